"""A run's output folder as one HTML page: pictures, volumes to look through, tables, parameters."""

from __future__ import annotations

import base64
import csv
import datetime
import gzip
import html
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.image import imsave

from maisi_tools.diffusion.conditions import is_mr
from maisi_tools.errors import InputError
from maisi_tools.files import RUN_RECORD, expanded, replacing
from maisi_tools.masks.intensity import hu_ranges
from maisi_tools.masks.label_maps import apply_label_map, recorded_label_map
from maisi_tools.masks.vocabulary import BODY, VOCABULARY, display_name, label_id
from maisi_tools.report.preview import centre_of, load_image, load_labels, page_colour, plane
from maisi_tools.volumes.inputs import NO_CT, is_volume, sidecar_path, stem_of
from maisi_tools.volumes.patching import read_stored

MAX_VOXELS = 4_000_000
"""A volume with more is shown with every n-th voxel along each axis: some 6 MB in the page."""

WINDOWS = {
    "soft tissue": (-160, 240),
    "lung": (-1350, 150),
    "bone": (-500, 1300),
    "brain": (0, 80),
    "whole range": (-1000, 1000),
}
"""Presets of the viewer: HU shown as black and as white; the first is shown at the start."""

MR_PERCENTILES = (0.5, 99.5)
"""Of an MR, whose intensities have no unit: shown as black and as white."""

NO_VALUE = -32768
"""HU that a voxel is shown with that is NaN or infinite: less than any CT has, so that nobody takes it for tissue."""

CURVE_HU = (-1000, 1500)
CURVE_BINS, CURVE_SIZE = 50, (150, 28)

LISTED_ROWS = 200
"""Rows of a CSV file that are shown."""


@dataclass(frozen=True)
class Case:
    """A CT of the run, or an MR, in RAS.

    Attributes:
        name: its stem.
        hu: (X, Y, Z), in HU or, of an MR, without unit.
        labels: the mask on its grid, uint8: in the vocabulary where `translated`, else 1, 2, ... in the order of the
            file's labels; None where there is none.
        spacing: mm along x, y, z.
        sidecar: what its JSON says.
        weight: an edit's blend weight, 0 to 1.
        names: label -> what the page calls it.
        translated: whether the labels are those of the vocabulary, whose ranges of HU then hold.
        unit: "HU", empty for an MR.
        windows: as :data:`WINDOWS`.
        curve: ends of the organs' histograms.
    """

    name: str
    hu: np.ndarray
    labels: np.ndarray | None
    spacing: tuple[float, float, float]
    sidecar: Mapping[str, Any]
    weight: np.ndarray | None = None
    names: Mapping[int, str] = field(default_factory=dict)
    translated: bool = True
    unit: str = "HU"
    windows: Mapping[str, tuple[float, float]] = field(default_factory=lambda: WINDOWS)
    curve: tuple[float, float] = CURVE_HU

    @property
    def window(self) -> tuple[float, float]:
        """Shown at the start."""
        return next(iter(self.windows.values()))


def write_report(run_dir: str | Path, output: str | Path | None = None, max_cases: int = 20) -> Path:
    """Write one self-contained HTML page about what a bundle wrote into a folder.

    It has a contact sheet, a viewer for each CT with its mask, histograms of the HU in each organ, the tables that an
    evaluation left, and the run's parameters, versions and weights, as far as ``run.json`` records them. A table that
    is older than the run it lies beside is of another one, and is named alone.

    Args:
        run_dir: output folder of a bundle.
        output: the .html file, by default ``run_dir/report.html``.
        max_cases: CTs to show, from the first; the others are counted.

    Returns:
        The file.

    Raises:
        InputError: no such folder, nothing in it that a bundle wrote, or a wrong `output` or `max_cases`.
    """
    folder = expanded(run_dir)
    if not folder.is_dir():
        raise InputError(f"run folder {folder} is no folder; give the output_dir of a bundle's run.")
    output = folder / "report.html" if output is None else expanded(output)
    if output.suffix.lower() != ".html":
        raise InputError(f"output {output} is not an .html file; give a name that ends in .html.")
    if not isinstance(max_cases, int) or isinstance(max_cases, bool) or max_cases < 0:
        raise InputError(f"max_cases {max_cases!r} is not usable; give how many CTs to show, 0 for none.")
    volumes = [path for path in sorted(folder.iterdir()) if is_volume(path) and not stem_of(path).endswith(NO_CT)]
    tables = sorted(folder.glob("*.csv"))
    if not volumes and not tables:
        raise InputError(f"run folder {folder} holds no CT and no table; give the output_dir of a bundle's run.")

    record = folder / RUN_RECORD
    settings = _settings(record)
    older = _older(tables, record)
    ranges = _hu_ranges(settings)
    sheet, viewers = [], []
    for number, path in enumerate(volumes[:max_cases]):
        try:
            case = _read_case(path, settings)
        except InputError as error:
            viewers.append(f"<h3>{_text(path.name)}</h3><p class='bad'>Not shown: {_text(error)}</p>")
            continue
        sheet.append(_thumbnail(case, f"case{number}"))
        viewers.append(_case(case, f"case{number}", ranges, opened=not number))
    hidden = len(volumes) - len(volumes[:max_cases])
    title = f"Run {folder.resolve().name}"
    body = [
        f"<h1>{_text(title)}</h1>",
        f"<p class='note'>{len(volumes)} CTs{f', {hidden} of them not shown' if hidden else ''}. "
        "Generated images are synthetic and not for diagnosis.</p>",
        f"<div class='sheet'>{''.join(sheet)}</div>",
        "<h2>Cases</h2>" if viewers else "",
        *viewers,
        *(_csv(path) for path in tables if path not in older),
        f"<p class='note'>{_text(', '.join(path.name for path in older))}: of before this run, and not shown as of its "
        "CTs; evaluate them again.</p>"
        if older
        else "",
        "<h2>Run</h2>",
        _record(record),
    ]
    style, script = (resources.files(__package__).joinpath(f"viewer.{kind}").read_text() for kind in ("css", "js"))
    page = (
        f"<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'><title>{_text(title)}</title>\n"
        "<meta name='viewport' content='width=device-width'><link rel='icon' href='data:,'>\n"
        f"<style>\n{style}</style></head>\n<body>\n"
        + "\n".join(body)
        + f"\n<script>\n{script}</script></body></html>\n"
    )
    with replacing(output) as part:
        part.write_text(page, encoding="utf-8")
    return output


def _text(value: object) -> str:
    return html.escape(str(value))


def _read_case(path: Path, settings: Mapping[str, Any] | None = None) -> Case:
    """Read a CT, its sidecar and, where it is called NAME_ct, the NAME_mask beside it.

    Args:
        path: of the CT.
        settings: of the run, which say its modality and how the masks of an edit are numbered.

    Raises:
        InputError: a file is damaged, or the mask has another grid, or the weight another shape.
    """
    image = load_image(path, "CT")
    stem = stem_of(path)
    suffix = path.name[len(stem) :]
    # A sample that was drawn without a mask has none, whatever mask of its name lies there.
    mask, weight = (
        path.with_name(f"{stem.removesuffix('_ct')}_{kind}{suffix}") if stem.endswith("_ct") else None
        for kind in ("mask", "weight")
    )
    content = _sidecar(path)
    x, y, z = image.header.get_zooms()[:3]
    case = Case(
        stem,
        np.asanyarray(image.dataobj),
        None,
        (float(x), float(y), float(z)),
        content,
        np.asanyarray(load_image(weight, "weight").dataobj) if weight and weight.is_file() else None,
    )
    if case.weight is not None and case.weight.shape != case.hu.shape:
        counts = [" x ".join(map(str, array.shape)) for array in (case.weight, case.hu)]
        raise InputError(f"{weight} has {counts[0]} voxels in place of the {counts[1]} of its CT; remove it.")
    if _is_mr(settings or {}):
        case = _as_mr(case)
    if mask is None or not mask.is_file():
        return case
    numbering = _sidecar(mask).get("labels")
    if case.weight is not None and settings:  # an edit gives the mask back as it came
        numbering = {**settings, "numbering": "input"}
    return _with_labels(case, load_labels(mask, image), numbering if isinstance(numbering, Mapping) else {})


def _is_mr(settings: Mapping[str, Any]) -> bool:
    """Whether a run's settings say that it made MRs."""
    try:
        return is_mr(settings.get("modality", "ct"))
    except InputError:  # of another config
        return False


def _as_mr(case: Case) -> Case:
    """The case without unit, with a window of its own intensities."""
    finite = case.hu[np.isfinite(case.hu)]
    low, high = np.percentile(finite, MR_PERCENTILES) if finite.size else (0, 1)
    window = (float(np.floor(low)), float(max(np.ceil(high), np.floor(low) + 1)))
    return replace(case, unit="", windows={"whole range": window}, curve=window)


def _sidecar(path: Path) -> dict[str, Any]:
    """What the JSON beside a volume says, nothing where there is none.

    Raises:
        InputError: it is damaged.
    """
    sidecar = sidecar_path(path)
    try:
        content = json.loads(sidecar.read_text()) if sidecar.is_file() else {}
    except ValueError as error:
        raise InputError(f"sidecar {sidecar.name} is no JSON ({error}); remove it.") from error
    return content if isinstance(content, dict) else {"content": content}


def _with_labels(case: Case, labels: np.ndarray, numbering: Mapping[str, Any]) -> Case:
    """The case with its mask in the vocabulary; a numbering that is not to be had any more gets numbers for names.

    Args:
        case: without labels.
        labels: as in the file.
        numbering: what :meth:`maisi_tools.masks.label_maps.LabelMap.record` gave of it, or the settings of an edit.

    Raises:
        InputError: more labels than the page can show.
    """
    present = [int(label) for label in np.unique(labels) if label]
    placeholders = numbering.get("placeholders")
    named = placeholders.items() if isinstance(placeholders, Mapping) else ()
    own = {id: name for name, id in named if isinstance(id, int)}
    translated = labels if max(present, default=0) <= 255 else None
    if numbering.get("numbering") == "input":
        try:
            label_map = recorded_label_map(numbering)
            own = dict(label_map.own_names)
            added = {int(number): label_id(name) for name, number in case.sidecar.get("added_labels", {}).items()}
            translated = apply_label_map(labels, {**label_map, **added}) if present else labels
        except (InputError, AttributeError, TypeError, ValueError):  # moved, or the sidecar was not written by us
            translated = None
    if translated is not None:
        ids = [int(label) for label in np.unique(translated) if label]
        names = {label: str(own.get(label) or _name(label)) for label in ids}
        return replace(case, labels=translated.astype(np.uint8), names=names)
    if len(present) > 255:
        raise InputError(f"mask of {case.name} has {len(present)} labels; a page shows up to 255: merge some.")
    numbers = np.searchsorted([0, *present], labels).astype(np.uint8)
    names = {number: f"label {label}" for number, label in enumerate(present, start=1)}
    return replace(case, labels=numbers, names=names, translated=False)


def _thumbnail(case: Case, anchor: str) -> str:
    """The axial plane through the middle of the anatomy, as a link to the case."""
    picture = _picture(case.hu, centre_of(case.hu, case.labels), case.window)
    name = _text(case.name)
    return (
        f"<figure><a href='#{anchor}-case'><img alt='Axial plane of {name}' src='data:image/png;base64,{picture}'></a>"
        f"<figcaption>{name}</figcaption></figure>"
    )


def _picture(volume: np.ndarray, centre: Sequence[int], window: Sequence[float]) -> str:
    """The axial plane as PNG, in base64."""
    with io.BytesIO() as buffer:
        pixels = _shown(plane(volume, "axial", centre))
        imsave(buffer, pixels, format="png", cmap="gray", vmin=window[0], vmax=window[1], origin="lower")
        return base64.b64encode(buffer.getvalue()).decode()


def _shown(values: np.ndarray) -> np.ndarray:
    """Values as they are shown: what is not finite as :data:`NO_VALUE`."""
    return np.where(np.isfinite(values), values, float(NO_VALUE))


def _edit(case: Case, weight: np.ndarray) -> str:
    """The axial plane through the middle of what was edited: the scan before, after, and the blend weight."""
    inside = np.argwhere(weight > 0)
    centre = ((inside.min(0) + inside.max(0)) // 2).tolist() if len(inside) else [n // 2 for n in weight.shape]
    shown = [("after", case.hu, case.window), ("weight", weight, (0, 1))]
    source, note = str(case.sidecar.get("source", "")), ""
    try:
        scan = read_stored(source, "ct")
        before = scan.ras()
        if before.shape != case.hu.shape:
            raise InputError(f"{source} has another shape than the edited scan")
        shown.insert(0, ("before", scan.slope * before + scan.intercept, case.window))
    except (InputError, OSError) as error:
        note = f"<p class='note'>The scan before the edit is not shown: {_text(error)}</p>"
    figures = "".join(
        f"<figure><img alt='Axial plane, {name}' src='data:image/png;base64,{_picture(volume, centre, window)}'>"
        f"<figcaption>{name}</figcaption></figure>"
        for name, volume, window in shown
    )
    return f"<div class='sheet'>{figures}</div>{note}"


def _case(case: Case, id: str, ranges: Mapping[int, tuple[float, float]], opened: bool) -> str:
    """The section of one case: viewer, organs with the `ranges` of their medians, sidecar."""
    step = max(1, int(np.ceil((case.hu.size / MAX_VOXELS) ** (1 / 3))))
    hu = np.clip(np.rint(_shown(case.hu[::step, ::step, ::step])), -32768, 32767).astype("<i2")
    lost = case.hu.size - int(np.count_nonzero(np.isfinite(case.hu)))
    labels = None if case.labels is None else case.labels[::step, ::step, ::step]
    shown: dict[str, Any] = {
        "size": hu.shape,
        "spacing": [mm * step for mm in case.spacing],
        "centre": centre_of(hu, labels),
        "unit": case.unit,
        "window": case.window,
    }
    if labels is not None:
        shown["labels"] = viewer_labels(labels, case.names)
    size, spacing = (" x ".join(f"{value:g}" for value in values) for values in (case.hu.shape, case.spacing))
    thinned = f", every {step}. voxel along each axis shown" if step > 1 else ""
    parts = [
        f"<details class='case' id='{id}-case'{' open' if opened else ''}><summary>{_text(case.name)}</summary>",
        f"<p class='note'>{size} voxels of {spacing} mm{thinned}</p>",
        f"<p class='bad'>{lost} voxels are NaN or infinite: shown as {NO_VALUE} {case.unit}, and left out of the "
        "organs' intensities.</p>"
        if lost
        else "",
        "" if case.weight is None else _edit(case, case.weight),
        _viewer(id, shown, case.windows),
        _data(f"{id}-ct", hu),
        "" if labels is None else _data(f"{id}-mask", labels),
        "" if case.labels is None else _organs(case, ranges if case.translated else {}),
        _entries(_flat(case.sidecar)) if case.sidecar else "",
        "</details>",
    ]
    return "\n".join(parts)


def _viewer(id: str, shown: Mapping[str, Any], windows: Mapping[str, tuple[float, float]]) -> str:
    presets = "".join(f"<option value='{low:g},{high:g}'>{name}</option>" for name, (low, high) in windows.items())
    (low, high), unit = shown["window"], shown["unit"]
    opacity = "<label>Mask <input class='opacity' type='range' min='0' max='1' step='0.05' value='0.4'></label>"
    planes = "".join(
        f"<div><canvas class='{name}' role='img' aria-label='{name} plane'></canvas><label>{name} slice "
        f"<output class='{name}'></output><input class='{name}' type='range' min='0' value='0'></label></div>"
        for name in ("axial", "coronal", "sagittal")
    )
    return (
        f"<div class='viewer' id='{id}' data-volume='{_text(json.dumps(shown))}'><div class='controls'>"
        f"<label>Window <select class='preset'>{presets}</select></label>"
        f"<label>from <input class='low' type='number' step='10' value='{low:g}'> {unit}</label>"
        f"<label>to <input class='high' type='number' step='10' value='{high:g}'> {unit}</label>"
        f"{opacity if 'labels' in shown else ''}</div><div class='planes'>{planes}</div>"
        "<p class='read note'>Move over a picture to read a voxel; turn the wheel to change the slice.</p></div>"
    )


def _data(id: str, values: np.ndarray) -> str:
    packed = base64.b64encode(gzip.compress(values.tobytes(order="F"), 6, mtime=0)).decode()
    return f"<script type='text/plain' id='{id}'>{packed}</script>"


def _organs(case: Case, ranges: Mapping[int, tuple[float, float]]) -> str:
    """A row for each label: volume, median and middle 90 % of its HU, the expected range, its histogram.

    HU, or an MR's intensities, are those of the finite voxels; an organ without any has none.
    """
    assert case.labels is not None
    voxel_ml = float(np.prod(case.spacing)) / 1000
    order = np.argsort(case.labels, axis=None, kind="stable")
    values = case.hu.reshape(-1)[order]
    labels, starts = np.unique(case.labels.reshape(-1)[order], return_index=True)
    rows = []
    for label, inside in zip(labels.tolist(), np.split(values, starts[1:]), strict=True):
        if not label:
            continue
        finite = inside[np.isfinite(inside)]
        expected, outside, about, middle = ranges.get(label), False, "no value", ""
        if finite.size:
            low, median, high = np.percentile(finite, (5, 50, 95))
            outside = expected is not None and not expected[0] <= median <= expected[1]
            about, middle = f"{median:.0f}", f"{low:.0f} to {high:.0f}"
        colour = "transparent" if (rgb := _colour(label)) is None else f"rgb({','.join(map(str, rgb))})"
        rows.append(
            f"<tr><td><span class='swatch' style='background:{colour}'></span>{_text(case.names[label])}</td>"
            f"<td class='number'>{inside.size * voxel_ml:.1f}</td>"
            f"<td class='number{' bad' if outside else ''}'>{about}</td>"
            f"<td class='number'>{middle}</td>"
            f"<td class='number'>{f'{expected[0]:g} to {expected[1]:g}' if expected else ''}"
            f"{' (outside)' if outside else ''}</td><td>{_curve(finite, case.curve)}</td></tr>"
        )
    return (
        "<div class='scroll'><table><caption class='note'>Organs of the mask</caption><tr><th>organ</th><th>ml</th>"
        f"<th>median {case.unit or 'intensity'}</th><th>5 to 95 %</th><th>expected median</th>"
        f"<th>histogram, {case.curve[0]:g} to {case.curve[1]:g} {case.unit}</th></tr>{''.join(rows)}</table></div>"
    )


def _curve(values: np.ndarray, ends: tuple[float, float]) -> str:
    """A histogram as a line of an SVG picture; what lies beyond its ends counts at them."""
    counts, _ = np.histogram(values.clip(*ends), CURVE_BINS, ends)
    width, height = CURVE_SIZE
    x = np.linspace(0, width, CURVE_BINS)
    y = height - 1 - (height - 2) * counts / max(int(counts.max()), 1)
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
    return (
        f"<svg width='{width}' height='{height}' role='img' aria-label='histogram'><polyline points='{points}'/></svg>"
    )


def _csv(path: Path) -> str:
    """A table that the run left."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        return f"<h2>{_text(path.name)}</h2><p class='bad'>Not shown: {_text(error)}</p>"
    if not rows:
        return ""
    more = len(rows) - 1 - LISTED_ROWS
    return f"<h2>{_text(path.name)}</h2><div class='scroll'>{_table(rows[0], rows[1 : LISTED_ROWS + 1])}</div>" + (
        f"<p class='note'>{more} more rows in the file.</p>" if more > 0 else ""
    )


def _settings(record: Path) -> dict[str, Any]:
    """Those in ``run.json``; nothing where there is no record, or a damaged one."""
    try:
        return dict(json.loads(record.read_text())["settings"])
    except (OSError, ValueError, LookupError, TypeError):
        return {}


def _older(tables: Sequence[Path], record: Path) -> list[Path]:
    """The tables that were written before the run began which ``run.json`` tells of; none where it does not say."""
    try:
        began = datetime.datetime.fromisoformat(json.loads(record.read_text())["started"]).timestamp()
    except (OSError, ValueError, LookupError, TypeError):
        return []
    return [path for path in tables if path.stat().st_mtime < began]


def _hu_ranges(settings: Mapping[str, Any]) -> dict[int, tuple[float, float]]:
    """Plausible medians: those that the run itself checked where its settings have them, else the vocabulary's.

    An MR has none.
    """
    if _is_mr(settings):
        return {}
    try:
        return hu_ranges(settings["hu_ranges"])
    except (ValueError, LookupError, TypeError):  # of another config
        return hu_ranges()


def _record(path: Path) -> str:
    """What ``run.json`` says."""
    if not path.is_file():
        return f"<p class='note'>Parameters, versions and weights were not recorded (no {path.name}).</p>"
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        return f"<p class='bad'>{path.name} is no JSON: {_text(error)}</p>"
    return _entries(_flat(content))


def _flat(content: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Entries of nested dicts, with their path as name."""
    for key, value in content.items() if isinstance(content, Mapping) else [("", content)]:
        name = f"{prefix} {key}".strip()
        if isinstance(value, Mapping):
            yield from _flat(value, name)
        else:
            yield name, value


def _entries(entries: Iterable[tuple[str, Any]]) -> str:
    return f"<div class='scroll'>{_table(('entry', 'value'), entries)}</div>"


def _table(head: Sequence[Any], rows: Iterable[Sequence[Any]]) -> str:
    def cell(value: Any) -> str:
        text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
        try:
            float(text)
        except ValueError:
            return f"<td>{_text(text)}</td>"
        return f"<td class='number'>{_text(text)}</td>"

    lines = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    return f"<table><tr>{''.join(f'<th>{_text(name)}</th>' for name in head)}</tr>{lines}</table>"


def viewer_labels(labels: np.ndarray, names: Mapping[int, str] | None = None) -> dict[int, list[Any]]:
    """Label -> [RGB or None, name] of all in a mask, as ``viewer.js`` takes them.

    Args:
        labels: any shape, in the vocabulary unless `names` says otherwise.
        names: label -> name, where it is not the vocabulary's.
    """
    present = [int(label) for label in np.unique(labels) if label]
    return {label: [_colour(label), (names or {}).get(label) or _name(label)] for label in present}


def _name(label: int) -> str:
    return display_name(label) if label in VOCABULARY else f"label {label}"


def _colour(label: int) -> list[int] | None:
    """RGB, 0 to 255; None for the body, which would cover everything."""
    return None if label == BODY else page_colour(label)
