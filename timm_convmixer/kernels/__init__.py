"""Triton kernels and the custom operators that expose them; this package knows tensors and knows nothing of timm."""
