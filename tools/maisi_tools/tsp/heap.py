"""The C library's heap, set up so that a slab's memory goes back to the system with the slab.

glibc keeps what is freed in its heap, and after slabs of many sizes up to a third of the peak is holes in it. Blocks
that are mapped by themselves leave none. Other C libraries, and other systems, are left as they are.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform

MAPPED_BYTES = 2**20
"""Blocks from this size on are mapped: slabs are larger, what a convolution's bookkeeping allocates is smaller."""

_M_MMAP_THRESHOLD = -3  # of glibc's malloc.h; set once, it no longer grows with what is freed


@functools.cache
def map_slabs() -> bool:
    """Have large blocks mapped in this process from now on; returns whether the C library does."""
    if platform.libc_ver()[0] != "glibc":
        return False
    return bool(ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, MAPPED_BYTES))


def ask_for_huge_pages() -> None:
    """Have torch ask for pages of 2 MiB, which makes a mapped block's first use twice as fast.

    Torch looks when it allocates its first CPU tensor, so this is called on import; a user's own setting stays.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
