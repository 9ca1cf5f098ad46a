"""The Triton kernels for training against fp64, run like kernel_grid.py: on the GPU or under Triton's interpreter."""
import itertools

import pytest
import torch

from kernel_grid import (
    ACTS,
    DEVICE,
    DTYPES,
    FLOORS,
    FULL,
    assert_as_close_as_pytorch,
    assert_only_written,
    double,
    identify,
    ieee,  # noqa: F401, a fixture of every test
    poisoned,
    relative_error,
)
from timm_convmixer import kernels
from timm_convmixer.kernels import activation_norm

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
    x = torch.ones((1, 2, 2 ** 16, 2 ** 15 + 8) if tall else (2 ** 12 + 1, 2 ** 9, 32, 32), device=DEVICE, dtype=torch.half)
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
