"""Depthwise mixing: `x + scale * act(depthwise_conv(x) + bias) + shift`, the first half of a ConvMixer block for
inference.

Patches Are All You Need? (https://arxiv.org/abs/2201.09792), section 2: `y = x + BN(act(depthwise(x)))`, with the
BatchNorm folded to `scale` and `shift`.
"""
from typing import Optional

import torch
import torch.nn.functional as F

from ..activation import activate, activate_backward
from .depthwise_launch import depthwise_refusal, run
from .depthwise_training import depthwise_convolution, depthwise_input_gradient, depthwise_weight_gradient
from .support import KernelSupport, autocast, check_arguments, define_operator, device_refusal, explain

__all__ = ['depthwise_mixing', 'depthwise_mixing_ref', 'depthwise_mixing_support']


def depthwise_mixing_ref(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor],
        scale: torch.Tensor,
        shift: torch.Tensor,
        act: str = 'gelu',
) -> torch.Tensor:
    """`depthwise_mixing` in plain PyTorch."""
    y = F.conv2d(x, weight, None if bias is None else bias.to(x.dtype), padding='same', groups=weight.shape[0])
    y = activate(y, act)
    out = x + torch.addcmul(shift.view(-1, 1, 1), y, scale.view(-1, 1, 1))
    return out.to(y.dtype)


def _forward(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor],
        scale: torch.Tensor,
        shift: torch.Tensor,
        act: str,
) -> torch.Tensor:
    if depthwise_refusal(x, weight, bias, scale, shift) or device_refusal(x.device):
        return depthwise_mixing_ref(x, weight, bias, scale, shift, act).contiguous()
    return run('depthwise_mixing', x, weight, bias=bias, act=act, scale=scale, shift=shift, residual=x)


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias, scale, shift, act = inputs
    ctx.save_for_backward(x, weight, bias, scale, shift)
    ctx.act = act


def _backward(ctx, grad):
    """The convolution is computed again rather than kept; activation, scale and shift are plain PyTorch."""
    x, weight, bias, scale, shift = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, needs_scale, needs_shift, _ = ctx.needs_input_grad
    needs_bias = bias is not None and needs_bias
    grad = grad.contiguous()
    z = depthwise_convolution(x, weight, bias)
    grad_scale = (grad * activate(z, ctx.act)).sum((0, 2, 3), dtype=scale.dtype) if needs_scale else None
    grad_shift = grad.sum((0, 2, 3), dtype=shift.dtype) if needs_shift else None
    grad_z = activate_backward((grad * scale.view(-1, 1, 1)).to(x.dtype), z, ctx.act)
    grad_x = depthwise_input_gradient(grad_z, weight, residual=grad) if needs_x else None
    grad_weight = grad_bias = None
    if needs_weight or needs_bias:
        grad_weight, grad_bias = depthwise_weight_gradient(x, grad_z, weight.shape[2])
        grad_weight = grad_weight.to(weight.dtype) if needs_weight else None
        grad_bias = grad_bias.to(bias.dtype) if needs_bias else None
    return grad_x, grad_weight, grad_bias, grad_scale, grad_shift, None


def _fake(x, weight, bias, scale, shift, act):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_operator = define_operator('depthwise_mixing', _forward, _fake, _backward, _setup_context)


def depthwise_mixing_support(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor],
        scale: torch.Tensor,
        shift: torch.Tensor,
) -> KernelSupport:
    """Whether `depthwise_mixing` runs its Triton kernel on these tensors, and why."""
    x, weight, bias = autocast(x, weight, bias)
    return explain(depthwise_refusal(x, weight, bias, scale, shift), x)


def depthwise_mixing(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor],
        scale: torch.Tensor,
        shift: torch.Tensor,
        act: str = 'gelu',
) -> torch.Tensor:
    """Depthwise convolution with padding 'same', bias, activation, scale, shift and residual.

    Computes `x + scale * act(depthwise_conv(x, weight) + bias) + shift`; the plain PyTorch equivalent is
    `depthwise_mixing_ref`, which runs, silently, wherever no kernel does (`depthwise_mixing_support` says why): on a
    CPU, in channels_last, for maps wider than 64, for kernels larger than 9. The Triton kernel takes contiguous
    float32, float16 and bfloat16 CUDA tensors and accumulates and finishes in float32; float32 products are TF32 or
    IEEE as `torch.backends.cudnn` says for convolutions. Infinities and NaN reach the outputs that PyTorch's
    convolution lets them reach. Under autocast, x, weight and bias are cast as for `torch.nn.Conv2d`. Differentiable.

    Args:
        x: Input, (B, C, H, W).
        weight: Depthwise kernel, (C, 1, k, k), of the dtype of x. As in PyTorch, an even k pads one more on the right
            and the bottom.
        bias: (C,) or None; the dtype of x or float32, like scale and shift.
        scale: (C,), `weight / sqrt(running_var + eps)` of the BatchNorm that follows the activation.
        shift: (C,), `bias - running_mean * scale` of that BatchNorm.
        act: 'gelu' (with the error function), 'relu' or 'none'.

    Returns:
        (B, C, H, W), of the dtype of x (under autocast, of autocast's dtype).

    Raises:
        ValueError: An unknown act, or a bias, scale or shift that is not of shape (C,).
    """
    check_arguments(weight, bias, scale, shift, act)
    x, weight, bias = autocast(x, weight, bias)
    if depthwise_refusal(x, weight, bias, scale, shift):
        return depthwise_mixing_ref(x, weight, bias, scale, shift, act)
    return _operator(x, weight, bias, scale, shift, act)
