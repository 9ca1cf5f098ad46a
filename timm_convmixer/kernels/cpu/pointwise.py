"""A pointwise convolution and its gradients on a CPU, chunk by chunk, into given feature maps.

In float32 PyTorch's convolutions do it, by oneDNN. Matrix products come from the BLAS library, and MKL takes AVX2 on
AMD's CPUs with AVX-512, which is half the speed. They also obey ``torch.set_float32_matmul_precision``, which leaves
convolutions as they are. In bfloat16 both come from oneDNN, and products write into given memory, as convolutions do
not. Float16, and bfloat16 that oneDNN does not support on a CPU, are computed in float32.
"""
import functools
from typing import Optional, Tuple

import torch
import torch.nn.functional as F

from ..convolution import convolution_gradients_ref
from ..support import convolution_dtype, dense_memory_format

__all__ = ['PointwiseConvolution', 'PointwiseProducts', 'make_pointwise']


class PointwiseConvolution:
    """A pointwise convolution by PyTorch's own, in the dtype of the weight; the reference of ``PointwiseProducts``.

    Attributes:
        weight_grad: Gradient of the weight, ``(C_out, C, 1, 1)``, the sum over the chunks so far; None if not wanted.
        bias_grad: The same of the bias, ``(C_out,)``.
    """

    # Whether it computes in the dtype of the batch instead of the weight's.
    _in_batch_dtype = False

    def __init__(
            self,
            x: torch.Tensor,
            weight: torch.Tensor,
            bias: Optional[torch.Tensor],
            needs_weight_grad: bool = False,
    ):
        """
        Args:
            x: The batch, ``(B, C, H, W)``, for its dtype and memory format alone.
            weight: ``(C_out, C, 1, 1)``, in the dtype of ``x`` or wider; gradients are summed in its dtype.
            bias: ``(C_out,)``, as ``weight``, or None.
            needs_weight_grad: Whether ``backward`` computes the gradient of the weight.
        """
        self.memory_format = dense_memory_format(x)
        dtype = x.dtype if self._in_batch_dtype else weight.dtype
        self.weight = weight.to(dtype)
        self.bias = None if bias is None else bias.to(dtype)
        self.weight_grad = weight.new_zeros(weight.shape) if needs_weight_grad else None
        self.bias_grad = weight.new_zeros(len(weight))

    def like_output(self, x: torch.Tensor) -> torch.Tensor:
        """What the output of a batch looks like, without memory."""
        shape = (len(x), len(self.weight), *x.shape[2:])
        return torch.empty(shape, dtype=x.dtype, device='meta', memory_format=self.memory_format)

    def forward(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """Write the convolution of a chunk into ``out``.

        Args:
            x: ``(B, C, H, W)``, in any dtype.
            out: ``(B, C_out, H, W)``.
        """
        out.copy_(F.conv2d(x.to(self.weight.dtype), self.weight, self.bias))

    def backward(self, grad: torch.Tensor, x: torch.Tensor, out: torch.Tensor) -> None:
        """Write the gradient of a chunk into ``out`` and add up those of weight and bias.

        Args:
            grad: Gradient of the output, ``(B, C_out, H, W)``.
            x: The chunk, ``(B, C, H, W)``, in any dtype.
            out: ``(B, C, H, W)``.
        """
        needs = True, self.weight_grad is not None, True
        grad, x = grad.to(self.weight.dtype), x.to(self.weight.dtype)
        x_grad, weight_grad, bias_grad = convolution_gradients_ref(grad, x, self.weight, needs)
        out.copy_(x_grad)
        self.bias_grad += bias_grad
        if self.weight_grad is not None:
            self.weight_grad += weight_grad


class PointwiseProducts(PointwiseConvolution):
    """A pointwise convolution as matrix products, in the dtype of the batch."""

    _in_batch_dtype = True

    def _matrices(self, x: torch.Tensor) -> torch.Tensor:
        """A view of a chunk: ``(1, positions, C)`` of it in channels last, else ``(C, H * W)`` of each image."""
        if self.memory_format == torch.channels_last:
            return x.permute(0, 2, 3, 1).flatten(0, 2).unsqueeze(0)
        return x.flatten(2)

    @functools.cached_property
    def _transposed_weight(self) -> torch.Tensor:
        # Contiguous: half-precision products of a transposed matrix with a batch copy it for every image.
        return self.weight.flatten(1).t().contiguous()

    def _factors(self, matrices: torch.Tensor, backward: bool) -> Tuple[torch.Tensor, torch.Tensor]:
        """What to multiply for the weight, ``backward`` its transpose, times each position of matrices."""
        if self.memory_format == torch.channels_last:
            return matrices, (self.weight.flatten(1) if backward else self._transposed_weight).unsqueeze(0)
        weight = self._transposed_weight if backward else self.weight.flatten(1)
        return weight.expand(len(matrices), -1, -1), matrices

    def forward(self, x: torch.Tensor, out: torch.Tensor) -> None:
        factors = self._factors(self._matrices(x.to(out.dtype)), backward=False)
        if self.bias is None:
            torch.bmm(*factors, out=self._matrices(out))
        else:
            bias = self.bias if self.memory_format == torch.channels_last else self.bias.view(-1, 1)
            torch.baddbmm(bias, *factors, out=self._matrices(out))

    def backward(self, grad: torch.Tensor, x: torch.Tensor, out: torch.Tensor) -> None:
        grads = self._matrices(grad)
        torch.bmm(*self._factors(grads, backward=True), out=self._matrices(out))
        self.bias_grad += grad.sum(dim=(0, 2, 3), dtype=self.bias_grad.dtype)
        if self.weight_grad is None:
            return
        total = self.weight_grad.flatten(1)
        for grad_matrix, x_matrix in zip(grads, self._matrices(x.to(grad.dtype))):
            if self.memory_format == torch.channels_last:
                total += grad_matrix.t().mm(x_matrix)
            else:
                total += grad_matrix.mm(x_matrix.t())


def make_pointwise(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor],
        needs_weight_grad: bool = False,
) -> PointwiseConvolution:
    """The faster way for the dtype of a batch; arguments as of ``PointwiseConvolution``."""
    in_half_precision = convolution_dtype(x.dtype) in (torch.bfloat16, torch.float16)
    return (PointwiseProducts if in_half_precision else PointwiseConvolution)(x, weight, bias, needs_weight_grad)
