"""ConvMixer

Papers:
* `Patches Are All You Need?` - https://arxiv.org/abs/2201.09792

Original code and weights: https://github.com/locuslab/convmixer (MIT), CIFAR-10 variants from
https://github.com/locuslab/convmixer-cifar10 (MIT).
"""
import difflib
import inspect
import math
import operator
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple, Type, Union

import torch
import torch.fx
import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import LayerType, SelectAdaptivePool2d, calculate_drop_path_rates, get_act_layer, get_norm_layer
from timm.models import build_model_with_cfg, generate_default_cfgs, register_notrace_function, resolve_pretrained_cfg
from timm.models._features import feature_take_indices
from timm.models._hub import download_cached_file

from .checkpoints import adapt_state_dict, checkpoint_filter_fn, warn_of_non_finite_weights
from .inference import forward_in_place, runs_in_place
from .kernels.cpu.workspace import Workspace
from .kernels.support import has_onednn, use_fused
from .layers import (
    ConvMixerBlock,
    ConvMixerStem,
    checkpoint_exact,
    forward_segment,
    is_unmodified,
)
from .registry import register_model

__all__ = ['ConvMixer']


# One call in a symbolic trace, which cannot branch on sizes. A message is made where it is needed and not before: to
# name a size makes a constant of it, and what torch.compile compiles is then for that one size.
@torch.fx.wrap
@register_notrace_function
def check_images(x: torch.Tensor, in_chans: int, patch_size: int) -> torch.Tensor:
    """Return images ``(B, in_chans, H, W)`` as they are.

    Raises:
        AssertionError: If they have another number of dimensions or channels, or a side is less than ``patch_size``.
    """
    if not torch.jit.is_scripting():
        if torch.jit.is_tracing():  # where sizes are tensors, and each question is a warning
            return x
    if x.dim() != 4:
        raise AssertionError(f'Input has {x.dim()} dimensions, the model takes (B, in_chans={in_chans}, H, W).')
    if x.shape[1] != in_chans:
        raise AssertionError(f'Input has {x.shape[1]} channels, the model takes (B, in_chans={in_chans}, H, W).')
    if x.shape[2] < patch_size:
        raise AssertionError(f'Input height {x.shape[2]} is less than patch_size={patch_size}; enlarge the image.')
    if x.shape[3] < patch_size:
        raise AssertionError(f'Input width {x.shape[3]} is less than patch_size={patch_size}; enlarge the image.')
    return x


@torch.jit.ignore
def _channels_last_pays(x: torch.Tensor, patch_size: int, kernel_size: int) -> bool:
    if (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or x.device.type != 'cpu'
        or x.dtype not in (torch.float32, torch.bfloat16)
        or not x.is_contiguous()
        or not use_fused()
        or not has_onednn()
    ):
        return False
    # Measured: oneDNN's depthwise convolution in channels last falls behind where the kernel reaches over half the map,
    # and the copy that an even kernel needs costs inference of few images what the rest gains.
    small_map = 2 * kernel_size >= min(x.shape[2], x.shape[3]) // patch_size
    return not small_map and (kernel_size % 2 == 1 or x.shape[0] >= 4 or torch.is_grad_enabled())


# A symbolic trace knows neither device nor memory format: torch.fx and timm's feature extraction record the call.
@torch.fx.wrap
@register_notrace_function
def to_fast_memory_format(x: torch.Tensor, patch_size: int, kernel_size: int) -> torch.Tensor:
    """Images ``(B, in_chans, H, W)`` in the memory format in which a CPU runs this ConvMixer fastest.

    PyTorch's convolutions keep the memory format of their input, so channels last carries through the model. Left as
    they are: images on other devices, of other dtypes or in a memory format that the user chose, and what is compiled,
    traced or scripted. ``TIMM_CONVMIXER_FUSED=0`` switches it off.
    """
    if not torch.jit.is_scripting():
        if _channels_last_pays(x, patch_size, kernel_size):
            return x.contiguous(memory_format=torch.channels_last)
    return x


class ConvMixer(nn.Module):
    """ConvMixer: a patch embedding, ``depth`` equal blocks at one resolution, global pooling and a linear head.

    Same parameters, state-dict keys, initialisation and outputs as timm's own ConvMixer.
    """

    def __init__(
            self,
            dim: int,
            depth: int,
            kernel_size: int = 9,
            patch_size: int = 7,
            in_chans: int = 3,
            num_classes: int = 1000,
            global_pool: str = 'avg',
            drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            act_layer: LayerType = nn.GELU,
            norm_layer: LayerType = nn.BatchNorm2d,
            bn_momentum: Optional[float] = None,
            bn_eps: Optional[float] = None,
            device=None,
            dtype=None,
    ):
        """
        Args:
            dim: Number of channels of every block.
            depth: Number of blocks.
            kernel_size: Side of the depthwise kernels.
            patch_size: Side and stride of the patch embedding, in pixels.
            in_chans: Number of input image channels.
            num_classes: Number of classes, 0 for no head.
            global_pool: Pooling type of timm's ``SelectAdaptivePool2d``, ``''`` for none.
            drop_rate: Dropout rate before the head.
            drop_path_rate: Stochastic depth rate of the last block; the rates of the others rise to it from 0.
            act_layer: Activation layer, by timm's name or as a class.
            norm_layer: Normalisation layer for ``(B, C, H, W)``, by timm's name or as a class.
            bn_momentum: Momentum of the BatchNorms, PyTorch's default if None.
            bn_eps: Epsilon of the BatchNorms, PyTorch's default if None.

        Raises:
            TypeError: If a dimension is not an integer, a rate not a number, or a layer neither a name nor a class.
            ValueError: If a dimension or a rate is out of range, a layer name unknown, the normalisation one that does
                not take ``dim`` channels, or ``bn_momentum`` or ``bn_eps`` given with one that is not a BatchNorm.
        """
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        dim = _check_int('dim', dim, minimum=1)
        depth = _check_int('depth', depth, minimum=1)
        kernel_size = _check_int('kernel_size', kernel_size, minimum=1)
        patch_size = _check_int('patch_size', patch_size, minimum=1)
        in_chans = _check_int('in_chans', in_chans, minimum=1)
        num_classes = _check_int('num_classes', num_classes, minimum=0)
        _check_number('drop_rate', drop_rate, below=1.)
        _check_number('drop_path_rate', drop_path_rate, below=1.)
        act_layer = _resolve_act_layer(act_layer)
        norm_layer = _resolve_norm_layer(norm_layer, dim, bn_momentum, bn_eps)

        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = dim
        self.patch_size = patch_size
        self.kernel_size = kernel_size
        self.grad_checkpointing = False

        self.stem = ConvMixerStem(
            in_chans,
            dim,
            patch_size=patch_size,
            act_layer=act_layer,
            norm_layer=norm_layer,
            **dd,
        )
        self.blocks = nn.Sequential(*[
            ConvMixerBlock(
                dim,
                kernel_size=kernel_size,
                drop_path=drop_path,
                act_layer=act_layer,
                norm_layer=norm_layer,
                **dd,
            ) for drop_path in calculate_drop_path_rates(drop_path_rate, depth)
        ])
        self.feature_info = [dict(num_chs=dim, reduction=patch_size, module=f'blocks.{i}') for i in range(depth)]
        self.global_pool = _create_pool(global_pool)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(self.head_hidden_size, num_classes, **dd) if num_classes > 0 else nn.Identity()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        return dict(stem=r'^stem', blocks=r'^blocks\.(\d+)')

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Replace the head, and the pooling if one is named; device, dtype and training mode stay as they are."""
        parameter = next(self.parameters())
        self.num_classes = _check_int('num_classes', num_classes, minimum=0)
        if global_pool is not None:
            self.global_pool = _create_pool(global_pool)
            self.global_pool.train(self.training)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.head = nn.Linear(
            self.head_hidden_size,
            num_classes,
            device=parameter.device,
            dtype=parameter.dtype,
        ) if num_classes > 0 else nn.Identity()
        self.head.train(self.training)

    @torch.jit.ignore
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights, whichever project wrote them: see :func:`timm_convmixer.checkpoints.adapt_state_dict`.

        NaN and infinities are loaded as they are, with a warning that names where they are.
        """
        state_dict = adapt_state_dict(state_dict, self)
        warn_of_non_finite_weights(state_dict)
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: Optional[Union[int, List[int]]] = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]]]:
        """Forward features that returns intermediates.

        Args:
            x: Images ``(B, in_chans, H, W)``.
            indices: Take last n blocks if int, all if None, select matching indices if sequence.
            norm: Unused, there is no final norm: every block ends in one.
            stop_early: Stop after the last block that is taken.
            output_fmt: Shape of the intermediates, ``'NCHW'``, ``'NHWC'`` or ``'NLC'``.
            intermediates_only: Return the intermediates alone.

        Returns:
            Features ``(B, C, H, W)`` and list of intermediates, or just the intermediates.
        """
        assert output_fmt in ('NCHW', 'NHWC', 'NLC'), \
            f'Output format must be one of NCHW, NHWC or NLC, got output_fmt={output_fmt!r}.'
        intermediates = []
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)

        x = check_images(x, self.in_chans, self.patch_size)
        x = to_fast_memory_format(x, self.patch_size, self.kernel_size)
        if torch.jit.is_scripting() or not stop_early:  # can't slice blocks in torchscript
            blocks = self.blocks
        else:
            blocks = self.blocks[:max_index + 1]
        if not torch.jit.is_scripting() and self._runs_in_place(x):
            x, intermediates = self._forward_in_place(x, blocks, take_indices)
        elif not torch.jit.is_scripting() and self._takes_segments(x):
            x, intermediates = self._forward_segments(x, blocks, take_indices)
        else:
            x = self.stem(x)
            for i, block in enumerate(blocks):
                x = block(x)
                if i in take_indices:
                    intermediates.append(x)

        if output_fmt == 'NHWC':
            intermediates = [y.permute(0, 2, 3, 1).contiguous() for y in intermediates]
        elif output_fmt == 'NLC':
            intermediates = [y.flatten(2).transpose(1, 2).contiguous() for y in intermediates]

        if intermediates_only:
            return intermediates

        return x, intermediates

    def prune_intermediate_layers(
            self,
            indices: Union[int, List[int]] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> List[int]:
        """Prune layers not required for specified intermediates.

        Args:
            indices: Indices of the blocks whose outputs are taken.
            prune_norm: Unused, there is no final norm.
            prune_head: Whether to remove pooling and head as well.

        Returns:
            List of indices that were kept.
        """
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[:max_index + 1]
        if prune_head:
            self.reset_classifier(0, '')
        return take_indices

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images ``(B, in_chans, H, W)`` to features ``(B, C, H // patch_size, W // patch_size)``."""
        x = check_images(x, self.in_chans, self.patch_size)
        x = to_fast_memory_format(x, self.patch_size, self.kernel_size)
        if not torch.jit.is_scripting() and self._runs_in_place(x):
            x, _ = self._forward_in_place(x, self.blocks)
        elif not torch.jit.is_scripting() and self._takes_segments(x):
            x, _ = self._forward_segments(x, self.blocks)
        else:
            x = self.stem(x)
            x = self.blocks(x)
        return x

    @torch.jit.ignore
    def _runs_in_place(self, x: torch.Tensor) -> bool:
        return runs_in_place(x, self.stem, self.blocks)

    @torch.jit.ignore
    def _forward_in_place(
            self,
            x: torch.Tensor,
            blocks: nn.Sequential,
            take_indices: Sequence[int] = (),
    ) -> Tuple[torch.Tensor, List[torch.Tensor]]:
        return forward_in_place(x, self.stem, blocks, take_indices)

    @torch.jit.ignore
    def _takes_segments(self, x: torch.Tensor) -> bool:
        if self.grad_checkpointing:
            return True
        # What is compiled is left to the compiler, which chooses for itself what to keep.
        return (
            isinstance(x, torch.Tensor)
            and torch.is_grad_enabled()
            and use_fused()
            and not (torch.compiler.is_compiling() or torch.jit.is_tracing())
            and is_unmodified(self.blocks, nn.Sequential)
        )

    @torch.jit.ignore
    def _forward_segments(
            self,
            x: torch.Tensor,
            blocks: nn.Sequential,
            take_indices: Sequence[int] = (),
    ) -> Tuple[torch.Tensor, List[torch.Tensor]]:
        """Stem and blocks, keeping two maps a block for the backward pass, or one with gradient checkpointing.

        Segments end in a pointwise convolution, the one part of a block that is expensive and so is never computed
        twice. They begin with what the block before still has to do, its activation and normalisation. A block that is
        wrapped or hooked (by FSDP, say) must be called as a whole, and is its own segment.
        """
        intermediates = []
        workspace = Workspace()
        if is_unmodified(self.stem, ConvMixerStem):
            x, pending = self.stem[0](x), self.stem[1:]
        else:
            x, pending = self.stem(x), None
        for i, block in enumerate(blocks):
            if is_unmodified(block, ConvMixerBlock):
                x, pending = forward_segment(x, pending, block, self.grad_checkpointing, workspace), block[2:]
            elif self.grad_checkpointing:
                x, pending = checkpoint_exact(x, pending, block), None
            else:
                x, pending = block(x if pending is None else pending(x)), None
            if pending is not None and (i in take_indices or i == len(blocks) - 1):
                x, pending = pending(x), None
            if i in take_indices:
                intermediates.append(x)
        return x, intermediates

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Features ``(B, C, H, W)`` to logits ``(B, num_classes)``, or to what the head takes if ``pre_logits``."""
        x = self.global_pool(x)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.forward_features(x)
        x = self.forward_head(x)
        return x


def _check_int(name: str, value: Any, minimum: int) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        value = operator.index(value)
    except TypeError:
        raise TypeError(f'{name}={value!r} must be an integer of at least {minimum}.') from None
    if value < minimum:
        raise ValueError(f'{name}={value!r} must be an integer of at least {minimum}.')
    return value


def _check_number(name: str, value: Any, below: float = math.inf) -> None:
    right = 'a number of at least 0' + (f' and less than {below:g}' if below < math.inf else '')
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f'{name}={value!r} must be {right}.')
    if not 0. <= float(value) < below:
        raise ValueError(f'{name}={value!r} must be {right}.')


def _create_pool(global_pool: str) -> SelectAdaptivePool2d:
    known = ('', 'avg', 'max', 'avgmax', 'catavgmax', 'fast', 'fastavg', 'fastmax', 'fastavgmax', 'fastcatavgmax')
    if (global_pool or '') not in known:
        raise ValueError(f'Unknown global_pool={global_pool!r}, known: {", ".join(map(repr, known))}.')
    return SelectAdaptivePool2d(pool_type=global_pool, flatten=bool(global_pool))  # no flatten w/o pool


def _resolve_layer(
        name: str,
        layer: LayerType,
        resolve: Callable[[LayerType], Optional[Type[nn.Module]]],
        examples: str,
) -> Type[nn.Module]:
    if layer is not None and not isinstance(layer, str) and (isinstance(layer, nn.Module) or not callable(layer)):
        raise TypeError(f'{name}={layer!r} must be a name, or a class or function that makes a layer.')
    try:
        resolved = resolve(layer)
    except KeyError:
        resolved = None
    if resolved is None:
        raise ValueError(f'Unknown {name}={layer!r}; give a name that timm knows, such as {examples}, or a class.')
    return resolved


def _resolve_act_layer(act_layer: LayerType) -> Type[nn.Module]:
    return _resolve_layer('act_layer', act_layer, get_act_layer, "'gelu', 'relu' or 'silu'")


def _resolve_norm_layer(
        norm_layer: LayerType,
        dim: int,
        bn_momentum: Optional[float],
        bn_eps: Optional[float],
) -> Callable[..., nn.Module]:
    if norm_layer in ('layernorm', 'layernormfp32', 'rmsnorm', 'rmsnormfp32', 'simplenorm', 'simplenormfp32'):
        name_2d = norm_layer.replace('norm', 'norm2d')
        raise ValueError(f'norm_layer={norm_layer!r} takes channels last, the blocks are NCHW; use {name_2d!r}.')
    given_layer = norm_layer
    norm_layer = _resolve_layer(
        'norm_layer', norm_layer, get_norm_layer, "'batchnorm2d', 'groupnorm', 'groupnorm1' or 'layernorm2d'")
    bn_args = {k: v for k, v in dict(momentum=bn_momentum, eps=bn_eps).items() if v is not None}
    for name, value in bn_args.items():
        _check_number(f'bn_{name}', value)
    if not bn_args:
        try:
            norm_layer(dim, device='meta')
        except Exception as error:
            raise ValueError(f'norm_layer={given_layer!r} makes no layer for dim={dim} channels: {error}') from error
        return norm_layer
    norm_class = norm_layer.func if isinstance(norm_layer, partial) else norm_layer
    if not (isinstance(norm_class, type) and issubclass(norm_class, nn.modules.batchnorm._BatchNorm)):
        given = ' and '.join(f'bn_{k}={v!r}' for k, v in bn_args.items())
        raise ValueError(f'{given} needs a BatchNorm norm_layer, got norm_layer={norm_class!r}.')
    return partial(norm_layer, **bn_args)


# Arguments of a model's creation that build_model_with_cfg takes out of its **kwargs.
_BUILD_ARGS = ('features_only', 'out_indices', 'feature_cls', 'pruned')


def _check_model_args(variant: str, kwargs: Dict[str, Any]) -> None:
    model_args = list(inspect.signature(ConvMixer).parameters)
    known = {*model_args, *inspect.signature(build_model_with_cfg).parameters, *_BUILD_ARGS}
    for name, value in kwargs.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f'did you mean {close[0]!r}?' if close else f'known: {", ".join(model_args)}.'
            raise TypeError(f'{variant} has no argument {name!r} (got {name}={value!r}); {hint}')


def _url_as_file(variant: str, kwargs: Dict[str, Any]) -> Dict[str, Any]:
    """Arguments with the ``url`` of a pretrained cfg, where that is what timm would load, downloaded as its ``file``.

    timm loads files safely. A url it loads without that safety where the safe way raises a TypeError, as a pickle can.
    """
    cfg = resolve_pretrained_cfg(variant, kwargs.get('pretrained_cfg'), kwargs.get('pretrained_cfg_overlay')).to_dict()
    elsewhere = cfg.get('source') in ('hf-hub', 'local-dir') or any(
        cfg.get(source) for source in ('state_dict', 'file', 'hf_hub_id'))
    if elsewhere or not cfg.get('url'):
        return kwargs
    path = download_cached_file(cfg['url'], cache_dir=kwargs.get('cache_dir'))
    return {**kwargs, 'pretrained_cfg_overlay': {**(kwargs.get('pretrained_cfg_overlay') or {}), 'file': path}}


def _create_convmixer(variant: str, pretrained: bool = False, **kwargs) -> ConvMixer:
    _check_model_args(variant, kwargs)
    if pretrained:
        kwargs = _url_as_file(variant, kwargs)
    out_indices = kwargs.pop('out_indices', 3)
    model = build_model_with_cfg(
        ConvMixer,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=out_indices, feature_cls='getter'),
        **kwargs,
    )
    if isinstance(model, ConvMixer):
        # The window of timm's test-time pooling; not in the registered cfgs because it depends on patch_size.
        model.pretrained_cfg['pool_size'] = tuple(
            side // model.patch_size for side in model.pretrained_cfg['input_size'][1:])
    return model


def _cfg(url: str = '', **kwargs) -> Dict[str, Any]:
    return {
        'url': url,
        'num_classes': 1000, 'input_size': (3, 224, 224), 'pool_size': None,
        'crop_pct': .96, 'interpolation': 'bicubic',
        'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'stem.0', 'classifier': 'head', 'license': 'mit',
        'origin_url': 'https://github.com/locuslab/convmixer',
        'paper_name': 'Patches Are All You Need?', 'paper_ids': 'arXiv:2201.09792',
        **kwargs
    }


def _cifar10_cfg(**kwargs) -> Dict[str, Any]:
    return _cfg(**{
        'num_classes': 10, 'input_size': (3, 32, 32), 'crop_pct': 1.0,
        'mean': (0.4914, 0.4822, 0.4465), 'std': (0.2471, 0.2435, 0.2616),
        'origin_url': 'https://github.com/locuslab/convmixer-cifar10',
        **kwargs
    })


_DIGITS_WEIGHTS = Path(__file__).parent / 'weights' / 'test_convmixer.digits.safetensors'

default_cfgs = generate_default_cfgs({
    'convmixer_1536_20.in1k': _cfg(hf_hub_id='timm/'),
    'convmixer_1536_20_ks3_p7.untrained': _cfg(),
    'convmixer_1024_20_ks9_p14.in1k': _cfg(hf_hub_id='timm/'),
    'convmixer_1024_16_ks9_p7.untrained': _cfg(),
    'convmixer_1024_12_ks8_p7.untrained': _cfg(),
    'convmixer_768_32.in1k': _cfg(hf_hub_id='timm/'),
    'convmixer_512_16_ks8_p7.untrained': _cfg(),
    'convmixer_512_12_ks8_p7.untrained': _cfg(),
    'convmixer_256_8_ks5_p2.untrained': _cifar10_cfg(),
    'convmixer_256_8_ks9_p1.untrained': _cifar10_cfg(),
    'test_convmixer.digits': _cfg(
        file=str(_DIGITS_WEIGHTS),
        num_classes=10, input_size=(3, 32, 32), pool_size=(8, 8), crop_pct=1.0,
        mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5),
        label_names=tuple('0123456789'),
        description='Tiny ConvMixer trained on the digits of scikit-learn (load_digits), for tests and demonstration.',
        origin_url=None),
})


@register_model
def convmixer_1536_20(pretrained: bool = False, **kwargs) -> ConvMixer:
    model_args = dict(dim=1536, depth=20, kernel_size=9, patch_size=7)
    return _create_convmixer('convmixer_1536_20', pretrained, **dict(model_args, **kwargs))


@register_model
def convmixer_1536_20_ks3_p7(pretrained: bool = False, **kwargs) -> ConvMixer:
    model_args = dict(dim=1536, depth=20, kernel_size=3, patch_size=7)
    return _create_convmixer('convmixer_1536_20_ks3_p7', pretrained, **dict(model_args, **kwargs))


@register_model
def convmixer_1024_20_ks9_p14(pretrained: bool = False, **kwargs) -> ConvMixer:
    model_args = dict(dim=1024, depth=20, kernel_size=9, patch_size=14)
    return _create_convmixer('convmixer_1024_20_ks9_p14', pretrained, **dict(model_args, **kwargs))


@register_model
def convmixer_1024_16_ks9_p7(pretrained: bool = False, **kwargs) -> ConvMixer:
    model_args = dict(dim=1024, depth=16, kernel_size=9, patch_size=7)
    return _create_convmixer('convmixer_1024_16_ks9_p7', pretrained, **dict(model_args, **kwargs))


@register_model
def convmixer_1024_12_ks8_p7(pretrained: bool = False, **kwargs) -> ConvMixer:
    model_args = dict(dim=1024, depth=12, kernel_size=8, patch_size=7)
    return _create_convmixer('convmixer_1024_12_ks8_p7', pretrained, **dict(model_args, **kwargs))


@register_model
def convmixer_768_32(pretrained: bool = False, **kwargs) -> ConvMixer:
    model_args = dict(dim=768, depth=32, kernel_size=7, patch_size=7, act_layer=nn.ReLU)
    return _create_convmixer('convmixer_768_32', pretrained, **dict(model_args, **kwargs))


@register_model
def convmixer_512_16_ks8_p7(pretrained: bool = False, **kwargs) -> ConvMixer:
    model_args = dict(dim=512, depth=16, kernel_size=8, patch_size=7)
    return _create_convmixer('convmixer_512_16_ks8_p7', pretrained, **dict(model_args, **kwargs))


@register_model
def convmixer_512_12_ks8_p7(pretrained: bool = False, **kwargs) -> ConvMixer:
    model_args = dict(dim=512, depth=12, kernel_size=8, patch_size=7)
    return _create_convmixer('convmixer_512_12_ks8_p7', pretrained, **dict(model_args, **kwargs))


@register_model
def convmixer_256_8_ks5_p2(pretrained: bool = False, **kwargs) -> ConvMixer:
    model_args = dict(dim=256, depth=8, kernel_size=5, patch_size=2)
    return _create_convmixer('convmixer_256_8_ks5_p2', pretrained, **dict(model_args, **kwargs))


@register_model
def convmixer_256_8_ks9_p1(pretrained: bool = False, **kwargs) -> ConvMixer:
    model_args = dict(dim=256, depth=8, kernel_size=9, patch_size=1)
    return _create_convmixer('convmixer_256_8_ks9_p1', pretrained, **dict(model_args, **kwargs))


@register_model
def test_convmixer(pretrained: bool = False, **kwargs) -> ConvMixer:
    model_args = dict(dim=64, depth=4, kernel_size=5, patch_size=4)
    return _create_convmixer('test_convmixer', pretrained, **dict(model_args, **kwargs))
