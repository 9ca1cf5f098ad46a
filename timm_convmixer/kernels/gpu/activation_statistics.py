"""Mean and variance of an activated map, and the batch normalisation that they make, for training.

Patches Are All You Need? (https://arxiv.org/abs/2201.09792), section 2: ``BN(act(...))``. The map is read once, and
nothing else is written: what autograd would keep is computed again in the backward pass.
"""
import functools
from typing import Optional, Sequence, Tuple

import torch
import triton
import triton.language as tl

from ..activation import activate as activate_ref
from ..normalization import Affine, BatchNormalization
from ..support import opmath_dtype
from .common import activate
from .launch import MAX_PROBLEMS, Launch, device_limits
from .map_tiles import channel_launch, make_tiling, merge_launch

__all__ = [
    'activation_batch_norm',
    'activation_batch_norm_ref',
    'activation_statistics',
    'activation_statistics_ref',
]


@triton.jit
def statistics_kernel(
        x_ptr,
        partial_ptr,
        batch,
        channels,
        POSITIONS: tl.constexpr,
        ACT: tl.constexpr,
        IMAGES: tl.constexpr,
        PLANES: tl.constexpr,
        WIDTH: tl.constexpr,
):
    """One program: mean and sum of squared deviations of act(x) for one channel of ``IMAGES`` images.

    partial is (2, chunks of images, channels). Every element of a tile keeps a mean and a sum of its own, by Welford's
    method; they are merged once the images are through.
    """
    HALF: tl.constexpr = x_ptr.dtype.element_ty != tl.float32
    program = tl.program_id(0)
    channel = program % channels
    chunk = program // channels
    first = chunk * IMAGES
    images = tl.minimum(IMAGES, batch - first)
    x_ptr += (first.to(tl.int64) * channels + channel) * POSITIONS
    step_stride = tl.cast(channels, tl.int64) * (PLANES * POSITIONS)
    plane = tl.arange(0, PLANES)[:, None]
    total = 0.0
    mean = 0.0
    squares = 0.0
    for start in range(0, POSITIONS, WIDTH):
        position = start + tl.arange(0, WIDTH)[None, :]
        tile_mean = tl.zeros((PLANES, WIDTH), tl.float32)
        tile_squares = tl.zeros((PLANES, WIDTH), tl.float32)
        offset = plane.to(tl.int64) * channels * POSITIONS + position
        x_ptrs = x_ptr + offset
        for step in range(tl.cdiv(IMAGES, PLANES)):
            inside = (plane < images - step * PLANES) & (position < POSITIONS)
            x = tl.load(x_ptrs, mask=inside, other=0.0).to(tl.float32)
            deviation = activate(x, ACT, HALF) - tile_mean
            # Images end once: an element inside now was inside in every step before.
            moved = tile_mean + deviation * (1.0 / (step + 1))
            tile_squares = tl.where(inside, tile_squares + deviation * (deviation + tile_mean - moved), tile_squares)
            tile_mean = tl.where(inside, moved, tile_mean)
            x_ptrs += step_stride
        tile_count = tl.where(position < POSITIONS, (images - plane + PLANES - 1) // PLANES, 0).to(tl.float32)
        count = tl.sum(tile_count)
        merged = tl.sum(tile_mean * (tile_count / count))
        deviation = tile_mean - merged
        merged_squares = tl.sum(tile_squares + tile_count * deviation * deviation)
        # The same for what came before and this.
        total += count
        difference = merged - mean
        mean += difference * (count / total)
        squares += merged_squares + difference * difference * (count * (total - count) / total)
    partial_ptr += chunk * channels + channel
    tl.store(partial_ptr, mean)
    tl.store(partial_ptr + tl.cdiv(batch, IMAGES) * channels, squares)


@triton.jit
def _update_running(running_ptr, channel, inside, value, momentum):
    if running_ptr is not None:
        running = tl.load(running_ptr + channel, mask=inside, other=0.0).to(tl.float32)
        running = momentum * value + (1.0 - momentum) * running
        tl.store(running_ptr + channel, running.to(running_ptr.dtype.element_ty), mask=inside)


@triton.jit
def merge_statistics_kernel(
        partial_ptr,
        weight_ptr,
        bias_ptr,
        running_mean_ptr,
        running_var_ptr,
        tracked_ptr,
        statistics_ptr,
        momentum,
        batch,
        channels,
        POSITIONS: tl.constexpr,
        IMAGES: tl.constexpr,
        CHUNKS: tl.constexpr,
        BLOCK: tl.constexpr,
        EPS: tl.constexpr,
):
    """One program: merges the parts of ``BLOCK`` channels, at most ``CHUNKS`` each, to what a normalisation needs.

    statistics is (5, channels): mean, variance, invstd, scale and shift. The rest may be None. Updates the running
    statistics. With a momentum it counts the batch; without, the caller has, and the momentum is 1 / count.
    """
    chunks = tl.cdiv(batch, IMAGES)
    chunk = tl.arange(0, CHUNKS)[:, None]
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    exists = channel < channels
    inside = (chunk < chunks) & exists
    offset = chunk * channels + channel
    # Weighted by images, which all have the same number of positions.
    share = tl.where(chunk < chunks, tl.minimum(IMAGES, batch - chunk * IMAGES), 0).to(tl.float32) / batch
    part_mean = tl.load(partial_ptr + offset, mask=inside, other=0.0)
    part_squares = tl.load(partial_ptr + chunks * channels + offset, mask=inside, other=0.0)
    mean = tl.sum(part_mean * share, axis=0)[None, :]
    deviation = part_mean - mean
    var = tl.sum(part_squares / batch / POSITIONS + deviation * deviation * share, axis=0)[None, :]

    invstd = 1.0 / tl.sqrt_rn(var + EPS)
    scale = invstd
    if weight_ptr is not None:
        scale = invstd * tl.load(weight_ptr + channel, mask=exists, other=0.0).to(tl.float32)
    shift = -mean * scale
    if bias_ptr is not None:
        shift += tl.load(bias_ptr + channel, mask=exists, other=0.0).to(tl.float32)
    statistics_ptr += channel
    tl.store(statistics_ptr, mean, mask=exists)
    tl.store(statistics_ptr + channels, var, mask=exists)
    tl.store(statistics_ptr + 2 * channels, invstd, mask=exists)
    tl.store(statistics_ptr + 3 * channels, scale, mask=exists)
    tl.store(statistics_ptr + 4 * channels, shift, mask=exists)

    share_of_batch = 0.0
    if momentum is not None:
        share_of_batch = momentum
        if tracked_ptr is not None:
            if tl.program_id(0) == 0:
                tl.store(tracked_ptr, tl.load(tracked_ptr) + 1)
    elif tracked_ptr is not None:
        share_of_batch = 1.0 / tl.load(tracked_ptr).to(tl.float32)
    count = tl.cast(batch, tl.float32) * POSITIONS
    _update_running(running_mean_ptr, channel, exists, mean, share_of_batch)
    _update_running(running_var_ptr, channel, exists, var * (count / (count - 1.0)), share_of_batch)


@functools.lru_cache(maxsize=MAX_PROBLEMS)
def statistics_launches(
        device: torch.device,
        shape: Tuple[int, ...],
        dtype: torch.dtype,
        act: str,
        eps: float,
        has_momentum: bool,
        arguments: Tuple[Optional[torch.dtype], ...],
) -> Tuple[Launch, Launch, int]:
    """The two launches for maps of ``shape``, and in how many parts the first computes each channel.

    By dtypes as well, because the machine code differs.
    """
    tiling = make_tiling(shape, device_limits(device).processors)
    sums = channel_launch(statistics_kernel, device, shape, act, tiling)
    merge = merge_launch(
        merge_statistics_kernel, device, shape, shape[0], tiling, POSITIONS=shape[2] * shape[3], IMAGES=tiling.images,
        EPS=eps)
    return sums, merge, tiling.chunks


def activation_statistics_ref(x: torch.Tensor, act: str) -> Tuple[torch.Tensor, torch.Tensor]:
    """:func:`activation_statistics` in plain PyTorch."""
    var, mean = torch.var_mean(activate_ref(x.to(opmath_dtype(x.dtype)), act), dim=(0, 2, 3), correction=0)
    return mean, var


def activation_statistics(x: torch.Tensor, act: str) -> Tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance of ``act(x)`` over (B, H, W).

    In two deterministic stages and without cancellation (Welford's method). A channel that holds an infinity or NaN has
    statistics that are not finite. Not differentiable. Nothing is checked: ask :func:`~.support.kernel_refusal` first.

    Args:
        x: Map, (B, C, H, W), contiguous, on a CUDA device; float32, float16 or bfloat16.
        act: ``'gelu'`` (with the error function), ``'relu'`` or ``'none'``.

    Returns:
        mean and var, each (C,), float32.
    """
    return _statistics(x, act, 0., None, (None,) * 5)[:2]


def _statistics(
        x: torch.Tensor,
        act: str,
        eps: float,
        momentum: Optional[float],
        tensors: Sequence[Optional[torch.Tensor]],
) -> Tuple[torch.Tensor, ...]:
    device, shape = x.device, x.shape
    sums, merge, parts = statistics_launches(
        device, shape, x.dtype, act, eps, momentum is not None,
        tuple(None if t is None else t.dtype for t in tensors))
    partial = torch.empty((2, parts, shape[1]), dtype=torch.float32, device=device)
    out = torch.empty((5, shape[1]), dtype=torch.float32, device=device)
    sums(x, partial)
    merge(partial, *tensors, out, momentum)
    return out.unbind()


def activation_batch_norm_ref(x: torch.Tensor, norm: BatchNormalization) -> Affine:
    """:func:`activation_batch_norm` in plain PyTorch."""
    return norm.batch_affine(x.dtype, *activation_statistics_ref(x, norm.act), x.numel() // x.shape[1])


def activation_batch_norm(x: torch.Tensor, norm: BatchNormalization) -> Affine:
    """What a normalisation by the statistics of the batch is for ``act(x)``; updates its running statistics.

    Not differentiable, nothing checked: as :func:`activation_statistics`.

    Args:
        x: Map, (B, C, H, W), contiguous, on a CUDA device; float32, float16 or bfloat16.
        norm: Activation and normalisation. If one of its tensors is not contiguous, or on another device, as the count
            of batches may be, PyTorch computes the affine.

    Returns:
        The affine, its tensors in float32.
    """
    tensors = norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.num_batches_tracked
    if not all(t is None or (t.is_contiguous() and t.device == x.device) for t in tensors):
        return norm.batch_affine(x.dtype, *activation_statistics(x, norm.act), x.numel() // x.shape[1])
    if norm.momentum is None and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    momentum = None if norm.momentum is None else float(norm.momentum)
    mean, _, invstd, scale, shift = _statistics(x, norm.act, norm.eps, momentum, tensors)
    if norm.momentum is not None and norm.num_batches_tracked is not None:
        # Autograd does not see what a kernel writes. Of running statistics F.batch_norm does not tell it either.
        torch.autograd.graph.increment_version(norm.num_batches_tracked)
    return Affine(norm.act, mean, invstd, scale, shift, batch_statistics=True)
