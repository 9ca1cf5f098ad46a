"""Operators for NVIDIA GPUs: Triton kernels, each beside its plain PyTorch reference."""
