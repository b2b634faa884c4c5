"""Makes the small weights from a folder of CTs: `python recipes/small/run.py DATA --out RUNS`.

Stages, each by a config of its own, trainings with an overlay that lies beside this file:

    prepare      data sets -> datalist; the patients of docs/held_out.json stay out of it
    masks        CTs and their labels -> completed masks, in the MAISI vocabulary
    autoencoder  CTs -> autoencoder at factor 2, from a linear start
    latents      CTs -> latents, and coarse CTs beside them
    decoder      CTs -> the autoencoder's decoder goes on; its encoder, and so the latents, stay as they are
    controlnet   crops of latents and masks -> U-Net and ControlNet, trained together
    whole        whole latents: the same weights go on, at what they will see
    coarse       coarse CTs -> the network that draws the whole field of view first
    ldm          crops of latents and coarse CTs -> the U-Net that draws latents from them
    judge        CTs and their labels -> the segmentation network that measures conditioning
    evaluate     the kept-out patients, once -> RUNS/measured.json
    samples      a dozen CTs from noise: their bodies, how near they are to the training's -> RUNS/samples.json
    editing      a hundred edits of the kept-out patients' CTs -> RUNS/editing (by --stages)
    downstream   CTs of training masks; networks trained with and without them -> RUNS/downstream (hours; by --stages)

A stage that is done is passed over, one that was cut off goes on. The weights are those of `RUNS/decoder/model.pt`
(`RUNS/autoencoder` while stage `decoder` was not run), `RUNS/whole/model.pt` (`RUNS/controlnet` likewise) and
`RUNS/{coarse,ldm,judge}/model.pt`.
`--ship` copies them into the bundles and `evaluation/segmentation`, and writes what was measured into the model cards.

On a borrowed GPU, to which the data travel as one file:

    python recipes/small/run.py DATA --out RUNS --stages prepare,masks --pack data.npz
    python recipes/small/run.py data.npz --out AWAY --gpu --minutes 3       # there: the trainings

Then `autoencoder`, `latents`, `decoder`, `controlnet`, `coarse`, `ldm` and `judge` of AWAY go into RUNS, and
`run.py DATA --out RUNS --stages evaluate` measures them.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from measured import (
    FIELDS,
    by_region,
    check_makers,
    files_of,
    gather,
    is_measured,
    makers,
    measure_bodies,
    publish,
    sampling,
)
from packed import pack, unpack

from maisi_tools.datasets.layouts import find_cases
from maisi_tools.errors import InputError, first_few, report_input_errors
from maisi_tools.files import expanded, fingerprint_file, held, read_json, write_json
from maisi_tools.volumes.inputs import stem_of

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
LEAST_MINUTES = {"cpu": 5.0, "gpu": 0.5}
"""Of a stage with a time budget: what is shorter does not see the data once."""

STAGES = (
    "prepare",
    "masks",
    "autoencoder",
    "latents",
    "decoder",
    "controlnet",
    "whole",
    "coarse",
    "ldm",
    "judge",
    "evaluate",
    "samples",
    "editing",
    "downstream",
)

BY_NAME = ("editing", "downstream")
"""Stages that run where --stages names them, and with --quick."""

BEGUN = ("*/checkpoint*", "*/model*.pt")
"""Files of which there is one where a training has begun: from these it goes on, and others begin with them."""

AT_HOME = ("masks", "evaluate", "samples", "editing", "downstream")
"""Stages for which a packed file has not all that they need."""


def run_python(*arguments: object, cwd: Path | None = None) -> None:
    """Run Python with arguments. Where that fails it has said why, and this ends with its exit status."""
    status = subprocess.run([sys.executable, *map(str, arguments)], check=False, cwd=cwd).returncode
    if status:
        print(f"stopped: python {' '.join(map(str, arguments[:3]))} ... ended with {status}", file=sys.stderr)
        sys.exit(status)


def run_script(path: str, *arguments: object) -> None:
    """Run a script of this repository."""
    run_python(ROOT / path, *arguments)


def run_maisi(*arguments: object) -> None:
    """Run the `maisi` command."""
    run_python("-m", "maisi_tools.cli", *arguments)


def run_bundle(root: Path, configs: str, overlays: list[str], settings: Mapping[str, Any]) -> None:
    """Run a config of a bundle, or several one upon the other, with overlays of this folder on top."""
    files = [*(str(root / "configs" / name) for name in configs.split(",")), *(str(HERE / name) for name in overlays)]
    given = [text for key, value in settings.items() for text in (f"--{key}", _as_text(value))]
    run_python("-m", "monai.bundle", "run", "--config_file", repr(files), "--bundle_root", root, *given, cwd=root)


def _as_text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, (list, dict)) else str(value)


def prepare(data: Path, out: Path, split: Mapping[str, list[str]]) -> None:
    """Write `datalist.json`: patients to train on and to validate with, and none of those that are kept out."""
    write_json(out / "validation.json", {"held_out": split["validation"]})
    everyone = out / "everyone.json"
    run_maisi("prepare", data, "--output", everyone, "--label_map", "openkbp", "--held_out", out / "validation.json")
    kept_out = set(split["held_out"])
    lists = json.loads(everyone.read_text())
    patients = [item for section in ("training", "validation") for item in lists[section]]
    write_json(out / "kept_out.json", {"validation": [item for item in patients if _patient(item) in kept_out]})
    for section in ("training", "validation"):
        lists[section] = [item for item in lists[section] if _patient(item) not in kept_out]
    measured = sum(_patient(item) in kept_out for item in patients)
    if len(lists["training"]) < 2 or not lists["validation"] or not measured:
        raise InputError(
            f"{data} has {len(lists['training'])} patients to train on, {len(lists['validation'])} to validate with "
            f"and {measured} kept out; allowed are at least 2, 1 and 1: give more data, or another --split"
        )
    write_json(out / "datalist.json", lists)


def check_data(out: Path, data: Path, split: Mapping[str, list[str]]) -> None:
    """Refuse to go on in a folder of other data, or of another split: of who validates, or who is kept out.

    Data are known by their files' names; what was made of a CT knows its content.

    Raises:
        InputError: with either, data that got or lost a case, or a folder that `prepare` did not finish.
    """
    lists = json.loads((out / "datalist.json").read_text())
    used = [item for section in ("training", "validation") for item in lists[section]]
    if absent := [name for name in ("validation.json", "kept_out.json", "everyone.json") if not (out / name).is_file()]:
        raise InputError(f"{out} has a datalist.json and no {absent[0]}, which prepare writes; give another --out")
    if not Path(used[0]["image"]).is_relative_to(data):
        place = Path(used[0]["image"]).parent
        raise InputError(f"{out} is of the data in {place}, not of {data}; give these, or another --out")
    validation = json.loads((out / "validation.json").read_text())["held_out"]
    kept_out = {_patient(item) for item in json.loads((out / "kept_out.json").read_text())["validation"]}
    others = {_patient(item) for item in used} & set(split["held_out"]) or kept_out - set(split["held_out"])
    if others or sorted(validation) != sorted(split["validation"]):
        raise InputError(f"{out} was made with another --split than this one; give that, or another --out")
    if changed := _changed_cases(out, data):
        raise InputError(
            f"{data} is no longer what {out} was made of: {changed}; put the files back as they were, or give another "
            "--out, which is made of what is there now"
        )


def _changed_cases(out: Path, data: Path) -> str:
    """The cases that a folder of data got, lost, or has another mask of since `prepare`, in words; "" for none."""
    lists = json.loads((out / "everyone.json").read_text())
    report = out / "everyone_report.json"
    refused = json.loads(report.read_text())["refused"] if report.is_file() else {}
    # As `prepare` takes them: each once, by whatever link, the first of several.
    now = [case for case in reversed(find_cases(data)[0]) if case.refused is None and case.image.exists()]
    masks = {case.image.resolve(): str(case.label) if case.label and case.label.exists() else None for case in now}
    cases = [item for section in ("training", "validation") for item in lists[section]]
    then = {Path(item["image"]).resolve(): item.get("label") for item in cases}
    passed_over = {Path(file).resolve() for file in refused}
    found = {
        "added": masks.keys() - then.keys() - passed_over,
        "gone": then.keys() - masks.keys(),
        "with another mask": [image for image in then.keys() & masks.keys() if masks[image] != then[image]],
    }
    named = {what: sorted(image.name for image in of) for what, of in found.items()}
    return ", ".join(f"{len(of)} {what} ({first_few(of)})" for what, of in named.items() if of)


def check_packed(out: Path, file: Path) -> None:
    """Refuse to go on in a folder of another packed file, or of a folder of data.

    Raises:
        InputError: it is one.
    """
    made_of = out / "packed.json"
    if not made_of.is_file() or json.loads(made_of.read_text())["fingerprint"] != fingerprint_file(file):
        raise InputError(f"{out} is of other data than {file}; give these, or another --out")


def _patient(item: Mapping[str, Any]) -> str:
    return Path(item["image"]).name.split("_ct.")[0]


class Run:
    """The stages of one run's folder.

    Args:
        out: the folder.
        minutes: of training, for each stage that trains.
        changes: settings of each stage beside its overlay's, by its name; of all that draw CTs by "inference".
    """

    def __init__(self, out: Path, minutes: float, changes: Mapping[str, Mapping[str, Any]]) -> None:
        self.out, self.minutes, self.changes = out, minutes, changes
        self.inference = changes.get("inference", {})

    def masks(self) -> None:
        """Complete the masks."""
        out = self.out
        run_maisi("complete_masks", out / "datalist.json", "--output_dir", out / "masks", "--label_map", "openkbp")

    def autoencoder(self) -> None:
        """Train the autoencoder."""
        self._train("autoencoder", "bundles/maisi_vae", ["autoencoder.json"], datalist=self.out / "datalist.json")

    def latents(self) -> None:
        """Encode the CTs."""
        settings = {
            "input": self.out / "masks" / "cases.json",
            "output_dir": self.out / "latents",
            "ckpt_path": self.out / "autoencoder" / "model.pt",
            "coarse_size": sampling("maisi_ldm")["coarse_size"],
        }
        run_bundle(ROOT / "bundles/maisi_vae", "encode.json", [], settings)

    def decoder(self) -> None:
        """Train the decoder on."""
        settings = {"datalist": self.out / "datalist.json", "init_ckpt": self.out / "autoencoder" / "model.pt"}
        self._train("decoder", "bundles/maisi_vae", ["autoencoder.json", "decoder.json"], **settings)

    def controlnet(self) -> None:
        """Train U-Net and ControlNet on crops."""
        self._train_diffusion("controlnet", "maisi_controlnet", ["controlnet.json"], masks_dir=self.out / "masks")

    def whole(self) -> None:
        """Train them on whole latents."""
        settings = {"masks_dir": self.out / "masks", "init_ckpt": self.out / "controlnet" / "model.pt"}
        self._train_diffusion("whole", "maisi_controlnet", ["controlnet.json", "whole.json"], **settings)

    def coarse(self) -> None:
        """Train what draws coarse CTs."""
        self._train_diffusion("coarse", "maisi_ldm", ["coarse.json"], "train.json,train_coarse.json")

    def ldm(self) -> None:
        """Train the U-Net that draws latents from coarse CTs."""
        self._train_diffusion("ldm", "maisi_ldm", ["ldm.json"])

    def judge(self) -> None:
        """Train the segmentation network."""
        self._train("judge", "evaluation/segmentation", ["judge.json"], datalist=self.out / "datalist.json")

    def evaluate(self) -> None:
        """Measure the weights on the patients that nothing was trained or chosen on."""
        if is_measured(self.out):
            return
        files = files_of(self.out)
        folder, lists = self.out / "evaluation", self.out / "kept_out.json"
        run_maisi("complete_masks", lists, "--output_dir", folder / "masks", "--label_map", "openkbp")
        kept_out = json.loads(lists.read_text())["validation"]
        write_json(folder / "cases.json", [{"image": item["image"]} for item in kept_out])
        autoencoder = files["autoencoder"]
        settings = {"input": folder / "cases.json", "ckpt_path": autoencoder, "output_dir": folder / "vae"}
        run_bundle(ROOT / "bundles/maisi_vae", "inference.json,evaluate.json", [], settings)
        settings = {
            "datalist": lists,
            "masks_dir": folder / "masks",
            "ckpt_path": files["controlnet"],
            "autoencoder_ckpt_path": autoencoder,
            "segmenter_config": ROOT / "evaluation/segmentation/configs/inference.json",
            "segmenter_ckpt": files["judge"],
            "output_dir": folder / "controlnet",
        }
        run_bundle(ROOT / "bundles/maisi_controlnet", "inference.json,evaluate.json", [], settings | self.inference)
        figures = gather(folder, kept_out)
        write_json(self.out / "measured.json", {**makers(self.out), **figures})

    def samples(self) -> None:
        """Draw CTs from noise, and measure their bodies and how near they are to the training's."""
        if is_measured(self.out, "samples"):
            return
        files, folder = files_of(self.out, "samples"), self.out / "samples"
        weights = {"ckpt_path": files["ldm"], "autoencoder_ckpt_path": files["autoencoder"]}
        changes = {"fields": FIELDS, "seeds": 3, "fid_size": 128} | self.changes.get("samples", {})
        fields, seeds, size = (changes.pop(name) for name in ("fields", "seeds", "fid_size"))
        for number, field in enumerate(fields):
            samples = [{"seed": seed, "name": f"field{number}_seed{seed}"} for seed in range(seeds)]
            settings = {"input": samples, "coarse_ckpt_path": files["coarse"], "output_dir": folder / f"field{number}"}
            run_bundle(ROOT / "bundles/maisi_ldm", "inference.json", [], weights | settings | field | changes)
        lists = {
            "training": json.loads((self.out / "datalist.json").read_text())["training"],
            "validation": json.loads((self.out / "kept_out.json").read_text())["validation"],
        }
        write_json(folder / "cases.json", lists)
        settings = {
            "dataset_dir": self.out / "latents",
            "held_out": self.out / "validation.json",
            "datalist": folder / "cases.json",
            "samples_dir": str(folder / "field*" / "*.nii.gz"),
            "output_dir": folder,
            **{name: value for name, value in changes.items() if name.startswith("network_def#")},
        }
        run_bundle(ROOT / "bundles/maisi_ldm", "train.json,evaluate.json", [], weights | settings)
        figures = json.loads((folder / "summary.json").read_text())
        bodies = [field | measure_bodies(folder / f"field{number}") for number, field in enumerate(fields)]
        fid = self._fid([str(path) for path in sorted(folder.glob("field*/*.nii.gz"))], lists, fields, size)
        write_json(self.out / "samples.json", {**makers(self.out, "samples"), **figures, "fields": bodies, "fid": fid})

    def _fid(
        self, drawn: list[str], lists: Mapping[str, Any], fields: Sequence[Mapping[str, Any]], size: int
    ) -> list[dict[str, Any]]:
        """How far samples, and as many CTs of the training, are from kept-out patients, in cubes of 512 mm.

        Heads are compared with heads: how many patients of either kind there are would else weigh more than the CTs.
        """
        known, kept_out = ([case["image"] for case in lists[name]] for name in ("training", "validation"))
        made, known, kept_out = (by_region(cts, fields) for cts in (drawn, known, kept_out))
        folder, rows = self.out / "samples" / "realism", []
        for region in sorted(made.keys() & known.keys() & kept_out.keys()):
            cts = {"kept_out": kept_out[region], "samples": made[region]}
            cts["training"] = random.Random(0).sample(known[region], min(len(made[region]), len(known[region])))
            row: dict[str, Any] = {"region": list(region), "cts": {name: len(of) for name, of in cts.items()}}
            for name, of in cts.items():
                write_json(folder / f"{name}.json", {"validation": of})
            for name in ("samples", "training"):
                options = ("--output_dir", folder, "--spacing", 512 / size, "--size", size, "--pairs", 0)
                run_maisi("realism", folder / "kept_out.json", folder / f"{name}.json", *options)
                found = json.loads((folder / "realism.json").read_text())
                row[name] = found["figures"][f"fid@{found['network']}"]
                row |= {kind: found[kind] for kind in ("network", "spacing")}
            rows.append(row)
        return rows

    def editing(self) -> None:
        """Edit the CTs of the kept-out patients, and measure what it did."""
        files, folder = files_of(self.out), self.out / "editing"
        check_makers(self.out, "editing")
        if (folder / "table.md").is_file():
            return
        plan = {"count": 100} | self.changes.get("editing", {})
        weights = {"ckpt_path": str(files["controlnet"]), "autoencoder_ckpt_path": str(files["autoencoder"])}
        options = {
            "datalist": self.out / "kept_out.json",
            "label_map": "openkbp",
            "count": plan["count"],
            "settings": json.dumps(self.inference | weights),
            "segmenter": ROOT / "evaluation/segmentation/configs/inference.json",
            "ckpt": files["judge"],
            "output_dir": folder,
        }
        run_script("evaluation/editing.py", *(f"--{name}={value}" for name, value in options.items()))

    def downstream(self) -> None:
        """Make CTs of masks of training patients, and measure what they are worth to a segmentation network."""
        files, folder = files_of(self.out), self.out / "downstream"
        plan = json.loads((HERE / "downstream.json").read_text()) | self.changes.get("downstream", {})
        check_makers(self.out, "downstream")
        patients = json.loads((self.out / "datalist.json").read_text())
        training = patients["training"]
        if len(training) < plan["count"]:
            raise InputError(
                f"there are {len(training)} patients to train on, and downstream.json asks for {plan['count']}"
            )
        drawn = random.Random(plan["seed"]).sample(training, plan["count"])
        masks = [self.out / "masks" / f"{stem_of(case['image'])}_mask.nii.gz" for case in drawn]
        cts = [folder / "cts" / f"{stem_of(mask)}_ct.nii.gz" for mask in masks]
        left = [{"image": str(mask)} for mask, ct in zip(masks, cts, strict=True) if not ct.is_file()]
        if left:
            write_json(folder / "left.json", {"training": left})
            settings = {
                "input": folder / "left.json",
                "output_dir": folder / "cts",
                "ckpt_path": files["controlnet"],
                "autoencoder_ckpt_path": files["autoencoder"],
            }
            run_bundle(ROOT / "bundles/maisi_controlnet", "inference.json", [], settings | self.inference)
        pairs = [{"image": str(ct), "label": case["label"]} for ct, case in zip(cts, drawn, strict=True)]
        write_json(folder / "synthetic.json", {"training": pairs})
        write_json(folder / "real.json", patients | {"validation": patients["validation"][: plan["validation"]]})
        options = {
            "datalist": folder / "real.json",
            "kept_out": self.out / "kept_out.json",
            "synthetic": folder / "synthetic.json",
            "output_dir": folder / "arms",
            **{name: plan[name] for name in ("real", "synthetic_counts", "orders", "seeds")},
            "settings": json.dumps(plan["settings"]),
        }
        run_script("evaluation/downstream.py", *(f"--{name}={value}" for name, value in options.items()))

    def _train_diffusion(
        self, stage: str, bundle: str, overlays: list[str], configs: str = "train.json", **settings: Any
    ) -> None:
        settings |= {
            "dataset_dir": self.out / "latents",
            "held_out": self.out / "validation.json",
            "autoencoder_ckpt_path": self.out / "autoencoder" / "model.pt",
        }
        self._train(stage, f"bundles/{bundle}", overlays, configs, **settings)

    def _train(
        self, stage: str, bundle: str, overlays: list[str], configs: str = "train.json", **settings: Any
    ) -> None:
        folder = self.out / stage
        if (folder / "model.pt").is_file():
            return
        settings |= {"ckpt_dir": folder, "resume": True, "minutes": self.minutes}
        run_bundle(ROOT / bundle, configs, overlays, settings | self.changes.get(stage, {}))


def main(arguments: list[str] | None = None) -> None:
    """Make all stages, see the module."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "data", type=expanded, help="folder of NAME_ct.nii.gz and NAME_seg.nii.gz, such as OpenKBP's, or a packed file"
    )
    parser.add_argument("--out", type=expanded, required=True, help="folder of the runs")
    parser.add_argument("--minutes", type=float, default=60.0, help="of training, for each stage that trains")
    parser.add_argument("--split", type=expanded, default=ROOT / "docs" / "held_out.json")
    parser.add_argument(
        "--stages",
        help=f"of {','.join(STAGES)} (default: all but {', '.join(BY_NAME)}; of a packed file the trainings)",
    )
    parser.add_argument("--pack", type=expanded, help="write the data, with completed masks, into this file")
    parser.add_argument("--ship", action="store_true", help="copy weights and figures into the bundles")
    parser.add_argument("--gpu", action="store_true", help="larger batches and crops, for a GPU")
    parser.add_argument(
        "--quick", action="store_true", help="tiny networks and a few steps, to see that all of it runs"
    )
    given = parser.parse_args(arguments)
    least = LEAST_MINUTES["gpu" if given.gpu else "cpu"]
    if not (given.minutes >= least or given.quick):
        raise InputError(f"--minutes is {given.minutes:g}; allowed are {least:g} and more, which see all data")
    packed = given.data.is_file()
    here = [stage for stage in STAGES if not (packed and stage in AT_HOME)]
    stages = given.stages.split(",") if given.stages else [one for one in here if given.quick or one not in BY_NAME]
    if unknown := set(stages) - set(STAGES):
        raise InputError(f"--stages names {', '.join(sorted(unknown))}; allowed are {', '.join(STAGES)}")
    if away := set(stages) - set(here):
        raise InputError(f"--stages names {', '.join(sorted(away))}, but a packed file has no more than training needs")
    if given.quick and given.ship:
        raise InputError("--quick makes networks that fit no bundle; leave it out, or --ship")
    out = given.out.resolve()
    changes: dict[str, dict[str, Any]] = {}
    for name in ("gpu", "quick"):
        if getattr(given, name):
            for stage, settings in json.loads((HERE / f"{name}.json").read_text()).items():
                changes.setdefault(stage, {}).update(settings)
    with held(out, f"another run begins in {out}; wait, or give another --out"):
        open_folder(out, given, stages, changes)
    run = Run(out, given.minutes, changes)
    for stage in STAGES[1:]:
        if stage in stages:  # two processes may train two stages side by side, as on a GPU
            with held(
                out / ".held" / stage, f"another run is at {stage} in {out}; wait for its end, or give another --out"
            ):
                getattr(run, stage)()
    if given.pack:
        pack(out, given.pack)
    if given.ship:
        publish(out, ROOT)


def open_folder(
    out: Path, given: argparse.Namespace, stages: Sequence[str], changes: Mapping[str, Mapping[str, Any]]
) -> None:
    """Begin the folder of the runs, or refuse to go on in it; `quick.json` there says that its networks are tiny.

    Raises:
        InputError: it is of other data, or of networks of another size (``--quick``).
    """
    quick = out / "quick.json"
    if quick.is_file() != given.quick and any(file for pattern in BEGUN for file in out.glob(pattern)):
        raise InputError(
            f"{out} has the weights of a run {'without' if given.quick else 'with'} --quick; give another --out"
        )
    begun = (out / "datalist.json").is_file()
    if given.data.is_file():
        if begun:
            check_packed(out, given.data)
        else:
            write_json(out / "packed.json", {"fingerprint": fingerprint_file(given.data)})
            unpack(given.data, out)
    elif (out / "packed.json").is_file():
        raise InputError(f"{out} is of a packed file, not of {given.data}; give that file, or another --out")
    elif begun:
        check_data(out, given.data.resolve(), read_json(given.split))
    elif "prepare" in stages:
        prepare(given.data.resolve(), out, read_json(given.split))
    if given.quick:
        write_json(quick, changes)
    else:
        quick.unlink(missing_ok=True)


if __name__ == "__main__":
    report_input_errors()
    main()
