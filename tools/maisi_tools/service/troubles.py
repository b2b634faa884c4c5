"""What went wrong, counted: for the log, the metrics, and health."""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

logger = logging.getLogger(__name__)

DEGRADED_SECONDS = 300.0
"""How long one trouble is seen in health."""

PARTS = ("object", "store", "study", "spool", "queue", "archive")
"""An object that was not taken; the disk that objects go to; a study that cannot be queued; a look at the spool; the
queue; an archive that was asked."""

MAX_TEXT = 2000
"""Characters of a text that came from outside, or from an error about it."""


class Troubles:
    """Counts what went wrong, by part; safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = dict.fromkeys(PARTS, 0)
        self._last: dict[str, tuple[float, str]] = {}

    def add(self, part: str, text: str) -> None:
        """Log and count one trouble; the same text again within :data:`DEGRADED_SECONDS` is only counted.

        Args:
            part: one of :data:`PARTS`.
            text: what is wrong.
        """
        text, now = printable(text), time.monotonic()
        with self._lock:
            self._counts[part] += 1
            since, before = self._last.get(part, (-DEGRADED_SECONDS, ""))
            repeated = before == text and now - since < DEGRADED_SECONDS
            self._last[part] = now, text
        if not repeated:
            logger.error("%s", text)

    def counts(self) -> dict[str, int]:
        """Part -> how often something went wrong since the start."""
        with self._lock:
            return dict(self._counts)

    def recent(self) -> dict[str, str]:
        """Part -> what went wrong last, of the last :data:`DEGRADED_SECONDS`."""
        now = time.monotonic()
        with self._lock:
            return {part: text for part, (since, text) in self._last.items() if now - since < DEGRADED_SECONDS}


def printable(text: Any) -> str:
    """A text that came from outside, for a log or a file: one line, no control characters, of bounded length."""
    text = str(text)
    shown = "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text[:MAX_TEXT])
    return shown + ("..." if len(text) > MAX_TEXT else "")
