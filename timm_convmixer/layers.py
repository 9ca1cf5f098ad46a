"""The building blocks of ConvMixer: one class for each of the two equations of a block.

Papers:
* `Patches Are All You Need?` - https://arxiv.org/abs/2201.09792, section 2
"""
from collections import OrderedDict
from contextlib import contextmanager, nullcontext
from typing import Iterator, Optional, Type, Union

import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

__all__ = ['SpatialMixing', 'ConvMixerBlock', 'checkpoint_exact']


class SpatialMixing(nn.Module):
    """Mixes locations within each channel: ``x + drop_path(norm(act(depthwise(x))))``.

    The normalisation comes after the activation, as everywhere in ConvMixer. The depthwise convolution, the activation
    and the normalisation are ``fn[0]``, ``fn[1]`` and ``fn[2]``: the state-dict keys of timm's ConvMixer.
    """

    def __init__(
            self,
            dim: int,
            kernel_size: int = 9,
            drop_path: float = 0.,
            act_layer: Type[nn.Module] = nn.GELU,
            norm_layer: Type[nn.Module] = nn.BatchNorm2d,
            device=None,
            dtype=None,
    ):
        """
        Args:
            dim: Number of channels.
            kernel_size: Side of the depthwise kernel; an even one pads one more on the right and the bottom.
            drop_path: Stochastic depth rate of this branch.
            act_layer: Activation layer class.
            norm_layer: Normalisation layer class for ``(B, C, H, W)``.
        """
        # Importing timm registers the models, which imports this module: that must find it complete.
        from timm.layers import DropPath

        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.fn = nn.Sequential(
            nn.Conv2d(dim, dim, kernel_size, groups=dim, padding='same', **dd),
            act_layer(),
            norm_layer(dim, **dd),
        )
        self.drop_path = DropPath(drop_path) if drop_path > 0. else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.drop_path(self.fn(x))


class ConvMixerBlock(nn.Sequential):
    """One block: ``x = spatial_mixing(x)``, then ``norm(act(pointwise(x)))``, shapes ``(B, C, H, W)`` throughout.

    The second equation mixes the channels of each location and has no residual. A ``Sequential``, so that its children
    keep the state-dict keys of timm's ConvMixer: ``0`` is the :class:`SpatialMixing`, ``1`` the pointwise convolution,
    ``2`` the activation, ``3`` the normalisation.
    """

    def __init__(
            self,
            dim: int,
            kernel_size: int = 9,
            drop_path: float = 0.,
            act_layer: Type[nn.Module] = nn.GELU,
            norm_layer: Type[nn.Module] = nn.BatchNorm2d,
            device=None,
            dtype=None,
    ):
        """
        Args:
            dim: Number of channels.
            kernel_size: Side of the depthwise kernel.
            drop_path: Stochastic depth rate of the spatial mixing.
            act_layer: Activation layer class.
            norm_layer: Normalisation layer class for ``(B, C, H, W)``.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__(
            SpatialMixing(dim, kernel_size, drop_path, act_layer, norm_layer, **dd),
            nn.Conv2d(dim, dim, kernel_size=1, **dd),
            act_layer(),
            norm_layer(dim, **dd),
        )

    def __getitem__(self, index: Union[int, slice]) -> nn.Module:
        if isinstance(index, slice):
            # Sequential would build a slice with its own class, whose arguments here are not modules.
            return nn.Sequential(OrderedDict(list(self.named_children())[index]))
        return super().__getitem__(index)


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


def checkpoint_exact(x: torch.Tensor, *modules: Optional[nn.Module]) -> torch.Tensor:
    """Run modules one after the other, keeping ``x`` alone for the backward pass, which runs them again.

    Unlike plain checkpointing it trains exactly as without: running the modules again leaves their buffers as they are,
    so that BatchNorm updates its running statistics once a step. What the last module computes is not computed again,
    only its inputs: let that be the most expensive one.

    Args:
        x: Input of the first module.
        modules: Modules to run, None for none.
    """
    modules = tuple(module for module in modules if module is not None)

    def run(y: torch.Tensor) -> torch.Tensor:
        for module in modules:
            y = module(y)
        return y

    if torch.compiler.is_compiling():
        # The compiled step updates buffers once, after what it recomputes: nothing to undo, and no context to trace.
        return checkpoint(run, x, use_reentrant=False)
    return checkpoint(run, x, use_reentrant=False, context_fn=lambda: (nullcontext(), _keep_buffers(*modules)))
