"""The route with gradients: segments that keep two feature maps a block, or one with gradient checkpointing."""
from contextlib import contextmanager, nullcontext
from typing import Iterator, List, Optional, Sequence, Tuple, cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from .kernels.activation import activate
from .kernels.block_segment import Passes, block_segment
from .kernels.cpu.passes import CpuPasses
from .kernels.normalization import BatchNormalization
from .kernels.support import is_transformed
from .layers import BlockLayers, StemLayers, is_dropping
from .routes import Plan, suggest_memory_format

__all__ = ['checkpoint_exact', 'forward_training']


@contextmanager
def _keep_buffers(*modules: nn.Module) -> Iterator[None]:
    """Undo what the forward pass within the context does to the modules' buffers, such as running statistics."""
    buffers = [buffer for module in modules for buffer in module.buffers()]
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, before):
                buffer.copy_(value)


def checkpoint_exact(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Run a module keeping ``x`` alone for the backward pass, which runs the module again.

    Unlike plain checkpointing it trains exactly as without: running the module again leaves its buffers as they are, so
    that BatchNorm updates its running statistics once a step.
    """
    if torch.compiler.is_compiling():
        # The compiled step updates buffers once, after what it recomputes: nothing to undo, and no context to trace.
        return checkpoint(module, x, use_reentrant=False)
    return checkpoint(module, x, use_reentrant=False, context_fn=lambda: (nullcontext(), _keep_buffers(module)))


if torch.__version__ < '2.9':
    # There a compiled step updates the buffers of what it recomputes twice. The checkpointed layers stay uncompiled.
    checkpoint_exact = torch.compiler.disable(checkpoint_exact)


class _ToMemoryFormat(torch.autograd.Function):
    """A tensor in another memory format, its gradient in the one that it had."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, memory_format: torch.memory_format, own: torch.memory_format) -> torch.Tensor:
        ctx.own = own
        return x.contiguous(memory_format=memory_format)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        # Within a transform memory formats cannot be asked for, and PyTorch's own formulas do not either.
        return grad if is_transformed(grad) else grad.contiguous(memory_format=ctx.own), None, None


def _batch_normalization(act: str, norm: nn.BatchNorm2d) -> BatchNormalization:
    """An activation and the BatchNorm after it, about to run: counts the batch, as calling the module would."""
    momentum = norm.momentum
    if norm.training:
        norm.num_batches_tracked.add_(1)
        if momentum is None:
            momentum = 1. / norm.num_batches_tracked.item()
    return BatchNormalization(
        act=act,
        weight=norm.weight,
        bias=norm.bias,
        running_mean=norm.running_mean,
        running_var=norm.running_var,
        batch_statistics=norm.training,
        momentum=momentum or 0.,
        eps=norm.eps,
    )


def _run_segment(
        x: torch.Tensor,
        pending: Optional[Tuple[str, nn.BatchNorm2d]],
        block: BlockLayers,
        checkpointing: bool,
        passes: Passes,
) -> torch.Tensor:
    return block_segment(
        x,
        None if pending is None else _batch_normalization(*pending),
        block.depthwise.weight,
        block.depthwise.bias,
        _batch_normalization(block.spatial_act, block.spatial_norm),
        # Drawn by the layer itself: the same random numbers as without segments.
        block.drop_path(x.new_ones((x.shape[0], 1, 1, 1))) if is_dropping(block.drop_path) else None,
        block.pointwise.weight,
        block.pointwise.bias,
        passes,
        keep_depthwise=not checkpointing,
    )


def _make_passes(device: torch.device) -> Passes:
    if device.type == 'cpu':
        return CpuPasses()
    from .kernels.gpu.passes import GpuPasses

    return GpuPasses()


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
        checkpointing: Whether to save memory at the cost of computing the depthwise convolution twice.

    Returns:
        Features ``(B, C, H, W)``, and the outputs of the blocks that were asked for, in the memory format of ``x``.
    """
    intermediates = []
    passes = _make_passes(x.device) if any(plan.blocks) else None
    outer_format = plan.outer_format
    pending: Optional[Tuple[str, nn.BatchNorm2d]] = None
    if isinstance(plan.stem, StemLayers):
        x = _run_patch_embedding(_convert(x, plan.memory_format, outer_format), plan.stem.conv)
        pending = plan.stem.act, plan.stem.norm
    else:
        x = stem(x)
    for i, (block, layers) in enumerate(zip(blocks, plan.blocks)):
        if isinstance(layers, BlockLayers) and (pending is not None or plan.takes(x, layers.depthwise.weight)):
            if pending is None:
                outer_format = suggest_memory_format(x)
                x = _convert(x, plan.memory_format, outer_format)
            x = _run_segment(x, pending, layers, checkpointing, cast(Passes, passes))
            pending = layers.act, layers.norm
        else:
            if pending is not None:
                x, pending = _finish(x, *pending, outer_format, plan.memory_format), None
            x = checkpoint_exact(block, x) if checkpointing else block(x)
        if pending is not None and (i in take_indices or i == len(blocks) - 1):
            x, pending = _finish(x, *pending, outer_format, plan.memory_format), None
        if i in take_indices:
            intermediates.append(x)
    return x, intermediates


def _convert(x: torch.Tensor, to: torch.memory_format, own: torch.memory_format) -> torch.Tensor:
    if to == own or x.is_contiguous(memory_format=to):
        return x
    return _ToMemoryFormat.apply(x, to, own)


def _run_patch_embedding(x: torch.Tensor, conv: nn.Conv2d) -> torch.Tensor:
    weight = conv.weight
    if weight.is_contiguous() and not x.is_contiguous():
        # Its gradient would have the memory format of the images.
        weight = _ToMemoryFormat.apply(weight, torch.contiguous_format, torch.contiguous_format)
    return F.conv2d(x, weight, conv.bias, conv.stride)


def _finish(
        x: torch.Tensor,
        act: str,
        norm: nn.BatchNorm2d,
        outer_format: torch.memory_format,
        own: torch.memory_format,
) -> torch.Tensor:
    """A feature map through what is pending, in the memory format of what leaves."""
    # Before and not after: PyTorch's gradients of a normalisation are far less exact in channels last.
    return norm(activate(_convert(x, outer_format, own), act))
