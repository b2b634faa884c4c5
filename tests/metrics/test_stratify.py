from __future__ import annotations

import csv

import numpy as np
import pytest
from scipy import stats

from maisi_tools.cli import main
from maisi_tools.errors import InputError
from maisi_tools.metrics.stratify import stratify


@pytest.fixture
def tables(tmp_path):
    random = np.random.default_rng(0)
    dice = random.uniform(0.5, 1, 12).round(4)
    sexes = ["F", "M"] * 5 + ["", "F"]
    with open(tmp_path / "metrics.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["case", "dice", "note", "psnr"])
        writer.writerows([f"pt_{i}_ct", dice[i], "text", "nan" if i == 0 else 30 + i] for i in range(12))
    with open(tmp_path / "cases.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["name", "sex", "age"])
        writer.writerows([f"pt_{i}", sexes[i], 30 + 5 * i] for i in range(12))
        writer.writerow(["pt", "X", "1"])  # a shorter name: pt_3_ct is pt_3's
    return tmp_path, dice, sexes


def test_groups_agree_with_numpy_and_scipy(tables):
    folder, dice, sexes = tables
    rows = stratify(folder / "metrics.csv", folder / "cases.csv", ["sex"], folder / "out.csv", case_column="name")
    found = {(row["group"], row["figure"]): row for row in rows}
    assert {figure for _, figure in found} == {"dice", "psnr"}
    groups = {name: [dice[i] for i in range(12) if sexes[i] == name] for name in ("F", "M", "")}
    for name, values in groups.items():
        row = found[name or "unknown", "dice"]
        assert row["cases"] == len(values) and row["mean"] == pytest.approx(np.mean(values), rel=1e-5)
        assert row["sd"] == pytest.approx(np.std(values, ddof=1) if len(values) > 1 else 0, rel=1e-4)
        assert float(row["p_value"]) == pytest.approx(stats.kruskal(groups["F"], groups["M"]).pvalue, rel=1e-3)
    assert found["F", "psnr"]["cases"] == 5  # one is not a number
    with open(folder / "out.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == len(rows)


def test_several_scans_of_a_patient_count_once(tmp_path):
    """Six patients, five scans each: the rows of their means, and their p-value (0.51), not that of 30 (0.11)."""
    dice = {f"p{i}": 0.8 + 0.01 * i for i in range(6)}
    (tmp_path / "cases.csv").write_text("\n".join(["case,sex", *(f"p{i},{'FM'[i % 2]}" for i in range(6))]))
    tables = {
        "scans": [f"{name}_s{j}_ct,{mean + 0.001 * (j - 2)}" for name, mean in dice.items() for j in range(5)],
        "means": [f"{name}_ct,{mean}" for name, mean in dice.items()],
    }
    for name, lines in tables.items():
        (tmp_path / f"{name}.csv").write_text("\n".join(["case,dice", *lines]))
    scans, means = (
        stratify(tmp_path / f"{name}.csv", tmp_path / "cases.csv", ["sex"], tmp_path / "out.csv") for name in tables
    )
    assert scans == means and [row["cases"] for row in scans] == [3, 3]
    expected = stats.kruskal([dice[f"p{i}"] for i in (0, 2, 4)], [dice[f"p{i}"] for i in (1, 3, 5)]).pvalue
    assert float(scans[0]["p_value"]) == pytest.approx(expected, rel=1e-3)


def test_numbers_are_grouped_by_edges(tables):
    folder, dice, _ = tables
    options = {"edges": {"age": [40, 60]}, "case_column": "name"}
    rows = stratify(folder / "metrics.csv", folder / "cases.csv", ["age"], folder / "out.csv", **options)
    ages = 30 + 5 * np.arange(12)  # 40 and 60 themselves among them
    expected = [dice[ages < 40].mean(), dice[(ages >= 40) & (ages < 60)].mean(), dice[ages >= 60].mean()]
    found = [row for row in rows if row["figure"] == "dice"]
    assert [row["group"] for row in found] == ["below 40", "40 to below 60", "from 60"]
    assert [row["mean"] for row in found] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"by": ["height"]}, "height.*sex, age"),
        ({"case_column": "id"}, "has no rows with a column 'id' .columns: "),
        ({"edges": {"sex": [1]}, "by": ["sex"]}, "'F' in column sex"),
        ({"edges": {"age": [60, 40]}, "by": ["age"]}, "edges of age are .60, 40.; allowed are ascending numbers"),
        ({"edges": {"age": []}, "by": ["age"]}, "edges of age are .*ascending numbers"),
        ({"edges": {"age": ["40", "60"]}, "by": ["age"]}, "edges of age are .*'60'.*ascending numbers"),
        ({"edges": {"age": None}, "by": ["age"]}, "edges of age are None; allowed are ascending numbers"),
        ({"edges": {"age": [40]}}, "edges name age, which by lacks .sex."),
        ({"edges": {"height": [40]}}, "edges name height, which by lacks"),
        ({"metrics": "absent.csv"}, "absent.csv"),
    ],
)
def test_wrong_requests_are_refused(tables, change, words):
    folder, *_ = tables
    settings = {"metrics": "metrics.csv", "by": ["sex"], "case_column": "name", **change}
    metrics = folder / settings.pop("metrics")
    with pytest.raises(InputError, match=words):
        stratify(metrics, folder / "cases.csv", output=folder / "out.csv", **settings)
    assert not (folder / "out.csv").exists()


def test_tables_that_excel_saved(tables):
    """Its "CSV UTF-8" begins with a byte order mark."""
    folder, *_ = tables
    options = {"by": ["sex"], "output": folder / "out.csv", "case_column": "name"}
    expected = stratify(folder / "metrics.csv", folder / "cases.csv", **options)
    for name in ("metrics.csv", "cases.csv"):
        (folder / name).write_text((folder / name).read_text(), encoding="utf-8-sig")
    assert stratify(folder / "metrics.csv", folder / "cases.csv", **options) == expected
    (folder / "cases.csv").write_text("name,sex\npt,männlich\n", encoding="cp1252")
    with pytest.raises(InputError, match="cases.csv cannot be read .*; give a CSV file in UTF-8 with a header"):
        stratify(folder / "metrics.csv", folder / "cases.csv", **options)


def test_commas_at_the_end_of_lines(tables):
    """Nothing but commas is no row; a trailing one is no entry; a line with more entries than columns is named."""
    folder, *_ = tables
    options = {"by": ["sex"], "output": folder / "out.csv", "case_column": "name"}
    metrics, cases = folder / "metrics.csv", folder / "cases.csv"
    expected = stratify(metrics, cases, **options)
    for path in (metrics, cases):
        first, *lines = path.read_text().splitlines()
        path.write_text("\n".join([first, ",,", *(f"{line}," for line in lines), ",,,", " , "]))
    assert stratify(metrics, cases, **options) == expected
    with pytest.raises(InputError, match="has no column height; allowed are sex, age"):
        stratify(metrics, cases, **{**options, "by": ["height"]})
    cases.write_text("name,sex\npt,F\npt_1,M,old\n")
    with pytest.raises(InputError, match="line 3 of table .*cases.csv has more entries than the header has columns"):
        stratify(metrics, cases, **options)


def test_one_edge_is_a_list_of_one(tables):
    folder, *_ = tables
    files = folder / "metrics.csv", folder / "cases.csv", ["age"], folder / "out.csv"
    expected = stratify(*files, edges={"age": [50]}, case_column="name")
    assert stratify(*files, edges={"age": 50}, case_column="name") == expected


def test_a_table_is_not_written_over(tables):
    folder, *_ = tables
    before = (folder / "cases.csv").read_bytes()
    with pytest.raises(InputError, match="cases.csv would be written over"):
        stratify(folder / "metrics.csv", folder / "cases.csv", ["sex"], folder / "cases.csv", case_column="name")
    assert (folder / "cases.csv").read_bytes() == before


def test_a_table_of_somebody_else_is_not_written_over(tables):
    folder, *_ = tables
    own, out = folder / "own.csv", folder / "out.csv"
    own.write_text("column,group\n")
    given = (folder / "metrics.csv", folder / "cases.csv", ["sex"])
    with pytest.raises(InputError, match=r"own.csv .*, and no `maisi stratify` wrote it; .* give another --output"):
        stratify(*given, own, case_column="name")
    assert own.read_text() == "column,group\n"
    stratify(*given, out, case_column="name")
    first = out.read_bytes()
    stratify(*given, out, case_column="name")
    assert out.read_bytes() == first


def test_cases_without_a_row_are_named(tables):
    folder, *_ = tables
    (folder / "few.csv").write_text("name,sex\npt_1,F\n")
    with pytest.raises(InputError, match="pt_0_ct"):
        stratify(folder / "metrics.csv", folder / "few.csv", ["sex"], folder / "out.csv", case_column="name")


def test_command(tables, capsys):
    folder, *_ = tables
    files = [str(folder / "metrics.csv"), str(folder / "cases.csv"), "--case_column", "name"]
    assert main(["stratify", *files, "--by", "sex,age", "--edges", "{'age':[50]}", "--output", f"{folder}/o.csv"]) == 0
    shown = capsys.readouterr().out
    assert "from 50" in shown and "unknown" in shown and "Kruskal" not in shown
    assert main(["stratify", *files, "--by", "sex", "--edges", "5"]) == 2
    assert "column -> bounds" in capsys.readouterr().err


def test_columns_are_named_as_they_were_typed(tmp_path, capsys):
    """Fire takes # for the beginning of a comment, and 1_0 for a number."""
    (tmp_path / "metrics.csv").write_text("case,dice\n" + "".join(f"p{i},0.{i}\n" for i in range(1, 5)))
    rows = "".join(f"p{i},F,{i % 2},x\n" for i in range(1, 5))
    (tmp_path / "cases.csv").write_text(f"case,sex,#scans,1_0\n{rows}")
    for by in ("sex,#scans,1_0", "sex, #scans, 1_0", "['sex','#scans','1_0']"):
        files = [str(tmp_path / name) for name in ("metrics.csv", "cases.csv")]
        assert main(["stratify", *files, "--by", by, "--output", str(tmp_path / "o.csv")]) == 0
        with open(tmp_path / "o.csv", newline="") as file:
            found = [(row["column"], row["group"], row["mean"]) for row in csv.DictReader(file)]
        assert found == [("sex", "F", "0.25"), ("#scans", "0", "0.3"), ("#scans", "1", "0.2"), ("1_0", "x", "0.25")]


def test_names_of_volumes_are_no_figures(tmp_path):
    """Of training cases that are called by numbers."""
    (tmp_path / "metrics.csv").write_text(
        "case,distance_hu,nearest,kept_out_nearest\np1,200,17,\np2,300,4,\nkept,,,12\n"
    )
    (tmp_path / "cases.csv").write_text("case,sex\np1,F\np2,M\nkept,F\n")
    rows = stratify(tmp_path / "metrics.csv", tmp_path / "cases.csv", ["sex"], tmp_path / "o.csv")
    assert {row["figure"] for row in rows} == {"distance_hu"}
