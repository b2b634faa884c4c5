"""Fingerprints: short hashes of content, by which a file that was made from something tells whether that changed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LENGTH = 32
"""Hexadecimal digits of a fingerprint: 128 bits of the SHA-256, so that two contents never share one by chance."""

CHUNK = 1 << 20  # bytes


def sha256(path: str | os.PathLike) -> str:
    """SHA-256 of a file's bytes, all 64 hexadecimal digits."""
    digest = hashlib.sha256()
    _update(digest, Path(path))
    return digest.hexdigest()


def of_file(path: str | os.PathLike) -> str:
    """Fingerprint of a file's bytes, or of the names and bytes of all files in a folder (a DICOM series)."""
    path, digest = Path(path), hashlib.sha256()
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        if path.is_dir():
            digest.update(file.name.encode() + b"\0")
        _update(digest, file)
    return digest.hexdigest()[:LENGTH]


def of_text(text: str) -> str:
    """Fingerprint of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:LENGTH]


def of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Fingerprint of named tensors, whatever their order.

    Floating-point values count as float32: weights that are stored as fp16 have the fingerprint of the network they
    were loaded into.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu()
        value = value.float() if value.is_floating_point() else value
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\0".encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:LENGTH]


def of_settings(settings: Any) -> str:
    """JSON settings as one line, the same for settings that mean the same: keys sorted, nulls left out, 2 as 2.0."""
    return json.dumps(_canonical(settings), sort_keys=True)


def _canonical(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _canonical(entry) for key, entry in value.items() if entry is not None}
    if isinstance(value, (list, tuple)):
        return [_canonical(entry) for entry in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _update(digest: Any, file: Path) -> None:
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
