"""The gradients of a depthwise convolution on a CPU, each computed as a depthwise convolution.

PyTorch's gradient of a depthwise weight takes ten times as long as the convolution and more. But a CPU is fast at
depthwise convolutions, and both gradients are such: that of the input convolves the output gradient with the kernels
rotated by 180 degrees, that of the weight convolves each feature map with its output gradient as the kernel.
"""
from typing import Tuple

import torch
import torch.nn.functional as F

from ..convolution import convolution_gradients_ref
from ..support import has_onednn

__all__ = [
    'depthwise_gradients',
    'depthwise_input_gradient',
    'depthwise_weight_gradient',
    'depthwise_weight_gradient_ref',
    'weight_gradient_refusal',
]


# Bytes of the images of one convolution: a large number of groups is slow once they leave the cache.
_WEIGHT_GRADIENT_BYTES = 1 << 20

# With more padding than a kernel of 9 needs, or as much as a side of the feature map, oneDNN's convolution is slow
# (measured), so a copy of the feature map is padded instead.
_LARGEST_PADDED_KERNEL = 9


def _padding(kernel_size: int) -> Tuple[int, int]:
    """What ``padding='same'`` pads before and after each spatial dimension."""
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
    """``depthwise_weight_gradient`` by PyTorch's own."""
    weight = x.new_empty(x.shape[1], 1, kernel_size, kernel_size)
    return convolution_gradients_ref(grad, x, weight, (False, True, False))[1]


def depthwise_weight_gradient(x: torch.Tensor, grad: torch.Tensor, kernel_size: int) -> torch.Tensor:
    """Gradient of the weight of a depthwise convolution with padding ``'same'``.

    Args:
        x: Input of the convolution, ``(B, C, H, W)``; float32.
        grad: Gradient of its output, ``(B, C, H, W)``.
        kernel_size: Side k of the kernels.

    Returns:
        ``(C, 1, k, k)``.
    """
    before, after = _padding(kernel_size)
    batch_size, channels, height, width = x.shape
    size = max(1, min(batch_size, _WEIGHT_GRADIENT_BYTES // (x[0].numel() * x.element_size())))
    padding = after
    if kernel_size > _LARGEST_PADDED_KERNEL or after >= min(height, width):
        x, padding = F.pad(x, (after,) * 4), 0
    total = x.new_zeros((channels, 1, kernel_size, kernel_size))
    for images, kernels in zip(x.split(size), grad.split(size)):
        # Images and channels alike are channels here, each with a kernel of its own.
        taps = F.conv2d(
            images.reshape(1, -1, *images.shape[2:]),
            kernels.reshape(-1, 1, height, width),
            padding=padding,
            groups=len(images) * channels,
        )
        # An even kernel pads one less on the left and the top.
        taps = taps[:, :, after - before:, after - before:]
        total += taps.reshape(len(images), channels, 1, kernel_size, kernel_size).sum(dim=0)
    return total


def weight_gradient_refusal(x: torch.Tensor, weight: torch.Tensor) -> str:
    """Why ``depthwise_weight_gradient`` does not pay for an input and a weight, or ``''`` if it does."""
    if not has_onednn():
        return 'PyTorch has no oneDNN, or it is switched off'
    if torch.backends.cpu.get_cpu_capability() not in ('AVX2', 'AVX512'):
        return 'measured on x86 with AVX2 and AVX-512 alone'
    if x.dtype != torch.float32:
        return 'dtype is not float32'
    if weight.shape[2] < 5:
        return 'the kernel is smaller than 5'
    return ''


def depthwise_gradients(
        grad: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the input and the weight: the fast ones where they pay, else PyTorch's.

    Args:
        grad: Gradient of the output, ``(B, C, H, W)``.
        x: Input, ``(B, C, H, W)``.
        weight: ``(C, 1, k, k)``.

    Returns:
        ``(B, C, H, W)`` and ``(C, 1, k, k)``.
    """
    if not weight_gradient_refusal(x, weight):
        return depthwise_input_gradient(grad, weight), depthwise_weight_gradient(x, grad, weight.shape[-1])
    x_grad, weight_grad, _ = convolution_gradients_ref(grad, x, weight, (True, True, False))
    return x_grad, weight_grad
