"""``python -m timm_convmixer convert``: from every known format to a folder that timm and transformers load."""
import argparse
import json
import os
import re
import shutil
import stat
from copy import deepcopy

import pytest
import safetensors.torch
import timm
import torch
import torch.nn as nn
from timm.models.convmixer import ConvMixer as TimmConvMixer
from timm.utils import CheckpointSaver, ModelEmaV2

from references import official_convmixer, openmmlab_convmixer
from support import assert_close, randomize_norms
from timm_convmixer import ConvMixer
from timm_convmixer import __main__ as command_line
from timm_convmixer.convert import convert_checkpoint, read_checkpoint
from timm_convmixer.files import new_folder, write_atomically

TINY = dict(dim=12, depth=3, kernel_size=5, patch_size=4, num_classes=5)
DIGITS = dict(dim=64, depth=4, kernel_size=5, patch_size=4, num_classes=10)


def build(builder, seed: int = 0, **kwargs) -> nn.Module:
    torch.manual_seed(seed)
    return randomize_norms(builder(**{**TINY, **kwargs}), seed).eval()


def load(folder) -> ConvMixer:
    return timm.create_model(f'local-dir:{folder}', pretrained=True).eval()


def images(in_chans: int = 3) -> torch.Tensor:
    return torch.randn(2, in_chans, 20, 16, generator=torch.Generator().manual_seed(1))


def train_py(trained: nn.Module, folder, **args):
    """Save a checkpoint with train.py's own saver. The averaged weights come from another seed."""
    saver = CheckpointSaver(
        trained,
        torch.optim.AdamW(trained.parameters()),
        args=argparse.Namespace(**args),
        model_ema=ModelEmaV2(randomize_norms(deepcopy(trained), seed=7)),
        checkpoint_dir=str(folder),
        recovery_dir=str(folder),
    )
    saver.save_checkpoint(epoch=1)
    return folder / 'last.pth.tar'


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
@pytest.mark.parametrize('builder,checkpoint_format', [
    (TimmConvMixer, 'timm'), (official_convmixer, 'official'), (openmmlab_convmixer, 'openmmlab')])
def test_formats(builder, checkpoint_format, suffix, tmp_path):
    reference = build(builder)
    path = tmp_path / f'checkpoint{suffix}'
    if suffix == '.safetensors':
        safetensors.torch.save_file(reference.state_dict(), path)
    else:
        torch.save(nn.DataParallel(reference).state_dict(), path)
    conversion = convert_checkpoint(path, tmp_path / 'hub')
    assert conversion.checkpoint_format == checkpoint_format and conversion.container is None
    assert conversion.wrapper == ('' if suffix == '.safetensors' else 'module.')
    assert conversion.architecture == {**TINY, 'in_chans': 3}
    # No variant has these sizes: the most similar one gives the name, and negative running means rule out ReLU.
    assert conversion.variant == 'test_convmixer' and conversion.model_args == dict(dim=12, depth=3)
    assert conversion.activation == 'GELU' and 'running means' in conversion.activation_source
    loaded = load(tmp_path / 'hub')
    assert type(loaded) is ConvMixer
    assert_close(loaded(images()), reference(images()))
    assert sorted(os.listdir(tmp_path / 'hub')) == ['README.md', 'config.json', 'model.safetensors']
    assert sorted(os.listdir(tmp_path)) == sorted(['hub', path.name])


def test_train_py_gives_averaged_weights_and_what_it_trained_with(tmp_path):
    model = timm.create_model(
        'convmixer_512_12_ks8_p7', **TINY, act_layer='silu', bn_eps=1e-3, norm_layer='batchnorm2d')
    path = train_py(
        model, tmp_path, model='convmixer_512_12_ks8_p7', model_kwargs=dict(dim=12, depth=3, act_layer='silu'),
        bn_eps=1e-3, mean=(0.1, 0.2, 0.3), img_size=36, lr=0.1, gp=None)
    conversion = convert_checkpoint(path, tmp_path / 'hub')
    assert conversion.container == 'state_dict_ema' and conversion.variant == 'convmixer_512_12_ks8_p7'
    assert conversion.model_args == dict(
        dim=12, depth=3, kernel_size=5, patch_size=4, act_layer='silu', bn_eps=1e-3)
    loaded = load(tmp_path / 'hub')
    assert type(loaded.stem[1]) is nn.SiLU and loaded.stem[2].eps == 1e-3
    config = timm.data.resolve_model_data_config(loaded)
    assert tuple(config['mean']) == (0.1, 0.2, 0.3) and tuple(config['input_size']) == (3, 36, 36)
    averaged = torch.load(path, weights_only=False)['state_dict_ema']
    assert all(torch.equal(value, averaged[key]) for key, value in loaded.state_dict().items())


@pytest.mark.parametrize('kwargs', [
    dict(in_chans=1), dict(num_classes=0), dict(global_pool='catavgmax'), dict(kernel_size=8, patch_size=7)], ids=str)
def test_architectures(kwargs, tmp_path):
    reference = build(ConvMixer, **kwargs)
    torch.save(reference.state_dict(), tmp_path / 'checkpoint.pth')
    convert_checkpoint(tmp_path / 'checkpoint.pth', tmp_path / 'hub')
    loaded = load(tmp_path / 'hub')
    x = images(kwargs.get('in_chans', 3))
    assert_close(loaded(x), reference(x))


def test_a_registered_variant_brings_its_activation(tmp_path):
    reference = timm.create_model('convmixer_768_32', depth=32, num_classes=3)
    torch.save(reference.state_dict(), tmp_path / 'checkpoint.pth')
    conversion = convert_checkpoint(tmp_path / 'checkpoint.pth', tmp_path / 'hub')
    assert conversion.variant == 'convmixer_768_32' and conversion.model_args == {}
    assert conversion.activation == 'ReLU' and conversion.activation_source.startswith('that of convmixer_768_32')
    assert not conversion.warnings


def test_the_activation_can_be_given_and_is_doubted(tmp_path):
    reference = build(ConvMixer, act_layer='relu')  # with negative running means
    torch.save(reference.state_dict(), tmp_path / 'checkpoint.pth')
    conversion = convert_checkpoint(
        tmp_path / 'checkpoint.pth', tmp_path / 'hub', model='convmixer_256_8_ks5_p2', act_layer='relu')
    assert conversion.variant == 'convmixer_256_8_ks5_p2' and conversion.activation == 'ReLU'
    assert 'ReLU gives none below 0' in conversion.warnings[0]
    assert_close(load(tmp_path / 'hub')(images()), reference(images()))


def test_no_negative_running_mean_is_no_gelus(tmp_path):
    reference = build(ConvMixer, **DIGITS, act_layer='relu')
    for module in reference.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.abs_()
    torch.save(reference.state_dict(), tmp_path / 'checkpoint.pth')
    conversion = convert_checkpoint(tmp_path / 'checkpoint.pth', tmp_path / 'hub')
    assert conversion.activation == 'GELU' and 'should --act-layer be relu?' in conversion.warnings[0]


def test_another_variant_keeps_what_the_weights_were_trained_with(tmp_path):
    tiny = {key: TINY[key] for key in ('dim', 'depth')}
    for trained, named, expected in (
            ('convmixer_768_32', 'convmixer_1024_16_ks9_p7', (nn.ReLU, 1e-5)),
            ('tf_convmixer_512_16_ks8_p7', 'convmixer_512_16_ks8_p7', (nn.GELU, 1e-3))):
        model = timm.create_model(trained, **tiny)
        path = train_py(model, tmp_path, model=trained, model_kwargs=tiny)
        convert_checkpoint(path, tmp_path / trained, model=named)
        loaded = load(tmp_path / trained)
        assert (type(loaded.stem[1]), loaded.stem[2].eps) == expected


def test_arguments_of_other_scripts(tmp_path):
    args = argparse.Namespace(model='convmixer_768_32', input_size=56, global_pool=True, act_layer=nn.SiLU)
    model = timm.create_model('convmixer_768_32', dim=12, depth=3)
    torch.save(dict(model=model.state_dict(), args=vars(args) | dict(act_layer=3)), tmp_path / 'checkpoint.pth')
    convert_checkpoint(tmp_path / 'checkpoint.pth', tmp_path / 'hub')
    loaded = load(tmp_path / 'hub')
    assert type(loaded.stem[1]) is nn.ReLU and tuple(loaded.pretrained_cfg['input_size']) == (3, 56, 56)
    args = dict(img_size=[64, 64], mean='imagenet', std=[[1.]], crop_pct=True, interpolation=3, model_kwargs=['dim=3'])
    torch.save(dict(model=model.state_dict(), args=args), tmp_path / 'foreign.pth')
    convert_checkpoint(tmp_path / 'foreign.pth', tmp_path / 'foreign', model='convmixer_768_32.in1k')
    cfg, expected = load(tmp_path / 'foreign').pretrained_cfg, timm.get_pretrained_cfg('convmixer_768_32').to_dict()
    for name in ('input_size', 'mean', 'std', 'interpolation'):
        assert tuple(cfg[name]) == tuple(expected[name])
    torch.save({0: torch.zeros(1)}, tmp_path / 'numbers.pth')
    with pytest.raises(ValueError, match='the key 0 is not a string'):
        convert_checkpoint(tmp_path / 'numbers.pth', tmp_path / 'numbers')


def test_labels_of_a_file(tmp_path, capsys):
    torch.save(build(ConvMixer).state_dict(), tmp_path / 'checkpoint.pth')
    labels, arguments = tmp_path / 'labels.txt', ['convert', str(tmp_path / 'checkpoint.pth'), str(tmp_path / 'hub')]
    labels.write_bytes('cat\ndog \n\nLöwe\na\u2028b\nfox\n'.encode('utf-8-sig'))
    assert command_line.main([*arguments, '--labels', str(labels)]) == 0
    config = json.loads((tmp_path / 'hub' / 'config.json').read_text())
    assert config['label_names'] == ['cat', 'dog', 'Löwe', 'a\u2028b', 'fox']
    labels.write_bytes('Löwe\n'.encode('latin-1'))
    capsys.readouterr()
    assert command_line.main([*arguments, '--labels', str(labels)]) == 1
    assert 'is not UTF-8' in capsys.readouterr().err


def test_labels_and_preprocessing(tmp_path):
    torch.save(build(ConvMixer, **DIGITS).state_dict(), tmp_path / 'checkpoint.pth')
    convert_checkpoint(
        tmp_path / 'checkpoint.pth', tmp_path / 'hub', label_names='abcdefghij',
        data_config=dict(img_size=40, mean=(0.1, 0.1, 0.1), std=None))
    config = json.loads((tmp_path / 'hub' / 'config.json').read_text())
    assert config['label_names'] == list('abcdefghij') and config['model_args'] == {}
    cfg = load(tmp_path / 'hub').pretrained_cfg
    assert list(cfg['input_size']) == [3, 40, 40] and cfg['mean'] == [0.1, 0.1, 0.1] and cfg['std'] == [0.5, 0.5, 0.5]
    assert not {'tag', 'description', 'license'} & config['pretrained_cfg'].keys()
    assert 'license' not in (tmp_path / 'hub' / 'README.md').read_text()
    with pytest.raises(ValueError, match=r'label_names \(--labels\) names 3 classes, the checkpoint has 10'):
        convert_checkpoint(tmp_path / 'checkpoint.pth', tmp_path / 'other', label_names='abc')
    with pytest.raises(ValueError, match=r'mean=\[0.5, 0.4\] must have one value for each of the 3 channels'):
        convert_checkpoint(tmp_path / 'checkpoint.pth', tmp_path / 'other', data_config=dict(mean=[0.5, 0.4]))
    for bad in (dict(std=[0.]), dict(mean=[float('nan')]), dict(crop_pct=0.), dict(crop_pct=-1.), dict(img_size=3)):
        name, value = next(iter(bad.items()))
        with pytest.raises(ValueError, match=re.escape(f'{name}={value!r} must be ')):
            convert_checkpoint(tmp_path / 'checkpoint.pth', tmp_path / 'deep' / 'other', data_config=bad)
        assert not (tmp_path / 'deep').exists()

    dataset = dict(classes=[f'class {index}' for index in range(5)])
    weights = build(openmmlab_convmixer).state_dict()
    torch.save(dict(meta=dict(dataset_meta=dataset), state_dict=weights), tmp_path / 'mm.pth')
    convert_checkpoint(tmp_path / 'mm.pth', tmp_path / 'mm')
    assert json.loads((tmp_path / 'mm' / 'config.json').read_text())['label_names'] == dataset['classes']


def test_transformers_reads_the_folder(tmp_path):
    transformers = pytest.importorskip('transformers')
    reference = build(official_convmixer)
    torch.save(reference.state_dict(), tmp_path / 'checkpoint.pth')
    convert_checkpoint(tmp_path / 'checkpoint.pth', tmp_path / 'hub', label_names='abcde')
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / 'hub').eval()
    assert_close(model(images()).logits, reference(images()))
    assert model.config.id2label == dict(enumerate('abcde'))


def test_half_precision_and_nan(tmp_path):
    weights = build(ConvMixer).half().state_dict()
    weights['head.bias'][0] = torch.nan
    torch.save(weights, tmp_path / 'checkpoint.pth')
    conversion = convert_checkpoint(tmp_path / 'checkpoint.pth', tmp_path / 'hub')
    assert conversion.dtypes == ['float16'] and 'NaN' in conversion.warnings[-1]
    assert load(tmp_path / 'hub').head.bias[0].isnan()


class RunsCode:
    def __reduce__(self):
        return os.mkdir, ('this-must-not-appear',)


def test_what_cannot_be_converted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state_dict = build(ConvMixer).state_dict()

    def refused(name, match, error=ValueError):
        with pytest.raises(error, match=match):
            convert_checkpoint(name, 'hub')
        assert not os.path.exists('hub') and not [entry for entry in os.listdir() if entry.startswith('.')]

    refused('missing.pth', 'missing.pth', FileNotFoundError)
    refused(tmp_path, 'is a folder', IsADirectoryError)
    torch.save(dict(state_dict=state_dict, extra=RunsCode()), 'code.pth')
    refused('code.pth', 'refused: it names (posix|nt).mkdir')
    assert not os.path.exists('this-must-not-appear')
    torch.save(state_dict, 'cut.pth')
    os.truncate('cut.pth', 3000)
    refused('cut.pth', 'cut.pth is')
    safetensors.torch.save_file(state_dict, 'cut.safetensors')
    os.truncate('cut.safetensors', 3000)
    refused('cut.safetensors', 'cut.safetensors is damaged')
    open('empty.pth', 'w').close()
    refused('empty.pth', 'empty.pth is')
    torch.save(torch.zeros(2), 'tensor.pth')
    refused('tensor.pth', 'holds a Tensor')
    torch.save(timm.create_model('test_resnet').state_dict(), 'resnet.pth')
    refused('resnet.pth', 'Not a known ConvMixer checkpoint')
    torch.save(timm.utils.model.reparameterize_model(build(ConvMixer)).state_dict(), 'fused.pth')
    refused('fused.pth', 'inference form')
    torch.save({key: value for key, value in state_dict.items() if key != 'blocks.1.1.weight'}, 'missing-key.pth')
    refused('missing-key.pth', 'blocks.1.1.weight')
    torch.save(build(ConvMixer, norm_layer='groupnorm1').state_dict(), 'groupnorm.pth')
    refused('groupnorm.pth', 'running_mean')
    with pytest.raises(ValueError, match="model='resnet18' is not a registered ConvMixer"):
        convert_checkpoint('cut.pth', 'hub', model='resnet18')


# The folder and the command.

def test_folders_are_replaced_whole_or_not_at_all(tmp_path):
    folder = tmp_path / 'deep' / 'hub'
    with new_folder(folder, ['a']) as workplace:
        (workplace / 'a').write_text('1')
        assert not folder.exists()
    assert (folder / 'a').read_text() == '1'
    for replace, match in ((False, 'not empty'), (True, None)):
        if match:
            with pytest.raises(FileExistsError, match=match), new_folder(folder, ['a'], replace=replace):
                pytest.fail('must not get here')
    with pytest.raises(KeyboardInterrupt), new_folder(folder, ['a'], replace=True) as workplace:
        (workplace / 'a').write_text('2')
        raise KeyboardInterrupt
    assert (folder / 'a').read_text() == '1' and os.listdir(folder.parent) == ['hub']
    with new_folder(folder, ['a'], replace=True) as workplace:
        (workplace / 'a').write_text('2')
    assert (folder / 'a').read_text() == '2' and os.listdir(folder.parent) == ['hub']
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / 'new' / 'parents' / 'hub', ['a']):
        raise KeyboardInterrupt
    assert not (tmp_path / 'new').exists()
    with pytest.raises(ValueError, match='name a folder in it'), new_folder('.', ['a']):
        pytest.fail('must not get here')
    (folder / 'thesis.tex').touch()
    with pytest.raises(FileExistsError, match="holds 'thesis.tex', which would be lost"):
        with new_folder(folder, ['a'], replace=True):
            pytest.fail('must not get here')
    with pytest.raises(FileExistsError, match='is not a folder'):
        with new_folder(folder / 'a', ['a'], replace=True):
            pytest.fail('must not get here')


def test_files_are_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / 'file'
    path.write_bytes(b'old')

    def fail(*args):
        raise OSError('No space left on device')

    with monkeypatch.context() as patch:
        patch.setattr(os, 'replace', fail)
        with pytest.raises(OSError, match='No space left'):
            write_atomically(path, b'new')
    assert path.read_bytes() == b'old' and os.listdir(tmp_path) == ['file']
    write_atomically(path, b'new')
    assert path.read_bytes() == b'new'
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask
    with pytest.raises(FileNotFoundError, match='There is no folder'):
        write_atomically(tmp_path / 'no' / 'file', b'')


def test_command(tmp_path, capsys):
    path = train_py(build(official_convmixer, **DIGITS), tmp_path, model='resnet18', mean=(0.1, 0.2, 0.3))
    labels = tmp_path / 'labels.txt'
    labels.write_text('\n'.join('abcdefghij'))
    arguments = ['convert', str(path), str(tmp_path / 'hub'), '--labels', str(labels), '--img-size', '32']
    assert command_line.main(arguments) == 0
    printed = capsys.readouterr()
    for said in (
            "official", "'state_dict_ema' (averaged)", 'dim=64, depth=4', 'test_convmixer', 'GELU',
            'same weights, same outputs'):
        assert said in printed.out
    assert 'reading' in printed.err
    pretrained_cfg = load(tmp_path / 'hub').pretrained_cfg
    assert pretrained_cfg['label_names'] == list('abcdefghij')
    assert pretrained_cfg['mean'] == [0.1, 0.2, 0.3] and list(pretrained_cfg['input_size']) == [3, 32, 32]

    assert command_line.main(arguments) == 1
    assert '--force' in capsys.readouterr().err
    assert command_line.main([*arguments, '--force']) == 0
    shutil.rmtree(tmp_path / 'hub')
    assert command_line.main(['convert', str(labels), str(tmp_path / 'hub')]) == 1
    printed = capsys.readouterr()
    assert 'is damaged, or no checkpoint' in printed.err and 'Traceback' not in printed.err
    assert 'weights_only' not in printed.err
    assert not (tmp_path / 'hub').exists()


def test_read_checkpoint_keeps_the_arguments_of_train_py(tmp_path):
    path = train_py(build(ConvMixer), tmp_path, model='convmixer_768_32', lr=0.5)
    assert read_checkpoint(path)['args'].lr == 0.5
