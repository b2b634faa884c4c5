"""The `maisi` command: the few things a bundle's config cannot express.

A command is a function; its options are its arguments, and its help is its docstring.
"""

from __future__ import annotations

import difflib
import inspect
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import fire

from maisi_tools.cli import data, dicom, make, masks, quality, service
from maisi_tools.cli.options import planned
from maisi_tools.errors import find_input_error

GROUPS: dict[str, tuple[Callable[..., None], ...]] = {
    "make": (make.demo, make.cohort, make.twin, make.plan, make.weights, make.package),
    "masks": (masks.phantom, masks.edit, masks.index, masks.find),
    "data": (data.prepare, data.complete_masks),
    "quality": (
        quality.preview,
        quality.report,
        quality.compare,
        quality.realism,
        quality.stratify,
    ),
    "DICOM": (dicom.dicom_read, dicom.dicom_write),
    "service": (service.studio, service.listen, service.jobs),
}
"""The commands, as the help shows them."""

COMMANDS = tuple(command for group in GROUPS.values() for command in group)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; wrong input ends with `error: ...` on stderr and status 2 instead of a traceback."""
    arguments = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    commands = {command.__name__: planned(command) for command in COMMANDS}
    if arguments[0] in ("--help", "-h"):
        print(_help())
        return 0
    if arguments[0].replace("-", "_") not in commands:
        print(f"error: {_unknown(arguments[0])}", file=sys.stderr)
        return 2
    try:
        plan = fire.Fire(commands, arguments, name="maisi", serialize=lambda _: None)
        plan.execute()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        message = find_input_error(error)
        if message is None and not isinstance(error, OSError) and not _ours(error):
            raise
        print(f"error: {message or error}", file=sys.stderr)
        return 2
    return 0


def _help() -> str:
    """The commands in their groups, each with the first line of what it says of itself."""
    width = max(len(command.__name__) for command in COMMANDS)
    lines = ["maisi COMMAND [--option value ...]", "maisi COMMAND --help lists the options of a command."]
    for group, commands in GROUPS.items():
        lines += ["", f"{group}:"]
        for command in commands:
            lines.append(f"  {command.__name__:<{width}}  {inspect.cleandoc(command.__doc__ or '').splitlines()[0]}")
    return "\n".join(lines)


def _unknown(given: str) -> str:
    """What to say of a command that there is not."""
    names = [command.__name__ for command in COMMANDS]
    nearest = difflib.get_close_matches(given.replace("-", "_").lower(), names, n=1)
    meant = f"did you mean {nearest[0]}? All of them: " if nearest else "choose among: "
    return f"{given!r} is no command; {meant}{', '.join(names)}."


def _ours(error: Exception) -> bool:
    """Whether it is a ValueError raised by this package, which says what is wrong with the input."""
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    return isinstance(error, ValueError) and Path(__file__).parents[1] in raised_in.parents
