"""YAML files whose mappings are the fields of dataclasses, checked key by key."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from maisi_tools.errors import InputError


def read_yaml(path: Path, what: str, page: str) -> Any:
    """The content of a YAML file.

    Args:
        path: the file.
        what: what a message calls it.
        page: of the documentation, to look it up.

    Raises:
        InputError: no such file, or no YAML.
    """
    try:
        return yaml.safe_load(path.read_text())
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:  # ValueError: bytes, dates or numbers
        raise InputError(f"{what} {path} cannot be read as YAML ({error}); see {page}") from error


def checked_fields(kind: Any, content: Any, where: str) -> dict[str, Any]:
    """A mapping whose keys are fields of the dataclass `kind`, none unknown and no needed one missing, as a new dict.

    Args:
        kind: the dataclass.
        content: what the file has.
        where: what a message calls it.

    Raises:
        InputError: it is no such mapping.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}
    if not isinstance(content, Mapping):
        raise InputError(f"{where} is {content!r}; allowed is a mapping with some of {', '.join(fields)}")
    if unknown := sorted(map(str, set(content) - set(fields))):
        raise InputError(f"{where} has {', '.join(unknown)}; allowed are {', '.join(fields)}")
    missing = [
        name
        for name, field in fields.items()
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING and name not in content
    ]
    if missing:
        raise InputError(f"{where} has no {', '.join(missing)}; add it")
    return dict(content)
