"""The gradient of the weight and bias of a depthwise convolution, on tensor cores.

Cut into row groups as in `depthwise_triton.py`, a map and the gradient of its convolution meet in

    product_d = sum over row groups of x[group + d]^T @ grad[group]

whose element `[(g', w'), (g, w)]` belongs to the tap in row `g' - g + d * GROUP + before` and column `w' - w + before`:
a tap's gradient is the sum of a diagonal, or of the part of one. The products are summed over all row groups first, in
fp32 registers, and the diagonals once at the end, by turning row `i` of the matrix by `i` places and summing its
columns.

A program sums over some of the images and leaves its sums in memory of its own, a second kernel adds those up: no
atomic operation, the same bits each time.

Each element of a product is a sum of products of real elements, and those that are no tap's are left out, not
multiplied by zero. But beyond the map's upper and lower edges x is zero, and zero times an infinity is NaN. A program
whose products are not finite therefore computes its sums again tap by tap.
"""
import triton
import triton.language as tl

from .common_triton import matmul
from .depthwise_triton import locate


@triton.jit
def _sum_diagonals(product, W: tl.constexpr, KERNEL: tl.constexpr, GROUP: tl.constexpr, BLOCK_K: tl.constexpr):
    """Sums along the diagonals `source - target = i` and `source - target = i - BLOCK_K`, of what belongs to taps."""
    source = tl.arange(0, BLOCK_K)[:, None]
    target = (source - tl.arange(0, BLOCK_K)[None, :]) & (BLOCK_K - 1)
    turned = tl.gather(product, target, 1)
    tap_col = source % W - target % W + (KERNEL - 1) // 2
    inside = (tap_col >= 0) & (tap_col < KERNEL) & (source < GROUP * W) & (target < GROUP * W)
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
        GROUP: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_K: tl.constexpr,
        STEPS: tl.constexpr,
):
    """The gradient of each tap by its definition, in fp32, reading nothing outside the map."""
    BEFORE: tl.constexpr = (KERNEL - 1) // 2
    for tap in range(KERNEL * KERNEL):
        dy = tap // KERNEL - BEFORE
        dx = tap % KERNEL - BEFORE
        acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
        for step in range(STEPS):
            position, inside, x_offset, grad_offset = locate(
                start + step * BLOCK_M, rows, x_batch_stride, grad_batch_stride, H, W, GROUP, BLOCK_M, BLOCK_K)
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
        GROUP: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_K: tl.constexpr,
        STEPS: tl.constexpr,
        TAPS: tl.constexpr,
):
    """One program: one channel, `STEPS` tiles of `BLOCK_M` row groups.

    x and grad are (batch, channels, H, W), contiguous but for the stride between images. partial is (chunks, channels,
    slots): two vectors of diagonals for each product, a number for each tap, one for the bias. `TAPS` is the number of
    the last two, rounded up to a power of two. `PRECISION` is 'ieee' or 'tf32'.
    """
    GROUPS: tl.constexpr = (H + GROUP - 1) // GROUP
    BEFORE: tl.constexpr = (KERNEL - 1) // 2
    FIRST: tl.constexpr = max(-((BEFORE + GROUP - 1) // GROUP), 1 - GROUPS)
    LAST: tl.constexpr = min((GROUP - 1 + KERNEL - 1 - BEFORE) // GROUP, GROUPS - 1)
    DIAGONALS: tl.constexpr = (LAST + 1 - FIRST) * 2 * BLOCK_K
    TAPS_M: tl.constexpr = min(BLOCK_M, 16)  # as in the forward kernel

    program = tl.program_id(0)
    channel = program % channels
    chunk = program // channels
    x_ptr += channel.to(tl.int64) * (H * W)
    grad_ptr += channel.to(tl.int64) * (H * W)
    partial_ptr += program.to(tl.int64) * (DIAGONALS + KERNEL * KERNEL + 1)

    rows = batch * GROUPS
    start = chunk * (STEPS * BLOCK_M)
    products = ()
    for _ in tl.static_range(FIRST, LAST + 1):
        products = products + (tl.zeros((BLOCK_K, BLOCK_K), tl.float32),)
    sums = tl.zeros((BLOCK_M, BLOCK_K // 8), tl.float32)
    for step in range(STEPS):
        position, inside, x_offset, grad_offset = locate(
            start + step * BLOCK_M, rows, x_batch_stride, grad_batch_stride, H, W, GROUP, BLOCK_M, BLOCK_K)
        grad = tl.load(grad_ptr + grad_offset, mask=inside & (position < H * W), other=0.0)
        # By eights, as a thread loads them: fewer registers are held for the sums, and nothing is exchanged.
        sums += tl.sum(tl.reshape(grad.to(tl.float32), (BLOCK_M, BLOCK_K // 8, 8)), axis=2)
        added = ()
        for offset in tl.static_range(FIRST, LAST + 1):
            moved = position + offset * (GROUP * W)
            mask = inside & (moved >= 0) & (moved < H * W)
            x = tl.load(x_ptr + x_offset + offset * (GROUP * W), mask=mask, other=0.0)
            added = added + (matmul(tl.trans(x), grad, products[offset - FIRST], PRECISION),)
        products = added

    regular = 0.0
    for index in tl.static_range(LAST + 1 - FIRST):
        regular += tl.sum(products[index] * 0.0)
    column = tl.arange(0, BLOCK_K)
    tap = tl.arange(0, TAPS)
    tap_ptr = partial_ptr + DIAGONALS
    if regular == 0.0:
        for index in tl.static_range(LAST + 1 - FIRST):
            above, below = _sum_diagonals(products[index], W, KERNEL, GROUP, BLOCK_K)
            tl.store(partial_ptr + index * (2 * BLOCK_K) + column, above)
            tl.store(partial_ptr + index * (2 * BLOCK_K) + BLOCK_K + column, below)
        tl.store(tap_ptr + tap, tl.zeros((TAPS,), tl.float32), mask=tap < KERNEL * KERNEL)
    else:
        for index in tl.static_range(2 * (LAST + 1 - FIRST)):
            tl.store(partial_ptr + index * BLOCK_K + column, tl.zeros((BLOCK_K,), tl.float32))
        _sum_taps(
            x_ptr, grad_ptr, tap_ptr, start, rows, x_batch_stride, grad_batch_stride, H, W, KERNEL, GROUP, TAPS_M,
            BLOCK_K, STEPS * BLOCK_M // TAPS_M)
    tl.store(tap_ptr + KERNEL * KERNEL, tl.sum(sums))


@triton.jit
def merge_weight_gradient_kernel(
        partial_ptr,
        weight_grad_ptr,
        bias_grad_ptr,
        chunks,
        channels,
        H: tl.constexpr,
        W: tl.constexpr,
        KERNEL: tl.constexpr,
        GROUP: tl.constexpr,
        BLOCK_K: tl.constexpr,
        TAPS: tl.constexpr,
        CHUNKS: tl.constexpr,
):
    """One program: the gradients of one channel, from the sums of all chunks, of which there are at most `CHUNKS`."""
    GROUPS: tl.constexpr = (H + GROUP - 1) // GROUP
    BEFORE: tl.constexpr = (KERNEL - 1) // 2
    FIRST: tl.constexpr = max(-((BEFORE + GROUP - 1) // GROUP), 1 - GROUPS)
    LAST: tl.constexpr = min((GROUP - 1 + KERNEL - 1 - BEFORE) // GROUP, GROUPS - 1)
    DIAGONALS: tl.constexpr = (LAST + 1 - FIRST) * 2 * BLOCK_K

    channel = tl.program_id(0)
    # The number after the taps' is the bias'.
    tap = tl.arange(0, TAPS)
    total = tl.zeros((TAPS,), tl.float32)
    for chunk in range(CHUNKS):
        inside = (tap <= KERNEL * KERNEL) & (tap * 0 + chunk < chunks)
        chunk_ptr = partial_ptr + (chunk * channels + channel).to(tl.int64) * (DIAGONALS + KERNEL * KERNEL + 1)
        total += tl.load(chunk_ptr + DIAGONALS + tap, mask=inside, other=0.0)
        for offset in tl.static_range(FIRST, LAST + 1):
            # The tap's diagonal in this product, if its rows meet in it.
            rows = tap // KERNEL - BEFORE - offset * GROUP
            diagonal = rows * W + tap % KERNEL - BEFORE
            slot = (offset - FIRST) * (2 * BLOCK_K) + tl.where(diagonal < 0, diagonal + 2 * BLOCK_K, diagonal)
            meets = inside & (tap < KERNEL * KERNEL) & (rows > -GROUP) & (rows < GROUP)
            total += tl.load(chunk_ptr + slot, mask=meets, other=0.0)
    tl.store(weight_grad_ptr + channel * (KERNEL * KERNEL) + tap, total, mask=tap < KERNEL * KERNEL)
    # One element of it.
    tl.store(bias_grad_ptr + channel + tap * 0, total, mask=tap == KERNEL * KERNEL)
