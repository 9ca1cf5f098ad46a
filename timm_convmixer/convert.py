"""Converts a ConvMixer checkpoint to a folder for the Hugging Face Hub: configuration, weights and model card.

The architecture follows from the shapes of the weights. The activation has none, so these decide, in this order: the
user, train.py's arguments in the checkpoint, the registered variant of this architecture, and the running means (after
a ReLU none is negative). Keras's files record neither the epsilon of the BatchNorms nor the scaling of the pixels: they
are taken to be Keras's defaults unless the user says otherwise.
"""
import argparse
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import safetensors.torch
import timm
import torch
from huggingface_hub import ModelCardData
from timm.models import get_pretrained_cfg, save_for_hf

from .checkpoints import (
    convert_state_dict,
    find_container,
    non_finite_weights,
    recognize_format,
    unwrap_state_dict,
)
from .convmixer import ConvMixer
from .files import new_folder
from .keras_hdf5 import BN_EPS, SIGNATURE, read_keras_weights

__all__ = ['Conversion', 'convert_checkpoint', 'infer_architecture', 'read_checkpoint']

FILES = ('config.json', 'model.safetensors', 'README.md')

_SIZES = ('dim', 'depth', 'kernel_size', 'patch_size')
# Arguments of train.py that describe the model, besides its sizes.
_FROM_TRAINING = ('bn_momentum', 'bn_eps', 'norm_layer', 'global_pool')
# Other scripts have arguments of the same names that mean something else.
_TYPES: Dict[str, Any] = dict(
    act_layer=str, bn_momentum=(float, int), bn_eps=(float, int), norm_layer=str, global_pool=str)


@dataclass
class Conversion:
    """What a checkpoint holds, and the model it was converted to.

    Attributes:
        checkpoint_format: Format of the keys: ``'timm'``, ``'official'`` or ``'openmmlab'``; ``'keras'`` for HDF5.
        container: Key of the weights in a training checkpoint, None for a plain state dict.
        wrapper: Prefix that a wrapper added to the keys, such as ``'module.'``.
        architecture: ``dim``, ``depth``, ``kernel_size``, ``patch_size``, ``in_chans`` and ``num_classes``.
        variant: Registered name in config.json.
        model_args: Arguments that differ from the variant's.
        activation_source: How the activation was chosen.
        num_tensors: Number of tensors in the checkpoint.
        dtypes: Dtypes of these tensors.
        activation: Class name of the activation layer.
        num_parameters: Number of the model's parameters.
        warnings: What the user should check.
    """
    checkpoint_format: Optional[str]
    container: Optional[str]
    wrapper: str
    architecture: Dict[str, int]
    variant: str
    model_args: Dict[str, Any]
    activation_source: str
    num_tensors: int
    dtypes: List[str]
    activation: str = ''
    num_parameters: int = 0
    warnings: List[str] = field(default_factory=list)


def read_checkpoint(path: Union[str, Path]) -> Mapping[str, Any]:
    """Read a ``.safetensors``, PyTorch or Keras (HDF5) checkpoint onto the CPU without running code from it.

    Raises:
        ModuleNotFoundError: If it is an HDF5 file and h5py is not installed.
        OSError: If the file cannot be opened.
        ValueError: If it is damaged, no checkpoint, or a pickle of more than weights and plain data.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f'{path} is a folder; name the checkpoint in it.')
    with open(path, 'rb') as file:
        is_hdf5 = file.read(len(SIGNATURE)) == SIGNATURE
    if is_hdf5:
        state_dict = read_keras_weights(path)
        in_chans = state_dict['stem.0.weight'].shape[1]
        # In train.py's form, with what Keras does unless told otherwise.
        args = dict(bn_eps=BN_EPS, mean=in_chans * (0.,), std=in_chans * (1.,))
        return dict(format='keras', state_dict=state_dict, args=args)
    try:
        if path.suffix == '.safetensors':
            return safetensors.torch.load_file(path)
        # train.py saves its parsed arguments with the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except OSError:
        raise
    except Exception as error:
        # The unpickler fails on arbitrary bytes with IndexError, struct.error, UnicodeDecodeError, ...
        refused = re.search(r'GLOBAL (\S+)', str(error))
        if refused:
            raise ValueError(
                f'{path} is refused: it names {refused[1]}, and pickled code is never run.') from error
        # Only the first sentence: PyTorch goes on to suggest weights_only=False.
        reason = str(error).partition('\n')[0].partition('. ')[0]
        raise ValueError(f'{path} is damaged, or no checkpoint: {type(error).__name__}: {reason}') from error
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f'{path} holds a {type(checkpoint).__name__}, not a state dict or a training checkpoint.')
    return checkpoint


def infer_architecture(state_dict: Mapping[str, torch.Tensor]) -> Dict[str, int]:
    """Infer the architecture from the shapes of a state dict with timm's keys.

    Returns:
        ``dim``, ``depth``, ``kernel_size``, ``patch_size``, ``in_chans`` and ``num_classes`` (0 without a head).

    Raises:
        ValueError: If these are not the weights of a ConvMixer.
    """
    def shape(key: str, ndim: int) -> Tuple[int, ...]:
        weight = state_dict[key]
        if not isinstance(weight, torch.Tensor) or weight.ndim != ndim:
            given = tuple(weight.shape) if isinstance(weight, torch.Tensor) else type(weight).__name__
            raise ValueError(f'{key} must be a tensor of {ndim} dimensions, got {given}.')
        return tuple(weight.shape)

    dim, in_chans, patch_size, patch_width = shape('stem.0.weight', 4)
    *_, kernel_size, kernel_width = shape('blocks.0.0.fn.0.weight', 4)
    if patch_size != patch_width or kernel_size != kernel_width:
        raise ValueError(
            f'Patches and kernels must be square, got {patch_size}x{patch_width} and {kernel_size}x{kernel_width}.')
    blocks = {key.split('.')[1] for key in state_dict if key.startswith('blocks.') and key.endswith('.0.fn.0.weight')}
    return dict(
        dim=dim,
        depth=max(map(int, blocks)) + 1,
        kernel_size=kernel_size,
        patch_size=patch_size,
        in_chans=in_chans,
        num_classes=shape('head.weight', 2)[0] if 'head.weight' in state_dict else 0,
    )


@dataclass
class _Variant:
    sizes: Dict[str, int]
    act_layer: str
    bn_eps: float


def _act_layer(model: ConvMixer) -> str:
    return type(model.stem[1]).__name__


def _variants() -> Dict[str, _Variant]:
    """Return the registered variants with their default sizes and activation."""
    variants = {}
    for name in timm.list_models(module='convmixer'):
        model = timm.create_model(name, device='meta')
        sizes = (model.num_features, len(model.blocks), model.kernel_size, model.patch_size)
        variants[name] = _Variant(dict(zip(_SIZES, sizes)), _act_layer(model), model.stem[2].eps)
    return variants


def _training_args(checkpoint: Mapping[str, Any]) -> Dict[str, Any]:
    """Return the arguments of train.py in a checkpoint, without those that are None."""
    args = checkpoint.get('args')
    args = vars(args) if isinstance(args, argparse.Namespace) else args if isinstance(args, Mapping) else {}
    args = {key: value for key, value in args.items() if value is not None}
    if args.get('gp'):
        args['global_pool'] = args['gp']
    args['model'] = str(args.get('model') or checkpoint.get('arch')).partition('.')[0]
    return args


def _trained_with(args: Mapping[str, Any], named: str, variants: Mapping[str, _Variant]) -> Dict[str, Any]:
    """Return the arguments that the model was trained with, as far as train.py's arguments tell."""
    model_kwargs = args.get('model_kwargs')
    trained_with = {**args, **(model_kwargs if isinstance(model_kwargs, Mapping) else {})}
    trained_as = variants.get(args['model'])
    if trained_as is not None and named != args['model']:
        # The defaults of the variant to build on are not those that the weights were trained with.
        trained_with = {'act_layer': trained_as.act_layer.lower(), 'bn_eps': trained_as.bn_eps, **trained_with}
    return {key: value for key, value in trained_with.items() if isinstance(value, _TYPES.get(key, object))}


def _choose_variant(
        architecture: Dict[str, int],
        bn_eps: Optional[float],
        named: Optional[str],
        variants: Dict[str, _Variant],
) -> str:
    if named in variants:
        return named
    # The patch size comes first, because the image size depends on it.
    order = ('patch_size', 'kernel_size', 'dim', 'depth')

    def similarity(name: str) -> Tuple[bool, ...]:
        sizes = variants[name].sizes
        same = tuple(sizes[size] == architecture[size] for size in order)
        return (all(same), *same, bn_eps in (None, variants[name].bn_eps))

    return max(variants, key=similarity)


def _range_of_running_means(state_dict: Mapping[str, torch.Tensor]) -> Tuple[float, float]:
    means = [value.float() for key, value in state_dict.items() if key.endswith('running_mean')]
    return (
        min((mean.min().item() for mean in means), default=0.),
        max((mean.max().item() for mean in means), default=0.),
    )


def _choose_activation(
        state_dict: Mapping[str, torch.Tensor],
        given: Optional[str],
        trained_with: Optional[str],
        variant: str,
        own: str,
        is_variant: bool,
) -> Tuple[Optional[str], str, Optional[str]]:
    """Choose the activation.

    Args:
        state_dict: The weights, with timm's keys.
        given: What the user says, if anything.
        trained_with: What train.py's arguments say, if anything.
        variant: Name of the variant to build on.
        own: Class name of its activation.
        is_variant: Whether the checkpoint is this variant, not only similar to it.

    Returns:
        Its timm name, None for the variant's own; the source of the choice; and a warning if the weights contradict it.
    """
    smallest, largest = _range_of_running_means(state_dict)
    if given is not None:
        act_layer, source = given, '--act-layer'
    elif trained_with is not None:
        act_layer, source = trained_with, 'the arguments of train.py in the checkpoint'
    elif is_variant:
        act_layer, source = None, f'that of {variant}; weights do not record it'
    elif smallest < 0:
        act_layer, source = 'gelu', 'negative running means, which rule out ReLU'
    else:
        act_layer, source = None, f'that of {variant}, the most similar variant; weights do not record it'
    name = (act_layer or own).lower()
    doubt = None
    if name == 'relu' and smallest < -1e-3:
        doubt = f'a running mean is {smallest:.3g}, but ReLU gives none below 0; should --act-layer be gelu?'
    elif name == 'gelu' and smallest < -0.17:
        doubt = f'a running mean is {smallest:.3g}, but GELU gives none below -0.17; check --act-layer.'
    elif name == 'gelu' and smallest >= 0 and largest > 0 and given is None:
        doubt = 'no running mean is negative, as after ReLU, but GELU gives some; should --act-layer be relu?'
    return act_layer, source, doubt


def _model_card(name: str, conversion: Conversion, source: str, label_names: Optional[Sequence[str]]) -> str:
    data = ModelCardData(
        library_name='timm',
        pipeline_tag='image-classification' if conversion.architecture['num_classes'] else 'image-feature-extraction',
        tags=['timm', 'transformers', 'convmixer'],
    )
    architecture = ', '.join(f'`{key}={value}`' for key, value in conversion.architecture.items())
    classes = f'\n- **Classes:** {", ".join(label_names)}' if label_names and len(label_names) <= 100 else ''
    return f"""---
{data.to_yaml()}
---
# {name}

A ConvMixer ([Patches Are All You Need?](https://arxiv.org/abs/2201.09792)), converted from `{source}` by
timm-convmixer.

- **Architecture:** `{conversion.variant}` with {architecture}
- **Activation:** {conversion.activation}
- **Parameters:** {conversion.num_parameters:,}{classes}

The checkpoint does not record the training data, the accuracy or the licence: state them here.

## Use

```bash
pip install timm-convmixer
```

```python
import timm

model = timm.create_model('hf-hub:OWNER/{name}', pretrained=True).eval()  # or 'local-dir:FOLDER'
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
logits = model(transform(image).unsqueeze(0))
```
"""


def _write_folder(
        folder: Path,
        model: ConvMixer,
        model_args: Dict[str, Any],
        label_names: Optional[Sequence[str]],
) -> None:
    model_config = dict(label_names=list(label_names)) if label_names else None
    save_for_hf(model, str(folder), model_config=model_config, model_args=model_args, safe_serialization=True)
    config_path = folder / 'config.json'
    config = json.loads(config_path.read_text())
    # timm repeats num_classes and global_pool in model_args; transformers passes both twice and fails.
    config['model_args'] = model_args
    config_path.write_text(json.dumps(config, indent=2))


@torch.no_grad()
def _check_folder(folder: Path, model: ConvMixer, state_dict: Mapping[str, torch.Tensor]) -> None:
    """Load the folder as a user would. Compare its weights with the checkpoint and its outputs with the model's."""
    loaded = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    weights = loaded.state_dict()
    for key, value in state_dict.items():
        if key not in weights or not torch.equal(
                weights[key].nan_to_num(), value.to(weights[key].dtype).nan_to_num()):
            raise RuntimeError(f'{key} does not load as written: a bug of timm-convmixer, please report it.')
    side = 4 * model.patch_size
    images = torch.randn(1, model.in_chans, side, side, generator=torch.Generator().manual_seed(0))
    if not torch.equal(loaded(images).nan_to_num(), model.eval()(images).nan_to_num()):
        raise RuntimeError('The folder gives other outputs: a bug of timm-convmixer, please report it.')


def _training_data_config(args: Mapping[str, Any]) -> Dict[str, Any]:
    def is_numbers(value: Any) -> bool:
        return isinstance(value, (list, tuple)) and all(isinstance(item, (int, float)) for item in value)

    # Other scripts have arguments of the same names that mean something else, as with _TYPES.
    config = {key: args[key] for key in ('mean', 'std', 'input_size') if args.get(key) and is_numbers(args[key])}
    for key, types in ('crop_pct', (float, int)), ('interpolation', str):
        if args.get(key) and isinstance(args[key], types):
            config[key] = args[key]
    if len(config.get('input_size', ())) != 3:
        config.pop('input_size', None)
        # Other training scripts name the side of the images so.
        side = next((args[key] for key in ('input_size', 'img_size') if isinstance(args.get(key), int)), None)
        if side:
            config['img_size'] = side
    return config


def _check_data_config(given: Mapping[str, Any], architecture: Mapping[str, int]) -> None:
    """Raise ValueError for preprocessing that no image survives."""
    in_chans, patch_size = architecture['in_chans'], architecture['patch_size']
    for name in ('mean', 'std'):
        values = given.get(name)
        if values is None:
            continue
        if len(values) not in (1, in_chans):
            raise ValueError(
                f'{name}={values!r} must have one value for each of the {in_chans} channels, or one for all.')
        if not all(math.isfinite(value) and (name == 'mean' or value > 0) for value in values):
            raise ValueError(f'{name}={values!r} must be finite{"" if name == "mean" else " and greater than 0"}.')
    crop_pct, img_size = given.get('crop_pct', 1.), given.get('img_size', patch_size)
    if not 0 < crop_pct < math.inf:
        raise ValueError(f'crop_pct={crop_pct!r} must be a finite number greater than 0.')
    if img_size < patch_size:
        raise ValueError(f'img_size={img_size!r} must be at least the size of a patch, {patch_size}.')


# Entries of a variant's pretrained cfg that describe its own weights.
_OF_OTHER_WEIGHTS = (
    'url', 'file', 'hf_hub_id', 'tag', 'label_names', 'label_descriptions', 'description', 'license', 'origin_url',
    'notes',
)


def _pretrained_cfg(variant: str, architecture: Mapping[str, int], data_config: Mapping[str, Any]) -> Dict[str, Any]:
    cfg = {key: value for key, value in get_pretrained_cfg(variant).to_dict().items() if key not in _OF_OTHER_WEIGHTS}
    data_config = dict(data_config)
    side = data_config.pop('img_size', None)
    cfg.update(data_config, architecture=variant, num_classes=architecture['num_classes'])
    height, width = (side, side) if side else cfg['input_size'][1:]
    cfg['input_size'] = (architecture['in_chans'], height, width)
    cfg['pool_size'] = (height // architecture['patch_size'], width // architecture['patch_size'])
    return cfg


def _model_args(
        state_dict: Mapping[str, torch.Tensor],
        architecture: Mapping[str, int],
        variant: _Variant,
        act_layer: Optional[str],
        trained_with: Mapping[str, Any],
) -> Dict[str, Any]:
    """Return the arguments that differ from the variant's."""
    model_args: Dict[str, Any] = {
        size: architecture[size] for size in _SIZES if architecture[size] != variant.sizes[size]}
    if architecture['in_chans'] != 3:
        model_args['in_chans'] = architecture['in_chans']
    if act_layer is not None and act_layer.lower() != variant.act_layer.lower():
        model_args['act_layer'] = act_layer
    head = state_dict.get('head.weight')
    if head is not None and head.shape[1] == 2 * architecture['dim']:
        model_args['global_pool'] = 'catavgmax'
    return {**model_args, **{key: trained_with[key] for key in _FROM_TRAINING if trained_with.get(key) is not None}}


def _labels(
        checkpoint: Mapping[str, Any],
        label_names: Optional[Sequence[str]],
        num_classes: int,
) -> Optional[List[str]]:
    if label_names is not None:
        if len(label_names) != num_classes:
            raise ValueError(
                f'label_names (--labels) names {len(label_names)} classes, the checkpoint has {num_classes}.')
        return list(label_names)
    # OpenMMLab saves them with the weights.
    meta = checkpoint.get('meta')
    dataset = meta.get('dataset_meta') if isinstance(meta, Mapping) else None
    known = dataset.get('classes') if isinstance(dataset, Mapping) else None
    return list(known) if known and len(known) == num_classes else None


def _recognize(
        checkpoint: Mapping[str, Any],
        model: Optional[str],
        act_layer: Optional[str],
        bn_eps: Optional[float],
) -> Tuple[Conversion, Dict[str, torch.Tensor]]:
    """Recognise a checkpoint, and return its weights with timm's keys."""
    variants = _variants()
    container = find_container(checkpoint)
    unwrapped = unwrap_state_dict(checkpoint)
    state_dict = convert_state_dict(checkpoint)
    architecture = infer_architecture(state_dict)

    args = _training_args(checkpoint)
    named = model or args['model']
    trained_with = _trained_with(args, named, variants)
    if bn_eps is not None:
        trained_with['bn_eps'] = bn_eps
    variant = _choose_variant(architecture, trained_with.get('bn_eps'), named, variants)
    is_variant = variant == named or all(architecture[size] == variants[variant].sizes[size] for size in _SIZES)
    chosen_act, source, doubt = _choose_activation(
        state_dict, act_layer, trained_with.get('act_layer'), variant, variants[variant].act_layer, is_variant)

    weights = [value for value in state_dict.values() if isinstance(value, torch.Tensor)]
    warnings = [doubt] if doubt else []
    is_keras = checkpoint.get('format') == 'keras'
    if is_keras:
        warnings.append(
            'Keras records neither the epsilon of its BatchNorms nor the scaling of the pixels. Its defaults are '
            f'written, {BN_EPS:g} and [0, 1], where --bn-eps, --mean and --std say nothing else.')
    if non_finite_weights(state_dict):
        warnings.append('the weights hold NaN or infinities, and so will the outputs.')
    return Conversion(
        checkpoint_format='keras' if is_keras else recognize_format(unwrapped),
        container=None if is_keras else container,
        wrapper=_wrapper(checkpoint if container is None else checkpoint[container], unwrapped),
        architecture=architecture,
        variant=variant,
        model_args=_model_args(state_dict, architecture, variants[variant], chosen_act, trained_with),
        activation_source=source,
        num_tensors=len(weights),
        dtypes=sorted({str(weight.dtype).replace('torch.', '') for weight in weights if weight.is_floating_point()}),
        warnings=warnings,
    ), state_dict


def _wrapper(keys: Mapping[str, Any], unwrapped: Mapping[str, Any]) -> str:
    return next((key[:len(key) - len(bare)] for key, bare in zip(keys, unwrapped) if key != bare), '')


def convert_checkpoint(
        checkpoint_path: Union[str, Path],
        folder: Union[str, Path],
        model: Optional[str] = None,
        act_layer: Optional[str] = None,
        bn_eps: Optional[float] = None,
        label_names: Optional[Sequence[str]] = None,
        data_config: Optional[Mapping[str, Any]] = None,
        replace: bool = False,
        report: Callable[[str], None] = lambda step: None,
) -> Conversion:
    """Convert a checkpoint of any known format to a folder for timm's ``local-dir:`` or, uploaded, ``hf-hub:``.

    The folder is loaded and compared with the checkpoint before it appears.

    Args:
        checkpoint_path: A ``.safetensors`` file, one that ``torch.load`` reads with ``weights_only=True``, or Keras's
            ``.weights.h5`` or ``.h5``.
        folder: Folder to create, with ``config.json``, ``model.safetensors`` and ``README.md``.
        model: Variant to build on, instead of the one recognised.
        act_layer: Timm name of the activation, instead of the one recognised.
        bn_eps: Epsilon of the BatchNorms, instead of the training's, Keras's or the variant's.
        label_names: Names of the classes.
        data_config: Preprocessing (``img_size``, ``mean``, ``std``, ``crop_pct``), instead of the training's or the
            variant's.
        replace: Whether to replace the folder of an earlier conversion.
        report: Called with a description of each step.

    Raises:
        ModuleNotFoundError: If the checkpoint is an HDF5 file and h5py is not installed.
        OSError: If the checkpoint cannot be opened, or the folder cannot be written.
        ValueError: If the checkpoint is damaged or not a ConvMixer's, or an argument does not fit it.
    """
    known = timm.list_models(module='convmixer')
    model = None if model is None else model.partition('.')[0]  # a tag names weights
    if model is not None and model not in known:
        raise ValueError(f'model={model!r} is not a registered ConvMixer; choose from {", ".join(known)}.')
    with new_folder(folder, FILES, replace=replace) as workplace:
        report(f'reading {checkpoint_path}')
        checkpoint = read_checkpoint(checkpoint_path)
        try:
            conversion, state_dict = _recognize(checkpoint, model, act_layer, bn_eps)
        except ValueError as error:
            raise ValueError(f'{checkpoint_path}: {error}') from error
        num_classes = conversion.architecture['num_classes']
        label_names = _labels(checkpoint, label_names, num_classes)
        given = {key: value for key, value in (data_config or {}).items() if value is not None}
        _check_data_config(given, conversion.architecture)

        report('building the model')
        converted = timm.create_model(conversion.variant, num_classes=num_classes, **conversion.model_args)
        try:
            converted.load_state_dict(state_dict)
        except RuntimeError as error:
            raise ValueError(f'{checkpoint_path} does not fit the ConvMixer that its shapes imply: {error}') from error
        data_config = {**_training_data_config(_training_args(checkpoint)), **given}
        converted.pretrained_cfg = converted.default_cfg = _pretrained_cfg(
            conversion.variant, conversion.architecture, data_config)
        conversion.activation = _act_layer(converted)
        conversion.num_parameters = sum(parameter.numel() for parameter in converted.parameters())

        report(f'writing {folder}')
        _write_folder(workplace, converted, conversion.model_args, label_names)
        card = _model_card(Path(folder).resolve().name, conversion, Path(checkpoint_path).name, label_names)
        (workplace / 'README.md').write_text(card, encoding='utf-8')
        report('checking what was written')
        _check_folder(workplace, converted, state_dict)
    return conversion
