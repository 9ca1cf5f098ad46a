"""Reads the weights of a Keras ConvMixer from an HDF5 file, with h5py and without Keras.

This is the ConvMixer of https://github.com/keras-team/keras-cv and of Keras's code examples. It is the paper's: an
even kernel pads one more on the right and the bottom, GELU is exact, the patch embedding has no padding. Keras's
defaults differ from PyTorch's: its batch normalisation adds 1e-3 to the variance, and images are scaled to [0, 1].

Keras has two layouts:

- ``save_weights('x.weights.h5')``: a group for each layer, named by the layer's class and a number that counts the
  layers of this class in the model's order: ``layers/conv2d_1/vars/0``.
- ``save_weights('x.h5')`` of Keras 2, and ``save('x.h5')``, which keeps the same under ``model_weights``: a group for
  each layer, by its own name. Attributes list layers and weights in the model's order.

An HDF5 file can point to other files, and can state any size for what it does not hold. So only hard links are
followed, and only datasets are read that lie in the file, uncompressed, with all their values.
"""
import mmap
import re
import struct
from pathlib import Path
from typing import Any, Dict, List, Tuple, Union

import torch

__all__ = ['BN_EPS', 'SIGNATURE', 'read_keras_weights']

# How every HDF5 file of Keras begins.
SIGNATURE = b'\x89HDF\r\n\x1a\n'
# Keras's default, which no ConvMixer of Keras changes.
BN_EPS = 1e-3

# Groups of layers named by class: since TensorFlow 2.13, and before.
_BY_CLASS = ('layers', '_layer_checkpoint_dependencies')
# PyTorch's names of the weights of each kind of layer, by Keras's and in Keras's order.
_CONVOLUTION = {'kernel': 'weight', 'bias': 'bias'}
_WEIGHTS = {
    'conv2d': _CONVOLUTION,
    'depthwise_conv2d': _CONVOLUTION,
    'batch_normalization': {
        'gamma': 'weight', 'beta': 'bias', 'moving_mean': 'running_mean', 'moving_variance': 'running_var'},
    'dense': _CONVOLUTION,
}
# Kernels have the channels last: (height, width, in, out), (height, width, channels, 1) and (in, out).
_AXES = {'conv2d': (3, 2, 0, 1), 'depthwise_conv2d': (2, 3, 0, 1), 'dense': (1, 0)}
_LAYER = re.compile(rf'({"|".join(_WEIGHTS)})(?:_([1-9]\d*))?')
# How a block of strings begins: a global heap of HDF5, version 1.
_HEAP = b'GCOL\1\0\0\0'
# Far more than any ConvMixer has: a bound for what a lying attribute can make h5py read.
_MOST_NAMES = 4096

# Each layer of the model in order: its kind, its group and the paths of its weights there, by Keras's names.
_Layers = List[Tuple[str, Any, Dict[str, str]]]


def _check_heaps(path: Union[str, Path]) -> None:
    """Check the lengths of the strings in a file: HDF5 2.0 searches a damaged block of strings for ever.

    Raises:
        ValueError: If they do not add up to the length of their block.
    """
    with open(path, 'rb') as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        start = content.find(_HEAP)
        while start >= 0:
            at, end = start + 16, start + int.from_bytes(content[start + 8:start + 16], 'little')
            # A string's number, from 1 on, then its length; both are padded to 8 bytes. The rest is number 0.
            while end - at >= 16:
                index, length = struct.unpack('<H6xQ', content[at:at + 16].ljust(16))
                at += 16 + -(-length // 8) * 8 if index else length
                if not index:
                    break
            if at > end or end - at >= 16:
                raise ValueError(f'the strings from byte {start} on do not fill their block.')
            start = content.find(_HEAP, start + 1)


class _Reader:
    """Reads groups, attributes and datasets of one open file, and nothing outside it."""

    def __init__(self, file: Any):
        self.bytes_left = file.id.get_filesize()

    def get(self, parent: Any, path: str) -> Any:
        """Return the group or dataset at a path below a group, without following soft or external links."""
        import h5py

        for name in path.split('/'):
            if not isinstance(parent, h5py.Group) or not name or name not in parent:
                raise ValueError(f'{parent.name} has no {name!r}.')
            if parent.id.links.get_info(name.encode()).type != h5py.h5l.TYPE_HARD:
                raise ValueError(f'{name!r} in {parent.name} is a link, and links are not followed.')
            parent = parent[name]
        return parent

    def names(self, group: Any, attribute: str) -> List[str]:
        """Return the names that an attribute lists."""
        if attribute not in group.attrs:
            raise ValueError(f'{group.name} has no attribute {attribute!r}.')
        shape = group.attrs.get_id(attribute).shape
        if len(shape) != 1 or shape[0] > _MOST_NAMES:
            raise ValueError(f'The attribute {attribute!r} of {group.name} is no list of names: its shape is {shape}.')
        names = group.attrs[attribute].tolist()
        return [name.decode() if isinstance(name, bytes) else str(name) for name in names]

    def tensor(self, group: Any, path: str, num_axes: int) -> torch.Tensor:
        """Return a dataset with a number of axes."""
        import h5py

        dataset = self.get(group, path)
        if not isinstance(dataset, h5py.Dataset) or dataset.dtype.kind != 'f' or dataset.dtype.itemsize > 8:
            found = dataset.dtype if isinstance(dataset, h5py.Dataset) else 'a group'
            raise ValueError(f'{dataset.name} must hold floating-point numbers, got {found}.')
        if len(dataset.shape or ()) != num_axes:
            raise ValueError(f'{dataset.name} must have {num_axes} axes, got the shape {dataset.shape}.')
        stored = 0 if dataset.external or dataset.is_virtual else dataset.id.get_storage_size()
        self.bytes_left -= dataset.nbytes
        if stored != dataset.nbytes or self.bytes_left < 0:
            raise ValueError(
                f'{dataset.name} states the shape {dataset.shape}, but the file does not hold as many values '
                'uncompressed.')
        return torch.from_numpy(dataset[()].astype(dataset.dtype.newbyteorder('='), copy=False))


def _kinds(depth: int, num_heads: int) -> List[str]:
    """Return the kind of each layer of a ConvMixer that has weights."""
    block = ['depthwise_conv2d', 'batch_normalization', 'conv2d', 'batch_normalization']
    return ['conv2d', 'batch_normalization'] + depth * block + num_heads * ['dense']


def _layers_by_class(reader: _Reader, parent: Any) -> _Layers:
    groups: Dict[str, List[Tuple[int, Any]]] = {kind: [] for kind in _WEIGHTS}
    for name in parent:
        group = reader.get(parent, name)
        known = _LAYER.fullmatch(name)
        if known:
            groups[known[1]].append((int(known[2] or 0), group))
        elif 'vars' in group and len(reader.get(group, 'vars')):
            raise ValueError(f'{group.name} has weights, but a ConvMixer has no such layer.')

    # In order, but not consecutive: TensorFlow 2.12 leaves out every other number.
    ordered = {kind: iter([group for _, group in sorted(groups[kind], key=lambda item: item[0])]) for kind in groups}
    kinds = _kinds(len(groups['depthwise_conv2d']), len(groups['dense']))
    counts = {kind: len(groups[kind]) for kind in groups}
    fits = all(count == kinds.count(kind) for kind, count in counts.items())
    if not fits or counts['dense'] > 1 or not counts['depthwise_conv2d']:
        raise ValueError(
            f'{", ".join(f"{count} {kind}" for kind, count in counts.items())} in {parent.name} are no ConvMixer.')
    layers = []
    for kind in kinds:
        group = next(ordered[kind])
        held = len(reader.get(group, 'vars'))
        if held != len(_WEIGHTS[kind]):
            raise ValueError(f'{group.name} has {held} weights, in a ConvMixer it has {len(_WEIGHTS[kind])}.')
        layers.append((kind, group, {name: f'vars/{number}' for number, name in enumerate(_WEIGHTS[kind])}))
    return layers


def _layers_by_name(reader: _Reader, parent: Any) -> _Layers:
    found = []
    for name in reader.names(parent, 'layer_names'):
        group = reader.get(parent, name)
        # 'conv2d_1/kernel' of Keras 3; 'conv2d_1/kernel:0' or 'depthwise_conv2d/depthwise_kernel:0' of Keras 2.
        paths = {
            path.rpartition('/')[2].removesuffix(':0').removeprefix('depthwise_'): path
            for path in reader.names(group, 'weight_names')}
        if paths:
            found.append((group, paths))

    depth, num_heads = divmod(len(found) - 2, 4)
    if depth < 1 or num_heads > 1:
        raise ValueError(
            f'{len(found)} layers have weights, but in a ConvMixer there are 2, then 4 a block, then 1 for a head.')
    layers = []
    for kind, (group, paths) in zip(_kinds(depth, num_heads), found):
        if set(paths) != set(_WEIGHTS[kind]):
            raise ValueError(
                f'{group.name} has {", ".join(paths)}, where a ConvMixer has {", ".join(_WEIGHTS[kind])} of a {kind}.')
        layers.append((kind, group, paths))
    return layers


def _state_dict(reader: _Reader, layers: _Layers) -> Dict[str, torch.Tensor]:
    modules = ['stem.0', 'stem.2']
    for index in range((len(layers) - 2) // 4):
        modules += [f'blocks.{index}.{module}' for module in ('0.fn.0', '0.fn.2', '1', '3')]
    modules.append('head')
    state_dict = {}
    for module, (kind, group, paths) in zip(modules, layers):
        for name, torch_name in _WEIGHTS[kind].items():
            axes = _AXES[kind] if name == 'kernel' else (0,)
            weight = reader.tensor(group, paths[name], len(axes))
            state_dict[f'{module}.{torch_name}'] = weight.permute(axes).contiguous()
    return state_dict


def read_keras_weights(path: Union[str, Path]) -> Dict[str, torch.Tensor]:
    """Read a ``.weights.h5`` or ``.h5`` file of Keras.

    Returns:
        The weights with timm's keys and axes.

    Raises:
        ModuleNotFoundError: If h5py is not installed.
        ValueError: If the file is damaged or holds something else.
    """
    try:
        import h5py
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{path} is an HDF5 file, which needs h5py: pip install 'timm-convmixer[keras]'.") from error
    try:
        _check_heaps(path)
        with h5py.File(path, 'r') as file:
            reader = _Reader(file)
            by_class = next((name for name in _BY_CLASS if name in file), None)
            if by_class:
                layers = _layers_by_class(reader, reader.get(file, by_class))
            else:
                layers = _layers_by_name(
                    reader, reader.get(file, 'model_weights') if 'model_weights' in file else file)
            return _state_dict(reader, layers)
    except ValueError as error:
        raise ValueError(f'{path} is damaged, or no ConvMixer of Keras: {error}') from error
    except Exception as error:
        # On damage, h5py raises OSError, KeyError, RuntimeError, TypeError, ...
        raise ValueError(f'{path} is damaged: {type(error).__name__}: {error}') from error
