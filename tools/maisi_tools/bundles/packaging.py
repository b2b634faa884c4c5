"""Bundles as downloads: NAME_vVERSION.zip, which runs where only MONAI and the bundle's packages are installed."""

from __future__ import annotations

import ast
import functools
import json
import logging
import re
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

import maisi_tools
from maisi_tools.errors import InputError
from maisi_tools.files import expanded, replacing

logger = logging.getLogger(__name__)

PARTS = ("configs", "docs", "models", "scripts", "LICENSE", "large_files.yml")
"""What of a bundle's folder is shipped; runs and outputs in it are not."""

EPOCH = (1980, 1, 1, 0, 0, 0)
"""Time of every file in the zip, the earliest that the format knows: bytes depend on the content alone."""

PACKAGE = maisi_tools.__name__

LICENCES = "docs/data_license.txt"
"""Where a bundle says of each file in ``models`` ("NAME: DATA" a line) what it was trained on."""

_NAME = re.compile(r"[A-Za-z0-9][\w-]*", re.ASCII)

_LICENSED = re.compile(r"^(\S+): ", re.MULTILINE)

_NAMED = re.compile(rf"\b{PACKAGE}(?:\.\w+)*")


def package_bundle(
    bundle: str | Path, output_dir: str | Path, overlays: Sequence[str] = (), name: str | None = None
) -> Path:
    """Write a bundle, with the modules of this package that it and the bundles beside it need, as one zip file.

    The zip holds the folder NAME. MONAI finds the modules in it when it is the working folder, MONAI Label always does.
    Nothing is compressed (weights hardly would be), so the same content gives the same bytes everywhere. Weights that
    ``large_files.yml`` lists are left to `maisi weights` and ``monai.bundle download_large_files``. Others that
    ``docs/data_license.txt`` does not name, which may be anybody's under any licence, are left out, which is said.

    Args:
        bundle: its folder.
        output_dir: gets ``NAME_vVERSION.zip``.
        overlays: configs of the bundle that its ``inference.json`` is to have over it, see :func:`merged_config`.
        name: of the folder in the zip, by default the bundle's. One with overlays is another bundle, so it needs one.

    Returns:
        The zip file.

    Raises:
        InputError: the folder is no bundle, its weights or an overlay are not there, or name and overlays do not fit.
    """
    root = Path(bundle).resolve()
    title = root.name if name is None else name
    if (title != root.name) != bool(overlays) or (overlays and not _NAME.fullmatch(title)):
        raise InputError(
            f"{root.name} is given the overlays {', '.join(overlays) or 'none'} and the name {title!r}; allowed is a "
            "name of its own (letters, digits, _, -) with overlays, and none without: give both, such as --overlay "
            "edit.json,monailabel_edit.json --name maisi_edit"
        )
    files = shipped_files(root)
    made = {"configs/inference.json": merged_config(root, overlays)} if overlays else {}
    target = expanded(output_dir) / f"{title}_v{read_metadata(root)['version']}.zip"
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as part, zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(files):
            entry = zipfile.ZipInfo(f"{title}/{path}", EPOCH)
            entry.external_attr = 0o644 << 16
            entry.create_system = 3  # Unix, wherever it is made
            archive.writestr(entry, made.get(path) or files[path].read_bytes())
    return target


def merged_config(root: Path, overlays: Sequence[str]) -> bytes:
    """A bundle's ``inference.json`` with overlays over it, as MONAI merges them, for programs that open it alone.

    Args:
        root: the bundle's folder.
        overlays: names of its configs, each over the ones before.

    Raises:
        InputError: there is no such config.
    """
    from monai.bundle import ConfigParser  # seconds, which a plain package does not wait for

    files = [root / "configs" / name for name in ("inference.json", *overlays)]
    if missing := [path.name for path in files if not path.is_file() or path.parent != root / "configs"]:
        known = ", ".join(sorted(path.name for path in (root / "configs").glob("*.json")))
        raise InputError(f"{root.name} has no config {', '.join(missing)}; allowed as overlay are {known}")
    merged = ConfigParser.load_config_files([str(path) for path in files])
    return (json.dumps(merged, indent=4) + "\n").encode()


def read_metadata(root: Path) -> dict[str, Any]:
    """What a bundle says of itself.

    Raises:
        InputError: the folder is no bundle.
    """
    metadata = root / "configs" / "metadata.json"
    if not metadata.is_file():
        raise InputError(f"{metadata} does not exist; give a bundle's folder, such as bundles/maisi_vae")
    return json.loads(metadata.read_text())


def shipped_files(root: Path) -> dict[str, Path]:
    """What a download of a bundle holds, by the path in it: its own files, and the modules that it needs.

    Raises:
        InputError: the folder is no bundle, or its weights are not there.
    """
    read_metadata(root)
    files = {path.relative_to(root).as_posix(): path for path in _bundle_files(root)}
    if not any(name.startswith("models/") for name in files):
        raise InputError(f"{root / 'models'} holds no weights; a bundle is packaged with its own: put them there")
    source = Path(maisi_tools.__file__).parent
    # Of all bundles: MONAI Label loads several into one process, where the first one's package serves the others.
    needed = needed_files(root.parent.glob("*/configs/*.json"))
    return files | {f"{PACKAGE}/{path.relative_to(source).as_posix()}": path for path in needed}


def needed_files(configs: Iterable[Path]) -> set[Path]:
    """Files of this package that some configs need: the modules they name, what these import, and data beside them."""
    source = Path(maisi_tools.__file__).parent
    names = {name for config in configs for name in _NAMED.findall(config.read_text())}
    modules: set[Path] = set()
    waiting = {path for name in names for path in _modules_on(name, source)}
    while waiting:
        path = waiting.pop()
        modules.add(path)
        imported = _imports_of(path, path.stat().st_mtime_ns)
        waiting |= {found for name in imported for found in _modules_on(name, source)} - modules
    folders = {path.parent for path in modules}
    data = {path for folder in folders for path in folder.iterdir() if path.suffix in (".json", ".csv", ".css", ".js")}
    return modules | data


def _bundle_files(root: Path) -> list[Path]:
    listed, licences = root / "large_files.yml", root / LICENCES
    large = {entry["path"] for entry in yaml.safe_load(listed.read_text())["large_files"]} if listed.is_file() else ()
    known = set(_LICENSED.findall(licences.read_text())) if licences.is_file() else None
    found: list[Path] = []
    for path in (path for part in PARTS for path in (root / part, *sorted((root / part).rglob("*")))):
        name = path.relative_to(root)
        if not path.is_file() or any(part.startswith(".") or part == "__pycache__" for part in name.parts):
            continue
        if name.as_posix() in large:
            continue
        if name.parts[0] == "models" and known is not None and path.name not in known:
            logger.warning("%s of %s is left out: %s does not say what it was trained on", name, root.name, LICENCES)
            continue
        found.append(path)
    return found


def _modules_on(name: str, source: Path) -> set[Path]:
    """The files that importing a dotted name of this package runs; its last parts may be attributes."""
    found = {source / "__init__.py"}
    folder = source
    for part in name.split(".")[1:]:
        if (folder / f"{part}.py").is_file():
            found.add(folder / f"{part}.py")
            break
        folder /= part
        if not (folder / "__init__.py").is_file():
            break
        found.add(folder / "__init__.py")
    return found


@functools.cache
def _imports_of(path: Path, changed: int) -> frozenset[str]:
    """Dotted names of this package that a file imports; read once as long as it was not `changed`."""
    return frozenset(name for node in ast.walk(ast.parse(path.read_text())) for name in _imported(node))


def _imported(node: ast.AST) -> list[str]:
    """Dotted names of this package that a statement imports, also inside a function."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and not node.level:
        names = [f"{node.module}.{alias.name}" for alias in node.names]
    else:
        return []
    return [name for name in names if name.split(".")[0] == PACKAGE]
