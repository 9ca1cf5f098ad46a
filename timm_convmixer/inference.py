"""Inference of a ConvMixer in either form on a CPU, a few images at a time, each map overwritten by what follows it.

PyTorch's convolutions do the work. What is saved is memory: maps of a large batch come fresh from the system, page by
page, for every layer, which can cost more than what is computed.
"""
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple, cast
from weakref import WeakKeyDictionary

import torch
import torch.nn as nn
import torch.nn.functional as F

from .kernels.activation import activate_into
from .kernels.cpu.pointwise import pack_pointwise_weight, packed_pointwise, packed_pointwise_refusal
from .kernels.cpu.workspace import keep_freed_memory
from .kernels.support import is_observed, is_transformed, use_fused
from .layers import (
    ConvMixerBlock,
    ConvMixerStem,
    FusedConvMixerBlock,
    FusedStem,
    affine,
    affine_dtype,
    is_activation_and_batch_norm,
    is_plain_act,
    is_plain_block,
    is_plain_conv,
    is_unmodified,
    kernel_act,
    norms_to_affine,
    scaled_residual,
)

__all__ = ['forward_in_place', 'runs_in_place']

# Bytes of a map that the images computed at a time may have between them, from measurements on two cores: above, maps
# leave the caches and the memory that the C library keeps, below, convolutions have too little to share out.
_MAP_BYTES = 8 << 20
# Elements of a batch's map from which on this outweighs the cost of asking, and in the training form of folding the
# normalisations at every call.
_LARGE_FOR_FUSED = 1 << 16
_LARGE = 1 << 18


def runs_in_place(x: torch.Tensor, stem: nn.Module, blocks: nn.Module) -> bool:
    """Whether :func:`forward_in_place` serves a stem and blocks for images ``x`` of ``(B, in_chans, H, W)``."""
    if (
        # First: what is compiled or traced must not depend on the size of a map.
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or type(x) is not torch.Tensor
        or x.device.type != 'cpu'
        or torch.is_autocast_enabled('cpu')
        or not use_fused()
        or is_transformed()
        or is_observed()
        or not is_unmodified(stem, ConvMixerStem, FusedStem)
        or not is_unmodified(blocks, nn.Sequential)
        or len(blocks) == 0
    ):
        return False
    fused = isinstance(stem, FusedStem)
    if torch.Size(_map_shape(x, stem)).numel() < (_LARGE_FOR_FUSED if fused else _LARGE):
        return False
    if torch.is_grad_enabled() and any(
            tensor.requires_grad for tensor in (x, *stem.parameters(), *blocks.parameters())):
        return False
    if fused:
        return is_plain_conv(stem.conv) and is_plain_act(stem.act) and all(map(_is_plain_fused_block, blocks))
    return (
        x.dtype in (torch.float32, torch.bfloat16)
        and is_plain_conv(stem[0])
        and _is_inference(*stem[1:])
        and all(map(_is_plain_inference_block, blocks))
    )


def _map_shape(x: torch.Tensor, stem: nn.Module) -> Tuple[int, ...]:
    """The shape of what a stem makes of images."""
    conv = stem.conv if isinstance(stem, FusedStem) else cast(ConvMixerStem, stem)[0]
    return (
        x.shape[0], conv.weight.shape[0], x.shape[2] // conv.weight.shape[2], x.shape[3] // conv.weight.shape[3])


def _is_plain_fused_block(block: nn.Module) -> bool:
    return (
        is_unmodified(block, FusedConvMixerBlock)
        and is_plain_act(block.spatial_act)
        and is_plain_act(block.act)
        and is_plain_conv(block.depthwise)
        and is_plain_conv(block.pointwise)
    )


def _is_inference(act: nn.Module, norm: nn.Module) -> bool:
    return is_activation_and_batch_norm(act, norm) and not norm.training and norm.running_mean is not None


def _is_plain_inference_block(block: nn.Module) -> bool:
    return (
        is_unmodified(block, ConvMixerBlock)
        and is_plain_block(block)
        and _is_inference(*block[0].fn[1:])
        and _is_inference(*block[2:])
        and not block[0].drop_path.training
    )


class _Stem(NamedTuple):
    """A patch embedding, its activation and its folded normalisation."""
    conv: nn.Module
    act: str
    scale: torch.Tensor
    shift: torch.Tensor


class _Block(NamedTuple):
    """The convolutions of a block, its activations and its folded normalisations."""
    depthwise: nn.Module
    spatial_act: str
    spatial_scale: torch.Tensor
    spatial_shift: Optional[torch.Tensor]
    pointwise_weight: torch.Tensor
    pointwise_bias: Optional[torch.Tensor]
    act: str
    scale: torch.Tensor
    shift: torch.Tensor


def _fused_constants(stem: FusedStem, blocks: Sequence[FusedConvMixerBlock]) -> Tuple[_Stem, List[_Block]]:
    constants = []
    for block in blocks:
        spatial_act, act = cast(Tuple[str, str], block.kernel_acts)
        constants.append(_Block(
            block.depthwise,
            spatial_act,
            block.spatial_scale,
            None,
            block.pointwise.weight,
            block.pointwise.bias,
            act,
            block.scale,
            block.shift,
        ))
    return _Stem(stem.conv, cast(str, kernel_act(stem.act)), stem.scale, stem.shift), constants


def _fold(stem: ConvMixerStem, blocks: Sequence[ConvMixerBlock], locations: int) -> Tuple[_Stem, List[_Block]]:
    """The constants of the training form, its normalisations folded: all of them at once, not one by one."""
    norms = [stem[2], *(block[0].fn[2] for block in blocks), *(block[3] for block in blocks)]
    dtype = affine_dtype(stem[0].weight)
    scales, shifts = (values.to(dtype).unbind() for values in norms_to_affine(norms))
    depth = len(blocks)
    constants = []
    for i, block in enumerate(blocks):
        (depthwise, spatial_act, _), (_, pointwise, act, _) = block[0].fn, block
        weight, bias = pointwise.weight, pointwise.bias
        spatial_shift = shifts[1 + i]
        # Into the bias, as in the inference form, where reading the weight is less than another pass over the map.
        if locations > weight.shape[1]:
            folded = weight.flatten(1).to(dtype).mv(spatial_shift)
            bias = (folded if bias is None else folded + bias).to(weight.dtype)
            spatial_shift = None
        constants.append(_Block(
            depthwise,
            cast(str, kernel_act(spatial_act)),
            scales[1 + i],
            spatial_shift,
            weight,
            bias,
            cast(str, kernel_act(act)),
            scales[1 + depth + i],
            shifts[1 + depth + i],
        ))
    return _Stem(stem[0], cast(str, kernel_act(stem[1])), scales[0], shifts[0]), constants


class _Packed(NamedTuple):
    """A packed weight, and what it was made from and for."""
    made_from: Tuple
    # Held so that no other weight comes to lie at the address that tells this one from others.
    weight: torch.Tensor
    packed: torch.Tensor


# By block, for the last shape alone. Not with the block, which is copied, pickled and moved.
_PACKED: 'WeakKeyDictionary[nn.Module, _Packed]' = WeakKeyDictionary()


def _packed_weight(block: FusedConvMixerBlock, like: torch.Tensor) -> Optional[torch.Tensor]:
    """The weight of a block's pointwise convolution, packed for maps like ``like``; None where that is of no use."""
    weight = block.pointwise.weight
    if packed_pointwise_refusal(like, weight):
        return None
    made_from = weight.data_ptr(), weight._version, weight.dtype, tuple(like.shape)
    cached = _PACKED.get(block)
    if cached is not None and cached.made_from == made_from:
        return cached.packed
    packed = pack_pointwise_weight(weight, like.shape)
    _PACKED[block] = _Packed(made_from, weight.detach(), packed)
    return packed


def _forward_stem(x: torch.Tensor, stem: _Stem) -> torch.Tensor:
    x = stem.conv(x)
    x = activate_into(x, x, stem.act)
    return affine(x, stem.scale, stem.shift, inplace=True)


def _forward_block(x: torch.Tensor, block: _Block, packed_weight: Optional[torch.Tensor]) -> torch.Tensor:
    branch = block.depthwise(x)
    branch = activate_into(branch, branch, block.spatial_act)
    mixed = scaled_residual(x, branch, block.spatial_scale, inplace=True)
    if block.spatial_shift is not None:
        mixed += block.spatial_shift.view(-1, 1, 1)
    if packed_weight is not None:
        out = packed_pointwise(mixed, packed_weight, block.pointwise_bias, block.act)
    else:
        out = F.conv2d(mixed, block.pointwise_weight, block.pointwise_bias)
        out = activate_into(out, out, block.act)
    return affine(out, block.scale, block.shift, inplace=True)


def forward_in_place(
        x: torch.Tensor,
        stem: nn.Module,
        blocks: nn.Sequential,
        take_indices: Sequence[int] = (),
) -> Tuple[torch.Tensor, List[torch.Tensor]]:
    """Stem and blocks of a model for which :func:`runs_in_place` returns True.

    Args:
        x: Images ``(B, in_chans, H, W)``.
        stem: Patch embedding.
        blocks: The blocks.
        take_indices: Indices of the blocks whose outputs are returned.

    Returns:
        Features ``(B, C, H, W)``, and the outputs of the blocks that were asked for.
    """
    keep_freed_memory()
    batch_size, channels, height, width = _map_shape(x, stem)
    if isinstance(stem, FusedStem):
        stem_constants, constants = _fused_constants(stem, blocks)
        channels_last = x.contiguous(memory_format=torch.channels_last)
        # With packed weights it is the fastest memory format for every model.
        if not packed_pointwise_refusal(channels_last, blocks[0].pointwise.weight):
            x = channels_last
    else:
        stem_constants, constants = _fold(stem, blocks, batch_size * height * width)
    chunks = x.split(max(1, _MAP_BYTES // (channels * height * width * x.element_size())))
    taken: Dict[int, List[torch.Tensor]] = {index: [] for index in (*take_indices, len(blocks) - 1)}
    for chunk in chunks:
        y = _forward_stem(chunk, stem_constants)
        # A weight packed for one number of images is slow for another, so not for the rest at the end.
        packs = isinstance(stem, FusedStem) and len(chunk) == len(chunks[0])
        for index, block in enumerate(constants):
            y = _forward_block(y, block, _packed_weight(blocks[index], y) if packs else None)
            if index in taken:
                taken[index].append(y)
    maps = {index: parts[0] if len(parts) == 1 else torch.cat(parts) for index, parts in taken.items()}
    return maps[len(blocks) - 1], [maps[index] for index in sorted(take_indices)]
