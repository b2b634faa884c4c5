"""Bundles as repositories of the Hugging Face Hub: the folder of one, and its model card."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from posixpath import normpath
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from maisi_tools.bundles.packaging import read_metadata, shipped_files
from maisi_tools.errors import InputError
from maisi_tools.files import expanded

PAGE = "docs/README.md"
"""The bundle's own page; the Hub shows the README.md at the top of a repository."""

LICENSES = {"Apache License": "apache-2.0", "MIT License": "mit"}
"""First line of a LICENSE -> the Hub's name of it."""

NEEDED = (
    *("version", "changelog", "task", "data_source", "intended_use", "authors", "network_data_format"),
    *("monai_version", "pytorch_version", "numpy_version", "required_packages_version"),
)
"""Keys of metadata.json that a model card says."""

_ORG = re.compile(r"[A-Za-z0-9]+(?:[._-][A-Za-z0-9]+)*", re.ASCII)
_LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")
_CODE = re.compile(r"^(```.*?^```)", re.MULTILINE | re.DOTALL)


def hub_folder(bundle: str | Path, output_dir: str | Path, org: str, pages: str | None = None) -> Path:
    """Write a bundle as the repository that ``monai.bundle download --source huggingface_hub`` fetches.

    It holds what the zip file does (see :func:`~maisi_tools.bundles.packaging.package_bundle`), at its top, with
    the bundle's page as model card: ``README.md`` in place of ``docs/README.md``.

    Args:
        bundle: its folder.
        output_dir: gets the folder NAME.
        org: the account on the Hub, for the commands in the card.
        pages: address of the folder that holds ``bundles``, for links that lead out of the bundle; without it, these
            become plain text.

    Returns:
        The folder.

    Raises:
        InputError: the folder is no bundle, its weights or its page are not there, `org` or `pages` is not usable, or
            the target exists.
    """
    root = Path(bundle).resolve()
    if not _ORG.fullmatch(str(org)):
        raise InputError(f"org {org!r} is no account of the Hub; allowed are letters and digits, with . _ - between")
    if pages is not None and not re.match(r"https?://\S+$", str(pages)):
        raise InputError(f"pages {pages!r} is no address; give one that begins with https://")
    target = expanded(output_dir) / root.name
    if target.exists():
        raise InputError(f"{target} exists; remove it, or give another output_dir")
    card = model_card(root, org, pages)
    files = shipped_files(root)
    del files[PAGE]
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=target.parent, prefix=".") as scratch:
        part = Path(scratch) / root.name
        for name, path in files.items():
            (part / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, part / name)
        (part / "README.md").write_text(card)
        part.rename(target)
    return target


def model_card(root: Path, org: str, pages: str | None = None) -> str:
    """The README.md of a bundle on the Hub.

    Front matter that the Hub sorts and searches by, from ``metadata.json`` and ``LICENSE``; the bundle's page
    (``docs/README.md``), with how to fetch it before the first heading; at the end what else the metadata say. The
    front matter names no ``datasets``: these are identifiers of the Hub, and `data_source` is text.

    Args:
        root: the bundle's folder.
        org: the account on the Hub.
        pages: as of :func:`hub_folder`.

    Raises:
        InputError: the page or the LICENSE is not there, or the metadata lack something that a card says.
    """
    metadata = read_metadata(root)
    if lacking := [key for key in NEEDED if key not in metadata]:
        raise InputError(f"{root / 'configs' / 'metadata.json'} lacks {', '.join(lacking)}, which a model card says")
    for name in (PAGE, "LICENSE"):
        if not (root / name).is_file():
            raise InputError(f"{root / name} does not exist; a model card is made of it: write it")
    first = (root / "LICENSE").read_text().split("\n", 1)[0].strip()
    license_name = LICENSES.get(first)
    front = {
        **({"license": license_name} if license_name else {"license": "other", "license_link": "LICENSE"}),
        "library_name": "monai",
        "pipeline_tag": pipeline_tag(metadata["network_data_format"]),
        "tags": ["monai", "medical", "ct", "synthetic-data"],
    }
    packages = metadata["required_packages_version"] | {"monai": metadata["monai_version"]}
    versions = {"torch": metadata["pytorch_version"], "numpy": metadata["numpy_version"], **packages}
    download = f"""## Get it

```bash
pip install {" ".join(sorted({**packages, "huggingface_hub": ""}))}
python -m monai.bundle download --name {root.name} --source huggingface_hub --repo {org}/{root.name} --bundle_dir .
cd {root.name}
```

The commands below run in this folder: the Python package that the configs name is in it. Those with `../` need the
bundle of that name beside it, those that begin with `maisi` the package installed.
"""
    rows = {
        "version": f"{metadata['version']}: {metadata['changelog'][metadata['version']]}",
        "task": metadata["task"],
        "data": metadata["data_source"],
        "intended use": metadata["intended_use"],
        "authors": metadata["authors"],
        "tested with": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }
    details = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    page = _linked((root / PAGE).read_text(), root, pages)
    head, heading, rest = page.partition("\n## ")
    matter = yaml.safe_dump(front, sort_keys=False)
    return (
        f"---\n{matter}---\n\n{head}\n{download}{heading}{rest.rstrip()}\n\n## Details\n\n| | |\n|---|---|\n{details}\n"
    )


def pipeline_tag(formats: Mapping[str, Any]) -> str:
    """The Hub's task of a network, by what goes into it and what comes out (``network_data_format``)."""
    given, made = formats["inputs"]["image"], formats["outputs"]["pred"]
    if given["format"] == "noise":
        return "unconditional-image-generation"
    return "image-segmentation" if made["format"] == "segmentation" else "image-to-image"


def _linked(page: str, root: Path, pages: str | None) -> str:
    """A bundle's page with links that lead on from the top of its folder; code is left as it is."""

    def moved(link: re.Match[str]) -> str:
        text, target = link.groups()
        if re.match(r"[a-z]+:|#", target):
            return link.group()
        path = normpath(f"{PurePosixPath(PAGE).parent}/{target}")
        if not path.startswith("../"):
            return f"[{text}]({path})"
        return text if pages is None else f"[{text}]({pages.rstrip('/')}/{normpath(f'bundles/{root.name}/{path}')})"

    parts = _CODE.split(page)
    return "".join(part if part.startswith("```") else _LINK.sub(moved, part) for part in parts)
