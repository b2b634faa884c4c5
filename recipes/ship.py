"""Puts weights into the bundles, and what they were trained on into the bundles' licences.

    python recipes/ship.py RUNS/autoencoder/model.pt --data openkbp torso \
        --to maisi_vae/models/model.pt maisi_ldm/models/autoencoder.pt maisi_controlnet/models/autoencoder.pt
    python recipes/ship.py          # writes the licences again from what is recorded

``recipes/data.json`` describes the data sets, ``recipes/weights.json`` records each file's SHA-256 and data. From these
two the script writes ``docs/data_license.txt`` and the ``data_source`` of ``configs/metadata.json`` of every bundle.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from maisi_tools.errors import InputError, report_input_errors
from maisi_tools.files import replacing, sha256, write_json
from maisi_tools.weights import read_weights

ROOT = Path(__file__).resolve().parents[1]
HEAD = "Data the small weights in models/ were trained on, and their licences (written by recipes/ship.py).\n"
FOOT = "The released full-size weights listed in large_files.yml come under the licence of their publisher (NVIDIA).\n"


def licence_text(files: Mapping[str, Sequence[str]], described: Mapping[str, Any]) -> str:
    """The page of a bundle.

    Args:
        files: name of each of its weights -> the data sets they were trained on.
        described: data set -> ``text`` (lines) and, where it has single ones, ``cases`` (name, source, licence).
    """
    parts = [HEAD, "".join(f"{name + ':':<22}{', '.join(data)}\n" for name, data in sorted(files.items()))]
    for name in _data_of(files):
        parts.append("\n".join([f"[{name}]", *described[name]["text"]]) + "\n")
        if cases := described[name].get("cases"):
            rows = [["case", "source", "licence"], *cases]
            widths = [max(len(row[column]) for row in rows) + 2 for column in (0, 1)]
            parts.append("".join(f"{row[0]:<{widths[0]}}{row[1]:<{widths[1]}}{row[2]}\n" for row in rows))
    return "\n".join([*parts, FOOT])


def _data_of(files: Mapping[str, Sequence[str]]) -> list[str]:
    return sorted({name for data in files.values() for name in data})


def ship(weights: Path, targets: Sequence[str], data: Sequence[str], root: Path = ROOT) -> None:
    """Place weights (see :func:`place`) and write the licences."""
    place(weights, targets, data, root)
    write_licences(root)


def place(weights: Path, targets: Sequence[str], data: Sequence[str], root: Path = ROOT) -> None:
    """Copy weights to `targets` (relative to the folder of the bundles), and record what they were trained on.

    Raises:
        InputError: no weights, a data set that is not described, or a target that is no bundle's.
    """
    read_weights(weights)
    described = json.loads((root / "recipes" / "data.json").read_text())
    if unknown := sorted(set(data) - set(described)):
        raise InputError(f"--data has {', '.join(unknown)}; described in recipes/data.json are {', '.join(described)}")
    record = json.loads((root / "recipes" / "weights.json").read_text())
    bundles = {path.parent.parent.name for path in (root / "bundles").glob("*/configs/metadata.json")}
    for target in targets:
        if not re.fullmatch(r"(\w+)/models/\w+\.pt", target) or target.split("/")[0] not in bundles:
            raise InputError(f"--to has {target!r}; allowed is BUNDLE/models/NAME.pt, of {', '.join(sorted(bundles))}")
    for target in targets:
        with replacing(root / "bundles" / target) as part:
            shutil.copyfile(weights, part)
        record[target] = {"sha256": sha256(weights), "data": sorted(data)}
    write_json(root / "recipes" / "weights.json", dict(sorted(record.items())))


def write_licences(root: Path = ROOT) -> None:
    """Write what the bundles say about their weights' data.

    Raises:
        InputError: weights in a bundle that are not recorded, or are other ones than recorded.
    """
    described = json.loads((root / "recipes" / "data.json").read_text())
    record = json.loads((root / "recipes" / "weights.json").read_text())
    files: dict[str, dict[str, list[str]]] = {}
    for path in sorted((root / "bundles").glob("*/models/*.pt")):
        name = path.relative_to(root / "bundles").as_posix()
        if record.get(name, {}).get("sha256") != sha256(path):
            raise InputError(
                f"bundles/{name} is not as recorded in recipes/weights.json, so nobody knows what it was trained on; "
                "put weights there with recipes/ship.py"
            )
        files.setdefault(path.parents[1].name, {})[path.name] = record[name]["data"]
    for bundle, of in files.items():
        with replacing(root / "bundles" / bundle / "docs" / "data_license.txt") as part:
            part.write_text(licence_text(of, described))
        metadata = root / "bundles" / bundle / "configs" / "metadata.json"
        source = ", ".join(described[name]["source"] for name in _data_of(of))
        text = metadata.read_text()
        written = json.dumps(json.loads(text)["data_source"])
        with replacing(metadata) as part:
            part.write_text(text.replace(f'"data_source": {written}', f'"data_source": {json.dumps(source)}', 1))


def main(arguments: list[str] | None = None) -> None:
    """Ship weights, or write the licences again; see the module."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("weights", type=Path, nargs="?", help="a checkpoint")
    parser.add_argument("--to", nargs="+", default=[], help="where, such as maisi_vae/models/model.pt")
    parser.add_argument("--data", nargs="+", default=[], help="data sets it was trained on, of recipes/data.json")
    given = parser.parse_args(arguments)
    if given.weights is None and not given.to and not given.data:
        return write_licences()
    if given.weights is None or not given.to or not given.data:
        raise InputError("weights, --to and --data belong together; give all three, or none")
    ship(given.weights, given.to, given.data)


if __name__ == "__main__":
    report_input_errors()
    main()
