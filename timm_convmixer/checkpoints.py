"""Converts other projects' checkpoints to timm's keys, and patch and kernel sizes to those of the model.

Known formats, with the keys of the stem's convolution, the first depthwise convolution and the head:

====================  ===========================  =====================================  ==================
format                stem                         first depthwise convolution            head
====================  ===========================  =====================================  ==================
``timm``              ``stem.0.weight``            ``blocks.0.0.fn.0.weight``             ``head.weight``
``official``          ``0.weight``                 ``3.0.fn.0.weight``                    ``{depth+5}.weight``
``openmmlab``         ``backbone.stem.0.weight``   ``backbone.stages.0.0.fn.0.weight``    ``head.fc.weight``
====================  ===========================  =====================================  ==================

``official`` is the flat ``nn.Sequential`` of https://github.com/locuslab/convmixer, its timm fork and
https://github.com/locuslab/convmixer-cifar10. ``openmmlab`` is https://github.com/open-mmlab/mmpretrain. Keys may have
the prefix of a wrapper: DataParallel (``module.``), torch.compile (``_orig_mod.``), Hugging Face transformers
(``timm_model.``) or a class that holds the model (``model.``).
"""
import logging
import re
from collections import Counter
from typing import Any, Dict, List, Mapping, Optional, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F

__all__ = [
    'UnknownFormatError', 'adapt_state_dict', 'checkpoint_filter_fn', 'convert_state_dict', 'download_url',
    'find_container', 'non_finite_weights', 'recognize_format', 'unwrap_state_dict', 'warn_of_non_finite_weights',
]

_logger = logging.getLogger(__name__)

_WRAPPERS = re.compile(r'^(?:(?:module|_orig_mod|timm_model|model)\.)+')
# Keys of the weights in a training checkpoint, in the order of timm's loader: averaged (EMA) weights first. OpenMMLab's
# 'ema_state_dict' is missing on purpose: its EMA hook saves the averaged weights as 'state_dict' and the others there.
_CONTAINERS = ('state_dict_ema', 'model_ema', 'state_dict', 'model')
_OFFICIAL_DEPTHWISE = re.compile(r'(\d+)\.0\.fn\.0\.weight')
_SAMPLE = 4


class UnknownFormatError(ValueError, RuntimeError):
    """These are no weights of a ConvMixer. Also a RuntimeError, which PyTorch raises for keys that do not fit."""


def _sample(keys: Sequence[str]) -> str:
    return ', '.join(map(repr, keys[:_SAMPLE])) + (f' and {len(keys) - _SAMPLE} more' if len(keys) > _SAMPLE else '')


def find_container(checkpoint: Mapping[str, Any]) -> Optional[str]:
    """Return the key of a training checkpoint's weights, averaged ones first, or None for a plain state dict."""
    return next((key for key in _CONTAINERS if isinstance(checkpoint.get(key), Mapping)), None)


def unwrap_state_dict(checkpoint: Mapping[str, Any]) -> Dict[str, Any]:
    """Return the weights of a training checkpoint or a plain state dict, without prefixes of wrappers.

    Raises:
        UnknownFormatError: If a key is not a string.
    """
    container = find_container(checkpoint)
    state_dict = checkpoint if container is None else checkpoint[container]
    foreign = next((key for key in state_dict if not isinstance(key, str)), None)
    if foreign is not None:
        raise UnknownFormatError(f'Not a known ConvMixer checkpoint: the key {foreign!r} is not a string.')
    return {_WRAPPERS.sub('', key): value for key, value in state_dict.items()}


def recognize_format(state_dict: Mapping[str, Any]) -> Optional[str]:
    """Return the format of an unwrapped state dict: ``'timm'``, ``'official'``, ``'openmmlab'`` or None."""
    if 'stem.0.weight' in state_dict and 'blocks.0.0.fn.0.weight' in state_dict:
        return 'timm'
    if '0.weight' in state_dict and '3.0.fn.0.weight' in state_dict:
        return 'official'
    if 'backbone.stem.0.weight' in state_dict and 'backbone.stages.0.0.fn.0.weight' in state_dict:
        return 'openmmlab'
    return None


def _official_key(key: str, depth: int) -> str:
    index, _, rest = key.partition('.')
    if not index.isdecimal():
        return key
    # Indices: 0 convolution, 1 activation, 2 normalisation; then the blocks; pooling, flattening; the head.
    if int(index) < 3:
        return f'stem.{key}'
    if int(index) < 3 + depth:
        return f'blocks.{int(index) - 3}.{rest}'
    if int(index) == 3 + depth + 2:
        return f'head.{rest}'
    return key


def _openmmlab_key(key: str) -> str:
    key = re.sub(r'^backbone\.stages\.', 'blocks.', key)
    key = re.sub(r'^backbone\.stem\.', 'stem.', key)
    return re.sub(r'^head\.fc\.', 'head.', key)


def convert_state_dict(state_dict: Mapping[str, Any]) -> Dict[str, Any]:
    """Rename the keys of a state dict or training checkpoint of any known format to timm's.

    Raises:
        UnknownFormatError: If the format is not known. The message shows some of the keys.
    """
    state_dict = unwrap_state_dict(state_dict)
    checkpoint_format = recognize_format(state_dict)
    if checkpoint_format is None and 'stem.conv.weight' in state_dict:
        raise UnknownFormatError(
            'This is an inference form (reparameterize_model), which cannot be converted back; use the checkpoint it '
            'was made from.')
    if checkpoint_format is None:
        raise UnknownFormatError(
            f'Not a known ConvMixer checkpoint: its keys are {_sample(list(state_dict))}. Known are timm\'s '
            '(stem.0.weight, blocks.0.0.fn.0.weight, ...), the official repository\'s (0.weight, 3.0.fn.0.weight, ...) '
            'and OpenMMLab\'s (backbone.stem.0.weight, backbone.stages.0.0.fn.0.weight, ...).'
        )
    if checkpoint_format == 'official':
        # The index of the last block, not the number of blocks: if one is missing, the others keep their places.
        depth = max(int(match[1]) for match in map(_OFFICIAL_DEPTHWISE.fullmatch, state_dict) if match) - 2
        return {_official_key(key, depth): value for key, value in state_dict.items()}
    if checkpoint_format == 'openmmlab':
        return {_openmmlab_key(key): value for key, value in state_dict.items()}
    return state_dict


def resize_depthwise_kernel(weight: torch.Tensor, kernel_size: int) -> torch.Tensor:
    """Zero-pad or crop depthwise kernels ``(C, 1, k, k)`` to ``(C, 1, kernel_size, kernel_size)``.

    Keeps the centre of ``padding='same'``, so that a padded kernel gives the same outputs.
    """
    old_size = weight.shape[-1]
    before = (kernel_size - 1) // 2 - (old_size - 1) // 2
    after = kernel_size - old_size - before
    return F.pad(weight, (before, after, before, after))


def _resize_weights(state_dict: Mapping[str, Any], target: Mapping[str, torch.Tensor]) -> Mapping[str, Any]:
    """Resize the patch embedding and the depthwise kernels to the target's sizes."""
    # Not at the top: importing timm registers the models, which imports this module.
    from timm.layers import resample_patch_embed

    resized = {}
    depthwise_sizes: Counter = Counter()
    for key, weight in state_dict.items():
        if key not in target or not isinstance(weight, torch.Tensor) or weight.ndim != 4:
            continue
        old_size, new_size = weight.shape[-2:], target[key].shape[-2:]
        if old_size == new_size:
            continue
        if key == 'stem.0.weight':
            _logger.info(f'Resampling the patch embedding from patch_size={old_size[0]} to {new_size[0]}.')
            resized[key] = resample_patch_embed(weight, list(new_size))
        elif key.endswith('.fn.0.weight'):
            depthwise_sizes[old_size[0], new_size[0]] += 1
            resized[key] = resize_depthwise_kernel(weight, new_size[0])
    for (old, new), count in depthwise_sizes.items():
        if new > old:
            _logger.info(f'Padding {count} depthwise kernels with zeros from kernel_size={old} to {new}.')
        else:
            _logger.warning(
                f'Cropping {count} depthwise kernels from kernel_size={old} to {new}: the outputs will differ.')
    # Copy only if needed: a copy loses the version numbers (_metadata) of a module's state dict.
    return {**state_dict, **resized} if resized else state_dict


def adapt_state_dict(state_dict: Mapping[str, Any], model: nn.Module, strict: bool = True) -> Mapping[str, Any]:
    """Rename the keys of a checkpoint to timm's, and resize its weights to the model's patch and kernel size.

    For another ``patch_size`` the patch embedding is resampled. For a larger ``kernel_size`` the depthwise kernels are
    padded with zeros, which keeps the outputs; for a smaller one they are cropped, with a warning. A state dict that
    shares any key with the model keeps all its keys.

    Args:
        state_dict: Weights of any known format, or a training checkpoint.
        model: The ConvMixer that will load them.
        strict: Whether to refuse weights of an unknown format, instead of returning them as they are.

    Raises:
        TypeError: If the state dict is not a mapping.
        UnknownFormatError: If ``strict``, the format is not known and no key is the model's.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f'state_dict must map keys to tensors, got {type(state_dict).__name__}.')
    target = model.state_dict()
    if state_dict and not target.keys() & state_dict.keys():
        container = find_container(state_dict)
        if container is not None:
            others = [other for other in _CONTAINERS if other != container and other in state_dict]
            _logger.log(
                logging.WARNING if others else logging.INFO,
                f'Loading {container!r} of a training checkpoint' + (f', not {others[0]!r}.' if others else '.'))
        try:
            state_dict = convert_state_dict(state_dict)
        except UnknownFormatError:
            if strict:
                raise
    return _resize_weights(state_dict, target)


def non_finite_weights(state_dict: Mapping[str, Any]) -> List[str]:
    """Return the keys of the weights that hold NaN or infinities, in order."""
    def is_finite(weight: torch.Tensor) -> bool:
        # A finite sum proves that all values are finite, and allocates nothing. It may overflow: then check each value.
        return bool(weight.sum().isfinite()) or bool(weight.isfinite().all())

    return [
        key for key, weight in state_dict.items()
        # Only plain tensors: subclasses, quantised and meta tensors may not support these operations.
        if type(weight) in (torch.Tensor, nn.Parameter) and not weight.is_meta and weight.layout == torch.strided
        and weight.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64) and not is_finite(weight)
    ]


def warn_of_non_finite_weights(state_dict: Mapping[str, Any]) -> None:
    """Log a warning that names weights with NaN or infinities, from diverged training or a damaged file."""
    keys = non_finite_weights(state_dict)
    if keys:
        _logger.warning(
            f'The checkpoint holds NaN or infinities, and so will the outputs: in {len(keys)} of {len(state_dict)} '
            f'tensors: {_sample(keys)}.')


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module, strict: bool = False) -> Dict[str, Any]:
    """Adapt pretrained weights, as ``filter_fn`` of timm's ``load_checkpoint`` and for ``pretrained=True``.

    timm loads pretrained weights non-strictly if ``num_classes`` differs. Without the check of ``strict``, a truncated
    checkpoint or one of another depth would then load without an error.

    Args:
        state_dict: Weights of any known format, or a training checkpoint.
        model: The ConvMixer that will load them.
        strict: Whether to check that only the head's are missing; ``pretrained_strict`` of timm's ``create_model``.

    Raises:
        ValueError: If ``strict`` and the format is not known.
        RuntimeError: If ``strict`` and weights other than the head's are missing or unexpected.
    """
    state_dict = dict(adapt_state_dict(state_dict, model, strict))
    if not strict:
        return state_dict
    target = model.state_dict().keys()
    # Optional for PyTorch too: old BatchNorms did not save num_batches_tracked.
    missing = [
        key for key in target if key not in state_dict and not key.startswith('head.')
        and not key.endswith('.num_batches_tracked')
    ]
    unexpected = [key for key in state_dict if key not in target and not key.startswith('head.')]
    if missing or unexpected:
        raise RuntimeError(
            f'The checkpoint does not fit this {type(model).__name__} of depth {len(model.blocks)}.'
            + (f' Missing keys: {_sample(missing)}.' if missing else '')
            + (f' Unexpected keys: {_sample(unexpected)}.' if unexpected else '')
        )
    return state_dict


def download_url(variant: str, kwargs: Mapping[str, Any]) -> Optional[str]:
    """Download the ``url`` of a pretrained cfg, if timm would load it, so that it can be the cfg's ``file`` instead.

    timm always loads a file with ``weights_only=True``. It loads a url again without it if the first attempt raises a
    TypeError, which a malicious pickle can cause.

    Args:
        variant: Name of the model.
        kwargs: Keyword arguments of ``create_model``.

    Returns:
        Path of the downloaded file, None if timm would load something else.
    """
    from timm.models import _builder, resolve_pretrained_cfg
    from timm.models._hub import download_cached_file

    cfg = resolve_pretrained_cfg(variant, kwargs.get('pretrained_cfg'), kwargs.get('pretrained_cfg_overlay'))
    elsewhere = cfg.source in ('hf-hub', 'local-dir') or cfg.state_dict or cfg.file or cfg.hf_hub_id
    if elsewhere or not cfg.url:
        return None
    # As set_pretrained_check_hash() and set_pretrained_download_progress() say, which timm's own download obeys.
    return download_cached_file(
        cfg.url,
        check_hash=_builder._CHECK_HASH,
        progress=_builder._DOWNLOAD_PROGRESS,
        cache_dir=kwargs.get('cache_dir'),
    )
