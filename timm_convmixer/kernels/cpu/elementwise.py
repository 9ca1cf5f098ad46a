"""Per-channel operations on feature maps, into memory that is there already, in the forms that PyTorch vectorises.

PyTorch vectorises an operation in NCHW if at most one of its operands is a value per channel, in channels last whatever
they are, and only if all dtypes are the same. An inference BatchNorm takes half-precision maps with float32 constants.
The statistics of PyTorch's BatchNorm take ten times as long in NCHW as the sums that they are made of.
"""
from typing import Optional, Tuple

import torch

from ..support import dense_memory_format

__all__ = ['affine_into', 'batch_statistics', 'scaled_residual_into']


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
    # An epsilon of 1 makes of a variance of 0 one of 1, exactly.
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
    """Mean and biased variance of each channel, ``(C,)`` each.

    Args:
        x: ``(B, C, H, W)``; float32 or float64.
        scratch: A map like ``x``, which is overwritten.
    """
    if dense_memory_format(x) == torch.channels_last:
        return torch.batch_norm_update_stats(x, None, None, 0.)
    mean = x.mean(dim=(0, 2, 3))
    return mean, torch.sub(x, mean.view(-1, 1, 1), out=scratch).square_().mean(dim=(0, 2, 3))
