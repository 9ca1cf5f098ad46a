"""Kernels for NVIDIA GPUs in Triton: ``support`` says where they serve and imports no Triton; the rest does."""
