"""Properties of any architecture, image and dtype, in training and inference form, tested with hypothesis.

References are references.py in float64 and timm's ConvMixer. kernel_grid.py tests the kernels, also beyond 2**31
elements. TIMM_CONVMIXER_EXAMPLES sets the number of random examples per property. The default is a fixed set of 20, 200
with ``pytest --all``.
"""
import copy
import functools
import os
from typing import Any, Dict

import pytest
import timm
import torch
import torch.nn as nn
from timm.models.convmixer import ConvMixer as TimmConvMixer
from timm.utils.model import reparameterize_model

from references import official_convmixer
from support import ALL, assert_close, fast_paths, randomize_norms
from timm_convmixer.convmixer import ConvMixer

pytest.importorskip('hypothesis')
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

EXAMPLES = os.environ.get('TIMM_CONVMIXER_EXAMPLES')
search = settings(
    max_examples=int(EXAMPLES or (200 if ALL else 20)),
    # The same examples in every run by default, so that a failure is due to the last change.
    derandomize=EXAMPLES is None,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


pytestmark = pytest.mark.usefixtures('small_maps')


ACTS = {'gelu': nn.GELU, 'relu': nn.ReLU}
FORMATS = (torch.contiguous_format, torch.channels_last)


@st.composite
def architectures(draw, **fixed: Any) -> Dict[str, Any]:
    args = dict(
        dim=draw(st.integers(1, 24)),
        depth=draw(st.integers(1, 3)),
        kernel_size=draw(st.integers(1, 9)),
        patch_size=draw(st.integers(1, 7)),
        in_chans=draw(st.integers(1, 4)),
        num_classes=draw(st.integers(1, 9)),
        act_layer=draw(st.sampled_from(['gelu', 'relu'])),
        global_pool=draw(st.sampled_from(['avg', 'max', 'avgmax', 'catavgmax', ''])),
    )
    return {**args, **fixed}


@st.composite
def images(draw, args: Dict[str, Any], dtype: torch.dtype = torch.float32, min_batch: int = 1) -> torch.Tensor:
    """Draw images of at least one patch: contiguous, channels last, cropped or expanded."""
    batch = draw(st.integers(min_batch, 3))
    height, width = (draw(st.integers(args['patch_size'], 5 * args['patch_size'] + 3)) for _ in range(2))
    shape = batch, args['in_chans'], height, width
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2 ** 31)))
    layout = draw(st.sampled_from(['contiguous', 'channels_last', 'cut out', 'every second', 'expanded', 'transposed']))
    if layout == 'cut out':
        x = torch.randn(batch, shape[1] + 1, height + 2, width + 3, generator=generator)
        x = x[:, 1:, 1:height + 1, 2:width + 2]
    elif layout == 'every second':
        x = torch.randn(batch, shape[1], 2 * height, 2 * width, generator=generator)[:, :, ::2, ::2]
    elif layout == 'expanded':
        x = torch.randn(1, 1, height, width, generator=generator).expand(shape)
    elif layout == 'transposed':
        x = torch.randn(batch, shape[1], width, height, generator=generator).transpose(2, 3)
    else:
        x = torch.randn(shape, generator=generator)
        if layout == 'channels_last':
            x = x.contiguous(memory_format=torch.channels_last)
    x = x.to(dtype)
    assert x.shape == shape
    return x


def test_examples_take_the_fast_paths():
    model, x = ConvMixer(dim=1, depth=1, kernel_size=1, patch_size=1), torch.randn(2, 3, 1, 1)
    assert model.route(x).name == 'training'
    with torch.no_grad():
        assert model.eval().route(x).name == 'inference'


def create(args: Dict[str, Any], seed: int = 0, **kwargs) -> ConvMixer:
    torch.manual_seed(seed)
    return randomize_norms(ConvMixer(**args, **kwargs), seed)


# A single logit may nearly cancel out.
assert_outputs_close = functools.partial(assert_close, floor=0.1)


def gradients(model: nn.Module, x: torch.Tensor) -> Dict[str, torch.Tensor]:
    """Return the output, and gradients of its weighted sum for the image and every parameter."""
    x = x.detach().requires_grad_()
    model.zero_grad()
    output = model(x)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
    (output * weights).sum().backward()
    parameters = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return dict(output=output.detach(), image=x.grad, **parameters)


def assert_gradients_close(
        actual: Dict[str, torch.Tensor],
        expected: Dict[str, torch.Tensor],
        tolerance: float,
) -> None:
    """Compare relative to each gradient's largest value, or to the largest of all if a gradient is only rounding."""
    assert list(actual) == list(expected)
    scale = max(value.abs().max() for name, value in expected.items() if name != 'output')
    for name, value in expected.items():
        assert torch.isfinite(actual[name]).all() and torch.isfinite(value).all(), name
        largest = torch.maximum(value.abs().max(), value.new_tensor(0.1) if name == 'output' else 1e-3 * scale)
        assert (actual[name].double() - value.double()).abs().max() <= tolerance * largest + 1e-12, name


def reference(args: Dict[str, Any], model: ConvMixer) -> nn.Module:
    """Return the official model with our weights and head, in float64."""
    sizes = (args[name] for name in ('dim', 'depth', 'kernel_size', 'patch_size', 'num_classes'))
    expected = official_convmixer(*sizes, ACTS[args['act_layer']])
    if args['in_chans'] != 3:
        expected[0] = nn.Conv2d(args['in_chans'], args['dim'], args['patch_size'], stride=args['patch_size'])
    expected = expected.double()
    expected.load_state_dict(dict(zip(expected.state_dict(), model.state_dict().values())))
    return expected


@search
@given(st.data())
def test_equals_the_reference(data):
    """In float64, outputs and all gradients are equal up to rounding, in training and evaluation."""
    args = data.draw(architectures(global_pool='avg'))
    x = data.draw(images(args, torch.float64, min_batch=2))
    model = create(args, dtype=torch.float64)
    expected = reference(args, model)
    for training in (True, False):
        model.train(training), expected.train(training)
        if training and x.shape[2] < 2 * args['patch_size'] and x.shape[3] < 2 * args['patch_size']:
            continue  # statistics of two values per channel amplify rounding without bounds
        ours, theirs = gradients(model, x), gradients(expected, x)
        assert_gradients_close(dict(zip(theirs, ours.values())), theirs, 1e-8)


@search
@given(st.data())
def test_equals_timm(data):
    """In float32 evaluation, outputs and all gradients are close, for every kind of pooling."""
    args = data.draw(architectures())
    x = data.draw(images(args))
    model = create(args).eval()
    expected = TimmConvMixer(**{**args, 'act_layer': ACTS[args['act_layer']]}).eval()
    if args['global_pool'] == 'catavgmax':
        expected.head = nn.Linear(2 * args['dim'], args['num_classes'])  # timm's head is too narrow
    if args['global_pool'] == '':
        model.reset_classifier(0), expected.reset_classifier(0)
    expected.load_state_dict(model.state_dict())
    assert_outputs_close(model(x), expected(x))
    with torch.no_grad():
        assert_outputs_close(model(x), expected(x))
    assert_gradients_close(gradients(model, x), gradients(expected, x), 2e-5)


@search
@given(st.data())
def test_inference_form_equals_the_model(data):
    args = data.draw(architectures(act_layer=data.draw(st.sampled_from(['gelu', 'relu', 'silu', 'gelu_tanh']))))
    if args['global_pool'] == '':
        args['num_classes'] = 0
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    x = data.draw(images(args, dtype))
    model = create(args, dtype=dtype).eval()
    fused = reparameterize_model(model)
    with torch.no_grad():
        before = x.clone()
        assert_outputs_close(fused(x), model(x), 1e-4 if dtype == torch.float32 else 1e-10)
        assert torch.equal(x, before), 'the images were overwritten'
    # Gradients of the image take another route.
    x = x.detach().requires_grad_()
    assert_outputs_close(fused(x), model(x), 1e-4 if dtype == torch.float32 else 1e-10)
    expected, = torch.autograd.grad(model(x).sum(), x)
    actual, = torch.autograd.grad(fused(x).sum(), x)
    assert (actual - expected).abs().max() <= 1e-3 * expected.abs().max().clamp_min(1e-3)


@search
@given(st.data())
def test_half_precision_is_as_close_as_pytorch(data):
    """In bf16 and fp16, features of both forms are at most 1.5 times as far from float64 as PyTorch's, plus rounding.

    Logits may cancel out, which makes their relative error arbitrary.
    """
    args = data.draw(architectures(global_pool='avg', dim=data.draw(st.integers(8, 24))))
    dtype = data.draw(st.sampled_from([torch.bfloat16, torch.float16]))
    x = data.draw(images(args, dtype))
    model = create(args).eval().to(dtype)
    exact = create(args).eval().double()
    exact.load_state_dict(model.state_dict())
    with fast_paths(False):
        with torch.no_grad():
            plain, expected = model.forward_features(x).double(), exact.forward_features(x.double())
    with torch.no_grad():
        for form in (model, reparameterize_model(model)):
            output = form.forward_features(x)
            assert output.dtype == dtype and torch.isfinite(output).all()
            error, own = (output.double() - expected).norm(), (plain - expected).norm()
            assert error <= 1.5 * own + 2 * torch.finfo(dtype).eps * expected.norm()


SPECIALS = [float('nan'), float('inf'), -float('inf')]


@search
@given(st.data())
def test_extreme_values_pass_as_pytorch_passes_them(data):
    """NaN, infinities and overflow appear where PyTorch's layers have them, and in no other image.

    Its convolutions may turn an infinity into NaN, also at neighbouring positions: which, depends on the memory format
    and the dtype of the arithmetic. The fast paths choose both.
    """
    args = data.draw(architectures(global_pool='', num_classes=0))
    dtype = data.draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
    x = data.draw(images(args, dtype)).clone()
    largest = torch.finfo(dtype).max
    values = data.draw(st.lists(st.sampled_from([*SPECIALS, largest, -largest, torch.finfo(dtype).tiny]), max_size=3))
    for value in values:
        x[tuple(data.draw(st.integers(0, side - 1)) for side in x.shape)] = value
    is_plain = (x.isfinite() & (x.abs() < largest)).flatten(1).all(dim=1)
    model = create(args).eval().to(dtype)
    with torch.no_grad():
        with fast_paths(False):
            expected = [
                form(image.to(kind)).float()
                for kind, form in ((dtype, model), (torch.float32, copy.deepcopy(model).float()))
                for image in (x, x.contiguous(memory_format=torch.channels_last))
            ]
        outputs = dict(model=model(x).float(), fused=reparameterize_model(model)(x).float())
    broken = torch.stack([~reference.isfinite() for reference in expected]).all(dim=0)
    for form, output in outputs.items():
        assert output[is_plain].isfinite().all(), form
        # Beside the limit rounding decides what overflows, and ReLU makes 0 of an infinity.
        if {largest, -largest} & set(values):
            continue
        assert not (broken & output.isfinite()).any(), form
        finite = output.isfinite() & expected[0].isfinite()
        if finite.any():
            scale = expected[0][finite].abs().max()
            tolerance = 200 * torch.finfo(dtype).eps
            assert ((output - expected[0]).abs()[finite] <= tolerance * scale + 1e-6).all(), form


@search
@given(st.data())
def test_any_number_of_images(data):
    """An image gives the same output alone and in a batch, and an empty batch gives no rows, in both forms."""
    args = data.draw(architectures(global_pool='avg'))
    x = data.draw(images(args))
    model = create(args).eval()
    with torch.no_grad():
        for form in (model, reparameterize_model(model)):
            together = form(x)
            for index in range(len(x)):
                assert_outputs_close(form(x[index:index + 1]), together[index:index + 1])
            assert form(x[:0]).shape == (0, args['num_classes'])
            assert form.forward_features(x[:0]).shape[0] == 0


def test_empty_batch_in_training():
    model = create(dict(dim=8, depth=2, kernel_size=5, patch_size=2, num_classes=3, norm_layer='groupnorm1'))
    output = model(torch.randn(0, 3, 8, 8, requires_grad=True))
    output.sum().backward()
    assert output.shape == (0, 3)
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize('memory_format', FORMATS, ids=['contiguous', 'channels_last'])
@pytest.mark.parametrize('kernel_size', [7, 8])
@pytest.mark.parametrize('form', ['model', 'inference form'])
def test_images_with_more_than_two_billion_elements(form, kernel_size, memory_format):
    """Shapes and strides beyond 32 bits, on the meta device, where operators check them without memory."""
    with torch.device('meta'):
        model = ConvMixer(dim=512, depth=2, kernel_size=kernel_size, patch_size=1, in_chans=3, num_classes=5).eval()
        if form == 'inference form':
            model = reparameterize_model(model)
        x = torch.empty(2 ** 10, 3, 1024, 1024, device='meta').to(memory_format=memory_format)
        assert x.numel() > 2 ** 31
        features = model.forward_features(x)
        assert features.shape == (2 ** 10, 512, 1024, 1024) and features.numel() > 2 ** 38
        assert model(x).shape == (2 ** 10, 5)
        if form == 'model':
            output = model.train()(x.requires_grad_())
            output.sum().backward()
            assert x.grad.shape == x.shape


@pytest.mark.parametrize('name', timm.list_models(module='convmixer'))
def test_every_variant_on_any_side(name):
    """Both sides may be any size of at least one patch; incomplete patches are dropped."""
    model = timm.create_model(name, device='meta', num_classes=5).eval()
    patch = model.patch_size
    for height, width in ((patch, patch), (patch, 3 * patch + patch // 2), (225, 223)):
        features = model.forward_features(torch.empty(2, 3, height, width, device='meta'))
        assert features.shape == (2, model.num_features, height // patch, width // patch)
