"""The training form of a block, which keeps two maps, against plain PyTorch, and in a model."""
import copy
import itertools

import pytest
import torch
import torch.nn as nn

from support import assert_close
from timm_convmixer.convmixer import ConvMixer
from timm_convmixer.kernels import set_fused
from timm_convmixer.kernels.block_training import (
    BatchNormalization,
    Workspace,
    block_segment,
    block_segment_ref,
    block_segment_support,
)

CHANNELS = 6


def operands(kernel_size=5, act='gelu', batch_statistics=True, affine=True, size=(3, CHANNELS, 9, 7), seed=0, **kwargs):
    """Arguments of a segment, and those of them that have gradients."""
    generator = torch.Generator().manual_seed(seed)
    channels = size[1]

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    def norm():
        weight, bias = (random(channels), random(channels)) if affine else (None, None)
        running = random(channels).detach(), random(channels).detach().exp()
        return BatchNormalization(act, weight, bias, *running, batch_statistics, momentum=0.1, eps=1e-3)

    args = dict(
        z=random(*size),
        norm=norm(),
        depthwise_weight=random(channels, 1, kernel_size, kernel_size),
        depthwise_bias=random(channels),
        spatial_norm=norm(),
        drop_path_scale=None,
        pointwise_weight=random(channels, channels, 1, 1),
        pointwise_bias=random(channels),
    )
    return {**args, **kwargs}


def leaves(args):
    tensors = [value for value in args.values() if isinstance(value, torch.Tensor)]
    tensors += [tensor for value in args.values() if isinstance(value, BatchNormalization) for tensor in value[1:3]]
    return [tensor for tensor in tensors if tensor is not None and tensor.requires_grad]


def buffers(args):
    return [tensor for norm in (args['norm'], args['spatial_norm']) if norm is not None for tensor in norm[3:5]]


def converted(args, dtype=None, memory_format=torch.preserve_format):
    """A copy of the arguments, maps and weights in a dtype, normalisations at least in float32."""
    def convert(value, dtype):
        if isinstance(value, BatchNormalization):
            wide = torch.promote_types(dtype, torch.float32)
            return BatchNormalization(*[convert(item, wide) for item in value])
        if not isinstance(value, torch.Tensor):
            return value
        memory = memory_format if value.dim() == 4 else torch.preserve_format
        return value.detach().to(dtype, copy=True, memory_format=memory).requires_grad_(value.requires_grad)

    return {key: convert(value, dtype or torch.float64) for key, value in args.items()}


def run(function, args, **kwargs):
    """Output, gradients, running statistics."""
    out = function(**args, **kwargs)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves(args), grad), *buffers(args)]


def assert_all_close(actual, expected, tolerance):
    """All gradients on one scale: the bias before a normalisation has a gradient of nothing but rounding errors."""
    scale = max(tensor.abs().max() for tensor in expected)
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.shape == theirs.shape and torch.isfinite(ours).all()
        assert (ours - theirs).abs().max() <= tolerance * scale


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=['nchw', 'nhwc'])
@pytest.mark.parametrize('kernel_size', [1, 3, 4, 7, 8])
@pytest.mark.parametrize('kwargs', [
    dict(),
    dict(act='relu'),
    dict(act='none'),
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
        assert_all_close(run(block_segment, converted(args), keep_depthwise=keep_depthwise), expected, 1e-10)


@pytest.mark.parametrize('act', ['gelu', 'relu'])
def test_float32(act):
    args = operands(7, act, size=(4, CHANNELS, 32, 32))
    for actual, exact in zip(run(block_segment, converted(args, torch.float32)), run(block_segment_ref, args)):
        assert_close(actual, exact.float())


@pytest.mark.parametrize('act', ['gelu', 'relu'])
def test_bfloat16_is_no_further_from_float64_than_pytorchs_own(act):
    args = operands(5, act, size=(4, CHANNELS, 16, 16))
    exact = run(block_segment_ref, args)
    ours, theirs = ([
        sum((value.double() - reference).square().sum() for value, reference in zip(values, exact)) for values in [
            run(function, converted(args, torch.bfloat16))]] for function in (block_segment, block_segment_ref))
    assert ours[0] <= 1.5 ** 2 * theirs[0]


def test_gradcheck_twice():
    args = operands(3, size=(2, 2, 2, 3))
    names, norms = list(args), ('norm', 'spatial_norm')

    def function(*tensors):
        tensors = iter(tensors)
        values = {name: args[name] if name in norms + ('drop_path_scale',) else next(tensors) for name in names}
        # Each evaluation must start from the same running statistics.
        for name in norms:
            values[name] = converted(dict(norm=args[name]))['norm']._replace(weight=next(tensors), bias=next(tensors))
        return block_segment(**values)

    inputs = [args[name] for name in names if isinstance(args[name], torch.Tensor)]
    inputs += [tensor for name in norms for tensor in args[name][1:3]]
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def test_only_what_is_needed():
    args = operands()
    for tensor in leaves(args):
        tensor.requires_grad_(False)
    args['pointwise_bias'].requires_grad_()
    out = block_segment(**args)
    out.sum().backward()
    assert_close(args['pointwise_bias'].grad, torch.full((CHANNELS,), 3 * 9 * 7., dtype=torch.float64))
    assert args['z'].grad is None and args['norm'].weight.grad is None


def test_fixed_statistics_are_those_of_the_forward_pass():
    args = operands(batch_statistics=False)
    expected = torch.autograd.grad(block_segment(**args).square().sum(), args['z'])[0]
    out = block_segment(**args)
    for buffer in buffers(args):
        buffer.zero_()
    assert torch.equal(torch.autograd.grad(out.square().sum(), args['z'])[0], expected)


def test_a_changed_weight_is_an_error_as_in_pytorch():
    args = operands()
    out = block_segment(**args)
    with torch.no_grad():
        args['depthwise_weight'].add_(1)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        out.sum().backward()


def test_support_says_why():
    z = torch.randn(2, 3, 4, 4)
    assert block_segment_support(z) == ''
    assert 'one value per channel' in block_segment_support(z[:1, :, :1, :1])
    assert 'float16' in block_segment_support(z.half())
    with torch.no_grad():
        assert 'no gradients' in block_segment_support(z)
    with torch.autocast('cpu', torch.bfloat16):
        assert 'autocast' in block_segment_support(z)
        assert block_segment_support(z.bfloat16()) == ''
    set_fused(False)
    try:
        assert 'TIMM_CONVMIXER_FUSED' in block_segment_support(z)
    finally:
        set_fused(True)


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


# In a model


def tiny(**kwargs) -> ConvMixer:
    torch.manual_seed(0)
    return ConvMixer(**{**dict(dim=16, depth=3, kernel_size=5, patch_size=2, num_classes=5), **kwargs})


def kept_maps(model, x) -> int:
    """Maps of the size of a block's that autograd keeps from a forward pass."""
    kept = {}

    def pack(tensor):
        if tensor.dim() == 4 and tensor.shape[0] == len(x):
            kept[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(x)
    assert output.requires_grad
    return sum(tensor.shape[1] == model.num_features for tensor in kept.values())


def test_keeps_two_maps_a_block_and_one_with_checkpointing():
    x = torch.randn(2, 3, 24, 24)
    counts = {}
    for checkpointing, fused in itertools.product((False, True), repeat=2):
        set_fused(fused)
        try:
            models = [tiny(depth=depth) for depth in (3, 4)]
            for model in models:
                model.set_grad_checkpointing(checkpointing)
            first, second = (kept_maps(model, x) for model in models)
        finally:
            set_fused(True)
        counts[checkpointing, fused] = second - first
    assert counts == {(False, True): 2, (True, True): 1, (False, False): 6, (True, False): 1}


def gradients(model, x, **kwargs):
    model.zero_grad()
    model(x).square().sum().backward(**kwargs)
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize('kwargs', [
    dict(),
    dict(act_layer='relu', kernel_size=4),
    dict(drop_path_rate=0.5, drop_rate=0.2),
    dict(bn_momentum=0.01, bn_eps=0.1),
], ids=lambda kwargs: '-'.join(kwargs) or 'default')
@pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
def test_a_model_trains_as_without(training, kwargs):
    fused = tiny(**kwargs).double().train(training)
    plain = copy.deepcopy(fused)
    x = torch.randn(4, 3, 24, 24, dtype=torch.float64)
    torch.manual_seed(1)
    actual = gradients(fused, x)
    set_fused(False)
    try:
        torch.manual_seed(1)
        expected = gradients(plain, x)
    finally:
        set_fused(True)
    assert_all_close(actual, expected, 1e-9)
    for ours, theirs in zip(fused.buffers(), plain.buffers()):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_twice_through_the_same_graph_and_in_two_threads():
    from concurrent.futures import ThreadPoolExecutor

    model, x = tiny().eval(), torch.randn(2, 3, 24, 24)
    loss = model(x).square().sum()
    parameters = list(model.parameters())
    expected = torch.autograd.grad(loss, parameters, retain_graph=True)
    with ThreadPoolExecutor(4) as pool:
        results = pool.map(lambda _: torch.autograd.grad(loss, parameters, retain_graph=True), range(8))
    for result in results:
        assert all(map(torch.equal, result, expected))


def test_gradient_penalty():
    """Double backward of a whole model, as a gradient penalty needs it."""
    model, x = tiny(depth=2).double(), torch.randn(2, 3, 16, 16, dtype=torch.float64, requires_grad=True)

    def penalty():
        grad, = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), list(model.parameters()), allow_unused=True)

    actual = penalty()
    set_fused(False)
    try:
        expected = penalty()
    finally:
        set_fused(True)
    assert [gradient is None for gradient in actual] == [gradient is None for gradient in expected]
    actual, expected = ([gradient for gradient in result if gradient is not None] for result in (actual, expected))
    assert_all_close(actual, expected, 1e-9)


def test_a_patched_forward_and_hooks_of_any_layer_are_called():
    model, x = tiny(), torch.randn(2, 3, 16, 16)
    calls = []
    patched = model.blocks[0][1]
    original = patched.forward
    patched.forward = lambda y: calls.append('patched') or original(y)
    for name in ('stem', 'blocks', 'blocks.1.0', 'blocks.1.0.fn.1', 'blocks.2.2', 'blocks.2.3'):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.append(name))
    model(x)
    assert calls == ['stem', 'patched', 'blocks.1.0.fn.1', 'blocks.1.0', 'blocks.2.2', 'blocks.2.3', 'blocks']


def test_one_value_per_channel_is_pytorchs_error():
    with pytest.raises(ValueError, match='more than 1 value per channel'):
        tiny()(torch.randn(1, 3, 2, 2))


@pytest.mark.parametrize('convert', ['sync', 'split', 'frozen'])
def test_other_normalisations_are_left_to_themselves(convert):
    from timm.layers import convert_splitbn_model, freeze_batch_norm_2d

    model = tiny()
    model = dict(
        sync=nn.SyncBatchNorm.convert_sync_batchnorm,
        split=lambda model: convert_splitbn_model(model, 2),
        frozen=freeze_batch_norm_2d,
    )[convert](model)
    if convert == 'sync':
        # PyTorch's trains on GPUs alone.
        model.eval()
    assert kept_maps(model, torch.randn(4, 3, 16, 16)) > 9


def test_timms_model_gives_the_same_gradients():
    from timm.models.convmixer import ConvMixer as TimmConvMixer

    torch.manual_seed(0)
    theirs = TimmConvMixer(16, 3, kernel_size=5, patch_size=2, num_classes=5)
    ours = tiny()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(4, 3, 24, 24)
    for actual, expected in zip(gradients(ours, x), gradients(theirs, x)):
        assert_close(actual, expected, 1e-4)
