"""Names that came from outside, before they become paths."""

from __future__ import annotations

import hashlib
import re
from typing import Any

MAX_UID = 64
"""Characters of a UID (DICOM PS3.5 section 9.1)."""

_SYNTAX = re.compile(r"[0-9]+(\.[0-9]+)*")


def is_uid(value: Any) -> bool:
    """Whether a value has the syntax of a UID: numbers with dots between them, at most 64 characters.

    Leading zeros, which the standard forbids and devices write, are let through.
    """
    return len(str(value)) <= MAX_UID and _SYNTAX.fullmatch(str(value)) is not None


def uid_name(value: Any) -> str:
    """The one way from a name that came from outside to the name of a file or folder.

    A UID is its own name. Of anything else (a path, a NUL, 300 characters) the name is a hash, so that it is neither a
    path nor too long, and two of them do not share a file.
    """
    if is_uid(value):
        return str(value)
    return f"no-uid-{hashlib.sha256(str(value).encode(errors='surrogatepass')).hexdigest()[:32]}"
