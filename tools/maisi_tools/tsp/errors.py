"""What tensor splitting parallelism refuses, and why."""

from __future__ import annotations


class TSPError(RuntimeError):
    """A network or a call that cannot be run in slabs (training mode, a mutated view, a lost rank)."""


class MemoryLimitError(TSPError):
    """No plan fits under the memory limit; the message names the least limit that would do."""
