"""The passes of a training segment on a CPU, by PyTorch's operators, in as little fresh memory as possible.

A feature map that comes fresh from the system costs more than most of what a pass computes into it, so passes write
over maps that are no longer read.
"""
from typing import Optional, Tuple

import torch
import torch.nn.functional as F

from ..activation import activate_backward_in_place, activate_into
from ..normalization import Affine, BatchNormalization
from .depthwise import depthwise_input_gradient, depthwise_weight_gradient, weight_gradient_refusal
from .workspace import Workspace

__all__ = ['CpuPasses']


class CpuPasses:
    """The passes over feature maps ``(B, C, H, W)`` that a training segment is made of."""

    def __init__(self, workspace: Optional[Workspace] = None):
        """
        Args:
            workspace: Feature maps to write into, shared by the segments of one forward pass.
        """
        self.workspace = Workspace() if workspace is None else workspace

    def normalize(
            self,
            x: torch.Tensor,
            norm: BatchNormalization,
            residual: Optional[torch.Tensor] = None,
            branch_scale: Optional[torch.Tensor] = None,
    ) -> Tuple[torch.Tensor, Affine]:
        """``residual + branch_scale * norm(act(x))``, and the affine that ``norm`` was; updates running statistics."""
        activated = activate_into(self.workspace.take(x), x, norm.act)
        affine = norm.running_affine(x.dtype)
        if affine is None:
            mean, var = torch.batch_norm_update_stats(activated, norm.running_mean, norm.running_var, norm.momentum)
            affine = norm.affine(x.dtype, mean, var)
        return _apply(activated, affine, residual, branch_scale, out=activated), affine

    def apply(
            self,
            x: torch.Tensor,
            affine: Affine,
            residual: Optional[torch.Tensor] = None,
            branch_scale: Optional[torch.Tensor] = None,
            keep_activated: bool = False,
    ) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
        """The result of ``normalize`` again, bit for bit, and ``act(x)`` where it is kept for ``backward``."""
        activated = activate_into(self.workspace.take(x), x, affine.act)
        out = self.workspace.take(x) if keep_activated else activated
        out = _apply(activated, affine, residual, branch_scale, out=out)
        return out, activated if keep_activated else None

    def backward(
            self,
            grad: torch.Tensor,
            x: torch.Tensor,
            activated: Optional[torch.Tensor],
            affine: Affine,
            scratch: torch.Tensor,
    ) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients of ``norm(act(x))`` with respect to ``x``, weight and bias.

        ``activated`` and ``scratch`` are overwritten.
        """
        if activated is None:
            activated = activate_into(self.workspace.take(x), x, affine.act)
        invstd = affine.invstd()
        if activated.dtype != invstd.dtype:
            grad, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
                grad, activated, affine.weight, affine.mean, affine.var, affine.mean, invstd, affine.batch_statistics,
                affine.eps, [True, affine.weight is not None, affine.bias is not None],
            )
            return activate_backward_in_place(grad, x, affine.act), grad_weight, grad_bias
        centered = activated.sub_(affine.mean.view(-1, 1, 1))
        grad_bias = grad.sum(dim=(0, 2, 3))
        grad_weight = torch.mul(grad, centered, out=scratch).sum(dim=(0, 2, 3)) * invstd
        scale = invstd if affine.weight is None else invstd * affine.weight
        if affine.batch_statistics:
            share = -scale / (x.numel() // x.shape[1])
            out = torch.addcmul(
                (share * grad_bias).view(-1, 1, 1), centered, (share * grad_weight * invstd).view(-1, 1, 1),
                out=centered,
            )
            out.addcmul_(grad, scale.view(-1, 1, 1))
        else:
            out = torch.mul(grad, scale.view(-1, 1, 1), out=centered)
        return activate_backward_in_place(out, x, affine.act), grad_weight, grad_bias

    def depthwise(self, x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor]) -> torch.Tensor:
        """The depthwise convolution with padding ``'same'``."""
        return F.conv2d(x, weight, bias, padding='same', groups=weight.shape[0])

    def depthwise_backward(
            self,
            grad: torch.Tensor,
            x: torch.Tensor,
            weight: torch.Tensor,
            residual: torch.Tensor,
    ) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients of the depthwise convolution: of ``x``, to which ``residual`` is added, of weight and of bias."""
        if not weight_gradient_refusal(x, weight):
            grad_x = depthwise_input_gradient(grad, weight)
            grad_weight, grad_bias = depthwise_weight_gradient(x, grad, weight.shape[-1]), grad.sum(dim=(0, 2, 3))
        else:
            grad_x, grad_weight, grad_bias = convolution_backward(grad, x, weight)
        return grad_x.add_(residual), grad_weight, grad_bias

    def release(self, *maps: torch.Tensor) -> None:
        """Hand feature maps that nobody reads any more to the passes that follow."""
        self.workspace.give(*maps)


def convolution_backward(
        grad: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """PyTorch's gradients of a depthwise convolution with padding ``'same'``: of ``x``, weight and bias."""
    channels, kernel_size = weight.shape[0], weight.shape[-1]
    # An even kernel pads one more on the right and the bottom, which a convolution's own padding cannot.
    extra, padding = 1 - kernel_size % 2, (kernel_size - 1) // 2
    padded = F.pad(x, (0, extra, 0, extra)) if extra else x
    grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        grad, padded, weight, [channels], [1, 1], [padding, padding], [1, 1], False, [0, 0], channels, [True] * 3)
    return grad_x[:, :, :x.shape[2], :x.shape[3]], grad_weight, grad_bias


def _apply(
        activated: torch.Tensor,
        affine: Affine,
        residual: Optional[torch.Tensor],
        branch_scale: Optional[torch.Tensor],
        out: torch.Tensor,
) -> torch.Tensor:
    scale, shift = affine.scale_and_shift()
    if activated.dtype == scale.dtype:
        out = torch.addcmul(shift.view(-1, 1, 1), activated, scale.view(-1, 1, 1), out=out)
    else:
        # Half precision: one rounding, as PyTorch's own normalisation.
        out = F.batch_norm(activated, affine.mean, affine.var, affine.weight, affine.bias, False, 0., affine.eps)
    if branch_scale is not None:
        out.mul_(branch_scale)
    return out if residual is None else out.add_(residual)
