"""Which way a batch takes through stem and blocks: decided here, once a forward pass, with a reason in words.

- ``inference``: without gradients, in few passes over memory (``inference.py``).
- ``training``: with gradients, in segments that keep two feature maps a block (``training.py``).
- ``layers``: every layer is called, as in timm's ConvMixer.

The first two compute from outside what layers do. So each layer that they stand for is proven to be what its
constructor made (``plain.py``), and any other is called. Under a compiler, a transform or an observer all are called.
"""
import functools
from typing import Any, List, NamedTuple, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn

from .inference_form import FusedConvMixerBlock, FusedStem
from .kernels.support import (
    convolution_dtype,
    has_onednn,
    is_gpu,
    is_observed,
    is_transformed,
    opmath_dtype,
    suggest_memory_format,
    use_fused,
)
from .plain import TENSORS
from .plain_layers import (
    BlockLayers,
    StemLayers,
    container_difference,
    find_block,
    find_patched_layer,
    find_stem,
    is_dropping,
    part_tensors,
)

__all__ = ['Plan', 'Route', 'inference_difference', 'make_plan']

# The fewest elements of a batch's feature map for which a fast path pays: below, its checks and the folding of the
# normalisations cost more than it saves.
SMALLEST_MAP = 1 << 18

Stem = Union[StemLayers, FusedStem]
Block = Union[BlockLayers, FusedConvMixerBlock]
Part = Union[Stem, Block]


class Route(NamedTuple):
    """The answer to "which way does this batch take?".

    Attributes:
        name: ``'inference'``, ``'training'`` or ``'layers'``.
        reason: Why, in one sentence that names the layer if it is a layer's doing.
    """
    name: str
    reason: str


class Plan(NamedTuple):
    """A route, and all that it takes to run it.

    Attributes:
        route: The route.
        stem: Layers of the stem, None where it is called.
        blocks: Layers of each block, None where it is called.
        dtype: Dtype of the feature maps.
        positions: ``B * H * W`` of the feature maps, 0 if not known.
        memory_format: Memory format of the feature maps within the route ``inference``.
        outer_format: Memory format that the layers would give the feature maps, and that leaves a fast path.
    """
    route: Route
    stem: Optional[Stem] = None
    blocks: Sequence[Optional[Block]] = ()
    dtype: torch.dtype = torch.float32
    positions: int = 0
    memory_format: torch.memory_format = torch.contiguous_format
    outer_format: torch.memory_format = torch.contiguous_format

    def takes(self, x: torch.Tensor, depthwise_weight: torch.Tensor) -> bool:
        """Whether what a called layer returned is a feature map for the plain block that follows."""
        # Of one value per channel BatchNorm has no statistics, and raises an error of its own.
        return (
            type(x) is torch.Tensor and x.dim() == 4 and x.dtype == self.dtype and x.device == depthwise_weight.device
            and x.shape[1] == depthwise_weight.shape[0] and x.numel() > x.shape[1]
            and not _kernel_difference(x.device, x.dtype, x.shape, suggest_memory_format(x), depthwise_weight))


def make_plan(
        x: torch.Tensor,
        stem: nn.Module,
        blocks: Sequence[nn.Module],
        container: Optional[nn.Module] = None,
        checkpointing: bool = False,
) -> Plan:
    """Decide how images ``(B, in_chans, H, W)`` go through a stem and blocks.

    Args:
        x: The images.
        stem: Patch embedding.
        blocks: The blocks.
        container: What holds the blocks, if that is to be called as well.
        checkpointing: Whether gradient checkpointing is on.
    """
    # First: a compiled model must not depend on any of the rest.
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return _call_layers('the model is compiled, exported or traced', blocks, checkpointing)
    refusal = (
        _refusal(x)
        # Before the layers are looked at, which takes as long as a small model.
        or _device_refusal(x)
        or _small_map_refusal(x, stem)
        or ('' if container is None else container_difference(container))
        or find_patched_layer()
    )
    if refusal:
        return _call_layers(refusal, blocks, checkpointing)
    return _plan_parts(x, stem, blocks, checkpointing)


def _call_layers(reason: str, blocks: Sequence[nn.Module], checkpointing: bool) -> Plan:
    if checkpointing and _records_gradients():
        return Plan(Route('training', f'gradient checkpointing of called blocks: {reason}'), None, [None] * len(blocks))
    return Plan(Route('layers', reason))


def _records_gradients() -> bool:
    # enable_grad() within inference_mode() records nothing.
    return torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def _refusal(x: torch.Tensor) -> str:
    """Why no fast path serves images, whatever the layers are."""
    if not use_fused():
        return 'fast paths are switched off (TIMM_CONVMIXER_FUSED=0 or set_fused(False))'
    if type(x) not in TENSORS:
        return f'the input is a {type(x).__name__}'
    if x.layout != torch.strided:
        return f'the input has the layout {x.layout}'
    if is_transformed():
        return 'within a transform of torch.func or forward-mode differentiation'
    if is_observed():
        return 'a mode or a hook for all modules watches what is called'
    if x.dim() != 4 or x.numel() == 0:
        return f'the input has the shape {tuple(x.shape)}'
    if x.device.type not in ('cpu', 'cuda'):
        return f'there is no fast path for {x.device.type}'
    return ''


def _map_dtype(x: torch.Tensor) -> torch.dtype:
    """Dtype of the feature maps."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _device_refusal(x: torch.Tensor) -> str:
    """Why no fast path serves on a device, whatever the layers are."""
    if not is_gpu(x.device):
        return ''
    from .kernels.gpu.support import device_refusal

    return device_refusal(x.device, _map_dtype(x))


def _map_shape(x: torch.Tensor, weight: torch.Tensor) -> Tuple[int, int, int, int]:
    """Shape of the feature map that a patch embedding makes of images."""
    channels, _, patch_height, patch_width = weight.shape
    return x.shape[0], channels, x.shape[2] // patch_height, x.shape[3] // patch_width


def _small_map_refusal(x: torch.Tensor, stem: nn.Module) -> str:
    # Of a stem that is not plain this only guesses: it may be scripted, or its convolution have lost its weight.
    conv: Any = dict(stem.named_children()).get('conv' if type(stem) is FusedStem else '0')
    weight = conv._parameters.get('weight') if type(conv) is nn.Conv2d else None
    if weight is None or type(weight) not in TENSORS or weight.dim() != 4:
        return ''
    shape = torch.Size(_map_shape(x, weight))
    if not shape.numel():
        return 'the images are smaller than a patch'
    if shape.numel() >= SMALLEST_MAP:
        return ''
    dtype = _map_dtype(x)
    # In a dtype without fast convolutions the layers take longer than any check.
    if not is_gpu(x.device) and convolution_dtype(dtype) != dtype:
        return ''
    return f'a feature map of {tuple(shape)} is too small for a fast path to pay'


def _plan_parts(x: torch.Tensor, stem: nn.Module, blocks: Sequence[nn.Module], checkpointing: bool) -> Plan:
    """Prove the stem and each block plain, and choose between the routes."""
    device = x.device.type
    dtype = _map_dtype(x)
    conv_dtypes = (torch.float32, dtype) if torch.is_autocast_enabled(device) else (dtype,)
    if x.dtype not in conv_dtypes or dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        return _call_layers(f'the input is {x.dtype}', blocks, checkpointing)

    differences: List[str] = []
    needs_grad = x.requires_grad

    def check(part: Any, difference: str, name: str) -> Any:
        nonlocal needs_grad
        if part is not None:
            difference, requires_grad = _tensor_difference(part, x.device, conv_dtypes, dtype)
            needs_grad |= requires_grad
            difference = difference and f'{name} {difference}'
        if difference:
            differences.append(difference)
            return None
        return part

    stem_part = check(*find_stem(stem, 'stem'), 'stem')
    channels = None if stem_part is None else stem_part.conv.weight.shape[0]
    parts: List[Optional[Block]] = []
    for i, block in enumerate(blocks):
        part = check(*find_block(block, f'blocks.{i}', channels), f'blocks.{i}')
        channels = None if part is None else part.pointwise.weight.shape[0]
        parts.append(part)

    # A layer that is not plain may use a tensor that nobody can see.
    training = _records_gradients() and (needs_grad or bool(differences))
    if stem_part is not None and x.shape[1] != stem_part.conv.weight.shape[1]:
        return _call_layers(f'the images have {x.shape[1]} channels', blocks, checkpointing)
    shape = None if stem_part is None else _map_shape(x, stem_part.conv.weight)
    outer_format = suggest_memory_format(x)
    if stem_part is not None and suggest_memory_format(stem_part.conv.weight) == torch.channels_last:
        outer_format = torch.channels_last

    # Asked once: it is the same for every part.
    cpu_difference = '' if is_gpu(x.device) else _cpu_difference(dtype, training)

    def serves(part: Any, name: str, memory_format: torch.memory_format) -> bool:
        if part is None:
            return False
        difference = (
            (_training_difference(part, shape) if training else inference_difference(part))
            or ('has weights in channels last' if _changes_format(part, memory_format) else '')
            or (_gpu_difference(part, x, dtype, shape, memory_format) if is_gpu(x.device)
                else cpu_difference))
        if difference:
            differences.append(f'{name} {difference}')
        return not difference

    stem_part = stem_part if serves(stem_part, 'stem', outer_format) else None
    # Of the feature maps that reach a block, as far as it is known.
    memory_format = torch.contiguous_format if stem_part is None else outer_format
    for i, part in enumerate(parts):
        if not serves(part, f'blocks.{i}', memory_format):
            parts[i] = None
        if part is None:
            memory_format = torch.contiguous_format
        elif suggest_memory_format(part.pointwise.weight) == torch.channels_last:
            memory_format = torch.channels_last
    if not any(parts):
        return _call_layers(differences[0] if differences else 'there are no blocks', blocks, checkpointing)
    called = sum(part is None for part in (stem_part, *parts))
    reason = 'gradients are needed' if needs_grad else 'a called layer may need gradients'
    if not training:
        reason = 'no gradients are needed'
    elif checkpointing:
        reason += ', gradient checkpointing'
    reason += (
        f'; {called} of {1 + len(parts)} parts are called as layers: {differences[0]}' if called
        else '; every layer is plain')
    inner_format = outer_format
    if is_gpu(x.device):
        inner_format = torch.contiguous_format  # which is all that the kernels read
    elif not training and shape is not None and _channels_last_pays(parts, shape):
        inner_format = torch.channels_last
    return Plan(
        Route('training' if training else 'inference', reason),
        stem_part,
        parts,
        dtype,
        0 if shape is None else shape[0] * shape[2] * shape[3],
        inner_format,
        outer_format,
    )


def _tensor_difference(
        part: Part,
        device: torch.device,
        conv_dtypes: Sequence[torch.dtype],
        dtype: torch.dtype,
) -> Tuple[str, bool]:
    """How the tensors of a part differ from what a fast path takes; if they do not, whether one requires a gradient."""
    conv_tensors, norm_tensors = part_tensors(part)
    requires_grad = False
    for tensor in (*conv_tensors, *norm_tensors):
        if tensor is None:
            continue
        if tensor.device != device:
            return f'has a tensor on {tensor.device}', False
        requires_grad |= tensor.requires_grad
    for tensor in conv_tensors:
        if tensor is not None and tensor.dtype not in conv_dtypes:
            return f'has a convolution in {tensor.dtype}', False
    norm_dtypes = {tensor.dtype for tensor in norm_tensors if tensor is not None}
    if not (norm_dtypes == {dtype} or norm_dtypes == {opmath_dtype(dtype)}):
        return f'has normalisations in {sorted(map(str, norm_dtypes))}', False
    return '', requires_grad


def inference_difference(part: Part) -> str:
    """Why a plain part is called on the route ``inference``."""
    norms = (
        (part.norm,) if isinstance(part, StemLayers)
        else (part.spatial_norm, part.norm) if isinstance(part, BlockLayers) else ())
    if any(norm.training for norm in norms) or (isinstance(part, BlockLayers) and is_dropping(part.drop_path)):
        return 'is in training mode'
    return ''


def _training_difference(part: Part, shape: Optional[Sequence[int]]) -> str:
    """Why a plain part is called on the route ``training``."""
    if isinstance(part, (FusedStem, FusedConvMixerBlock)):
        return 'is an inference form'
    if shape is not None and shape[0] * shape[2] * shape[3] < 2:
        return 'has one value per channel'
    return ''


def _changes_format(part: Part, memory_format: torch.memory_format) -> bool:
    """Whether the weights of a block take feature maps to channels last, which only its layers do."""
    return memory_format == torch.contiguous_format and not isinstance(part, (StemLayers, FusedStem)) and any(
        suggest_memory_format(conv.weight) == torch.channels_last for conv in (part.depthwise, part.pointwise))


def _cpu_difference(dtype: torch.dtype, training: bool) -> str:
    """Why a part is called because the operators of a CPU do not serve the dtype of its feature maps."""
    # Nobody has measured it.
    return f'would run in {dtype} on a CPU' if dtype == torch.float64 and not training else ''


def _gpu_difference(
        part: Part,
        x: torch.Tensor,
        dtype: torch.dtype,
        shape: Optional[Sequence[int]],
        memory_format: torch.memory_format,
) -> str:
    """Why a part is called because no GPU kernel serves it."""
    if isinstance(part, (StemLayers, FusedStem)):
        return ''
    if shape is None:
        return 'follows a stem that is called, which may return any size'
    return _kernel_difference(x.device, dtype, shape, memory_format, part.depthwise.weight)


def _kernel_difference(
        device: torch.device,
        dtype: torch.dtype,
        shape: Sequence[int],
        memory_format: torch.memory_format,
        depthwise_weight: torch.Tensor,
) -> str:
    """Why no GPU kernel serves a block on feature maps of such a shape and memory format; ``''`` on a CPU."""
    if not is_gpu(device):
        return ''
    from .kernels.gpu.support import kernel_refusal

    if memory_format != torch.contiguous_format:
        return 'would get feature maps in channels last'
    channels, _, _, kernel_size = depthwise_weight.shape
    return kernel_refusal(device, dtype, (shape[0], channels, *shape[2:]), kernel_size)


def _channels_last_pays(parts: Sequence[Optional[Block]], shape: Sequence[int]) -> bool:
    """Whether inference of contiguous images on a CPU is faster in channels last."""
    # Measured: oneDNN's depthwise convolution without AVX-512 is up to twice as fast on contiguous feature maps.
    if not has_onednn() or not _has_avx512():
        return False
    # Measured: with AVX-512, channels last falls behind where the kernel reaches over half the feature map.
    block = next(part for part in parts if part is not None)
    return 2 * block.depthwise.weight.shape[-1] < min(shape[2:])


@functools.cache
def _has_avx512() -> bool:
    return torch.backends.cpu.get_cpu_capability() == 'AVX512'
