"""Counts what the bundles' configs repeat: `python tests/config_lines.py`; tests/bundles/test_configs.py holds it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BUNDLES = Path(__file__).resolve().parents[1] / "bundles"


def leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """(path, JSON) of each value in a config: an overlay's "a#b" is the path a, b.

    A list of numbers or words is one value; in one of components or expressions each counts, wherever it stands.
    """
    if isinstance(value, dict) and value:
        for key, entry in value.items():
            yield from leaves(entry, (*path, *key.lstrip("+").split("#")))
    elif isinstance(value, list) and any(
        isinstance(entry, dict) or str(entry).startswith(("$", "@", "%")) for entry in value
    ):
        for entry in value:
            yield from leaves(entry, path)
    else:
        yield path, json.dumps(value)


def count(bundles: Path = BUNDLES) -> dict[str, float]:
    """Lines of all configs with the metadata, their leaves, and the share of leaves that repeat another one."""
    files = sorted(bundles.glob("*/configs/*.json"))
    found = Counter(
        leaf for file in files if file.name != "metadata.json" for leaf in leaves(json.loads(file.read_text()))
    )
    total = found.total()
    return {
        "lines": sum(len(file.read_text().splitlines()) for file in files),
        "longest": max(len(line) for file in files for line in file.read_text().splitlines()),
        "leaves": total,
        "repeated": (total - len(found)) / total,
    }


if __name__ == "__main__":
    for name, number in count().items():
        print(f"{name:<10}{number:.3g}" if isinstance(number, float) else f"{name:<10}{number}")
