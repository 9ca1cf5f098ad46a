"""A segment of a ConvMixer in training that keeps two feature maps for its backward pass, where autograd keeps six.

Autograd keeps the inputs of the two convolutions, of the two activations and of the two normalisations. All of them
follow from the outputs of the convolutions by an activation and an affine, a pass over memory each, so the backward
pass recomputes them. A segment runs from one pointwise convolution to the next::

    x = norm(act(z))                        # the end of the block before, or of the stem
    y = x + spatial_norm(spatial_act(depthwise(x)))
    z = pointwise(y)

Source of the equations: Patches Are All You Need?, section 2, https://arxiv.org/abs/2201.09792.
"""
from typing import List, Optional, Protocol, Tuple

import torch
import torch.nn.functional as F

from .activation import activate
from .normalization import Affine, BatchNormalization
from .support import is_observed, is_transformed

__all__ = ['Passes', 'block_segment', 'block_segment_ref']


class Passes(Protocol):
    """How a device runs the passes of a segment: ``cpu/passes.py`` documents the methods."""

    def normalize(
            self,
            x: torch.Tensor,
            norm: BatchNormalization,
            residual: Optional[torch.Tensor] = None,
            branch_scale: Optional[torch.Tensor] = None,
    ) -> Tuple[torch.Tensor, Affine]: ...

    def apply(
            self,
            x: torch.Tensor,
            affine: Affine,
            residual: Optional[torch.Tensor] = None,
            branch_scale: Optional[torch.Tensor] = None,
            keep_activated: bool = False,
    ) -> Tuple[torch.Tensor, Optional[torch.Tensor]]: ...

    def backward(
            self,
            grad: torch.Tensor,
            x: torch.Tensor,
            activated: Optional[torch.Tensor],
            affine: Affine,
            scratch: torch.Tensor,
    ) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]: ...

    def depthwise(self, x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor]) -> torch.Tensor: ...

    def depthwise_backward(
            self,
            grad: torch.Tensor,
            x: torch.Tensor,
            weight: torch.Tensor,
            residual: torch.Tensor,
    ) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]: ...

    def release(self, *maps: torch.Tensor) -> None: ...


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
    """``block_segment`` in plain PyTorch; autograd keeps what it likes."""
    def normalize(x: torch.Tensor, norm: BatchNormalization) -> torch.Tensor:
        return F.batch_norm(activate(x, norm.act), norm.running_mean, norm.running_var, norm.weight, norm.bias,
                            norm.batch_statistics, norm.momentum, norm.eps)

    x = z if norm is None else normalize(z, norm)
    groups = depthwise_weight.shape[0]
    branch = normalize(F.conv2d(x, depthwise_weight, depthwise_bias, padding='same', groups=groups), spatial_norm)
    y = x + (branch if drop_path_scale is None else branch * drop_path_scale)
    return F.conv2d(y, pointwise_weight, pointwise_bias)


def _pointwise_backward(
        grad: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        needs_weight: bool,
        needs_bias: bool,
) -> Tuple[torch.Tensor, Optional[torch.Tensor], Optional[torch.Tensor]]:
    """Gradients of the pointwise convolution: of ``x``, its weight and its bias."""
    return torch.ops.aten.convolution_backward(
        grad, x, weight, [weight.shape[0]], [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [True, needs_weight, needs_bias])


def _as_gradient_of(parameter: Optional[torch.Tensor], grad: Optional[torch.Tensor]) -> Optional[torch.Tensor]:
    """A gradient in the dtype and memory format of its parameter, whatever the segment computes in."""
    if grad is None or parameter is None:
        return None
    grad = grad.to(parameter.dtype)
    return grad.contiguous() if parameter.is_contiguous() else grad


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
            passes: Passes,
    ) -> torch.Tensor:
        ctx.set_materialize_grads(False)

        def cast(tensor: Optional[torch.Tensor]) -> Optional[torch.Tensor]:
            return None if tensor is None else tensor.to(z.dtype)

        # Everything is cast here: what autocast would cast for the backward pass, it would cast again there.
        with torch.autocast(z.device.type, enabled=False):
            x, affine = (z, None) if norm is None else passes.normalize(z, norm)
            mixed = passes.depthwise(x, cast(depthwise_weight), cast(depthwise_bias))
            y, spatial_affine = passes.normalize(mixed, spatial_norm, x, drop_path_scale)
            out = F.conv2d(y, cast(pointwise_weight), cast(pointwise_bias))
        passes.release(y)
        if x is not z:
            passes.release(x)
        ctx.norm, ctx.spatial_norm, ctx.passes = norm, spatial_norm, passes
        ctx.statistics = [None if a is None else (a.mean, a.var) for a in (affine, spatial_affine)]
        ctx.save_for_backward(
            z, norm_weight, norm_bias, depthwise_weight, depthwise_bias, spatial_weight, spatial_bias, drop_path_scale,
            pointwise_weight, pointwise_bias, mixed if keep_depthwise else None)
        return out

    @staticmethod
    def backward(ctx, grad: Optional[torch.Tensor]):
        if grad is None:
            return (None,) * 14
        if torch.is_grad_enabled() or is_transformed(grad) or is_observed() or type(grad) is not torch.Tensor:
            return _BlockSegment._reference_backward(ctx, grad)
        (
            z, norm_weight, norm_bias, depthwise_weight, depthwise_bias, spatial_weight, spatial_bias, drop_path_scale,
            pointwise_weight, pointwise_bias, mixed,
        ) = ctx.saved_tensors
        needs, passes = ctx.needs_input_grad, ctx.passes
        norm, spatial_norm = ctx.norm, ctx.spatial_norm._replace(weight=spatial_weight, bias=spatial_bias)
        spatial_affine = spatial_norm.affine(z.dtype, *ctx.statistics[1])

        x, affine = z, None
        if norm is not None:
            affine = norm._replace(weight=norm_weight, bias=norm_bias).affine(z.dtype, *ctx.statistics[0])
            x, _ = passes.apply(z, affine)
        if mixed is None:
            bias = None if depthwise_bias is None else depthwise_bias.to(z.dtype)
            mixed = passes.depthwise(x, depthwise_weight.to(z.dtype), bias)
        y, activated = passes.apply(mixed, spatial_affine, x, drop_path_scale, keep_activated=True)

        grad, pointwise_weight_grad, pointwise_bias_grad = _pointwise_backward(
            grad, y, pointwise_weight.to(z.dtype), needs[10], pointwise_bias is not None and needs[11])
        branch_grad = grad if drop_path_scale is None else grad * drop_path_scale
        mixed_grad, spatial_weight_grad, spatial_bias_grad = passes.backward(
            branch_grad, mixed, activated, spatial_affine, scratch=y)
        # Held no longer than they are needed: these are what a step takes at its peak.
        del activated, branch_grad, mixed
        x_grad, depthwise_weight_grad, depthwise_bias_grad = passes.depthwise_backward(
            mixed_grad, x, depthwise_weight.to(z.dtype), grad)
        passes.release(mixed_grad, grad)
        del mixed_grad, grad
        z_grad, norm_weight_grad, norm_bias_grad = x_grad, None, None
        if affine is not None:
            passes.release(x)
            z_grad, norm_weight_grad, norm_bias_grad = passes.backward(x_grad, z, None, affine, scratch=y)
            passes.release(x_grad)
        passes.release(y)
        return (
            z_grad if needs[0] else None,
            None,
            _as_gradient_of(norm_weight, norm_weight_grad),
            _as_gradient_of(norm_bias, norm_bias_grad),
            _as_gradient_of(depthwise_weight, depthwise_weight_grad),
            _as_gradient_of(depthwise_bias, depthwise_bias_grad),
            None,
            _as_gradient_of(spatial_weight, spatial_weight_grad),
            _as_gradient_of(spatial_bias, spatial_bias_grad),
            None,
            _as_gradient_of(pointwise_weight, pointwise_weight_grad),
            _as_gradient_of(pointwise_bias, pointwise_bias_grad),
            None,
            None,
        )

    @staticmethod
    def _reference_backward(ctx, grad: torch.Tensor):
        """The gradients by the reference, which can be differentiated again, batched and observed."""
        (
            z, norm_weight, norm_bias, depthwise_weight, depthwise_bias, spatial_weight, spatial_bias, drop_path_scale,
            pointwise_weight, pointwise_bias, _,
        ) = ctx.saved_tensors
        needs = ctx.needs_input_grad

        def without_update(norm: BatchNormalization, weight, bias) -> BatchNormalization:
            if norm.batch_statistics:
                norm = norm._replace(running_mean=None, running_var=None)
            return norm._replace(weight=weight, bias=bias)

        def cast(tensor: Optional[torch.Tensor]) -> Optional[torch.Tensor]:
            return None if tensor is None else tensor.to(z.dtype)

        create_graph = torch.is_grad_enabled()
        with torch.enable_grad(), torch.autocast(z.device.type, enabled=False):
            if not create_graph:
                # Nothing beyond this segment is to be differentiated, and batched gradients bear no channels last.
                z = z.detach().contiguous().requires_grad_(needs[0])
            norm = ctx.norm
            out = block_segment_ref(
                z,
                norm if norm is None else without_update(norm, norm_weight, norm_bias),
                cast(depthwise_weight),
                cast(depthwise_bias),
                without_update(ctx.spatial_norm, spatial_weight, spatial_bias),
                drop_path_scale,
                cast(pointwise_weight),
                cast(pointwise_bias),
            )
            inputs: List[Optional[torch.Tensor]] = [
                z, None, norm_weight, norm_bias, depthwise_weight, depthwise_bias, None, spatial_weight, spatial_bias,
                None, pointwise_weight, pointwise_bias, None, None,
            ]
            wanted = [tensor for tensor, needed in zip(inputs, needs) if needed]
            gradients = iter(torch.autograd.grad(out, wanted, grad, create_graph=create_graph))
        return tuple(next(gradients) if needed else None for needed in needs)


def block_segment(
        z: torch.Tensor,
        norm: Optional[BatchNormalization],
        depthwise_weight: torch.Tensor,
        depthwise_bias: Optional[torch.Tensor],
        spatial_norm: BatchNormalization,
        drop_path_scale: Optional[torch.Tensor],
        pointwise_weight: torch.Tensor,
        pointwise_bias: Optional[torch.Tensor],
        passes: Passes,
        keep_depthwise: bool = True,
) -> torch.Tensor:
    """From one pointwise convolution to the next, keeping ``z`` and the depthwise convolution's output for autograd.

    The plain PyTorch equivalent is ``block_segment_ref``. The convolutions run in the dtype of ``z``. Differentiable
    any number of times, from the second on by the reference.

    Args:
        z: Output of the pointwise convolution before, or of the stem's, ``(B, C, H, W)``.
        norm: Activation and normalisation of ``z``, None if it has had them.
        depthwise_weight: ``(C, 1, k, k)``; an even k pads one more on the right and the bottom.
        depthwise_bias: ``(C,)`` or None.
        spatial_norm: Activation and normalisation after the depthwise convolution.
        drop_path_scale: What stochastic depth multiplies each image's branch by, ``(B, 1, 1, 1)``, or None.
        pointwise_weight: ``(C_out, C, 1, 1)``.
        pointwise_bias: ``(C_out,)`` or None.
        passes: How the device runs the passes: ``CpuPasses`` or ``GpuPasses``.
        keep_depthwise: Whether to keep the output of the depthwise convolution, or to recompute that as well.

    Returns:
        Output of the pointwise convolution, ``(B, C_out, H, W)``.
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
        passes,
    )
