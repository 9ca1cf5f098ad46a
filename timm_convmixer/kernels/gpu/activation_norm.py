"""Activation and normalisation over (B, H, W), in the order of ConvMixer and in few passes over memory, for training.

Patches Are All You Need? (https://arxiv.org/abs/2201.09792), section 2: ``BN(act(...))``. What the autograd of the two
by themselves would keep is computed again on the fly, so that of a block only the outputs of its convolutions need be
kept. None of these functions is differentiable; together they are a forward and a backward pass.

Each kernel goes over a map once and is bound by memory. A map is (batch, channels, POSITIONS), contiguous. A tile is
``PLANES`` rows of ``WIDTH`` positions: of one channel in several images where a kernel sums over a channel, of
neighbouring planes (an image's channel each) where it does not.
"""
import functools
from typing import Any, NamedTuple, Optional, Sequence, Tuple

import torch
import triton
import triton.language as tl

from ..activation import activate as activate_ref
from ..activation import activate_backward as activate_backward_ref
from ..normalization import Affine, BatchNormalization
from ..support import opmath_dtype
from .common import activate, activate_backward
from .launch import MAX_PROBLEMS, Launch, device_limits, round_up

__all__ = [
    'activation_affine',
    'activation_affine_ref',
    'activation_batch_norm',
    'activation_batch_norm_ref',
    'activation_norm_backward',
    'activation_norm_backward_ref',
    'activation_statistics',
    'activation_statistics_ref',
]

# Elements of a tile: 16 for each thread of 4 warps, enough loads in flight and registers for all of them.
_TILE = 2048
_MAX_WIDTH = 1024
# Parts that a sum over a channel is computed in, at most.
_MAX_CHUNKS = 64
# Channels whose parts one program merges.
_MERGED_CHANNELS = 32


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
        running += momentum * (value - running)
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


@triton.jit
def _locate_planes(
        planes,
        channels,
        POSITIONS: tl.constexpr,
        PLANES: tl.constexpr,
        WIDTH: tl.constexpr,
):
    """Offset, existence and channel of a tile of neighbouring planes, which each fill POSITIONS of the memory."""
    BLOCKS: tl.constexpr = (POSITIONS + WIDTH - 1) // WIDTH
    program = tl.program_id(0)
    plane = (program // BLOCKS) * PLANES + tl.arange(0, PLANES)[:, None]
    position = (program % BLOCKS) * WIDTH + tl.arange(0, WIDTH)[None, :]
    inside = (plane < planes) & (position < POSITIONS)
    return plane.to(tl.int64) * POSITIONS + position, inside, plane % channels


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
    offset, inside, channel = _locate_planes(planes, channels, POSITIONS, PLANES, WIDTH)
    x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + channel)
    shift = tl.load(shift_ptr + channel)
    out = activate(x, ACT, HALF) * scale + shift
    if residual_ptr is not None:
        out += tl.load(residual_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + offset, out.to(out_ptr.dtype.element_ty), mask=inside)


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
    offset, inside, channel = _locate_planes(planes, channels, POSITIONS, PLANES, WIDTH)
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


class Tiling(NamedTuple):
    """How a map is cut for these kernels.

    Attributes:
        planes: Planes of a tile.
        width: Positions of a tile.
        images: Images that one program sums over: so few that there are programs for the chip, a whole number of tiles.
        chunks: Programs a channel, of those that sum over one.
        tiles: Tiles of the whole map, for those that do not.
    """
    planes: int
    width: int
    images: int
    chunks: int
    tiles: int


def make_tiling(shape: Tuple[int, ...], processors: int) -> Tiling:
    """The tiling of maps (B, C, H, W) on a device of ``processors`` multiprocessors."""
    batch, channels, positions = shape[0], shape[1], shape[2] * shape[3]
    width = max(16, min(_MAX_WIDTH, round_up(positions)))
    planes = _TILE // width
    chunks = min(_MAX_CHUNKS, -(-64 * processors // channels), -(-batch // planes))
    images = -(-batch // (chunks * planes)) * planes
    return Tiling(
        planes, width, images, -(-batch // images), -(-batch * channels // planes) * -(-positions // width))


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
    sums = _channel_launch(statistics_kernel, device, shape, act, tiling)
    merge = _merge_launch(
        merge_statistics_kernel, device, shape, shape[0], tiling, POSITIONS=shape[2] * shape[3], IMAGES=tiling.images,
        EPS=eps)
    return sums, merge, tiling.chunks


@functools.lru_cache(maxsize=MAX_PROBLEMS)
def affine_launch(
        device: torch.device,
        shape: Tuple[int, ...],
        dtype: torch.dtype,
        act: str,
        has_residual: bool,
) -> Launch:
    """The launch for maps of ``shape``; by dtype and residual, because the machine code differs."""
    return _map_launch(affine_kernel, device, shape, act, make_tiling(shape, device_limits(device).processors))


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
    sums = _channel_launch(gradient_sums_kernel, device, shape, act, tiling)
    merge = _merge_launch(merge_gradient_sums_kernel, device, shape, tiling.chunks, tiling)
    gradient = _map_launch(
        input_gradient_kernel, device, shape, act, tiling, BATCH_STATISTICS=batch_statistics)
    return sums, merge, gradient, tiling.chunks


def _channel_launch(kernel: Any, device: torch.device, shape: Tuple[int, ...], act: str, tiling: Tiling) -> Launch:
    """The launch of a kernel that sums over each channel."""
    constants = dict(
        POSITIONS=shape[2] * shape[3], ACT=act, IMAGES=tiling.images, PLANES=tiling.planes, WIDTH=tiling.width)
    return Launch(kernel, device, shape[1] * tiling.chunks, shape[:2], constants, num_warps=4)


def _merge_launch(
        kernel: Any,
        device: torch.device,
        shape: Tuple[int, ...],
        count: int,
        tiling: Tiling,
        **constants: Any,
) -> Launch:
    """The launch of a kernel that merges the parts of each channel."""
    constants.update(CHUNKS=round_up(tiling.chunks), BLOCK=_MERGED_CHANNELS)
    return Launch(
        kernel, device, -(-shape[1] // _MERGED_CHANNELS), (count, shape[1]), constants, num_warps=1)


def _map_launch(
        kernel: Any,
        device: torch.device,
        shape: Tuple[int, ...],
        act: str,
        tiling: Tiling,
        **constants: Any,
) -> Launch:
    """The launch of a kernel that goes over a map element by element."""
    constants.update(POSITIONS=shape[2] * shape[3], ACT=act, PLANES=tiling.planes, WIDTH=tiling.width)
    return Launch(kernel, device, tiling.tiles, (shape[0] * shape[1], shape[1]), constants, num_warps=4)


def activation_statistics_ref(x: torch.Tensor, act: str) -> Tuple[torch.Tensor, torch.Tensor]:
    """:func:`activation_statistics` in plain PyTorch."""
    var, mean = torch.var_mean(activate_ref(x.to(opmath_dtype(x.dtype)), act), dim=(0, 2, 3), correction=0)
    return mean, var


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
        norm: Activation and normalisation. If one of its tensors is not contiguous, PyTorch computes the affine.

    Returns:
        The affine, its tensors in float32.
    """
    tensors = norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.num_batches_tracked
    if not all(t is None or t.is_contiguous() for t in tensors):
        return norm.batch_affine(x.dtype, *activation_statistics(x, norm.act), x.numel() // x.shape[1])
    if norm.momentum is None and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    momentum = None if norm.momentum is None else float(norm.momentum)
    mean, _, invstd, scale, shift = _statistics(x, norm.act, norm.eps, momentum, tensors)
    if norm.momentum is not None and norm.num_batches_tracked is not None:
        # Autograd does not see what a kernel writes. Of running statistics F.batch_norm does not tell it either.
        torch.autograd.graph.increment_version(norm.num_batches_tracked)
    return Affine(norm.act, mean, invstd, scale, shift, batch_statistics=True)


def activation_affine(
        x: torch.Tensor,
        scale: torch.Tensor,
        shift: torch.Tensor,
        act: str,
        residual: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """``act(x) * scale + shift``, plus the residual if there is one.

    Not differentiable, nothing checked: as :func:`activation_statistics`.

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
    Not differentiable, nothing checked: as :func:`activation_statistics`.

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
