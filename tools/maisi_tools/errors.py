"""The error for wrong input, and how it reaches the user without a traceback."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import TracebackType

from maisi_tools.tsp.errors import TSPError


class InputError(ValueError):
    """Something the user gave cannot be used.

    Raised at the door, before minutes of computing. The message says what was given, what is allowed and what to do.
    """


class TrainingError(RuntimeError):
    """Training cannot go on: a loss or the weights are no longer finite. The message says what broke and what to do."""


FEW = 5
"""Names of a kind that a message has."""


def first_few(names: Sequence[str]) -> str:
    """Names for a message, which says where there are more."""
    return ", ".join(names[:FEW]) + (", ..." if len(names) > FEW else "")


def find_input_error(error: BaseException | None) -> InputError | TrainingError | TSPError | None:
    """Return the first InputError among `error`, its causes and its contexts, or None.

    What stops a training run, and what the TSP engine refuses (a memory limit that cannot be met, a lost rank), count
    as one: their messages, too, say what to do.

    MONAI's ConfigParser wraps what a component raises into a RuntimeError, so the error at hand is rarely the cause.
    """
    pending, seen = [error], set()
    while pending:
        current = pending.pop(0)
        if current is None or id(current) in seen:
            continue
        if isinstance(current, (InputError, TrainingError, TSPError)):
            return current
        seen.add(id(current))
        pending += [current.__cause__, current.__context__]
    return None


def report_input_errors() -> None:
    """Let an uncaught InputError end this process with `error: MESSAGE` on stderr (exit status 1) and no traceback.

    Every other exception goes to the hook that was in place before. Calling it again changes nothing.
    """
    previous = sys.excepthook
    if getattr(previous, "reports_input_errors", False):
        return

    def hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        found = find_input_error(error)
        if found is None:
            previous(kind, error, traceback)
        else:
            print(f"error: {found}", file=sys.stderr)

    hook.reports_input_errors = True  # type: ignore[attr-defined]
    sys.excepthook = hook
