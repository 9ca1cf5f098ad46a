"""Operators for the CPU, made of PyTorch's own."""
