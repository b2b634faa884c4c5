from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest

from maisi_tools.errors import InputError
from maisi_tools.metrics.summary import check_tables, summarise

PSNR = {"a": 30.5, "b": 33.25, "c": 29.0}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three cases; only one has a lung, one figure is null, and there are other JSON files beside them."""
    cases = {name: {"psnr": psnr} for name, psnr in PSNR.items()}
    cases["b"]["hu_lung"] = -812.5
    cases["c"]["hu_lung"] = None
    for name, metrics in cases.items():
        (tmp_path / f"{name}_recon.json").write_text(json.dumps({"metrics": metrics, "size": [1, 2, 3]}))
    (tmp_path / "a_latent.json").write_text(json.dumps({"scale_factor": 1.0}))
    (tmp_path / "list.json").write_text("[1, 2]")
    return tmp_path


def test_summary_of_all_cases(folder):
    summary = summarise(folder)
    values = np.array(list(PSNR.values()))
    assert summary["psnr"] == pytest.approx(
        {"mean": values.mean(), "std": values.std(ddof=1), "min": 29.0, "max": 33.25, "cases": 3}
    )
    assert summary["hu_lung"] == {"mean": -812.5, "std": 0.0, "min": -812.5, "max": -812.5, "cases": 1}
    assert json.loads((folder / "summary.json").read_text()) == summary


def test_table_has_a_row_a_case(folder):
    summarise(folder)
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["case"] for row in rows] == ["a_recon", "b_recon", "c_recon"]
    assert [float(row["psnr"]) for row in rows] == list(PSNR.values())
    assert [row["hu_lung"] for row in rows] == ["", "-812.5", ""]


def test_a_second_run_gives_the_same_and_leaves_no_other_file(folder):
    before = {path.name for path in folder.iterdir()}
    first = summarise(folder)
    table = (folder / "metrics.csv").read_bytes()
    assert summarise(folder) == first and (folder / "metrics.csv").read_bytes() == table
    assert {path.name for path in folder.iterdir()} - before == {"metrics.csv", "summary.json"}


def test_only_files_and_figures_asked_for(folder):
    (folder / "d_other.json").write_text(json.dumps({"metrics": {"psnr": 0.0}}))
    assert summarise(folder, suffix="_recon")["psnr"]["cases"] == 3
    assert summarise(folder)["psnr"]["cases"] == 4


def test_a_case_of_an_earlier_run_does_not_count(folder):
    (folder / "old_recon.json").write_text(json.dumps({"metrics": {"psnr": 0.0}}))
    items = [{"image": f"cts/{name}.nii.gz"} for name in ("b", "a")]
    psnr = summarise(folder, "metrics", "_recon", items)["psnr"]
    assert psnr["mean"] == pytest.approx((30.5 + 33.25) / 2) and psnr["cases"] == 2
    with open(folder / "metrics.csv", newline="") as file:
        assert [row["case"] for row in csv.DictReader(file)] == ["a_recon", "b_recon"]
    with pytest.raises(InputError, match=r"no 'metrics' in d_recon.json \(1 of 3 cases\); allowed .*: run"):
        summarise(folder, "metrics", "_recon", [*items, {"image": "d.nii"}])


OTHERS = [
    ("summary.json", '{"psnr": 31.0}'),
    ("summary.json", '{"psnr": {"mean": 31.0}}'),
    ("summary.json", "[1, 2]"),
    ("summary.json", "none"),
    ("metrics.csv", "case,psnr\na,31\n"),
]


@pytest.mark.parametrize(("name", "text"), OTHERS)
def test_tables_of_somebody_else_are_not_written_over(folder, name, text):
    (folder / name).write_text(text)
    for write in (check_tables, lambda folder: summarise(folder, suffix="_recon")):
        with pytest.raises(InputError, match=f"{name} would be written over, and no evaluation wrote it"):
            write(folder)
    assert (folder / name).read_text() == text
    assert {"metrics.csv", "summary.json"} & {path.name for path in folder.iterdir()} == {name}


def test_tables_of_an_evaluation_are(folder):
    (folder / "d_recon.json").write_text(json.dumps({"metrics": {"psnr": math.nan}}))
    for suffix in ("_recon", "d_recon"):  # of the latter nothing is finite, so that the summary is empty
        summarise(folder, suffix=suffix)
        check_tables(folder)
    assert json.loads((folder / "summary.json").read_text()) == {}
    (folder / "metrics.csv").unlink()
    check_tables(folder)


def test_a_folder_without_figures_is_refused(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no \*\.json with 'metrics'.*evaluate\.json first"):
        summarise(tmp_path / "empty")
    with pytest.raises(InputError, match="'dice'"):
        summarise(folder, key="dice")
    assert not (folder / "summary.json").exists()
