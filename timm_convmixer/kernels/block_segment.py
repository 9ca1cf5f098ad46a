"""A segment of a ConvMixer in training that keeps two feature maps for its backward pass, where autograd keeps six.

Autograd keeps the inputs of the two convolutions, of the two activations and of the two normalisations. All of them
follow from the outputs of the convolutions by an activation and an affine, a pass over memory each, so the backward
pass recomputes them. A segment runs from one pointwise convolution to the next::

    x = norm(act(z))                        # the end of the block before, or of the stem
    y = x + spatial_norm(spatial_act(depthwise(x)))
    z = pointwise(y)

Source of the equations: Patches Are All You Need?, section 2, https://arxiv.org/abs/2201.09792.
"""
from typing import List, NamedTuple, Optional, Protocol, Tuple

import torch
import torch.nn.functional as F

from .activation import activate
from .normalization import Affine, BatchNormalization
from .support import dense_memory_format, is_observed, is_transformed

__all__ = ['SegmentGradients', 'SegmentKernels', 'SegmentTensors', 'block_segment', 'block_segment_ref']


class SegmentTensors(NamedTuple):
    """The convolutions of a segment and its stochastic depth; :func:`block_segment` documents them."""
    depthwise_weight: torch.Tensor
    depthwise_bias: Optional[torch.Tensor]
    drop_path_scale: Optional[torch.Tensor]
    pointwise_weight: torch.Tensor
    pointwise_bias: Optional[torch.Tensor]

    def to(self, dtype: torch.dtype) -> 'SegmentTensors':
        return SegmentTensors(*[None if tensor is None else tensor.to(dtype) for tensor in self])

    def contiguous(self) -> 'SegmentTensors':
        return SegmentTensors(*[None if tensor is None else tensor.contiguous() for tensor in self])


class SegmentGradients(NamedTuple):
    """The gradients of a segment, in any floating-point dtype; those that do not exist are ignored."""
    z: torch.Tensor
    norm_weight: Optional[torch.Tensor]
    norm_bias: Optional[torch.Tensor]
    depthwise_weight: torch.Tensor
    depthwise_bias: torch.Tensor
    spatial_weight: torch.Tensor
    spatial_bias: torch.Tensor
    pointwise_weight: Optional[torch.Tensor]
    pointwise_bias: Optional[torch.Tensor]


class SegmentKernels(Protocol):
    """How a device runs a segment."""

    def forward(
            self,
            z: torch.Tensor,
            norm: Optional[BatchNormalization],
            spatial_norm: BatchNormalization,
            tensors: SegmentTensors,
    ) -> Tuple[torch.Tensor, torch.Tensor, Optional[Affine], Affine]:
        """Output, output of the depthwise convolution, and the affines of both normalisations; updates statistics."""
        ...

    def backward(
            self,
            grad: torch.Tensor,
            z: torch.Tensor,
            depthwise_out: Optional[torch.Tensor],
            affine: Optional[Affine],
            spatial_affine: Affine,
            tensors: SegmentTensors,
            needs_pointwise_weight: bool,
    ) -> SegmentGradients:
        """All gradients, given the one of the output; computes ``depthwise_out`` where that is None.

        That of the pointwise weight, half of the matrix products, is left out where nobody needs it.
        """
        ...


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
    """``block_segment`` in plain PyTorch, of which autograd keeps six feature maps.

    It counts no batches, and with a momentum of None leaves the running statistics as they are.
    """
    def normalize(x: torch.Tensor, norm: BatchNormalization) -> torch.Tensor:
        return F.batch_norm(activate(x, norm.act), norm.running_mean, norm.running_var, norm.weight, norm.bias,
                            norm.batch_statistics, norm.momentum or 0., norm.eps)

    x = z if norm is None else normalize(z, norm)
    groups = depthwise_weight.shape[0]
    branch = normalize(F.conv2d(x, depthwise_weight, depthwise_bias, padding='same', groups=groups), spatial_norm)
    y = x + (branch if drop_path_scale is None else branch * drop_path_scale)
    return F.conv2d(y, pointwise_weight, pointwise_bias)


def _as_gradient_of(parameter: Optional[torch.Tensor], grad: Optional[torch.Tensor]) -> Optional[torch.Tensor]:
    """A gradient in the dtype and memory format of its parameter, whatever the segment computes in."""
    if grad is None or parameter is None:
        return None
    grad = grad.to(parameter.dtype)
    return grad.contiguous(memory_format=dense_memory_format(parameter)) if grad.dim() == 4 else grad


def _versions(tensors: Tuple[Optional[torch.Tensor], ...]) -> List[int]:
    """How often each tensor has been changed in place, as far as PyTorch counts it."""
    return [0 if tensor is None or tensor.is_inference() else tensor._version for tensor in tensors]


def _to_recompute(norm: Optional[BatchNormalization]) -> Optional[BatchNormalization]:
    """A normalisation that computes again what it computed, whatever has become of its running statistics."""
    if norm is None or norm.running_mean is None or norm.running_var is None:
        return norm
    if norm.batch_statistics and (norm.weight is not None or norm.bias is not None):
        return norm._replace(running_mean=None, running_var=None)
    # Of batch statistics only the dtype matters: without any vector in float32, F.batch_norm rounds to half precision.
    return norm._replace(running_mean=norm.running_mean.clone(), running_var=norm.running_var.clone())


# Among the arguments of _BlockSegment.forward.
_POINTWISE_WEIGHT = 10


class _BlockSegment(torch.autograd.Function):
    """Takes the parameters of the normalisations a second time: autograd sees only tensors that are arguments."""

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
            kernels: SegmentKernels,
    ) -> torch.Tensor:
        ctx.set_materialize_grads(False)
        tensors = SegmentTensors(depthwise_weight, depthwise_bias, drop_path_scale, pointwise_weight, pointwise_bias)
        # Kernels cast what they are given themselves; autocast would cast it again for the backward pass.
        with torch.autocast(z.device.type, enabled=False):
            out, depthwise_out, affine, spatial_affine = kernels.forward(z, norm, spatial_norm, tensors)
        ctx.norm, ctx.spatial_norm, ctx.kernels = _to_recompute(norm), _to_recompute(spatial_norm), kernels
        ctx.affine, ctx.spatial_affine = affine, spatial_affine
        # No gradient depends on their values. Saved by autograd, they could not change before the backward pass.
        ctx.biases = norm_bias, depthwise_bias, spatial_bias, pointwise_bias
        ctx.versions = _versions(ctx.biases)
        ctx.save_for_backward(
            z, norm_weight, depthwise_weight, None if keep_depthwise else depthwise_bias, spatial_weight,
            drop_path_scale, pointwise_weight, depthwise_out if keep_depthwise else None)
        return out

    @staticmethod
    def backward(ctx, grad: Optional[torch.Tensor]):
        if grad is None:
            return (None,) * 14
        if torch.is_grad_enabled() or is_transformed(grad) or is_observed() or type(grad) is not torch.Tensor:
            return _BlockSegment._reference_backward(ctx, grad)
        (
            z, norm_weight, depthwise_weight, _, spatial_weight, drop_path_scale, pointwise_weight, depthwise_out,
        ) = ctx.saved_tensors
        norm_bias, depthwise_bias, spatial_bias, pointwise_bias = ctx.biases
        tensors = SegmentTensors(depthwise_weight, depthwise_bias, drop_path_scale, pointwise_weight, pointwise_bias)
        # A backward pass may be called within autocast as well.
        with torch.autocast(z.device.type, enabled=False):
            gradients = ctx.kernels.backward(
                grad,
                z,
                depthwise_out,
                ctx.affine,
                ctx.spatial_affine,
                tensors,
                ctx.needs_input_grad[_POINTWISE_WEIGHT],
            )
        result = (
            gradients.z,
            None,
            _as_gradient_of(norm_weight, gradients.norm_weight),
            _as_gradient_of(norm_bias, gradients.norm_bias),
            _as_gradient_of(depthwise_weight, gradients.depthwise_weight),
            _as_gradient_of(depthwise_bias, gradients.depthwise_bias),
            None,
            _as_gradient_of(spatial_weight, gradients.spatial_weight),
            _as_gradient_of(spatial_bias, gradients.spatial_bias),
            None,
            _as_gradient_of(pointwise_weight, gradients.pointwise_weight),
            _as_gradient_of(pointwise_bias, gradients.pointwise_bias),
            None,
            None,
        )
        # Anomaly detection looks at all that is returned.
        return tuple(grad if needed else None for grad, needed in zip(result, ctx.needs_input_grad))

    @staticmethod
    def _reference_backward(ctx, grad: torch.Tensor):
        """The gradients by the reference, which can be differentiated again, batched and observed."""
        z, norm_weight, depthwise_weight, _, spatial_weight, drop_path_scale, pointwise_weight, _ = ctx.saved_tensors
        norm_bias, depthwise_bias, spatial_bias, pointwise_bias = ctx.biases
        if _versions(ctx.biases) != ctx.versions:
            raise RuntimeError(
                'one of the variables needed for gradient computation has been modified by an inplace operation: a '
                'bias of a ConvMixer block, which this kind of backward pass computes with again')
        needs = ctx.needs_input_grad

        def cast(tensor: Optional[torch.Tensor]) -> Optional[torch.Tensor]:
            return None if tensor is None else tensor.to(z.dtype)

        create_graph = torch.is_grad_enabled()

        def alias(tensor: Optional[torch.Tensor], needed: bool) -> Optional[torch.Tensor]:
            """A tensor of its own for each argument, so that its gradient is that of the argument alone."""
            if tensor is None:
                return None
            if tensor.requires_grad or not needed:
                return tensor.view_as(tensor)
            # Frozen since the forward pass.
            return tensor.detach().requires_grad_()

        with torch.enable_grad(), torch.autocast(z.device.type, enabled=False):
            # Batched gradients cannot be in channels last.
            z = z if create_graph else z.contiguous()
            inputs: List[Optional[torch.Tensor]] = [
                z, None, norm_weight, norm_bias, depthwise_weight, depthwise_bias, None, spatial_weight, spatial_bias,
                None, pointwise_weight, pointwise_bias, None, None,
            ]
            inputs = [alias(tensor, needed) for tensor, needed in zip(inputs, needs)]
            (
                z, _, norm_weight, norm_bias, depthwise_weight, depthwise_bias, _, spatial_weight, spatial_bias,
                _, pointwise_weight, pointwise_bias, _, _,
            ) = inputs
            norm = ctx.norm
            out = block_segment_ref(
                z,
                norm if norm is None else norm._replace(weight=norm_weight, bias=norm_bias),
                cast(depthwise_weight),
                cast(depthwise_bias),
                ctx.spatial_norm._replace(weight=spatial_weight, bias=spatial_bias),
                drop_path_scale,
                cast(pointwise_weight),
                cast(pointwise_bias),
            )
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
        kernels: SegmentKernels,
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
        kernels: How the device runs it: ``CpuSegment`` or ``GpuSegment``.
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
        kernels,
    )
