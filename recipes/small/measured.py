"""What was measured of the small weights, and the places where it stands: docs/measured.json and the model cards."""

from __future__ import annotations

import csv
import json
import shutil
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from monai.bundle import ConfigParser

from maisi_tools.errors import InputError
from maisi_tools.files import replacing, sha256, write_json
from maisi_tools.volumes.inputs import stem_of

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ship import place, write_licences  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]

SAMPLING = (
    "solver",
    "num_inference_steps",
    "guidance_scale",
    "guidance_interval",
    "guided_conditions",
    "control_scale",
)

OVERLAYS = {"editing": ("edit.json",)}
"""Of inference.json, in a stage."""

BONE, AIRWAY = 120, 132
"""Labels of completed masks."""

BEGIN, END = "<!-- measured: written by recipes/small/run.py --ship -->\n", "<!-- end -->\n"
"""Around the part of a card that is written from the figures."""


def gather(folder: Path, kept_out: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """The figures of an evaluation's folder, as run.py makes it.

    Args:
        folder: with `masks`, `vae` and `controlnet`.
        kept_out: CTs (`image`) of the patients that were measured.

    Returns:
        `vae`: name -> mean, min, max; `controlnet`: rows of its table, and the deviation of HU inside the body over
        that of the real CT.
    """
    vae = json.loads((folder / "vae" / "summary.json").read_text())
    tissues: dict[str, list[float]] = {}
    for case in kept_out:
        name = stem_of(case["image"])
        mask, real = _read(folder / "masks" / f"{name}_mask.nii.gz"), _read(case["image"]).clip(-1000, 1000)
        made = {
            "recon": _read(folder / "vae" / f"{name}_recon.nii.gz"),
            "ct": _read(folder / "controlnet" / f"{name}_mask_ct.nii.gz"),
        }
        for tissue, label in (("bone", BONE), ("airway", AIRWAY)):
            if (mask == label).any():
                for kind, volume in (("real", real), ("recon", made["recon"])):
                    tissues.setdefault(f"{kind}_{tissue}_hu", []).append(float(volume[mask == label].mean()))
        body = mask > 0
        tissues.setdefault("deviation_ratio", []).append(float(made["ct"][body].std() / real[body].std()))
    with open(folder / "controlnet" / "conditioning.csv", newline="") as file:
        table = list(csv.DictReader(file))
    return {
        "patients": len(kept_out),
        "vae": {
            **{name: {key: vae[name][key] for key in ("mean", "min", "max")} for name in vae if name in VAE_ROWS},
            **{name: _spread(values) for name, values in tissues.items() if name.endswith("_hu")},
        },
        "controlnet": {"table": table, "deviation_ratio": _spread(tissues["deviation_ratio"])},
    }


def files_of(runs: Path) -> dict[str, Path]:
    """The weights of a run: `autoencoder`, `controlnet` (of the last stage there is), `judge`.

    Raises:
        InputError: one is missing.
    """
    files = {
        "autoencoder": runs / "autoencoder" / "model.pt",
        "controlnet": _last(runs) / "model.pt",
        "judge": runs / "judge" / "model.pt",
    }
    if missing := [str(path) for path in files.values() if not path.is_file()]:
        raise InputError(f"there is no {', '.join(missing)}; run the stages that make them first")
    return files


def unet_of(runs: Path) -> Path:
    """The U-Net that was trained with the ControlNet, of the last stage there is."""
    return _last(runs) / "unet.pt"


def _last(runs: Path) -> Path:
    return runs / ("whole" if (runs / "whole" / "model.pt").is_file() else "controlnet")


def is_measured(runs: Path) -> bool:
    """Whether `measured.json` has the figures of the weights that are there, drawn as the bundle draws now."""
    path, these = runs / "measured.json", makers(runs)
    return path.is_file() and {key: json.loads(path.read_text()).get(key) for key in these} == these


def makers(runs: Path, *overlays: str) -> dict[str, dict[str, Any]]:
    """What figures depend on: `weights`, the SHA-256 of each of :func:`files_of`, and `sampling`."""
    return {"weights": {name: sha256(path) for name, path in files_of(runs).items()}, "sampling": sampling(*overlays)}


def sampling(*overlays: str) -> dict[str, Any]:
    """How the bundle draws a CT: the settings of its inference.json, under overlays."""
    folder = ROOT / "bundles" / "maisi_controlnet" / "configs"
    parser = ConfigParser()
    parser.read_config([str(folder / name) for name in ("inference.json", *overlays)])
    return {name: parser.get_parsed_content(name) for name in SAMPLING}


def check_makers(runs: Path, stage: str) -> None:
    """Refuse a stage's folder that other weights or settings made; a new one is marked with these.

    Raises:
        InputError: others.
    """
    path, these = runs / stage / "made_by.json", makers(runs, *OVERLAYS.get(stage, ()))
    if not path.is_file():
        path.parent.mkdir(exist_ok=True)
        write_json(path, these)
    elif (found := json.loads(path.read_text())) != these:
        other = " and ".join(key for key in these if found.get(key) != these[key])
        raise InputError(
            f"{path.parent} was made with other {other} than there is now; delete it, or give another --out"
        )


def publish(runs: Path, root: Path) -> None:
    """Put a run's weights and figures where the bundles, the judge and the docs have them.

    Raises:
        InputError: weights are missing, or the figures are not theirs.
    """
    files = files_of(runs)
    if not is_measured(runs):
        raise InputError(
            f"{runs / 'measured.json'} does not have the figures of these weights; run stage evaluate first"
        )
    for name, targets in TARGETS.items():
        place(files[name], targets, ["openkbp"], root)
    with replacing(root / "evaluation" / "segmentation" / "models" / "model.pt") as part:
        shutil.copyfile(files["judge"], part)
    write_json(root / "docs" / "measured.json", json.loads((runs / "measured.json").read_text()))
    if (runs / "editing" / "table.md").is_file():
        check_makers(runs, "editing")
        table = (runs / "editing" / "table.md").read_text().strip().splitlines()
        write_json(root / "docs" / "editing.json", {"table": table})
    if (runs / "downstream" / "arms" / "downstream.json").is_file():
        check_makers(runs, "downstream")
        write_json(root / "docs" / "downstream.json", gather_downstream(runs / "downstream" / "arms"))
    write_licences(root)
    write_cards(root)


TARGETS = {
    "autoencoder": (
        "maisi_vae/models/model.pt",
        "maisi_controlnet/models/autoencoder.pt",
    ),
    "controlnet": ("maisi_controlnet/models/model.pt",),
}
"""Where the bundles have the weights."""


def gather_downstream(arms: Path) -> dict[str, Any]:
    """What docs/downstream.json has of the folder of an experiment: its tables, without anybody's paths.

    Returns:
        `settings` of the segmentation network, `table` (lines) and `rows`.
    """
    found = json.loads((arms / "downstream.json").read_text())
    if not found["table"]:
        raise InputError(f"{arms} has no arm with synthetic cases yet; run stage downstream to its end")
    settings = next(iter(found["arms"].values()))["settings"]
    return {
        "settings": settings["overrides"],
        "validation": len(settings["validation"]),
        "kept_out": len(settings["kept_out"]),
        "table": (arms / "table.md").read_text().strip().splitlines(),
        "rows": found["table"],
    }


def write_cards(root: Path) -> None:
    """Write the figures of docs/measured.json, downstream.json and editing.json into the pages that show them."""
    docs = root / "docs"
    pages = {root / "bundles" / bundle / "docs" / "README.md": (render, "measured") for bundle, render in CARDS.items()}
    pages[docs / "how-to" / "quality.md"] = _downstream, "downstream"
    pages[docs / "results.md"] = _editing, "editing"
    for path, (render, name) in pages.items():
        figures = json.loads((docs / f"{name}.json").read_text())
        before, rest = path.read_text().split(BEGIN)
        _, after = rest.split(END)
        with replacing(path) as part:
            part.write_text(before + BEGIN + "\n" + render(figures) + "\n" + END + after)


VAE_ROWS = {
    "psnr_body": ("PSNR inside the body, dB", 2),
    "ssim_body": ("SSIM inside the body", 3),
    "psnr": ("PSNR of the whole volume, dB", 2),
    "ssim": ("SSIM of the whole volume", 3),
    "recon_bone_hu": ("HU in bone", 0),
    "real_bone_hu": ("the same in the real CTs", 0),
    "recon_airway_hu": ("HU in airway", 0),
    "real_airway_hu": ("the same in the real CTs", 0),
}
"""Figures of reconstructions: how they are called, and their decimals."""


def _vae(figures: Mapping[str, Any]) -> str:
    lines = [
        f"| {figures['patients']} kept-out patients, on their own grid | mean | lowest | highest |",
        "|---|---|---|---|",
    ]
    for name, (title, digits) in VAE_ROWS.items():
        row = figures["vae"][name]
        lines.append(f"| {title} | " + " | ".join(f"{row[key]:.{digits}f}" for key in ("mean", "min", "max")) + " |")
    return "\n".join(lines) + "\n"


def _controlnet(figures: Mapping[str, Any]) -> str:
    found = figures["controlnet"]
    lines = [f"| {figures['patients']} kept-out patients | cases | generated | real | ratio |", "|---|---|---|---|---|"]
    for row in found["table"]:
        cells = [row["structure"], row["cases"], *(_two(row[key]) for key in ("generated", "real", "ratio"))]
        lines.append("| " + " | ".join(cells) + " |")
    ratio = found["deviation_ratio"]
    lines += [
        "",
        f"Standard deviation of HU inside the body over the real CT's: {ratio['mean']:.3f} ({ratio['min']:.2f} to ",
    ]
    lines[-1] += f"{ratio['max']:.2f})."
    return "\n".join(lines) + "\n"


def _editing(figures: Mapping[str, Any]) -> str:
    return "\n".join(figures["table"]) + "\n"


def _downstream(figures: Mapping[str, Any]) -> str:
    seeds = sorted({row["seeds"] for row in figures["rows"]})
    text = (
        f"Dice on {figures['kept_out']} kept-out patients of N real cases alone, and the difference that M synthetic "
        f"ones make (95 % interval). Seeds: {' to '.join(map(str, seeds))}. Patients to validate with: "
        f"{figures['validation']}."
    )
    apart = [
        f"- N = {row['real']}, M = {row['synthetic']}, {row['order']}: {row['lowest']:+.3f} to {row['highest']:+.3f}"
        for row in figures["rows"]
        if row["figure"] == "dice_mean"
    ]
    lines = [text, "", *figures["table"], "", "Difference of the mean, by seed:", *apart]
    return "\n".join(lines) + "\n"


CARDS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "maisi_vae": _vae,
    "maisi_controlnet": _controlnet,
}
"""What stands in a bundle's card."""


def _two(text: str) -> str:
    return f"{float(text):.2f}" if text else ""


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"mean": round(statistics.fmean(values), 4), "min": round(min(values), 4), "max": round(max(values), 4)}


def _read(path: str | Path) -> np.ndarray:
    return np.asarray(nibabel.as_closest_canonical(nibabel.load(path)).dataobj).astype(np.float32)
