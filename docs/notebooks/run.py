"""Runs the notebooks from top to bottom and stores what they show.

python docs/notebooks/run.py [NAME ...] [--quick]

They run in a folder that is removed afterwards, beside which the bundles lie as in a checkout; with `--quick` nothing
is stored. A notebook with an error, with a path of this machine in what it shows, or of too many bytes is not stored.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent

MOST_BYTES = 400_000
"""Of a notebook's file."""

QUICK = re.compile(r"^QUICK = False\b", re.MULTILINE)
"""The line of the cell with the tag "parameters" that a quick run changes."""

LOCAL_PATH = re.compile(r"(?<![\w.:/<])/(?:home|root|tmp|work|usr|opt|var|Users|mnt|data)/[\w.-]+|[A-Z]:\\\\")
"""A path of the machine that a notebook was run on."""


QUIET = {"PYTHONWARNINGS": "ignore:IProgress not found"}
"""Variables of a kernel: without Jupyter's widgets, tqdm says so; bars are no part of what is stored."""


def code_hash(notebook: NotebookNode) -> str:
    """SHA-256 of a notebook's code cells: what was stored with its outputs tells whether they are of this code."""
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256(json.dumps(code).encode()).hexdigest()


def weights_hash() -> str:
    """SHA-256 of the weights that make the CTs of the notebooks: what was stored tells whether they are these."""
    models = ROOT / "bundles" / "maisi_controlnet" / "models"  # where the released weights may lie, too
    shipped = [(models / name).read_bytes() for name in ("autoencoder.pt", "model.pt")]
    return hashlib.sha256(b"".join(hashlib.sha256(content).digest() for content in shipped)).hexdigest()


def parameters(notebook: NotebookNode) -> NotebookNode:
    """The one cell that says how a notebook runs.

    Raises:
        ValueError: there is not one, or it has no line that makes it quick.
    """
    found = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    if len(found) != 1 or len(QUICK.findall(found[0].source)) != 1:
        raise ValueError("a notebook needs one cell with the tag 'parameters' and the line 'QUICK = False' in it")
    return found[0]


def execute(
    path: Path, folder: Path, quick: bool = False, kernel: str = "python3", env: dict[str, str] | None = None
) -> NotebookNode:
    """Run a notebook from top to bottom.

    Args:
        path: of the .ipynb file, which stays as it is.
        folder: an empty one, which gets ``docs/notebooks`` to run in and a link to the bundles.
        quick: run with ``QUICK = True``.
        kernel: name of Jupyter's kernel.
        env: environment of the kernel, by default that of this process.

    Returns:
        The notebook with its outputs.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised; what it raised is in the message.
    """
    notebook = nbformat.read(path, as_version=4)
    cell = parameters(notebook)
    source = cell.source
    if quick:
        cell.source = QUICK.sub("QUICK = True", source)
    where = folder / "docs" / "notebooks"
    where.mkdir(parents=True)
    (folder / "bundles").symlink_to(ROOT / "bundles")
    client = NotebookClient(
        notebook,
        timeout=None,
        kernel_name=kernel,
        resources={"metadata": {"path": str(where)}},
        coalesce_streams=True,
        record_timing=False,
    )
    client.execute(env=dict(os.environ if env is None else env) | QUIET)
    cell.source = source
    return notebook


def outputs(notebook: NotebookNode) -> list[tuple[int, NotebookNode]]:
    """All outputs, each with the number of its cell, from 1."""
    cells = [(number, cell) for number, cell in enumerate(notebook.cells, 1) if cell.cell_type == "code"]
    return [(number, output) for number, cell in cells for output in cell.outputs]


def faults(notebook: NotebookNode) -> list[str]:
    """What keeps a notebook from being shown: its cells did not run in order, or an output is not for a page."""
    found = []
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    if counts != list(range(1, len(counts) + 1)):
        found.append(f"its code cells were not run once each, from top to bottom: {counts}")
    for number, output in outputs(notebook):
        if output.output_type == "error" or output.get("name") == "stderr":
            found.append(f"cell {number} shows an error or a warning: {output.get('evalue') or output.text}")
        shown = {name: data for name, data in output.get("data", {}).items() if not name.startswith("image/")}
        for text in [output.get("text", ""), *map(str, shown.values())]:
            found += [f"cell {number} shows a path of this machine: {path}" for path in LOCAL_PATH.findall(text)]
    if not any("image/png" in output.get("data", {}) for _, output in outputs(notebook)):
        found.append("no picture is in it")
    size = len(nbformat.writes(notebook).encode())
    if size > MOST_BYTES:
        found.append(f"it has {size} bytes; at most {MOST_BYTES} are wanted: make its pictures smaller")
    return found


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = sorted(path.stem for path in HERE.glob("*.ipynb"))
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"by default all: {', '.join(known)}")
    parser.add_argument("--quick", action="store_true", help="only see whether they run")
    given = parser.parse_args()
    if unknown := sorted(set(given.names) - set(known)):
        parser.error(f"there is no notebook {', '.join(unknown)}; choose among: {', '.join(known)}")
    env = {**os.environ, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
    failed = False
    for path in [HERE / f"{name}.ipynb" for name in given.names or known]:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="maisi-") as folder:
            notebook = execute(path, Path(folder), given.quick, env=env)
        found = faults(notebook)
        notebook.metadata |= {"code_sha256": code_hash(notebook), "weights_sha256": weights_hash()}
        if not (given.quick or found):
            nbformat.write(notebook, path)
        print(f"{path.name}: {time.perf_counter() - start:.0f} s", *found, sep="\n  ")
        failed |= bool(found)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
