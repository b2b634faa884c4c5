"""Makes single samples of a cohort; one a process, thread or Ray actor, each with the networks in memory."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from nibabel.orientations import io_orientation, ornt_transform

from maisi_tools.bundles.stage import Stage
from maisi_tools.cohort.generator import GeneratorSource
from maisi_tools.cohort.layouts import LAYOUTS, consecutive_labels, place
from maisi_tools.cohort.spec import CohortSpec, draw, draw_seed
from maisi_tools.diffusion.editing import find_scans
from maisi_tools.errors import find_input_error
from maisi_tools.files import sha256, write_json
from maisi_tools.masks.body import add_body
from maisi_tools.masks.class_folder import find_masks, read_mask
from maisi_tools.masks.edits import flip_sides, insert_lesion, resize_organ
from maisi_tools.masks.label_maps import read_label_map
from maisi_tools.masks.library import read_index, search
from maisi_tools.masks.sources import FileSource, PhantomSource
from maisi_tools.masks.vocabulary import VOCABULARY, display_name, label_id
from maisi_tools.volumes.inputs import TRAINED, stem_of
from maisi_tools.volumes.nifti import read_nifti_grid
from maisi_tools.volumes.writing import write_sidecar, write_volume

DONE, LEFT_OUT, FAILED = "done", "left out", "failed"
"""A sample's ``status``: made; made, but left out since a judge does not see its anatomy; or not made."""

RECORDS = "records"
"""Folder of the cohort with one JSON file a finished sample: it is written last, so what has one is whole."""

SCRATCH = ".scratch"


def read_record(path: Path) -> dict[str, Any]:
    """A sample's record; empty where there is none, or none that is whole, so that the sample is made again."""
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(record, dict):
        return {}
    needed = {"name", "status", "ct_sha256" if record.get("status") == DONE else "error"}
    return record if needed <= record.keys() else {}


class Worker:
    """Makes samples of a cohort, each from its number alone.

    Args:
        spec: the cohort.
        folder: where it goes.
        bundles: folder with the bundles.
        device: for the networks.
        threads: of torch on the CPU; the same number gives the same bytes.
        judge: keys ``judge`` and ``judge_label_map`` of maisi_controlnet's inference.json, which no specification may
            set, since a segmenter is code.
    """

    def __init__(
        self,
        spec: CohortSpec,
        folder: str | Path,
        bundles: str | Path,
        device: str = "cpu",
        threads: int = 1,
        judge: Mapping[str, Any] | None = None,
    ) -> None:
        torch.set_num_threads(threads)
        self.spec, self.folder, self.bundles = spec, Path(folder), Path(bundles)
        self.device = device
        self.layout = LAYOUTS[spec.layout]
        (self.folder / SCRATCH).mkdir(parents=True, exist_ok=True)
        self.scratch = Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=self.folder / SCRATCH))
        self.ct = Stage(
            self.bundles / "maisi_controlnet",
            configs_of(spec),
            device,
            {"progress": False, **spec.ct},
            output_dir=str(self.scratch),
            seed=0,
            **(judge or {}),
        )
        self.ct.load()
        config = {key: self.ct.parser.get_parsed_content(key) for key in ("keep_labels", "merge_labels")}
        self.keep, self.merge = numbered_labels(spec, config)
        self.label_map = read_label_map(spec.masks.label_map).shown_to(config["keep_labels"])
        self.pool = mask_pool(spec)
        self.scans = scans_of(spec)

    def make(self, index: int) -> dict[str, Any]:
        """Make sample number `index`, unless it is there or was left out, and return its record.

        A sample that fails is tried again as often as the specification says; then its record has the ``status``
        "failed" and the ``error``, and the next run tries it once more.
        """
        name = self.spec.sample_name(index)
        path = self.folder / RECORDS / f"{name}.json"
        record = read_record(path)
        if record.get("status") in (DONE, LEFT_OUT):
            return record
        for attempt in range(self.spec.retries + 1):
            try:
                record = {"index": index, "name": name, "status": DONE, **self._sample(index, name)}
                break
            except Exception as error:  # whatever is wrong with one sample, the others are made
                known = find_input_error(error)
                text = str(known) if known else f"{type(error).__name__}: {error}"
                record = {"index": index, "name": name, "status": FAILED, "error": text, "attempts": attempt + 1}
        write_json(path, record)
        for file in self.scratch.iterdir():
            shutil.rmtree(file) if file.is_dir() else file.unlink()  # a series is edited into a study, too
        return record

    def close(self) -> None:
        """Remove what is left in the scratch folder."""
        shutil.rmtree(self.scratch, ignore_errors=True)

    def _sample(self, index: int, name: str) -> dict[str, Any]:
        random = self.spec.random(index)
        seed = draw_seed(random)
        if self.spec.masks.source == "real":
            return self._edited(index, name, random, seed)
        mask, origin, misfits = self._mask(random, seed)
        labels = np.asarray(mask[0]).astype(np.uint8)
        affine = np.asarray(mask.affine, dtype=float)
        edits = []
        spacing = np.linalg.norm(affine[:3, :3], axis=0).tolist()
        if self.spec.resize:  # an organ takes room from the body, or leaves room to it
            labels = add_body(labels, spacing)
        for organ, factor in self.spec.resize.items():
            drawn = draw(random, factor)
            labels = resize_organ(labels, spacing, label_id(organ), drawn)
            edits.append(f"{organ} x {drawn:.3g}")
        for tumor in self.spec.tumors:
            wanted = random.random() < tumor.probability
            diameter = draw(random, tumor.diameter_mm)
            if wanted:
                labels = insert_lesion(labels, spacing, label_id(tumor.lesion), diameter, random)
                edits.append(f"{tumor.lesion} {diameter:.3g} mm")
        if random.random() < self.spec.flip:
            labels = flip_sides(labels, self.label_map)
            edits.append("flip")
        source = self.scratch / f"{name}.nii.gz"
        write_volume(source, labels, affine, np.uint8)
        self.ct({"image": str(source)}, seed)
        made = {what: self.scratch / f"{name}_{what}.nii.gz" for what in ("ct", "mask")}
        sidecar = json.loads((self.scratch / f"{name}_ct.json").read_text())
        used: Any = nib.load(made["mask"])
        values = np.asarray(used.dataobj)
        tried = sidecar["draws"]["tried"]
        kept = next(one for one in tried if one["seed"] == sidecar["draws"]["seed"])
        record = {
            "seed": kept["seed"],
            "origin": origin,
            "misfits": "; ".join(misfits),
            "edits": "; ".join(edits),
            "size": list(values.shape),
            "spacing": [round(float(mm), 6) for mm in used.header.get_zooms()],
            "labels": [int(label) for label in np.unique(values) if label],
            "draws": len(tried),
            "implausible": sorted(kept["implausible"]),
            **sidecar["metrics"],
            **{f"judge_{organ.replace(' ', '_')}": value for organ, value in kept.get("dice", {}).items()},
        }
        if hidden := kept.get("not_shown"):
            return {**record, "status": LEFT_OUT, "error": f"the CT does not show {', '.join(hidden)}"}
        if self.layout.consecutive:
            write_volume(made["mask"], consecutive_labels(values, self.keep, self.merge), used.affine, np.uint8)
        return {**record, **self._store(name, made, record)}

    def _edited(self, index: int, name: str, random: np.random.Generator, seed: int) -> dict[str, Any]:
        """A real scan with other anatomy in some places; the scans take turns."""
        scan = self.scans[index % len(self.scans)]
        wanted: list[dict[str, Any]] = [
            {"resize": {organ: draw(random, factor)}} for organ, factor in self.spec.resize.items()
        ]
        for tumor in self.spec.tumors:
            drawn, diameter = random.random() < tumor.probability, draw(random, tumor.diameter_mm)
            if drawn:
                wanted.append({"insert": {tumor.lesion: diameter}, "seed": draw_seed(random)})
        # In the vocabulary, which has a number for whatever is put in.
        mask: Any = read_mask(scan["mask"], self.label_map)
        given = self.scratch / f"{name}_labels.nii.gz"
        write_volume(given, mask[0].numpy(), mask.affine.numpy(), np.uint8)
        self.ct.preprocessing.edits = wanted
        out = self.ct({"image": scan["image"], "mask": str(given)}, seed)
        made = {what: Path(out[f"{what}_path"]) for what in ("ct", "mask")}
        sidecar = json.loads(made["ct"].with_name(made["ct"].name.replace(".nii.gz", ".json")).read_text())
        _, affine = read_nifti_grid(made["ct"], "ct")
        used: Any = nib.load(made["mask"])
        turn = ornt_transform(io_orientation(mask.affine.numpy()), io_orientation(affine))
        used = used.as_reoriented(turn)  # as the CT's file is, whatever the mask's was
        values = np.asarray(used.dataobj)
        named = {display_name(id): name for id, name in self.label_map.own_names.items()}
        record = {
            "seed": seed,
            "origin": stem_of(scan["image"]),
            "misfits": "",
            "edits": "; ".join(
                f"{what} {value:.3g}{' mm' if 'insert' in one else ' x'}"
                for one in wanted
                for what, value in (one.get("insert") or one["resize"]).items()
            ),
            "size": list(values.shape),
            "spacing": [round(float(mm), 6) for mm in used.header.get_zooms()],
            "labels": [int(label) for label in np.unique(values) if label],
            **{f"hu_{named.get(what, what).replace(' ', '_')}": hu["after"] for what, hu in sidecar["hu"].items()},
        }
        labels = consecutive_labels(values, self.keep, self.merge) if self.layout.consecutive else values
        write_volume(made["mask"], labels, affine, np.uint8)
        return {**record, **self._store(name, made, record, scan["image"], sidecar["region"]["box_ras_mm"])}

    def _mask(self, random: np.random.Generator, seed: int) -> tuple[MetaTensor, str, Sequence[str]]:
        masks = self.spec.masks
        if masks.source == "phantom":
            (one,) = PhantomSource(masks.spacing).masks(masks.request, 1, seed)
            return one.mask, one.origin, one.misfits
        if masks.source == "generator":
            self.generator.organ_sizes = {
                organ: round(draw(random, size), 3) for organ, size in masks.organ_sizes.items()
            }
            (one,) = self.generator.masks(masks.request, 1, seed)
            return one.mask, one.origin, one.misfits
        path = self.pool[int(random.integers(len(self.pool)))]
        (one,) = FileSource([path], self.label_map).masks(masks.request, 1)
        return one.mask, one.origin, one.misfits

    @cached_property
    def generator(self) -> GeneratorSource:
        """The learned mask generator, whose networks stay in memory, too."""
        return GeneratorSource(self.bundles / "maisi_ldm", settings=self.spec.masks.settings, device=self.device)

    def _store(
        self,
        name: str,
        made: Mapping[str, Path],
        record: Mapping[str, Any],
        scan: str | None = None,
        region: Sequence[Sequence[float]] = (),
    ) -> dict[str, str]:
        """Put the files where they belong, and return their paths and hashes.

        Args:
            scan: that was edited, a series where the format is DICOM, whose study it joins.
            region: of it, see :func:`~maisi_tools.dicom.study.write_study`.
        """
        if self.spec.format == "dicom":
            from maisi_tools.dicom.objects import recordable
            from maisi_tools.dicom.study import write_study

            ct: Any = nib.load(made["ct"])
            mask: Any = nib.load(made["mask"])
            files = write_study(
                self.folder / name,
                np.asarray(ct.dataobj),
                ct.affine,
                np.asarray(mask.dataobj),
                seed=record["seed"],
                conditions=recordable({"spacing": record["spacing"], **self.spec.ct}),
                created=datetime.datetime.fromisoformat(self.spec.created),
                replace=True,
                source=scan,
                from_scan=scan is not None,
                region=region,
            )
            digests = "".join(f"{file.name} {sha256(file)}\n" for file in files)
            return {"ct": name, "ct_sha256": hashlib.sha256(digests.encode()).hexdigest()}
        stored: dict[str, str] = {}
        for what, pattern in (("ct", self.layout.ct), ("mask", self.layout.mask)):
            path = self.folder / place(pattern, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(made[what], path)
            if what == "ct" and scan is not None:  # whose patient it shows, wherever it goes
                write_sidecar(path, {"from_scan": True, "region": {"box_ras_mm": region}})
            stored |= {what: place(pattern, name), f"{what}_sha256": sha256(path)}
        return stored


def configs_of(spec: CohortSpec) -> list[str]:
    """The configs of maisi_controlnet that make a cohort's CTs."""
    return ["inference.json", *(["edit.json"] if spec.masks.source == "real" else [])]


def numbered_labels(spec: CohortSpec, config: Mapping[str, Any]) -> tuple[list[int], dict[str, int]]:
    """The labels that a layout numbers 1, 2, ..., and group -> which of them stands for its others.

    Of CTs that are made, they are those that the weights know. A scan shows whatever it was labelled with, and what is
    put into it.

    Args:
        spec: the cohort.
        config: ``keep_labels`` and ``merge_labels`` of the weights; None for those that know all labels.
    """
    if spec.masks.source != "real":
        kept = sorted(VOCABULARY.keys() - {0}) if config["keep_labels"] is None else config["keep_labels"]
        return [int(label) for label in kept], dict(config["merge_labels"] or {})
    labelled = read_label_map(spec.masks.label_map).ids.values()
    put_in = (label_id(tumor.lesion) for tumor in spec.tumors)
    return sorted({*labelled, *put_in} - {0}), {}


def scans_of(spec: CohortSpec) -> list[dict[str, str]]:
    """The scans that are edited, see :func:`~maisi_tools.diffusion.editing.find_scans`; none of other sources."""
    if spec.masks.source != "real":
        return []
    return find_scans(spec.masks.path, None, label_map=read_label_map(spec.masks.label_map), sections=TRAINED)


def mask_pool(spec: CohortSpec) -> list[Path]:
    """The masks that samples draw from: all files, or what fits of a library; its nearest where nothing does."""
    masks = spec.masks
    if masks.source == "files":
        label_map = read_label_map(masks.label_map)
        found = find_masks(masks.path, label_map, TRAINED)
        return [Path(item["image"]) for item in found]
    if masks.source == "library":
        label_map = read_label_map(masks.label_map)
        ranked = search(read_index(str(masks.path), label_map), masks.request)
        return [path for path, misfits in ranked if not misfits] or [ranked[0][0]]
    return []
