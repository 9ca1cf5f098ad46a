"""An activation and an affine per channel in one pass over a map, for training."""
import functools
from typing import Optional, Tuple

import torch
import triton
import triton.language as tl

from ..activation import activate as activate_ref
from ..support import opmath_dtype
from .common import activate
from .launch import MAX_PROBLEMS, Launch, device_limits
from .map_tiles import locate_planes, make_tiling, map_launch

__all__ = ['activation_affine', 'activation_affine_ref']


@triton.jit
def affine_kernel(
        x_ptr,
        scale_ptr,
        shift_ptr,
        residual_ptr,
        out_ptr,
        planes,
        channels,
        POSITIONS: tl.constexpr,
        ACT: tl.constexpr,
        PLANES: tl.constexpr,
        WIDTH: tl.constexpr,
):
    """One program: act(x) * scale + shift, and the residual, for one tile."""
    HALF: tl.constexpr = out_ptr.dtype.element_ty != tl.float32
    offset, inside, channel = locate_planes(planes, channels, POSITIONS, PLANES, WIDTH)
    x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + channel)
    shift = tl.load(shift_ptr + channel)
    out = activate(x, ACT, HALF) * scale + shift
    if residual_ptr is not None:
        out += tl.load(residual_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + offset, out.to(out_ptr.dtype.element_ty), mask=inside)


@functools.lru_cache(maxsize=MAX_PROBLEMS)
def affine_launch(
        device: torch.device,
        shape: Tuple[int, ...],
        dtype: torch.dtype,
        act: str,
        has_residual: bool,
) -> Launch:
    """The launch for maps of ``shape``; by dtype and residual, because the machine code differs."""
    return map_launch(affine_kernel, device, shape, act, make_tiling(shape, device_limits(device).processors))


def activation_affine_ref(
        x: torch.Tensor,
        scale: torch.Tensor,
        shift: torch.Tensor,
        act: str,
        residual: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """:func:`activation_affine` in plain PyTorch."""
    dtype = opmath_dtype(x.dtype)
    scale, shift = scale.to(dtype).view(-1, 1, 1), shift.to(dtype).view(-1, 1, 1)
    out = torch.addcmul(shift, activate_ref(x.to(dtype), act), scale)
    if residual is not None:
        out = out + residual
    return out.to(x.dtype)


def activation_affine(
        x: torch.Tensor,
        scale: torch.Tensor,
        shift: torch.Tensor,
        act: str,
        residual: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """``act(x) * scale + shift``, plus the residual if there is one.

    Not differentiable, nothing checked: as :func:`~.activation_statistics.activation_statistics`.

    Args:
        x: Map, (B, C, H, W), contiguous, on a CUDA device; float32, float16 or bfloat16.
        scale: (C,), contiguous, float32.
        shift: (C,), contiguous, float32.
        act: ``'gelu'`` (with the error function), ``'relu'`` or ``'none'``.
        residual: Like ``x``, or None.

    Returns:
        (B, C, H, W), contiguous, of the dtype of ``x``.
    """
    out = torch.empty_like(x)
    affine_launch(x.device, x.shape, x.dtype, act, residual is not None)(x, scale, shift, residual, out)
    return out
