"""Keras's HDF5 files: the same outputs as Keras's own models, and what is refused."""
import json
import os
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Callable, Dict

import numpy as np
import pytest
import timm
import torch

from support import assert_close, child_env, randomize_norms
from timm_convmixer import ConvMixer
from timm_convmixer import __main__ as command_line
from timm_convmixer.convert import convert_checkpoint, read_checkpoint
from timm_convmixer.filters import load_filters
from timm_convmixer.keras_hdf5 import SIGNATURE

h5py = pytest.importorskip('h5py', reason="needs h5py: pip install 'timm-convmixer[keras]'")

# What Keras saved and computed: tests/keras_files.py says how these were made.
with zipfile.ZipFile(Path(__file__).with_name('keras_files.zip')) as archive:
    SAVED = {name: archive.read(name) for name in archive.namelist()}
FILES = [name for name in SAVED if name.endswith('.h5')]
# One of each layout.
BY_CLASS, BY_NAME = 'keras3/model.weights.h5', 'kerascv/model_by_name.h5'
TINY = dict(dim=6, depth=2, kernel_size=3, patch_size=2, num_classes=3)


def unpack(folder: Path) -> Path:
    for name, content in SAVED.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def load(folder: Path, **kwargs: Any) -> ConvMixer:
    return timm.create_model(f'local-dir:{folder}', pretrained=True, **kwargs).eval()


@torch.no_grad()
def assert_same_outputs(path: Path, converted: Path, **kwargs: Any) -> None:
    """Compare a converted file with what Keras computed, beside the file: logits, or features without a head."""
    model = load(converted, **kwargs)
    images = torch.from_numpy(np.load(path.parent / 'images.npy')).permute(0, 3, 1, 2)
    config = timm.data.resolve_model_data_config(model)
    mean, std = (torch.tensor(config[key]).view(-1, 1, 1) for key in ('mean', 'std'))
    images = (images / 255. - mean) / std
    if path.name.startswith('headless'):
        expected = torch.from_numpy(np.load(path.parent / 'headless.npy')).permute(0, 3, 1, 2)
        assert_close(model.forward_features(images), expected)
    else:
        assert_close(model(images), torch.from_numpy(np.load(path.parent / 'model.npy')))


def write_by_class(model: ConvMixer, path: Path) -> None:
    """Write a model as ``save_weights('x.weights.h5')`` does."""
    block_layers = [
        layer for block in model.blocks for layer in (block[0].fn[0], block[0].fn[2], block[1], block[3])]
    head = [model.head] if model.num_classes else []
    counts: Dict[str, int] = {}
    with h5py.File(path, 'w') as file:
        for layer in (model.stem[0], model.stem[2], *block_layers, *head):
            values = [layer.weight, layer.bias]
            if isinstance(layer, torch.nn.Linear):
                kind, values[0] = 'dense', layer.weight.t()
            elif isinstance(layer, torch.nn.BatchNorm2d):
                kind, values = 'batch_normalization', [*values, layer.running_mean, layer.running_var]
            elif layer.groups > 1:
                kind, values[0] = 'depthwise_conv2d', layer.weight.permute(2, 3, 0, 1)
            else:
                kind, values[0] = 'conv2d', layer.weight.permute(2, 3, 1, 0)
            number = counts[kind] = counts.get(kind, -1) + 1
            for index, value in enumerate(values):
                file[f'layers/{kind}{f"_{number}" if number else ""}/vars/{index}'] = value.detach().numpy()


def tiny(**kwargs: Any) -> ConvMixer:
    torch.manual_seed(0)
    return randomize_norms(ConvMixer(**{**TINY, 'bn_eps': 1e-3, **kwargs})).eval()


# What is read.

@pytest.mark.parametrize('name', FILES)
def test_outputs_are_keras(name, tmp_path):
    path = unpack(tmp_path) / name
    conversion = convert_checkpoint(path, tmp_path / 'hub')
    assert conversion.checkpoint_format == 'keras' and conversion.container is None
    assert conversion.architecture == dict(
        dim=6, depth=5, kernel_size=4, patch_size=3, in_chans=3, num_classes=0 if 'headless' in name else 5)
    assert conversion.variant == 'tf_convmixer_512_16_ks8_p7' and conversion.activation == 'GELU'
    assert any('--bn-eps' in warning for warning in conversion.warnings)
    assert_same_outputs(path, tmp_path / 'hub')
    with pytest.raises(AssertionError):
        assert_same_outputs(path, tmp_path / 'hub', bn_eps=1e-5)  # the epsilon is felt


@pytest.mark.slow
@pytest.mark.parametrize('kerascv', [False, True], ids=['keras', 'kerascv'])
def test_outputs_are_keras_itself(kerascv, tmp_path):
    """The same with the Keras that is installed."""
    for package in ('tensorflow', 'keras_cv', 'tf_keras') if kerascv else ('keras',):
        if find_spec(package) is None:
            pytest.skip(f'needs {package}')
    env = dict(TF_USE_LEGACY_KERAS='1') if kerascv else dict(KERAS_BACKEND='torch')
    script = Path(__file__).with_name('keras_files.py')
    subprocess.run(
        [sys.executable, script, tmp_path / 'keras', *['--kerascv'][:kerascv]], env=child_env(**env), check=True)
    paths = sorted((tmp_path / 'keras').glob('*.h5'))
    assert len(paths) >= 4
    for path in paths:
        convert_checkpoint(path, tmp_path / path.stem)
        assert_same_outputs(path, tmp_path / path.stem)


@pytest.mark.parametrize('kwargs', [
    dict(), dict(depth=12), dict(in_chans=1), dict(num_classes=0), dict(kernel_size=8, patch_size=7),
    dict(kernel_size=1, patch_size=1)], ids=str)
def test_architectures(kwargs, tmp_path):
    reference = tiny(**kwargs)
    write_by_class(reference, tmp_path / 'model.weights.h5')
    convert_checkpoint(tmp_path / 'model.weights.h5', tmp_path / 'hub')
    converted = load(tmp_path / 'hub')
    for key, value in reference.state_dict().items():
        assert torch.equal(converted.state_dict()[key], value), key
    assert converted.stem[2].eps == 1e-3
    assert set(timm.data.resolve_model_data_config(converted)['mean']) == {0.}


def test_the_variant_of_kerascv(tmp_path):
    """The sizes are those of two variants, which differ in the epsilon and in the preprocessing."""
    name = 'tf_convmixer_512_16_ks8_p7'
    reference = timm.create_model(name).eval()
    write_by_class(reference, tmp_path / 'model.weights.h5')
    conversion = convert_checkpoint(tmp_path / 'model.weights.h5', tmp_path / 'hub')
    assert conversion.variant == name
    torch.save(reference.state_dict(), tmp_path / 'model.pth')
    assert convert_checkpoint(tmp_path / 'model.pth', tmp_path / 'other').variant == 'convmixer_512_16_ks8_p7'

    by_name = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(
        file=str(tmp_path / 'hub' / 'model.safetensors')))
    for model in (by_name, load(tmp_path / 'hub')):
        assert {module.eps for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)} == {1e-3}
        assert torch.equal(model.blocks[15][1].weight, reference.blocks[15][1].weight)
        config = timm.data.resolve_model_data_config(model)
        assert (list(config['mean']), list(config['std'])) == ([0., 0., 0.], [1., 1., 1.])
        assert (config['interpolation'], config['crop_pct']) == ('bilinear', 1.0)
    with pytest.raises(RuntimeError, match='No pretrained weights exist'):
        timm.create_model(name, pretrained=True)


def test_command(tmp_path, capsys):
    write_by_class(tiny(), tmp_path / 'model.h5')
    arguments = ['convert', str(tmp_path / 'model.h5'), str(tmp_path / 'hub')]
    assert command_line.main(arguments) == 0
    printed = capsys.readouterr()
    assert 'keras' in printed.out and 'bn_eps=0.001' in printed.out and '--bn-eps' in printed.err
    pretrained_cfg = json.loads((tmp_path / 'hub' / 'config.json').read_text())['pretrained_cfg']
    assert (pretrained_cfg['mean'], pretrained_cfg['std']) == ([0., 0., 0.], [1., 1., 1.])

    given = ['--force', '--bn-eps', '1e-4', '--mean', '0.1', '0.2', '0.3', '--std', '0.5', '0.5', '0.5']
    assert command_line.main([*arguments, *given]) == 0
    config = json.loads((tmp_path / 'hub' / 'config.json').read_text())
    assert config['model_args']['bn_eps'] == 1e-4
    assert config['pretrained_cfg']['mean'] == [0.1, 0.2, 0.3] and config['pretrained_cfg']['std'] == [0.5] * 3


def test_filters(tmp_path):
    model = tiny()
    write_by_class(model, tmp_path / 'model.h5')
    assert torch.equal(load_filters(checkpoint_path=tmp_path / 'model.h5')['stem.0.weight'], model.stem[0].weight)


@pytest.mark.parametrize('dtype', ['>f4', '<f8', '<f2'])
def test_dtypes(dtype, tmp_path):
    model = tiny()
    write_by_class(model, tmp_path / 'model.h5')
    expected = model.head.bias.detach().numpy().astype(dtype)
    with h5py.File(tmp_path / 'model.h5', 'a') as file:
        del file['layers/dense/vars/1']
        file['layers/dense/vars/1'] = expected
    bias = read_checkpoint(tmp_path / 'model.h5')['state_dict']['head.bias']
    assert bias.dtype == getattr(torch, f'float{8 * expected.itemsize}')
    assert np.array_equal(bias.numpy(), expected)


def test_without_h5py(tmp_path, monkeypatch, capsys):
    (tmp_path / 'model.h5').write_bytes(SAVED[BY_NAME])
    monkeypatch.setitem(sys.modules, 'h5py', None)  # importing it now raises ModuleNotFoundError
    assert command_line.main(['convert', str(tmp_path / 'model.h5'), str(tmp_path / 'hub')]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert 'model.h5' in error and "pip install 'timm-convmixer[keras]'" in error
    assert os.listdir(tmp_path) == ['model.h5']


# What is refused.

def assert_refused(path: Path, match: str) -> None:
    before = sorted(os.listdir(path.parent))
    with pytest.raises(ValueError, match=match) as error:
        convert_checkpoint(path, path.parent / 'hub')
    assert str(path) in str(error.value)
    assert sorted(os.listdir(path.parent)) == before


def replaced(path: str, **kwargs: Any) -> Callable[[Any], None]:
    """Write a dataset made by ``create_dataset(**kwargs)``, in place of the one there, if any."""
    def damage(file: Any) -> None:
        if path in file:
            del file[path]
        file.create_dataset(path, **kwargs)
    return damage


def linked(path: str, link: Any) -> Callable[[Any], None]:
    def damage(file: Any) -> None:
        del file[path]
        file[path] = link
    return damage


def virtual(path: str) -> Callable[[Any], None]:
    def damage(file: Any) -> None:
        layout = h5py.VirtualLayout(file[path].shape, 'f4')
        layout[:] = h5py.VirtualSource('elsewhere.h5', 'values', file[path].shape)
        del file[path]
        file.create_virtual_dataset(path, layout)
    return damage


def without(path: str) -> Callable[[Any], None]:
    def damage(file: Any) -> None:
        del file[path]
    return damage


def with_names(attribute: str, value: Any, group: str = '/') -> Callable[[Any], None]:
    def damage(file: Any) -> None:
        file[group].attrs[attribute] = value
    return damage


KERNEL, BIAS = 'layers/conv2d_1/vars/0', 'layers/dense/vars/1'
FILL = dict(shape=(1, 1, 2 ** 20, 2 ** 20), dtype='f4', chunks=(1, 1, 64, 64), fillvalue=1.)


@pytest.mark.parametrize('damage,match', [
    (without(KERNEL), 'conv2d_1 has 1 weights'),
    (without('layers/batch_normalization_3'), '10 batch_normalization.* no ConvMixer'),
    (without('layers/depthwise_conv2d_2/vars'), "depthwise_conv2d_2 has no 'vars'"),
    (without('layers'), "no attribute 'layer_names'"),
    (replaced(KERNEL, data=np.ones((6, 6), 'f4')), r'vars/0 must have 4 axes, got the shape \(6, 6\)'),
    (replaced(KERNEL, data=np.ones((1, 1, 6, 7), 'f4')), 'blocks.0.1.weight'),
    (replaced('layers/depthwise_conv2d/vars/0', data=np.ones((4, 5, 6, 1), 'f4')), 'kernels must be square'),
    (replaced(BIAS, data=np.float32(1)), r'must have 1 axes, got the shape \(\)'),
    (replaced(BIAS, data=h5py.Empty('f4')), 'must have 1 axes, got the shape None'),
    (replaced(BIAS, data=np.ones(5, 'i8')), 'must hold floating-point numbers, got int64'),
    (replaced(BIAS, data=['a'] * 5), 'must hold floating-point numbers, got object'),
    (replaced(BIAS, data=np.ones(5, 'c8')), 'must hold floating-point numbers, got complex64'),
    (replaced(BIAS, data=np.ones(5, np.longdouble)), 'must hold floating-point numbers, got float128'),
    (replaced(KERNEL, shape=(1, 1, 2 ** 20, 2 ** 20), dtype='f4'), 'does not hold as many values'),
    (replaced(KERNEL, **FILL), 'does not hold as many values'),
    (replaced(KERNEL, data=np.ones((1, 1, 6, 6), 'f4'), compression='gzip'), 'does not hold as many values'),
    (replaced(BIAS, shape=(5,), dtype='f4', external=[('elsewhere', 0, 20)]), 'does not hold as many values'),
    (virtual(KERNEL), 'does not hold as many values'),
    (linked(KERNEL, h5py.ExternalLink('elsewhere.h5', '/values')), "'0' in .* is a link"),
    (linked(KERNEL, h5py.SoftLink('/layers/conv2d_2/vars/0')), "'0' in .* is a link"),
    (linked('layers/conv2d_1', h5py.ExternalLink('elsewhere.h5', '/')), "'conv2d_1' in .* is a link"),
    (linked('layers', h5py.ExternalLink('elsewhere.h5', '/layers')), "'layers' in .* is a link"),
    (lambda file: linked(KERNEL, file['layers'])(file), 'must hold floating-point numbers, got a group'),
    (lambda file: linked('layers/conv2d_1', file[BIAS])(file), "has no 'vars'"),
    (replaced('layers/normalization/vars/0', data=np.ones(3, 'f4')), 'normalization has weights'),
    (replaced('layers/dense_1/vars/0', data=np.ones((5, 5), 'f4')), '2 dense'),
], ids=lambda value: value if isinstance(value, str) else 'damage')
def test_damage_by_class(damage, match, tmp_path, monkeypatch):
    refuse(BY_CLASS, damage, match, tmp_path, monkeypatch)


@pytest.mark.parametrize('damage,match', [
    (without('batch_normalization_13'), "has no 'batch_normalization_13'"),
    (without('predictions/predictions/bias:0'), "has no 'bias:0'"),
    (lambda file: file.attrs.__delitem__('layer_names'), "no attribute 'layer_names'"),
    (lambda file: file['predictions'].attrs.__delitem__('weight_names'), "predictions has no attribute 'weight_names'"),
    (with_names('layer_names', 'conv2d'), 'is no list of names'),
    (with_names('layer_names', np.full(5000, b'conv2d')), r'is no list of names: its shape is \(5000,\)'),
    (with_names('layer_names', [b'predictions']), '1 layers have weights'),
    (with_names('layer_names', ['']), "has no ''"),
    (with_names('layer_names', ['/predictions']), "has no ''"),
    (with_names('weight_names', ['predictions/kernel:0'], 'predictions'), 'predictions has kernel, where'),
    (with_names('weight_names', ['x/gamma:0', 'x/beta:0'], 'predictions'), 'predictions has gamma, beta, where'),
    (linked('predictions/predictions/bias:0', h5py.ExternalLink('elsewhere.h5', '/values')), "'bias:0' .* is a link"),
], ids=lambda value: value if isinstance(value, str) else 'damage')
def test_damage_by_name(damage, match, tmp_path, monkeypatch):
    refuse(BY_NAME, damage, match, tmp_path, monkeypatch)


def refuse(name: str, damage: Callable[[Any], None], match: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    # What links lead to would fit, so that following one would be seen.
    with h5py.File('elsewhere.h5', 'w') as file:
        file['values'] = np.ones((1, 1, 6, 6), 'f4')
    Path('elsewhere').write_bytes(bytes(20))
    path = folder / 'model.h5'
    path.write_bytes(SAVED[name])
    with h5py.File(path, 'a') as file:
        damage(file)
    assert_refused(path, match)


@pytest.mark.parametrize('name', [BY_CLASS, BY_NAME])
def test_cut_files(name, tmp_path):
    content = SAVED[name]
    for length in (0, 4, 8, 100, 2048, len(content) // 2, len(content) - 1):
        path = tmp_path / 'cut.h5'
        path.write_bytes(content[:length])
        assert_refused(path, 'is damaged')
    (tmp_path / 'cut.h5').write_bytes(SIGNATURE + b'\xff' * 4096)
    assert_refused(tmp_path / 'cut.h5', 'is damaged')


def test_a_block_of_strings_that_hdf5_searches_for_ever(tmp_path):
    content = bytearray(SAVED[BY_NAME])
    start = content.index(b'GCOL\1\0\0\0')
    content[start + 48:start + 1024] = bytes(976)
    (tmp_path / 'model.h5').write_bytes(content)
    assert_refused(tmp_path / 'model.h5', 'do not fill their block')


def test_other_models(tmp_path):
    """A model of convolutions, BatchNorms and a dense layer alone, in either layout."""
    def refused(layers: Dict[str, Any], match: str) -> None:
        with h5py.File(tmp_path / 'model.h5', 'w') as file:
            for path, shape in layers.items():
                file[path] = np.ones(shape, 'f4')
            file.attrs['layer_names'] = ['conv', 'dense']
            for group in ('conv', 'dense'):
                file.require_group(group).attrs['weight_names'] = ['kernel:0', 'bias:0']
        assert_refused(tmp_path / 'model.h5', match)

    refused({
        'layers/conv2d/vars/0': (3, 3, 3, 8), 'layers/conv2d/vars/1': 8,
        'layers/dense/vars/0': (8, 5), 'layers/dense/vars/1': 5,
    }, '1 conv2d, 0 depthwise_conv2d.* no ConvMixer')
    refused({
        'conv/kernel:0': (3, 3, 3, 8), 'conv/bias:0': 8, 'dense/kernel:0': (8, 5), 'dense/bias:0': 5,
    }, '2 layers have weights, but in a ConvMixer')
