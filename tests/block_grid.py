"""Tests of a training segment on the Triton kernels, on a GPU or under the interpreter (see kernel_grid.py)."""
import pytest
import torch

from kernel_grid import DEVICE, ieee  # noqa: F401, a fixture of every test
from segments import assert_all_close, converted, operands, run
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
