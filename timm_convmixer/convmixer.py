"""ConvMixer

Papers:
* `Patches Are All You Need?` - https://arxiv.org/abs/2201.09792

Original code and weights: https://github.com/locuslab/convmixer (MIT), CIFAR-10 variants from
https://github.com/locuslab/convmixer-cifar10 (MIT).
"""
import inspect
from functools import partial
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Tuple, Union

import torch
import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import LayerType, calculate_drop_path_rates
from timm.models import PretrainedCfg, build_model_with_cfg, generate_default_cfgs
from timm.models._features import feature_take_indices

from .arguments import check_int, check_names, check_number, create_pool, resolve_act_layer, resolve_norm_layer
from .checkpoints import adapt_state_dict, checkpoint_filter_fn, download_url, warn_of_non_finite_weights
from .inference import forward_inference
from .layers import ConvMixerBlock, ConvMixerStem
from .registry import register_model
from .routes import Plan, Route, make_plan
from .training import forward_training

__all__ = ['ConvMixer']


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
            act_layer: LayerType = nn.GELU,
            drop_path_rate: float = 0.,
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
            act_layer: Activation layer, by timm's name or as a class.
            drop_path_rate: Stochastic depth rate of the last block; the rates of the others rise to it from 0.
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
        dim = check_int('dim', dim, minimum=1)
        depth = check_int('depth', depth, minimum=1)
        kernel_size = check_int('kernel_size', kernel_size, minimum=1)
        patch_size = check_int('patch_size', patch_size, minimum=1)
        in_chans = check_int('in_chans', in_chans, minimum=1)
        num_classes = check_int('num_classes', num_classes, minimum=0)
        check_number('drop_rate', drop_rate, below=1.)
        check_number('drop_path_rate', drop_path_rate, below=1.)
        act_layer = resolve_act_layer(act_layer)
        norm_layer = resolve_norm_layer(norm_layer, dim, bn_momentum, bn_eps)

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
        self.global_pool = create_pool(global_pool)
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
        # Of a convolution: the scales of a half-precision inference form are float32.
        parameter = next((parameter for parameter in self.parameters() if parameter.dim() > 1), torch.empty(0))
        self.num_classes = check_int('num_classes', num_classes, minimum=0)
        if global_pool is not None:
            self.global_pool = create_pool(global_pool)
            self.global_pool.train(self.training)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.head = nn.Linear(
            self.head_hidden_size,
            self.num_classes,
            device=parameter.device,
            dtype=parameter.dtype,
        ) if self.num_classes > 0 else nn.Identity()
        self.head.train(self.training)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights, whichever project wrote them: see :func:`timm_convmixer.checkpoints.adapt_state_dict`.

        NaN and infinities are loaded as they are, with a warning that names where they are.
        """
        # Hooks of a user are to see what was given, and to be called by PyTorch alone.
        if not any(
            module._load_state_dict_pre_hooks or module._state_dict_hooks or module._state_dict_pre_hooks
            for module in self.modules()
        ):
            state_dict = adapt_state_dict(state_dict, self, strict)
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
            f'Output format must be one of NCHW, NHWC or NLC, got output_fmt={output_fmt}.'  # TorchScript knows no !r
        intermediates = []
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)

        if torch.jit.is_scripting() or not stop_early:  # can't slice blocks in torchscript
            blocks = self.blocks
        else:
            blocks = self.blocks[:max_index + 1]
        result = None
        if not torch.jit.is_scripting():
            result = self._forward_fast(x, blocks, take_indices)
        if result is not None:
            x, intermediates = result
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
        if not torch.jit.is_scripting():
            result = self._forward_fast(x, self.blocks)
            if result is not None:
                return result[0]
        x = self.stem(x)
        if self.grad_checkpointing:
            # As timm's checkpoint_seq() does: nothing that the container adds runs.
            for block in self.blocks:
                x = block(x)
        else:
            x = self.blocks(x)
        return x

    @torch.jit.ignore
    def route(self, x: torch.Tensor) -> Route:
        """Which way images ``(B, in_chans, H, W)`` would take through stem and blocks now, and why.

        Returns:
            The ``name``, ``'inference'``, ``'training'`` or ``'layers'``, and the ``reason``, which names the layer if
            it is a layer's doing.
        """
        plan = self._plan(x, self.blocks)
        return Route('layers', 'the stem or the blocks are not a module') if plan is None else plan.route

    @torch.jit.ignore
    def _plan(self, x: torch.Tensor, blocks: nn.Sequential, take_indices: Optional[List[int]] = None) -> Optional[Plan]:
        """How images go through stem and blocks, None where what stands in their place tells nothing."""
        if not isinstance(self.stem, nn.Module) or not isinstance(blocks, nn.Module):
            return None
        if take_indices is not None and type(blocks) is not nn.Sequential:
            return None  # it may iterate over other blocks
        # Intermediates are taken block by block, checkpoints as well: then nothing calls the container.
        container = blocks if take_indices is None and not self.grad_checkpointing else None
        return make_plan(x, self.stem, list(blocks._modules.values()), container, self.grad_checkpointing)

    @torch.jit.ignore
    def _forward_fast(
            self,
            x: torch.Tensor,
            blocks: nn.Sequential,
            take_indices: Optional[List[int]] = None,
    ) -> Optional[Tuple[torch.Tensor, List[torch.Tensor]]]:
        """Features and intermediates by the route of these images, None where the layers are to be called."""
        plan = self._plan(x, blocks, take_indices)
        if plan is None:
            return None
        modules = list(blocks._modules.values())
        if plan.route.name == 'inference':
            return forward_inference(x, plan, self.stem, modules, take_indices or [])
        if plan.route.name == 'training':
            return forward_training(x, plan, self.stem, modules, take_indices or [], self.grad_checkpointing)
        return None

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Features ``(B, C, H, W)`` to logits ``(B, num_classes)``, or to what the head takes if ``pre_logits``."""
        x = self.global_pool(x)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.forward_features(x)
        x = self.forward_head(x)
        return x


# Besides those of the signatures, build_model_with_cfg takes these out of its **kwargs.
_BUILD_ARGS = ('features_only', 'out_indices', 'feature_cls', 'pruned')
# Its arguments that are the variant's own.
_GIVEN_ARGS = ('model_cls', 'variant', 'pretrained', 'model_cfg', 'feature_cfg', 'pretrained_filter_fn', 'kwargs')


def _create_convmixer(variant: str, pretrained: bool = False, **kwargs) -> ConvMixer:
    build_args = inspect.signature(build_model_with_cfg).parameters.keys() - set(_GIVEN_ARGS)
    check_names(variant, kwargs, [*inspect.signature(ConvMixer).parameters, *sorted(build_args), *_BUILD_ARGS])
    overlay = kwargs.get('pretrained_cfg_overlay') or {}
    is_registered = not isinstance(kwargs.get('pretrained_cfg'), (dict, PretrainedCfg))
    if is_registered and (overlay.get('hf_hub_id') or overlay.get('url')) and 'file' not in overlay:
        # timm would rather load the file in the package.
        overlay = kwargs['pretrained_cfg_overlay'] = {**overlay, 'file': None}
    downloaded = download_url(variant, kwargs) if pretrained else None
    if downloaded is not None:
        kwargs['pretrained_cfg_overlay'] = {**overlay, 'file': downloaded}
    # The last three, as in timm's ConvMixer, which has no shallower ones.
    out_indices = kwargs.pop('out_indices', min(3, kwargs['depth']) if isinstance(kwargs.get('depth'), int) else 3)
    model = build_model_with_cfg(
        ConvMixer,
        variant,
        pretrained,
        pretrained_filter_fn=partial(checkpoint_filter_fn, strict=kwargs.get('pretrained_strict', True)),
        feature_cfg=dict(out_indices=out_indices, feature_cls='getter'),
        **kwargs,
    )
    cfg = model.pretrained_cfg
    if downloaded is not None:
        del cfg['file']  # on another machine there is none
    given = kwargs.get('pretrained_cfg')
    given = given if isinstance(given, dict) else vars(given) if isinstance(given, PretrainedCfg) else {}
    has_pool_size = 'pool_size' in overlay or bool(given.get('pool_size'))
    if isinstance(model, ConvMixer) and not has_pool_size and cfg.get('input_size'):
        # The window of timm's test-time pooling; not in the registered cfgs because it depends on patch_size.
        cfg['pool_size'] = tuple(side // model.patch_size for side in cfg['input_size'][1:])
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
    # KerasCV publishes a file of Keras, which `python -m timm_convmixer convert` reads.
    'tf_convmixer_512_16_ks8_p7.keras_in1k': _cfg(
        crop_pct=1.0, interpolation='bilinear', mean=(0., 0., 0.), std=(1., 1., 1.),
        license='apache-2.0', origin_url='https://github.com/keras-team/keras-cv'),
    'convmixer_256_8_ks5_p2.untrained': _cifar10_cfg(),
    'convmixer_256_8_ks9_p1.untrained': _cifar10_cfg(),
    'test_convmixer.digits': _cfg(
        file=str(_DIGITS_WEIGHTS),
        num_classes=10, input_size=(3, 32, 32), crop_pct=1.0,
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
def tf_convmixer_512_16_ks8_p7(pretrained: bool = False, **kwargs) -> ConvMixer:
    model_args = dict(dim=512, depth=16, kernel_size=8, patch_size=7, bn_eps=1e-3)
    return _create_convmixer('tf_convmixer_512_16_ks8_p7', pretrained, **dict(model_args, **kwargs))


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
