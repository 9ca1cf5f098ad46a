"""The gradient of a pointwise convolution's weight and bias, in half precision: a split-K matrix product.

In NCHW it is a sum over images of ``grad[n] (C_out, H * W) @ x[n]^T (H * W, C_in)``, with the maps as they stand. cuDNN
and cuBLAS compute one product an image and sum them in another pass, or transpose the maps first. Here a program keeps
a tile of the sum in registers and goes through one of the splits of the images.

The splits are summed in a fixed order: no atomic operation, the same bits each time. Not differentiable.
"""
import functools
from typing import NamedTuple, Tuple

import torch
import triton
import triton.language as tl

from ..convolution import convolution_gradients_ref
from .common import ONES, matmul
from .launch import MAX_PROBLEMS, DeviceLimits, Launch, device_limits

__all__ = ['pointwise_weight_gradient', 'pointwise_weight_gradient_ref']


@triton.jit
def pointwise_weight_gradient_kernel(
        x_ptr,
        grad_ptr,
        partial_ptr,
        steps,
        steps_per_split,
        out_channels,
        IN_CHANNELS: tl.constexpr,
        POSITIONS: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_K: tl.constexpr,
        ONES: tl.constexpr,
):
    """One program: ``BLOCK_M`` output channels times ``BLOCK_N`` input channels, over one split of all ``steps``.

    A step is ``BLOCK_K`` positions of an image. x is (batch, IN_CHANNELS, POSITIONS) and grad (batch, out_channels,
    POSITIONS), contiguous. partial is (splits, out_channels * (IN_CHANNELS + 1)): the weight's sums, then the bias'.
    """
    BLOCKS_N: tl.constexpr = (IN_CHANNELS + BLOCK_N - 1) // BLOCK_N
    BLOCKS_K: tl.constexpr = (POSITIONS + BLOCK_K - 1) // BLOCK_K
    program = tl.program_id(0)
    tiles = tl.cdiv(out_channels, BLOCK_M) * BLOCKS_N
    split = program // tiles
    tile = program % tiles
    row = (tile // BLOCKS_N) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = (tile % BLOCKS_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_inside = row < out_channels
    col_inside = col < IN_CHANNELS
    k = tl.arange(0, BLOCK_K)
    grad_ptrs = grad_ptr + row[:, None].to(tl.int64) * POSITIONS + k[None, :]
    x_ptrs = x_ptr + col[None, :].to(tl.int64) * POSITIONS + k[:, None]
    ones = tl.full((BLOCK_K, ONES), 1.0, tl.float32).to(grad_ptr.dtype.element_ty)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    sums = tl.zeros((BLOCK_M, ONES), tl.float32)
    for step in range(split * steps_per_split, tl.minimum((split + 1) * steps_per_split, steps)):
        image = tl.cast(step // BLOCKS_K, tl.int64)
        position = (step % BLOCKS_K) * BLOCK_K
        grad_mask = row_inside[:, None]
        x_mask = col_inside[None, :]
        if POSITIONS % BLOCK_K != 0:
            # Both, because 0 * inf is NaN.
            grad_mask = grad_mask & (k[None, :] < POSITIONS - position)
            x_mask = x_mask & (k[:, None] < POSITIONS - position)
        grad = tl.load(grad_ptrs + (image * out_channels * POSITIONS + position), mask=grad_mask, other=0.0)
        x = tl.load(x_ptrs + (image * IN_CHANNELS * POSITIONS + position), mask=x_mask, other=0.0)
        acc = matmul(grad, x, acc, 'tf32')
        # The bias' gradient: a sum along the rows, which tensor cores do in passing.
        sums = matmul(grad, ones, sums, 'tf32')
    inside = row_inside[:, None] & col_inside[None, :]
    partial_ptr += tl.cast(split, tl.int64) * out_channels * (IN_CHANNELS + 1)
    tl.store(partial_ptr + row[:, None] * IN_CHANNELS + col[None, :], acc, mask=inside)
    if tile % BLOCKS_N == 0:
        # All columns are the same.
        tl.store(partial_ptr + out_channels * IN_CHANNELS + row, tl.sum(sums, axis=1) * (1.0 / ONES), mask=row_inside)


class PointwiseWeightGradientLaunch(NamedTuple):
    """The launch of a gradient, and in how many splits it leaves its sums."""
    sums: Launch
    splits: int


def choose_splits(tiles: int, steps: int, processors: int) -> int:
    """Splits of ``steps`` steps for each of ``tiles`` tiles, so that the programs fill the chip evenly."""
    def cost(splits: int) -> float:
        # In steps: the waves of programs, and the pass over the partial sums, which takes as long as it moves bytes.
        return -(-tiles * splits // processors) * -(-steps // splits) + 0.15 * tiles * splits

    return min(range(1, min(steps, 128) + 1), key=cost)


@functools.lru_cache(maxsize=MAX_PROBLEMS)
def make_launch(
        device: torch.device,
        shape: Tuple[int, ...],
        out_channels: int,
        dtype: torch.dtype,
        limits: DeviceLimits,
) -> PointwiseWeightGradientLaunch:
    """The launch for feature maps of ``shape``; by dtype, because the machine code differs."""
    batch, in_channels, height, width = shape
    block_m, block_n, block_k = (128, 256, 64) if limits.has_async_products else (64, 128, 32)
    steps = batch * -(-height * width // block_k)
    tiles = -(-out_channels // block_m) * -(-in_channels // block_n)
    steps_per_split = -(-steps // choose_splits(tiles, steps, limits.processors))
    splits = -(-steps // steps_per_split)
    constants = dict(
        IN_CHANNELS=in_channels,
        POSITIONS=height * width,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        ONES=ONES,
    )
    launch = Launch(
        pointwise_weight_gradient_kernel,
        device,
        tiles * splits,
        (steps, steps_per_split, out_channels),
        constants,
        num_warps=8,
    )
    return PointwiseWeightGradientLaunch(launch, splits)


def pointwise_weight_gradient_ref(x: torch.Tensor, grad: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """:func:`pointwise_weight_gradient` in plain PyTorch."""
    weight = x.new_empty(grad.shape[1], x.shape[1], 1, 1)
    _, weight_grad, bias_grad = convolution_gradients_ref(grad, x, weight, (False, True, True))
    return weight_grad, bias_grad


def pointwise_weight_gradient(x: torch.Tensor, grad: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """The gradients of :func:`~.pointwise.pointwise_convolution` with respect to its weight and its bias.

    Not differentiable. Nothing is checked: ask :func:`~.support.kernel_refusal` first. In float32 it is PyTorch's
    operator.

    Args:
        x: Input of the convolution, (B, C_in, H, W), contiguous, on a CUDA device; float32, float16 or bfloat16.
        grad: Gradient of its output, (B, C_out, H, W), of the dtype of ``x``.

    Returns:
        The gradient of the weight, (C_out, C_in, 1, 1), and of the bias, (C_out,), in float32.
    """
    if x.dtype == torch.float32:
        return pointwise_weight_gradient_ref(x, grad)
    in_channels, out_channels = x.shape[1], grad.shape[1]
    launch, splits = make_launch(x.device, x.shape, out_channels, x.dtype, device_limits(x.device))
    partial = torch.empty((splits, out_channels * (in_channels + 1)), dtype=torch.float32, device=x.device)
    # Autograd hands on gradients in any layout.
    launch(x, grad.contiguous(), partial)
    weight_grad, bias_grad = partial.sum(0).split((out_channels * in_channels, out_channels))
    return weight_grad.view(out_channels, in_channels, 1, 1), bias_grad
