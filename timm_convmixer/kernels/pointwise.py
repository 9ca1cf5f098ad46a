"""PyTorch's gradients of a pointwise convolution, for the CPU code, chunk by chunk, and the GPU code."""
from typing import Any, Tuple

import torch

__all__ = ['pointwise_gradients_ref']


def pointwise_gradients_ref(
        grad: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        needs: Tuple[bool, bool, bool],
) -> Tuple[Any, Any, Any]:
    """Gradients of a pointwise convolution, as precise as PyTorch's switch for convolutions says; not differentiable.

    Args:
        grad: Gradient of the output, ``(B, C_out, H, W)``.
        x: Input, ``(B, C, H, W)``; its values matter for the gradient of the weight alone.
        weight: ``(C_out, C, 1, 1)``; its values matter for the gradient of the input alone.
        needs: Whether the gradients of input, weight and bias are wanted.

    Returns:
        The three gradients, None where not wanted.
    """
    return torch.ops.aten.convolution_backward(
        grad, x, weight, [len(weight)], [1, 1], [0, 0], [1, 1], False, [0, 0], 1, needs)
