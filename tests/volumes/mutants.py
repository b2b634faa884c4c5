"""Damaged volumes from a seed: truncated, with bits flipped, with false header fields, of NIfTI and NRRD."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import nrrd
import numpy as np

from .conftest import OBLIQUE, ct_values

NIFTI_FIELDS = {  # name -> byte, format and false values (nifti1.h)
    "sizeof_hdr": (0, "<i", [0, 540, -348, 1543569408]),
    "dim": (40, "<h", [0, 1, 2, 4, 7, 8, -3, 30000]),
    "dim[1]": (42, "<h", [0, 1, -10, 11, 32767]),
    "dim[2]": (44, "<h", [0, -1, 9, 30000]),
    "dim[3]": (46, "<h", [0, 1, -14, 15, 20000]),
    "datatype": (70, "<h", [0, 1, 2, 8, 16, 32, 64, 128, 512, 768, 1024, 1536, 2304, 9999]),
    "bitpix": (72, "<h", [0, 1, 8, 64, -16]),
    "qfac": (76, "<f", [0.0, 2.0, float("nan"), -1.0]),
    "pixdim[1]": (80, "<f", [0.0, -1.0, float("nan"), float("inf"), 1e-30, 1e30]),
    "vox_offset": (108, "<f", [0.0, 100.0, 353.5, 1e9, float("nan"), float("inf"), -5.0]),
    "scl_slope": (112, "<f", [0.0, -1.0, float("nan"), float("inf"), 1e38]),
    "scl_inter": (116, "<f", [float("nan"), float("inf"), -1e38, 5000.0]),
    "xyzt_units": (123, "<b", [0, 1, 3, 4, 5, 7, 127]),
    "qform_code": (252, "<h", [0, 5, 6, 77, -1]),
    "sform_code": (254, "<h", [0, 5, 6, 77, -1]),
    "quatern_b": (256, "<f", [2.0, float("nan"), -1.0]),
    "qoffset_x": (268, "<f", [float("nan"), 1e30]),
    "srow_x[0]": (280, "<f", [0.0, float("nan"), float("inf"), 1e20]),
    "srow_z[3]": (324, "<f", [float("nan"), 1e30]),
    "magic": (344, "<4s", [b"ni1\0", b"n+2\0", b"\0\0\0\0", b"nrrd"]),
    "extension": (348, "<4s", [b"\1\0\0\0", b"\xff\xff\xff\xff"]),
}

NRRD_LINES = {  # field -> false values
    "NRRD0005": [
        "NRRD0009",
        "NRRD",
        "JPEG",
    ],
    "type: int16": [
        "type: float",
        "type: block",
        "type: complex",
        "type:",
        "type: double",
    ],
    "dimension: 3": [
        "dimension: 4",
        "dimension: 0",
        "dimension: x",
        "dimension: -3",
    ],
    "sizes: 10 12 14": [
        "sizes: 10 12",
        "sizes: 2000 2000 1000",
        "sizes: 30000 30000 30000",
        "sizes: 0 12 14",
        "sizes: -10 12 -14",
        "sizes: 10 12 14 1",
        "sizes: 1e9 1 1",
        "sizes: 14 12 10",
        "sizes: 99999999999999999999 1 1",
        "sizes: a b c",
    ],
    "space: left-posterior-superior": [
        "space: 3D-left-handed",
        "space:",
        "space dimension: 2",
        "space: LPST",
    ],
    "space directions: (2,0,0) (0,2,0) (0,0,3)": [
        "space directions: none none none",
        "space directions: (2,0,0) (0,2,0)",
        "space directions: (2,0) (0,2) (0,0)",
        "space directions: (0,0,0) (0,0,0) (0,0,0)",
        "space directions: (nan,0,0) (0,2,0) (0,0,3)",
        "spacings: 1 1 1",
        "space directions: (inf,0,0) (0,2,0) (0,0,3)",
        "space directions: (2,0,0) (2,0,0) (0,0,3)",
    ],
    "space origin: (1,2,3)": [
        "space origin: (1,2)",
        "space origin: (nan,2,3)",
        "space origin: 1 2 3",
        "units: a",
    ],
    "endian: little": [
        "endian: middle",
        "endian: big",
        "endian:",
    ],
    "encoding: ": [
        "encoding: hex",
        "encoding: gzip",
        "encoding: raw",
        "encoding: bzip2",
        "encoding: text",
        "encoding:",
    ],
    "extra": [
        "data file: /etc/passwd",
        "data file: ../x.nii",
        "data file: LIST",
        "byte skip: -1",
        "byte skip: 999999999999",
        "line skip: -1",
        "line skip: 999999",
        "byte skip: x",
        'space units: "lightyear" "mm" "mm"',
        "sizes: 1 1 1",
        'space units: "mm"',
        "Segment0_Name:=liver",
        "Segment0_LabelValue:=x",
        "Segment0_Layer:=9",
        "no colon here",
    ],
}


def make_mutant(folder: Path, number: int, seed: int = 0) -> Path:
    """Write mutant `number` of a seed into a folder; the same numbers give the same bytes."""
    rng = np.random.default_rng([seed, number])
    name = ("nii", "nii.gz", "nrrd")[number % 3]
    path = folder / f"mutant{number:03d}.{name}"
    if name == "nrrd":
        encoding = str(rng.choice(["raw", "gzip", "bzip2", "text"]))
        header = {"space": "left-posterior-superior", "space directions": np.diag([2, 2, 3]), "space origin": [1, 2, 3]}
        nrrd.write(str(path), ct_values(), {**header, "encoding": encoding})
        head, _, data = path.read_bytes().partition(b"\n\n")
        head = b"\n".join(line for line in head.split(b"\n") if not line.startswith(b"#"))  # the date, among them
        path.write_bytes(head + b"\n\n" + data)
    else:
        nib.save(nib.Nifti1Image(ct_values(), OBLIQUE), path)
    content = path.read_bytes()
    ways: list[Callable] = [_cut, _flip, _field if name == "nrrd" else _false_fields, _field_and_flip]
    inner = name == "nii.gz" and rng.random() < 0.7  # the content itself, or the compressed file
    content = gzip.decompress(content) if inner else content
    content = ways[int(rng.integers(len(ways)))](bytearray(content), rng, name)
    path.write_bytes(gzip.compress(content, mtime=0) if inner else content)
    return path


def _cut(content: bytearray, rng: np.random.Generator, name: str) -> bytes:
    return bytes(content[: int(rng.integers(len(content)))])


def _flip(content: bytearray, rng: np.random.Generator, name: str) -> bytes:
    reach = len(content) if rng.random() < 0.5 else min(len(content), 400)  # the header more often than its share
    for _ in range(int(rng.integers(1, 30))):
        content[int(rng.integers(reach))] ^= 1 << int(rng.integers(8))
    return bytes(content)


def _false_fields(content: bytearray, rng: np.random.Generator, name: str) -> bytes:
    for field in rng.choice(sorted(NIFTI_FIELDS), size=int(rng.integers(1, 4)), replace=False):
        begin, form, values = NIFTI_FIELDS[str(field)]
        content[begin : begin + struct.calcsize(form)] = struct.pack(form, values[int(rng.integers(len(values)))])
    return bytes(content)


def _field(content: bytearray, rng: np.random.Generator, name: str) -> bytes:
    head, _, data = bytes(content).partition(b"\n\n")
    lines = head.decode().split("\n")
    for field in rng.choice(sorted(NRRD_LINES), size=int(rng.integers(1, 3)), replace=False):
        value = NRRD_LINES[str(field)][int(rng.integers(len(NRRD_LINES[str(field)])))]
        place = next((place for place, line in enumerate(lines) if line.startswith(str(field))), None)
        lines[place if place is not None else slice(len(lines), None)] = value if place is not None else [value]
    return "\n".join(lines).encode() + b"\n\n" + data


def _field_and_flip(content: bytearray, rng: np.random.Generator, name: str) -> bytes:
    changed = _field(content, rng, name) if name == "nrrd" else _false_fields(content, rng, name)
    return _flip(bytearray(changed), rng, name)
