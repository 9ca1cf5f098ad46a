"""The kernels around the convolutions in training: each goes over a map once and is bound by memory.

A map is (batch, channels, POSITIONS), contiguous. A tile is `PLANES` rows of `WIDTH` positions: of one channel in
several images where a kernel sums over a channel, of neighbouring planes (an image's channel each) where it does not.
"""
import triton
import triton.language as tl

from .common_triton import activate, activate_backward


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
    """One program: mean and sum of squared deviations of act(x) for one channel of `IMAGES` images.

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
            # An element that is inside now has been so in all steps before.
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
def merge_statistics_kernel(
        partial_ptr,
        mean_ptr,
        var_ptr,
        batch,
        channels,
        POSITIONS: tl.constexpr,
        IMAGES: tl.constexpr,
        CHUNKS: tl.constexpr,
        BLOCK: tl.constexpr,
):
    """One program: mean and variance of `BLOCK` channels from their parts, of which there are at most `CHUNKS`."""
    chunks = tl.cdiv(batch, IMAGES)
    chunk = tl.arange(0, CHUNKS)[:, None]
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (chunk < chunks) & (channel < channels)
    offset = chunk * channels + channel
    # In images: the counts of positions are all the same multiple of it.
    share = tl.where(chunk < chunks, tl.minimum(IMAGES, batch - chunk * IMAGES), 0).to(tl.float32) / batch
    part_mean = tl.load(partial_ptr + offset, mask=inside, other=0.0)
    part_squares = tl.load(partial_ptr + chunks * channels + offset, mask=inside, other=0.0)
    mean = tl.sum(part_mean * share, axis=0)[None, :]
    deviation = part_mean - mean
    var = tl.sum(part_squares / batch / POSITIONS + deviation * deviation * share, axis=0)[None, :]
    tl.store(mean_ptr + channel, mean, mask=channel < channels)
    tl.store(var_ptr + channel, var, mask=channel < channels)


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
        HAS_RESIDUAL: tl.constexpr,
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
    if HAS_RESIDUAL:
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
    """One program: the sums of grad and of grad * (act(x) - mean) for one channel of `IMAGES` images.

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
def input_gradient_kernel(
        grad_ptr,
        x_ptr,
        weight_ptr,
        mean_ptr,
        invstd_ptr,
        grad_weight_ptr,
        grad_bias_ptr,
        out_ptr,
        planes,
        channels,
        POSITIONS: tl.constexpr,
        ACT: tl.constexpr,
        HAS_WEIGHT: tl.constexpr,
        BATCH_STATISTICS: tl.constexpr,
        PLANES: tl.constexpr,
        WIDTH: tl.constexpr,
):
    """One program: the gradient with respect to x for one tile."""
    HALF: tl.constexpr = out_ptr.dtype.element_ty != tl.float32
    offset, inside, channel = _locate_planes(planes, channels, POSITIONS, PLANES, WIDTH)
    x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(invstd_ptr + channel)
    if BATCH_STATISTICS:
        # Mean and variance move with x: what they explain of the gradient is taken out of it.
        count = tl.cast(planes // channels, tl.float32) * POSITIONS
        slope = tl.load(grad_weight_ptr + channel) / count * scale
        constant = tl.load(grad_bias_ptr + channel) / count
        grad -= constant + (activate(x, ACT, HALF) - tl.load(mean_ptr + channel)) * slope
    if HAS_WEIGHT:
        scale *= tl.load(weight_ptr + channel).to(tl.float32)
    grad = activate_backward(grad * scale, x, ACT, HALF)
    tl.store(out_ptr + offset, grad.to(out_ptr.dtype.element_ty), mask=inside)
