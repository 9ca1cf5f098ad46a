"""Memory that serves one feature map after the other.

On a CPU memory fresh from the system, page by page, costs more than most of what is computed into it, and the C library
gives back to the system what a training step frees.
"""
import functools
import threading
import weakref
from collections import deque
from typing import Deque, List

import torch

__all__ = ['MapPool', 'empty_cache', 'keep_freed_memory', 'pool_of']


@functools.cache
def keep_freed_memory() -> None:
    """Have glibc keep the memory of a freed feature map for the next one, for the rest of the process.

    It returns a freed block above a threshold of 128 KiB to the system. Freeing a larger block raises the threshold to
    that size, up to 32 MiB (mallopt(3), M_MMAP_THRESHOLD). So one block of almost 32 MiB is freed here, which takes no
    memory because nothing touches it. Thresholds that the user has set stay as they are.
    """
    torch.empty((32 << 20) - (64 << 10), dtype=torch.uint8, device='cpu')


class MapPool:
    """Blocks of memory for feature maps; a block serves again once the last tensor in it is gone.

    Tensors tell by their own reference counts: whatever keeps one, be it a graph that is retained, a second graph or a
    user, keeps its block out of the pool. Thread-safe.
    """

    def __init__(self):
        self._lock = threading.Lock()
        self._free: List[torch.Tensor] = []
        # Filled by finalizers, which may run at any time, also while this thread holds the lock.
        self._returned: Deque[torch.Tensor] = deque()

    def take(self, like: torch.Tensor) -> torch.Tensor:
        """Return an uninitialised tensor with the shape, strides and dtype of ``like``, which is dense."""
        block = self._find(like.numel() * like.element_size())
        lease = memoryview(block.numpy())
        weakref.finalize(lease, self._returned.append, block).atexit = False
        # The tensor holds the lease, and nothing else does.
        storage = torch.frombuffer(lease, dtype=like.dtype, count=like.numel()).untyped_storage()
        return torch.empty(0, dtype=like.dtype, device='cpu').set_(storage, 0, like.shape, like.stride())

    def clear(self) -> None:
        """Release the blocks that no tensor is in."""
        with self._lock:
            self._returned.clear()
            self._free.clear()

    def _find(self, size: int) -> torch.Tensor:
        """The smallest free block of ``size`` bytes or more, or a new one in place of a smaller one."""
        with self._lock:
            while self._returned:
                self._free.append(self._returned.popleft())
            self._free.sort(key=torch.Tensor.numel)
            for i, block in enumerate(self._free):
                if block.numel() >= size:
                    return self._free.pop(i)
            # Else what an earlier, smaller batch left would stay for good.
            del self._free[:1]
        return torch.empty(size, dtype=torch.uint8, device='cpu')


_POOLS: 'weakref.WeakKeyDictionary[object, MapPool]' = weakref.WeakKeyDictionary()


def pool_of(owner: object) -> MapPool:
    """The pool of a module: released with the module, and left out of its copies and pickles."""
    return _POOLS.setdefault(owner, MapPool())


def empty_cache() -> None:
    """Release the memory that models keep for the feature maps of their next training step on a CPU."""
    # Not by iteration over the dictionary, which another thread may extend meanwhile.
    for owner in [reference() for reference in _POOLS.keyrefs()]:
        if owner is not None:
            pool_of(owner).clear()
