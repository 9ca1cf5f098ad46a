"""Activation and normalisation over (B, H, W), in the order of ConvMixer and in few passes over memory, for training.

Patches Are All You Need? (https://arxiv.org/abs/2201.09792), section 2: `BN(act(...))`. What the autograd of the two by
themselves would keep is computed again on the fly, so that of a block only the outputs of its convolutions need be
kept. None of these functions is differentiable; together they are a forward and a backward pass.
"""
from typing import Optional, Tuple

import torch

from ..activation import activate, activate_backward
from .support import ACTIVATIONS, KernelSupport, device_limits, device_refusal, explain, launch, map_refusal

__all__ = [
    'activation_affine',
    'activation_affine_ref',
    'activation_norm_backward',
    'activation_norm_backward_ref',
    'activation_norm_support',
    'activation_statistics',
    'activation_statistics_ref',
    'runs_activation_norm_kernels',
]

# Elements of a tile: 16 for each thread of 4 warps, enough loads in flight and registers for all of them.
_TILE = 2048
_MAX_WIDTH = 1024
# Parts that a sum over a channel is computed in, at most.
_MAX_CHUNKS = 64
# Channels whose parts one program merges.
MERGED_CHANNELS = 32


def _wide(x: torch.Tensor) -> torch.dtype:
    """The dtype of the arithmetic: float64 for float64, float32 for the rest."""
    return torch.promote_types(x.dtype, torch.float32)


def activation_statistics_ref(x: torch.Tensor, act: str) -> Tuple[torch.Tensor, torch.Tensor]:
    """`activation_statistics` in plain PyTorch."""
    var, mean = torch.var_mean(activate(x.to(_wide(x)), act), dim=(0, 2, 3), correction=0)
    return mean, var


def activation_affine_ref(
        x: torch.Tensor,
        scale: torch.Tensor,
        shift: torch.Tensor,
        act: str,
        residual: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """`activation_affine` in plain PyTorch."""
    dtype = _wide(x)
    scale, shift = scale.to(dtype).view(-1, 1, 1), shift.to(dtype).view(-1, 1, 1)
    out = torch.addcmul(shift, activate(x.to(dtype), act), scale)
    if residual is not None:
        out = out + residual
    return out.to(x.dtype)


def activation_norm_backward_ref(
        grad: torch.Tensor,
        x: torch.Tensor,
        act: str,
        weight: Optional[torch.Tensor],
        mean: torch.Tensor,
        invstd: torch.Tensor,
        batch_statistics: bool,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`activation_norm_backward` in plain PyTorch."""
    dtype = _wide(x)
    grad, wide_x, invstd = grad.to(dtype), x.to(dtype), invstd.to(dtype)
    centered = activate(wide_x, act) - mean.to(dtype).view(-1, 1, 1)
    grad_bias = grad.sum(dim=(0, 2, 3))
    grad_weight = (grad * centered).sum(dim=(0, 2, 3)) * invstd
    if batch_statistics:
        count = x.numel() / x.shape[1]
        explained = torch.addcmul(
            (grad_bias / count).view(-1, 1, 1), centered, (grad_weight * invstd / count).view(-1, 1, 1))
        grad = grad - explained
    scale = invstd if weight is None else invstd * weight.to(dtype)
    grad_x = activate_backward(grad * scale.view(-1, 1, 1), wide_x, act)
    return grad_x.to(x.dtype), grad_weight, grad_bias


def _refusal(x: torch.Tensor, *others: Optional[torch.Tensor]) -> str:
    reason = map_refusal(x) or device_refusal(x.device)
    if reason:
        return reason
    for other in others:
        if other is not None and (other.dtype == torch.float64 or other.device != x.device):
            return 'the other tensors must not be float64, and on the device of x'
    # Planes and positions are counted in 32 bits; elements are not.
    if x.shape[0] * x.shape[1] >= 2 ** 30 or x.shape[2] * x.shape[3] >= 2 ** 30:
        return 'too many planes or positions to count in 32 bits'
    return ''


def _check_act(act: str) -> None:
    if act not in ACTIVATIONS:
        raise ValueError(f'act must be one of {ACTIVATIONS}, got {act!r}')


def _check_vectors(x: torch.Tensor, **vectors: Optional[torch.Tensor]) -> None:
    for name, vector in vectors.items():
        if vector is not None and (vector.dim() != 1 or vector.shape[0] != x.shape[1]):
            raise ValueError(f'{name} must have shape ({x.shape[1]},), one per channel, got {tuple(vector.shape)}')


def _check_maps(x: torch.Tensor, **maps: Optional[torch.Tensor]) -> None:
    for name, other in maps.items():
        if other is not None and other.shape != x.shape:
            raise ValueError(f'{name} must have the shape of x, {tuple(x.shape)}, got {tuple(other.shape)}')


def tile_shape(positions: int) -> Tuple[int, int]:
    """Planes and width of a tile."""
    width = max(16, min(_MAX_WIDTH, 1 << (positions - 1).bit_length()))
    return _TILE // width, width


def images_per_program(batch: int, channels: int, planes: int, processors: int) -> int:
    """Images that one program sums over: so few that there are programs for the chip, a whole number of tiles."""
    chunks = min(_MAX_CHUNKS, -(-64 * processors // channels), -(-batch // planes))
    return -(-batch // (chunks * planes)) * planes


def chunks_to_merge(batch: int, images: int) -> int:
    """Parts of a sum when programs sum over `images` images each, rounded up to a power of two."""
    return 1 << (-(-batch // images) - 1).bit_length()


def _sum_shape(x: torch.Tensor) -> Tuple[int, int, int, int]:
    """Images per program, chunks of images, planes and width of a tile, of a kernel that sums over channels."""
    planes, width = tile_shape(x.shape[2] * x.shape[3])
    images = images_per_program(x.shape[0], x.shape[1], planes, device_limits(x.device)[0])
    return images, -(-x.shape[0] // images), planes, width


def _map_programs(x: torch.Tensor) -> Tuple[int, int, int]:
    """Programs, planes and width of a tile, of a kernel that goes element by element."""
    planes, width = tile_shape(x.shape[2] * x.shape[3])
    return -(-x.shape[0] * x.shape[1] // planes) * -(-x.shape[2] * x.shape[3] // width), planes, width


def run_statistics(x: torch.Tensor, act: str, mean: torch.Tensor, var: torch.Tensor) -> None:
    """Launch the kernels into `mean` and `var`."""
    from .activation_norm_triton import merge_statistics_kernel, statistics_kernel
    batch, channels, height, width = x.shape
    images, chunks, planes, tile_width = _sum_shape(x)
    partial = x.new_empty((2, chunks, channels), dtype=torch.float32)
    launch(
        statistics_kernel,
        channels * chunks,
        x,
        partial,
        batch,
        channels,
        POSITIONS=height * width,
        ACT=act,
        IMAGES=images,
        PLANES=planes,
        WIDTH=tile_width,
        num_warps=4,
    )
    launch(
        merge_statistics_kernel,
        -(-channels // MERGED_CHANNELS),
        partial,
        mean,
        var,
        batch,
        channels,
        POSITIONS=height * width,
        IMAGES=images,
        CHUNKS=chunks_to_merge(batch, images),
        BLOCK=MERGED_CHANNELS,
        num_warps=1,
    )


def run_affine(
        x: torch.Tensor,
        scale: torch.Tensor,
        shift: torch.Tensor,
        act: str,
        residual: Optional[torch.Tensor],
        out: torch.Tensor,
) -> None:
    """Launch the kernel into `out`."""
    from .activation_norm_triton import affine_kernel
    programs, planes, width = _map_programs(x)
    launch(
        affine_kernel,
        programs,
        x,
        scale,
        shift,
        x if residual is None else residual,
        out,
        x.shape[0] * x.shape[1],
        x.shape[1],
        POSITIONS=x.shape[2] * x.shape[3],
        ACT=act,
        HAS_RESIDUAL=residual is not None,
        PLANES=planes,
        WIDTH=width,
        num_warps=4,
    )


def run_gradient_sums(grad: torch.Tensor, x: torch.Tensor, act: str, mean: torch.Tensor) -> torch.Tensor:
    """The sums over each channel of grad and of grad * (act(x) - mean), (2, C)."""
    from .activation_norm_triton import gradient_sums_kernel
    images, chunks, planes, width = _sum_shape(x)
    partial = x.new_empty((2, chunks, x.shape[1]), dtype=torch.float32)
    launch(
        gradient_sums_kernel,
        x.shape[1] * chunks,
        grad,
        x,
        mean,
        partial,
        x.shape[0],
        x.shape[1],
        POSITIONS=x.shape[2] * x.shape[3],
        ACT=act,
        IMAGES=images,
        PLANES=planes,
        WIDTH=width,
        num_warps=4,
    )
    return partial.sum(dim=1)


def run_input_gradient(
        grad: torch.Tensor,
        x: torch.Tensor,
        act: str,
        weight: Optional[torch.Tensor],
        mean: torch.Tensor,
        invstd: torch.Tensor,
        grad_weight: torch.Tensor,
        grad_bias: torch.Tensor,
        batch_statistics: bool,
        out: torch.Tensor,
) -> None:
    """Launch the kernel into `out`."""
    from .activation_norm_triton import input_gradient_kernel
    programs, planes, width = _map_programs(x)
    launch(
        input_gradient_kernel,
        programs,
        grad,
        x,
        invstd if weight is None else weight,
        mean,
        invstd,
        grad_weight,
        grad_bias,
        out,
        x.shape[0] * x.shape[1],
        x.shape[1],
        POSITIONS=x.shape[2] * x.shape[3],
        ACT=act,
        HAS_WEIGHT=weight is not None,
        BATCH_STATISTICS=batch_statistics,
        PLANES=planes,
        WIDTH=width,
        num_warps=4,
    )


def runs_activation_norm_kernels(x: torch.Tensor) -> bool:
    """`activation_norm_support` without a reason, which costs too much to word before every pass over a map."""
    return not _refusal(x)


def activation_norm_support(x: torch.Tensor) -> KernelSupport:
    """Whether the functions of this file run their Triton kernels on a map `x`, and why."""
    return explain(_refusal(x), x)


def activation_statistics(x: torch.Tensor, act: str) -> Tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance of `act(x)` over (B, H, W); the plain PyTorch equivalent is `activation_statistics_ref`.

    The Triton kernel takes what `activation_norm_support` says, in two deterministic stages and without cancellation
    (Welford's method). A channel that holds an infinity or NaN has statistics that are not finite.

    Args:
        x: Map, (B, C, H, W).
        act: 'gelu' (with the error function), 'relu' or 'none'.

    Returns:
        mean and var, each (C,), float64 for x in float64, else float32.

    Raises:
        ValueError: An unknown act.
    """
    _check_act(act)
    if _refusal(x):
        return activation_statistics_ref(x, act)
    mean, var = x.new_empty((2, x.shape[1]), dtype=torch.float32)
    run_statistics(x, act, mean, var)
    return mean, var


def activation_affine(
        x: torch.Tensor,
        scale: torch.Tensor,
        shift: torch.Tensor,
        act: str,
        residual: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """`act(x) * scale + shift`, plus the residual if there is one; in plain PyTorch `activation_affine_ref`.

    Args:
        x: Map, (B, C, H, W).
        scale: (C,), float32 (float64 for x in float64).
        shift: (C,), of the same dtype.
        act: 'gelu' (with the error function), 'relu' or 'none'.
        residual: (B, C, H, W) or None.

    Returns:
        (B, C, H, W), of the dtype of x.

    Raises:
        ValueError: An unknown act, or a tensor of another shape.
    """
    _check_act(act)
    _check_vectors(x, scale=scale, shift=shift)
    _check_maps(x, residual=residual)
    if _refusal(x, scale, shift, residual):
        return activation_affine_ref(x, scale, shift, act, residual)
    out = torch.empty_like(x)
    residual = None if residual is None else residual.contiguous()
    run_affine(x, scale.float().contiguous(), shift.float().contiguous(), act, residual, out)
    return out


def activation_norm_backward(
        grad: torch.Tensor,
        x: torch.Tensor,
        act: str,
        weight: Optional[torch.Tensor],
        mean: torch.Tensor,
        invstd: torch.Tensor,
        batch_statistics: bool,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `weight * (act(x) - mean) * invstd + bias`; in plain PyTorch `activation_norm_backward_ref`.

    Two passes, one for the sums over each channel (deterministic) and one for the map; `act(x)` is computed in both.

    Args:
        grad: Gradient of the result, (B, C, H, W).
        x: Map, (B, C, H, W).
        act: 'gelu' (with the error function), 'relu' or 'none'.
        weight: (C,), or None for ones.
        mean: (C,), float32 (float64 for x in float64), as are the rest.
        invstd: `1 / sqrt(var + eps)`, (C,).
        batch_statistics: Whether mean and invstd are those of x itself, through which x has a gradient as well, and not
            fixed ones, such as the running statistics of a BatchNorm in eval mode.

    Returns:
        The gradients with respect to x, of its shape and dtype; to weight (also where it is None); to bias. The last
        two (C,), float64 for x in float64, else float32.

    Raises:
        ValueError: An unknown act, or a tensor of another shape.
    """
    _check_act(act)
    _check_vectors(x, weight=weight, mean=mean, invstd=invstd)
    _check_maps(x, grad=grad)
    if _refusal(x, grad, weight, mean, invstd):
        return activation_norm_backward_ref(grad, x, act, weight, mean, invstd, batch_statistics)
    grad = grad.contiguous()
    mean, invstd = mean.float().contiguous(), invstd.float().contiguous()
    weight = None if weight is None else weight.contiguous()
    grad_bias, grad_weight = run_gradient_sums(grad, x, act, mean)
    grad_weight = grad_weight * invstd
    out = torch.empty_like(x)
    run_input_gradient(grad, x, act, weight, mean, invstd, grad_weight, grad_bias, batch_statistics, out)
    return out, grad_weight, grad_bias
