"""The building blocks of ConvMixer: one class for each of the two equations of a block.

Papers:
* `Patches Are All You Need?` - https://arxiv.org/abs/2201.09792, section 2
"""
from typing import Type

import torch
import torch.nn as nn
from timm.layers import DropPath

__all__ = ['SpatialMixing', 'ConvMixerBlock']


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
