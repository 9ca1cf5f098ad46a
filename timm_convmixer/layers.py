"""The building blocks of ConvMixer: one class for each of the two equations of a block, and their inference forms.

Papers:
* `Patches Are All You Need?` - https://arxiv.org/abs/2201.09792, section 2
"""
import functools
from collections import OrderedDict
from copy import deepcopy
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Set, Tuple, Type, Union

import torch
import torch.fx
import torch.nn as nn
import torch.nn.functional as F

from .plain import Form, Plain, find_patched

__all__ = [
    'BlockLayers',
    'ConvMixerBlock',
    'ConvMixerStem',
    'FusedConvMixerBlock',
    'FusedStem',
    'SpatialMixing',
    'StemLayers',
    'act_name',
    'affine_dtype',
    'container_difference',
    'find_block',
    'find_patched_layer',
    'find_stem',
    'fold_norms',
    'is_dropping',
    'part_tensors',
]


class SpatialMixing(nn.Module):
    """Mixes locations within each channel: ``x + drop_path(norm(act(depthwise(x))))``.

    The normalisation comes after the activation, as everywhere in ConvMixer. The depthwise convolution, the activation
    and the normalisation are ``fn[0]``, ``fn[1]`` and ``fn[2]``: the state-dict keys of timm's ConvMixer.
    """

    def __init__(
            self,
            dim: int,
            kernel_size: int = 9,
            drop_path: float = 0.,
            act_layer: Type[nn.Module] = nn.GELU,
            norm_layer: Type[nn.Module] = nn.BatchNorm2d,
            device=None,
            dtype=None,
    ):
        """
        Args:
            dim: Number of channels.
            kernel_size: Side of the depthwise kernel; an even one pads one more on the right and the bottom.
            drop_path: Stochastic depth rate of this branch.
            act_layer: Activation layer class.
            norm_layer: Normalisation layer class for ``(B, C, H, W)``.
        """
        # Importing timm registers the models, which imports this module: that must find it complete.
        from timm.layers import DropPath

        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.fn = nn.Sequential(
            nn.Conv2d(dim, dim, kernel_size, groups=dim, padding='same', **dd),
            act_layer(),
            norm_layer(dim, **dd),
        )
        self.drop_path = DropPath(drop_path) if drop_path > 0. else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # In timm's order, which decides the memory format where the two differ.
        return self.drop_path(self.fn(x)) + x


class _NamedSequential(nn.Sequential):
    """A ``Sequential`` with a constructor of its own, whose slices are therefore plain ones."""

    def __getitem__(self, index: Union[int, slice]) -> nn.Module:
        if isinstance(index, slice):
            return nn.Sequential(OrderedDict(list(self.named_children())[index]))
        return super().__getitem__(index)


class ConvMixerStem(_NamedSequential):
    """Patch embedding ``norm(act(conv(image)))``: ``(B, in_chans, H, W)`` to ``(B, C, H // patch, W // patch)``."""

    def __init__(
            self,
            in_chans: int,
            dim: int,
            patch_size: int = 7,
            act_layer: Type[nn.Module] = nn.GELU,
            norm_layer: Type[nn.Module] = nn.BatchNorm2d,
            device=None,
            dtype=None,
    ):
        """
        Args:
            in_chans: Number of input image channels.
            dim: Number of output channels.
            patch_size: Side and stride of the convolution, in pixels.
            act_layer: Activation layer class.
            norm_layer: Normalisation layer class for ``(B, C, H, W)``.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__(
            nn.Conv2d(in_chans, dim, kernel_size=patch_size, stride=patch_size, **dd),
            act_layer(),
            norm_layer(dim, **dd),
        )

    def fuse(self) -> nn.Module:
        """The inference form of the stem, or the stem itself where a layer is not what its constructor made.

        See :class:`FusedStem`.
        """
        layers, _ = _forms().fusible_stem.find(self)
        if not (layers and _can_fuse(self, layers, (self[1],), layers[2:])):
            return self
        _, conv, norm = layers
        (scale,), (shift,) = fold_norms([norm])
        return FusedStem(conv, self[1], scale, shift)


class ConvMixerBlock(_NamedSequential):
    """One block: ``x = spatial_mixing(x)``, then ``norm(act(pointwise(x)))``, shapes ``(B, C, H, W)`` throughout.

    The second equation mixes the channels of each location and has no residual. A ``Sequential``, so that its children
    keep the state-dict keys of timm's ConvMixer: ``0`` is the :class:`SpatialMixing`, ``1`` the pointwise convolution,
    ``2`` the activation, ``3`` the normalisation.
    """

    def __init__(
            self,
            dim: int,
            kernel_size: int = 9,
            drop_path: float = 0.,
            act_layer: Type[nn.Module] = nn.GELU,
            norm_layer: Type[nn.Module] = nn.BatchNorm2d,
            device=None,
            dtype=None,
    ):
        """
        Args:
            dim: Number of channels.
            kernel_size: Side of the depthwise kernel.
            drop_path: Stochastic depth rate of the spatial mixing.
            act_layer: Activation layer class.
            norm_layer: Normalisation layer class for ``(B, C, H, W)``.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__(
            SpatialMixing(dim, kernel_size, drop_path, act_layer, norm_layer, **dd),
            nn.Conv2d(dim, dim, kernel_size=1, **dd),
            act_layer(),
            norm_layer(dim, **dd),
        )

    def fuse(self) -> nn.Module:
        """The inference form of the block, or the block itself where a layer is not what its constructor made.

        See :class:`FusedConvMixerBlock`.
        """
        layers, _ = _forms().fusible_block.find(self)
        if not (layers and _can_fuse(self, layers, (self[0].fn[1], self[2]), (layers[4], layers[7]))):
            return self
        _, spatial, _, depthwise, spatial_norm, _, pointwise, norm = layers
        (spatial_scale, scale), (spatial_shift, shift) = fold_norms([spatial_norm, norm])
        return FusedConvMixerBlock(
            depthwise,
            spatial.fn[1],
            spatial_scale,
            spatial_shift,
            pointwise,
            self[2],
            scale,
            shift,
        )


def _can_fuse(
        module: nn.Module,
        layers: Sequence[nn.Module],
        acts: Sequence[nn.Module],
        norms: Sequence[nn.Module],
) -> bool:
    """Whether the layers of a form can be folded: statistics there, tensors plain, no layer in a mode of its own."""
    # A frozen normalisation has no modes.
    from torchvision.ops import FrozenBatchNorm2d

    def tensors(layer: nn.Module) -> List[torch.Tensor]:
        return [tensor for tensor in (*layer._parameters.values(), *layer._buffers.values()) if tensor is not None]

    def dtypes(layer: nn.Module) -> Set[torch.dtype]:
        return {tensor.dtype for tensor in tensors(layer) if tensor.is_floating_point()}

    dtype = next(layer for layer in layers if type(layer) is nn.Conv2d).weight.dtype
    return (
        all(isinstance(act, nn.Module) for act in acts)
        and all(norm.running_mean is not None and norm.running_var is not None for norm in norms)
        # What PyTorch refuses to compute must not compute once it is folded.
        and all(dtypes(layer) == {dtype} for layer in layers if type(layer) is nn.Conv2d)
        and all(dtypes(norm) in ({dtype}, {affine_dtype(dtype)}) for norm in norms)
        and all(layer.training == module.training or isinstance(layer, FrozenBatchNorm2d) for layer in layers)
        and not find_patched()
    )


@torch.no_grad()
def fold_norms(
        norms: Sequence[nn.Module],
        dtype: torch.dtype = torch.float64,
) -> Tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
    """The running statistics and affines of BatchNorms as scales and shifts, ``(C,)`` each, computed in float64."""
    # All norms in one tensor: a ConvMixer has dozens, and each operation costs more than its arithmetic.
    def concatenate(name: str, default: float) -> torch.Tensor:
        values = (getattr(norm, name) for norm in norms)
        return torch.cat([
            torch.full_like(norm.running_var, default) if value is None else value for norm, value in zip(norms, values)
        ]).double()

    widths = [len(norm.running_var) for norm in norms]
    variance = concatenate('running_var', 1.)
    if len({norm.eps for norm in norms}) == 1:
        variance += norms[0].eps
    else:
        variance += torch.cat([torch.full_like(norm.running_var, norm.eps, dtype=torch.float64) for norm in norms])
    scale = concatenate('weight', 1.) * variance.rsqrt()
    shift = concatenate('bias', 0.) - concatenate('running_mean', 0.) * scale
    return scale.to(dtype).split(widths), shift.to(dtype).split(widths)


def _constant(value: torch.Tensor, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(value.detach().to(dtype, copy=True), requires_grad=False)


def affine_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of scales and shifts for weights of a dtype."""
    # A scale rounded to half precision is off by the same factor everywhere in its channel, which pooling does not
    # average out; BatchNorm itself computes it in float32.
    return torch.promote_types(dtype, torch.float32)


@torch.jit.unused
def _is_exporting() -> bool:
    # A trace is what Core ML and OpenVINO take a model by. torch.compiler.is_exporting() came with PyTorch 2.7.
    return (
        torch.jit.is_tracing() or torch.onnx.is_in_onnx_export()
        or getattr(torch.compiler, 'is_exporting', lambda: False)())


def _in_one_pass(x: torch.Tensor, scale: torch.Tensor) -> bool:
    if torch.jit.is_scripting():
        return x.dtype == scale.dtype
    return x.dtype == scale.dtype and not _is_exporting()


# affine and scaled_residual ask for the dtype, which a symbolic trace does not know: torch.fx records the call instead.
@torch.fx.wrap
def affine(
        x: torch.Tensor,
        scale: torch.Tensor,
        shift: torch.Tensor,
        zeros: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """``scale * x + shift`` for ``x`` of ``(B, C, H, W)`` and per-channel ``scale`` and ``shift`` of ``(C,)``.

    The result has the dtype of ``x``. Exported, it is a batch normalisation: ONNX Runtime keeps its blocked layout
    through one, and breaks it up around a multiplication and an addition of constants. ``zeros`` of ``(C,)`` are its
    statistics: stored ones are constants of the exported graph, which runtimes ask for.
    """
    if _in_one_pass(x, scale):
        return torch.addcmul(shift.view(-1, 1, 1), x, scale.view(-1, 1, 1))
    if zeros is None:
        zeros = torch.zeros_like(shift)
    # (x - 0) / sqrt(0 + 1): with a variance of 0 and an epsilon of 1 the statistics leave x exactly as it is.
    return F.batch_norm(x, zeros, zeros, scale, shift, eps=1.)


@torch.fx.wrap
def scaled_residual(
        x: torch.Tensor,
        branch: torch.Tensor,
        scale: torch.Tensor,
        zeros: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """``x + scale * branch`` for maps of ``(B, C, H, W)`` and a per-channel ``scale`` of ``(C,)``.

    ``zeros`` as for :func:`affine`.
    """
    if _in_one_pass(x, scale):
        return torch.addcmul(x, branch, scale.view(-1, 1, 1))
    if zeros is None:
        zeros = torch.zeros_like(scale)
    return x + affine(branch, scale, zeros, zeros=zeros)


class _InferenceForm(nn.Module):
    """Base of the inference forms. They cannot train: their normalisations are folded into constants.

    Each scale has a non-persistent buffer of zeros beside it, which exports use as running statistics.
    """

    def _register_zeros(self, name: str, scale: torch.Tensor) -> None:
        self.register_buffer(name, torch.zeros_like(scale), persistent=False)

    def train(self, mode: bool = True) -> nn.Module:
        if mode:
            raise RuntimeError(
                f'{type(self).__name__} is an inference form and cannot train; train the model it was made from, '
                'before reparameterize_model().')
        return super().train(mode)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        # On the meta device, after to_empty() or with assign=True they may be anything.
        for name in self._buffers.keys() & {'spatial_zeros', 'zeros'}:
            self._register_zeros(name, getattr(self, name.replace('zeros', 'scale')))


class FusedStem(_InferenceForm):
    """Inference form of :class:`ConvMixerStem`: ``scale * act(conv(image)) + shift``.

    State-dict keys: ``conv.weight``, ``conv.bias``, ``scale`` and ``shift``, the last two ``(C,)``.
    """

    def __init__(
            self,
            conv: nn.Conv2d,
            act: nn.Module,
            scale: torch.Tensor,
            shift: torch.Tensor,
    ):
        """
        Args:
            conv: Patch embedding.
            act: Activation.
            scale: Scale of the folded normalisation, ``(C,)``.
            shift: Shift of the folded normalisation, ``(C,)``.
        """
        super().__init__()
        self.conv = deepcopy(conv).requires_grad_(False)
        self.act = act
        self.scale = _constant(scale, affine_dtype(conv.weight.dtype))
        self.shift = _constant(shift, affine_dtype(conv.weight.dtype))
        self._register_zeros('zeros', self.scale)
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return affine(self.act(self.conv(x)), self.scale, self.shift, zeros=self.zeros)


def act_name(act: nn.Module) -> str:
    """The name by which the kernels know a plain activation."""
    return 'relu' if type(act) is nn.ReLU else 'gelu'


class FusedConvMixerBlock(_InferenceForm):
    """Inference form of :class:`ConvMixerBlock`, shapes ``(B, C, H, W)`` throughout::

        x = x + spatial_scale * act(depthwise(x))
        x = scale * act(pointwise(x)) + shift

    The shift of the first normalisation is folded into the bias of the pointwise convolution: it is the same at every
    location, and nothing else reads that map. The second normalisation must stay: the residual reads its output, and
    the zeros that the next depthwise convolution pads with have not been shifted.

    State-dict keys: ``depthwise.weight``, ``depthwise.bias``, ``spatial_scale``, ``pointwise.weight``,
    ``pointwise.bias``, ``scale`` and ``shift``, the scales and the shift ``(C,)``.
    """

    def __init__(
            self,
            depthwise: nn.Conv2d,
            spatial_act: nn.Module,
            spatial_scale: torch.Tensor,
            spatial_shift: torch.Tensor,
            pointwise: nn.Conv2d,
            act: nn.Module,
            scale: torch.Tensor,
            shift: torch.Tensor,
    ):
        """
        Args:
            depthwise: Depthwise convolution.
            spatial_act: Activation after it.
            spatial_scale: Scale of the folded normalisation after the depthwise convolution, ``(C,)``.
            spatial_shift: Shift of the same.
            pointwise: Pointwise convolution.
            act: Activation after it.
            scale: Scale of the folded normalisation after the pointwise convolution, ``(C,)``.
            shift: Shift of the same.
        """
        super().__init__()
        self.depthwise = deepcopy(depthwise).requires_grad_(False)
        # An odd kernel's padding in numbers, because quantizers know no padding='same'. What an even kernel pads on one
        # side alone would take an operator of its own, around which ONNX Runtime breaks up its blocked layout.
        totals = [step * (side - 1) for step, side in zip(depthwise.dilation, depthwise.weight.shape[2:])]
        if depthwise.padding == 'same' and all(total % 2 == 0 for total in totals):
            self.depthwise.padding = tuple(total // 2 for total in totals)
        self.spatial_act = spatial_act
        self.spatial_scale = _constant(spatial_scale, affine_dtype(depthwise.weight.dtype))
        self.pointwise = deepcopy(pointwise).requires_grad_(False)
        self.act = act
        weight = pointwise.weight.detach().double().flatten(1)
        bias = weight @ spatial_shift.to(weight)
        if pointwise.bias is not None:
            bias = bias + pointwise.bias.detach().double()
        self.pointwise.bias = _constant(bias, pointwise.weight.dtype)
        self.scale = _constant(scale, affine_dtype(pointwise.weight.dtype))
        self.shift = _constant(shift, affine_dtype(pointwise.weight.dtype))
        self._register_zeros('spatial_zeros', self.spatial_scale)
        self._register_zeros('zeros', self.scale)
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branch = self.spatial_act(self.depthwise(x))
        x = scaled_residual(x, branch, self.spatial_scale, zeros=self.spatial_zeros)
        return affine(self.act(self.pointwise(x)), self.scale, self.shift, zeros=self.zeros)


class StemLayers(NamedTuple):
    """The layers of a plain :class:`ConvMixerStem`, its activation by the name that the kernels know."""
    conv: nn.Conv2d
    act: str
    norm: nn.BatchNorm2d


class BlockLayers(NamedTuple):
    """The layers of a plain :class:`ConvMixerBlock`, its activations by the names that the kernels know."""
    depthwise: nn.Conv2d
    spatial_act: str
    spatial_norm: nn.BatchNorm2d
    drop_path: nn.Module
    pointwise: nn.Conv2d
    act: str
    norm: nn.BatchNorm2d


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
    batch_norm = Plain(norm, track_running_stats=True)
    fusible_norm = Plain(norm, nn.SyncBatchNorm(1, **dd), FrozenBatchNorm2d(1))
    drop_path = Plain(nn.Identity(), DropPath())
    stem = Plain(ConvMixerStem(1, 1, **dd), children=('0', '1', '2'))
    block = Plain(ConvMixerBlock(1, **dd), children=('0', '1', '2', '3'))
    spatial = Plain(SpatialMixing(1, **dd), children=('fn', 'drop_path'))
    branch = Plain(nn.Sequential(), children=('0', '1', '2'))
    fused_stem = Plain(FusedStem(conv, act, one, one), children=('conv', 'act'))
    fused_block = Plain(
        FusedConvMixerBlock(conv, act, one, one, conv, act, one, one),
        children=('depthwise', 'spatial_act', 'pointwise', 'act'),
    )
    return _Forms(
        stem=Form({'': stem, '0': patches, '1': activation, '2': batch_norm}),
        block=Form({
            '': block, '0': spatial, '0.fn': branch, '0.fn.0': depthwise, '0.fn.1': activation, '0.fn.2': batch_norm,
            '0.drop_path': drop_path, '1': pointwise, '2': activation, '3': batch_norm,
        }),
        fused_stem=Form({'': fused_stem, 'conv': patches, 'act': activation}),
        fused_block=Form({
            '': fused_block, 'depthwise': fused_depthwise, 'spatial_act': activation, 'pointwise': pointwise,
            'act': activation,
        }),
        fusible_stem=Form({'': stem, '0': patches, '2': fusible_norm}),
        fusible_block=Form({
            '': block, '0': spatial, '0.fn': branch, '0.fn.0': depthwise, '0.fn.2': fusible_norm,
            '0.drop_path': drop_path, '1': pointwise, '3': fusible_norm,
        }),
        container=Plain(nn.Sequential(), children=None),
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
    shape = conv.weight.shape
    if conv.stride != tuple(shape[2:]):
        return None, f'{name} has stride={conv.stride} for patches of {tuple(shape[2:])}'
    difference = (
        _width_difference(shape[0], conv.bias, stem.scale, stem.shift) if fused
        else _width_difference(shape[0], conv.bias) or _norm_difference(shape[0], layers[3]))
    if difference:
        return None, f'{name} {difference}'
    return stem if fused else StemLayers(conv, act_name(act), layers[3]), ''


def find_block(
        block: nn.Module,
        name: str,
        width: Optional[int] = None,
) -> Tuple[Union[BlockLayers, FusedConvMixerBlock, None], str]:
    """The layers of a block in either form.

    Args:
        block: The block.
        name: Its name in the model, for the reason.
        width: Channels of the feature maps that it takes, if they are known.

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
    shape, side = depthwise.weight.shape, depthwise.weight.shape[-1]
    width, out_width = shape[0] if width is None else width, pointwise.weight.shape[0]
    if shape != (width, 1, side, side) or depthwise.groups != width:
        difference = f'has depthwise kernels of {tuple(shape)} in {depthwise.groups} groups for {width} channels'
    elif depthwise.padding != 'same' and (side % 2 == 0 or depthwise.padding != (side // 2, side // 2)):
        difference = f'has depthwise padding={depthwise.padding} for kernels of {side}'
    elif pointwise.weight.shape[1:] != (width, 1, 1):
        difference = f'has a pointwise weight of {tuple(pointwise.weight.shape)} for {width} channels'
    elif fused:
        difference = (
            _width_difference(width, depthwise.bias, block.spatial_scale)
            or _width_difference(out_width, pointwise.bias, block.scale, block.shift))
    else:
        difference = (
            _width_difference(width, depthwise.bias) or _norm_difference(width, spatial_norm)
            or _width_difference(out_width, pointwise.bias) or _norm_difference(out_width, norm))
    if difference:
        return None, f'{name} {difference}'
    if fused:
        return block, ''
    return BlockLayers(
        depthwise, act_name(spatial_act), spatial_norm, drop_path, pointwise, act_name(act), norm), ''


def _norm_tensors(norm: nn.BatchNorm2d) -> Tuple[Optional[torch.Tensor], ...]:
    parameters, buffers = norm._parameters, norm._buffers
    return parameters['weight'], parameters['bias'], buffers['running_mean'], buffers['running_var']


def _norm_difference(width: int, norm: nn.BatchNorm2d) -> str:
    if any(norm._buffers[name] is None for name in ('running_mean', 'running_var', 'num_batches_tracked')):
        return 'has a normalisation without running statistics'
    # PyTorch refuses an eps of 0 in training alone.
    if not (isinstance(norm.eps, (float, int)) and norm.eps > 0) or not isinstance(
            norm.momentum, (float, int, type(None))):
        return f'has a normalisation with eps={norm.eps!r} and momentum={norm.momentum!r}'
    return _width_difference(width, *_norm_tensors(norm))


def _width_difference(width: int, *vectors: Optional[torch.Tensor]) -> str:
    for vector in vectors:
        if vector is not None and vector.shape != (width,):
            return f'has a vector of {tuple(vector.shape)} for {width} channels'
    return ''


def find_patched_layer() -> str:
    """As :func:`find_patched`, for all classes that can be part of a stem or a block."""
    _forms()  # notes what they came with, if this is the first time
    return find_patched()


def container_difference(blocks: nn.Module, name: str) -> str:
    """How the container of the blocks differs from a plain ``nn.Sequential``, ``''`` if it does not."""
    difference = _forms().container.difference(blocks)
    return difference and f'{name} {difference}'


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


def is_dropping(drop_path: nn.Module) -> bool:
    """Whether a plain drop path layer, or the identity in its place, drops anything now."""
    return drop_path.training and getattr(drop_path, 'drop_prob', 0.) > 0.
