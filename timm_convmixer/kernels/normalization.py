"""A batch normalisation after its activation, as tensors and numbers: what the passes of a training segment take."""
from typing import NamedTuple, Optional

import torch

from .support import opmath_dtype

__all__ = ['Affine', 'BatchNormalization']


class Affine(NamedTuple):
    """What a normalisation did to a batch: enough to do it again, bit for bit, and backwards.

    Attributes:
        act: Activation before it.
        mean: Mean that it subtracted, ``(C,)``.
        invstd: Inverse of the standard deviation that it divided by, ``(C,)``.
        scale: Statistics, weight and bias in one: ``scale * x + shift``, ``(C,)``.
        shift: ``(C,)``.
        batch_statistics: Whether the statistics are those of the batch.
    """
    act: str
    mean: torch.Tensor
    invstd: torch.Tensor
    scale: torch.Tensor
    shift: torch.Tensor
    batch_statistics: bool


class BatchNormalization(NamedTuple):
    """A batch normalisation after its activation.

    Attributes:
        act: Activation before it, ``'gelu'`` (with the error function) or ``'relu'``.
        weight: Scale, ``(C,)``, or None.
        bias: Shift, ``(C,)``, or None.
        running_mean: ``(C,)``. Updated in place if ``batch_statistics``; None then means no update.
        running_var: ``(C,)``, as ``running_mean``.
        batch_statistics: Whether to normalise by the statistics of the batch instead of the running ones.
        momentum: Weight of the batch in the update of the running statistics; None for the mean of all batches.
        eps: Added to the variance.
        num_batches_tracked: Counts the updates; None to count nothing.
    """
    act: str
    weight: Optional[torch.Tensor]
    bias: Optional[torch.Tensor]
    running_mean: Optional[torch.Tensor]
    running_var: Optional[torch.Tensor]
    batch_statistics: bool
    momentum: Optional[float]
    eps: float
    num_batches_tracked: Optional[torch.Tensor] = None

    def affine(self, dtype: torch.dtype, mean: torch.Tensor, var: torch.Tensor) -> Affine:
        """The affine for feature maps of a dtype, given the statistics."""
        # In the dtype of the arithmetic, whatever the parameters have: what is recomputed must be the same.
        dtype = opmath_dtype(dtype)
        weight, bias = (None if t is None else t.detach().to(dtype) for t in (self.weight, self.bias))
        mean, invstd = mean.to(dtype), torch.rsqrt(var.to(dtype) + self.eps)
        scale = invstd if weight is None else invstd * weight
        shift = -mean * scale
        return Affine(self.act, mean, invstd, scale, shift if bias is None else shift + bias, self.batch_statistics)

    def running_affine(self, dtype: torch.dtype) -> Optional[Affine]:
        """The affine by the running statistics, None where those of the batch are needed."""
        if self.batch_statistics or self.running_mean is None or self.running_var is None:
            return None
        # A copy: training goes on to update the running mean, maybe before this batch's backward pass.
        return self.affine(dtype, self.running_mean.clone(), self.running_var)

    def batch_affine(self, dtype: torch.dtype, mean: torch.Tensor, var: torch.Tensor, count: int) -> Affine:
        """The affine by the statistics of a batch of ``count`` values per channel; updates the running statistics."""
        self._update_running(mean, var, count)
        return self.affine(dtype, mean, var)

    def _update_running(self, mean: torch.Tensor, var: torch.Tensor, count: int) -> None:
        """Update the running statistics with the mean and the biased variance of a batch."""
        momentum = self._count_batch()
        if self.running_mean is not None and self.running_var is not None:
            for running, batch in (self.running_mean, mean), (self.running_var, var * (count / (count - 1))):
                # Like F.batch_norm: rounded once, and past autograd, since an earlier forward pass may have saved them
                # for its backward pass.
                running.data.copy_(momentum * batch + (1. - momentum) * running.data)

    def _count_batch(self) -> float:
        """Count a batch, and return its weight in the update of the running statistics."""
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                return 1. / self.num_batches_tracked.item()
        return self.momentum or 0.
