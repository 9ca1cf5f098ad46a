"""The depthwise convolution's operators on a CPU without kernels: derivatives, registration, the fallback."""
import pytest
import torch
import torch.nn.functional as F

from support import assert_close
from test_kernels import TRACE, run_python
from timm_convmixer import kernels
from timm_convmixer.kernels import depthwise_training, support


def operands(kernel, dtype=torch.float64, memory_format=torch.contiguous_format):
    """x, weight, bias, the gradient of the output, a residual."""
    torch.manual_seed(0)
    x, grad, residual = (torch.randn(2, 3, 4, 5, dtype=dtype).to(memory_format=memory_format) for _ in range(3))
    return x, torch.randn(3, 1, kernel, kernel, dtype=dtype), torch.randn(3, dtype=dtype), grad, residual


def calls_of(kernel, dtype=torch.float64):
    """Each operator with its arguments."""
    x, weight, bias, grad, residual = operands(kernel, dtype)
    operators = torch.ops.timm_convmixer
    return (
        (operators.depthwise_convolution.default, (x, weight, bias)),
        (operators.depthwise_convolution.default, (x, weight, None)),
        (operators.depthwise_input_gradient.default, (grad, weight, residual)),
        (operators.depthwise_weight_gradient.default, (x, grad, kernel)),
    )


@pytest.mark.parametrize('kernel', [3, 4])
def test_gradcheck_of_the_operators_twice(kernel):
    for operator, arguments in calls_of(kernel):
        arguments = [t.requires_grad_() if isinstance(t, torch.Tensor) else t for t in arguments]
        assert torch.autograd.gradcheck(operator, arguments)
        assert torch.autograd.gradgradcheck(operator, arguments)


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=['nchw', 'nhwc'])
@pytest.mark.parametrize('kernel', [1, 2, 5, 8])
def test_gradients_are_pytorchs(kernel, memory_format):
    x, weight, bias, grad, residual = operands(kernel, memory_format=memory_format)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    out = F.conv2d(*leaves, padding='same', groups=3)
    grad_x, grad_weight, grad_bias = torch.autograd.grad(out, leaves, grad)
    assert torch.equal(kernels.depthwise_convolution(x, weight, bias), out)
    assert_close(kernels.depthwise_input_gradient(grad, weight), grad_x, 1e-12)
    assert_close(kernels.depthwise_input_gradient(grad, weight, residual), grad_x + residual, 1e-12)
    for actual, expected in zip(kernels.depthwise_weight_gradient(x, grad, kernel), (grad_weight, grad_bias)):
        assert actual.dtype == torch.float64
        assert_close(actual, expected, 1e-12)


@pytest.mark.parametrize('half', [torch.float16, torch.bfloat16])
def test_gradients_of_half_are_summed_in_float32(half):
    x, weight, bias, grad, residual = operands(5, half)
    assert kernels.depthwise_input_gradient(grad, weight, residual).dtype == half
    for actual in kernels.depthwise_weight_gradient(x, grad, 5):
        assert actual.dtype == torch.float32


@pytest.mark.parametrize('requires_grad', [False, True])
def test_opcheck_on_the_cpu(requires_grad):
    for operator, arguments in calls_of(4, torch.float32):
        arguments = [t.requires_grad_(requires_grad) if isinstance(t, torch.Tensor) else t for t in arguments]
        torch.library.opcheck(operator, arguments)


def test_training_compiles_where_no_kernel_runs():
    x, weight, bias, _, _ = operands(5, torch.float32)

    def step(function):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        function(*leaves).square().mean().backward()
        return [t.grad for t in leaves]

    compiled = torch.compile(kernels.depthwise_convolution, fullgraph=True, backend='aot_eager')
    for actual, expected in zip(step(compiled), step(kernels.depthwise_convolution_ref)):
        assert_close(actual, expected)


def test_autocast_on_the_cpu_is_that_of_conv2d():
    x, weight, bias, _, _ = operands(5, torch.float32)
    with torch.autocast('cpu', torch.bfloat16):
        assert kernels.depthwise_convolution(x, weight, bias).dtype == torch.bfloat16


def test_support_says_why():
    x, weight, bias, _, _ = operands(5, torch.float32)
    answer = kernels.depthwise_convolution_support(x, weight, bias)
    assert not answer and '(2, 3, 4, 5)' in answer.reason and 'cpu' in answer.reason


# As in test_kernels.py. A backward pass on CUDA tensors without data needs a device: its operators are called instead.
TRACE_TRAINING = TRACE[:TRACE.index('class Block')] + '''
class Step(torch.nn.Module):
    def forward(self, x, w, b, grad):
        return (
            kernels.depthwise_convolution(x, w, b),
            kernels.depthwise_input_gradient(grad, w, x),
            *kernels.depthwise_weight_gradient(x, grad, 9),
        )

with FakeTensorMode():
    new = lambda *shape: torch.empty(shape, device='cuda', dtype=torch.bfloat16)
    maps = new(48, 64, 32, 32), new(48, 64, 32, 32)
    graph, _ = aot_export_module(Step(), (maps[0], new(64, 1, 9, 9), new(64), maps[1]), trace_joint=False)
calls = [node for node in graph.graph.nodes if 'triton_kernel_wrapper' in str(node.target)]
print([sorted(node.kwargs['tensors_to_clone']) for node in calls])
'''


@pytest.mark.skipif(not support.TRITON_PRESENT or not hasattr(torch.library, 'triton_op'), reason='no triton_op')
def test_torch_compile_sees_what_the_kernels_of_a_training_step_write():
    result = run_python('-c', TRACE_TRAINING, TRITON_INTERPRET='0')
    expected = "[['out_ptr'], ['out_ptr'], ['partial_ptr'], ['bias_grad_ptr', 'weight_grad_ptr']]"
    assert result.stdout.strip().endswith(expected), result.stdout + result.stderr[-5000:]


def test_configurations_of_the_weight_gradient():
    def candidates(width, kernel, itemsize, precision, shared_memory=232448):
        return depthwise_training.weight_gradient_candidates(
            64, 768, width, width, kernel, itemsize, precision, 132, shared_memory)

    for width in (1, 4, 7, 14, 16, 28, 32, 33, 64):
        for kernel in range(1, 10):
            for shared_memory in (232448, 101376):
                assert candidates(width, kernel, 2, 'tf32', shared_memory)
                assert candidates(width, kernel, 4, 'tf32', shared_memory)
            # As the docstring says.
            assert bool(candidates(width, kernel, 4, 'ieee')) == (width <= 32 or kernel <= 5)
    # Rows of a group whose taps would fall on one diagonal are kept apart.
    assert all(config.group == 1 for config in candidates(4, 5, 2, 'tf32'))
