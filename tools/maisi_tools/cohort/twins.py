"""Twins, synthetic CTs with the anatomy of real ones: CT -> labels -> mask -> CT by stage 3; run again, it goes on."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.transforms import Orientation
from nibabel.orientations import aff2axcodes
from scipy import ndimage
from tqdm import tqdm

from maisi_tools.bundles.stage import Stage, config_files
from maisi_tools.diffusion.editing import check_edited, is_series
from maisi_tools.errors import InputError, find_input_error
from maisi_tools.files import canonical_json, fingerprint_tensors, fingerprint_text, held, write_json
from maisi_tools.masks.body import body_envelope, tissues, without_couch
from maisi_tools.masks.vocabulary import BODY, VOCABULARY
from maisi_tools.metrics.segmenters import THRESHOLDS, Segmenter, open_segmenter
from maisi_tools.volumes.grid import straighten
from maisi_tools.volumes.inputs import (
    TRAINED,
    check_output_dir,
    find_inputs,
    fingerprint_input,
    sidecar_path,
    stem_of,
    study_dir,
)
from maisi_tools.volumes.orientation import from_ras
from maisi_tools.volumes.reading import read_volume
from maisi_tools.volumes.writing import write_volume

logger = logging.getLogger(__name__)

RECORD = "_twin.json"
"""End of the name of a twin's record. It is written last: what has one that says "done" is whole."""


def make_twins(
    cts: Any,
    output_dir: str | Path,
    segmenter: str,
    bundle: str | Path,
    label_map: str | None = None,
    overlays: Sequence[str] = (),
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    keep_patient: bool = True,
    device: str = "cpu",
) -> dict[str, list[str]]:
    """Make what is missing of the twins of CTs.

    Args:
        cts: see :func:`~maisi_tools.volumes.inputs.find_inputs`; of a datalist with sections those under "training".
        output_dir: gets ``NAME_ct.nii.gz``, ``NAME_mask.nii.gz``, ``NAME_ct.json`` and the record ``NAME_twin.json``,
            of a DICOM series also the study ``NAME_dicom``.
        segmenter, label_map: see :func:`~maisi_tools.metrics.segmenters.open_segmenter`.
        bundle: folder of maisi_controlnet.
        overlays: configs over its inference.json, such as full_rflow.json.
        seed: of every CT.
        settings: further keys of its inference.json with plain values.
        keep_patient: whether a study joins that of the series; else it has a new, invented patient.
        device: for the networks.

    Returns:
        Names by what became of them: ``made``, ``there`` (before), ``failed``.

    Raises:
        InputError: no CT, a segmenter or setting that cannot be used, an output that is an input, or twins there that
            were made in another way. What is wrong with one CT is in its record, and the others are made.
    """
    items = find_inputs(cts, "image", sections=TRAINED)
    folder = check_output_dir(output_dir)
    check_edited(items, folder)
    labeller = open_segmenter(segmenter, label_map, device)
    configs = ["inference.json", *overlays]
    own: dict[str, Any] = {"output_dir": str(folder), "seed": seed, "label_map": "maisi", "placeholders": None}
    settings = {"progress": False, **(settings or {})}
    stage = Stage(bundle, configs, device, settings, output_labels="vocabulary", **own)
    how = {
        "segmenter": segmenter,
        "label_map": dict(labeller.label_map.ids),
        "configs": configs,
        "config": fingerprint_text(canonical_json(ConfigParser.load_config_files(config_files(bundle, configs)))),
        "segmenter_config": labeller.config,
        "seed": seed,
        "settings": settings,
        "keep_patient": keep_patient,
        "weights": [
            labeller.fingerprint,
            *(
                fingerprint_tensors(stage.parser.get_parsed_content(key).state_dict())
                for key in ("network", "autoencoder")
            ),
        ],
    }
    how = json.loads(json.dumps(how))
    _check_earlier(items, folder, how)
    complete = segmenter == THRESHOLDS or stage.parser.get_parsed_content("keep_labels") is not None
    with held(folder, f"another run makes twins in {folder}"):
        return _make(items, folder, labeller, stage, complete, how)


def _make(
    items: Sequence[Mapping[str, str]], folder: Path, labeller: Segmenter, stage: Stage, complete: bool, how: Any
) -> dict[str, list[str]]:
    """What is missing, one after the other."""
    found: dict[str, list[str]] = {"made": [], "there": [], "failed": []}
    for item in tqdm(items, desc="twins", unit="CT"):
        name = stem_of(item["image"])
        path = folder / f"{name}{RECORD}"
        earlier = _read(path)
        record: dict[str, Any] = {"name": name, "how": how}
        try:
            content = fingerprint_input(item["image"])
            if _is_done(earlier, folder, content):
                found["there"].append(name)
                continue
            if earlier.get("input") != content:
                _remove(earlier, item["image"], folder)
                earlier = {}
            record["input"] = content  # from here on, what is there is of this CT
            record |= _twin(item["image"], folder, labeller, stage, complete)
            if is_series(item["image"]):
                _write_study(item["image"], folder, name, how)
                record["files"].append(study_dir(item["image"], folder).name)
            record["status"] = "done"
        except Exception as error:  # whatever is wrong with one CT, the others are made
            known = find_input_error(error)
            record |= {"status": "failed", "error": str(known) if known else f"{type(error).__name__}: {error}"}
            record["files"] = sorted({*earlier.get("files", ()), *record.get("files", ())})
            logger.warning("%s failed: %s", name, record["error"])
        write_json(path, record)
        found["made" if record["status"] == "done" else "failed"].append(name)
    return found


def twin_mask(
    ct: MetaTensor, labels: np.ndarray, complete: bool, name: str = "the CT"
) -> tuple[np.ndarray, dict[str, float]]:
    """The mask of a CT for stage 3: its labels and its body, without the couch.

    Labels may reach over the skin; pieces that do not touch the body are left out, since tissue would be drawn there.

    Args:
        ct: (1, X, Y, Z) in HU, RAS, with its affine.
        labels: (X, Y, Z) in the vocabulary, may be empty.
        complete: whether airway, lung and bone that the labels leave open are found by HU, as weights of few labels
            want it.
        name: of the CT, for messages.

    Returns:
        uint8 (X, Y, Z), and ml of the ``body`` and of the ``couch`` that was taken away.

    Raises:
        InputError: there is no body in the CT.
    """
    hu = ct.as_tensor()[0].cpu().numpy()
    mm = np.array([float(length) for length in ct.pixdim])
    with_couch = body_envelope(hu, mm.tolist())
    body = without_couch(with_couch, hu, mm.tolist(), labels)
    if not body.any():
        raise InputError(f"there is no body in {name}; allowed is the CT of a patient in HU")
    couch = with_couch & ~body
    mask = np.where(couch, 0, labels).astype(np.uint8)
    if ((mask > 0) & ~body).any():
        parts, _ = ndimage.label((mask > 0) | body, np.ones((3, 3, 3)))
        mask[~np.isin(parts, np.unique(parts[body]))] = 0
    free = body & (mask == 0)
    mask[free] = BODY
    if complete:
        told = tissues(hu, np.where(free, 0, mask).astype(np.uint8), mm.tolist(), body)
        mask[free & (told > 0)] = told[free & (told > 0)]
    ml = float(np.prod(mm)) / 1000
    return mask, {"body": round(float(body.sum()) * ml, 1), "couch": round(float(couch.sum()) * ml, 1)}


def _twin(ct: str, folder: Path, segmenter: Segmenter, stage: Stage, complete: bool) -> dict[str, Any]:
    """Make the volumes of one twin; returns what its record says of it."""
    name = stem_of(ct)
    scan = straighten(read_volume(ct, "ct"), "bilinear", -1000)
    own_axes = "".join(aff2axcodes(scan.affine.numpy()))
    turned: Any = Orientation(axcodes="RAS", labels=None)(scan)
    with tempfile.TemporaryDirectory(prefix="maisi-") as scratch:
        given = write_volume(Path(scratch) / "scan.nii.gz", turned[0].numpy(), turned.affine.numpy(), np.float32)
        mask, ml = twin_mask(turned, segmenter(given, turned), complete, ct)
        placed = from_ras(MetaTensor(mask[None], affine=turned.affine), own_axes)
        drawn = Path(scratch) / f"{name}.nii.gz"
        write_volume(drawn, placed[0].numpy(), placed.affine.numpy(), np.uint8)
        stage({"image": str(drawn)})
    labels = [VOCABULARY[int(id)].name for id in np.unique(mask) if id]
    return {"files": [file.name for file in _volumes(ct, folder)], "labels": labels, "ml": ml}


def _volumes(ct: str, folder: Path) -> list[Path]:
    return [folder / f"{stem_of(ct)}_{what}.nii.gz" for what in ("ct", "mask")]


def _write_study(ct: str, folder: Path, name: str, how: Mapping[str, Any]) -> None:
    from maisi_tools.dicom.objects import recordable
    from maisi_tools.dicom.study import write_study

    image: Any = nib.load(folder / f"{name}_ct.nii.gz")
    mask: Any = nib.load(folder / f"{name}_mask.nii.gz")
    write_study(
        study_dir(ct, folder),
        np.asarray(image.dataobj),
        image.affine,
        np.asarray(mask.dataobj),
        source=ct if how["keep_patient"] else None,
        seed=how["seed"],
        conditions=recordable({"segmenter": how["segmenter"], **how["settings"]}),
        replace=True,
    )


def _read(path: Path) -> dict[str, Any]:
    """A record; empty where there is none, or none that is whole, so that the twin is made again."""
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    whole = isinstance(record, dict) and isinstance(files := record.get("files", []), list)
    return record if whole and all(isinstance(file, str) for file in files) else {}


def _is_done(record: Mapping[str, Any], folder: Path, input: str) -> bool:
    if record.get("status") != "done" or record.get("input") != input:
        return False
    files = record.get("files", ())
    return bool(files) and all((folder / file).exists() for file in files)


def _remove(record: Mapping[str, Any], ct: str, folder: Path) -> None:
    """Remove what a record lists of a twin whose CT was replaced: beside the new one it would pass for its twin.

    Raises:
        InputError: its study has something of others, too.
    """
    listed = record.get("files", ())
    if (study := study_dir(ct, folder)).name in listed and study.exists():
        from maisi_tools.dicom.study import remove_study  # of the extra "dicom"

        remove_study(study)
    for path in _volumes(ct, folder):
        if path.name in listed:
            path.unlink(missing_ok=True)
            sidecar_path(path).unlink(missing_ok=True)


def _check_earlier(items: Sequence[Mapping[str, str]], folder: Path, how: Mapping[str, Any]) -> None:
    """Refuse a folder with twins of these CTs that were made in another way."""
    for item in items:
        path = folder / f"{stem_of(item['image'])}{RECORD}"
        record = _read(path)
        # An earlier version recorded the configs' names alone.
        earlier = {key: how[key] for key in ("config", "segmenter_config")} | record.get("how", {})
        if record.get("status") == "done" and earlier != how:
            changed = ", ".join(key for key, value in how.items() if earlier.get(key) != value)
            raise InputError(
                f"{path} says that its twin was made with another {changed}; give the same options again, or another "
                "output_dir"
            )
