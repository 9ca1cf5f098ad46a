"""How the depthwise kernel is launched: by the depthwise mixing, the depthwise convolution, and its input gradient."""
from typing import List, NamedTuple, Optional

import torch

from .support import device_limits, input_precision, launch, refusal
from .tuning import batch_bucket, choose

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


def offsets_of(height: int, kernel: int, group: int, flip: bool = False) -> int:
    """How many row groups a row group's receptive field touches: as many banded matrices are kept."""
    groups = -(-height // group)
    before = (kernel - 1 + flip) // 2
    first = max(-((before + group - 1) // group), 1 - groups)
    last = min((group - 1 + kernel - 1 - before) // group, groups - 1)
    return last + 1 - first


def round_up(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()


def block_k(width: int, group: int) -> int:
    """Columns of a tile: those of a row group, rounded up."""
    return max(16, round_up(group * width))


def steps_of(tiles: int, channels: int, processors: int) -> int:
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
        flip: bool = False,
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
        columns = block_k(width, group)
        offsets = offsets_of(height, kernel, group, flip)
        tiles_kept = offsets if prefetch else 1
        if itemsize * columns * (offsets * columns + tiles_kept * block_m) > shared_memory:
            continue
        steps = steps_of(-(-rows // block_m), channels, processors)
        config = DepthwiseConfig(group, block_m, prefetch, num_warps, steps)
        if config not in found:
            found.append(config)
    return found


def taps_config(batch: int, channels: int, height: int, width: int, processors: int) -> DepthwiseConfig:
    """The configuration for the convolution tap by tap, which uses no matrix product and no shared memory."""
    group = max(1, min(height, MAX_WIDTH // width))
    tiles = -(-batch * -(-height // group) // 16)
    return DepthwiseConfig(group, 16, False, 4, steps_of(tiles, channels, processors))


def run_kernel(
        x: torch.Tensor,
        weight: torch.Tensor,
        out: torch.Tensor,
        config: DepthwiseConfig,
        precision: str,
        bias: Optional[torch.Tensor] = None,
        act: str = 'none',
        scale: Optional[torch.Tensor] = None,
        shift: Optional[torch.Tensor] = None,
        residual: Optional[torch.Tensor] = None,
        flip: bool = False,
) -> None:
    """Launch the kernel into `out`: act(convolution + bias) * scale + shift + residual, in part or in whole.

    x, residual and out: (B, C, H, W), contiguous but for the stride between images, which is that of x for the
    residual. `flip` turns the taps round.
    """
    from .depthwise_triton import depthwise_kernel
    batch, channels, height, width = x.shape
    rows = batch * -(-height // config.group)
    chunks = -(-rows // (config.block_m * config.steps))
    launch(
        depthwise_kernel,
        channels * chunks,
        x,
        weight,
        weight if bias is None else bias,
        weight if scale is None else scale,
        weight if shift is None else shift,
        x if residual is None else residual,
        out,
        batch,
        channels,
        x.stride(0),
        out.stride(0),
        H=height,
        W=width,
        KERNEL=weight.shape[2],
        FLIP=flip,
        HAS_BIAS=bias is not None,
        ACT=act,
        AFFINE=scale is not None,
        HAS_RESIDUAL=residual is not None,
        PRECISION=precision,
        GROUP=config.group,
        BLOCK_M=config.block_m,
        BLOCK_K=block_k(width, config.group),
        STEPS=config.steps,
        PREFETCH=config.prefetch,
        num_warps=config.num_warps,
        num_stages=1,
    )


def run(name: str, x: torch.Tensor, weight: torch.Tensor, flip: bool = False, **arguments) -> torch.Tensor:
    """The kernel's result on (B, C, H, W), in the configuration for the problem.

    Args:
        name: The operator's, by which measured configurations are kept.
        x: Input.
        weight: Taps, (C, 1, k, k).
        flip: Whether to turn them round.
        arguments: More of those of `run_kernel`.
    """
    batch, channels = x.shape[0], x.shape[1]
    # The kernel is compiled for a map and a kernel size; under torch.compile with dynamic shapes this is where they
    # become fixed.
    height, width, kernel = int(x.shape[2]), int(x.shape[3]), int(weight.shape[2])
    processors, shared_memory = device_limits(x.device)
    precision = input_precision() if x.dtype == torch.float32 else 'tf32'
    bucket = batch_bucket(batch)
    configs: List[DepthwiseConfig] = []
    if not (x.dtype == torch.float32 and precision == 'ieee'):
        configs = candidates(bucket, channels, height, width, kernel, x.element_size(), processors, shared_memory, flip)
    if not configs:
        precision = 'taps'
        configs = [taps_config(bucket, channels, height, width, processors)]
    out = torch.empty_like(x)
    key = (name, x.device, x.dtype, precision, bucket, channels, height, width, kernel)
    config = choose(
        key, configs, lambda c: run_kernel(x, weight, out, c, precision, flip=flip, **arguments), x)
    run_kernel(x, weight, out, config, precision, flip=flip, **arguments)
    return out


def depthwise_refusal(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor] = None,
        scale: Optional[torch.Tensor] = None,
        shift: Optional[torch.Tensor] = None,
) -> str:
    """Why the kernel cannot take these tensors, or '' if nothing speaks against it; traced by torch.compile."""
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
