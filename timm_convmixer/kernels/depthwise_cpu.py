"""Depthwise convolution for training on a CPU: PyTorch's forward pass with a faster backward pass.

PyTorch's gradients of a depthwise convolution take many times as long as the convolution. The gradient of the input is
itself a depthwise convolution, with the kernels turned round. The gradient of the weight, for one row of the kernel,
lies on the diagonals of a matrix product over all rows of all images: more arithmetic than needed, by a factor of the
map's width over the kernel's, in the form that a CPU does fastest.
"""
from typing import Optional, Tuple

import torch
import torch.nn.functional as F

from .support import use_fused

__all__ = [
    'depthwise_convolution_cpu',
    'depthwise_convolution_cpu_support',
    'depthwise_weight_gradient',
    'depthwise_weight_gradient_ref',
]

# Columns of the map for each product; wider maps are cut, or the products would grow with the square of the width.
_BLOCK_WIDTH = 32


def depthwise_weight_gradient_ref(x: torch.Tensor, grad: torch.Tensor, kernel_size: int) -> torch.Tensor:
    """`depthwise_weight_gradient` tap by tap."""
    (before, after), (height, width) = _padding(kernel_size), grad.shape[2:]
    x = F.pad(x, (before, after, before, after))
    taps = [
        (x[:, :, row:row + height, column:column + width] * grad).sum(dim=(0, 2, 3))
        for row in range(kernel_size) for column in range(kernel_size)
    ]
    return torch.stack(taps, dim=1).view(-1, 1, kernel_size, kernel_size)


def _padding(kernel_size: int) -> Tuple[int, int]:
    before = (kernel_size - 1) // 2
    return before, kernel_size - 1 - before


def _rows_by_channel(x: torch.Tensor, left: int, right: int, top: int, bottom: int) -> torch.Tensor:
    """Maps of (B, C, H, W), padded with zeros, as a matrix for each channel with a row for each row of each image."""
    batch, channels, height, width = x.shape
    # By way of the contiguous format: from channels_last in one step, PyTorch copies element by element.
    x = x.contiguous().transpose(0, 1)
    rows = x.new_empty(channels, batch, top + height + bottom, left + width + right)
    # The borders alone: filling everything with zeros first takes as long as the copy.
    rows[:, :, :top] = 0
    rows[:, :, top + height:] = 0
    rows[..., :left] = 0
    rows[..., left + width:] = 0
    rows[:, :, top:top + height, left:left + width] = x
    return rows.flatten(1, 2)


def depthwise_weight_gradient(x: torch.Tensor, grad: torch.Tensor, kernel_size: int) -> torch.Tensor:
    """Gradient of the weight of a depthwise convolution with padding 'same', by banded matrix products.

    With the maps' rows stacked, `x_shifted^T @ grad` holds for each pair of columns the sum over all rows of the input
    at the first times the gradient at the second. Columns that lie j apart meet tap j: the taps are the sums of its
    diagonals.

    Args:
        x: Input of the convolution, (B, C, H, W).
        grad: Gradient of its output, (B, C, H, W).
        kernel_size: Side k of the kernels.

    Returns:
        (C, 1, k, k).
    """
    before, after = _padding(kernel_size)
    channels, width = x.shape[1], x.shape[3]
    x_rows = _rows_by_channel(x, before, after, before, after)
    # Padded below as the input is above and below: a shift by rows then never mixes two images.
    grad_rows = _rows_by_channel(grad, 0, 0, 0, before + after)
    rows = x_rows.shape[1] - (kernel_size - 1)
    weight_grad = x.new_zeros(channels, kernel_size, kernel_size)
    for start in range(0, width, _BLOCK_WIDTH):
        stop = min(start + _BLOCK_WIDTH, width)
        columns = stop - start
        grad_block = grad_rows[:, :rows, start:stop]
        x_block = x_rows[:, :, start:stop + kernel_size - 1]
        products = x.new_empty(channels, columns + kernel_size - 1, columns)
        channel_stride, row_stride, column_stride = products.stride()
        diagonals = products.as_strided(
            (channels, kernel_size, columns), (channel_stride, row_stride, row_stride + column_stride))
        for shift in range(kernel_size):
            torch.bmm(x_block[:, shift:shift + rows].transpose(1, 2), grad_block, out=products)
            weight_grad[:, shift] += diagonals.sum(dim=2)
    return weight_grad.unsqueeze(1)


class _DepthwiseConvolution(torch.autograd.Function):

    @staticmethod
    def forward(x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor]) -> torch.Tensor:
        return F.conv2d(x, weight, bias, padding='same', groups=weight.shape[0])

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, weight, bias = inputs
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        kernel_size, channels = weight.shape[2], weight.shape[0]
        before, after = _padding(kernel_size)
        x_grad = weight_grad = bias_grad = None
        if needs_x:
            # Turned round, an even kernel pads one more on the left and the top.
            padded = F.pad(grad, (after - before, 0, after - before, 0)) if after > before else grad
            x_grad = F.conv2d(padded, weight.flip(2, 3), padding=before, groups=channels)
        if needs_weight:
            # A second derivative was asked for: the products below write into place, the taps can be differentiated.
            gradient = depthwise_weight_gradient_ref if torch.is_grad_enabled() else depthwise_weight_gradient
            weight_grad = gradient(x, grad, kernel_size)
        if needs_bias and ctx.has_bias:
            bias_grad = grad.sum(dim=(0, 2, 3))
        return x_grad, weight_grad, bias_grad


def depthwise_convolution_cpu_support(x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor]) -> str:
    """Why PyTorch's own backward pass serves these tensors, or '' if this one does."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return 'compiled or traced'
    if type(x) is not torch.Tensor or x.device.type != 'cpu':
        return 'not a CPU tensor'
    if not use_fused():
        return 'switched off (TIMM_CONVMIXER_FUSED=0 or set_fused(False))'
    if not torch.is_grad_enabled() or not (x.requires_grad or weight.requires_grad):
        return 'no gradients are needed'
    if not isinstance(weight, torch.nn.Parameter) or x.dtype != torch.float32 or weight.dtype != torch.float32:
        return 'dtype is not float32'
    if torch.is_autocast_enabled('cpu'):
        return 'autocast casts convolutions'
    if weight.shape[2] < 5:
        return 'the kernel is smaller than 5'
    if x.numel() == 0:
        return 'x is empty'
    return ''


def depthwise_convolution_cpu(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor],
) -> torch.Tensor:
    """`F.conv2d(x, weight, bias, padding='same', groups=C)` with a faster backward pass; twice differentiable.

    Args:
        x: Input, (B, C, H, W), float32.
        weight: (C, 1, k, k).
        bias: (C,) or None.

    Returns:
        (B, C, H, W), in the memory format of x.
    """
    return _DepthwiseConvolution.apply(x, weight, bias)
