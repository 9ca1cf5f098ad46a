"""The model against timm's own ConvMixer, and its additional features."""
import copy

import pytest
import timm
import torch
import torch.nn as nn
from timm.models.convmixer import ConvMixer as TimmConvMixer
from torch.utils.flop_counter import FlopCounterMode

from support import assert_close, lower_thresholds, randomize_norms
from timm_convmixer.convmixer import ConvMixer, default_cfgs
from timm_convmixer.kernels import set_fused

# Name: dim, depth, kernel_size, patch_size, image size, parameters, GMACs.
VARIANTS = {
    'convmixer_1536_20': (1536, 20, 9, 7, 224, 51_625_960, 51.10),
    'convmixer_1536_20_ks3_p7': (1536, 20, 3, 7, 224, 49_414_120, 48.83),
    'convmixer_1024_20_ks9_p14': (1024, 20, 9, 14, 224, 24_383_464, 5.95),
    'convmixer_1024_16_ks9_p7': (1024, 16, 9, 7, 224, 19_381_224, 18.69),
    'convmixer_1024_12_ks8_p7': (1024, 12, 8, 7, 224, 14_621_672, 13.85),
    'convmixer_768_32': (768, 32, 7, 7, 224, 21_110_248, 20.68),
    'convmixer_512_16_ks8_p7': (512, 16, 8, 7, 224, 5_357_544, 4.91),
    'tf_convmixer_512_16_ks8_p7': (512, 16, 8, 7, 224, 5_357_544, 4.91),
    'convmixer_512_12_ks8_p7': (512, 12, 8, 7, 224, 4_165_608, 3.70),
    'convmixer_256_8_ks5_p2': (256, 8, 5, 2, 32, 594_186, 0.15),
    'convmixer_256_8_ks9_p1': (256, 8, 9, 1, 32, 706_570, 0.71),
}
PRETRAINED = ('convmixer_1536_20', 'convmixer_768_32', 'convmixer_1024_20_ks9_p14')


def tiny(**kwargs) -> ConvMixer:
    return ConvMixer(**{**dict(dim=16, depth=2, kernel_size=5, patch_size=4, num_classes=7), **kwargs})


@pytest.fixture
def plain_paths():
    set_fused(False)
    yield
    set_fused(True)


@pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
@pytest.mark.parametrize('act_layer', [nn.GELU, nn.ReLU], ids=['gelu', 'relu'])
@pytest.mark.parametrize('kernel_size,patch_size', [(9, 7), (3, 7), (9, 14), (8, 7), (7, 7), (5, 2), (9, 1), (8, 2)])
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=['nchw', 'nhwc'])
def test_equals_timm(kernel_size, patch_size, act_layer, training, memory_format, plain_paths):
    args = dict(
        dim=24, depth=3, kernel_size=kernel_size, patch_size=patch_size, num_classes=11, act_layer=act_layer)
    torch.manual_seed(0)
    theirs = TimmConvMixer(**args)
    torch.manual_seed(0)
    ours = ConvMixer(**args)

    assert list(ours.state_dict()) == list(theirs.state_dict())
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), f'{key} is initialised differently'

    randomize_norms(theirs)
    ours.load_state_dict(theirs.state_dict())
    inputs = []
    for model in (ours, theirs):
        model.train(training)
        x = torch.randn(3, 3, 9 * patch_size, 6 * patch_size + 1, generator=torch.Generator().manual_seed(1))
        # Use one memory format: another changes the order of summation.
        inputs.append(x.to(memory_format=memory_format).requires_grad_())
    outputs = [model(x) for model, x in zip((ours, theirs), inputs)]
    weights = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(2))
    for output in outputs:
        (output * weights).sum().backward()

    assert_close(*outputs)
    assert_close(*(x.grad for x in inputs))
    for ours_parameter, theirs_parameter in zip(ours.parameters(), theirs.parameters()):
        assert_close(ours_parameter.grad, theirs_parameter.grad)
    for ours_buffer, theirs_buffer in zip(ours.buffers(), theirs.buffers()):
        assert_close(ours_buffer.double(), theirs_buffer.double())


@pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
@pytest.mark.parametrize('kernel_size', [3, 7, 8, 9])
def test_the_default_is_as_exact_as_timms_model(kernel_size, training, monkeypatch):
    lower_thresholds(monkeypatch)
    torch.manual_seed(0)
    args = dict(dim=32, depth=2, kernel_size=kernel_size, patch_size=2, num_classes=11)
    theirs, ours = TimmConvMixer(**args).train(training), ConvMixer(**args).train(training)
    randomize_norms(theirs)
    ours.load_state_dict(theirs.state_dict())
    exact = copy.deepcopy(theirs).double()
    x = torch.randn(4, 3, 48, 48, generator=torch.Generator().manual_seed(1))
    results = []
    channels_last = copy.deepcopy(theirs), x.to(memory_format=torch.channels_last)
    for model, image in ((ours, x), (theirs, x), channels_last, (exact, x.double())):
        output = model(image)
        output.square().sum().backward()
        results.append([output, *(parameter.grad for parameter in model.parameters())])
    assert_close(results[0][0], results[1][0])
    # Some gradients nearly cancel out. Ours must be as accurate as timm's in either memory format, by norm: the largest
    # of a few errors is a matter of luck.
    for our, *both, true in zip(*results):
        allowed = max(2 * max((their - true).norm() for their in both), 1e-6 * true.norm())
        assert (our - true).norm() <= allowed


@pytest.mark.parametrize('name', VARIANTS)
def test_variant_counts(name):
    dim, depth, kernel_size, patch_size, size, parameters, gmacs = VARIANTS[name]
    model = timm.create_model(name, device='meta').eval()
    assert type(model) is ConvMixer
    assert sum(p.numel() for p in model.parameters()) == parameters
    with FlopCounterMode(display=False) as counter:
        output = model(torch.empty(1, 3, size, size, device='meta'))
    assert output.shape == (1, 1000 if size == 224 else 10)
    assert round(counter.get_total_flops() / 2e9, 2) == gmacs
    block = model.blocks[0]
    assert (model.num_features, len(model.blocks)) == (dim, depth)
    assert block[0].fn[0].kernel_size == (kernel_size, kernel_size)
    assert model.stem[0].stride == model.stem[0].kernel_size == (patch_size, patch_size)
    assert type(block[2]) is (nn.ReLU if name == 'convmixer_768_32' else nn.GELU)


def test_registry():
    names = timm.list_models(module='convmixer')
    assert set(names) == {*VARIANTS, 'test_convmixer'}
    assert set(timm.list_pretrained('convmixer*')) == {f'{name}.in1k' for name in PRETRAINED}
    assert timm.list_pretrained('test_convmixer*') == ['test_convmixer.digits']
    assert all(timm.model_entrypoint(name).__module__ == 'timm_convmixer.convmixer' for name in names)


@pytest.mark.parametrize('name', [*VARIANTS, 'test_convmixer'])
def test_default_cfg(name):
    cfg = timm.get_pretrained_cfg(name)
    assert (cfg.first_conv, cfg.classifier) == ('stem.0', 'head')
    assert cfg.license == ('apache-2.0' if name.startswith('tf_') else 'mit')
    assert cfg.architecture == name
    assert cfg.paper_ids == 'arXiv:2201.09792'
    if name == 'test_convmixer':
        assert (cfg.input_size, cfg.num_classes, cfg.tag) == ((3, 32, 32), 10, 'digits')
        return
    size = VARIANTS[name][4]
    assert cfg.input_size == (3, size, size)
    if name.startswith('tf_'):  # KerasCV's preprocessing: a central square, bilinear, pixels in [0, 1]
        assert (cfg.tag, cfg.num_classes, cfg.crop_pct, cfg.interpolation) == ('keras_in1k', 1000, 1.0, 'bilinear')
        assert (cfg.mean, cfg.std, cfg.hf_hub_id) == ((0., 0., 0.), (1., 1., 1.), None)
        return
    assert (cfg.num_classes, cfg.crop_pct) == ((1000, 0.96) if size == 224 else (10, 1.0))
    assert cfg.interpolation == 'bicubic'
    assert cfg.origin_url.startswith('https://github.com/locuslab/convmixer')
    assert cfg.hf_hub_id == (f'timm/{name}.in1k' if name in PRETRAINED else None)
    assert cfg.tag == ('in1k' if name in PRETRAINED else 'untrained')


@pytest.mark.parametrize('name', PRETRAINED)
def test_default_cfg_is_timms(name):
    from timm.models import convmixer
    ours, theirs = (cfgs[name].default.to_dict() for cfgs in (default_cfgs, convmixer.default_cfgs))
    assert {key: ours[key] for key in theirs} == theirs


def test_architecture_can_be_overridden():
    model = timm.create_model(
        'convmixer_768_32', dim=32, depth=3, patch_size=14, kernel_size=9, act_layer='silu', num_classes=5, in_chans=1)
    assert model.stem[0].weight.shape == (32, 1, 14, 14)
    assert model.blocks[2][0].fn[0].weight.shape == (32, 1, 9, 9)
    assert isinstance(model.blocks[0][2], nn.SiLU)
    assert model(torch.randn(2, 1, 28, 42)).shape == (2, 5)


def test_batchnorm_arguments():
    model = tiny(bn_momentum=0.03, bn_eps=1e-3)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == 5 and all((norm.momentum, norm.eps) == (0.03, 1e-3) for norm in norms)
    norm = tiny().stem[2]
    assert (norm.momentum, norm.eps) == (0.1, 1e-5)


@pytest.mark.parametrize('norm_layer', ['groupnorm', 'groupnorm1', 'layernorm2d', nn.InstanceNorm2d])
def test_batch_independent_norm(norm_layer):
    model = tiny(dim=32, norm_layer=norm_layer).train()
    x = torch.randn(4, 3, 20, 20)
    assert_close(model(x)[:1], model(x[:1]))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def test_drop_path_rises_with_depth():
    model = tiny(depth=5, drop_path_rate=0.4)
    rates = [block[0].fn[3].drop_prob if len(block[0].fn) == 4 else 0. for block in model.blocks]
    assert rates == pytest.approx([0., 0.1, 0.2, 0.3, 0.4])
    assert list(model.state_dict()) == list(tiny(depth=5).state_dict())


def test_drop_path_drops_the_branch_alone():
    block = tiny(drop_path_rate=0.5).train().blocks[1]
    torch.manual_seed(0)
    x = torch.randn(64, 16, 6, 6)
    with torch.no_grad():
        y = block[0](x)
    dropped = (y == x).flatten(1).all(dim=1)
    assert 16 < dropped.sum() < 48
    with torch.no_grad():
        assert not (block[0].eval()(x) == x).flatten(1).all(dim=1).any()


@pytest.mark.parametrize('output_fmt', ['NCHW', 'NHWC', 'NLC'])
def test_forward_intermediates(output_fmt):
    model = tiny(depth=4).eval()
    x = torch.randn(2, 3, 20, 24)
    expected, y = [], model.stem(x)
    for block in model.blocks:
        y = block(y)
        expected.append(y)
    final, intermediates = model.forward_intermediates(x, indices=[1, -1], output_fmt=output_fmt)
    assert torch.equal(final, model.forward_features(x))
    for intermediate, features in zip(intermediates, (expected[1], expected[3])):
        if output_fmt == 'NHWC':
            features = features.permute(0, 2, 3, 1)
        elif output_fmt == 'NLC':
            features = features.flatten(2).transpose(1, 2)
        assert torch.equal(intermediate, features)
    only = model.forward_intermediates(x, indices=1, stop_early=True, intermediates_only=True)
    assert len(only) == 1 and torch.equal(only[0], expected[3])
    assert len(model.forward_intermediates(x, intermediates_only=True)) == 4


def test_features_only():
    whole = timm.create_model('test_convmixer').eval()
    features = timm.create_model('test_convmixer', features_only=True, out_indices=(0, 2)).eval()
    features.load_state_dict({f'model.{k}': v for k, v in whole.state_dict().items()}, strict=False)
    assert features.feature_info.channels() == [64, 64]
    assert features.feature_info.reduction() == [4, 4]
    assert len(features.model.blocks) == 3
    x = torch.randn(2, 3, 32, 40)
    expected = whole.forward_intermediates(x, indices=[0, 2], intermediates_only=True)
    for actual, wanted in zip(features(x), expected):
        assert torch.equal(actual, wanted)
    assert len(timm.create_model('test_convmixer', features_only=True)(x)) == 3


@pytest.mark.parametrize('global_pool,features', [('avg', 16), ('max', 16), ('avgmax', 16), ('catavgmax', 32)])
def test_global_pool(global_pool, features):
    model = tiny(global_pool=global_pool)
    assert model.head_hidden_size == model.head.in_features == features
    x = torch.randn(2, 3, 20, 24)
    assert model(x).shape == (2, 7)
    assert model.forward_head(model.forward_features(x), pre_logits=True).shape == (2, features)


def test_no_pool_no_head():
    model = tiny(num_classes=0, global_pool='')
    assert model(torch.randn(2, 3, 20, 24)).shape == (2, 16, 5, 6)
    assert tiny(num_classes=0, global_pool=None)(torch.randn(2, 3, 20, 24)).shape == (2, 16, 5, 6)
    assert tiny(global_pool='CatAvgMax')(torch.randn(2, 3, 20, 24)).shape == (2, 7)


def test_reset_classifier_keeps_device_dtype_and_mode():
    model = tiny(dtype=torch.float64).eval()
    model.reset_classifier(3, 'catavgmax')
    assert model.head.weight.shape == (3, 32) and model.head.weight.dtype == torch.float64
    assert not model.head.training and not model.global_pool.training
    assert model(torch.randn(1, 3, 8, 8, dtype=torch.float64)).shape == (1, 3)
    model.reset_classifier(0)
    assert isinstance(model.get_classifier(), nn.Identity) and model.num_classes == 0
    meta = tiny(device='meta')
    meta.reset_classifier(4)
    assert meta.head.weight.is_meta


def test_factory_kwargs():
    model = tiny(device='meta', dtype=torch.bfloat16)
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in model.parameters())


def test_torchscript_and_fx():
    model = tiny().eval()
    randomize_norms(model)
    x = torch.randn(2, 3, 20, 24)
    expected = model(x)
    # Scripting and tracing record the layers; eager mode may take a fast path.
    assert_close(torch.fx.symbolic_trace(model)(x), expected)
    scripted = torch.jit.script(model)
    assert_close(scripted(x), expected)
    other = tiny().eval()
    scripted.load_state_dict(other.state_dict())
    assert_close(scripted(x), other(x))


def test_layer_groups():
    from timm.models import group_parameters
    groups = group_parameters(tiny(depth=3), tiny(depth=3).group_matcher())
    names = [sorted(name.split('.')[0] for name in group) for group in groups.values()]
    assert [set(group) for group in names] == [{'stem'}, {'blocks'}, {'blocks'}, {'blocks'}, {'head'}]


@pytest.mark.parametrize('kwargs,error,words', [
    (dict(dim=0), ValueError, 'dim=0'),
    (dict(dim=16.0), TypeError, 'dim=16.0'),
    (dict(depth=-1), ValueError, 'depth=-1'),
    (dict(depth='3'), TypeError, "depth='3'"),
    (dict(kernel_size=0), ValueError, 'kernel_size=0'),
    (dict(kernel_size=(3, 5)), TypeError, 'kernel_size=(3, 5)'),
    (dict(patch_size=0), ValueError, 'patch_size=0'),
    (dict(in_chans=0), ValueError, 'in_chans=0'),
    (dict(num_classes=-1), ValueError, 'num_classes=-1'),
    (dict(num_classes=True), TypeError, 'num_classes=True'),
    (dict(drop_rate=1.0), ValueError, 'drop_rate=1.0'),
    (dict(drop_path_rate=-0.1), ValueError, 'drop_path_rate=-0.1'),
    (dict(drop_path_rate='0.1'), TypeError, "drop_path_rate='0.1' must be a finite number of at least 0"),
    (dict(act_layer='gleu'), ValueError, "act_layer='gleu'"),
    (dict(act_layer=3), TypeError, 'act_layer=3'),
    (dict(act_layer=nn.GELU()), TypeError, "act_layer=GELU(approximate='none') must be a name, or a class"),
    (dict(norm_layer='batchnorm3d'), ValueError, "norm_layer='batchnorm3d'"),
    (dict(norm_layer='layernorm'), ValueError, 'layernorm2d'),
    (dict(norm_layer='RMS_NormFp32'), ValueError, "norm_layer='RMS_NormFp32' expects channels last"),
    (dict(norm_layer=nn.LayerNorm), ValueError, "use 'layernorm2d'"),
    (dict(norm_layer=timm.layers.SimpleNorm), ValueError, "use 'simplenorm2d'"),
    (dict(norm_layer='batchnorm1d'), ValueError, "norm_layer='batchnorm1d' makes no layer"),
    (dict(norm_layer=nn.BatchNorm3d, bn_eps=1e-3), ValueError, 'BatchNorm3d'),
    (dict(norm_layer=nn.InstanceNorm1d), ValueError, 'InstanceNorm1d'),
    (dict(act_layer=nn.Threshold), TypeError, 'makes no layer without arguments'),
    (dict(norm_layer=nn.BatchNorm2d(64)), TypeError, 'must be a name, or a class'),
    (dict(norm_layer='groupnorm', dim=48), ValueError, "norm_layer='groupnorm' makes no layer for dim=48 channels"),
    (dict(norm_layer=nn.GroupNorm), ValueError, 'GroupNorm'),
    (dict(norm_layer='groupnorm', bn_eps=1e-3), ValueError, 'bn_eps=0.001'),
    (dict(bn_eps=-1e-3), ValueError, 'bn_eps=-0.001 must be a finite number of at least 0'),
    (dict(bn_momentum='x'), TypeError, "bn_momentum='x' must be a finite number of at least 0"),
    (dict(global_pool='mean'), ValueError, "global_pool='mean'"),
    (dict(global_pool=nn.AvgPool2d), ValueError, 'Unknown global_pool='),
    (dict(kernel=3), TypeError, "did you mean 'kernel_size'"),
    (dict(drop_path=0.1), TypeError, "did you mean 'drop_path_rate'"),
    (dict(input_size=(3, 64, 64)), TypeError, 'it takes images of any size'),
    (dict(drop_block_rate=0.1), TypeError, 'it has no DropBlock'),
    (dict(embed_dim=64), TypeError, "did you mean 'dim'"),
    (dict(feature_cfg={}), TypeError, "unexpected keyword argument 'feature_cfg'"),
], ids=lambda value: str(value) if isinstance(value, dict) else '')
def test_bad_arguments_are_named(kwargs, error, words):
    with pytest.raises(error) as raised:
        timm.create_model('test_convmixer', **kwargs)
    assert words in str(raised.value)


def test_functions_that_make_no_layer():
    for name, value in (('norm_layer', {}.get), ('act_layer', torch.relu), ('act_layer', lambda: None)):
        with pytest.raises(TypeError, match=f'^{name}='):
            timm.create_model('test_convmixer', **{name: value})


def test_an_unknown_argument_is_pythons_error():
    with pytest.raises(TypeError, match="got an unexpected keyword argument 'img_size'"):
        timm.create_model('test_convmixer', img_size=64)


@pytest.mark.parametrize('shape', [(1, 3, 3, 8), (1, 3, 8, 2), (1, 4, 8, 8), (3, 8, 8), (0, 3, 2, 2)], ids=str)
@pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
def test_bad_inputs_raise_what_timms_model_raises(shape, training):
    ours = tiny().train(training)
    theirs = TimmConvMixer(16, 2, kernel_size=5, patch_size=4, num_classes=7).train(training)
    for method in ('forward', 'forward_features', 'forward_intermediates'):
        with pytest.raises((RuntimeError, ValueError)) as expected:
            getattr(theirs, method)(torch.zeros(shape))
        with pytest.raises(expected.type) as raised:
            getattr(ours, method)(torch.zeros(shape))
        assert str(raised.value) == str(expected.value)


def test_shallow_features():
    model = timm.create_model('test_convmixer', depth=2, features_only=True)
    assert [len(model.feature_info), len(model(torch.randn(1, 3, 32, 32)))] == [2, 2]


def test_forward_intermediates_can_be_scripted():
    class Wrapper(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x: torch.Tensor):
            return self.model.forward_intermediates(x, intermediates_only=True)

    wrapper = Wrapper(timm.create_model('test_convmixer').eval())
    x = torch.randn(1, 3, 32, 32)
    assert all(map(torch.equal, torch.jit.script(wrapper)(x), wrapper(x)))


def test_pool_size_of_a_pretrained_cfg_is_kept():
    given = dict(input_size=(3, 32, 32), pool_size=(4, 4))
    for cfg in (given, timm.models.PretrainedCfg(**given)):
        assert tuple(timm.create_model('test_convmixer', pretrained_cfg=cfg).pretrained_cfg['pool_size']) == (4, 4)
    assert timm.create_model('test_convmixer').pretrained_cfg['pool_size'] == (8, 8)
