"""The CPU kernels, depthwise gradients, pointwise convolutions and elementwise operations, against float64."""
import pytest
import torch
import torch.nn.functional as F

from support import assert_close, let_onednn_support
from timm_convmixer.kernels.activation import activate, activate_backward, activate_backward_in_place, activate_into
from timm_convmixer.kernels.cpu.depthwise import (
    depthwise_gradients,
    depthwise_input_gradient,
    depthwise_weight_gradient,
    depthwise_weight_gradient_ref,
    weight_gradient_refusal,
)
from timm_convmixer.kernels.cpu.elementwise import (
    affine_into,
    batch_statistics,
    norm_gradient_sums,
    scaled_residual_into,
)
from timm_convmixer.kernels.cpu.pointwise import PointwiseConvolution, PointwiseProducts, make_pointwise


def operands(kernel_size, size=(2, 3, 9, 7), dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(size, generator=generator, dtype=dtype) for _ in range(2))
    return x, grad, torch.randn((size[1], 1, kernel_size, kernel_size), generator=generator, dtype=dtype)


FORMATS = pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=['nchw', 'nhwc'])
SIZES = [(2, 3, 9, 7), (1, 1, 1, 1), (3, 2, 1, 40), (2, 2, 40, 3), (1, 4, 6, 33), (2, 2, 5, 70), (2, 5, 16, 32)]


@FORMATS
@pytest.mark.parametrize('size', SIZES, ids=str)
@pytest.mark.parametrize('kernel_size', range(1, 12))
def test_gradients_equal_pytorchs(kernel_size, size, memory_format):
    x, grad, weight = operands(kernel_size, size)
    x, grad = x.to(memory_format=memory_format), grad.to(memory_format=memory_format)
    leaves = [tensor.clone().requires_grad_() for tensor in (x, weight)]
    expected = torch.autograd.grad(F.conv2d(*leaves, padding='same', groups=size[1]), leaves, grad)
    assert_close(depthwise_input_gradient(grad, weight), expected[0], 1e-12)
    assert_close(depthwise_weight_gradient(x, grad, kernel_size), expected[1], 1e-12)
    assert_close(depthwise_weight_gradient_ref(x, grad, kernel_size), expected[1], 1e-12)


@pytest.mark.parametrize('side', [16, 32, 96])
def test_float32_is_close_to_float64(side):
    x, grad, _ = operands(9, (2, 16, side, side))
    exact = depthwise_weight_gradient_ref(x, grad, 9)
    assert_close(depthwise_weight_gradient(x.float(), grad.float(), 9), exact.float(), 5e-6)


@pytest.mark.parametrize('kernel_size', [1, 3, 4, 5, 8])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_the_fastest_gradients_are_right(dtype, kernel_size):
    x, grad, weight = operands(kernel_size)
    leaves = [tensor.clone().requires_grad_() for tensor in (x, weight)]
    expected = torch.autograd.grad(F.conv2d(*leaves, padding='same', groups=len(weight)), leaves, grad)
    actual = depthwise_gradients(grad.to(dtype), x.to(dtype), weight.to(dtype))
    for ours, exact in zip(actual, expected, strict=True):
        assert_close(ours, exact.to(dtype), 5e-6 if dtype == torch.float32 else 1e-12)


def test_weight_gradient_in_several_chunks(monkeypatch):
    x, grad, weight = operands(4, (5, 3, 9, 7))
    monkeypatch.setattr('timm_convmixer.kernels.cpu.depthwise._WEIGHT_GRADIENT_BYTES', 2 * 3 * 9 * 7 * 8)
    assert_close(depthwise_weight_gradient(x, grad, 4), depthwise_weight_gradient_ref(x, grad, 4), 1e-12)


def test_refusals_say_why():
    x, _, weight = operands(5, dtype=torch.float32)
    if torch.backends.cpu.get_cpu_capability() in ('AVX2', 'AVX512'):
        assert weight_gradient_refusal(x, weight) == ''
        assert 'float32' in weight_gradient_refusal(x.double(), weight)
        assert 'smaller' in weight_gradient_refusal(x, weight[:, :, :3, :3])
    with torch.backends.mkldnn.flags(enabled=False):
        assert 'oneDNN' in weight_gradient_refusal(x, weight)


# Of the feature map, and of what there is for each channel.
DTYPES = pytest.mark.parametrize('dtype, wide, tolerance', [
    (torch.float64, torch.float64, 1e-12),
    (torch.float32, torch.float32, 1e-5),
    (torch.bfloat16, torch.float32, 1e-2),
], ids=['float64', 'float32', 'bfloat16'])


def feature_maps(count, dtype, memory_format):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(3, 20, 7, 5, generator=generator, dtype=torch.float64).to(dtype, memory_format=memory_format)
        for _ in range(count)
    ]


def channel_values(count, dtype):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(20, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]


@FORMATS
@DTYPES
@pytest.mark.parametrize('in_place', [True, False])
def test_affine_into(in_place, dtype, wide, tolerance, memory_format):
    (x,), (scale, shift) = feature_maps(1, dtype, memory_format), channel_values(2, wide)
    expected = x.double() * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)
    out = x if in_place else torch.full_like(x, torch.nan)
    assert affine_into(out, x, scale, shift) is out
    assert_close(out.double(), expected, tolerance)


@FORMATS
@DTYPES
@pytest.mark.parametrize('shifted', [True, False])
def test_scaled_residual_into(shifted, dtype, wide, tolerance, memory_format):
    (x, branch), (scale, shift) = feature_maps(2, dtype, memory_format), channel_values(2, wide)
    expected = x.double() + branch.double() * scale.view(-1, 1, 1) + (shift.view(-1, 1, 1) if shifted else 0)
    assert scaled_residual_into(branch, x, scale, shift if shifted else None) is branch
    assert_close(branch.double(), expected, tolerance)


@FORMATS
@pytest.mark.parametrize('offset', [0, 1000])
@pytest.mark.parametrize(
    'dtype, tolerance', [(torch.float32, 1e-5), (torch.float64, 1e-12), (torch.bfloat16, 1e-5)])
def test_batch_statistics(dtype, tolerance, offset, memory_format):
    x, scratch = feature_maps(2, dtype, memory_format)
    x += offset
    mean, var = batch_statistics(x, scratch)
    assert mean.dtype == var.dtype == torch.promote_types(dtype, torch.float32)
    expected_var, expected_mean = torch.var_mean(x.double(), dim=(0, 2, 3), correction=0)
    assert_close(mean.double(), expected_mean, tolerance)
    assert_close(var.double(), expected_var, tolerance)


@FORMATS
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
def test_norm_gradient_sums(dtype, memory_format):
    grad, x = feature_maps(2, dtype, memory_format)
    wide = torch.promote_types(dtype, torch.float32)
    mean, = channel_values(1, wide)
    sums, products = norm_gradient_sums(grad, x, mean)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert sums.dtype == products.dtype == wide
    assert_close(sums.double(), grad.double().sum((0, 2, 3)), tolerance)
    assert_close(products.double(), (grad.double() * (x.double() - mean.view(-1, 1, 1))).sum((0, 2, 3)), tolerance)


@FORMATS
@DTYPES
@pytest.mark.parametrize('act', ['gelu', 'relu', 'none'])
def test_activations_into_given_memory(act, dtype, wide, tolerance, memory_format):
    x, grad = feature_maps(2, dtype, memory_format)
    expected = activate(x.double(), act)
    out = torch.full_like(x, torch.nan)
    assert activate_into(out, x, act) is out
    assert_close(out.double(), expected, tolerance)
    expected = activate_backward(grad.double(), x.double(), act)
    assert activate_backward_in_place(grad, x, act) is grad
    assert_close(grad.double(), expected, tolerance)
    in_place = x.clone()
    assert_close(activate_into(in_place, in_place, act), out, 0)


@FORMATS
@DTYPES
@pytest.mark.parametrize('channels, out_channels', [(20, 20), (8, 1), (1, 8)])
@pytest.mark.parametrize('cls', [PointwiseConvolution, PointwiseProducts])
def test_pointwise_in_chunks(cls, channels, out_channels, dtype, wide, tolerance, memory_format):
    generator = torch.Generator().manual_seed(0)

    def randn(*size, to):
        return torch.randn(size, generator=generator, dtype=torch.float64).to(to)

    x = randn(3, channels, 7, 5, to=dtype).to(memory_format=memory_format)
    weight, bias = randn(out_channels, channels, 1, 1, to=wide), randn(out_channels, to=wide)
    grad = randn(3, out_channels, 7, 5, to=dtype).to(memory_format=memory_format)
    leaves = [tensor.double().clone().requires_grad_() for tensor in (x, weight, bias)]
    expected = F.conv2d(*leaves)
    x_grad, weight_grad, bias_grad = torch.autograd.grad(expected, leaves, grad.double())

    for given_bias, needs_weight_grad in ((bias, True), (None, False)):
        pointwise = cls(x, weight, given_bias, needs_weight_grad)
        out = torch.empty_like(pointwise.like_output(x), device='cpu').fill_(torch.nan)
        actual_grad = torch.full_like(x, torch.nan)
        for x_chunk, grad_chunk, out_chunk, x_grad_chunk in zip(
                x.split(2), grad.split(2), out.split(2), actual_grad.split(2), strict=True):
            # The arithmetic between the convolutions may be in a wider dtype than the feature maps.
            pointwise.forward(x_chunk.to(wide), out_chunk)
            pointwise.backward(grad_chunk, x_chunk.to(wide), x_grad_chunk)
        shift = 0 if given_bias is not None else bias.double().view(-1, 1, 1)
        assert_close(out.double() + shift, expected.detach(), tolerance)
        assert_close(actual_grad.double(), x_grad, tolerance)
        assert_close(pointwise.bias_grad.double(), bias_grad, tolerance)
        if needs_weight_grad:
            assert_close(pointwise.weight_grad.double(), weight_grad, tolerance)
        else:
            assert pointwise.weight_grad is None


@FORMATS
def test_pointwise_by_dtype(memory_format, monkeypatch):
    let_onednn_support(monkeypatch, torch.bfloat16)
    weight = torch.ones(20, 20, 1, 1)
    for dtype, cls in (
            (torch.float32, PointwiseConvolution), (torch.float64, PointwiseConvolution),
            (torch.float16, PointwiseConvolution), (torch.bfloat16, PointwiseProducts)):
        (x,) = feature_maps(1, dtype, memory_format)
        assert type(make_pointwise(x, weight, None)) is cls
        assert make_pointwise(x, weight, None).like_output(x).stride() == x.stride()
