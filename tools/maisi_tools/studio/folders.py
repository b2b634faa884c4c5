"""Where the studio keeps things: one folder with jobs, uploads and label maps, held by one server."""

from __future__ import annotations

import errno
import json
import re
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maisi_tools.errors import InputError
from maisi_tools.files import held

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""Errors after which another disk, or room on it, helps."""

JOB = "job.json"
"""In a job's folder: its request and what has become of it."""

_ID = re.compile(r"[0-9a-z-]{1,40}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_ -]{0,63}")


@dataclass(frozen=True)
class Folders:
    """The studio's folder, and the one with the bundles.

    An id or a name that comes from a request is only ever looked up: it becomes a path when something of that id is
    there.
    """

    root: Path
    bundles: Path

    def job(self, id: str) -> Path:
        """The folder of a job, which is also the output folder of its run."""
        return self.root / "jobs" / _checked(_ID, id, "job")

    def upload(self, id: Any) -> dict[str, Any]:
        """What is known of an upload; ``path`` is its file, ``notes`` what was warned of when it was read.

        Raises:
            InputError: there is none of this id.
        """
        try:
            folder = self.root / "uploads" / _checked(_ID, id, "upload")
            known = json.loads((folder / "upload.json").read_text())
        except (OSError, ValueError):
            raise InputError(f"there is no upload {id!r}; upload the file first") from None
        return {"notes": [], **known, "path": str(folder / known["file"])}  # earlier versions kept no notes

    def label_map(self, name: Any) -> str:
        """What :func:`~maisi_tools.masks.label_maps.read_label_map` takes for a label map of the studio's.

        Raises:
            InputError: no such label map.
        """
        from maisi_tools.masks.label_maps import LABEL_MAPS

        if isinstance(name, str) and name in LABEL_MAPS:
            return name
        known = self.label_maps()
        if not isinstance(name, str) or name not in known:
            raise InputError(f"label_map is {name!r}; allowed are {', '.join([*LABEL_MAPS, *known])}")
        return str(known[name])

    def label_maps(self) -> dict[str, Path]:
        """Those that were saved: name -> file."""
        return {path.stem: path for path in sorted((self.root / "label_maps").glob("*.json"))}

    def new_label_map(self, name: Any) -> Path:
        """The file for a label map of this name.

        Raises:
            InputError: no usable name.
        """
        return self.root / "label_maps" / f"{_checked(_NAME, name, 'label map')}.json"

    def held(self) -> AbstractContextManager[None]:
        """Hold the folder, see :func:`~maisi_tools.files.held`."""
        return held(
            self.root, f"another studio runs in {self.root}; use its page, stop it, or give another --output_dir"
        )


def _checked(pattern: re.Pattern[str], text: Any, what: str) -> str:
    if not isinstance(text, str) or not pattern.fullmatch(text):
        raise InputError(
            f"{text!r} names no {what}; allowed are letters, digits, - and, within a name, _ and spaces, 64 at most"
        )
    return text
