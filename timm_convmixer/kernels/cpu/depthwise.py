"""The gradients of a depthwise convolution on a CPU, each computed as a depthwise convolution.

PyTorch's gradient of a depthwise weight takes ten times as long as the convolution and more. But a CPU is fast at
depthwise convolutions, and both gradients are such: that of the input convolves the output gradient with the kernels
rotated by 180 degrees, that of the weight convolves each feature map with its output gradient as the kernel.
"""
from typing import Tuple

import torch
import torch.nn.functional as F

from ..support import has_onednn

__all__ = [
    'depthwise_input_gradient',
    'depthwise_weight_gradient',
    'depthwise_weight_gradient_ref',
    'weight_gradient_refusal',
]


def _padding(kernel_size: int) -> Tuple[int, int]:
    """What ``padding='same'`` pads before and after each side."""
    before = (kernel_size - 1) // 2
    return before, kernel_size - 1 - before


def depthwise_input_gradient(grad: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Gradient of the input of a depthwise convolution with padding ``'same'``; runs on any device.

    Args:
        grad: Gradient of its output, ``(B, C, H, W)``.
        weight: ``(C, 1, k, k)``.

    Returns:
        ``(B, C, H, W)``.
    """
    before, after = _padding(weight.shape[-1])
    # Rotated, an even kernel pads one more on the left and the top.
    grad = F.pad(grad, (after - before, 0, after - before, 0)) if after > before else grad
    return F.conv2d(grad, weight.flip(2, 3), padding=before, groups=weight.shape[0])


def depthwise_weight_gradient_ref(x: torch.Tensor, grad: torch.Tensor, kernel_size: int) -> torch.Tensor:
    """``depthwise_weight_gradient`` tap by tap."""
    (before, after), (height, width) = _padding(kernel_size), grad.shape[2:]
    x = F.pad(x, (before, after, before, after))
    taps = [
        (x[:, :, row:row + height, column:column + width] * grad).sum(dim=(0, 2, 3))
        for row in range(kernel_size) for column in range(kernel_size)
    ]
    return torch.stack(taps, dim=1).view(-1, 1, kernel_size, kernel_size)


def depthwise_weight_gradient(x: torch.Tensor, grad: torch.Tensor, kernel_size: int) -> torch.Tensor:
    """Gradient of the weight of a depthwise convolution with padding ``'same'``.

    One image at a time, so that its feature map and the kernels that its gradient makes stay in the cache, sums stay
    short, and half precision is widened to float32 without much memory.

    Args:
        x: Input of the convolution, ``(B, C, H, W)``.
        grad: Gradient of its output, ``(B, C, H, W)``.
        kernel_size: Side k of the kernels.

    Returns:
        ``(C, 1, k, k)``, float64 for ``x`` in float64, else float32.
    """
    before, after = _padding(kernel_size)
    channels = x.shape[1]
    dtype = torch.promote_types(x.dtype, torch.float32)
    total = x.new_zeros((1, channels, kernel_size, kernel_size), dtype=dtype)
    for image, kernels in zip(x.split(1), grad.split(1)):
        image = F.pad(image.to(dtype), (before, after, before, after))
        total = total + F.conv2d(image, kernels.to(dtype).transpose(0, 1).contiguous(), groups=channels)
    return total.transpose(0, 1)


def weight_gradient_refusal(x: torch.Tensor, weight: torch.Tensor) -> str:
    """Why ``depthwise_weight_gradient`` does not pay for an input and a weight, or ``''`` if it does."""
    if not has_onednn():
        return 'PyTorch has no oneDNN, or it is switched off'
    if torch.backends.cpu.get_cpu_capability() not in ('AVX2', 'AVX512'):
        return 'measured on x86 with AVX2 and AVX-512 alone'
    if x.dtype not in (torch.float32, torch.bfloat16):
        return 'dtype is not float32 or bfloat16'
    if weight.shape[2] < 5:
        return 'the kernel is smaller than 5'
    return ''
