"""Pointwise mixing: ``scale * act(conv1x1(x) + bias) + shift``, the second half of a ConvMixer block in inference.

Patches Are All You Need? (https://arxiv.org/abs/2201.09792), section 2: ``BN(act(pointwise(y)))``, with the BatchNorm
folded to ``scale`` and ``shift``.

In NCHW a 1x1 convolution is a matrix product as it stands, ``weight (C_out, C_in) @ x[n] (C_in, H * W)``, whose result
is already in the layout of the next layer. The positions of all images form the second dimension of one product.
"""
import functools
from typing import List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from ..activation import activate as activate_ref
from .common import activate, matmul
from .launch import MAX_PROBLEMS, DeviceLimits, Launch, device_limits, input_precision, round_up

__all__ = ['pointwise_mixing', 'pointwise_mixing_ref']


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
        PRECISION: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_K: tl.constexpr,
):
    """One program: ``BLOCK_M`` output channels at ``BLOCK_N`` positions.

    x is (batch, IN_CHANNELS, POSITIONS) and out (batch, out_channels, POSITIONS), contiguous but for the stride between
    images; the bias may be None. ``PRECISION`` is 'ieee' or 'tf32'.
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

    if bias_ptr is not None:
        acc += tl.load(bias_ptr + channel, mask=channel_inside, other=0.0).to(tl.float32)[:, None]
    scale = tl.load(scale_ptr + channel, mask=channel_inside, other=0.0).to(tl.float32)[:, None]
    shift = tl.load(shift_ptr + channel, mask=channel_inside, other=0.0).to(tl.float32)[:, None]
    out = activate(acc, ACT, HALF) * scale + shift
    out_ptrs = out_ptr + (image * out_batch_stride + position)[None, :] + channel.to(tl.int64)[:, None] * POSITIONS
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=channel_inside[:, None] & column_inside[None, :])


class PointwiseConfig(NamedTuple):
    """How the kernel is launched.

    Attributes:
        block_m: Output channels of a tile.
        block_n: Positions of a tile.
        block_k: Input channels of a step.
        num_warps: Warps of a program.
        num_stages: Steps whose loads are in flight.
    """
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


# From large tiles, which read each operand least often, to small ones, of which there are enough for a single image.
CONFIGS_16_BIT = (
    PointwiseConfig(128, 256, 64, 8, 3),
    PointwiseConfig(128, 128, 64, 8, 3),
    PointwiseConfig(128, 128, 64, 4, 3),
    PointwiseConfig(64, 128, 64, 4, 3),
    PointwiseConfig(64, 64, 64, 4, 4),
    PointwiseConfig(64, 32, 64, 4, 4),
)
# Where rows of x are not aligned to 16 bytes (7 x 7 or 14 x 14 maps), addresses take registers that large tiles have
# not left.
CONFIGS_UNALIGNED = (
    PointwiseConfig(128, 128, 64, 8, 3),
    PointwiseConfig(64, 64, 64, 4, 4),
    PointwiseConfig(64, 32, 64, 4, 4),
)
CONFIGS_32_BIT = (
    PointwiseConfig(128, 128, 32, 8, 3),
    PointwiseConfig(64, 128, 32, 4, 3),
    PointwiseConfig(64, 64, 32, 4, 3),
    PointwiseConfig(64, 32, 32, 4, 3),
)
# No tensor cores: the products are ordinary multiply-adds.
CONFIGS_IEEE = (
    PointwiseConfig(64, 128, 16, 8, 3),
    PointwiseConfig(64, 64, 16, 4, 3),
    PointwiseConfig(32, 32, 16, 4, 3),
)


def candidates(
        shape: Tuple[int, ...],
        out_channels: int,
        dtype: torch.dtype,
        precision: str,
        limits: DeviceLimits,
) -> List[PointwiseConfig]:
    """The configurations worth trying for maps of (B, C, H, W), first the one that is launched.

    That is the largest tile of which there is one for every processor. A batch counts as the next power of two, so that
    not every size of it is compiled for.
    """
    batch, positions = round_up(shape[0]), shape[2] * shape[3]
    configs: Sequence[PointwiseConfig]
    if dtype != torch.float32:
        configs = CONFIGS_16_BIT if positions % 8 == 0 else CONFIGS_UNALIGNED
    else:
        configs = CONFIGS_IEEE if precision == 'ieee' else CONFIGS_32_BIT
    room = limits.shared_memory // dtype.itemsize
    fitting = [config for config in configs if config.num_stages * config.block_k * sum(config[:2]) <= room]
    for first, config in enumerate(fitting):  # noqa: B007, what is wanted is where it stops
        if -(-out_channels // config.block_m) * -(-batch * positions // config.block_n) >= limits.processors:
            break
    return fitting[first:first + 3] + fitting[max(0, first - 1):first]


def make_launch(
        device: torch.device,
        shape: Tuple[int, ...],
        out_channels: int,
        config: PointwiseConfig,
        act: str,
        precision: str,
        x_batch_stride: Optional[int] = None,
        out_batch_stride: Optional[int] = None,
) -> Launch:
    """The launch for maps of ``shape`` in one configuration.

    It takes x, weight, bias, scale, shift and out. The strides are those of contiguous maps by default.
    """
    batch, in_channels, height, width = shape
    positions = height * width
    return Launch(
        pointwise_mixing_kernel,
        device,
        -(-out_channels // config.block_m) * -(-batch * positions // config.block_n),
        (batch, out_channels, x_batch_stride or in_channels * positions, out_batch_stride or out_channels * positions),
        dict(
            IN_CHANNELS=in_channels,
            POSITIONS=positions,
            ACT=act,
            PRECISION=precision,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
        ),
        config.num_warps,
        config.num_stages,
    )


@functools.lru_cache(maxsize=MAX_PROBLEMS)
def _launch(
        device: torch.device,
        shape: Tuple[int, ...],
        out_channels: int,
        dtype: torch.dtype,
        precision: str,
        act: str,
        arguments: Tuple[Optional[torch.dtype], ...],
) -> Launch:
    """The launch for a problem; ``arguments`` tell apart launches with other tensors than the dtype says."""
    config = candidates(shape, out_channels, dtype, precision, device_limits(device))[0]
    return make_launch(device, shape, out_channels, config, act, precision)


def pointwise_mixing_ref(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor],
        scale: torch.Tensor,
        shift: torch.Tensor,
        act: str = 'gelu',
) -> torch.Tensor:
    """:func:`pointwise_mixing` in plain PyTorch."""
    y = activate_ref(F.conv2d(x, weight, None if bias is None else bias.to(x.dtype)), act)
    return torch.addcmul(shift.view(-1, 1, 1), y, scale.view(-1, 1, 1)).to(y.dtype)


def pointwise_mixing(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor],
        scale: torch.Tensor,
        shift: torch.Tensor,
        act: str = 'gelu',
) -> torch.Tensor:
    """``scale * act(conv1x1(x, weight) + bias) + shift``: the second half of a block in inference.

    Not differentiable. Nothing is checked: ask :func:`~.support.inference_refusal` first. Products are accumulated, and
    the result is finished, in float32; products of float32 are TF32 or IEEE as ``torch.backends.cudnn`` says for
    convolutions.

    Args:
        x: Input, (B, C_in, H, W), contiguous, on a CUDA device; float32, float16 or bfloat16.
        weight: (C_out, C_in, 1, 1), contiguous, of the dtype of ``x``.
        bias: (C_out,) or None, contiguous, of the dtype of ``x`` or float32, as are ``scale`` and ``shift``.
        scale: (C_out,), ``weight / sqrt(running_var + eps)`` of the BatchNorm that follows the activation.
        shift: (C_out,), ``bias - running_mean * scale`` of that BatchNorm.
        act: ``'gelu'`` (with the error function), ``'relu'`` or ``'none'``.

    Returns:
        (B, C_out, H, W), contiguous, of the dtype of ``x``.
    """
    shape, dtype, out_channels = x.shape, x.dtype, weight.shape[0]
    out = x.new_empty((shape[0], out_channels, shape[2], shape[3]))
    launch = _launch(
        x.device, shape, out_channels, dtype, input_precision(dtype), act,
        (None if bias is None else bias.dtype, scale.dtype, shift.dtype))
    launch(x, weight, bias, scale, shift, out)
    return out
