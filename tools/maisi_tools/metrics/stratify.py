"""Any figure by the columns of a case table: does it depend on sex, age, scanner or region?"""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

from scipy import stats

from maisi_tools.errors import InputError
from maisi_tools.files import check_own_table, write_csv
from maisi_tools.volumes.inputs import check_targets

Table = dict[str, dict[str, str]]
"""Case -> column -> text."""

UNKNOWN = "unknown"
"""The group of cases without an entry."""

NAMES = ("nearest", "kept_out_nearest")
"""Columns of an evaluation that hold names, which may be numbers; they are no figures."""

COLUMNS = ("column", "group", "figure", "cases", "mean", "sd", "median", "lowest", "highest", "p_value")


def stratify(
    metrics: str | Path,
    cases: str | Path,
    by: Sequence[str],
    output: str | Path,
    edges: Mapping[str, Sequence[float] | float] | None = None,
    case_column: str = "case",
) -> list[dict[str, Any]]:
    """Write each figure of each group of cases to the CSV file `output`.

    Args:
        metrics: ``metrics.csv`` of an evaluation: a row a case, numbers in the other columns.
        cases: CSV file with a row a case; a case of `metrics` belongs to the row whose name it is or begins with,
            followed by "_", the longest one (``pt_1_ct_recon`` to ``pt_1``). Of several that belong to one row, such as
            the scans of a patient, the mean counts, once.
        by: columns of `cases`.
        output: file to write.
        edges: column of `by` with numbers -> ascending bounds of its groups: ``{"age": [40, 60]}`` gives below 40, 40
            to below 60, and from 60 on; one number is a list of one.
        case_column: where the names stand in `cases`.

    Returns:
        A row for each column, group and figure: :data:`COLUMNS`. ``p_value`` is that of the Kruskal-Wallis test of the
        column's groups of two cases and more, empty where there are fewer than two such groups; it is not corrected for
        the number of figures. A case without an entry in a column is in the group "unknown", which is not tested.

    Raises:
        InputError: a file that is no such table, an unknown column, a case without a row, or an entry that is no number
            where edges are given; edges that are no ascending numbers, or of a column that is not in `by`; or an output
            that is one of the tables.
    """
    check_targets([metrics, cases], [Path(output)])
    check_own_table(Path(output), COLUMNS, "`maisi stratify`", "--output")
    bounds = {str(column): _bounds(column, given) for column, given in (edges or {}).items()}
    if idle := [column for column in bounds if column not in by]:
        raise InputError(f"edges name {', '.join(idle)}, which by lacks ({', '.join(by)}); add it, or leave it out")
    figures, table = _read(metrics, "case"), _read(cases, case_column)
    columns = list(next(iter(table.values())))
    if unknown := sorted(set(by) - set(columns)):
        raise InputError(f"{cases} has no column {', '.join(unknown)}; allowed are {', '.join(columns)}")
    owners = {case: owner for case in figures if (owner := _owner(case, table)) is not None}
    if lost := [case for case in figures if case not in owners]:
        raise InputError(f"{cases} has no row for {', '.join(lost[:5])} of {metrics}; add it, or name it alike")
    rows = []
    for column in by:
        group_of = {owner: _group(table[owner][column], bounds.get(column), column, cases) for owner in owners.values()}
        names = sorted(set(group_of.values()), key=lambda name: (name == UNKNOWN, _order(name, bounds.get(column))))
        for figure in _figures(figures):
            values: dict[str, list[float]] = {name: [] for name in names}
            for owner, found in _by_owner(figures, figure, owners).items():
                values[group_of[owner]].append(statistics.fmean(found))
            tested = [found for name, found in values.items() if name != UNKNOWN and len(found) > 1]
            differ = len(tested) > 1 and len({value for found in tested for value in found}) > 1
            p_value: Any = f"{stats.kruskal(*tested).pvalue:.4g}" if differ else ""
            rows += [
                dict(zip(COLUMNS, (column, name, figure, *_summary(found), p_value), strict=True))
                for name, found in values.items()
                if found
            ]
    write_csv(output, rows, COLUMNS)
    return rows


def _read(path: str | Path, case_column: str) -> Table:
    try:
        # Excel's "CSV UTF-8" begins with a byte order mark, which would be part of the first column's name.
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = csv.DictReader(file)
            # A trailing comma gives a row an entry without a column, and Excel writes empty rows as commas.
            rows = [_row(row, path, lines.line_num) for row in lines]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"table {path} cannot be read ({error}); give a CSV file in UTF-8 with a header") from error
    rows = [row for row in rows if any(map(str.strip, row.values()))]
    if not rows or case_column not in rows[0]:
        columns = ", ".join(map(str, rows[0])) if rows else "none"
        raise InputError(
            f"table {path} has no rows with a column {case_column!r} (columns: {columns}); give such a one"
        )
    names = [row[case_column] for row in rows]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"table {path} has {', '.join(map(repr, twice[:5]))} twice; allowed is one row a case")
    return {row.pop(case_column): row for row in rows}


def _row(row: Mapping[Any, Any], path: str | Path, line: int) -> dict[str, str]:
    """A row without entries beyond the header's columns, which have to be empty."""
    if any(entry.strip() for entry in row.get(None, ())):
        raise InputError(f"line {line} of table {path} has more entries than the header has columns; correct it")
    return {column: entry or "" for column, entry in row.items() if column is not None}


def _bounds(column: Any, given: Any) -> list[float]:
    """The edges of a column as a list of numbers."""
    bounds = list(given) if isinstance(given, (list, tuple)) else [given]
    numbers = all(isinstance(edge, Real) and not isinstance(edge, bool) and math.isfinite(edge) for edge in bounds)
    if not bounds or not numbers or bounds != sorted(set(bounds)):
        raise InputError(f"edges of {column} are {given!r}; allowed are ascending numbers: [40, 60]")
    return bounds


def _owner(case: str, table: Table) -> str | None:
    fitting = [name for name in table if case == name or case.startswith(f"{name}_")]
    return max(fitting, key=len, default=None)


def _by_owner(figures: Table, figure: str, owners: Mapping[str, str]) -> dict[str, list[float]]:
    """Row of the case table -> the values of a figure in the cases that belong to it."""
    found: dict[str, list[float]] = {}
    for case, row in figures.items():
        if (value := _number(row.get(figure, ""))) is not None:
            found.setdefault(owners[case], []).append(value)
    return found


def _group(entry: str | None, edges: Sequence[float] | None, column: str, cases: str | Path) -> str:
    entry = (entry or "").strip()
    if not entry:
        return UNKNOWN
    if edges is None:
        return entry
    number = _number(entry)
    if number is None:
        raise InputError(f"{cases} has {entry!r} in column {column}, which is to be grouped by numbers; correct it")
    place = sum(number >= edge for edge in edges)
    return _names(edges)[place]


def _names(edges: Sequence[float]) -> list[str]:
    between = [f"{low:g} to below {high:g}" for low, high in zip(edges, edges[1:], strict=False)]
    return [f"below {edges[0]:g}", *between, f"from {edges[-1]:g}"]


def _order(name: str, edges: Sequence[float] | None) -> Any:
    return _names(edges).index(name) if edges is not None and name != UNKNOWN else name


def _figures(figures: Table) -> list[str]:
    names = dict.fromkeys(name for row in figures.values() for name in row)
    names = {name: None for name in names if name not in NAMES}
    return [name for name in names if any(_number(row.get(name, "")) is not None for row in figures.values())]


def _number(text: str | None) -> float | None:
    try:
        number = float(text or "")
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _summary(values: Sequence[float]) -> list[Any]:
    if not values:
        return [0, "", "", "", "", ""]
    sd = statistics.stdev(values) if len(values) > 1 else 0.0
    figures = (statistics.fmean(values), sd, statistics.median(values), min(values), max(values))
    return [len(values), *(float(f"{value:.6g}") for value in figures)]
