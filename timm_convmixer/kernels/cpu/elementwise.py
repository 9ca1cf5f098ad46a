"""Per-channel operations on feature maps, into memory that is there already, in the forms that PyTorch vectorises.

``torch.addcmul`` with a value per channel is vectorised in channels last alone, and where all dtypes are the same. An
inference BatchNorm is in NCHW as well, and takes half-precision maps with float32 constants. Statistics are the other
way round: those of PyTorch's BatchNorm take ten times as long in NCHW as the sums that they are made of.
"""
from typing import Optional, Tuple

import torch

from ..support import dense_memory_format

__all__ = ['affine_into', 'batch_statistics', 'scaled_residual_into']


def _is_vectorised(x: torch.Tensor, scale: torch.Tensor) -> bool:
    """Whether ``torch.addcmul`` is, for a map and a value per channel."""
    return x.dtype == scale.dtype and dense_memory_format(x) == torch.channels_last


def affine_into(out: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """``scale * x + shift`` written into ``out``, which may be ``x``; not differentiable.

    Args:
        out: ``(B, C, H, W)``, in the dtype and memory format of ``x``.
        x: ``(B, C, H, W)``.
        scale: ``(C,)``, in the dtype of ``x`` or wider.
        shift: ``(C,)``, as ``scale``.
    """
    if _is_vectorised(x, scale):
        return torch.addcmul(shift.view(-1, 1, 1), x, scale.view(-1, 1, 1), out=out)
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
    if shift is None and _is_vectorised(x, scale):
        return torch.addcmul(x, branch, scale.view(-1, 1, 1), out=branch)
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
