"""A training segment on a GPU, by the Triton kernels, which apply an activation within each pass over memory."""
from typing import Optional, Tuple

import torch

from ..block_segment import SegmentGradients, SegmentTensors
from ..normalization import Affine, BatchNormalization
from .activation_affine import activation_affine
from .activation_norm_backward import activation_norm_backward
from .activation_statistics import activation_batch_norm
from .depthwise import depthwise_convolution, depthwise_input_gradient
from .depthwise_weight_gradient import depthwise_weight_gradient
from .pointwise import pointwise_convolution, pointwise_input_gradient
from .pointwise_weight_gradient import pointwise_weight_gradient

__all__ = ['GpuSegment']


class GpuSegment:
    """The forward and backward pass of :func:`timm_convmixer.kernels.block_segment.block_segment`."""

    def forward(
            self,
            z: torch.Tensor,
            norm: Optional[BatchNormalization],
            spatial_norm: BatchNormalization,
            tensors: SegmentTensors,
    ) -> Tuple[torch.Tensor, torch.Tensor, Optional[Affine], Affine]:
        # A called block may return a feature map in any layout.
        z, tensors = z.contiguous(), tensors.contiguous()
        x, affine = z, None
        if norm is not None:
            affine = _batch_affine(z, norm)
            x = _normalize(z, affine)
        depthwise_out = depthwise_convolution(x, tensors.depthwise_weight, tensors.depthwise_bias)
        spatial_affine = _batch_affine(depthwise_out, spatial_norm)
        y = _mix(x, depthwise_out, spatial_affine, tensors.drop_path_scale)
        out = pointwise_convolution(y, tensors.pointwise_weight.to(y.dtype), tensors.pointwise_bias)
        return out, depthwise_out, affine, spatial_affine

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
        z, grad, tensors = z.contiguous(), grad.contiguous(), tensors.contiguous()
        x = z if affine is None else _normalize(z, affine)
        if depthwise_out is None:
            depthwise_out = depthwise_convolution(x, tensors.depthwise_weight, tensors.depthwise_bias)
        y = _mix(x, depthwise_out, spatial_affine, tensors.drop_path_scale)
        pointwise_weight_grad = None
        if needs_pointwise_weight:
            pointwise_weight_grad, pointwise_bias_grad = pointwise_weight_gradient(y, grad)
        else:
            pointwise_bias_grad = grad.sum((0, 2, 3), dtype=torch.float32)
        # Held no longer than it is needed: this is where a step takes most memory.
        del y
        y_grad = pointwise_input_gradient(grad, tensors.pointwise_weight.to(grad.dtype))
        branch_grad = y_grad if tensors.drop_path_scale is None else y_grad * tensors.drop_path_scale
        depthwise_grad, spatial_weight_grad, spatial_bias_grad = _normalize_backward(
            branch_grad, depthwise_out, spatial_affine)
        del branch_grad
        x_grad = depthwise_input_gradient(depthwise_grad, tensors.depthwise_weight, y_grad)
        depthwise_weight_grad, depthwise_bias_grad = depthwise_weight_gradient(
            x, depthwise_grad, tensors.depthwise_weight.shape[-1])
        del x, y_grad, depthwise_grad
        z_grad, norm_weight_grad, norm_bias_grad = x_grad, None, None
        if affine is not None:
            z_grad, norm_weight_grad, norm_bias_grad = _normalize_backward(x_grad, z, affine)
        return SegmentGradients(
            z=z_grad,
            norm_weight=norm_weight_grad,
            norm_bias=norm_bias_grad,
            depthwise_weight=depthwise_weight_grad,
            depthwise_bias=depthwise_bias_grad,
            spatial_weight=spatial_weight_grad,
            spatial_bias=spatial_bias_grad,
            pointwise_weight=pointwise_weight_grad,
            pointwise_bias=pointwise_bias_grad,
        )


def _batch_affine(x: torch.Tensor, norm: BatchNormalization) -> Affine:
    """The affine that a normalisation is for a batch; updates its running statistics."""
    return norm.running_affine(x.dtype) or activation_batch_norm(x, norm)


def _normalize(x: torch.Tensor, affine: Affine, residual: Optional[torch.Tensor] = None) -> torch.Tensor:
    return activation_affine(x, affine.scale, affine.shift, affine.act, residual)


def _mix(
        x: torch.Tensor,
        depthwise_out: torch.Tensor,
        affine: Affine,
        drop_path_scale: Optional[torch.Tensor],
) -> torch.Tensor:
    if drop_path_scale is None:
        return _normalize(depthwise_out, affine, x)
    return _normalize(depthwise_out, affine).mul_(drop_path_scale).add_(x)


def _normalize_backward(
        grad: torch.Tensor,
        x: torch.Tensor,
        affine: Affine,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of ``norm(act(x))`` with respect to ``x``, weight and bias."""
    return activation_norm_backward(
        grad, x, affine.act, affine.scale, affine.mean, affine.invstd, affine.batch_statistics)
