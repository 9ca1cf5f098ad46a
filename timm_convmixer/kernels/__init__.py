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
    'KernelSupport': 'support',
    'activation_affine': 'activation_norm',
    'activation_affine_ref': 'activation_norm',
    'activation_norm_backward': 'activation_norm',
    'activation_norm_backward_ref': 'activation_norm',
    'activation_norm_support': 'activation_norm',
    'activation_statistics': 'activation_norm',
    'activation_statistics_ref': 'activation_norm',
    'clear_autotune_cache': 'tuning',
    'depthwise_convolution': 'depthwise_training',
    'depthwise_convolution_cpu': 'depthwise_cpu',
    'depthwise_convolution_cpu_support': 'depthwise_cpu',
    'depthwise_convolution_ref': 'depthwise_training',
    'depthwise_convolution_support': 'depthwise_training',
    'depthwise_input_gradient': 'depthwise_training',
    'depthwise_input_gradient_ref': 'depthwise_training',
    'depthwise_mixing': 'depthwise',
    'depthwise_mixing_ref': 'depthwise',
    'depthwise_mixing_support': 'depthwise',
    'depthwise_weight_gradient': 'depthwise_training',
    'depthwise_weight_gradient_ref': 'depthwise_training',
    'pointwise_mixing': 'pointwise',
    'pointwise_mixing_ref': 'pointwise',
    'pointwise_mixing_support': 'pointwise',
    'set_autotune': 'tuning',
    'set_fused': 'support',
    'use_autotune': 'tuning',
    'use_fused': 'support',
}

__all__ = list(_PUBLIC_NAMES)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC_NAMES:
        return getattr(importlib.import_module(f'{__name__}.{_PUBLIC_NAMES[name]}'), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
