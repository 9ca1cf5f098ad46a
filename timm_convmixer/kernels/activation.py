"""The activations of the mixing operators by name, in plain PyTorch, and their derivatives.

Each once for autograd, and once into memory that is there already.
"""
import torch
import torch.nn.functional as F


def activate(x: torch.Tensor, act: str) -> torch.Tensor:
    """``x`` through 'gelu' (exact, with the error function), 'relu' or 'none'."""
    if act == 'gelu':
        return F.gelu(x)
    if act == 'relu':
        return F.relu(x)
    return x


def activate_into(out: torch.Tensor, x: torch.Tensor, act: str) -> torch.Tensor:
    """``activate(x, act)`` written into ``out``, which may be ``x``; not differentiable."""
    if act == 'gelu':
        return torch.ops.aten.gelu.out(x, out=out)
    if act == 'relu':
        return torch.clamp_min(x, 0, out=out)
    return out if out is x else out.copy_(x)


def activate_backward(grad: torch.Tensor, x: torch.Tensor, act: str) -> torch.Tensor:
    """The gradient with respect to ``x`` of ``activate(x, act)``, differentiable once more."""
    if act == 'gelu':
        return torch.ops.aten.gelu_backward(grad, x)
    if act == 'relu':
        return torch.ops.aten.threshold_backward(grad, x, 0)
    return grad


def activate_backward_in_place(grad: torch.Tensor, x: torch.Tensor, act: str) -> torch.Tensor:
    """``activate_backward(grad, x, act)`` written over ``grad``; not differentiable."""
    if act == 'gelu':
        return torch.ops.aten.gelu_backward.grad_input(grad, x, grad_input=grad)
    if act == 'relu':
        return torch.ops.aten.threshold_backward.grad_input(grad, x, 0, grad_input=grad)
    return grad
