"""The training form of a block on the Triton kernels, run like kernel_grid.py: on the GPU or under the interpreter."""
import copy

import pytest
import torch
from test_block_training import assert_all_close, converted, kept_maps, operands, run, tiny
from timm_convmixer.kernels.block_training import block_segment, block_segment_ref, block_segment_support

from kernel_grid import DEVICE, ieee  # noqa: F401, a fixture of every test
from support import assert_close
from timm_convmixer.kernels import activation_norm_support, set_fused


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
    assert activation_norm_support(moved['z']).used and block_segment_support(moved['z']) == ''
    ours = [value.cpu().float() for value in run(block_segment, moved)]
    checkpointed = [value.cpu().float() for value in run(block_segment, on_device(args, dtype), keep_depthwise=False)]
    assert all(map(torch.equal, ours, checkpointed))
    assert_all_close(ours, exact, 1e-5 if dtype == torch.float32 else 0.05)


def test_model():
    """One step of a model: two maps a block, gradients and statistics as by PyTorch's own layers."""
    fused = tiny().to(DEVICE)
    plain = copy.deepcopy(fused).double()
    x = torch.randn(2, 3, 16, 16, device=DEVICE)
    assert kept_maps(fused, x) < 10
    fused.load_state_dict(plain.state_dict())
    gradients = []
    for model, images, on in ((fused, x, True), (plain, x.double(), False)):
        set_fused(on)
        try:
            model(images).square().sum().backward()
        finally:
            set_fused(True)
        gradients.append([parameter.grad.float() for parameter in model.parameters()])
    assert_all_close(*gradients, 1e-4)
    for ours, theirs in zip(fused.buffers(), plain.buffers()):
        assert_close(ours.float(), theirs.float(), 1e-4)
