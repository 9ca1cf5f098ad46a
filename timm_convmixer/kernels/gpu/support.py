"""Whether the Triton kernels serve, and why not: asked on every machine, so nothing here imports Triton."""
import functools
import importlib.util
import os
from pathlib import Path
from typing import FrozenSet, Tuple

import torch

from ..support import read_switch

__all__ = [
    'device_refusal',
    'kernel_refusal',
    'set_gpu_kernels',
    'use_gpu_kernels',
    'weight_gradient_refusal',
]

Capability = Tuple[int, int]

# The compute capabilities on which all kernels were measured and found faster than PyTorch's operators, in float32,
# float16 and bfloat16 (benchmarks/results/kernels_notes.md). Elsewhere PyTorch's operators run.
MEASURED: FrozenSet[Capability] = frozenset({(9, 0)})
# Where the machine code of the weight gradient keeps its sums in registers (benchmarks/compile_kernels.py). On 8.0,
# 8.6, 8.9 and 12.0 it spills 184 bytes a thread or more (benchmarks/results/kernels_notes.md); others were not compiled
# for.
WEIGHT_GRADIENT_FITS: FrozenSet[Capability] = frozenset({(9, 0), (10, 0)})

MIN_CAPABILITY = (8, 0)
# The widest map and the largest kernel for which Toeplitz matrices were checked to fit and to pay.
MAX_WIDTH = 64
MAX_KERNEL_SIZE = 9

# Whether the kernels also run where they have not been measured.
_RUN_UNMEASURED = read_switch('TIMM_CONVMIXER_GPU_KERNELS', default=False)


def use_gpu_kernels() -> bool:
    """Whether the Triton kernels run on every GPU that can run them, measured or not.

    Set by ``TIMM_CONVMIXER_GPU_KERNELS=1`` in the environment, or by :func:`set_gpu_kernels`.
    """
    return _RUN_UNMEASURED


def set_gpu_kernels(enable: bool = True) -> None:
    """Run the Triton kernels on every GPU that can run them, or only where they were measured and found faster.

    For this process, over ``TIMM_CONVMIXER_GPU_KERNELS``.
    """
    global _RUN_UNMEASURED
    _RUN_UNMEASURED = bool(enable)
    _refusal.cache_clear()


@functools.cache
def has_triton() -> bool:
    """Whether Triton 3.4 or newer is installed; does not import it."""
    spec = importlib.util.find_spec('triton')
    # Triton 3.4, which comes with PyTorch 2.8, is the first to have this module.
    folders = spec.submodule_search_locations if spec is not None else None
    return any((Path(folder) / 'knobs.py').exists() for folder in folders or ())


@functools.cache
def is_interpreted() -> bool:
    """Whether Triton interprets kernels, on a CPU: Triton itself reads the variable when it decorates a kernel."""
    return os.environ.get('TRITON_INTERPRET', '0').lower() in ('1', 'true', 'yes', 'on', 'y') and has_triton()


def _capability(device: torch.device) -> Capability:
    return torch.cuda.get_device_capability(device) if device.type == 'cuda' else (9, 0)


# Dynamic shapes must not let it grow without end.
@functools.lru_cache(maxsize=4096)
def _refusal(
        device: torch.device,
        dtype: torch.dtype,
        shape: Tuple[int, ...],
        kernel_size: int,
        weight_gradient: bool = False,
) -> str:
    if not has_triton():
        return 'Triton 3.4 or newer is not installed'
    if device.type != 'cuda' and not (device.type == 'cpu' and is_interpreted()):
        return 'not on a CUDA device'
    if torch.version.hip is not None:
        return 'the kernels have not been tested on ROCm'
    capability = _capability(device)
    version = '.'.join(map(str, capability))
    if capability < MIN_CAPABILITY:
        return f'compute capability {version} is below 8.0'
    if weight_gradient and capability not in WEIGHT_GRADIENT_FITS:
        return f'the weight gradient is not known to fit into the registers of compute capability {version}'
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f'dtype is {dtype}, not float32, float16 or bfloat16'
    batch, channels, height, width = shape
    if 0 in shape:
        return 'the map is empty'
    if width > MAX_WIDTH:
        return f'the map is {width} wide, more than {MAX_WIDTH}'
    if kernel_size > MAX_KERNEL_SIZE:
        return f'the kernel is {kernel_size} x {kernel_size}, more than {MAX_KERNEL_SIZE}'
    # Planes, positions, rows and programs are counted in 32 bits; elements are not.
    if max(batch * channels, batch * height * width, batch * channels * height // 16) >= 2 ** 30:
        return 'the map has more rows than the kernels count in 32 bits'
    if not _RUN_UNMEASURED and capability not in MEASURED:
        return (
            f'kernels are off: not measured on compute capability {version} '
            '(TIMM_CONVMIXER_GPU_KERNELS=1 turns them on)')
    return ''


def kernel_refusal(
        device: torch.device,
        dtype: torch.dtype,
        shape: Tuple[int, ...],
        kernel_size: int,
) -> str:
    """Why the kernels do not serve a block, in inference or in training, or ``''`` if they do.

    In training ``depthwise_weight_gradient`` may still run PyTorch's gradient, see :func:`weight_gradient_refusal`.
    Costs a look into a dictionary once it has been answered for the same arguments.

    Args:
        device: Device of the block and its input.
        dtype: Dtype that the convolutions run in.
        shape: Shape of the input, (B, C, H, W), which must be a plain tensor, contiguous in this order.
        kernel_size: Side of the depthwise kernel.
    """
    return _refusal(device, dtype, shape, kernel_size)


def device_refusal(device: torch.device, dtype: torch.dtype) -> str:
    """Why no kernel serves any block, or ``''`` if some may: asked before the layers are looked at.

    Args:
        device: Device of the images.
        dtype: Dtype of the feature maps.
    """
    return _refusal(device, dtype, torch.Size((1, 1, 1, 1)), 1)


def weight_gradient_refusal(
        device: torch.device,
        dtype: torch.dtype,
        shape: Tuple[int, ...],
        kernel_size: int,
) -> str:
    """Why ``depthwise_weight_gradient`` runs PyTorch's gradient, or ``''`` if its own kernel.

    Arguments as of :func:`kernel_refusal`.
    """
    return _refusal(device, dtype, shape, kernel_size, weight_gradient=True)
