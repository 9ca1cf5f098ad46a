"""The GPU kernels of the training segment against float64, and their references against PyTorch's autograd."""
import contextlib
import itertools

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from kernel_grid import (
    ACTS,
    DEPTHWISE_SHAPES,
    DEVICE,
    DTYPES,
    FLOORS,
    FULL,
    INTERPRETED,
    assert_as_close_as_pytorch,
    assert_only_written,
    assert_same_specials,
    by_dtype,
    depthwise_inputs,
    double,
    far_apart,
    floor_of,
    on_kernels,
    poisoned,
    relative_error,
    shapes_by_dtype_and_act,
    some,
    with_gaps,
)
from support import ROOT, assert_close, identify
from timm_convmixer import kernels
from timm_convmixer.kernels.gpu import support
from timm_convmixer.kernels.normalization import BatchNormalization

if support.has_triton():
    from test_kernels import depthwise_configs, precision_of, run_depthwise
    from timm_convmixer.kernels.gpu import (
        activation_affine,
        activation_norm_backward,
        activation_statistics,
        depthwise_weight_gradient,
        launch,
        map_tiles,
        pointwise_weight_gradient,
    )
else:
    pytest.skip('Triton 3.4 or newer is not installed', allow_module_level=True)

MAP_SHAPES = (  # batch, channels, height, width
    (1, 1, 1, 1),
    (2, 3, 5, 7),
    (3, 2, 8, 8),
    (1, 5, 1, 16),
    (5, 2, 32, 32),
    (70, 1, 2, 1),
    (2, 2, 33, 40),
)


def maps(shape, dtype, count=1):
    """Return random feature maps with a mean of several standard deviations, which reveals cancellation."""
    generator = torch.Generator().manual_seed(sum(shape))
    return [(torch.randn(shape, generator=generator) + 3).to(DEVICE, dtype) for _ in range(count)]


def vectors(channels, count):
    generator = torch.Generator().manual_seed(channels)
    return [torch.randn(channels, generator=generator).to(DEVICE) for _ in range(count)]


def error_by_channel(actual, expected):
    """Return the largest error relative to the channel's expected value."""
    return ((actual.double() - expected).abs() / expected.abs().clamp_min(1e-3)).max().item()


@contextlib.contextmanager
def chunks(count):
    """Limit the number of programs per channel sum, so that each sums several tiles of images."""
    cached = activation_statistics.statistics_launches, activation_norm_backward.backward_launches
    before, map_tiles._MAX_CHUNKS = map_tiles._MAX_CHUNKS, count
    for function in cached:
        function.cache_clear()
    try:
        yield
    finally:
        map_tiles._MAX_CHUNKS = before
        for function in cached:
            function.cache_clear()


@pytest.mark.parametrize('shape,dtype,act', shapes_by_dtype_and_act(MAP_SHAPES))
@on_kernels
def test_statistics(shape, dtype, act):
    x, = maps(shape, dtype)
    expected = kernels.activation_statistics_ref(x.double(), act)
    actual = kernels.activation_statistics(x, act)
    for result, reference in zip(actual, expected):
        assert result.dtype == torch.float32 and result.shape == (shape[1],)
        assert error_by_channel(result, reference) <= 2e-6
    again = kernels.activation_statistics(x, act)
    assert all(torch.equal(a, b) for a, b in zip(actual, again))


@on_kernels
def test_statistics_do_not_cancel():
    x, = maps((40, 2, 8, 8), torch.float32)
    x[20:, 0] += 30.0  # later images differ from the first
    x += 1000.0
    mean, var = kernels.activation_statistics(x, 'none')
    expected_mean, expected_var = kernels.activation_statistics_ref(x.double(), 'none')
    assert error_by_channel(mean, expected_mean) <= 2e-7
    assert error_by_channel(var, expected_var) <= 1e-4


@pytest.mark.parametrize('count', [1, 2])
@pytest.mark.parametrize('shape', [(7, 2, 32, 32), (5, 2, 33, 40)], ids=identify)
@on_kernels
def test_sums_of_programs_of_several_tiles(shape, count):
    """Programs that sum more images than a tile holds, the last tile partial, as at batch 256."""
    grad, x = maps(shape, torch.float32, 2)
    with chunks(count):
        tiling = map_tiles.make_tiling(shape, 132)
        assert tiling.chunks == count and tiling.images > tiling.planes
        statistics = kernels.activation_statistics(x, 'gelu')
        scale, mean, invstd = vectors(shape[1], 3)
        actual = kernels.activation_norm_backward(grad, x, 'gelu', scale, mean, invstd, True)
    for result, reference in zip(statistics, kernels.activation_statistics_ref(x.double(), 'gelu')):
        assert error_by_channel(result, reference) <= 2e-6
    expected = kernels.activation_norm_backward_ref(
        *double(grad, x), 'gelu', *double(scale, mean, invstd), True)
    for result, reference in zip(actual, expected):
        assert relative_error(result, reference) <= 2e-6


@pytest.mark.parametrize('shape,dtype,act', shapes_by_dtype_and_act(MAP_SHAPES))
@on_kernels
def test_affine(shape, dtype, act):
    x, other = maps(shape, dtype, 2)
    scale, shift = vectors(shape[1], 2)
    for residual in (other, None):
        x64, scale64, shift64, residual64 = double(x, scale, shift, residual)
        expected = kernels.activation_affine_ref(x64, scale64, shift64, act, residual64)
        own = kernels.activation_affine_ref(x, scale, shift, act, residual)
        actual = kernels.activation_affine(x, scale, shift, act, residual)
        assert actual.dtype == dtype and actual.is_contiguous()
        assert_as_close_as_pytorch(actual, own, expected, FLOORS[dtype])
        out, storage = poisoned(shape, dtype, gap=0)
        run = activation_affine.affine_launch(x.device, x.shape, dtype, act, residual is not None)
        run(x, scale, shift, residual, out)
        assert torch.equal(out, actual)
        assert_only_written(out, storage)


@pytest.mark.parametrize('shape,dtype,act', shapes_by_dtype_and_act(MAP_SHAPES))
@on_kernels
def test_backward(shape, dtype, act):
    grad, x = maps(shape, dtype, 2)
    grad -= 2.5
    mean, var = kernels.activation_statistics_ref(x.double(), act)
    mean, invstd = mean.float(), (var + 1e-5).rsqrt().float()
    scale = vectors(shape[1], 1)[0] * invstd
    grad64, x64, scale64, mean64, invstd64 = double(grad, x, scale, mean, invstd)
    for batch_statistics in (False, True):
        expected = kernels.activation_norm_backward_ref(grad64, x64, act, scale64, mean64, invstd64, batch_statistics)
        own = kernels.activation_norm_backward_ref(grad, x, act, scale, mean, invstd, batch_statistics)
        actual = kernels.activation_norm_backward(grad, x, act, scale, mean, invstd, batch_statistics)
        assert actual[0].dtype == dtype and actual[0].is_contiguous()
        # Normalising a single value by its own statistics gives 0.
        if batch_statistics and x[:, 0].numel() == 1:
            assert actual[0].abs().max() <= 1e-3
        else:
            assert_as_close_as_pytorch(actual[0], own[0], expected[0], FLOORS[dtype])
        # These sums cancel in part: compare relative to the sum of absolute values.
        largest = (grad64.abs().sum((0, 2, 3)) * (3 + mean64.abs() * invstd64)).max().item()
        for result, reference in zip(actual[1:], expected[1:]):
            assert result.dtype == torch.float32
            assert (result.double() - reference).abs().max().item() <= 1e-6 * largest
        again = kernels.activation_norm_backward(grad, x, act, scale, mean, invstd, batch_statistics)
        assert all(torch.equal(a, b) for a, b in zip(actual, again))


@pytest.mark.parametrize('options', [
    dict(),
    dict(momentum=None),
    dict(weight=None, bias=None),
    dict(running_mean=None, running_var=None, num_batches_tracked=None),
], ids=lambda options: '-'.join(options) or 'default')
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=identify)
@pytest.mark.parametrize('is_strided', [False, True])
@on_kernels
def test_batch_norm(dtype, options, is_strided):
    x, = maps((5, 40, 9, 7), dtype)

    def norm():
        values = [vector.to(dtype) for vector in vectors(40, 4)]
        if is_strided:
            values = [torch.stack([vector, vector], 1)[:, 0] for vector in values]
        return BatchNormalization(
            'gelu', *values[:3], values[3].exp(), True, 0.1, 1e-5, torch.tensor(3, device=DEVICE))._replace(**options)

    ours, theirs = norm(), norm()
    actual, expected = kernels.activation_batch_norm(x, ours), kernels.activation_batch_norm_ref(x, theirs)
    for result, reference in zip(actual[1:], expected[1:]):
        torch.testing.assert_close(result, reference, rtol=1e-5, atol=1e-5)
    # What is rounded to bfloat16 may be rounded the other way, and the interpreter truncates.
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for result, reference in zip(ours[3:5], theirs[3:5]):
        torch.testing.assert_close(result, reference, rtol=tolerance, atol=tolerance)
    if ours.num_batches_tracked is not None:
        assert ours.num_batches_tracked == theirs.num_batches_tracked == 4
        # The count is bumped, as autograd expects. Running statistics are not, as in F.batch_norm: a graph may have
        # saved them.
        assert [tensor._version for tensor in (*ours[3:5], ours.num_batches_tracked)] == [0, 0, 1]


@on_kernels
def test_momentum_that_changes_compiles_nothing_anew():
    x, = maps((2, 3, 4, 4), torch.float32)
    activation_statistics.statistics_launches.cache_clear()
    running = vectors(3, 2)
    for momentum in (0.1, 0.2, 0, 1):
        norm = BatchNormalization('relu', None, None, *running, True, momentum, 1e-5)
        expected = norm._replace(running_mean=running[0].clone(), running_var=running[1].clone())
        kernels.activation_batch_norm(x, norm)
        kernels.activation_batch_norm_ref(x, expected)
        torch.testing.assert_close(running, list(expected[3:5]), rtol=1e-5, atol=1e-5)
    assert activation_statistics.statistics_launches.cache_info().currsize == 1


@on_kernels
def test_gradients_may_have_any_layout():
    """For example the expanded gradient of pooling."""
    x, weight, _, _, residual = depthwise_inputs((2, 3, 4, 4, 3), torch.float32)
    grad = torch.randn(2, 3, 1, 1, device=DEVICE).expand(2, 3, 4, 4)
    nhwc = residual.contiguous(memory_format=torch.channels_last)
    scale, mean, invstd = vectors(3, 3)
    for function, ref, arguments in (
            (kernels.activation_norm_backward, kernels.activation_norm_backward_ref,
             (grad, x, 'gelu', scale, mean, invstd, True)),
            (kernels.depthwise_input_gradient, kernels.depthwise_input_gradient_ref, (grad, weight, nhwc)),
            (kernels.depthwise_weight_gradient, kernels.depthwise_weight_gradient_ref, (x, grad, 3)),
            (kernels.pointwise_weight_gradient, kernels.pointwise_weight_gradient_ref, (x, grad)),
    ):
        torch.testing.assert_close(function(*arguments), ref(*arguments), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('act', ACTS)
@pytest.mark.parametrize('dtype', DTYPES, ids=identify)
@on_kernels
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
    # With fixed statistics an infinity affects one element, with batch statistics the whole channel.
    grad[0, 3, 0, 0] = float('inf')
    actual = kernels.activation_norm_backward(grad, x, act, scale, shift, scale.abs(), False)
    grad64, x64, scale64, shift64 = double(grad, x, scale, shift)
    expected = kernels.activation_norm_backward_ref(grad64, x64, act, scale64, shift64, scale64.abs(), False)
    for result, reference in zip(actual, expected):
        assert torch.equal(result.isfinite(), reference.isfinite())


@pytest.mark.skipif(DEVICE == 'cpu', reason='needs the memory of a GPU')
@pytest.mark.parametrize('tall', [False, True])
@on_kernels
def test_maps_beyond_32_bits(tall):
    # Positions of an image are counted in 32 bits.
    shape = (1, 3, 2 ** 15, 2 ** 15 - 8) if tall else (2 ** 12 + 1, 2 ** 9, 32, 32)
    x = torch.ones(shape, device=DEVICE, dtype=torch.half)
    one = torch.ones(x.shape[1], device=DEVICE)
    mean, var = kernels.activation_statistics(x, 'none')
    torch.testing.assert_close(mean, one, rtol=1e-5, atol=0)
    assert var.max() <= 1e-5
    out = kernels.activation_affine(x, 2 * one, one, 'relu')
    assert (out == 3).all()


@pytest.mark.parametrize('shape,dtype', by_dtype(DEPTHWISE_SHAPES, every=2))
@on_kernels
def test_depthwise_convolution_and_input_gradient(shape, dtype):
    x, weight, bias, grad, residual = depthwise_inputs(shape, dtype)
    cases = [
        (kernels.depthwise_convolution, kernels.depthwise_convolution_ref, (x, weight, bias)),
        (kernels.depthwise_input_gradient, kernels.depthwise_input_gradient_ref, (grad, weight, residual)),
    ]
    if FULL or shape[4] <= 5:
        cases += [(function, ref, (*inputs[:2], None)) for function, ref, inputs in cases]
    for function, ref, inputs in cases:
        flip = function is kernels.depthwise_input_gradient
        expected, own = ref(*double(*inputs)), ref(*inputs)
        actual = function(*inputs)
        assert actual.dtype == dtype and actual.is_contiguous()
        assert_as_close_as_pytorch(actual, own, expected, FLOORS[dtype])
        if inputs[2] is None:
            continue
        # Run configurations on images with gaps between them, into NaN-filled memory. The tests of depthwise mixing use
        # the same kernel and configurations.
        bias_of, residual_of = (None, with_gaps(residual)) if flip else (bias, None)
        for config in some(depthwise_configs(x, shape[4], flip), shape, dtype):
            out, storage = poisoned(x.shape, dtype)
            run_depthwise(with_gaps(inputs[0]), weight, bias_of, None, None, residual_of, out, config, flip=flip)
            assert_as_close_as_pytorch(out, own, expected, floor_of(dtype, precision_of(config)))
            assert_only_written(out, storage)


@contextlib.contextmanager
def poisoned_memory():
    """Fill newly allocated memory with NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def pytorch_gradients(x, weight, bias, grad):
    """Return PyTorch's gradients of input, weight and bias."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
    out = F.conv2d(*leaves, padding='same', groups=weight.shape[0])
    return torch.autograd.grad(out, leaves, grad)


def weight_gradient_configs(x, kernel):
    """Return every configuration, and small tiles so that a program takes several, the last one partial."""
    found = [
        (precision, config)
        for precision in (('tf32', 'ieee') if x.dtype == torch.float32 else ('tf32',))
        for config in depthwise_weight_gradient.candidates(x.shape, kernel, x.dtype, precision, launch.H100)
    ]
    return found + [(precision, config._replace(block_m=16, tiles=4)) for precision, config in found[:1]]


def run_weight_gradient(x, grad, kernel, config, precision):
    return depthwise_weight_gradient.make_launches(
        x.device, x.shape, kernel, config, precision, x.stride(0), grad.stride(0))(x, grad)


@pytest.mark.parametrize('shape,dtype', by_dtype(DEPTHWISE_SHAPES))
@on_kernels
def test_depthwise_weight_gradient(shape, dtype):
    x, weight, bias, grad, _ = depthwise_inputs(shape, dtype)
    expected = pytorch_gradients(*double(x, weight, bias, grad))[1:]
    own = kernels.depthwise_weight_gradient_ref(x, grad, shape[4])
    with poisoned_memory():
        actual = kernels.depthwise_weight_gradient(x, grad, shape[4])
        again = kernels.depthwise_weight_gradient(x, grad, shape[4])
        assert all(torch.equal(a, b) for a, b in zip(actual, again))
        for result, own_result, reference in zip(actual, own, expected):
            assert result.dtype == torch.float32 and result.shape == reference.shape
            # Products are exact and sums are in fp32 for every dtype.
            assert_as_close_as_pytorch(result, own_result, reference, 1e-6)

        x, grad = with_gaps(x), with_gaps(grad)
        for precision, config in some(weight_gradient_configs(x, shape[4]), shape, dtype):
            results = run_weight_gradient(x, grad, shape[4], config, precision)
            for result, reference in zip(results, expected):
                assert relative_error(result, reference) <= max(2e-6, floor_of(torch.float32, precision))


@pytest.mark.parametrize('tiles', [1, 2, 4])
@on_kernels
def test_depthwise_weight_gradient_of_programs_of_several_tiles(tiles):
    """Several programs of several tiles, the last one partial."""
    x, weight, bias, grad, _ = depthwise_inputs((21, 2, 9, 9, 3), torch.float32)
    expected = pytorch_gradients(*double(x, weight, bias, grad))[1:]
    config = weight_gradient_configs(x, 3)[0][1]._replace(block_m=16, tiles=tiles)
    with poisoned_memory():
        for result, reference in zip(run_weight_gradient(x, grad, 3, config, 'tf32'), expected):
            assert relative_error(result, reference) <= max(2e-6, floor_of(torch.float32, 'tf32'))


@pytest.mark.skipif(DEVICE == 'cpu', reason='needs a GPU')
@pytest.mark.parametrize('dtype', DTYPES, ids=identify)
@pytest.mark.parametrize('shape', [(70, 64, 16, 16, 9), (64, 64, 32, 32, 9), (64, 64, 32, 32, 7)], ids=identify)
@on_kernels
def test_weight_gradients_of_many_images(shape, dtype):
    """What a pipelined loop overwrites too early shows where many tiles follow each other."""
    x, grad = torch.randn(2, *shape[:4], device=DEVICE).to(dtype)
    expected = gradient_by_definition(x, grad, shape[4])
    for precision, config in weight_gradient_configs(x, shape[4]):
        weight_grad, bias_grad = run_weight_gradient(x, grad, shape[4], config, precision)
        floor = floor_of(torch.float32, precision) if dtype == torch.float32 else 1e-5
        assert relative_error(weight_grad, expected) <= floor, config
        assert relative_error(bias_grad, grad.double().sum((0, 2, 3))) <= 1e-5, config


@pytest.mark.parametrize('shape', [(3, 17, 40, 5, 7), (2, 64, 130, 8, 8), (5, 260, 24, 4, 4)], ids=identify)
@pytest.mark.parametrize('dtype', DTYPES, ids=identify)
@on_kernels
def test_pointwise_gradients(shape, dtype):
    batch, channels, out_channels, *size = shape
    x = torch.randn(batch, channels, *size, device=DEVICE).to(dtype)
    grad = torch.randn(batch, out_channels, *size, device=DEVICE).to(dtype)
    expected = kernels.pointwise_weight_gradient_ref(*double(x, grad))
    own = kernels.pointwise_weight_gradient_ref(x, grad)
    actual, again = (kernels.pointwise_weight_gradient(x, grad) for _ in range(2))
    assert all(map(torch.equal, actual, again))
    for result, own_result, reference in zip(actual, own, expected):
        assert result.dtype == torch.float32 and result.shape == reference.shape
        assert_as_close_as_pytorch(result, own_result, reference, 1e-6)
    weight = torch.randn(out_channels, channels, 1, 1, device=DEVICE).to(dtype) / channels ** 0.5
    actual = kernels.pointwise_input_gradient(grad, weight)
    assert actual.dtype == dtype and actual.is_contiguous()
    expected = torch.einsum('bohw,oc->bchw', grad.double(), weight.double()[:, :, 0, 0])
    assert relative_error(actual, expected) <= {torch.float32: 1e-6, torch.float16: 1e-3}.get(dtype, 8e-3)


@pytest.mark.skipif(INTERPRETED, reason='kernels are interpreted')
@pytest.mark.parametrize('channels,size,kernel', [(768, 32, 7), (1024, 16, 9), (768, 32, None)])
def test_products_read_nothing_that_is_loaded_as_well(channels, size, kernel, monkeypatch):
    """Triton 3.6 gives a pipelined tile that products and registers read a buffer too few: a race."""
    monkeypatch.syspath_prepend(str(ROOT / 'benchmarks'))
    from compile_kernels import compile_launch

    shape, cpu = (64, channels, size, size), torch.device('cpu')
    if kernel is None:
        run = pointwise_weight_gradient.make_launch(cpu, shape, channels, torch.bfloat16, launch.H100).sums
    else:
        config = depthwise_weight_gradient.candidates(shape, kernel, torch.bfloat16, 'tf32', launch.H100)[0]
        assert config.num_stages > 1
        run = depthwise_weight_gradient.make_launches(cpu, shape, kernel, config, 'tf32').sums
    text = compile_launch(run, torch.bfloat16, (), 90).asm['ttgir']
    assert 'async_copy_global_to_local' in text and 'isAsync = true' in text
    assert 'local_load' not in text


@pytest.mark.parametrize('splits', [1, 3])
@on_kernels
def test_splits_of_a_pointwise_weight_gradient(splits, monkeypatch):
    """Several steps a split, the last one with fewer."""
    x, grad = torch.randn(2, 5, 24, 8, 10, device=DEVICE).half()
    pointwise_weight_gradient.make_launch.cache_clear()
    monkeypatch.setattr(pointwise_weight_gradient, 'choose_splits', lambda *args: splits)
    try:
        actual = kernels.pointwise_weight_gradient(x, grad)
    finally:
        pointwise_weight_gradient.make_launch.cache_clear()
    for result, reference in zip(actual, kernels.pointwise_weight_gradient_ref(*double(x, grad))):
        assert relative_error(result, reference) <= 1e-6


def gradient_by_definition(x, grad, kernel):
    """Return the weight gradient in float64, tap by tap and without products with the padding."""
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


@pytest.mark.parametrize('shape,dtype', by_dtype([(3, 5, 16, 16, 5), (2, 5, 13, 33, 4), (2, 5, 7, 7, 3)]))
@on_kernels
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
    for precision, config in some(weight_gradient_configs(x, shape[4]), shape, dtype):
        weight_grad, bias_grad = run_weight_gradient(x, grad, shape[4], config, precision)
        assert_same_specials(weight_grad, expected, max(2e-6, floor_of(torch.float32, precision)))
        assert torch.equal(bias_grad.isnan(), grad.double().sum((0, 2, 3)).isnan())
    weight[:, :, 0, 1] = 0.0
    expected = kernels.depthwise_input_gradient_ref(*double(grad, weight, residual))
    assert_same_specials(kernels.depthwise_input_gradient(grad, weight, residual), expected, FLOORS[dtype])


@on_kernels
def test_depthwise_gradients_of_more_than_two_billion_elements():
    x, weight, bias, grad, residual = depthwise_inputs((3, 2, 4, 8, 3), torch.float16)
    far_x, far_grad, far_residual, out = (far_apart(x.shape, torch.float16) for _ in range(4))
    far_x.copy_(x)
    far_grad.copy_(grad)
    far_residual.copy_(residual)
    expected = kernels.depthwise_input_gradient_ref(*double(grad, weight, residual))
    config = depthwise_configs(x, 3, flip=True)[0]
    run_depthwise(far_grad, weight, None, None, None, far_residual, out, config, flip=True)
    assert relative_error(out, expected) <= FLOORS[torch.float16]
    precision, config = weight_gradient_configs(x, 3)[0]
    weight_grad, _ = run_weight_gradient(far_x, far_grad, 3, config, precision)
    assert relative_error(weight_grad, gradient_by_definition(x, grad, 3)) <= 1e-6
    far_grad[2, 0, 0, 0] = float('nan')  # tap by tap
    weight_grad, _ = run_weight_gradient(far_x, far_grad, 3, config, precision)
    assert weight_grad[0].isnan().any()
    assert relative_error(weight_grad[1], gradient_by_definition(x, grad, 3)[1]) <= 1e-6


@pytest.mark.skipif(DEVICE == 'cpu', reason='needs a GPU')
@on_kernels
def test_gradients_in_a_cuda_graph():
    x, weight, bias, grad, _ = depthwise_inputs((4, 64, 32, 32, 9), torch.bfloat16)
    expected = kernels.depthwise_weight_gradient(x, grad, 9)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernels.depthwise_weight_gradient(x, grad, 9)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(out, expected))


def test_a_weight_gradient_that_is_refused_is_pytorchs():
    x, _, _, grad, _ = (t.cpu() for t in depthwise_inputs((2, 3, 6, 7, 5), torch.float32))
    assert kernels.weight_gradient_refusal(x.device, x.dtype, x.shape, 5)
    actual = kernels.depthwise_weight_gradient(x, grad, 5)
    assert all(map(torch.equal, actual, kernels.depthwise_weight_gradient_ref(x, grad, 5)))


def test_configurations_of_the_weight_gradient():
    def candidates(width, kernel, dtype, precision, shared_memory=launch.H100.shared_memory):
        return depthwise_weight_gradient.candidates(
            (64, 768, width, width), kernel, dtype, precision, launch.DeviceLimits(132, shared_memory))

    for width in (1, 4, 7, 14, 16, 28, 32, 33, 64):
        for kernel in range(1, 10):
            for shared_memory in (232448, 101376):
                assert candidates(width, kernel, torch.float16, 'tf32', shared_memory)
                assert candidates(width, kernel, torch.float32, 'tf32', shared_memory)
            # As documented.
            assert bool(candidates(width, kernel, torch.float32, 'ieee')) == (width <= 32 or kernel <= 5)
    # Rows whose taps would share a diagonal are not grouped.
    assert all(config.group_rows == 1 for config in candidates(4, 5, torch.float16, 'tf32'))


@pytest.mark.parametrize('kernel', [1, 2, 5, 8])
def test_references_are_pytorchs_gradients(kernel):
    x, weight, bias, grad, residual = (t.cpu().double() for t in depthwise_inputs((2, 3, 6, 7, kernel), torch.float32))
    grad_x, grad_weight, grad_bias = pytorch_gradients(x, weight, bias, grad)
    torch.testing.assert_close(kernels.depthwise_input_gradient_ref(grad, weight), grad_x)
    torch.testing.assert_close(kernels.depthwise_input_gradient_ref(grad, weight, residual), grad_x + residual)
    torch.testing.assert_close(kernels.depthwise_weight_gradient_ref(x, grad, kernel), (grad_weight, grad_bias))


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('act', ACTS)
def test_references_compose_to_batch_norm(act, training):
    torch.manual_seed(0)
    x, residual = torch.randn(2, 2, 3, 4, 5, dtype=torch.float64)
    weight, bias = torch.randn(2, 3, dtype=torch.float64)
    norm = nn.BatchNorm2d(3, dtype=torch.float64)
    norm.weight.data, norm.bias.data = weight.clone(), bias.clone()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2.0)
    norm.train(training)
    statistics = norm.running_mean.clone(), norm.running_var.clone()
    mean, var = kernels.activation_statistics_ref(x, act) if training else statistics
    invstd = (var + norm.eps).rsqrt()
    scale = weight * invstd
    activation = {'gelu': F.gelu, 'relu': F.relu, 'none': lambda x: x}[act]
    leaf = x.clone().requires_grad_()
    expected = norm(activation(leaf)) + residual
    actual = kernels.activation_affine_ref(x, scale, bias - mean * scale, act, residual)
    assert_close(actual, expected.detach(), 1e-12)
    grad = torch.randn_like(expected)
    gradients = kernels.activation_norm_backward_ref(grad, x, act, scale, mean, invstd, training)
    for ours, reference in zip(gradients, torch.autograd.grad(expected, (leaf, norm.weight, norm.bias), grad)):
        assert_close(ours, reference, 1e-11)
