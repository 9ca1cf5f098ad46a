"""The training route, segments in a model, against calling the layers."""
import copy
import itertools

import pytest
import torch
import torch.nn as nn

from segments import assert_all_close
from support import assert_close, fast_paths, kept_maps, let_onednn_support
from timm_convmixer.convmixer import ConvMixer
from timm_convmixer.kernels.support import has_onednn

pytestmark = pytest.mark.usefixtures('small_maps')


def tiny(**kwargs) -> ConvMixer:
    torch.manual_seed(0)
    return ConvMixer(**{**dict(dim=16, depth=3, kernel_size=5, patch_size=2, num_classes=5), **kwargs})


def test_keeps_two_maps_a_block_and_one_with_checkpointing():
    x = torch.randn(2, 3, 24, 24)
    counts = {}
    for checkpointing, fused in itertools.product((False, True), repeat=2):
        with fast_paths(fused):
            models = [tiny(depth=depth) for depth in (3, 4)]
            for model in models:
                model.set_grad_checkpointing(checkpointing)
            first, second = (kept_maps(model, x) for model in models)
        counts[checkpointing, fused] = second - first
    assert counts == {(False, True): 2, (True, True): 1, (False, False): 6, (True, False): 1}


def gradients(model, x, **kwargs):
    model.zero_grad()
    model(x).square().sum().backward(**kwargs)
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize('kwargs', [
    dict(),
    dict(act_layer='relu', kernel_size=4),
    dict(drop_path_rate=0.5, drop_rate=0.2),
    dict(bn_momentum=0.01, bn_eps=0.1),
], ids=lambda kwargs: '-'.join(kwargs) or 'default')
@pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
def test_a_model_trains_as_without(training, kwargs):
    fused = tiny(**kwargs).double().train(training)
    plain = copy.deepcopy(fused)
    x = torch.randn(4, 3, 24, 24, dtype=torch.float64)
    torch.manual_seed(1)
    actual = gradients(fused, x)
    with fast_paths(False):
        torch.manual_seed(1)
        expected = gradients(plain, x)
    assert_all_close(actual, expected, 1e-9)
    for ours, theirs in zip(fused.buffers(), plain.buffers()):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_twice_through_the_same_graph_and_in_two_threads():
    from concurrent.futures import ThreadPoolExecutor

    model, x = tiny().eval(), torch.randn(2, 3, 24, 24)
    loss = model(x).square().sum()
    parameters = list(model.parameters())
    expected = torch.autograd.grad(loss, parameters, retain_graph=True)
    with ThreadPoolExecutor(4) as pool:
        results = pool.map(lambda _: torch.autograd.grad(loss, parameters, retain_graph=True), range(8))
    for result in results:
        assert all(map(torch.equal, result, expected))


def test_gradient_penalty():
    """Double backward of a whole model, as in a gradient penalty."""
    model, x = tiny(depth=2).double(), torch.randn(2, 3, 16, 16, dtype=torch.float64, requires_grad=True)

    def penalty():
        grad, = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), list(model.parameters()), allow_unused=True)

    actual = penalty()
    with fast_paths(False):
        expected = penalty()
    assert [gradient is None for gradient in actual] == [gradient is None for gradient in expected]
    actual, expected = ([gradient for gradient in result if gradient is not None] for result in (actual, expected))
    assert_all_close(actual, expected, 1e-9)


def test_a_patched_forward_and_hooks_of_any_layer_are_called():
    model, x = tiny(), torch.randn(2, 3, 16, 16)
    calls = []
    patched = model.blocks[0][1]
    original = patched.forward
    patched.forward = lambda y: calls.append('patched') or original(y)
    for name in ('stem', 'blocks.1.0', 'blocks.1.0.fn.1', 'blocks.2.2', 'blocks.2.3'):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.append(name))
    model(x)
    assert calls == ['stem', 'patched', 'blocks.1.0.fn.1', 'blocks.1.0', 'blocks.2.2', 'blocks.2.3']


def test_one_value_per_channel_is_pytorchs_error():
    with pytest.raises(ValueError, match='more than 1 value per channel'):
        tiny()(torch.randn(1, 3, 2, 2))


@pytest.mark.parametrize('convert', ['split', 'frozen'])
def test_other_normalisations_are_left_to_themselves(convert):
    from timm.layers import convert_splitbn_model, freeze_batch_norm_2d

    model = tiny()
    model = dict(split=lambda model: convert_splitbn_model(model, 2), frozen=freeze_batch_norm_2d)[convert](model)
    assert kept_maps(model, torch.randn(4, 3, 16, 16)) > 9


def test_sync_batch_norm_is_a_batch_norm_until_it_synchronises(monkeypatch):
    x = torch.randn(4, 3, 16, 16)
    expected = tiny()
    model = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(expected))
    assert model.route(x).reason == 'gradients are needed; every layer is plain'
    assert_close(model(x), expected(x))
    assert_all_close(list(model.buffers()), list(expected.buffers()), 1e-6)
    # PyTorch's own synchronises on GPUs alone, and raises an error on a CPU.
    monkeypatch.setattr(torch.distributed, 'is_initialized', lambda: True)
    assert model.route(x).reason == 'stem has a normalisation that is synchronised'
    with pytest.raises(ValueError, match='SyncBatchNorm'):
        model(x)
    with torch.no_grad():
        assert model.eval().route(x).reason == 'no gradients are needed; every layer is plain'
        assert_close(model(x), expected.eval()(x))


def test_timms_model_gives_the_same_gradients():
    from timm.models.convmixer import ConvMixer as TimmConvMixer

    torch.manual_seed(0)
    theirs = TimmConvMixer(16, 3, kernel_size=5, patch_size=2, num_classes=5)
    ours = tiny()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(4, 3, 24, 24)
    for actual, expected in zip(gradients(ours, x), gradients(theirs, x)):
        assert_close(actual, expected, 1e-4)


def test_called_blocks_need_no_kernels(monkeypatch):
    """Gradient checkpointing alone takes this route on devices that have no kernels, and under a compiler."""
    monkeypatch.setattr('timm_convmixer.training._kernels_for', lambda *args: pytest.fail('asked for kernels'))
    model = tiny(act_layer='silu')
    model.set_grad_checkpointing()
    x = torch.randn(2, 3, 24, 24)
    assert model.route(x).name == 'training'
    assert all(torch.isfinite(grad).all() for grad in gradients(model, x))


@pytest.mark.skipif(not has_onednn(), reason='PyTorch makes products of convolutions without oneDNN')
def test_no_matrix_products_in_float32():
    # They obey torch.set_float32_matmul_precision(), which convolutions do not. timm's head does, and is left out.
    # PyTorch itself makes products of convolutions that are smaller than these.
    model, x = tiny(num_classes=0), torch.randn(4, 3, 64, 64)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        gradients(model, x)
        with torch.no_grad():
            model.eval()(x)
    operators = {event.key for event in profile.key_averages()}
    assert {'_BlockSegment', 'aten::convolution_backward', 'aten::addcmul'} <= operators
    assert not operators & {'aten::mm', 'aten::bmm', 'aten::addmm', 'aten::baddbmm', 'aten::mv', 'aten::addmv_'}


def half_precision_gradients(model, x, dtype, autocast, scale=1.):
    """Gradients of the sum of two halves of a batch, by a loss that is scaled as GradScaler does."""
    model.zero_grad()
    torch.manual_seed(1)
    for images in x.chunk(2):
        with torch.autocast('cpu', dtype, enabled=autocast):
            loss = model(images).float().square().sum()
        (scale * loss).backward()
    return [parameter.grad.double() / scale for parameter in model.parameters()]


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=['nchw', 'nhwc'])
@pytest.mark.parametrize('kwargs', [
    dict(),
    dict(act_layer='relu', kernel_size=8),
    dict(drop_path_rate=0.5),
], ids=lambda kwargs: '-'.join(kwargs) or 'default')
@pytest.mark.parametrize('dtype, supported', [
    (torch.bfloat16, True), (torch.bfloat16, False), (torch.float16, False),
], ids=['bfloat16', 'bfloat16-in-float32', 'float16-in-float32'])
@pytest.mark.parametrize('autocast', [True, False], ids=['autocast', 'half'])
def test_half_precision_is_no_further_from_float64_than_the_layers(
        autocast, dtype, supported, kwargs, memory_format, monkeypatch):
    let_onednn_support(monkeypatch, *([dtype] if supported else []))
    exact = tiny(**kwargs).double()
    model = copy.deepcopy(exact).to(torch.float32 if autocast else dtype, memory_format=memory_format)
    x = torch.randn(8, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    expected = half_precision_gradients(exact, x.double(), torch.float64, autocast=False)
    images = x.to(model.stem[0].weight.dtype, memory_format=memory_format)

    def error(**kwargs):
        actual = half_precision_gradients(model, images, dtype, autocast, **kwargs)
        return sum((value - reference).square().sum() for value, reference in zip(actual, expected)).sqrt()

    with torch.autocast('cpu', dtype, enabled=autocast):
        assert model.route(images).name == 'training'
    ours = [error(), error(scale=1024.)]
    model.set_grad_checkpointing()
    ours.append(error())
    model.set_grad_checkpointing(False)
    with fast_paths(False):
        theirs = error()
    assert max(ours) <= 1.5 * theirs


def losses_and_gradients(model, losses, **kwargs):
    """The same of the fast paths and of the layers."""
    results = []
    for fused in (True, False):
        current = copy.deepcopy(model)
        with fast_paths(fused):
            loss = losses(current)
            loss.backward(**kwargs)
        results.append([loss.detach(), *[parameter.grad.detach() for parameter in current.parameters()],
                        *[buffer.double() for buffer in current.buffers()]])
    return results


def test_maps_of_several_sizes_in_one_step(monkeypatch):
    """The smaller batch takes the layers, which save running statistics that the larger one updates."""
    monkeypatch.setattr('timm_convmixer.routes.SMALLEST_MAP', 2 * 16 * 10 ** 2)
    model = tiny().double()
    small, large = torch.randn(2, 3, 8, 8).double(), torch.randn(2, 3, 24, 24).double()
    assert (model.route(small).name, model.route(large).name) == ('layers', 'training')
    ours, expected = losses_and_gradients(
        model, lambda model: model(small).square().sum() + model(large).square().sum())
    assert_all_close(ours, expected, 1e-9)


def share_a_block(model):
    model.blocks[1] = model.blocks[0]


def tie_biases(model):
    model.blocks[0][1].bias = model.blocks[0][0].fn[0].bias


def tie_norms(model):
    model.blocks[1][0].fn[2].weight = model.blocks[0][3].weight


@pytest.mark.parametrize('tie', [share_a_block, tie_biases, tie_norms])
@pytest.mark.parametrize('create_graph', [False, True])
@pytest.mark.filterwarnings('ignore:Using backward')
def test_what_reaches_a_parameter_twice_counts_twice(tie, create_graph):
    model = tiny().double()
    tie(model)
    x = torch.randn(2, 3, 24, 24).double()
    ours, expected = losses_and_gradients(model, lambda model: model(x).square().sum(), create_graph=create_graph)
    assert_all_close(ours, expected, 1e-9)


def test_features_fed_back_in_are_differentiated_once():
    model = tiny(in_chans=16).double()
    x = torch.randn(2, 16, 24, 24).double()
    ours, expected = losses_and_gradients(model, lambda model: model.head(model.forward_features(
        model.forward_features(x)).mean((2, 3))).square().sum(), create_graph=True)
    assert_all_close(ours, expected, 1e-9)


def test_a_cropped_map_in_channels_last_stays_in_it():
    class Crop(nn.Module):
        def __init__(self, stem):
            super().__init__()
            self.stem = stem

        def forward(self, x):
            return self.stem(x.contiguous(memory_format=torch.channels_last))[:, :, 1:-1, 1:-1]

    model, x = tiny().double(), torch.randn(2, 3, 24, 24).double()
    model.stem = Crop(model.stem)
    out = model.forward_features(x)
    with fast_paths(False):
        assert out.stride() == model.forward_features(x).stride()


def test_a_hook_that_switches_gradients_on_within_no_grad():
    model, x = tiny().eval(), torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        expected = model(x)
        model.blocks[0].register_forward_hook(lambda *args: torch.set_grad_enabled(True) and None)
        assert_close(model(x).detach(), expected)


@pytest.mark.parametrize('name', ['stem', 'blocks'])
@pytest.mark.parametrize('training', [True, False])
def test_a_function_in_place_of_a_part(name, training):
    model, x = tiny().train(training), torch.randn(2, 3, 24, 24)
    expected = model(x).detach()
    part = getattr(model, name)
    delattr(model, name)
    setattr(model, name, lambda x: part(x))
    assert_close(model(x).detach(), expected)


def test_blocks_that_iterate_their_own_way():
    class Backwards(nn.Sequential):
        def __iter__(self):
            return reversed(list(self._modules.values()))

    model, x = tiny().eval(), torch.randn(2, 3, 24, 24)
    expected = model.forward_intermediates(x, indices=[2], intermediates_only=True)
    model.blocks = Backwards(*reversed(list(model.blocks)))
    assert_close(model.forward_intermediates(x, indices=[2], intermediates_only=True)[0], expected[0])


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason='PyTorch has no oneDNN')
def test_images_in_a_layout_of_their_own():
    model, x = tiny().eval(), torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        assert model.route(x.to_mkldnn()) == ('layers', 'the input has the layout torch._mkldnn')


def test_biases_may_change_before_the_backward_pass():
    """As for PyTorch's convolutions and BatchNorm, whose gradients do not depend on them."""
    model, x = tiny().double(), torch.randn(2, 3, 24, 24).double()

    def loss(model):
        out = model(x).square().sum()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith('bias'):
                    parameter.add_(1)
        return out

    ours, expected = losses_and_gradients(model, loss)
    assert_all_close(ours, expected, 1e-9)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        loss(model).backward(create_graph=True)


def fill(model):
    with torch.no_grad():
        model.blocks[1][3].running_mean.fill_(0.5)
        model.blocks[2][1].weight.mul_(2)


def replace_an_activation(model):
    model.blocks[2][2] = nn.ReLU()


def change_an_epsilon(model):
    model.blocks[1][0].fn[2].eps = 0.5


def train_a_norm(model):
    model.blocks[2][3].train()


@pytest.mark.parametrize('change', [fill, replace_an_activation, change_an_epsilon, train_a_norm])
@pytest.mark.parametrize('grad', [True, False])
def test_a_hook_that_changes_a_later_block(change, grad):
    model, x = tiny().eval(), torch.randn(2, 3, 24, 24)
    results = []
    for fused in (True, False):
        current = copy.deepcopy(model)
        current.stem.register_forward_pre_hook(lambda module, args, current=current: change(current))
        with fast_paths(fused):
            with torch.set_grad_enabled(grad):
                results.append(current(x).detach())
    assert_close(*results)
