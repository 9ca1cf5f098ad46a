"""The route of a batch, and the reason given to the user."""
import functools

import pytest
import timm
import torch
import torch.nn as nn
from timm.utils.model import reparameterize_model
from torch.utils.flop_counter import FlopCounterMode

from interpreter import Interpreter
from support import fast_paths, let_onednn_support
from timm_convmixer import layers, plain, plain_layers, routes
from timm_convmixer.convmixer import ConvMixer
from timm_convmixer.kernels.support import suggest_memory_format
from timm_convmixer.plain import find_patched

pytestmark = pytest.mark.usefixtures('small_maps')


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))


def tiny(**kwargs) -> ConvMixer:
    torch.manual_seed(0)
    return ConvMixer(**{**dict(dim=16, depth=3, kernel_size=5, patch_size=2, num_classes=5), **kwargs})


def test_a_plain_model(x):
    model = tiny()
    assert model.route(x) == ('training', 'gradients are needed; every layer is plain')
    with torch.no_grad():
        assert model.route(x).name == 'layers' and 'stem is in training mode' in model.route(x).reason
    model.eval()
    assert model.route(x).name == 'training'
    for form in (model, reparameterize_model(model)):
        with torch.no_grad():
            assert form.route(x) == ('inference', 'no gradients are needed; every layer is plain')
    model.requires_grad_(False)
    assert model.route(x).name == 'inference'
    assert model.route(x.requires_grad_()).name == 'training'


def test_gradient_checkpointing(x):
    model = tiny()
    model.set_grad_checkpointing()
    assert model.route(x) == ('training', 'gradients are needed, gradient checkpointing; every layer is plain')
    with fast_paths(False):
        route = model.route(x)
    assert route.name == 'training' and 'of called blocks: fast paths are switched off' in route.reason


def test_a_called_layer_may_need_gradients(x):
    model = tiny().requires_grad_(False)
    model.blocks[0][1].register_forward_hook(lambda *_: None)
    assert model.route(x).reason.startswith('a called layer may need gradients; 1 of ')


def test_functions_in_place_of_blocks_are_called(x):
    model = tiny()
    blocks = model.blocks
    del model.blocks
    model.blocks = lambda x: blocks(x)
    assert model.route(x) == ('layers', 'the stem or the blocks are not a module')


def test_the_situation(x, monkeypatch):
    model = tiny()

    def reason() -> str:
        route = model.route(x)
        assert route.name == 'layers'
        return route.reason

    with fast_paths(False):
        assert 'TIMM_CONVMIXER_FUSED=0' in reason()
    with FlopCounterMode(display=False):
        assert 'watches' in reason()
    with torch.device('cpu'):
        assert model.route(x).name == 'training'
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert 'watches' in reason()
    finally:
        handle.remove()
    with torch.autograd.forward_ad.dual_level():
        assert 'forward-mode' in reason()
    assert model.route(x[0]).reason == 'the input has the shape (3, 24, 24)'
    assert model.route(x.half()).name == 'layers'
    model.half()
    for supported in ([], [torch.float16]):
        let_onednn_support(monkeypatch, *supported)
        assert model.route(x.half()).name == 'training'
    model.double()
    with torch.no_grad():
        assert model.eval().route(x.double()).reason == 'stem would run in torch.float64 on a CPU'


def test_small_maps(x, monkeypatch):
    monkeypatch.setattr(routes, 'SMALLEST_MAP', 2 * 16 * 12 * 12 + 1)
    model = tiny()
    assert model.route(x) == ('layers', 'a feature map of (2, 16, 12, 12) is too small for a fast path to pay')
    # The layers are slower than any fast path where oneDNN does not support their dtype.
    for supported, name in (([torch.bfloat16], 'layers'), ([], 'training')):
        let_onednn_support(monkeypatch, *supported)
        assert model.route(x).name == 'layers'
        with torch.autocast('cpu', torch.bfloat16):
            assert model.route(x).name == name
    monkeypatch.setattr(routes, 'SMALLEST_MAP', 2 * 16 * 12 * 12)
    assert model.route(x).name == 'training'


@pytest.mark.parametrize('change,reason', [
    (lambda m: setattr(m.blocks[1][1], 'stride', (2, 2)), 'blocks.1.1 has stride=(2, 2) instead of (1, 1)'),
    (lambda m: setattr(m.blocks[1][0].fn[0], 'padding_mode', 'circular'),
     "blocks.1.0.fn.0 has padding_mode='circular' instead of 'zeros'"),
    (lambda m: m.blocks[1][0].fn.append(nn.Identity()), "blocks.1.0.fn has the children ['0', '1', '2', '3']"),
    (lambda m: m.blocks[1][0].fn.add_module('drop', timm.layers.DropPath(0.5)), 'blocks.1.0.fn has the children'),
    (lambda m: m.blocks[1][0].fn.register_module('3', None), 'blocks.1.0.fn has the children'),
    (lambda m: m.blocks[1].__delitem__(3), 'blocks.1 has the children'),
    (lambda m: m.blocks[1][2].register_forward_hook(print), 'blocks.1.2 has a hook'),
    (lambda m: m.blocks[1][2].register_full_backward_pre_hook(print), 'blocks.1.2 has a hook'),
    (lambda m: setattr(m.blocks[1][3], 'forward', abs), 'blocks.1.3 has a forward of its own'),
    (lambda m: setattr(m.blocks[1][1], '_conv_forward', abs), 'blocks.1.1 has a _conv_forward of its own'),
    (lambda m: m.blocks[1][1].compile(), 'blocks.1.1 is compiled'),
    (lambda m: m.blocks[1].compile(), 'blocks.1 is compiled'),
    (lambda m: m.blocks.__setitem__(1, nn.Sequential(m.blocks[1])), 'blocks.1 is a Sequential'),
    (lambda m: m.blocks[1].__setitem__(2, nn.SiLU()), 'blocks.1.2 is a SiLU'),
    (lambda m: m.blocks[1].__setitem__(2, nn.GELU('tanh')), "blocks.1.2 has approximate='tanh' instead of 'none'"),
    (lambda m: setattr(m.blocks[1][3], 'track_running_stats', False), 'blocks.1.3 has track_running_stats=False'),
    (lambda m: setattr(m.blocks[1][3], 'running_var', None), 'blocks.1 has a normalisation without running statistics'),
    (lambda m: setattr(m.blocks[1][3], 'eps', torch.tensor(1.)), 'blocks.1 has a normalisation with eps=tensor(1.)'),
    (lambda m: m.blocks[1].__setitem__(1, nn.Conv2d(16, 16, 1, groups=2)), 'blocks.1.1 has groups=2'),
    (lambda m: m.blocks[1].__setitem__(3, nn.BatchNorm2d(8)), 'blocks.1 has a vector of (8,) for 16 channels'),
    (lambda m: m.blocks[1].__setitem__(1, nn.Conv2d(8, 16, 1)), 'a pointwise weight of (16, 8, 1, 1) for 16 channels'),
    (lambda m: m.blocks[1][0].fn.__setitem__(0, nn.Conv2d(16, 16, (1, 5), groups=16, padding='same')),
     'blocks.1 has depthwise kernels of (16, 1, 1, 5)'),
    (lambda m: m.blocks[1][1].double(), 'blocks.1 has a convolution in torch.float64'),
    (lambda m: m.blocks[1][3].half(), 'blocks.1 has normalisations in'),
    (lambda m: nn.utils.parametrizations.weight_norm(m.blocks[1][1]), 'blocks.1.1 is a ParametrizedConv2d'),
], ids=lambda value: value if isinstance(value, str) else '')
def test_the_first_layer_that_is_not_plain_is_named(change, reason, x):
    model = tiny()
    change(model)
    route = model.route(x)
    assert route.name == 'training'
    assert route.reason.startswith('gradients are needed; 1 of 4 parts are called as layers: ')
    assert reason in route.reason


def test_a_plain_tensor_for_a_parameter(x):
    model = tiny()
    norm = model.blocks[1][3]
    weight = norm.weight.detach()
    del norm.weight
    norm.weight = weight
    assert 'blocks.1.3 has other parameters' in model.route(x).reason
    model = tiny()
    vars(model.blocks[1][3])['weight'] = weight
    assert 'blocks.1.3 has a weight of its own' in model.route(x).reason


def test_marks_of_other_libraries_change_nothing(x):
    model = tiny()
    for module in model.modules():
        module._is_hf_initialized = True
    assert model.route(x).reason == 'gradients are needed; every layer is plain'


@pytest.mark.parametrize('owner,name', [
    (nn.Conv2d, 'forward'), (nn.Conv2d, '_conv_forward'), (nn.BatchNorm2d, 'forward'), (nn.Sequential, 'forward'),
    (nn.Module, '__call__'), (nn.ReLU, 'forward'), (nn.functional, 'conv2d'),
], ids=lambda value: getattr(value, '__name__', value))
def test_patched_classes_and_functions(owner, name, x, monkeypatch):
    model = tiny(act_layer=nn.ReLU)
    assert find_patched() == ''
    original = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: original(*args, **kwargs))
    route = model.route(x)
    assert route.name == 'layers' and f'.{name} has been replaced' in route.reason


@pytest.fixture
def unused(monkeypatch):
    """As before the first forward pass of a process."""
    monkeypatch.setattr(plain, '_ORIGINALS', {})
    plain_layers._forms.cache_clear()
    yield
    plain_layers._forms.cache_clear()


@pytest.mark.parametrize('owner', [nn.Conv2d, nn.ReLU, layers.SpatialMixing], ids=lambda owner: owner.__name__)
@pytest.mark.parametrize('method', ['forward', 'forward_intermediates'])
def test_patched_before_the_first_forward_pass(owner, method, x, unused, monkeypatch):
    calls, model, original = [], tiny(act_layer=nn.ReLU), owner.forward

    @functools.wraps(original)
    def forward(*args):
        calls.append(args)
        return original(*args)

    monkeypatch.setattr(owner, 'forward', forward)
    getattr(model, method)(x)
    assert len(calls) == sum(isinstance(module, owner) for module in model.modules())


def test_the_first_forward_pass_draws_no_random_numbers(x, unused):
    model, state = tiny(), torch.get_rng_state()
    model(x)
    assert torch.equal(torch.get_rng_state(), state)


def test_patched_for_the_first_forward_pass_alone(tmp_path):
    with Interpreter({}, tmp_path / 'log') as python:
        assert python.run("""
            from unittest import mock
            import timm, torch
            model, x = timm.create_model('test_convmixer'), torch.zeros(64, 3, 32, 32)
            with mock.patch.object(torch.nn.Conv2d, 'forward', lambda conv, x: 2 * x):
                result = [model.route(x).name]
            result.append(model.route(x).name)
        """) == ['layers', 'training']


class Silent(torch.Tensor):
    """Answers nothing, as tensors that exist for a few operators alone."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        raise RuntimeError(f'{function} is not for these tensors')


@pytest.mark.parametrize('place,part', [
    ('stem.0', 'stem'), ('blocks.1.0.fn.0', 'blocks.1'), ('blocks.1.1', 'blocks.1'), ('blocks.2.3', 'blocks.2'),
])
def test_tensors_of_a_subclass_are_asked_nothing(place, part, x):
    model = tiny()
    parameters = model.get_submodule(place)._parameters
    parameters['weight'] = parameters['weight'].detach().as_subclass(Silent)
    assert f'{place} holds a Silent' in model.route(x).reason
    assert model.get_submodule(part).fuse() is model.get_submodule(part)


@pytest.mark.parametrize('container', [
    lambda blocks: blocks.register_forward_hook(lambda *_: None), lambda blocks: blocks.compile(backend='eager'),
])
def test_the_container_of_the_blocks_is_called(container, x):
    model = tiny()
    container(model.blocks)
    assert model.route(x).name == 'layers' and model.route(x).reason.startswith('blocks ')


def test_no_plain_block_is_no_fast_path(x):
    assert tiny(act_layer='silu').route(x) == ('layers', 'stem.1 is a SiLU')
    assert tiny(norm_layer='groupnorm1').route(x) == ('layers', 'stem.2 is a GroupNorm1')


def test_suggest_memory_format_is_what_convolutions_make(x):
    conv = nn.Conv2d(3, 4, 3)
    wide = torch.randn(2, 3, 9, 11)
    for images in (
            wide, wide.to(memory_format=torch.channels_last), wide[:, :, ::2], wide.transpose(2, 3),
            wide.permute(0, 1, 3, 2).contiguous(memory_format=torch.channels_last)[:, :, 1:, 2:],
            torch.randn(2, 9, 11, 3).permute(0, 3, 1, 2), wide[:1].expand(2, 3, 9, 11),
    ):
        output = conv(images)
        assert output.is_contiguous(memory_format=suggest_memory_format(images))


def test_registered_models_answer():
    model = timm.create_model('test_convmixer')
    assert model.route(torch.randn(64, 3, 32, 32)).name == 'training'
