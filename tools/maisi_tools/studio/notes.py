"""What is warned of while a file is read or a job is made, for the person who asked for it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path


class Notes(logging.Handler):
    """Collects what maisi_tools warns of while it is open.

    Args:
        names: path of the studio's own -> what the user calls the file; put in its place.
        thread: id of the only thread that is listened to, None for all.
        before: what was warned of already.

    Attributes:
        found: the warnings, each once, in the order they came.
    """

    def __init__(self, names: Mapping[str | Path, str], thread: int | None = None, before: Iterable[str] = ()) -> None:
        super().__init__(logging.WARNING)
        self.names, self.thread, self.found = names, thread, list(dict.fromkeys(before))

    def words(self, text: str) -> str:
        """A text with the user's names for files."""
        for path, name in self.names.items():
            text = text.replace(str(path), name)
        return text

    def emit(self, record: logging.LogRecord) -> None:
        if self.thread in (None, record.thread) and (text := self.words(record.getMessage())) not in self.found:
            self.found.append(text)

    def __enter__(self) -> Notes:
        logging.getLogger("maisi_tools").addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("maisi_tools").removeHandler(self)
