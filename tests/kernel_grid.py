"""The Triton kernels against fp64, over a grid of shapes, on the GPU or under Triton's interpreter.

Run directly on a machine with a GPU (`pytest tests/kernel_grid.py`), or with TRITON_INTERPRET=1 on any other;
`test_kernels.py` does whichever is possible, in a process of its own, because Triton decides at import whether kernels
are interpreted. By default the grid is a covering subset; TIMM_CONVMIXER_TEST_FULL=1 runs every combination.
"""
import itertools
import os

import pytest
import torch

from timm_convmixer import kernels
from timm_convmixer.kernels import depthwise_launch, pointwise, support

DEVICE = 'cpu' if support.INTERPRETED else 'cuda'
FULL = os.environ.get('TIMM_CONVMIXER_TEST_FULL', '0') == '1' or not support.INTERPRETED
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ACTS = ('gelu', 'relu', 'none')
# What rounding the output alone costs; the interpreter truncates to bf16 where hardware rounds to nearest.
FLOORS = {torch.float32: 1e-6, torch.float16: 4e-4, torch.bfloat16: 6e-3 if support.INTERPRETED else 3e-3}

DEPTHWISE_SHAPES = (  # batch, channels, height, width, kernel
    (1, 1, 1, 1, 3),
    (2, 3, 5, 7, 9),
    (3, 2, 8, 8, 8),
    (2, 1, 1, 16, 5),
    (17, 1, 16, 16, 9),
    (5, 1, 32, 32, 7),
    (2, 2, 13, 33, 4),
    (1, 2, 9, 64, 3),
    (2, 1, 32, 32, 9),
    (1, 1, 5, 64, 9),
    (1, 1, 3, 64, 8),
    (3, 2, 14, 14, 6),
    (1, 3, 4, 4, 9),
    (70, 1, 2, 1, 3),
    (2, 2, 7, 7, 7),
    (2, 2, 3, 16, 1),
    (1, 2, 70, 5, 2),
)
POINTWISE_SHAPES = (  # batch, channels in, channels out, height, width
    (1, 1, 1, 1, 1),
    (2, 3, 5, 7, 7),
    (3, 70, 33, 4, 4),
    (2, 64, 64, 8, 8),
    (1, 40, 130, 5, 16),
    (5, 17, 20, 1, 33),
    (1, 128, 96, 16, 16),
)


def combinations(shapes):
    """Every shape with every dtype and activation, or a subset: every shape in each dtype, activations in turn."""
    pairs = list(itertools.product(DTYPES, ACTS))
    if FULL:
        return [(shape, *pair) for shape in shapes for pair in pairs]
    return [
        (shape, dtype, ACTS[(i + j) % len(ACTS)])
        for i, shape in enumerate(shapes)
        for j, dtype in enumerate(DTYPES)
    ]


def identify(value):
    return 'x'.join(map(str, value)) if isinstance(value, tuple) else str(value).replace('torch.', '')


def relative_error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def assert_as_close_as_pytorch(actual, own, expected, floor):
    """The error of `actual` is at most 1.5 times that of PyTorch's `own` result. NaN never passes."""
    error, own_error = relative_error(actual, expected), relative_error(own, expected)
    assert error <= max(1.5 * own_error, floor), f'error {error:.3g}, of PyTorch {own_error:.3g}, floor {floor:.3g}'


def floor_of(dtype, precision):
    """The error that a configuration may have whatever PyTorch's is. The interpreter multiplies in fp32, not TF32."""
    return 1e-3 if dtype == torch.float32 and precision == 'tf32' and not support.INTERPRETED else FLOORS[dtype]


def double(*tensors):
    return [None if t is None else t.double() for t in tensors]


def depthwise_inputs(shape, dtype, with_bias=True, affine_dtype=None):
    batch, channels, height, width, kernel = shape
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(batch, channels, height, width, generator=generator)
    weight = torch.randn(channels, 1, kernel, kernel, generator=generator) / kernel
    bias, scale, shift = torch.randn(3, channels, generator=generator)
    affine_dtype = affine_dtype or dtype
    return [
        x.to(DEVICE, dtype),
        weight.to(DEVICE, dtype),
        bias.to(DEVICE, affine_dtype) if with_bias else None,
        scale.to(DEVICE, affine_dtype),
        shift.to(DEVICE, affine_dtype),
    ]


def pointwise_inputs(shape, dtype, with_bias=True, affine_dtype=None):
    batch, channels, out_channels, height, width = shape
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(batch, channels, height, width, generator=generator)
    weight = torch.randn(out_channels, channels, 1, 1, generator=generator) / channels ** 0.5
    bias, scale, shift = torch.randn(3, out_channels, generator=generator)
    affine_dtype = affine_dtype or dtype
    return [
        x.to(DEVICE, dtype),
        weight.to(DEVICE, dtype),
        bias.to(DEVICE, affine_dtype) if with_bias else None,
        scale.to(DEVICE, affine_dtype),
        shift.to(DEVICE, affine_dtype),
    ]


def poisoned(shape, dtype, gap=24):
    """A NaN tensor of `shape`, contiguous but for `gap` elements between images, and the storage it lies in."""
    size = shape[1] * shape[2] * shape[3]
    storage = torch.full(((size + gap) * shape[0] + gap,), float('nan'), dtype=dtype, device=DEVICE)
    view = storage[gap:].as_strided(shape, (size + gap, shape[2] * shape[3], shape[3], 1), gap)
    return view, storage


def assert_only_written(view, storage):
    """Every element of `view` was written and nothing else of `storage` was."""
    assert not view.isnan().any()
    view.fill_(float('nan'))
    assert storage.isnan().all()


def with_gaps(x):
    """The values of `x` in a tensor with room between its images."""
    view, _ = poisoned(x.shape, x.dtype)
    return view.copy_(x)


@pytest.fixture(autouse=True)
def ieee():
    """fp32 means fp32, unless a test asks for TF32."""
    # The older of PyTorch's two interfaces: after the newer one alone, torch.export fails as it reads the older.
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = True


def depthwise_configs(x, kernel):
    batch, channels, height, width = x.shape
    configs = [('taps', depthwise_launch.taps_config(batch, channels, height, width, 132))]
    for config in depthwise_launch.candidates(batch, channels, height, width, kernel, x.element_size(), 132, 232448):
        configs.append(('tf32', config))
    return configs


def run_depthwise_mixing(x, weight, bias, scale, shift, act, out, config, precision):
    depthwise_launch.run_kernel(
        x, weight, out, config, precision, bias=bias, act=act, scale=scale, shift=shift, residual=x)


@pytest.mark.parametrize('shape,dtype,act', combinations(DEPTHWISE_SHAPES), ids=identify)
def test_depthwise(shape, dtype, act):
    inputs = depthwise_inputs(shape, dtype, with_bias=act != 'none')
    expected = kernels.depthwise_mixing_ref(*double(*inputs), act)
    own = kernels.depthwise_mixing_ref(*inputs, act)
    assert kernels.depthwise_mixing_support(*inputs).used
    actual = kernels.depthwise_mixing(*inputs, act)
    assert actual.dtype == dtype and actual.shape == expected.shape and actual.is_contiguous()
    assert_as_close_as_pytorch(actual, own, expected, FLOORS[dtype])

    # Each configuration by itself, on images with room between them, into poison.
    x = with_gaps(inputs[0])
    for precision, config in depthwise_configs(x, shape[4]):
        out, storage = poisoned(x.shape, dtype)
        run_depthwise_mixing(x, *inputs[1:], act, out, config, precision)
        assert_as_close_as_pytorch(out, own, expected, floor_of(dtype, precision))
        assert_only_written(out, storage)


@pytest.mark.parametrize('shape,dtype,act', combinations(POINTWISE_SHAPES), ids=identify)
def test_pointwise(shape, dtype, act):
    inputs = pointwise_inputs(shape, dtype, with_bias=act != 'none')
    expected = kernels.pointwise_mixing_ref(*double(*inputs), act)
    own = kernels.pointwise_mixing_ref(*inputs, act)
    assert kernels.pointwise_mixing_support(*inputs).used
    actual = kernels.pointwise_mixing(*inputs, act)
    assert actual.dtype == dtype and actual.shape == expected.shape and actual.is_contiguous()
    assert_as_close_as_pytorch(actual, own, expected, FLOORS[dtype])

    x = with_gaps(inputs[0])
    configs = pointwise._CONFIGS_16_BIT
    if dtype == torch.float32:
        configs = pointwise._CONFIGS_32_BIT + pointwise._CONFIGS_IEEE
    # Interpreted, a large tile on a small problem is nothing but masked work: the two ends of the list cover what
    # differs.
    for config in configs if FULL else (configs[0], configs[-1]):
        precision = 'ieee' if config in pointwise._CONFIGS_IEEE else 'tf32'
        out, storage = poisoned(expected.shape, dtype)
        pointwise.run_kernel(x, *inputs[1:], act, out, config, precision)
        assert_as_close_as_pytorch(out, own, expected, floor_of(dtype, precision))
        assert_only_written(out, storage)


@pytest.mark.parametrize('half', [torch.float16, torch.bfloat16], ids=identify)
def test_affine_parameters_in_fp32(half):
    for inputs, function, ref in (
            (depthwise_inputs((2, 3, 8, 8, 5), half, affine_dtype=torch.float32),
             kernels.depthwise_mixing, kernels.depthwise_mixing_ref),
            (pointwise_inputs((2, 3, 5, 7, 7), half, affine_dtype=torch.float32),
             kernels.pointwise_mixing, kernels.pointwise_mixing_ref),
    ):
        actual = function(*inputs, 'gelu')
        assert actual.dtype == half
        assert_as_close_as_pytorch(actual, ref(*inputs, 'gelu'), ref(*double(*inputs), 'gelu'), FLOORS[half])


@pytest.mark.parametrize('interface', ['allow_tf32', 'fp32_precision'])
@pytest.mark.parametrize('precision', ['ieee', 'tf32'])
def test_fp32_follows_the_switch_for_convolutions(precision, interface):
    if interface == 'allow_tf32':
        torch.backends.cudnn.allow_tf32 = precision == 'tf32'
    elif hasattr(torch.backends.cudnn, 'conv'):
        torch.backends.cudnn.conv.fp32_precision = precision
    else:
        pytest.skip('PyTorch 2.9 brought this interface')
    assert support.input_precision() == precision
    inputs = depthwise_inputs((2, 2, 16, 16, 9), torch.float32)
    actual = kernels.depthwise_mixing(*inputs, 'gelu')
    floor = floor_of(torch.float32, precision)
    assert relative_error(actual, kernels.depthwise_mixing_ref(*double(*inputs), 'gelu')) <= floor
    inputs = pointwise_inputs((2, 64, 64, 8, 8), torch.float32)
    actual = kernels.pointwise_mixing(*inputs, 'gelu')
    assert relative_error(actual, kernels.pointwise_mixing_ref(*double(*inputs), 'gelu')) <= floor


def assert_same_specials(actual, expected, tolerance):
    """NaN where NaN is expected, the same infinities, and close everywhere else."""
    assert torch.equal(actual.isnan(), expected.isnan())
    infinite = expected.isinf()
    assert torch.equal(actual[infinite].double(), expected[infinite])
    finite = expected.isfinite()
    assert finite.any() and not finite.all()
    assert relative_error(actual[finite], expected[finite]) <= tolerance


@pytest.mark.parametrize('act', ACTS)
@pytest.mark.parametrize('dtype', DTYPES, ids=identify)
@pytest.mark.parametrize('shape', [(3, 2, 16, 16, 5), (2, 2, 13, 33, 4), (2, 1, 7, 7, 3)], ids=identify)
def test_depthwise_infinities_and_nan(shape, dtype, act):
    inputs = depthwise_inputs(shape, dtype)
    x, weight = inputs[:2]
    x[0, 0, 0, 0] = float('inf')
    x[0, 0, -1, -2] = float('-inf')
    x[-1, -1, shape[2] // 2, shape[3] // 2] = float('nan')
    weight[:, :, 0, 1] = 0.0  # 0 * inf is NaN inside the receptive field, and nothing outside it
    expected = kernels.depthwise_mixing_ref(*double(*inputs), act)
    for precision, config in depthwise_configs(x, shape[4]):
        out, storage = poisoned(x.shape, dtype)
        run_depthwise_mixing(*inputs, act, out, config, precision)
        assert_same_specials(out, expected, floor_of(dtype, precision))


def test_depthwise_infinite_weight():
    inputs = depthwise_inputs((2, 2, 16, 16, 3), torch.float32)
    inputs[1][0, 0, 0, 0] = float('inf')
    inputs[1][1, 0, 1, 1] = float('nan')
    actual = kernels.depthwise_mixing(*inputs, 'none')
    expected = kernels.depthwise_mixing_ref(*double(*inputs), 'none')
    # At the border libraries disagree whether an infinite weight meets the padding; here it does not.
    inner = (slice(None), slice(None), slice(1, -1), slice(1, -1))
    assert torch.equal(actual[inner].isnan(), expected[inner].isnan())
    assert torch.equal(actual[inner].isinf(), expected[inner].isinf())
    assert actual[:, 0, 0].isfinite().all() and actual[:, 1].isnan().all()


@pytest.mark.parametrize('act', ACTS)
@pytest.mark.parametrize('dtype', DTYPES, ids=identify)
def test_pointwise_infinities_and_nan(dtype, act):
    inputs = pointwise_inputs((2, 40, 33, 4, 5), dtype)
    inputs[0][0, 0, 0, 0] = float('inf')
    inputs[0][0, 1, 3, 4] = float('-inf')
    inputs[0][1, 39, 2, 2] = float('nan')
    actual = kernels.pointwise_mixing(*inputs, act)
    expected = kernels.pointwise_mixing_ref(*double(*inputs), act)
    assert_same_specials(actual, expected, FLOORS[dtype])


@pytest.mark.parametrize('dtype', DTYPES, ids=identify)
def test_gelu_over_its_whole_range(dtype):
    values = torch.cat([torch.linspace(-12, 12, 4000), torch.tensor([0.0, -0.0, 1e-8, -1e-8, 60000.0, -60000.0])])
    x = values.view(1, 1, 1, -1).to(DEVICE, dtype)[..., :4006]
    one = torch.ones(1, device=DEVICE, dtype=dtype)
    actual = kernels.pointwise_mixing(x, one.view(1, 1, 1, 1), None, one, 0 * one, 'gelu')
    expected = torch.nn.functional.gelu(x.double())
    ulp = {torch.float32: 2e-7, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    assert ((actual.double() - expected).abs() <= ulp * expected.abs() + 2e-6).all()


def far_apart(shape, dtype):
    """Three images of which the last begins beyond what 32 bits can count; the pages between them are never touched."""
    stride = 2 ** 30 + 16
    storage = torch.empty(2 * stride + shape[1] * shape[2] * shape[3], dtype=dtype, device=DEVICE)
    return storage.as_strided(shape, (stride, shape[2] * shape[3], shape[3], 1))


def test_more_than_two_billion_elements():
    inputs = depthwise_inputs((3, 2, 4, 8, 3), torch.float16)
    x = far_apart(inputs[0].shape, torch.float16)
    x.copy_(inputs[0])
    out = far_apart(inputs[0].shape, torch.float16)
    expected = kernels.depthwise_mixing_ref(*double(*inputs), 'relu')
    for precision, config in depthwise_configs(x, 3)[:2]:
        out.fill_(float('nan'))
        run_depthwise_mixing(x, *inputs[1:], 'relu', out, config, precision)
        assert relative_error(out, expected) <= FLOORS[torch.float16]
    inputs = pointwise_inputs((3, 2, 2, 4, 8), torch.float16)
    x.copy_(inputs[0])
    out.fill_(float('nan'))
    pointwise.run_kernel(x, *inputs[1:], 'relu', out, pointwise._CONFIGS_16_BIT[-1], 'tf32')
    assert relative_error(out, kernels.pointwise_mixing_ref(*double(*inputs), 'relu')) <= FLOORS[torch.float16]


def gradients(function, inputs, act):
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in inputs]
    out = function(*leaves, act)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).view_as(out)
    return torch.autograd.grad((out * weights).sum(), [t for t in leaves if t is not None])


@pytest.mark.parametrize('act', ACTS)
@pytest.mark.parametrize('kernel', [5, 4])
@pytest.mark.parametrize('with_bias', [True, False])
def test_gradients(kernel, act, with_bias):
    for function, ref, inputs in (
            (kernels.depthwise_mixing, kernels.depthwise_mixing_ref,
             depthwise_inputs((2, 3, 8, 9, kernel), torch.float32, with_bias)),
            (kernels.pointwise_mixing, kernels.pointwise_mixing_ref,
             pointwise_inputs((2, 3, 5, 7, kernel), torch.float32, with_bias)),
    ):
        for actual, expected in zip(gradients(function, inputs, act), gradients(ref, double(*inputs), act)):
            assert relative_error(actual, expected) <= 1e-5


@pytest.mark.parametrize('half', [torch.float16, torch.bfloat16], ids=identify)
def test_gradients_of_half_have_the_dtypes_of_the_inputs(half):
    for function, ref, inputs in (
            (kernels.depthwise_mixing, kernels.depthwise_mixing_ref,
             depthwise_inputs((2, 3, 8, 8, 5), half, affine_dtype=torch.float32)),
            (kernels.pointwise_mixing, kernels.pointwise_mixing_ref,
             pointwise_inputs((2, 3, 5, 7, 7), half, affine_dtype=torch.float32)),
    ):
        for tensor, actual, expected in zip(
                inputs, gradients(function, inputs, 'gelu'), gradients(ref, double(*inputs), 'gelu')):
            assert actual.dtype == tensor.dtype
            assert relative_error(actual, expected) <= 3e-2


@pytest.mark.parametrize('requires_grad', [False, True])
def test_opcheck(requires_grad):
    inputs = [t.requires_grad_(requires_grad) for t in depthwise_inputs((2, 3, 8, 8, 5), torch.float32)]
    torch.library.opcheck(torch.ops.timm_convmixer.depthwise_mixing.default, (*inputs, 'gelu'))
    inputs = [t.requires_grad_(requires_grad) for t in pointwise_inputs((2, 3, 5, 7, 7), torch.float32)]
    torch.library.opcheck(torch.ops.timm_convmixer.pointwise_mixing.default, (*inputs, 'relu'))


class Block(torch.nn.Module):
    def __init__(self, channels=8, kernel=5):
        super().__init__()
        self.depthwise = torch.nn.Conv2d(channels, channels, kernel, padding='same', groups=channels)
        self.pointwise = torch.nn.Conv2d(channels, channels, 1)
        self.scale = torch.nn.Parameter(torch.rand(channels))
        self.shift = torch.nn.Parameter(torch.rand(channels))

    def forward(self, x):
        x = kernels.depthwise_mixing(x, self.depthwise.weight, self.depthwise.bias, self.scale, self.shift, 'gelu')
        return kernels.pointwise_mixing(x, self.pointwise.weight, self.pointwise.bias, self.scale, self.shift, 'gelu')


@pytest.mark.parametrize('dynamic', [False, True])
def test_compile_fullgraph(dynamic):
    torch.manual_seed(0)
    torch.compiler.reset()
    block = Block().to(DEVICE)
    backend = 'aot_eager' if support.INTERPRETED else 'inductor'
    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic, backend=backend)
    for batch in (2, 5):
        x = torch.randn(batch, 8, 7, 7, device=DEVICE, requires_grad=True)
        actual, expected = compiled(x), block(x)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
        grad, = torch.autograd.grad(actual.square().sum(), x)
        expected_grad, = torch.autograd.grad(expected.square().sum(), x)
        torch.testing.assert_close(grad, expected_grad, rtol=1e-3, atol=1e-3)


def test_export_keeps_the_operators():
    block = Block().to(DEVICE).eval()
    x = torch.randn(2, 8, 7, 7, device=DEVICE)
    program = torch.export.export(block, (x,))
    targets = {str(node.target) for node in program.graph.nodes}
    assert {'timm_convmixer.depthwise_mixing.default', 'timm_convmixer.pointwise_mixing.default'} <= targets
    torch.testing.assert_close(program.module()(x), block(x))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=identify)
def test_autocast_as_conv2d(dtype):
    block = Block().to(DEVICE)
    x = torch.randn(2, 8, 7, 7, device=DEVICE)
    with torch.autocast(DEVICE, dtype):
        out = block(x)
        assert out.dtype == block.depthwise(x).dtype == dtype
        compiled = torch.compile(block, fullgraph=True, backend='aot_eager')(x)
    explicit = kernels.pointwise_mixing(
        kernels.depthwise_mixing(
            x.to(dtype), block.depthwise.weight.to(dtype), block.depthwise.bias.to(dtype), block.scale, block.shift),
        block.pointwise.weight.to(dtype), block.pointwise.bias.to(dtype), block.scale, block.shift,
    )
    assert torch.equal(out, explicit) and torch.equal(compiled, explicit)
    out.float().sum().backward()
    assert block.depthwise.weight.grad.dtype == torch.float32


def test_switch_off():
    inputs = depthwise_inputs((2, 3, 8, 8, 5), torch.float32)
    kernels.set_fused(False)
    try:
        support_ = kernels.depthwise_mixing_support(*inputs)
        assert not support_.used and 'TIMM_CONVMIXER_FUSED' in support_.reason
        assert torch.equal(kernels.depthwise_mixing(*inputs), kernels.depthwise_mixing_ref(*inputs))
    finally:
        kernels.set_fused(True)


@pytest.mark.parametrize('change,reason', [
    (lambda x, w: (x.contiguous(memory_format=torch.channels_last), w), 'channels_last'),
    (lambda x, w: (x.double(), w.double()), 'dtype'),
    (lambda x, w: (x.repeat(1, 1, 1, 9), w), 'wider'),
    (lambda x, w: (x, w.repeat(1, 1, 3, 3)), 'larger than 9'),
    (lambda x, w: (x, w[..., :3].contiguous()), 'square'),
    (lambda x, w: (x[:0], w), 'empty'),
])
def test_the_rest_is_pytorch_exactly(change, reason):
    x, weight, bias, scale, shift = depthwise_inputs((2, 3, 8, 8, 5), torch.float32)
    x, weight = change(x, weight)
    bias, scale, shift = (t.to(x.dtype) for t in (bias, scale, shift))
    answer = kernels.depthwise_mixing_support(x, weight, bias, scale, shift)
    assert not answer and reason in answer.reason
    actual = kernels.depthwise_mixing(x, weight, bias, scale, shift)
    expected = kernels.depthwise_mixing_ref(x, weight, bias, scale, shift)
    assert torch.equal(actual, expected) and actual.stride() == expected.stride()


@pytest.mark.skipif(DEVICE == 'cpu', reason='needs a GPU')
def test_cuda_graph():
    block = Block(64, 9).to(DEVICE, torch.bfloat16).eval()
    x = torch.randn(4, 64, 32, 32, device=DEVICE, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = block(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = block(x)
        out.fill_(float('nan'))
        graph.replay()
        assert torch.equal(out, expected)
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(out, block(x))


@pytest.mark.skipif(DEVICE == 'cpu', reason='needs a GPU')
def test_autotune():
    inputs = depthwise_inputs((64, 64, 32, 32, 9), torch.bfloat16)
    expected = kernels.depthwise_mixing_ref(*double(*inputs), 'gelu')
    kernels.set_autotune(True)
    try:
        actual = kernels.depthwise_mixing(*inputs, 'gelu')
    finally:
        kernels.set_autotune(False)
        kernels.clear_autotune_cache()
    assert_as_close_as_pytorch(actual, kernels.depthwise_mixing_ref(*inputs, 'gelu'), expected, FLOORS[torch.bfloat16])
