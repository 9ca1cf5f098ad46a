"""Memory that one layer after the other writes into.

On a CPU memory fresh from the system, page by page, costs more than most of what a layer computes into it.
"""
import functools
from typing import List

import torch

__all__ = ['Workspace', 'keep_freed_memory']


@functools.cache
def keep_freed_memory() -> None:
    """Have the C library of Linux keep the memory of a freed map for the next one, for the rest of the process.

    It gives a block of over 128 KiB back to the system as soon as that is freed, until a program has freed a block of
    more: its size, up to 32 MiB, is the limit from then on, and twice as much is kept (mallopt(3), M_MMAP_THRESHOLD).
    The block here is never touched and so takes no memory. Limits that the user has set stay as they are.
    """
    torch.empty((32 << 20) - (64 << 10), dtype=torch.uint8, device='cpu')


class Workspace:
    """Maps that the blocks of one forward pass, and of its backward pass, hand on to each other to write into."""

    # A block's backward pass needs as many at once.
    SIZE = 3

    def __init__(self):
        self._free: List[torch.Tensor] = []

    def take(self, like: torch.Tensor) -> torch.Tensor:
        """A map of the shape, dtype, device and memory format of `like`, with anything in it."""
        try:
            # One step for Python, so that two threads never get the same map.
            x = self._free.pop()
        except IndexError:
            return torch.empty_like(like)
        same = x.shape == like.shape and x.stride() == like.stride() and x.dtype == like.dtype
        return x if same and x.device == like.device else torch.empty_like(like)

    def give(self, *maps: torch.Tensor) -> None:
        """Hand on maps that nobody reads any more."""
        for x in maps:
            # GPUs have an allocator that keeps what is freed.
            if x.device.type == 'cpu' and len(self._free) < self.SIZE:
                self._free.append(x)
