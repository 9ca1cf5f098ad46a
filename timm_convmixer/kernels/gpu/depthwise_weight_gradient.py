"""The gradient of a depthwise convolution's weight and bias, on tensor cores.

Cut into row groups as in ``depthwise.py``, a map and the gradient of its convolution meet in

    product_d = sum over row groups of x[group + d]^T @ grad[group]

whose element ``[(g', w'), (g, w)]`` belongs to the tap in row ``g' - g + d * GROUP_ROWS + before`` and column
``w' - w + before``: a tap's gradient is the sum of a diagonal, or of the part of one. The products are summed over all
row groups first, in fp32 registers, and the diagonals once at the end, by turning row ``i`` of the matrix by ``i``
places and summing its columns.

A program sums over some of the images and leaves its sums in memory of its own, a second kernel adds those up: no
atomic operation, the same bits each time.

Each element of a product is a sum of products of real elements, and those that are no tap's are left out, not
multiplied by zero. But beyond the map's upper and lower edges x is zero, and zero times an infinity is NaN. A program
whose products are not finite therefore computes its sums again tap by tap.

None of these functions is differentiable.
"""
import functools
from typing import List, NamedTuple, Optional, Tuple

import torch
import triton
import triton.language as tl

from ..convolution import convolution_gradients_ref
from ..support import opmath_dtype
from .common import ONES, TAPS_M, locate, matmul
from .depthwise import columns_of, reach, tiles_per_program
from .launch import MAX_PROBLEMS, DeviceLimits, Launch, device_limits, input_precision, round_up
from .support import MAX_WIDTH, weight_gradient_refusal

__all__ = ['depthwise_weight_gradient', 'depthwise_weight_gradient_ref']


@triton.jit
def _sum_diagonals(product, W: tl.constexpr, KERNEL: tl.constexpr, GROUP_ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sums along the diagonals ``source - target = i`` and ``... = i - COLUMNS``, of the elements that are a tap's."""
    source = tl.arange(0, COLUMNS)[:, None]
    target = (source - tl.arange(0, COLUMNS)[None, :]) & (COLUMNS - 1)
    turned = tl.gather(product, target, 1)
    tap_col = source % W - target % W + (KERNEL - 1) // 2
    inside = (tap_col >= 0) & (tap_col < KERNEL) & (source < GROUP_ROWS * W) & (target < GROUP_ROWS * W)
    above = tl.sum(tl.where(inside & (source >= target), turned, 0.0), axis=0)
    below = tl.sum(tl.where(inside & (source < target), turned, 0.0), axis=0)
    return above, below


@triton.jit
def _sum_taps(
        x_ptr,
        grad_ptr,
        out_ptr,
        start,
        rows,
        x_batch_stride,
        grad_batch_stride,
        H: tl.constexpr,
        W: tl.constexpr,
        KERNEL: tl.constexpr,
        GROUP_ROWS: tl.constexpr,
        BLOCK_M: tl.constexpr,
        COLUMNS: tl.constexpr,
        TILES: tl.constexpr,
):
    """The gradient of each tap by its definition, in fp32, reading nothing outside the map."""
    BEFORE: tl.constexpr = (KERNEL - 1) // 2
    for tap in range(KERNEL * KERNEL):
        dy = tap // KERNEL - BEFORE
        dx = tap % KERNEL - BEFORE
        acc = tl.zeros((BLOCK_M, COLUMNS), tl.float32)
        for tile in range(TILES):
            position, inside, x_offset, grad_offset = locate(
                start + tile * BLOCK_M, rows, x_batch_stride, grad_batch_stride, H, W, GROUP_ROWS, BLOCK_M, COLUMNS)
            row = position // W + dy
            col = position % W + dx
            mask = inside & (position < H * W) & (row >= 0) & (row < H) & (col >= 0) & (col < W)
            x = tl.load(x_ptr + x_offset + (dy * W + dx), mask=mask, other=0.0).to(tl.float32)
            grad = tl.load(grad_ptr + grad_offset, mask=mask, other=0.0).to(tl.float32)
            acc += x * grad
        tl.store(out_ptr + tap, tl.sum(acc))


@triton.jit
def weight_gradient_kernel(
        x_ptr,
        grad_ptr,
        partial_ptr,
        batch,
        channels,
        x_batch_stride,
        grad_batch_stride,
        H: tl.constexpr,
        W: tl.constexpr,
        KERNEL: tl.constexpr,
        PRECISION: tl.constexpr,
        GROUP_ROWS: tl.constexpr,
        FIRST: tl.constexpr,
        LAST: tl.constexpr,
        BLOCK_M: tl.constexpr,
        COLUMNS: tl.constexpr,
        TILES: tl.constexpr,
        SLOTS: tl.constexpr,
        ONES: tl.constexpr,
        PIPELINED: tl.constexpr,
):
    """One program: one channel, ``TILES`` tiles of ``BLOCK_M`` row groups.

    x and grad are (batch, channels, H, W), contiguous but for the stride between images. partial is (chunks, channels,
    numbers): two vectors of diagonals for each product, a number for each tap, one for the bias. ``SLOTS`` is the count
    of the last two, rounded up to a power of two. ``PRECISION`` is 'ieee' or 'tf32'.
    """
    DIAGONALS: tl.constexpr = (LAST + 1 - FIRST) * 2 * COLUMNS

    program = tl.program_id(0)
    channel = program % channels
    chunk = program // channels
    x_ptr += channel.to(tl.int64) * (H * W)
    grad_ptr += channel.to(tl.int64) * (H * W)
    partial_ptr += program.to(tl.int64) * (DIAGONALS + KERNEL * KERNEL + 1)

    rows = batch * ((H + GROUP_ROWS - 1) // GROUP_ROWS)
    start = chunk * (TILES * BLOCK_M)
    products = ()
    for _ in tl.static_range(FIRST, LAST + 1):
        products = products + (tl.zeros((COLUMNS, COLUMNS), tl.float32),)  # type: ignore[assignment]
    # The bias' gradient is a product with ones where the loop is pipelined: Triton 3.6 gives a tile that is also summed
    # up in registers a buffer too few, and loads the next one over it while products still read it.
    if PIPELINED:
        ones = tl.full((BLOCK_M, ONES), 1.0, tl.float32).to(grad_ptr.dtype.element_ty)
        sums = tl.zeros((COLUMNS, ONES), tl.float32)
    else:
        sums = tl.zeros((BLOCK_M, COLUMNS // 8), tl.float32)
    for tile in range(TILES):
        position, inside, x_offset, grad_offset = locate(
            start + tile * BLOCK_M, rows, x_batch_stride, grad_batch_stride, H, W, GROUP_ROWS, BLOCK_M, COLUMNS)
        grad = tl.load(grad_ptr + grad_offset, mask=inside & (position < H * W), other=0.0)
        if PIPELINED:
            sums = matmul(tl.trans(grad), ones, sums, PRECISION)
        else:
            # By eights, as a thread loads them: fewer registers are held for the sums, and nothing is exchanged.
            sums += tl.sum(tl.reshape(grad.to(tl.float32), (BLOCK_M, COLUMNS // 8, 8)), axis=2)
        added = ()
        for offset in tl.static_range(FIRST, LAST + 1):
            moved = position + offset * (GROUP_ROWS * W)
            mask = inside & (moved >= 0) & (moved < H * W)
            x = tl.load(x_ptr + x_offset + offset * (GROUP_ROWS * W), mask=mask, other=0.0)
            added = added + (matmul(tl.trans(x), grad, products[offset - FIRST], PRECISION),)  # type: ignore[assignment]
        products = added

    regular = 0.0
    for index in tl.static_range(LAST + 1 - FIRST):
        regular += tl.sum(products[index] * 0.0)
    column = tl.arange(0, COLUMNS)
    tap = tl.arange(0, SLOTS)
    tap_ptr = partial_ptr + DIAGONALS
    if regular == 0.0:
        for index in tl.static_range(LAST + 1 - FIRST):
            above, below = _sum_diagonals(products[index], W, KERNEL, GROUP_ROWS, COLUMNS)
            tl.store(partial_ptr + index * (2 * COLUMNS) + column, above)
            tl.store(partial_ptr + index * (2 * COLUMNS) + COLUMNS + column, below)
        tl.store(tap_ptr + tap, tl.zeros((SLOTS,), tl.float32), mask=tap < KERNEL * KERNEL)
    else:
        for index in tl.static_range(2 * (LAST + 1 - FIRST)):
            tl.store(partial_ptr + index * COLUMNS + column, tl.zeros((COLUMNS,), tl.float32))
        _sum_taps(
            x_ptr, grad_ptr, tap_ptr, start, rows, x_batch_stride, grad_batch_stride, H, W, KERNEL, GROUP_ROWS, TAPS_M,
            COLUMNS, TILES * BLOCK_M // TAPS_M)
    bias_grad = tl.sum(sums)
    if PIPELINED:
        bias_grad = bias_grad * (1.0 / ONES)  # all columns are the same
    tl.store(tap_ptr + KERNEL * KERNEL, bias_grad)


@triton.jit
def merge_weight_gradient_kernel(
        partial_ptr,
        weight_grad_ptr,
        bias_grad_ptr,
        chunks,
        channels,
        W: tl.constexpr,
        KERNEL: tl.constexpr,
        GROUP_ROWS: tl.constexpr,
        FIRST: tl.constexpr,
        LAST: tl.constexpr,
        COLUMNS: tl.constexpr,
        SLOTS: tl.constexpr,
        CHUNKS: tl.constexpr,
):
    """One program: the gradients of one channel, from the sums of all chunks, of which there are at most ``CHUNKS``."""
    BEFORE: tl.constexpr = (KERNEL - 1) // 2
    DIAGONALS: tl.constexpr = (LAST + 1 - FIRST) * 2 * COLUMNS

    channel = tl.program_id(0)
    # The number after the taps' is the bias'.
    tap = tl.arange(0, SLOTS)
    total = tl.zeros((SLOTS,), tl.float32)
    for chunk in range(CHUNKS):
        inside = (tap <= KERNEL * KERNEL) & (tap * 0 + chunk < chunks)
        chunk_ptr = partial_ptr + (chunk * channels + channel).to(tl.int64) * (DIAGONALS + KERNEL * KERNEL + 1)
        total += tl.load(chunk_ptr + DIAGONALS + tap, mask=inside, other=0.0)
        for offset in tl.static_range(FIRST, LAST + 1):
            # The tap's diagonal in this product, if its rows meet in it.
            rows = tap // KERNEL - BEFORE - offset * GROUP_ROWS
            diagonal = rows * W + tap % KERNEL - BEFORE
            slot = (offset - FIRST) * (2 * COLUMNS) + tl.where(diagonal < 0, diagonal + 2 * COLUMNS, diagonal)
            meets = inside & (tap < KERNEL * KERNEL) & (rows > -GROUP_ROWS) & (rows < GROUP_ROWS)
            total += tl.load(chunk_ptr + slot, mask=meets, other=0.0)
    tl.store(weight_grad_ptr + channel * (KERNEL * KERNEL) + tap, total, mask=tap < KERNEL * KERNEL)
    # One element of it.
    tl.store(bias_grad_ptr + channel + tap * 0, total, mask=tap == KERNEL * KERNEL)


class WeightGradientConfig(NamedTuple):
    """How the kernel is launched.

    Attributes:
        group_rows: Rows of a row group.
        block_m: Row groups of a tile.
        tiles: Tiles of a program.
        num_warps: Warps of a program.
        num_stages: Loads in flight.
    """
    group_rows: int
    block_m: int
    tiles: int
    num_warps: int
    num_stages: int


def candidates(
        shape: Tuple[int, ...],
        kernel_size: int,
        dtype: torch.dtype,
        precision: str,
        limits: DeviceLimits,
) -> List[WeightGradientConfig]:
    """The configurations worth trying, first the one that is launched; none if none fits into registers and memory.

    A batch counts as the next power of two, so that not every size of it is compiled for.
    """
    batch, channels, height, width = round_up(shape[0]), *shape[1:]
    # Narrower than the kernel, diagonals of different rows would fall together.
    group_rows = max(1, min(height, MAX_WIDTH // width)) if width >= kernel_size else 1
    columns = columns_of(width, group_rows)
    first, last = reach(height, kernel_size, group_rows)
    products = last + 1 - first
    # A product is ``columns`` squared sums in fp32, for which a thread has room for about a hundred. Without tensor
    # cores the operands are in registers as well, and of 16 warps no thread has enough.
    without_tensor_cores = dtype == torch.float32 and precision == 'ieee'
    room, sizes = (80, (4, 8)) if without_tensor_cores else (96, (4, 8, 16))
    fitting = [num_warps for num_warps in sizes if products * columns * columns <= room * 32 * num_warps]
    rows = batch * -(-height // group_rows)
    found: List[WeightGradientConfig] = []
    for block_m, num_stages in ((64, 3), (64, 2), (32, 3), (64, 1)):
        if rows < 64 or without_tensor_cores:
            block_m, num_stages = 16, 1
        if dtype == torch.float32:
            # A product with ones would be as imprecise as TF32, so that the loop cannot be pipelined.
            num_stages = 1
        kept = num_stages * (products + 1) if num_stages > 1 else 2
        if not fitting or dtype.itemsize * columns * block_m * kept > limits.shared_memory:
            continue
        tiles = tiles_per_program(-(-rows // block_m), channels, limits.processors)
        config = WeightGradientConfig(group_rows, block_m, tiles, fitting[0], num_stages)
        if config not in found:
            found.append(config)
    return found


class WeightGradientLaunches(NamedTuple):
    """The two launches of a gradient, and the shape of what the first leaves for the second, in float32."""
    sums: Launch
    merge: Launch
    partial_shape: Tuple[int, int, int]

    def __call__(self, x: torch.Tensor, grad: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        channels, kernel_size = x.shape[1], self.merge.constants['KERNEL']
        partial = torch.empty(self.partial_shape, dtype=torch.float32, device=x.device)
        weight_grad = torch.empty((channels, 1, kernel_size, kernel_size), dtype=torch.float32, device=x.device)
        bias_grad = torch.empty(channels, dtype=torch.float32, device=x.device)
        self.sums(x, grad, partial)
        self.merge(partial, weight_grad, bias_grad)
        return weight_grad, bias_grad


def make_launches(
        device: torch.device,
        shape: Tuple[int, ...],
        kernel_size: int,
        config: WeightGradientConfig,
        precision: str,
        x_batch_stride: Optional[int] = None,
        grad_batch_stride: Optional[int] = None,
) -> WeightGradientLaunches:
    """The launches for maps of ``shape`` in one configuration; the strides are those of contiguous maps by default."""
    batch, channels, height, width = shape
    rows = batch * -(-height // config.group_rows)
    chunks = -(-rows // (config.block_m * config.tiles))
    columns = columns_of(width, config.group_rows)
    first, last = reach(height, kernel_size, config.group_rows)
    image = channels * height * width
    constants = dict(
        W=width,
        KERNEL=kernel_size,
        GROUP_ROWS=config.group_rows,
        FIRST=first,
        LAST=last,
        COLUMNS=columns,
        SLOTS=round_up(kernel_size * kernel_size + 1),
    )
    sums = Launch(
        weight_gradient_kernel,
        device,
        channels * chunks,
        (batch, channels, x_batch_stride or image, grad_batch_stride or image),
        dict(
            constants,
            H=height,
            PRECISION=precision,
            BLOCK_M=config.block_m,
            TILES=config.tiles,
            ONES=ONES,
            PIPELINED=config.num_stages > 1,
        ),
        config.num_warps,
        config.num_stages,
    )
    merge = Launch(
        merge_weight_gradient_kernel,
        device,
        channels,
        (chunks, channels),
        dict(constants, CHUNKS=round_up(chunks)),
        num_warps=1,
    )
    slots = (last + 1 - first) * 2 * columns + kernel_size * kernel_size + 1
    return WeightGradientLaunches(sums, merge, (chunks, channels, slots))


@functools.lru_cache(maxsize=MAX_PROBLEMS)
def _launches(
        device: torch.device,
        shape: Tuple[int, ...],
        kernel_size: int,
        dtype: torch.dtype,
        precision: str,
) -> Optional[WeightGradientLaunches]:
    configs = candidates(shape, kernel_size, dtype, precision, device_limits(device))
    return make_launches(device, shape, kernel_size, configs[0], precision) if configs else None


def depthwise_weight_gradient_ref(
        x: torch.Tensor,
        grad: torch.Tensor,
        kernel_size: int,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """:func:`depthwise_weight_gradient` in plain PyTorch."""
    weight = x.new_empty(x.shape[1], 1, kernel_size, kernel_size)
    _, weight_grad, bias_grad = convolution_gradients_ref(grad, x, weight, (False, True, True))
    dtype = opmath_dtype(x.dtype)
    return weight_grad.to(dtype), bias_grad.to(dtype)


def depthwise_weight_gradient(
        x: torch.Tensor,
        grad: torch.Tensor,
        kernel_size: int,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """The gradients of :func:`~.depthwise.depthwise_convolution` with respect to its weight and its bias.

    Where :func:`~.support.weight_gradient_refusal` says why, and for IEEE float32 with kernels larger than 5 on maps
    wider than 32, whose sums do not fit into registers, PyTorch's operator computes them. The kernel is deterministic:
    sums are split by the shape alone and merged in a fixed order, without atomic operations. Products of float32 are
    TF32 or IEEE as ``torch.backends.cudnn`` says for convolutions. Not differentiable.

    Args:
        x: Input of the convolution, (B, C, H, W), contiguous, on a CUDA device; float32, float16 or bfloat16.
        grad: Gradient of its output, of the shape and dtype of ``x``.
        kernel_size: Side k of the kernels.

    Returns:
        The gradient of the weight, (C, 1, k, k), and of the bias, (C,), in float32, in which they are accumulated.
    """
    device, dtype, shape = x.device, x.dtype, x.shape
    launches = None
    if not weight_gradient_refusal(device, dtype, shape, kernel_size):
        launches = _launches(device, shape, kernel_size, dtype, input_precision(dtype))
    if launches is None:
        return depthwise_weight_gradient_ref(x, grad, kernel_size)
    # Autograd hands on gradients in any layout.
    return launches(x, grad.contiguous())
