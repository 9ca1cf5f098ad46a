"""What surrounds the convolutions in training, in plain PyTorch: its functions are each other's derivatives."""
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from support import assert_close
from timm_convmixer import kernels

ACTIVATIONS = {'gelu': F.gelu, 'relu': F.relu, 'none': lambda x: x}


class ActivationNorm(torch.autograd.Function):
    """BatchNorm of the activation, and the residual, with nothing kept but x and two statistics."""

    @staticmethod
    def forward(ctx, x, weight, bias, residual, act, eps, fixed):
        mean, var = fixed if fixed is not None else kernels.activation_statistics(x, act)
        invstd = (var + eps).rsqrt()
        ctx.save_for_backward(x, weight, mean, invstd)
        ctx.act, ctx.batch_statistics = act, fixed is None
        scale = weight * invstd
        return kernels.activation_affine(x, scale, bias - mean * scale, act, residual)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight, mean, invstd = ctx.saved_tensors
        gradients = kernels.activation_norm_backward(grad, x, ctx.act, weight, mean, invstd, ctx.batch_statistics)
        return (*gradients, grad, None, None, None)


def operands(dtype=torch.float64, memory_format=torch.contiguous_format):
    torch.manual_seed(0)
    x, residual = (torch.randn(2, 3, 4, 5, dtype=dtype).to(memory_format=memory_format) for _ in range(2))
    weight, bias = torch.randn(2, 3, dtype=dtype)
    return x, weight, bias, residual


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=['nchw', 'nhwc'])
@pytest.mark.parametrize('act', list(ACTIVATIONS))
def test_composition_is_batch_norm(act, memory_format, training):
    x, weight, bias, residual = operands(memory_format=memory_format)
    norm = nn.BatchNorm2d(3, dtype=torch.float64)
    norm.weight.data, norm.bias.data = weight.clone(), bias.clone()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2.0)
    norm.train(training)
    fixed = None if training else (norm.running_mean.clone(), norm.running_var.clone())
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias, residual)]
    theirs = [leaves[0].detach().clone().requires_grad_(), norm.weight, norm.bias]
    expected = norm(ACTIVATIONS[act](theirs[0])) + residual
    actual = ActivationNorm.apply(*leaves, act, norm.eps, fixed)
    assert actual.is_contiguous(memory_format=memory_format)
    assert_close(actual, expected, 1e-12)
    grad = torch.randn_like(expected)
    for ours, reference in zip(
            torch.autograd.grad(actual, leaves[:3], grad), torch.autograd.grad(expected, theirs, grad)):
        assert_close(ours, reference, 1e-11)


@pytest.mark.parametrize('fixed', [False, True])
@pytest.mark.parametrize('act', ['gelu', 'none'])
def test_gradcheck_of_the_composition(act, fixed):
    leaves = [t.requires_grad_() for t in operands()]
    statistics = kernels.activation_statistics(torch.randn(2, 3, 4, 5, dtype=torch.float64), act) if fixed else None
    assert torch.autograd.gradcheck(lambda *args: ActivationNorm.apply(*args, act, 1e-5, statistics), leaves)


@pytest.mark.parametrize('half', [torch.float16, torch.bfloat16])
def test_half_is_computed_in_float32(half):
    x, weight, bias, residual = (t.float() for t in operands())
    x, residual = x.to(half), residual.to(half)
    mean, var = kernels.activation_statistics(x, 'gelu')
    assert mean.dtype == var.dtype == torch.float32
    assert_close(mean, F.gelu(x.float()).mean((0, 2, 3)))
    out = kernels.activation_affine(x, weight, bias, 'gelu', residual)
    assert torch.equal(out, kernels.activation_affine(x.float(), weight, bias, 'gelu', residual.float()).to(half))
    grad_x, grad_weight, grad_bias = kernels.activation_norm_backward(
        residual, x, 'gelu', None, mean, (var + 1e-5).rsqrt(), True)
    assert (grad_x.dtype, grad_weight.dtype, grad_bias.dtype) == (half, torch.float32, torch.float32)


def test_support_says_why():
    x = operands(torch.float32)[0]
    answer = kernels.activation_norm_support(x)
    assert not answer and '(2, 3, 4, 5)' in answer.reason and 'cpu' in answer.reason


@pytest.mark.parametrize('call,message', [
    (lambda x, w, b, r: kernels.activation_statistics(x, 'swish'), r"act must be one of .* got 'swish'"),
    (lambda x, w, b, r: kernels.activation_affine(x, w[:2], b, 'gelu'), r'scale must have shape \(3,\).*got \(2,\)'),
    (lambda x, w, b, r: kernels.activation_affine(x, w, b.view(3, 1), 'gelu'), r'shift must have shape \(3,\)'),
    (lambda x, w, b, r: kernels.activation_affine(x, w, b, 'gelu', r[:1]), r'residual must have the shape of x'),
    (lambda x, w, b, r: kernels.activation_norm_backward(r[:1], x, 'gelu', w, b, b, True), r'grad must have the shape'),
    (lambda x, w, b, r: kernels.activation_norm_backward(r, x, 'gelu', w, b, b[:1], True), r'invstd must have shape'),
])
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(*operands())
