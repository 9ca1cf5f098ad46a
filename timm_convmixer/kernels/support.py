"""What the CPU and the GPU code share: the switch, and the state of PyTorch that a fast path depends on."""
import os
import warnings

import torch

__all__ = [
    'convolution_dtype',
    'dense_memory_format',
    'has_onednn',
    'is_gpu',
    'is_observed',
    'is_transformed',
    'onednn_supports',
    'opmath_dtype',
    'read_switch',
    'set_fused',
    'suggest_memory_format',
    'use_fused',
]


def read_switch(name: str, default: bool) -> bool:
    """What a variable of the environment says, 0 or 1; for anything else a warning, and the default."""
    value = os.environ.get(name, '').strip()
    if value in ('0', '1'):
        return value == '1'
    if value:
        warnings.warn(
            f'{name}={value!r} is neither 0 nor 1; {int(default)}, the default, is taken.',
            RuntimeWarning,
            stacklevel=2,
        )
    return default


# 0: PyTorch's operators only. 1 (default): a fast path wherever one is supported.
_FUSED = read_switch('TIMM_CONVMIXER_FUSED', default=True)


def use_fused() -> bool:
    """Whether the fast paths, on CPU and GPU, are switched on (``TIMM_CONVMIXER_FUSED`` or ``set_fused()``)."""
    return _FUSED


def set_fused(enable: bool = True) -> None:
    """Switch the fast paths on or off for this process, over ``TIMM_CONVMIXER_FUSED``."""
    global _FUSED
    _FUSED = bool(enable)


def is_gpu(device: torch.device) -> bool:
    """Whether the fast paths on a device run the Triton kernels."""
    return device.type == 'cuda'


def has_onednn() -> bool:
    """Whether PyTorch runs convolutions on a CPU by oneDNN: it is there, and not switched off."""
    return torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled


def onednn_supports(dtype: torch.dtype) -> bool:
    """Whether oneDNN has convolutions in a dtype for this CPU; bfloat16 and float16 depend on its instructions."""
    if not has_onednn():
        return False
    # No public name answers this. Where PyTorch has no private one either, the guess is that of most CPUs.
    name = {torch.bfloat16: '_is_mkldnn_bf16_supported', torch.float16: '_is_mkldnn_fp16_supported'}.get(dtype)
    query = None if name is None else getattr(torch.ops.mkldnn, name, None)
    return dtype in (torch.float32, torch.bfloat16) if query is None else query()


def opmath_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics, sums, scales and shifts: float32 for half precision, else the dtype itself.

    A scale rounded to half precision would be off by the same factor everywhere in its channel, which pooling does not
    average out; BatchNorm itself computes it in float32.
    """
    return torch.promote_types(dtype, torch.float32)


def convolution_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that the fast paths on a CPU compute convolutions of a dtype in.

    Float32 for half precision that oneDNN does not support: PyTorch's own convolutions in that take ten to thirty
    times as long as oneDNN's in float32. And for float16: with AVX512-FP16, oneDNN's take 1.5 times as long.
    """
    return dtype if dtype != torch.float16 and onednn_supports(dtype) else opmath_dtype(dtype)


def dense_memory_format(x: torch.Tensor) -> torch.memory_format:
    """The memory format to make a tensor ``(B, C, H, W)`` dense in: channels last if it is in that and no other."""
    is_channels_last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if is_channels_last else torch.contiguous_format


def suggest_memory_format(x: torch.Tensor) -> torch.memory_format:
    """The memory format that PyTorch's convolutions take a tensor ``(B, C, H, W)`` for, by its strides."""
    smallest, strides = 0, x.stride()
    for dim in (1, 3, 2, 0):
        if x.shape[dim] == 0 or strides[dim] < smallest or strides[1] == 0 or (dim == 0 and smallest == strides[1]):
            return torch.contiguous_format
        smallest = strides[dim] * max(1, x.shape[dim])
    return torch.channels_last


def is_transformed(*tensors: torch.Tensor) -> bool:
    """Whether torch.func or forward-mode differentiation is at work, or one of the tensors a batch of gradients.

    Custom autograd functions and operators that write into given memory do not join in these.
    """
    # No public name answers the first and the last question: batched gradients (is_grads_batched=True) come from an
    # older vmap than torch.func's, which shows in the tensors alone.
    transforms_active = getattr(torch._C, '_are_functorch_transforms_active', None)
    is_batched = getattr(torch._C._functorch, 'is_legacy_batchedtensor', None)
    return (
        bool(transforms_active is not None and transforms_active())
        or torch.autograd.forward_ad._current_level >= 0
        or bool(is_batched is not None and any(map(is_batched, tensors))))


def is_observed() -> bool:
    """Whether somebody watches each module, function or operator: a hook for all modules, or a mode."""
    # No public name answers these questions.
    count_dispatch_modes = getattr(torch._C, '_len_torch_dispatch_stack', None)
    count_function_modes = getattr(torch._C, '_len_torch_function_stack', None)
    return bool(
        torch.nn.modules.module._has_any_global_hook()
        or (count_dispatch_modes is not None and count_dispatch_modes())
        or (count_function_modes is not None and count_function_modes() and not _only_default_device()))


def _only_default_device() -> bool:
    # A default device (torch.set_default_device, `with torch.device(...)`) is such a mode as well, and watches nothing.
    from torch.overrides import _get_current_function_mode_stack
    from torch.utils._device import DeviceContext

    return all(type(mode) is DeviceContext for mode in _get_current_function_mode_stack())
