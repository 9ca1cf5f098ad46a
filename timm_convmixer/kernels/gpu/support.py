"""Which path an operator takes, and why: the switch, the limits of the kernels, and how to launch one.

Nothing here imports Triton, which may be missing (macOS, Windows): the modules that hold the kernels do, when a tensor
needs them.
"""
import functools
import importlib.util
import os
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional, Tuple

import torch

from ..support import use_fused

__all__ = ['KernelSupport']

MIN_CAPABILITY = (8, 0)
ACTIVATIONS = ('gelu', 'relu', 'none')


def _find_triton() -> bool:
    spec = importlib.util.find_spec('triton')
    # The kernels need Triton 3.4, which comes with PyTorch 2.8 and is the first to have this module.
    folders = spec.submodule_search_locations if spec is not None else None
    return any((Path(folder) / 'knobs.py').exists() for folder in folders or ())


TRITON_PRESENT = _find_triton()
# Triton decides at the first decoration of a kernel whether it is interpreted, so the variable is read once here as
# well.
INTERPRETED = TRITON_PRESENT and os.environ.get('TRITON_INTERPRET', '0').lower() in ('1', 'true', 'yes', 'on', 'y')


class KernelSupport(NamedTuple):
    """The answer to "does a Triton kernel run here?".

    Attributes:
        used: Whether the kernel runs; if not, the plain PyTorch reference does, with the same result.
        reason: Why, in one sentence.
    """
    used: bool
    reason: str

    def __bool__(self) -> bool:
        return self.used


def check_arguments(
        weight: torch.Tensor,
        bias: Optional[torch.Tensor],
        scale: torch.Tensor,
        shift: torch.Tensor,
        act: str,
) -> None:
    """Raise a ValueError that names what is wrong with the arguments that PyTorch's convolution does not check."""
    if act not in ACTIVATIONS:
        raise ValueError(f'act must be one of {ACTIVATIONS}, got {act!r}')
    channels = weight.shape[0]
    if scale.dim() != 1 or scale.shape[0] != channels:
        raise ValueError(f'scale must have shape ({channels},), one per output channel, got {tuple(scale.shape)}')
    if shift.dim() != 1 or shift.shape[0] != channels:
        raise ValueError(f'shift must have shape ({channels},), one per output channel, got {tuple(shift.shape)}')
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != channels):
        raise ValueError(f'bias must have shape ({channels},), one per output channel, got {tuple(bias.shape)}')


def map_refusal(x: torch.Tensor) -> str:
    """Why no kernel can take `x` as a map of (B, C, H, W), or '' if nothing speaks against it.

    torch.compile traces this, so it looks at nothing but attributes of the tensors and returns constants.
    """
    if not use_fused():
        return 'switched off (TIMM_CONVMIXER_FUSED=0 or set_fused(False))'
    if not TRITON_PRESENT:
        return 'Triton 3.4 or newer is not installed'
    if x.device.type != 'cuda' and not (INTERPRETED and x.device.type == 'cpu'):
        return 'not a CUDA tensor'
    if torch.version.hip is not None:
        return 'not tested on ROCm'
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return 'dtype is not float32, float16 or bfloat16'
    if x.dim() != 4:
        return 'x is not of shape (B, C, H, W)'
    if not x.is_contiguous():
        return 'x is not contiguous NCHW (channels_last, or a view)'
    if x.numel() == 0:
        return 'x is empty'
    return ''


def refusal(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor],
        scale: Optional[torch.Tensor] = None,
        shift: Optional[torch.Tensor] = None,
) -> str:
    """Why no kernel can take these tensors, or '' if nothing speaks against it; traced like `map_refusal`."""
    reason = map_refusal(x)
    if reason:
        return reason
    if weight.dtype != x.dtype:
        return 'x and weight differ in dtype'
    if weight.device != x.device or not weight.is_contiguous():
        return 'weight must be contiguous and on the device of x'
    for tensor in (bias, scale, shift):
        if tensor is not None and tensor.dtype != x.dtype and tensor.dtype != torch.float32:
            return 'bias, scale and shift must be float32 or of the dtype of x'
        if tensor is not None and (tensor.device != x.device or not tensor.is_contiguous()):
            return 'bias, scale and shift must be contiguous and on the device of x'
    return ''


@functools.cache
def device_refusal(device: torch.device) -> str:
    """Why no kernel can run on this device, or ''. For the operators when they run: torch.compile cannot trace it."""
    if device.type == 'cuda' and torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        return 'compute capability below 8.0'
    return ''


def explain(reason: str, x: torch.Tensor) -> KernelSupport:
    """The public answer for a refusal (or '') about `x`."""
    reason = reason or device_refusal(x.device)
    if reason:
        return KernelSupport(False, f'PyTorch: {reason} (x: {tuple(x.shape)}, {x.dtype}, {x.device})')
    return KernelSupport(True, 'Triton, interpreted on the CPU' if INTERPRETED else 'Triton')


def autocast(*tensors: Optional[torch.Tensor]) -> Tuple[Optional[torch.Tensor], ...]:
    """Under autocast, the tensors in its dtype, as `torch.nn.Conv2d` takes them (float64 stays); else the tensors
    themselves.

    Where no kernel could run anyway they are left to PyTorch's own autocast.
    """
    device_type = tensors[0].device.type  # type: ignore[union-attr]  # the first is x, and always there
    if device_type != 'cuda' and not (INTERPRETED and device_type == 'cpu'):
        return tensors
    if not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def input_precision() -> str:
    """'tf32' or 'ieee': PyTorch's switch for fp32 convolutions on CUDA, since it is convolutions that the kernels
    replace.

    That is `torch.backends.cudnn.conv.fp32_precision`, and `torch.backends.cudnn.allow_tf32` where PyTorch does not
    have it yet.
    """
    conv = getattr(torch.backends.cudnn, 'conv', None)
    if conv is not None:
        return 'tf32' if conv.fp32_precision == 'tf32' else 'ieee'
    return 'tf32' if torch.backends.cudnn.allow_tf32 else 'ieee'


def define_operator(
        name: str,
        forward: Callable,
        fake: Callable,
        backward: Callable,
        setup_context: Callable,
) -> Callable:
    """Register `timm_convmixer::name`: one implementation for all devices, its shapes, and its gradients."""
    # torch.compile sees into a triton_op (PyTorch 2.6). A custom_op is a closed box to it: correct as well, and all
    # there is without Triton and where kernels are interpreted, which PyTorch does not take for Triton kernels.
    define = torch.library.custom_op
    if TRITON_PRESENT and not INTERPRETED:
        define = getattr(torch.library, 'triton_op', define)
    operator = define(f'timm_convmixer::{name}', forward, mutates_args=())
    operator.register_fake(fake)
    operator.register_autograd(backward, setup_context=setup_context)
    return operator


def is_traced(x: torch.Tensor) -> bool:
    """Whether `x` stands for data that is not there yet (torch.compile, torch.export), so that nothing can be timed."""
    return type(x) not in (torch.Tensor, torch.nn.Parameter)


def launch(kernel: Any, programs: int, *args: Any, **meta: Any) -> None:
    """Launch a Triton kernel on a one-dimensional grid, for torch.compile to see where `args` are traced."""
    x = args[0]
    if is_traced(x):
        torch.library.wrap_triton(kernel)[(programs,)](*args, **meta)
    elif INTERPRETED:
        kernel[(programs,)](*args, **meta)
    else:
        # Triton launches on the current device, which need not be that of the tensors. Fusing multiplications and
        # additions is its default, but Triton 3.9 warns where that is not said.
        with torch.cuda.device(x.device):
            kernel[(programs,)](*args, **meta, enable_fp_fusion=True)


@functools.cache
def device_limits(device: torch.device) -> Tuple[int, int]:
    """Multiprocessors and bytes of shared memory per block of a device."""
    if device.type != 'cuda':
        return 132, 232448
    properties = torch.cuda.get_device_properties(device)
    shared = getattr(properties, 'shared_memory_per_block_optin', 101376)
    return properties.multi_processor_count, shared
