"""What a run was: settings, versions and weights, in a file beside what it writes."""

from __future__ import annotations

import datetime
import json
import logging
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from maisi_tools.bundles.settings import running
from maisi_tools.files import RUN_RECORD, check_own_json, expanded, sha256, write_json
from maisi_tools.volumes.inputs import short_names

logger = logging.getLogger(__name__)

PACKAGES = ("maisi-bundles", "monai", "torch", "numpy", "nibabel", "pytorch-ignite")


def record_run(
    output_dir: str | os.PathLike,
    bundle_root: str | os.PathLike,
    weights: Sequence[str | os.PathLike],
    settings: Mapping[str, Any] | Sequence[str],
    more: Mapping[str, Any] | None = None,
) -> Path:
    """Write ``run.json`` into a run's output folder (of several ranks the first does); a later run there replaces it.

    Where an earlier run in the folder had other settings or weights, a warning says which: of its files those that are
    not written again stay.

    Args:
        output_dir: the folder.
        bundle_root: of the bundle that runs; its ``configs/metadata.json`` names version and bundle.
        weights: the files that are loaded.
        settings: the values that were chosen, JSON or convertible to text; or their keys in the config that runs.
        more: values beside them.

    Returns:
        The file: ``bundle``, ``version``, ``started`` (local time, ISO 8601), ``command``, ``settings``, ``weights``
        (file name, with as many folders as tell it from others, -> SHA-256), ``versions`` (package -> version) and
        ``machine``.

    Raises:
        InputError: there is a ``run.json`` that no run wrote.
    """
    path = expanded(output_dir) / RUN_RECORD
    if int(os.environ.get("RANK", 0)):  # as torchrun sets it
        return path
    check_own_json(path, lambda found: found.keys() >= {"settings", "weights"}, "run", "output_dir")
    if not isinstance(settings, Mapping):
        workflow = running()
        if workflow is None:
            raise ValueError("no config is being run whose values could be recorded; give the values")
        settings = {name: workflow.parser.get_parsed_content(name) for name in settings}
    metadata = json.loads((Path(bundle_root) / "configs" / "metadata.json").read_text())
    record = {
        "bundle": metadata.get("name"),
        "version": metadata.get("version"),
        "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": sys.argv,
        "settings": {**settings, **(more or {})},
        "weights": {name: sha256(file) for name, file in zip(short_names(weights), weights, strict=True)},
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "machine": f"{platform.system()} {platform.machine()}",
    }
    record = json.loads(json.dumps(record, default=str))
    _warn_changed(path, record)
    write_json(path, record)
    return path


def _warn_changed(path: Path, record: Mapping[str, Any]) -> None:
    try:
        earlier = json.loads(path.read_text())
        changed = [
            f"{name} {was[name]} (now {now.get(name)})"
            for was, now in ((earlier[part], record[part]) for part in ("settings", "weights"))
            for name in was
            if was[name] != now.get(name)
        ]
    except (OSError, ValueError, TypeError, KeyError):  # none, or one that something else wrote
        return
    if changed:
        logger.warning(
            "%s has files of an earlier run with %s; run.json becomes this run's, and a report will take all for it: "
            "give another output_dir to keep them apart",
            path.parent,
            ", ".join(changed),
        )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # a bundle with the package's modules beside it
        return None
