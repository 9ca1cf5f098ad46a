"""The depthwise convolution on tensor cores: by itself, as the first half of a block, and as its input's gradient.

Patches Are All You Need? (https://arxiv.org/abs/2201.09792), section 2: ``y = x + BN(act(depthwise(x)))``.

A depthwise convolution has too little arithmetic per byte for a convolution library and too much for the ordinary
units. In NCHW, however, a channel's rows are contiguous, so a *row group*, ``GROUP_ROWS`` consecutive rows of an H x W
map, is one vector of ``GROUP_ROWS * W`` numbers. Cut every map into such groups. The group ``d`` places away from an
output group contributes a fixed linear map of it,

    out[group] = sum over d of x[group + d] @ toeplitz_d
    toeplitz_d[(g', w'), (g, w)] = weight[g' - g + d * GROUP_ROWS + before, w' - w + before]

with zeros where the index leaves the kernel: a Toeplitz matrix of blocks that are Toeplitz matrices themselves. Groups
of many images are the rows of one matrix product on the tensor cores, zero padding costs nothing, and the Toeplitz
matrices are built once per channel and used for many images. ``GROUP_ROWS = 1`` is one matrix per kernel row; larger
groups fetch each row fewer times (for k = 9 and W = 32, groups of two rows need 5 matrices instead of 9).

A program takes tiles of row groups, each with all the groups that it needs. Or it goes *by image*: through the groups
of many images at once, loading each group once and adding its share to the sums of all output groups that it touches.

A product with a zero of a Toeplitz matrix turns an infinity or NaN anywhere in the group into NaN everywhere in it.
That shows in the sums (0 * inf = NaN). A program that finds one computes all its tiles again tap by tap, which is also
the way of float32 that has to be IEEE.

None of these functions is differentiable.
"""
import functools
from typing import List, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from ..activation import activate as activate_ref
from ..convolution import convolution_gradients_ref
from .common import TAPS_M, activate, locate, matmul
from .launch import MAX_PROBLEMS, DeviceLimits, Launch, device_limits, input_precision, round_up
from .support import MAX_WIDTH

__all__ = [
    'depthwise_convolution',
    'depthwise_convolution_ref',
    'depthwise_input_gradient',
    'depthwise_input_gradient_ref',
    'depthwise_mixing',
    'depthwise_mixing_ref',
]


@triton.jit
def _load_tap(weight_ptr, tap, mask, KERNEL: tl.constexpr, FLIP: tl.constexpr):
    if FLIP:
        tap = KERNEL * KERNEL - 1 - tap
    return tl.load(weight_ptr + tap, mask=mask, other=0.0)


@triton.jit
def _build_toeplitz(
        weight_ptr,
        offset,
        W: tl.constexpr,
        KERNEL: tl.constexpr,
        FLIP: tl.constexpr,
        BEFORE: tl.constexpr,
        GROUP_ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
):
    """The matrix (COLUMNS, COLUMNS) that takes the row group ``offset`` places away to its share of the output's."""
    source = tl.arange(0, COLUMNS)[:, None]
    target = tl.arange(0, COLUMNS)[None, :]
    tap_row = source // W - target // W + offset * GROUP_ROWS + BEFORE
    tap_col = source % W - target % W + BEFORE
    inside = (tap_row >= 0) & (tap_row < KERNEL) & (tap_col >= 0) & (tap_col < KERNEL)
    inside = inside & (source < GROUP_ROWS * W) & (target < GROUP_ROWS * W)
    return _load_tap(weight_ptr, tap_row * KERNEL + tap_col, inside, KERNEL, FLIP)


@triton.jit
def _epilogue(
        acc,
        bias,
        scale,
        shift,
        residual,
        out_ptrs,
        mask,
        ACT: tl.constexpr,
        HALF: tl.constexpr,
):
    """Bias, activation, scale, shift and residual, as far as they are there, and the only store."""
    if bias is not None:
        acc += bias
    out = activate(acc, ACT, HALF)
    if shift is not None:
        out = out * scale + shift
    elif scale is not None:
        out = out * scale
    if residual is not None:
        out = residual.to(tl.float32) + out
    tl.store(out_ptrs, out.to(out_ptrs.dtype.element_ty), mask=mask)


@triton.jit
def _find_non_finite(acc, BLOCK_M: tl.constexpr, COLUMNS: tl.constexpr):
    """Zeros (BLOCK_M, 2, 8), or NaN where something is not finite: sums within a thread, so that none waits."""
    return tl.sum(tl.reshape(acc * 0.0, (BLOCK_M, 2, COLUMNS // 16, 8)), axis=2)


@triton.jit
def _load_residual(residual_ptr, offset, mask):
    residual = None
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + offset, mask=mask, other=0.0)
    return residual


@triton.jit
def _mix_taps(
        x_ptr,
        weight_ptr,
        bias,
        scale,
        shift,
        residual_ptr,
        out_ptr,
        start,
        rows,
        x_batch_stride,
        out_batch_stride,
        H: tl.constexpr,
        W: tl.constexpr,
        KERNEL: tl.constexpr,
        FLIP: tl.constexpr,
        BEFORE: tl.constexpr,
        ACT: tl.constexpr,
        HALF: tl.constexpr,
        GROUP_ROWS: tl.constexpr,
        BLOCK_M: tl.constexpr,
        COLUMNS: tl.constexpr,
):
    """A tile by the definition of the convolution, in fp32, reading nothing outside the receptive field."""
    position, inside, x_offset, out_offset = locate(
        start, rows, x_batch_stride, out_batch_stride, H, W, GROUP_ROWS, BLOCK_M, COLUMNS)
    mask = inside & (position < H * W)
    row = position // W
    col = position % W
    acc = tl.zeros((BLOCK_M, COLUMNS), tl.float32)
    for tap in range(KERNEL * KERNEL):
        dy = tap // KERNEL - BEFORE
        dx = tap % KERNEL - BEFORE
        touched = mask & (row + dy >= 0) & (row + dy < H) & (col + dx >= 0) & (col + dx < W)
        value = tl.load(x_ptr + x_offset + (dy * W + dx), mask=touched, other=0.0).to(tl.float32)
        weight = _load_tap(weight_ptr, tap, True, KERNEL, FLIP).to(x_ptr.dtype.element_ty).to(tl.float32)
        # Outside the map nothing is added: 0 * weight would be NaN for an infinite weight.
        acc += tl.where(touched, value * weight, 0.0)
    residual = _load_residual(residual_ptr, x_offset, mask)
    _epilogue(acc, bias, scale, shift, residual, out_ptr + out_offset, mask, ACT, HALF)


@triton.jit
def depthwise_kernel(
        x_ptr,
        weight_ptr,
        bias_ptr,
        scale_ptr,
        shift_ptr,
        residual_ptr,
        out_ptr,
        batch,
        channels,
        x_batch_stride,
        out_batch_stride,
        H: tl.constexpr,
        W: tl.constexpr,
        KERNEL: tl.constexpr,
        FLIP: tl.constexpr,
        ACT: tl.constexpr,
        TAPS: tl.constexpr,
        GROUP_ROWS: tl.constexpr,
        FIRST: tl.constexpr,
        LAST: tl.constexpr,
        BLOCK_M: tl.constexpr,
        COLUMNS: tl.constexpr,
        TILES: tl.constexpr,
        ROWS: tl.constexpr,
        PREFETCH: tl.constexpr,
        BY_IMAGE: tl.constexpr,
):
    """One program: one channel, ``TILES`` tiles of ``BLOCK_M`` row groups, padded to ``COLUMNS`` columns.

    ``BY_IMAGE``: the tiles are of ``BLOCK_M`` images instead, and the program goes through all their row groups.

    x, residual and out are (batch, channels, H, W), contiguous but for the stride between images, which is that of x
    for the residual. Bias and residual may be None, and so may shift, alone or with scale. ``FLIP`` rotates the taps by
    180 degrees, ``TAPS`` uses no matrix product. ``ROWS`` are the row groups of a program. ``FIRST`` to ``LAST`` are
    the row groups, counted from its own, that a row group's receptive field touches. ``PREFETCH`` issues all loads of a
    tile before its first product: their latencies overlap, at the price of shared memory for all of them.
    """
    # PyTorch's padding='same': the smaller half of KERNEL - 1 goes to the top and to the left; rotated, the
    # larger.
    BEFORE: tl.constexpr = (KERNEL - 1 + FLIP) // 2
    HALF: tl.constexpr = out_ptr.dtype.element_ty != tl.float32

    program = tl.program_id(0)
    # Neighbouring programs work on neighbouring channels of the same images, which are neighbours in memory.
    channel = program % channels
    chunk = program // channels

    plane = channel.to(tl.int64) * (H * W)
    x_ptr += plane
    out_ptr += plane
    weight_ptr += channel.to(tl.int64) * (KERNEL * KERNEL)
    bias = None
    scale = None
    shift = None
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + channel).to(tl.float32)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + channel).to(tl.float32)
    if shift_ptr is not None:
        shift = tl.load(shift_ptr + channel).to(tl.float32)
    if residual_ptr is not None:
        residual_ptr += plane

    GROUPS: tl.constexpr = (H + GROUP_ROWS - 1) // GROUP_ROWS
    rows = batch * GROUPS
    first_row = chunk * ROWS
    regular = not TAPS
    if not TAPS:
        toeplitz = ()
        for offset in tl.static_range(FIRST, LAST + 1):
            toeplitz = toeplitz + (  # type: ignore[assignment]
                _build_toeplitz(
                    weight_ptr, offset, W, KERNEL, FLIP, BEFORE, GROUP_ROWS, COLUMNS).to(x_ptr.dtype.element_ty),)
        zeros = tl.zeros((BLOCK_M, 2, 8), tl.float32)
        for tile in range(TILES):
            if BY_IMAGE:
                image = (chunk * TILES + tile) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
                col = tl.arange(0, COLUMNS)[None, :]
                inside = (image < batch) & (col < GROUP_ROWS * W)
                x_offset = image.to(tl.int64) * x_batch_stride + col
                out_offset = image.to(tl.int64) * out_batch_stride + col
                # Sums of the groups that are not complete yet, the first of them first.
                accs = ()
                for _ in tl.static_range(LAST - FIRST):
                    accs = accs + (tl.zeros((BLOCK_M, COLUMNS), tl.float32),)  # type: ignore[assignment]
                # One group ahead of the products.
                x = tl.load(x_ptr + x_offset, mask=inside & (col < H * W), other=0.0)
                for group in range(-LAST, GROUPS):
                    position = group * (GROUP_ROWS * W)
                    mask = inside & (col + position >= 0) & (col + position < H * W)
                    residual = _load_residual(residual_ptr, x_offset + position, mask)
                    ahead = position + (LAST + 1) * (GROUP_ROWS * W)
                    fetched = tl.load(x_ptr + x_offset + ahead, mask=inside & (col + ahead < H * W), other=0.0)
                    acc = matmul(x, toeplitz[LAST - FIRST], accs[0], 'tf32')  # type: ignore[misc]
                    shifted_accs = ()
                    for index in tl.static_range(1, LAST - FIRST):
                        shifted_accs = shifted_accs + (  # type: ignore[assignment]
                            matmul(x, toeplitz[LAST - FIRST - index], accs[index], 'tf32'),)
                    accs = shifted_accs + (  # type: ignore[assignment]
                        matmul(x, toeplitz[0], tl.zeros((BLOCK_M, COLUMNS), tl.float32), 'tf32'),)  # type: ignore[misc]
                    x = fetched
                    if group >= 0:
                        zeros += _find_non_finite(acc, BLOCK_M, COLUMNS)
                        _epilogue(acc, bias, scale, shift, residual, out_ptr + out_offset + position, mask, ACT, HALF)
            else:
                position, inside, x_offset, out_offset = locate(
                    first_row + tile * BLOCK_M, rows, x_batch_stride, out_batch_stride, H, W, GROUP_ROWS, BLOCK_M,
                    COLUMNS)
                mask = inside & (position < H * W)
                residual = _load_residual(residual_ptr, x_offset, mask)
                acc = tl.zeros((BLOCK_M, COLUMNS), tl.float32)
                tiles = ()
                for offset in tl.static_range(FIRST, LAST + 1):
                    source = position + offset * (GROUP_ROWS * W)
                    touched = inside & (source >= 0) & (source < H * W)
                    x = tl.load(x_ptr + x_offset + offset * (GROUP_ROWS * W), mask=touched, other=0.0)
                    if PREFETCH:
                        tiles = tiles + (x,)  # type: ignore[assignment]
                    else:
                        acc = matmul(x, toeplitz[offset - FIRST], acc, 'tf32')
                if PREFETCH:
                    for index in tl.static_range(LAST + 1 - FIRST):
                        acc = matmul(tiles[index], toeplitz[index], acc, 'tf32')
                zeros += _find_non_finite(acc, BLOCK_M, COLUMNS)
                _epilogue(acc, bias, scale, shift, residual, out_ptr + out_offset, mask, ACT, HALF)
        regular = tl.sum(zeros) == 0.0
    if not regular:
        for part in range(ROWS // TAPS_M):
            _mix_taps(
                x_ptr, weight_ptr, bias, scale, shift, residual_ptr, out_ptr, first_row + part * TAPS_M, rows,
                x_batch_stride, out_batch_stride, H, W, KERNEL, FLIP, BEFORE, ACT, HALF, GROUP_ROWS, TAPS_M, COLUMNS)


# Row groups of a map from which on a program goes through those of its images. Measured: 16 gain, 4 lose.
BY_IMAGE_GROUPS = 8
# Columns of all row groups that a program then keeps sums of, at most: they must fit into registers.
BY_IMAGE_COLUMNS = 320


class DepthwiseConfig(NamedTuple):
    """How the kernel is launched.

    Attributes:
        group_rows: Rows of a row group.
        block_m: Row groups of a tile.
        tiles: Tiles of a program.
        num_warps: Warps of a program.
        prefetch: Whether all loads of a tile go before its first product.
        by_image: Whether the rows of a tile are the same row group of ``block_m`` images. A program goes through all
            row groups of its images and loads each once.
        taps: Whether every tile is computed tap by tap, without a matrix product.
    """
    group_rows: int
    block_m: int
    tiles: int
    num_warps: int
    prefetch: bool = False
    by_image: bool = False
    taps: bool = False


def reach(height: int, kernel_size: int, group_rows: int, flip: bool = False) -> Tuple[int, int]:
    """The first and the last row group, counted from its own, that a row group's receptive field touches in a map."""
    groups = -(-height // group_rows)
    before = (kernel_size - 1 + flip) // 2
    first = -((before + group_rows - 1) // group_rows)
    last = (group_rows - 1 + kernel_size - 1 - before) // group_rows
    return max(first, 1 - groups), min(last, groups - 1)


def columns_of(width: int, group_rows: int) -> int:
    """Columns of a tile: those of a row group, rounded up to what a matrix product takes."""
    return max(16, round_up(group_rows * width))


def tiles_per_program(tiles: int, channels: int, processors: int, products: int = 1) -> int:
    """Many, so that the Toeplitz matrices of a channel are built once, yet so few that there is work for the chip.

    Args:
        tiles: Tiles of a channel.
        channels: Channels.
        processors: Multiprocessors of the device.
        products: Row groups that a program goes through for a tile.
    """
    build = 2.5  # products that building the matrices is worth, from instruction counts

    def cost(each: int) -> float:
        waves = -(-channels * -(-tiles // each) // (2 * processors))
        return waves * (each * products + build)

    return min((1, 2, 4, 8) if products > 1 else (1, 4, 16, 64), key=cost)


def candidates(
        shape: Tuple[int, ...],
        kernel_size: int,
        dtype: torch.dtype,
        precision: str,
        limits: DeviceLimits,
        flip: bool = False,
) -> List[DepthwiseConfig]:
    """The configurations worth trying for maps of (B, C, H, W), first the one that is launched.

    A batch counts as the next power of two, so that not every size of it is compiled for.
    """
    batch, channels, height, width = round_up(shape[0]), *shape[1:]
    # Products of 64 columns keep the tensor cores busier than the shared memory that feeds them.
    group_rows = max(1, min(height, MAX_WIDTH // width))
    first, last = reach(height, kernel_size, group_rows, flip)
    matrices, columns, groups = last + 1 - first, columns_of(width, group_rows), -(-height // group_rows)
    rows, image_tiles = batch * groups, -(-shape[0] // 64)
    found: List[DepthwiseConfig] = []
    if (
        limits.has_async_products and dtype != torch.float32 and groups >= BY_IMAGE_GROUPS and last > first
        and matrices * columns <= BY_IMAGE_COLUMNS
        # Most of a tile's rows must be images.
        and 64 * image_tiles <= 1.25 * shape[0]
    ):
        tiles = tiles_per_program(round_up(image_tiles), channels, limits.processors, groups + last)
        found.append(DepthwiseConfig(group_rows, 64, tiles, num_warps=8, by_image=True))
    # Measured: prefetching pays if there is shared memory for several programs nonetheless.
    few = matrices <= 3
    for block_m, num_warps, prefetch in ((64, 4, few), (64, 4, not few), (128, 8, False)):
        if rows < 64:
            block_m, num_warps = 16, 4
        # The matrices, and the tiles that are fetched at once, all in shared memory.
        kept = columns * columns * matrices + block_m * columns * (matrices if prefetch else 1)
        if kept * dtype.itemsize > limits.shared_memory:
            continue
        tiles = tiles_per_program(-(-rows // block_m), channels, limits.processors)
        config = DepthwiseConfig(group_rows, block_m, tiles, num_warps, prefetch)
        if config not in found:
            found.append(config)
    if found and precision == 'tf32':
        return found
    return [DepthwiseConfig(
        group_rows, 16, tiles_per_program(-(-rows // 16), channels, limits.processors), num_warps=4, taps=True)]


def make_launch(
        device: torch.device,
        shape: Tuple[int, ...],
        kernel_size: int,
        config: DepthwiseConfig,
        act: str = 'none',
        flip: bool = False,
        x_batch_stride: Optional[int] = None,
        out_batch_stride: Optional[int] = None,
) -> Launch:
    """The launch for maps of ``shape`` in one configuration.

    It takes x, weight, bias, scale, shift, residual and out. The strides are those of contiguous maps by default.
    """
    batch, channels, height, width = shape
    rows = batch if config.by_image else batch * -(-height // config.group_rows)
    first, last = reach(height, kernel_size, config.group_rows, flip)
    image = channels * height * width
    return Launch(
        depthwise_kernel,
        device,
        channels * -(-rows // (config.block_m * config.tiles)),
        (batch, channels, x_batch_stride or image, out_batch_stride or image),
        dict(
            H=height,
            W=width,
            KERNEL=kernel_size,
            FLIP=flip,
            ACT=act,
            TAPS=config.taps,
            GROUP_ROWS=config.group_rows,
            FIRST=first,
            LAST=last,
            BLOCK_M=config.block_m,
            COLUMNS=columns_of(width, config.group_rows),
            TILES=config.tiles,
            ROWS=config.tiles * config.block_m * (-(-height // config.group_rows) if config.by_image else 1),
            PREFETCH=config.prefetch,
            BY_IMAGE=config.by_image,
        ),
        config.num_warps,
        num_stages=1,
        # Two programs a multiprocessor, where the compiler would take the registers of both for one.
        max_registers=128 if config.by_image else None,
    )


@functools.lru_cache(maxsize=MAX_PROBLEMS)
def _launch(
        device: torch.device,
        shape: Tuple[int, ...],
        kernel_size: int,
        dtype: torch.dtype,
        precision: str,
        act: str,
        flip: bool,
        arguments: Tuple[Optional[torch.dtype], ...],
) -> Launch:
    """The launch for a problem; ``arguments`` are the dtypes of the other tensors, None where one is absent."""
    config = candidates(shape, kernel_size, dtype, precision, device_limits(device), flip)[0]
    return make_launch(device, shape, kernel_size, config, act, flip)


def _run(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor] = None,
        scale: Optional[torch.Tensor] = None,
        shift: Optional[torch.Tensor] = None,
        residual: Optional[torch.Tensor] = None,
        act: str = 'none',
        flip: bool = False,
) -> torch.Tensor:
    arguments = tuple(None if t is None else t.dtype for t in (weight, bias, scale, shift, residual))
    launch = _launch(x.device, x.shape, weight.shape[2], x.dtype, input_precision(x.dtype), act, flip, arguments)
    out = torch.empty_like(x)
    launch(x, weight, bias, scale, shift, residual, out)
    return out


def depthwise_mixing_ref(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor],
        scale: torch.Tensor,
        shift: Optional[torch.Tensor],
        act: str = 'gelu',
) -> torch.Tensor:
    """:func:`depthwise_mixing` in plain PyTorch."""
    y = activate_ref(depthwise_convolution_ref(x, weight, bias), act)
    scale = scale.view(-1, 1, 1)
    branch = y * scale if shift is None else torch.addcmul(shift.view(-1, 1, 1), y, scale)
    return (x + branch).to(y.dtype)


def depthwise_mixing(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor],
        scale: torch.Tensor,
        shift: Optional[torch.Tensor],
        act: str = 'gelu',
) -> torch.Tensor:
    """``x + scale * act(depthwise_conv(x, weight) + bias) + shift``: the first half of a block in inference.

    Not differentiable. Nothing is checked: ask :func:`~.support.kernel_refusal` first. Products are accumulated, and
    the result is finished, in float32; products of float32 are TF32 or IEEE as ``torch.backends.cudnn`` says for
    convolutions. Infinities and NaN reach the outputs that PyTorch's convolution lets them reach.

    Args:
        x: Input, (B, C, H, W), contiguous, on a CUDA device; float32, float16 or bfloat16.
        weight: Depthwise kernel, (C, 1, k, k), contiguous, rounded to the dtype of ``x``. As in PyTorch, an even k
            pads one more on the right and the bottom.
        bias: (C,) or None, contiguous, of the dtype of ``x`` or float32, as are ``scale`` and ``shift``.
        scale: (C,), ``weight / sqrt(running_var + eps)`` of the BatchNorm that follows the activation.
        shift: (C,), ``bias - running_mean * scale`` of that BatchNorm; None where what follows has it in its bias.
        act: ``'gelu'`` (with the error function), ``'relu'`` or ``'none'``.

    Returns:
        (B, C, H, W), contiguous, of the dtype of ``x``.
    """
    return _run(x, weight, bias, scale, shift, residual=x, act=act)


def depthwise_convolution_ref(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor],
) -> torch.Tensor:
    """:func:`depthwise_convolution` in plain PyTorch."""
    return F.conv2d(x, weight, None if bias is None else bias.to(x.dtype), padding='same', groups=weight.shape[0])


def depthwise_convolution(x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor]) -> torch.Tensor:
    """``F.conv2d(x, weight, bias, padding='same', groups=C)``, for training.

    Not differentiable by itself: its gradients are :func:`depthwise_input_gradient` and
    :func:`~.depthwise_weight_gradient.depthwise_weight_gradient`. Nothing is checked: ask
    :func:`~.support.kernel_refusal` first. Arithmetic as in :func:`depthwise_mixing`.

    Args:
        x: Input, (B, C, H, W), contiguous, on a CUDA device; float32, float16 or bfloat16.
        weight: Depthwise kernel, (C, 1, k, k), contiguous, rounded to the dtype of ``x``.
        bias: (C,) or None, contiguous, of the dtype of ``x`` or float32.

    Returns:
        (B, C, H, W), contiguous, of the dtype of ``x``.
    """
    return _run(x, weight, bias)


def depthwise_input_gradient_ref(
        grad: torch.Tensor,
        weight: torch.Tensor,
        residual: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """:func:`depthwise_input_gradient` in plain PyTorch."""
    # Of the input only the shape matters.
    out, _, _ = convolution_gradients_ref(grad, grad, weight, (True, False, False))
    return out if residual is None else out + residual


def depthwise_input_gradient(
        grad: torch.Tensor,
        weight: torch.Tensor,
        residual: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """The gradient of :func:`depthwise_convolution` with respect to its input, plus a residual.

    Not differentiable, nothing checked, arithmetic: as there.

    Args:
        grad: Gradient of the output, (B, C, H, W).
        weight: Depthwise kernel, (C, 1, k, k), contiguous, rounded to the dtype of ``grad``.
        residual: What to add, such as the gradient that arrives past the convolution: like ``grad``, or None.

    Returns:
        (B, C, H, W), contiguous, of the dtype of ``grad``.
    """
    # Autograd hands on gradients in any layout.
    residual = None if residual is None else residual.contiguous()
    return _run(grad.contiguous(), weight, residual=residual, flip=True)
