"""Single cases in which a fast path could differ from timm's ConvMixer; surgery.py has those that combine."""
import copy
import inspect

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.models.convmixer import ConvMixer as TimmConvMixer
from timm.utils.model import reparameterize_model
from torch.ao.quantization import get_default_qat_qconfig, prepare_qat

from support import assert_close, fast_paths, let_onednn_support, randomize_norms
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


def test_arguments_by_position():
    names = [list(inspect.signature(model).parameters) for model in (TimmConvMixer, ConvMixer)]
    theirs = names[0][:names[0].index('device')]
    assert names[1][:len(theirs)] == theirs


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


def test_a_pointwise_convolution_of_another_size_is_not_fused(x):
    model = randomize_norms(ConvMixer(**SIZE)).eval()
    model.blocks[0][1] = nn.Conv2d(16, 16, 3).eval()
    fused = reparameterize_model(model)
    assert type(fused.blocks[0]) is type(model.blocks[0]) and type(fused.blocks[1]) is not type(model.blocks[1])
    assert_close(fused(x), model(x), 1e-4)


def test_reset_classifier_of_a_half_precision_inference_form(x):
    fused = reparameterize_model(ConvMixer(**SIZE).eval().bfloat16())
    fused.reset_classifier(7)
    assert fused.head.weight.dtype == torch.bfloat16 and fused(x.bfloat16()).shape == (3, 7)


def test_fusing_leaves_the_block_as_it_is():
    block = ConvMixer(**SIZE, act_layer=nn.RReLU).blocks[0]
    block.fuse()
    assert all(module.training for module in block.modules())


@pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
def test_vmap_over_the_backward_pass(training, x):
    jacobians = []
    for model in pair():
        image = x.clone().requires_grad_()
        out = model.train(training)(image)[0, :3]
        jacobians.append(torch.vmap(
            lambda v, image=image, out=out: torch.autograd.grad(out, image, v, retain_graph=True)[0])(torch.eye(3)))
    assert_close(*jacobians)


@pytest.mark.parametrize('grad', [True, False], ids=['grad', 'no-grad'])
@pytest.mark.parametrize('fused', [True, False], ids=['fused', 'layers'])
def test_gradient_checkpointing_does_not_call_the_container(fused, grad, x):
    theirs, ours = pair()
    for model in (theirs.eval(), ours.eval()):
        model.set_grad_checkpointing()
        model.blocks.register_forward_hook(lambda module, args, output: output + 1)
    with torch.set_grad_enabled(grad), fast_paths(fused):
        assert 'hook' not in ours.route(x).reason
        assert_close(ours(x), theirs(x))


class MovingScale(nn.Module):
    """Reads in training a buffer that it changes: in place, or by another in its place."""

    def __init__(self, in_place):
        super().__init__()
        self.in_place = in_place
        self.register_buffer('scale', torch.ones(()))

    def forward(self, x):
        if self.in_place:
            self.scale.mul_(2)
            return x * self.scale.clone()
        self.scale = self.scale * 2
        return x * self.scale


@pytest.mark.parametrize('in_place', [True, False], ids=['in-place', 'replaced'])
def test_checkpointed_blocks_run_again_with_the_buffers_that_they_had(in_place, x):
    results, untouched = [], pair()[1]
    untouched.blocks[1].append(MovingScale(in_place))
    for checkpointing in (False, True):
        model = copy.deepcopy(untouched)
        model.set_grad_checkpointing(checkpointing)
        model(x).square().mean().backward()
        assert model.blocks[1][4].scale == 2
        results.append([parameter.grad for parameter in model.parameters()])
    assert all(map(torch.equal, *results))


def test_checkpoint_debugging(x):
    model = pair()[1]
    model.set_grad_checkpointing()
    model.blocks[1].register_forward_hook(lambda *args: None)
    with torch.utils.checkpoint.set_checkpoint_debug_enabled(True):
        model(x).sum().backward()
    assert model.head.weight.grad is not None


def test_frozen_statistics_are_those_of_the_forward_pass_in_every_backward_pass(x):
    model = pair()[1].eval()
    image = x.clone().requires_grad_()
    out = model(image).square().sum()
    expected, = torch.autograd.grad(out, image, retain_graph=True)
    with torch.no_grad():
        model.blocks[0][3].running_mean.add_(1.)
        model.blocks[1][0].fn[2].running_var.mul_(2.)
    actual, = torch.autograd.grad(out, image, create_graph=True)
    assert_close(actual.detach(), expected)


def test_second_derivatives_in_half_precision_without_affine(x):
    def norm(dim, **kwargs):
        return nn.BatchNorm2d(dim, affine=False, **kwargs)

    errors = []
    model = ConvMixer(**SIZE, norm_layer=norm)
    exact = copy.deepcopy(model).double()
    for fused, half in ((False, False), (False, True), (True, True)):
        tried = copy.deepcopy(model if half else exact)
        with fast_paths(fused), torch.autocast('cpu', torch.bfloat16, enabled=half):
            out = tried(x if half else x.double())
        grads = torch.autograd.grad(out.to(exact.head.weight.dtype).square().sum(), tried.head.weight,
                                    create_graph=True)[0]
        second = torch.autograd.grad(grads.double().square().sum(), list(tried.stem.parameters()))
        errors.append(torch.cat([grad.flatten().double() for grad in second]))
    layers, ours = ((error - errors[0]).norm() for error in errors[1:])
    assert ours <= 1.5 * layers


def test_hooks_on_every_leaf(x):
    results = []
    for model in pair():
        model.eval()
        for module in model.modules():
            if not list(module.children()):
                module.register_forward_hook(lambda module, args, output: output * 1.1)
        results.append((len(list(model.modules())), model(x)))
    assert results[0][0] == results[1][0]
    assert_close(results[0][1], results[1][1])


def test_modules_rebuilt_from_their_children(x):
    def rebuild(module):
        if isinstance(module, nn.Sequential):
            return type(module)(*map(rebuild, module))
        for name, child in module.named_children():
            setattr(module, name, rebuild(child))
        return module

    assert_close(*[rebuild(model.eval())(x) for model in pair()])


@pytest.mark.parametrize('change', [
    lambda model: prepare_qat(model, inplace=True), lambda model: setattr(model.blocks[1], '3', nn.LazyBatchNorm2d()),
], ids=['observers', 'lazy'])
@pytest.mark.filterwarnings('ignore')
def test_checkpointed_buffers_that_the_first_call_makes(change, x):
    results = []
    for model, checkpointing in zip(pair(), (False, True)):
        model.qconfig = get_default_qat_qconfig('x86')
        change(model)
        model.set_grad_checkpointing(checkpointing)
        model(x).square().mean().backward()
        results.append([parameter.grad for parameter in model.parameters()])
    for theirs, ours in zip(*results):
        assert_close(ours, theirs, tolerance=1e-4)


def test_weights_that_come_with_a_hook(x):
    results = []
    for model in pair():
        model.eval()
        conv = model.blocks[0][1]
        weight, conv.weight = conv.weight, None
        with pytest.raises(TypeError):
            model(x)
        model.stem.register_forward_hook(lambda *args, conv=conv, weight=weight: setattr(conv, 'weight', weight))
        results.append(model(x))
    assert_close(*results)


def test_anomaly_detection_with_a_gradient_that_nobody_needs(x):
    """A ReLU passes no gradient to an image that is not a number, if its loss is masked."""
    x[1] = float('nan')
    for model in pair(act_layer=nn.ReLU):
        model.eval().requires_grad_(False)
        image = x.clone().requires_grad_()
        with torch.autograd.detect_anomaly(check_nan=True):
            gradient, = torch.autograd.grad(model(image)[0].sum(), image)
        assert gradient.isfinite().all()


def test_running_variance_near_the_end_of_float16(x):
    results = []
    for model in pair(depth=1):
        model.half().train()
        model(x.half().abs() * 1000)
        model.stem[2].running_var[0] = float('inf')
        model(x.half())
        results.append(model.stem[2].running_var.float())
    assert results[0][0] == results[1][0] == float('inf')
    torch.testing.assert_close(results[1][1:], results[0][1:], rtol=2e-2, atol=0.)
    assert results[0][1:].max() > 7000


def test_keys_that_do_not_fit():
    for model in pair():
        with pytest.raises(RuntimeError):
            model.load_state_dict({f'encoder.{key}': value for key, value in model.state_dict().items()})
