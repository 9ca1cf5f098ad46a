"""What people do to a ConvMixer, done to ours and to timm's alike: both must then compute the same.

A program is a few operations (an attribute changed, a layer replaced, a hook, a transform of torch.func, ...) and a way
of running what they leave. It runs once on timm's own class and once on ours, each from equal weights and equal random
numbers; what comes out, with every gradient, buffer, call of a hook, stride and exception, is compared. Images are
small: :func:`lowered_thresholds` has the fast paths run for them nevertheless.

    python tests/surgery.py --programs 500 --seed 0     # random programs; prints those that fail, shrunk
    python tests/surgery.py --singly                    # every operation by itself, in every way
    python tests/surgery.py --only circular_padding --way train
    python tests/surgery.py --self-check --singly       # timm's class in the place of ours: all must agree
"""
import argparse
import copy
import math
import pickle
import random
import sys
import time
import warnings
from collections import Counter
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any, Callable, ContextManager, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple
from unittest import mock

import timm
import timm.utils
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn as nn
import torch.nn.functional as F
import torch.nn.utils.parametrizations as parametrizations
import torch.nn.utils.parametrize as parametrize
import torch.nn.utils.prune as prune
from timm.models import _features, _features_fx
from timm.models.convmixer import ConvMixer as TimmConvMixer
from timm.utils.model import reparameterize_model
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.feature_extraction import create_feature_extractor

import timm_convmixer  # noqa: F401, registers the models where nothing else has
from support import randomize_norms

__all__ = [
    'OPERATIONS', 'SIZES', 'WAYS', 'Program', 'differences', 'lowered_thresholds', 'random_program', 'shrink',
    'single_programs',
]


@contextmanager
def lowered_thresholds() -> Iterator[None]:
    """Have the fast paths run for small images, and for few of them at a time."""
    with (
        mock.patch.multiple('timm_convmixer.routes', SMALLEST_MAP=0),
        mock.patch.multiple('timm_convmixer.inference', _CHUNK_BYTES=24 << 10),
    ):
        yield


class Size(NamedTuple):
    """A model and its images."""
    dim: int
    depth: int
    kernel_size: int
    patch_size: int
    act_layer: Callable[[], nn.Module]
    image: Tuple[int, int]


# The maps of the first three are over twice the kernel's size, from where on images change their memory format.
SIZES = dict(
    relu=Size(16, 2, 5, 2, nn.ReLU, (22, 22)),
    gelu=Size(16, 3, 5, 3, nn.GELU, (36, 39)),
    even=Size(16, 2, 6, 2, nn.GELU, (28, 28)),
    ks7=Size(16, 2, 7, 7, nn.ReLU, (112, 56)),
    ks3=Size(16, 2, 3, 2, nn.ReLU, (16, 20)),
    small_map=Size(16, 2, 7, 7, nn.GELU, (42, 28)),
)
NUM_CLASSES = 10
BATCH_SIZE = 3

# What a place is called in timm's ConvMixer and in our training form, and in our inference form if it is still there.
PLACES = dict(
    model=('', ''),
    stem=('stem', 'stem'),
    stem_conv=('stem.0', 'stem.conv'),
    stem_act=('stem.1', 'stem.act'),
    stem_norm=('stem.2', None),
    blocks=('blocks', 'blocks'),
    block=('blocks.{}', 'blocks.{}'),
    spatial=('blocks.{}.0', None),
    branch=('blocks.{}.0.fn', None),
    depthwise=('blocks.{}.0.fn.0', 'blocks.{}.depthwise'),
    spatial_act=('blocks.{}.0.fn.1', 'blocks.{}.spatial_act'),
    spatial_norm=('blocks.{}.0.fn.2', None),
    pointwise=('blocks.{}.1', 'blocks.{}.pointwise'),
    act=('blocks.{}.2', 'blocks.{}.act'),
    norm=('blocks.{}.3', None),
    global_pool=('global_pool', 'global_pool'),
    head=('head', 'head'),
)


def describe(value: Any) -> Any:
    """Shapes of tensors, however nested."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape)
    if isinstance(value, (tuple, list)):
        return tuple(describe(item) for item in value)
    return None if value is None else type(value).__name__


def strides(value: Any) -> Any:
    """Strides of tensors, however nested, where there is more than one element to step over."""
    if isinstance(value, torch.Tensor):
        return tuple(step for step, length in zip(value.stride(), value.shape) if length > 1) if value.numel() else ()
    if isinstance(value, (tuple, list)):
        return tuple(strides(item) for item in value)
    return None


@dataclass
class Case:
    """A model on the table, its images, and what operations leave for the run."""
    model: nn.Module
    images: torch.Tensor
    size: Size
    is_ours: bool
    # Ends with the program.
    stack: ExitStack = field(default_factory=ExitStack)
    # Entered for the run alone.
    around: List[Callable[[], ContextManager]] = field(default_factory=list)
    # Calls of what was registered at a place: who, and with what shapes; and the same with strides.
    calls: Counter = field(default_factory=Counter)
    layouts: Counter = field(default_factory=Counter)
    # What those saw that watch everything.
    observed: Counter = field(default_factory=Counter)
    # Tensors whose gradients are wanted besides those of the images and parameters, and tensors changed by a run
    # besides the buffers.
    leaves: Dict[str, torch.Tensor] = field(default_factory=dict)
    watched: Dict[str, Callable[[], Optional[torch.Tensor]]] = field(default_factory=dict)
    # What is computed, where that is not what the way of running says.
    run: Optional[Callable[['Case', torch.Tensor], Dict[str, Optional[torch.Tensor]]]] = None
    images_require_grad: bool = True
    low_precision: bool = False
    # After reparameterize_model: ours then has other parameters, without gradients, and other layers.
    is_fused: bool = False
    numbers_only: bool = False

    def path(self, place: str, index: int = 0) -> str:
        path, fused_path = PLACES[place]
        if hasattr(self.model.stem, 'conv') and place.startswith('stem'):
            path = fused_path
        elif hasattr(self.model, 'blocks') and len(self.model.blocks) and '{}' in path:
            if hasattr(self.model.blocks[index % len(self.model.blocks)], 'depthwise'):
                path = fused_path
        if path is None:
            raise LookupError(f'the inference form has no {place}')
        return path.format(index)

    def get(self, place: str, index: int = 0) -> nn.Module:
        return self.model.get_submodule(self.path(place, index))

    def set(self, place: str, module: nn.Module, index: int = 0) -> nn.Module:
        parent, _, name = self.path(place, index).rpartition('.')
        setattr(self.model.get_submodule(parent), name, module)
        return module

    def new(self, module: nn.Module) -> nn.Module:
        """A new layer in the state that the model is in."""
        parameter = next((p for p in self.model.parameters() if p.is_floating_point()), None)
        if parameter is not None:
            module.to(parameter.dtype)
        return randomize_norms(module, seed=7).train(self.model.training)

    def change(self, place: str, function: Callable[[nn.Module], nn.Module], index: int = 0) -> None:
        self.set(place, self.new(function(self.get(place, index))), index)

    def note(self, label: str, *values: Any) -> None:
        self.calls[(label, describe(values))] += 1
        self.layouts[(label, strides(values))] += 1


# Ways of running. Each sets its mode before the operations, which may set that of a layer.
WAYS = (
    'train',  # a step: .grad of everything
    'train_no_grad',  # statistics alone, as PyTorch renews those of averaged weights
    'eval',  # with gradients, by torch.autograd.grad
    'inference',  # no_grad: forward, forward_features, forward_intermediates; and inference_mode
    'intermediates',  # forward_intermediates in training, with gradients by torch.autograd.grad
    'reparam',  # the operations, then timm's reparameterize_model; with gradients and without
    'reparam_first',  # reparameterize_model, then the operations
)
GRADIENT_WAYS = ('train', 'eval', 'intermediates', 'reparam', 'reparam_first')
TRAINING_WAYS = ('train', 'train_no_grad', 'intermediates')
UNFUSED_WAYS = ('train', 'train_no_grad', 'eval', 'inference', 'intermediates')
FEW_WAYS = ('train', 'inference')


class Operation(NamedTuple):
    """Something done to a model, in the same words to ours and to timm's."""
    name: str
    category: str
    apply: Callable[[Case], None]
    ways: Tuple[str, ...]
    size: str
    is_run: bool


OPERATIONS: Dict[str, Operation] = {}
_category = ''


def operation(
        *args: Callable,
        ways: Sequence[str] = WAYS,
        after: bool = False,
        name: Optional[str] = None,
        size: str = 'relu',
) -> Callable:
    """Register a function of a :class:`Case`.

    Args:
        ways: Ways of running in which it says something.
        after: Whether it makes sense on the inference form as well, whose layers are others.
        name: Its name, by default that of the function.
        size: The model on which it is tried by itself.
    """
    def register(function: Callable[[Case], None]) -> Callable:
        key = name or function.__name__
        assert key not in OPERATIONS, key
        kept = tuple(way for way in ways if after or way != 'reparam_first')
        OPERATIONS[key] = Operation(key, _category, function, kept, size, is_run=False)
        return function

    return register(*args) if args else register


# A way then gives the mode, and the form.
def computation(
        function: Callable,
        ways: Tuple[str, ...] = ('train', 'eval', 'reparam', 'reparam_first'),
) -> Callable:
    """Register what is computed in the place of a step: ``function(case, x)`` returns named tensors."""
    def apply(case: Case) -> None:
        case.run = function

    OPERATIONS[function.__name__] = Operation(function.__name__, _category, apply, ways, 'relu', is_run=True)
    return function


def category(name: str) -> None:
    global _category
    _category = name


def bend(x: torch.Tensor) -> torch.Tensor:
    """Another map, and by no scale or shift that the next normalisation would undo."""
    return x + 0.5 * torch.sin(x)


class Bent(nn.Module):
    """A module of the user's around another."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return bend(self.inner(x))


class BentSequential(nn.Sequential):

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return bend(super().forward(x))


class BentConv2d(nn.Conv2d):

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return bend(super().forward(x))


class StandardizedConv2d(nn.Conv2d):
    """Another way to convolve, without a forward of its own."""

    def _conv_forward(self, x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor]) -> torch.Tensor:
        return super()._conv_forward(x, weight - weight.mean(dim=(1, 2, 3), keepdim=True), bias)


class BentBatchNorm2d(nn.BatchNorm2d):

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return bend(super().forward(x))


class BentReLU(nn.ReLU):

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return bend(super().forward(x))


class BentGELU(nn.GELU):

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return bend(super().forward(x))


class SqueezeExcite(nn.Module):
    """With ``.view``, as such code has it, which maps in channels last do not allow."""

    def __init__(self, channels: int):
        super().__init__()
        self.fc = nn.Linear(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch_size, channels = x.shape[:2]
        pooled = x.view(batch_size, channels, -1).mean(-1)
        return x * self.fc(pooled).sigmoid().view(batch_size, channels, 1, 1)


class Flattened(nn.Module):
    """A normalisation of the user's that sees all of an image as one row."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x.view(x.shape[0], -1), [x[0].numel()]).view(x.shape)


class LowRank(nn.Module):
    """A convolution and an addition of low rank to it, as LoRA has it."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.conv = conv
        self.down = nn.Conv2d(conv.in_channels, 2, 1, bias=False)
        self.up = nn.Conv2d(2, conv.out_channels, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x) + self.up(self.down(x))


class Doubled(nn.Module):
    """A parametrization."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


class Images(torch.Tensor):
    """A subclass of tensors that adds nothing."""


# ----------------------------------------------------------------------------------------------------------------------
category('none')


@operation(after=True)
def nothing(case: Case) -> None:
    """The models as they are: no other difference means anything where this one fails."""


# ----------------------------------------------------------------------------------------------------------------------
category('attributes')


@operation
def circular_padding(case: Case) -> None:
    for index in range(len(case.model.blocks)):
        case.get('depthwise', index).padding_mode = 'circular'


@operation
def circular_padding_everywhere(case: Case) -> None:
    for module in case.model.modules():
        if isinstance(module, nn.Conv2d):
            module.padding_mode = 'circular'


@operation
def reflect_padding_in_last_block(case: Case) -> None:
    case.get('depthwise', 1).padding_mode = 'reflect'


@operation
def dilated_depthwise(case: Case) -> None:
    case.get('depthwise').dilation = (2, 2)


@operation
def dilated_along_one_side(case: Case) -> None:
    case.get('depthwise', 1).dilation = (1, 2)


@operation
def strided_pointwise(case: Case) -> None:
    case.get('pointwise').stride = (2, 2)


@operation
def strided_depthwise(case: Case) -> None:
    """PyTorch refuses padding='same' with a stride."""
    case.get('depthwise').stride = (2, 2)


@operation
def overlapping_patches(case: Case) -> None:
    patch_size = case.size.patch_size
    case.get('stem_conv').stride = (max(1, patch_size // 2), patch_size)


@operation
def padded_stem(case: Case) -> None:
    case.get('stem_conv').padding = (1, 1)


@operation
def padded_stem_same_size(case: Case) -> None:
    """The size of the maps that an image of one pixel less on each side would have, or one more."""
    case.get('stem_conv').padding = (0, case.size.patch_size - 1)


@operation
def dilated_stem(case: Case) -> None:
    case.get('stem_conv').dilation = (2, 1)


@operation
def padding_in_numbers(case: Case) -> None:
    conv = case.get('depthwise')
    conv.padding = ((conv.kernel_size[0] - 1) // 2, (conv.kernel_size[1] - 1) // 2)


@operation
def padding_valid(case: Case) -> None:
    """The residual does not fit."""
    case.get('depthwise').padding = 'valid'


@operation
def padded_pointwise(case: Case) -> None:
    case.get('pointwise').padding = (1, 1)


@operation
def depthwise_groups(case: Case) -> None:
    """Groups that the weight has not: PyTorch refuses."""
    case.get('depthwise').groups = 2


@operation
def conv_metadata_that_lie(case: Case) -> None:
    """Forward passes read none of these."""
    for place in ('stem_conv', 'depthwise', 'pointwise'):
        conv = case.get(place)
        conv.in_channels, conv.out_channels, conv.kernel_size = 5, 7, (11, 11)


@operation
def norm_metadata_that_lie(case: Case) -> None:
    norm = case.get('norm')
    norm.num_features, norm.affine = 5, False


@operation
def smaller_kernel(case: Case) -> None:
    weight = case.get('depthwise').weight
    weight.data = weight.data[..., :-2, :-2].contiguous()


@operation
def strip_of_a_kernel(case: Case) -> None:
    weight = case.get('depthwise', 1).weight
    weight.data = weight.data[..., :1, :].contiguous()


@operation
def transposed_weight(case: Case) -> None:
    weight = case.get('depthwise').weight
    weight.data = weight.data.transpose(2, 3)


@operation
def transposed_pointwise_weight(case: Case) -> None:
    weight = case.get('pointwise').weight
    weight.data = weight.data.transpose(0, 1)


@operation
def no_depthwise_bias(case: Case) -> None:
    case.get('depthwise').bias = None


@operation
def no_pointwise_bias(case: Case) -> None:
    case.get('pointwise').bias = None


@operation
def no_stem_bias(case: Case) -> None:
    case.get('stem_conv').bias = None


@operation
def large_eps(case: Case) -> None:
    case.get('spatial_norm').eps = 0.5


@operation
def zero_eps(case: Case) -> None:
    case.get('norm').eps = 0.


@operation(ways=TRAINING_WAYS)
def momentum_none(case: Case) -> None:
    for place in ('stem_norm', 'spatial_norm', 'norm'):
        case.get(place).momentum = None


@operation(ways=TRAINING_WAYS)
def momentum_zero(case: Case) -> None:
    for place in ('stem_norm', 'spatial_norm', 'norm'):
        case.get(place).momentum = 0.


@operation(ways=TRAINING_WAYS)
def momentum_one(case: Case) -> None:
    case.get('norm', 1).momentum = 1.


@operation
def no_tracking(case: Case) -> None:
    for place in ('stem_norm', 'spatial_norm', 'norm'):
        case.get(place).track_running_stats = False


@operation
def no_tracking_of_one(case: Case) -> None:
    case.get('spatial_norm', 1).track_running_stats = False


@operation
def no_norm_weight(case: Case) -> None:
    case.get('spatial_norm').weight = None


@operation
def no_norm_bias(case: Case) -> None:
    case.get('norm').bias = None


@operation
def no_affine(case: Case) -> None:
    for place in ('stem_norm', 'spatial_norm', 'norm'):
        norm = case.get(place)
        norm.weight = norm.bias = None


@operation
def no_running_statistics(case: Case) -> None:
    norm = case.get('norm')
    norm.running_mean = norm.running_var = None


@operation
def no_running_mean(case: Case) -> None:
    """PyTorch refuses one without the other."""
    case.get('spatial_norm').running_mean = None


@operation(ways=TRAINING_WAYS)
def no_count_of_batches(case: Case) -> None:
    case.get('norm').num_batches_tracked = None


@operation(ways=TRAINING_WAYS)
def no_count_of_batches_and_no_momentum(case: Case) -> None:
    norm = case.get('spatial_norm')
    norm.num_batches_tracked, norm.momentum = None, None


@operation
def zero_scale(case: Case) -> None:
    nn.init.zeros_(case.get('spatial_norm').weight)


@operation
def dead_channel(case: Case) -> None:
    case.get('depthwise').weight.data[3] = 0.
    case.get('depthwise').bias.data[3] = 0.


@operation
def one_norm_in_eval(case: Case) -> None:
    case.get('spatial_norm').eval()


@operation
def all_norms_in_eval(case: Case) -> None:
    """As detection and fine-tuning freeze statistics."""
    for module in case.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


@operation
def one_norm_in_train(case: Case) -> None:
    case.get('norm').train()


@operation
def stem_norm_in_train(case: Case) -> None:
    case.get('stem_norm').train()


# Fused, a block is in eval mode whatever it was in: timm's scripts reparameterise models that are in training mode.
@operation(ways=UNFUSED_WAYS)
def block_in_the_other_mode(case: Case) -> None:
    case.get('block', 1).train(not case.model.training)


@operation
def inplace_activation(case: Case) -> None:
    for place in ('stem_act', 'spatial_act', 'act'):
        case.change(place, lambda act: nn.ReLU(inplace=True))


@operation(size='gelu')
def approximate_attribute(case: Case) -> None:
    """Of GELU; a ReLU does not read it."""
    case.get('spatial_act').approximate = 'tanh'
    case.get('act').approximate = 'tanh'


@operation
def unknown_attribute(case: Case) -> None:
    """A mark of the user's own, which changes nothing."""
    case.get('depthwise').note = case.get('block').note = 'mine'


# ----------------------------------------------------------------------------------------------------------------------
category('replaced layers')


@operation
def stem_of_one_channel(case: Case) -> None:
    conv = case.get('stem_conv')
    case.set('stem_conv', case.new(nn.Conv2d(1, conv.out_channels, conv.kernel_size, conv.stride)))
    case.images = case.images[:, :1]


@operation
def stem_of_smaller_patches(case: Case) -> None:
    """With images that are smaller than the patches of the constructor."""
    case.change('stem_conv', lambda conv: nn.Conv2d(conv.in_channels, conv.out_channels, 1, 1))
    side = case.size.patch_size
    case.images = case.images[..., :side, :side - 1] if side > 1 else case.images


@operation
def convolutional_stem(case: Case) -> None:
    case.change('stem_conv', lambda conv: nn.Sequential(
        nn.Conv2d(conv.in_channels, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, conv.out_channels, 3, 1, 1)))


@operation
def strip_kernel(case: Case) -> None:
    case.change('depthwise', lambda conv: nn.Conv2d(
        conv.in_channels, conv.out_channels, (1, 11), groups=conv.groups, padding='same'))


@operation
def other_kernel_size(case: Case) -> None:
    case.change('depthwise', lambda conv: nn.Conv2d(
        conv.in_channels, conv.out_channels, 9, groups=conv.groups, padding='same'), 1)


@operation
def dense_kernel(case: Case) -> None:
    case.change('depthwise', lambda conv: nn.Conv2d(conv.in_channels, conv.out_channels, 3, padding='same'))


@operation
def grouped_pointwise(case: Case) -> None:
    case.change('pointwise', lambda conv: nn.Conv2d(conv.in_channels, conv.out_channels, 1, groups=4))


@operation
def pointwise_of_three(case: Case) -> None:
    case.change('pointwise', lambda conv: nn.Conv2d(conv.in_channels, conv.out_channels, 3, padding=1))


@operation
def wider_from_here(case: Case) -> None:
    """A pointwise convolution that doubles the width, and the block after it built for that."""
    dim = case.get('pointwise').in_channels
    case.change('pointwise', lambda conv: nn.Conv2d(dim, 2 * dim, 1))
    case.change('norm', lambda norm: nn.BatchNorm2d(2 * dim))
    kernel_size = case.size.kernel_size
    case.change('depthwise', lambda conv: nn.Conv2d(2 * dim, 2 * dim, kernel_size, groups=2 * dim, padding='same'), 1)
    case.change('spatial_norm', lambda norm: nn.BatchNorm2d(2 * dim), 1)
    case.change('pointwise', lambda conv: nn.Conv2d(2 * dim, dim, 1), 1)


@operation
def group_norm(case: Case) -> None:
    case.change('norm', lambda norm: nn.GroupNorm(4, norm.num_features))


@operation
def instance_norm_in_branch(case: Case) -> None:
    case.change('spatial_norm', lambda norm: nn.InstanceNorm2d(
        norm.num_features, affine=True, track_running_stats=True))


@operation
def sync_batch_norm(case: Case) -> None:
    """Without a process group it is a BatchNorm."""
    case.model = nn.SyncBatchNorm.convert_sync_batchnorm(case.model)


@operation
def sync_batch_norm_of_timm(case: Case) -> None:
    from timm.layers import convert_sync_batchnorm

    case.model = convert_sync_batchnorm(case.model)


@operation
def lazy_batch_norm(case: Case) -> None:
    case.set('norm', nn.LazyBatchNorm2d().train(case.model.training))


@operation
def frozen_batch_norm(case: Case) -> None:
    from timm.layers import freeze_batch_norm_2d

    case.model = freeze_batch_norm_2d(case.model)


@operation
def one_frozen_batch_norm(case: Case) -> None:
    from timm.layers import freeze_batch_norm_2d

    case.set('spatial_norm', freeze_batch_norm_2d(case.get('spatial_norm')))


@operation
def silu(case: Case) -> None:
    case.change('spatial_act', lambda act: nn.SiLU())


@operation(after=True)
def silu_after_pointwise(case: Case) -> None:
    case.change('act', lambda act: nn.SiLU())


@operation(after=True)
def tanh_gelu(case: Case) -> None:
    case.change('spatial_act', lambda act: nn.GELU(approximate='tanh'))


@operation
def mixed_activations(case: Case) -> None:
    case.change('spatial_act', lambda act: nn.GELU())
    case.change('act', lambda act: nn.ReLU())
    case.change('act', lambda act: nn.GELU(), 1)


@operation
def prelu(case: Case) -> None:
    case.change('act', lambda act: nn.PReLU(case.get('pointwise').out_channels))


@operation
def identity_activation(case: Case) -> None:
    case.change('spatial_act', lambda act: nn.Identity())


@operation
def identity_norm(case: Case) -> None:
    case.change('norm', lambda norm: nn.Identity())


@operation
def identity_spatial_norm(case: Case) -> None:
    case.change('spatial_norm', lambda norm: nn.Identity())


@operation
def identity_block(case: Case) -> None:
    case.change('block', lambda block: nn.Identity(), 1)


@operation
def identity_branch(case: Case) -> None:
    case.change('branch', lambda branch: nn.Identity())


@operation
def identity_spatial_mixing(case: Case) -> None:
    case.change('spatial', lambda spatial: nn.Identity())


@operation
def identity_stem(case: Case) -> None:
    """Images of as many channels as the blocks have."""
    case.change('stem', lambda stem: nn.Identity())
    case.images = torch.cat([case.images] * 6, dim=1)[:, :case.size.dim]


@operation
def subclass_of_conv(case: Case) -> None:
    case.change('depthwise', lambda conv: BentConv2d(
        conv.in_channels, conv.out_channels, conv.kernel_size, groups=conv.groups, padding='same'))


@operation
def subclass_of_pointwise_conv(case: Case) -> None:
    case.change('pointwise', lambda conv: StandardizedConv2d(conv.in_channels, conv.out_channels, 1))


@operation
def subclass_of_stem_conv(case: Case) -> None:
    case.change('stem_conv', lambda conv: StandardizedConv2d(
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride))


@operation
def subclass_of_batch_norm(case: Case) -> None:
    case.change('spatial_norm', lambda norm: BentBatchNorm2d(norm.num_features))


@operation
def subclass_of_batch_norm_after_pointwise(case: Case) -> None:
    case.change('norm', lambda norm: BentBatchNorm2d(norm.num_features), 1)


@operation
def subclass_of_activation(case: Case) -> None:
    case.change('act', lambda act: BentReLU())
    case.change('spatial_act', lambda act: BentGELU(), 1)


@operation
def class_of_a_layer_changed(case: Case) -> None:
    case.get('depthwise').__class__ = BentConv2d
    case.get('norm', 1).__class__ = BentBatchNorm2d


@operation
def stem_of_a_plain_sequential(case: Case) -> None:
    case.change('stem', lambda stem: nn.Sequential(*stem))


@operation
def block_of_a_plain_sequential(case: Case) -> None:
    case.change('block', lambda block: nn.Sequential(*block))


@operation
def plain_head_of_features(case: Case) -> None:
    case.model.reset_classifier(0, '')


@operation
def pooling_by_maximum(case: Case) -> None:
    case.model.reset_classifier(NUM_CLASSES, 'max')


# ----------------------------------------------------------------------------------------------------------------------
category('wrapped layers')


for _place in ('branch', 'spatial', 'block', 'depthwise', 'pointwise', 'spatial_norm', 'act', 'stem', 'stem_conv',
               'blocks'):
    operation(partial(lambda place, case: case.change(place, Bent), _place), name=f'{_place}_wrapped')

for _place in ('branch', 'block', 'blocks', 'stem'):
    operation(
        partial(lambda place, case: case.change(place, lambda inner: BentSequential(*inner)), _place),
        name=f'{_place}_of_an_own_sequential',
    )


@operation
def class_of_a_container_changed(case: Case) -> None:
    case.get('branch').__class__ = BentSequential


@operation
def squeeze_excite_in_branch(case: Case) -> None:
    case.get('branch').append(case.new(SqueezeExcite(case.size.dim)))


@operation
def squeeze_excite_inside_branch(case: Case) -> None:
    case.get('branch', 1).insert(2, case.new(SqueezeExcite(case.size.dim)))


@operation
def squeeze_excite_around_norm(case: Case) -> None:
    case.change('norm', lambda norm: nn.Sequential(norm, SqueezeExcite(case.size.dim)))


@operation
def squeeze_excite_between_blocks(case: Case) -> None:
    case.model.blocks.insert(1, case.new(SqueezeExcite(case.size.dim)))


@operation
def flattened_norm(case: Case) -> None:
    case.change('spatial_norm', lambda norm: Flattened())


@operation
def flattened_after_blocks(case: Case) -> None:
    case.change('global_pool', lambda pool: nn.Sequential(Flattened(), pool))


@operation
def low_rank(case: Case) -> None:
    case.change('pointwise', LowRank)


@operation
def data_parallel_block(case: Case) -> None:
    case.change('block', nn.DataParallel)


@operation
def checkpoint_wrapper(case: Case) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper as wrap

    case.change('block', wrap)
    case.numbers_only = True  # hooks are called again where layers are computed again


# ----------------------------------------------------------------------------------------------------------------------
category('added and removed layers')


@operation
def dropout_of_nothing_in_branch(case: Case) -> None:
    case.get('branch').append(case.new(nn.Dropout2d(0.)))


@operation
def dropout_in_branch(case: Case) -> None:
    """Whole channels, whose random numbers no memory format rearranges."""
    case.get('branch').append(case.new(nn.Dropout2d(0.5)))


@operation
def dropout_before_head(case: Case) -> None:
    case.model.head_drop.p = 0.5


@operation
def conv_added_to_branch(case: Case) -> None:
    case.get('branch').append(case.new(nn.Conv2d(case.size.dim, case.size.dim, 1)))


@operation
def conv_inserted_in_block(case: Case) -> None:
    case.get('block').insert(1, case.new(nn.Conv2d(case.size.dim, case.size.dim, 3, padding=1)))


@operation
def activation_added_to_stem(case: Case) -> None:
    case.get('stem').append(nn.SiLU())


@operation
def activation_added_to_block(case: Case) -> None:
    case.get('block', 1).append(nn.SiLU())


@operation
def module_registered_beside(case: Case) -> None:
    """A child that nobody calls but who put it there, as adapters and loss heads are kept."""
    case.get('spatial').register_module('extra', case.new(nn.Conv2d(case.size.dim, 1, 1)))


@operation
def parameter_registered_beside(case: Case) -> None:
    case.get('block').register_parameter('gamma', nn.Parameter(torch.ones(case.size.dim)))


@operation
def norm_deleted(case: Case) -> None:
    del case.model.blocks[0][3]


@operation
def norm_popped(case: Case) -> None:
    case.get('block', 1).pop(3)


@operation
def activation_deleted(case: Case) -> None:
    del case.get('block')[2]


@operation
def branch_norm_deleted(case: Case) -> None:
    del case.get('branch')[2]


@operation
def branch_activation_deleted(case: Case) -> None:
    del case.get('branch', 1)[1]


@operation
def spatial_mixing_deleted(case: Case) -> None:
    del case.get('block')[0]


@operation
def stem_norm_deleted(case: Case) -> None:
    del case.get('stem')[2]


@operation
def block_sliced(case: Case) -> None:
    case.set('block', case.get('block')[:3])


@operation
def branch_sliced(case: Case) -> None:
    case.set('branch', case.get('branch')[:2])


@operation
def block_deleted(case: Case) -> None:
    del case.model.blocks[0]


@operation
def blocks_sliced(case: Case) -> None:
    case.model.blocks = case.model.blocks[1:]


@operation
def no_blocks(case: Case) -> None:
    case.model.blocks = nn.Sequential()


@operation
def intermediate_layers_pruned(case: Case) -> None:
    case.model.prune_intermediate_layers([0])


@operation
def block_appended(case: Case) -> None:
    case.model.blocks.append(copy.deepcopy(case.get('block')))


@operation
def blocks_added(case: Case) -> None:
    case.model.blocks = case.model.blocks + nn.Sequential(copy.deepcopy(case.get('block', 1)))


@operation
def downsampling_between_blocks(case: Case) -> None:
    case.model.blocks.insert(1, case.new(nn.AvgPool2d(2)))


@operation
def conv_after_blocks(case: Case) -> None:
    case.model.blocks.append(case.new(nn.Conv2d(case.size.dim, case.size.dim, 3)))


def _kept(tensor: Optional[torch.Tensor], kept: torch.Tensor, dim: int = 0) -> Optional[torch.Tensor]:
    if tensor is None:
        return None
    values = tensor.detach().index_select(dim, kept).clone()
    return nn.Parameter(values) if isinstance(tensor, nn.Parameter) else values


def _prune_outputs(layer: nn.Module, kept: torch.Tensor) -> None:
    """Keep some of what a convolution or normalisation gives; a depthwise one takes no more than that either."""
    layer.weight, layer.bias = _kept(layer.weight, kept), _kept(layer.bias, kept)
    if isinstance(layer, nn.BatchNorm2d):
        layer.running_mean, layer.running_var = _kept(layer.running_mean, kept), _kept(layer.running_var, kept)
        layer.num_features = len(kept)
    else:
        layer.out_channels = len(kept)
        if layer.groups > 1:
            layer.in_channels = layer.groups = len(kept)


def _prune_inputs(layer: nn.Module, kept: torch.Tensor) -> None:
    layer.weight = _kept(layer.weight, kept, dim=1)


@operation
def channels_pruned_between_blocks(case: Case) -> None:
    kept = torch.tensor([0, 1, 2, 5, 8, 9, 10, 11, 13, 15])
    for place, index in (('pointwise', 0), ('norm', 0), ('depthwise', 1), ('spatial_norm', 1)):
        _prune_outputs(case.get(place, index), kept)
    _prune_inputs(case.get('pointwise', 1), kept)


@operation
def channels_pruned_everywhere(case: Case) -> None:
    """To another width in each block, and before the head."""
    kept = torch.arange(4, 16)
    for place in ('stem_conv', 'stem_norm', 'depthwise', 'spatial_norm'):
        _prune_outputs(case.get(place), kept)
    _prune_inputs(case.get('pointwise'), kept)
    for index in range(len(case.model.blocks)):
        kept = torch.arange(11 - index)
        _prune_outputs(case.get('pointwise', index), kept)
        _prune_outputs(case.get('norm', index), kept)
        if index + 1 < len(case.model.blocks):
            _prune_outputs(case.get('depthwise', index + 1), kept)
            _prune_outputs(case.get('spatial_norm', index + 1), kept)
            _prune_inputs(case.get('pointwise', index + 1), kept)
    _prune_inputs(case.get('head'), kept)


# ----------------------------------------------------------------------------------------------------------------------
category('shared and reordered layers')


@operation
def same_block_twice(case: Case) -> None:
    case.model.blocks[1] = case.model.blocks[0]


@operation
def same_block_appended(case: Case) -> None:
    case.model.blocks.append(case.model.blocks[0])


@operation
def same_norm_in_two_places(case: Case) -> None:
    case.set('norm', case.get('spatial_norm'))


@operation
def same_norm_in_two_blocks(case: Case) -> None:
    case.set('norm', case.get('norm'), 1)


@operation
def same_norm_in_stem_and_block(case: Case) -> None:
    case.set('spatial_norm', case.get('stem_norm'))


@operation
def same_activation_everywhere(case: Case) -> None:
    act = case.get('stem_act')
    for index in range(len(case.model.blocks)):
        case.set('act', act, index)
        case.set('spatial_act', act, index)


@operation
def same_conv_in_two_blocks(case: Case) -> None:
    case.set('depthwise', case.get('depthwise'), 1)


@operation
def tied_weights(case: Case) -> None:
    for place in ('depthwise', 'pointwise', 'norm'):
        case.get(place, 1).weight = case.get(place).weight


@operation
def tied_norm_weights(case: Case) -> None:
    case.get('norm').weight = case.get('spatial_norm').weight
    case.get('stem_norm').bias = case.get('norm').bias


@operation
def tied_running_mean(case: Case) -> None:
    case.get('norm').running_mean = case.get('spatial_norm').running_mean


@operation
def blocks_reversed(case: Case) -> None:
    case.model.blocks = nn.Sequential(*reversed(case.model.blocks))


@operation
def norm_before_activation(case: Case) -> None:
    block = case.get('block')
    block[2], block[3] = block[3], block[2]


@operation
def branch_reversed(case: Case) -> None:
    branch = case.get('branch', 1)
    branch[0], branch[2] = branch[2], branch[0]


@operation
def pointwise_before_spatial_mixing(case: Case) -> None:
    block = case.get('block')
    block[0], block[1] = block[1], block[0]


@operation
def children_in_another_order(case: Case) -> None:
    """Containers call what they hold in the order in which it was put there, whatever its name."""
    modules = case.get('branch')._modules
    modules['1'] = modules.pop('1')


@operation
def stem_norm_moved_to_blocks(case: Case) -> None:
    case.model.blocks.insert(0, case.get('stem').pop(2))


# ----------------------------------------------------------------------------------------------------------------------
category('hooks')


def _hook(kind: str, place: str, value: Optional[Callable] = None, **kwargs) -> Callable[[Case], None]:
    """An operation that registers a hook, which counts its calls and may return another value."""
    def apply(case: Case) -> None:
        label = f'{kind} on {place}'

        def hook(module: nn.Module, *args: Any) -> Any:
            # Of what comes with keyword arguments, only that they come.
            tensors = [item for item in args if not isinstance(item, dict)]
            case.note(label, *tensors)
            return None if value is None else value(tensors[-1])

        getattr(case.get(place), f'register_{kind}')(hook, **kwargs)

    return apply


def _bend_all(tensors: Tuple[Optional[torch.Tensor], ...]) -> Tuple[Optional[torch.Tensor], ...]:
    return tuple(None if tensor is None else bend(tensor) for tensor in tensors)


# What the inference form calls with the very maps of timm's layers: the shift of a branch's normalisation comes to its
# pointwise convolution in the bias, so only what that gives is the same, and what it takes is not.
_ALSO_FUSED = (
    'model', 'stem', 'stem_conv', 'stem_act', 'blocks', 'block', 'depthwise', 'spatial_act', 'act', 'global_pool',
    'head',
)
for _place in PLACES:
    operation(
        _hook('forward_hook', _place),
        name=f'forward_hook_on_{_place}',
        after=_place in _ALSO_FUSED,
    )
for _place in ('stem', 'stem_conv', 'blocks', 'block', 'spatial', 'branch', 'depthwise', 'spatial_norm', 'pointwise',
               'act'):
    operation(
        _hook('forward_hook', _place, bend),
        name=f'forward_hook_that_replaces_on_{_place}',
        after=_place in (*_ALSO_FUSED, 'pointwise'),
    )
for _place in ('blocks', 'block', 'branch', 'depthwise', 'spatial_norm', 'pointwise', 'norm'):
    operation(
        _hook('forward_pre_hook', _place),
        name=f'forward_pre_hook_on_{_place}',
        after=_place in _ALSO_FUSED,
    )
for _place in ('block', 'spatial', 'branch', 'depthwise', 'act'):
    operation(
        _hook('forward_pre_hook', _place, _bend_all),
        name=f'forward_pre_hook_that_replaces_on_{_place}',
        after=_place in _ALSO_FUSED,
    )
for _place in ('model', 'stem', 'blocks', 'block', 'branch', 'depthwise', 'spatial_norm', 'pointwise', 'act'):
    operation(
        _hook('full_backward_hook', _place),
        name=f'full_backward_hook_on_{_place}',
        ways=GRADIENT_WAYS,
        after=_place in ('model', 'blocks', 'block'),
    )
operation(
    _hook('full_backward_hook', 'pointwise', lambda grads: _bend_all(grads)),
    name='full_backward_hook_that_keeps_its_kind_on_pointwise',
    ways=GRADIENT_WAYS,
)
for _place in ('block', 'spatial', 'norm'):
    operation(
        _hook('full_backward_pre_hook', _place, _bend_all),
        name=f'full_backward_pre_hook_that_replaces_on_{_place}',
        ways=GRADIENT_WAYS,
        after=_place == 'block',
    )


@operation
def forward_hook_with_kwargs(case: Case) -> None:
    _hook('forward_hook', 'depthwise', bend, with_kwargs=True)(case)
    _hook('forward_pre_hook', 'norm', with_kwargs=True)(case)


@operation
def forward_hook_always_called(case: Case) -> None:
    _hook('forward_hook', 'block', always_call=True)(case)
    _hook('forward_hook', 'spatial_norm', always_call=True, prepend=True)(case)


@operation
def forward_hook_that_raises(case: Case) -> None:
    """As code ends a forward pass when it has seen enough."""
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        raise StopIteration('seen enough')

    case.get('branch', 1).register_forward_hook(hook)


@operation
def hook_removed_again(case: Case) -> None:
    handles = [
        case.get(place).register_forward_hook(lambda *args: case.note('removed')) for place in ('block', 'depthwise')]
    for handle in handles:
        handle.remove()


@operation(ways=('train', 'eval', 'reparam'))
def grad_cam(case: Case) -> None:
    """Keeps what the last normalisation of a branch gives, and asks for its gradient after the backward pass."""
    kept: List[torch.Tensor] = []

    def hook(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.retain_grad()
            kept.append(output)

    case.get('branch', 1).register_forward_hook(hook)
    case.watched['gradient of the branch'] = lambda: kept[-1].grad if kept else None


@operation(ways=GRADIENT_WAYS)
def tensor_hook_on_output(case: Case) -> None:
    def hook(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda grad: case.note('tensor hook', grad) or bend(grad))

    case.get('spatial_act').register_forward_hook(hook)


@operation(ways=('train', 'eval', 'intermediates'))
def tensor_hook_on_parameters(case: Case) -> None:
    for place in ('depthwise', 'pointwise', 'norm'):
        case.get(place).weight.register_hook(
            lambda grad, place=place: case.note(f'tensor hook on the weight of {place}', grad) or bend(grad))


@operation(ways=('train',))
def hook_after_accumulation(case: Case) -> None:
    """As optimizers that step within the backward pass do it."""
    for place in ('depthwise', 'spatial_norm', 'pointwise'):
        case.get(place).weight.register_post_accumulate_grad_hook(
            lambda weight, place=place: case.note(f'accumulated at {place}', weight.grad))


def _global_hook(kind: str, value: Optional[Callable] = None, types: Tuple = (nn.Module,)) -> Callable[[Case], None]:
    """A hook for all modules."""
    def apply(case: Case) -> None:
        def hook(module: nn.Module, *args: Any) -> Any:
            if not isinstance(module, types):
                return None
            # Not by name alone, which changes with what wraps the model; compiled modules have no place.
            for name, other in case.model.named_modules():
                if other is module:
                    case.observed[f'{kind} {name} {describe(args)}'] += 1
            return None if value is None else value(args[-1])

        case.stack.callback(getattr(nn.modules.module, f'register_module_{kind}')(hook).remove)

    return apply


operation(_global_hook('forward_hook'), name='global_forward_hook', after=True)
operation(_global_hook('forward_pre_hook'), name='global_forward_pre_hook', after=True)
operation(_global_hook('full_backward_hook'), name='global_full_backward_hook', ways=GRADIENT_WAYS, after=True)
operation(
    _global_hook('forward_hook', bend, (nn.Conv2d,)),
    name='global_forward_hook_that_replaces',
    after=True,
)
# Before, not after: the normalisations that it changes are none in the inference form.
operation(
    _global_hook('forward_hook', bend, (nn.BatchNorm2d,)),
    name='global_forward_hook_that_replaces_norms',
    ways=UNFUSED_WAYS,
)


@operation(after=True)
def global_parameter_registration_hook(case: Case) -> None:
    """Sees what is registered, and no call."""
    handle = nn.modules.module.register_module_parameter_registration_hook(lambda *args: None)
    case.stack.callback(handle.remove)


# ----------------------------------------------------------------------------------------------------------------------
category('patches of instances')


def _patch_forward(place: str, index: int = 0) -> Callable[[Case], None]:
    def apply(case: Case) -> None:
        module = case.get(place, index)
        original = module.forward

        def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
            case.note(f'forward of {place}', *args)
            return bend(original(*args, **kwargs))

        module.forward = forward

    return apply


for _place in ('stem', 'stem_conv', 'stem_norm', 'blocks', 'block', 'spatial', 'branch', 'depthwise', 'spatial_act',
               'spatial_norm', 'pointwise', 'norm', 'model'):
    # A deep copy still calls the forward of the original: what timm's function makes of that, ours must make of it.
    operation(
        _patch_forward(_place),
        name=f'forward_of_{_place}_patched',
        after=_place in _ALSO_FUSED,
    )


@operation
def conv_forward_patched(case: Case) -> None:
    conv = case.get('depthwise')
    original = conv._conv_forward
    conv._conv_forward = lambda x, weight, bias: bend(original(x, weight, bias))


@operation
def conv_forward_of_pointwise_patched(case: Case) -> None:
    conv = case.get('pointwise', 1)
    original = conv._conv_forward
    conv._conv_forward = lambda x, weight, bias: original(x, torch.sin(weight), bias)


@operation
def check_of_norm_patched(case: Case) -> None:
    def check(x: torch.Tensor) -> None:
        case.note('check of norm', x)

    case.get('norm')._check_input_dim = check


@operation
def forward_features_patched(case: Case) -> None:
    original = case.model.forward_features
    case.model.forward_features = lambda x: bend(original(x))


# ----------------------------------------------------------------------------------------------------------------------
category('patches of classes')


def _patch_class(owner: Any, name: str, result: Callable = bend) -> Callable[[Case], None]:
    def apply(case: Case) -> None:
        original = getattr(owner, name)

        def patched(*args: Any, **kwargs: Any) -> Any:
            return result(original(*args, **kwargs))

        case.stack.enter_context(mock.patch.object(owner, name, patched))

    return apply


# Normalisations that are folded are no longer called: patched first, they must not be folded.
for _class in (nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.GELU):
    operation(
        _patch_class(_class, 'forward'),
        name=f'{_class.__name__}_forward_patched',
        after=_class is not nn.BatchNorm2d,
        size='gelu' if _class is nn.GELU else 'relu',
    )
operation(_patch_class(nn.Sequential, 'forward'), name='Sequential_forward_patched')
operation(_patch_class(nn.Conv2d, '_conv_forward'), name='Conv2d_conv_forward_patched', after=True)
operation(_patch_class(F, 'conv2d'), name='functional_conv2d_patched', after=True)
# What the inference form does not call, it cannot be seen to.
operation(_patch_class(F, 'batch_norm'), name='functional_batch_norm_patched', ways=UNFUSED_WAYS)
operation(_patch_class(F, 'relu'), name='functional_relu_patched', ways=UNFUSED_WAYS)
operation(_patch_class(F, 'gelu'), name='functional_gelu_patched', ways=UNFUSED_WAYS, size='gelu')


@operation(ways=UNFUSED_WAYS)
def Module_call_patched(case: Case) -> None:
    """As tracers and profilers watch modules."""
    original = nn.Module.__call__

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if isinstance(module, (nn.Conv2d, nn.BatchNorm2d, nn.Sequential, nn.ReLU, nn.GELU)):
            # Our containers are subclasses of timm's.
            kind = next(base for base in type(module).__mro__ if base.__module__.startswith('torch.nn.'))
            case.observed[f'call of {kind.__name__} with {describe(args)}'] += 1
        return original(module, *args, **kwargs)

    case.stack.enter_context(mock.patch.object(nn.Module, '__call__', call))


# ----------------------------------------------------------------------------------------------------------------------
category('compiled in place')


def _counting_backend(case: Case, label: str) -> Callable:
    """Runs a graph as it is. That it ran is noted, not how often: graphs break where the code of a forward says."""
    def backend(graph: nn.Module, inputs: Any) -> Callable:
        def run(*args: Any) -> Any:
            case.calls[f'{label} ran compiled'] = 1
            return graph(*args)

        return run

    case.stack.callback(torch._dynamo.reset)
    return backend


for _place in ('block', 'depthwise', 'norm'):
    operation(
        partial(
            lambda place, case: case.get(place).compile(backend=_counting_backend(case, place)),
            _place,
        ),
        name=f'{_place}_compiled_in_place',
        ways=FEW_WAYS,
    )


@operation(ways=FEW_WAYS)
def block_compiled(case: Case) -> None:
    case.set('block', torch.compile(case.get('block'), backend=_counting_backend(case, 'block')))


# ----------------------------------------------------------------------------------------------------------------------
category('tensors for parameters')


def _freeze(case: Case, *kept: nn.Parameter) -> None:
    for parameter in case.model.parameters():
        parameter.requires_grad_(any(parameter is other for other in kept))


def _scaled_tensor(place: str, name: str, index: int = 0) -> Callable[[Case], None]:
    """A parameter that becomes what a scale makes of it; everything else is frozen, the images as well."""
    def apply(case: Case) -> None:
        module = case.get(place, index)
        scale = torch.tensor(1.3, requires_grad=True)
        value = getattr(module, name).detach()
        delattr(module, name)
        setattr(module, name, scale * value)
        _freeze(case)
        case.images_require_grad = False
        case.leaves['scale'] = scale

    return apply


operation(_scaled_tensor('spatial_norm', 'weight'), name='norm_weight_is_a_tensor')
operation(_scaled_tensor('norm', 'bias', 1), name='norm_bias_is_a_tensor')
operation(_scaled_tensor('stem_norm', 'weight'), name='stem_norm_weight_is_a_tensor')
operation(_scaled_tensor('depthwise', 'weight'), name='depthwise_weight_is_a_tensor')
operation(_scaled_tensor('pointwise', 'weight', 1), name='pointwise_weight_is_a_tensor')
operation(_scaled_tensor('pointwise', 'bias'), name='pointwise_bias_is_a_tensor')
operation(_scaled_tensor('stem_conv', 'weight'), name='stem_weight_is_a_tensor')


@operation
def running_statistics_are_tensors(case: Case) -> None:
    norm = case.get('spatial_norm')
    for name in ('running_mean', 'running_var'):
        value = getattr(norm, name).clone()
        delattr(norm, name)
        setattr(norm, name, value)
        case.watched[name] = partial(getattr, norm, name)


@operation
def norm_weight_is_a_constant(case: Case) -> None:
    norm = case.get('norm')
    value = norm.weight.detach().clone()
    del norm.weight
    norm.weight = value


@operation
def parametrized_depthwise(case: Case) -> None:
    parametrize.register_parametrization(case.get('depthwise'), 'weight', Doubled())


@operation
def parametrized_norm(case: Case) -> None:
    parametrize.register_parametrization(case.get('norm'), 'weight', Doubled())


@operation
def weight_norm(case: Case) -> None:
    parametrizations.weight_norm(case.get('pointwise'))


@operation
def weight_norm_by_hook(case: Case) -> None:
    nn.utils.weight_norm(case.get('depthwise'))


@operation
def spectral_norm(case: Case) -> None:
    """Each look at the weight in training moves its estimate, so there must be as many."""
    parametrizations.spectral_norm(case.get('pointwise'))


@operation
def pruned_by_mask(case: Case) -> None:
    prune.l1_unstructured(case.get('depthwise'), 'weight', 0.5)


@operation
def pruned_for_good(case: Case) -> None:
    prune.ln_structured(case.get('pointwise'), 'weight', 0.25, n=2, dim=0)
    prune.remove(case.get('pointwise'), 'weight')


@operation
def parameter_of_a_subclass(case: Case) -> None:
    conv = case.get('depthwise')
    conv.weight = nn.Parameter(conv.weight.detach().as_subclass(Images))


@operation
def everything_frozen(case: Case) -> None:
    _freeze(case)


@operation
def everything_frozen_and_images(case: Case) -> None:
    """A backward pass then has nothing to do, which PyTorch refuses."""
    _freeze(case)
    case.images_require_grad = False


@operation(after=True)
def images_without_gradient(case: Case) -> None:
    """As nearly all training has it."""
    case.images_require_grad = False


for _place, _name, _index in (
        ('spatial_norm', 'weight', 0),
        ('norm', 'bias', 1),
        ('depthwise', 'weight', 0),
        ('depthwise', 'bias', 1),
        ('pointwise', 'bias', 0),
        ('pointwise', 'weight', 1),
        ('stem_conv', 'weight', 0),
        ('head', 'bias', 0),
):
    def _only(place: str, name: str, index: int, case: Case) -> None:
        _freeze(case, getattr(case.get(place, index), name))
        case.images_require_grad = False

    operation(
        partial(_only, _place, _name, _index),
        name=f'only_{_place}_{_name}_trained',
        ways=('train', 'eval', 'intermediates') if _place != 'head' else ('train', 'eval'),
    )


@operation
def stem_and_first_block_frozen(case: Case) -> None:
    for place in ('stem', 'block'):
        case.get(place).requires_grad_(False)
    case.images_require_grad = False


@operation
def frozen_by_timm(case: Case) -> None:
    """Which puts other normalisations there."""
    timm.utils.freeze(case.model, ['stem', 'blocks.0'])


@operation
def unfrozen_by_timm(case: Case) -> None:
    timm.utils.freeze(case.model)
    timm.utils.unfreeze(case.model, ['blocks.1', 'head'])


@operation
def convolutions_frozen(case: Case) -> None:
    for module in case.model.modules():
        if isinstance(module, nn.Conv2d):
            module.requires_grad_(False)


@operation
def norms_frozen(case: Case) -> None:
    for module in case.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.requires_grad_(False)


# ----------------------------------------------------------------------------------------------------------------------
category('dtypes and memory formats')


@operation(after=True)
def model_in_double(case: Case) -> None:
    case.model.double()
    case.images = case.images.double()


@operation(after=True)
def model_in_bfloat16(case: Case) -> None:
    case.model.bfloat16()
    case.images = case.images.bfloat16()
    case.low_precision = True


@operation
def model_in_bfloat16_but_norms(case: Case) -> None:
    model_in_bfloat16(case)
    for module in case.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.float()


@operation
def model_in_half(case: Case) -> None:
    case.model.half()
    case.images = case.images.half()
    case.low_precision = True


for _place, _dtype in (
        ('spatial_norm', torch.float64),
        ('norm', torch.bfloat16),
        ('depthwise', torch.float64),
        ('pointwise', torch.bfloat16),
        ('stem_norm', torch.float16),
        ('head', torch.float64),
):
    operation(
        partial(lambda place, dtype, case: case.get(place).to(dtype), _place, _dtype),
        name=f'{_place}_in_{str(_dtype).removeprefix("torch.")}',
    )


@operation
def images_in_double(case: Case) -> None:
    """Which a model in float32 refuses."""
    case.images = case.images.double()


@operation
def double_norm_that_casts(case: Case) -> None:
    class Casting(nn.BatchNorm2d):

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.double()).to(x.dtype)

    case.set('spatial_norm', case.new(Casting(case.size.dim)).double())


@operation(after=True)
def autocast(case: Case) -> None:
    case.around.append(lambda: torch.autocast('cpu', torch.bfloat16))
    case.low_precision = True


@operation(after=True)
def model_in_channels_last(case: Case) -> None:
    case.model.to(memory_format=torch.channels_last)


@operation(after=True)
def block_in_channels_last(case: Case) -> None:
    case.get('block').to(memory_format=torch.channels_last)


@operation(after=True)
def pointwise_in_channels_last(case: Case) -> None:
    case.get('pointwise', 1).to(memory_format=torch.channels_last)


# The inference form adds the branch to its input the other way round, which decides the memory format of the sum.
@operation(ways=UNFUSED_WAYS)
def depthwise_in_channels_last(case: Case) -> None:
    case.get('depthwise').to(memory_format=torch.channels_last)


@operation(after=True)
def all_in_channels_last(case: Case) -> None:
    case.model.to(memory_format=torch.channels_last)
    case.images = case.images.contiguous(memory_format=torch.channels_last)


@operation(after=True)
def images_in_channels_last(case: Case) -> None:
    case.images = case.images.contiguous(memory_format=torch.channels_last)


@operation(after=True)
def images_sliced(case: Case) -> None:
    case.images = torch.cat([case.images, case.images.flip(3)], dim=3)[..., ::2]


@operation(after=True)
def images_expanded(case: Case) -> None:
    case.images = case.images[:1].expand(BATCH_SIZE, -1, -1, -1)


@operation(after=True)
def images_of_one_channel_expanded(case: Case) -> None:
    case.images = case.images[:, :1].expand_as(case.images)


@operation(after=True)
def images_transposed(case: Case) -> None:
    case.images = case.images.transpose(2, 3)


@operation(after=True)
def images_permuted(case: Case) -> None:
    case.images = case.images.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)


@operation(after=True)
def one_image(case: Case) -> None:
    case.images = case.images[:1]


@operation(after=True)
def no_images(case: Case) -> None:
    case.images = case.images[:0]


@operation(after=True)
def small_images(case: Case) -> None:
    """Maps that are smaller than the kernel."""
    side = case.size.patch_size
    case.images = case.images[..., :3 * side, :2 * side]


@operation(after=True)
def one_image_of_one_patch(case: Case) -> None:
    """One value per channel, of which there are no statistics."""
    side = case.size.patch_size
    case.images = case.images[:1, :, :side, :side]


@operation(after=True)
def cropped_images(case: Case) -> None:
    """No multiple of the patches."""
    case.images = case.images[..., :-1, 1:]


@operation(after=True)
def one_image_of_nan(case: Case) -> None:
    """Which in eval reaches no other image."""
    case.images = case.images.clone()
    case.images[1, 0, 0, 0] = float('nan')


@operation(after=True)
def images_of_a_subclass(case: Case) -> None:
    case.images = case.images.as_subclass(Images)


@operation(ways=('inference',))
def images_of_inference_mode(case: Case) -> None:
    case.images_require_grad = False
    with torch.inference_mode():
        case.images = case.images.clone()


# ----------------------------------------------------------------------------------------------------------------------
category('transforms')


def _loss(out: torch.Tensor) -> torch.Tensor:
    return (out * projection(out)).sum() + out.square().sum()


def _parameters(case: Case) -> Dict[str, torch.Tensor]:
    return {name: parameter for name, parameter in case.model.named_parameters() if parameter.requires_grad}


def _images_and_parameters(case: Case, x: torch.Tensor) -> Dict[str, torch.Tensor]:
    """The parameters only of the training form: those of the inference form are others, and have no gradients."""
    wanted = {'images': x} if x.requires_grad else {}
    return {**wanted, **({} if case.is_fused else _parameters(case)), **case.leaves}


def _named(wanted: Dict[str, torch.Tensor], gradients: Sequence[Optional[torch.Tensor]]) -> Dict:
    return {f'gradient of {name}': gradient for name, gradient in zip(wanted, gradients)}


@computation
def vmap(case: Case, x: torch.Tensor) -> Dict[str, torch.Tensor]:
    return dict(output=torch.func.vmap(case.model)(x.detach().unsqueeze(1)))


@computation
def vmap_of_features(case: Case, x: torch.Tensor) -> Dict[str, torch.Tensor]:
    with torch.no_grad():
        return dict(features=torch.func.vmap(case.model.forward_features)(x.detach().unsqueeze(1)))


@computation
def func_grad(case: Case, x: torch.Tensor) -> Dict[str, torch.Tensor]:
    return dict(gradient=torch.func.grad(lambda x: _loss(case.model(x)))(x.detach()))


@computation
def func_vjp(case: Case, x: torch.Tensor) -> Dict[str, torch.Tensor]:
    out, vjp = torch.func.vjp(case.model, x.detach())
    return dict(output=out, gradient=vjp(projection(out))[0])


@computation
def func_jvp(case: Case, x: torch.Tensor) -> Dict[str, torch.Tensor]:
    out, tangent = torch.func.jvp(case.model, (x.detach(),), (projection(x),))
    return dict(output=out, tangent=tangent)


@computation
def func_jacrev(case: Case, x: torch.Tensor) -> Dict[str, torch.Tensor]:
    return dict(jacobian=torch.func.jacrev(lambda x: case.model(x)[:, :3])(x.detach()[:2]))


@computation
def per_sample_gradients(case: Case, x: torch.Tensor) -> Dict[str, torch.Tensor]:
    parameters = {} if case.is_fused else _parameters(case)
    parameters = {name: parameter.detach() for name, parameter in parameters.items()}

    def loss(parameters: Dict[str, torch.Tensor], image: torch.Tensor) -> torch.Tensor:
        return _loss(torch.func.functional_call(case.model, parameters, (image.unsqueeze(0),)))

    gradients, images = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)), (None, 0))(parameters, x.detach())
    return {'images': images, **gradients}


@computation
def functional_call(case: Case, x: torch.Tensor) -> Dict[str, torch.Tensor]:
    """With other tensors for the parameters, which are made of one scale."""
    scale = torch.tensor(1.1, requires_grad=True)
    parameters = {} if case.is_fused else _parameters(case)
    parameters = {name: scale * parameter.detach() for name, parameter in parameters.items()}
    out = torch.func.functional_call(case.model, parameters, (x,))
    wanted = dict(scale=scale, images=x)
    gradients = torch.autograd.grad(_loss(out), list(wanted.values()), allow_unused=True)
    return dict(output=out, **_named(wanted, gradients))


@computation
def functional_call_without_gradient_of_images(case: Case, x: torch.Tensor) -> Dict[str, torch.Tensor]:
    """The model's own parameters are frozen, the images as well."""
    scale = torch.tensor(1.1, requires_grad=True)
    own = {} if case.is_fused else _parameters(case)
    scaled = {name: scale * parameter.detach() for name, parameter in own.items()}
    case.model.requires_grad_(False)
    out = torch.func.functional_call(case.model, scaled, (x.detach(),))
    return dict(output=out, gradient=torch.autograd.grad(_loss(out), scale, allow_unused=True)[0] if scaled else None)


@computation
def expanded_weights(case: Case, x: torch.Tensor) -> Dict[str, torch.Tensor]:
    """Per-sample gradients by weights that answer nothing but the operators of a few layers."""
    if case.is_fused:
        _freeze(case, *case.model.head.parameters())
    else:
        for index in range(len(case.model.blocks)):
            case.change('spatial_norm', lambda norm: nn.GroupNorm(4, norm.num_features), index)
            case.change('norm', lambda norm: nn.GroupNorm(4, norm.num_features), index)
        case.change('stem_norm', lambda norm: nn.GroupNorm(4, norm.num_features))
    _loss(call_for_per_sample_grads(case.model, batch_size=len(x), loss_reduction='sum')(x.detach())).backward()
    return {f'gradient of {name}': parameter.grad_sample for name, parameter in _parameters(case).items()}


@computation
def jacobian_vectorized(case: Case, x: torch.Tensor) -> Dict[str, torch.Tensor]:
    function = lambda x: case.model(x)[:, :3]  # noqa: E731
    return dict(jacobian=torch.autograd.functional.jacobian(function, x[:2].detach(), vectorize=True))


@computation
def jacobian_row_by_row(case: Case, x: torch.Tensor) -> Dict[str, torch.Tensor]:
    function = lambda x: case.model(x)[:, :2]  # noqa: E731
    return dict(jacobian=torch.autograd.functional.jacobian(function, x[:2].detach()))


@computation
def gradients_batched(case: Case, x: torch.Tensor) -> Dict[str, Optional[torch.Tensor]]:
    out, wanted = case.model(x), _images_and_parameters(case, x)
    grad_outputs = torch.stack([projection(out), out.detach()])
    gradients = torch.autograd.grad(
        out, list(wanted.values()), grad_outputs, is_grads_batched=True, allow_unused=True)
    return dict(output=out, **_named(wanted, gradients))


@computation
def gradients_batched_of_features(case: Case, x: torch.Tensor) -> Dict[str, Optional[torch.Tensor]]:
    out = case.model.forward_features(x)
    gradients = torch.autograd.grad(
        out, [x], torch.stack([projection(out), out.detach()]), is_grads_batched=True, allow_unused=True)
    return dict(output=out, gradient=gradients[0])


@computation
def dual_images(case: Case, x: torch.Tensor) -> Dict[str, Optional[torch.Tensor]]:
    with forward_ad.dual_level():
        out, tangent = forward_ad.unpack_dual(case.model(forward_ad.make_dual(x.detach(), projection(x))))
    return dict(output=out, tangent=tangent)


@computation
def dual_parameters(case: Case, x: torch.Tensor) -> Dict[str, Optional[torch.Tensor]]:
    parameters = {} if case.is_fused else _parameters(case)
    with forward_ad.dual_level():
        duals = {
            name: forward_ad.make_dual(parameter.detach(), projection(parameter))
            for name, parameter in parameters.items()
        }
        out, tangent = forward_ad.unpack_dual(torch.func.functional_call(case.model, duals, (x.detach(),)))
    return dict(output=out, tangent=tangent)


@computation
def double_backward(case: Case, x: torch.Tensor) -> Dict[str, Optional[torch.Tensor]]:
    """A penalty on the gradient of the images."""
    out, wanted = case.model(x), _images_and_parameters(case, x)
    gradient, = torch.autograd.grad(_loss(out), x, create_graph=True)
    second = torch.autograd.grad(gradient.square().sum(), list(wanted.values()), allow_unused=True)
    # PyTorch leaves second gradients in whatever strides its formulas end with, which differ between memory formats.
    second = [grad if grad is None else grad.contiguous() for grad in second]
    return dict(first=gradient, **_named(wanted, second))


@computation
def hessian_vector_product(case: Case, x: torch.Tensor) -> Dict[str, Optional[torch.Tensor]]:
    out, product = torch.autograd.functional.hvp(lambda x: _loss(case.model(x)), x.detach(), projection(x))
    return dict(output=out, product=product)


@computation
def batched_second_gradients(case: Case, x: torch.Tensor) -> Dict[str, Optional[torch.Tensor]]:
    """A batch of gradients through a graph that an ordinary backward pass made."""
    gradient, = torch.autograd.grad(_loss(case.model(x)), x, create_graph=True)
    vectors = torch.stack([projection(gradient), gradient.detach()])
    second, = torch.autograd.grad(gradient, x, vectors, is_grads_batched=True, allow_unused=True)
    return dict(first=gradient, second=second)


@computation
def backward_twice(case: Case, x: torch.Tensor) -> Dict[str, Optional[torch.Tensor]]:
    """Through one graph, which must still hold what it held."""
    out, wanted = case.model(x), list(_images_and_parameters(case, x).values())
    torch.autograd.grad(_loss(out), wanted, retain_graph=True, allow_unused=True)
    gradients = torch.autograd.grad(
        (out * projection(out)).sum(), wanted, retain_graph=True, allow_unused=True)
    return dict(output=out, **_named(_images_and_parameters(case, x), gradients))


@computation
def two_forwards_one_backward(case: Case, x: torch.Tensor) -> Dict[str, Optional[torch.Tensor]]:
    first, second, wanted = case.model(x), case.model(x.flip(0)), _images_and_parameters(case, x)
    gradients = torch.autograd.grad(_loss(first) + (second * first).sum(), list(wanted.values()), allow_unused=True)
    return dict(output=first, second=second, **_named(wanted, gradients))


@computation
def gradient_of_one_weight(case: Case, x: torch.Tensor) -> Dict[str, Optional[torch.Tensor]]:
    out = case.model(x)
    weight = x if case.is_fused else case.get('depthwise').weight
    return dict(output=out, gradient=torch.autograd.grad(_loss(out), weight)[0])


@computation
def gradients_one_by_one(case: Case, x: torch.Tensor) -> Dict[str, Optional[torch.Tensor]]:
    out, wanted = case.model(x), _images_and_parameters(case, x)
    gradients = [
        torch.autograd.grad(_loss(out), tensor, retain_graph=True, allow_unused=True)[0] for tensor in wanted.values()]
    return _named(wanted, gradients)


@computation
def weight_changed_before_backward(case: Case, x: torch.Tensor) -> Dict[str, Optional[torch.Tensor]]:
    """PyTorch notices, and refuses."""
    out = case.model(x)
    if not case.is_fused:
        with torch.no_grad():
            case.get('pointwise').weight.mul_(2)
    return dict(gradient=torch.autograd.grad(_loss(out), x)[0])


@computation
def norm_weight_changed_before_backward(case: Case, x: torch.Tensor) -> Dict[str, Optional[torch.Tensor]]:
    out = case.model(x)
    if not case.is_fused:
        with torch.no_grad():
            case.get('spatial_norm').weight.mul_(2)
    return dict(gradient=torch.autograd.grad(_loss(out), x)[0])


@computation
def backward_through_a_freed_graph(case: Case, x: torch.Tensor) -> Dict[str, Optional[torch.Tensor]]:
    """PyTorch refuses the second time."""
    out = case.model(x)
    torch.autograd.grad(_loss(out), x)
    return dict(gradient=torch.autograd.grad(_loss(out), x)[0])


@computation
def features_changed_in_place(case: Case, x: torch.Tensor) -> Dict[str, Optional[torch.Tensor]]:
    features = case.model.forward_features(x)
    features.mul_(0.5).relu_()
    return dict(features=features, gradient=torch.autograd.grad(_loss(features), x)[0])


@computation
def results_kept(case: Case, x: torch.Tensor) -> Dict[str, Optional[torch.Tensor]]:
    """What one batch gave stays as it is while the next ones run."""
    with torch.no_grad():
        kept = [case.model.forward_features(x), *case.model.forward_intermediates(x.flip(0), intermediates_only=True)]
        case.model(x + 1)
    return {str(index): value for index, value in enumerate(kept)}


# ----------------------------------------------------------------------------------------------------------------------
category('views of results')


@computation
def features_viewed(case: Case, x: torch.Tensor) -> Dict[str, torch.Tensor]:
    features = case.model.forward_features(x)
    return dict(view=features.view(len(x), -1))


@computation
def features_viewed_without_gradients(case: Case, x: torch.Tensor) -> Dict[str, torch.Tensor]:
    with torch.no_grad():
        return dict(view=case.model.forward_features(x).view(len(x), -1))


@computation
def intermediates_viewed(case: Case, x: torch.Tensor) -> Dict[str, torch.Tensor]:
    _, intermediates = case.model.forward_intermediates(x)
    return {str(index): item.view(len(x), -1) for index, item in enumerate(intermediates)}


@computation
def gradient_of_images_viewed(case: Case, x: torch.Tensor) -> Dict[str, torch.Tensor]:
    gradient, = torch.autograd.grad(_loss(case.model(x)), x)
    return dict(view=gradient.view(len(x), -1))


@computation
def gradients_of_parameters_viewed(case: Case, x: torch.Tensor) -> Dict[str, torch.Tensor]:
    wanted = _images_and_parameters(case, x)
    gradients = torch.autograd.grad(_loss(case.model(x)), list(wanted.values()))
    return _named(wanted, [gradient.view(-1) for gradient in gradients])


# ----------------------------------------------------------------------------------------------------------------------
category('models around a model')


def _maps(case: Case, x: torch.Tensor, maps: Any) -> Dict[str, Optional[torch.Tensor]]:
    """Feature maps, and the gradients that come back through all of them."""
    outputs = {str(name): value for name, value in (maps if isinstance(maps, dict) else dict(enumerate(maps))).items()}
    wanted = _images_and_parameters(case, x)
    gradients = torch.autograd.grad(
        sum(_loss(value) for value in outputs.values()), list(wanted.values()), allow_unused=True)
    return {**outputs, **_named(wanted, gradients)}


def _features_only(cls: type, **kwargs: Any) -> Callable:
    def run(case: Case, x: torch.Tensor) -> Dict[str, Optional[torch.Tensor]]:
        return _maps(case, x, cls(case.model, out_indices=(0, 1), **kwargs)(x))

    run.__name__ = cls.__name__
    return run


for _cls, _kwargs in (
        (_features.FeatureGetterNet, {}),
        (_features.FeatureHookNet, {}),
        (_features.FeatureListNet, dict(flatten_sequential=True)),
):
    computation(_features_only(_cls, **_kwargs))
# Both trace a model in training mode as well, which the inference form refuses.
computation(_features_only(_features_fx.FeatureGraphNet), ways=('train', 'eval'))


@partial(computation, ways=('train', 'eval'))
def feature_extractor_of_torchvision(case: Case, x: torch.Tensor) -> Dict[str, Optional[torch.Tensor]]:
    return _maps(case, x, create_feature_extractor(case.model, ['blocks.0', 'blocks.1', 'head'])(x))


@computation
def averaged_weights(case: Case, x: torch.Tensor) -> Dict[str, Optional[torch.Tensor]]:
    average = timm.utils.ModelEmaV3(case.model, decay=0.5)
    if not case.is_fused:
        _loss(case.model(x)).backward()
        with torch.no_grad():
            for parameter in case.model.parameters():
                if parameter.grad is not None:
                    parameter.sub_(1e-4 * parameter.grad)
        case.model.zero_grad()
        average.update(case.model)
    with torch.no_grad():
        return dict(average=average(x), own=case.model(x))


# ----------------------------------------------------------------------------------------------------------------------
category('observers and contexts')

# What of a layer can be seen in the inference form as well.
_SEEN_IN_BOTH_FORMS = ('convolution', 'conv2d', 'flops')


@operation(after=True)
def dispatch_mode(case: Case) -> None:
    class Counting(TorchDispatchMode):

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = function._schema.name.removeprefix('aten::')
            if name in ('convolution', 'convolution_backward', 'native_batch_norm', 'relu', 'gelu'):
                case.observed[name] += 1
            return function(*args, **(kwargs or {}))

    case.around.append(Counting)


@operation(after=True)
def function_mode(case: Case) -> None:
    class Counting(TorchFunctionMode):

        def __torch_function__(self, function, types, args=(), kwargs=None):
            name = getattr(function, '__name__', '')
            if name in ('conv2d', 'batch_norm', 'relu', 'gelu', 'linear'):
                case.observed[name] += 1
            return function(*args, **(kwargs or {}))

    case.around.append(Counting)


@operation(after=True)
def function_mode_that_replaces(case: Case) -> None:
    class Bending(TorchFunctionMode):

        def __torch_function__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            return bend(out) if function is F.conv2d else out

    case.around.append(Bending)


@operation(ways=('train', 'train_no_grad', 'inference', 'reparam', 'reparam_first'), after=True)
def flop_counter(case: Case) -> None:
    case.images_require_grad = False  # PyTorch's counter itself fails where torch.autograd.grad is asked for a leaf's

    @contextmanager
    def count() -> Iterator[None]:
        with FlopCounterMode(display=False) as counter:
            yield
        case.observed['flops'] = counter.get_total_flops()

    case.around.append(count)


@operation(ways=GRADIENT_WAYS, after=True)
def saved_tensors_hooks(case: Case) -> None:
    """What is saved is each model's own matter; that it goes through the hooks unharmed is not."""
    case.around.append(lambda: torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: tensor.detach().clone(), lambda tensor: tensor))


@operation(ways=('train',), after=True)
def saved_tensors_in_numpy(case: Case) -> None:
    case.around.append(lambda: torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: tensor.detach().numpy().copy(), torch.from_numpy))


@operation(ways=GRADIENT_WAYS, after=True)
def anomaly_detection(case: Case) -> None:
    case.around.append(torch.autograd.detect_anomaly)


@operation(after=True)
def device_context(case: Case) -> None:
    case.around.append(lambda: torch.device('cpu'))


@operation(after=True)
def default_device(case: Case) -> None:
    case.stack.callback(torch.set_default_device, None)
    torch.set_default_device('cpu')


@operation(after=True)
def default_device_meta(case: Case) -> None:
    """New tensors would be on another device than the model."""
    case.around.append(lambda: torch.device('meta'))


@operation(after=True)
def default_dtype(case: Case) -> None:
    @contextmanager
    def double() -> Iterator[None]:
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(before)

    case.around.append(double)


@operation(after=True)
def deterministic_algorithms(case: Case) -> None:
    @contextmanager
    def deterministic() -> Iterator[None]:
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)

    case.around.append(deterministic)


@operation(after=True)
def no_onednn(case: Case) -> None:
    case.around.append(lambda: torch.backends.mkldnn.flags(enabled=False))


# ----------------------------------------------------------------------------------------------------------------------
category('copies and checkpointing')


@operation(after=True)
def deep_copied(case: Case) -> None:
    case.model = copy.deepcopy(case.model)


@operation(after=True)
def pickled(case: Case) -> None:
    case.model = pickle.loads(pickle.dumps(case.model))


@operation(after=True)
def shallow_copy(case: Case) -> None:
    """Of the model: its children are the same."""
    case.model = copy.copy(case.model)


@operation
def used_before(case: Case) -> None:
    """What a forward pass leaves behind must not outlive a change."""
    with torch.no_grad():
        case.model(case.images)
        case.model.forward_features(case.images)
        for place in ('depthwise', 'pointwise', 'norm'):
            case.get(place).weight.data.mul_(1.5)


@operation
def weights_loaded(case: Case) -> None:
    case.model.load_state_dict({name: value.clone() * 1 for name, value in case.model.state_dict().items()})


@operation
def weights_assigned(case: Case) -> None:
    state_dict = {name: value.clone() for name, value in case.model.state_dict().items()}
    case.model.load_state_dict(state_dict, assign=True)


@operation
def checkpointing(case: Case) -> None:
    """Of ours alone: it must change nothing but memory, where timm's moves the statistics twice a step.

    Hooks are called again where layers are computed again, so that only numbers are compared. Neither model calls its
    Sequential of blocks then; what is done to the call of that does not go with it. Neither do function modes, which
    PyTorch takes off in the backward pass and so for what is computed again, nor torch.func, which does not checkpoint.
    """
    if case.is_ours:
        case.model.set_grad_checkpointing()
    case.numbers_only = True


# ----------------------------------------------------------------------------------------------------------------------


def projection(like: torch.Tensor) -> torch.Tensor:
    """Values of a tensor's shape, as good as random, and made without what transforms and modes take for random."""
    values = torch.arange(like.numel(), device='cpu', dtype=torch.float32) * 1.7
    return torch.sin(values + 0.1 * values.sqrt()).view(like.shape).to(like.dtype)


@dataclass(frozen=True)
class Program:
    """A model, what is done to it, and how it is then run."""
    operations: Tuple[str, ...]
    way: str
    size: str = 'relu'
    seed: int = 0
    # What is computed, where that is not what the way says: as `Case.run`.
    run: Optional[Callable[[Case, torch.Tensor], Dict[str, Optional[torch.Tensor]]]] = None

    def __str__(self) -> str:
        return f'{" + ".join(self.operations)} | {self.way} | {self.size}'


@dataclass
class Outcome:
    """What a program left on one model."""
    error: Optional[BaseException] = None
    stage: str = ''
    outputs: Dict[str, Optional[torch.Tensor]] = field(default_factory=dict)
    gradients: Dict[str, Optional[torch.Tensor]] = field(default_factory=dict)
    # Those that .grad holds have the strides that PyTorch gives them there, whatever came.
    gradients_have_strides: bool = True
    buffers: Dict[str, Optional[torch.Tensor]] = field(default_factory=dict)
    case: Optional[Case] = None


def create(size: Size, ours: bool) -> nn.Module:
    """Our model, by name, or timm's, by its class."""
    kwargs = dict(dim=size.dim, depth=size.depth, kernel_size=size.kernel_size, patch_size=size.patch_size)
    if ours:
        name = 'convmixer_768_32' if size.act_layer is nn.ReLU else 'convmixer_512_12_ks8_p7'
        return timm.create_model(name, num_classes=NUM_CLASSES, **kwargs)
    return TimmConvMixer(num_classes=NUM_CLASSES, act_layer=size.act_layer, **kwargs)


@lru_cache(maxsize=32)
def _template(size: str, seed: int, ours: bool) -> nn.Module:
    """Our model or timm's, the same for the same seed, with weights that training could have made."""
    model = create(SIZES[size], ours)
    if ours:
        model.load_state_dict(_template(size, seed, ours=False).state_dict())
        return model
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            values = torch.randn(parameter.shape, generator=generator)
            # Few channels that are hardly ever active: a normalisation makes their rounding errors large.
            parameter.copy_(values.abs() if parameter.dim() == 1 else values / parameter[0].numel() ** 0.5)
        randomize_norms(model, seed)
        for name, buffer in model.named_buffers():
            if name.endswith('num_batches_tracked'):
                buffer.fill_(3)  # another than at first, for a momentum of None
    return model


def _copy(module: nn.Module) -> nn.Module:
    """A deep copy of what a constructor made, where each tensor and each module is in one place: ten times as fast."""
    copied = module.__class__.__new__(module.__class__)
    vars(copied).update(
        (name, value.copy() if isinstance(value, (dict, set)) else value) for name, value in vars(module).items())
    for name, parameter in module._parameters.items():
        if parameter is not None:
            copied._parameters[name] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
    for name, buffer in module._buffers.items():
        copied._buffers[name] = None if buffer is None else buffer.clone()
    for name, child in module._modules.items():
        copied._modules[name] = _copy(child)
    return copied


def _run(case: Case, way: str, outcome: Outcome) -> None:
    """Run a case and fill its outcome in."""
    gradients_wanted = way in GRADIENT_WAYS or case.run is not None
    x = case.images.detach()
    if x.is_floating_point() and gradients_wanted and case.images_require_grad:
        x = x.requires_grad_()
    if case.run is not None:
        for name, value in case.run(case, x).items():
            (outcome.gradients if 'gradient' in name else outcome.outputs)[name] = value
        return
    if way == 'train_no_grad':
        with torch.no_grad():
            outcome.outputs['output'] = case.model(x)
        return
    if not gradients_wanted or way.startswith('reparam'):
        with torch.no_grad():
            outcome.outputs['output without gradients'] = case.model(x)
            outcome.outputs['features'] = case.model.forward_features(x)
            features, intermediates = case.model.forward_intermediates(x)
        outcome.outputs['last features'] = features
        outcome.outputs.update({f'intermediate {i}': value for i, value in enumerate(intermediates)})
        with torch.inference_mode():
            outcome.outputs['output in inference mode'] = case.model(x)
    if not gradients_wanted:
        return

    if way == 'intermediates':
        features, intermediates = case.model.forward_intermediates(x)
        outputs = {f'intermediate {i}': value for i, value in enumerate(intermediates)}
        outputs['features'] = features
    else:
        outputs = dict(output=case.model(x))
    outcome.outputs.update(outputs)
    loss = sum((value * projection(value)).sum() for value in outputs.values())
    if way == 'train':
        loss.backward()
        outcome.gradients_have_strides = False
        wanted = {'images': x, **dict(case.model.named_parameters()), **case.leaves}
        outcome.gradients.update({name: tensor.grad for name, tensor in wanted.items()})
        return
    wanted = _images_and_parameters(case, x)
    if case.is_fused and not wanted:
        return
    gradients = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    outcome.gradients.update(zip(wanted, gradients))


@contextmanager
def _own_state() -> Iterator[None]:
    """Leave the process as it was: random numbers, threads, warnings."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), ExitStack() as stack:
        warnings.simplefilter('ignore')
        torch.set_num_threads(1)  # the maps are small, and the sums then always the same
        stack.callback(torch.set_num_threads, threads)
        yield


def execute(program: Program, ours: bool) -> Outcome:
    """Run a program on our model or on timm's."""
    outcome = Outcome()
    size = SIZES[program.size]
    model = _copy(_template(program.size, program.seed, ours))
    images = torch.randn(BATCH_SIZE, 3, *size.image, generator=torch.Generator().manual_seed(program.seed + 1))
    case = outcome.case = Case(model, images, size, is_ours=ours, run=program.run)
    model.train(program.way in TRAINING_WAYS)

    def reparameterize() -> None:
        outcome.stage = 'reparameterize_model'
        # A copy, also of timm's class, which fuses nothing; the model itself if it is fresh, or nobody can copy it.
        try:
            case.model = reparameterize_model(case.model, inplace=program.way == 'reparam_first')
        except (RuntimeError, ValueError):
            case.model = reparameterize_model(case.model, inplace=True)
        case.is_fused = True

    with case.stack:
        try:
            if program.way == 'reparam_first':
                reparameterize()
            for name in program.operations:
                outcome.stage = name
                torch.default_generator.manual_seed(program.seed + 2)
                OPERATIONS[name].apply(case)
            if program.way == 'reparam':
                reparameterize()
            outcome.stage = 'run'
            torch.default_generator.manual_seed(program.seed + 3)
            with ExitStack() as around:
                for context in case.around:
                    around.enter_context(context())
                _run(case, program.way, outcome)
            if not case.is_fused:
                outcome.buffers.update(
                    (name, buffer.detach().clone()) for name, buffer in case.model.named_buffers())
            outcome.buffers.update((name, watched()) for name, watched in case.watched.items())
        except Exception as error:
            outcome.error = error
    return outcome


class Difference(NamedTuple):
    """Where two outcomes differ, and whether by rounding alone could be."""
    text: str
    is_of_values: bool = False


def _largest(tensors: Dict[str, Optional[torch.Tensor]]) -> float:
    largest = 0.
    for tensor in tensors.values():
        if tensor is not None and tensor.numel() and tensor.is_floating_point():
            finite = tensor.detach().abs().nan_to_num(0., 0., 0.)
            largest = max(largest, float(finite.max()))
    return largest


def _compare_tensors(
        what: str,
        actual: Optional[torch.Tensor],
        expected: Optional[torch.Tensor],
        tolerance: float,
        floor: float = 0.,
        with_strides: bool = False,
        rounded: Optional[torch.Tensor] = None,
        compare_requires_grad: bool = True,
) -> Iterator[Difference]:
    if actual is None or expected is None:
        if (actual is None) != (expected is None):
            yield Difference(f'{what}: {"none" if actual is None else "one"}, timm has '
                             f'{"none" if expected is None else "one"}')
        return
    for question in ('shape', 'dtype', 'requires_grad') if compare_requires_grad else ('shape', 'dtype'):
        ours, theirs = getattr(actual, question), getattr(expected, question)
        if ours != theirs:
            yield Difference(f'{what}: {question} {ours}, timm {theirs}')
            return
    if with_strides and strides(actual) != strides(expected):
        yield Difference(f'{what}: strides {actual.stride()}, timm {expected.stride()} for {tuple(actual.shape)}')
    actual, expected = (tensor.detach().as_subclass(torch.Tensor) for tensor in (actual, expected))
    if not expected.is_floating_point():
        if not torch.equal(actual, expected):
            yield Difference(f'{what}: {actual.flatten().tolist()[:4]}, timm {expected.flatten().tolist()[:4]}')
        return
    if not expected.numel():
        return
    # No difference of bfloat16 is to round here.
    actual, expected = actual.double(), expected.double()
    worst, largest = float((actual - expected).abs().max()), float(expected.abs().max())
    if not math.isfinite(worst + largest):
        if not torch.equal(actual.isfinite(), expected.isfinite()):
            yield Difference(f'{what}: {int((~actual.isfinite()).sum())} values not finite, '
                             f'timm {int((~expected.isfinite()).sum())} of {expected.numel()}')
            return
        actual, expected = actual.nan_to_num(0., 0., 0.), expected.nan_to_num(0., 0., 0.)
        worst, largest = float((actual - expected).abs().max()), float(expected.abs().max())
    scale = max(largest, floor)
    bound = tolerance * scale
    if worst > bound and rounded is not None and rounded.shape == expected.shape:
        bound = max(bound, ROUNDING * float((rounded.detach().double() - expected).abs().max()))
    if not worst <= bound:
        yield Difference(f'{what}: off by {worst:.2g} where the largest is {scale:.2g}', is_of_values=True)


# Relative to the largest value. README: float32 to 1e-5, the inference form to 1e-4.
TOLERANCE = 1e-5
FUSED_TOLERANCE = 1e-4
# Of bfloat16 and float16, where the same sums in another order come out as far apart as this.
LOW_PRECISION_TOLERANCE = 6e-2
# There, many a ReLU comes out on the other side of zero.
LOW_PRECISION_GRADIENT_TOLERANCE = 0.3
# A gradient that cancels out (of a bias before a normalisation, say) is made of rounding errors of the size of the
# others: no gradient is held to more than the tolerance of this part of the largest one.
GRADIENT_FLOOR = 0.5


# How much more than timm's own numbers differ between its two memory formats ours may differ from them.
ROUNDING = 3.


def compare(
        program: Program,
        actual: Outcome,
        expected: Outcome,
        rounded: Optional[Outcome] = None,
) -> List[Difference]:
    """Where what a program made of one model differs from what it made of timm's.

    Args:
        program: The program.
        actual: Of the model.
        expected: Of timm's.
        rounded: Of timm's with the same sums in another order.
    """
    if actual.error is not None or expected.error is not None:
        ours, theirs = (
            'no exception' if outcome.error is None
            else f'{type(outcome.error).__name__} in {outcome.stage} ({str(outcome.error).splitlines()[:1]})'
            for outcome in (actual, expected)
        )
        if type(actual.error) is type(expected.error):
            # What came before it.
            tolerance = LOW_PRECISION_TOLERANCE if actual.case.low_precision else FUSED_TOLERANCE
            return [
                difference for name in expected.outputs if name in actual.outputs
                for difference in _compare_tensors(name, actual.outputs[name], expected.outputs[name], tolerance)]
        return [Difference(f'{ours}, timm {theirs}')]

    fused = expected.case.is_fused
    low = actual.case.low_precision
    tolerance = LOW_PRECISION_TOLERANCE if low else FUSED_TOLERANCE if fused else TOLERANCE
    found: List[Difference] = []
    # Of the inference form's layers under torch.func, which are others than those of timm's, the numbers.
    kinds = [
        ('', actual.outputs, expected.outputs, not (fused and actual.case.run is not None)),
        ('gradient of ', actual.gradients, expected.gradients, actual.gradients_have_strides),
        ('after it, ', actual.buffers, expected.buffers, False),
    ]
    for prefix, ours, theirs, with_strides in kinds:
        if set(ours) != set(theirs):
            found.append(Difference(f'{prefix or "outputs: "}{sorted(set(ours) ^ set(theirs))} only in one of both'))
        floor = GRADIENT_FLOOR * _largest(theirs) if prefix == 'gradient of ' else 0.
        if low and prefix == 'gradient of ':
            tolerance = LOW_PRECISION_GRADIENT_TOLERANCE
        for name in theirs:
            if name in ours:
                name_of = name if name.startswith(prefix) else f'{prefix}{name}'
                found.extend(_compare_tensors(
                    name_of,
                    ours[name],
                    theirs[name],
                    tolerance,
                    floor,
                    with_strides,
                    None if rounded is None else {
                        **rounded.outputs, **rounded.gradients, **rounded.buffers}.get(name),
                    # The parameters of the inference form are frozen.
                    compare_requires_grad=not fused,
                ))
    if actual.case.numbers_only:
        return found

    for what in ('calls', 'layouts', 'observed'):
        ours, theirs = getattr(actual.case, what), getattr(expected.case, what)
        if what == 'observed' and fused:
            # Who watches everything sees other modules and operators in the inference form, but no fewer convolutions.
            ours, theirs = (
                Counter({key: n for key, n in seen.items() if key in _SEEN_IN_BOTH_FORMS}) for seen in (ours, theirs))
        if ours == theirs:
            continue
        key = next(key for key in sorted({*ours, *theirs}, key=str) if ours[key] != theirs[key])
        name = dict(calls='hook', layouts='strides seen by a hook', observed='observer')[what]
        found.append(Difference(f'{name}: {key} {ours[key]} times, timm {theirs[key]}'))
        if what == 'calls':
            break  # the strides of other calls say nothing new
    return found


def differences(program: Program, ours: Callable[[Program], Outcome] = partial(execute, ours=True)) -> List[str]:
    """What of a program differs between our model and timm's, in words; nothing if they agree.

    A difference of values alone counts where it is larger than that between timm's own model in its two memory formats
    (README, "Limits": ours sums as timm's does in channels last), and shows with each of three random weights and
    images: an activation at the very edge of zero, which rounding puts on either side, does not come thrice.

    Args:
        program: The program.
        ours: What runs the other model, ours by default.
    """
    found: List[str] = []
    of_values: List[str] = []
    with _own_state(), lowered_thresholds():
        for seed in (program.seed, program.seed + 1000, program.seed + 2000):
            again = replace(program, seed=seed)
            actual, expected = ours(again), execute(again, ours=False)
            current = compare(again, actual, expected)
            if any(difference.is_of_values for difference in current):
                in_channels_last = replace(again, operations=('all_in_channels_last', *again.operations))
                current = compare(again, actual, expected, execute(in_channels_last, ours=False))
            values = [difference.text for difference in current if difference.is_of_values]
            if seed == program.seed:
                of_values = values
                found = [difference.text for difference in current if not difference.is_of_values]
            if not values:
                return found
    return of_values + found


def single_programs() -> Iterator[Program]:
    """Every operation by itself, in every way of running in which it says something."""
    for name, entry in OPERATIONS.items():
        for way in entry.ways:
            yield Program((name,), way, entry.size)


def random_program(seed: int) -> Program:
    """One to three operations, a way of running and a size, drawn by a seed."""
    rng = random.Random(seed)
    size, way = rng.choice(list(SIZES)), rng.choice(WAYS)
    names: List[str] = []
    count = rng.choice((1, 2, 2, 3, 3))
    categories = sorted({entry.category for entry in OPERATIONS.values()} - {'none'})
    while len(names) < count:
        # By category, or hooks would be half of all; compilation takes a second each time.
        kind = rng.choice(categories)
        entry = rng.choice([entry for entry in OPERATIONS.values() if entry.category == kind])
        if way not in entry.ways or entry.name in names or (kind == 'compiled in place' and rng.random() < 0.8):
            way = rng.choice(WAYS) if not names else way
            continue
        if not _go_together([*names, entry.name]):
            continue
        names.append(entry.name)
    return Program(tuple(names), way, size, seed)


_NOT_CHECKPOINTED = (
    'Sequential_forward_patched', 'vmap', 'vmap_of_features', 'func_grad', 'func_vjp', 'func_jvp', 'func_jacrev',
    'per_sample_gradients',
)


def _go_together(names: Sequence[str]) -> bool:
    """Whether a program of these operations has a meaning: see ``checkpointing``; two at once have none."""
    if sum(OPERATIONS[name].is_run for name in names) > 1:
        return False
    return 'checkpointing' not in names or not any(
        'blocks' in name or 'function_mode' in name or name in _NOT_CHECKPOINTED for name in names)


def shrink(program: Program, fails: Callable[[Program], bool]) -> Program:
    """The same program with the fewest operations with which it still fails."""
    names = program.operations
    for count in range(1, len(names)):
        # In order: each alone, then each without one.
        for kept in ([[name] for name in names] if count == 1 else [
                [other for other in names if other != name] for name in reversed(names)]):
            smaller = replace(program, operations=tuple(kept))
            if len(kept) == count and fails(smaller):
                return smaller
    return program


def _noisy(program: Program) -> Outcome:
    """Timm's class by other convolutions than oneDNN's, which round otherwise: what tolerances must bear."""
    with torch.backends.mkldnn.flags(enabled=False):
        return execute(program, ours=False)


def main(args: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--programs', type=int, default=0, metavar='N', help='run N random programs')
    parser.add_argument('--seed', type=int, default=0, help='seed of the first random program')
    parser.add_argument('--singly', action='store_true', help='run every operation by itself, in every way')
    parser.add_argument('--only', nargs='+', metavar='OPERATION', help='run these operations, one after the other')
    parser.add_argument('--way', choices=WAYS, help='a way of running, for --only and --singly')
    parser.add_argument('--size', choices=SIZES, help='a model, for --only and --singly')
    parser.add_argument('--list', action='store_true', help='print the operations')
    parser.add_argument('--self-check', action='store_true', help="a second copy of timm's class in the place of ours")
    parser.add_argument('--noise', action='store_true', help='the same by other convolutions, values alone compared')
    parsed = parser.parse_args(args)

    if parsed.list:
        for entry in OPERATIONS.values():
            print(f'{entry.category:28} {entry.name:60} {", ".join(entry.ways)}')
        return 0
    programs = [random_program(seed) for seed in range(parsed.seed, parsed.seed + parsed.programs)]
    if parsed.singly:
        programs += [
            replace(program, size=parsed.size or program.size) for program in single_programs()
            if parsed.way in (None, program.way)
        ]
    if parsed.only:
        unknown = set(parsed.only) - set(OPERATIONS)
        if unknown:
            parser.error(f'unknown operations: {sorted(unknown)}')
        programs += [
            Program(tuple(parsed.only), way, parsed.size or OPERATIONS[parsed.only[0]].size, parsed.seed)
            for way in ([parsed.way] if parsed.way else WAYS)
            if all(way in OPERATIONS[name].ways for name in parsed.only)
        ]

    run: Callable[[Program], List[str]] = differences
    if parsed.noise:
        run = lambda program: [text for text in differences(program, _noisy) if ': off by' in text]  # noqa: E731
    elif parsed.self_check:
        run = partial(differences, ours=partial(execute, ours=False))
    start, failed = time.perf_counter(), 0
    for program in programs:
        found = run(program)
        if not found:
            continue
        failed += 1
        smallest = shrink(program, lambda smaller: bool(run(smaller)))
        found = run(smallest) if smallest != program else found
        print(f'seed {program.seed}: {smallest}')
        for text in found[:3]:
            print(f'    {text}')
        if len(found) > 3:
            print(f'    and {len(found) - 3} more')
        sys.stdout.flush()
    print(f'{failed} of {len(programs)} programs differ; {time.perf_counter() - start:.0f} s')
    return int(failed > 0)


if __name__ == '__main__':
    sys.exit(main())
