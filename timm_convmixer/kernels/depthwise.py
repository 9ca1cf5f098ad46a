"""PyTorch's gradients of a depthwise convolution, for the CPU and the GPU code."""
from typing import Any, Tuple

import torch
import torch.nn.functional as F

__all__ = ['depthwise_gradients_ref']


def depthwise_gradients_ref(
        grad: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        needs: Tuple[bool, bool, bool],
) -> Tuple[Any, Any, Any]:
    """Gradients of a depthwise convolution with padding ``'same'``; not differentiable.

    Args:
        grad: Gradient of the output, ``(B, C, H, W)``.
        x: Input, ``(B, C, H, W)``.
        weight: ``(C, 1, k, k)``; its values matter for the gradient of the input alone.
        needs: Whether the gradients of input, weight and bias are wanted.

    Returns:
        The three gradients, None where not wanted.
    """
    kernel_size = weight.shape[-1]
    # An even kernel pads one more on the right and the bottom, which a convolution's own padding cannot.
    padding, extra = (kernel_size - 1) // 2, 1 - kernel_size % 2
    padded = F.pad(x, (0, extra, 0, extra)) if extra else x
    x_grad, weight_grad, bias_grad = torch.ops.aten.convolution_backward(
        grad, padded, weight, [len(weight)], [1, 1], [padding, padding], [1, 1], False, [0, 0], len(weight), needs)
    if x_grad is not None:
        x_grad = x_grad[:, :, :x.shape[2], :x.shape[3]]
    return x_grad, weight_grad, bias_grad
