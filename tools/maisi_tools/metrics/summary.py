"""One table of the figures that the cases of a run left in their sidecars."""

from __future__ import annotations

import json
import logging
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from maisi_tools.errors import InputError
from maisi_tools.files import check_own_json, expanded, replacing, write_csv
from maisi_tools.volumes.inputs import stem_of

logger = logging.getLogger(__name__)

TABLE, SUMMARY = "metrics.csv", "summary.json"
STATISTICS = ("mean", "std", "min", "max", "cases")
"""Of a figure, in the summary."""


def check_tables(output_dir: str | Path) -> None:
    """Refuse to write over tables that no evaluation wrote, before anything is computed.

    Raises:
        InputError: there is a ``summary.json`` of another form than :func:`tabulate` writes, or a ``metrics.csv`` and
            no summary.
    """

    def is_summary(found: Any) -> bool:
        return isinstance(found, dict) and all(tuple(figure) == STATISTICS for figure in found.values())

    check_own_json(expanded(output_dir) / SUMMARY, is_summary, "evaluation", "output_dir", [TABLE])


def summarise(
    output_dir: str | Path,
    key: str = "metrics",
    suffix: str = "",
    items: Sequence[Mapping[str, Any]] | None = None,
) -> dict[str, dict[str, float]]:
    """Collect ``key`` of a run's ``<stem><suffix>.json`` into ``metrics.csv`` (a row a case) and ``summary.json``.

    Args:
        output_dir: where the sidecars are and the tables go.
        key: of the figures in a sidecar.
        suffix: of the sidecars' stems.
        items: of the run, each with its ``image``; None for every ``*<suffix>.json``, those of earlier runs into the
            same folder among them.

    Returns:
        figure -> {"mean", "std", "min", "max", "cases"}; a figure that a case does not have (a label that is absent) is
        left out of that case only. Also logged.

    Raises:
        InputError: no sidecar with such figures, or not one for each of `items`.
    """
    folder = expanded(output_dir)
    rows: dict[str, dict[str, float]] = {}
    asked = None if items is None else [folder / f"{stem_of(item['image'])}{suffix}.json" for item in items]
    for path in sorted(folder.glob(f"*{suffix}.json") if asked is None else asked):
        content = json.loads(path.read_text()) if path.is_file() else None
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            rows[path.stem] = {name: value for name, value in content[key].items() if value is not None}
    if missing := [path.name for path in asked or () if path.stem not in rows]:
        raise InputError(
            f"{folder} has no {key!r} in {', '.join(missing[:5])} ({len(missing)} of {len(asked or ())} cases); "
            "allowed is a figure of every case: run the bundle's evaluate.json again"
        )
    if not rows:
        raise InputError(f"no *{suffix}.json with {key!r} in {folder}; run the bundle's evaluate.json first")
    return tabulate(folder, rows)


def tabulate(folder: Path, rows: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Write cases and their figures as ``metrics.csv`` and, those that are finite numbers, ``summary.json``.

    Args:
        folder: where the files go.
        rows: case -> figure -> value.

    Returns:
        As :func:`summarise`.

    Raises:
        InputError: as :func:`check_tables`.
    """
    check_tables(folder)
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    summary = {}
    for name in names:
        numbers = [row[name] for row in rows.values() if isinstance(row.get(name), (int, float))]
        values = [number for number in numbers if math.isfinite(number)]
        if not values:
            continue
        std = statistics.stdev(values) if len(values) > 1 else 0.0
        figures = (statistics.fmean(values), std, min(values), max(values), len(values))
        summary[name] = dict(zip(STATISTICS, figures, strict=True))
        logger.info("%-24s %10.4f +- %.4f (%.4f to %.4f, %d cases)", name, *summary[name].values())
    with replacing(folder / SUMMARY) as part:  # before the table, which is not known for ours without it
        part.write_text(json.dumps(summary, indent=2) + "\n")
    write_csv(folder / TABLE, ({"case": case, **row} for case, row in rows.items()), ["case", *names])
    return summary
