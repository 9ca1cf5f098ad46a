"""Convolution with its activation in one pass over memory, for inference on a CPU.

oneDNN applies an activation to a convolution's output while it is still in registers. PyTorch has that as an operator,
which its compiler uses; there is no public name for it. It stands behind `convolution_act` alone, which does without
wherever it is missing.
"""
from typing import Optional

import torch
import torch.nn.functional as F

from .activation import activate
from .support import use_fused

__all__ = ['convolution_act', 'convolution_act_ref', 'convolution_act_support']


def convolution_act_ref(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor],
        act: str = 'gelu',
) -> torch.Tensor:
    """`convolution_act` in plain PyTorch."""
    return activate(F.conv2d(x, weight, bias, padding='same', groups=x.shape[1] // weight.shape[1]), act)


def convolution_act_support(x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor]) -> str:
    """Why `convolution_act` takes two passes for these tensors, or '' if it takes one."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return 'compiled or traced'
    if not use_fused():
        return 'switched off (TIMM_CONVMIXER_FUSED=0 or set_fused(False))'
    if type(x) is not torch.Tensor or x.device.type != 'cpu':
        return 'not a CPU tensor'
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return 'PyTorch has no oneDNN, or it is switched off'
    if not hasattr(torch.ops.mkldnn, '_convolution_pointwise'):
        return 'this PyTorch lacks the operator'
    if x.dtype == torch.bfloat16:
        if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return 'this CPU lacks bfloat16'
    elif x.dtype != torch.float32:
        return 'dtype is not float32 or bfloat16'
    if weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
        return 'x, weight and bias differ in dtype'
    if x.numel() == 0:
        return 'x is empty'
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return 'gradients are needed'
    if torch.is_autocast_enabled('cpu'):
        return 'autocast casts convolutions'
    return ''


def convolution_act(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor],
        act: str = 'gelu',
) -> torch.Tensor:
    """`act(conv2d(x, weight, bias, padding='same'))`; the plain PyTorch equivalent is `convolution_act_ref`.

    Takes one pass over the output where `convolution_act_support` returns '', and is not differentiable there.

    Args:
        x: Input, (B, C_in, H, W), in channels_last for speed.
        weight: (C_out, C_in / groups, k, k); the number of groups follows from the shapes.
        bias: (C_out,) or None.
        act: 'gelu' (with the error function), 'relu' or 'none'.

    Returns:
        (B, C_out, H, W), in the memory format of x.
    """
    if convolution_act_support(x, weight, bias):
        return convolution_act_ref(x, weight, bias, act)
    kernel_size = weight.shape[-1]
    if kernel_size % 2 == 0:
        # 'same' pads one more on the right and the bottom, the operator the same on both sides.
        x = F.pad(x, (0, 1, 0, 1))
    padding = (kernel_size - 1) // 2
    groups = x.shape[1] // weight.shape[1]
    # oneDNN's ReLU turns NaN into 0, which would hide what went wrong; PyTorch's keeps it, in place at little cost.
    fused_act = 'none' if act == 'relu' else act
    y = torch.ops.mkldnn._convolution_pointwise(
        x, weight, bias, [padding, padding], [1, 1], [1, 1], groups, fused_act, [], 'none')
    return F.relu_(y) if act == 'relu' else y
