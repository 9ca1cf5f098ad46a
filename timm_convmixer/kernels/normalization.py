"""A batch normalisation after its activation, as tensors and numbers: what the passes of a training segment take."""
from typing import NamedTuple, Optional, Tuple

import torch

__all__ = ['Affine', 'BatchNormalization']


class Affine(NamedTuple):
    """What a normalisation did to a batch: enough to do it again, bit for bit, and backwards.

    Attributes:
        act: Activation before it.
        weight: ``(C,)`` or None.
        bias: ``(C,)`` or None.
        mean: Mean that it subtracted, ``(C,)``.
        var: Biased variance that it divided by, ``(C,)``.
        batch_statistics: Whether mean and variance are those of the batch.
        eps: Added to the variance.
    """
    act: str
    weight: Optional[torch.Tensor]
    bias: Optional[torch.Tensor]
    mean: torch.Tensor
    var: torch.Tensor
    batch_statistics: bool
    eps: float

    def invstd(self) -> torch.Tensor:
        return torch.rsqrt(self.var + self.eps)

    def scale_and_shift(self) -> Tuple[torch.Tensor, torch.Tensor]:
        scale = self.invstd() if self.weight is None else self.invstd() * self.weight
        shift = -self.mean * scale
        return scale, shift if self.bias is None else shift + self.bias


class BatchNormalization(NamedTuple):
    """A batch normalisation after its activation.

    Attributes:
        act: Activation before it, ``'gelu'`` (with the error function) or ``'relu'``.
        weight: Scale, ``(C,)``, or None.
        bias: Shift, ``(C,)``, or None.
        running_mean: ``(C,)``; updated in place if ``batch_statistics``. None, with those, for no update.
        running_var: ``(C,)``, as ``running_mean``.
        batch_statistics: Whether to normalise by the statistics of the batch instead of the running ones.
        momentum: Weight of the batch in the update of the running statistics.
        eps: Added to the variance.
    """
    act: str
    weight: Optional[torch.Tensor]
    bias: Optional[torch.Tensor]
    running_mean: Optional[torch.Tensor]
    running_var: Optional[torch.Tensor]
    batch_statistics: bool
    momentum: float
    eps: float

    def affine(self, dtype: torch.dtype, mean: torch.Tensor, var: torch.Tensor) -> Affine:
        """The affine for feature maps of a dtype, given the statistics."""
        # In the dtype of the arithmetic, whatever the parameters have: what is recomputed must be the same.
        wide = torch.promote_types(dtype, torch.float32)
        weight, bias = (None if t is None else t.detach().to(wide) for t in (self.weight, self.bias))
        return Affine(self.act, weight, bias, mean.to(wide), var.to(wide), self.batch_statistics, self.eps)

    def running_affine(self, dtype: torch.dtype) -> Optional[Affine]:
        """The affine by the running statistics, None where those of the batch are needed."""
        if self.batch_statistics or self.running_mean is None or self.running_var is None:
            return None
        # Copies: training goes on to update the running statistics, maybe before this batch's backward pass.
        return self.affine(dtype, self.running_mean.clone(), self.running_var.clone())

    def update_running(self, mean: torch.Tensor, var: torch.Tensor, count: int) -> None:
        """Let the statistics of a batch of ``count`` values per channel, biased variance, into the running ones."""
        if self.running_mean is not None and self.running_var is not None:
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_((var * (count / (count - 1))).to(self.running_var.dtype), self.momentum)
