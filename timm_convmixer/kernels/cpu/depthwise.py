"""Depthwise convolution for training on a CPU: PyTorch's forward pass with a faster backward pass.

PyTorch's gradient of a depthwise weight takes ten times as long as the convolution and more. But both gradients are
themselves depthwise convolutions, which a CPU does fast: that of the input takes the kernels turned round, that of the
weight takes each image's maps and, as kernels of the maps' size, the gradient's maps.
"""
from typing import Optional, Tuple

import torch
import torch.nn.functional as F

from ..support import has_onednn, is_transformed, use_fused

__all__ = [
    'depthwise_convolution_cpu',
    'depthwise_convolution_cpu_support',
    'depthwise_input_gradient_cpu',
    'depthwise_weight_gradient_cpu',
    'depthwise_weight_gradient_ref',
]


def _padding(kernel_size: int) -> Tuple[int, int]:
    before = (kernel_size - 1) // 2
    return before, kernel_size - 1 - before


def depthwise_input_gradient_cpu(grad: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Gradient of the input of a depthwise convolution with padding 'same'.

    Args:
        grad: Gradient of its output, (B, C, H, W).
        weight: (C, 1, k, k).

    Returns:
        (B, C, H, W).
    """
    before, after = _padding(weight.shape[-1])
    # Turned round, an even kernel pads one more on the left and the top.
    grad = F.pad(grad, (after - before, 0, after - before, 0)) if after > before else grad
    return F.conv2d(grad, weight.flip(2, 3), padding=before, groups=weight.shape[0])


def depthwise_weight_gradient_ref(x: torch.Tensor, grad: torch.Tensor, kernel_size: int) -> torch.Tensor:
    """`depthwise_weight_gradient_cpu` tap by tap."""
    (before, after), (height, width) = _padding(kernel_size), grad.shape[2:]
    x = F.pad(x, (before, after, before, after))
    taps = [
        (x[:, :, row:row + height, column:column + width] * grad).sum(dim=(0, 2, 3))
        for row in range(kernel_size) for column in range(kernel_size)
    ]
    return torch.stack(taps, dim=1).view(-1, 1, kernel_size, kernel_size)


def depthwise_weight_gradient_cpu(x: torch.Tensor, grad: torch.Tensor, kernel_size: int) -> torch.Tensor:
    """Gradient of the weight of a depthwise convolution with padding 'same'.

    Image by image: an image's maps and the kernels that its gradient makes stay in the cache, and sums stay short.

    Args:
        x: Input of the convolution, (B, C, H, W).
        grad: Gradient of its output, (B, C, H, W).
        kernel_size: Side k of the kernels.

    Returns:
        (C, 1, k, k).
    """
    before, after = _padding(kernel_size)
    channels = x.shape[1]
    total = x.new_zeros(1, channels, kernel_size, kernel_size)
    for image, kernels in zip(x.split(1), grad.split(1)):
        image = F.pad(image, (before, after, before, after))
        total = total + F.conv2d(image, kernels.transpose(0, 1).contiguous(), groups=channels)
    return total.transpose(0, 1)


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
        x_grad = depthwise_input_gradient_cpu(grad, weight) if needs_x else None
        weight_grad = depthwise_weight_gradient_cpu(x, grad, weight.shape[2]) if needs_weight else None
        bias_grad = grad.sum(dim=(0, 2, 3)) if needs_bias and ctx.has_bias else None
        return x_grad, weight_grad, bias_grad


def depthwise_convolution_cpu_support(x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor]) -> str:
    """Why PyTorch's own backward pass serves these tensors, or '' if this one does."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return 'compiled or traced'
    if type(x) is not torch.Tensor or x.device.type != 'cpu':
        return 'not a CPU tensor'
    if not use_fused():
        return 'switched off (TIMM_CONVMIXER_FUSED=0 or set_fused(False))'
    if is_transformed():
        return 'within a transform of torch.func or forward-mode differentiation'
    if not torch.is_grad_enabled() or not (x.requires_grad or weight.requires_grad):
        return 'no gradients are needed'
    if not isinstance(weight, torch.nn.Parameter) or x.dtype != torch.float32 or weight.dtype != torch.float32:
        return 'dtype is not float32'
    if torch.is_autocast_enabled('cpu'):
        return 'autocast casts convolutions'
    return weight_gradient_refusal(x, weight)


def weight_gradient_refusal(x: torch.Tensor, weight: torch.Tensor) -> str:
    """Why `depthwise_weight_gradient_cpu` does not pay for an input and a weight, or '' if it does."""
    if not has_onednn():
        return 'PyTorch has no oneDNN, or it is switched off'
    if torch.backends.cpu.get_cpu_capability() not in ('AVX2', 'AVX512'):
        return 'measured on x86 with AVX2 and AVX-512 alone'
    if x.dtype != torch.float32:
        return 'dtype is not float32'
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
