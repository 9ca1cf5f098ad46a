"""The depthwise kernel: k x k depthwise convolution, bias, activation, scale, shift and residual in one pass.

The same kernel without activation, scale and shift is the convolution by itself; with its taps turned round, the
gradient of the convolution's input.

A depthwise convolution has too little arithmetic per byte for a convolution library and too much for the ordinary
units. In NCHW, however, a channel's rows are contiguous, so `GROUP` consecutive rows of an H x W map are one vector of
`GROUP * W` numbers. Cut every map into such groups. The group `d` places away from an output group contributes a fixed
linear map of it,

    out[group] = sum over d of x[group + d] @ band_d
    band_d[(g', w'), (g, w)] = weight[g' - g + d * GROUP + top, w' - w + left]

with zeros where the index leaves the kernel: a banded matrix. Rows of many images stack into one matrix product on the
tensor cores, zero padding costs nothing, and the bands are built once per channel and used for many images. `GROUP = 1`
is one band per kernel row; larger groups fetch each row fewer times (for k = 9 and W = 32, `GROUP = 2` needs 5 offsets
instead of 9).

A product with a zero of the band turns an infinity or NaN anywhere in the group into NaN everywhere in it. Such a tile
shows in its accumulator (0 * inf = NaN), and is then computed again tap by tap, as is everything when fp32 has to be
IEEE.
"""
import triton
import triton.language as tl

from .common_triton import activate, matmul


@triton.jit
def _load_tap(weight_ptr, tap, mask, KERNEL: tl.constexpr, FLIP: tl.constexpr):
    if FLIP:
        tap = KERNEL * KERNEL - 1 - tap
    return tl.load(weight_ptr + tap, mask=mask, other=0.0)


@triton.jit
def _build_band(
        weight_ptr,
        offset,
        W: tl.constexpr,
        KERNEL: tl.constexpr,
        FLIP: tl.constexpr,
        GROUP: tl.constexpr,
        BLOCK_K: tl.constexpr,
):
    """The matrix (BLOCK_K, BLOCK_K) that takes the row group `offset` places away to its share of the output group."""
    # PyTorch's padding='same': the smaller half of KERNEL - 1 goes to the top and to the left; turned round, the
    # larger.
    BEFORE: tl.constexpr = (KERNEL - 1 + FLIP) // 2
    source = tl.arange(0, BLOCK_K)[:, None]
    target = tl.arange(0, BLOCK_K)[None, :]
    tap_row = source // W - target // W + offset * GROUP + BEFORE
    tap_col = source % W - target % W + BEFORE
    inside = (tap_row >= 0) & (tap_row < KERNEL) & (tap_col >= 0) & (tap_col < KERNEL)
    inside = inside & (source < GROUP * W) & (target < GROUP * W)
    return _load_tap(weight_ptr, tap_row * KERNEL + tap_col, inside, KERNEL, FLIP)


@triton.jit
def locate(
        start,
        rows,
        x_batch_stride,
        out_batch_stride,
        H: tl.constexpr,
        W: tl.constexpr,
        GROUP: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_K: tl.constexpr,
):
    """Position in the map, existence, and offsets in x and out of the tile of row groups from `start` on."""
    GROUPS: tl.constexpr = (H + GROUP - 1) // GROUP
    row = start + tl.arange(0, BLOCK_M)[:, None]
    col = tl.arange(0, BLOCK_K)[None, :]
    image = (row // GROUPS).to(tl.int64)
    position = (row % GROUPS) * (GROUP * W) + col
    inside = (row < rows) & (col < GROUP * W)
    return position, inside, image * x_batch_stride + position, image * out_batch_stride + position


@triton.jit
def _finish(
        acc,
        residual_ptrs,
        out_ptrs,
        bias,
        scale,
        shift,
        mask,
        ACT: tl.constexpr,
        AFFINE: tl.constexpr,
        HAS_RESIDUAL: tl.constexpr,
        HALF: tl.constexpr,
):
    """Bias, activation, scale, shift and residual, and the only store."""
    out = activate(acc + bias, ACT, HALF)
    if AFFINE:
        out = out * scale + shift
    if HAS_RESIDUAL:
        out = tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32) + out
    tl.store(out_ptrs, out.to(out_ptrs.dtype.element_ty), mask=mask)


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
        ACT: tl.constexpr,
        AFFINE: tl.constexpr,
        HAS_RESIDUAL: tl.constexpr,
        HALF: tl.constexpr,
        GROUP: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_K: tl.constexpr,
):
    """A tile by the definition of the convolution, in fp32, reading nothing outside the receptive field."""
    BEFORE: tl.constexpr = (KERNEL - 1 + FLIP) // 2
    position, inside, x_offset, out_offset = locate(
        start, rows, x_batch_stride, out_batch_stride, H, W, GROUP, BLOCK_M, BLOCK_K)
    mask = inside & (position < H * W)
    row = position // W
    col = position % W
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for tap in range(KERNEL * KERNEL):
        dy = tap // KERNEL - BEFORE
        dx = tap % KERNEL - BEFORE
        touched = mask & (row + dy >= 0) & (row + dy < H) & (col + dx >= 0) & (col + dx < W)
        value = tl.load(x_ptr + x_offset + (dy * W + dx), mask=touched, other=0.0).to(tl.float32)
        weight = _load_tap(weight_ptr, tap, True, KERNEL, FLIP).to(tl.float32)
        # Outside the map nothing is added: 0 * weight would be NaN for an infinite weight.
        acc += tl.where(touched, value * weight, 0.0)
    _finish(
        acc, residual_ptr + x_offset, out_ptr + out_offset, bias, scale, shift, mask, ACT, AFFINE, HAS_RESIDUAL, HALF)


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
        HAS_BIAS: tl.constexpr,
        ACT: tl.constexpr,
        AFFINE: tl.constexpr,
        HAS_RESIDUAL: tl.constexpr,
        PRECISION: tl.constexpr,
        GROUP: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_K: tl.constexpr,
        STEPS: tl.constexpr,
        PREFETCH: tl.constexpr,
):
    """One program: one channel, `STEPS` tiles of `BLOCK_M` row groups.

    x, residual and out are (batch, channels, H, W), contiguous but for the stride between images, which is that of x
    for the residual. `FLIP` turns the taps round, `AFFINE` is scale and shift. `PRECISION` is 'ieee' or 'tf32', or
    'taps' for no matrix product at all. `PREFETCH` issues all loads of a tile before its first product: their latencies
    overlap, at the price of shared memory for all of them.
    """
    GROUPS: tl.constexpr = (H + GROUP - 1) // GROUP  # row groups in a map
    BEFORE: tl.constexpr = (KERNEL - 1 + FLIP) // 2
    # The row groups that an output group's receptive field touches, and that exist in a map of GROUPS groups.
    FIRST: tl.constexpr = max(-((BEFORE + GROUP - 1) // GROUP), 1 - GROUPS)
    LAST: tl.constexpr = min((GROUP - 1 + KERNEL - 1 - BEFORE) // GROUP, GROUPS - 1)
    TAPS_M: tl.constexpr = min(BLOCK_M, 16)  # tap by tap, a smaller tile: fewer registers are held for what rarely runs
    HALF: tl.constexpr = out_ptr.dtype.element_ty != tl.float32

    program = tl.program_id(0)
    # Neighbouring programs work on neighbouring channels of the same images, which are neighbours in memory.
    channel = program % channels
    chunk = program // channels

    weight_ptr += channel.to(tl.int64) * (KERNEL * KERNEL)
    x_ptr += channel.to(tl.int64) * (H * W)
    residual_ptr += channel.to(tl.int64) * (H * W)
    out_ptr += channel.to(tl.int64) * (H * W)
    bias = 0.0
    scale = 1.0
    shift = 0.0
    if HAS_BIAS:
        bias = tl.load(bias_ptr + channel).to(tl.float32)
    if AFFINE:
        scale = tl.load(scale_ptr + channel).to(tl.float32)
        shift = tl.load(shift_ptr + channel).to(tl.float32)

    bands = ()
    if PRECISION != 'taps':
        for offset in tl.static_range(FIRST, LAST + 1):
            bands = bands + (_build_band(weight_ptr, offset, W, KERNEL, FLIP, GROUP, BLOCK_K),)

    rows = batch * GROUPS
    for step in range(STEPS):
        start = (chunk * STEPS + step) * BLOCK_M
        regular = PRECISION != 'taps'
        if PRECISION != 'taps':
            position, inside, x_offset, out_offset = locate(
                start, rows, x_batch_stride, out_batch_stride, H, W, GROUP, BLOCK_M, BLOCK_K)
            acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
            tiles = ()
            for offset in tl.static_range(FIRST, LAST + 1):
                moved = position + offset * (GROUP * W)
                mask = inside & (moved >= 0) & (moved < H * W)
                tile = tl.load(x_ptr + x_offset + offset * (GROUP * W), mask=mask, other=0.0)
                if PREFETCH:
                    tiles = tiles + (tile,)
                else:
                    acc = matmul(tile, bands[offset - FIRST], acc, PRECISION)
            if PREFETCH:
                for index in tl.static_range(LAST + 1 - FIRST):
                    acc = matmul(tiles[index], bands[index], acc, PRECISION)
            regular = tl.sum(acc * 0.0) == 0.0
            if regular:
                mask = inside & (position < H * W)
                _finish(
                    acc, residual_ptr + x_offset, out_ptr + out_offset, bias, scale, shift, mask, ACT, AFFINE,
                    HAS_RESIDUAL, HALF)
        if not regular:
            for part in range(BLOCK_M // TAPS_M):
                _mix_taps(
                    x_ptr, weight_ptr, bias, scale, shift, residual_ptr, out_ptr, start + part * TAPS_M, rows,
                    x_batch_stride, out_batch_stride, H, W, KERNEL, FLIP, ACT, AFFINE, HAS_RESIDUAL, HALF, GROUP,
                    TAPS_M, BLOCK_K)
