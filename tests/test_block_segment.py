"""The training segment, which keeps two feature maps per block, against plain PyTorch."""
import pytest
import torch

from segments import CHANNELS, assert_all_close, buffers, converted, leaves, operands, run
from support import assert_close
from timm_convmixer.kernels.block_segment import block_segment, block_segment_ref
from timm_convmixer.kernels.cpu.passes import CpuPasses
from timm_convmixer.kernels.cpu.workspace import Workspace


def segment(**kwargs) -> torch.Tensor:
    return block_segment(**kwargs, passes=CpuPasses())


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=['nchw', 'nhwc'])
@pytest.mark.parametrize('kernel_size', [1, 3, 4, 7, 8])
@pytest.mark.parametrize('kwargs', [
    dict(),
    dict(act='relu'),
    dict(batch_statistics=False),
    dict(affine=False),
    dict(norm=None),
    dict(depthwise_bias=None, pointwise_bias=None),
    dict(drop_path_scale=torch.tensor([0., 2., 0.5], dtype=torch.float64).view(3, 1, 1, 1)),
    dict(size=(1, CHANNELS, 1, 2)),
], ids=lambda kwargs: '-'.join(kwargs) or 'default')
def test_equals_plain_pytorch(kwargs, kernel_size, memory_format):
    args = converted(operands(kernel_size, **kwargs), memory_format=memory_format)
    expected = run(block_segment_ref, converted(args))
    for keep_depthwise in (True, False):
        assert_all_close(run(segment, converted(args), keep_depthwise=keep_depthwise), expected, 1e-10)


@pytest.mark.parametrize('act', ['gelu', 'relu'])
def test_float32(act):
    args = operands(7, act, size=(4, CHANNELS, 32, 32))
    for actual, exact in zip(run(segment, converted(args, torch.float32)), run(block_segment_ref, args)):
        assert_close(actual, exact.float())


@pytest.mark.parametrize('act', ['gelu', 'relu'])
def test_bfloat16_is_no_further_from_float64_than_pytorchs_own(act):
    args = operands(5, act, size=(4, CHANNELS, 16, 16))
    exact = run(block_segment_ref, args)
    ours, theirs = ([
        sum((value.double() - reference).square().sum() for value, reference in zip(values, exact)) for values in [
            run(function, converted(args, torch.bfloat16))]] for function in (segment, block_segment_ref))
    assert ours[0] <= 1.5 ** 2 * theirs[0]


def test_gradcheck_twice():
    args = operands(3, size=(2, 2, 2, 3))
    names, norms = list(args), ('norm', 'spatial_norm')

    def function(*tensors):
        tensors = iter(tensors)
        values = {name: args[name] if name in norms + ('drop_path_scale',) else next(tensors) for name in names}
        # Every evaluation starts from the same running statistics.
        for name in norms:
            values[name] = converted(dict(norm=args[name]))['norm']._replace(weight=next(tensors), bias=next(tensors))
        return segment(**values)

    inputs = [args[name] for name in names if isinstance(args[name], torch.Tensor)]
    inputs += [tensor for name in norms for tensor in args[name][1:3]]
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def test_only_what_is_needed():
    args = operands()
    for tensor in leaves(args):
        tensor.requires_grad_(False)
    args['pointwise_bias'].requires_grad_()
    out = segment(**args)
    out.sum().backward()
    assert_close(args['pointwise_bias'].grad, torch.full((CHANNELS,), 3 * 9 * 7., dtype=torch.float64))
    assert args['z'].grad is None and args['norm'].weight.grad is None


def test_fixed_statistics_are_those_of_the_forward_pass():
    args = operands(batch_statistics=False)
    expected = torch.autograd.grad(segment(**args).square().sum(), args['z'])[0]
    out = segment(**args)
    for buffer in buffers(args):
        buffer.zero_()
    assert torch.equal(torch.autograd.grad(out.square().sum(), args['z'])[0], expected)


def test_a_changed_weight_is_an_error_as_in_pytorch():
    args = operands()
    out = segment(**args)
    with torch.no_grad():
        args['depthwise_weight'].add_(1)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        out.sum().backward()


def test_workspace_hands_on_what_fits():
    workspace = Workspace()
    x = torch.zeros(1, 2, 3, 4)
    workspace.give(x)
    assert workspace.take(torch.ones(1, 2, 3, 4)) is x
    assert workspace.take(x) is not x
    for other in (x.double(), x.transpose(2, 3), x[:, :1], torch.empty_like(x, memory_format=torch.channels_last)):
        workspace.give(other)
        assert workspace.take(x).data_ptr() != other.data_ptr()
    workspace.give(*[torch.zeros(1)] * 9)
    assert len(workspace._free) == Workspace.SIZE


def test_batched_gradients_go_by_the_reference():
    args = operands(batch_statistics=False)
    out = segment(**args)
    grads = torch.randn(3, *out.shape, dtype=torch.float64)
    batched = torch.autograd.grad(out, leaves(args), grads, is_grads_batched=True, retain_graph=True)
    for index, grad in enumerate(grads):
        for actual, expected in zip(batched, torch.autograd.grad(out, leaves(args), grad, retain_graph=True)):
            assert_close(actual[index], expected, 1e-9)


def test_gradients_have_the_memory_format_of_their_parameters():
    args = converted(operands(), torch.float32)
    out = segment(**{**args, 'z': args['z'].detach().to(memory_format=torch.channels_last)})
    for name in ('depthwise_weight', 'pointwise_weight'):
        assert torch.autograd.grad(out.sum(), args[name], retain_graph=True)[0].is_contiguous()


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_widths_may_differ(dtype):
    """After channel pruning every block may have another width."""
    weight = torch.randn(9, CHANNELS, 1, 1, dtype=torch.float64)
    args = converted(operands(pointwise_weight=weight, pointwise_bias=None))
    expected = run(block_segment_ref, converted(args))
    assert expected[0].shape[1] == 9
    assert_all_close(
        [value.double() for value in run(segment, converted(args, dtype))], expected,
        1e-10 if dtype == torch.float64 else 0.05)
