"""What the user calls "input" becomes a sorted list of items; where the output goes is checked before computing."""

from __future__ import annotations

import errno
import glob
import json
import logging
import os
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from maisi_tools.errors import InputError, first_few
from maisi_tools.files import expanded, fingerprint_file, fingerprint_text, read_json
from maisi_tools.volumes.limits import check_limit

logger = logging.getLogger(__name__)

SUFFIXES = (".nii.gz", ".nii", ".seg.nrrd", ".nrrd")
"""Volume files that are read: NIfTI and NRRD."""

DATALIST_SECTIONS = ("testing", "validation", "training")
"""Sections of a MONAI (Decathlon) datalist; the first one present is the input, unless others are asked for."""

TRAINED = ("training",)
"""The section of which synthetic data are made: of those of held-out patients a network would learn these."""

ALLOWED = (
    f"a volume file ({', '.join(SUFFIXES)}), a folder or zip file with one DICOM series, the file of an Enhanced CT or "
    "MR, a folder of those, a glob, a list of them, or a datalist (JSON)"
)

DAMAGES = (errno.EINVAL, errno.ENAMETOOLONG, errno.EEXIST)
"""What the system says of the offsets and the names in a damaged zip file."""

PREFIX, HEAD = slice(128, 132), 512
"""Where a DICOM file says that it is one, and how much of it has its SOP Class."""

BARE_STARTS, BARE_CLASS = (b"\x02\0", b"\x08\0"), b"1.2.840.10008.5.1.4.1.1."
"""How one begins that was stored without preamble and prefix, with the group of its first element, and the root of the
SOP Classes of stored objects, one of which it names soon after."""

DIRECTORY = b"\x02\x00\x02\x00UI\x14\x001.2.840.10008.1.3.10"
"""That element of a DICOMDIR, as it is stored (DICOM PS3.10 section 7.1): Media Storage Directory Storage."""

NO_CT = ("_mask", "_latent", "_sigma", "_coarse", "_seg", "_label", "_weight")
"""Ends of the stems of volumes that are no CT."""

OURS = frozenset(("metrics", "from_scan", "scale_factor", "organ_ml", "added_labels", "sources", "weights"))
"""Keys of which the JSON that a run leaves beside its volume has one, in this version and in earlier ones. Those of
scanners' software, such as dcm2niix, and of BIDS are spelt otherwise: Modality, Sources."""

BLOCK, PARTS = 4096, 31
"""Bytes that :func:`glimpse_input` reads in one place, and into how many parts the places divide a file: a prime, by
which the places are seldom all the corners of slices, which are air."""

IsOne = Callable[[Path], bool]


def stem_of(path: str | os.PathLike) -> str:
    """Name that the outputs of an input carry: the file name without its volume suffix, or the folder's name."""
    name = Path(path).name
    if name in ("", "..") and os.fspath(path):  # the folder one is in, or the one above
        name = Path(path).resolve().name
    suffix = name[-4:] if name.lower().endswith((".zip", ".dcm")) else _volume_suffix(name)
    return name[: -len(suffix)] if suffix and not os.path.isdir(path) else name


def sidecar_path(path: str | os.PathLike) -> Path:
    """Where a volume's JSON sidecar lies: beside it, same stem, suffix .json."""
    return Path(path).with_name(stem_of(path) + ".json")


def study_dir(volume: str | os.PathLike, output_dir: str | os.PathLike) -> Path:
    """The folder of the DICOM study that a run writes of a volume, named by its file."""
    return expanded(output_dir) / f"{stem_of(volume)}_dicom"


def find_inputs(
    input: Any,
    key: str = "image",
    folder_is_one: Callable[[Path], bool] | None = None,
    sections: Sequence[str] = (),
    prefer: str = "",
    skip: tuple[str, ...] = (),
    unique: bool = True,
) -> list[dict[str, str]]:
    """The items that `input` names, as a MONAI data list ``[{key: path}, ...]`` in a fixed order.

    Args:
        input: one of

            - a volume file (.nii, .nii.gz, .nrrd), a folder or zip file that holds one DICOM series, or a DICOM file
              with all of it (Enhanced CT or MR);
            - a folder of volume files and of folders and zip files of DICOM series (not searched any deeper);
            - a glob pattern (files that are no volumes are passed over);
            - a datalist: a JSON file with a list of paths or of ``{key: path}``, or with such a list under
              "testing", "validation" or "training" (see `sections`); paths are relative to the JSON file;
            - a list of these, or of ``{key: path}`` dicts; further entries of a dict are kept, but for what is null.
        key: the entry of an item that holds the path.
        folder_is_one: tells folders that are one item each, as those of one DICOM series always are.
        sections: of a datalist that are taken, such as :data:`TRAINED`; by default the
            first one present of :data:`DATALIST_SECTIONS`, those that are held out. A warning says what is left out.
        prefer: of a folder or a glob where names end so, only these are taken, such as "_latent.nii.gz".
        skip: of a folder or a glob, volumes whose stems end so are left out, such as :data:`NO_CT`; a warning says how
            many.
        unique: refuse two inputs of one stem, which outputs are named by.

    Returns:
        Items in the order given; those of a folder or of a glob sorted by path.

    Raises:
        InputError: nothing found or nothing but what is skipped, a missing file, a file type that is not read, a
            datalist with none of the `sections`, or two inputs of one stem.
    """
    entries = [input] if isinstance(input, (str, os.PathLike, Mapping)) else input
    if not isinstance(entries, Sequence):
        raise InputError(f"input is {input!r}; allowed is {ALLOWED}")

    def is_one(folder: Path) -> bool:
        return (folder_is_one is not None and folder_is_one(folder)) or holds_dicom(folder)

    items = [item for entry in entries for item in _items_of(entry, key, sections, is_one, prefer, skip)]
    if not items:
        raise InputError(f"input {input!r} holds no item; give at least one: {ALLOWED}")
    if unique:
        check_stems(item[key] for item in items)
    return items


def find_cts(input: Any, unique: bool = True) -> list[dict[str, str]]:
    """The items of :func:`find_inputs`, of folders and globs without what has the name of no CT (:data:`NO_CT`)."""
    return find_inputs(input, skip=NO_CT, unique=unique)


def short_names(paths: Sequence[str | os.PathLike]) -> list[str]:
    """A name for each input that no other has: its stem, with as many folders before it as tell it from the others."""
    files = [Path(path).absolute() for path in paths]
    names: dict[Path, str] = {}
    for folders in range(max((len(file.parts) for file in files), default=0)):
        tails = {file: (*file.parts[max(0, len(file.parts) - 1 - folders) : -1], stem_of(file)) for file in files}
        count = Counter(tails.values())
        names = {file: str(Path(*tail)) for file, tail in tails.items() if count[tail] == 1} | names
    return [names.get(file, str(file)) for file in files]


def check_stems(paths: Iterable[str | os.PathLike]) -> None:
    """Refuse two inputs of one stem, by which outputs and rows of tables are named.

    Raises:
        InputError: there are two.
    """
    by_stem: dict[str, str | os.PathLike] = {}
    for path in paths:
        if (stem := stem_of(path)) in by_stem:
            raise InputError(
                f"inputs {by_stem[stem]} and {path} have the same stem {stem!r}, so their outputs would overwrite "
                "each other; allowed are different names: rename one or run them into different output folders"
            )
        by_stem[stem] = path


def check_output_dir(
    path: str | os.PathLike,
    items: Sequence[Mapping[str, Any]] = (),
    suffixes: Sequence[str] = (),
    key: str = "image",
) -> Path:
    """Create the output folder if it is missing and prove that it can be written, by writing and removing a file.

    Args:
        path: the folder.
        items: inputs, see :func:`find_inputs`, whose outputs have their stems.
        suffixes: of the outputs of each, such as "_ct".
        key: the entry of an item that holds the path, or "name", that of a sample which is made of no file.

    Raises:
        InputError: the folder cannot be made or written, or an output would be written over an input, or over a file
            that no earlier run wrote, see :func:`check_earlier`.
    """
    folder = expanded(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".writable-"):
            pass
    except OSError as error:
        raise InputError(
            f"output_dir {folder} cannot be written ({error.strerror or error}); allowed is a folder that this user "
            "may create and write: give another output_dir, or change its permissions"
        ) from error
    inputs = [item[key] for item in items]
    outputs = [[folder / f"{stem_of(one)}{suffix}.nii.gz" for suffix in suffixes] for one in inputs]
    if key != "name":
        check_targets(inputs, [path for of_one in outputs for path in of_one], folder)
    for of_one in outputs:
        check_earlier(of_one)
    return folder


def check_earlier(outputs: Sequence[Path]) -> None:
    """Refuse to write the outputs of one item over a file that no earlier run wrote.

    Raises:
        InputError: one of them is there, and beside none the JSON that a run leaves, see :func:`of_a_run`.
    """
    there = [file for path in outputs for file in (path, sidecar_path(path)) if file.exists()]
    if there and not any(map(of_a_run, outputs)):
        raise InputError(
            f"{there[0]} would be written over, and no earlier run wrote it (there is no JSON of one beside it); "
            "allowed are names that are free: give another output_dir, or move the file away"
        )


def of_a_run(path: Path) -> bool:
    """Whether a run wrote a volume, or was about to: there is a JSON beside it with a key of :data:`OURS`."""
    try:
        content = read_json(sidecar_path(path))
    except (OSError, ValueError):
        return False
    return isinstance(content, Mapping) and not OURS.isdisjoint(content)


def check_targets(
    inputs: Iterable[str | os.PathLike], targets: Iterable[Path], output_dir: str | os.PathLike | None = None
) -> None:
    """Refuse to write over an input, by whatever path it is named.

    Args:
        inputs: files and folders that are read; those that do not exist are passed over.
        targets: files and folders that will be written.
        output_dir: where they go; None for a file whose whole path was given.

    Raises:
        InputError: a target is an input, or a folder that holds one, or a file of a folder that is one.
    """
    there = {(status.st_dev, status.st_ino): path for path in targets if path.exists() for status in [path.stat()]}
    for given in (expanded(path) for path in inputs) if there else ():
        parts = [given, *(given.iterdir() if given.is_dir() else ()), *given.resolve().parents]
        for status in (part.stat() for part in parts if part.exists()):
            if (target := there.get((status.st_dev, status.st_ino))) is not None:
                advice = (
                    "allowed is another path: give another output"
                    if output_dir is None
                    else f"output_dir is {output_dir}; allowed is another folder than that of the inputs: give another "
                    "output_dir"
                )
                raise InputError(
                    f"{target} would be written over, which is the input {given}, or a part of it or the folder it "
                    f"lies in; {advice}"
                )


def fingerprint_input(path: str | os.PathLike) -> str:
    """Fingerprint of a volume's file or folder; of a DICOM series its own files count, not what lies beside them."""
    folder = Path(path)
    return fingerprint_file(folder, is_dicom if folder.is_dir() and holds_dicom(folder) else None)


def glimpse_input(path: str | os.PathLike) -> str:
    """Fingerprint of a part of what :func:`fingerprint_input` reads, which takes next to no time.

    It is of each file's size and of a few blocks of it: of a .gz the last, which has the checksum of all its content
    (RFC 1952), of another file those at its ends and between, of a file in a folder one near its middle. A change
    between the blocks that keeps the size is not seen.
    """
    given = Path(path)
    if not given.is_dir():
        return fingerprint_text(_glimpse(given, range(PARTS + 1)))
    counts = is_dicom if holds_dicom(given) else Path.is_file
    files = sorted(file for file in given.rglob("*") if file.is_file() and counts(file))
    return fingerprint_text(json.dumps([[str(file.relative_to(given)), _glimpse(file, (17,))] for file in files]))


def _glimpse(file: Path, places: Iterable[int]) -> str:
    """The size of a file and its blocks at some of :data:`PARTS`; of a .gz at the last."""
    size, blocks = file.stat().st_size, b""
    with file.open("rb", buffering=0) as stream:
        for place in (PARTS,) if file.name.endswith(".gz") else places:
            stream.seek(max(0, size - BLOCK) * place // PARTS)
            blocks += stream.read(BLOCK)
    return f"{size} {blocks.hex()}"


def _items_of(
    entry: Any, key: str, sections: Sequence[str], is_one: IsOne, prefer: str, skip: tuple[str, ...]
) -> list[dict[str, str]]:
    """The items of one element of the input: a path, a glob, a datalist or a datalist's entry."""
    if isinstance(entry, Mapping):
        return [_item(entry, key, Path(), is_one)]
    if not isinstance(entry, (str, os.PathLike)):
        raise InputError(f"input has an entry {entry!r}; allowed is {ALLOWED}")
    path = expanded(entry)
    if path.suffix.lower() == ".json":
        return _read_datalist(path, key, sections, is_one)
    paths = _expand(path, is_one)
    if left := [found for found in paths if stem_of(found).endswith(skip)] if skip and paths != [str(path)] else []:
        names = first_few([Path(found).name for found in left])
        if len(left) == len(paths):
            raise InputError(
                f"{path} holds no CT, by their names: {names}; allowed are volumes whose names do not end in "
                f"{', '.join(skip)}: rename them, or name them one by one"
            )
        logger.warning("%s: %d volumes that are no CT by their names are left out (%s)", path, len(left), names)
        paths = [found for found in paths if found not in left]
    return [{key: found} for found in [path for path in paths if path.endswith(prefer)] or paths]


def _item(entry: Mapping, key: str, base: Path, is_one: IsOne) -> dict[str, str]:
    """One datalist entry with its path made relative to `base` and checked."""
    if not isinstance(entry.get(key), (str, os.PathLike)):
        raise InputError(
            f"a datalist entry has the keys {sorted(map(str, entry))} and no path under {key!r}; "
            f"allowed are entries {{{key!r}: path}}: rename the key in the datalist"
        )
    path = base / expanded(entry[key])
    if not path.exists():
        raise InputError(f"{path} (named in a datalist) does not exist; correct the path, relative to the datalist")
    return {**_said(entry), key: _single(path, is_one)}


def _said(entry: Mapping) -> dict:
    """A datalist's entry without what is null in it, which MONAI's collation could not carry."""
    said = {name: _said(value) if isinstance(value, Mapping) else value for name, value in entry.items()}
    return {name: value for name, value in said.items() if value is not None and value != {}}


def _read_datalist(path: Path, key: str, wanted: Sequence[str], is_one: IsOne) -> list[dict[str, str]]:
    try:
        content = read_json(path)
    except OSError as error:
        raise InputError(f"input {path} cannot be read ({error.strerror}); allowed is {ALLOWED}") from error
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}); allowed as .json is a datalist: correct the file") from error
    if isinstance(content, Mapping):
        sections = [name for name in DATALIST_SECTIONS if content.get(name)]
        if not sections:
            raise InputError(
                f"datalist {path} has the keys {sorted(content)}; allowed is a list, or a list under one of "
                f"{', '.join(DATALIST_SECTIONS)}"
            )
        taken = [name for name in sections if name in wanted] if wanted else sections[:1]
        if not taken:
            given, allowed = (" and ".join(map(repr, names)) for names in (sections, wanted))
            raise InputError(
                f"datalist {path} has cases under {given} alone, which are kept out of this; allowed are those under "
                f"{allowed}: name the files themselves if that is meant"
            )
        parts = {name: content[name] for name in sections}
    else:
        parts, taken = {"": content}, [""]
    if wrong := [part for part in parts.values() if not isinstance(part, list)]:
        raise InputError(f"datalist {path} holds a {type(wrong[0]).__name__}; allowed is a list of {{{key!r}: path}}")
    if left := [f"{len(part)} of {name!r}" for name, part in parts.items() if name not in taken]:
        logger.warning("%s: %s taken, %s left out", path, " and ".join(map(repr, taken)), ", ".join(left))
    content = [entry for name in taken for entry in parts[name]]
    entries = [{key: entry} if isinstance(entry, str) else entry for entry in content]
    for entry in entries:
        if not isinstance(entry, Mapping):
            raise InputError(f"datalist {path} has an entry {entry!r}; allowed are paths and {{{key!r}: path}}")
    return [_item(entry, key, path.parent, is_one) for entry in entries]


def _expand(path: Path, is_one: IsOne) -> list[str]:
    """All inputs that one path or glob pattern stands for, sorted."""
    if path.is_dir():
        if is_one(path) and not holds_dicom(path):
            return [str(path)]
        entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
        found = [entry for entry in entries if _is_volume(entry, is_one)]
        if not any(is_dicom(entry) for entry in entries):
            if not found and not holds_dicom(path):
                raise InputError(f"folder {path} holds no volume and no DICOM series; allowed is {ALLOWED}")
            return [str(entry) for entry in found or [path]]
        if found:
            raise InputError(
                f"folder {path} holds DICOM slices and also {found[0].name}; allowed is the one or the other: name the "
                "volume itself, or put the series into a folder of its own"
            )
    if path.exists():
        return [_single(path, is_one)]
    if glob.has_magic(str(path)):
        matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
        found = [match for match in matches if _is_volume(match, is_one)]
        if not found:
            raise InputError(f"glob {path} matches {len(matches)} files and none is a volume; allowed is {ALLOWED}")
        return [str(match) for match in found]
    raise InputError(f"input {path} does not exist; allowed is {ALLOWED}: correct the path")


def _single(path: Path, is_one: IsOne) -> str:
    """A volume file, or a folder, zip file or file of one DICOM series, as a string."""
    if not (_is_volume(path, is_one) or is_dicom(path)):
        what = "a folder without DICOM files" if path.is_dir() else "no supported file type"
        raise InputError(
            f"input {path} is {what}; allowed are {', '.join(SUFFIXES)}, folders or zip files of one DICOM series, and "
            "the file of an Enhanced CT or MR: give the folder of the DICOM files, or convert it to NIfTI"
        )
    return str(path)


def is_dicom(path: Path) -> bool:
    """Whether `path` is a DICOM file, with its prefix or without, and not the directory of a medium (DICOMDIR)."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return _is_object(file.read(HEAD))


def _is_object(head: bytes) -> bool:
    return DIRECTORY not in head if head[PREFIX] == b"DICM" else head.startswith(BARE_STARTS) and BARE_CLASS in head


def is_zip(path: Path) -> bool:
    """Whether `path` is a zip file by its name."""
    return path.name.lower().endswith(".zip") and path.is_file()


@contextmanager
def unzipping(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open a zip file; a damaged one makes the libraries raise nearly anything, and that becomes an InputError.

    Raises:
        InputError: in place of anything but an error of the disk or of memory.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (InputError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno not in (None, *DAMAGES):
            raise
        raise InputError(
            f"{path} cannot be read ({error}); allowed is an intact zip file without a password: zip the folder again"
        ) from error


def zipped_dicom(path: Path) -> list[str]:
    """Names of the DICOM files in a zip file, at any depth, sorted.

    Raises:
        InputError: it is no zip file, is encrypted, or holds more than the limits allow.
    """
    with unzipping(path) as archive:
        entries, names = archive.infolist(), []
        total = sum(entry.file_size for entry in entries)
        check_limit("MAISI_MAX_ZIP_MEMBERS", len(entries), f"{path} holds {len(entries)} files")
        check_limit("MAISI_MAX_ZIP_BYTES", total, f"{path} holds {total} bytes, unpacked")
        for name in sorted(entry.filename for entry in entries if not entry.is_dir()):
            with archive.open(name) as file:
                if _is_object(file.read(HEAD)):
                    names.append(name)
        return names


def holds_dicom(path: Path) -> bool:
    """Whether it is a DICOM file, or one is directly in the folder, or anywhere in the zip file or below a DICOMDIR."""
    if not path.is_dir():
        return bool(zipped_dicom(path)) if is_zip(path) else is_dicom(path)
    entries = list(path.iterdir())
    is_medium = any(entry.name.upper() == "DICOMDIR" and entry.is_file() for entry in entries)
    return any(is_dicom(entry) for entry in (*entries, *(path.rglob("*") if is_medium else ())))


def _is_volume(path: Path, is_one: IsOne) -> bool:
    if path.is_dir():
        return is_one(path)
    if is_zip(path):
        return holds_dicom(path)
    return _volume_suffix(path.name) is not None


def is_volume(path: Path) -> bool:
    """Whether a path has the name of a volume file, and not of a hidden one."""
    return not path.name.startswith(".") and _volume_suffix(path.name) is not None


def _volume_suffix(name: str) -> str | None:
    return next((suffix for suffix in SUFFIXES if name.lower().endswith(suffix) and len(name) > len(suffix)), None)
