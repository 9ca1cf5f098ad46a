"""The CPU's one-pass convolution against its reference."""
import pytest
import torch

from support import assert_close
from timm_convmixer.kernels import convolution_act, convolution_act_ref, convolution_act_support, set_fused


def operands(kernel_size=5, depthwise=True, bias=True, dtype=torch.float32, size=(2, 24, 9, 7)):
    generator = torch.Generator().manual_seed(0)
    shape = (24, 1, kernel_size, kernel_size) if depthwise else (40, 24, 1, 1)
    x = torch.randn(size, generator=generator, dtype=dtype)
    weight = torch.randn(shape, generator=generator, dtype=dtype) / 5
    return x, weight, torch.randn(shape[0], generator=generator, dtype=dtype) if bias else None


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=['nchw', 'nhwc'])
@pytest.mark.parametrize('act', ['gelu', 'relu', 'none'])
@pytest.mark.parametrize('kwargs', [
    *(dict(kernel_size=kernel_size) for kernel_size in (1, 2, 3, 7, 8, 9)),
    dict(depthwise=False),
    dict(bias=False),
    dict(size=(1, 24, 1, 1)),
], ids=str)
def test_equals_the_reference(kwargs, act, memory_format):
    x, weight, bias = operands(**kwargs)
    x = x.to(memory_format=memory_format)
    before = x.clone()
    assert convolution_act_support(x, weight, bias) == ''
    y = convolution_act(x, weight, bias, act)
    assert_close(y, convolution_act_ref(x, weight, bias, act))
    assert y.is_contiguous(memory_format=memory_format)
    assert torch.equal(x, before)


@pytest.mark.parametrize('act', ['gelu', 'relu'])
def test_bfloat16_is_as_close_as_pytorchs(act):
    x, weight, bias = operands(dtype=torch.bfloat16)
    exact = convolution_act_ref(x.double(), weight.double(), bias.double(), act)
    ours, theirs = (
        (f(x, weight, bias, act).double() - exact).square().mean().sqrt()
        for f in (convolution_act, convolution_act_ref))
    assert ours <= 1.5 * theirs


def test_what_has_no_one_pass_form_falls_back():
    x, weight, bias = operands()
    expected = convolution_act_ref(x, weight, bias, 'gelu')
    assert 'gradients' in convolution_act_support(x.clone().requires_grad_(), weight, bias)
    with torch.no_grad():
        assert convolution_act_support(x.clone().requires_grad_(), weight, bias) == ''
    assert 'dtype' in convolution_act_support(x.double(), weight.double(), bias.double())
    assert 'differ' in convolution_act_support(x, weight.bfloat16(), bias)
    assert 'empty' in convolution_act_support(x[:0], weight, bias)
    assert convolution_act(x[:0], weight, bias).shape == (0, 24, 9, 7)
    with torch.autocast('cpu', torch.bfloat16):
        assert 'autocast' in convolution_act_support(x, weight, bias)
        assert convolution_act(x, weight, bias).dtype == torch.bfloat16
    set_fused(False)
    try:
        assert 'switched off' in convolution_act_support(x, weight, bias)
        assert torch.equal(convolution_act(x, weight, bias, 'gelu'), expected)
    finally:
        set_fused(True)
    image = x.clone().requires_grad_()
    convolution_act(image, weight, bias).sum().backward()
    assert image.grad.abs().sum() > 0


@pytest.mark.parametrize('value', [float('nan'), float('inf'), float('-inf')])
@pytest.mark.parametrize('act', ['gelu', 'relu', 'none'])
def test_what_is_not_finite_passes(act, value):
    x, weight, bias = operands(kernel_size=3)
    x[0, 3, 4, 4] = value
    actual, expected = convolution_act(x, weight, bias, act), convolution_act_ref(x, weight, bias, act)
    assert torch.equal(actual.isfinite(), expected.isfinite())
    assert not actual[0, 3].isfinite().all() or act == 'relu'
