"""The layers of a stem or a block, if each still is what its constructor made: see :mod:`timm_convmixer.plain`."""
import functools
from typing import Any, Dict, NamedTuple, Optional, Sequence, Set, Tuple, Union

import torch
import torch.nn as nn

from .inference_form import FusedConvMixerBlock, FusedStem
from .kernels.support import opmath_dtype
from .layers import ConvMixerBlock, ConvMixerStem, SpatialMixing
from .plain import Form, Plain, find_patched

__all__ = [
    'BlockLayers',
    'StemLayers',
    'act_name',
    'container_difference',
    'find_block',
    'find_fusible_block',
    'find_fusible_stem',
    'find_patched_layer',
    'find_stem',
    'is_dropping',
    'part_tensors',
]

BatchNorm = Union[nn.BatchNorm2d, nn.SyncBatchNorm]


class StemLayers(NamedTuple):
    """The layers of a plain :class:`ConvMixerStem`, its activation by the name that the kernels know."""
    conv: nn.Conv2d
    act: str
    norm: BatchNorm


class BlockLayers(NamedTuple):
    """The layers of a plain :class:`ConvMixerBlock`, its activations by the names that the kernels know."""
    depthwise: nn.Conv2d
    spatial_act: str
    spatial_norm: BatchNorm
    drop_path: Optional[nn.Module]
    pointwise: nn.Conv2d
    act: str
    norm: BatchNorm


def act_name(act: nn.Module) -> str:
    """The name by which the kernels know a plain activation."""
    return 'relu' if type(act) is nn.ReLU else 'gelu'


class _Forms(NamedTuple):
    """What is plain for each layer of a stem and a block: of both forms, and of what can be fused."""
    stem: Form
    block: Form
    fused_stem: Form
    fused_block: Form
    fusible_stem: Form
    fusible_block: Form
    container: Plain


@functools.cache
def _forms() -> _Forms:
    # Importing timm registers the models, which imports this module: that must find it complete.
    from timm.layers import GELU, DropPath
    from torchvision.ops import FrozenBatchNorm2d

    # On meta, where initial values draw no random numbers: those are the user's.
    dd: Dict[str, Any] = {'device': 'meta'}
    conv, norm, act = nn.Conv2d(1, 1, 1, **dd), nn.BatchNorm2d(1, **dd), nn.ReLU()
    one = torch.ones(1, **dd)
    patches = Plain(conv, padding=(0, 0), dilation=(1, 1), groups=1, padding_mode='zeros')
    depthwise = Plain(conv, stride=(1, 1), padding='same', dilation=(1, 1), padding_mode='zeros')
    # The inference form writes an odd kernel's padding in numbers.
    fused_depthwise = Plain(conv, stride=(1, 1), dilation=(1, 1), padding_mode='zeros')
    pointwise = Plain(conv, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1, padding_mode='zeros')
    activation = Plain(act, nn.GELU(), GELU(), approximate='none')
    sync_norm = nn.SyncBatchNorm(1, **dd)
    batch_norm = Plain(norm, sync_norm, track_running_stats=True)
    fusible_norm = Plain(norm, sync_norm, FrozenBatchNorm2d(1))
    drop_path = Plain(DropPath(), optional=True)
    stem = Plain(ConvMixerStem(1, 1, **dd), children=('0', '1', '2'))
    block = Plain(ConvMixerBlock(1, **dd), children=('0', '1', '2', '3'))
    spatial = Plain(SpatialMixing(1, **dd), children=('fn',))
    branch = Plain(nn.Sequential(), children=('0', '1', '2'), last=DropPath())
    fused_stem = Plain(FusedStem(conv, act, one, one), children=('conv', 'act'))
    fused_block = Plain(
        FusedConvMixerBlock(conv, act, one, one, conv, act, one, one),
        children=('depthwise', 'spatial_act', 'pointwise', 'act'),
    )
    return _Forms(
        stem=Form({'': stem, '0': patches, '1': activation, '2': batch_norm}),
        block=Form({
            '': block, '0': spatial, '0.fn': branch, '0.fn.0': depthwise, '0.fn.1': activation, '0.fn.2': batch_norm,
            '0.fn.3': drop_path, '1': pointwise, '2': activation, '3': batch_norm,
        }),
        fused_stem=Form({'': fused_stem, 'conv': patches, 'act': activation}),
        fused_block=Form({
            '': fused_block, 'depthwise': fused_depthwise, 'spatial_act': activation, 'pointwise': pointwise,
            'act': activation,
        }),
        fusible_stem=Form({'': stem, '0': patches, '2': fusible_norm}),
        fusible_block=Form({
            '': block, '0': spatial, '0.fn': branch, '0.fn.0': depthwise, '0.fn.2': fusible_norm,
            '0.fn.3': drop_path, '1': pointwise, '3': fusible_norm,
        }),
        container=Plain(nn.Sequential(), children=None),
    )


def find_fusible_stem(stem: nn.Module) -> Optional[Tuple[nn.Conv2d, nn.Module]]:
    """The convolution and the normalisation of a stem that can be folded, None where a layer is not plain."""
    layers, _ = _forms().fusible_stem.find(stem)
    if not (layers and _can_fold(layers, (stem[1],), layers[2:])):
        return None
    _, conv, norm = layers
    return conv, norm


def find_fusible_block(block: nn.Module) -> Optional[Tuple[nn.Conv2d, nn.Module, nn.Conv2d, nn.Module]]:
    """As :func:`find_fusible_stem`: depthwise convolution, its normalisation, pointwise convolution, normalisation."""
    layers, _ = _forms().fusible_block.find(block)
    if not (layers and _can_fold(layers, (block[0].fn[1], block[2]), (layers[4], layers[7]))):
        return None
    _, _, _, depthwise, spatial_norm, _, pointwise, norm = layers
    # A larger kernel would see the shift, which goes into its bias, once for each of its positions.
    if pointwise.weight.shape[1:] != (len(depthwise.weight), 1, 1):
        return None
    return depthwise, spatial_norm, pointwise, norm


def _can_fold(
        layers: Sequence[nn.Module],
        acts: Sequence[nn.Module],
        norms: Sequence[nn.Module],
) -> bool:
    """Whether the layers of a form can be folded: statistics there, tensors plain, no layer in a mode of its own."""
    # A frozen normalisation has no modes.
    from torchvision.ops import FrozenBatchNorm2d

    def dtypes(layer: nn.Module) -> Set[torch.dtype]:
        tensors = (*layer._parameters.values(), *layer._buffers.values())
        return {tensor.dtype for tensor in tensors if tensor is not None and tensor.is_floating_point()}

    convs = [layer for layer in layers if type(layer) is nn.Conv2d]
    if _weight_difference(*convs):
        return False
    dtype = convs[0].weight.dtype
    return (
        all(isinstance(act, nn.Module) for act in acts)
        and all(norm.running_mean is not None and norm.running_var is not None for norm in norms)
        # What PyTorch refuses to compute must not compute once it is folded.
        and all(dtypes(conv) == {dtype} for conv in convs)
        and all(dtypes(norm) in ({dtype}, {opmath_dtype(dtype)}) for norm in norms)
        and all(
            layer is None or layer.training == layers[0].training or isinstance(layer, FrozenBatchNorm2d)
            for layer in layers)
        and not find_patched()
    )


def find_stem(stem: nn.Module, name: str) -> Tuple[Union[StemLayers, FusedStem, None], str]:
    """The layers of a stem in either form.

    Args:
        stem: The stem.
        name: Its name in the model, for the reason.

    Returns:
        Its layers and ``''``; or None, and the first layer that is not what its constructor made with what differs.
    """
    fused = type(stem) is FusedStem
    layers, difference = (_forms().fused_stem if fused else _forms().stem).find(stem, name)
    if difference:
        return None, difference
    conv, act = layers[1], layers[2]
    difference = _weight_difference(conv)
    if difference:
        return None, f'{name} {difference}'
    shape = conv.weight.shape
    if conv.stride != tuple(shape[2:]):
        return None, f'{name} has stride={conv.stride} for patches of {tuple(shape[2:])}'
    difference = (
        _vector_difference(shape[0], conv.bias, stem.scale, stem.shift) if fused
        else _vector_difference(shape[0], conv.bias) or _norm_difference(shape[0], layers[3]))
    if difference:
        return None, f'{name} {difference}'
    return stem if fused else StemLayers(conv, act_name(act), layers[3]), ''


def find_block(
        block: nn.Module,
        name: str,
        channels: Optional[int] = None,
) -> Tuple[Union[BlockLayers, FusedConvMixerBlock, None], str]:
    """The layers of a block in either form.

    Args:
        block: The block.
        name: Its name in the model, for the reason.
        channels: Channels of the feature maps that it takes, if they are known.

    Returns:
        As :func:`find_stem`.
    """
    fused = type(block) is FusedConvMixerBlock
    layers, difference = (_forms().fused_block if fused else _forms().block).find(block, name)
    if difference:
        return None, difference
    if fused:
        _, depthwise, spatial_act, pointwise, act = layers
    else:
        _, _, _, depthwise, spatial_act, spatial_norm, drop_path, pointwise, act, norm = layers
    difference = _weight_difference(depthwise, pointwise)
    if difference:
        return None, f'{name} {difference}'
    shape, side = depthwise.weight.shape, depthwise.weight.shape[-1]
    channels, out_channels = shape[0] if channels is None else channels, pointwise.weight.shape[0]
    if shape != (channels, 1, side, side) or depthwise.groups != channels:
        difference = f'has depthwise kernels of {tuple(shape)} in {depthwise.groups} groups for {channels} channels'
    elif depthwise.padding != 'same' and (side % 2 == 0 or depthwise.padding != (side // 2, side // 2)):
        difference = f'has depthwise padding={depthwise.padding} for kernels of {side}'
    elif pointwise.weight.shape[1:] != (channels, 1, 1):
        difference = f'has a pointwise weight of {tuple(pointwise.weight.shape)} for {channels} channels'
    elif fused:
        difference = (
            _vector_difference(channels, depthwise.bias, block.spatial_scale)
            or _vector_difference(out_channels, pointwise.bias, block.scale, block.shift))
    else:
        difference = (
            _vector_difference(channels, depthwise.bias) or _norm_difference(channels, spatial_norm)
            or _vector_difference(out_channels, pointwise.bias) or _norm_difference(out_channels, norm))
    if difference:
        return None, f'{name} {difference}'
    if fused:
        return block, ''
    return BlockLayers(
        depthwise, act_name(spatial_act), spatial_norm, drop_path, pointwise, act_name(act), norm), ''


def _norm_tensors(norm: BatchNorm) -> Tuple[Optional[torch.Tensor], ...]:
    parameters, buffers = norm._parameters, norm._buffers
    return parameters['weight'], parameters['bias'], buffers['running_mean'], buffers['running_var']


def _norm_difference(channels: int, norm: BatchNorm) -> str:
    # Synchronised over processes only in training, and where there are several.
    if type(norm) is nn.SyncBatchNorm and norm.training and (
            torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 'has a normalisation that is synchronised'
    if any(norm._buffers[name] is None for name in ('running_mean', 'running_var', 'num_batches_tracked')):
        return 'has a normalisation without running statistics'
    # PyTorch refuses an eps of 0 in training alone.
    if not (isinstance(norm.eps, (float, int)) and norm.eps > 0) or not isinstance(
            norm.momentum, (float, int, type(None))):
        return f'has a normalisation with eps={norm.eps!r} and momentum={norm.momentum!r}'
    return _vector_difference(channels, *_norm_tensors(norm))


def _weight_difference(*convs: nn.Conv2d) -> str:
    # A hypernetwork may give a convolution its weight in each call.
    if any(conv.weight is None or conv.weight.dim() != 4 for conv in convs):
        return 'has a convolution without a weight of four dimensions'
    return ''


def _vector_difference(channels: int, *vectors: Optional[torch.Tensor]) -> str:
    for vector in vectors:
        if vector is not None and vector.shape != (channels,):
            return f'has a vector of {tuple(vector.shape)} for {channels} channels'
    return ''


def find_patched_layer() -> str:
    """As :func:`find_patched`, for all classes that can be part of a stem or a block."""
    _forms()  # notes what they came with, if this is the first time
    return find_patched()


def container_difference(blocks: nn.Module) -> str:
    """How the container of the blocks differs from a plain ``nn.Sequential``, ``''`` if it does not."""
    difference = _forms().container.difference(blocks)
    return difference and f'blocks {difference}'


def part_tensors(
        part: Union[StemLayers, FusedStem, BlockLayers, FusedConvMixerBlock],
) -> Tuple[Tuple[Optional[torch.Tensor], ...], Tuple[Optional[torch.Tensor], ...]]:
    """The tensors that a plain stem or block computes from: of its convolutions, and of its normalisations."""
    if isinstance(part, StemLayers):
        return tuple(part.conv._parameters.values()), _norm_tensors(part.norm)
    if isinstance(part, FusedStem):
        return tuple(part.conv._parameters.values()), (part.scale, part.shift)
    convs = (*part.depthwise._parameters.values(), *part.pointwise._parameters.values())
    if isinstance(part, BlockLayers):
        return convs, (*_norm_tensors(part.spatial_norm), *_norm_tensors(part.norm))
    return convs, (part.spatial_scale, part.scale, part.shift)


def is_dropping(drop_path: Optional[nn.Module]) -> bool:
    """Whether a plain drop path layer, or what is in its place, drops anything now."""
    return drop_path is not None and drop_path.training and getattr(drop_path, 'drop_prob', 0.) > 0.
