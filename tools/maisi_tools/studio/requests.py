"""What a job's request may say. All of it is checked here, before anything is queued; none of it is ever evaluated."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from maisi_tools.diffusion.samplers import SOLVERS, check_sampling
from maisi_tools.errors import InputError
from maisi_tools.masks.edits import VERBS
from maisi_tools.masks.label_maps import read_label_map
from maisi_tools.masks.phantom import CENTERS
from maisi_tools.masks.vocabulary import VOCABULARY, hosts_of, label_id
from maisi_tools.settings import HIGHEST, check_number, check_plain, checked_fields
from maisi_tools.studio.catalogue import SMALL, SOURCES, Catalogue, Weights
from maisi_tools.tsp.errors import TSPError
from maisi_tools.tsp.memory import parse_bytes
from maisi_tools.volumes.checks import AGREES, check_spacing, nearest_spacing
from maisi_tools.volumes.limits import check_limit
from maisi_tools.volumes.regrid import LARGEST_FACTOR

Grid = tuple[Sequence[int], Sequence[float]]
"""Voxels and mm along x, y, z."""

PHANTOM: Grid = (96, 80, 96), (4.0, 4.0, 2.5)
"""Of a phantom whose request names no other, the demo's."""

EDITS = 50
"""In one request; each may have so many lesions."""


@dataclass(frozen=True)
class Request:
    """What is to be made; see docs/how-to/studio.md.

    Args:
        makes: "mask" or "ct".
        source: where the mask comes from.
        edits: of the mask, or of the real CT.
        settings: see :class:`Settings`.
    """

    makes: str
    source: Mapping[str, Any]
    edits: Sequence[Mapping[str, Any]] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Settings:
    """How it is made; what is None is left to the weights' config."""

    seed: int = 0
    solver: str | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    spacing: Sequence[float] | None = None
    preset: str | None = None
    output_size: Sequence[int] | None = None
    memory_limit: str | None = None
    weights: str = SMALL
    device: str | None = None


@dataclass(frozen=True)
class _Phantom:
    body: str = "head_neck"
    preset: str | None = None
    size: Sequence[int] | None = None
    spacing: Sequence[float] | None = None


@dataclass(frozen=True)
class _Generator:
    organ_sizes: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _Upload:
    id: str
    label_map: str = "maisi"


@dataclass(frozen=True)
class _Job:
    id: str


@dataclass(frozen=True)
class _CT:
    id: str
    mask_id: str
    label_map: str = "maisi"


_KINDS = dict(zip(SOURCES, (_Phantom, _Generator, _Upload, _Job, _CT), strict=True))


def check_request(content: Any, catalogue: Catalogue, mask_grid: Callable[[Any], Grid]) -> dict[str, Any]:
    """A request as it is stored and carried out: JSON with all that it leaves open filled in.

    Args:
        content: of a client.
        catalogue: what there is.
        mask_grid: id of a job -> the grid of its mask; raises InputError where there is none.

    Raises:
        InputError: anything that is unknown, of another kind, out of bounds, or without effect.
    """
    request = Request(**checked_fields(Request, content, "the request"))
    for name, value in vars(request).items():
        check_plain(value, name)
    if request.makes not in ("mask", "ct"):
        raise InputError(f"makes is {request.makes!r}; allowed are mask and ct")
    kind, source, grid = _check_source(request, catalogue, mask_grid)
    edits = _check_edits(request.edits, kind == "ct")
    if kind == "ct" and (request.makes != "ct" or not edits):
        raise InputError("a source of kind ct is a real CT that is edited: give makes: ct, and at least one edit")
    settings = _check_settings(request, kind, catalogue)
    if request.makes == "ct" and kind != "ct":
        weights = catalogue.weights[settings["weights"]]
        _check_grid(grid, settings, weights)
    return {"makes": request.makes, "source": {"kind": kind, **source}, "edits": edits, "settings": settings}


def _check_source(
    request: Request, catalogue: Catalogue, mask_grid: Callable[[Any], Grid]
) -> tuple[str, dict[str, Any], Grid]:
    if not isinstance(request.source, Mapping) or request.source.get("kind") not in SOURCES:
        raise InputError(
            f"source is {request.source!r}; allowed is a kind, of {', '.join(SOURCES)}, with what it takes"
        )
    content = dict(request.source)
    kind = content.pop("kind")
    source = vars(_KINDS[kind](**checked_fields(_KINDS[kind], content, f"the source {kind}")))
    if kind == "phantom":
        return _check_phantom(source, catalogue)
    if kind == "generator":
        catalogue.organs.vector(source["organ_sizes"])
        return kind, source, catalogue.mask_grid
    if kind == "job":
        return kind, source, mask_grid(source["id"])
    mask = catalogue.folders.upload(source["mask_id" if kind == "ct" else "id"])
    ct = catalogue.folders.upload(source["id"]) if kind == "ct" else None
    if mask["kind"] != "mask" or (ct is not None and ct["kind"] != "ct"):
        raise InputError(f"the source {kind} names an upload of another kind; upload a mask as mask and a CT as ct")
    if ct is not None and _apart(mask, ct):
        of_mask, of_ct = (
            f"{one['name']} has {' x '.join(map(str, one['size']))} voxels of {one['spacing']} mm" for one in (mask, ct)
        )
        raise InputError(
            f"the mask {of_mask}, and the CT {of_ct} (in RAS orientation); allowed is a mask on the CT's grid: upload "
            "the mask of this CT, or resample it onto the CT"
        )
    if not mask["labels"]:
        raise InputError(
            f"the mask {mask['name']} is empty: every voxel is 0; allowed is a mask with at least one label: upload "
            "another one"
        )
    label_map = read_label_map(catalogue.folders.label_map(source["label_map"]))
    known = {0, *label_map, *label_map.classes}
    if unknown := [entry for entry in mask["labels"] if entry["value"] not in known]:
        listed = ", ".join(f"{entry['value']} ({entry['voxels']} voxels)" for entry in unknown)
        raise InputError(
            f"the label map {source['label_map']} does not know {len(unknown)} of the mask's labels: {listed}; say "
            "what they are, or drop them, and save that as a label map"
        )
    if not any(label_map.get(entry["value"]) for entry in mask["labels"]):
        raise InputError(
            f"the label map {source['label_map']} drops every label that the mask {mask['name']} has; allowed is one "
            "that keeps at least one: say what it is, and save that as a label map"
        )
    return kind, source, (mask["size"], mask["spacing"])


def _apart(mask: Mapping[str, Any], ct: Mapping[str, Any]) -> bool:
    """Whether two uploads cannot have the same voxels, wherever they lie; if they lie elsewhere, the job says so."""
    axes = zip(ct["size"], mask["spacing"], ct["spacing"], strict=True)
    return ct["size"] != mask["size"] or any((n - 1) / 2 * abs(a - b) > AGREES * b for n, a, b in axes)


def _check_phantom(source: dict[str, Any], catalogue: Catalogue) -> tuple[str, dict[str, Any], Grid]:
    if not isinstance(source["body"], str) or source["body"] not in CENTERS:
        raise InputError(f"body is {source['body']!r}; allowed are {', '.join(CENTERS)}")
    name = source.pop("preset")
    size, spacing = source["size"], source["spacing"]
    grid: Grid = PHANTOM[0] if size is None else size, PHANTOM[1] if spacing is None else spacing
    if name is not None:
        preset = catalogue.weights[SMALL].presets.get(name) if isinstance(name, str) else None
        if preset is None:
            raise InputError(f"preset is {name!r}; allowed are {', '.join(catalogue.weights[SMALL].presets)}")
        grid, given = (preset.size, preset.spacing), (size, spacing)
        if any(own not in (None, list(its)) for own, its in zip(given, grid, strict=True)):
            raise InputError("the source phantom has a preset and another size or spacing; give the one or the other")
        source["preset"] = name
    check_triple("size", grid[0], 8, 4096, whole=True)
    check_triple("spacing", grid[1], 0.2, 20)
    check_limit("MAISI_MAX_VOXELS", math.prod(grid[0]), f"a phantom of {grid[0]} has {math.prod(grid[0])} voxels")
    return "phantom", {**source, "size": list(grid[0]), "spacing": [float(mm) for mm in grid[1]]}, grid


def _check_edits(edits: Any, real: bool) -> list[dict[str, Any]]:
    """Edits as docs/editing.md has them, with `flip` for masks; names become those of the vocabulary."""
    if not isinstance(edits, (list, tuple)) or len(edits) > EDITS:
        raise InputError(f"edits is no list of at most {EDITS}; allowed are such as {{'insert': {{'lung tumor': 20}}}}")
    return [_check_edit(edit, real) for edit in edits]


def _check_edit(edit: Any, real: bool) -> dict[str, Any]:
    verbs = VERBS if real else (*(verb for verb in VERBS if verb != "redraw"), "flip")
    numbers = {"shift_mm": (0, 500), "elastic_mm": (0, 500), "seed": (0, 2**32 - 1)}
    if not isinstance(edit, Mapping) or not set(edit) & set(verbs) or set(edit) - {*verbs, *numbers}:
        raise InputError(
            f"an edit is {edit!r}; allowed {'for a real CT' if real else 'for a mask'} are {', '.join(verbs)}, at "
            f"least one, with {', '.join(numbers)}"
        )
    checked: dict[str, Any] = {}
    for key, value in edit.items():
        if key in numbers:
            check_number(f"{key} of an edit", value, *numbers[key], whole=key == "seed")
            checked[key] = value
        elif key == "flip":
            if not isinstance(value, bool):
                raise InputError(f"flip is {value!r}; allowed are true and false")
            checked[key] = value
        elif key in ("remove", "redraw"):
            names = [value] if isinstance(value, str) else value
            if not isinstance(names, (list, tuple)) or not names or not all(isinstance(name, str) for name in names):
                raise InputError(f"{key} is {value!r}; allowed is a name, or a list of them")
            checked[key] = _names(key, names)
        else:
            if not isinstance(value, Mapping) or not value:
                raise InputError(f"{key} is {value!r}; allowed is name -> number, such as {{'lung tumor': 20}}")
            amounts = [_check_amount(key, name, amount) for name, amount in value.items()]
            checked[key] = dict(zip(_names(key, value), amounts, strict=True))
    if not any(checked.get(verb) for verb in verbs):
        raise InputError(f"an edit is {edit!r}, which changes nothing; give flip: true, or leave it out")
    if (checked.get("shift_mm") or checked.get("elastic_mm")) and "augment" not in checked:
        raise InputError(
            f"an edit is {edit!r}; shift_mm and elastic_mm move the lesions that augment names: add such as "
            "augment: {'hepatic tumor': 1}, which keeps their size, or leave them out"
        )
    return checked


def _names(verb: str, given: Iterable[str]) -> list[str]:
    """Names as the vocabulary has them, in the order given; one that is there twice is refused, however written."""
    found: dict[str, str] = {}
    for name in given:
        if (known := _name(name, verb)) in found:
            several = ", with a list of diameters" if verb == "insert" else ""
            raise InputError(f"{verb} has {found[known]!r} and {name!r}, which are the same; give it once{several}")
        found[known] = name
    return list(found)


def _name(name: str, verb: str) -> str:
    label = label_id(name)
    if verb in ("remove", "insert", "augment"):
        hosts_of(label)  # that it is a lesion
    return VOCABULARY[label].name


def _check_amount(verb: str, name: str, value: Any) -> Any:
    several = value if isinstance(value, (list, tuple)) and verb == "insert" else [value]
    if not 1 <= len(several) <= EDITS:
        raise InputError(f"{verb} of {name} is a list of {len(several)}; allowed are 1 to {EDITS} diameters")
    for one in several:
        check_number(f"{verb} of {name}", one, 0.01, 500)
    return value


def _check_settings(request: Request, kind: str, catalogue: Catalogue) -> dict[str, Any]:
    """The settings that the request has or that are needed; of others the config of the weights has its own."""
    given = checked_fields(Settings, request.settings, "settings")
    given = {key: value for key, value in given.items() if value is not None}
    settings = {"seed": 0, "device": catalogue.devices[0], **given}
    check_number("seed", settings["seed"], 0, 2**32 - 1, whole=True)
    if settings["device"] not in catalogue.devices:
        raise InputError(f"device is {settings['device']!r}; allowed are {', '.join(catalogue.devices)}")
    effective = {"seed", "device"}
    if request.makes == "ct":
        effective = set(Settings.__annotations__) - ({"spacing", "preset", "output_size"} if kind == "ct" else set())
        settings.setdefault("weights", SMALL)
    elif kind == "generator":
        effective |= {"solver", "num_inference_steps"}
    if without := sorted(settings.keys() - effective):
        raise InputError(
            f"settings has {', '.join(without)}, which changes nothing in what is made; allowed here are "
            f"{', '.join(sorted(effective))}: leave it out"
        )
    if "solver" in settings and settings["solver"] not in SOLVERS:
        raise InputError(f"solver is {settings['solver']!r}; allowed are {', '.join(SOLVERS)}")
    if "num_inference_steps" in settings:
        check_number("num_inference_steps", settings["num_inference_steps"], 1, 1000, whole=True)
    if request.makes == "ct":
        if not isinstance(settings["weights"], str) or settings["weights"] not in catalogue.weights:
            raise InputError(f"weights is {settings['weights']!r}; allowed are {', '.join(catalogue.weights)}")
        weights = catalogue.weights[settings["weights"]]
        sampling = {**weights.defaults, **settings}
        check_number("guidance_scale", sampling["guidance_scale"], 0, HIGHEST["guidance_scale"])
        check_sampling(weights.scheduler, sampling["num_inference_steps"], sampling["solver"])
        check_memory_limit(settings.get("memory_limit"))
    return settings


def check_memory_limit(value: Any) -> None:
    """Refuse what is no size of memory.

    Raises:
        InputError: anything but None, or a number of bytes with a unit, as text.
    """
    try:
        if value is not None and (not isinstance(value, str) or len(value) > 20):
            raise TSPError("")
        parse_bytes(value)
    except TSPError:
        raise InputError(f"memory_limit is {value!r}; allowed is a text such as 4GiB or 800MB") from None


def _check_grid(grid: Grid, settings: Mapping[str, Any], weights: Weights) -> None:
    """Refuse a grid that the weights do not know, as the config would when it is run."""
    asked = [key for key in ("spacing", "preset", "output_size") if key in settings]
    if "preset" in asked:
        if len(asked) > 1:
            raise InputError(f"settings has {' and '.join(asked)}; a preset sets spacing and size: give one of them")
        if not isinstance(settings["preset"], str) or settings["preset"] not in weights.presets:
            raise InputError(f"preset is {settings['preset']!r}; allowed are {', '.join(weights.presets)}")
        return
    if "output_size" in asked:
        check_triple("output_size", settings["output_size"], weights.multiple, 4096, whole=True)
        size = math.prod(settings["output_size"])
        check_limit("MAISI_MAX_VOXELS", size, f"an output_size of {settings['output_size']} has {size} voxels")
        if any(n % weights.multiple for n in settings["output_size"]):
            raise InputError(f"output_size is {settings['output_size']}; allowed are multiples of {weights.multiple}")
    if "spacing" in asked:
        check_triple("spacing", settings["spacing"], 0.1, 20)
        check_spacing(settings["spacing"], weights.spacing_range, "spacing")
    elif "output_size" in asked:
        check_spacing(grid[1], weights.spacing_range, "the spacing of the mask")
    else:
        nearest = nearest_spacing(grid[1], weights.spacing_range)
        if max(max(a / b, b / a) for a, b in zip(grid[1], nearest, strict=True)) > LARGEST_FACTOR:
            check_spacing(grid[1], weights.spacing_range, "the spacing of the mask", LARGEST_FACTOR)


def grid_of(request: Mapping[str, Any], catalogue: Catalogue, mask_grid: Callable[[Any], Grid]) -> Grid:
    """The grid that a CT is generated on, as far as the request of :func:`check_request` tells."""
    source, settings = request["source"], request["settings"]
    if source["kind"] == "phantom":
        size, spacing = source["size"], source["spacing"]
    elif source["kind"] == "generator":
        size, spacing = catalogue.mask_grid
    elif source["kind"] == "job":
        size, spacing = mask_grid(source["id"])
    else:
        upload = catalogue.folders.upload(source["id"])
        size, spacing = upload["size"], upload["spacing"]
    weights = catalogue.weights[settings.get("weights", SMALL)]
    if "preset" in settings:
        preset = weights.presets[settings["preset"]]
        return preset.size, preset.spacing
    fine = settings.get("spacing") or nearest_spacing(spacing, weights.spacing_range)
    size = [max(1, round(n * mm / new)) for n, mm, new in zip(size, spacing, fine, strict=True)]
    return settings.get("output_size", size), fine


def check_triple(name: str, values: Any, low: float, high: float, whole: bool = False) -> None:
    """Refuse what is not three numbers from `low` to `high`.

    Raises:
        InputError: something else; the message calls it `name`.
    """
    if not isinstance(values, (list, tuple)) or len(values) != 3:
        raise InputError(f"{name} is {values!r}; allowed are three numbers, along x, y, z")
    for value in values:
        check_number(name, value, low, high, whole)
