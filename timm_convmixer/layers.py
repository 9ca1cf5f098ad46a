"""The building blocks of ConvMixer: one class for each of the two equations of a block.

Papers:
* `Patches Are All You Need?` - https://arxiv.org/abs/2201.09792, section 2
"""
from typing import Any, Type

import torch
import torch.nn as nn

from .inference_form import FusedConvMixerBlock, FusedStem, fold_norms

__all__ = ['ConvMixerBlock', 'ConvMixerStem', 'SpatialMixing']


class SpatialMixing(nn.Module):
    """Mixes positions within each channel: ``x + drop_path(norm(act(depthwise(x))))``.

    The normalisation comes after the activation, as everywhere in ConvMixer. The depthwise convolution, the activation
    and the normalisation are ``fn[0]``, ``fn[1]`` and ``fn[2]``: the state-dict keys of timm's ConvMixer. Stochastic
    depth, if there is any, is ``fn[3]``.
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
        if drop_path > 0.:
            # No identity otherwise: whoever walks over the layers finds those of timm's ConvMixer.
            self.fn.append(DropPath(drop_path))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # In timm's order, which decides the memory format where the two differ.
        return self.fn(x) + x


class _NamedSequential(nn.Sequential):
    """A ``Sequential`` with a constructor of its own. Made of layers, as its slices are, it is a plain one."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], (nn.Module, dict)):
            return nn.Sequential(*args)
        return super().__new__(cls)


class ConvMixerStem(_NamedSequential):
    """Patch embedding ``norm(act(conv(image)))``: ``(B, in_chans, H, W)`` to ``(B, C, H // patch, W // patch)``."""

    def __init__(
            self,
            in_chans: int,
            dim: int,
            patch_size: int = 7,
            act_layer: Type[nn.Module] = nn.GELU,
            norm_layer: Type[nn.Module] = nn.BatchNorm2d,
            device=None,
            dtype=None,
    ):
        """
        Args:
            in_chans: Number of input image channels.
            dim: Number of output channels.
            patch_size: Side and stride of the convolution, in pixels.
            act_layer: Activation layer class.
            norm_layer: Normalisation layer class for ``(B, C, H, W)``.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__(
            nn.Conv2d(in_chans, dim, kernel_size=patch_size, stride=patch_size, **dd),
            act_layer(),
            norm_layer(dim, **dd),
        )

    def fuse(self) -> nn.Module:
        """The inference form of the stem, or the stem itself where a layer is not what its constructor made.

        See :class:`FusedStem`.
        """
        # Imported here: it knows this class.
        from .plain_layers import find_fusible_stem

        layers = find_fusible_stem(self)
        if layers is None:
            return self
        conv, norm = layers
        (scale,), (shift,) = fold_norms([norm])
        return FusedStem(conv, self[1], scale, shift)


class ConvMixerBlock(_NamedSequential):
    """One block: ``x = spatial_mixing(x)``, then ``norm(act(pointwise(x)))``, shapes ``(B, C, H, W)`` throughout.

    The second equation mixes the channels of each position and has no residual. A ``Sequential``, so that its children
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

    def fuse(self) -> nn.Module:
        """The inference form of the block, or the block itself where a layer is not what its constructor made.

        See :class:`FusedConvMixerBlock`.
        """
        # Imported here: it knows this class.
        from .plain_layers import find_fusible_block

        layers = find_fusible_block(self)
        if layers is None:
            return self
        depthwise, spatial_norm, pointwise, norm = layers
        (spatial_scale, scale), (spatial_shift, shift) = fold_norms([spatial_norm, norm])
        return FusedConvMixerBlock(
            depthwise,
            self[0].fn[1],
            spatial_scale,
            spatial_shift,
            pointwise,
            self[2],
            scale,
            shift,
        )
