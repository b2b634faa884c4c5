"""How many random examples a property is tried on: few with each change, five times as many by `make test-thorough`."""

from __future__ import annotations

import os


def examples(few: int) -> int:
    """Hypothesis's ``max_examples``. Derandomized, the few are always the same ones."""
    return few * (5 if "THOROUGH" in os.environ else 1)
