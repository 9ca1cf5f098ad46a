"""The blocks, and gradient checkpointing, which changes only memory use."""
import copy

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F

from timm_convmixer.convmixer import ConvMixer
from timm_convmixer.layers import ConvMixerBlock


def train_steps(model: nn.Module, steps: int = 3, amp: bool = False, seed: int = 0) -> nn.Module:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(seed)
    for _ in range(steps):
        with torch.autocast('cpu', torch.bfloat16, enabled=amp):
            output = model(torch.randn(4, 3, 12, 16))
            output = output if isinstance(output, torch.Tensor) else torch.cat([y.flatten(1) for y in output], dim=1)
            loss = output.float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def elements_kept(model: nn.Module) -> int:
    """Count elements that autograd saves in a forward pass, without changing the model."""
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: sizes.append(tensor.numel()) or tensor, lambda t: t):
        copy.deepcopy(model).train()(torch.randn(2, 3, 16, 16))
    return sum(sizes)


def test_checkpointing_leaves_other_graphs_alone():
    """Running a block again restores its buffers without telling the graphs that saved them, as F.batch_norm does."""
    x = torch.randn(2, 3, 16, 16)
    model = ConvMixer(dim=16, depth=2, kernel_size=5, patch_size=2, act_layer='silu').train()
    plain = copy.deepcopy(model)
    losses = []
    for checkpointing in (True, False):
        model.set_grad_checkpointing(checkpointing)
        losses.append((model(x).sum(), plain(x).sum()))
    for loss, expected in losses:
        loss.backward()
        expected.backward()
    for parameter, expected in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(parameter.grad, expected.grad)


def assert_bit_equal(actual: nn.Module, expected: nn.Module) -> None:
    expected = expected.state_dict()
    for key, value in actual.state_dict().items():
        assert torch.equal(value, expected[key]), key


pytestmark = pytest.mark.usefixtures('small_maps')


def tiny(**kwargs) -> ConvMixer:
    return ConvMixer(**{**dict(dim=16, depth=3, kernel_size=3, patch_size=2, num_classes=5), **kwargs})


def test_a_slice_of_a_block_is_a_sequential():
    block = ConvMixerBlock(8, 3)
    assert list(block[2:].state_dict()) == [key for key in block.state_dict() if key.startswith('3.')]
    x = torch.randn(2, 8, 5, 5)
    assert torch.equal(block[2:](block[:2](x)), block(x))


@pytest.mark.parametrize('kwargs', [
    dict(),
    dict(act_layer=nn.ReLU),
    dict(drop_path_rate=0.5, drop_rate=0.3),
    dict(bn_momentum=0.01),
    dict(norm_layer='groupnorm1'),
], ids=str)
@pytest.mark.parametrize('amp', [False, True], ids=['fp32', 'amp'])
def test_checkpointing_trains_identically(kwargs, amp):
    plain = tiny(**kwargs)
    checkpointed = copy.deepcopy(plain)
    checkpointed.set_grad_checkpointing()
    assert_bit_equal(train_steps(checkpointed, amp=amp), train_steps(plain, amp=amp))


def test_checkpointing_with_momentum_none_trains_identically():
    plain = tiny()
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    checkpointed = copy.deepcopy(plain)
    checkpointed.set_grad_checkpointing()
    assert_bit_equal(train_steps(checkpointed), train_steps(plain))
    assert checkpointed.stem[2].num_batches_tracked == 3


def test_checkpointing_with_frozen_statistics_trains_identically():
    from timm.utils.model import freeze_batch_norm_2d
    plain = tiny()
    train_steps(plain)
    plain.blocks = freeze_batch_norm_2d(plain.blocks)
    checkpointed = copy.deepcopy(plain)
    checkpointed.set_grad_checkpointing()
    assert_bit_equal(train_steps(checkpointed), train_steps(plain))


@pytest.mark.parametrize('indices', [[0, 2], [1], [2]], ids=str)
def test_checkpointing_of_intermediates_trains_identically(indices):
    class Features(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model.forward_intermediates(x, indices=indices, stop_early=True, intermediates_only=True)

    plain = Features(tiny(drop_path_rate=0.3))
    checkpointed = copy.deepcopy(plain)
    checkpointed.model.set_grad_checkpointing()
    assert_bit_equal(train_steps(checkpointed), train_steps(plain))


def test_checkpointing_of_features_only_trains_identically():
    """timm's wrapper has no ``set_grad_checkpointing()``; the wrapped model has."""
    torch.manual_seed(0)
    plain = timm.create_model('test_convmixer', features_only=True, out_indices=(1, 2), drop_path_rate=0.3)
    checkpointed = copy.deepcopy(plain)
    checkpointed.model.set_grad_checkpointing()
    assert elements_kept(checkpointed) < elements_kept(plain)
    assert_bit_equal(train_steps(checkpointed), train_steps(plain))


def test_hooked_blocks_are_called_as_a_whole_and_train_identically():
    plain = tiny()
    shapes = []
    for module in (plain.blocks[1], plain.blocks[2][0].fn[1]):
        module.register_forward_hook(lambda module, args, output: shapes.append(output.shape))
    checkpointed = copy.deepcopy(plain)
    checkpointed.set_grad_checkpointing()
    train_steps(plain)
    assert shapes == [(4, 16, 6, 8)] * 6
    assert_bit_equal(train_steps(checkpointed), plain)


def test_checkpointing_recomputes_no_pointwise_convolution(monkeypatch):
    calls = []
    conv2d = F.conv2d

    def count(x, weight, *args, **kwargs):
        calls.append('pointwise' if weight.shape[-1] == 1 else 'other')
        return conv2d(x, weight, *args, **kwargs)

    model = tiny().train()
    model.set_grad_checkpointing()
    loss = model(torch.randn(2, 3, 8, 8)).sum()
    # Patch only now, because a model with a patched function takes no fast path.
    monkeypatch.setattr(F, 'conv2d', count)
    loss.backward()
    assert calls.count('other') >= 3 and 'pointwise' not in calls


@pytest.mark.parametrize('act_layer', [nn.GELU, nn.ReLU])
def test_compiled_checkpointing_trains_the_same(act_layer):
    plain = tiny(act_layer=act_layer)
    checkpointed = copy.deepcopy(plain)
    checkpointed.set_grad_checkpointing()
    train_steps(torch.compile(checkpointed, backend='aot_eager'))
    expected = train_steps(plain).state_dict()
    for key, value in checkpointed.state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-5)
