"""``python -m timm_convmixer filters``: the picture and its sources."""
import os

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from references import official_convmixer
from timm_convmixer import ConvMixer
from timm_convmixer import __main__ as command_line
from timm_convmixer.filters import draw_filters, load_filters, save_filters


def count(picture: Image.Image, colour) -> int:
    return int((np.asarray(picture) == np.array(colour)).all(axis=-1).sum())


@pytest.mark.parametrize('depth,kernel_size,patch_size,in_chans', [
    (1, 3, 2, 3), (4, 5, 4, 3), (32, 7, 7, 3), (2, 9, 1, 1), (2, 8, 14, 4), (2, 1, 1, 3)])
def test_layouts(depth, kernel_size, patch_size, in_chans):
    model = ConvMixer(dim=20, depth=depth, kernel_size=kernel_size, patch_size=patch_size, in_chans=in_chans)
    picture = draw_filters(model.state_dict(), 'A title', max_filters=16)
    assert picture.mode == 'RGB'
    assert 0.2 < picture.width / picture.height < 4 and picture.width * picture.height < 16e6


def test_every_kernel_is_drawn_on_a_symmetric_scale():
    model = ConvMixer(dim=4, depth=3, kernel_size=3, patch_size=2, in_chans=1)
    state_dict = {key: torch.zeros_like(value) for key, value in model.state_dict().items()}
    nothing = draw_filters(state_dict, '')
    positive, negative = (178, 24, 43), (33, 102, 172)
    # One weight per block, of different magnitudes: each has the full colour and the same number of pixels.
    for index, weight in enumerate((1e-3, 1., 1e3)):
        state_dict[f'blocks.{index}.0.fn.0.weight'][index, 0, 1, 2] = weight
    picture = draw_filters(state_dict, '')
    area = (count(picture, positive) - count(nothing, positive)) / 3
    assert area == int(area) > 9 and count(picture, negative) == count(nothing, negative)
    opposite = draw_filters({key: -value for key, value in state_dict.items()}, '')
    assert count(opposite, negative) - count(nothing, negative) == 3 * area


def test_patch_embeddings_are_in_colour():
    model = ConvMixer(dim=4, depth=1, kernel_size=3, patch_size=2)
    state_dict = {key: torch.zeros_like(value) for key, value in model.state_dict().items()}
    state_dict['stem.0.weight'][0, 1] = 1.   # green
    state_dict['stem.0.weight'][1, 2] = -2.  # minus blue
    picture = draw_filters(state_dict, '')
    assert count(picture, (128, 255, 128)) > 0 and count(picture, (128, 128, 0)) > 0


def test_max_filters():
    state_dict = timm.create_model('test_convmixer').state_dict()
    small, large = (draw_filters(state_dict, '', max_filters=n) for n in (4, 64))
    assert small.width * small.height < large.width * large.height
    with pytest.raises(ValueError, match='max_filters=0 must be at least 1'):
        draw_filters(state_dict, '', max_filters=0)


def test_nan_weights_are_drawn():
    state_dict = timm.create_model('test_convmixer').state_dict()
    state_dict['blocks.1.0.fn.0.weight'][0] = torch.nan
    draw_filters(state_dict, '')


def test_command(tmp_path, capsys):
    path = tmp_path / 'filters.png'
    assert command_line.main(['filters', 'test_convmixer.digits', '-o', str(path), '--max-filters', '9']) == 0
    with Image.open(path) as picture:
        assert picture.format == 'PNG' and f'{picture.width}x{picture.height}' in capsys.readouterr().out
        drawn = np.asarray(picture)
    model = timm.create_model('test_convmixer.digits', pretrained=True)
    assert np.array_equal(drawn, np.asarray(draw_filters(model.state_dict(), 'test_convmixer.digits', 9)))

    timm.models.save_for_hf(model, tmp_path / 'hub', safe_serialization=True)
    assert command_line.main(['filters', f'local-dir:{tmp_path / "hub"}', '-o', str(tmp_path / 'local.webp')]) == 0
    reference = official_convmixer(dim=8, depth=2, kernel_size=3, patch_size=2, num_classes=3)
    torch.save(dict(state_dict=reference.state_dict()), tmp_path / 'official.pth')
    assert command_line.main(['filters', '--checkpoint', str(tmp_path / 'official.pth'), '-o', str(path)]) == 0
    with Image.open(path) as picture:
        assert not np.array_equal(drawn, np.asarray(picture))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ['filters.png', 'hub', 'local.webp', 'official.pth']


@pytest.mark.parametrize('arguments,message', [
    (['resnet18', '-o', 'x.png'], "'resnet18' is no ConvMixer"),
    (['convmixer_512_12_ks8_p7', '-o', 'x.png'], 'has no pretrained weights'),
    (['test_convmixer', '-o', 'x.unknown'], 'such as .png'),
    (['test_convmixer', '-o', 'missing/x.png'], 'There is no folder missing'),
    (['local-dir:missing', '-o', 'x.png'], 'missing'),
    (['--checkpoint', 'missing.pth', '-o', 'x.png'], 'missing.pth'),
])
def test_failures(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command_line.main(['filters', *arguments]) == 1
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_damaged_weights_are_named(tmp_path, capsys):
    arguments = ['-o', str(tmp_path / 'x.png')]
    timm.models.save_for_hf(timm.create_model('test_convmixer'), str(tmp_path / 'hub'), safe_serialization=True)
    os.truncate(tmp_path / 'hub' / 'model.safetensors', 3000)
    assert command_line.main(['filters', f'local-dir:{tmp_path / "hub"}', *arguments]) == 1
    assert 'cannot be loaded: SafetensorError' in capsys.readouterr().err
    weights = timm.create_model('test_convmixer').state_dict()
    torch.save({**weights, 'stem.0.weight': 3}, tmp_path / 'number.pth')
    assert command_line.main(['filters', '--checkpoint', str(tmp_path / 'number.pth'), *arguments]) == 1
    assert 'number.pth: stem.0.weight must be a tensor' in capsys.readouterr().err
    fused = timm.utils.model.reparameterize_model(timm.create_model('test_convmixer').eval())
    torch.save(fused.state_dict(), tmp_path / 'fused.pth')
    assert command_line.main(['filters', '--checkpoint', str(tmp_path / 'fused.pth'), *arguments]) == 1
    assert 'fused.pth: This is an inference form' in capsys.readouterr().err
    assert not (tmp_path / 'x.png').exists()


@pytest.mark.parametrize('arguments', [
    [], ['test_convmixer'], ['-o', 'x.png'], ['test_convmixer', '--checkpoint', 'x.pth', '-o', 'x.png'],
    ['test_convmixer', '-o', 'x.png', '--max-filters', '0']], ids=' '.join)
def test_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        command_line.main(['filters', *arguments])
    assert stopped.value.code == 2


def test_load_filters_takes_one_source():
    with pytest.raises(ValueError, match='either a model or a checkpoint'):
        load_filters()


def test_pictures_are_not_left_half_written(tmp_path, monkeypatch):
    path = tmp_path / 'x.png'
    path.write_bytes(b'old')
    picture = Image.new('RGB', (4, 4))

    def fail(*args, **kwargs):
        raise OSError('No space left on device')

    monkeypatch.setattr(picture, 'save', fail)
    with pytest.raises(OSError):
        save_filters(picture, path)
    assert path.read_bytes() == b'old' and [entry.name for entry in tmp_path.iterdir()] == ['x.png']
