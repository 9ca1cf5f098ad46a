"""ConvMixer as other projects define it, with their state-dict keys, and the authors' learning rate schedule."""
from typing import Type

import torch
import torch.nn as nn

__all__ = ['official_convmixer', 'official_schedule', 'openmmlab_convmixer']


class _Residual(nn.Module):
    def __init__(self, fn: nn.Module):
        super().__init__()
        self.fn = fn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fn(x) + x


def _stem(dim: int, patch_size: int, act: nn.Module) -> list:
    return [nn.Conv2d(3, dim, patch_size, stride=patch_size), act, nn.BatchNorm2d(dim)]


def _block(dim: int, kernel_size: int, act: nn.Module) -> nn.Sequential:
    depthwise = nn.Conv2d(dim, dim, kernel_size, groups=dim, padding='same')
    return nn.Sequential(
        _Residual(nn.Sequential(depthwise, act, nn.BatchNorm2d(dim))),
        nn.Conv2d(dim, dim, 1),
        act,
        nn.BatchNorm2d(dim),
    )


def official_convmixer(
        dim: int,
        depth: int,
        kernel_size: int,
        patch_size: int,
        num_classes: int,
        act_layer: Type[nn.Module] = nn.GELU,
) -> nn.Sequential:
    """The flat ``nn.Sequential`` of locuslab/convmixer, its timm fork and locuslab/convmixer-cifar10."""
    layers = _stem(dim, patch_size, act_layer())
    layers += [_block(dim, kernel_size, act_layer()) for _ in range(depth)]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(dim, num_classes)]
    return nn.Sequential(*layers)


class _OpenMMLabBackbone(nn.Module):
    def __init__(self, dim: int, depth: int, kernel_size: int, patch_size: int, act: nn.Module):
        super().__init__()
        self.act = act
        self.stem = nn.Sequential(*_stem(dim, patch_size, act))
        self.stages = nn.Sequential(*[_block(dim, kernel_size, act) for _ in range(depth)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.stages(self.stem(x))


class _OpenMMLabHead(nn.Module):
    def __init__(self, dim: int, num_classes: int):
        super().__init__()
        self.fc = nn.Linear(dim, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)


class _OpenMMLabClassifier(nn.Module):
    def __init__(self, backbone: nn.Module, head: nn.Module):
        super().__init__()
        self.data_preprocessor = nn.Module()
        self.data_preprocessor.register_buffer('mean', torch.zeros(3, 1, 1), persistent=False)
        self.backbone = backbone
        self.neck = nn.Sequential(nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten())
        self.head = head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.neck(self.backbone(x)))


def openmmlab_convmixer(
        dim: int,
        depth: int,
        kernel_size: int,
        patch_size: int,
        num_classes: int,
        act_layer: Type[nn.Module] = nn.GELU,
) -> nn.Module:
    """The classifier of open-mmlab/mmpretrain: backbone, pooling neck, head, and one activation for all layers."""
    return _OpenMMLabClassifier(
        _OpenMMLabBackbone(dim, depth, kernel_size, patch_size, act_layer()),
        _OpenMMLabHead(dim, num_classes),
    )


def official_schedule(progress: torch.Tensor, lr: float) -> torch.Tensor:
    """Return the learning rate of both official repositories: piecewise linear from 0 to lr, lr / 20 and 0.

    Args:
        progress: Progress of the training, from 0 to 1, of any shape.
        lr: Peak learning rate.
    """
    rise = progress / 0.4
    fall = 1 - 0.95 * (progress - 0.4) / 0.4
    tail = 0.05 * (1 - progress) / 0.2
    return lr * torch.where(progress < 0.4, rise, torch.where(progress < 0.8, fall, tail))
