"""Code that a bundle brings along, in the folder ``scripts`` beside ``configs``, as in MONAI's model zoo."""

from __future__ import annotations

import importlib.util
import os
import sys
from types import ModuleType

from maisi_tools.errors import InputError
from maisi_tools.files import expanded


def bundle_script(bundle_root: str | os.PathLike, name: str) -> ModuleType:
    """The module ``scripts/NAME.py`` of a bundle, whatever the working directory.

    It is loaded by its path and not as ``scripts.NAME``: that name would be the same in two bundles of one process.

    Raises:
        InputError: the bundle has no such file.
    """
    path = expanded(bundle_root).resolve() / "scripts" / f"{name}.py"
    key = f"bundle_script:{path}"
    if key in sys.modules:
        return sys.modules[key]
    if not path.is_file():
        raise InputError(f"{path} does not exist; give the bundle's folder with --bundle_root")
    spec = importlib.util.spec_from_file_location(key, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[key] = module
    return module
