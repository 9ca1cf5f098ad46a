"""PyTorch's gradients of the convolutions of a block, for the CPU and the GPU code."""
from typing import Any, Tuple

import torch
import torch.nn.functional as F

__all__ = ['convolution_gradients_ref']


def convolution_gradients_ref(
        grad: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        needs: Tuple[bool, bool, bool],
) -> Tuple[Any, Any, Any]:
    """Gradients of a depthwise or pointwise convolution with padding ``'same'``; not differentiable.

    As precise as PyTorch's switches for convolutions say.

    Args:
        grad: Gradient of the output, ``(B, C_out, H, W)``.
        x: Input, ``(B, C, H, W)``; its values matter for the gradient of the weight alone.
        weight: ``(C_out, 1, k, k)`` or ``(C_out, C, 1, 1)``; its values matter for the gradient of the input alone.
        needs: Whether the gradients of input, weight and bias are wanted.

    Returns:
        The three gradients, None where not wanted.
    """
    kernel_size, groups = weight.shape[-1], x.shape[1] // weight.shape[1]
    # An even kernel pads one more on the right and the bottom, which a convolution's own padding cannot.
    padding, extra = (kernel_size - 1) // 2, 1 - kernel_size % 2
    padded = F.pad(x, (0, extra, 0, extra)) if extra else x
    x_grad, weight_grad, bias_grad = torch.ops.aten.convolution_backward(
        grad, padded, weight, [len(weight)], [1, 1], [padding, padding], [1, 1], False, [0, 0], groups, needs)
    if x_grad is not None and extra:
        x_grad = x_grad[:, :, :x.shape[2], :x.shape[3]]
    return x_grad, weight_grad, bias_grad
