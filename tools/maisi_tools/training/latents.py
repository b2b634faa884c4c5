"""The latent cache that stages 2 and 3 train from: a folder of ``*_latent.nii.gz`` with their sidecars."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from maisi_tools.errors import InputError

SUFFIX = "_latent.nii.gz"
"""What ``maisi_vae``'s encode.json appends to a volume's stem."""


def belongs(stem: str, name: str) -> bool:
    """Whether the latent ``stem`` is one of the case ``name``."""
    return stem == name or stem.startswith(f"{name}_")


def find_latents(
    latents_dir: str | Path,
    held_out: Sequence[str] | str | Path = (),
    masks_dir: str | Path | None = None,
    mask_suffix: str = "_mask.nii.gz",
) -> dict[str, list[dict[str, str]]]:
    """List the cached latents, split by patient into "training" and "validation".

    Args:
        latents_dir: folder written by ``maisi_vae``'s encode.json.
        held_out: case names kept out of training, or a JSON file with them under "held_out". A latent belongs to a
            case when its stem is the name or begins with the name and an underscore (``pt_1_ct``, ``pt_1_flip``).
        masks_dir: folder with one mask a case, ``<stem>`` + ``mask_suffix``; latents without a mask are left out.

    Raises:
        InputError: no latents, or none with a mask; or a held-out name that no latent belongs to, because a misspelt
            name would put its patient into training.
    """
    root = Path(latents_dir)
    found = sorted(root.glob(f"*{SUFFIX}"))
    if not found:
        raise InputError(f"no *{SUFFIX} in {root}; make them with configs/encode.json of the maisi_vae bundle")
    names = _names(held_out)
    stems = [path.name.removesuffix(SUFFIX) for path in found]
    unknown = [name for name in names if not any(belongs(stem, name) for stem in stems)]
    if unknown:
        raise InputError(f"held-out cases {', '.join(unknown)} have no latent in {root}; correct the names")
    lists: dict[str, list[dict[str, str]]] = {"training": [], "validation": []}
    for path in found:
        stem = path.name.removesuffix(SUFFIX)
        item = {"latent": str(path)}
        if masks_dir is not None:
            mask = Path(masks_dir) / f"{stem}{mask_suffix}"
            if not mask.is_file():
                continue
            item["mask"] = str(mask)
        kept_out = any(belongs(stem, name) for name in names)
        lists["validation" if kept_out else "training"].append(item)
    if not lists["training"] and not lists["validation"]:
        raise InputError(f"none of the latents in {root} has a mask *{mask_suffix} in {masks_dir}")
    return lists


def _names(held_out: Sequence[str] | str | Path) -> list[str]:
    if not isinstance(held_out, (str, Path)):
        return list(held_out)
    if not str(held_out).endswith(".json"):
        raise InputError(f"held_out is {str(held_out)!r}; give a list of names, or a JSON file with one in 'held_out'")
    try:
        return list(json.loads(Path(held_out).read_text())["held_out"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{held_out} is no JSON file with a list of names under 'held_out' ({error!r})") from error
