"""The route with gradients: segments that keep two feature maps a block, or one with gradient checkpointing."""
from typing import List, Optional, Sequence, Tuple, cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parameter import is_lazy
from torch.utils.checkpoint import checkpoint

from .kernels.activation import activate
from .kernels.block_segment import SegmentKernels, block_segment
from .kernels.cpu.memory import pool_of
from .kernels.cpu.segment import CpuSegment
from .kernels.normalization import BatchNormalization
from .kernels.support import convolution_dtype, is_gpu
from .plain_layers import BatchNorm, BlockLayers, StemLayers, find_block, is_dropping
from .routes import Plan

__all__ = ['checkpoint_exact', 'forward_training']


class _Buffers:
    """Which buffers a module has now, such as running statistics, and what they hold."""

    def __init__(self, module: nn.Module):
        self._owners = [(owner, dict(owner._buffers)) for owner in module.modules() if owner._buffers]
        # A lazy layer makes its own in its first call.
        self._values = [(buffer, buffer.detach().clone()) for buffer in module.buffers() if not is_lazy(buffer)]

    def restore(self) -> None:
        for owner, buffers in self._owners:
            owner._buffers.clear()
            owner._buffers.update(buffers)
        for buffer, value in self._values:
            if buffer.shape != value.shape:
                with torch.no_grad():
                    buffer.resize_(value.shape)  # as an observer does in its first call
            # Past autograd, like F.batch_norm: a graph without checkpointing may have saved them.
            buffer.data.copy_(value)


def checkpoint_exact(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Run a module keeping ``x`` alone for the backward pass, which runs the module again.

    Unlike plain checkpointing it trains exactly as without: the module runs again with the buffers that it had the
    first time, and leaves them as they are, so that BatchNorm updates its running statistics once a step.
    """
    if torch.compiler.is_compiling():
        # The compiled step updates buffers once, after what it recomputes: there is nothing to undo.
        return checkpoint(module, x, use_reentrant=False)
    before: Optional[_Buffers] = None

    def run(x: torch.Tensor) -> torch.Tensor:
        nonlocal before
        if before is None:
            before = _Buffers(module)
            return module(x)
        now = _Buffers(module)
        before.restore()
        try:
            return module(x)
        finally:
            now.restore()

    return checkpoint(run, x, use_reentrant=False)


if torch.__version__ < '2.9':
    # There a compiled step updates the buffers of what it recomputes twice. The checkpointed layers stay uncompiled.
    checkpoint_exact = torch.compiler.disable(checkpoint_exact)


def _batch_normalization(act: str, norm: BatchNorm) -> BatchNormalization:
    """An activation and the BatchNorm after it, about to run."""
    return BatchNormalization(
        act=act,
        weight=norm.weight,
        bias=norm.bias,
        running_mean=norm.running_mean,
        running_var=norm.running_var,
        batch_statistics=norm.training,
        momentum=norm.momentum,
        eps=norm.eps,
        num_batches_tracked=norm.num_batches_tracked,
    )


def _run_segment(
        x: torch.Tensor,
        pending: Optional[Tuple[str, BatchNorm]],
        block: BlockLayers,
        checkpointing: bool,
        kernels: SegmentKernels,
) -> torch.Tensor:
    drop_path_scale = None
    if block.drop_path is not None and is_dropping(block.drop_path):
        # Drawn by the layer itself: the same random numbers as without segments.
        drop_path_scale = block.drop_path(x.new_ones((x.shape[0], 1, 1, 1)))
    return block_segment(
        x,
        None if pending is None else _batch_normalization(*pending),
        block.depthwise.weight,
        block.depthwise.bias,
        _batch_normalization(block.spatial_act, block.spatial_norm),
        drop_path_scale,
        block.pointwise.weight,
        block.pointwise.bias,
        kernels,
        keep_depthwise=not checkpointing,
    )


def _embed_patches(x: torch.Tensor, conv: nn.Conv2d, dtype: torch.dtype) -> torch.Tensor:
    """The convolution of the stem; its output, a feature map ``(B, C, H, W)``, has the given dtype."""
    wide = dtype if is_gpu(x.device) else convolution_dtype(dtype)
    if wide == dtype:
        return F.conv2d(x, conv.weight, conv.bias, conv.stride)
    bias = None if conv.bias is None else conv.bias.to(wide)
    with torch.autocast(x.device.type, enabled=False):
        return F.conv2d(x.to(wide), conv.weight.to(wide), bias, conv.stride).to(dtype)


def _kernels_for(stem: nn.Module, device: torch.device) -> SegmentKernels:
    if not is_gpu(device):
        return CpuSegment(pool_of(stem))
    from .kernels.gpu.segment import GpuSegment

    return GpuSegment()


def forward_training(
        x: torch.Tensor,
        plan: Plan,
        stem: nn.Module,
        blocks: Sequence[nn.Module],
        take_indices: Sequence[int] = (),
        checkpointing: bool = False,
) -> Tuple[torch.Tensor, List[torch.Tensor]]:
    """Stem and blocks, keeping two feature maps a block for the backward pass, or one with ``checkpointing``.

    A segment ends in a pointwise convolution, the one part of a block that is expensive and so is never recomputed. It
    begins with the activation and the normalisation that the block before leaves pending. A block that is not plain is
    called, under ``checkpointing`` by :func:`checkpoint_exact`.

    Args:
        x: Images ``(B, in_chans, H, W)``.
        plan: What :func:`timm_convmixer.routes.make_plan` says of this very call.
        stem: Patch embedding.
        blocks: The blocks.
        take_indices: Indices of the blocks whose outputs are returned.
        checkpointing: Whether to save memory by recomputing: of a plain block the depthwise convolution, of a called
            one everything.

    Returns:
        Features ``(B, C, H, W)``, and the outputs of the blocks that were asked for, in the memory format that the
        layers would return.
    """
    intermediates = []
    # None where every block is called: a compiler, or a device without kernels, has no use for them.
    kernels = _kernels_for(stem, x.device) if any(plan.blocks) else None
    pending: Optional[Tuple[str, BatchNorm]] = None
    if isinstance(plan.stem, StemLayers):
        x = _embed_patches(x, plan.stem.conv, plan.dtype)
        pending = plan.stem.act, plan.stem.norm
    else:
        x = stem(x)
    called = plan.stem is None
    for i, (block, layers) in enumerate(zip(blocks, plan.blocks)):
        # A hook on a called part may have changed this block.
        if called and layers is not None and find_block(block, '')[0] != layers:
            layers = None
        called |= layers is None
        if isinstance(layers, BlockLayers) and (pending is not None or plan.takes(x, layers.depthwise.weight)):
            x = _run_segment(x, pending, layers, checkpointing, cast(SegmentKernels, kernels))
            pending = layers.act, layers.norm
        else:
            if pending is not None:
                x, pending = _finish(x, *pending), None
            x = checkpoint_exact(block, x) if checkpointing else block(x)
        if pending is not None and (i in take_indices or i == len(blocks) - 1):
            x, pending = _finish(x, *pending), None
        if i in take_indices:
            intermediates.append(x)
    return x, intermediates


def _finish(x: torch.Tensor, act: str, norm: BatchNorm) -> torch.Tensor:
    return norm(activate(x, act))
