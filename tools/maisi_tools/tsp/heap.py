"""Memory on the CPU: stored slabs in mappings of their own that are used again, the rest in the C library's heap.

Fresh memory is dear: the kernel clears every page at its first use. Were stored slabs, which live long, among the
temporaries in the heap, a third of the peak would be holes between them. So a stored slab is copied into a mapping that
an earlier slab left, and the temporaries of every step find the places of the step before. The holes that these leave
(measured: 14 MB at a peak of 221 MB) are too many where a memory limit has to hold; there the larger temporaries are
mapped, too: from half a slab on. Measured with slabs of 8 MiB: from 1 MiB on, instead of 4, a sampling step took 1.4
times as long for 3 % less memory; from 8 MiB on 0.9 of the time, but a decoder was 1 % above its limit. With slabs of 2
MiB: from 4 MiB on, instead of 1, an encoder took as long, and in 6 of 20 runs more than its limit, at most 12 % more.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import platform
import sys
import weakref
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

POOLED_BYTES = 2**20
"""Slabs from this size on are put into mappings; smaller ones stay where they are."""

FIT = 1.125
"""A slab is put into a mapping up to this much larger than it is: slabs of a pass differ by one row."""

MAPPED_BYTES = 4 * 2**20
"""Temporaries from this size on are mapped under a limit where there are no slabs; see above."""

MAPPED_AT_LEAST = 2**20
"""Smaller ones never are: each mapping is a call of the system."""

# Of glibc's malloc.h; see mallopt(3). The first two values are those at which its own adaption ends.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
MMAP_THRESHOLD, _TRIM_THRESHOLD = 32 * 2**20, 64 * 2**20
_NEVER_TRIM = 2**30


class SlabPool:
    """Mappings for slabs; one whose slab is gone, and every view of it, is given to the next slab of about its size.

    Memory is asked of the system only once nothing is left unused, so that no more is resident than what was in use at
    some moment.
    """

    def __init__(self) -> None:
        self._unused: list[mmap.mmap] = []
        self._closed = False

    def store(self, slab: Tensor) -> Tensor:
        """Return a copy of the slab, in the same memory layout, that shares its memory with nothing else."""
        mapping = self._take(slab.nbytes)
        block = np.frombuffer(mapping, np.uint8, slab.nbytes)
        weakref.finalize(block, self._put, mapping).atexit = False
        like = torch.empty_like(slab, device="meta")
        copy = torch.from_numpy(block).view(slab.dtype).as_strided(like.shape, like.stride())
        return copy.copy_(slab)

    def close(self) -> None:
        """Give back what is not in use, now and whenever a slab goes."""
        self._closed = True
        self._unused.clear()

    def _take(self, size: int) -> mmap.mmap:
        fitting = [place for place, mapping in enumerate(self._unused) if size <= len(mapping) <= FIT * size]
        if fitting:
            return self._unused.pop(min(fitting, key=lambda place: len(self._unused[place])))
        mapping = None
        if self._unused and sys.platform == "linux":  # which can move pages into a mapping of another size
            mapping = self._unused.pop(max(range(len(self._unused)), key=lambda place: len(self._unused[place])))
        wanted = size - (len(mapping) if mapping else 0)
        while self._unused and wanted > 0:
            wanted -= len(self._unused.pop(0))
        if mapping is not None:
            mapping.resize(size)
            return mapping
        mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):  # clearing 2 MiB at a time takes half the time
            with contextlib.suppress(OSError):  # a kernel without
                mapping.madvise(mmap.MADV_HUGEPAGE)
        return mapping

    def _put(self, mapping: mmap.mmap) -> None:
        if not self._closed:
            self._unused.append(mapping)


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


def set_heap(mapped: int) -> None:
    """Have the C library keep what a step's temporaries leave, but for the large ones; glibc alone can be asked.

    Args:
        mapped: bytes from which on a temporary is given back at once, at least MAPPED_AT_LEAST.
    """
    if (library := _glibc()) is not None:
        library.mallopt(_M_MMAP_THRESHOLD, max(mapped, MAPPED_AT_LEAST))
        library.mallopt(_M_TRIM_THRESHOLD, _NEVER_TRIM)


@contextlib.contextmanager
def lean_heap() -> Iterator[None]:
    """Have the C library give back what temporaries leave, from before until after."""
    trim_heap()
    set_heap(MAPPED_BYTES)
    try:
        yield
    finally:
        reset_heap()


def trim_heap() -> None:
    """Give what is not in use back to the system."""
    if (library := _glibc()) is not None:
        library.malloc_trim(0)


def reset_heap() -> None:
    """Give what is not in use back, and have the C library do so by itself again."""
    if (library := _glibc()) is not None:
        library.mallopt(_M_MMAP_THRESHOLD, MMAP_THRESHOLD)
        library.mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD)
        library.malloc_trim(0)
