"""Compares a ConvMixer with timm's own class: the arguments, the weights and images that reveal errors, the tolerances.

Shared by ``python -m timm_convmixer measure`` and the benchmarks.
"""
import functools
from typing import Any, Dict, Optional

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F

__all__ = [
    'architecture', 'bn_eps', 'create_timms', 'random_images', 'randomize_trivial', 'relative_error', 'set_bn_eps',
    'tolerance',
]

# Largest relative error of the logits: in float32 that of the inference form; where PyTorch rounds more (lower
# precisions, TF32 on a GPU), a multiple of what the plain model has there, which itself must make sense.
FLOAT32_TOLERANCE = 1e-4
LOW_PRECISION_FACTOR = 2.
LOW_PRECISION_TOLERANCE = 0.2


@functools.cache
def architecture(name: str) -> Dict[str, Any]:
    """Return the arguments of timm's ConvMixer for one of our variants."""
    model = timm.create_model(name, device='meta')
    return dict(
        dim=model.num_features,
        depth=len(model.blocks),
        kernel_size=model.kernel_size,
        patch_size=model.patch_size,
        in_chans=model.in_chans,
        num_classes=model.num_classes,
        act_layer=type(model.stem[1]),
    )


@functools.cache
def bn_eps(name: str) -> float:
    """Return the epsilon of a variant's BatchNorms, which timm's ConvMixer has no argument for."""
    return timm.create_model(name, device='meta').stem[2].eps


def create_timms(name: str) -> nn.Module:
    """Create timm's ConvMixer for one of our variants, with initial weights."""
    return set_bn_eps(timm.models.convmixer.ConvMixer(**architecture(name)), bn_eps(name))


def set_bn_eps(model: nn.Module, eps: float) -> nn.Module:
    """Set the epsilon of every BatchNorm of a model, and return the model."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = eps
    return model


def randomize_trivial(model: nn.Module, convmixer: bool) -> None:
    """Randomize weights whose trivial initial values could hide errors: BatchNorms and zero-initialised heads.

    Statistics of real images would not do: normalised with them, an untrained network amplifies rounding errors from
    block to block.
    """
    generator = torch.Generator().manual_seed(0)
    # These ranges keep activations of the deepest models within float16, without vanishing.
    weight_range = (1.5, 2.5) if convmixer else (0.3, 0.6)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                    (module.running_mean, -0.5, 0.5),
                    (module.running_var, 0.5, 2.),
                    (module.weight, *weight_range),
                    (module.bias, -0.5, 0.5),
            ):
                nn.init.uniform_(tensor, low, high, generator=generator)
        elif isinstance(module, nn.Linear) and not module.weight.any():
            nn.init.normal_(module.weight, std=0.02, generator=generator)


def random_images(batch_size: int, image_size: int) -> torch.Tensor:
    """Return images ``(B, 3, H, W)`` with structure at every scale. White noise would average out within patches."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch_size, 3, image_size, image_size, generator=generator)
    for size in (1, 4, 16):
        coarse = torch.randn(batch_size, 3, size, size, generator=generator)
        images += F.interpolate(coarse, size=(image_size, image_size), mode='bilinear')
    return images


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest error relative to the largest value; infinite for other shapes or non-finite values."""
    actual, expected = actual.detach().cpu().double(), expected.detach().cpu().double()
    if actual.shape != expected.shape or not torch.isfinite(actual).all():
        return float('inf')
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def tolerance(device: str, dtype: torch.dtype, plain_error: Optional[float]) -> float:
    """Return the largest relative error that is rounding.

    Args:
        device: Device of the compared models.
        dtype: Dtype they compute in; the expected result is in float32.
        plain_error: Error of the plain model on that device in that dtype, None if unknown.
    """
    if dtype == torch.float32 and torch.device(device).type == 'cpu':
        return FLOAT32_TOLERANCE
    if plain_error is None:
        return LOW_PRECISION_TOLERANCE
    # On a GPU, PyTorch's float32 convolutions are TF32 unless told otherwise.
    return min(LOW_PRECISION_TOLERANCE, max(FLOAT32_TOLERANCE, LOW_PRECISION_FACTOR * plain_error))
