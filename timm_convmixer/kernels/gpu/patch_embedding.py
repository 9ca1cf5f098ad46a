"""The patch embedding in inference: ``scale * act(conv(x) + bias) + shift``, the stride as long as the kernel.

Patches Are All You Need? (https://arxiv.org/abs/2201.09792), section 2. Patches do not overlap, so that the convolution
is a pointwise one of the image with every patch's pixels as its channels. cuDNN does not use tensor cores for three
input channels; the images are small beside their feature map, so that copying them patch by patch costs little.
"""
from typing import Optional

import torch
import torch.nn.functional as F

from .pointwise import epilogue_ref, pointwise_mixing

__all__ = ['patch_embedding', 'patch_embedding_ref']

# Channels of a patch are rounded up to a multiple of this, which makes 16 bytes: the alignment that TMA needs.
_MULTIPLE = 8


def patch_embedding_ref(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor],
        scale: torch.Tensor,
        shift: torch.Tensor,
        act: str = 'gelu',
) -> torch.Tensor:
    """:func:`patch_embedding` in plain PyTorch."""
    bias = None if bias is None else bias.to(x.dtype)
    return epilogue_ref(F.conv2d(x, weight, bias, stride=weight.shape[2:]), scale, shift, act)


def patch_embedding(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor],
        scale: torch.Tensor,
        shift: torch.Tensor,
        act: str = 'gelu',
) -> torch.Tensor:
    """``scale * act(conv(x, weight, stride=p) + bias) + shift``, in NCHW.

    Not differentiable, nothing checked, arithmetic: as :func:`~.pointwise.pointwise_mixing`.

    Args:
        x: Images, (B, in_chans, H, W), on a CUDA device; float32, float16 or bfloat16. What does not fill a patch is
            left out.
        weight: (C, in_chans, p, q), of the dtype of ``x``.
        bias: (C,) or None, contiguous, of the dtype of ``x`` or float32, as are ``scale`` and ``shift``.
        scale: (C,), of the folded normalisation that follows the activation.
        shift: (C,), of the same.
        act: ``'gelu'`` (with the error function), ``'relu'`` or ``'none'``.

    Returns:
        (B, C, H // p, W // q), contiguous, of the dtype of ``x``.
    """
    batch = len(x)
    channels, in_chans, *patch = weight.shape
    height, width = (size // side for size, side in zip(x.shape[2:], patch))
    used = in_chans * patch[0] * patch[1]
    empty = -used % _MULTIPLE
    patches = x.new_empty((batch, used + empty, height, width))
    pixels = x[:, :, :height * patch[0], :width * patch[1]].reshape(
        batch, in_chans, height, patch[0], width, patch[1])
    patches[:, :used].view(batch, in_chans, *patch, height, width).copy_(pixels.permute(0, 1, 3, 5, 2, 4))
    matrix = weight.flatten(1)
    if empty:
        patches[:, used:].zero_()
        matrix = F.pad(matrix, (0, empty))
    return pointwise_mixing(patches, matrix.contiguous().view(channels, -1, 1, 1), bias, scale, shift, act)
