"""Tests of segments and models on the Triton kernels, on a GPU or under the interpreter (see kernel_grid.py)."""
import copy

import pytest
import torch
import torch.nn as nn

from kernel_grid import DEVICE, ieee  # noqa: F401, a fixture of every test
from segments import assert_all_close, converted, operands, run
from support import fast_paths, lower_thresholds
from timm_convmixer import kernels
from timm_convmixer.convmixer import ConvMixer
from timm_convmixer.kernels.block_segment import block_segment, block_segment_ref
from timm_convmixer.kernels.gpu.segment import GpuSegment


def on_device(args, dtype):
    def move(value):
        if isinstance(value, torch.Tensor):
            return value.detach().to(DEVICE).requires_grad_(value.requires_grad)
        return type(value)(*map(move, value)) if isinstance(value, tuple) else value

    return {key: move(value) for key, value in converted(args, dtype).items()}


@pytest.mark.parametrize('kwargs', [
    dict(),
    dict(kernel_size=4, act='relu'),
    dict(batch_statistics=False),
    dict(affine=False, norm=None),
    dict(drop_path_scale=torch.tensor([0., 2., 0.5], dtype=torch.float64).view(3, 1, 1, 1)),
], ids=lambda kwargs: '-'.join(kwargs) or 'default')
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_segment(kwargs, dtype):
    args = operands(**kwargs)
    exact = [value.float() for value in run(block_segment_ref, converted(args))]
    moved = on_device(args, dtype)
    ours = [value.cpu().float() for value in run(block_segment, moved, kernels=GpuSegment())]
    checkpointed = [value.cpu().float() for value in run(
        block_segment, on_device(args, dtype), kernels=GpuSegment(), keep_depthwise=False)]
    assert all(map(torch.equal, ours, checkpointed))
    assert_all_close(ours, exact, 1e-5 if dtype == torch.float32 else 0.05)


def in_channels_last(tensor):
    return tensor.detach().clone(memory_format=torch.channels_last).requires_grad_()


def with_gaps(tensor):
    """The same values, every second element of a larger tensor."""
    return torch.stack([tensor.detach(), torch.full_like(tensor, 1e3)], dim=-1)[..., 0].requires_grad_()


def with_weight(norm, layout):
    return norm._replace(weight=layout(norm.weight))


@pytest.mark.parametrize('layouts', [
    dict(z=in_channels_last),
    dict(z=with_gaps),
    dict(pointwise_weight=in_channels_last),  # of 1x1 kernels, and so contiguous as well
    dict(depthwise_weight=with_gaps, depthwise_bias=with_gaps, pointwise_weight=with_gaps, pointwise_bias=with_gaps),
    dict(norm=lambda norm: with_weight(norm, with_gaps), spatial_norm=lambda norm: with_weight(norm, with_gaps)),
], ids=lambda layouts: '-'.join(layouts))
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_any_layout(layouts, dtype):
    args = operands()
    exact = [value.float() for value in run(block_segment_ref, converted(args))]
    moved = on_device(args, dtype)
    moved.update((name, layout(moved[name])) for name, layout in layouts.items())
    ours = [value.cpu().float() for value in run(block_segment, moved, kernels=GpuSegment())]
    assert_all_close(ours, exact, 1e-5 if dtype == torch.float32 else 0.05)
    # The next segment reads it as it stands.
    assert block_segment(**moved, kernels=GpuSegment()).is_contiguous()


class ChannelsLast(nn.Module):
    def forward(self, x):
        return x.contiguous(memory_format=torch.channels_last)


class Contiguous(nn.Module):
    def forward(self, x):
        return x.contiguous()


class Slice(nn.Module):
    def forward(self, x):
        return torch.cat([x, x], dim=1)[:, :x.shape[1]]


def replace(layer):
    def change(model):
        model.blocks[1] = layer
    return change


def move_a_block(model):
    model.blocks[0].to(memory_format=torch.channels_last)


def hook_a_block_in_channels_last(model):
    move_a_block(model)
    model.blocks[0].register_forward_hook(lambda *args: None)


def spread_norms(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight = nn.Parameter(with_gaps(module.weight))


def features_and_gradients(model, x):
    out = model.forward_features(x)
    if model.training:
        out.square().sum().backward()
    return [out.detach(), *[parameter.grad for parameter in model.parameters() if parameter.grad is not None]]


@pytest.mark.parametrize('change', [
    lambda model: None,
    move_a_block,
    hook_a_block_in_channels_last,
    spread_norms,
    replace(ChannelsLast()),
    replace(Slice()),
    replace(nn.Upsample(scale_factor=17)),  # to maps that no kernel serves
    replace(Contiguous()),
], ids=['plain', 'moved', 'hooked', 'norms', 'channels-last', 'slice', 'upsample', 'contiguous'])
@pytest.mark.parametrize('training', [True, False], ids=['training', 'inference'])
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=['nchw', 'nhwc'])
def test_model(memory_format, change, training, monkeypatch):
    """Whole models on the routes of a GPU, against their layers."""
    lower_thresholds(monkeypatch)
    for module in ('inference', 'routes', 'training'):
        monkeypatch.setattr(f'timm_convmixer.{module}.is_gpu', lambda device: True)
    kernels.set_gpu_kernels()
    torch.manual_seed(0)
    model = ConvMixer(dim=4, depth=3, kernel_size=3, patch_size=2, num_classes=5)
    change(model)
    model = model.to(DEVICE).train(training).requires_grad_(training)
    plain = copy.deepcopy(model).double()
    x = torch.randn(2, 3, 8, 8, device=DEVICE).to(memory_format=memory_format)
    with torch.set_grad_enabled(training):
        route = model.route(x)
        # Kernels serve no images in channels last, but blocks behind a called one, which may return anything.
        if memory_format == torch.contiguous_format:
            assert route.name == ('training' if training else 'inference')
        ours = features_and_gradients(model, x)
        with fast_paths(False):
            expected = features_and_gradients(plain, x.double())
    assert ours[0].stride() == expected[0].stride()
    assert_all_close([value.double() for value in ours], expected, 1e-5)
