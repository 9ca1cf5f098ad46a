"""Inference on a CPU a few images at a time, in place, against the layers called one by one."""
import copy
import gc
import os
import pickle
import platform
import subprocess
import sys

import pytest
import timm
import torch
import torch.nn as nn
from timm.utils.model import reparameterize_model
from torch.utils.flop_counter import FlopCounterMode

from support import assert_close, randomize_norms
from timm_convmixer import inference
from timm_convmixer.convmixer import ConvMixer
from timm_convmixer.kernels import set_fused

IMAGES = 5


@pytest.fixture(autouse=True)
def chunks(monkeypatch):
    """Sizes of the chunks, at most two images of 12 channels and 9 x 7 locations, that a test computes in place."""
    sizes = []
    forward_stem = inference._forward_stem
    monkeypatch.setattr(inference, '_MAP_BYTES', 2 * 12 * 9 * 7 * 4)
    monkeypatch.setattr(inference, '_LARGE', 1)
    monkeypatch.setattr(inference, '_LARGE_FOR_FUSED', 1)
    monkeypatch.setattr(
        inference, '_forward_stem', lambda x, *args: sizes.append(len(x)) or forward_stem(x, *args))
    return sizes


def tiny(**kwargs) -> ConvMixer:
    torch.manual_seed(0)
    model = ConvMixer(**{**dict(dim=12, depth=3, kernel_size=5, patch_size=4, num_classes=7), **kwargs})
    return randomize_norms(model).eval()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(IMAGES, 3, 37, 30, generator=torch.Generator().manual_seed(0))


def layer_by_layer(function, *args, **kwargs):
    set_fused(False)
    try:
        return function(*args, **kwargs)
    finally:
        set_fused(True)


FORMS = pytest.mark.parametrize('form', [lambda model: model, reparameterize_model], ids=['training', 'inference'])


@FORMS
@pytest.mark.parametrize('kwargs', [
    dict(),
    dict(act_layer=nn.ReLU),
    dict(kernel_size=8),
    dict(kernel_size=1),
    dict(dim=72, patch_size=14),  # fewer locations than channels: the shift is not folded into the bias
    dict(drop_path_rate=0.5, drop_rate=0.5),
    dict(bn_eps=0.1),
    dict(norm_layer=lambda dim, **dd: nn.BatchNorm2d(dim, affine=False, **dd)),
], ids=str)
@torch.no_grad()
def test_equals_the_layers(kwargs, form, x, chunks):
    model = form(tiny(**kwargs))
    given = x.clone()
    for images in (x, x.to(memory_format=torch.channels_last), x[:, :, 1:, 2:]):
        expected = layer_by_layer(model, images)
        assert not chunks
        assert_close(model(images), expected, 1e-5)
        assert sum(chunks) == IMAGES
        if 'patch_size' not in kwargs:
            assert chunks == [2, 2, 1]
        chunks.clear()
    assert torch.equal(x, given)


@FORMS
@torch.no_grad()
def test_dtypes(form, x):
    """In bfloat16 no further from float64 than layer by layer; in float64 nothing but the algebra."""
    model = tiny(dim=64, depth=4)
    half = form(copy.deepcopy(model).bfloat16())
    exact = copy.deepcopy(model).bfloat16().double().forward_features(x.bfloat16().double())
    ours, theirs = (
        (y.double() - exact).square().mean().sqrt()
        for y in (half.forward_features(x.bfloat16()), layer_by_layer(half.forward_features, x.bfloat16())))
    assert 0 < ours <= 1.5 * theirs
    model = form(model.double())
    assert_close(model(x.double()), layer_by_layer(model, x.double()), 1e-12)


@FORMS
@torch.no_grad()
def test_intermediates(form, x, chunks):
    model = form(tiny())
    expected = layer_by_layer(model.forward_intermediates, x, indices=[0, 2])
    final, maps = model.forward_intermediates(x, indices=[0, 2])
    assert chunks == [2, 2, 1]
    assert_close(final, expected[0])
    for actual, wanted in zip(maps, expected[1], strict=True):
        assert_close(actual, wanted)
    stopped = model.forward_intermediates(x, indices=[1, 0], stop_early=True, intermediates_only=True)
    wanted = layer_by_layer(model.forward_intermediates, x, indices=[0, 1], intermediates_only=True)
    for actual, expected in zip(stopped, wanted, strict=True):
        assert_close(actual, expected)


@torch.no_grad()
def test_features_only(x, chunks):
    model = timm.create_model('test_convmixer', features_only=True, out_indices=(0, 3)).eval()
    for actual, expected in zip(model(x), layer_by_layer(model, x), strict=True):
        assert_close(actual, expected)
    assert sum(chunks) == IMAGES


def test_gradients_are_not_lost(x, chunks):
    """In place only where nobody wants a gradient."""
    model = tiny()
    model(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters()) and not chunks
    fused = reparameterize_model(model)
    image = x.clone().requires_grad_()
    fused(image).sum().backward()
    assert image.grad is not None and not chunks
    fused(x)
    assert sum(chunks) == IMAGES
    chunks.clear()
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    model(x).sum().backward()
    assert model.head.weight.grad is not None and sum(chunks) == IMAGES


@torch.no_grad()
def test_batch_statistics_are_those_of_the_batch(x, chunks):
    model = tiny().train()
    expected = copy.deepcopy(model)
    assert_close(model(x), layer_by_layer(expected, x))
    assert not chunks
    for actual, wanted in zip(model.buffers(), expected.buffers()):
        torch.testing.assert_close(actual, wanted)


@FORMS
@torch.no_grad()
def test_every_hook_sees_the_whole_batch(form, x, chunks):
    def modules(model: nn.Module) -> list:
        return [model.stem, model.blocks, *model.stem.modules(), *model.blocks.modules()]

    for i in range(len(modules(form(tiny())))):
        model = form(tiny())
        sizes = []
        module = modules(model)[i]
        module.register_forward_hook(lambda module, args, output: sizes.append(len(output)))
        model(x)
        assert sizes == [IMAGES], type(module)
    assert not chunks


@FORMS
@torch.no_grad()
def test_what_else_is_left_to_the_layers(form, x, chunks):
    model = form(tiny())
    expected = layer_by_layer(model, x)

    sizes = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: sizes.append(len(output)))
    model(x)
    handle.remove()
    assert len(sizes) > 10 and set(sizes) == {IMAGES}

    with FlopCounterMode(display=False) as counter:
        model(x)
    with FlopCounterMode(display=False) as plain_counter:
        layer_by_layer(model, x)
    assert counter.get_total_flops() == plain_counter.get_total_flops() > 0

    with torch.autocast('cpu', torch.bfloat16):
        assert model.forward_features(x).dtype == torch.bfloat16
    assert_close(torch.func.vmap(model)(x[:, None])[:, 0], expected)
    assert_close(torch.compile(model, fullgraph=True, backend='eager')(x), expected)
    assert_close(torch.jit.trace(model, x[:2], check_trace=False)(x), expected)
    assert not chunks

    for change in (
            lambda model: setattr(model.blocks[1], 'forward', lambda x: 2 * x),
            lambda model: setattr(model, 'stem', nn.Sequential(model.stem)),
            lambda model: model.blocks.__setitem__(2, nn.Sequential(model.blocks[2])),
    ):
        changed = form(tiny())
        change(changed)
        assert_close(changed(x), layer_by_layer(changed, x))
    for kwargs in (dict(act_layer='silu'), dict(norm_layer='groupnorm1')):
        other = form(tiny(**kwargs))
        assert_close(other(x), layer_by_layer(other, x))
    assert not chunks
    model(x)
    assert chunks == [2, 2, 1]


@torch.no_grad()
def test_small_maps_are_left_to_the_layers(x, chunks, monkeypatch):
    monkeypatch.setattr(inference, '_LARGE', 12 * 9 * 7 * IMAGES + 1)
    monkeypatch.setattr(inference, '_LARGE_FOR_FUSED', 12 * 9 * 7 * IMAGES + 1)
    model = tiny()
    model(x)
    reparameterize_model(model)(x)
    model(x[:0])
    assert not chunks
    monkeypatch.setattr(inference, '_LARGE', 12 * 9 * 7 * IMAGES)
    model(x)
    assert sum(chunks) == IMAGES


class TestPackedWeights:
    """What is packed is a copy: whatever changes the weight must be noticed."""

    @pytest.fixture(autouse=True)
    def needs_operators(self):
        weight = torch.randn(8, 8, 1, 1)
        if inference.packed_pointwise_refusal(torch.randn(1, 8, 2, 2).to(memory_format=torch.channels_last), weight):
            pytest.skip('this build of PyTorch has no such operators')

    @pytest.fixture
    def fused(self, x) -> ConvMixer:
        fused = reparameterize_model(tiny())
        with torch.no_grad():
            fused(x)
        assert all(block in inference._PACKED for block in fused.blocks)
        return fused

    @pytest.mark.parametrize('change', [
        lambda model: [block.pointwise.weight.mul_(2) for block in model.blocks],
        lambda model: model.load_state_dict(reparameterize_model(tiny(bn_eps=0.5)).state_dict()),
        lambda model: [setattr(block.pointwise, 'weight', nn.Parameter(2 * block.pointwise.weight, False))
                       for block in model.blocks],
        lambda model: [setattr(block.pointwise.weight, 'data', 2 * block.pointwise.weight) for block in model.blocks],
        lambda model: model.blocks.__setitem__(0, copy.deepcopy(model.blocks[1])),
        lambda model: model.blocks[0].pointwise.weight[0, 0].zero_(),
    ], ids=['in place', 'state dict', 'replaced', 'data', 'block', 'one value'])
    @pytest.mark.parametrize('mode', [torch.no_grad, torch.inference_mode])
    def test_changes_are_noticed(self, change, mode, fused, x):
        with mode():
            before = fused(x)
            change(fused)
            after = fused(x)
            assert (after - before).abs().max() > 1e-3 * before.abs().max()
            assert_close(after, layer_by_layer(fused, x))

    @torch.no_grad()
    def test_a_weight_at_the_address_of_one_before(self, fused, x):
        """Freed and allocated in turn, weights come to lie where others have lain."""
        for _ in range(20):
            for block in fused.blocks:
                for _ in range(2):
                    block.pointwise.weight.data = torch.randn(12, 12, 1, 1)
            assert_close(fused(x), layer_by_layer(fused, x))

    @torch.no_grad()
    def test_other_sizes_and_dtypes(self, fused, x):
        for images in (x[:1], x[:, :, :20], x, x[:2, :, :, :16], x):
            assert_close(fused(images), layer_by_layer(fused, images))
        fused.double()
        assert_close(fused(x.double()), layer_by_layer(fused, x.double()), 1e-12)

    @torch.no_grad()
    def test_are_made_once(self, fused, x, monkeypatch):
        monkeypatch.setattr(inference, 'pack_pointwise_weight', lambda *args: pytest.fail('packed again'))
        fused(x)
        fused(x[:2])

    @torch.no_grad()
    def test_belong_to_no_copy(self, fused, x):
        expected = fused(x)
        size = len(pickle.dumps(fused))
        assert size == len(pickle.dumps(reparameterize_model(tiny())))
        for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
            assert not any(block in inference._PACKED for block in other.blocks)
            assert_close(other(x), expected)

    def test_go_with_their_block(self, x):
        fused = reparameterize_model(tiny())
        with torch.no_grad():
            fused(x)
        count = len(inference._PACKED)
        del fused
        gc.collect()
        assert len(inference._PACKED) == count - 3

    @torch.no_grad()
    def test_are_not_needed(self, fused, x, monkeypatch):
        expected = fused(x)
        monkeypatch.setattr(inference, 'packed_pointwise_refusal', lambda *args: 'no such operators')
        assert_close(fused(x), expected)


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='other C libraries have limits of their own')
def test_freed_memory_is_kept():
    """Maps of 4 MB, freed and allocated again, come fresh from the system before, and from what is kept after."""
    script = (
        'import resource, torch\n'
        'from timm_convmixer.kernels.workspace import keep_freed_memory\n'
        'def fresh_pages():\n'
        '    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n'
        '    for _ in range(10):\n'
        '        a = torch.zeros(1 << 20) + 1\n'
        '        b = torch.zeros(1 << 20) + 1\n'
        '        del a, b\n'
        '    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n'
        'fresh_pages()\n'
        'before = fresh_pages()\n'
        'keep_freed_memory()\n'
        'fresh_pages()\n'
        'print(before, fresh_pages())\n')
    env = {key: value for key, value in os.environ.items() if not key.startswith(('MALLOC_', 'GLIBC_', 'LD_PRELOAD'))}
    result = subprocess.run([sys.executable, '-c', script], env=env, check=True, capture_output=True, text=True)
    before, after = map(int, result.stdout.split())
    assert after < 100 < 1000 < before
