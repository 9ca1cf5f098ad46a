"""Triton kernels and the custom operators that expose them; this package knows tensors and knows nothing of timm.

One operation a file: the public function, its plain PyTorch reference, the operator and the choice of a launch
configuration in `depthwise.py` and `pointwise.py`, the Triton kernels themselves in `*_triton.py`, imported when a
tensor needs them.
"""
from .convolution import convolution_act, convolution_act_ref, convolution_act_support
from .depthwise import depthwise_mixing, depthwise_mixing_ref, depthwise_mixing_support
from .pointwise import pointwise_mixing, pointwise_mixing_ref, pointwise_mixing_support
from .depthwise_cpu import depthwise_convolution_cpu, depthwise_convolution_cpu_support
from .support import KernelSupport, set_fused, use_fused
from .tuning import clear_autotune_cache, set_autotune, use_autotune

__all__ = [
    'KernelSupport',
    'clear_autotune_cache',
    'convolution_act',
    'convolution_act_ref',
    'convolution_act_support',
    'depthwise_convolution_cpu',
    'depthwise_convolution_cpu_support',
    'depthwise_mixing',
    'depthwise_mixing_ref',
    'depthwise_mixing_support',
    'pointwise_mixing',
    'pointwise_mixing_ref',
    'pointwise_mixing_support',
    'set_autotune',
    'set_fused',
    'use_autotune',
    'use_fused',
]
