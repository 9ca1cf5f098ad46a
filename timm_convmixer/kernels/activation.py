"""The activations of the mixing operators by name, in plain PyTorch, and their derivatives."""
from typing import Optional

import torch
import torch.nn.functional as F


def activate(x: torch.Tensor, act: str, out: Optional[torch.Tensor] = None) -> torch.Tensor:
    """`x` through 'gelu' (exact, with the error function), 'relu' or 'none'; into `out`, if given, without autograd."""
    if out is not None:
        if act == 'gelu':
            return torch.ops.aten.gelu.out(x, out=out)
        if act == 'relu':
            return torch.clamp_min(x, 0, out=out)
        return out.copy_(x)
    if act == 'gelu':
        return F.gelu(x)
    if act == 'relu':
        return F.relu(x)
    return x


def activate_backward(
        grad: torch.Tensor,
        x: torch.Tensor,
        act: str,
        out: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """The gradient with respect to `x` of `activate(x, act)`.

    Differentiable once more, or written into `out`, which may be `grad`.
    """
    if out is not None:
        if act == 'gelu':
            return torch.ops.aten.gelu_backward.grad_input(grad, x, grad_input=out)
        if act == 'relu':
            return torch.ops.aten.threshold_backward.grad_input(grad, x, 0, grad_input=out)
        return out if out is grad else out.copy_(grad)
    if act == 'gelu':
        return torch.ops.aten.gelu_backward(grad, x)
    if act == 'relu':
        return torch.ops.aten.threshold_backward(grad, x, 0)
    return grad
