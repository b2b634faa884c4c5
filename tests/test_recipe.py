"""The recipe of the small weights runs from end to end, on phantoms."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch

from maisi_tools.errors import InputError
from maisi_tools.files import held, sha256
from maisi_tools.masks.phantom import make_phantom

SAMPLES = {
    "autoencoder": "bundles/maisi_ldm/models/autoencoder.pt",
    "coarse": "bundles/maisi_ldm/models/coarse.pt",
    "ldm": "bundles/maisi_ldm/models/model.pt",
}

SHIPPED = {
    "autoencoder": "bundles/maisi_vae/models/model.pt",
    "controlnet": "bundles/maisi_controlnet/models/model.pt",
    "judge": "evaluation/segmentation/models/model.pt",
}

CLASSES = {1: 2, 2: 121, 3: 11, 4: 16}
"""Labels of OpenKBP and what they are in the vocabulary."""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Five small head-and-neck patients, named as OpenKBP's."""
    folder = tmp_path_factory.mktemp("data")
    for number in range(1, 6):
        labels = make_phantom("head_neck", (24, 22, 24), (9.0, 9.0, 9.0), seed=number)
        rng = np.random.default_rng(number)
        ct = np.where(labels > 0, 40 + 20 * rng.normal(size=labels.shape), -1000).astype(np.int16)
        ct[np.isin(labels, (120,))] = 700
        own = sum(np.where(labels == theirs, ours, 0) for ours, theirs in CLASSES.items()).astype(np.uint8)
        affine = np.diag([9.0, 9.0, 9.0, 1.0])
        nib.save(nib.Nifti1Image(ct, affine), folder / f"pt_{number}_ct.nii.gz")
        nib.save(nib.Nifti1Image(own, affine), folder / f"pt_{number}_seg.nii.gz")
    (folder / "split.json").write_text(json.dumps({"held_out": ["pt_4", "pt_5"], "validation": ["pt_3"]}))
    return folder


@pytest.fixture
def run(python, repo_root, data):
    """``run(out, "--quick", given=data)`` runs the recipe; every stage's process is forked, see preloaded.py."""

    def run(out: Path, *more: str, given: Path = data) -> subprocess.CompletedProcess[str]:
        command = [python, str(repo_root / "recipes" / "small" / "run.py"), str(given), "--out", str(out)]
        split = () if "--split" in more else ("--split", str(data / "split.json"))
        return subprocess.run([*command, *split, *more], capture_output=True, text=True, check=False)

    return run


@pytest.fixture
def recipe(repo_root, data, monkeypatch):
    """The recipe's module, and ``begun(out, DATA)``, a folder as `prepare` leaves it of that data."""
    monkeypatch.syspath_prepend(str(repo_root / "recipes" / "small"))
    module = importlib.import_module("run")

    def begun(out: Path, of: Path) -> Path:
        split = json.loads((data / "split.json").read_text())
        items = {
            name: {"image": str(of / f"{name}_ct.nii.gz"), "label": str(of / f"{name}_seg.nii.gz")}
            for name in (f"pt_{number}" for number in range(1, 6))
        }
        held = [items.pop(name) for name in split["held_out"]]
        lists = {"training": [items["pt_1"], items["pt_2"]], "validation": [items["pt_3"]]}
        out.mkdir(exist_ok=True)
        for name, content in (
            ("datalist", lists),
            ("everyone", {**lists, "training": lists["training"] + held}),
            ("validation", {"held_out": split["validation"]}),
            ("kept_out", {"validation": held}),
        ):
            (out / f"{name}.json").write_text(json.dumps(content))
        return out

    yield SimpleNamespace(module=module, main=module.main, begun=begun)
    del sys.modules["run"]


@pytest.mark.timeout(1200)
def test_quick_makes_every_stage_and_a_second_run_keeps_them(run, tmp_path):
    made = run(tmp_path, "--quick")
    assert made.returncode == 0, made.stderr[-2000:]
    lists = json.loads((tmp_path / "datalist.json").read_text())
    names = {
        section: sorted(Path(item["image"]).name for item in lists[section]) for section in ("training", "validation")
    }
    assert names["training"] == ["pt_1_ct.nii.gz", "pt_2_ct.nii.gz"] and names["validation"] == ["pt_3_ct.nii.gz"]
    kept_out = {str(path.relative_to(tmp_path)).split("/")[0] for path in tmp_path.rglob("*pt_[45]*")}
    assert kept_out == {"evaluation", "downstream"}
    trained = json.loads((tmp_path / "downstream" / "arms" / "mixed_1_2_seed0" / "datalist.json").read_text())
    assert not any("pt_4" in case["image"] or "pt_5" in case["image"] for cases in trained.values() for case in cases)
    sidecar = json.loads((tmp_path / "latents" / "pt_1_ct_latent.json").read_text())
    assert sidecar["factor"] == 2
    names = ("decoder/model.pt", "whole/model.pt", "whole/unet.pt", "coarse/model.pt", "ldm/model.pt")
    files = [tmp_path / name for name in names]
    figures = json.loads((tmp_path / "measured.json").read_text())
    assert figures["patients"] == 2 and figures["vae"]["psnr_body"]["mean"] > 5
    assert {row["structure"] for row in figures["controlnet"]["table"]} > {"body", "all structures"}
    rows = json.loads((tmp_path / "downstream" / "arms" / "downstream.json").read_text())["table"]
    assert {(row["real"], row["synthetic"]) for row in rows} == {(1, 2)}
    assert len(list((tmp_path / "downstream" / "cts").glob("*_ct.nii.gz"))) == 2
    assert "| redraw | 1 |" in (tmp_path / "editing" / "table.md").read_text()
    weights = [torch.load(path, weights_only=True) for path in files]
    first = torch.load(tmp_path / "autoencoder" / "model.pt", weights_only=True)["model"]
    went_on = {name for name, value in weights[0]["model"].items() if not torch.equal(value, first[name])}
    assert went_on and {name.split(".")[0] for name in went_on} <= {"decoder", "post_quant_conv"}
    assert [each.get("factor") for each in weights[1:]] == [2, 2, 2, 2]
    assert weights[1]["scale_factor"] == weights[2]["scale_factor"]
    whole, unet, coarse, ldm = (each["model"] for each in weights[1:])
    assert unet and all(torch.equal(whole[f"unet.{name}"], value) for name, value in unet.items())
    assert coarse["conv_in.conv.weight"].shape[1] == 16 and ldm["conv_in.conv.weight"].shape[1] == 5
    near = json.loads((tmp_path / "samples.json").read_text())
    assert near["ratio"]["cases"] == 2 and near["ratio"]["mean"] > 0
    (fid,) = near["fid"]
    assert fid["region"] == ["head"] and [fid["cts"][name] for name in ("samples", "training")] == [2, 2]
    assert fid["samples"] > fid["training"] > 0  # they were hardly trained
    made_by = {"autoencoder": "decoder", "coarse": "coarse", "ldm": "ldm"}
    assert near["weights"] == {name: sha256(tmp_path / stage / "model.pt") for name, stage in made_by.items()}
    times = [path.stat().st_mtime_ns for path in files]
    assert run(tmp_path, "--quick").returncode == 0
    assert [path.stat().st_mtime_ns for path in files] == times


def test_packed_data_come_back_within_a_step(run, data, tmp_path):
    made = run(tmp_path / "runs", "--stages", "prepare,masks", "--pack", str(tmp_path / "data.npz"))
    assert made.returncode == 0, made.stderr[-2000:]
    out = tmp_path / "away"
    assert run(out, "--stages", "prepare", given=tmp_path / "data.npz").returncode == 0
    lists = json.loads((out / "datalist.json").read_text())
    assert [len(lists[section]) for section in ("training", "validation")] == [2, 1]
    assert json.loads((out / "validation.json").read_text()) == {"held_out": ["pt_3_ct"]}
    (tmp_path / "other.npz").write_bytes((tmp_path / "data.npz").read_bytes() + b" ")
    other = run(out, "--stages", "latents", given=tmp_path / "other.npz")
    assert other.returncode and "is of other data than" in other.stderr
    bones = {}
    for number in (1, 2, 3):
        first, again = (nib.load(folder / f"pt_{number}_ct.nii.gz") for folder in (data, out / "data"))
        assert np.array_equal(first.affine, again.affine)
        given, found = (np.asarray(image.dataobj).astype(int) for image in (first, again))
        step = np.where((given >= -200) & (given < 200), 10, 20)
        assert (np.abs(found - given) <= step).all() and np.abs(found - given)[given > -1000].max() > 5
        assert (found[given == -1000] == -1000).all()
        bones[number] = np.where(given == 700, found, -1000)
        pairs = [(data / f"pt_{number}_seg.nii.gz", out / "data" / f"pt_{number}_ct_seg.nii.gz")]
        pairs.append(tuple(folder / "masks" / f"pt_{number}_ct_mask.nii.gz" for folder in (tmp_path / "runs", out)))
        for one, other in pairs:
            assert np.array_equal(nib.load(one).dataobj, nib.load(other).dataobj)
    both = (bones[1] > 0) & (bones[2] > 0)  # of one step, but each patient has noise of its own
    assert both.sum() > 100 and (bones[1] != bones[2])[both].mean() > 0.8


def test_labels_that_do_not_lie_on_their_ct_are_not_packed(repo_root, monkeypatch, tmp_path):
    """They would be unpacked on its grid: mirrored, left as right."""
    monkeypatch.syspath_prepend(str(repo_root / "recipes" / "small"))
    from packed import _labels_beside

    image = nib.Nifti1Image(np.zeros((4, 4, 4), np.int16), np.diag([2.0, 2, 2, 1]))
    labels, mirrored = np.arange(64, dtype=np.int16).reshape(4, 4, 4), np.diag([-2.0, 2, 2, 1])
    mirrored[0, 3] = 6
    for name, values, affine in (
        ("fit", labels, image.affine),
        ("another grid", labels, mirrored),
        ("another grid", labels[:3], image.affine),
        ("labels from 240 to 303", labels + 240, image.affine),
    ):
        nib.save(nib.Nifti1Image(values, affine), tmp_path / "labels.nii.gz")
        if name == "fit":
            assert np.array_equal(_labels_beside(tmp_path / "labels.nii.gz", image), labels)
            continue
        with pytest.raises(InputError, match=name):
            _labels_beside(tmp_path / "labels.nii.gz", image)


def test_cards_say_what_was_measured(python, repo_root, tmp_path):
    names = [f"bundles/{bundle}/docs/README.md" for bundle in ("maisi_vae", "maisi_ldm", "maisi_controlnet")]
    names += ["docs/how-to/quality.md", "docs/results.md"]
    figures = ("measured", "samples", "downstream", "editing")
    for name in [*names, *(f"docs/{name}.json" for name in figures)]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(repo_root / name, tmp_path / name)
    code = f"import sys, pathlib; sys.path.insert(0, {str(repo_root / 'recipes' / 'small')!r}); import measured; "
    code += f"measured.write_cards(pathlib.Path({str(tmp_path)!r}))"
    subprocess.run([python, "-c", code], check=True)
    for name in names:
        assert (tmp_path / name).read_text() == (repo_root / name).read_text()
    editing = json.loads((tmp_path / "docs" / "editing.json").read_text())
    editing.setdefault("made_by", {})["weights"] = {"autoencoder": "another"}
    (tmp_path / "docs" / "editing.json").write_text(json.dumps(editing))
    subprocess.run([python, "-c", code], check=True)
    assert "(Measured with earlier weights" in (tmp_path / "docs" / "results.md").read_text()
    figures = json.loads((repo_root / "docs" / "measured.json").read_text())
    assert figures["weights"] == {name: sha256(repo_root / path) for name, path in SHIPPED.items()}
    near = json.loads((repo_root / "docs" / "samples.json").read_text())
    assert near["weights"] == {name: sha256(repo_root / path) for name, path in SAMPLES.items()}
    settings = json.loads((repo_root / "bundles/maisi_controlnet/configs/inference.json").read_text())
    shown = settings["displayable_configs"]
    assert figures["sampling"] == {name: shown.get(name, settings[name]) for name in figures["sampling"]}
    assert {"solver", "num_inference_steps", "guidance_scale", "guided_conditions"} <= figures["sampling"].keys()
    card = (repo_root / names[0]).read_text()
    assert f"| PSNR inside the body, dB | {figures['vae']['psnr_body']['mean']:.2f} |" in card


def test_nothing_is_shipped_beside_figures_of_other_weights(python, repo_root, tmp_path):
    runs = tmp_path / "runs"
    for stage in ("autoencoder", "controlnet", "coarse", "ldm", "judge", "editing"):
        (runs / stage).mkdir(parents=True)
        (runs / stage / "model.pt").write_bytes(stage.encode())
    (runs / "editing" / "table.md").write_text("| of which weights? |")
    code = f"import sys, json, pathlib; sys.path.insert(0, {str(repo_root / 'recipes' / 'small')!r}); import measured; "
    code += f"runs = pathlib.Path({str(runs)!r}); "
    code += "[measured.write_json(runs / f'{one}.json', measured.makers(runs, one)) for one in measured.FIGURES]; "
    code += f"measured.publish(runs, pathlib.Path({str(tmp_path / 'root')!r}))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    assert "editing does not say which weights made it" in done.stderr, done.stderr[-2000:]
    assert not (tmp_path / "root").exists()


def test_cases_that_come_or_go_after_prepare_are_named(run, data, tmp_path):
    """All was made of those that were there; a file that prepare passed over may go."""
    given, out = shutil.copytree(data, tmp_path / "data"), tmp_path / "out"
    (given / "bad_ct.nii.gz").write_bytes(b"no volume")
    (given / "twice_ct.nii.gz").symlink_to(given / "pt_1_ct.nii.gz")  # one patient, by two names

    def go_on() -> str:
        done = run(out, "--stages", "prepare", given=given)
        assert done.returncode in (0, 1) and bool(done.returncode) == ("error: " in done.stderr), done.stderr
        return done.stderr

    assert "error" not in go_on() and "bad_ct" in (out / "everyone_report.json").read_text()
    assert "error" not in go_on()
    (given / "bad_ct.nii.gz").unlink()
    assert "error" not in go_on()
    shutil.copy(given / "pt_1_ct.nii.gz", given / "pt_9_ct.nii.gz")
    said = go_on()
    assert f"{given} is no longer what {out} was made of: 1 added (pt_9_ct.nii.gz); put" in said and "--out" in said
    (given / "pt_9_ct.nii.gz").unlink()
    for name in ("pt_2", "pt_3", "pt_4"):  # trains, validates, is kept out
        files = [given / f"{name}_{what}.nii.gz" for what in ("ct", "seg")]
        for file, wanted in zip(files, ("gone", "with another mask"), strict=True):
            away = file.rename(tmp_path / "away")
            assert f"made of: 1 {wanted} ({name}_ct.nii.gz); put" in go_on()
            away.rename(file)
    assert "error" not in go_on()


def test_data_inside_the_folder_of_the_runs_are_checked_too(recipe, data, tmp_path):
    """What lies there need not have come of a packed file."""
    out = tmp_path / "out"
    own = shutil.copytree(data, out / "data")
    recipe.begun(out, own)
    options = ("--out", str(out), "--stages", "prepare", "--split")
    recipe.main([str(own), *options, str(own / "split.json")])
    (own / "other.json").write_text(json.dumps({"held_out": ["pt_1"], "validation": ["pt_3"]}))
    with pytest.raises(InputError, match="another --split"):
        recipe.main([str(own), *options, str(own / "other.json")])
    with pytest.raises(InputError, match=f"is of the data in {own}, not of {data}"):
        recipe.main([str(data), *options, str(own / "split.json")])
    shutil.copy(own / "pt_1_ct.nii.gz", own / "pt_9_ct.nii.gz")
    with pytest.raises(InputError, match=r"1 added \(pt_9_ct.nii.gz\)"):
        recipe.main([str(own), *options, str(own / "split.json")])
    (out / "packed.json").write_text('{"fingerprint": "of a file"}')
    with pytest.raises(InputError, match=f"is of a packed file, not of {own}"):
        recipe.main([str(own), *options, str(own / "split.json")])


def test_quick_is_what_the_folder_was_last_begun_with(recipe, data, tmp_path):
    """A quick run that left no training does not count; from a training's first checkpoint on, neither changes."""
    options = (str(data), "--out", str(tmp_path), "--stages", "prepare", "--split", str(data / "split.json"))
    recipe.begun(tmp_path, data)
    for first, other, file in (
        (["--quick"], [], "judge/checkpoint.pt"),
        ([], ["--quick"], "judge/checkpoint.pt"),
        ([], ["--quick"], "coarse/model.pt"),
    ):
        recipe.main([*options, *other])
        recipe.main([*options, *first])
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
        recipe.main([*options, *first])
        with pytest.raises(InputError, match=f"the weights of a run {'without' if other else 'with'} --quick"):
            recipe.main([*options, *other])
        recipe.main([*options, *first])
        (tmp_path / file).unlink()


def test_one_run_at_a_time_begins_a_folder_and_is_at_a_stage(recipe, data, tmp_path):
    options = [str(data), "--out", str(tmp_path), "--split", str(data / "split.json"), "--stages"]
    recipe.begun(tmp_path, data)
    with held(tmp_path, "never said"), pytest.raises(InputError, match=f"another run begins in {tmp_path}; wait"):
        recipe.main([*options, "prepare"])
    with held(tmp_path / ".held" / "evaluate", "never said"):
        with pytest.raises(InputError, match=f"another run is at evaluate in {tmp_path}; wait"):
            recipe.main([*options, "evaluate"])
        recipe.main([*options, "prepare"])


def test_what_cannot_work_is_refused_at_once(run, data, tmp_path):
    short = run(tmp_path, "--minutes", "1")
    assert short.returncode == 1 and "--minutes is 1; allowed are 5 and more" in short.stderr
    (data / "few.json").write_text(json.dumps({"held_out": ["pt_1", "pt_2", "pt_5"], "validation": ["pt_3"]}))
    (tmp_path / "empty").mkdir()
    empty = run(tmp_path / "runs", given=tmp_path / "empty")
    assert empty.returncode and "error: " in empty.stderr and "Traceback" not in empty.stderr
    begun = tmp_path / "begun"
    begun.mkdir()
    first, *_, last = json.loads((data / "split.json").read_text())["held_out"]
    trained, kept = ([{"image": str(data / f"{name}_ct.nii.gz")}] for name in ("pt_1", last))
    (begun / "everyone.json").write_text("{}")
    for training, kept_out, validation in (
        (trained, kept, "pt_2"),
        (trained, trained, "pt_3"),
        ([{"image": str(data / f"{first}_ct.nii.gz")}], kept, "pt_3"),
    ):
        (begun / "datalist.json").write_text(json.dumps({"training": training, "validation": []}))
        unfinished = run(begun, "--stages", "masks")
        assert unfinished.returncode and "has a datalist.json and no validation.json" in unfinished.stderr
        (begun / "validation.json").write_text(json.dumps({"held_out": [validation]}))
        (begun / "kept_out.json").write_text(json.dumps({"validation": kept_out}))
        other = run(begun, "--stages", "masks")
        assert other.returncode and "was made with another --split than this one" in other.stderr
        (begun / "validation.json").unlink()
    (begun / "validation.json").write_text(json.dumps({"held_out": ["pt_3"]}))
    other = run(begun, "--stages", "masks", given=tmp_path / "empty")
    assert other.returncode and f"is of the data in {data}, not of" in other.stderr
    early = run(tmp_path / "early", "--stages", "prepare", "--pack", str(tmp_path / "early.npz"))
    assert early.returncode and "has no masks to pack; run the stages prepare and masks first" in early.stderr
    few = run(tmp_path, "--split", str(data / "few.json"))
    assert few.returncode == 1 and "has 1 patients to train on, 1 to validate with and 3 kept out" in few.stderr


def test_the_downstream_table_of_the_docs_is_what_the_recipe_makes(repo_root):
    plan = json.loads((repo_root / "recipes" / "small" / "downstream.json").read_text())
    found = json.loads((repo_root / "docs" / "downstream.json").read_text())
    assert found["settings"] == plan["settings"] and found["validation"] == plan["validation"]
    kinds = {(row["real"], row["synthetic"], row["order"]) for row in found["rows"]}
    real, synthetic, orders = (plan[name].split(",") for name in ("real", "synthetic_counts", "orders"))
    assert kinds == {(int(n), int(m), order) for n in real for m in synthetic for order in orders}
    assert {row["seeds"] for row in found["rows"]} == {plan["seeds"]}
