"""The CPU's depthwise gradients against PyTorch's, in float64."""
import pytest
import torch
import torch.nn.functional as F

from support import assert_close
from timm_convmixer.kernels.depthwise_cpu import (
    depthwise_convolution_cpu,
    depthwise_convolution_cpu_support,
    depthwise_weight_gradient_cpu,
    depthwise_weight_gradient_ref,
)


def operands(kernel_size, size=(2, 3, 9, 7), dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(size, generator=generator, dtype=dtype) for _ in range(2))
    weight = torch.randn((size[1], 1, kernel_size, kernel_size), generator=generator, dtype=dtype)
    return x, grad, weight, torch.randn(size[1], generator=generator, dtype=dtype)


SIZES = [(2, 3, 9, 7), (1, 1, 1, 1), (3, 2, 1, 40), (2, 2, 40, 3), (1, 4, 6, 33), (2, 2, 5, 70), (2, 5, 16, 32)]


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=['nchw', 'nhwc'])
@pytest.mark.parametrize('size', SIZES, ids=str)
@pytest.mark.parametrize('kernel_size', range(1, 10))
def test_gradients_equal_pytorchs(kernel_size, size, memory_format):
    x, grad, weight, bias = operands(kernel_size, size)
    x, grad = x.to(memory_format=memory_format), grad.to(memory_format=memory_format)
    results = []
    for convolution in (depthwise_convolution_cpu, lambda *a: F.conv2d(*a, padding='same', groups=size[1])):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
        output = convolution(*leaves)
        results.append([output, *torch.autograd.grad(output, leaves, grad)])
    for actual, expected in zip(*results):
        assert_close(actual, expected, 1e-12)
    assert_close(depthwise_weight_gradient_ref(x, grad, kernel_size), results[1][2], 1e-12)


@pytest.mark.parametrize('side', [16, 32, 96])
def test_float32_is_close_to_float64(side):
    x, grad, _, _ = operands(9, (2, 16, side, side))
    exact = depthwise_weight_gradient_ref(x, grad, 9)
    assert_close(depthwise_weight_gradient_cpu(x.float(), grad.float(), 9), exact.float(), 5e-6)


def per_sample_gradients(model, x):
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(parameters, image):
        return torch.func.functional_call(model, parameters, (image.unsqueeze(0),)).square().sum()

    return torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)


def test_transforms_of_torch_func_and_forward_mode():
    """Per-sample gradients and Jacobian-vector products of a model in eval mode, as with any model of timm's."""
    from timm_convmixer.convmixer import ConvMixer
    torch.manual_seed(0)
    model = ConvMixer(dim=8, depth=2, kernel_size=5, patch_size=2, num_classes=3).eval()
    x = torch.randn(3, 3, 12, 12)
    for name, gradients in per_sample_gradients(model, x).items():
        for image, gradient in zip(x, gradients):
            expected = torch.autograd.grad(model(image.unsqueeze(0)).square().sum(), model.get_parameter(name))[0]
            assert_close(gradient, expected, 1e-4)
    tangent = torch.randn_like(x)
    _, product = torch.func.jvp(model, (x,), (tangent,))
    jacobian = torch.autograd.functional.jacobian(lambda x: model(x).sum(dim=0), x)
    assert_close(product.sum(dim=0), torch.einsum('kbchw,bchw->k', jacobian, tangent), 1e-4)


@pytest.mark.parametrize('kernel_size', [5, 6])
def test_gradcheck_twice(kernel_size):
    x, _, weight, bias = (tensor.requires_grad_() for tensor in operands(kernel_size, (2, 2, 3, 2)))
    assert torch.autograd.gradcheck(depthwise_convolution_cpu, (x, weight, bias))
    assert torch.autograd.gradgradcheck(depthwise_convolution_cpu, (x, weight, bias), fast_mode=True)


def test_only_what_is_needed():
    x, grad, weight, _ = operands(5)
    output = depthwise_convolution_cpu(x, weight.requires_grad_(), None)
    output.backward(grad)
    assert x.grad is None and weight.grad is not None


def test_the_model_trains_with_it():
    """Same gradients as with PyTorch's own backward pass, where a block is left to autograd (here by a hook)."""
    from timm_convmixer.convmixer import ConvMixer
    from timm_convmixer.kernels import set_fused
    torch.manual_seed(0)
    model = ConvMixer(dim=16, depth=2, kernel_size=5, patch_size=2, num_classes=3)
    for block in model.blocks:
        block.register_forward_hook(lambda *_: None)
    x = torch.randn(2, 3, 16, 16)
    gradients = []
    for fused, checkpointing in ((True, False), (True, True), (False, False)):
        set_fused(fused)
        model.set_grad_checkpointing(checkpointing)
        try:
            output = model(x)
            names, nodes = set(), [output.grad_fn]
            while nodes:
                node = nodes.pop()
                names.add(type(node).__name__)
                nodes += [following for following, _ in node.next_functions if following is not None]
            output.square().sum().backward()
        finally:
            set_fused(True)
        assert ('_DepthwiseConvolutionBackward' in names) is fused
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
        model.zero_grad()
    for ours, checkpointed, theirs in zip(*gradients):
        assert torch.equal(ours, checkpointed)
        assert_close(ours, theirs, 1e-4)


def test_support_says_why():
    x, _, weight, bias = operands(5, dtype=torch.float32)
    weight = torch.nn.Parameter(weight)
    assert depthwise_convolution_cpu_support(x, weight, bias) == ''
    assert 'float32' in depthwise_convolution_cpu_support(x.double(), weight, bias)
    assert 'smaller' in depthwise_convolution_cpu_support(x, torch.nn.Parameter(weight[:, :, :3, :3]), bias)
    assert 'empty' in depthwise_convolution_cpu_support(x[:0], weight, bias)
    with torch.no_grad():
        assert 'no gradients' in depthwise_convolution_cpu_support(x, weight, bias)
    with torch.autocast('cpu', torch.bfloat16):
        assert 'autocast' in depthwise_convolution_cpu_support(x, weight, bias)
