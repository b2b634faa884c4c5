from __future__ import annotations

import base64
import datetime
import gzip
import importlib.util
import io
import json
import os
import shutil
from html.parser import HTMLParser

import nibabel as nib
import numpy as np
import pytest

from maisi_tools.bundles.record import record_run
from maisi_tools.cli import main
from maisi_tools.errors import InputError
from maisi_tools.report import run_report
from maisi_tools.report.preview import label_colour, plane
from maisi_tools.report.run_report import write_report

SHAPE, SPACING = (20, 16, 12), (2.0, 2.0, 3.0)


@pytest.fixture
def volume():
    """Each voxel has a value of its own, so that a turned or shifted picture shows."""
    return (np.arange(np.prod(SHAPE)).reshape(SHAPE) % 1700 - 900).astype(np.int16)


@pytest.fixture
def labels():
    mask = np.full(SHAPE, 200, np.uint8)
    mask[3:8, 4:9, 2:7] = 1
    mask[12:16, 4:9, 2:7] = 120
    return mask


@pytest.fixture
def run_dir(tmp_path, volume, labels):
    folder = tmp_path / "run <1>"
    folder.mkdir()
    for name, data in (("a_ct", volume), ("a_mask", labels), ("sample_seed3", volume[:, ::-1]), ("a_latent", volume)):
        nib.save(nib.Nifti1Image(data, np.diag([*SPACING, 1.0])), folder / f"{name}.nii.gz")
    (folder / "a_ct.json").write_text(
        json.dumps({"seed": 7, "metrics": {"hu_bone": 369.5}, "x": "<script>bad()</script>"})
    )
    (folder / "metrics.csv").write_text('case,dice\na_ct,0.75\n"<b>",0.5\n')
    return folder


class Page(HTMLParser):
    """The page's elements: (tag, attributes, text directly after its start)."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[list] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append([tag, dict(attrs), ""])

    def handle_data(self, data):
        if self.elements:
            self.elements[-1][2] += data

    def find(self, tag, **attributes):
        wanted = attributes.items()
        return [e for e in self.elements if e[0] == tag and all(e[1].get(k) == v for k, v in wanted)]


def unpacked(page: Page, id: str, dtype: str, shape) -> np.ndarray:
    (element,) = page.find("script", id=id)
    return np.frombuffer(gzip.decompress(base64.b64decode(element[2])), dtype).reshape(shape, order="F")


def test_the_page_holds_the_volumes_voxel_for_voxel(run_dir, volume, labels):
    page = Page(write_report(run_dir).read_text())
    np.testing.assert_array_equal(unpacked(page, "case0-ct", "<i2", SHAPE), volume)
    np.testing.assert_array_equal(unpacked(page, "case0-mask", "u1", SHAPE), labels)
    np.testing.assert_array_equal(unpacked(page, "case1-ct", "<i2", SHAPE), volume[:, ::-1])
    assert not page.find("script", id="case1-mask") and not page.find("script", id="case2-ct")
    (viewer,) = page.find("div", id="case0")
    shown = json.loads(viewer[1]["data-volume"])
    assert shown["size"] == list(SHAPE) and shown["spacing"] == list(SPACING)
    assert {label: name for label, (_, name) in shown["labels"].items()} == {
        "1": "liver",
        "120": "skull",
        "200": "body",
    }
    assert shown["labels"]["200"][0] is None  # would cover everything


def test_organs_tables_and_figures(run_dir, volume, labels):
    text = write_report(run_dir).read_text()
    page = Page(text)
    cells = [element[2] for element in page.find("td") if "number" in element[1].get("class", "")]
    inside = volume[labels == 120]
    assert f"{inside.size * 12 / 1000:.1f}" in cells and f"{np.median(inside):.0f}" in cells
    assert {"369.5", "7", "0.75"} <= set(cells)
    (curve,) = [p for p in page.find("polyline")][1:2]  # of the second label, the skull
    heights = np.array([float(point.split(",")[1]) for point in curve[1]["points"].split()])
    counts, _ = np.histogram(inside, 50, (-1000, 1500))
    np.testing.assert_allclose(27 - heights, 26 * counts / counts.max(), atol=0.06)


@pytest.mark.parametrize("edited", [False, True])
def test_a_mask_in_the_inputs_numbering_has_the_names_of_its_organs(run_dir, edited, tmp_path):
    """2 is the spinal cord (121) here, MAISI's 2 the brainstem; 300 does not fit into a byte."""
    mask = np.zeros(SHAPE, np.uint16)
    mask[3:8, 4:9, 2:7], mask[12:16, 4:9, 2:7], mask[9, 9, 9], mask[1, 1, 1] = 2, 300, 7, 301
    nib.save(nib.Nifti1Image(mask, np.diag([*SPACING, 1.0])), run_dir / "a_mask.nii.gz")
    table = tmp_path / "map.json"
    table.write_text(json.dumps({"2": "spinal cord", "300": "skull", "7": "placeholder 18: lump"}))
    (run_dir / "a_ct.json").write_text(json.dumps({"added_labels": {"liver": 301}}))
    record = {"label_map": str(table), "placeholders": {"lump": 18}}
    if edited:  # the settings of the run say it, as the user gave them: the JSON has the placeholder
        nib.save(nib.Nifti1Image(np.ones(SHAPE, np.float32), np.diag([*SPACING, 1.0])), run_dir / "a_weight.nii.gz")
        (run_dir / "run.json").write_text(json.dumps({"settings": {**record, "placeholders": None}}))
    else:
        (run_dir / "a_mask.json").write_text(json.dumps({"labels": {**record, "numbering": "input"}}))
    page = Page(write_report(run_dir).read_text())
    (viewer,) = page.find("div", id="case0")
    names = {"1": "liver", "18": "lump", "120": "skull", "121": "spinal cord"}
    assert {label: name for label, (_, name) in json.loads(viewer[1]["data-volume"])["labels"].items()} == names
    expected = np.zeros(SHAPE, np.uint8)
    for label, id in ((2, 121), (300, 120), (7, 18), (301, 1)):
        expected[mask == label] = id
    np.testing.assert_array_equal(unpacked(page, "case0-mask", "u1", SHAPE), expected)

    table.unlink()  # nobody knows any more what the numbers mean
    text = write_report(run_dir).read_text()
    page = Page(text)
    (viewer,) = page.find("div", id="case0")
    names = {"1": "label 2", "2": "label 7", "3": "label 300", "4": "label 301"}
    assert {label: name for label, (_, name) in json.loads(viewer[1]["data-volume"])["labels"].items()} == names
    packed = unpacked(page, "case0-mask", "u1", SHAPE)
    assert [np.unique(mask[packed == number]).tolist() for number in range(5)] == [[0], [2], [7], [300], [301]]
    assert "(outside)" not in text and text.count("<td class='number'></td>") == 4  # no ranges


def test_names_and_values_cannot_become_markup(run_dir):
    text = write_report(run_dir).read_text()
    page = Page(text)
    assert "<script>bad()" not in text and "run &lt;1&gt;" in text
    assert not page.find("b") and len(page.find("script")) == 4  # two CTs, a mask, the viewer
    assert "http:" not in text and "https:" not in text


def test_what_cannot_be_read_is_listed_and_the_rest_shown(run_dir, labels):
    (run_dir / "b_ct.nii.gz").write_bytes(b"no volume")
    shutil.copy(run_dir / "a_ct.nii.gz", run_dir / "c_ct.nii.gz")
    nib.save(nib.Nifti1Image(labels[:-1], np.diag([*SPACING, 1.0])), run_dir / "c_mask.nii.gz")
    shutil.copy(run_dir / "a_ct.nii.gz", run_dir / "d_ct.nii.gz")
    weight = np.ones(labels[:, :-1].shape, np.float32)
    nib.save(nib.Nifti1Image(weight, np.diag([*SPACING, 1.0])), run_dir / "d_weight.nii.gz")
    page = Page(write_report(run_dir).read_text())
    reasons = " ".join(element[2] for element in page.find("p", **{"class": "bad"}))
    assert "b_ct.nii.gz cannot be read" in reasons and "one grid" in reasons
    of_weight, of_ct = (" x ".join(map(str, shape)) for shape in (weight.shape, labels.shape))
    assert f"d_weight.nii.gz has {of_weight} voxels in place of the {of_ct} of its CT; remove it" in reasons
    assert len(page.find("details")) == 2


@pytest.mark.parametrize(("value", "kind"), [(-1, np.int16), (2.0**40, np.float32), (2**32 - 1, np.uint32)])
def test_a_mask_with_values_that_are_no_labels_is_listed_and_the_rest_shown(run_dir, labels, value, kind):
    wrong = labels.astype(kind)
    wrong[0, 0, 0] = value
    nib.save(nib.Nifti1Image(wrong, np.diag([*SPACING, 1.0])), run_dir / "a_mask.nii.gz")
    page = Page(write_report(run_dir).read_text())
    (reason,) = page.find("p", **{"class": "bad"})
    assert reason[2].startswith("Not shown: mask") and "allowed" in reason[2] and "a_mask.nii.gz" in reason[2]
    assert len(page.find("details")) == 1


def test_voxels_without_a_value_are_counted_and_shown_as_the_lowest(run_dir, volume, labels):
    hu = volume.astype(np.float32)
    hu[12:16, 4:9, 2:7] = np.nan  # all of the skull
    hu[3, 4, 2], hu[4, 4, 2], hu[0, 0, 0] = np.nan, np.inf, -np.inf  # two voxels of the liver, one of the body
    nib.save(nib.Nifti1Image(hu, np.diag([*SPACING, 1.0])), run_dir / "a_ct.nii.gz")
    text = write_report(run_dir).read_text()
    page, lost = Page(text), ~np.isfinite(hu)
    np.testing.assert_array_equal(unpacked(page, "case0-ct", "<i2", SHAPE), np.where(lost, -32768, volume))
    (note,) = page.find("p", **{"class": "bad"})
    assert note[2].startswith("103 voxels are NaN or infinite")
    cells = [element[2] for element in page.find("td") if "number" in element[1].get("class", "")]
    assert f"{np.median(volume[(labels == 1) & ~lost]):.0f}" in cells and cells.count("no value") == 1
    assert "nan" not in cells and "nan to nan" not in cells


def test_a_sample_has_no_mask_of_another_run(run_dir, labels):
    """maisi_ldm draws CTs and masks of the same names: of noise each, and into the same folder if one likes."""
    nib.save(nib.Nifti1Image(labels, np.diag([*SPACING, 1.0])), run_dir / "sample_seed3_mask.nii.gz")
    nib.save(
        nib.Nifti1Image(labels.astype(np.float32), np.diag([*SPACING, 1.0])), run_dir / "sample_seed3_weight.nii.gz"
    )
    page = Page(write_report(run_dir).read_text())
    assert page.find("script", id="case0-mask") and not page.find("script", id="case1-mask")
    assert len(page.find("details")) == 2 and not page.find("img", alt="Axial plane, weight")


def test_an_mr_has_no_hu(run_dir, volume, labels):
    """Neither ranges of medians nor windows of a CT; the window is that of its own intensities."""
    assert "(outside)" in write_report(run_dir).read_text()
    for modality in ("mri_t1", 9):
        (run_dir / "run.json").write_text(
            json.dumps({"settings": {"modality": modality, "hu_ranges": {"liver": [0, 1]}}})
        )
        text = write_report(run_dir).read_text()
        assert "HU" not in text.split("<script>")[0] and "(outside)" not in text
        assert "median intensity" in text and "soft tissue" not in text
        (viewer,) = Page(text).find("div", id="case0")
        shown = json.loads(viewer[1]["data-volume"])
        low, high = np.percentile(volume, (0.5, 99.5))
        assert shown["unit"] == "" and shown["window"] == [np.floor(low), np.ceil(high)]
    for modality in ("ct", "of another config"):
        (run_dir / "run.json").write_text(json.dumps({"settings": {"modality": modality}}))
        text = write_report(run_dir).read_text()
        assert "median HU" in text and "(outside)" in text


def test_a_table_of_before_the_run_is_not_shown_as_its_own(run_dir, repo_root):
    """New CTs in the folder of an earlier evaluation."""
    weights = run_dir.parent / "model.pt"
    weights.write_bytes(b"abc")
    record_run(run_dir, repo_root / "bundles" / "maisi_vae", [weights], {})
    began = datetime.datetime.fromisoformat(json.loads((run_dir / "run.json").read_text())["started"]).timestamp()
    (run_dir / "conditioning.csv").write_text("structure,generated\ncord,0.625\n")
    for name in ("metrics.csv", "conditioning.csv"):
        os.utime(run_dir / name, (began + 60, began + 60))
    text = write_report(run_dir).read_text()
    assert "0.75" in text and "0.625" in text and "of before this run" not in text
    os.utime(run_dir / "metrics.csv", (began - 60, began - 60))
    text = write_report(run_dir).read_text()
    assert ">0.75<" not in text and "0.625" in text and "metrics.csv: of before this run" in text
    assert (run_dir / "metrics.csv").is_file()
    (run_dir / "run.json").write_text('{"started": "some time"}')
    assert ">0.75<" in write_report(run_dir).read_text()


def test_large_volumes_are_thinned_and_many_counted(run_dir, volume, monkeypatch):
    monkeypatch.setattr(run_report, "MAX_VOXELS", volume.size // 8)
    text = write_report(run_dir, max_cases=1).read_text()
    np.testing.assert_array_equal(unpacked(Page(text), "case0-ct", "<i2", (10, 8, 6)), volume[::2, ::2, ::2])
    assert "every 2. voxel" in text and "2 CTs, 1 of them not shown" in text


def test_the_record_of_a_run_is_shown(run_dir, repo_root, tmp_path):
    weights = tmp_path / "model.pt"
    weights.write_bytes(b"abc")
    record_run(run_dir, repo_root / "bundles" / "maisi_vae", [weights], {"seed": 5, "device": object})
    record = json.loads((run_dir / "run.json").read_text())
    assert record["bundle"] and record["settings"]["seed"] == 5
    # SHA-256 of "abc", FIPS 180-4 example
    assert record["weights"] == {"model.pt": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"}
    (tmp_path / "other").mkdir()
    both = [weights, tmp_path / "other" / "model.pt"]
    both[1].write_bytes(b"other")
    record_run(tmp_path / "out", repo_root / "bundles" / "maisi_vae", both, {})
    names = json.loads((tmp_path / "out" / "run.json").read_text())["weights"]
    assert list(names) == [f"{tmp_path.name}/model.pt", "other/model.pt"]
    judged = [tmp_path / name / "models" / "model.pt" for name in ("stage", "judge")]
    for path in judged:
        path.parent.mkdir(parents=True)
        path.write_text(path.parts[-3])
    record_run(tmp_path / "out", repo_root / "bundles" / "maisi_vae", judged, {})
    names = json.loads((tmp_path / "out" / "run.json").read_text())["weights"]
    assert list(names) == ["stage/models/model.pt", "judge/models/model.pt"]
    text = write_report(run_dir).read_text()
    assert "ba7816bf" in text and "versions torch" in text
    (run_dir / "run.json").unlink()
    assert "were not recorded" in write_report(run_dir).read_text()


def test_another_run_in_the_folder_is_told_of(run_dir, repo_root, tmp_path, caplog):
    weights = tmp_path / "model.pt"
    weights.write_bytes(b"abc")
    arguments = (run_dir, repo_root / "bundles" / "maisi_vae", [weights])
    record_run(*arguments, {"seed": 5, "spacing": (1, 2)})
    record_run(*arguments, {"seed": 5, "spacing": (1, 2)})
    assert not caplog.records
    record_run(*arguments, {"seed": 6, "spacing": (1, 2)})
    assert "files of an earlier run with seed 5 (now 6); run.json becomes" in caplog.text
    assert json.loads((run_dir / "run.json").read_text())["settings"]["seed"] == 6
    caplog.clear()
    weights.write_bytes(b"abcd")
    record_run(*arguments, {"seed": 6, "spacing": (1, 2)})
    assert "earlier run with model.pt ba7816bf" in caplog.text


@pytest.mark.parametrize("content", ['{"settings": {"lr": 1}}', "[1]", "no JSON", '{"epochs": 3}'])
def test_a_run_json_that_no_run_wrote_is_not_replaced(tmp_path, repo_root, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(InputError, match=r"run\.json would be written over, and no run wrote it; allowed are names"):
        record_run(tmp_path, repo_root / "bundles" / "maisi_vae", [], {"seed": 5})
    assert (tmp_path / "run.json").read_text() == content


def test_medians_are_judged_by_the_ranges_of_the_run(run_dir):
    """A contrast phase that the run allowed is not marked as implausible."""

    def marked() -> int:
        return write_report(run_dir).read_text().count("(outside)")

    before = marked()
    assert before > 0
    wide = {name: [-2000, 2000] for name in ("liver", "skull", "body")}
    (run_dir / "run.json").write_text(json.dumps({"settings": {"hu_ranges": wide}}))
    assert marked() == 0
    (run_dir / "run.json").write_text(json.dumps({"settings": {"seed": 5}}))
    assert marked() == before


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["nowhere"], "no folder"),
        (["empty"], "holds no CT"),
        (["run <1>", "--output", "page.txt"], "ends in .html"),
        (["run <1>", "--max_cases", "-1"], "max_cases -1"),
    ],
)
def test_wrong_input(run_dir, tmp_path, monkeypatch, capsys, arguments, named):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(["report", *arguments]) == 2
    assert named in capsys.readouterr().err


def test_command(run_dir, capsys):
    assert main(["report", str(run_dir)]) == 0
    assert "report.html: 0." in capsys.readouterr().out


def test_a_broken_sidecar_is_said(run_dir):
    (run_dir / "a_ct.json").write_text("{")
    with pytest.raises(InputError, match="is no JSON"):
        run_report._read_case(run_dir / "a_ct.nii.gz")
    assert "is no JSON" in write_report(run_dir).read_text()


@pytest.mark.browser
@pytest.mark.skipif(
    not (importlib.util.find_spec("playwright") and shutil.which("chromium")),
    reason="needs Chromium and playwright (make test-browser)",
)
def test_in_a_browser(run_dir, volume, labels):
    """The pixels on screen are those that numpy computes; nothing is fetched, nothing goes wrong."""
    from playwright.sync_api import sync_playwright

    page_file = write_report(run_dir)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page()
        wrong, asked = [], []
        page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(page_file.as_uri())
        page.wait_for_selector("#case0[data-ready]")

        def pixels(name: str) -> np.ndarray:
            shape = page.evaluate(f"(c => [c.height, c.width])(document.querySelector('#case0 canvas.{name}'))")
            script = (
                f"(c => Array.from(c.getContext('2d').getImageData(0, 0, c.width, c.height).data))"
                f"(document.querySelector('#case0 canvas.{name}'))"
            )
            return np.array(page.evaluate(script)).reshape(*shape, 4)

        def expected(name: str, voxel, window, opacity: float) -> np.ndarray:
            grey = ((plane(volume, name, voxel).astype(float) - window[0]) * 255 / (window[1] - window[0])).clip(0, 255)
            over = plane(labels, name, voxel)
            picture = np.repeat(grey[..., None], 3, axis=-1)
            for label in (1, 120):
                picture[over == label] = picture[over == label] * (1 - opacity) + label_colour(label) * 255 * opacity
            return picture[::-1]  # rows run downwards on a canvas

        for name, axis, slice_ in (("axial", 2, 4), ("coronal", 1, 6), ("sagittal", 0, 13)):
            page.fill(f"#case0 input.{name}", str(slice_))
            voxel = [0, 0, 0]
            voxel[axis] = slice_
            np.testing.assert_allclose(pixels(name)[..., :3], expected(name, voxel, (-160, 240), 0.4), atol=1.5)
        page.select_option("#case0 .preset", label="bone")
        page.fill("#case0 .opacity", "0")
        np.testing.assert_allclose(pixels("axial")[..., :3], expected("axial", [0, 0, 4], (-500, 1300), 0), atol=1.5)
        page.locator("#case0 input.axial").press("ArrowRight")
        np.testing.assert_allclose(pixels("axial")[..., :3], expected("axial", [0, 0, 5], (-500, 1300), 0), atol=1.5)

        box = page.locator("#case0 canvas.axial").bounding_box()
        page.mouse.move(box["x"] + box["width"] * 4.5 / 20, box["y"] + box["height"] * 9.5 / 16)
        x, y = 19 - 4, 15 - 9
        organ = {1: ", liver", 120: ", skull", 200: ", body"}[int(labels[x, y, 5])]
        assert page.inner_text("#case0 .read") == f"voxel {x}, {y}, 5: {volume[x, y, 5]} HU{organ}"
        page.mouse.wheel(0, 100)
        assert int(page.input_value("#case0 input.axial")) < 5
        page.click("#case1-case summary")
        page.wait_for_selector("#case1[data-ready]")
        browser.close()
    assert wrong == [] and all(url.startswith(("file:", "data:")) for url in asked)


def test_an_edit_shows_before_after_and_weight(run_dir, volume, tmp_path):
    """One axial plane through the middle of the edit; the scan before is the file that the sidecar names."""
    before = tmp_path / "scan.nii.gz"
    nib.save(nib.Nifti1Image(np.where(volume > 0, 0, volume)[::-1].astype(np.int16), np.diag([-2.0, 2, 3, 1])), before)
    weight = np.zeros(SHAPE, np.float32)
    weight[4:7, 3:9, 8:11] = 0.5
    nib.save(nib.Nifti1Image(weight, np.diag([*SPACING, 1.0])), run_dir / "a_weight.nii.gz")
    (run_dir / "a_ct.json").write_text(json.dumps({"source": str(before)}))

    def pictures() -> dict[str, np.ndarray]:
        from matplotlib.image import imread

        page = Page(write_report(run_dir).read_text())
        found = [a for tag, a, _ in page.elements if tag == "img" and a["alt"].startswith("Axial plane, ")]
        return {
            a["alt"].removeprefix("Axial plane, "): imread(io.BytesIO(base64.b64decode(a["src"].split(",")[1])))[
                ::-1, :, 0
            ]
            for a in found
        }

    shown = pictures()
    assert list(shown) == ["before", "after", "weight"]
    expected = {"before": np.where(volume > 0, 0, volume), "after": volume}
    for name, array in expected.items():
        grey = ((plane(array, "axial", (5, 5, 9)) + 160) / 400).clip(0, 1)
        np.testing.assert_allclose(shown[name], grey, atol=0.01)
    np.testing.assert_allclose(shown["weight"], plane(weight, "axial", (5, 5, 9)), atol=0.01)
    before.unlink()
    assert list(pictures()) == ["after", "weight"]
    assert "The scan before the edit is not shown" in (run_dir / "report.html").read_text()
