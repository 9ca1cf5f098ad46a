"""The pointwise kernel: 1x1 convolution, bias, activation, scale and shift in one pass.

In NCHW a 1x1 convolution is a matrix product as it stands, `weight (C_out, C_in) @ x[n] (C_in, H * W)`, whose result is
already in the layout of the next layer. The positions of all images form the second dimension of one product.
"""
import triton
import triton.language as tl

from .common_triton import activate, matmul


@triton.jit
def pointwise_mixing_kernel(
        x_ptr,
        weight_ptr,
        bias_ptr,
        scale_ptr,
        shift_ptr,
        out_ptr,
        batch,
        out_channels,
        x_batch_stride,
        out_batch_stride,
        IN_CHANNELS: tl.constexpr,
        POSITIONS: tl.constexpr,
        ACT: tl.constexpr,
        HAS_BIAS: tl.constexpr,
        PRECISION: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_K: tl.constexpr,
):
    """One program: `BLOCK_M` output channels at `BLOCK_N` positions.

    x is (batch, IN_CHANNELS, POSITIONS) and out (batch, out_channels, POSITIONS), contiguous but for the stride between
    images. `PRECISION` is 'ieee' or 'tf32'.
    """
    HALF: tl.constexpr = out_ptr.dtype.element_ty != tl.float32

    program = tl.program_id(0)
    # Programs that share a tile of x run side by side: x comes from memory once, the (small) weight stays in the L2
    # cache.
    blocks_m = tl.cdiv(out_channels, BLOCK_M)
    channel = (program % blocks_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = (program // blocks_m) * BLOCK_N + tl.arange(0, BLOCK_N)
    channel_inside = channel < out_channels
    column_inside = column < batch * POSITIONS
    image = (column // POSITIONS).to(tl.int64)
    position = column % POSITIONS
    k = tl.arange(0, BLOCK_K)

    weight_ptrs = weight_ptr + channel.to(tl.int64)[:, None] * IN_CHANNELS + k[None, :]
    x_ptrs = x_ptr + (image * x_batch_stride + position)[None, :] + k.to(tl.int64)[:, None] * POSITIONS
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(tl.cdiv(IN_CHANNELS, BLOCK_K)):
        weight_mask = channel_inside[:, None]
        x_mask = column_inside[None, :]
        if IN_CHANNELS % BLOCK_K != 0:
            # Both, because 0 * inf is NaN.
            weight_mask = weight_mask & (k[None, :] < IN_CHANNELS - step * BLOCK_K)
            x_mask = x_mask & (k[:, None] < IN_CHANNELS - step * BLOCK_K)
        weight = tl.load(weight_ptrs, mask=weight_mask, other=0.0)
        x = tl.load(x_ptrs, mask=x_mask, other=0.0)
        acc = matmul(weight, x, acc, PRECISION)
        weight_ptrs += BLOCK_K
        x_ptrs += BLOCK_K * POSITIONS

    if HAS_BIAS:
        acc += tl.load(bias_ptr + channel, mask=channel_inside, other=0.0).to(tl.float32)[:, None]
    scale = tl.load(scale_ptr + channel, mask=channel_inside, other=0.0).to(tl.float32)[:, None]
    shift = tl.load(shift_ptr + channel, mask=channel_inside, other=0.0).to(tl.float32)[:, None]
    out = activate(acc, ACT, HALF) * scale + shift
    out_ptrs = out_ptr + (image * out_batch_stride + position)[None, :] + channel.to(tl.int64)[:, None] * POSITIONS
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=channel_inside[:, None] & column_inside[None, :])
