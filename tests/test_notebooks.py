"""The notebooks run from top to bottom with quick settings, and what is stored in them is what their code showed."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "notebooks"
_spec = importlib.util.spec_from_file_location("notebooks_run", FOLDER / "run.py")
notebooks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(notebooks)

NAMES = ("lesion_in_a_ct", "mask_to_ct", "train_on_own_data")


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def test_these_are_the_notebooks():
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == list(NAMES)


@pytest.fixture
def kernel(python, tmp_path, monkeypatch) -> str:
    """A kernel of Jupyter, and the command `maisi`, that start with MONAI imported, see preloaded.py."""
    subprocess.run([python, "-c", ""], check=True)  # waits for the imports, which may take longer than a kernel may
    spec = {"argv": [python, "-m", "ipykernel_launcher", "-f", "{connection_file}"], "display_name": "P"}
    (tmp_path / "jupyter" / "kernels" / "preloaded").mkdir(parents=True)
    (tmp_path / "jupyter" / "kernels" / "preloaded" / "kernel.json").write_text(json.dumps(spec))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "maisi").write_text(f'#!/bin/sh\nexec {python} -m maisi_tools.cli "$@"\n')
    (tmp_path / "bin" / "maisi").chmod(0o755)
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("PATH", os.pathsep.join([str(tmp_path / "bin"), os.environ["PATH"]]))
    return "preloaded"


@pytest.mark.parametrize("name", NAMES)
def test_it_runs_from_top_to_bottom(name, kernel, tiny_bundles, tmp_path, monkeypatch):
    """Shown is what the stored one shows: as many pictures, and text, from each cell.

    The one that trains gives the shipped bundles weights of its own, the others run narrow ones.
    """
    if name != "train_on_own_data":
        monkeypatch.setattr(notebooks, "ROOT", tiny_bundles.parent)
    before = files()
    ran = notebooks.execute(FOLDER / f"{name}.ipynb", tmp_path / "checkout", quick=True, kernel=kernel)
    stored = read(name)
    assert notebooks.code_hash(ran) == notebooks.code_hash(stored)
    assert kinds(ran) == kinds(stored)
    assert files() == before  # what it writes goes into the folder that it ran in


def files() -> set[str]:
    return {path.name for path in FOLDER.iterdir()} - {"__pycache__"}


def kinds(notebook: nbformat.NotebookNode) -> list[tuple[int, str]]:
    """Cell and kind of all that is shown, but for what is logged."""
    return [
        (number, ",".join(sorted(output.get("data", {"stdout": 0}))))
        for number, output in notebooks.outputs(notebook)
        if output.get("name") != "stderr"
    ]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_stored_is_of_this_code_and_fit_to_be_shown(name):
    notebook = read(name)
    nbformat.validate(notebook)
    assert notebooks.faults(notebook) == []
    assert notebook.metadata["code_sha256"] == notebooks.code_hash(notebook), "changed since: make notebooks"
    if name != "train_on_own_data":  # which makes its own
        assert notebook.metadata["weights_sha256"] == notebooks.weights_hash(), "of other weights: make notebooks"
    assert (FOLDER / f"{name}.ipynb").stat().st_size <= notebooks.MOST_BYTES


@pytest.mark.parametrize("name", NAMES)
def test_its_links_lead_to_files(name):
    text = "\n".join(cell.source for cell in read(name).cells if cell.cell_type == "markdown")
    linked = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
    assert linked and [one for one in linked if not (FOLDER / one).is_file()] == []


def test_faults_are_found():
    good = read("mask_to_ct")
    shown = next(cell for cell in good.cells if cell.cell_type == "code" and cell.outputs)

    def spoilt(**output: object) -> list[str]:
        bad = copy.deepcopy(good)
        bad.cells[good.cells.index(shown)].outputs = [nbformat.v4.new_output(**output)]
        return notebooks.faults(bad)

    assert "shows an error" in spoilt(output_type="error", ename="E", evalue="no", traceback=[])[0]
    assert "a warning: oh" in spoilt(output_type="stream", name="stderr", text="oh")[0]
    for path in ("/home/me/x.nii.gz", "'/tmp/pytest-1/a'", "C:\\\\Users\\me"):
        assert "path of this machine" in spoilt(output_type="stream", name="stdout", text=f"wrote {path}")[0]
    assert spoilt(output_type="stream", name="stdout", text="mask_to_ct/out/a, https://a.b/work/c, 3/work/b") == []
    big = "x" * notebooks.MOST_BYTES
    assert "make its pictures smaller" in spoilt(output_type="stream", name="stdout", text=big)[0]
    twice = copy.deepcopy(good)
    twice.cells[good.cells.index(shown)].execution_count = 9
    assert "from top to bottom" in notebooks.faults(twice)[0]
    for cell in twice.cells:
        cell.outputs = []
    assert "no picture" in notebooks.faults(twice)[1]


@pytest.mark.parametrize("source", ["STEPS = 1", "QUICK = True", "x = 1\nQUICK = False\nQUICK = False"])
def test_a_notebook_without_quick_settings_is_refused(source, tmp_path):
    cells = [nbformat.v4.new_code_cell(source, metadata={"tags": ["parameters"]})]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "a.ipynb")
    with pytest.raises(ValueError, match="QUICK = False"):
        notebooks.execute(tmp_path / "a.ipynb", tmp_path / "checkout")


def test_an_unknown_name_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run.py", "mask_to_mr"])
    with pytest.raises(SystemExit):
        notebooks.main()
    assert "choose among: lesion_in_a_ct, mask_to_ct" in capsys.readouterr().err
