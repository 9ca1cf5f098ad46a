"""The training segment, which keeps two feature maps per block, against plain PyTorch."""
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from segments import CHANNELS, assert_all_close, buffers, converted, leaves, operands, run
from support import assert_close
from timm_convmixer.kernels.block_segment import block_segment, block_segment_ref
from timm_convmixer.kernels.cpu.memory import MapPool, empty_cache, pool_of
from timm_convmixer.kernels.cpu.segment import CpuSegment


def segment(**kwargs) -> torch.Tensor:
    return block_segment(**kwargs, kernels=CpuSegment())


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


def test_backward_within_autocast_is_the_same():
    args = operands(5, size=(4, CHANNELS, 16, 16))
    gradients = []
    for enabled in (False, True):
        moved = converted(args, torch.bfloat16)
        out = segment(**moved)
        with torch.autocast('cpu', torch.bfloat16, enabled=enabled):
            gradients.append(torch.autograd.grad(out.sum(), leaves(moved)))
    assert all(map(torch.equal, *gradients))


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


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=['nchw', 'nhwc'])
@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_chunks(monkeypatch, dtype, memory_format):
    """Five images, two at a time: the last chunk is smaller."""
    args = converted(operands(size=(5, CHANNELS, 9, 7), drop_path_scale=torch.rand(5, 1, 1, 1, dtype=torch.float64)))
    expected = run(block_segment_ref, converted(args))
    args = converted(args, dtype, memory_format)
    wide = torch.promote_types(dtype, torch.float32)
    monkeypatch.setattr('timm_convmixer.kernels.cpu.segment._CHUNK_BYTES', 2 * CHANNELS * 9 * 7 * wide.itemsize)
    for keep_depthwise in (True, False):
        actual = run(segment, converted(args, dtype), keep_depthwise=keep_depthwise)
        assert_all_close([value.double() for value in actual], expected, 1e-10 if dtype == torch.float64 else 0.05)


def test_a_pool_serves_again_what_is_gone():
    pool = MapPool()
    like = torch.empty(2, 3, 4, 5).to(memory_format=torch.channels_last)
    x = pool.take(like).fill_(1)
    assert (x.shape, x.stride(), x.dtype) == (like.shape, like.stride(), like.dtype)
    address, view = x.data_ptr(), x[1:, 0]
    del x
    other = pool.take(like).fill_(2)
    assert (view == 1).all(), 'memory that a view still reads'
    assert other.data_ptr() != address
    del view
    assert pool.take(like).data_ptr() == address


def test_a_pool_serves_smaller_maps_and_replaces_blocks_that_are_too_small():
    pool = MapPool()
    address = pool.take(torch.empty(8)).data_ptr()
    assert pool.take(torch.empty(3, dtype=torch.float64)).data_ptr() == address
    for size in (16, 32, 64):
        pool.take(torch.empty(size))
    pool.take(torch.empty(1))
    assert [block.numel() for block in (*pool._free, *pool._returned)] == [64 * 4]


def test_pools_belong_to_a_model():
    first, second = torch.nn.Identity(), torch.nn.Identity()
    assert pool_of(first) is pool_of(first) is not pool_of(second)
    kept = weakref.ref(pool_of(first))
    x = pool_of(first).take(torch.zeros(4)).fill_(3)
    del first
    assert kept() is None and (x == 3).all()


def test_empty_cache_leaves_what_is_in_use():
    model = torch.nn.Identity()
    pool = pool_of(model)
    x = pool.take(torch.empty(4)).fill_(3)
    pool.take(torch.empty(4))
    assert pool._returned
    empty_cache()
    assert not pool._free and not pool._returned and (x == 3).all()


def test_threads_never_share_a_map():
    pool, like = MapPool(), torch.empty(64)

    def work(value: int) -> bool:
        right = True
        for _ in range(300):
            maps = [pool.take(like).fill_(value) for _ in range(3)]
            right &= all(bool((x == value).all()) for x in maps)
        return right

    with ThreadPoolExecutor(4) as executor:
        assert all(executor.map(work, range(4)))


def test_graphs_keep_their_maps():
    """Two forward passes before any backward pass, each backward pass twice, all from one pool."""
    kernels = CpuSegment()
    runs = [converted(operands(seed=seed)) for seed in (1, 2)]
    expected = [run(block_segment_ref, converted(args))[1] for args in runs]
    outs = [block_segment(**args, kernels=kernels) for args in runs]
    grad = torch.randn(outs[0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for _ in range(2):
        for args, out, exact in zip(runs, outs, expected):
            assert_close(torch.autograd.grad(out, args['z'], grad, retain_graph=True)[0], exact, 1e-9)


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
