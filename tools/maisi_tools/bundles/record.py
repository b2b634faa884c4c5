"""What a run was: settings, versions and weights, in a file beside what it writes."""

from __future__ import annotations

import datetime
import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from maisi_tools.bundles.settings import running
from maisi_tools.files import sha256, write_json

RUN_RECORD = "run.json"

PACKAGES = ("maisi-bundles", "monai", "torch", "numpy", "nibabel", "pytorch-ignite")


def record_run(
    output_dir: str | os.PathLike,
    bundle_root: str | os.PathLike,
    weights: Sequence[str | os.PathLike],
    settings: Mapping[str, Any] | Sequence[str],
    more: Mapping[str, Any] | None = None,
) -> Path:
    """Write ``run.json`` into a run's output folder (of several ranks the first does); a later run there replaces it.

    Args:
        output_dir: the folder.
        bundle_root: of the bundle that runs; its ``configs/metadata.json`` names version and bundle.
        weights: the files that are loaded.
        settings: the values that were chosen, JSON or convertible to text; or their keys in the config that runs.
        more: values beside them.

    Returns:
        The file: ``bundle``, ``version``, ``started`` (local time, ISO 8601), ``command``, ``settings``, ``weights``
        (file name -> SHA-256), ``versions`` (package -> version) and ``machine``.
    """
    path = Path(output_dir).expanduser() / RUN_RECORD
    if int(os.environ.get("RANK", 0)):  # as torchrun sets it
        return path
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
        "weights": {Path(file).name: sha256(file) for file in weights},
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "machine": f"{platform.system()} {platform.machine()}",
    }
    write_json(path, json.loads(json.dumps(record, default=str)))
    return path


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # a bundle with the package's modules beside it
        return None
