"""The activations of the mixing operators by name, in plain PyTorch, and their derivatives."""
import torch
import torch.nn.functional as F


def activate(x: torch.Tensor, act: str) -> torch.Tensor:
    """`x` through 'gelu' (exact, with the error function), 'relu' or 'none'."""
    if act == 'gelu':
        return F.gelu(x)
    if act == 'relu':
        return F.relu(x)
    return x


def activate_backward(grad: torch.Tensor, x: torch.Tensor, act: str) -> torch.Tensor:
    """The gradient with respect to `x` of `activate(x, act)`, differentiable once more."""
    if act == 'gelu':
        return torch.ops.aten.gelu_backward(grad, x)
    if act == 'relu':
        return torch.ops.aten.threshold_backward(grad, x, 0)
    return grad
