"""CTs, their labels and completed masks of a run in one small file, so that they can travel to a borrowed GPU.

Values are kept in steps of 10 HU from -200 to 200 and of 20 HU elsewhere from -1000 to 1100; 1100 and more are one.
Unpacking draws each value within its step, so that no step can be learnt. 217 patients of OpenKBP take 27 MB.
"""

from __future__ import annotations

import json
import lzma
import zipfile
import zlib
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from maisi_tools.errors import InputError
from maisi_tools.files import replacing, write_json
from maisi_tools.volumes.inputs import stem_of

EDGES = np.concatenate([np.arange(-1000, -200, 20), np.arange(-200, 200, 10), np.arange(200, 1120, 20)])
"""Lower edges of the steps, HU."""


VOLUMES = ("image", "label", "mask")
"""Of each case."""


def pack(runs: Path, file: Path) -> None:
    """Write what `datalist.json` and `masks` of a run's folder name into one file."""
    if not (runs / "masks" / "cases.json").is_file():
        raise InputError(f"{runs} has no masks to pack; run the stages prepare and masks first")
    lists = json.loads((runs / "datalist.json").read_text())
    if bare := [item["image"] for key in ("training", "validation") for item in lists[key] if not item.get("label")]:
        raise InputError(f"{bare[0]} has no labels; a packed file has those of every case: add them, or leave it out")
    cases = {case["image"]: case for case in json.loads((runs / "masks" / "cases.json").read_text())}
    items = [
        {**cases[item["image"]], "label": item["label"], "section": section}
        for section in ("training", "validation")
        for item in lists[section]
    ]
    with ProcessPoolExecutor() as pool:
        packed = list(pool.map(partial(_pack_case, runs / "masks"), items))
    rest = {key: value for key, value in lists.items() if key not in ("training", "validation")}
    blobs = {f"{number}_{key}": case.pop(key) for number, case in enumerate(packed) for key in VOLUMES}
    header = json.dumps({"datalist": rest, "cases": packed}).encode()
    with replacing(file) as part, open(part, "wb") as opened:  # by name, numpy would add a suffix
        np.savez(opened, header=_bytes(header), **{name: _bytes(blob) for name, blob in blobs.items()})


def unpack(file: Path, runs: Path) -> None:
    """Make a run's folder of a packed file: `datalist.json`, `masks` with `cases.json`, CTs and labels in `data`.

    Raises:
        InputError: it is no packed file.
    """
    try:
        with np.load(file, allow_pickle=False) as stored:
            packed = json.loads(stored["header"].tobytes())
            for number, case in enumerate(packed["cases"]):
                case.update({key: stored[f"{number}_{key}"].tobytes() for key in VOLUMES})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise InputError(f"{file} is no packed file ({error}); give one that --pack wrote, or a folder") from error
    if strange := [case["name"] for case in packed["cases"] if Path(case["name"]).name != case["name"]]:
        raise InputError(f"{file} has cases named {strange[:3]}; allowed are plain names, as --pack writes them")
    for folder in ("data", "masks"):
        (runs / folder).mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor() as pool:
        found = list(pool.map(partial(_unpack_case, runs), packed["cases"]))
    lists = {**packed["datalist"], "training": [], "validation": []}
    for item in found:
        lists[item["section"]].append({key: item[key] for key in ("image", "label")})
    names = [stem_of(item["image"]) for item in lists["validation"]]
    write_json(runs / "validation.json", {"held_out": names})
    write_json(runs / "masks" / "cases.json", [{key: item[key] for key in ("image", "region")} for item in found])
    write_json(runs / "datalist.json", lists)


def _bytes(content: bytes) -> np.ndarray:
    return np.frombuffer(content, np.uint8)


def _pack_case(masks: Path, item: Mapping[str, Any]) -> dict[str, Any]:
    image = nibabel.load(item["image"])
    steps = np.searchsorted(EDGES, np.asarray(image.dataobj), side="right") - 1
    volumes = {"image": steps.clip(0, len(EDGES) - 1)}
    beside = {"label": Path(item["label"]), "mask": masks / f"{stem_of(item['image'])}_mask.nii.gz"}
    volumes |= {key: _labels_beside(path, image) for key, path in beside.items()}
    return {
        "name": stem_of(item["image"]),
        "shape": image.shape,
        "affine": image.affine.tolist(),
        **{key: lzma.compress(value.astype(np.uint8).tobytes(), preset=9) for key, value in volumes.items()},
        "sidecar": json.loads((masks / f"{stem_of(item['image'])}_mask.json").read_text()),
        "region": item["region"],
        "section": item["section"],
    }


def _labels_beside(path: Path, image: Any) -> np.ndarray:
    """The labels of a file that is unpacked with the affine of its CT.

    Raises:
        InputError: it has another grid or direction of its axes, or labels that a byte does not hold.
    """
    volume = nibabel.load(path)
    labels = np.asarray(volume.dataobj)
    if labels.shape != image.shape or not np.allclose(volume.affine, image.affine, atol=1e-3):
        raise InputError(
            f"{path} has another grid than its CT, or axes of another direction; allowed is one affine for both: "
            "resample the labels to the CT"
        )
    if labels.min() < 0 or labels.max() > 255:
        raise InputError(f"{path} has labels from {labels.min()} to {labels.max()}; allowed are 0 to 255")
    return labels


def _unpack_case(runs: Path, case: Mapping[str, Any]) -> dict[str, Any]:
    volumes = {key: np.frombuffer(lzma.decompress(case[key]), np.uint8).reshape(case["shape"]) for key in VOLUMES}
    affine = np.array(case["affine"])
    upper = np.append(EDGES[1:], EDGES[-1] + 20)
    draw = np.random.default_rng(zlib.crc32(case["name"].encode())).random(case["shape"])
    lower = EDGES[volumes["image"]]
    volumes["image"] = (lower + draw * (upper[volumes["image"]] - lower)).round().astype(np.int16)
    volumes["image"][lower == EDGES[0]] = EDGES[0]
    paths = {
        "image": runs / "data" / f"{case['name']}.nii.gz",
        "label": runs / "data" / f"{case['name']}_seg.nii.gz",
        "mask": runs / "masks" / f"{case['name']}_mask.nii.gz",
    }
    for key, path in paths.items():
        with replacing(path) as part:
            nibabel.save(nibabel.Nifti1Image(volumes[key], affine), part)
    write_json(runs / "masks" / f"{case['name']}_mask.json", case["sidecar"])
    return {"image": str(paths["image"]), "label": str(paths["label"]), **{k: case[k] for k in ("region", "section")}}
