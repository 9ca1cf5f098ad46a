"""The CPU kernels of depthwise gradients against PyTorch's in float64."""
import pytest
import torch
import torch.nn.functional as F

from support import assert_close
from timm_convmixer.kernels.cpu.depthwise import (
    depthwise_input_gradient,
    depthwise_weight_gradient,
    depthwise_weight_gradient_ref,
    weight_gradient_refusal,
)


def operands(kernel_size, size=(2, 3, 9, 7), dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(size, generator=generator, dtype=dtype) for _ in range(2))
    return x, grad, torch.randn((size[1], 1, kernel_size, kernel_size), generator=generator, dtype=dtype)


SIZES = [(2, 3, 9, 7), (1, 1, 1, 1), (3, 2, 1, 40), (2, 2, 40, 3), (1, 4, 6, 33), (2, 2, 5, 70), (2, 5, 16, 32)]


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=['nchw', 'nhwc'])
@pytest.mark.parametrize('size', SIZES, ids=str)
@pytest.mark.parametrize('kernel_size', range(1, 10))
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


@pytest.mark.parametrize('kernel_size', [5, 8])
def test_bfloat16_is_accumulated_in_float32(kernel_size):
    x, grad, _ = (tensor.bfloat16() for tensor in operands(kernel_size, (3, 16, 24, 20)))
    exact = depthwise_weight_gradient_ref(x.double(), grad.double(), kernel_size)
    actual = depthwise_weight_gradient(x, grad, kernel_size)
    assert actual.dtype == torch.float32
    assert_close(actual, exact.float(), 5e-6)


def test_refusals_say_why():
    x, _, weight = operands(5, dtype=torch.float32)
    if torch.backends.cpu.get_cpu_capability() in ('AVX2', 'AVX512'):
        assert weight_gradient_refusal(x, weight) == weight_gradient_refusal(x.bfloat16(), weight) == ''
        assert 'float32' in weight_gradient_refusal(x.double(), weight)
        assert 'smaller' in weight_gradient_refusal(x, weight[:, :, :3, :3])
    with torch.backends.mkldnn.flags(enabled=False):
        assert 'oneDNN' in weight_gradient_refusal(x, weight)
