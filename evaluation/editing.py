"""What an edit does to real CTs: seeded edits of kept-out scans, measured voxel by voxel.

Of each scan, in turn: an organ drawn anew as it is, an organ resized, an air-filled and a bony sphere put in, and that
bony sphere taken out again. The masks are those of training: the data set's labels, completed from the CT.

    python evaluation/editing.py --datalist datalist.json --label_map openkbp --count 100 --output_dir runs/editing \\
        --segmenter evaluation/segmentation/configs/inference.json --ckpt runs/segmentation/model.pt
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from scipy import ndimage

from maisi_tools.bundles.stage import Stage
from maisi_tools.datasets.datalist import read_datalist
from maisi_tools.errors import InputError, report_input_errors
from maisi_tools.files import (
    canonical_json,
    check_own_json,
    expanded,
    fingerprint_file,
    fingerprint_tensors,
    fingerprint_text,
    held,
    json_mapping,
    replacing,
    write_csv,
    write_json,
)
from maisi_tools.masks.body import label_from_ct, labels_of_more
from maisi_tools.masks.class_folder import read_mask
from maisi_tools.masks.edits import resize_organ
from maisi_tools.masks.label_maps import LabelMap, read_label_map
from maisi_tools.masks.vocabulary import BODY, VOCABULARY, display_name, label_id
from maisi_tools.metrics.overlap import dice
from maisi_tools.metrics.segmentation import BundleSegmenter
from maisi_tools.metrics.segmenters import labels_on_grid
from maisi_tools.volumes.inputs import check_stems, fingerprint_input, stem_of
from maisi_tools.volumes.reading import read_ras
from maisi_tools.volumes.writing import write_volume

logger = logging.getLogger(__name__)

BUNDLE = Path(__file__).resolve().parent.parent / "bundles" / "maisi_controlnet"
AIR, BONE = label_id("airway"), label_id("skull")
RADIUS_MM = 10.0
FACTORS = (0.7, 1.3)
SMALLEST_ML = 1.0
"""An organ to be redrawn or resized has at least so much."""

KINDS = ("redraw", "resize", "air in", "bone in", "bone out")


@dataclass
class Scan:
    """A CT (X, Y, Z) in HU, RAS, and its completed mask; the organs are those of the data set's own labels."""

    name: str
    hu: np.ndarray
    labels: np.ndarray
    affine: np.ndarray
    organs: list[int]

    @property
    def spacing(self) -> list[float]:
        return np.linalg.norm(self.affine[:3, :3], axis=0).tolist()


def read_scan(case: Mapping[str, str], label_map: LabelMap) -> Scan:
    """Read a case of the datalist and complete its mask."""
    ct = read_ras(case["image"], "ct")
    own = read_mask(case["label"], label_map)[0].numpy()
    affine = np.asarray(ct.affine, dtype=float)
    hu = np.rint(ct[0].numpy())  # as it is given to the bundle, and comes back
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    organs = [int(label) for label in np.unique(own) if label and label != BODY]
    large = [label for label in organs if np.count_nonzero(own == label) * np.prod(spacing) / 1000 >= SMALLEST_ML]
    return Scan(stem_of(case["image"]), hu, label_from_ct(hu, own, spacing.tolist()), affine, large)


def with_sphere(scan: Scan, label: int, random: np.random.Generator) -> np.ndarray:
    """The mask with a sphere in soft tissue, as deep under its surface as the sphere and its margin are wide."""
    soft = np.pad(scan.labels == BODY, 1)
    depth = ndimage.distance_transform_edt(soft, sampling=scan.spacing)[1:-1, 1:-1, 1:-1]
    places = np.argwhere(depth >= min(RADIUS_MM, 0.9 * depth.max()))
    center = places[random.integers(len(places))]
    grids = np.ogrid[tuple(map(slice, scan.labels.shape))]
    off = sum(((grid - at) * mm) ** 2 for grid, at, mm in zip(grids, center, scan.spacing, strict=True))
    return np.where((off <= RADIUS_MM**2) & (scan.labels == BODY), label, scan.labels).astype(np.uint8)


def seam_ratio(
    before: np.ndarray, after: np.ndarray, weight: np.ndarray, changed: np.ndarray, body: np.ndarray
) -> float:
    """Mean absolute difference of neighbours across the blended margin, over that of the untouched scan there.

    Pairs of neighbours inside the body whose labels stay and which are blended by different shares; the border of the
    margin, beyond which nothing changes, is among them, and the surface of what was edited is not.
    """
    sums = np.zeros(2)
    for axis in range(3):
        pair = [np.moveaxis(array, axis, 0) for array in (before, after, weight, changed, body)]
        old, new, blended, anew, inside = ((array[:-1], array[1:]) for array in pair)
        across = (blended[0] != blended[1]) & ~(anew[0] | anew[1]) & inside[0] & inside[1]
        sums += [np.abs(values[1] - values[0])[across].sum() for values in (old, new)]
    return float(sums[1] / sums[0]) if sums[0] else float("nan")


class Editor:
    """Runs the bundle's edit and measures what it did.

    Args:
        folder: for files that nobody keeps.
        settings: keys of edit.json, the caller's own: MONAI's parser evaluates them.
        segmenter: numbered as the data set; None for none.
        label_map: of the data set, whose numbering the segmenter has.
    """

    def __init__(
        self, folder: Path, settings: Mapping[str, Any], segmenter: BundleSegmenter | None, label_map: LabelMap
    ) -> None:
        self.folder, self.segmenter, self.label_map = folder, segmenter, label_map
        self.stage = Stage(
            BUNDLE,
            ["inference.json", "edit.json"],
            "cpu",
            **{"progress": False, **settings, "output_dir": str(folder / "out")},
        )
        self.found: dict[str, np.ndarray] = {}

    def __call__(self, scan: Scan, new: np.ndarray, edits: Any, seed: int) -> dict[str, Any]:
        """Edit a scan to the mask `new`, or by `edits`; returns figures, with the edited scan under ``hu``."""
        inputs = self.folder / "in"
        item = {"image": str(inputs / f"{scan.name}.nii.gz"), "mask": str(inputs / f"{scan.name}_mask.nii.gz")}
        write_volume(item["image"], scan.hu, scan.affine, np.int16)
        write_volume(item["mask"], scan.labels, scan.affine, np.uint8)
        if edits is None:
            item["new_mask"] = str(inputs / f"{scan.name}_new.nii.gz")
            write_volume(item["new_mask"], new, scan.affine, np.uint8)
        self.stage.preprocessing.edits = edits
        self.stage.inferer.seed = seed
        start = time.perf_counter()
        made = self.stage(item)
        seconds = time.perf_counter() - start
        path = Path(made["ct_path"])
        after = np.asarray(nib.load(path).dataobj).astype(np.float32)
        weight = np.asarray(nib.load(str(path).replace("_ct.nii.gz", "_weight.nii.gz")).dataobj)
        changed = weight == 1
        return {
            "outside": int(np.count_nonzero((after != scan.hu)[weight == 0])),
            "seam": seam_ratio(scan.hu, after, weight, changed, (scan.labels > 0) & (new > 0)),
            "seconds": seconds,
            "hu": after,
            "changed": changed,
            "path": path,
        }

    def dices(self, scan: Scan, edited: Path, organ: int) -> tuple[float, float]:
        """Dice of an organ as the network finds it in the edited and in the untouched scan, against the mask.

        Not of what a completed mask may have more of, see :func:`~maisi_tools.masks.body.labels_of_more`.
        """
        numbers = {label: number for number, label in self.label_map.items()}
        if (
            self.segmenter is None
            or numbers.get(organ) not in self.segmenter.classes.values()
            or organ in labels_of_more(np.unique(scan.labels))
        ):
            return float("nan"), float("nan")
        number = numbers[organ]
        untouched = self.folder / "in" / f"{scan.name}.nii.gz"
        if scan.name not in self.found:
            self.found = {scan.name: self._labels(scan, untouched)}
        labels = self._labels(scan, edited)
        return dice(labels == number, scan.labels == organ), dice(self.found[scan.name] == number, scan.labels == organ)

    def _labels(self, scan: Scan, path: Path) -> np.ndarray:
        """What the network finds, (X, Y, Z) on the scan's grid."""
        assert self.segmenter is not None
        grid = MetaTensor(torch.from_numpy(scan.hu)[None], affine=torch.from_numpy(scan.affine))
        return np.asarray(labels_on_grid(self.segmenter(path), grid).cpu())[0]


def rows_of(editor: Editor, scans: Sequence[Scan], count: int, first: int = 0) -> Iterator[dict[str, Any]]:
    """A row for each edit from the `first` on; which kind, organ and place follow from its number."""
    inserted: tuple[Scan, np.ndarray] | None = None
    for number in range(first, count):
        scan, kind = scans[number // len(KINDS) % len(scans)], KINDS[number % len(KINDS)]
        random = np.random.default_rng([0, number])
        row: dict[str, Any] = {"edit": number, "scan": scan.name, "kind": kind}
        soft = float(np.median(scan.hu[scan.labels == BODY]))
        try:
            if kind in ("redraw", "resize"):
                if not scan.organs:
                    raise InputError("no organ is large enough")
                organ = scan.organs[int(random.integers(len(scan.organs)))]
                if kind == "redraw":
                    made = editor(scan, scan.labels, {"redraw": VOCABULARY[organ].name}, number)
                    row["dice"], row["dice_untouched"] = editor.dices(scan, made["path"], organ)
                else:
                    factor = FACTORS[int(random.integers(2))]
                    new = resize_organ(scan.labels, scan.spacing, organ, factor)
                    made = editor(scan, new, None, number)
                    row["factor"] = factor
                # What a shrinking organ leaves is body.
                place = made["changed"]
                wanted = soft if row.get("factor", 1) < 1 else float(np.median(scan.hu[scan.labels == organ]))
                row["organ"] = display_name(organ)
            elif kind == "bone out":
                if inserted is None:
                    raise InputError("no sphere went in before")
                (scan, old), inserted = inserted, None
                made = editor(scan, old, None, number)
                place, wanted = made["changed"], soft
            else:
                label = AIR if kind == "air in" else BONE
                if kind == "bone in":
                    inserted = None  # should this one be refused, the sphere of an earlier scan is not to be taken out
                new = with_sphere(scan, label, random)
                made = editor(scan, new, None, number)
                place, wanted = made["changed"], float(np.median(scan.hu[scan.labels == label]))
                if kind == "bone in":
                    inserted = Scan(scan.name, made["hu"], new, scan.affine, scan.organs), scan.labels
        except InputError as error:
            logger.warning("edit %d, %s of %s: %s", number, kind, scan.name, error)
            yield row | {"refused": str(error)}
            continue
        row["hu"] = float(np.median(made["hu"][place])) if place.any() else float("nan")
        row |= {"wanted_hu": wanted, "soft_hu": soft}
        yield row | {key: made[key] for key in ("outside", "seam", "seconds")}


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A markdown table with a row for each kind of edit, medians over the edits."""

    def middle(some: Sequence[Mapping[str, Any]], key: str, digits: int = 0) -> str:
        values = [row[key] for row in some if row.get(key) == row.get(key) and key in row]
        return f"{statistics.median(values):.{digits}f}" if values else "-"

    lines = [
        "| edit | number | refused | voxels changed outside, all | HU inside | wanted | soft tissue | seam ratio |"
        " 90th percentile | Dice, edited | Dice, untouched | seconds |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for kind in KINDS:
        some = [row for row in rows if row["kind"] == kind]
        done = [row for row in some if "refused" not in row]
        seams = [row["seam"] for row in done if row["seam"] == row["seam"]]
        cells = [
            kind,
            str(len(some)),
            str(len(some) - len(done)),
            str(sum(row["outside"] for row in done)),
            *(middle(done, key) for key in ("hu", "wanted_hu", "soft_hu")),
            middle(done, "seam", 2),
            f"{np.percentile(seams, 90):.2f}" if seams else "-",
            *(middle(done, key, 3) for key in ("dice", "dice_untouched")),
            middle(done, "seconds", 1),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _begun(path: Path, given: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows that an interrupted run left.

    Raises:
        InputError: of other options.
    """
    if not path.is_file():
        return []
    found = json.loads(path.read_text())
    if found["given"] != given:
        raise InputError(
            f"{path} was begun with other options or files: {found['given']}; give these, or another output folder"
        )
    return found["rows"]


def content_of(
    files: Sequence[str | Path],
    cases: Sequence[Mapping[str, str]],
    label_map: LabelMap,
    segmenter: BundleSegmenter | None,
    config: str | None,
) -> dict[str, Any]:
    """Fingerprints of all that a row follows from, whatever its files are called.

    Args:
        files: the datalist and the bundle's weights.
        cases: CTs and their labels.
        label_map: of the labels.
        segmenter, config: the network that measures and its config, both None for none.
    """
    content: dict[str, Any] = {
        "files": [fingerprint_file(path) for path in files],
        "cases": [fingerprint_input(case[key]) for case in cases for key in ("image", "label")],
        "label_map": fingerprint_text(canonical_json(label_map.ids)),
    }
    if segmenter is not None and config is not None:
        content["segmenter"] = fingerprint_tensors(segmenter.network.state_dict())
        content["segmenter_config"] = fingerprint_text(canonical_json(ConfigParser.load_config_file(config)))
        content["segmenter_classes"] = segmenter.classes
    return content


def main() -> None:
    """Edit, measure, write edits.csv and table.md, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datalist", required=True, help="as maisi prepare writes it")
    parser.add_argument("--section", default="validation", help="of the datalist")
    parser.add_argument("--label_map", default="openkbp")
    parser.add_argument("--count", type=int, default=100, help="edits in all")
    parser.add_argument("--settings", default="{}", help="JSON: keys of edit.json, such as strength")
    parser.add_argument("--segmenter", help="inference config of a segmentation bundle")
    parser.add_argument("--ckpt", help="its weights")
    parser.add_argument("--output_dir", type=expanded, required=True)
    options = parser.parse_args()
    folder = options.output_dir
    label_map = read_label_map(options.label_map)
    segmenter = BundleSegmenter(options.segmenter, options.ckpt) if options.segmenter else None
    cases = read_datalist(options.datalist, options.section)
    if without := [case["image"] for case in cases if not case.get("label")]:
        raise InputError(
            f"{options.datalist} has no label of {without[0]}, which an edit needs: add it, or leave it out"
        )
    check_stems(case["image"] for case in cases)  # by which scans and their figures are told apart
    there = folder / "edits.json"
    check_own_json(
        there,
        lambda found: found.keys() == {"given", "rows"},
        "evaluation/editing.py",
        "--output_dir",
        ["edits.csv", "table.md"],
    )
    taken = f"another run edits in {folder}; wait for its end, or give another output folder"
    with held(folder, taken), tempfile.TemporaryDirectory(prefix="scratch-", dir=folder) as scratch:
        editor = Editor(Path(scratch), json_mapping(options.settings, "settings"), segmenter, label_map)
        given = {name: value for name, value in vars(options).items() if name not in ("output_dir", "count")}
        weights = editor.stage.parser.get_parsed_content("weights")
        given["content"] = content_of([options.datalist, *weights], cases, label_map, segmenter, options.segmenter)
        rows = _begun(there, given)[: options.count]
        if len(rows) % len(KINDS) == KINDS.index("bone out"):  # which takes out what the one before put in
            rows.pop()
        scans = [read_scan(case, label_map) for case in cases]
        for row in rows_of(editor, scans, options.count, len(rows)):
            rows.append(row)
            write_json(there, {"given": given, "rows": rows})
            rounded = {key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}
            print(rounded, flush=True)
    write_csv(folder / "edits.csv", rows)
    lines = table(rows)
    with replacing(folder / "table.md") as part:
        part.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    report_input_errors()
    main()
