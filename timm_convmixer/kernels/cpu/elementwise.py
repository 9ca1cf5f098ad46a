"""Per-channel operations on feature maps, into given memory, in the forms that PyTorch vectorises.

PyTorch vectorises an elementwise operation if all operands have one dtype, and in NCHW only if at most one of them is a
vector of channels. Its BatchNorm operators also take half-precision maps with float32 vectors, and compute in float32.
But on float32 maps in NCHW their statistics take ten times as long as two means.
"""
from typing import Optional, Tuple

import torch

from ..support import dense_memory_format, opmath_dtype

__all__ = ['affine_into', 'batch_statistics', 'norm_gradient_sums', 'scaled_residual_into']


def affine_into(out: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """``scale * x + shift`` written into ``out``, which may be ``x``; not differentiable.

    Args:
        out: ``(B, C, H, W)``, in the dtype and memory format of ``x``.
        x: ``(B, C, H, W)``.
        scale: ``(C,)``, in the dtype of ``x`` or wider.
        shift: ``(C,)``, as ``scale``.
    """
    if x.dtype == scale.dtype:
        scale, shift = scale.view(-1, 1, 1), shift.view(-1, 1, 1)
        if dense_memory_format(x) == torch.channels_last:
            return torch.addcmul(shift, x, scale, out=out)
        return torch.mul(x, scale, out=out).add_(shift)
    # (x - 0) / sqrt(0 + 1): with a variance of 0 and an epsilon of 1 the statistics leave x exactly as it is.
    zeros, unused = torch.zeros_like(shift), shift.new_empty(0)
    return torch.ops.aten.native_batch_norm.out(
        x, scale, shift, zeros, zeros, False, 0., 1., out=out, save_mean=unused, save_invstd=unused)[0]


def scaled_residual_into(
        branch: torch.Tensor,
        x: torch.Tensor,
        scale: torch.Tensor,
        shift: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """``x + scale * branch + shift`` written into ``branch``; not differentiable.

    Args:
        branch: ``(B, C, H, W)``, in the dtype and memory format of ``x``.
        x: ``(B, C, H, W)``.
        scale: ``(C,)``, in the dtype of ``x`` or wider.
        shift: ``(C,)``, as ``scale``, or None.
    """
    if x.dtype == scale.dtype:
        out = torch.addcmul(x, branch, scale.view(-1, 1, 1), out=branch)
        return out if shift is None else out.add_(shift.view(-1, 1, 1))
    return affine_into(branch, branch, scale, torch.zeros_like(scale) if shift is None else shift).add_(x)


def batch_statistics(x: torch.Tensor, scratch: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance of each channel, ``(C,)`` each, in float32 or wider.

    Args:
        x: ``(B, C, H, W)``.
        scratch: A map like ``x``, which may be overwritten.
    """
    if x.dtype in (torch.float32, torch.float64) and dense_memory_format(x) != torch.channels_last:
        mean = x.mean(dim=(0, 2, 3))
        return mean, torch.sub(x, mean.view(-1, 1, 1), out=scratch).square_().mean(dim=(0, 2, 3))
    # Running statistics that stay as they are: results have their dtype.
    running = torch.zeros(x.shape[1], dtype=opmath_dtype(x.dtype), device='cpu')
    return torch.batch_norm_update_stats(x, running, running, 0.)


def norm_gradient_sums(
        grad: torch.Tensor,
        x: torch.Tensor,
        mean: torch.Tensor,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """The sums of ``grad`` and of ``grad * (x - mean)`` over each channel, ``(C,)`` each, in the dtype of ``mean``.

    Args:
        grad: ``(B, C, H, W)``.
        x: ``(B, C, H, W)``, in the dtype and memory format of ``grad``.
        mean: ``(C,)``, float32 or wider.
    """
    # The gradients of an inference BatchNorm whose variance is 1.
    ones = torch.ones_like(mean)
    _, products, sums = torch.ops.aten.native_batch_norm_backward(
        grad, x, ones, mean, ones, None, None, False, 0., [False, True, True])
    return sums, products
