"""Triton kernels and the custom operators that expose them; this package knows tensors and knows nothing of timm.

One operation a file: the public function, its plain PyTorch reference, the operator and the choice of a launch
configuration in `depthwise.py` and `pointwise.py`, the Triton kernels themselves in `*_triton.py`, imported when a
tensor needs them.

Public names load on first use: registering an operator takes PyTorch tens of milliseconds, which `import timm` must not
pay.
"""
import importlib
from typing import Any

_PUBLIC_NAMES = {
    'KernelSupport': 'gpu.support',
    'activation_affine': 'gpu.activation_norm',
    'activation_affine_ref': 'gpu.activation_norm',
    'activation_norm_backward': 'gpu.activation_norm',
    'activation_norm_backward_ref': 'gpu.activation_norm',
    'activation_norm_support': 'gpu.activation_norm',
    'activation_statistics': 'gpu.activation_norm',
    'activation_statistics_ref': 'gpu.activation_norm',
    'clear_autotune_cache': 'gpu.tuning',
    'depthwise_convolution': 'gpu.depthwise_training',
    'depthwise_convolution_cpu': 'cpu.depthwise',
    'depthwise_convolution_cpu_support': 'cpu.depthwise',
    'depthwise_convolution_ref': 'gpu.depthwise_training',
    'depthwise_convolution_support': 'gpu.depthwise_training',
    'depthwise_input_gradient': 'gpu.depthwise_training',
    'depthwise_input_gradient_ref': 'gpu.depthwise_training',
    'depthwise_mixing': 'gpu.depthwise',
    'depthwise_mixing_ref': 'gpu.depthwise',
    'depthwise_mixing_support': 'gpu.depthwise',
    'depthwise_weight_gradient': 'gpu.depthwise_training',
    'depthwise_weight_gradient_ref': 'gpu.depthwise_training',
    'pointwise_mixing': 'gpu.pointwise',
    'pointwise_mixing_ref': 'gpu.pointwise',
    'pointwise_mixing_support': 'gpu.pointwise',
    'set_autotune': 'gpu.tuning',
    'set_fused': 'support',
    'use_autotune': 'gpu.tuning',
    'use_fused': 'support',
}

__all__ = list(_PUBLIC_NAMES)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC_NAMES:
        return getattr(importlib.import_module(f'{__name__}.{_PUBLIC_NAMES[name]}'), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
