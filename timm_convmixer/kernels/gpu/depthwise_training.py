"""Depthwise convolution for training: the convolution by itself and its gradients, each an operator.

Patches Are All You Need? (https://arxiv.org/abs/2201.09792), section 2: the `depthwise` of `x + BN(act(depthwise(x)))`.
Each of the three is bilinear, and the derivatives of each are the other two, so they can be differentiated any number
of times.
"""
from typing import List, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F

from ..cpu.depthwise import depthwise_input_gradient_cpu
from .depthwise_launch import MAX_WIDTH, block_k, depthwise_refusal, offsets_of, round_up, run, steps_of
from .support import (
    KernelSupport,
    autocast,
    define_operator,
    device_limits,
    device_refusal,
    explain,
    input_precision,
    launch,
)
from .tuning import batch_bucket, choose

__all__ = [
    'depthwise_convolution',
    'depthwise_convolution_ref',
    'depthwise_convolution_support',
    'depthwise_input_gradient',
    'depthwise_input_gradient_ref',
    'depthwise_weight_gradient',
    'depthwise_weight_gradient_ref',
]


def depthwise_convolution_ref(x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor]) -> torch.Tensor:
    """`depthwise_convolution` in plain PyTorch."""
    return F.conv2d(x, weight, None if bias is None else bias.to(x.dtype), padding='same', groups=weight.shape[0])


def depthwise_input_gradient_ref(
        grad: torch.Tensor,
        weight: torch.Tensor,
        residual: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """`depthwise_input_gradient` in plain PyTorch."""
    out = depthwise_input_gradient_cpu(grad, weight)
    return out if residual is None else (out + residual).to(out.dtype)


def depthwise_weight_gradient_ref(
        x: torch.Tensor,
        grad: torch.Tensor,
        kernel_size: int,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """`depthwise_weight_gradient` in plain PyTorch."""
    channels = x.shape[1]
    extra, padding = 1 - kernel_size % 2, (kernel_size - 1) // 2
    padded = F.pad(x, (0, extra, 0, extra)) if extra else x
    weight = x.new_empty(channels, 1, kernel_size, kernel_size)
    _, weight_grad, bias_grad = torch.ops.aten.convolution_backward(
        grad, padded, weight, [channels], [1, 1], [padding, padding], [1, 1], False, [0, 0], channels,
        [False, True, True],
    )
    dtype = torch.promote_types(x.dtype, torch.float32)
    return weight_grad.to(dtype), bias_grad.to(dtype)


class WeightGradientConfig(NamedTuple):
    """How the kernel is launched: rows a group, row groups a tile, warps, loads in flight, tiles a program."""
    group: int
    block_m: int
    num_warps: int
    num_stages: int
    steps: int


def weight_gradient_candidates(
        batch: int,
        channels: int,
        height: int,
        width: int,
        kernel: int,
        itemsize: int,
        precision: str,
        processors: int,
        shared_memory: int,
) -> List[WeightGradientConfig]:
    """The configurations worth trying, the default first; none if registers or shared memory are too small."""
    # Narrower than the kernel, diagonals of different rows would fall together.
    group = max(1, min(height, MAX_WIDTH // width)) if width >= kernel else 1
    columns, offsets = block_k(width, group), offsets_of(height, kernel, group)
    # A product is `columns` squared sums in fp32, for which a thread has room for about a hundred. Without tensor cores
    # the operands are in registers as well, and of 16 warps no thread has enough.
    without_tensor_cores = itemsize == 4 and precision == 'ieee'
    room, sizes = (80, (4, 8)) if without_tensor_cores else (96, (4, 8, 16))
    fitting = [num_warps for num_warps in sizes if offsets * columns * columns <= room * 32 * num_warps]
    rows = batch * -(-height // group)
    found: List[WeightGradientConfig] = []
    for block_m, num_stages in ((64, 3), (64, 2), (32, 3), (64, 1)):
        if rows < 64 or without_tensor_cores:
            block_m, num_stages = 16, 1
        tiles_kept = num_stages * (offsets + 1) if num_stages > 1 else 2
        if not fitting or itemsize * columns * block_m * tiles_kept > shared_memory:
            continue
        steps = steps_of(-(-rows // block_m), channels, processors)
        config = WeightGradientConfig(group, block_m, fitting[0], num_stages, steps)
        if config not in found:
            found.append(config)
    return found


def run_weight_gradient(
        x: torch.Tensor,
        grad: torch.Tensor,
        weight_grad: torch.Tensor,
        bias_grad: torch.Tensor,
        config: WeightGradientConfig,
        precision: str,
) -> None:
    """Launch the kernels into `weight_grad` and `bias_grad`, float32.

    x and grad: (B, C, H, W), contiguous but for the stride between images.
    """
    from .depthwise_weight_gradient_triton import merge_weight_gradient_kernel, weight_gradient_kernel
    batch, channels, height, width = x.shape
    kernel = weight_grad.shape[2]
    rows = batch * -(-height // config.group)
    chunks = -(-rows // (config.block_m * config.steps))
    columns = block_k(width, config.group)
    constants = dict(
        H=height,
        W=width,
        KERNEL=kernel,
        GROUP=config.group,
        BLOCK_K=columns,
        TAPS=round_up(kernel * kernel + 1),
    )
    slots = offsets_of(height, kernel, config.group) * 2 * columns + kernel * kernel + 1
    partial = x.new_empty((chunks, channels, slots), dtype=torch.float32)
    launch(
        weight_gradient_kernel,
        channels * chunks,
        x,
        grad,
        partial,
        batch,
        channels,
        x.stride(0),
        grad.stride(0),
        PRECISION=precision,
        BLOCK_M=config.block_m,
        STEPS=config.steps,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **constants,
    )
    launch(
        merge_weight_gradient_kernel,
        channels,
        partial,
        weight_grad,
        bias_grad,
        chunks,
        channels,
        CHUNKS=round_up(chunks),
        num_warps=1,
        **constants,
    )


def _same_map_refusal(x: torch.Tensor, other: Optional[torch.Tensor]) -> str:
    if other is None or (
            other.shape == x.shape and other.device == x.device and other.dtype == x.dtype and other.is_contiguous()):
        return ''
    return 'the two maps differ in shape, dtype, device or layout'


def _weight_refusal(x: torch.Tensor, grad: torch.Tensor, kernel_size: int) -> str:
    # A stand-in for the weight, of which only shape and dtype matter.
    reason = depthwise_refusal(x, x.new_empty(x.shape[1], 1, kernel_size, kernel_size))
    return reason or _same_map_refusal(x, grad)


def _convolution_forward(x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor]) -> torch.Tensor:
    if depthwise_refusal(x, weight, bias) or device_refusal(x.device):
        return depthwise_convolution_ref(x, weight, bias).contiguous()
    return run('depthwise_convolution', x, weight, bias=bias)


def _input_gradient_forward(
        grad: torch.Tensor,
        weight: torch.Tensor,
        residual: Optional[torch.Tensor],
) -> torch.Tensor:
    if depthwise_refusal(grad, weight) or _same_map_refusal(grad, residual) or device_refusal(grad.device):
        return depthwise_input_gradient_ref(grad, weight, residual).contiguous()
    return run('depthwise_input_gradient', grad, weight, flip=True, residual=residual)


def _weight_gradient_forward(
        x: torch.Tensor,
        grad: torch.Tensor,
        kernel_size: int,
) -> Tuple[torch.Tensor, torch.Tensor]:
    if _weight_refusal(x, grad, kernel_size) or device_refusal(x.device):
        return depthwise_weight_gradient_ref(x, grad, kernel_size)
    batch, channels, height, width = x.shape[0], int(x.shape[1]), int(x.shape[2]), int(x.shape[3])
    processors, shared_memory = device_limits(x.device)
    precision = input_precision() if x.dtype == torch.float32 else 'tf32'
    bucket = batch_bucket(batch)
    configs = weight_gradient_candidates(
        bucket, channels, height, width, kernel_size, x.element_size(), precision, processors, shared_memory)
    if not configs:
        return depthwise_weight_gradient_ref(x, grad, kernel_size)
    weight_grad = x.new_empty((channels, 1, kernel_size, kernel_size), dtype=torch.float32)
    bias_grad = x.new_empty((channels,), dtype=torch.float32)
    key = ('depthwise_weight_gradient', x.device, x.dtype, precision, bucket, channels, height, width, kernel_size)
    config = choose(
        key, configs, lambda c: run_weight_gradient(x, grad, weight_grad, bias_grad, c, precision), x)
    run_weight_gradient(x, grad, weight_grad, bias_grad, config, precision)
    return weight_grad, bias_grad


def _convolution_fake(x, weight, bias):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _input_gradient_fake(grad, weight, residual):
    return torch.empty_like(grad, memory_format=torch.contiguous_format)


def _weight_gradient_fake(x, grad, kernel_size):
    dtype = torch.promote_types(x.dtype, torch.float32)
    channels = x.shape[1]
    return x.new_empty((channels, 1, kernel_size, kernel_size), dtype=dtype), x.new_empty((channels,), dtype=dtype)


def _save_inputs(ctx, inputs, output) -> None:
    ctx.save_for_backward(*[value for value in inputs if isinstance(value, torch.Tensor) or value is None])


def _convolution_backward(ctx, grad):
    x, weight, bias = ctx.saved_tensors
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad
    grad = grad.contiguous()
    grad_x = depthwise_input_gradient(grad, weight) if needs_x else None
    grad_weight = grad_bias = None
    if needs_weight or needs_bias:
        grad_weight, grad_bias = depthwise_weight_gradient(x, grad, weight.shape[2])
        grad_weight = grad_weight.to(weight.dtype)
        grad_bias = None if bias is None else grad_bias.to(bias.dtype)
    return grad_x, grad_weight, grad_bias


def _input_gradient_backward(ctx, grad_grad):
    grad, weight, residual = ctx.saved_tensors
    needs_grad, needs_weight, needs_residual = ctx.needs_input_grad
    grad_grad = grad_grad.contiguous()
    out = depthwise_convolution(grad_grad, weight, None) if needs_grad else None
    out_weight = None
    if needs_weight:
        # The gradient of an input at grad_grad, so to speak, whose output's gradient is grad.
        out_weight = depthwise_weight_gradient(grad_grad, grad, weight.shape[2])[0].to(weight.dtype)
    return out, out_weight, None if residual is None else grad_grad.to(residual.dtype)


def _weight_gradient_backward(ctx, weight_grad_grad, bias_grad_grad):
    x, grad = ctx.saved_tensors
    needs_x, needs_grad, _ = ctx.needs_input_grad
    taps, bias = weight_grad_grad.to(x.dtype).contiguous(), bias_grad_grad.to(x.dtype).contiguous()
    out_x = depthwise_input_gradient(grad, taps) if needs_x else None
    out_grad = depthwise_convolution(x, taps, bias) if needs_grad else None
    return out_x, out_grad, None


_convolution = define_operator(
    'depthwise_convolution', _convolution_forward, _convolution_fake, _convolution_backward, _save_inputs)
_input_gradient = define_operator(
    'depthwise_input_gradient', _input_gradient_forward, _input_gradient_fake, _input_gradient_backward, _save_inputs)
_weight_gradient = define_operator(
    'depthwise_weight_gradient', _weight_gradient_forward, _weight_gradient_fake, _weight_gradient_backward,
    _save_inputs)


def depthwise_convolution_support(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor],
) -> KernelSupport:
    """Whether `depthwise_convolution` and its gradients run Triton kernels on these tensors, and why."""
    x, weight, bias = autocast(x, weight, bias)
    return explain(depthwise_refusal(x, weight, bias), x)


def depthwise_convolution(x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor]) -> torch.Tensor:
    """`F.conv2d(x, weight, bias, padding='same', groups=C)`, forward and backward on tensor cores.

    The plain PyTorch equivalent is `depthwise_convolution_ref`, which runs, silently, wherever no kernel does
    (`depthwise_convolution_support` says why). The Triton kernel takes contiguous float32, float16 and bfloat16 CUDA
    tensors and accumulates in float32; float32 products are TF32 or IEEE as `torch.backends.cudnn` says for
    convolutions. Under autocast, x, weight and bias are cast as for `torch.nn.Conv2d`. The backward pass is
    deterministic. Differentiable any number of times.

    Args:
        x: Input, (B, C, H, W).
        weight: Depthwise kernel, (C, 1, k, k), of the dtype of x. As in PyTorch, an even k pads one more on the right
            and the bottom.
        bias: (C,) or None; the dtype of x or float32.

    Returns:
        (B, C, H, W), of the dtype of x (under autocast, of autocast's dtype).
    """
    x, weight, bias = autocast(x, weight, bias)
    if depthwise_refusal(x, weight, bias):
        return depthwise_convolution_ref(x, weight, bias)
    return _convolution(x, weight, bias)


def depthwise_input_gradient(
        grad: torch.Tensor,
        weight: torch.Tensor,
        residual: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """Gradient of `depthwise_convolution`'s input, plus a residual; in plain PyTorch `depthwise_input_gradient_ref`.

    Args:
        grad: Gradient of the output, (B, C, H, W).
        weight: (C, 1, k, k), of the dtype of grad.
        residual: What to add, of the shape and dtype of grad, such as the gradient that arrives past the convolution;
            None for nothing.

    Returns:
        (B, C, H, W), of the dtype of grad.
    """
    if depthwise_refusal(grad, weight) or _same_map_refusal(grad, residual):
        return depthwise_input_gradient_ref(grad, weight, residual)
    return _input_gradient(grad, weight, residual)


def depthwise_weight_gradient(
        x: torch.Tensor,
        grad: torch.Tensor,
        kernel_size: int,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Gradients of weight and bias of `depthwise_convolution`; in plain PyTorch `depthwise_weight_gradient_ref`.

    Always deterministic: sums are split by the shape alone and merged in a fixed order, without atomic operations. IEEE
    float32 products for kernels larger than 5 on maps wider than 32 are left to PyTorch.

    Args:
        x: Input of the convolution, (B, C, H, W).
        grad: Gradient of its output, of the shape and dtype of x.
        kernel_size: Side k of the kernels.

    Returns:
        The gradient of the weight, (C, 1, k, k), and of the bias, (C,): float64 for x in float64, else float32, in
        which they are accumulated.
    """
    if _weight_refusal(x, grad, kernel_size):
        return depthwise_weight_gradient_ref(x, grad, kernel_size)
    return _weight_gradient(x, grad, kernel_size)
