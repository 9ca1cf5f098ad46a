"""Other projects' checkpoints, other patch and kernel sizes, and errors for checkpoints that do not fit."""
import argparse
import ast
import logging
import os
from collections import OrderedDict
from copy import deepcopy
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.models.convmixer import ConvMixer as TimmConvMixer
from timm.utils import CheckpointSaver, ModelEmaV2

import timm_convmixer
from references import official_convmixer, openmmlab_convmixer
from support import assert_close, pairwise, randomize_norms
from timm_convmixer import ConvMixer
from timm_convmixer.checkpoints import checkpoint_filter_fn, resize_depthwise_kernel

# Odd and even kernels; the activation follows from the name.
ARCHITECTURES = {
    'convmixer_768_32': dict(dim=12, depth=3, kernel_size=7, patch_size=7, num_classes=5, act_layer=nn.ReLU),
    'convmixer_512_12_ks8_p7': dict(dim=12, depth=3, kernel_size=8, patch_size=7, num_classes=5, act_layer=nn.GELU),
}
NAME = 'convmixer_512_12_ks8_p7'
TINY = dict(dim=12, depth=3, kernel_size=5, patch_size=4, num_classes=5)


def images(height: int = 42, width: int = 35, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(3))


def tiny(seed: int = 0, **kwargs) -> ConvMixer:
    torch.manual_seed(seed)
    return randomize_norms(ConvMixer(**{**TINY, **kwargs}), seed).eval()


def build(builder, architecture, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return randomize_norms(builder(**architecture), seed).eval()


def by_checkpoint_path(name: str, path: Path, **kwargs) -> nn.Module:
    """As train.py ``--initial-checkpoint`` and validate.py ``--checkpoint`` do."""
    return timm.create_model(name, checkpoint_path=str(path), **kwargs)


def by_overlay(name: str, path: Path, **kwargs) -> nn.Module:
    overlay = dict(file=str(path), num_classes=TINY['num_classes'])
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)


def by_load_checkpoint(name: str, path: Path, **kwargs) -> nn.Module:
    model = timm.create_model(name, **kwargs)
    timm.models.load_checkpoint(model, str(path))
    return model


def by_load_state_dict(name: str, path: Path, **kwargs) -> nn.Module:
    model = timm.create_model(name, **kwargs)
    with torch.serialization.safe_globals([argparse.Namespace]):
        model.load_state_dict(torch.load(path, weights_only=True))
    return model


WAYS = [by_checkpoint_path, by_overlay, by_load_checkpoint, by_load_state_dict]
USER_WAYS = WAYS[:3]


# Formats: functions from an architecture to the saved checkpoint and its model.

def official(architecture):
    model = build(official_convmixer, architecture)
    return model.state_dict(), model


def official_timm_fork(architecture):
    """The released .pth.tar files: the flat model in a training checkpoint, without averaged weights."""
    model = build(official_convmixer, architecture)
    optimizer = torch.optim.AdamW(model.parameters())
    return dict(
        epoch=149, arch='convmixer_768_32', state_dict=model.state_dict(), optimizer=optimizer.state_dict(), version=2,
        args=argparse.Namespace(model='convmixer_768_32', opt='adamw'), metric=80.16), model


def cifar_dataparallel(architecture):
    model = build(official_convmixer, architecture)
    return nn.DataParallel(model).state_dict(), model


def official_compiled(architecture):
    model = build(official_convmixer, architecture)
    return torch.compile(model).state_dict(), model


def official_compiled_dataparallel(architecture):
    model = build(official_convmixer, architecture)
    return torch.compile(nn.DataParallel(model)).state_dict(), model


def official_dataparallel_compiled(architecture):
    model = build(official_convmixer, architecture)
    return nn.DataParallel(torch.compile(model)).state_dict(), model


def timm_plain(architecture):
    model = build(TimmConvMixer, architecture)
    return model.state_dict(), model


def timm_compiled_dataparallel(architecture):
    model = build(TimmConvMixer, architecture)
    return torch.compile(nn.DataParallel(model)).state_dict(), model


def timm_in_a_module(architecture):
    """A module that holds the model as ``self.model``."""
    model = build(TimmConvMixer, architecture)
    return dict(state_dict=nn.ModuleDict(dict(model=model)).state_dict(), global_step=1), model


def openmmlab(architecture):
    model = build(openmmlab_convmixer, architecture)
    meta = dict(mmpretrain_version='1.2.0', dataset_meta=dict(classes=['tench', 'goldfish']))
    return dict(meta=meta, state_dict=model.state_dict()), model


def openmmlab_distributed(architecture):
    model = build(openmmlab_convmixer, architecture)
    return dict(meta={}, state_dict=nn.DataParallel(model).state_dict()), model


def openmmlab_averaged(architecture):
    """mmengine's EMA hook swaps the weights on saving: ``state_dict`` holds the averaged ones."""
    model, averaged = (build(openmmlab_convmixer, architecture, seed) for seed in (0, 1))
    ema_state_dict = OrderedDict(steps=torch.tensor(100), **nn.DataParallel(model).state_dict())
    return dict(meta={}, state_dict=averaged.state_dict(), ema_state_dict=ema_state_dict), averaged


FORMATS = [
    official, official_timm_fork, cifar_dataparallel, official_compiled, official_compiled_dataparallel,
    official_dataparallel_compiled, timm_plain, timm_compiled_dataparallel, timm_in_a_module, openmmlab,
    openmmlab_distributed, openmmlab_averaged,
]


@pytest.mark.parametrize('checkpoint_format,name,way', pairwise(FORMATS, list(ARCHITECTURES), WAYS))
def test_formats(checkpoint_format, name, way, tmp_path):
    checkpoint, reference = checkpoint_format(ARCHITECTURES[name])
    torch.save(checkpoint, tmp_path / 'checkpoint.pth')
    kwargs = {k: v for k, v in ARCHITECTURES[name].items() if k != 'act_layer'}
    model = way(name, tmp_path / 'checkpoint.pth', **kwargs).eval()
    assert type(model) is ConvMixer
    assert_close(model(images()), reference(images()))


@pytest.mark.parametrize('way', USER_WAYS)
@pytest.mark.parametrize(
    'builder', [official_convmixer, openmmlab_convmixer, TimmConvMixer], ids=['official', 'openmmlab', 'timm'])
def test_formats_as_safetensors(builder, way, tmp_path):
    reference = build(builder, TINY)
    safetensors.torch.save_file(reference.state_dict(), tmp_path / 'model.safetensors')
    model = way(NAME, tmp_path / 'model.safetensors', **TINY).eval()
    assert_close(model(images()), reference(images()))


@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('builder', [ConvMixer, TimmConvMixer, official_convmixer], ids=['ours', 'timm', 'official'])
def test_train_py_checkpoint_gives_the_averaged_weights(builder, way, tmp_path):
    """The checkpoint is written by train.py's own saver."""
    model = build(builder, TINY)
    averaged = ModelEmaV2(build(builder, TINY, seed=1))
    saver = CheckpointSaver(
        model,
        torch.optim.AdamW(model.parameters()),
        args=argparse.Namespace(model=NAME, lr=1e-3),
        model_ema=averaged,
        checkpoint_dir=str(tmp_path),
        recovery_dir=str(tmp_path),
    )
    saver.save_checkpoint(epoch=1, metric=50.)
    loaded = way(NAME, tmp_path / 'last.pth.tar', **TINY).eval()
    assert_close(loaded(images()), averaged.module(images()))


def test_train_py_checkpoint_without_averaging(tmp_path):
    model = build(official_convmixer, TINY)
    averaged = build(official_convmixer, TINY, seed=1)
    torch.save(dict(state_dict=model.state_dict(), state_dict_ema=averaged.state_dict()), tmp_path / 'last.pth.tar')
    loaded = tiny(seed=2)
    timm.models.load_checkpoint(loaded, str(tmp_path / 'last.pth.tar'), use_ema=False)
    assert_close(loaded(images()), model(images()))


def test_other_head_from_another_format(tmp_path):
    """Fine-tuning loads every layer of the official weights except the head."""
    reference = build(official_convmixer, TINY)
    torch.save(reference.state_dict(), tmp_path / 'official.pth')
    model = by_overlay(NAME, tmp_path / 'official.pth', **{**TINY, 'num_classes': 11}).eval()
    assert_close(model.forward_features(images()), reference[:3 + TINY['depth']](images()))
    assert model(images()).shape == (2, 11)


# To and from timm's own ConvMixer.

@pytest.mark.parametrize('suffix', ['.safetensors', '.pth'])
@pytest.mark.parametrize(
    'there_and_back', [(TimmConvMixer, ConvMixer), (ConvMixer, TimmConvMixer)], ids=['from timm', 'to timm'])
def test_moves_between_timm_and_here(there_and_back, suffix, tmp_path):
    source, target = (build(builder, TINY, seed) for seed, builder in enumerate(there_and_back))
    path = tmp_path / f'model{suffix}'
    if suffix == '.safetensors':
        safetensors.torch.save_file(source.state_dict(), path)
        loaded = safetensors.torch.load_file(path)
    else:
        torch.save(source.state_dict(), path)
        loaded = torch.load(path, weights_only=True)
    incompatible = target.load_state_dict(loaded)
    assert not incompatible.missing_keys and not incompatible.unexpected_keys
    assert list(target.state_dict()) == list(source.state_dict())
    for key, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[key], value), key
    assert_close(target(images()), source(images()))


# Other sizes.

def resize_patches(x: torch.Tensor, old: int, new: int) -> torch.Tensor:
    """Resize an image patch by patch, without mixing pixels of different patches."""
    b, c, h, w = x.shape
    patches = x.view(b, c, h // old, old, w // old, old).permute(0, 2, 4, 1, 3, 5).reshape(-1, c, old, old)
    patches = F.interpolate(patches, size=(new, new), mode='bicubic', antialias=True)
    patches = patches.view(b, h // old, w // old, c, new, new).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(b, c, h // old * new, w // old * new)


@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('old,new', [(7, 14), (4, 6), (1, 2), (2, 7)])
def test_larger_patch_is_exact_on_resized_patches(old, new, way, tmp_path):
    """The resampled embedding inverts bicubic enlargement of each patch, so outputs are equal."""
    reference = tiny(patch_size=old)
    torch.save(reference.state_dict(), tmp_path / 'model.pth')
    model = way(NAME, tmp_path / 'model.pth', **{**TINY, 'patch_size': new}).eval()
    x = images(height=6 * old, width=5 * old)
    assert_close(model(resize_patches(x, old, new)), reference(x), tolerance=1e-4)


@pytest.mark.parametrize('old,new', [(7, 14), (14, 7), (7, 5)])
def test_other_patch_stays_close_on_resized_images(old, new):
    """Outputs are only close: resizing a whole image mixes pixels across patches."""
    reference = tiny(patch_size=old)
    # Smooth images and filters, like trained ones, survive resizing.
    x = F.interpolate(images(height=6, width=5), size=(6 * old, 5 * old), mode='bicubic')
    smooth = F.interpolate(reference.stem[0].weight, size=(2, 2), mode='area')
    reference.stem[0].weight.data = F.interpolate(smooth, size=(old, old), mode='bicubic')
    model = tiny(seed=1, patch_size=new)
    model.load_state_dict(reference.state_dict())
    resized = F.interpolate(x, size=(6 * new, 5 * new), mode='bicubic', antialias=True)
    assert_close(model(resized), reference(x), tolerance=0.05)


@pytest.mark.parametrize('old,new', [(14, 7), (7, 14), (5, 3)])
def test_other_patch_is_the_least_squares_solution(old, new):
    """Compare with a least-squares solver that sees only how resizing changes each pixel."""
    reference, model = tiny(patch_size=old), tiny(seed=1, patch_size=new)
    model.load_state_dict(reference.state_dict())
    pixels = torch.eye(old * old).view(-1, 1, old, old)
    resizing = F.interpolate(pixels, size=(new, new), mode='bicubic', antialias=True).flatten(1)
    filters = reference.stem[0].weight.flatten(2).permute(2, 0, 1).flatten(1)
    driver = 'gelsd'  # the minimum-norm solution if there are many
    expected = torch.linalg.lstsq(resizing.double(), filters.double(), driver=driver).solution
    actual = model.stem[0].weight.flatten(2).permute(2, 0, 1).flatten(1)
    assert_close(actual.double(), expected, tolerance=1e-4)


@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('old,new', [(3, 5), (1, 9), (4, 7), (2, 3), (5, 8), (1, 2), (4, 8), (2, 4)])
def test_larger_kernel_keeps_the_outputs(old, new, way, tmp_path, caplog):
    """From odd and even kernels to odd and even ones, also larger than the feature map (6, 5)."""
    reference = tiny(kernel_size=old)
    torch.save(reference.state_dict(), tmp_path / 'model.pth')
    with caplog.at_level(logging.WARNING, logger='timm_convmixer'):
        model = way(NAME, tmp_path / 'model.pth', **{**TINY, 'kernel_size': new}).eval()
    assert not caplog.records
    x = images(height=24, width=20)
    assert model.blocks[0][0].fn[0].weight.shape[-1] == new
    assert_close(model(x), reference(x))


@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('old,new', [(5, 3), (9, 1), (7, 4), (3, 2), (8, 5), (2, 1), (8, 4), (4, 2)])
def test_smaller_kernel_crops_with_a_warning(old, new, way, tmp_path, caplog):
    """Equal to the larger kernel with zeros in the cropped taps."""
    reference = tiny(kernel_size=old)
    torch.save(reference.state_dict(), tmp_path / 'model.pth')
    with caplog.at_level(logging.WARNING, logger='timm_convmixer'):
        model = way(NAME, tmp_path / 'model.pth', **{**TINY, 'kernel_size': new}).eval()
    warnings = [record.getMessage() for record in caplog.records if record.name.startswith('timm_convmixer')]
    assert len(warnings) == 1
    assert f'kernel_size={old} to {new}' in warnings[0] and 'outputs will differ' in warnings[0]

    offsets = torch.arange(old) - (old - 1) // 2
    kept = (offsets >= -((new - 1) // 2)) & (offsets <= new // 2)
    cropped = deepcopy(reference)
    for block in cropped.blocks:
        block[0].fn[0].weight.data *= kept[:, None] & kept[None, :]
    assert_close(model(images()), cropped(images()))
    assert (model(images()) - reference(images())).abs().max() > 1e-3


def test_padded_kernel_crops_back():
    weight = torch.randn(3, 1, 4, 4)
    for size in range(4, 12):
        assert torch.equal(resize_depthwise_kernel(resize_depthwise_kernel(weight, size), 4), weight)


def test_patch_kernel_and_channels_at_once(tmp_path):
    """All adaptations at once. A grey image gives the outputs of its RGB version."""
    reference = build(official_convmixer, TINY)
    torch.save(reference.state_dict(), tmp_path / 'official.pth')
    kwargs = {**TINY, 'patch_size': 8, 'kernel_size': 9, 'in_chans': 1}
    model = by_overlay(NAME, tmp_path / 'official.pth', **kwargs).eval()
    grey = images(height=24, width=20)[:, :1]
    assert_close(model(resize_patches(grey, 4, 8)), reference(grey.expand(-1, 3, -1, -1)), tolerance=1e-4)


# Checkpoints that do not fit.

@pytest.mark.parametrize('way', WAYS)
def test_unknown_keys_are_shown(way, tmp_path):
    state_dict = {f'layer{i}.conv.weight': torch.zeros(1) for i in range(20)}
    torch.save(state_dict, tmp_path / 'resnet.pth')
    with pytest.raises(ValueError, match=r"Not a known ConvMixer checkpoint.*'layer0.conv.weight'.*and 16 more"):
        way(NAME, tmp_path / 'resnet.pth', **TINY)


@pytest.mark.parametrize('damage,builder,way', pairwise(
    ['missing', 'shape', 'left over'], [ConvMixer, official_convmixer, openmmlab_convmixer], WAYS))
def test_damage_is_named(damage, builder, way, tmp_path):
    key = {
        ConvMixer: 'blocks.1.1.weight',
        official_convmixer: '4.1.weight',
        openmmlab_convmixer: 'backbone.stages.1.1.weight',
    }[builder]
    state_dict = build(builder, TINY).state_dict()
    named = r'blocks\.1\.1\.weight'
    if damage == 'missing':
        del state_dict[key]
    elif damage == 'shape':
        state_dict[key] = state_dict[key][:-1]
    else:
        state_dict[key.replace('weight', 'scale')] = state_dict[key]
        named = r'blocks\.1\.1\.scale'
    torch.save(state_dict, tmp_path / 'damaged.pth')
    with pytest.raises(RuntimeError, match=named):
        way(NAME, tmp_path / 'damaged.pth', **TINY)


@pytest.mark.parametrize('depth,builder,way', pairwise(
    [2, 4], [ConvMixer, official_convmixer, openmmlab_convmixer], WAYS))
def test_other_depth_is_named(depth, builder, way, tmp_path):
    named = {2: r'[Mm]issing.*blocks\.2\.', 4: r'[Uu]nexpected.*blocks\.3\.'}[depth]
    torch.save(build(builder, {**TINY, 'depth': depth}).state_dict(), tmp_path / 'model.pth')
    with pytest.raises(RuntimeError, match=f'(?s){named}'):
        way(NAME, tmp_path / 'model.pth', **TINY)


def test_missing_block_is_named_and_the_others_keep_their_places():
    state_dict = build(official_convmixer, TINY).state_dict()
    state_dict = {key: value for key, value in state_dict.items() if not key.startswith('4.')}
    with pytest.raises(RuntimeError) as error:
        tiny().load_state_dict(state_dict)
    message = str(error.value)
    assert 'blocks.1.0.fn.0.weight' in message
    assert 'blocks.2.' not in message and 'head' not in message and 'Unexpected' not in message


@pytest.mark.parametrize('damage', ['missing', 'other depth'])
def test_fine_tuning_does_not_hide_damage(damage, tmp_path):
    """With another number of classes timm loads non-strictly."""
    state_dict = tiny(depth=2 if damage == 'other depth' else 3).state_dict()
    state_dict.pop('blocks.1.3.running_var')
    torch.save(state_dict, tmp_path / 'model.pth')
    with pytest.raises(RuntimeError, match=r'depth 3.*Missing keys: .*blocks\.1\.3\.running_var'):
        by_overlay(NAME, tmp_path / 'model.pth', **{**TINY, 'num_classes': 11})


def test_wrong_number_of_channels_is_named(tmp_path):
    torch.save(tiny(dim=16).state_dict(), tmp_path / 'model.pth')
    for way in WAYS:
        with pytest.raises(RuntimeError, match='size mismatch for stem.0.weight'):
            way(NAME, tmp_path / 'model.pth', **TINY)


@pytest.mark.parametrize('way', WAYS)
def test_older_batch_norms_load(way, tmp_path):
    """Old BatchNorms did not save ``num_batches_tracked``, exporters drop it, and PyTorch does not require it."""
    reference = tiny()
    state_dict = {k: v for k, v in reference.state_dict().items() if not k.endswith('num_batches_tracked')}
    torch.save(state_dict, tmp_path / 'model.pth')
    assert_close(way(NAME, tmp_path / 'model.pth', **TINY).eval()(images()), reference(images()))


@pytest.mark.parametrize('partial', [
    lambda key: key.startswith('head.'),
    lambda key: key.startswith('blocks.1.'),
    lambda key: not key.startswith('head.'),
    lambda key: False,
], ids=['head', 'one block', 'all but the head', 'nothing'])
def test_partial_load(partial):
    model, source = tiny(), tiny(seed=1)
    before = deepcopy(model.state_dict())
    state_dict = {key: value for key, value in source.state_dict().items() if partial(key)}
    incompatible = model.load_state_dict(state_dict, strict=False)
    assert incompatible == TimmConvMixer(**TINY).load_state_dict(state_dict, strict=False)
    assert not incompatible.unexpected_keys
    for key, value in model.state_dict().items():
        assert torch.equal(value, state_dict.get(key, before[key])), key


def test_partial_load_from_another_format():
    model, source = tiny(), build(official_convmixer, TINY, seed=1)
    state_dict = {key: value for key, value in source.state_dict().items() if not key.startswith('8.')}
    incompatible = model.load_state_dict({**state_dict, 'extra': torch.zeros(1)}, strict=False)
    assert set(incompatible.missing_keys) == {'head.weight', 'head.bias'}
    assert incompatible.unexpected_keys == ['extra']
    assert torch.equal(model.blocks[2][1].weight, source[5][1].weight)


def test_lenient_load_of_unknown_keys():
    """Without ``strict`` nothing is refused that PyTorch would not refuse."""
    state_dict = {'encoder.weight': torch.zeros(1)}
    incompatible = tiny().load_state_dict(state_dict, strict=False)
    assert incompatible == TimmConvMixer(**TINY).load_state_dict(state_dict, strict=False)


def test_lenient_pretrained_weights(tmp_path):
    """``pretrained_strict=False`` takes what fits: here the blocks of a shallower model."""
    reference = tiny()
    torch.save(reference.state_dict(), tmp_path / 'model.pth')
    shallower = by_overlay(NAME, tmp_path / 'model.pth', pretrained_strict=False, **{**TINY, 'depth': 2})
    for key, value in shallower.state_dict().items():
        assert torch.equal(value, reference.state_dict()[key]), key


def test_strict_load_as_strict_as_pytorch():
    """State dicts with version metadata of current layers must contain ``num_batches_tracked``."""
    state_dict = tiny().state_dict()
    del state_dict['stem.2.num_batches_tracked']
    with pytest.raises(RuntimeError, match='stem.2.num_batches_tracked'):
        tiny().load_state_dict(state_dict)


def test_a_training_checkpoint_says_which_weights_are_loaded(caplog):
    own, averaged, model = tiny(seed=1), tiny(seed=2), tiny()
    model.load_state_dict(dict(state_dict=own.state_dict(), state_dict_ema=averaged.state_dict()))
    assert torch.equal(model.head.weight, averaged.head.weight)
    assert [record.levelname for record in caplog.records] == ['WARNING']
    assert "Loading 'state_dict_ema' of a training checkpoint, not 'state_dict'" in caplog.text


def test_filter_of_a_lenient_load(tmp_path):
    state_dict = {key: value for key, value in tiny(seed=1).state_dict().items() if not key.startswith('blocks.1')}
    torch.save(state_dict, tmp_path / 'partial.pth')
    incompatible = timm.models.load_checkpoint(
        tiny(), str(tmp_path / 'partial.pth'), strict=False, filter_fn=checkpoint_filter_fn)
    assert all(key.startswith('blocks.1') for key in incompatible.missing_keys)


def test_a_url_beside_a_folder(tmp_path):
    source = timm.create_model('test_convmixer')
    timm.models.save_for_hf(source, str(tmp_path))
    model = timm.create_model(
        f'local-dir:{tmp_path}', pretrained=True, pretrained_cfg_overlay=dict(url='http://127.0.0.1:9/x.pth'))
    assert torch.equal(model.head.weight, source.head.weight)


def test_state_dict_must_be_a_mapping():
    with pytest.raises(TypeError, match='state_dict must map keys to tensors, got list'):
        tiny().load_state_dict([torch.zeros(1)])


def test_loading_leaves_the_state_dict_alone():
    state_dict = tiny(kernel_size=3, patch_size=2).state_dict()
    before = {key: value.clone() for key, value in state_dict.items()}
    tiny().load_state_dict(state_dict)
    checkpoint_filter_fn(state_dict, tiny())
    assert list(state_dict) == list(before)
    assert all(torch.equal(state_dict[key], value) for key, value in before.items())


def test_assign():
    source = tiny(seed=1).double()
    model = tiny()
    model.load_state_dict(source.state_dict(), assign=True)
    assert model.stem[0].weight.dtype == torch.float64
    assert torch.equal(model(images().double()), source(images().double()))


# Pickles.

class _RunsCode:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize('way', USER_WAYS)
@pytest.mark.parametrize('file_name', ['model.pth', 'last.pth.tar', 'pytorch_model.bin'])
def test_pickle_that_runs_code_is_refused(file_name, way, tmp_path):
    marker = tmp_path / 'it ran'
    torch.save(dict(state_dict=tiny().state_dict(), args=_RunsCode(marker)), tmp_path / file_name)
    with pytest.raises(RuntimeError, match='weights_only=True blocked loading this checkpoint'):
        way(NAME, tmp_path / file_name, **TINY)
    assert not marker.exists()

    torch.load(tmp_path / file_name, weights_only=False)
    assert marker.exists(), 'The pickle is harmless, so that the test proves nothing.'


@pytest.mark.parametrize('way', USER_WAYS)
def test_every_load_is_weights_only(way, tmp_path, monkeypatch):
    calls = []
    load = torch.load

    def spy(*args, **kwargs):
        calls.append(kwargs.get('weights_only'))
        return load(*args, **kwargs)

    monkeypatch.setattr(torch, 'load', spy)
    torch.save(official_timm_fork(ARCHITECTURES['convmixer_768_32'])[0], tmp_path / 'model.pth.tar')
    way('convmixer_768_32', tmp_path / 'model.pth.tar', dim=12, depth=3, num_classes=5)
    assert calls == [True]


def test_package_unpickles_nothing_itself():
    """The source reads files only through timm's loaders or with ``weights_only=True``."""
    sources = list(Path(timm_convmixer.__file__).parent.rglob('*.py'))
    assert len(sources) > 5
    for source in sources:
        for node in ast.walk(ast.parse(source.read_text())):
            imported = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
            assert not {'pickle', 'joblib', 'dill', 'cloudpickle'} & {name.split('.')[0] for name in imported}, source
            if isinstance(node, ast.Call):
                function, call = ast.unparse(node.func), ast.unparse(node)
                assert not function.endswith(('pickle.load', 'pickle.loads')), source
                assert not function.endswith('torch.load') or 'weights_only=True' in call, source
                assert 'weights_only=False' not in call, source
