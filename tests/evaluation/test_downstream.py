"""The experiment on what synthetic data are worth: arms, convergence, resuming, and the comparison."""

from __future__ import annotations

import csv
import json
import shutil
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from downstream import ARM, Arm, Experiment, compare_arms, main, table
from ignite.engine import Engine, Events
from torch.optim.lr_scheduler import ReduceLROnPlateau

from maisi_tools.errors import InputError
from maisi_tools.files import held
from maisi_tools.masks.phantom import flat_ct, make_phantom
from maisi_tools.training.checkpoint import Checkpointer
from maisi_tools.training.plateau import StopAtPlateau
from maisi_tools.weights import read_weights, save_weights

SPACING = (8.0, 8.0, 5.0)
TINY = {
    "spacing": list(SPACING),  # of the cases: a grid twice as fine has eight times the windows
    "patch_size": [24, 24, 24],
    "network_def#channels": [4, 8],
    "network_def#strides": [2],
    "device": "$torch.device('cpu')",
    "epoch_length": 2,
    "max_epochs": 3,
}


@pytest.fixture(scope="module")
def lists(tmp_path_factory):
    """Datalists of three real cases to train on, one to validate with, one kept out, and two synthetic ones."""
    folder = tmp_path_factory.mktemp("cases")
    cases = []
    for seed in range(7):
        labels = make_phantom("head_neck", (32, 32, 32), SPACING, seed)
        numbering = np.zeros(201, np.uint8)
        numbering[[2, 121, 18, 20]] = 1, 2, 6, 7
        case = {"image": str(folder / f"p{seed}_ct.nii.gz"), "label": str(folder / f"p{seed}_seg.nii.gz")}
        for path, array in ((case["image"], flat_ct(labels)), (case["label"], numbering[labels])):
            nib.save(nib.Nifti1Image(array, np.diag([*SPACING, 1.0])), path)
        cases.append(case)
    parts = {
        "datalist": {"training": cases[:3], "validation": cases[3:4]},
        "kept_out": {"validation": cases[4:5]},
        "synthetic": {"training": cases[5:]},
    }
    for name, content in parts.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return {name: folder / f"{name}.json" for name in parts}


@pytest.fixture
def experiment(lists, tmp_path):
    def run(real=(2,), synthetic=(2,), orders=("mixed",), seeds=1, settings=None, **given):
        overrides = TINY | (settings or {})
        return Experiment(**(lists | given), output_dir=tmp_path / "out", overrides=overrides).run(
            real, synthetic, orders, seeds
        )

    return run


def _arm(folder, *arm):
    return json.loads((folder / "out" / Arm(*arm).name / ARM).read_text())


def test_every_arm_trains_and_finished_ones_are_kept(experiment, assert_same, tmp_path):
    rows = experiment(orders=("mixed", "then_real"))
    out = tmp_path / "out"
    alone, mixed = _arm(tmp_path, 2, 0, "real", 0), _arm(tmp_path, 2, 2, "mixed", 0)
    later, first = _arm(tmp_path, 2, 2, "then_real", 0), _arm(tmp_path, 0, 2, "synthetic", 0)
    cases = alone["settings"]["training"]
    assert mixed["settings"]["training"] == cases + first["settings"]["training"]
    assert later["settings"]["training"] == cases and later["settings"]["first"] == first["settings"]["training"]
    assert first["figures"] == {} and [arm["steps"] for arm in (alone, mixed, later, first)] == [6] * 4
    for order, arm in (("mixed", mixed), ("then_real", later)):
        mean = {(row["order"], row["figure"]): row for row in rows}[order, "dice_mean"]
        assert list(arm["figures"]) == ["p4_ct"]
        assert mean["dice_real"] == pytest.approx(alone["figures"]["p4_ct"]["dice_mean"], abs=1e-4)
        assert mean["dice_with_synthetic"] == pytest.approx(arm["figures"]["p4_ct"]["dice_mean"], abs=1e-4)
    with open(out / "downstream.csv", newline="") as file:
        assert [row["figure"] for row in csv.DictReader(file)] == [row["figure"] for row in rows]
    assert "| mean |" in (out / "table.md").read_text() and not list(out.glob("*/checkpoint.pt"))

    stamps = {path: path.stat().st_mtime_ns for path in out.glob("*/model.pt")}
    best = torch.load(out / Arm(2, 2, "mixed", 0).name / "model_best.pt", weights_only=True)
    shutil.rmtree(out / Arm(2, 2, "mixed", 0).name)
    assert experiment(orders=("mixed", "then_real")) == rows  # trained again, to the same figures
    assert_same(torch.load(out / Arm(2, 2, "mixed", 0).name / "model_best.pt", weights_only=True), best)
    again = {path.parent.name for path, stamp in stamps.items() if path.stat().st_mtime_ns != stamp}
    assert again == {Arm(2, 2, "mixed", 0).name}
    with pytest.raises(InputError, match="another overrides"):
        experiment(settings={"patience": 5})


def test_real_cases_come_second_from_the_weights_of_synthetic_ones(experiment, tmp_path):
    """The first half's weights are replaced by others; with a rate of nearly nothing the second half keeps those."""
    experiment(orders=("then_real",), settings={"learning_rate": 1e-12, "max_epochs": 1}, seeds=2)
    first, second = (tmp_path / "out" / Arm(*arm).name for arm in ((0, 2, "synthetic", 0), (2, 2, "then_real", 0)))
    marked = {name: value + 0.5 for name, value in read_weights(first / "model_best.pt").items()}
    save_weights(first / "model_best.pt", marked)
    shutil.rmtree(second)
    experiment(orders=("then_real",), settings={"learning_rate": 1e-12, "max_epochs": 1}, seeds=2)
    found = read_weights(second / "model_best.pt")
    for name, value in marked.items():
        torch.testing.assert_close(found[name], value, atol=1e-2, rtol=0)


def test_an_interrupted_training_goes_on(experiment, assert_same, tmp_path, monkeypatch):
    """Stopped after the first arm's second epoch, and before it is measured: all is as in a run that was not."""

    def weights() -> dict:
        found = (tmp_path / "out").glob("*/model*.pt")
        return {f"{path.parent.name} {path.name}": torch.load(path, weights_only=True) for path in found}

    epochs, save = [], Checkpointer.save

    def stop_in_the_third(self, engine):
        save(self, engine)
        epochs.append(engine.state.epoch)
        if epochs == [1, 2]:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpointer, "save", stop_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        experiment()
    with monkeypatch.context() as stopped:
        stopped.setattr("downstream._dice", lambda path: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            experiment()
    rows = experiment()
    assert epochs[:4] == [1, 2, 3, 1]  # the last one the next arm's
    resumed = weights()
    shutil.rmtree(tmp_path / "out")
    assert experiment() == rows and len(resumed) == 4
    assert_same(weights(), resumed)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"real": (4,)}, "3 cases under 'training' and 4"),
        ({"synthetic": (3,)}, "2 cases"),
        ({"orders": ("first",)}, "orders is 'first'; allowed are mixed and then_real"),
        ({"seeds": 0}, "seeds is .*0.*; allowed are whole numbers from 1 up"),
        ({"real": ("many",)}, "real.* is .*many.*; allowed are whole numbers from 1 up"),
        ({"segmentation": "nowhere"}, "nowhere.*train.json does not exist"),
    ],
)
def test_what_cannot_be_is_refused_before_training(experiment, tmp_path, options, words):
    with pytest.raises(InputError, match=words):
        experiment(**options)
    assert not list((tmp_path / "out").glob("*/*"))


@pytest.mark.parametrize("name", ["downstream.json", "downstream.csv", "table.md"])
def test_files_of_somebody_else_are_not_written_over(lists, tmp_path, name):
    (tmp_path / name).write_text("{}")
    with pytest.raises(InputError, match=f"{name} would be written over, and no evaluation/downstream.py wrote it"):
        Experiment(**lists, output_dir=tmp_path)
    (tmp_path / "downstream.json").write_text('{"arms": {}, "table": []}')
    Experiment(**lists, output_dir=tmp_path)


def test_cases_that_cannot_be_used_are_refused(experiment, lists, tmp_path):
    other = tmp_path / "list.json"
    other.write_text(json.dumps({"training": [{"image": "a.nii.gz"}]}))
    with pytest.raises(InputError, match="without label"):
        experiment(**{"synthetic": (1,)} | {"kept_out": lists["kept_out"]}, datalist=other)
    other.write_text(json.dumps({"validation": [{"image": "a.nii.gz", "label": "b.nii.gz"}]}))
    with pytest.raises(InputError, match="does not exist"):
        experiment(kept_out=other)
    with pytest.raises(InputError, match="is kept out by .* has it"):
        experiment(kept_out=lists["datalist"])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"seed": 3}, "settings has seed, which every arm sets itself; leave it out"),
        ({"resume": False, "init_ckpt": "a.pt"}, "settings has init_ckpt, resume, which"),
        ({"output_dir": "a", "datalist": "b", "ckpt_dir": "c"}, "settings has ckpt_dir, datalist, output_dir, which"),
        ({"patiense": 3}, "no use for the key patiense .nearest: patience"),
        ({"patience": "long"}, "patience is 'long'; allowed is a number"),
    ],
)
def test_settings_that_no_arm_can_have_are_refused_at_once(lists, tmp_path, settings, words):
    with pytest.raises(InputError, match=words):
        Experiment(**lists, output_dir=tmp_path / "out", overrides=TINY | settings)
    assert not (tmp_path / "out").exists()


def test_paths_of_relative_lists_are_written_into_the_arms_lists_as_absolute_ones(lists, tmp_path, monkeypatch):
    folder = lists["datalist"].parent
    monkeypatch.chdir(folder.parent)
    text = lists["datalist"].read_text().replace(f"{folder}/", "")
    (folder / "by_name.json").write_text(text)
    given = lists | {"datalist": f"{folder.name}/by_name.json", "output_dir": tmp_path / "out"}
    assert Experiment(**given).real == json.loads(lists["datalist"].read_text())["training"]


def test_one_run_at_a_time_trains_in_a_folder(experiment, tmp_path):
    with held(tmp_path / "out", "never said"), pytest.raises(InputError, match="another run trains the arms in"):
        experiment()
    assert not list((tmp_path / "out").glob("*/*"))


@pytest.mark.parametrize("section", ["training", "validation"])
def test_a_kept_out_case_is_found_however_its_path_is_written(experiment, lists, tmp_path, monkeypatch, section):
    """Relative in one list, absolute in the other, or a link in its place."""
    real = json.loads(lists["datalist"].read_text())
    case, folder = real[section][0], lists["datalist"].parent
    names = [{key: path.removeprefix(f"{folder}/") for key, path in item.items()} for item in real["training"]]
    relative = {"training": names, "validation": [{key: path.split("/")[-1] for key, path in case.items()}]}
    (folder / f"relative_{section}.json").write_text(json.dumps(relative))
    other = tmp_path / "kept_out.json"
    link = tmp_path / "link.nii.gz"
    link.symlink_to(case["image"])
    monkeypatch.chdir(folder)
    for image in (case["image"], str(link)):
        other.write_text(json.dumps({"validation": [case | {"image": image}]}))
        with pytest.raises(InputError, match="is kept out by .* has it"):
            experiment(datalist=f"relative_{section}.json", kept_out=other)


def test_a_kept_out_patient_is_not_trained_with(experiment, lists, tmp_path):
    """Another scan of one: refused where both lists name patients; without names nothing is known."""
    datalist, other = tmp_path / "datalist.json", tmp_path / "kept_out.json"
    real, kept = (json.loads(lists[name].read_text()) for name in ("datalist", "kept_out"))
    other.write_text(json.dumps({"validation": [kept["validation"][0] | {"patient": "7"}]}))
    for section in ("training", "validation"):
        of_one = {section: [case | {"patient": "7"} for case in real[section]]}
        datalist.write_text(json.dumps(real | of_one))
        with pytest.raises(
            InputError, match=f"patient 7 of .* is kept out by .* has that patient under '{section}'; leave"
        ):
            experiment(datalist=datalist, kept_out=other)
    for patient in ({"patient": "8"}, {}):
        other.write_text(json.dumps({"validation": [kept["validation"][0] | patient]}))
        Experiment(datalist, other, lists["synthetic"], tmp_path / "out")


def test_a_patient_who_is_validated_with_is_not_trained_with(lists, tmp_path):
    real = json.loads(lists["datalist"].read_text())
    for again, words in (
        (real["training"][0], "p0_ct.nii.gz is validated with by .* has it under 'training'"),
        (
            real["validation"][0] | {"patient": 7},
            "patient 7 of .*p3_ct.nii.gz is validated with by .* has that patient",
        ),
    ):
        training = [case | {"patient": "7"} for case in real["training"]]
        (tmp_path / "list.json").write_text(json.dumps({"training": training, "validation": [again]}))
        with pytest.raises(InputError, match=words):
            Experiment(**lists | {"datalist": tmp_path / "list.json"}, output_dir=tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "origin"),
    [
        ("p4_ct_mask_ct", "p4_ct.nii.gz is kept out"),  # of the mask that complete_masks made
        ("p4_ct_ct", "p4_ct.nii.gz is kept out"),  # a twin, an edit
        ("p4_drawn", "p4_ct.nii.gz is kept out"),
        ("p3_ct_ct", "p3_ct.nii.gz is validated with"),
        ("p0_ct_ct", None),
        ("p40_ct", None),
    ],
)
def test_a_synthetic_case_tells_by_its_name_what_it_is_made_of(lists, tmp_path, name, origin):
    """Its files are others, and lists of synthetic cases name no patients."""
    made = json.loads(lists["synthetic"].read_text())["training"]
    made[1]["image"] = shutil.copy(made[1]["image"], str(tmp_path / f"{name}.nii.gz"))
    (tmp_path / "synthetic.json").write_text(json.dumps({"training": made}))
    given = lists | {"synthetic": tmp_path / "synthetic.json", "output_dir": tmp_path / "out"}
    if origin is None:
        Experiment(**given)
    else:
        with pytest.raises(InputError, match=f"{origin} by .*, but by its name .*{name}.nii.gz .* is made of it"):
            Experiment(**given)


def test_synthetic_cases_of_kept_out_ones_are_refused(lists, tmp_path):
    """Its CT is another file; that its labels are those to be measured on tells."""
    kept = json.loads(lists["kept_out"].read_text())["validation"][0]
    made = json.loads(lists["synthetic"].read_text())["training"]
    other = tmp_path / "synthetic.json"
    other.write_text(json.dumps({"training": [made[1], made[0] | {"label": kept["label"]}]}))
    with pytest.raises(InputError, match="is kept out by .* has it"):
        Experiment(**lists | {"synthetic": other}, output_dir=tmp_path / "out")


def test_an_arm_of_other_images_is_another_arm(lists, tmp_path):
    """Synthetic CTs that were drawn again under the same names."""
    made = json.loads(lists["synthetic"].read_text())["training"]
    for number, case in enumerate(made):
        case["image"] = shutil.copy(case["image"], str(tmp_path / f"{number}_ct.nii.gz"))
    (tmp_path / "synthetic.json").write_text(json.dumps({"training": made}))
    given = {**lists, "synthetic": tmp_path / "synthetic.json", "output_dir": tmp_path / "out", "overrides": TINY}
    Experiment(**given).run([2], [2], ["mixed"], 1)
    moved = [case | {"image": shutil.copy(case["image"], str(tmp_path / "moved"))} for case in made
             if (tmp_path / "moved").mkdir(exist_ok=True) is None]  # fmt: skip
    (tmp_path / "moved.json").write_text(json.dumps({"training": moved}))
    Experiment(**given | {"synthetic": tmp_path / "moved.json"}).run([2], [2], ["mixed"], 1)  # they may lie elsewhere
    (record,) = (tmp_path / "out").glob("mixed_*/arm.json")
    written = json.loads(record.read_text())
    del written["settings"]["first"]  # as an earlier version left it
    record.write_text(json.dumps(written))
    Experiment(**given | {"synthetic": tmp_path / "moved.json"}).run([2], [2], ["mixed"], 1)
    shutil.copy(made[0]["image"], made[1]["image"])
    with pytest.raises(InputError, match="was made with another content of training"):
        Experiment(**given).run([2], [2], ["mixed"], 1)


def test_an_arm_of_another_loss_is_another_arm(lists, repo_root, tmp_path):
    """What the bundle's scripts say decides, too; an arm of before they were recorded counts."""
    root = shutil.copytree(repo_root / "evaluation" / "segmentation", tmp_path / "bundle")
    arm = Arm(2, 0, "mixed", 1)

    def finished():
        return Experiment(**lists, output_dir=tmp_path / "out", segmentation=root, overrides=TINY)._finished(arm)

    settings = Experiment(**lists, output_dir=tmp_path / "out", segmentation=root, overrides=TINY)._settings(arm)
    record = {"settings": settings, "figures": {"p4_ct": {}}}
    path = tmp_path / "out" / arm.name / ARM
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(record))
    assert finished() == record
    loss = root / "scripts" / "partial_labels.py"
    loss.write_text(loss.read_text() + "# another\n")
    with pytest.raises(InputError, match="was made with another scripts; give"):
        finished()
    del record["settings"]["scripts"]
    path.write_text(json.dumps(record))
    assert finished() == record


def test_seeds_draw_nested_cases_and_repeat_the_real_ones():
    real, synthetic = ([{"image": f"{kind}{i}"} for i in range(9)] for kind in "rs")
    few, more = (Arm(n, m, "mixed", 1).draw(real, synthetic) for n, m in ((3, 2), (5, 4)))
    assert more[:3] == few[:3] and more[5:7] == few[3:] and (len(few), len(more)) == (5, 9)
    assert few != Arm(3, 2, "mixed", 2).draw(real, synthetic)
    many = Arm(2, 9, "mixed", 1).draw(real, synthetic)  # 9 / 2 rounds to 4
    assert many[:8] == few[:2] * 4 and len(many) == 17
    assert Arm(3, 9, "then_real", 1).draw(real, synthetic) == few[:3]
    assert Arm(0, 2, "synthetic", 1).draw(real, synthetic) == few[3:]


def test_comparison_is_paired_by_seed_and_case():
    """Two cases, one without the second structure; two seeds. By hand: 0.1, 0.1 and 0.4, 0.2 for the first."""
    first = {"a": {"dice_x": 0.4, "dice_y": 0.2}, "b": {"dice_x": 0.6}}
    figures = {
        Arm(10, 0, "real", 0): first,
        Arm(10, 5, "mixed", 0): {"a": {"dice_x": 0.5, "dice_y": 0.1}, "b": {"dice_x": 0.7}},
        Arm(10, 0, "real", 1): first,
        Arm(10, 5, "mixed", 1): {"a": {"dice_x": 0.8, "dice_y": 0.3}, "b": {"dice_x": 0.8}},
        Arm(10, 5, "mixed", 2): first,  # whose partner is not there yet
        Arm(0, 5, "synthetic", 0): {},
    }
    rows = {row["figure"]: row for row in compare_arms(figures)}
    assert rows["dice_x"] == {
        "real": 10,
        "synthetic": 5,
        "order": "mixed",
        "figure": "dice_x",
        "seeds": 2,
        "dice_real": 0.5,
        "dice_with_synthetic": 0.7,
        "difference": 0.2,
        "low": 0.15,
        "high": 0.25,
        "lowest": 0.1,
        "highest": 0.3,
    }
    assert rows["dice_y"]["difference"] == 0.0 and rows["dice_y"]["low"] == ""
    lines = table(list(rows.values()), {Arm(10, 5, "mixed", 0): 400, Arm(10, 5, "mixed", 1): 600})
    assert "| x | 0.500 | +0.200 (+0.150 to +0.250) |" in lines and "- N = 10, M = 5, mixed: 500" in lines


def test_an_interval_is_that_of_the_mean():
    """40 cases whose differences are normal: about 1.96 standard errors to either side."""
    differences = np.random.default_rng(3).normal(0.05, 0.1, 40)
    figures = {
        Arm(1, 0, "real", 0): {str(i): {"dice_x": 0.0} for i in range(40)},
        Arm(1, 1, "mixed", 0): {str(i): {"dice_x": value} for i, value in enumerate(differences)},
    }
    row = compare_arms(figures)[0]
    error = 1.96 * differences.std(ddof=1) / 40**0.5
    assert row["low"] == pytest.approx(differences.mean() - error, abs=0.004)
    assert row["high"] == pytest.approx(differences.mean() + error, abs=0.004)


def test_cases_of_one_patient_count_as_one():
    """12 patients with 4 cases each: as of the 12 means, not as of 48 cases, of which the interval is half as wide."""
    random = np.random.default_rng(0)
    by_patient = random.normal(0.03, 0.05, 12)
    cases = {f"p{p}_{t}": by_patient[p] + random.normal(0, 0.001) for p in range(12) for t in range(4)}
    means = {f"p{p}": np.mean([cases[f"p{p}_{t}"] for t in range(4)]) for p in range(12)}

    def compared(differences: dict, **given) -> dict:
        arms = {Arm(1, 0, "real", 0): 0.0, Arm(1, 1, "mixed", 0): 1.0}
        figures = {arm: {case: {"dice_x": on * d} for case, d in differences.items()} for arm, on in arms.items()}
        (row,) = compare_arms(figures, **given)
        return row

    found = compared(cases, patients={case: case.split("_")[0] for case in cases})
    assert found == compared(means)
    each = compared(cases)
    assert found["high"] - found["low"] == pytest.approx(2 * (each["high"] - each["low"]), rel=0.1)


def test_an_experiment_knows_the_patients_of_its_kept_out_cases(lists, tmp_path):
    kept = json.loads(lists["kept_out"].read_text())["validation"]
    (tmp_path / "kept_out.json").write_text(json.dumps({"validation": [kept[0] | {"patient": 4}]}))
    given = lists | {"kept_out": tmp_path / "kept_out.json", "output_dir": tmp_path / "out"}
    assert Experiment(**given).patients == {"p4_ct": "4"}


def test_a_run_ends_when_its_validation_stops_improving():
    """Patience 1: the rate falls after two epochs without a gain, and the run ends at the second fall."""
    metrics = [0.1, 0.2, 0.2, 0.2, 0.5, 0.4, 0.4, 0.4, 0.4]
    rates = []
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = ReduceLROnPlateau(optimizer, "max", factor=0.1, patience=1)
    evaluator = SimpleNamespace(state=SimpleNamespace(key_metric_name="dice", metrics={}))
    trainer = Engine(lambda engine, batch: None)
    epoch = Events.EPOCH_COMPLETED
    trainer.add_event_handler(
        epoch, lambda engine: evaluator.state.metrics.update(dice=metrics[engine.state.epoch - 1])
    )
    StopAtPlateau(evaluator, scheduler, least_rate=0.05).attach(trainer)
    trainer.add_event_handler(epoch, lambda engine: rates.append(optimizer.param_groups[0]["lr"]))
    trainer.run([0], max_epochs=len(metrics))
    assert rates == pytest.approx([1, 1, 1, 0.1, 0.1, 0.1, 0.01])
    trainer.run([0], max_epochs=len(metrics))  # as when it is resumed after its end
    assert len(rates) == trainer.state.iteration == 7


def test_the_command_prints_its_table(lists, tmp_path, capsys):
    options = [f"--{name}={path}" for name, path in lists.items()]
    options += ["--real=2", "--synthetic_counts=2", "--orders=mixed", "--seeds=1", f"--output_dir={tmp_path / 'out'}"]
    with pytest.raises(InputError, match="no list of whole numbers"):
        main([*options, "--real=two"])
    main([*options, "--settings", json.dumps(TINY | {"max_epochs": 1, "device": "cpu"})])
    assert "| N = 2 | real alone | M = 2, mixed |" in capsys.readouterr().out
