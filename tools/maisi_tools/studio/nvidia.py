"""The request that NVIDIA's MAISI service takes, ``POST /v1/maisi/run``, in terms of the studio's own jobs.

The masks are those of the small mask generator: head and neck. What that does not know is refused, not left out.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from maisi_tools.errors import InputError
from maisi_tools.masks.vocabulary import label_id
from maisi_tools.settings import check_number, check_plain, checked_fields
from maisi_tools.studio.catalogue import SMALL, Catalogue
from maisi_tools.studio.requests import check_triple

REGIONS = ("head", "chest", "thorax")
"""That the generator's masks show, down to the upper part of the chest."""

ENDINGS = (".nii.gz", ".nii")

SAMPLES = 20


@dataclass(frozen=True)
class Body:
    """The fields of the request, by the names and with the defaults of NVIDIA's documentation."""

    num_output_samples: int
    body_region: Sequence[str] | str
    anatomy_list: Sequence[str] | str | None = None
    output_size: Sequence[int] | None = None
    spacing: Sequence[float] | None = None
    controllable_anatomy_size: Sequence[Sequence[Any]] | None = None
    image_output_ext: str = ".nii.gz"
    label_output_ext: str = ".nii.gz"
    pre_signed_url: str | None = None
    local_working_dir: str | None = None


def read_body(content: Any, catalogue: Catalogue) -> tuple[Body, list[dict[str, Any]]]:
    """The request, and those of the jobs that fulfil it, for :func:`~maisi_tools.studio.requests.check_request`.

    Raises:
        InputError: it asks for what cannot be made here.
    """
    body = Body(**checked_fields(Body, content, "the request"))
    check_plain(vars(body), "the request")
    check_number("num_output_samples", body.num_output_samples, 1, SAMPLES, whole=True)
    for name in ("pre_signed_url", "local_working_dir"):
        if getattr(body, name):
            raise InputError(f"{name} is not supported: no request chooses where files go; leave it out")
    for name in ("image_output_ext", "label_output_ext"):
        if getattr(body, name) not in ENDINGS:
            raise InputError(
                f"{name} is {getattr(body, name)!r}; allowed are {', '.join(ENDINGS)}; jobs give DICOM, too"
            )
    regions = _names("body_region", body.body_region)
    if "head" not in regions or not set(regions) <= set(REGIONS):
        raise InputError(
            f"body_region is {body.body_region!r}; allowed are head, and with it {' and '.join(REGIONS[1:])}: the mask "
            "generator that is there draws heads and necks"
        )
    shown = set(catalogue.mask_labels)
    if unknown := [name for name in _names("anatomy_list", body.anatomy_list) if _label(name, catalogue) not in shown]:
        raise InputError(
            f"anatomy_list has {', '.join(unknown)}; allowed are {', '.join(catalogue.organs.organs)}, which "
            "the masks have"
        )
    settings = _field_of_view(body, catalogue)
    sizes = _sizes(body.controllable_anatomy_size, catalogue)
    first = secrets.randbelow(2**31)
    source = {"kind": "generator", "organ_sizes": sizes}
    seeds = range(first, first + body.num_output_samples)
    made = [{"makes": "ct", "source": source, "settings": {**settings, "seed": seed}} for seed in seeds]
    return body, made


def info(catalogue: Catalogue) -> dict[str, Any]:
    """What ``GET /v1/maisi/info`` answers."""
    return {
        "name": "MAISI Studio",
        "version": version("maisi-bundles"),
        "weights": list(catalogue.weights),
        "body_region": REGIONS,
        "anatomy_list": list(catalogue.organs.organs),
        "controllable_anatomy": list(catalogue.organs.organs),
        "presets": {
            name: {"output_size": preset.size, "spacing": preset.spacing}
            for name, preset in catalogue.weights[SMALL].presets.items()
        },
        "output_ext": ENDINGS,
        "max_output_samples": SAMPLES,
    }


def _field_of_view(body: Body, catalogue: Catalogue) -> dict[str, Any]:
    """Settings for the size and spacing that are asked for: a preset of the small weights, or the released ones."""
    if body.output_size is None and body.spacing is None:
        return {}
    if body.output_size is not None:
        check_triple("output_size", body.output_size, 1, 4096, whole=True)
    if body.spacing is not None:
        check_triple("spacing", body.spacing, 0.1, 20)
    released = [name for name in catalogue.weights if name != SMALL]
    if released:
        asked = {"output_size": body.output_size, "spacing": body.spacing, "weights": released[-1]}
        return {name: value for name, value in asked.items() if value is not None}
    presets = catalogue.weights[SMALL].presets
    for name, preset in presets.items():
        fits = body.output_size is None or list(body.output_size) == list(preset.size)
        if fits and (body.spacing is None or list(body.spacing) == list(preset.spacing)):
            return {"preset": name}
    listed = "; ".join(f"{list(one.size)} at {list(one.spacing)}" for one in presets.values())
    raise InputError(
        f"output_size is {body.output_size} and spacing {body.spacing}; allowed with the small weights are {listed}, "
        "or neither of both; for the others fetch the released weights (maisi weights maisi_controlnet)"
    )


def _sizes(pairs: Any, catalogue: Catalogue) -> dict[str, float]:
    """Organ -> ml, of pairs of an organ and a share of its range."""
    if pairs is None:
        return {}
    if not isinstance(pairs, list) or len(pairs) > 10:
        raise InputError(f"controllable_anatomy_size is {pairs!r}; allowed are at most 10 pairs of organ and size")
    sizes: dict[str, float] = {}
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2:
            raise InputError(f"controllable_anatomy_size has {pair!r}; allowed are pairs such as ['larynx', 0.5]")
        organ = next((name for name in catalogue.organs.organs if name.casefold() == str(pair[0]).casefold()), None)
        if organ is None:
            raise InputError(
                f"controllable_anatomy_size has {pair[0]!r}; allowed are {', '.join(catalogue.organs.organs)}: the "
                "mask generator that is there knows no other size"
            )
        check_number(f"controllable_anatomy_size of {organ}", pair[1], 0, 1)
        if organ in sizes:
            raise InputError(f"controllable_anatomy_size has {organ} twice; give each organ once")
        low, high = catalogue.organs.organs[organ]["range"]
        sizes[organ] = round(low + pair[1] * (high - low), 1)
    return sizes


def _names(field: str, value: Any) -> list[str]:
    names = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{field} is {value!r}; allowed is a list of names")
    return names


def _label(name: str, catalogue: Catalogue) -> int | None:
    if name in catalogue.organs.organs:
        return int(catalogue.organs.organs[name]["label"])
    return label_id(name)
