"""NRRD files: their header, their grid in mm, and their voxels, read no further than the header claims."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import nrrd
import numpy as np

from maisi_tools.errors import InputError
from maisi_tools.volumes.checks import check_affine, check_stored_type, warn_sheared
from maisi_tools.volumes.stored import check_memory, read_voxels, skip

logger = logging.getLogger(__name__)

HEADER_BYTES = 2**24
"""A header is text of some thousand bytes; what is longer is none."""

SPACES = {
    "right-anterior-superior": (1, 1, 1),
    "left-anterior-superior": (-1, 1, 1),
    "left-posterior-superior": (-1, -1, 1),
}
"""Anatomical spaces of NRRD (format definition, section 5) -> signs of their axes in RAS. Their names are written in
any case, or as initials."""

UNITS_MM = {
    **dict.fromkeys(("", "none", "???", "mm", "millimeter", "millimeters", "millimetre", "millimetres"), 1.0),
    **dict.fromkeys(("m", "meter", "meters", "metre", "metres"), 1000.0),
    **dict.fromkeys(("cm", "centimeter", "centimeters", "centimetre", "centimetres"), 10.0),
    **dict.fromkeys(("um", "\u00b5m", "\u03bcm", "micron", "microns", "micrometer", "micrometre"), 0.001),
}
"""Names in "space units" -> mm; without a name, mm."""

TYPES = {
    "i1": ("signed char", "int8", "int8_t"),
    "u1": ("uchar", "unsigned char", "uint8", "uint8_t"),
    "i2": ("short", "short int", "signed short", "signed short int", "int16", "int16_t"),
    "u2": ("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"),
    "i4": ("int", "signed int", "int32", "int32_t"),
    "u4": ("uint", "unsigned int", "uint32", "uint32_t"),
    "i8": ("longlong", "long long", "long long int", "signed long long", "signed long long int", "int64", "int64_t"),
    "u8": ("ulonglong", "unsigned long long", "unsigned long long int", "uint64", "uint64_t"),
    "f4": ("float",),
    "f8": ("double",),
}
"""numpy's name of a type -> its names in NRRD."""

BYTE_ORDERS = {"little": "<", "big": ">"}
TEXT, GZIP, BZIP2 = ("ascii", "text", "txt"), ("gzip", "gz"), ("bzip2", "bz2")

Header = Mapping[str, Any]


def read_header(path: str | os.PathLike) -> tuple[Header, int]:
    """The fields of a file's header, and the byte at which its data begin.

    Raises:
        InputError: the file does not begin with an NRRD header.
        Exception: what pynrrd raises for one that is damaged.
    """
    lines, begin = [], 0
    with open(path, "rb") as file:
        while begin < HEADER_BYTES and (line := file.readline(HEADER_BYTES - begin)):
            begin += len(line)
            if not (text := line.decode(errors="replace").rstrip()):
                break
            lines.append(text)
    if begin >= HEADER_BYTES or not lines or not lines[0].startswith("NRRD"):
        raise InputError(
            f"{path} cannot be read: it has no NRRD header; allowed is an intact NRRD: copy or export the file again"
        )
    return nrrd.read_header(lines), begin


def read_nrrd(path: str | os.PathLike) -> tuple[np.ndarray, np.ndarray]:
    """Read an NRRD file, and check what its header claims before anything is allocated.

    Args:
        path: of the file; a "data file" that it names has to lie in its folder.

    Returns:
        Values (X, Y, Z, ...), float32, axes without a direction in space behind the others, and the affine (4, 4) to
        RAS in mm.

    Raises:
        InputError: the header has no usable geometry, or claims more than the file holds.
        Exception: what pynrrd and the decompressors raise for a damaged file.
    """
    header, begin = read_header(path)
    affine, spatial = nrrd_affine(header, str(path))
    shape = [int(n) for n in header["sizes"]]
    if header.get("dimension") != len(shape) or min(shape) < 1:
        raise InputError(
            f"{path} has the sizes {shape} and the dimension {header.get('dimension')}; allowed is one size from 1 on "
            "for each axis: correct the header"
        )
    check_memory(shape, str(path))
    values = _stored(header, Path(path), begin, shape)
    check_stored_type(values.dtype, str(path))
    order = [*spatial, *(axis for axis in range(len(shape)) if axis not in spatial)]
    return values.transpose(order).astype(np.float32), affine


def nrrd_affine(header: Header, name: str) -> tuple[np.ndarray, list[int]]:
    """The affine (4, 4) of a header from voxels to RAS in mm, and the three axes of the array that it is about.

    Args:
        header: see :func:`read_header`.
        name: of the file.

    Raises:
        InputError: there is no geometry, one in a space that is not the patient's, or in an unknown unit.
    """
    if missing := [field for field in ("space directions", "space origin") if field not in header]:
        raise InputError(
            f"{name} has no {' and no '.join(missing)} in its header; allowed is an NRRD with both: export it from a "
            "program that knows the patient's position, or convert it to NIfTI"
        )
    rows = np.asarray(header["space directions"], dtype=float)
    spatial = [axis for axis, row in enumerate(rows) if not np.isnan(row).all()]
    origin = np.asarray(header["space origin"], dtype=float)
    if rows.ndim != 2 or rows.shape[1] != 3 or len(spatial) != 3 or len(rows) != len(header["sizes"]):
        raise InputError(
            f"{name} has {len(spatial)} space directions for {len(header['sizes'])} axes; allowed are three of three "
            "numbers, and none for further axes: correct the header"
        )
    if origin.shape != (3,):
        raise InputError(f"{name} has the space origin {origin.tolist()}; allowed are three numbers in mm: correct it")
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = rows[spatial].T, origin
    check_affine(affine, name)
    warn_sheared(affine, name)
    return np.diag([*(_signs(header, name) * _units_mm(header, name)), 1.0]) @ affine, spatial


def _signs(header: Header, name: str) -> np.ndarray:
    given = str(header.get("space", "")).strip().casefold()
    if not given:
        logger.warning("%s does not name its space; it is taken for left-posterior-superior", name)
        given = "lps"
    for space, signs in SPACES.items():
        if given in (space, "".join(word[0] for word in space.split("-"))):
            return np.array(signs, dtype=float)
    raise InputError(
        f"{name} has the space {header['space']!r}; allowed are {', '.join(SPACES)}, or their initials: convert it to "
        "NIfTI"
    )


def _units_mm(header: Header, name: str) -> np.ndarray:
    given = [str(unit).strip().casefold() for unit in header.get("space units", ())] or [""] * 3
    if len(given) != 3 or any(unit not in UNITS_MM for unit in given):
        raise InputError(
            f"{name} has the space units {header['space units']}; allowed are three of mm, cm, m and um: correct the "
            "header"
        )
    return np.array([UNITS_MM[unit] for unit in given])


def _stored(header: Header, path: Path, begin: int, shape: Sequence[int]) -> np.ndarray:
    """The array as it is in the file, in its own order of axes."""
    encoding = str(header["encoding"]).casefold()
    dtype = _dtype(header, encoding, str(path))
    with _data(header, path, begin) as file:
        for _ in range(int(_either(header, "line skip", "lineskip", 0))):
            if not file.readline(HEADER_BYTES):
                break
        past = int(_either(header, "byte skip", "byteskip", 0))
        if encoding in TEXT:
            return _from_text(file, shape, dtype, path)
        if encoding not in ("raw", *GZIP, *BZIP2):
            raise InputError(
                f"{path} has the encoding {encoding!r}; allowed are raw, {', '.join((*GZIP, *BZIP2, *TEXT))}: export "
                "it again"
            )
        stream: Any = file
        if encoding in GZIP:
            stream = gzip.GzipFile(fileobj=file)
        elif encoding in BZIP2:
            stream = bz2.BZ2File(file)
        if past == -1 and stream is file:  # the data are the file's end
            file.seek(max(0, file.seek(0, os.SEEK_END) - int(np.prod(shape, dtype=object)) * dtype.itemsize))
        elif past < 0:
            raise InputError(
                f"{path} has the byte skip {past} in {encoding} data; allowed is 0 or more: export it again"
            )
        else:
            skip(stream, past)
        values = read_voxels(stream, shape, dtype, str(path))
        if stream.read(1):
            raise InputError(
                f"{path} says that it has {' x '.join(map(str, shape))} voxels, and holds more; allowed is as many as "
                "it says: correct the header, or export the file again"
            )
        return values


@contextlib.contextmanager
def _data(header: Header, path: Path, begin: int) -> Iterator[IO[bytes]]:
    """The file with the data, open where they begin."""
    given = _either(header, "data file", "datafile", None)
    if given is None:
        with open(path, "rb") as file:
            file.seek(begin)
            yield file
        return
    parts = Path(str(given)).parts
    if Path(str(given)).is_absolute() or ".." in parts:
        raise InputError(
            f"{path} names the data file {given!r}, which is not in its folder; allowed is a file beside the header: "
            "move it there, and write its name alone"
        )
    detached = path.parent / str(given)
    if not detached.is_file():
        raise InputError(f"{path} names the data file {given!r}, which is not there; allowed is one file beside it")
    with open(detached, "rb") as file:
        yield file


def _dtype(header: Header, encoding: str, name: str) -> np.dtype:
    given = str(header["type"]).strip().casefold()
    code = next((code for code, names in TYPES.items() if given in names), None)
    if code is None:
        raise InputError(f"{name} has voxels of the type {given!r}; allowed are integers, float and double: convert it")
    if np.dtype(code).itemsize == 1 or encoding in TEXT:
        return np.dtype(code)
    order = str(header.get("endian", "")).strip().casefold()
    if order not in BYTE_ORDERS:
        raise InputError(
            f"{name} has the endian {order!r}; allowed are {' and '.join(BYTE_ORDERS)}: correct the header"
        )
    return np.dtype(BYTE_ORDERS[order] + code)


def _from_text(file: IO[bytes], shape: Sequence[int], dtype: np.dtype, path: Path) -> np.ndarray:
    count = int(np.prod(shape, dtype=object))
    text = file.read()  # a value takes two bytes at least, so the file bounds what is read of it
    values = np.array(text.split(), dtype=dtype) if 2 * count <= len(text) + 1 else np.empty(0)
    if len(values) != count:
        raise InputError(
            f"{path} says that it has {' x '.join(map(str, shape))} voxels, and holds another number; allowed is as "
            "many as it says: export the file again"
        )
    return values.reshape(shape, order="F")


def _either(header: Header, name: str, other: str, default: Any) -> Any:
    """A field that NRRD writes with or without a space."""
    return header.get(name, header.get(other, default))
