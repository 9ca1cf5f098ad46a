"""Depthwise mixing: `x + scale * act(depthwise_conv(x) + bias) + shift`, the first half of a ConvMixer block for
inference.

Patches Are All You Need? (https://arxiv.org/abs/2201.09792), section 2: `y = x + BN(act(depthwise(x)))`, with the
BatchNorm folded to `scale` and `shift`.
"""
from typing import List, NamedTuple, Optional

import torch
import torch.nn.functional as F

from .activation import activate, activate_backward
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

__all__ = ['depthwise_mixing', 'depthwise_mixing_ref', 'depthwise_mixing_support']


def depthwise_mixing_ref(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor],
        scale: torch.Tensor,
        shift: torch.Tensor,
        act: str = 'gelu',
) -> torch.Tensor:
    """`depthwise_mixing` in plain PyTorch."""
    y = F.conv2d(x, weight, None if bias is None else bias.to(x.dtype), padding='same', groups=weight.shape[0])
    y = activate(y, act)
    out = x + torch.addcmul(shift.view(-1, 1, 1), y, scale.view(-1, 1, 1))
    return out.to(y.dtype)


# The widest map and the largest kernel for which the banded matrices were checked to fit and pay.
MAX_WIDTH = 64
MAX_KERNEL_SIZE = 9


class DepthwiseConfig(NamedTuple):
    """How the kernel is launched: rows a group, row groups a tile, whether loads go first, warps, tiles a program."""
    group: int
    block_m: int
    prefetch: bool
    num_warps: int
    steps: int


def _offsets(height: int, kernel: int, group: int) -> int:
    """How many row groups a row group's receptive field touches: as many banded matrices are kept."""
    groups = -(-height // group)
    top = (kernel - 1) // 2
    first = max(-((top + group - 1) // group), 1 - groups)
    last = min((group - 1 + kernel - 1 - top) // group, groups - 1)
    return last + 1 - first


def _block_k(width: int, group: int) -> int:
    return max(16, 1 << (group * width - 1).bit_length())


def _steps(tiles: int, channels: int, processors: int) -> int:
    """Tiles a program: many, so that the bands of a channel are built once, yet enough programs for the chip."""
    build = 2.5  # tiles that building the bands is worth, from instruction counts

    def cost(steps: int) -> float:
        chunks = -(-tiles // steps)
        waves = -(-channels * chunks // (2 * processors))
        return waves * (steps + build)

    return min((1, 4, 16, 64), key=cost)


def candidates(
        batch: int,
        channels: int,
        height: int,
        width: int,
        kernel: int,
        itemsize: int,
        processors: int,
        shared_memory: int,
) -> List[DepthwiseConfig]:
    """The configurations worth trying, the default first; those that do not fit into shared memory are left out."""
    # Products of 64 columns keep the tensor cores busier than the shared memory that feeds them.
    widest = max(1, min(height, MAX_WIDTH // width))
    found = []
    for group, block_m, prefetch, num_warps in (
            (widest, 64, True, 4),
            (widest, 64, False, 4),
            (widest, 128, False, 8),
            (max(1, widest // 2), 128, True, 4),
    ):
        rows = batch * -(-height // group)
        if rows < 64:
            block_m, num_warps = 16, 4
        block_k = _block_k(width, group)
        offsets = _offsets(height, kernel, group)
        tiles_kept = offsets if prefetch else 1
        if itemsize * block_k * (offsets * block_k + tiles_kept * block_m) > shared_memory:
            continue
        steps = _steps(-(-rows // block_m), channels, processors)
        config = DepthwiseConfig(group, block_m, prefetch, num_warps, steps)
        if config not in found:
            found.append(config)
    return found


def taps_config(batch: int, channels: int, height: int, width: int, processors: int) -> DepthwiseConfig:
    """The configuration for the convolution tap by tap, which uses no matrix product and no shared memory."""
    group = max(1, min(height, MAX_WIDTH // width))
    tiles = -(-batch * -(-height // group) // 16)
    return DepthwiseConfig(group, 16, False, 4, _steps(tiles, channels, processors))


def run_kernel(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor],
        scale: torch.Tensor,
        shift: torch.Tensor,
        act: str,
        out: torch.Tensor,
        config: DepthwiseConfig,
        precision: str,
) -> None:
    """Launch the kernel into `out`. x and out: (B, C, H, W), contiguous but for the stride between images."""
    from .depthwise_triton import depthwise_mixing_kernel
    batch, channels, height, width = x.shape
    rows = batch * -(-height // config.group)
    chunks = -(-rows // (config.block_m * config.steps))
    launch(
        depthwise_mixing_kernel,
        channels * chunks,
        x,
        weight,
        scale if bias is None else bias,
        scale,
        shift,
        out,
        batch,
        channels,
        x.stride(0),
        out.stride(0),
        H=height,
        W=width,
        KERNEL=weight.shape[2],
        ACT=act,
        HAS_BIAS=bias is not None,
        PRECISION=precision,
        GROUP=config.group,
        BLOCK_M=config.block_m,
        BLOCK_K=_block_k(width, config.group),
        STEPS=config.steps,
        PREFETCH=config.prefetch,
        num_warps=config.num_warps,
        num_stages=1,
    )


def _forward(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor],
        scale: torch.Tensor,
        shift: torch.Tensor,
        act: str,
) -> torch.Tensor:
    if _refusal(x, weight, bias, scale, shift) or device_refusal(x.device):
        return depthwise_mixing_ref(x, weight, bias, scale, shift, act).contiguous()
    batch, channels = x.shape[0], x.shape[1]
    # The kernel is compiled for a map and a kernel size; under torch.compile with dynamic shapes this is where they
    # become fixed.
    height, width, kernel = int(x.shape[2]), int(x.shape[3]), int(weight.shape[2])
    processors, shared_memory = device_limits(x.device)
    precision = input_precision() if x.dtype == torch.float32 else 'tf32'
    bucket = batch_bucket(batch)
    configs: List[DepthwiseConfig] = []
    if not (x.dtype == torch.float32 and precision == 'ieee'):
        configs = candidates(bucket, channels, height, width, kernel, x.element_size(), processors, shared_memory)
    if not configs:
        precision = 'taps'
        configs = [taps_config(bucket, channels, height, width, processors)]
    out = torch.empty_like(x)
    key = ('depthwise', x.device, x.dtype, precision, bucket, channels, height, width, kernel)
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
    if x.shape[3] > MAX_WIDTH:
        return 'the map is wider than 64'
    if weight.dim() != 4 or weight.shape[0] != x.shape[1] or weight.shape[1] != 1:
        return 'weight is not of shape (C, 1, k, k)'
    if weight.shape[2] != weight.shape[3] or weight.shape[2] > MAX_KERNEL_SIZE:
        return 'the convolution kernel is not square or larger than 9'
    # Row groups and programs are counted in 32 bits; elements are not.
    if x.shape[0] * x.shape[2] >= 2 ** 30 or x.shape[0] * x.shape[1] * x.shape[2] >= 2 ** 34:
        return 'too many rows to count in 32 bits'
    return ''


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias, scale, shift, act = inputs
    ctx.save_for_backward(x, weight, bias, scale, shift)
    ctx.act = act


def _backward(ctx, grad):
    """The gradients in plain PyTorch; the convolution is computed again rather than kept."""
    x, weight, bias, scale, shift = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, needs_scale, needs_shift, _ = ctx.needs_input_grad
    channels, kernel = weight.shape[0], weight.shape[2]
    # 'same' padding of an even kernel is one more on the right and the bottom, which a convolution cannot express by
    # itself.
    extra, padding = 1 - kernel % 2, (kernel - 1) // 2
    padded = F.pad(x, (0, extra, 0, extra))
    z = F.conv2d(padded, weight, None if bias is None else bias.to(x.dtype), padding=padding, groups=channels)
    grad_scale = (grad * activate(z, ctx.act)).sum((0, 2, 3), dtype=scale.dtype) if needs_scale else None
    grad_shift = grad.sum((0, 2, 3), dtype=shift.dtype) if needs_shift else None
    grad_z = activate_backward((grad * scale.view(-1, 1, 1)).to(x.dtype), z, ctx.act)
    grad_padded, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        grad_z, padded, weight, [channels], [1, 1], [padding, padding], [1, 1], False, [0, 0], channels,
        [needs_x, needs_weight, bias is not None and needs_bias],
    )
    grad_x = grad + grad_padded[:, :, :x.shape[2], :x.shape[3]] if needs_x else None
    return grad_x, grad_weight, None if grad_bias is None else grad_bias.to(bias.dtype), grad_scale, grad_shift, None


def _fake(x, weight, bias, scale, shift, act):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_operator = define_operator('depthwise_mixing', _forward, _fake, _backward, _setup_context)


def depthwise_mixing_support(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor],
        scale: torch.Tensor,
        shift: torch.Tensor,
) -> KernelSupport:
    """Whether `depthwise_mixing` runs its Triton kernel on these tensors, and why."""
    x, weight, bias = autocast(x, weight, bias)
    return explain(_refusal(x, weight, bias, scale, shift), x)


def depthwise_mixing(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor],
        scale: torch.Tensor,
        shift: torch.Tensor,
        act: str = 'gelu',
) -> torch.Tensor:
    """Depthwise convolution with padding 'same', bias, activation, scale, shift and residual.

    Computes `x + scale * act(depthwise_conv(x, weight) + bias) + shift`; the plain PyTorch equivalent is
    `depthwise_mixing_ref`, which runs, silently, wherever no kernel does (`depthwise_mixing_support` says why): on a
    CPU, in channels_last, for maps wider than 64, for kernels larger than 9. The Triton kernel takes contiguous
    float32, float16 and bfloat16 CUDA tensors and accumulates and finishes in float32; float32 products are TF32 or
    IEEE as `torch.backends.cudnn` says for convolutions. Infinities and NaN reach the outputs that PyTorch's
    convolution lets them reach. Under autocast, x, weight and bias are cast as for `torch.nn.Conv2d`. Differentiable.

    Args:
        x: Input, (B, C, H, W).
        weight: Depthwise kernel, (C, 1, k, k), of the dtype of x. As in PyTorch, an even k pads one more on the right
            and the bottom.
        bias: (C,) or None; the dtype of x or float32, like scale and shift.
        scale: (C,), `weight / sqrt(running_var + eps)` of the BatchNorm that follows the activation.
        shift: (C,), `bias - running_mean * scale` of that BatchNorm.
        act: 'gelu' (with the error function), 'relu' or 'none'.

    Returns:
        (B, C, H, W), of the dtype of x (under autocast, of autocast's dtype).

    Raises:
        ValueError: An unknown act, or a bias, scale or shift that is not of shape (C,).
    """
    check_arguments(weight, bias, scale, shift, act)
    x, weight, bias = autocast(x, weight, bias)
    if _refusal(x, weight, bias, scale, shift):
        return depthwise_mixing_ref(x, weight, bias, scale, shift, act)
    return _operator(x, weight, bias, scale, shift, act)
