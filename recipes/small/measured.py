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
from maisi_tools.masks.body import BONE_HU, body_envelope
from maisi_tools.volumes.inputs import stem_of

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ship import place, write_licences  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]

SAMPLING = {
    "maisi_controlnet": (
        "solver",
        "num_inference_steps",
        "last_step",
        "guidance_scale",
        "guidance_interval",
        "guidance_parallel",
        "guided_conditions",
        "control_scale",
    ),
    "maisi_ldm": (
        "solver",
        "num_inference_steps",
        "last_step",
        "guidance_scale",
        "guidance_interval",
        "coarse_size",
        "coarse#num_inference_steps",
        "coarse#scheduler#base_img_size_numel",
        "coarse#field_of_view#mm",
    ),
}
"""Settings of a bundle's inference.json that figures depend on."""

FIGURES = {
    "measured": ("maisi_controlnet", ("autoencoder", "controlnet", "judge"), "evaluate"),
    "samples": ("maisi_ldm", ("autoencoder", "coarse", "ldm"), "samples"),
}
"""Of CTs of masks, and of samples from noise: the bundle that draws them, the weights they depend on, the stage."""

GOES_ON = {"autoencoder": "decoder", "controlnet": "whole"}
"""Stages whose weights another takes further."""

OVERLAYS = {"editing": ("edit.json",)}
"""Of inference.json, in a stage."""

FIELDS = (
    {"output_size": [112, 80, 112], "spacing": [4.0, 4.0, 2.5], "region": ["head", "chest"]},
    {"output_size": [144, 112, 128], "spacing": [3.0, 3.0, 2.2], "region": ["head", "chest"]},
    {"output_size": [64, 64, 96], "spacing": [4.0, 4.0, 2.5], "region": ["head"]},
    {"output_size": [80, 80, 112], "spacing": [3.2, 3.2, 2.2], "region": ["head"]},
)
"""Of samples from noise: two fields of view, each on two grids."""

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


def measure_bodies(folder: Path) -> dict[str, list[int]]:
    """Of each CT of a folder, in the order of their names, the body's `width` (left to right, mm) and `bone` in ml."""
    found: dict[str, list[int]] = {"width": [], "bone": []}
    for path in sorted(folder.glob("*.nii.gz")):
        hu, spacing = _read(path), nibabel.load(path).header.get_zooms()
        body = body_envelope(hu, spacing)
        columns = np.flatnonzero(body.any(axis=(1, 2)))
        found["width"].append(round(float((columns[-1] + 1 - columns[0]) * spacing[0])) if columns.size else 0)
        found["bone"].append(round(float((body & (hu > BONE_HU)).sum() * np.prod(spacing) / 1000)))
    return found


def files_of(runs: Path, figures: str = "measured") -> dict[str, Path]:
    """The weights that :data:`FIGURES` depend on, by the names of their stages, or of those that went on from them.

    Raises:
        InputError: one is missing.
    """
    files = {name: _last(runs, name) for name in FIGURES[figures][1]}
    if missing := [str(path) for path in files.values() if not path.is_file()]:
        raise InputError(f"there is no {', '.join(missing)}; run the stages that make them first")
    return files


def _last(runs: Path, stage: str) -> Path:
    later = runs / GOES_ON.get(stage, stage) / "model.pt"
    return later if later.is_file() else runs / stage / "model.pt"


def is_measured(runs: Path, figures: str = "measured") -> bool:
    """Whether `measured.json`, or `samples.json`, is of the weights that are there, drawn as the bundle draws now."""
    path, these = runs / f"{figures}.json", makers(runs, figures)
    return path.is_file() and {key: json.loads(path.read_text()).get(key) for key in these} == these


def makers(runs: Path, figures: str = "measured", overlays: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """What figures depend on: `weights`, the SHA-256 of each of :func:`files_of`, and `sampling`."""
    weights = {name: sha256(path) for name, path in files_of(runs, figures).items()}
    return {"weights": weights, "sampling": sampling(FIGURES[figures][0], *overlays)}


def by_region(cts: Sequence[str], fields: Sequence[Mapping[str, Any]]) -> dict[tuple[str, ...], list[str]]:
    """CTs by the region of the field of view that theirs is most like in width."""
    widths = {field["output_size"][0] * field["spacing"][0]: tuple(field["region"]) for field in fields}
    found: dict[tuple[str, ...], list[str]] = {}
    for ct in cts:
        header = nibabel.load(ct).header
        width = header.get_data_shape()[0] * float(header.get_zooms()[0])
        found.setdefault(widths[min(widths, key=lambda mm: abs(mm - width))], []).append(ct)
    return found


def sampling(bundle: str, *overlays: str) -> dict[str, Any]:
    """How a bundle draws a CT: the settings of its inference.json, under overlays."""
    folder = ROOT / "bundles" / bundle / "configs"
    parser = ConfigParser()
    parser.read_config([str(folder / name) for name in ("inference.json", *overlays)])
    return {name: parser.get_parsed_content(name) for name in SAMPLING[bundle]}


def check_makers(runs: Path, stage: str) -> None:
    """Refuse a stage's folder that other weights or settings made; a new one is marked with these.

    Raises:
        InputError: others.
    """
    path, these = runs / stage / "made_by.json", makers(runs, overlays=OVERLAYS.get(stage, ()))
    if not path.is_file():
        if path.parent.is_dir() and any(path.parent.iterdir()):
            raise InputError(f"{path.parent} does not say which weights made it; delete it, or give another --out")
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
    files = {name: path for figures in FIGURES for name, path in files_of(runs, figures).items()}
    for figures, (_, _, stage) in FIGURES.items():
        if not is_measured(runs, figures):
            raise InputError(
                f"{runs / figures}.json does not have the figures of these weights; run stage {stage} first"
            )
    pages = {"editing": runs / "editing" / "table.md", "downstream": runs / "downstream" / "arms" / "downstream.json"}
    pages = {stage: path for stage, path in pages.items() if path.is_file()}
    for stage in pages:  # nothing is put anywhere before all is known to fit
        check_makers(runs, stage)
    arms = gather_downstream(runs / "downstream" / "arms") if "downstream" in pages else None
    for name, targets in TARGETS.items():
        place(files[name], targets, ["openkbp"], root)
    with replacing(root / "evaluation" / "segmentation" / "models" / "model.pt") as part:
        shutil.copyfile(files["judge"], part)
    for figures in FIGURES:
        write_json(root / "docs" / f"{figures}.json", json.loads((runs / f"{figures}.json").read_text()))
    if "editing" in pages:
        lines = pages["editing"].read_text().strip().splitlines()
        write_json(root / "docs" / "editing.json", {"made_by": _made_by(runs, "editing"), "table": lines})
    if arms is not None:
        write_json(root / "docs" / "downstream.json", {"made_by": _made_by(runs, "downstream"), **arms})
    write_licences(root)
    write_cards(root)


def _made_by(runs: Path, stage: str) -> dict[str, Any]:
    return json.loads((runs / stage / "made_by.json").read_text())


TARGETS = {
    "autoencoder": (
        "maisi_vae/models/model.pt",
        "maisi_ldm/models/autoencoder.pt",
        "maisi_controlnet/models/autoencoder.pt",
    ),
    "controlnet": ("maisi_controlnet/models/model.pt",),
    "coarse": ("maisi_ldm/models/coarse.pt",),
    "ldm": ("maisi_ldm/models/model.pt",),
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
    """Write the figures of docs/{measured,samples,downstream,editing}.json into the pages that show them."""
    docs = root / "docs"
    pages = {root / "bundles" / bundle / "docs" / "README.md": of for bundle, of in CARDS.items()}
    pages[docs / "how-to" / "quality.md"] = _downstream, "downstream"
    pages[docs / "results.md"] = _editing, "editing"
    for path, (render, name) in pages.items():
        figures = json.loads((docs / f"{name}.json").read_text())
        text = render(figures)
        if name in ("downstream", "editing") and figures.get("made_by") != _shipped(docs, name):
            text = f"{EARLIER}\n\n{text}"
        before, rest = path.read_text().split(BEGIN)
        _, after = rest.split(END)
        with replacing(path) as part:
            part.write_text(before + BEGIN + "\n" + text + "\n" + END + after)


EARLIER = "(Measured with earlier weights, or settings of them, than those that are shipped now.)"


def _shipped(docs: Path, stage: str) -> dict[str, Any]:
    """What made a stage's figures, if it was the weights of docs/measured.json and a bundle's own sampler settings."""
    weights = json.loads((docs / "measured.json").read_text())["weights"]
    return {"weights": weights, "sampling": sampling(FIGURES["measured"][0], *OVERLAYS.get(stage, ()))}


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


def _samples(figures: Mapping[str, Any]) -> str:
    ratio, distance, real = (figures[name] for name in ("ratio", "distance_hu", "kept_out_distance_hu"))
    lines = ["| `output_size` | `spacing` | field of view, mm | `region` | width of the body, mm | bone, ml |"]
    lines.append("|---|---|---|---|---|---|")
    for field in figures["fields"]:
        size, spacing = field["output_size"], field["spacing"]
        mm = " x ".join(f"{n * each:.0f}" for n, each in zip(size, spacing, strict=True))
        cells = [",".join(f"{one:g}" for one in value) for value in (size, spacing)]
        cells += [mm, *(", ".join(map(str, field[name])) for name in ("region", "width", "bone"))]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + (
        "\n\n"
        f"Distance to the nearest training volume over that of kept-out patients, {ratio['cases']} samples: "
        f"**{ratio['mean']:.2f}** ({ratio['min']:.2f} to {ratio['max']:.2f}).\n{distance['mean']:.0f} HU "
        f"({distance['min']:.0f} to {distance['max']:.0f}), of {real['cases']} kept-out patients {real['mean']:.0f} HU "
        f"({real['min']:.0f} to {real['max']:.0f}).\n\n" + _fid(figures["fid"])
    )


def _fid(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:  # nobody kept out has a field of view like the samples'
        return ""
    network, spacing = rows[0]["network"], rows[0]["spacing"]
    lines = [
        f"FID against kept-out patients of about that width (`maisi realism`, {network}, {spacing:g} mm):",
        "",
        "| region | kept-out patients | samples | FID | of as many training patients |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        counts = [str(row["cts"][name]) for name in ("kept_out", "samples")]
        cells = [", ".join(row["region"]), *counts, f"**{row['samples']:.3f}**", f"{row['training']:.3f}"]
        lines.append("| " + " | ".join(cells) + " |")
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


CARDS: dict[str, tuple[Callable[[Mapping[str, Any]], str], str]] = {
    "maisi_vae": (_vae, "measured"),
    "maisi_ldm": (_samples, "samples"),
    "maisi_controlnet": (_controlnet, "measured"),
}
"""What stands in a bundle's card, and which file of docs has its figures."""


def _two(text: str) -> str:
    return f"{float(text):.2f}" if text else ""


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"mean": round(statistics.fmean(values), 4), "min": round(min(values), 4), "max": round(max(values), 4)}


def _read(path: str | Path) -> np.ndarray:
    return np.asarray(nibabel.as_closest_canonical(nibabel.load(path)).dataobj).astype(np.float32)
