"""The gradients of an activation and the normalisation after it, from the map that the activation was given."""
import functools
from typing import Tuple

import torch
import triton
import triton.language as tl

from ..activation import activate as activate_ref
from ..activation import activate_backward as activate_backward_ref
from ..support import opmath_dtype
from .common import activate, activate_backward
from .launch import MAX_PROBLEMS, Launch, device_limits
from .map_tiles import channel_launch, locate_planes, make_tiling, map_launch, merge_launch

__all__ = ['activation_norm_backward', 'activation_norm_backward_ref']


@triton.jit
def gradient_sums_kernel(
        grad_ptr,
        x_ptr,
        mean_ptr,
        partial_ptr,
        batch,
        channels,
        POSITIONS: tl.constexpr,
        ACT: tl.constexpr,
        IMAGES: tl.constexpr,
        PLANES: tl.constexpr,
        WIDTH: tl.constexpr,
):
    """One program: the sums of grad and of grad * (act(x) - mean) for one channel of ``IMAGES`` images.

    partial is (2, chunks of images, channels).
    """
    HALF: tl.constexpr = x_ptr.dtype.element_ty != tl.float32
    program = tl.program_id(0)
    channel = program % channels
    chunk = program // channels
    first = chunk * IMAGES
    images = tl.minimum(IMAGES, batch - first)
    base = (first.to(tl.int64) * channels + channel) * POSITIONS
    step_stride = tl.cast(channels, tl.int64) * (PLANES * POSITIONS)
    mean = tl.load(mean_ptr + channel)
    plane = tl.arange(0, PLANES)[:, None]
    sums = tl.zeros((PLANES, WIDTH), tl.float32)
    products = tl.zeros((PLANES, WIDTH), tl.float32)
    for start in range(0, POSITIONS, WIDTH):
        position = start + tl.arange(0, WIDTH)[None, :]
        offset = base + plane.to(tl.int64) * channels * POSITIONS + position
        x_ptrs = x_ptr + offset
        grad_ptrs = grad_ptr + offset
        for step in range(tl.cdiv(IMAGES, PLANES)):
            inside = (plane < images - step * PLANES) & (position < POSITIONS)
            x = tl.load(x_ptrs, mask=inside, other=0.0).to(tl.float32)
            # Outside it is 0, and so is its product with a finite act(0) - mean.
            grad = tl.load(grad_ptrs, mask=inside, other=0.0).to(tl.float32)
            sums += grad
            products += grad * (activate(x, ACT, HALF) - mean)
            x_ptrs += step_stride
            grad_ptrs += step_stride
    partial_ptr += chunk * channels + channel
    tl.store(partial_ptr, tl.sum(sums))
    tl.store(partial_ptr + tl.cdiv(batch, IMAGES) * channels, tl.sum(products))


@triton.jit
def merge_gradient_sums_kernel(
        partial_ptr,
        invstd_ptr,
        weight_grad_ptr,
        bias_grad_ptr,
        chunks,
        channels,
        CHUNKS: tl.constexpr,
        BLOCK: tl.constexpr,
):
    """One program: the gradients of weight and bias of ``BLOCK`` channels from their at most ``CHUNKS`` parts."""
    chunk = tl.arange(0, CHUNKS)[:, None]
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (chunk < chunks) & (channel < channels)
    offset = chunk * channels + channel
    sums = tl.load(partial_ptr + offset, mask=inside, other=0.0)
    products = tl.load(partial_ptr + chunks * channels + offset, mask=inside, other=0.0)
    invstd = tl.load(invstd_ptr + channel, mask=channel < channels, other=0.0)
    tl.store(bias_grad_ptr + channel, tl.sum(sums, axis=0)[None, :], mask=channel < channels)
    tl.store(weight_grad_ptr + channel, tl.sum(products, axis=0)[None, :] * invstd, mask=channel < channels)


@triton.jit
def input_gradient_kernel(
        grad_ptr,
        x_ptr,
        scale_ptr,
        mean_ptr,
        invstd_ptr,
        weight_grad_ptr,
        bias_grad_ptr,
        out_ptr,
        planes,
        channels,
        POSITIONS: tl.constexpr,
        ACT: tl.constexpr,
        BATCH_STATISTICS: tl.constexpr,
        PLANES: tl.constexpr,
        WIDTH: tl.constexpr,
):
    """One program: the gradient with respect to x for one tile."""
    HALF: tl.constexpr = out_ptr.dtype.element_ty != tl.float32
    offset, inside, channel = locate_planes(planes, channels, POSITIONS, PLANES, WIDTH)
    x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    if BATCH_STATISTICS:
        # Mean and variance move with x: what they explain of the gradient is taken out of it.
        count = tl.cast(planes // channels, tl.float32) * POSITIONS
        slope = tl.load(weight_grad_ptr + channel) / count * tl.load(invstd_ptr + channel)
        constant = tl.load(bias_grad_ptr + channel) / count
        grad -= constant + (activate(x, ACT, HALF) - tl.load(mean_ptr + channel)) * slope
    grad = activate_backward(grad * tl.load(scale_ptr + channel), x, ACT, HALF)
    tl.store(out_ptr + offset, grad.to(out_ptr.dtype.element_ty), mask=inside)


@functools.lru_cache(maxsize=MAX_PROBLEMS)
def backward_launches(
        device: torch.device,
        shape: Tuple[int, ...],
        dtype: torch.dtype,
        act: str,
        batch_statistics: bool,
) -> Tuple[Launch, Launch, Launch, int]:
    """The three launches for maps of ``shape``, and in how many parts the first sums each channel.

    By dtype as well, because the machine code differs.
    """
    tiling = make_tiling(shape, device_limits(device).processors)
    sums = channel_launch(gradient_sums_kernel, device, shape, act, tiling)
    merge = merge_launch(merge_gradient_sums_kernel, device, shape, tiling.chunks, tiling)
    gradient = map_launch(
        input_gradient_kernel, device, shape, act, tiling, BATCH_STATISTICS=batch_statistics)
    return sums, merge, gradient, tiling.chunks


def activation_norm_backward_ref(
        grad: torch.Tensor,
        x: torch.Tensor,
        act: str,
        scale: torch.Tensor,
        mean: torch.Tensor,
        invstd: torch.Tensor,
        batch_statistics: bool,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """:func:`activation_norm_backward` in plain PyTorch."""
    dtype = opmath_dtype(x.dtype)
    grad, opmath_x, invstd = grad.to(dtype), x.to(dtype), invstd.to(dtype)
    centered = activate_ref(opmath_x, act) - mean.to(dtype).view(-1, 1, 1)
    bias_grad = grad.sum(dim=(0, 2, 3))
    weight_grad = (grad * centered).sum(dim=(0, 2, 3)) * invstd
    if batch_statistics:
        count = x.numel() / x.shape[1]
        explained = torch.addcmul(
            (bias_grad / count).view(-1, 1, 1), centered, (weight_grad * invstd / count).view(-1, 1, 1))
        grad = grad - explained
    x_grad = activate_backward_ref(grad * scale.to(dtype).view(-1, 1, 1), opmath_x, act)
    return x_grad.to(x.dtype), weight_grad, bias_grad


def activation_norm_backward(
        grad: torch.Tensor,
        x: torch.Tensor,
        act: str,
        scale: torch.Tensor,
        mean: torch.Tensor,
        invstd: torch.Tensor,
        batch_statistics: bool,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of ``weight * (act(x) - mean) * invstd + bias``.

    Two passes, one for the sums over each channel (deterministic) and one for the map; ``act(x)`` is computed in both.
    Not differentiable, nothing checked: as :func:`~.activation_statistics.activation_statistics`.

    Args:
        grad: Gradient of the result, of the shape and dtype of ``x``.
        x: Map, (B, C, H, W), contiguous, on a CUDA device; float32, float16 or bfloat16.
        act: ``'gelu'`` (with the error function), ``'relu'`` or ``'none'``.
        scale: ``weight * invstd``, (C,), contiguous, float32.
        mean: (C,), contiguous, float32.
        invstd: ``1 / sqrt(var + eps)``, (C,), contiguous, float32.
        batch_statistics: Whether mean and invstd are those of ``x`` itself, through which ``x`` has a gradient as well,
            and not fixed ones, such as the running statistics of a BatchNorm in eval mode.

    Returns:
        The gradients with respect to ``x``, of its shape and dtype, to weight and to bias; the last two (C,), float32.
    """
    # Autograd hands on gradients in any layout.
    grad = grad.contiguous()
    device, shape = x.device, x.shape
    sums, merge, gradient, parts = backward_launches(device, shape, x.dtype, act, batch_statistics)
    partial = torch.empty((2, parts, shape[1]), dtype=torch.float32, device=device)
    weight_grad = torch.empty(shape[1], dtype=torch.float32, device=device)
    bias_grad, out = torch.empty_like(weight_grad), torch.empty_like(x)
    sums(grad, x, mean, partial)
    merge(partial, invstd, weight_grad, bias_grad)
    gradient(grad, x, scale, mean, invstd, weight_grad, bias_grad, out)
    return out, weight_grad, bias_grad
