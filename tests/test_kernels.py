"""The GPU kernels of inference against float64, kernel launches, and which problems have a kernel."""
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

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
    RUNS_HERE,
    assert_as_close_as_pytorch,
    assert_only_written,
    assert_same_specials,
    by_dtype,
    double,
    far_apart,
    floor_of,
    interpreting_process,
    on_kernels,
    poisoned,
    relative_error,
    shapes_by_dtype_and_act,
    some,
    with_gaps,
)
from support import ROOT, child_env, identify
from timm_convmixer import kernels
from timm_convmixer.kernels.gpu import support

if support.has_triton():
    from timm_convmixer.kernels.gpu import depthwise, depthwise_weight_gradient, launch, pointwise
else:
    pytest.skip('Triton 3.4 or newer is not installed', allow_module_level=True)

POINTWISE_SHAPES = (  # batch, channels in, channels out, height, width
    (1, 1, 1, 1, 1),
    (2, 3, 5, 7, 7),
    (3, 70, 33, 4, 4),
    (2, 64, 64, 8, 8),
    (1, 40, 130, 5, 16),
    (5, 17, 20, 1, 33),
    (1, 128, 96, 16, 16),
)


def run_python(*arguments, **environment):
    """Run Python with this checkout on its path and other environment variables."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=child_env(**environment),
        capture_output=True,
        text=True,
        timeout=600,
    )


def mixing_inputs(shape, dtype, channels=None, with_bias=True, affine_dtype=None):
    """Return x, weight, bias, scale and shift of depthwise mixing, or of pointwise mixing to ``channels``."""
    batch, in_channels, height, width, kernel = shape
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(batch, in_channels, height, width, generator=generator)
    if channels is None:
        channels, weight = in_channels, torch.randn(in_channels, 1, kernel, kernel, generator=generator) / kernel
    else:
        weight = torch.randn(channels, in_channels, 1, 1, generator=generator) / in_channels ** 0.5
    vectors = torch.randn(3, channels, generator=generator).to(DEVICE, affine_dtype or dtype)
    bias, scale, shift = (vector.clone() for vector in vectors)
    return [x.to(DEVICE, dtype), weight.to(DEVICE, dtype), bias if with_bias else None, scale, shift]


def pointwise_inputs(shape, dtype, **options):
    batch, in_channels, channels, height, width = shape
    return mixing_inputs((batch, in_channels, height, width, 1), dtype, channels, **options)


def depthwise_configs(x, kernel, flip=False):
    """Return every configuration, and small tiles so that a program takes several, the last one partial."""
    found = []
    for precision in ('tf32', 'ieee'):
        found += depthwise.candidates(x.shape, kernel, x.dtype, precision, launch.H100, flip)
    # For a wide feature map with a large kernel no tile of products fits.
    assert found[-1].taps and (not found[0].taps or x.shape[3] * kernel > 256)
    several = [found[0], found[-1]._replace(tiles=2)]
    found += [config._replace(block_m=16, tiles=max(2, config.tiles // 2)) for config in several]
    group_rows = found[0].group_rows
    first, last = depthwise.reach(x.shape[2], kernel, group_rows, flip)
    columns = (last + 1 - first) * depthwise.columns_of(x.shape[3], group_rows)
    if last > first and columns <= depthwise.BY_IMAGE_COLUMNS:
        found.append(depthwise.DepthwiseConfig(group_rows, 16, 2, 4, by_image=True))
    return found


def run_depthwise(x, weight, bias, scale, shift, residual, out, config, act='none', flip=False):
    depthwise.make_launch(
        x.device, x.shape, weight.shape[2], config, act, flip, x.stride(0), out.stride(0),
    )(x, weight, bias, scale, shift, residual, out)


def precision_of(config):
    return 'ieee' if config.taps else 'tf32'


@pytest.mark.parametrize('shape,dtype,act', shapes_by_dtype_and_act(DEPTHWISE_SHAPES))
@on_kernels
def test_depthwise_mixing(shape, dtype, act):
    inputs = mixing_inputs(shape, dtype, with_bias=act != 'none')
    expected = kernels.depthwise_mixing_ref(*double(*inputs), act)
    own = kernels.depthwise_mixing_ref(*inputs, act)
    actual = kernels.depthwise_mixing(*inputs, act)
    assert actual.dtype == dtype and actual.shape == expected.shape and actual.is_contiguous()
    assert_as_close_as_pytorch(actual, own, expected, FLOORS[dtype])

    # Run each configuration on images with gaps between them, into NaN-filled memory.
    x = with_gaps(inputs[0])
    for config in some(depthwise_configs(x, shape[4]), shape, dtype):
        out, storage = poisoned(x.shape, dtype)
        run_depthwise(x, *inputs[1:], x, out, config, act)
        assert_as_close_as_pytorch(out, own, expected, floor_of(dtype, precision_of(config)))
        assert_only_written(out, storage)


@pytest.mark.parametrize('tiles', [pytest.param(1, marks=pytest.mark.slow), 2, 4, 16])
@on_kernels
def test_depthwise_programs_of_several_tiles(tiles):
    """Many images per program, ending in the middle of one, as at batch 256 with up to 64 tiles per program."""
    inputs = mixing_inputs((11, 2, 16, 16, 9), torch.float32)
    expected = kernels.depthwise_mixing_ref(*double(*inputs), 'relu')
    x = with_gaps(inputs[0])
    for config in depthwise.candidates(inputs[0].shape, 9, torch.float32, 'tf32', launch.H100):
        config = config._replace(block_m=16, tiles=tiles)
        assert tiles == 1 or (11 * 16 // config.group_rows) % (16 * tiles), 'the last program would be full'
        out, storage = poisoned(inputs[0].shape, torch.float32)
        run_depthwise(x, *inputs[1:], x, out, config, 'relu')
        assert relative_error(out, expected) <= floor_of(torch.float32, 'tf32')
        assert_only_written(out, storage)


@pytest.mark.parametrize('shape,dtype,act', shapes_by_dtype_and_act(POINTWISE_SHAPES))
@on_kernels
def test_pointwise_mixing(shape, dtype, act):
    inputs = pointwise_inputs(shape, dtype, with_bias=act != 'none')
    expected = kernels.pointwise_mixing_ref(*double(*inputs), act)
    own = kernels.pointwise_mixing_ref(*inputs, act)
    actual = kernels.pointwise_mixing(*inputs, act)
    assert actual.dtype == dtype and actual.shape == expected.shape and actual.is_contiguous()
    assert_as_close_as_pytorch(actual, own, expected, FLOORS[dtype])

    x = with_gaps(inputs[0])
    configs = pointwise.CONFIGS_16_BIT
    if dtype == torch.float32:
        configs = pointwise.CONFIGS_32_BIT + pointwise.CONFIGS_IEEE
    # Under the interpreter, run only the first and the last configuration: others mostly compute masked elements.
    for config in configs if DEVICE == 'cuda' else (configs[0], configs[-1]):
        precision = 'ieee' if config in pointwise.CONFIGS_IEEE else 'tf32'
        out, storage = poisoned(expected.shape, dtype)
        pointwise.make_launch(
            x.device, x.shape, expected.shape[1], config, act, precision, x.stride(0), out.stride(0),
        )(x, *inputs[1:], out)
        assert_as_close_as_pytorch(out, own, expected, floor_of(dtype, precision))
        assert_only_written(out, storage)


@pytest.mark.skipif(
    DEVICE == 'cpu' and metadata.version('triton').startswith('3.4'),
    reason="the interpreter of Triton 3.4 takes a descriptor's strides for bytes")
@pytest.mark.parametrize('shape,dtype', [
    ((3, 24, 40, 4, 10), torch.float16),  # a tile is larger than an image has positions and output channels
    ((40, 16, 40, 8, 8), torch.bfloat16),  # more tiles than programs
    ((2, 200, 256, 16, 16), torch.bfloat16),  # the last step is partial
], ids=identify)
@on_kernels
def test_persistent_pointwise(shape, dtype):
    inputs = pointwise_inputs(shape, dtype)
    x, weight, bias = inputs[:3]
    small = pointwise.PointwiseConfig(16, 32, 16, 4, 2, persistent=True)
    for config in (pointwise.PERSISTENT, small) if DEVICE == 'cuda' or shape[0] == 2 else (small,):
        for act, arguments, ref in (
                ('gelu', inputs, kernels.pointwise_mixing_ref),
                ('none', (x, weight, bias, None, None), lambda x, weight, bias, *_: F.conv2d(x, weight, bias)),
        ):
            expected, own = ref(*double(*arguments), act), ref(*arguments, act)
            gappy = with_gaps(x)
            out, storage = poisoned(expected.shape, dtype)
            pointwise.make_launch(
                x.device, x.shape, shape[2], config, act, 'tf32', gappy.stride(0), out.stride(0),
            )(gappy, *arguments[1:], out)
            assert_as_close_as_pytorch(out, own, expected, FLOORS[dtype])
            assert_only_written(out, storage)


def test_what_the_persistent_kernel_takes():
    def first(shape, out_channels=768, dtype=torch.bfloat16, limits=launch.H100, is_aligned=True):
        return pointwise.candidates(shape, out_channels, dtype, 'tf32', limits, is_aligned)[0]

    assert first((64, 768, 32, 32)).persistent and first((256, 1024, 16, 16)).persistent
    assert not first((64, 768, 32, 32), dtype=torch.float32).persistent
    assert not first((64, 768, 32, 32), limits=launch.DeviceLimits(108, 166912)).persistent
    assert not first((64, 768, 32, 32), limits=launch.DeviceLimits(170, 101376, has_async_products=True)).persistent
    # Rows or addresses that are not aligned, too few tiles, tiles that are empty in part.
    assert not first((64, 768, 32, 32), is_aligned=False).persistent
    assert not first((64, 768, 7, 7)).persistent and not first((64, 3, 32, 32)).persistent
    assert not first((1, 768, 32, 32)).persistent
    assert not first((64, 768, 28, 28)).persistent


@pytest.mark.parametrize('dtype', DTYPES, ids=identify)
@on_kernels
def test_pointwise_convolution(dtype):
    x, weight, vector = pointwise_inputs((2, 24, 33, 4, 10), dtype)[:3]
    for bias in (vector, vector.float(), None):
        expected = kernels.pointwise_convolution_ref(*double(x, weight, bias))
        actual, own = kernels.pointwise_convolution(x, weight, bias), kernels.pointwise_convolution_ref(x, weight, bias)
        assert actual.dtype == dtype and actual.is_contiguous()
        assert_as_close_as_pytorch(actual, own, expected, FLOORS[dtype])


@pytest.mark.parametrize('in_chans,patch,size', [(3, 7, 31), (4, 2, 8), (1, 1, 9)])
@pytest.mark.parametrize('dtype', DTYPES, ids=identify)
@on_kernels
def test_patch_embedding(dtype, in_chans, patch, size):
    x, _, bias, scale, shift = mixing_inputs((2, 40, size, size, 1), dtype)
    x, weight = x[:, :in_chans], torch.randn(40, in_chans, patch, patch).to(DEVICE, dtype) / patch
    expected = kernels.patch_embedding_ref(*double(x, weight, bias, scale, shift))
    actual = kernels.patch_embedding(x, weight, bias, scale, shift)
    assert actual.dtype == dtype and actual.shape == expected.shape and actual.is_contiguous()
    own = kernels.patch_embedding_ref(x, weight, bias, scale, shift)
    assert_as_close_as_pytorch(actual, own, expected, FLOORS[dtype])


@on_kernels
def test_depthwise_mixing_without_shift():
    """The inference form folds the shift into the bias of the pointwise convolution."""
    x, weight, bias, scale, _ = mixing_inputs((2, 3, 8, 8, 5), torch.float32)
    expected = kernels.depthwise_mixing_ref(*double(x, weight, bias, scale), None, 'gelu')
    assert relative_error(kernels.depthwise_mixing(x, weight, bias, scale, None, 'gelu'), expected) <= 1e-6


@pytest.mark.parametrize('half', [torch.float16, torch.bfloat16], ids=identify)
@on_kernels
def test_affine_parameters_in_fp32(half):
    for inputs, function, ref in (
            (mixing_inputs((2, 3, 8, 8, 5), half, affine_dtype=torch.float32),
             kernels.depthwise_mixing, kernels.depthwise_mixing_ref),
            (pointwise_inputs((2, 3, 5, 7, 7), half, affine_dtype=torch.float32),
             kernels.pointwise_mixing, kernels.pointwise_mixing_ref),
    ):
        actual = function(*inputs, 'gelu')
        assert actual.dtype == half
        assert_as_close_as_pytorch(actual, ref(*inputs, 'gelu'), ref(*double(*inputs), 'gelu'), FLOORS[half])


@pytest.mark.parametrize('interface', ['allow_tf32', 'fp32_precision'])
@pytest.mark.parametrize('precision', ['ieee', 'tf32'])
@on_kernels
def test_fp32_follows_the_switch_for_convolutions(precision, interface):
    if interface == 'allow_tf32':
        torch.backends.cudnn.allow_tf32 = precision == 'tf32'
    elif hasattr(torch.backends.cudnn, 'conv'):
        torch.backends.cudnn.conv.fp32_precision = precision
    else:
        return  # new in PyTorch 2.9
    assert launch.input_precision(torch.float32) == precision
    inputs = mixing_inputs((2, 2, 16, 16, 9), torch.float32)
    actual = kernels.depthwise_mixing(*inputs, 'gelu')
    floor = floor_of(torch.float32, precision)
    assert relative_error(actual, kernels.depthwise_mixing_ref(*double(*inputs), 'gelu')) <= floor
    inputs = pointwise_inputs((2, 64, 64, 8, 8), torch.float32)
    actual = kernels.pointwise_mixing(*inputs, 'gelu')
    assert relative_error(actual, kernels.pointwise_mixing_ref(*double(*inputs), 'gelu')) <= floor


@pytest.mark.parametrize('shape,dtype', by_dtype([(3, 2, 16, 16, 5), (2, 2, 13, 33, 4), (2, 1, 7, 7, 3)]))
@on_kernels
def test_depthwise_infinities_and_nan(shape, dtype):
    inputs = mixing_inputs(shape, dtype)
    x, weight = inputs[:2]
    x[0, 0, 0, 0] = float('inf')
    x[0, 0, -1, -2] = float('-inf')
    x[-1, -1, shape[2] // 2, shape[3] // 2] = float('nan')
    weight[:, :, 0, 1] = 0.0  # 0 * inf is NaN inside the receptive field only
    configs = depthwise_configs(x, shape[4])
    for act in ACTS:
        expected = kernels.depthwise_mixing_ref(*double(*inputs), act)
        for config in some(configs, (*shape, len(act)), dtype):
            out, storage = poisoned(x.shape, dtype)
            run_depthwise(*inputs, x, out, config, act)
            assert_same_specials(out, expected, floor_of(dtype, precision_of(config)))


@on_kernels
def test_depthwise_infinite_weight():
    inputs = mixing_inputs((2, 2, 16, 16, 3), torch.float32)
    inputs[1][0, 0, 0, 0] = float('inf')
    inputs[1][1, 0, 1, 1] = float('nan')
    actual = kernels.depthwise_mixing(*inputs, 'none')
    expected = kernels.depthwise_mixing_ref(*double(*inputs), 'none')
    # Libraries disagree whether an infinite weight is multiplied by the padding; ours does not multiply.
    inner = (slice(None), slice(None), slice(1, -1), slice(1, -1))
    assert torch.equal(actual[inner].isnan(), expected[inner].isnan())
    assert torch.equal(actual[inner].isinf(), expected[inner].isinf())
    assert actual[:, 0, 0].isfinite().all() and actual[:, 1].isnan().all()


@pytest.mark.parametrize('dtype', DTYPES, ids=identify)
@on_kernels
def test_pointwise_infinities_and_nan(dtype):
    inputs = pointwise_inputs((2, 40, 33, 4, 5), dtype)
    inputs[0][0, 0, 0, 0] = float('inf')
    inputs[0][0, 1, 3, 4] = float('-inf')
    inputs[0][1, 39, 2, 2] = float('nan')
    for act in ACTS:
        expected = kernels.pointwise_mixing_ref(*double(*inputs), act)
        assert_same_specials(kernels.pointwise_mixing(*inputs, act), expected, FLOORS[dtype])


@pytest.mark.parametrize('dtype', DTYPES, ids=identify)
@on_kernels
def test_gelu_over_its_whole_range(dtype):
    values = torch.cat([torch.linspace(-12, 12, 4000), torch.tensor([0.0, -0.0, 1e-8, -1e-8, 60000.0, -60000.0])])
    x = values.view(1, 1, 1, -1).to(DEVICE, dtype)
    one = torch.ones(1, device=DEVICE)
    actual = kernels.activation_affine(x, one, 0 * one, 'gelu')
    expected = F.gelu(x.double())
    ulp = {torch.float32: 2e-7, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    assert ((actual.double() - expected).abs() <= ulp * expected.abs() + 2e-6).all()


@on_kernels
def test_more_than_two_billion_elements():
    inputs = mixing_inputs((3, 2, 4, 8, 3), torch.float16)
    x = far_apart(inputs[0].shape, torch.float16)
    x.copy_(inputs[0])
    out = far_apart(inputs[0].shape, torch.float16)
    expected = kernels.depthwise_mixing_ref(*double(*inputs), 'relu')
    configs = depthwise_configs(x, 3)
    for config in (configs[0], next(config for config in configs if config.taps)):
        out.fill_(float('nan'))
        run_depthwise(x, *inputs[1:], x, out, config, 'relu')
        assert relative_error(out, expected) <= FLOORS[torch.float16]
    inputs = pointwise_inputs((3, 2, 2, 4, 8), torch.float16)
    x.copy_(inputs[0])
    out.fill_(float('nan'))
    pointwise.make_launch(
        x.device, x.shape, 2, pointwise.CONFIGS_16_BIT[-1], 'relu', 'tf32', x.stride(0), out.stride(0),
    )(x, *inputs[1:], out)
    assert relative_error(out, kernels.pointwise_mixing_ref(*double(*inputs), 'relu')) <= FLOORS[torch.float16]


@pytest.mark.skipif(DEVICE == 'cpu', reason='needs a GPU')
@on_kernels
def test_cuda_graph():
    inputs = mixing_inputs((4, 64, 32, 32, 9), torch.bfloat16)
    square = pointwise_inputs((4, 64, 64, 32, 32), torch.bfloat16)[1:]

    def block(x):
        return kernels.pointwise_mixing(kernels.depthwise_mixing(x, *inputs[1:]), *square)

    x = inputs[0]
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


@pytest.mark.skipif(RUNS_HERE, reason='runs in the process of the tests')
def test_block_grid():
    """Run block_grid.py in a process that interprets the kernels."""
    arguments = ['-q', '-p', 'no:cacheprovider', 'tests/block_grid.py']
    if not FULL:
        arguments += ['-k', '(dtype0 and default) or (dtype1 and kernel_size)']
    code = f'import pytest\nresult = int(pytest.main({arguments!r}))'
    process = interpreting_process()
    assert process.run(code) == 0, Path(process.log).read_text()[-6000:]


@pytest.mark.parametrize('act', ACTS)
@pytest.mark.parametrize('kernel', [1, 4, 5])
def test_references_are_the_definition(kernel, act):
    activation = {'gelu': F.gelu, 'relu': F.relu, 'none': lambda x: x}[act]
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(3, 3, kernel, padding='same', groups=3, dtype=torch.float64)
    x, scale, shift = torch.randn(2, 3, 8, 8).double(), torch.randn(3).double(), torch.randn(3).double()
    expected = x + scale[:, None, None] * activation(conv(x)) + shift[:, None, None]
    actual = kernels.depthwise_mixing_ref(x, conv.weight, conv.bias, scale, shift, act)
    torch.testing.assert_close(actual, expected)

    weight, bias = torch.randn(3, 3, 1, 1).double(), torch.randn(3).double()
    mixed = torch.einsum('bchw,oc->bohw', x, weight[:, :, 0, 0]) + bias[:, None, None]
    expected = scale[:, None, None] * activation(mixed) + shift[:, None, None]
    torch.testing.assert_close(kernels.pointwise_mixing_ref(x, weight, bias, scale, shift, act), expected)


@pytest.mark.parametrize('limits', [launch.H100, launch.DeviceLimits(84, 101376)], ids=['h100', 'small'])
def test_configurations_fit_every_shape(limits):
    for dtype in (torch.float32, torch.bfloat16):
        for kernel in range(1, 10):
            for width in (1, 4, 7, 8, 14, 16, 28, 32, 33, 56, 64):
                problem = (256, 768, width, width), kernel, dtype, 'tf32', limits
                for config in depthwise.candidates(*problem) + depthwise_weight_gradient.candidates(*problem):
                    assert config.group_rows * width <= depthwise.columns_of(width, config.group_rows) <= 64
                    assert config.block_m >= 16 and config.tiles >= 1
        for size in (1, 7, 16, 32):
            assert pointwise.candidates((1, 768, size, size), 768, dtype, 'tf32', limits)
    # The benchmarked models (224 pixels, batch 256) all run on matrix products.
    if limits == launch.H100:
        for channels, size, kernel in ((1536, 32, 9), (768, 32, 7), (1024, 16, 9)):
            problem = (256, channels, size, size), kernel, torch.bfloat16, 'tf32', limits
            assert not depthwise.candidates(*problem)[0].taps
            assert depthwise_weight_gradient.candidates(*problem)


@pytest.fixture
def driver(monkeypatch):
    """Triton with a stub driver that launches nothing."""
    import triton
    monkeypatch.syspath_prepend(str(ROOT / 'benchmarks'))
    from dispatch import StubDriver
    driver = StubDriver()
    # Triton loads a module that is None at every launch: machine code of an earlier test would keep that test's driver.
    driver.utils = SimpleNamespace(**{**vars(driver.utils), 'load_binary': lambda *args: (None, None, 32, 0, 1024)})
    triton.runtime.driver.set_active(driver)
    yield driver
    triton.runtime.driver.set_active(None)


@pytest.mark.skipif(RUNS_HERE, reason='kernels are launched for real, or interpreted')
@pytest.mark.parametrize('with_bias', [True, False])
def test_a_kept_launch_is_what_triton_would_launch(driver, with_bias):
    inputs = [
        None if t is None else t.clone() for t in mixing_inputs((3, 16, 4, 8, 3), torch.float16, with_bias=with_bias)]
    x, *rest = inputs
    out = torch.empty_like(x)
    config = depthwise.candidates(x.shape, 3, x.dtype, 'tf32', launch.H100)[0]
    run = depthwise.make_launch(x.device, x.shape, 3, config, 'relu')
    run(x, *rest, x, out)
    run(x, *rest, x, out)
    kept = driver.launched
    run.kernel[run.grid](x, *rest, x, out, *run.values, **run.options)

    def comparable(arguments):
        # Without the argument for profilers.
        return [id(a) if isinstance(a, torch.Tensor) else a for i, a in enumerate(arguments) if i != 6]

    assert kept[:3] == run.grid and comparable(kept) == comparable(driver.launched)
    assert kept[-len(run.values):] == run.values


@pytest.mark.skipif(RUNS_HERE, reason='kernels are launched for real, or interpreted')
def test_an_address_that_is_not_aligned_has_machine_code_of_its_own(driver):
    x, *rest = mixing_inputs((2, 16, 4, 8, 3), torch.float16)
    config = depthwise.candidates(x.shape, 3, x.dtype, 'tf32', launch.H100)[0]
    run = depthwise.make_launch(x.device, x.shape, 3, config, 'relu')
    position = run.kernel.arg_names.index('out_ptr')
    run(x, *rest, x, torch.empty_like(x))
    assert driver.source.attrs[position,] == [['tt.divisibility', 16]]
    shifted = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view_as(x)
    run(x, *rest, x, shifted)
    assert driver.launched[-len(run.values) - 1] is shifted and not driver.source.attrs[position,]


@pytest.mark.skipif(RUNS_HERE, reason='kernels are launched for real, or interpreted')
def test_every_kernel_compiles(driver, monkeypatch):
    """The interpreter accepts kernels that the compiler rejects, so test both."""
    from dispatch import make_calls

    launched = set()
    launcher = driver.launcher_cls
    monkeypatch.setattr(
        driver, 'launcher_cls', lambda source, metadata: launched.add(source.fn.__name__) or launcher(source, metadata))
    monkeypatch.setattr(support, 'is_interpreted', lambda: True)
    try:
        kernels.set_gpu_kernels()
        for _, call in make_calls().values():
            call()
    finally:
        kernels.set_gpu_kernels(False)
    assert launched == {
        'depthwise_kernel', 'pointwise_kernel', 'persistent_pointwise_kernel', 'pointwise_weight_gradient_kernel',
        'weight_gradient_kernel', 'merge_weight_gradient_kernel',
        'statistics_kernel', 'merge_statistics_kernel', 'affine_kernel', 'gradient_sums_kernel',
        'merge_gradient_sums_kernel', 'input_gradient_kernel',
    }


@pytest.mark.slow
def test_what_is_launched_on_hopper_does_not_spill():
    result = run_python('benchmarks/compile_kernels.py', '--quick', TRITON_INTERPRET='0')
    assert result.returncode == 0, result.stdout + result.stderr[-5000:]


@pytest.mark.parametrize('change,reason', [
    (dict(), ''),
    (dict(capability=(10, 0)), 'kernels are off: not measured on compute capability 10.0 '
                               '(TIMM_CONVMIXER_GPU_KERNELS=1 turns them on)'),
    (dict(capability=(8, 0)), 'kernels are off: not measured on compute capability 8.0'),
    (dict(capability=(7, 5)), 'compute capability 7.5 is below 8.0'),
    (dict(device=torch.device('cpu')), 'not on a CUDA device'),
    (dict(dtype=torch.float64), 'dtype is torch.float64'),
    (dict(shape=(1, 8, 65, 65)), 'the map is 65 wide'),
    (dict(shape=(0, 8, 16, 16)), 'the map is empty'),
    (dict(kernel_size=11), 'the kernel is 11 x 11'),
    (dict(shape=(2 ** 20, 1024, 4, 4)), '32 bits'),
    (dict(shape=(2 ** 26, 1, 4, 4)), '32 bits'),
    (dict(hip='6.0'), 'ROCm'),
    (dict(triton=False), 'Triton 3.4 or newer is not installed'),
])
def test_refusals_say_why(change, reason, monkeypatch):
    change = dict(change)
    capability = change.pop('capability', (9, 0))
    monkeypatch.setattr(support, '_capability', lambda device: capability)
    monkeypatch.setattr(support, 'is_interpreted', lambda: False)
    monkeypatch.setattr(torch.version, 'hip', change.pop('hip', None))
    present = change.pop('triton', True)
    monkeypatch.setattr(support, 'has_triton', lambda: present)
    problem = dict(
        device=torch.device('cuda', 0), dtype=torch.bfloat16, shape=torch.Size((4, 8, 16, 16)), kernel_size=9)
    problem.update(change)
    asked = kernels.kernel_refusal, kernels.weight_gradient_refusal
    try:
        for enable in (False, True):
            kernels.set_gpu_kernels(enable)
            assert kernels.use_gpu_kernels() is enable
            serves = not reason or enable and reason.startswith('kernels are off')
            for refusal in asked:
                answer = refusal(**problem)
                if refusal is kernels.weight_gradient_refusal and capability == (8, 0):
                    assert 'not known to fit into the registers of compute capability 8.0' in answer
                else:
                    assert answer == '' if serves else reason in answer
                assert refusal(**problem) is answer
    finally:
        kernels.set_gpu_kernels(False)


def test_a_device_without_kernels_is_refused_before_the_layers_are_looked_at(monkeypatch):
    monkeypatch.setattr(support, 'has_triton', lambda: True)
    monkeypatch.setattr(torch.version, 'hip', None)
    device = torch.device('cuda', 0)
    try:
        for capability, dtype, refused in (
                ((9, 0), torch.bfloat16, False),
                ((9, 0), torch.float32, False),
                ((9, 0), torch.float64, True),
                ((8, 0), torch.bfloat16, True),
        ):
            monkeypatch.setattr(support, '_capability', lambda device: capability)
            support._refusal.cache_clear()
            assert bool(support.device_refusal(device, dtype)) is refused
    finally:
        support._refusal.cache_clear()


def test_asking_imports_no_triton_and_needs_none():
    script = '''
import importlib.machinery, sys
import torch
from timm_convmixer import kernels
from timm_convmixer.kernels.gpu import support
problem = torch.device('cpu'), torch.float32, (1, 3, 4, 4), 3
print(kernels.use_gpu_kernels(), kernels.kernel_refusal(*problem))
print([name for name in sys.modules if name == 'triton' or name.startswith('timm_convmixer.kernels.gpu.')])
find_spec = importlib.machinery.PathFinder.find_spec
importlib.machinery.PathFinder.find_spec = classmethod(
    lambda cls, name, *args: None if name == 'triton' else find_spec(name, *args))
support.has_triton.cache_clear()
kernels.set_gpu_kernels(False)
print(kernels.kernel_refusal(*problem))
'''
    result = run_python('-W', 'error', '-c', script, TIMM_CONVMIXER_GPU_KERNELS='1', TRITON_INTERPRET='0')
    assert result.stdout.splitlines() == [
        'True not on a CUDA device', "['timm_convmixer.kernels.gpu.support']", 'Triton 3.4 or newer is not installed',
    ], result.stdout + result.stderr
