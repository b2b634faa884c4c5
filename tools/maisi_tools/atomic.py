"""Files that appear complete or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path to write to; on success it is renamed to `path`, on an error it is removed.

    The temporary file lies beside the target, because a rename is atomic only within one file system, and keeps its
    suffixes, because nibabel and matplotlib choose the format by them; its name has the process id, so that several
    processes do not write into one. Missing folders are created.

    Raises:
        OSError: the folder or file cannot be created.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Write JSON, complete or not at all; see :func:`replacing`."""
    with replacing(path) as part:
        part.write_text(json.dumps(content, indent=1) + "\n")
