"""The Triton kernels for training against fp64, run like kernel_grid.py: on the GPU or under Triton's interpreter."""
import itertools

import pytest
import torch
import torch.nn.functional as F

from kernel_grid import (
    ACTS,
    DEPTHWISE_SHAPES,
    DEVICE,
    DTYPES,
    FLOORS,
    FULL,
    assert_as_close_as_pytorch,
    assert_only_written,
    assert_same_specials,
    depthwise_configs,
    double,
    far_apart,
    floor_of,
    identify,
    ieee,  # noqa: F401, a fixture of every test
    poisoned,
    relative_error,
    with_gaps,
)
from timm_convmixer import kernels
from timm_convmixer.kernels import activation_norm, depthwise_launch, depthwise_training, support

MAP_SHAPES = (  # batch, channels, height, width
    (1, 1, 1, 1),
    (2, 3, 5, 7),
    (3, 2, 8, 8),
    (1, 5, 1, 16),
    (5, 2, 32, 32),
    (70, 1, 2, 1),
    (2, 2, 33, 40),
)


def map_combinations():
    """Every shape with every dtype and activation, or a subset: each dtype and each activation in turn."""
    pairs = list(itertools.product(DTYPES, ACTS))
    if FULL:
        return [(shape, *pair) for shape in MAP_SHAPES for pair in pairs]
    return [(shape, *pairs[(2 * i + 4 * j) % 9]) for i, shape in enumerate(MAP_SHAPES) for j in range(2)]


def maps(shape, dtype, count=1):
    """Random maps whose mean is several times their deviation, which shows cancellation."""
    generator = torch.Generator().manual_seed(sum(shape))
    return [(torch.randn(shape, generator=generator) + 3).to(DEVICE, dtype) for _ in range(count)]


def vectors(channels, count):
    generator = torch.Generator().manual_seed(channels)
    return torch.randn(count, channels, generator=generator).to(DEVICE).unbind()


def error_by_channel(actual, expected):
    """The largest error relative to the channel's expected value."""
    return ((actual.double() - expected).abs() / expected.abs().clamp_min(1e-3)).max().item()


@pytest.mark.parametrize('shape,dtype,act', map_combinations(), ids=identify)
def test_statistics(shape, dtype, act):
    x, = maps(shape, dtype)
    assert kernels.activation_norm_support(x).used
    expected = kernels.activation_statistics_ref(x.double(), act)
    actual = kernels.activation_statistics(x, act)
    for result, reference in zip(actual, expected):
        assert result.dtype == torch.float32 and result.shape == (shape[1],)
        assert error_by_channel(result, reference) <= 2e-6
    again = kernels.activation_statistics(x, act)
    assert all(torch.equal(a, b) for a, b in zip(actual, again))


def test_statistics_do_not_cancel():
    x, = maps((40, 2, 8, 8), torch.float32)
    x[20:, 0] += 30.0  # a part of the images that the first ones tell nothing about
    x += 1000.0
    mean, var = kernels.activation_statistics(x, 'none')
    expected_mean, expected_var = kernels.activation_statistics_ref(x.double(), 'none')
    assert error_by_channel(mean, expected_mean) <= 2e-7
    assert error_by_channel(var, expected_var) <= 1e-4


@pytest.mark.parametrize('with_residual', [False, True])
@pytest.mark.parametrize('shape,dtype,act', map_combinations(), ids=identify)
def test_affine(shape, dtype, act, with_residual):
    x, residual = maps(shape, dtype, 2)
    scale, shift = vectors(shape[1], 2)
    residual = residual if with_residual else None
    x64, scale64, shift64, residual64 = double(x, scale, shift, residual)
    expected = kernels.activation_affine_ref(x64, scale64, shift64, act, residual64)
    own = kernels.activation_affine_ref(x, scale, shift, act, residual)
    actual = kernels.activation_affine(x, scale, shift, act, residual)
    assert actual.dtype == dtype and actual.is_contiguous()
    assert_as_close_as_pytorch(actual, own, expected, FLOORS[dtype])
    out, storage = poisoned(shape, dtype, gap=0)
    activation_norm.run_affine(x, scale, shift, act, residual, out)
    assert torch.equal(out, actual)
    assert_only_written(out, storage)


@pytest.mark.parametrize('batch_statistics', [False, True])
@pytest.mark.parametrize('shape,dtype,act', map_combinations(), ids=identify)
def test_backward(shape, dtype, act, batch_statistics):
    grad, x = maps(shape, dtype, 2)
    grad -= 2.5
    weight = vectors(shape[1], 1)[0] if shape[1] > 1 else None
    mean, var = kernels.activation_statistics_ref(x.double(), act)
    mean, invstd = mean.float(), (var + 1e-5).rsqrt().float()
    grad64, x64, weight64, mean64, invstd64 = double(grad, x, weight, mean, invstd)
    expected = kernels.activation_norm_backward_ref(grad64, x64, act, weight64, mean64, invstd64, batch_statistics)
    own = kernels.activation_norm_backward_ref(grad, x, act, weight, mean, invstd, batch_statistics)
    actual = kernels.activation_norm_backward(grad, x, act, weight, mean, invstd, batch_statistics)
    assert actual[0].dtype == dtype and actual[0].is_contiguous()
    # Of a single number nothing is left once its mean and variance have been taken out.
    if batch_statistics and x[:, 0].numel() == 1:
        assert actual[0].abs().max() <= 1e-3
    else:
        assert_as_close_as_pytorch(actual[0], own[0], expected[0], FLOORS[dtype])
    # Sums of products that cancel in part: relative to what is summed, after the mean has been subtracted.
    largest = (grad64.abs().sum((0, 2, 3)) * (3 + mean64.abs() * invstd64)).max().item()
    for result, reference in zip(actual[1:], expected[1:]):
        assert result.dtype == torch.float32
        assert (result.double() - reference).abs().max().item() <= 1e-6 * largest
    again = kernels.activation_norm_backward(grad, x, act, weight, mean, invstd, batch_statistics)
    assert all(torch.equal(a, b) for a, b in zip(actual, again))


def test_backward_takes_the_expanded_gradient_of_pooling():
    x, = maps((2, 3, 4, 4), torch.float32)
    grad = torch.randn(2, 3, 1, 1, device=DEVICE).expand(2, 3, 4, 4)
    mean, invstd = vectors(3, 2)
    actual = kernels.activation_norm_backward(grad, x, 'gelu', None, mean, invstd, True)
    expected = kernels.activation_norm_backward_ref(grad, x, 'gelu', None, mean, invstd, True)
    for result, reference in zip(actual, expected):
        torch.testing.assert_close(result, reference)


@pytest.mark.parametrize('act', ACTS)
@pytest.mark.parametrize('dtype', DTYPES, ids=identify)
def test_infinities_and_nan(dtype, act):
    grad, x, residual = maps((2, 4, 5, 6), dtype, 3)
    scale, shift = vectors(4, 2)
    x[0, 0, 1, 1] = float('inf')
    x[1, 1, 2, 3] = float('-inf')
    x[1, 2, 0, 0] = float('nan')
    residual[0, 3, 4, 5] = float('inf')
    actual = kernels.activation_affine(x, scale, shift, act, residual)
    expected = kernels.activation_affine_ref(*double(x, scale, shift), act, residual)
    assert torch.equal(actual.isnan(), expected.isnan()) and torch.equal(actual.isinf(), expected.isinf())
    for result, reference in zip(
            kernels.activation_statistics(x, act), kernels.activation_statistics_ref(x.double(), act)):
        assert torch.equal(result.isfinite(), reference.isfinite())
    # What passes through fixed statistics; with those of the batch the whole channel is lost.
    grad[0, 3, 0, 0] = float('inf')
    actual = kernels.activation_norm_backward(grad, x, act, scale, shift, scale.abs(), False)
    grad64, x64, scale64, shift64 = double(grad, x, scale, shift)
    expected = kernels.activation_norm_backward_ref(grad64, x64, act, scale64, shift64, scale64.abs(), False)
    for result, reference in zip(actual, expected):
        assert torch.equal(result.isfinite(), reference.isfinite())


@pytest.mark.parametrize('tall', [False, True])
def test_maps_beyond_32_bits(tall):
    """Constants, of which expanded tensors hold one copy; the kernels see ordinary strides."""
    if DEVICE == 'cpu':
        pytest.skip('needs the memory of a GPU')
    shape = (1, 2, 2 ** 16, 2 ** 15 + 8) if tall else (2 ** 12 + 1, 2 ** 9, 32, 32)
    x = torch.ones(shape, device=DEVICE, dtype=torch.half)
    one = torch.ones(x.shape[1], device=DEVICE)
    mean, var = kernels.activation_statistics(x, 'none')
    assert torch.equal(mean, one) and not var.any()
    out = kernels.activation_affine(x, 2 * one, one, 'relu')
    assert (out == 3).all()


def test_the_rest_is_pytorch_exactly():
    x, residual = maps((2, 3, 5, 7), torch.float32, 2)
    scale, shift = vectors(3, 2)
    nhwc = x.contiguous(memory_format=torch.channels_last)
    for arguments in ((nhwc, scale, shift, 'gelu', residual), (*double(x, scale, shift), 'gelu', residual)):
        assert not kernels.activation_norm_support(arguments[0])
        actual, expected = kernels.activation_affine(*arguments), kernels.activation_affine_ref(*arguments)
        assert torch.equal(actual, expected) and actual.stride() == expected.stride()
    kernels.set_fused(False)
    try:
        assert 'TIMM_CONVMIXER_FUSED' in kernels.activation_norm_support(x).reason
        mean, var = kernels.activation_statistics(x, 'relu')
    finally:
        kernels.set_fused(True)
    expected = kernels.activation_statistics_ref(x, 'relu')
    assert torch.equal(mean, expected[0]) and torch.equal(var, expected[1])
    assert relative_error(mean, kernels.activation_statistics_ref(x.double(), 'relu')[0]) <= 1e-6


def depthwise_combinations():
    """Every shape with every dtype, or a subset: dtypes in turn."""
    if FULL:
        return list(itertools.product(DEPTHWISE_SHAPES, DTYPES))
    return [(shape, DTYPES[i % 3]) for i, shape in enumerate(DEPTHWISE_SHAPES)]


def depthwise_inputs(shape, dtype):
    """x, weight, bias, the gradient of the output, and a residual."""
    batch, channels, height, width, kernel = shape
    generator = torch.Generator().manual_seed(sum(shape))
    x, grad, residual = torch.randn(3, batch, channels, height, width, generator=generator)
    weight = torch.randn(channels, 1, kernel, kernel, generator=generator) / kernel
    return [t.to(DEVICE, dtype) for t in (x, weight, torch.randn(channels, generator=generator), grad, residual)]


def pytorch_gradients(x, weight, bias, grad):
    """Gradients of input, weight and bias by PyTorch's autograd."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
    out = F.conv2d(*leaves, padding='same', groups=weight.shape[0])
    return torch.autograd.grad(out, leaves, grad)


def test_pytorch_references_are_pytorchs_gradients():
    for kernel in (4, 5):
        x, weight, bias, grad, residual = double(*depthwise_inputs((2, 3, 6, 7, kernel), torch.float32))
        expected = pytorch_gradients(x, weight, bias, grad)
        torch.testing.assert_close(kernels.depthwise_input_gradient_ref(grad, weight), expected[0])
        torch.testing.assert_close(kernels.depthwise_input_gradient_ref(grad, weight, residual), expected[0] + residual)
        for actual, reference in zip(kernels.depthwise_weight_gradient_ref(x, grad, kernel), expected[1:]):
            torch.testing.assert_close(actual, reference)


@pytest.mark.parametrize('shape,dtype', depthwise_combinations(), ids=identify)
def test_depthwise_convolution_and_input_gradient(shape, dtype):
    x, weight, bias, grad, residual = depthwise_inputs(shape, dtype)
    assert kernels.depthwise_convolution_support(x, weight, bias).used
    cases = (
        (kernels.depthwise_convolution, kernels.depthwise_convolution_ref, (x, weight, bias), dict(bias=bias)),
        (kernels.depthwise_convolution, kernels.depthwise_convolution_ref, (x, weight, None), {}),
        (kernels.depthwise_input_gradient, kernels.depthwise_input_gradient_ref, (grad, weight, residual),
         dict(residual=with_gaps(residual), flip=True)),
        (kernels.depthwise_input_gradient, kernels.depthwise_input_gradient_ref, (grad, weight, None), dict(flip=True)),
    )
    for function, ref, inputs, options in cases:
        expected, own = ref(*double(*inputs)), ref(*inputs)
        actual = function(*inputs)
        assert actual.dtype == dtype and actual.is_contiguous()
        assert_as_close_as_pytorch(actual, own, expected, FLOORS[dtype])
        if 'bias' not in options and 'residual' not in options:
            continue
        # By itself, on images with room between them, into poison; kernel_grid.py goes through the same kernel's
        # configurations.
        gapped = with_gaps(inputs[0])
        for precision, config in depthwise_configs(gapped, shape[4])[:None if FULL else 2]:
            out, storage = poisoned(x.shape, dtype)
            depthwise_launch.run_kernel(gapped, weight, out, config, precision, **options)
            assert_as_close_as_pytorch(out, own, expected, floor_of(dtype, precision))
            assert_only_written(out, storage)


@pytest.fixture
def poisoned_memory():
    """Memory that is allocated and not written holds NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def weight_gradient_configs(x, kernel):
    batch, channels, height, width = x.shape
    return [
        (precision, config)
        for precision in (('tf32', 'ieee') if x.dtype == torch.float32 else ('tf32',))
        for config in depthwise_training.weight_gradient_candidates(
            batch, channels, height, width, kernel, x.element_size(), precision, 132, 232448)
    ]


def run_weight_gradient(x, grad, kernel, config, precision):
    gradients = x.new_empty(x.shape[1], 1, kernel, kernel).float(), x.new_empty(x.shape[1]).float()
    depthwise_training.run_weight_gradient(x, grad, *gradients, config, precision)
    return gradients


@pytest.mark.parametrize('shape,dtype', depthwise_combinations(), ids=identify)
def test_depthwise_weight_gradient(shape, dtype, poisoned_memory):
    x, weight, bias, grad, _ = depthwise_inputs(shape, dtype)
    expected = pytorch_gradients(*double(x, weight, bias, grad))[1:]
    own = kernels.depthwise_weight_gradient_ref(x, grad, shape[4])
    actual = kernels.depthwise_weight_gradient(x, grad, shape[4])
    again = kernels.depthwise_weight_gradient(x, grad, shape[4])
    assert all(torch.equal(a, b) for a, b in zip(actual, again))
    for result, own_result, reference in zip(actual, own, expected):
        assert result.dtype == torch.float32 and result.shape == reference.shape
        # Sums in fp32 of exact products, whatever the dtype.
        assert_as_close_as_pytorch(result, own_result, reference, 1e-6)

    x, grad = with_gaps(x), with_gaps(grad)
    for precision, config in weight_gradient_configs(x, shape[4]):
        results = run_weight_gradient(x, grad, shape[4], config, precision)
        for result, reference in zip(results, expected):
            assert relative_error(result, reference) <= max(2e-6, floor_of(torch.float32, precision))


def test_depthwise_weight_gradient_in_chunks_and_steps(poisoned_memory):
    """More tiles than one program takes, and programs that take several, the last of them not all."""
    x, weight, bias, grad, _ = depthwise_inputs((21, 2, 9, 9, 3), torch.float32)
    expected = pytorch_gradients(*double(x, weight, bias, grad))[1:]
    config = weight_gradient_configs(x, 3)[0][1]._replace(block_m=16)
    for steps in (1, 2, 4):
        for result, reference in zip(run_weight_gradient(x, grad, 3, config._replace(steps=steps), 'tf32'), expected):
            assert relative_error(result, reference) <= max(2e-6, floor_of(torch.float32, 'tf32'))


def gradient_by_definition(x, grad, kernel):
    """The weight gradient in float64 tap by tap, from real elements alone: nothing is multiplied by the padding."""
    x, grad = x.double(), grad.double()
    before, (height, width) = (kernel - 1) // 2, x.shape[2:]

    def meet(size, shift):
        return slice(max(0, -shift), min(size, size - shift)), slice(max(0, shift), min(size, size + shift))

    out = x.new_zeros(x.shape[1], 1, kernel, kernel)
    for row, column in itertools.product(range(kernel), repeat=2):
        (to_rows, from_rows), (to_columns, from_columns) = meet(height, row - before), meet(width, column - before)
        products = x[:, :, from_rows, from_columns] * grad[:, :, to_rows, to_columns]
        out[:, 0, row, column] = products.sum((0, 2, 3))
    return out


@pytest.mark.parametrize('dtype', DTYPES, ids=identify)
@pytest.mark.parametrize('shape', [(3, 5, 16, 16, 5), (2, 5, 13, 33, 4), (2, 5, 7, 7, 3)], ids=identify)
def test_depthwise_gradients_of_infinities_and_nan(shape, dtype):
    x, weight, bias, grad, residual = depthwise_inputs(shape, dtype)
    grad[0, 0, 0, 0] = float('inf')
    grad[-1, 1, -1, -2] = float('-inf')
    grad[0, 2, 0, shape[3] // 2] = float('nan')
    x[0, 3, -1, 1] = float('inf')
    expected = gradient_by_definition(x, grad, shape[4])
    finite = gradient_by_definition(x[:, 4:], grad[:, 4:], shape[4])
    torch.testing.assert_close(
        finite, kernels.depthwise_weight_gradient_ref(*double(x[:, 4:], grad[:, 4:]), shape[4])[0])
    for precision, config in weight_gradient_configs(x, shape[4])[:None if FULL else 1]:
        weight_grad, bias_grad = run_weight_gradient(x, grad, shape[4], config, precision)
        assert_same_specials(weight_grad, expected, max(2e-6, floor_of(torch.float32, precision)))
        assert torch.equal(bias_grad.isnan(), grad.double().sum((0, 2, 3)).isnan())
    weight[:, :, 0, 1] = 0.0
    expected = kernels.depthwise_input_gradient_ref(*double(grad, weight, residual))
    assert_same_specials(kernels.depthwise_input_gradient(grad, weight, residual), expected, FLOORS[dtype])


def test_depthwise_gradients_of_more_than_two_billion_elements():
    x, weight, bias, grad, residual = depthwise_inputs((3, 2, 4, 8, 3), torch.float16)
    far_x, far_grad, far_residual, out = (far_apart(x.shape, torch.float16) for _ in range(4))
    far_x.copy_(x)
    far_grad.copy_(grad)
    far_residual.copy_(residual)
    expected = kernels.depthwise_input_gradient_ref(*double(grad, weight, residual))
    for precision, config in depthwise_configs(x, 3)[:2]:
        out.fill_(float('nan'))
        depthwise_launch.run_kernel(far_grad, weight, out, config, precision, residual=far_residual, flip=True)
        assert relative_error(out, expected) <= FLOORS[torch.float16]
    for precision, config in weight_gradient_configs(x, 3)[:1]:
        weight_grad, _ = run_weight_gradient(far_x, far_grad, 3, config, precision)
        assert relative_error(weight_grad, gradient_by_definition(x, grad, 3)) <= 1e-6
        far_grad[2, 0, 0, 0] = float('nan')  # tap by tap
        weight_grad, _ = run_weight_gradient(far_x, far_grad, 3, config, precision)
        assert weight_grad[0].isnan().any()
        assert relative_error(weight_grad[1], gradient_by_definition(x, grad, 3)[1]) <= 1e-6


@pytest.mark.parametrize('kernel', [5, 4])
def test_depthwise_convolution_differentiates_twice(kernel):
    x, weight, bias, _, probe = depthwise_inputs((2, 3, 6, 7, kernel), torch.float32)

    def second(function, *inputs):
        leaves = [t.detach().clone().requires_grad_() for t in inputs]
        out = function(*leaves)
        first = torch.autograd.grad(out.pow(2).mul(probe.to(out)).sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.pow(2).sum() for g in first), leaves)

    expected = second(kernels.depthwise_convolution_ref, *double(x, weight, bias))
    for actual, reference in zip(second(kernels.depthwise_convolution, x, weight, bias), expected):
        assert relative_error(actual, reference) <= 1e-5


def test_depthwise_convolution_takes_the_expanded_gradient_of_pooling():
    x, weight, bias, _, _ = depthwise_inputs((2, 3, 6, 7, 5), torch.float32)
    gradients = []
    for function in (kernels.depthwise_convolution, kernels.depthwise_convolution_ref):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        gradients.append(torch.autograd.grad(function(*leaves).mean((2, 3)).sum(), leaves))
    for actual, expected in zip(*gradients):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize('requires_grad', [False, True])
def test_opcheck(requires_grad):
    x, weight, bias, grad, residual = (
        t.requires_grad_(requires_grad) for t in depthwise_inputs((2, 3, 6, 7, 4), torch.float32))
    operators = torch.ops.timm_convmixer
    torch.library.opcheck(operators.depthwise_convolution.default, (x, weight, bias))
    torch.library.opcheck(operators.depthwise_input_gradient.default, (grad, weight, residual))
    torch.library.opcheck(operators.depthwise_weight_gradient.default, (x, grad, 4))


class Trained(torch.nn.Module):
    def __init__(self, channels=8, kernel=5):
        super().__init__()
        self.conv = torch.nn.Conv2d(channels, channels, kernel, padding='same', groups=channels)
        self.norm = torch.nn.BatchNorm2d(channels)

    def forward(self, x):
        x = x + self.norm(F.gelu(kernels.depthwise_convolution(x, self.conv.weight, self.conv.bias)))
        return x.square().mean()


def train(model, x, backend=None):
    """The loss, the gradients of the parameters and of the input."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    step = model if backend is None else torch.compile(model, fullgraph=True, backend=backend)
    loss = step(x)
    loss.backward()
    return [loss.detach(), *[parameter.grad for parameter in model.parameters()], x.grad]


def test_training_compiles_without_graph_breaks():
    torch.manual_seed(0)
    torch.compiler.reset()
    model = Trained().to(DEVICE)
    x = torch.randn(3, 8, 7, 7, device=DEVICE)
    calls = []
    if support.INTERPRETED:
        from torch._dynamo.backends.common import aot_autograd

        def keep(graph, inputs):
            calls.extend(str(node.target) for node in graph.graph.nodes if node.op == 'call_function')
            return graph

        backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    else:
        backend = 'inductor'
    for actual, expected in zip(train(model, x, backend), train(model, x)):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)
    if support.INTERPRETED:
        names = {'depthwise_convolution', 'depthwise_input_gradient', 'depthwise_weight_gradient'}
        assert {f'timm_convmixer.{name}.default' for name in names} <= set(calls)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=identify)
def test_autocast_as_conv2d(dtype):
    conv = Trained().conv.to(DEVICE)
    x = torch.randn(2, 8, 7, 7, device=DEVICE, requires_grad=True)
    results = []
    for function in (lambda x: kernels.depthwise_convolution(x, conv.weight, conv.bias), conv):
        with torch.autocast(DEVICE, dtype):
            out = function(x)
        assert out.dtype == dtype
        results.append(torch.autograd.grad(out.float().square().sum(), [conv.weight, conv.bias, x]))
        assert all(g.dtype == torch.float32 for g in results[-1])
    for actual, expected in zip(*results):
        assert relative_error(actual, expected.double()) <= 3e-2


@pytest.mark.parametrize('change,reason', [
    (lambda x, w: (x.contiguous(memory_format=torch.channels_last), w), 'channels_last'),
    (lambda x, w: (x.double(), w.double()), 'dtype'),
    (lambda x, w: (x.repeat(1, 1, 1, 9), w), 'wider'),
    (lambda x, w: (x, w.repeat(1, 1, 3, 3)), 'larger than 9'),
    (lambda x, w: (x, w.half()), 'differ in dtype'),
])
def test_what_no_depthwise_kernel_takes_is_pytorchs(change, reason):
    x, weight, bias, grad, residual = depthwise_inputs((2, 3, 6, 8, 5), torch.float32)
    x, weight = change(x, weight)
    answer = kernels.depthwise_convolution_support(x, weight, bias.to(x.dtype))
    assert not answer and reason in answer.reason
    if weight.dtype != x.dtype:
        with pytest.raises(RuntimeError):
            kernels.depthwise_convolution(x, weight, bias)
        return
    actual = kernels.depthwise_convolution(x, weight, bias.to(x.dtype))
    expected = kernels.depthwise_convolution_ref(x, weight, bias)
    assert torch.equal(actual, expected) and actual.stride() == expected.stride()
    actual, expected = kernels.depthwise_input_gradient(x, weight), kernels.depthwise_input_gradient_ref(x, weight)
    assert torch.equal(actual, expected) and actual.stride() == expected.stride()
    for actual, expected in zip(
            kernels.depthwise_weight_gradient(x, x, weight.shape[2]),
            kernels.depthwise_weight_gradient_ref(x, x, weight.shape[2])):
        assert torch.equal(actual, expected)


@pytest.mark.skipif(DEVICE == 'cpu', reason='needs a GPU')
def test_training_in_a_cuda_graph():
    x, weight, bias, grad, _ = depthwise_inputs((4, 64, 32, 32, 9), torch.bfloat16)
    expected = kernels.depthwise_weight_gradient(x, grad, 9)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernels.depthwise_weight_gradient(x, grad, 9)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(out, expected))
