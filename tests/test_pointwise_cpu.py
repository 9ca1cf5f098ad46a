"""The pointwise convolution with a packed weight against plain PyTorch."""
import pytest
import torch
from timm_convmixer.kernels.pointwise_cpu import (
    pack_pointwise_weight,
    packed_pointwise,
    packed_pointwise_refusal,
    pointwise_ref,
)

from support import assert_close
from timm_convmixer.kernels import pointwise_cpu


def make(*shape: int, dtype: torch.dtype = torch.float32) -> tuple:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(dtype, memory_format=torch.channels_last)
    weight = torch.randn(shape[1], shape[1], 1, 1, generator=generator).to(dtype)
    return x, weight, torch.randn(shape[1], generator=generator).to(dtype)


needs_operators = pytest.mark.skipif(
    packed_pointwise_refusal(*make(1, 8, 2, 2)[:2]) != '', reason='this build of PyTorch has no such operators')


@needs_operators
@pytest.mark.parametrize('act', ['gelu', 'relu', 'none'])
@pytest.mark.parametrize('shape', [(1, 8, 1, 1), (2, 64, 9, 7), (3, 23, 5, 16), (1, 130, 32, 32)], ids=str)
def test_equals_the_reference(shape, act):
    x, weight, bias = make(*shape)
    for given_bias in (bias, None):
        out = packed_pointwise(x, pack_pointwise_weight(weight, shape), given_bias, act)
        assert_close(out, pointwise_ref(x, weight, given_bias, act))
        assert out.is_contiguous(memory_format=torch.channels_last)
        # Packed for another shape it is slow, never wrong.
        other = packed_pointwise(x, pack_pointwise_weight(weight, (5, shape[1], 12, 3)), given_bias, act)
        assert_close(other, out)


@needs_operators
@pytest.mark.parametrize('act', ['gelu', 'relu', 'none'])
def test_bfloat16_is_as_close_as_pytorchs(act):
    x, weight, bias = make(2, 96, 9, 7, dtype=torch.bfloat16)
    if packed_pointwise_refusal(x, weight):
        pytest.skip('no bfloat16 in oneDNN on this machine')
    exact = pointwise_ref(x.double(), weight.double(), bias.double(), act)
    ours = packed_pointwise(x, pack_pointwise_weight(weight, x.shape), bias, act)
    ours, theirs = (
        (out.double() - exact).square().mean().sqrt() for out in (ours, pointwise_ref(x, weight, bias, act)))
    assert 0 < ours <= 1.5 * theirs


def test_what_is_refused():
    x, weight, _ = make(2, 8, 3, 3)
    assert 'dtype' in packed_pointwise_refusal(x.double(), weight.double())
    assert 'dtype' in packed_pointwise_refusal(x, weight.bfloat16())
    assert 'channels last' in packed_pointwise_refusal(x.contiguous(), weight)
    assert 'empty' in packed_pointwise_refusal(x[:0], weight)
    with torch.inference_mode():
        assert 'inference mode' in packed_pointwise_refusal(x, weight.clone())
    with torch.backends.mkldnn.flags(enabled=False):
        assert 'oneDNN' in packed_pointwise_refusal(x, weight)


@pytest.mark.parametrize('operator', [
    lambda *args: (_ for _ in ()).throw(AttributeError('no such operator')),
    lambda *args: (_ for _ in ()).throw(RuntimeError('another signature')),
    lambda x, weight, bias, act: 2 * x,
], ids=['missing', 'changed', 'wrong'])
def test_operators_that_do_not_work_are_not_used(operator, monkeypatch):
    monkeypatch.setattr(pointwise_cpu, 'packed_pointwise', operator)
    pointwise_cpu._works.cache_clear()
    try:
        assert 'do not work' in packed_pointwise_refusal(*make(2, 8, 3, 3)[:2])
    finally:
        pointwise_cpu._works.cache_clear()
