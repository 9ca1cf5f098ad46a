"""The route without gradients: normalisations folded, each feature map overwritten by what follows it.

On a CPU a chunk of images goes through all blocks before the next chunk. Otherwise every layer would allocate a feature
map of the whole batch, whose page faults can cost more than the arithmetic.
"""
from itertools import groupby
from typing import Any, Dict, Iterable, List, NamedTuple, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn
import torch.nn.functional as F

from .inference_form import FusedConvMixerBlock, FusedStem, fold_norms
from .kernels.activation import activate_into
from .kernels.cpu.elementwise import affine_into, scaled_residual_into
from .kernels.cpu.memory import keep_freed_memory
from .kernels.support import convolution_dtype, is_gpu, opmath_dtype, suggest_memory_format
from .plain_layers import BlockLayers, StemLayers, act_name, find_block
from .routes import Plan, inference_difference

__all__ = ['forward_inference']

# Target bytes of one feature map per chunk, from measurements on two cores: larger ones leave the caches and the memory
# that the C library keeps, smaller ones leave a convolution too little to share out.
_CHUNK_BYTES = 8 << 20


class _FoldedStem(NamedTuple):
    """A patch embedding, its activation and its folded normalisation."""
    weight: torch.Tensor
    bias: Optional[torch.Tensor]
    act: str
    scale: torch.Tensor
    shift: torch.Tensor


class _FoldedBlock(NamedTuple):
    """The convolutions of a block, its activations and its folded normalisations."""
    depthwise_weight: torch.Tensor
    depthwise_bias: Optional[torch.Tensor]
    spatial_act: str
    spatial_scale: torch.Tensor
    spatial_shift: Optional[torch.Tensor]
    pointwise_weight: torch.Tensor
    pointwise_bias: Optional[torch.Tensor]
    act: str
    scale: torch.Tensor
    shift: torch.Tensor


class _PlannedPart(NamedTuple):
    """The stem (-1) or a block: its layers, or None where it is called."""
    block_index: int
    module: nn.Module
    layers: Any


def _fold_stem(
        stem: Union[StemLayers, FusedStem],
        dtype: torch.dtype,
        norms: Dict[nn.Module, Tuple[torch.Tensor, torch.Tensor]],
) -> _FoldedStem:
    act = act_name(stem.act) if isinstance(stem, FusedStem) else stem.act
    scale, shift = (stem.scale, stem.shift) if isinstance(stem, FusedStem) else norms[stem.norm]
    weight, bias = _cast(dtype, stem.conv.weight, stem.conv.bias)
    return _FoldedStem(weight, bias, act, *_widen(dtype, scale, shift))


def _fold_block(
        block: Union[BlockLayers, FusedConvMixerBlock],
        dtype: torch.dtype,
        norms: Dict[nn.Module, Tuple[torch.Tensor, torch.Tensor]],
        positions: int,
) -> _FoldedBlock:
    depthwise_weight, depthwise_bias = _cast(dtype, block.depthwise.weight, block.depthwise.bias)
    weight, bias = _cast(dtype, block.pointwise.weight, block.pointwise.bias)
    if isinstance(block, FusedConvMixerBlock):
        spatial_act, act = act_name(block.spatial_act), act_name(block.act)
        spatial_scale, scale, shift = _widen(dtype, block.spatial_scale, block.scale, block.shift)
        spatial_shift = None
    else:
        spatial_act, act = block.spatial_act, block.act
        spatial_scale, spatial_shift = norms[block.spatial_norm]
        scale, shift = norms[block.norm]
        # Into the bias, as in the inference form, where that reads less than another pass over the feature map. Maps
        # in half precision take the shift in the same pass as the scale.
        if dtype == spatial_shift.dtype and positions > weight.shape[1]:
            # Not a matrix product, which torch.set_float32_matmul_precision() may round.
            folded = (weight.flatten(1) * spatial_shift).sum(1)
            bias = folded if bias is None else folded + bias
            spatial_shift = None
    return _FoldedBlock(
        depthwise_weight, depthwise_bias, spatial_act, spatial_scale, spatial_shift, weight, bias, act, scale, shift)


def _cast(dtype: torch.dtype, *tensors: Optional[torch.Tensor]) -> List[Any]:
    return [None if tensor is None else tensor.to(dtype) for tensor in tensors]


def _widen(dtype: torch.dtype, *constants: torch.Tensor) -> List[torch.Tensor]:
    """The constants of an inference form that has been cast, in the dtype of the arithmetic or a wider one."""
    return [constant.to(torch.promote_types(constant.dtype, dtype)) for constant in constants]


def _fold(parts: Sequence[_PlannedPart], dtype: torch.dtype, positions: int) -> List[Union[_FoldedStem, _FoldedBlock]]:
    """The constants of plain parts; the normalisations of the training form are folded all at once."""
    norms: List[nn.Module] = []
    for part in parts:
        if isinstance(part.layers, StemLayers):
            norms.append(part.layers.norm)
        elif isinstance(part.layers, BlockLayers):
            norms += part.layers.spatial_norm, part.layers.norm
    folded = dict(zip(norms, zip(*fold_norms(norms, opmath_dtype(dtype))))) if norms else {}
    return [
        _fold_stem(part.layers, dtype, folded) if isinstance(part.layers, (StemLayers, FusedStem))
        else _fold_block(part.layers, dtype, folded, positions)
        for part in parts
    ]


def _run_stem(x: torch.Tensor, stem: _FoldedStem) -> torch.Tensor:
    x = F.conv2d(x, stem.weight, stem.bias, stride=stem.weight.shape[2:])
    x = activate_into(x, x, stem.act)
    return affine_into(x, x, stem.scale, stem.shift)


def _run_block(x: torch.Tensor, block: _FoldedBlock) -> torch.Tensor:
    weight = block.depthwise_weight
    branch = F.conv2d(x, weight, block.depthwise_bias, padding='same', groups=weight.shape[0])
    branch = activate_into(branch, branch, block.spatial_act)
    y = scaled_residual_into(branch, x, block.spatial_scale, block.spatial_shift)
    out = F.conv2d(y, block.pointwise_weight, block.pointwise_bias)
    out = activate_into(out, out, block.act)
    return affine_into(out, out, block.scale, block.shift)


def _run_stem_on_gpu(x: torch.Tensor, stem: _FoldedStem) -> torch.Tensor:
    from .kernels.gpu.patch_embedding import patch_embedding

    return patch_embedding(x, *_contiguous(stem.weight, stem.bias, stem.scale, stem.shift), stem.act)


def _run_block_on_gpu(x: torch.Tensor, block: _FoldedBlock) -> torch.Tensor:
    from .kernels.gpu.depthwise import depthwise_mixing
    from .kernels.gpu.pointwise import pointwise_mixing

    tensors = _contiguous(block.depthwise_weight, block.depthwise_bias, block.spatial_scale, block.spatial_shift)
    x = depthwise_mixing(x, *tensors, block.spatial_act)
    tensors = _contiguous(block.pointwise_weight, block.pointwise_bias, block.scale, block.shift)
    return pointwise_mixing(x, *tensors, block.act)


def _contiguous(*tensors: Optional[torch.Tensor]) -> Tuple[Any, Any, Any, Any]:
    weight, bias, scale, shift = (None if tensor is None else tensor.contiguous() for tensor in tensors)
    return weight, bias, scale, shift


def _chunk_size(x: torch.Tensor, constants: Union[_FoldedStem, _FoldedBlock], dtype: torch.dtype) -> int:
    """Images that go through the blocks at a time."""
    if isinstance(constants, _FoldedStem):
        channels, _, *patch = constants.weight.shape
        positions = (x.shape[2] // patch[0]) * (x.shape[3] // patch[1])
    else:
        channels, positions = x.shape[1], x.shape[2] * x.shape[3]
    return max(1, _CHUNK_BYTES // (channels * positions * dtype.itemsize))


def _store(
        out: Optional[torch.Tensor],
        chunk: torch.Tensor,
        start: int,
        batch_size: int,
        dtype: torch.dtype,
        memory_format: torch.memory_format,
) -> torch.Tensor:
    """Write a chunk into the feature map of its batch, which the first chunk makes."""
    if len(chunk) == batch_size:
        return chunk.to(dtype).contiguous(memory_format=memory_format)
    if out is None:
        shape = (batch_size, *chunk.shape[1:])
        out = torch.empty(shape, dtype=dtype, device=chunk.device, memory_format=memory_format)
    out[start:start + len(chunk)] = chunk
    return out


def forward_inference(
        x: torch.Tensor,
        plan: Plan,
        stem: nn.Module,
        blocks: Sequence[nn.Module],
        take_indices: Sequence[int] = (),
) -> Tuple[torch.Tensor, List[torch.Tensor]]:
    """Stem and blocks without gradients.

    Args:
        x: Images ``(B, in_chans, H, W)``.
        plan: What :func:`timm_convmixer.routes.make_plan` says of this very call.
        stem: Patch embedding.
        blocks: The blocks.
        take_indices: Indices of the blocks whose outputs are returned.

    Returns:
        Features ``(B, C, H, W)``, and the outputs of the blocks that were asked for, in the memory format that the
        layers would return.
    """
    if not is_gpu(x.device):
        keep_freed_memory()
    modules, layers = (stem, *blocks), (plan.stem, *plan.blocks)
    parts = [_PlannedPart(i, *part) for i, part in enumerate(zip(modules, layers), start=-1)]
    taken: Dict[int, torch.Tensor] = {}
    for is_plain, group in groupby(parts, key=lambda part: part.layers is not None):
        if is_plain:
            x = _run_plain(x, plan, list(group), take_indices, taken)
        else:
            x = _call(x, group, take_indices, taken)
    return x, [taken[index] for index in sorted(taken)]


def _call(
        x: torch.Tensor,
        group: Iterable[_PlannedPart],
        take_indices: Sequence[int],
        taken: Dict[int, torch.Tensor],
) -> torch.Tensor:
    """Called parts one after the other; notes outputs in ``taken``."""
    for part in group:
        x = part.module(x)
        if part.block_index in take_indices:
            taken[part.block_index] = x
    return x


def _has_changed(part: _PlannedPart) -> bool:
    """Whether a block is not what the plan says any more, because of a hook on a part that was called before it."""
    return find_block(part.module, '')[0] != part.layers or bool(inference_difference(part.layers))


def _run_plain(
        x: torch.Tensor,
        plan: Plan,
        group: Sequence[_PlannedPart],
        take_indices: Sequence[int],
        taken: Dict[int, torch.Tensor],
) -> torch.Tensor:
    """Plain parts one after the other, a chunk of images at a time; notes outputs in ``taken``."""
    first = group[0].layers
    if isinstance(first, (StemLayers, FusedStem)):
        outer_format = plan.outer_format
    elif plan.takes(x, first.depthwise.weight) and not any(map(_has_changed, group)):
        outer_format = suggest_memory_format(x)
    else:
        return _call(x, group, take_indices, taken)
    outputs: Dict[int, torch.Tensor] = {}
    last = group[-1].block_index
    wanted = {part.block_index for part in group if part.block_index in take_indices or part.block_index == last}
    on_gpu = is_gpu(x.device)
    run_stem, run_block = (_run_stem_on_gpu, _run_block_on_gpu) if on_gpu else (_run_stem, _run_block)
    # A hook on a called layer may have switched gradients on.
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        # Of the arithmetic. Where it is wider than that of the feature maps, only what the group returns is rounded.
        dtype = plan.dtype if on_gpu else convolution_dtype(plan.dtype)
        constants = _fold(group, dtype, plan.positions)
        size = len(x) if on_gpu else _chunk_size(x, constants[0], dtype)
        for start in range(0, len(x), size):
            y = x[start:start + size].to(dtype).contiguous(memory_format=plan.memory_format)
            for part, folded in zip(group, constants):
                y = run_stem(y, folded) if isinstance(folded, _FoldedStem) else run_block(y, folded)
                if part.block_index in wanted:
                    out = outputs.get(part.block_index)
                    outputs[part.block_index] = _store(out, y, start, len(x), plan.dtype, outer_format)
    taken.update((index, y) for index, y in outputs.items() if index in take_indices)
    return outputs[last]
