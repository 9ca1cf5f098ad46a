"""A training segment on a CPU: a few images at a time, so that what one operation writes is in the cache for the next.

A loop over the chunks ends only where the whole batch must be known: for the statistics of a normalisation, and for the
sums in its gradient. Half precision is rounded to where PyTorch's layers round to it, or later: sums, statistics, the
depthwise convolution and the gradients of normalisations are in float32.
"""
from typing import Any, Iterator, List, Optional, Tuple

import torch
import torch.nn.functional as F

from ..activation import activate_backward_in_place, activate_into
from ..block_segment import SegmentGradients, SegmentTensors
from ..normalization import Affine, BatchNormalization
from ..support import opmath_dtype, suggest_memory_format
from .depthwise import depthwise_gradients
from .elementwise import affine_into, batch_statistics, norm_gradient_sums
from .memory import MapPool, keep_freed_memory
from .pointwise import make_pointwise

__all__ = ['CpuSegment']

# Bytes of a chunk in the dtype of the arithmetic. About ten chunks are in use at a time, which a cache should hold.
_CHUNK_BYTES = 4 << 20


class CpuSegment:
    """The forward and backward pass of :func:`timm_convmixer.kernels.block_segment.block_segment`."""

    def __init__(self, pool: Optional[MapPool] = None):
        """
        Args:
            pool: Memory for the feature maps that outlive a chunk.
        """
        self.pool = MapPool() if pool is None else pool
        keep_freed_memory()

    def forward(
            self,
            z: torch.Tensor,
            norm: Optional[BatchNormalization],
            spatial_norm: BatchNormalization,
            tensors: SegmentTensors,
    ) -> Tuple[torch.Tensor, torch.Tensor, Optional[Affine], Affine]:
        z = z.contiguous(memory_format=suggest_memory_format(z))
        chunks = _Chunks(z)
        tensors = tensors.to(chunks.dtype)
        pointwise = make_pointwise(z, tensors.pointwise_weight, tensors.pointwise_bias)
        (opmath_scratch, _), (scratch_1, scratch_2) = chunks.scratch()
        activated_z, affine = z, None
        if norm is not None:
            activated_z, statistics = self.pool.take(z), _Statistics(norm, z)
            for act_z, z_chunk in chunks(activated_z, z):
                statistics.add(activate_into(act_z, z_chunk, norm.act), scratch_1)
            affine = statistics.close()
        depthwise_out, activated_depthwise = self.pool.take(z), self.pool.take(z)
        statistics = _Statistics(spatial_norm, z)
        for act_z, depthwise_chunk, act_depthwise in chunks(activated_z, depthwise_out, activated_depthwise):
            x_chunk = _normalize(act_z.to(chunks.dtype), affine, opmath_scratch)
            depthwise_chunk.copy_(_depthwise(x_chunk, tensors))
            statistics.add(activate_into(act_depthwise, depthwise_chunk, spatial_norm.act), scratch_1)
        spatial_affine = statistics.close()
        out = self.pool.take(pointwise.like_output(z))
        for act_z, act_depthwise, out_chunk, drop_scale in chunks(
                activated_z, activated_depthwise, out, tensors.drop_path_scale):
            y_chunk = _mixed(act_z, affine, act_depthwise, spatial_affine, drop_scale, scratch_1, scratch_2)
            pointwise.forward(y_chunk, out_chunk)
        return out, depthwise_out, affine, spatial_affine

    def backward(
            self,
            grad: torch.Tensor,
            z: torch.Tensor,
            depthwise_out: Optional[torch.Tensor],
            affine: Optional[Affine],
            spatial_affine: Affine,
            tensors: SegmentTensors,
            needs_pointwise_weight: bool,
    ) -> SegmentGradients:
        memory_format = suggest_memory_format(z)
        z, grad = z.contiguous(memory_format=memory_format), grad.contiguous(memory_format=memory_format)
        chunks = _Chunks(z)
        tensors = tensors.to(chunks.dtype)
        pointwise = make_pointwise(z, tensors.pointwise_weight, tensors.pointwise_bias, needs_pointwise_weight)
        (opmath_scratch_1, opmath_scratch_2), (scratch_1, scratch_2) = chunks.scratch()
        activated_z = z if affine is None else self.pool.take(z)
        activated_depthwise, gradient = self.pool.take(z), self.pool.take(z)
        recompute_depthwise = depthwise_out is None
        if depthwise_out is None:
            depthwise_out = self.pool.take(z)

        spatial = _NormGradients(spatial_affine, z)
        for grad_chunk, z_chunk, act_z, depthwise_chunk, act_depthwise, y_grad, drop_scale in chunks(
                grad, z, activated_z, depthwise_out, activated_depthwise, gradient, tensors.drop_path_scale):
            if affine is not None:
                activate_into(act_z, z_chunk, affine.act)
            if recompute_depthwise:
                x_chunk = _normalize(act_z.to(chunks.dtype), affine, opmath_scratch_1)
                depthwise_chunk.copy_(_depthwise(x_chunk, tensors))
            activate_into(act_depthwise, depthwise_chunk, spatial_affine.act)
            y_chunk = _mixed(act_z, affine, act_depthwise, spatial_affine, drop_scale, scratch_1, scratch_2)
            pointwise.backward(grad_chunk, y_chunk, y_grad)
            spatial.add(_scaled(y_grad, drop_scale), act_depthwise)
        spatial.close()

        outer = None if affine is None else _NormGradients(affine, z)
        weight = tensors.depthwise_weight
        weight_grad, bias_grad = weight.new_zeros(weight.shape), weight.new_zeros(len(weight))
        for act_z, depthwise_chunk, act_depthwise, gradient_chunk, drop_scale in chunks(
                activated_z, depthwise_out, activated_depthwise, gradient, tensors.drop_path_scale):
            y_grad, act_z = gradient_chunk.to(chunks.dtype), act_z.to(chunks.dtype)
            depthwise_grad = spatial.backward(
                _scaled(y_grad, drop_scale),
                depthwise_chunk.to(chunks.dtype),
                act_depthwise.to(chunks.dtype),
                opmath_scratch_1,
            )
            x_chunk = _normalize(act_z, affine, opmath_scratch_2)
            x_grad, chunk_weight_grad = depthwise_gradients(depthwise_grad, x_chunk, weight)
            weight_grad += chunk_weight_grad
            bias_grad += depthwise_grad.sum(dim=(0, 2, 3))
            x_grad = torch.add(x_grad, y_grad, out=y_grad)
            gradient_chunk.copy_(x_grad)
            if outer is not None:
                outer.add(x_grad, act_z)
        if outer is not None:
            outer.close()
            for gradient_chunk, z_chunk, act_z in chunks(gradient, z, activated_z):
                z_grad = gradient_chunk.to(chunks.dtype)
                outer.backward(z_grad, z_chunk.to(chunks.dtype), act_z.to(chunks.dtype), out=z_grad)
                gradient_chunk.copy_(z_grad)
        return SegmentGradients(
            z=gradient,
            norm_weight=None if outer is None else outer.weight,
            norm_bias=None if outer is None else outer.bias,
            depthwise_weight=weight_grad,
            depthwise_bias=bias_grad,
            spatial_weight=spatial.weight,
            spatial_bias=spatial.bias,
            pointwise_weight=pointwise.weight_grad,
            pointwise_bias=pointwise.bias_grad,
        )


class _Chunks:
    """Splits feature maps into chunks of a few images."""

    def __init__(self, x: torch.Tensor):
        self.dtype = opmath_dtype(x.dtype)
        self._size = min(len(x), max(1, _CHUNK_BYTES // (x[0].numel() * self.dtype.itemsize)))
        self._chunk = x[:self._size]
        self._count = -(-len(x) // self._size)

    def __call__(self, *maps: Optional[torch.Tensor]) -> Iterator[Tuple[Any, ...]]:
        """The chunks of several feature maps, side by side; None for the chunks of None."""
        return zip(*[[None] * self._count if x is None else x.split(self._size) for x in maps])

    def scratch(self) -> Tuple[List[torch.Tensor], List[torch.Tensor]]:
        """Two buffers in ``dtype`` and two in the dtype of the maps; the same two where the dtypes are one.

        Of one chunk each, they serve all chunks and so stay in the cache.
        """
        opmath_scratch = [torch.empty_like(self._chunk, dtype=self.dtype) for _ in range(2)]
        if self._chunk.dtype == self.dtype:
            return opmath_scratch, opmath_scratch
        return opmath_scratch, [torch.empty_like(self._chunk) for _ in range(2)]


def _depthwise(x: torch.Tensor, tensors: SegmentTensors) -> torch.Tensor:
    return F.conv2d(x, tensors.depthwise_weight, tensors.depthwise_bias, padding='same', groups=x.shape[1])


def _normalize(x: torch.Tensor, affine: Optional[Affine], out: torch.Tensor) -> torch.Tensor:
    """``scale * x + shift`` of a normalisation, written into ``out``; ``x`` if there is none."""
    return x if affine is None else affine_into(out[:len(x)], x, affine.scale, affine.shift)


def _mixed(
        act_z: torch.Tensor,
        affine: Optional[Affine],
        act_depthwise: torch.Tensor,
        spatial_affine: Affine,
        drop_scale: Optional[torch.Tensor],
        out: torch.Tensor,
        scratch: torch.Tensor,
) -> torch.Tensor:
    """The input of the pointwise convolution, ``x + branch``, written into ``out``."""
    if affine is None or drop_scale is not None or act_z.dtype != affine.scale.dtype:
        branch = _scaled(_normalize(act_depthwise, spatial_affine, out), drop_scale)
        return branch.add_(_normalize(act_z, affine, scratch))
    # Both shifts in one pass.
    out = torch.mul(act_depthwise, spatial_affine.scale.view(-1, 1, 1), out=out[:len(act_z)])
    return out.addcmul_(act_z, affine.scale.view(-1, 1, 1)).add_((affine.shift + spatial_affine.shift).view(-1, 1, 1))


def _scaled(x: torch.Tensor, scale: Optional[torch.Tensor]) -> torch.Tensor:
    return x if scale is None else x * scale.to(x.dtype)


class _Statistics:
    """Statistics of a batch, chunk by chunk, and the affine that they make of a normalisation."""

    def __init__(self, norm: BatchNormalization, x: torch.Tensor):
        self._norm, self._dtype = norm, x.dtype
        self._running = norm.running_affine(x.dtype)
        self._chunks: List[Tuple[int, torch.Tensor, torch.Tensor]] = []

    def add(self, x: torch.Tensor, scratch: torch.Tensor) -> None:
        if self._running is None:
            self._chunks.append((x.numel() // x.shape[1], *batch_statistics(x, scratch[:len(x)])))

    def close(self) -> Affine:
        """Update the running statistics and return the affine."""
        if self._running is not None:
            return self._running
        counts, means, variances = zip(*self._chunks)
        means, variances = torch.stack(means), torch.stack(variances)
        shares = means.new_tensor(counts).div_(sum(counts)).view(-1, 1)
        mean = (shares * means).sum(0)
        var = (shares * (variances + (means - mean).square())).sum(0)
        return self._norm.batch_affine(self._dtype, mean, var, sum(counts))


class _NormGradients:
    """Gradients of ``norm(act(x))``: ``add`` every chunk, ``close``, then ``backward`` chunk by chunk."""

    def __init__(self, affine: Affine, x: torch.Tensor):
        self._affine, self._count = affine, x.numel() // x.shape[1]
        self.weight, self.bias = torch.zeros_like(affine.mean), torch.zeros_like(affine.mean)

    def add(self, grad: torch.Tensor, activated: torch.Tensor) -> None:
        sums, products = norm_gradient_sums(grad, activated, self._affine.mean)
        self.bias += sums
        self.weight += products

    def close(self) -> None:
        invstd = self._affine.invstd
        self.weight *= invstd
        self._scale = self._affine.scale.view(-1, 1, 1)
        # What the gradient through the statistics of the batch takes off, an affine of the activated map.
        self._factor = (self.weight * invstd / -self._count).view(-1, 1, 1)
        self._constant = (self.bias / -self._count).view(-1, 1, 1) - self._affine.mean.view(-1, 1, 1) * self._factor

    def backward(
            self,
            grad: torch.Tensor,
            x: torch.Tensor,
            activated: torch.Tensor,
            out: torch.Tensor,
    ) -> torch.Tensor:
        out = out[:len(grad)]
        if self._affine.batch_statistics:
            torch.addcmul(grad, activated, self._factor, out=out).add_(self._constant).mul_(self._scale)
        else:
            torch.mul(grad, self._scale, out=out)
        return activate_backward_in_place(out, x, self._affine.act)
