"""The passes of a training segment on a GPU, by the Triton kernels, which apply an activation within each pass."""
from typing import Optional, Tuple

import torch

from ..normalization import Affine, BatchNormalization
from .activation_norm import activation_affine, activation_norm_backward, activation_statistics
from .depthwise import depthwise_convolution, depthwise_input_gradient
from .depthwise_weight_gradient import depthwise_weight_gradient

__all__ = ['GpuPasses']


class GpuPasses:
    """The passes over feature maps ``(B, C, H, W)``, contiguous, that a training segment is made of.

    The methods are those of ``timm_convmixer.kernels.cpu.passes.CpuPasses``.
    """

    def normalize(
            self,
            x: torch.Tensor,
            norm: BatchNormalization,
            residual: Optional[torch.Tensor] = None,
            branch_scale: Optional[torch.Tensor] = None,
    ) -> Tuple[torch.Tensor, Affine]:
        affine = norm.running_affine(x.dtype)
        if affine is None:
            mean, var = activation_statistics(x, norm.act)
            if norm.running_mean is not None and norm.running_var is not None:
                count = x.numel() // x.shape[1]
                norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), norm.momentum)
                norm.running_var.lerp_((var * (count / (count - 1))).to(norm.running_var.dtype), norm.momentum)
            affine = norm.affine(x.dtype, mean, var)
        return self.apply(x, affine, residual, branch_scale)[0], affine

    def apply(
            self,
            x: torch.Tensor,
            affine: Affine,
            residual: Optional[torch.Tensor] = None,
            branch_scale: Optional[torch.Tensor] = None,
            keep_activated: bool = False,
    ) -> Tuple[torch.Tensor, None]:
        scale, shift = affine.scale_and_shift()
        if branch_scale is None:
            return activation_affine(x, scale, shift, affine.act, residual), None
        return activation_affine(x, scale, shift, affine.act).mul_(branch_scale).add_(residual), None

    def backward(
            self,
            grad: torch.Tensor,
            x: torch.Tensor,
            activated: None,
            affine: Affine,
            scratch: torch.Tensor,
    ) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return activation_norm_backward(
            grad, x, affine.act, affine.weight, affine.mean, affine.invstd(), affine.batch_statistics)

    def depthwise(self, x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor]) -> torch.Tensor:
        return depthwise_convolution(x, weight, bias)

    def depthwise_backward(
            self,
            grad: torch.Tensor,
            x: torch.Tensor,
            weight: torch.Tensor,
            residual: torch.Tensor,
    ) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return (
            depthwise_input_gradient(grad, weight, residual.contiguous()),
            *depthwise_weight_gradient(x, grad, weight.shape[-1]),
        )

    def release(self, *maps: torch.Tensor) -> None:
        """Nothing to do: the CUDA allocator keeps what is freed."""
