"""Feature maps that one pass after the other writes into.

On a CPU memory fresh from the system, page by page, costs more than most of what a pass computes into it.
"""
import functools
from typing import List

import torch

__all__ = ['Workspace', 'keep_freed_memory']


@functools.cache
def keep_freed_memory() -> None:
    """Have glibc keep the memory of a freed feature map for the next one, for the rest of the process.

    It returns a block of over 128 KiB to the system as soon as that is freed, until a program has freed a larger one:
    that size, up to 32 MiB, is the limit from then on, and twice as much is kept (mallopt(3), M_MMAP_THRESHOLD). The
    block here is never touched and so takes no memory. Limits that the user has set stay as they are.
    """
    torch.empty((32 << 20) - (64 << 10), dtype=torch.uint8, device='cpu')


class Workspace:
    """Feature maps that the segments of one forward pass, and of its backward pass, hand on; thread-safe."""

    # The backward pass of a segment needs as many at once.
    SIZE = 3

    def __init__(self):
        self._free: List[torch.Tensor] = []

    def take(self, like: torch.Tensor) -> torch.Tensor:
        """A feature map of the shape, dtype and memory format of ``like``, with anything in it."""
        try:
            # One step for Python, so that two threads never get the same map.
            x = self._free.pop()
        except IndexError:
            return torch.empty_like(like)
        same = x.shape == like.shape and x.stride() == like.stride() and x.dtype == like.dtype
        return x if same else torch.empty_like(like)

    def give(self, *maps: torch.Tensor) -> None:
        """Hand on feature maps that nobody reads any more."""
        for x in maps:
            if len(self._free) < self.SIZE:
                self._free.append(x)
