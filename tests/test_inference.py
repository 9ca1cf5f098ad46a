"""The inference route on a CPU (in place, in chunks of a few images) against calling the layers."""
import copy

import pytest
import timm
import torch
import torch.nn as nn
from timm.utils.model import reparameterize_model
from torch.utils.flop_counter import FlopCounterMode

from support import assert_close, fast_paths, let_onednn_support, lower_thresholds, randomize_norms
from timm_convmixer import inference, routes
from timm_convmixer.convmixer import ConvMixer

IMAGES = 5


@pytest.fixture(autouse=True)
def chunks(monkeypatch):
    """Record chunk sizes; a chunk holds at most two images of 12 channels and 9 x 7 pixels."""
    sizes = []
    run_stem = inference._run_stem
    lower_thresholds(monkeypatch)
    monkeypatch.setattr(inference, '_CHUNK_BYTES', 2 * 12 * 9 * 7 * 4)
    monkeypatch.setattr(inference, '_run_stem', lambda x, *args: sizes.append(len(x)) or run_stem(x, *args))
    return sizes


def tiny(**kwargs) -> ConvMixer:
    torch.manual_seed(0)
    model = ConvMixer(**{**dict(dim=12, depth=3, kernel_size=5, patch_size=4, num_classes=7), **kwargs})
    return randomize_norms(model).eval()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(IMAGES, 3, 37, 30, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=[True, False], ids=['avx512', 'avx2'])
def either_cpu(request, monkeypatch):
    """Contiguous images are converted to channels last on one of these CPUs alone."""
    monkeypatch.setattr(routes, '_has_avx512', lambda: request.param)


def layer_by_layer(function, *args, **kwargs):
    with fast_paths(False):
        return function(*args, **kwargs)


FORMS = pytest.mark.parametrize('form', [lambda model: model, reparameterize_model], ids=['training', 'inference'])


@FORMS
@pytest.mark.parametrize('kwargs', [
    dict(),
    dict(act_layer=nn.ReLU),
    dict(kernel_size=8),
    dict(kernel_size=1),
    dict(dim=72, patch_size=14),  # fewer pixels than channels: the shift is not folded into the bias
    dict(drop_path_rate=0.5, drop_rate=0.5),
    dict(bn_eps=0.1),
    dict(norm_layer=lambda dim, **dd: nn.BatchNorm2d(dim, affine=False, **dd)),
], ids=lambda kwargs: '-'.join(kwargs) or 'default')
@torch.no_grad()
def test_equals_the_layers(kwargs, form, x, chunks, either_cpu):
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
@pytest.mark.parametrize('dtype, supported', [
    (torch.bfloat16, True), (torch.bfloat16, False), (torch.float16, False),
], ids=['bfloat16', 'bfloat16-in-float32', 'float16-in-float32'])
@torch.no_grad()
def test_dtypes(form, dtype, supported, x, chunks, monkeypatch):
    """In half precision and under autocast, the error against float64 is at most 1.5 times that of the layers."""
    let_onednn_support(monkeypatch, *([dtype] if supported else []))
    model = tiny(dim=64, depth=4)
    half = form(copy.deepcopy(model).to(dtype))
    exact = copy.deepcopy(model).to(dtype).double().forward_features(x.to(dtype).double())
    ours, theirs = half.forward_features(x.to(dtype)), layer_by_layer(half.forward_features, x.to(dtype))
    assert ours.dtype == theirs.dtype == dtype and sum(chunks) == IMAGES
    ours, theirs = ((y.double() - exact).square().mean().sqrt() for y in (ours, theirs))
    assert 0 < ours <= 1.5 * theirs

    model = form(model)
    chunks.clear()
    with torch.autocast('cpu', dtype):
        ours, theirs = model.forward_features(x), layer_by_layer(model.forward_features, x)
    assert ours.dtype == theirs.dtype == dtype and sum(chunks) == IMAGES
    exact = copy.deepcopy(model).double().forward_features(x.double())
    ours, theirs = ((y.double() - exact).square().mean().sqrt() for y in (ours, theirs))
    assert 0 < ours <= 1.5 * theirs


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
    """Computes in place only if no tensor requires a gradient."""
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
        module.register_forward_hook(lambda module, args, output: sizes.append((len(output), output.is_contiguous())))
        model(x)
        assert sizes == [(IMAGES, True)], type(module)


@FORMS
@torch.no_grad()
@pytest.mark.parametrize('index', [0, 1, 2])
def test_a_called_block_among_plain_ones(form, index, x, chunks):
    """The other blocks keep the fast path; intermediates are those of the layers."""
    class Twice(nn.Module):
        def __init__(self, block: nn.Module):
            super().__init__()
            self.block = block

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert len(x) == IMAGES and x.is_contiguous()
            return 2 * self.block(x)

    model = form(tiny())
    model.blocks[index] = Twice(model.blocks[index])
    assert model.route(x).name == 'inference' and f'blocks.{index} is a Twice' in model.route(x).reason
    expected = layer_by_layer(model.forward_intermediates, x)
    actual = model.forward_intermediates(x)
    assert chunks == [2, 2, 1]
    for ours, theirs in zip((actual[0], *actual[1]), (expected[0], *expected[1]), strict=True):
        assert_close(ours, theirs)
        assert ours.stride() == theirs.stride()


@torch.no_grad()
def test_what_leaves_has_the_memory_format_of_what_came(x, either_cpu):
    wide = torch.randn(IMAGES, 3, 64, 64)
    for images in (wide, wide.to(memory_format=torch.channels_last), wide[:, :, ::2], wide.transpose(2, 3)):
        for channels_last in (False, True):
            model = tiny().to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
            for form in (model, reparameterize_model(model)):
                features = form.forward_features(images)
                assert features.stride() == layer_by_layer(form.forward_features, images).stride()


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

    assert_close(torch.func.vmap(model)(x[:, None])[:, 0], expected)
    assert_close(torch.compile(model, fullgraph=True, backend='eager')(x), expected)
    assert_close(torch.jit.trace(model, x[:2], check_trace=False)(x), expected)
    assert not chunks

    for kwargs in (dict(act_layer='silu'), dict(norm_layer='groupnorm1')):
        other = form(tiny(**kwargs))
        assert_close(other(x), layer_by_layer(other, x))
    assert not chunks
    model(x)
    assert chunks == [2, 2, 1]


@torch.no_grad()
def test_small_maps_are_left_to_the_layers(x, chunks, monkeypatch):
    monkeypatch.setattr(routes, 'SMALLEST_MAP', 12 * 9 * 7 * IMAGES + 1)
    model = tiny()
    model(x)
    reparameterize_model(model)(x)
    model(x[:0])
    assert not chunks
    monkeypatch.setattr(routes, 'SMALLEST_MAP', 12 * 9 * 7 * IMAGES)
    model(x)
    assert sum(chunks) == IMAGES
