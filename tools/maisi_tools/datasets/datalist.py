"""Reads the datalists that training takes, as `maisi prepare` writes them."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from monai.data import load_decathlon_datalist

from maisi_tools.errors import InputError
from maisi_tools.files import read_json

logger = logging.getLogger(__name__)


def belongs(stem: str, name: str) -> bool:
    """Whether a file or latent called ``stem`` is one of the case ``name``."""
    return stem == name or stem.startswith(f"{name}_")


def read_datalist(
    datalist: str | Path, section: str, base_dir: str | Path | None = None, required: bool = True
) -> list[dict]:
    """Read one section ("training", "validation") of a MONAI (Decathlon) datalist.

    Args:
        datalist: JSON file with a list of dicts under ``section``; relative paths are relative to ``base_dir``, or to
            the datalist's own folder when ``base_dir`` is None. They come back absolute: another list, elsewhere, may
            be made of them.
        required: whether a missing or empty section is an error.

    Raises:
        InputError: no such file, it is not JSON or not such a list, an entry has not one file as image or as label, or
            the section is missing or empty.
    """
    path = Path(datalist)
    if not path.is_file():
        raise InputError(
            f"datalist {path} does not exist; make one with `maisi prepare FOLDER -o datalist.json`, "
            "or give a MONAI datalist with --datalist"
        )
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise InputError(f"datalist {path} cannot be read as JSON ({error}); make one with `maisi prepare`") from error
    listed = content.get(section, []) if isinstance(content, dict) else None
    if not isinstance(listed, list) or not all(isinstance(item, dict) and "image" in item for item in listed):
        raise InputError(
            f"datalist {path} has no list of {{'image': path}} under {section!r}, as training needs it; "
            "`maisi prepare` makes one of any data set"
        )
    for item in listed:
        files_of_entry(path, item)
    trained = {str(item.get("image")) for item in content.get("training") or [] if isinstance(item, dict)}
    if section == "validation" and (both := [item["image"] for item in listed if item["image"] in trained]):
        logger.warning(
            "datalist %s has %d volumes under training and validation, such as %s; weights are then chosen by what "
            "they were trained on: `maisi prepare` splits by patient",
            *(path, len(both), both[0]),
        )
    items: list[dict] = []
    if listed:
        base = Path(path.parent if base_dir is None else base_dir).absolute()
        items = load_decathlon_datalist(str(path), is_segmentation=True, data_list_key=section, base_dir=base)
        items = [{key: value for key, value in item.items() if key != "label" or value is not None} for item in items]
    if required and not items:
        raise InputError(f"datalist {path} has no entries under {section!r}; it needs at least one")
    return items


def files_of_entry(path: Path, entry: Any) -> tuple[str, str | None]:
    """The image and, where there is one, the mask of an entry of a list in the file `path`.

    Raises:
        InputError: it has not one file as image, or several as label.
    """
    image, label = (entry.get("image"), entry.get("label")) if isinstance(entry, Mapping) else (None, None)
    if not isinstance(image, str) or not isinstance(label, str | None):
        raise InputError(
            f"{path} has the entry {json.dumps(entry)[:200]}; allowed are entries with one file under 'image' and, "
            "where there is a mask, one under 'label'"
        )
    return image, label
