"""Pointwise convolution with its activation for inference on a CPU, the weight in the order that oneDNN reads it in.

PyTorch's convolution brings the weight into that order at every call, which takes a tenth of a ConvMixer's time where
there is one image to spread it over. The operators that take it as it is are those that torch.compile calls. Their
names are not public: they are asked for, and tried on an example, before they are used.
"""
import functools
import itertools
from typing import Optional, Sequence

import torch
import torch.nn.functional as F

from ..activation import activate
from ..support import has_onednn

__all__ = ['pack_pointwise_weight', 'packed_pointwise', 'packed_pointwise_refusal', 'pointwise_ref']

# Padding, stride, dilation and groups.
_GEOMETRY = ([0, 0], [1, 1], [1, 1], 1)


def pointwise_ref(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor],
        act: str,
) -> torch.Tensor:
    """What `packed_pointwise` computes, `weight` being (C, C, 1, 1) as ever, in plain PyTorch."""
    return activate(F.conv2d(x, weight, bias), act)


def pack_pointwise_weight(weight: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """The weight (C, C, 1, 1) in the order that is read fastest for an input of a shape (B, C, H, W).

    For an input of another shape it is right as well, but can be many times slower.
    """
    weight = weight.detach().contiguous(memory_format=torch.channels_last)
    return torch.ops.mkldnn._reorder_convolution_weight(weight, *_GEOMETRY, list(shape))


def packed_pointwise(
        x: torch.Tensor,
        packed_weight: torch.Tensor,
        bias: Optional[torch.Tensor],
        act: str,
) -> torch.Tensor:
    """`act(conv(x))` for a pointwise convolution; without gradients.

    Args:
        x: Input, (B, C, H, W) in channels last, float32 or bfloat16.
        packed_weight: From `pack_pointwise_weight`.
        bias: (C,) or None.
        act: 'gelu', 'relu' or 'none'.

    Returns:
        (B, C, H, W) in channels last.
    """
    return torch.ops.mkldnn._convolution_pointwise(x, packed_weight, bias, *_GEOMETRY, act, [], 'none')


def packed_pointwise_refusal(x: torch.Tensor, weight: torch.Tensor) -> str:
    """Why `packed_pointwise` cannot take an input and a weight, or '' if it can."""
    if not has_onednn():
        return 'PyTorch has no oneDNN, or it is switched off'
    if x.dtype not in (torch.float32, torch.bfloat16) or weight.dtype != x.dtype:
        return 'dtype is not float32 or bfloat16'
    if x.numel() == 0 or not x.is_contiguous(memory_format=torch.channels_last):
        return 'x is empty or not in channels last'
    if weight.is_inference():
        return 'weight was made in inference mode, so that a change of it cannot be noticed'
    if not _works(x.dtype):
        return 'this PyTorch has no such operators, or they do not work'
    return ''


@functools.cache
def _works(dtype: torch.dtype) -> bool:
    """Whether the operators exist and compute what the reference does, on an example."""
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 16, 5, 4), (16, 16, 1, 1), (16,)
    x, weight, bias = (torch.randn(shape, generator=generator, device='cpu').to(dtype) for shape in shapes)
    x = x.contiguous(memory_format=torch.channels_last)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-1
    try:
        packed = pack_pointwise_weight(weight, x.shape)
        for given_bias, act in itertools.product((bias, None), ('gelu', 'relu', 'none')):
            out = packed_pointwise(x, packed, given_bias, act)
            torch.testing.assert_close(
                out, pointwise_ref(x, weight, given_bias, act), rtol=tolerance, atol=tolerance, check_stride=True)
    except (AttributeError, RuntimeError, TypeError, AssertionError):
        return False
    return True
