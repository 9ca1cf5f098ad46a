"""Operators for a CPU and for a GPU; this package knows tensors and knows nothing of timm.

``cpu/`` is written with PyTorch's operators, ``gpu/`` in Triton. Each operation has a plain PyTorch reference: a
function ``*_ref``, or PyTorch's own operator in its test. The Triton files are imported only when a tensor on a GPU
needs them. Public names load on first use.
"""
import importlib
from typing import Any

_PUBLIC_NAMES = {
    'activation_affine': 'gpu.activation_affine',
    'activation_affine_ref': 'gpu.activation_affine',
    'activation_batch_norm': 'gpu.activation_statistics',
    'activation_batch_norm_ref': 'gpu.activation_statistics',
    'activation_norm_backward': 'gpu.activation_norm_backward',
    'activation_norm_backward_ref': 'gpu.activation_norm_backward',
    'activation_statistics': 'gpu.activation_statistics',
    'activation_statistics_ref': 'gpu.activation_statistics',
    'depthwise_convolution': 'gpu.depthwise',
    'depthwise_convolution_ref': 'gpu.depthwise',
    'depthwise_input_gradient': 'gpu.depthwise',
    'depthwise_input_gradient_ref': 'gpu.depthwise',
    'depthwise_mixing': 'gpu.depthwise',
    'depthwise_mixing_ref': 'gpu.depthwise',
    'depthwise_weight_gradient': 'gpu.depthwise_weight_gradient',
    'depthwise_weight_gradient_ref': 'gpu.depthwise_weight_gradient',
    'empty_cache': 'cpu.memory',
    'kernel_refusal': 'gpu.support',
    'patch_embedding': 'gpu.patch_embedding',
    'patch_embedding_ref': 'gpu.patch_embedding',
    'pointwise_convolution': 'gpu.pointwise',
    'pointwise_convolution_ref': 'gpu.pointwise',
    'pointwise_input_gradient': 'gpu.pointwise',
    'pointwise_mixing': 'gpu.pointwise',
    'pointwise_mixing_ref': 'gpu.pointwise',
    'pointwise_weight_gradient': 'gpu.pointwise_weight_gradient',
    'pointwise_weight_gradient_ref': 'gpu.pointwise_weight_gradient',
    'set_fused': 'support',
    'set_gpu_kernels': 'gpu.support',
    'use_fused': 'support',
    'use_gpu_kernels': 'gpu.support',
    'weight_gradient_refusal': 'gpu.support',
}

__all__ = list(_PUBLIC_NAMES)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC_NAMES:
        return getattr(importlib.import_module(f'{__name__}.{_PUBLIC_NAMES[name]}'), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC_NAMES})
