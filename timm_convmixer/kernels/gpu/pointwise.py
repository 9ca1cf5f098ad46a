"""Pointwise mixing: `scale * act(conv1x1(x) + bias) + shift`, the second half of a ConvMixer block for inference.

Patches Are All You Need? (https://arxiv.org/abs/2201.09792), section 2: `BN(act(pointwise(y)))`, with the BatchNorm
folded to `scale` and `shift`.
"""
from typing import List, NamedTuple, Optional, Sequence

import torch
import torch.nn.functional as F

from ..activation import activate, activate_backward
from .support import (
    KernelSupport,
    autocast,
    check_arguments,
    define_operator,
    device_limits,
    device_refusal,
    explain,
    input_precision,
    launch,
    refusal,
)
from .tuning import batch_bucket, choose

__all__ = ['pointwise_mixing', 'pointwise_mixing_ref', 'pointwise_mixing_support']


def pointwise_mixing_ref(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor],
        scale: torch.Tensor,
        shift: torch.Tensor,
        act: str = 'gelu',
) -> torch.Tensor:
    """`pointwise_mixing` in plain PyTorch."""
    y = activate(F.conv2d(x, weight, None if bias is None else bias.to(x.dtype)), act)
    return torch.addcmul(shift.view(-1, 1, 1), y, scale.view(-1, 1, 1)).to(y.dtype)


class PointwiseConfig(NamedTuple):
    """How the kernel is launched: output channels and positions per tile, depth of a step, warps, steps in flight."""
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


# From large tiles, which read each operand least often, to small ones, of which there are enough for a single image.
_CONFIGS_16_BIT = (
    PointwiseConfig(128, 256, 64, 8, 3),
    PointwiseConfig(128, 128, 64, 8, 3),
    PointwiseConfig(128, 128, 64, 4, 3),
    PointwiseConfig(64, 128, 64, 4, 3),
    PointwiseConfig(64, 64, 64, 4, 4),
    PointwiseConfig(64, 32, 64, 4, 4),
)
# Where rows of x are not aligned to 16 bytes (7 x 7 or 14 x 14 maps), addresses take registers that large tiles have
# not left.
_CONFIGS_UNALIGNED = (
    PointwiseConfig(128, 128, 64, 8, 3),
    PointwiseConfig(64, 64, 64, 4, 4),
    PointwiseConfig(64, 32, 64, 4, 4),
)
_CONFIGS_32_BIT = (
    PointwiseConfig(128, 128, 32, 8, 3),
    PointwiseConfig(64, 128, 32, 4, 3),
    PointwiseConfig(64, 64, 32, 4, 3),
    PointwiseConfig(64, 32, 32, 4, 3),
)
# No tensor cores: the products are ordinary multiply-adds.
_CONFIGS_IEEE = (
    PointwiseConfig(64, 128, 16, 8, 3),
    PointwiseConfig(64, 64, 16, 4, 3),
    PointwiseConfig(32, 32, 16, 4, 3),
)


def candidates(
        batch: int,
        out_channels: int,
        positions: int,
        itemsize: int,
        precision: str,
        processors: int,
        shared_memory: int,
) -> List[PointwiseConfig]:
    """The configurations worth trying, first the largest tile of which there is one for every processor."""
    configs: Sequence[PointwiseConfig]
    if itemsize == 2:
        configs = _CONFIGS_16_BIT if positions % 8 == 0 else _CONFIGS_UNALIGNED
    else:
        configs = _CONFIGS_IEEE if precision == 'ieee' else _CONFIGS_32_BIT
    fitting = [c for c in configs if itemsize * c.num_stages * c.block_k * (c.block_m + c.block_n) <= shared_memory]
    for first, config in enumerate(fitting):  # noqa: B007, what is wanted is where it stops
        if -(-out_channels // config.block_m) * -(-batch * positions // config.block_n) >= processors:
            break
    return fitting[first:first + 3] + fitting[max(0, first - 1):first]


def run_kernel(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor],
        scale: torch.Tensor,
        shift: torch.Tensor,
        act: str,
        out: torch.Tensor,
        config: PointwiseConfig,
        precision: str,
) -> None:
    """Launch the kernel into `out`.

    x: (B, C_in, H, W), out: (B, C_out, H, W), contiguous but for the stride between images.
    """
    from .pointwise_triton import pointwise_mixing_kernel
    batch, out_channels, positions = x.shape[0], weight.shape[0], x.shape[2] * x.shape[3]
    programs = -(-out_channels // config.block_m) * -(-batch * positions // config.block_n)
    launch(
        pointwise_mixing_kernel,
        programs,
        x,
        weight,
        scale if bias is None else bias,
        scale,
        shift,
        out,
        batch,
        out_channels,
        x.stride(0),
        out.stride(0),
        IN_CHANNELS=int(x.shape[1]),
        POSITIONS=int(positions),
        ACT=act,
        HAS_BIAS=bias is not None,
        PRECISION=precision,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def _output_shape(x: torch.Tensor, weight: torch.Tensor) -> List[int]:
    return [x.shape[0], weight.shape[0], x.shape[2], x.shape[3]]


def _forward(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor],
        scale: torch.Tensor,
        shift: torch.Tensor,
        act: str,
) -> torch.Tensor:
    if _refusal(x, weight, bias, scale, shift) or device_refusal(x.device):
        return pointwise_mixing_ref(x, weight, bias, scale, shift, act).contiguous()
    positions = int(x.shape[2] * x.shape[3])
    processors, shared_memory = device_limits(x.device)
    precision = input_precision() if x.dtype == torch.float32 else 'tf32'
    bucket = batch_bucket(x.shape[0])
    configs = candidates(
        bucket, weight.shape[0], positions, x.element_size(), precision, processors, shared_memory)
    out = x.new_empty(_output_shape(x, weight))
    key = ('pointwise', x.device, x.dtype, precision, bucket, weight.shape[0], weight.shape[1], positions)
    config = choose(
        key, configs, lambda c: run_kernel(x, weight, bias, scale, shift, act, out, c, precision), x)
    run_kernel(x, weight, bias, scale, shift, act, out, config, precision)
    return out


def _refusal(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor],
        scale: torch.Tensor,
        shift: torch.Tensor,
) -> str:
    reason = refusal(x, weight, bias, scale, shift)
    if reason:
        return reason
    if weight.dim() != 4 or weight.shape[2] != 1 or weight.shape[3] != 1 or weight.shape[1] != x.shape[1]:
        return 'weight is not of shape (C_out, C, 1, 1)'
    # Positions and programs are counted in 32 bits; elements are not.
    if x.shape[0] * x.shape[2] * x.shape[3] >= 2 ** 30:
        return 'too many positions to count in 32 bits'
    return ''


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias, scale, shift, act = inputs
    ctx.save_for_backward(x, weight, bias, scale, shift)
    ctx.act = act


def _backward(ctx, grad):
    """The gradients in plain PyTorch; the convolution is computed again rather than kept."""
    x, weight, bias, scale, shift = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, needs_scale, needs_shift, _ = ctx.needs_input_grad
    z = F.conv2d(x, weight, None if bias is None else bias.to(x.dtype))
    grad_scale = (grad * activate(z, ctx.act)).sum((0, 2, 3), dtype=scale.dtype) if needs_scale else None
    grad_shift = grad.sum((0, 2, 3), dtype=shift.dtype) if needs_shift else None
    grad_z = activate_backward((grad * scale.view(-1, 1, 1)).to(x.dtype), z, ctx.act)
    grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        grad_z, x, weight, [weight.shape[0]], [1, 1], [0, 0], [1, 1], False, [0, 0], 1,
        [needs_x, needs_weight, bias is not None and needs_bias],
    )
    return grad_x, grad_weight, None if grad_bias is None else grad_bias.to(bias.dtype), grad_scale, grad_shift, None


def _fake(x, weight, bias, scale, shift, act):
    return x.new_empty(_output_shape(x, weight))


_operator = define_operator('pointwise_mixing', _forward, _fake, _backward, _setup_context)


def pointwise_mixing_support(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor],
        scale: torch.Tensor,
        shift: torch.Tensor,
) -> KernelSupport:
    """Whether `pointwise_mixing` runs its Triton kernel on these tensors, and why."""
    x, weight, bias = autocast(x, weight, bias)
    return explain(_refusal(x, weight, bias, scale, shift), x)


def pointwise_mixing(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor],
        scale: torch.Tensor,
        shift: torch.Tensor,
        act: str = 'gelu',
) -> torch.Tensor:
    """1x1 convolution, bias, activation, scale and shift.

    Computes `scale * act(conv1x1(x, weight) + bias) + shift`; the plain PyTorch equivalent is `pointwise_mixing_ref`,
    which runs, silently, wherever no kernel does (`pointwise_mixing_support` says why): on a CPU, in channels_last. The
    Triton kernel takes contiguous float32, float16 and bfloat16 CUDA tensors and accumulates and finishes in float32;
    float32 products are TF32 or IEEE as `torch.backends.cudnn` says for convolutions. Under autocast, x, weight and
    bias are cast as for `torch.nn.Conv2d`. Differentiable.

    Args:
        x: Input, (B, C_in, H, W).
        weight: (C_out, C_in, 1, 1), of the dtype of x.
        bias: (C_out,) or None; the dtype of x or float32, like scale and shift.
        scale: (C_out,), `weight / sqrt(running_var + eps)` of the BatchNorm that follows the activation.
        shift: (C_out,), `bias - running_mean * scale` of that BatchNorm.
        act: 'gelu' (with the error function), 'relu' or 'none'.

    Returns:
        (B, C_out, H, W), of the dtype of x (under autocast, of autocast's dtype).

    Raises:
        ValueError: An unknown act, or a bias, scale or shift that is not of shape (C_out,).
    """
    check_arguments(weight, bias, scale, shift, act)
    x, weight, bias = autocast(x, weight, bias)
    if _refusal(x, weight, bias, scale, shift):
        return pointwise_mixing_ref(x, weight, bias, scale, shift, act)
    return _operator(x, weight, bias, scale, shift, act)
