"""The voxels of a file: as many as its header claims, and never more than the file holds."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from typing import IO, TypeVar

import numpy as np

from maisi_tools.errors import InputError

Result = TypeVar("Result")

CHUNK = 2**24
"""Bytes that are read at a time: what is claimed is allocated only as far as it is there."""

WORKING_BYTES = 12
"""Memory for each voxel while a file is read: its value as stored, in float64 and in float32, less what is freed."""


DISK_FAILS = (errno.EIO, errno.ESTALE)
"""What a disk, or a share of another machine, says when it fails; no damaged file makes a library say so."""


def check_memory(shape: Sequence[int], name: str) -> None:
    """Refuse a volume that this machine's memory cannot hold.

    Args:
        shape: voxels, as the header claims.
        name: of the file.

    Raises:
        InputError: with both figures in GB.
    """
    needed = WORKING_BYTES * float(np.prod([float(n) for n in shape]))
    memory = float(os.sysconf("SC_PAGE_SIZE")) * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise InputError(
            f"{name} says that it has {' x '.join(map(str, shape))} voxels, which take {needed / 1e9:.1f} GB; allowed "
            f"is what this machine's memory of {memory / 1e9:.1f} GB holds: correct the header, or cut the volume"
        )


def read_voxels(stream: IO[bytes], shape: Sequence[int], dtype: np.dtype, name: str) -> np.ndarray:
    """The next voxels of an open file; nothing is allocated for what it does not hold.

    Args:
        stream: at the first voxel; compressed files are opened with their decompressor.
        shape: of the array, the first axis fastest.
        dtype: of a voxel.
        name: of the file.

    Returns:
        The array, in the stored type.

    Raises:
        InputError: the file is shorter.
    """
    count = int(np.prod(shape, dtype=object)) * dtype.itemsize
    data = bytearray()
    while len(data) < count:
        part = stream.read(min(CHUNK, count - len(data)))
        if not part:
            raise InputError(
                f"{name} says that it has {' x '.join(map(str, shape))} voxels, {count} bytes, and holds {len(data)}; "
                "allowed is a complete file: copy or export the file again"
            )
        data += part
    return np.frombuffer(data, dtype).reshape(shape, order="F")


def read_end(stream: IO[bytes], count: int, name: str) -> None:
    """Read on to a file's end, where gzip holds the sum of its content: until then a damaged one is not told from a
    good one. What follows the voxels is passed over, as programs that pad their files expect.

    Args:
        stream: behind the last voxel.
        count: bytes of the voxels. As many again, or 16 MB, are no padding, and may have no end.
        name: of the file.

    Raises:
        InputError: more follows than both.
    """
    most = max(count, CHUNK)
    followed = 0
    while part := stream.read(CHUNK):
        followed += len(part)
        if followed > most:
            raise InputError(
                f"{name} says that its voxels take {count} bytes, and holds more than {most} beyond them; allowed are "
                "as many voxels as it says: correct the header, or export the file again"
            )


def last_axis_fastest(array: np.ndarray) -> np.ndarray:
    """The array in C order, plane by plane: of a file, whose first axis is the fastest, numpy's own copy reads each
    value from another page (512x512x300 float32, one core: 4.7 s against 1.2).

    Args:
        array: of any shape.

    Returns:
        The array itself where it has that order already.
    """
    if array.ndim < 3 or array.flags.c_contiguous:
        return np.ascontiguousarray(array)
    ordered = np.empty(array.shape, array.dtype)
    for plane in range(array.shape[-2]):
        ordered[..., plane, :] = array[..., plane, :]
    return ordered


def skip(stream: IO[bytes], count: int) -> None:
    """Move on by `count` bytes, to the end at most; in compressed files, too."""
    while count > 0 and (part := stream.read(min(count, CHUNK))):
        count -= len(part)


def without_single_axes(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape without axes of one voxel behind the third, such as the one time point of a 4D file."""
    return (*map(int, shape[:3]), *(int(n) for n in shape[3:] if n != 1))


def read_whole(path: str | os.PathLike, read: Callable[[], Result]) -> Result:
    """What `read` returns; a damaged file makes the libraries raise nearly anything, and that becomes an InputError.

    Not so an error of the disk (:data:`DISK_FAILS`), after which the same file may be read.
    """
    try:
        return read()
    except InputError:
        raise
    except MemoryError as error:
        raise InputError(f"{path} is too large for this machine's memory; allowed is a smaller volume") from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno in DISK_FAILS:
            raise
        raise InputError(
            f"{path} cannot be read ({type(error).__name__}: {error}); allowed is an intact NIfTI or NRRD: copy or "
            "export the file again"
        ) from error
