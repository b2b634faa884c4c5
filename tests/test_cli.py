from __future__ import annotations

import datetime
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from maisi_tools.cli import COMMANDS, main
from maisi_tools.cli.options import amounts, process_group
from maisi_tools.errors import InputError


def save(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(data, np.eye(4)), path)
    return path


def save_bodies(folder, *names):
    """A small body in air as ``NAME_ct.nii.gz`` for each name."""
    hu = np.full((4, 4, 4), -1000, np.int16)
    hu[1:3, 1:3, 1:3] = 40
    for name in names:
        save(folder / f"{name}_ct.nii.gz", hu)


@pytest.fixture
def volume(tmp_path):
    return save(tmp_path / "ct.nii.gz", np.zeros((16, 16, 16), np.int16))


def fails(arguments, capsys) -> str:
    """Run a command that must fail for wrong input, and return its one line on stderr."""
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert captured.out == ""
    return captured.err


# --- the command line itself ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_names_every_command_once_in_its_group(arguments, capsys):
    assert main(arguments) == 0
    groups = [part.splitlines() for part in capsys.readouterr().out.split("\n\n")[1:]]
    listed = {heading.rstrip(":"): [line.split()[0] for line in lines] for heading, *lines in groups}
    assert listed == {
        "make": ["demo", "cohort", "twin", "plan", "weights", "package"],
        "masks": ["phantom", "edit", "index", "find"],
        "data": ["prepare", "complete_masks"],
        "quality": ["preview", "report", "compare", "realism", "stratify"],
        "DICOM": ["dicom_read", "dicom_write"],
        "service": ["studio", "listen", "jobs"],
    }
    assert all(len(line.split()) > 3 for _, *lines in groups for line in lines)  # each says what it does


def test_ranks_wait_for_one_another_for_days(monkeypatch):
    """One's share of a cohort may take hours longer than another's; PyTorch's own half hour ended the run."""
    ranks = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}
    for name, value in {**ranks, "TORCHELASTIC_RUN_ID": "a"}.items():
        monkeypatch.setenv(name, str(value))
    with process_group():
        group = torch.distributed.group.WORLD._get_backend(torch.device("cpu"))
        assert group.options._timeout >= datetime.timedelta(days=2)
    assert not torch.distributed.is_initialized()


def test_help_of_a_command_lists_its_options(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["edit", "--help"])
    assert caught.value.code == 0
    assert "--insert" in "".join(capsys.readouterr())


@pytest.mark.parametrize("command", [command.__name__ for command in COMMANDS])
def test_help_of_a_command_offers_nothing_but_its_arguments(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    lines = "".join(capsys.readouterr()).splitlines()
    assert "GROUP" not in " ".join(lines)  # Fire's word for attributes
    assert lines[lines.index("SYNOPSIS") + 1].startswith(f"    maisi {command}")
    assert not [line for line in lines if line.strip().startswith("Type:") and ("'" in line or "| None" in line)]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("previw", "did you mean preview?"),
        ("Cohort", "did you mean cohort?"),
        ("dicom-reed", "did you mean dicom_read?"),
        ("complete", "did you mean complete_masks?"),
        ("xyzzy", "choose among: demo, cohort, twin, plan,"),
        ("--seed", "choose among: demo, cohort, twin, plan,"),
    ],
)
def test_unknown_command_names_the_nearest(given, said, capsys):
    assert said in fails([given], capsys)


def test_a_tilde_that_the_shell_left_is_the_home_folder(tmp_path, monkeypatch, capsys):
    """As bash leaves it in `--output=~/x`; nothing comes to lie in a folder called ~."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path)
    small = ["--size=32,32,32", "--spacing=8,8,8"]
    assert main(["phantom", "--output=~/new/q.nii.gz", *small]) == 0
    assert main(["edit", "~/new/q.nii.gz", "--output=~/r.nii.gz", "--flip"]) == 0
    assert main(["preview", "~/new/q.nii.gz", "--output=~/q.png"]) == 0
    assert [str(path) for path in tmp_path.iterdir()] == [str(tmp_path / "home")]
    found = {str(path.relative_to(tmp_path / "home")) for path in (tmp_path / "home").rglob("*") if path.is_file()}
    assert found == {"new/q.nii.gz", "r.nii.gz", "q.png"}
    capsys.readouterr()
    for line in (["report", "~nobody-here/x"], ["prepare", "~nobody-here/x"], ["phantom", "--output=~nobody-here/x"]):
        assert "~nobody-here/x begins with the name of no user of this machine" in fails(line, capsys)


def test_commands_may_be_written_with_dashes(tmp_path, capsys):
    assert "nope.json" in fails(["complete-masks", tmp_path / "nope.json", tmp_path / "out"], capsys)


def test_misspelt_option_is_refused_before_anything_runs(tmp_path, volume, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(["preview", str(volume), "--outptu", "x.png"])
    assert caught.value.code == 2
    assert "--outptu" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["ct.nii.gz"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["prepare", "1_000", "--validation", "0.1"], "1_000"),
        (["prepare", "2_7", "1e5"], "2_7"),
        (["weights", "1e5"], "1e5 is no bundle"),
        (["weights", "maisi_vae", "--bundles", "007"], "bundles folder 007 does not"),
        (["preview", "20260101"], "20260101"),
        (["preview", "CT#2.nii.gz"], "CT#2.nii.gz"),
        (["weights", "(old)"], "(old) is no bundle"),
        (["weights", "'(old)'"], "(old) is no bundle"),
        (["realism", "old #2", "b"], "input old #2 does not exist"),
        (["realism", "1_0", "2_0"], "input 1_0 does not exist"),
        (["realism", "2027", "2028", "--device", "cuda:99"], "device cuda:99 cannot be used"),
    ],
)
def test_names_that_look_like_numbers_are_text(arguments, named, capsys, tmp_path, monkeypatch, repo_root):
    monkeypatch.chdir(repo_root)
    assert named in fails(arguments, capsys)


def test_options_of_ray_are_refused_without_it(capsys):
    said = fails(["cohort", "a.yaml", "--workers", "8", "--gpus=0.5", "--address", "head:6379"], capsys)
    assert "--workers 8, --gpus 0.5, --address head:6379 would be without effect" in said and "--engine ray" in said
    assert "a.yaml" in fails(["cohort", "a.yaml", "--workers", "8", "--engine", "ray"], capsys)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["twin", "ct.nii.gz", "--keep_patient", "no"], "keep_patient 'no' is not usable; give True or False"),
        (["twin", "ct.nii.gz", "--keep_patient=0"], "keep_patient 0 is not usable; give True or False"),
        (["dicom_write", "ct.nii.gz", "--from_scan", "no"], "from_scan 'no' is not usable; give True or False"),
        (["dicom_write", "ct.nii.gz", "--enhanced", "off"], "enhanced 'off' is not usable; give True or False"),
        (["studio", "--open", "no"], "open 'no' is not usable; give True or False"),
        (["plan", "maisi_vae", "64,64,64", "--details", "no"], "details 'no' is not usable; give True or False"),
        (["phantom", "x.nii.gz", "--seed", "True"], "seed True is not usable; give a whole number"),
        (["prepare", "cts", "--workers", "1.5"], "workers 1.5 is not usable; give a whole number"),
        (["cohort", "a.yaml", "--gpus", "half"], "gpus 'half' is not usable; give a number"),
    ],
)
def test_an_option_of_another_kind_is_refused(arguments, said, capsys):
    """Text such as "no" counts as true in Python, so that the patient was kept."""
    assert said in fails(arguments, capsys)


@pytest.mark.parametrize("given", ["", ",", "cpu,cpu"])
def test_a_studio_works_on_each_device_once_and_on_one_at_least(tmp_path, capsys, given):
    pytest.importorskip("fastapi", reason="needs the extra 'studio'")
    command = ["studio", f"--device={given}", "--open=False", f"--output_dir={tmp_path / 'studio'}"]
    assert f"device is {given!r}; allowed is at least one, and each once" in fails(command, capsys)
    assert not (tmp_path / "studio").exists()


def test_help_does_not_wait_for_torch(repo_root):
    code = "import sys, maisi_tools.cli; sys.exit(bool({'torch', 'monai', 'matplotlib'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(repo_root / "tools")}).returncode == 0


def test_exit_status_of_the_process(repo_root, tmp_path):
    command = [sys.executable, "-m", "maisi_tools.cli", "preview", str(tmp_path / "nope.nii.gz")]
    done = subprocess.run(command, env={"PYTHONPATH": str(repo_root / "tools")}, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: volume ") and "Traceback" not in done.stderr


# --- preview ----------------------------------------------------------------------------------------------------------


def test_preview(tmp_path, volume, capsys):
    mask = save(tmp_path / "mask.nii.gz", np.ones((16, 16, 16), np.uint8))
    output = tmp_path / "x.png"
    assert main(["preview", str(volume), str(mask), "-o", str(output), "--window=-1000,1000"]) == 0
    assert capsys.readouterr().out == f"{output}\n"
    assert output.read_bytes().startswith(b"\x89PNG")


def test_preview_of_wrong_input(tmp_path, volume, capsys):
    assert "does not exist" in fails(["preview", tmp_path / "nope.nii.gz"], capsys)
    assert "ends in .png" in fails(["preview", volume, "-o", tmp_path / "x.gif"], capsys)
    assert "window" in fails(["preview", volume, "-o", tmp_path / "x.png", "--window=soft"], capsys)
    for window in ("240,-160", "a,b", "-160", "0,1,2", "0,1e999"):
        assert "lower one first" in fails(["preview", volume, "-o", tmp_path / "x.png", f"--window={window}"], capsys)
    (tmp_path / "file").touch()  # a file where the output's folder should be
    assert "file" in fails(["preview", volume, "-o", tmp_path / "file" / "x.png"], capsys)


# --- weights ----------------------------------------------------------------------------------------------------------


def bundles(folder):
    for name in ("maisi_vae", "maisi_controlnet"):
        (folder / "bundles" / name / "configs").mkdir(parents=True)
    return folder / "bundles"


def test_weights_finds_the_bundle_by_name_folder_or_from_below(tmp_path, capsys, monkeypatch):
    root = bundles(tmp_path)
    model = root / "maisi_vae" / "models" / "x.pt"
    model.parent.mkdir()
    model.write_bytes(b"there already")
    (root / "maisi_vae" / "large_files.yml").write_text(
        "large_files:\n- {path: models/x.pt, url: 'http://127.0.0.1:9/'}"
    )
    monkeypatch.chdir(root / "maisi_controlnet" / "configs")
    for arguments in (["maisi_vae"], [str(root / "maisi_vae")], ["maisi_vae", f"--bundles={root}"]):
        assert main(["weights", *arguments]) == 0
        assert capsys.readouterr().out == f"{model}\n"


def test_weights_of_an_unknown_bundle(tmp_path, capsys, monkeypatch):
    root = bundles(tmp_path)
    assert "choose among: maisi_controlnet, maisi_vae." in fails(["weights", "vae", "--bundles", root], capsys)
    assert "large_files.yml" in fails(["weights", "maisi_vae", "--bundles", root], capsys)
    assert "nowhere does not exist" in fails(["weights", "vae", "--bundles", tmp_path / "nowhere"], capsys)
    monkeypatch.chdir(tmp_path / "bundles" / "maisi_vae")
    root.rename(tmp_path / "renamed")
    assert "--bundles DIR" in fails(["weights", "maisi_vae"], capsys)


# --- prepare ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def cases(tmp_path):
    hu = np.full((4, 4, 4), -1000, np.int16)
    hu[1:3, 1:3, 1:3] = 40
    for name in ("a/pt_1_ct", "a/pt_2_ct", "b/deep/pt_3_ct", "b/7_ct"):
        save(tmp_path / f"{name}.nii.gz", hu)
    save(tmp_path / "a" / "pt_1_seg.nii.gz", (hu > 0).astype(np.uint8))
    return tmp_path


@pytest.mark.parametrize("held_out", ["pt_2,7", "list", "dict"])
def test_prepare_of_several_folders(cases, capsys, held_out):
    if held_out in ("list", "dict"):
        names = ["pt_2", "7"]
        (cases / "h.json").write_text(json.dumps(names if held_out == "list" else {"held_out": names}))
        held_out = str(cases / "h.json")
    output = cases / "out" / "datalist.json"
    folders = [str(cases / "a"), str(cases / "b"), str(cases / "a")]  # one twice
    assert main(["prepare", *folders, "-o", str(output), "--held_out", held_out]) == 0
    lists = json.loads(output.read_text())
    assert sorted(item["name"] for item in lists["training"]) == ["pt_1", "pt_3"]
    assert sorted(item["name"] for item in lists["validation"]) == sorted(lists["held_out"]) == ["7", "pt_2"]
    assert [Path(item["label"]).name for item in lists["training"] if "label" in item] == ["pt_1_seg.nii.gz"]
    assert "2 volumes of 2 patients to train on, 2 of 2 held out" in capsys.readouterr().out


def test_prepare_of_wrong_input(cases, capsys):
    output = cases / "datalist.json"
    (cases / "h.json").write_text('{"names": []}')
    (cases / "empty").mkdir()
    assert "no data set was given" in fails(["prepare", "-o", output], capsys)
    assert "neither a folder nor a JSON" in fails(["prepare", cases / "nowhere", "-o", output], capsys)
    assert "no volume" in fails(["prepare", cases / "empty", "-o", output], capsys)
    assert "is no .json file" in fails(["prepare", cases / "a", "-o", cases / "list"], capsys)
    assert "pt_9" in fails(["prepare", cases / "a", "-o", output, "--held_out=pt_9,pt_1"], capsys)
    assert "is no list of names" in fails(
        ["prepare", cases / "a", "-o", output, "--held_out", cases / "h.json"], capsys
    )
    assert "does not exist" in fails(["prepare", cases / "a", "-o", output, "--held_out", cases / "n.json"], capsys)
    assert "seed 'x'" in fails(["prepare", cases / "a", "-o", output, "--seed=x"], capsys)
    assert "label_map 'mine' is neither" in fails(["prepare", cases / "a", "-o", output, "--label_map=mine"], capsys)
    given = cases / "given.json"
    given.write_text('["a/pt_1_ct.nii.gz"]')
    for line in ([given], [cases / "a", "--held_out", given]):
        assert "given.json would be written over" in fails(["prepare", *line, "-o", given], capsys)
    assert not output.exists()


def test_prepare_holds_out_many_by_name(tmp_path, capsys):
    names = [f"patient_number_{number:03d}" for number in range(21)]
    save_bodies(tmp_path / "cts", *names)
    held_out = ",".join(names[1:])
    assert main(["prepare", str(tmp_path / "cts"), "-o", str(tmp_path / "l.json"), "--held_out", held_out]) == 0
    assert "1 volumes of 1 patients to train on, 20 of 20 held out" in capsys.readouterr().out


def test_prepare_holds_out_of_what_can_be_used(tmp_path, capsys):
    save_bodies(tmp_path / "cts", "a")
    (tmp_path / "cts" / "b_ct.nii.gz").write_text("damaged")
    for seed in range(3):
        line = ["prepare", tmp_path / "cts", "-o", tmp_path / "l.json", "--validation=0.5", f"--seed={seed}"]
        assert "validation 0.5 of 1 patients leaves none to train on" in fails(line, capsys)
    save_bodies(tmp_path / "cts", "c")
    for seed in range(3):
        line = ["prepare", str(tmp_path / "cts"), "-o", str(tmp_path / "l.json"), "--validation=0.5", f"--seed={seed}"]
        assert main(line) == 0
        assert "1 volumes of 1 patients to train on, 1 of 1 held out" in capsys.readouterr().out


def test_a_damaged_file_of_a_patient_that_is_held_out_changes_nothing(tmp_path, capsys):
    save_bodies(tmp_path / "cts", "pt_2_a")
    (tmp_path / "cts" / "pt_1_a_ct.nii.gz").write_text("damaged")
    line = ["prepare", str(tmp_path / "cts"), "-o", str(tmp_path / "l.json"), "--patient_pattern", r"pt_\d+"]
    assert main([*line, "--held_out", "pt_1"]) == 0
    assert "1 volumes of 1 patients to train on, 0 of 0 held out" in capsys.readouterr().out


def test_an_interrupted_command_says_so_in_a_word(monkeypatch, tmp_path, capsys):
    from maisi_tools.masks import phantom

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(phantom, "write_phantom", interrupted)
    assert main(["phantom", str(tmp_path / "a.nii.gz")]) == 130
    assert capsys.readouterr().err.strip() == "interrupted"


# --- phantom, demo ----------------------------------------------------------------------------------------------------


def test_phantom_is_seeded(tmp_path):
    arguments = ["--size", "32,32,32", "--spacing", "8,8,8"]
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert main(["phantom", str(tmp_path / f"{name}.nii.gz"), *arguments, "--seed", str(seed)]) == 0
    a, b, c = (nib.load(tmp_path / f"{name}.nii.gz") for name in "abc")
    assert a.shape == (32, 32, 32) and a.header.get_zooms() == (8, 8, 8)
    assert np.array_equal(np.asarray(a.dataobj), np.asarray(b.dataobj))
    assert not np.array_equal(np.asarray(a.dataobj), np.asarray(c.dataobj))


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--size", "96"], "size 96"),
        (["--size", "96,80"], "size (96, 80)"),
        (["--size", "96,80,95.5"], "size (96, 80, 95.5)"),
        (["--spacing", "wide"], "spacing 'wide'"),
        (["--seed", "first"], "seed 'first'"),
        (["--seed=-1"], "seed -1"),
    ],
)
def test_phantom_of_wrong_input(tmp_path, arguments, named, capsys):
    assert named in fails(["phantom", tmp_path / "x.nii.gz", *arguments], capsys)
    assert list(tmp_path.iterdir()) == []


def test_demo_runs_the_bundle_it_is_given(tmp_path, capfd):
    """A bundle that keeps the contract without a network: air and tissue straight from the mask."""
    configs = tmp_path / "bundles" / "maisi_controlnet" / "configs"
    configs.mkdir(parents=True)
    config = {
        "imports": ["$import nibabel", "$import numpy", "$import os", "$import shutil"],
        "mask": "$nibabel.load(@input)",
        "hu": "$numpy.where(@mask.get_fdata() > 0, 40 + @seed, -1000).astype('int16')",
        "run": [
            "$nibabel.save(nibabel.Nifti1Image(@hu, @mask.affine), os.path.join(@output_dir, 'phantom_ct.nii.gz'))",
            "$shutil.copy(@input, os.path.join(@output_dir, 'phantom_mask.nii.gz'))",
        ],
    }
    (configs / "inference.json").write_text(json.dumps(config))
    (configs / "metadata.json").write_text("{}")
    (configs / "logging.conf").write_text(
        "[loggers]\nkeys=root\n[handlers]\nkeys=h\n[formatters]\nkeys=\n[logger_root]\nlevel=WARNING\nhandlers=h\n"
        "[handler_h]\nclass=StreamHandler\nargs=(sys.stderr,)\n"
    )
    output = tmp_path / "with space"
    assert main(["demo", f"--output_dir={output}", "--seed=3", f"--bundles={tmp_path / 'bundles'}"]) == 0
    printed = capfd.readouterr().out
    for name in ("phantom_ct.nii.gz", "phantom_mask.nii.gz", "preview.png"):
        assert f"{output / name}\n" in printed and (output / name).is_file()
    assert np.asarray(nib.load(output / "phantom_ct.nii.gz").dataobj).max() == 43
    made = {path.name for path in output.iterdir()}  # and no mask among them that a report would take for a CT
    assert made == {"input", "phantom_ct.nii.gz", "phantom_mask.nii.gz", "preview.png"}

    # the command it prints does the same
    (output / "phantom_ct.nii.gz").unlink()
    subprocess.run(shlex.split(printed.strip().splitlines()[-1]), check=True, capture_output=True)
    assert np.asarray(nib.load(output / "phantom_ct.nii.gz").dataobj).max() == 43
    made = {path.name for path in output.iterdir()}  # and no mask among them that a report would take for a CT
    assert made == {"input", "phantom_ct.nii.gz", "phantom_mask.nii.gz", "preview.png"}


def test_demo_of_wrong_input(tmp_path, capsys, repo_root):
    line = ["demo", "--bundles", repo_root / "bundles", "--output_dir", tmp_path / "out", f"--seed={2**64}"]
    assert "is not usable; give a whole number from 0 to" in fails(line, capsys)
    assert not (tmp_path / "out").exists()
    assert "inference.json does not exist" in fails(["demo", "--bundles", tmp_path], capsys)
    assert "nowhere does not exist" in fails(["demo", "--bundles", tmp_path / "nowhere"], capsys)


def test_plan_prints_what_each_network_would_need(capsys, repo_root):
    bundles = str(repo_root / "bundles")
    line = ["plan", "maisi_vae", "--output_size=128,128,64", "--memory_limit=100MB", "--bundles", bundles]
    assert main(line) == 0
    rows = {words[0]: words for words in map(str.split, capsys.readouterr().out.splitlines())}
    assert set(rows) == {"network", "encoder", "decoder"}
    for stage in ("encoder", "decoder"):
        assert float(rows[stage][1]) * 2**20 <= 100e6 and rows[stage][2] == "MiB"
        assert float(rows[stage][3].replace(",", "")) > 10  # GFLOP


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--output_size=128,128,64", "--memory_limit=1MB"], "the least that would do is"),
        (["--output_size=128,128,64", "--memory_limit=lots"], "memory_limit is 'lots'; give a size such as 12GiB"),
        (["--output_size=128,128,63"], "change z 63 -> 62 or 64"),
        (["--output_size=128"], "output_size 128 is not usable"),
        (["--output_size=128,128,64", "--device=tpu"], "give cpu or cuda"),
        (["--output_size=128,128,64", "--overlay=big.json"], "overlays of this bundle are: full.json"),
        (["--output_size=128,128,64", "--splits=0"], "splits is 0; give a whole number from 1 on"),
        (["--output_size=128,128,64", "--splits=two"], "splits is 'two'; give a whole number from 1 on"),
        (["--output_size=128,128,64", "--memory_limit=0"], "memory_limit is 0; give a size such as 12GiB"),
        (["--output_size=64,64,64", "--overlay=full_mask.json"], "full_mask.json changes asked, "),
        (["--output_size=64,64,64", "--overlay=mask_inference.json"], "is a config of the mask generator"),
        (
            ["--output_size=64,64,64", "--overlay=train.json"],
            "train.json is a config by itself, which goes over no other",
        ),
        (["--output_size=128,128,64", "--overlay=encode.json"], "encode.json is a config by itself"),
        (["--output_size=128,128,64", "--overlay=full.json,decode.json"], "decode.json is a config by itself"),
        (
            ["--output_size=128,128,64", "--overlay=multi_gpu_inference.json"],
            "multi_gpu_inference.json spreads a volume",
        ),
        (["--output_size=64,64,64", "--overlay=full_rflow.json,x.json"], "configs/x.json does not exist"),
        (["--output_size=64,64,64", "--overlay=x.json"], "are: full_ddpm.json, full_rflow.json, full_rflow_mr"),
    ],
)
def test_plan_refuses_what_cannot_be(capsys, repo_root, options, said):
    bundle = "maisi_ldm" if "64,64,64" in options[0] else "maisi_vae"
    assert main(["plan", bundle, *options, "--bundles", str(repo_root / "bundles")]) == 2
    printed = capsys.readouterr()
    assert said in printed.out + printed.err and "Traceback" not in printed.err


# --- compare ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def kept_out(tmp_path):
    """Two kept-out cases with their masks, and a datalist; the CTs are phantoms."""
    from maisi_tools.masks.phantom import make_phantom

    cases = []
    for name in ("a", "b"):
        labels = make_phantom("head_neck", size=(32, 32, 32), spacing=(5.0, 5.0, 3.4), seed=3)
        affine = np.diag([5.0, 5.0, 3.4, 1.0])
        ct = np.where(labels == 120, 600, np.where(labels > 0, 40, -1000)).astype(np.int16)
        for data, suffix in ((ct, "ct"), (labels, "ct_mask")):
            nib.save(nib.Nifti1Image(data, affine), tmp_path / f"{name}_{suffix}.nii.gz")
        cases.append({"image": f"{name}_ct.nii.gz"})
    (tmp_path / "list.json").write_text(json.dumps({"validation": cases}))
    return tmp_path / "list.json"


def test_compare_computes_what_it_shows(kept_out, tmp_path, capsys, repo_root):
    # The shipped bundles, but with two sampling steps.
    root = tmp_path / "bundles"
    for name in ("maisi_vae", "maisi_controlnet"):
        shutil.copytree(repo_root / "bundles" / name / "configs", root / name / "configs")
        (root / name / "models").symlink_to(repo_root / "bundles" / name / "models")
    config = root / "maisi_controlnet" / "configs" / "inference.json"
    content = json.loads(config.read_text())
    content["displayable_configs"]["num_inference_steps"] = 2
    config.write_text(json.dumps(content))
    line = ["compare", str(kept_out), str(tmp_path), f"--output_dir={tmp_path / 'out'}", "--cases=1"]
    assert main([*line, f"--bundles={root}"]) == 0
    page = tmp_path / "out" / "comparison.html"
    assert capsys.readouterr().out.splitlines()[-1] == str(page)
    text = page.read_text()
    assert text.count("data:image/png") == 1 and "psnr_body" in text and "hu_bone" in text
    made = sorted(path.name for path in (tmp_path / "out").glob("*/*.nii.gz"))
    assert made == ["a_ct_mask_ct.nii.gz", "a_ct_mask_mask.nii.gz", "a_ct_recon.nii.gz"]


def test_compare_shows_what_was_computed(kept_out, tmp_path, capsys):
    done = tmp_path / "done"
    done.mkdir()
    for name in ("a", "b"):
        for suffix in ("ct_recon", "ct_mask_ct"):
            nib.load(tmp_path / f"{name}_ct.nii.gz").to_filename(done / f"{name}_{suffix}.nii.gz")
    line = ["compare", str(kept_out), str(tmp_path), f"--output_dir={tmp_path / 'out'}", "--cases=0"]
    assert main([*line, f"--reconstructed={done}", f"--generated={done}"]) == 0
    assert (tmp_path / "out" / "comparison.html").read_text().count("data:image/png") == 2
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["comparison.html"]


def test_compare_of_wrong_input(kept_out, tmp_path, capsys):
    assert "list2.json does not exist" in fails(["compare", tmp_path / "list2.json", tmp_path], capsys)
    assert "maisi complete_masks" in fails(["compare", kept_out, tmp_path / "nowhere"], capsys)
    assert "cases -1 is not usable" in fails(["compare", kept_out, tmp_path, "--cases=-1"], capsys)
    assert "'training'" in fails(["compare", kept_out, tmp_path, "--section=training"], capsys)
    given = [f"--{name}={tmp_path}" for name in ("reconstructed", "generated", "output_dir")]
    assert "a_ct_recon.nii.gz does not exist" in fails(["compare", kept_out, tmp_path, *given], capsys)
    # Before the other stage is run for nothing.
    given = [f"--generated={tmp_path}", f"--output_dir={tmp_path / 'out'}"]
    assert "a_ct_mask_ct.nii.gz does not exist" in fails(["compare", kept_out, tmp_path, *given], capsys)
    assert not list((tmp_path / "out").rglob("*_recon.nii.gz"))


# --- edit -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def torso(tmp_path):
    path = tmp_path / "torso.nii.gz"
    assert main(["phantom", str(path), "--kind=torso", "--size=48,36,52", "--spacing=7.5,7.5,8.5"]) == 0
    return path


def test_edit(tmp_path, torso, capsys):
    capsys.readouterr()
    options = ["--insert", "{hepatic tumor: 40}", "--resize", "{spleen: 1.3, liver: 0.9}", "--flip", "--seed=2"]
    for name in ("a", "b"):
        assert main(["edit", str(torso), "-o", str(tmp_path / f"{name}.nii.gz"), *options]) == 0
    printed = capsys.readouterr().out
    a, b, given = (np.asarray(nib.load(tmp_path / name).dataobj) for name in ("a.nii.gz", "b.nii.gz", torso.name))
    assert np.array_equal(a, b) and a.shape == given.shape
    counts, before = np.bincount(a.ravel(), minlength=201), np.bincount(given.ravel(), minlength=201)
    assert counts[26] == round(np.pi / 6 * 40**3 / (7.5 * 7.5 * 8.5)) and counts[3] == round(1.3 * before[3])
    assert abs(counts[1] + counts[26] - 0.9 * before[1]) <= 1
    assert f"hepatic tumor{'':<23}{0.0:>10.1f} ml -> {counts[26] * 7.5 * 7.5 * 8.5 / 1000:>8.1f} ml" in printed
    assert printed.endswith(f"{tmp_path / 'b.nii.gz'}\n")

    again = ["edit", str(tmp_path / "a.nii.gz"), "-o", str(tmp_path / "c.nii.gz"), "--remove", "hepatic tumor"]
    assert main([*again, "--spacing=8,8,8", "--size=40,32,48", "--keep=liver,spleen"]) == 0
    assert nib.load(tmp_path / "c.nii.gz").shape == (40, 32, 48)


def test_edit_of_wrong_input(tmp_path, torso, capsys):
    capsys.readouterr()
    line = ["edit", torso, "-o", tmp_path / "x.nii.gz"]
    assert "'lever' is no label" in fails([*line, "--resize={lever: 2}"], capsys)
    assert "is not usable; give a number for each name" in fails([*line, "--resize=liver"], capsys)
    for option in ("resize", "augment"):
        assert "has 'liver' more than once; give it once." in fails(
            [*line, f"--{option}={{liver: 1, liver: 2}}"], capsys
        )
    twice = [*line, "--insert", "{bone lesion: 20, 'bone lesion': [12]}"]
    assert "has 'bone lesion' more than once; give it once, with a list of diameters." in fails(twice, capsys)
    assert "hepatic tumor is not in the mask" in fails([*line, "--augment", "{hepatic tumor: 1.1}"], capsys)
    assert "does not exist" in fails(["edit", tmp_path / "nope.nii.gz", "-o", tmp_path / "x.nii.gz"], capsys)
    assert "has no NIfTI name" in fails(["edit", torso, "-o", tmp_path / "x.png"], capsys)
    assert "size 40" in fails([*line, "--size=40"], capsys)
    assert "'7' is no label" in fails([*line, "--remove=7"], capsys)
    shifted = [*line, "--insert={hepatic tumor: 30}", "--augment={hepatic tumor: 1}", "--shift=far"]
    assert "shift 'far' is not usable; give a number" in fails(shifted, capsys)
    assert "flip 'no' is not usable; give True or False" in fails([*line, "--flip", "no"], capsys)
    assert not (tmp_path / "x.nii.gz").exists()


def test_a_mask_is_not_edited_in_place(tmp_path, torso, capsys):
    """By whatever path it is named."""
    capsys.readouterr()
    before = torso.read_bytes()
    (tmp_path / "link.nii.gz").symlink_to(torso)
    for output in (torso, tmp_path / "link.nii.gz"):
        said = fails(["edit", torso, output, "--flip"], capsys)
        assert "would be written over, which is the input" in said and "allowed is another path" in said
    assert torso.read_bytes() == before


@pytest.mark.parametrize("lesions", ["{hepatic tumor: [40, 30]}", "{'hepatic tumor': [40,30]}"])
def test_edit_inserts_lesions_of_several_diameters(tmp_path, torso, capsys, lesions):
    assert main(["edit", str(torso), "-o", str(tmp_path / "a.nii.gz"), "--insert", lesions]) == 0
    found = (np.asarray(nib.load(tmp_path / "a.nii.gz").dataobj) == 26).sum()
    assert found == sum(round(np.pi / 6 * mm**3 / (7.5 * 7.5 * 8.5)) for mm in (40, 30))


def test_amounts_are_split_outside_of_brackets():
    both = amounts("insert", "{lung tumor: [20, 12], hepatic tumor: 25, 'bone lesion': [8]}")
    assert both == {"lung tumor": [20.0, 12.0], "hepatic tumor": 25.0, "bone lesion": [8.0]}
    assert amounts("resize", " 'liver':1.2, ") == {"liver": 1.2} and amounts("resize", None) == {}


@pytest.mark.parametrize("given", ["{liver: x}", "{}", "{liver: 1, 2}", "{liver: [1, 2}", "{liver: []}", "{: 2}", "3"])
def test_amounts_that_are_none_are_refused(given):
    with pytest.raises(InputError, match="is not usable; give a number for each name"):
        amounts("resize", given)


# --- index, find ------------------------------------------------------------------------------------------------------


def test_index_and_find(tmp_path, torso, capsys):
    capsys.readouterr()
    save(tmp_path / "bad.nii.gz", np.full((4, 4, 4), 150, np.uint8))
    for read in (1, 0):  # the second run reads nothing again
        assert main(["index", str(tmp_path)]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[-1] == f"{tmp_path}: 1 masks, {read} read, 0 gone, 1 skipped" and "150" in lines[0]
    assert (
        main(["find", str(tmp_path), "--region=abdomen", "--organs=liver,prostate", "--field_of_view=300,200,900"]) == 0
    )
    assert capsys.readouterr().out == f"{torso}: has no prostate; is 442 mm long along z instead of 900\n"
    assert "allowed are head, chest" in fails(["find", tmp_path, "--region=foot"], capsys)
    assert "field_of_view 3" in fails(["find", tmp_path, "--field_of_view=3"], capsys)
    assert "count 0" in fails(["find", tmp_path, "--count=0"], capsys)
    assert "is no folder" in fails(["index", tmp_path / "nowhere"], capsys)
