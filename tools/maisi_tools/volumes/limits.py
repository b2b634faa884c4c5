"""How much a file from outside may make us read; each limit can be set by an environment variable."""

from __future__ import annotations

import os

from maisi_tools.errors import InputError

DEFAULTS = {
    "MAISI_MAX_FILE_BYTES": 2 << 30,
    "MAISI_MAX_ZIP_BYTES": 16 << 30,
    "MAISI_MAX_ZIP_MEMBERS": 20_000,
    "MAISI_MAX_VOXELS": 512 * 512 * 2048,
    "MAISI_MAX_CONTOUR_POINTS": 100_000,
}
"""One DICOM file, decompressed; the members of a zip file, together, and their number; voxels of a DICOM volume or
mask, and of whatever comes to the studio; points of one contour."""


def limit(name: str) -> int:
    """A limit: of the environment, else the default.

    Raises:
        InputError: the variable holds no positive whole number.
    """
    text = os.environ.get(name, "")
    if not text:
        return DEFAULTS[name]
    if not text.isdecimal() or not int(text):
        raise InputError(f"the environment variable {name} is {text!r}; allowed is a whole number from 1 up")
    return int(text)


def check_limit(name: str, value: int, what: str) -> None:
    """Refuse what is beyond a limit.

    Args:
        name: of the limit.
        value: what was found.
        what: the beginning of the message, such as "ct.zip holds 70000 files".

    Raises:
        InputError: `value` is beyond it.
    """
    if value > (allowed := limit(name)):
        raise InputError(f"{what}; allowed are {allowed}: if it is right, set the environment variable {name} higher")
