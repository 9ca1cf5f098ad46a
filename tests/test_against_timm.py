"""Single cases in which a fast path could differ from timm's ConvMixer; surgery.py has those that combine."""
import pytest
import torch
import torch.nn.functional as F
from timm.models.convmixer import ConvMixer as TimmConvMixer

from support import assert_close, let_onednn_support, randomize_norms
from timm_convmixer.convmixer import ConvMixer

SIZE = dict(dim=16, depth=2, kernel_size=5, patch_size=2, num_classes=5)


pytestmark = pytest.mark.usefixtures('small_maps')


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, 3, 24, 24, generator=torch.Generator().manual_seed(0))


def pair(**kwargs):
    """timm's model and ours, with the same weights."""
    theirs, ours = TimmConvMixer(**{**SIZE, **kwargs}), ConvMixer(**{**SIZE, **kwargs})
    randomize_norms(theirs)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def test_gradients_enabled_in_inference_mode(x):
    theirs, ours = pair()
    for model in (theirs.eval(), ours.eval()):
        with torch.inference_mode(), torch.enable_grad():
            result = model(x)
        assert result.is_inference()
    assert ours.route(x).name == 'training'
    with torch.inference_mode(), torch.enable_grad():
        assert ours.route(x).name == 'inference'
        assert_close(ours(x), theirs(x))


@pytest.mark.parametrize('compile', [torch.jit.script, lambda stem: torch.jit.trace(stem, torch.randn(1, 3, 8, 8))],
                         ids=['script', 'trace'])
@pytest.mark.filterwarnings('ignore')
def test_a_scripted_stem(compile, x):
    results = []
    for model in pair():
        model.eval()
        model.stem = compile(model.stem)
        results.append(model(x))
    assert_close(*results)


def test_a_stem_convolution_without_a_weight(x):
    """A hypernetwork gives it one in each call."""
    results = []
    for model in pair():
        conv = model.stem[0]
        weight = conv.weight.detach().clone()
        del conv.weight
        conv.forward = lambda image, conv=conv, weight=weight: F.conv2d(image, weight, conv.bias, conv.stride)
        results.append(model(x))
    assert_close(*results)


def test_load_hooks_see_what_was_given(x):
    theirs, ours = pair()
    given = {f'encoder.{key}': value for key, value in theirs.state_dict().items()}
    asked = []

    def rename(module, state_dict, prefix, *rest):
        for key in [key for key in state_dict if key.startswith('encoder.')]:
            state_dict[key.removeprefix('encoder.')] = state_dict.pop(key)

    other = ConvMixer(**SIZE)
    other.register_load_state_dict_pre_hook(rename)
    other.register_state_dict_pre_hook(lambda *_: asked.append(1))
    assert not any(other.load_state_dict(given))
    assert not asked
    assert_close(other.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize('size', [1, 3])
def test_images_smaller_than_a_patch_in_half_precision(size, monkeypatch):
    let_onednn_support(monkeypatch)
    messages = []
    for model in pair(patch_size=7):
        with torch.no_grad(), pytest.raises(RuntimeError) as raised:
            model.eval().half()(torch.zeros(1, 3, size, size, dtype=torch.float16))
        messages.append(str(raised.value))
    assert messages[0] == messages[1]


def test_images_of_other_channels(monkeypatch):
    monkeypatch.setattr('timm_convmixer.inference._CHUNK_BYTES', 1)
    messages = []
    for model in pair():
        with torch.no_grad(), pytest.raises(RuntimeError) as raised:
            model.eval()(torch.zeros(6, 4, 24, 24))
        messages.append(str(raised.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize('options', [dict(create_graph=True), dict(is_grads_batched=True)], ids=lambda o: next(iter(o)))
def test_parameters_frozen_before_the_backward_pass(options, x):
    gradients = []
    for model in pair():
        image = x.clone().requires_grad_()
        out = model.eval()(image)
        model.requires_grad_(False)
        weights = torch.ones(2, *out.shape) if 'is_grads_batched' in options else torch.ones_like(out)
        gradient, = torch.autograd.grad(out, image, weights, **options)
        gradients.append(gradient.detach())
    assert_close(*gradients)


def test_reset_classifier_of_a_model_without_parameters(x):
    for model in pair():
        for module in model.modules():
            for name in list(module._parameters):
                parameter = module._parameters.pop(name)
                module.register_buffer(name, None if parameter is None else parameter.detach())
        model.reset_classifier(7)
        assert model(x).shape == (3, 7)
