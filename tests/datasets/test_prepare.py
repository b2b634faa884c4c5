"""Small data sets in every form that `maisi prepare` takes, and what is wrong with some of their files."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from maisi_tools.cli import main
from maisi_tools.datasets.layouts import Case, find_cases
from maisi_tools.datasets.prepare import split
from maisi_tools.datasets.workers import in_order
from maisi_tools.errors import InputError
from maisi_tools.training.latents import find_latents
from maisi_tools.volumes.inputs import stem_of


def write(path: Path, hu: bool = True, size=(6, 5, 4), mm=(2.0, 2.0, 3.0), value: int = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.full(size, -1000 if hu else 0, dtype=np.int16)
    array[1:3, 1:3, 1:3] = 40 if hu else value
    nib.save(nib.Nifti1Image(array, np.diag([*mm, 1.0])), path)
    return path


def case(root: Path, name: str, label: int = 1, **options) -> None:
    write(root / f"{name}_ct.nii.gz", **options)
    write(root / f"{name}_seg.nii.gz", hu=False, value=label, **options)


def prepare(*arguments) -> tuple[dict, dict]:
    """Run the command, which must succeed, and read what it wrote."""
    output = Path(next(a for a in map(str, arguments) if a.startswith("--output=")).removeprefix("--output="))
    assert main(["prepare", *map(str, arguments)]) == 0
    return json.loads(output.read_text()), json.loads(output.with_name(f"{output.stem}_report.json").read_text())


def names(items: list[dict]) -> list[str]:
    return [item["name"] for item in items]


def test_a_folder_is_reported_and_split(tmp_path, capsys):
    data = tmp_path / "data"
    case(data, "a")
    case(data, "sub/b", label=3, mm=(4.0, 2.0, 5.0))
    write(data / "c_ct.nii", size=(8, 5, 4))
    write(data / "a_dose.nii.gz")
    lists, report = prepare(data, f"--output={tmp_path / 'x' / 'list.json'}", "--held_out=b")
    assert names(lists["training"]) == ["a", "c"] and names(lists["validation"]) == lists["held_out"] == ["b"]
    assert lists["training"][0] == {
        "name": "a",
        "patient": "a",
        "image": str(data / "a_ct.nii.gz"),
        "label": str(data / "a_seg.nii.gz"),
    }
    assert "label" not in lists["training"][1]
    assert report["spacing_mm"] == {"x": [2, 2, 4], "y": [2, 2, 2], "z": [3, 3, 5]}
    assert report["size"]["x"] == [6, 6, 8] and report["modalities"] == {"ct": 3} and report["masks"] == 2
    assert [(e["label"], e["read_as"], e["cases"]) for e in report["labels"]] == [(1, "liver", 1), (3, "spleen", 1)]
    assert report["refused"] == {} and report["warnings"] == []
    printed = capsys.readouterr().out
    assert "3 of 3 volumes can be used" in printed and "spacing x: 2 to 4 mm, median 2" in printed
    assert "2 volumes of 2 patients to train on, 1 of 1 held out" in printed


def test_what_is_wrong_is_listed_with_its_reason_and_left_out(tmp_path, capsys):
    data = tmp_path / "data"
    case(data, "good")
    case(data, "odd_label", label=133)
    case(data, "other_grid")
    write(data / "other_grid_seg.nii.gz", hu=False, size=(6, 5, 5))
    write(data / "no_hu_ct.nii.gz", hu=False)
    (data / "damaged_ct.nii.gz").write_bytes(b"no volume")
    write(data / "again" / "good_ct.nii.gz", size=(4, 4, 4))
    lists, report = prepare(data, f"--output={tmp_path / 'list.json'}")
    assert names(lists["training"]) == ["good"]
    reasons = {Path(file).relative_to(data).as_posix(): reason for file, reason in report["refused"].items()}
    # "again/good" comes first in the order of paths
    assert set(reasons) == {
        "good_ct.nii.gz",
        *(f"{name}_ct.nii.gz" for name in ("odd_label", "other_grid", "no_hu", "damaged")),
    }
    assert "133 (8 voxels)" in reasons["odd_label_ct.nii.gz"]
    assert "another grid" in reasons["other_grid_ct.nii.gz"]
    assert "8-bit" in reasons["no_hu_ct.nii.gz"] or "normalisation" in reasons["no_hu_ct.nii.gz"]
    assert "cannot be read" in reasons["damaged_ct.nii.gz"] and "same name" in reasons["good_ct.nii.gz"]
    assert "1 of 6 volumes can be used" in capsys.readouterr().out


def test_nothing_usable_ends_with_an_error_and_a_report(tmp_path, capsys):
    write(tmp_path / "data" / "x_ct.nii.gz", hu=False)
    for share in ([], ["--validation", "0.2"]):
        assert main(["prepare", str(tmp_path / "data"), "-o", str(tmp_path / "list.json"), *share]) == 2
        captured = capsys.readouterr()
        assert "refused: " in captured.out and captured.err.startswith("error: none of the 1 volumes can be used")
        assert not (tmp_path / "list.json").exists() and (tmp_path / "list_report.json").exists()
    case(tmp_path / "data", "good")
    assert main(["prepare", str(tmp_path / "data"), "-o", str(tmp_path / "list.json"), "--validation", "0.2"]) == 2
    assert (
        "of 1 patients leaves none to train on; give a smaller share (1 volumes are refused" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("list.json", {"note": "mine"}),
        ("list.json", {"training": [], "validation": [], "held_out": [], "testing": []}),
        ("list.json", "{cut"),
        ("list_report.json", "mine"),
    ],
)
def test_what_no_prepare_wrote_is_not_written_over(tmp_path, capsys, name, content):
    """What one wrote is, also after a run in which nothing could be used."""
    case(tmp_path / "data", "a")
    line = ["prepare", str(tmp_path / "data"), "-o", str(tmp_path / "list.json")]
    (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    before = (tmp_path / name).read_bytes()
    assert main(line) == 2
    assert f"{name} would be written over, and no `maisi prepare` wrote it" in capsys.readouterr().err
    assert (tmp_path / name).read_bytes() == before
    (tmp_path / name).unlink()
    assert [main([*line, *more]) for more in (["--label_map=openkbp"], [], ["--label_map=openkbp"])] == [0, 0, 0]


def test_volumes_of_another_name_are_listed(tmp_path, capsys):
    """As soon as one file is called NAME_ct, the others are no volumes; nor is a mask without a volume."""
    data = tmp_path / "data"
    case(data, "p1")
    for name in ("p2", "p1_dose", "deep/p1_dose"):
        write(data / f"{name}.nii.gz")
    write(data / "p3_seg.nii.gz", hu=False)
    output = f"--output={tmp_path / 'list.json'}"
    lists, report = prepare(data, output, "--patient_pattern=p1", "--validation=0")
    assert names(lists["training"]) == ["p1"] and report["volumes"] == 4
    reasons = {Path(file).relative_to(data).as_posix(): reason for file, reason in report["refused"].items()}
    assert set(reasons) == {"p2.nii.gz", "deep/p1_dose.nii.gz", "p3_seg.nii.gz"}
    assert "called NAME_ct; rename it so" in reasons["p2.nii.gz"]
    assert "without its volume; give that the name p3_ct" in reasons["p3_seg.nii.gz"]
    assert "1 of 4 volumes can be used" in capsys.readouterr().out
    (data / "p1_ct.nii.gz").rename(data / "p1.nii.gz")
    cases, _ = find_cases(data)
    assert {case.name: case.refused for case in cases if case.refused} == {
        "p3_seg": "a mask without its volume; give that the name p3"
    }


def test_links_keep_the_names_that_they_have(tmp_path):
    """As git-annex, DVC and hospital exports make them; a file that two links lead to counts once."""
    for name, value in (("p1", 1), ("p2", 3)):
        write(tmp_path / "store" / name / "ct.nii.gz", size=(6, 5, 4 + value))
        write(tmp_path / "store" / name / "seg.nii.gz", hu=False, size=(6, 5, 4 + value), value=value)
    data = tmp_path / "data"
    data.mkdir()
    for name in ("p1", "p2"):
        for kind in ("ct", "seg"):
            (data / f"{name}_{kind}.nii.gz").symlink_to(tmp_path / "store" / name / f"{kind}.nii.gz")
    (data / "p2_again_ct.nii.gz").symlink_to(data / "p2_ct.nii.gz")
    lists, report = prepare(data, f"--output={tmp_path / 'list.json'}")
    assert [(item["image"], item.get("label")) for item in lists["training"]] == [
        (str(data / "p1_ct.nii.gz"), str(data / "p1_seg.nii.gz")),
        (str(data / "p2_again_ct.nii.gz"), None),
    ]
    assert report["refused"] == {}


def test_any_volumes_of_a_folder(tmp_path):
    write(tmp_path / "one.nii.gz")
    write(tmp_path / "deep" / "two.nii")
    write(tmp_path / "one_seg.nii.gz", hu=False)
    cases, _ = find_cases(tmp_path)
    assert [(case.name, case.image.name, case.label and case.label.name) for case in cases] == [
        ("two", "two.nii", None),
        ("one", "one.nii.gz", "one_seg.nii.gz"),
    ]


def test_a_datalist_keeps_its_split_unless_another_is_asked_for(tmp_path):
    for name in ("a", "b", "c"):
        write(tmp_path / f"{name}.nii.gz")
    given = {"training": [{"image": "a.nii.gz", "region": ["head"]}, "c.nii.gz"], "validation": [{"image": "b.nii.gz"}]}
    (tmp_path / "given.json").write_text(json.dumps({**given, "testing": ["t.nii.gz"]}))
    lists, _ = prepare(tmp_path / "given.json", f"--output={tmp_path / 'list.json'}")
    assert names(lists["training"]) == ["a", "c"] and names(lists["validation"]) == ["b"]
    assert lists["training"][0]["region"] == ["head"]
    lists, _ = prepare(tmp_path / "given.json", f"--output={tmp_path / 'list.json'}", "--held_out=c,a")
    assert names(lists["training"]) == ["b"]
    # A list that describes its labels, too, as those of MONAI's tutorials.
    described = {"numTraining": 2, "modality": {"0": "CT"}, "labels": {"0": "background", "1": "liver"}}
    (tmp_path / "described.json").write_text(json.dumps(given | {"training": given["training"][:1]} | described))
    found, _ = prepare(tmp_path / "described.json", f"--output={tmp_path / 'found.json'}")
    assert names(found["training"]) == ["a"] and names(found["validation"]) == found["held_out"] == ["b"]
    assert found["training"][0]["region"] == ["head"]
    # what was written can be read again
    again, _ = prepare(tmp_path / "list.json", f"--output={tmp_path / 'again.json'}")
    assert again == lists


def test_held_out_names_are_taken_as_they_were_typed(tmp_path):
    """As the command line's parser reads them, some are numbers, sums or octal."""
    for given in (("pt-1", "pt-2"), ("0001", "0002"), ("1_000", "2_000"), ("LIDC-IDRI-0001", "LIDC-IDRI-0002")):
        for name in (*given, "other"):
            write(tmp_path / given[0] / f"{name}.nii.gz")
        for option in (",".join(given), f"[{','.join(map(repr, given))}]"):
            lists, _ = prepare(tmp_path / given[0], f"--output={tmp_path / 'list.json'}", f"--held_out={option}")
            assert names(lists["validation"]) == list(given) and names(lists["training"]) == ["other"]


def test_a_region_is_a_name_or_several(tmp_path):
    write(tmp_path / "a.nii.gz")
    for given in ("head", ["head"]):
        (tmp_path / "given.json").write_text(json.dumps({"training": [{"image": "a.nii.gz", "region": given}]}))
        lists, _ = prepare(tmp_path / "given.json", f"--output={tmp_path / 'list.json'}", "--validation=0")
        assert [item["region"] for item in lists["training"] + lists["validation"]] == [["head"]]
    (tmp_path / "given.json").write_text(json.dumps({"training": [{"image": "a.nii.gz", "region": "neck"}]}))
    with pytest.raises(InputError, match="region 'neck' is not known; allowed are head, chest"):
        find_cases(tmp_path / "given.json")


def test_held_out_is_what_the_latents_are_called(tmp_path):
    for name in ("scan78", "scan79_a", "scan80"):
        write(tmp_path / f"{name}.nii.gz")
    held = [{"name": "bob", "image": "scan78.nii.gz"}, {"name": "scan79", "image": "scan79_a.nii.gz"}]
    (tmp_path / "given.json").write_text(json.dumps({"training": ["scan80.nii.gz"], "validation": held}))
    lists, _ = prepare(tmp_path / "given.json", f"--output={tmp_path / 'list.json'}")
    assert names(lists["validation"]) == ["bob", "scan79"] and lists["held_out"] == ["scan78", "scan79"]


def test_a_held_out_case_whose_name_begins_anothers_takes_out_no_other(tmp_path):
    """The stages tell latents by these names; the list serves the next `maisi prepare`, too."""
    for name in ("pt_1", "pt_1_2", "pt_3", "pt_4", "pt_4_2"):
        case(tmp_path / "data", name)
    wanted = {"pt_1": "pt_1_ct", "pt_3": "pt_3", "pt_4_2": "pt_4_2", "pt_4": "pt_4"}  # both out
    lists, _ = prepare(tmp_path / "data", f"--output={tmp_path / 'list.json'}", f"--held_out={','.join(wanted)}")
    assert names(lists["training"]) == ["pt_1_2"] and lists["held_out"] == list(wanted.values())
    latents = tmp_path / "latents"
    latents.mkdir()
    for item in lists["training"] + lists["validation"]:
        for view in ("", "_flip"):
            stem = f"{stem_of(item['image'])}{view}"
            (latents / f"{stem}_latent.nii.gz").touch()
            (latents / f"{stem}_latent.json").write_text(json.dumps({"view": view[1:]}))
    found = find_latents(latents, tmp_path / "list.json")
    assert [Path(item["latent"]).name for item in found["training"]] == [
        f"pt_1_2_ct{view}_latent.nii.gz" for view in ("_flip", "")
    ]
    again, _ = prepare(tmp_path / "data", f"--output={tmp_path / 'b.json'}", f"--held_out={tmp_path / 'list.json'}")
    assert again == lists


def test_a_held_out_file_whose_name_begins_a_training_files_is_refused(tmp_path, capsys):
    for name in ("scan", "scan_2", "scan3"):
        write(tmp_path / "data" / f"{name}.nii.gz")
    line = ["prepare", str(tmp_path / "data"), f"--output={tmp_path / 'list.json'}"]
    assert main([*line, "--held_out=scan"]) == 2 and not (tmp_path / "list.json").exists()
    assert "scan.nii.gz is held out and scan_2 is not" in capsys.readouterr().err
    for held_out, wanted in (("scan,scan_2", ["scan", "scan_2"]), ("scan_2", ["scan_2"]), ("scan3", ["scan3"])):
        assert prepare(*line[1:], f"--held_out={held_out}")[0]["held_out"] == wanted


def test_msd(tmp_path, capsys):
    for name in ("liver_1", "liver_10"):
        write(tmp_path / "imagesTr" / f"{name}.nii.gz")
        write(tmp_path / "labelsTr" / f"{name}.nii.gz", hu=False, value=2)
    entries = [
        {"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in ("liver_10", "liver_1", "gone")
    ]
    described = {"modality": {"0": "CT"}, "labels": {"0": "background", "1": "liver", "2": "cancer"}, "numTraining": 3}
    (tmp_path / "dataset.json").write_text(
        json.dumps({**described, "training": entries, "test": ["./imagesTs/x.nii.gz"]})
    )
    for source in (tmp_path, tmp_path / "dataset.json"):
        lists, report = prepare(source, f"--output={tmp_path / 'list.json'}")
        assert names(lists["training"]) == ["liver_1", "liver_10"]
        assert lists["training"][0]["label"] == str(tmp_path / "labelsTr" / "liver_1.nii.gz")
    ((file, reason),) = report["refused"].items()
    assert Path(file).name == "gone.nii.gz" and "does not exist" in reason
    assert report["labels"] == [{"label": 2, "cases": 2, "read_as": "placeholder 2", "called": "cancer"}]
    (warning,) = report["warnings"]
    assert "label 2 is called 'cancer'" in warning and "--label_map" in warning
    assert "warning: label 2" in capsys.readouterr().out


@pytest.mark.parametrize("form", ["v2", "v2 other way round", "v2 described", "v1"])
def test_nnunet(tmp_path, form, monkeypatch):
    """Two channels, of which the second is the CT; also by a relative path."""
    for name in ("case_1", "case_2"):
        write(tmp_path / "imagesTr" / f"{name}_0000.nii.gz", hu=False)
        write(tmp_path / "imagesTr" / f"{name}_0001.nii.gz")
        write(tmp_path / "labelsTr" / f"{name}.nii.gz", hu=False)
    content = {"labels": {"background": 0, "liver": 1, "whole": [1, 2]}, "numTraining": 2, "file_ending": ".nii.gz"}
    content["channel_names"] = {"0": "PET", "1": "CT"} if form != "v2 other way round" else {"PET": 0, "CT": 1}
    if form == "v2 described":
        content["dataset"] = {
            name: {
                "images": [f"imagesTr/{name}_{i:04d}.nii.gz" for i in range(2)],
                "label": f"labelsTr/{name}.nii.gz",
            }
            for name in ("case_2", "case_1")
        }
    if form == "v1":
        content = {"modality": content["channel_names"], "labels": {"0": "background", "1": "liver"}, "numTraining": 2}
        content["training"] = [
            {"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in ("case_1", "case_2")
        ]
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    monkeypatch.chdir(tmp_path.parent)
    for given in (tmp_path, Path(tmp_path.name), Path(tmp_path.name) / "dataset.json"):
        cases, labels = find_cases(given)
        assert [(case.name, case.image.name, case.label.name) for case in cases] == [
            (f"case_{i}", f"case_{i}_0001.nii.gz", f"case_{i}.nii.gz") for i in (1, 2)
        ]
        assert all(case.image.is_file() and case.label.is_file() for case in cases)
        assert labels == {1: "liver"} and {case.modality for case in cases} == {"ct"}


def test_other_modalities_are_named(tmp_path):
    write(tmp_path / "imagesTr" / "x_0000.nii.gz", hu=False)
    write(tmp_path / "labelsTr" / "x.nii.gz", hu=False)
    (tmp_path / "dataset.json").write_text(json.dumps({"channel_names": {"0": "T1"}, "file_ending": ".nii.gz"}))
    lists, report = prepare(tmp_path, f"--output={tmp_path / 'list.json'}")
    assert lists["training"][0]["modality"] == "mri" and report["modalities"] == {"mri": 1}
    assert "mri" in report["warnings"][0]


@pytest.mark.parametrize("channel", ["T1w", "t1gd", "ADC", "FLAIR", "MR"])
def test_names_of_mr_channels(tmp_path, channel):
    described = {"numTraining": 1, "channel_names": {"0": channel}, "training": ["x.nii.gz"]}
    (tmp_path / "dataset.json").write_text(json.dumps(described | {"training": [{"image": "x.nii.gz"}]}))
    assert [case.modality for case in find_cases(tmp_path)[0]] == ["mri"]


def test_every_ct_must_have_hu_and_what_no_network_takes_is_refused(tmp_path):
    """Whatever the case of its modality's letters; an MR has no unit, and the small weights know none."""
    hu = {"plain": "CT", "contrast": "CT_Contrast", "native": "ct_wo_contrast"}
    raw = {"raw": "ct", "raw_contrast": "ct_contrast", "mr": "MRI_T1", "pet": "PET", "odd": "ct_foo", "none": "unknown"}
    entries = [{"image": str(write(tmp_path / f"{name}.nii.gz")), "modality": kind} for name, kind in hu.items()]
    entries += [
        {"image": str(write(tmp_path / f"{name}.nii.gz", hu=False)), "modality": kind} for name, kind in raw.items()
    ]
    (tmp_path / "all.json").write_text(json.dumps({"training": entries}))
    lists, report = prepare(tmp_path / "all.json", f"--output={tmp_path / 'list.json'}")
    assert {item["name"]: item.get("modality", "ct") for item in lists["training"]} == {
        **{"plain": "ct", "contrast": "ct_contrast", "native": "ct_wo_contrast", "mr": "mri_t1"}
    }
    reasons = {Path(file).name.removesuffix(".nii.gz"): reason for file, reason in report["refused"].items()}
    assert set(reasons) == {"raw", "raw_contrast", "pet", "odd", "none"}
    assert "8-bit" in reasons["raw_contrast"] or "normalisation" in reasons["raw_contrast"]
    assert reasons["pet"].startswith("has the modality 'PET'; allowed are ct, ct_wo_contrast, ct_contrast, mri,")
    assert report["warnings"] == ["modality mri_t1 is in the list: these bundles' small weights know CT alone"]


def test_a_class_without_counterpart_is_reported_as_body(tmp_path, capsys):
    """Of TotalSegmentator 1 the pulmonary artery is 49; the report ended in KeyError."""
    case(tmp_path / "data", "a", label=49)
    case(tmp_path / "data", "b", label=5)
    values = np.zeros((6, 5, 4), np.uint8)
    values[1, 1], values[2, 2] = 49, 5
    nib.save(nib.Nifti1Image(values, np.diag([2.0, 2, 3, 1])), tmp_path / "data" / "a_seg.nii.gz")
    _, report = prepare(tmp_path / "data", f"--output={tmp_path / 'list.json'}", "--label_map=totalsegmentator_v1")
    assert [(one["label"], one["read_as"], one["cases"]) for one in report["labels"]] == [
        (5, "liver", 2),
        (49, "no counterpart: body", 1),
    ]
    assert "49 = no counterpart: body: in 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{oops", "cannot be read as JSON"),
        ({"testing": ["x.nii.gz"]}, "no list of cases under training"),
        ({"training": [{"img": "x.nii.gz"}]}, "one file under 'image'"),
        ({"training": [{"image": ["a.nii.gz", "b.nii.gz"]}]}, "one file under 'image'"),
        ({"numTraining": 3, "labels": {}}, "neither a list under 'training' nor a 'file_ending'"),
        ({"file_ending": ".nii.gz"}, "names no training case"),
        ({"numTraining": 1, "dataset": {"x": {"images": []}}}, "gives case x no list"),
        ({"numTraining": 1, "training": ["x.nii.gz"]}, "one file under 'image'"),
        ({"numTraining": 1, "training": [{"image": "x.nii.gz", "label": ["a.nii.gz"]}]}, "one under 'label'"),
        ({"numTraining": 1, "training": [{"image": "x.nii.gz", "label": 3}]}, "one under 'label'"),
        ({"numTraining": 1, "dataset": {"x": {"images": [3]}}}, "one file under 'image'"),
        ({"file_ending": ".nii.gz", "channel_names": {"CT": "first"}}, "gives the channel 'CT' no number"),
        ({"training": [{"image": "x.nii.gz", "region": 3}]}, "region is 3; allowed are head, .* one or a list"),
    ],
)
def test_lists_that_are_none_are_refused(tmp_path, content, said):
    (tmp_path / "list.json").write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(InputError, match=said):
        find_cases(tmp_path / "list.json")


def cases_of(*given: str, **sections: str) -> list[Case]:
    return [Case(name, Path(f"{name}.nii.gz"), section=sections.get(name)) for name in given]


@pytest.mark.parametrize("seed", range(5))
def test_a_share_is_of_patients_and_none_is_on_both_sides(seed):
    cases = cases_of(*(f"p{patient:02d}_{scan}" for patient in range(20) for scan in "abc"))
    placed = split(cases, validation=0.1, patient_pattern="^(.*)_", seed=seed)
    sections = {"training": set(), "validation": set()}
    for item, (patient, section) in zip(cases, placed, strict=True):
        assert patient == item.name[:3]
        sections[section].add(patient)
    assert len(sections["validation"]) == 2 and not sections["training"] & sections["validation"]
    # the same whatever the order, and one other moves at most when a patient is added
    assert split(cases[::-1], validation=0.1, patient_pattern="^(.*)_", seed=seed) == placed[::-1]
    more = split([*cases, *cases_of("q_a")], validation=0.1, patient_pattern="^(.*)_", seed=seed)
    held = {patient for patient, section in more if section == "validation"}
    assert len(held | sections["validation"]) == 3 and held - sections["validation"]


def test_who_is_held_out_stays_so_when_patients_are_added():
    """Of 20 and of 24 patients a fifth are not the same ones; the names of the first list are."""
    few, more = (cases_of(*(f"pt_{i}" for i in range(count))) for count in (20, 24))
    held = {patient for patient, section in split(few, validation=0.2) if section == "validation"}
    assert len(held) == 4
    assert {patient for patient, section in split(more, held_out=held) if section == "validation"} == held


def test_a_datalist_says_who_its_patients_are(tmp_path):
    """Also one that `prepare` wrote itself; a pattern that is given is stronger."""
    data = tmp_path / "data"
    for name in (f"p{patient}_t{time}" for patient in range(5) for time in range(2)):
        write(data / f"{name}_ct.nii.gz")
    first, _ = prepare(data, f"--output={tmp_path / 'all.json'}", "--patient_pattern=^(p.)_")
    lists, report = prepare(tmp_path / "all.json", f"--output={tmp_path / 'split.json'}", "--validation=0.3")
    assert report["patients"] == {"training": 3, "validation": 2}
    assert all(item["patient"] == item["name"][:2] for section in ("training", "validation") for item in lists[section])
    sides = [{item["name"][:2] for item in lists[section]} for section in ("training", "validation")]
    assert not sides[0] & sides[1]
    by_time, _ = prepare(
        tmp_path / "all.json", f"--output={tmp_path / 'x.json'}", "--patient_pattern=t.", "--held_out=t1"
    )
    assert {item["patient"] for item in by_time["validation"]} == {"t1"} and len(by_time["validation"]) == 5

    entries = [{"image": item["image"], "patient": index // 2} for index, item in enumerate(first["training"])]
    leaking = {"training": entries[::2], "validation": entries[1::2]}
    (tmp_path / "own.json").write_text(json.dumps(leaking))
    with pytest.raises(InputError, match="patients on both sides: 0, 1, 2, 3, 4"):
        split(find_cases(tmp_path / "own.json")[0])


@pytest.mark.parametrize("axes", ["RAS", "PIR"])
def test_a_mask_in_another_orientation_than_its_volume_is_on_its_grid(tmp_path, axes):
    """As the trainings and `complete_masks` take the pair."""
    case(tmp_path / "data", "a")
    path = tmp_path / "data" / "a_ct.nii.gz"
    image, wanted = nib.load(path), nib.orientations.axcodes2ornt(axes.replace("R", "L"))
    nib.save(image.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(image.affine), wanted)), path)
    lists, report = prepare(tmp_path / "data", f"--output={tmp_path / 'list.json'}")
    assert report["refused"] == {} and report["masks"] == 1 and names(lists["training"]) == ["a"]


def test_seeds_differ():
    cases = cases_of(*map(str, range(50)))
    assert len({tuple(split(cases, validation=0.2, seed=seed)) for seed in range(4)}) == 4
    assert {section for _, section in split(cases, validation=0)} == {"training"}


def test_a_held_out_scan_takes_its_patient_along():
    cases = cases_of("p1_a", "p1_b", "p2_a")
    for held_out in (["p1_b"], ["p1"]):
        placed = split(cases, held_out=held_out, patient_pattern=r"p\d")
        assert placed == [("p1", "validation"), ("p1", "validation"), ("p2", "training")]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"validation": 0.1, "held_out": ["a"]}, "give one of them"),
        ({"validation": 1.0}, "share of patients"),
        ({"validation": "few"}, "share of patients"),
        ({"validation": 0.9}, "leaves none to train on"),
        ({"held_out": ["d"]}, "held-out cases d are not in the data"),
        ({"patient_pattern": "("}, "no regular expression"),
        ({"patient_pattern": "^a"}, "finds no patient in 'b'"),
    ],
)
def test_splits_that_cannot_be_are_refused(options, said):
    with pytest.raises(InputError, match=said):
        split(cases_of("a", "b", "c"), **options)


def test_a_given_split_that_leaks_a_patient_is_refused():
    cases = cases_of("p1_a", "p1_b", "p2_a", p1_a="training", p1_b="validation", p2_a="training")
    with pytest.raises(InputError, match="patients on both sides: p1"):
        split(cases, patient_pattern="^(.*)_")


@pytest.mark.parametrize("workers", [0, 2])
def test_work_comes_back_in_order(workers):
    assert list(in_order(abs, [-3, 2, -1], workers, "counting")) == [3, 2, 1]
    with pytest.raises(TypeError):
        list(in_order(abs, [1, "x", 2], workers, "counting"))


@pytest.mark.parametrize("workers", [-1, 1.5, True, "two"])
def test_numbers_of_workers_that_are_none_are_refused(workers):
    with pytest.raises(InputError, match="whole number of processes"):
        list(in_order(abs, [1], workers, "counting"))


def test_a_folder_without_volumes_is_refused_and_of_dicom_says_how(tmp_path, caplog):
    (tmp_path / "CT").mkdir()
    (tmp_path / "CT" / "notes.txt").write_text("none")
    with pytest.raises(InputError, match="no volume .* allowed is a folder with volumes"):
        find_cases(tmp_path)
    (tmp_path / "CT" / "0001").write_bytes(bytes(128) + b"DICM")
    with pytest.raises(InputError, match="but DICOM; .* maisi dicom_read SERIES -o NAME_ct.nii.gz"):
        find_cases(tmp_path)
    write(tmp_path / "a_ct.nii.gz")
    assert [case.name for case in find_cases(tmp_path)[0]] == ["a"]
    assert "DICOM files are passed over; make each series a volume first" in caplog.text
    (tmp_path / "CT" / "0001").unlink()
    caplog.clear()
    find_cases(tmp_path)
    assert not caplog.text
