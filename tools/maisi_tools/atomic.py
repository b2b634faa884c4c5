"""Files that appear complete or not at all."""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: str | os.PathLike, durable: bool = False) -> Iterator[Path]:
    """Yield a temporary path to write to; on success it is renamed to `path`, on an error it is removed.

    The temporary file lies beside the target, because a rename is atomic only within one file system, and keeps its
    suffixes, because nibabel and matplotlib choose the format by them; its name has the process id and the thread's, so
    that no two write into one. Missing folders are created.

    Args:
        path: the target.
        durable: wait until file, name and folder are on the disk, so that a power cut after this undoes none of them.

    Raises:
        OSError: the folder or file cannot be created.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{os.getpid()}-{threading.get_native_id()}-{path.name}")
    try:
        yield part
        if durable:
            sync(part)
        part.replace(path)
        if durable:
            sync(path.parent)
            sync(path.parent.parent)
    finally:
        part.unlink(missing_ok=True)


def is_part(path: Path) -> bool:
    """Whether a file has the name of a temporary one of :func:`replacing`, as a killed process leaves them."""
    return re.match(r"\.\d+-\d+-", path.name) is not None


def sync(path: Path) -> None:
    """Wait until a file, or what a folder lists, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: str | os.PathLike, content: Any, durable: bool = False) -> None:
    """Write JSON, complete or not at all; see :func:`replacing`."""
    with replacing(path, durable) as part:
        part.write_text(json.dumps(content, indent=1) + "\n")
