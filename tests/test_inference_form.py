"""The inference form, from ``reparameterize_model()``, with random BatchNorm statistics."""
import copy
import io

import pytest
import timm
import torch
import torch.nn as nn
from timm.utils.model import reparameterize_model

from support import assert_close, let_onednn_support, randomize_norms
from timm_convmixer.convmixer import ConvMixer
from timm_convmixer.inference_form import FusedConvMixerBlock, FusedStem
from timm_convmixer.layers import ConvMixerBlock, ConvMixerStem
from timm_convmixer.plain_layers import find_block, find_stem


def tiny(**kwargs) -> ConvMixer:
    model = ConvMixer(**{**dict(dim=24, depth=3, kernel_size=5, patch_size=4, num_classes=7), **kwargs}).eval()
    randomize_norms(model)
    return model


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 3, 36, 30, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize('kwargs', [
    dict(),
    dict(act_layer=nn.ReLU),
    dict(act_layer='silu'),
    dict(act_layer='prelu'),
    dict(kernel_size=8, patch_size=2),
    dict(kernel_size=1, patch_size=1),
    dict(drop_path_rate=0.5, drop_rate=0.5),
    dict(bn_eps=0.1),
], ids=str)
def test_equals_the_model(kwargs, x):
    model = tiny(**kwargs)
    fused = reparameterize_model(model)
    assert type(fused.stem) is FusedStem
    assert all(type(block) is FusedConvMixerBlock for block in fused.blocks)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    assert type(model.blocks[0]) is ConvMixerBlock and type(model.stem) is ConvMixerStem
    with torch.no_grad():
        assert_close(fused(x), model(x), 1e-4)
        expected = model.forward_intermediates(x, output_fmt='NLC', intermediates_only=True)
        for actual, wanted in zip(fused.forward_intermediates(x, output_fmt='NLC', intermediates_only=True), expected):
            assert_close(actual, wanted, 1e-4)


def test_folds_are_exact_in_float64(x):
    """Each fold is exact in float64, also at the zero-padded borders."""
    model = tiny(dtype=torch.float64)
    with torch.no_grad():
        assert_close(reparameterize_model(model)(x.double()), model(x.double()), 1e-12)


def test_the_second_shift_cannot_be_folded(x):
    """Folded into the next convolution's bias, it is right inside the feature map but wrong at its border."""
    block = tiny(dtype=torch.float64, depth=1).blocks[0].fuse()
    depthwise, shift = block.depthwise, block.shift.view(-1, 1, 1)
    z = torch.randn(1, 24, 9, 9, dtype=torch.float64)
    exact = depthwise(z + shift)
    folded = depthwise(z) + (depthwise.weight.sum(dim=(1, 2, 3)) * block.shift).view(-1, 1, 1)
    inside = (slice(None), slice(None), slice(2, -2), slice(2, -2))
    assert_close(folded[inside], exact[inside], 1e-12)
    assert (folded - exact).abs().max() > 1e-2


@pytest.mark.parametrize('dtype,kept', [
    (torch.float64, torch.float64), (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32), (torch.float16, torch.float32),
])
def test_affine_is_computed_in_float64(dtype, kept):
    block = tiny(dtype=dtype, depth=1).blocks[0]
    norm = block[3]
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    fused = block.fuse()
    torch.testing.assert_close(fused.scale, scale.to(kept))
    torch.testing.assert_close(fused.shift, (norm.bias.double() - norm.running_mean.double() * scale).to(kept))
    assert fused.pointwise.bias.dtype == fused.pointwise.weight.dtype == dtype


@pytest.mark.parametrize('fuse_first', [False, True])
@pytest.mark.parametrize('supported', [True, False], ids=['in-half', 'in-float32'])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_is_as_close_as_pytorchs(dtype, supported, fuse_first, x, monkeypatch):
    let_onednn_support(monkeypatch, *([dtype] if supported else []))
    torch.manual_seed(0)
    model = tiny(dim=64, depth=4)
    half = copy.deepcopy(model).to(dtype)
    fused = reparameterize_model(model).to(dtype) if fuse_first else reparameterize_model(half)
    with torch.no_grad():
        exact = (model if fuse_first else half).double().forward_features(x.double())
        half.to(dtype)
        ours, theirs = (
            (module.forward_features(x.to(dtype)).double() - exact).square().mean().sqrt() for module in (fused, half))
    assert 0 < ours <= 1.5 * theirs


def test_autocast_is_as_close_as_pytorchs(x):
    torch.manual_seed(0)
    model = tiny(dim=64, depth=4)
    fused = reparameterize_model(model)
    with torch.no_grad():
        with torch.autocast('cpu', torch.bfloat16):
            ours, theirs = fused.forward_features(x), model.forward_features(x)
        assert ours.dtype == theirs.dtype == torch.bfloat16
        exact = model.double().forward_features(x.double())
    ours, theirs = ((y.double() - exact).square().mean().sqrt() for y in (ours, theirs))
    assert 0 < ours <= 1.5 * theirs


def test_state_dict(x):
    fused = reparameterize_model(tiny())
    assert list(fused.stem.state_dict()) == ['scale', 'shift', 'conv.weight', 'conv.bias']
    assert sorted(fused.blocks[0].state_dict()) == [
        'depthwise.bias', 'depthwise.weight', 'pointwise.bias', 'pointwise.weight', 'scale', 'shift', 'spatial_scale']
    file = io.BytesIO()
    torch.save(fused.state_dict(), file)
    file.seek(0)
    other = reparameterize_model(tiny(act_layer=nn.GELU))
    for parameter in other.parameters():
        nn.init.zeros_(parameter.data)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), fused(x))


def test_copies_are_plain(x):
    """Copied, moved, cast, loaded or pickled, it is still what its constructor made."""
    fused = reparameterize_model(tiny())
    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    loaded = copy.deepcopy(fused)
    loaded.load_state_dict(fused.state_dict(), assign=True)
    moved = copy.deepcopy(fused).to('meta').to_empty(device='cpu')
    moved.load_state_dict(fused.state_dict())
    set_one_by_one = copy.deepcopy(fused).to('meta').to_empty(device='cpu')
    for empty, value in zip(set_one_by_one.state_dict().values(), fused.state_dict().values()):
        empty.copy_(value)
    for part in (set_one_by_one.stem, *set_one_by_one.blocks):
        part.init_non_persistent_buffers()
    assert all(torch.equal(*zeros) for zeros in zip(set_one_by_one.buffers(), fused.buffers()))
    cast = copy.deepcopy(fused).to(torch.bfloat16)
    with torch.no_grad():
        for other in (fused, copy.deepcopy(fused), torch.load(file, weights_only=False), loaded, moved, cast):
            assert find_stem(other.stem, 'stem') == (other.stem, '')
            assert all(find_block(block, 'block') == (block, '') for block in other.blocks)
            if other is not cast:
                assert torch.equal(other(x), fused(x))


def test_train_is_refused():
    fused = reparameterize_model(tiny())
    assert not fused.eval().training
    with pytest.raises(RuntimeError, match='FusedStem is an inference form and cannot train'):
        fused.train()
    with pytest.raises(RuntimeError, match='FusedConvMixerBlock is an inference form and cannot train'):
        fused.blocks[0].train()


def test_copies_moves_and_gradients(x):
    fused = reparameterize_model(tiny())
    assert torch.equal(copy.deepcopy(fused)(x), fused(x))
    assert all(parameter.dtype == torch.float64 for parameter in copy.deepcopy(fused).double().parameters())
    assert all(parameter.is_meta for parameter in copy.deepcopy(fused).to('meta').parameters())
    assert not any(parameter.requires_grad for parameter in [*fused.stem.parameters(), *fused.blocks.parameters()])
    model = tiny()
    gradients = []
    for module in (model, reparameterize_model(model)):
        image = x.clone().requires_grad_()
        module(image).square().sum().backward()
        gradients.append(image.grad)
    assert_close(*gradients, 1e-4)


def test_features_only(x):
    model = timm.create_model('test_convmixer', features_only=True, out_indices=(0, 3)).eval()
    randomize_norms(model)
    fused = reparameterize_model(model)
    assert type(fused.model.blocks[0]) is FusedConvMixerBlock
    for actual, expected in zip(fused(x), model(x)):
        assert_close(actual, expected, 1e-4)


def test_reset_classifier_of_the_inference_form(x):
    fused = reparameterize_model(tiny())
    fused.reset_classifier(3)
    assert fused(x).shape == (2, 3)


def test_what_cannot_be_fused_stays(x):
    model = tiny(norm_layer='groupnorm1')
    assert reparameterize_model(model).blocks[0].__class__ is ConvMixerBlock

    class Doubled(nn.BatchNorm2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    def subclass(block: ConvMixerBlock) -> None:
        doubled = Doubled(24).eval()
        doubled.load_state_dict(block[3].state_dict())
        block[3] = doubled

    for change in (
            lambda block: block[1].register_forward_hook(lambda module, args, output: 2 * output),
            lambda block: block[0].fn.append(nn.Dropout2d(0.)),
            lambda block: block.__delitem__(3),
            lambda block: setattr(block[0], 'fn', nn.Sequential(block[0].fn)),
            lambda block: setattr(block[0].fn[0], 'padding_mode', 'circular'),
            lambda block: setattr(block[3], 'forward', lambda x: 3 * x),
            lambda block: block[3].train(),
            lambda block: nn.utils.parametrizations.weight_norm(block[1]),
            subclass,
    ):
        model = tiny()
        change(model.blocks[1])
        fused = reparameterize_model(model)
        assert [type(block) for block in fused.blocks] == [FusedConvMixerBlock, ConvMixerBlock, FusedConvMixerBlock]
        assert_close(fused(x), model(x), 1e-4)


def test_normalisations_without_affine_and_frozen_ones(x):
    from timm.utils.model import freeze_batch_norm_2d

    def norm_layer(dim, **kwargs):
        return nn.BatchNorm2d(dim, affine=False, **kwargs)

    model = ConvMixer(dim=8, depth=2, kernel_size=3, patch_size=4, norm_layer=norm_layer).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    assert_close(reparameterize_model(model)(x), model(x), 1e-4)

    model = tiny()
    model.blocks = freeze_batch_norm_2d(model.blocks)
    fused = reparameterize_model(model)
    assert type(fused.blocks[0]) is FusedConvMixerBlock
    assert_close(fused(x), model(x), 1e-4)


def test_compiles_and_exports(x):
    model = tiny()
    fused = reparameterize_model(model)
    expected = fused(x)
    assert_close(torch.compile(fused, fullgraph=True, backend='aot_eager')(x), expected)
    assert_close(torch.export.export(fused, (x,)).module()(x), expected)
    assert_close(torch.jit.script(fused)(x), expected)
    assert_close(torch.fx.symbolic_trace(fused)(x), expected)
