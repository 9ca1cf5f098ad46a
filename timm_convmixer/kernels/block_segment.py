"""A ConvMixer block in training that keeps two maps for its backward pass: the outputs of its two convolutions.

Patches Are All You Need? (https://arxiv.org/abs/2201.09792), section 2. Autograd keeps six maps a block: the inputs of
the two convolutions, of the two activations and of the two normalisations. All of them follow from the outputs of the
convolutions by an activation and an affine, which cost a pass over memory each, where a convolution costs many. So the
backward pass computes them again, and nothing that is expensive. The unit is a segment from one pointwise convolution
to the next::

    x = norm(act(z))                        # the end of the block before, or of the stem
    y = x + spatial_norm(spatial_act(depthwise(x)))
    z = pointwise(y)

Knows tensors alone; `timm_convmixer.layers` says which blocks it serves.
"""
from typing import NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F

from .. import kernels
from .activation import activate, activate_backward_in_place, activate_into
from .cpu.depthwise import depthwise_input_gradient_cpu, depthwise_weight_gradient_cpu, weight_gradient_refusal
from .cpu.workspace import Workspace
from .gpu.support import is_interpreted, training_refusal
from .support import is_transformed, use_fused

__all__ = ['BatchNormalization', 'block_segment', 'block_segment_ref', 'block_segment_support']


class BatchNormalization(NamedTuple):
    """A batch normalisation after its activation.

    Attributes:
        act: Activation before it, 'gelu' (with the error function), 'relu' or 'none'.
        weight: Scale, (C,), or None.
        bias: Shift, (C,), or None.
        running_mean: (C,) or None; updated in place if `batch_statistics`.
        running_var: (C,) or None; updated in place if `batch_statistics`.
        batch_statistics: Whether to normalise by the statistics of the batch instead of the running ones.
        momentum: Weight of the batch in the update of the running statistics.
        eps: Added to the variance.
    """
    act: str
    weight: Optional[torch.Tensor]
    bias: Optional[torch.Tensor]
    running_mean: Optional[torch.Tensor]
    running_var: Optional[torch.Tensor]
    batch_statistics: bool
    momentum: float
    eps: float


def block_segment_ref(
        z: torch.Tensor,
        norm: Optional[BatchNormalization],
        depthwise_weight: torch.Tensor,
        depthwise_bias: Optional[torch.Tensor],
        spatial_norm: BatchNormalization,
        drop_path_scale: Optional[torch.Tensor],
        pointwise_weight: torch.Tensor,
        pointwise_bias: Optional[torch.Tensor],
) -> torch.Tensor:
    """`block_segment` in plain PyTorch, for autograd to keep what it likes."""
    def normalize(x: torch.Tensor, norm: BatchNormalization) -> torch.Tensor:
        return F.batch_norm(activate(x, norm.act), norm.running_mean, norm.running_var, norm.weight, norm.bias,
                            norm.batch_statistics, norm.momentum, norm.eps)

    x = z if norm is None else normalize(z, norm)
    groups = depthwise_weight.shape[0]
    branch = normalize(F.conv2d(x, depthwise_weight, depthwise_bias, padding='same', groups=groups), spatial_norm)
    y = x + (branch if drop_path_scale is None else branch * drop_path_scale)
    return F.conv2d(y, pointwise_weight, pointwise_bias)


def _on_kernels(x: torch.Tensor) -> bool:
    return (x.is_cuda or is_interpreted()) and not training_refusal(x.device, x.dtype, x.shape, 1)


class _Affine(NamedTuple):
    """What a normalisation did to a batch: enough to do it again, bit for bit, and backwards."""
    act: str
    weight: Optional[torch.Tensor]
    bias: Optional[torch.Tensor]
    mean: torch.Tensor
    var: torch.Tensor
    batch_statistics: bool
    eps: float

    def invstd(self) -> torch.Tensor:
        return torch.rsqrt(self.var + self.eps)

    def scale_and_shift(self) -> Tuple[torch.Tensor, torch.Tensor]:
        scale = self.invstd() if self.weight is None else self.invstd() * self.weight
        shift = -self.mean * scale
        return scale, shift if self.bias is None else shift + self.bias


def _affine(
        x: torch.Tensor,
        norm: BatchNormalization,
        weight: Optional[torch.Tensor],
        bias: Optional[torch.Tensor],
        mean: torch.Tensor,
        var: torch.Tensor,
) -> _Affine:
    # Float32 as the arithmetic's, whatever the dtype of the parameters: what is computed again must be the same.
    dtype = torch.promote_types(x.dtype, torch.float32)
    weight, bias = (None if t is None else t.detach().to(dtype) for t in (weight, bias))
    return _Affine(norm.act, weight, bias, mean.to(dtype), var.to(dtype), norm.batch_statistics, norm.eps)


def _statistics(x: torch.Tensor, activated: Optional[torch.Tensor], norm: BatchNormalization) -> _Affine:
    """The statistics that a normalisation uses, after the update of its running ones."""
    mean: torch.Tensor
    var: torch.Tensor
    if not norm.batch_statistics and norm.running_mean is not None and norm.running_var is not None:
        # Copies: training goes on to update the running ones, maybe before this batch's backward pass.
        mean, var = norm.running_mean.clone(), norm.running_var.clone()
    elif activated is not None:
        mean, var = torch.batch_norm_update_stats(activated, norm.running_mean, norm.running_var, norm.momentum)
    else:
        mean, var = kernels.activation_statistics(x, norm.act)
        if norm.running_mean is not None and norm.running_var is not None:
            count = x.numel() // x.shape[1]
            norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), norm.momentum)
            norm.running_var.lerp_((var * (count / (count - 1))).to(norm.running_var.dtype), norm.momentum)
    return _affine(x, norm, norm.weight, norm.bias, mean, var)


def _activated(x: torch.Tensor, act: str, workspace: Workspace) -> Optional[torch.Tensor]:
    """The activation of a map as a map of its own, None where a kernel has it within each of its passes."""
    return None if _on_kernels(x) else activate_into(workspace.take(x), x, act)


def _apply(
        x: torch.Tensor,
        activated: Optional[torch.Tensor],
        affine: _Affine,
        residual: Optional[torch.Tensor] = None,
        branch_scale: Optional[torch.Tensor] = None,
        out: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """`residual + branch_scale * norm(act(x))`; `out` may be `activated`."""
    scale, shift = affine.scale_and_shift()
    if activated is None:
        if branch_scale is None:
            return kernels.activation_affine(x, scale, shift, affine.act, residual)
        return kernels.activation_affine(x, scale, shift, affine.act).mul_(branch_scale).add_(residual)
    if activated.dtype == scale.dtype:
        out = torch.addcmul(shift.view(-1, 1, 1), activated, scale.view(-1, 1, 1), out=out)
    else:
        # Half precision: one rounding, as PyTorch's own normalisation.
        out = F.batch_norm(activated, affine.mean, affine.var, affine.weight, affine.bias, False, 0., affine.eps)
    if branch_scale is not None:
        out.mul_(branch_scale)
    return out if residual is None else out.add_(residual)


def _backward(
        grad: torch.Tensor,
        x: torch.Tensor,
        activated: Optional[torch.Tensor],
        affine: _Affine,
        scratch: torch.Tensor,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `norm(act(x))` with respect to x, weight and bias; `activated` and `scratch` are overwritten."""
    invstd = affine.invstd()
    if activated is None:
        return kernels.activation_norm_backward(
            grad, x, affine.act, affine.weight, affine.mean, invstd, affine.batch_statistics)
    if activated.dtype != invstd.dtype:
        grad, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grad, activated, affine.weight, affine.mean, affine.var, affine.mean, invstd, affine.batch_statistics,
            affine.eps, [True, affine.weight is not None, affine.bias is not None],
        )
        return activate_backward_in_place(grad, x, affine.act), grad_weight, grad_bias
    # In place, since on a CPU fresh memory costs more than what is computed into it.
    centered = activated.sub_(affine.mean.view(-1, 1, 1))
    grad_bias = grad.sum(dim=(0, 2, 3))
    grad_weight = torch.mul(grad, centered, out=scratch).sum(dim=(0, 2, 3)) * invstd
    scale = invstd if affine.weight is None else invstd * affine.weight
    if affine.batch_statistics:
        share = -scale / (x.numel() // x.shape[1])
        out = torch.addcmul(
            (share * grad_bias).view(-1, 1, 1), centered, (share * grad_weight * invstd).view(-1, 1, 1), out=centered)
        out.addcmul_(grad, scale.view(-1, 1, 1))
    else:
        out = torch.mul(grad, scale.view(-1, 1, 1), out=centered)
    return activate_backward_in_place(out, x, affine.act), grad_weight, grad_bias


def _depthwise(x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor]) -> torch.Tensor:
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if _on_kernels(x):
        return kernels.depthwise_convolution(x, weight, bias)
    return F.conv2d(x, weight, bias, padding='same', groups=weight.shape[0])


def _depthwise_backward(
        grad: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        residual: torch.Tensor,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the depthwise convolution: of x, to which `residual` is added, of its weight and of its bias."""
    channels, kernel_size = weight.shape[0], weight.shape[-1]
    weight = weight.to(x.dtype)
    if _on_kernels(x):
        return (
            kernels.depthwise_input_gradient(grad, weight, residual.contiguous()),
            *kernels.depthwise_weight_gradient(x, grad, kernel_size),
        )
    if x.device.type == 'cpu' and not weight_gradient_refusal(x, weight):
        grad_x = depthwise_input_gradient_cpu(grad, weight)
        grad_weight, grad_bias = depthwise_weight_gradient_cpu(x, grad, kernel_size), grad.sum(dim=(0, 2, 3))
    else:
        # An even kernel's padding, one more on the right and the bottom, is not a convolution's own.
        extra, padding = 1 - kernel_size % 2, (kernel_size - 1) // 2
        padded = F.pad(x, (0, extra, 0, extra)) if extra else x
        grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
            grad, padded, weight, [channels], [1, 1], [padding, padding], [1, 1], False, [0, 0], channels, [True] * 3)
        grad_x = grad_x[:, :, :x.shape[2], :x.shape[3]]
    return grad_x.add_(residual), grad_weight, grad_bias


def _pointwise_backward(
        grad: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        needs_weight: bool,
        needs_bias: bool,
) -> Tuple[torch.Tensor, Optional[torch.Tensor], Optional[torch.Tensor]]:
    """Gradients of the pointwise convolution with respect to x, its weight and its bias."""
    return torch.ops.aten.convolution_backward(
        grad, x, weight.to(x.dtype), [weight.shape[0]], [1, 1], [0, 0], [1, 1], False, [0, 0], 1,
        [True, needs_weight, needs_bias],
    )


class _BlockSegment(torch.autograd.Function):
    """Takes the parameters of the normalisations once more as tensors of their own, for autograd to see them."""

    @staticmethod
    def forward(
            ctx,
            z: torch.Tensor,
            norm: Optional[BatchNormalization],
            norm_weight: Optional[torch.Tensor],
            norm_bias: Optional[torch.Tensor],
            depthwise_weight: torch.Tensor,
            depthwise_bias: Optional[torch.Tensor],
            spatial_norm: BatchNormalization,
            spatial_weight: Optional[torch.Tensor],
            spatial_bias: Optional[torch.Tensor],
            drop_path_scale: Optional[torch.Tensor],
            pointwise_weight: torch.Tensor,
            pointwise_bias: Optional[torch.Tensor],
            keep_depthwise: bool,
            workspace: Workspace,
    ) -> torch.Tensor:
        ctx.set_materialize_grads(False)
        # Everything is cast here: what autocast would cast for the backward pass, it would cast again there.
        with torch.autocast(z.device.type, enabled=False):
            x, affine = z, None
            if norm is not None:
                activated = _activated(z, norm.act, workspace)
                affine = _statistics(z, activated, norm)
                x = _apply(z, activated, affine, out=activated)
            mixed = _depthwise(x, depthwise_weight, depthwise_bias)
            activated = _activated(mixed, spatial_norm.act, workspace)
            spatial_affine = _statistics(mixed, activated, spatial_norm)
            y = _apply(mixed, activated, spatial_affine, x, drop_path_scale, out=activated)
            bias = None if pointwise_bias is None else pointwise_bias.to(y.dtype)
            out = F.conv2d(y, pointwise_weight.to(y.dtype), bias)
        workspace.give(y)
        if x is not z:
            workspace.give(x)
        ctx.norm, ctx.spatial_norm, ctx.workspace = norm, spatial_norm, workspace
        ctx.statistics = [None if a is None else (a.mean, a.var) for a in (affine, spatial_affine)]
        ctx.save_for_backward(
            z, norm_weight, norm_bias, depthwise_weight, depthwise_bias, spatial_weight, spatial_bias, drop_path_scale,
            pointwise_weight, pointwise_bias, mixed if keep_depthwise else None)
        return out

    @staticmethod
    def backward(ctx, grad: Optional[torch.Tensor]):
        if grad is None:
            return (None,) * 14
        if torch.is_grad_enabled():
            return _BlockSegment._differentiable_backward(ctx, grad)
        (
            z, norm_weight, norm_bias, depthwise_weight, depthwise_bias, spatial_weight, spatial_bias, drop_path_scale,
            pointwise_weight, pointwise_bias, mixed,
        ) = ctx.saved_tensors
        needs, workspace = ctx.needs_input_grad, ctx.workspace

        x = z
        if ctx.norm is not None:
            first = _affine(z, ctx.norm, norm_weight, norm_bias, *ctx.statistics[0])
            activated = _activated(z, first.act, workspace)
            x = _apply(z, activated, first, out=activated)
        second = _affine(z, ctx.spatial_norm, spatial_weight, spatial_bias, *ctx.statistics[1])
        if mixed is None:
            mixed = _depthwise(x, depthwise_weight, depthwise_bias)
        activated = _activated(mixed, second.act, workspace)
        y = _apply(
            mixed,
            activated,
            second,
            x,
            drop_path_scale,
            out=None if activated is None else workspace.take(mixed),
        )

        grad, pointwise_weight_grad, pointwise_bias_grad = _pointwise_backward(
            grad, y, pointwise_weight, needs[10], pointwise_bias is not None and needs[11])
        branch_grad = grad if drop_path_scale is None else grad * drop_path_scale
        mixed_grad, spatial_weight_grad, spatial_bias_grad = _backward(branch_grad, mixed, activated, second, scratch=y)
        del activated, branch_grad, mixed
        x_grad, depthwise_weight_grad, depthwise_bias_grad = _depthwise_backward(mixed_grad, x, depthwise_weight, grad)
        workspace.give(mixed_grad, grad)
        del mixed_grad, grad
        z_grad, norm_weight_grad, norm_bias_grad = x_grad, None, None
        if ctx.norm is not None:
            workspace.give(x)
            activated = _activated(z, first.act, workspace)
            z_grad, norm_weight_grad, norm_bias_grad = _backward(x_grad, z, activated, first, scratch=y)
            workspace.give(x_grad)
        workspace.give(y)

        def cast(gradient: Optional[torch.Tensor], parameter: Optional[torch.Tensor]) -> Optional[torch.Tensor]:
            return None if gradient is None or parameter is None else gradient.to(parameter.dtype)

        return (
            z_grad if needs[0] else None,
            None,
            cast(norm_weight_grad, norm_weight),
            cast(norm_bias_grad, norm_bias),
            cast(depthwise_weight_grad, depthwise_weight),
            cast(depthwise_bias_grad, depthwise_bias),
            None,
            cast(spatial_weight_grad, spatial_weight),
            cast(spatial_bias_grad, spatial_bias),
            None,
            cast(pointwise_weight_grad, pointwise_weight),
            cast(pointwise_bias_grad, pointwise_bias),
            None,
            None,
        )

    @staticmethod
    def _differentiable_backward(ctx, grad: torch.Tensor):
        """The gradients by plain PyTorch, for a second derivative."""
        (
            z, norm_weight, norm_bias, depthwise_weight, depthwise_bias, spatial_weight, spatial_bias, drop_path_scale,
            pointwise_weight, pointwise_bias, _,
        ) = ctx.saved_tensors

        def without_update(norm: BatchNormalization, weight, bias) -> BatchNormalization:
            if norm.batch_statistics:
                norm = norm._replace(running_mean=None, running_var=None)
            return norm._replace(weight=weight, bias=bias)

        norm = ctx.norm
        out = block_segment_ref(
            z,
            norm if norm is None else without_update(norm, norm_weight, norm_bias),
            depthwise_weight,
            depthwise_bias,
            without_update(ctx.spatial_norm, spatial_weight, spatial_bias),
            drop_path_scale,
            pointwise_weight,
            pointwise_bias,
        )
        inputs = [
            z, None, norm_weight, norm_bias, depthwise_weight, depthwise_bias, None, spatial_weight, spatial_bias, None,
            pointwise_weight, pointwise_bias, None, None,
        ]
        wanted = [tensor for tensor, needed in zip(inputs, ctx.needs_input_grad) if needed]
        gradients = iter(torch.autograd.grad(out, wanted, grad, create_graph=True))
        return tuple(next(gradients) if needed else None for needed in ctx.needs_input_grad)


def block_segment_support(z: torch.Tensor) -> str:
    """Why a segment is left to autograd for its input, or '' if it keeps two maps."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return 'compiled or traced'
    if not use_fused():
        return 'switched off (TIMM_CONVMIXER_FUSED=0 or set_fused(False))'
    if not torch.is_grad_enabled():
        return 'no gradients are needed'
    if type(z) is not torch.Tensor or is_transformed():
        return 'not a plain tensor, or within a transform of torch.func or forward-mode differentiation'
    if z.device.type not in ('cpu', 'cuda'):
        return 'neither on a CPU nor on a GPU'
    if z.numel() <= z.shape[1]:
        return 'empty, or one value per channel, of which there are no statistics'
    if torch.is_autocast_enabled(z.device.type) and z.dtype != torch.get_autocast_dtype(z.device.type):
        return 'autocast would cast it'
    if z.device.type == 'cpu':
        return '' if z.dtype != torch.float16 else 'dtype is float16'
    # Elsewhere what is computed again must cost less than it saves, which takes the kernels.
    return training_refusal(z.device, z.dtype, z.shape, 1)


def block_segment(
        z: torch.Tensor,
        norm: Optional[BatchNormalization],
        depthwise_weight: torch.Tensor,
        depthwise_bias: Optional[torch.Tensor],
        spatial_norm: BatchNormalization,
        drop_path_scale: Optional[torch.Tensor],
        pointwise_weight: torch.Tensor,
        pointwise_bias: Optional[torch.Tensor],
        keep_depthwise: bool = True,
        workspace: Optional[Workspace] = None,
) -> torch.Tensor:
    """From one pointwise convolution to the next, keeping `z` and the output of the depthwise convolution for autograd.

    The plain PyTorch equivalent is `block_segment_ref`. Under autocast `z` must have autocast's dtype, in which the
    convolutions then run. Differentiable twice, the second time by the reference.

    Args:
        z: Output of the pointwise convolution before, or of the stem's, (B, C, H, W).
        norm: Activation and normalisation of `z`, None if it has had them.
        depthwise_weight: (C, 1, k, k); an even k pads one more on the right and the bottom.
        depthwise_bias: (C,) or None.
        spatial_norm: Activation and normalisation after the depthwise convolution.
        drop_path_scale: What stochastic depth multiplies each image's branch by, (B, 1, 1, 1), or None.
        pointwise_weight: (C, C, 1, 1).
        pointwise_bias: (C,) or None.
        keep_depthwise: Whether to keep the output of the depthwise convolution, or compute that again as well.
        workspace: Shared by the segments of one forward pass, None for one of its own.

    Returns:
        Output of the pointwise convolution, (B, C, H, W).
    """
    return _BlockSegment.apply(
        z,
        norm,
        None if norm is None else norm.weight,
        None if norm is None else norm.bias,
        depthwise_weight,
        depthwise_bias,
        spatial_norm,
        spatial_norm.weight,
        spatial_norm.bias,
        drop_path_scale,
        pointwise_weight,
        pointwise_bias,
        keep_depthwise,
        Workspace() if workspace is None else workspace,
    )
