"""Memory for batches that is used again: fresh pages cost the kernel more time than filling them costs us."""

import ctypes
import weakref
from collections import deque
from functools import cache
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

# malloc.h of glibc: what it is told, and how.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_LARGEST_OF_THE_HEAP = 32 * 2**20  # glibc takes no larger threshold


@cache
def keep_freed_memory() -> bool:
    """Let this process's malloc keep what is freed, in one heap, as decoders free and ask for the memory of images all the time.

    glibc otherwise hands large blocks back to the kernel, which fills new pages with zeros for the next; and gives threads
    heaps of their own, each of which keeps what the threads of some stream once needed. Returns whether it obeyed; other C
    libraries are left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((_M_MMAP_THRESHOLD, _LARGEST_OF_THE_HEAP), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_ARENA_MAX, 1))
    obeyed = [mallopt(*setting) for setting in settings]
    return all(obeyed)


class Buffers:
    """Hands out arrays, and their memory again once nothing refers to an array or to any view or tensor made of it.

    Keeps at most `num_kept` unused blocks. May be used from several threads.
    """

    def __init__(self, num_kept: int) -> None:
        self._num_kept = num_kept
        self._unused: list[NDArray[np.uint8]] = []
        # The garbage collector may give a block back in the middle of `take`, on the thread that holds the lock.
        self._returned: deque[NDArray[np.uint8]] = deque()
        self._lock = Lock()

    def take(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """An array of this shape and type, C-contiguous, with whatever is in it."""
        kind = np.dtype(dtype)
        num_items = int(np.prod(shape, dtype=np.int64))
        size = max(1, num_items) * kind.itemsize
        with self._lock:
            self._sort_in_the_returned()
            fitting = [k for k, block in enumerate(self._unused) if block.size >= size]
            block = self._unused.pop(min(fitting, key=lambda k: self._unused[k].size)) if fitting else None
        if block is None:
            block = np.empty(size + size // 4, np.uint8)  # the next batch may need a little more
        # Views of a view refer to the first array alone. This one is the first, since a memoryview is none.
        whole = np.frombuffer(block.data[:size], kind)
        weakref.finalize(whole, self._returned.append, block).atexit = False
        return whole[:num_items].reshape(shape)

    def _sort_in_the_returned(self) -> None:
        while self._returned:
            self._unused.append(self._returned.popleft())
            if len(self._unused) > self._num_kept:
                del self._unused[min(range(len(self._unused)), key=lambda k: self._unused[k].size)]
