"""A real CT with other anatomy in one place: what changes is drawn by stage 3, all else stays as it is."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import MapTransform
from scipy import ndimage
from torch import Tensor
from torch.nn.functional import adaptive_max_pool3d, interpolate, max_pool3d

from maisi_tools.diffusion.autoencoder import LatentEncoder
from maisi_tools.diffusion.conditions import check_modalities
from maisi_tools.diffusion.inferers import MaskToCT, SeedOfInferer
from maisi_tools.diffusion.noise import redraw_seeds
from maisi_tools.diffusion.samplers import check_start, known_outside, sample, step_generator
from maisi_tools.errors import InputError
from maisi_tools.files import expanded
from maisi_tools.masks.body import SKIN_HU, add_body, tissues
from maisi_tools.masks.class_folder import ReadMaskd, is_one_mask
from maisi_tools.masks.edits import apply_edits
from maisi_tools.masks.label_maps import LabelMap, apply_label_map
from maisi_tools.masks.slicer import is_segmentation
from maisi_tools.masks.vocabulary import BODY, VOCABULARY, display_name
from maisi_tools.networks import ControlledUNet
from maisi_tools.volumes.checks import whole_labels
from maisi_tools.volumes.grid import crop_to, difference_of_grids, pad_to_multiple
from maisi_tools.volumes.inputs import (
    SUFFIXES,
    check_earlier,
    check_targets,
    find_inputs,
    holds_dicom,
    stem_of,
    study_dir,
)
from maisi_tools.volumes.normalise import HU_RANGE
from maisi_tools.volumes.patching import Stored, ras_affine, read_stored, to_ras, write_stored
from maisi_tools.volumes.reading import read_volume
from maisi_tools.volumes.regions import Box, blend_weight, box_of, extended, grown, windows
from maisi_tools.volumes.writing import write_sidecar

logger = logging.getLogger(__name__)

LARGEST_REGION = 0.5
"""A region takes no more than this share of the body; what changes more is another patient, which stage 3 draws."""

LEAST_TISSUE = 0.01
"""Share of a crop that is denser than :data:`~maisi_tools.masks.body.SKIN_HU`, where there is a body."""


def find_scans(
    input: Any,
    mask: Any,
    new_mask: Any = None,
    label_map: LabelMap | None = None,
    output_dir: str | os.PathLike | None = None,
    sections: Sequence[str] = (),
) -> list[dict[str, str]]:
    """The scans to edit: ``[{"image": CT, "mask": its labels, "new_mask": those it is to have, if given}, ...]``.

    Args:
        input: one CT, see :func:`~maisi_tools.volumes.inputs.find_inputs`; or a datalist whose entries have ``image``
            and ``label``, and where `new_mask` is to be taken from it, ``new_label``.
        mask: the labels of the one CT; None takes those of the datalist.
        new_mask: a mask of that CT that was edited already; True takes those of the datalist.
        label_map: tells a folder with one file a class.
        output_dir: where the edited scans are to go.
        sections: of the datalist, see :func:`~maisi_tools.volumes.inputs.find_inputs`.

    Raises:
        InputError: several CTs with one mask, no mask, what :func:`find_inputs` refuses, a scan that is
            no CT by its datalist, or an input that would be
            written over, see :func:`check_edited`.
    """

    def is_one(folder: Path) -> bool:
        return label_map is not None and is_one_mask(folder, label_map)

    scans = check_modalities(find_inputs(input, "image", sections=sections), "ct")
    if mask is None and _has_labels(scans):  # outputs are named by the CTs alone
        masks = [item["label"] for item in find_inputs(input, "label", is_one, sections, unique=False)]
    elif mask is not None and len(scans) == 1:
        masks = [str(mask)]
    else:
        raise InputError(
            f"input names {len(scans)} CTs and mask is {mask!r}; allowed is one CT with its mask, or a datalist whose "
            "entries have image and label"
        )
    items = [{"image": scan["image"], "mask": labels} for scan, labels in zip(scans, masks, strict=True)]
    if new_mask is True:
        items = [item | {"new_mask": new["new_label"]} for item, new in
                 zip(items, find_inputs(input, "new_label", is_one, sections, unique=False), strict=True)]  # fmt: skip
    elif new_mask is not None:
        if len(items) > 1:
            raise InputError(f"new_mask is {new_mask!r} for {len(items)} CTs; allowed is true: new_label in a datalist")
        items[0]["new_mask"] = str(new_mask)
    if output_dir is not None:
        check_edited(items, output_dir)
    return items


def targets_of(ct: str | os.PathLike, output_dir: str | os.PathLike) -> dict[str, Path]:
    """What an edited scan writes: "ct", "mask", "weight" and "sidecar", and the folder "dicom" of a series."""
    name, folder = stem_of(ct), expanded(output_dir)
    files = {what: folder / f"{name}_{what}.nii.gz" for what in ("ct", "mask", "weight")}
    return {**files, "sidecar": folder / f"{name}_ct.json", "dicom": study_dir(ct, output_dir)}


def check_edited(scans: Sequence[Mapping[str, str]], output_dir: str | os.PathLike) -> None:
    """Refuse to write an edited scan over an input or what no run wrote, or a series where none can be written.

    Args:
        scans: see :func:`find_scans`.
        output_dir: where they go.

    Raises:
        InputError: see :func:`~maisi_tools.volumes.inputs.check_targets`,
            :func:`~maisi_tools.volumes.inputs.check_earlier` and :func:`~maisi_tools.dicom.study.check_studies`.
    """
    series = [scan for scan in scans if is_series(scan["image"])]
    if series and importlib.util.find_spec("highdicom") is None:
        raise InputError(
            "a DICOM series comes back as one, which needs the extra 'dicom'; install it with: pip install "
            "'maisi-bundles[dicom]', or give the CT as NIfTI"
        )
    inputs = [scan[key] for scan in scans for key in ("image", "mask", "new_mask") if key in scan]
    targets = [targets_of(scan["image"], output_dir) for scan in scans]
    check_targets(inputs, [path for of_one in targets for path in of_one.values()], output_dir)
    for of_one in targets:
        check_earlier([path for what, path in of_one.items() if what in ("ct", "mask", "weight")])
    if series:
        from maisi_tools.dicom.study import check_studies  # of the extra "dicom"

        check_studies(series, output_dir)


def _has_labels(scans: Sequence[Mapping[str, str]]) -> bool:
    return bool(scans) and all("label" in scan for scan in scans)


class CropEditd(MapTransform):
    """MONAI dict transform: what an edit changes of a scan, cut out with its surroundings.

    Args:
        keys: of the CT's path, see :func:`find_scans`; becomes (3, X, Y, Z) with its affine, RAS: HU, labels of the
            vocabulary after the edit, as the ControlNet is to see them, and the blend weight.
        label_map: how the masks are read.
        edits: see :func:`~maisi_tools.masks.edits.apply_edits`; None where new masks are given.
        field_of_view: mm along x, y, z that the weights want around a region.
        margin_mm: see :func:`~maisi_tools.volumes.regions.blend_weight`.
        complete: whether the ControlNet sees the mask completed from the CT by
            :func:`~maisi_tools.masks.body.tissues`, as weights of few labels were trained; else with the body.
        seed: of the edits that have none.
        new_label_map: how new masks are read, where that is not as the others.

    The item gets ``edited`` (2, X, Y, Z), labels after the edit and the voxels where something changed, and ``plan``,
    JSON: where the box lies in the scan, which files it came from, what was edited.

    Raises:
        InputError: CT and mask on different grids, an edit that cannot be made or changes nothing, a region that
            fills most of the body, or one without body.
    """

    def __init__(
        self,
        keys: str,
        label_map: LabelMap,
        edits: Any,
        field_of_view: Sequence[float],
        margin_mm: float = 8.0,
        complete: bool = False,
        seed: int = 0,
        new_label_map: LabelMap | None = None,
    ) -> None:
        super().__init__(keys)
        self.new_label_map = new_label_map or label_map
        if not isinstance(margin_mm, (int, float)) or isinstance(margin_mm, bool) or not 0 <= margin_mm < np.inf:
            raise InputError(f"margin_mm is {margin_mm!r}; allowed is a number of mm from 0 on")
        self.label_map, self.edits, self.field_of_view = label_map, edits, [float(mm) for mm in field_of_view]
        self.margin_mm, self.complete, self.seed = float(margin_mm), complete, seed

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        key = self.keys[0]
        paths = {name: str(data[name]) for name in ("mask", "new_mask") if name in data}
        volume: Any = read_volume(data[key], "ct")
        affine = np.asarray(volume.affine, dtype=float)
        hu, grid = to_ras(volume[0].numpy(), affine), ras_affine(affine, volume.shape[1:])
        spacing = np.linalg.norm(grid[:3, :3], axis=0)
        before = _labels(paths["mask"], self.label_map, hu.shape, grid, data[key])
        source = {"ct": str(data[key]), **paths, "edits": self.edits, "labels_body": bool((before == BODY).any())}
        anew = None
        if "new_mask" in paths:
            if self.edits:
                raise InputError("edits and new_mask are both given; allowed is one of them: a new mask is edited")
            after = _labels(paths["new_mask"], self.new_label_map, hu.shape, grid, data[key])
        else:
            if _resizes(self.edits):  # an organ takes room from the body, or leaves room to it
                before = add_body(before, spacing.tolist(), hu)
            after, anew = apply_edits(before, spacing.tolist(), self.edits, self.seed, self.label_map)
        before, after, has_body = _alike(before, after)
        changed = after != before if anew is None else (after != before) | anew
        if not changed.any():
            raise InputError(
                f"the edits of {data[key]} change no voxel of its mask; allowed are edits that do, or redraw, which "
                "draws a structure anew as it is"
            )
        return {**data, **self._crop(key, source, hu, grid, before, after, changed, has_body)}

    def _crop(
        self,
        key: Hashable,
        source: Mapping[str, Any],
        hu: np.ndarray,
        grid: np.ndarray,
        before: np.ndarray,
        after: np.ndarray,
        changed: np.ndarray,
        has_body: bool,
    ) -> dict[Hashable, Any]:
        mm = np.linalg.norm(grid[:3, :3], axis=0)
        reach = grown(box_of(changed), hu.shape, np.ceil(self.margin_mm / mm).astype(int).tolist())
        blend = blend_weight(changed[reach], mm, self.margin_mm)
        parts, _ = ndimage.label(blend > 0, np.ones((3, 3, 3)))
        boxes = [_shifted(box, reach) for box in ndimage.find_objects(parts)]
        crop = _hull([window for _, window in windows(boxes, hu.shape, mm, self.field_of_view)])

        # Whole axial planes: what they enclose is body.
        slab = (slice(None), slice(None), crop[2])
        own, anew = after[slab], changed[slab]
        if self.complete:
            open_to_ct = np.where((own == BODY) & ~anew, 0, own)
            shown = tissues(hu[slab], open_to_ct, mm.tolist())
        else:
            shown = add_body(own, mm.tolist(), hu[slab])
        # Where a label was taken away there is air, or body in a mask that does not label the body.
        shown = np.where(anew & (own == 0), 0 if has_body else BODY, shown)[crop[0], crop[1]]
        inside = changed[crop]
        body = (shown > 0) | (before[crop] > 0)
        weight = np.zeros(inside.shape, dtype=np.float32)
        weight[_shifted(reach, crop, -1)] = blend
        weight *= body | inside
        share = float((weight > 0).sum()) / max(float(np.count_nonzero(before)), float(body.sum()))
        if np.mean(hu[crop] > SKIN_HU) < LEAST_TISSUE:
            raise InputError(
                f"there is no body around the region to be changed in {source['ct']}; allowed is one inside the "
                "patient: correct the mask"
            )
        if share > LARGEST_REGION:
            raise InputError(
                f"the region to be changed in {source['ct']} is {share:.0%} of the body; allowed is "
                f"{LARGEST_REGION:.0%}: edit less, or generate the whole CT from the mask (inference.json)"
            )
        start = np.eye(4)
        start[:3, 3] = [side.start for side in crop]
        affine = torch.as_tensor(grid @ start)
        cut = np.stack([hu[crop], shown.astype(np.float32), weight]).astype(np.float32)
        edited = np.stack([after[crop], inside.astype(np.uint8)])
        meta = {"filename_or_obj": source["ct"]}
        plan = {
            **source,
            "start": [side.start for side in crop],
            "ml": _volumes(before, after, mm),
            "region_share_of_body": round(share, 4),
        }
        return {
            key: MetaTensor(torch.from_numpy(cut), affine=affine, meta=dict(meta)),
            "edited": MetaTensor(torch.from_numpy(edited), affine=affine, meta=dict(meta)),
            "plan": json.dumps(plan),
        }


def _labels(path: str, label_map: LabelMap, shape: tuple[int, ...], grid: np.ndarray, ct: Any) -> np.ndarray:
    """A mask in the vocabulary, RAS, on the CT's grid."""
    mask: Any = ReadMaskd("mask", label_map)({"mask": path})["mask"]
    own = np.asarray(mask.affine, dtype=float)
    try:
        labels = to_ras(apply_label_map(mask[0].numpy(), label_map), own)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    if difference := difference_of_grids(ras_affine(own, mask.shape[1:]), labels.shape, grid, shape):
        raise InputError(
            f"{path} lies on another grid than {ct}: {difference}; allowed is one grid for both: resample the mask to "
            "the CT with nearest neighbour"
        )
    return labels


def _alike(before: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, np.ndarray, bool]:
    """Both masks with the body label where one of them alone has it, and whether the one after has it of its own."""
    had, has = (bool((labels == BODY).any()) for labels in (before, after))
    if had and not has:  # what is no organ any more is body
        after = np.where((after == 0) & (before > 0), BODY, after).astype(after.dtype)
    elif has and not had:
        before = np.where((before == 0) & (after == BODY), BODY, before).astype(before.dtype)
    return before, after, has


class EditedCT(SeedOfInferer):
    """Stage 3 inside a scan: (B, 3, X, Y, Z) as :class:`CropEditd` gives it -> HU of the edited scan, (B, 1, X, Y, Z).

    Each region, with its window, is resampled to a spacing the weights know and encoded; the latents it reaches are
    drawn, all others are the scan's at each step's noise; the result is decoded, corrected by what the decoder makes of
    the scan beside the region, resampled back, and blended into the scan by the weight.

    Args:
        inferer: stage 3, whose conditions, scheduler and decoder are taken.
        encoder: CT -> latent.
        spacing_range: (lowest, highest) mm for x, y, z that the weights know.
        field_of_view: mm along x, y, z of a window.
        strength, resample_steps: see :func:`~maisi_tools.diffusion.samplers.sample`.

    Raises:
        InputError: see :func:`~maisi_tools.diffusion.samplers.check_start`.
    """

    def __init__(
        self,
        inferer: MaskToCT,
        encoder: LatentEncoder,
        spacing_range: Sequence[Sequence[float]],
        field_of_view: Sequence[float],
        strength: float = 1.0,
        resample_steps: int = 0,
    ) -> None:
        super().__init__()
        check_start(strength, resample_steps)
        self.inferer, self.encoder = inferer, encoder
        self.spacing_range, self.field_of_view = spacing_range, [float(mm) for mm in field_of_view]
        self.strength, self.resample_steps = float(strength), int(resample_steps)

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self, inputs: Tensor, network: ControlledUNet, *args: Any, **kwargs: Any
    ) -> Tensor:
        spacings = self.inferer.spacings(inputs)
        scans = torch.as_tensor(inputs.as_tensor() if isinstance(inputs, MetaTensor) else inputs)
        return torch.stack([self._one(scan, mm, network) for scan, mm in zip(scans, spacings, strict=True)])

    def _one(self, scan: Tensor, spacing: Sequence[float], network: ControlledUNet) -> Tensor:
        hu, labels, weight = scan[0].clone(), scan[1], scan[2]
        parts, _ = ndimage.label(weight.cpu().numpy() > 0, np.ones((3, 3, 3)))
        found = windows(ndimage.find_objects(parts), hu.shape, spacing, self.field_of_view)
        seeds = redraw_seeds(self.inferer.seed, len(found) - 1)
        for (members, window), seed in zip(found, seeds, strict=True):
            region = torch.from_numpy(np.isin(parts[window], [member + 1 for member in members])).to(hu.device)
            share = weight[window] * region
            drawn = self._drawn(hu[window], labels[window], share, spacing, network, seed)
            # Where the weight is 0 not even a rounding error may come in.
            hu[window] = torch.where(share > 0, hu[window] + share * (drawn - hu[window]), hu[window])
        return hu[None]

    def _drawn(
        self,
        hu: Tensor,
        labels: Tensor,
        weight: Tensor,
        spacing: Sequence[float],
        network: ControlledUNet,
        seed: int,
    ) -> Tensor:
        """HU of a window (X, Y, Z) with what its labels say where the weight is not 0."""
        size, mm = self._grid(hu.shape, spacing)
        low, high = HU_RANGE
        ct = _resized(((hu - low) / (high - low)).clamp(0, 1)[None, None], size)
        mask = interpolate(labels[None, None].float(), size, mode="nearest-exact")
        reached = adaptive_max_pool3d((weight > 0).float()[None, None], size)
        multiple, factor = self.inferer.multiple, network.factor
        mask_padded, _ = pad_to_multiple(mask, multiple, "replicate")
        known = self.encoder(pad_to_multiple(ct, multiple, "replicate")[0])
        hole = max_pool3d(pad_to_multiple(reached, multiple, "constant")[0], factor) > 0

        denoiser, conditions = self.inferer.denoiser(mask_padded, mm, network)
        noise = replace(conditions, seed=seed).noise(factor)[None].to(hu.device)
        self.inferer.decoder.check(noise)
        latent = sample(
            known_outside(denoiser, known, hole, self.inferer.scheduler),
            noise,
            self.inferer.scheduler,
            self.inferer.num_inference_steps,
            step_generator(noise, seed),
            self.inferer.progress,
            self.inferer.solver,
            known,
            self.strength,
            self.resample_steps,
            self.inferer.last_step,
        )
        drawn = crop_to(self.inferer.decoder(torch.where(hole, latent, known)), size)
        # The decoder's error where nothing was drawn goes on into the region.
        beside = (reached == 0) & (mask > 0)
        error = extended((ct - drawn)[0, 0].cpu().numpy(), beside[0, 0].cpu().numpy(), mm)
        drawn = drawn + torch.from_numpy(error).to(drawn)[None, None]
        drawn = torch.where(mask == 0, torch.zeros_like(drawn), drawn).clamp(0, 1)
        return _resized(drawn, hu.shape)[0, 0] * (high - low) + low

    def _grid(self, shape: Sequence[int], spacing: Sequence[float]) -> tuple[tuple[int, ...], list[float]]:
        """Size and spacing of a window as the weights see it; its field of view stays."""
        size = []
        for length, mm, (low, high) in zip(shape, spacing, self.spacing_range, strict=True):
            extent = length * mm
            count = length
            if mm < low * (1 - 1e-4):
                count = max(1, int(np.floor(extent / low + 1e-6)))
            elif mm > high * (1 + 1e-4):
                count = int(np.ceil(extent / high - 1e-6))
            size.append(count)
        return tuple(size), [n * mm / count for n, mm, count in zip(shape, spacing, size, strict=True)]


class WriteEditd(MapTransform):
    """MONAI dict transform: writes an edited scan; all that the edit does not reach is as in the files it came from.

    ``NAME_ct.nii.gz`` has the CT's type, scaling and geometry, and its very bits wherever the weight is 0;
    ``NAME_mask.nii.gz`` is in the numbering of the input's mask (of the label map, where that is a class folder or a
    segmentation of 3D Slicer), and differs where a voxel is of another structure; one that the numbering lacks gets the
    next free number, and the body where the mask has it; labels that are stored with a slope are written as whole
    numbers without one;
    ``NAME_weight.nii.gz`` (float32) is the blend weight; ``NAME_ct.json`` says what was done, with HU before and after.
    Of a DICOM series there is also ``NAME_dicom``, a study of the same patient, see
    :func:`~maisi_tools.dicom.study.write_study`.

    Args:
        keys: of the edited HU (1, X, Y, Z), as :class:`EditedCT` gives them.
        image_key: of what :class:`CropEditd` gave.
        output_dir: folder, made if missing.
        label_map: how the mask was read.
        conditions: to be recorded.

    Raises:
        InputError: a file would be written over an input, see :func:`check_edited`.
    """

    def __init__(
        self,
        keys: str,
        image_key: str,
        output_dir: str | os.PathLike,
        label_map: LabelMap,
        conditions: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(keys)
        self.image_key, self.output_dir, self.label_map = image_key, expanded(output_dir), label_map
        self.conditions = dict(conditions or {})

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        plan = json.loads(data["plan"] if isinstance(data["plan"], str) else data["plan"][0])
        drawn = _array(data[self.keys[0]])[0]
        old_hu, _, weight = _array(data[self.image_key])
        after, changed = _array(data["edited"]).astype(np.uint8)
        box = tuple(slice(first, first + size) for first, size in zip(plan["start"], drawn.shape, strict=True))
        given = {key: plan[key] for key in ("mask", "new_mask") if key in plan}
        # Of a mask without the body label, the room that an organ leaves would be all there is of it.
        labels = after if plan["labels_body"] else np.where(after == BODY, 0, after)
        check_edited([{"image": plan["ct"], **given}], self.output_dir)
        files = targets_of(plan["ct"], self.output_dir)
        for what in ("ct", "mask", "weight"):  # where a file is, its sidecar is about it
            files[what].unlink(missing_ok=True)

        scan = read_stored(plan["ct"], "ct")
        view = scan.ras()
        lowest, highest = (float(scan.slope * end + scan.intercept) for end in (view.min(), view.max()))
        place = view[box]
        reached = weight > 0
        place[reached] = scan.stored(drawn[reached].clip(min(lowest, highest), max(lowest, highest)))
        new_hu = scan.slope * place.astype(np.float64) + scan.intercept

        study = {} if not is_series(plan["ct"]) else {"mask": self._vocabulary(plan["mask"], box, labels, changed > 0)}
        mask, added = self._mask(plan["mask"], box, labels, changed > 0)
        weights = Stored(np.zeros(scan.values.shape, np.float32), scan.affine)
        weights.ras()[box] = weight
        record = {
            "edits": plan["edits"] if "new_mask" not in plan else "new_mask",
            "ml": plan["ml"],
            "hu": _hu_inside(old_hu, new_hu, after, changed > 0),
            "region": {
                "voxels": int(np.count_nonzero(reached)),
                "share_of_body": plan["region_share_of_body"],
                "box_ras_mm": _corners(box_of(reached), data[self.image_key].affine),
            },
            "added_labels": added,
            "source": plan["ct"],
            **self.conditions,
        }
        write_sidecar(files["sidecar"], record)
        write_stored(files["weight"], weights)
        write_stored(files["mask"], mask)
        write_stored(files["ct"], scan)
        if study:
            from maisi_tools.dicom.study import write_study  # of the extra "dicom"

            write_study(
                files["dicom"],
                scan.values,
                scan.affine,
                to_scan(study["mask"], scan),
                plan["ct"],
                conditions=self.conditions,
                replace=True,
                from_scan=True,
                region=record["region"]["box_ras_mm"],
            )
        logger.info("wrote %s", files["ct"])
        return {**data, "ct_path": str(files["ct"]), "mask_path": str(files["mask"])}

    def _vocabulary(self, path: str, box: Box, after: np.ndarray, changed: np.ndarray) -> np.ndarray:
        """The whole edited mask in the vocabulary, RAS."""
        read: Any = ReadMaskd("mask", self.label_map)({"mask": path})["mask"]
        labels = apply_label_map(read[0].numpy(), self.label_map)
        ras = to_ras(labels, np.asarray(read.affine, dtype=float))
        ras[box][changed] = after[changed]
        return ras

    def _mask(self, path: str, box: Box, after: np.ndarray, changed: np.ndarray) -> tuple[Stored, dict[str, int]]:
        """The mask's file with the labels of what changed, and structures that its numbering got for that.

        A folder of classes and a segmentation of 3D Slicer have no numbering but the label map's, which they get.
        """
        if Path(path).is_dir() or is_segmentation(path):
            read: Any = ReadMaskd("mask", self.label_map)({"mask": path})["mask"]
            mask = Stored(read[0].numpy().astype(np.uint16), np.asarray(read.affine, dtype=float))
        else:
            mask = read_stored(path, "mask")
        # Only what reads as another structure than it is to be: of several labels that are one structure each stays.
        found, places = np.unique(whole_labels(mask.ras()[box][changed], path), return_inverse=True)
        read = np.array([{**self.label_map, 0: 0}.get(int(label), 0) for label in found])
        other = changed.copy()
        other[changed] = read[places] != after[changed]
        numbers = {0: 0, **self.label_map.inverse}
        added = {}
        for label in np.unique(after[other]).tolist():
            if label not in numbers:
                numbers[label] = max([*self.label_map, *self.label_map.classes, *numbers.values()]) + 1
                added[VOCABULARY[label].name] = numbers[label]
        if added:
            logger.warning("%s has no label for %s: they got new numbers", self.label_map.name, added)
        kind = np.promote_types(mask.values.dtype, np.min_scalar_type(max(numbers.values())))
        mask.values = mask.values.astype(kind, copy=False)
        table = np.zeros(max(VOCABULARY) + 1, dtype=np.int64)
        table[list(numbers)] = list(numbers.values())
        mask.ras()[box][other] = mask.stored(table[after[other]])
        return mask, added


def to_scan(ras: np.ndarray, scan: Stored) -> np.ndarray:
    """An array with RAS axes, on a scan's grid, with the axes of its file."""
    turned = np.zeros(scan.values.shape, ras.dtype)
    to_ras(turned, scan.affine)[...] = ras
    return turned


def is_series(path: str | os.PathLike) -> bool:
    """Whether a CT comes as DICOM: a folder, a zip file, or the file of an Enhanced CT."""
    file = Path(path)
    return not file.name.lower().endswith(SUFFIXES) and holds_dicom(file)


def _resizes(edits: Any) -> bool:
    several = [edits] if isinstance(edits, Mapping) else edits if isinstance(edits, Sequence) else []
    return any(isinstance(one, Mapping) and one.get("resize") for one in several)


def _resized(volume: Tensor, size: Sequence[int]) -> Tensor:
    """(1, 1, X, Y, Z) on another grid with the same outer faces: averaged where it gets coarser, else trilinear."""
    if tuple(volume.shape[2:]) == tuple(size):
        return volume
    coarser = [min(new, old) for new, old in zip(size, volume.shape[2:], strict=True)]
    if coarser != list(volume.shape[2:]):
        sigma = [0.5 * (old / new - 1) for new, old in zip(coarser, volume.shape[2:], strict=True)]
        smooth = ndimage.gaussian_filter(volume[0, 0].cpu().numpy(), sigma, mode="nearest")
        volume = torch.from_numpy(smooth).to(volume)[None, None]
    return interpolate(volume, tuple(size), mode="trilinear", align_corners=False)


def _shifted(box: Box, by: Box, sign: int = 1) -> Box:
    return tuple(slice(a.start + sign * b.start, a.stop + sign * b.start) for a, b in zip(box, by, strict=True))


def _hull(boxes: Sequence[Box]) -> Box:
    return tuple(
        slice(min(side.start for side in sides), max(side.stop for side in sides)) for sides in zip(*boxes, strict=True)
    )


def _array(volume: Any) -> np.ndarray:
    tensor = volume.as_tensor() if isinstance(volume, MetaTensor) else torch.as_tensor(volume)
    return tensor.detach().cpu().numpy()


def _volumes(before: np.ndarray, after: np.ndarray, spacing: np.ndarray) -> dict[str, list[float]]:
    """Structure -> ml before and after, of all that changed."""
    ml = float(np.prod(spacing)) / 1000
    # Plane by plane: bincount makes each voxel eight bytes.
    counts = [
        np.sum([np.bincount(plane.ravel(), minlength=BODY + 1) for plane in labels], axis=0)
        for labels in (before, after)
    ]
    return {
        display_name(label): [round(float(counts[0][label]) * ml, 3), round(float(counts[1][label]) * ml, 3)]
        for label in VOCABULARY
        if counts[0][label] != counts[1][label]
    }


def _hu_inside(old: np.ndarray, new: np.ndarray, labels: np.ndarray, changed: np.ndarray) -> dict[str, Any]:
    """Label (after the edit) -> mean HU of its changed voxels before and after."""
    found = {}
    for label in np.unique(labels[changed]).tolist():
        inside = changed & (labels == label)
        found[display_name(label) if label in VOCABULARY else "background"] = {
            "before": round(float(old[inside].mean()), 1),
            "after": round(float(new[inside].mean()), 1),
        }
    return found


def _corners(box: Box, affine: Any) -> list[list[float]]:
    """Centres of the first and of the last voxel of a box, RAS in mm."""
    ends = np.array([[side.start for side in box] + [1], [side.stop - 1 for side in box] + [1]], dtype=float)
    return np.round((np.asarray(affine, dtype=float) @ ends.T)[:3].T, 2).tolist()
