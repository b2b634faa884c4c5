"""Files that appear complete or not at all, tables, and fingerprints.

A fingerprint is a short hash of content, by which a file that was made from something tells whether that changed.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maisi_tools.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

RUN_RECORD = "run.json"
"""What a run says of itself, in its output folder (:mod:`maisi_tools.bundles.record`)."""

LENGTH = 32
"""Hexadecimal digits of a fingerprint: 128 bits of the SHA-256, so that two contents never share one by chance."""

CHUNK = 1 << 20  # bytes


def expanded(path: str | os.PathLike) -> Path:
    """A path with the folder of a user in place of its `~`, where a shell left that.

    Raises:
        InputError: it names a user that there is not.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise InputError(
            f"{path} begins with the name of no user of this machine; allowed is ~/ for your own folder: write the "
            "path in full"
        ) from None


@contextmanager
def replacing(path: str | os.PathLike, durable: bool = False) -> Iterator[Path]:
    """Yield a temporary path to write to; on success it is renamed to `path`, on an error it is removed.

    The temporary file lies beside the target, because a rename is atomic only within one file system, and keeps its
    suffixes, because nibabel and matplotlib choose the format by them; its name has the process id and the thread's, so
    that no two write into one. Missing folders are created.

    Args:
        path: the target.
        durable: wait until file, name and folder are on the disk, so that a power cut after this undoes none of them.

    Raises:
        OSError: the folder or file cannot be created.
        InputError: see :func:`expanded`.
    """
    path = expanded(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = part_of(path)
    try:
        yield part
        if durable:
            sync(part)
        part.replace(path)
        if durable:
            sync(path.parent)
            sync(path.parent.parent)
    finally:
        part.unlink(missing_ok=True)


def part_of(path: Path) -> Path:
    """A temporary name beside a path, this thread's own."""
    return path.with_name(f".{os.getpid()}-{threading.get_native_id()}-{path.name}")


def is_part(path: Path) -> bool:
    """Whether a file has a name of :func:`part_of`, as a killed process leaves them."""
    return re.match(r"\.\d+-\d+-", path.name) is not None


LOCK = ".lock"
"""In a folder that :func:`held` holds."""


@contextmanager
def held(folder: Path, words: str) -> Iterator[None]:
    """Hold a folder, made if missing; the operating system frees it when the process ends, however it ends.

    Args:
        folder: that one process at a time may work in.
        words: what is said where another one does.

    Raises:
        InputError: another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # of Unix alone; elsewhere nothing is held
        folder.mkdir(parents=True, exist_ok=True)
        yield
        return

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(words) from None
        yield


def sync(path: Path) -> None:
    """Wait until a file, or what a folder lists, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: str | os.PathLike, content: Any, durable: bool = False) -> None:
    """Write JSON, complete or not at all; see :func:`replacing`."""
    with replacing(path, durable) as part:
        part.write_text(json.dumps(content, indent=1) + "\n")


def read_json(path: str | os.PathLike) -> Any:
    """Return what a user's JSON file holds: UTF-8, whatever the machine's own encoding, and Windows' mark before it.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no JSON, or a key stands in an object twice, of which json would keep the last.
    """
    return parse_json(Path(path).read_text(encoding="utf-8-sig"))


def check_own_json(
    path: Path, is_ours: Callable[[Any], bool], writer: str, option: str, beside: Sequence[str] = ()
) -> None:
    """Refuse to write over a JSON file that somebody else wrote.

    Args:
        path: where nothing need be.
        is_ours: whether content has the form of ours; where asking is an error of its type, it has not.
        writer, option: for the message, who writes such files, and what says where.
        beside: names of what is written after it into its folder, which without it is somebody else's.

    Raises:
        InputError: there is one of another form, or that is no JSON, or one of `beside` and not it.
    """
    _check_own(path, lambda file: is_ours(read_json(file)), writer, option)
    if not path.exists():
        for name in beside:
            _check_own(path.with_name(name), lambda _: False, writer, option)


def check_own_table(path: Path, columns: Sequence[str], writer: str, option: str) -> None:
    """The same of a CSV file, which is ours with just these columns."""

    def is_ours(file: Path) -> bool:
        with open(file, newline="") as opened:
            return next(csv.reader(opened), None) == list(columns)

    _check_own(path, is_ours, writer, option)


def _check_own(path: Path, is_ours: Callable[[Path], bool], writer: str, option: str) -> None:
    try:
        ours = not path.exists() or is_ours(path)
    except (OSError, ValueError, TypeError, AttributeError, csv.Error):
        ours = False
    if not ours:
        raise InputError(
            f"{path} would be written over, and no {writer} wrote it; allowed are names that are free: give another "
            f"{option}, or move the file away"
        )


def parse_json(text: str | bytes | bytearray) -> Any:
    """Return what a user's JSON text holds.

    Raises:
        ValueError: as :func:`read_json`.
    """
    return json.loads(text, object_pairs_hook=_each_once)


def json_mapping(text: str, name: str) -> dict[str, Any]:
    """An option's JSON text as a mapping of keys.

    Raises:
        InputError: it is none, or a key stands in it twice.
    """
    try:
        found = parse_json(text)
    except ValueError as error:
        raise InputError(f'{name} {text!r} is no JSON ({error}); give for instance {{"patience": 3}}') from None
    if not isinstance(found, dict):
        raise InputError(f'{name} is {text!r}; give a mapping of keys, for instance {{"patience": 3}}')
    return found


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        raise ValueError(f"{', '.join(map(repr, twice))} stands there more than once")
    return found


def write_csv(path: str | os.PathLike, rows: Iterable[Mapping[str, Any]], columns: Sequence[str] | None = None) -> None:
    """Write a table, complete or not at all; see :func:`replacing`.

    Args:
        path: the target.
        rows: each column -> value; what a row lacks stays empty.
        columns: their names, in order; by default those of all rows, as they come.
    """
    rows = list(rows)
    names = list(dict.fromkeys(name for row in rows for name in row)) if columns is None else list(columns)
    with replacing(path) as part, open(part, "w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)


def sha256(path: str | os.PathLike) -> str:
    """SHA-256 of a file's bytes, all 64 hexadecimal digits."""
    digest = hashlib.sha256()
    _update(digest, Path(path))
    return digest.hexdigest()


def fingerprint_file(path: str | os.PathLike, counts: Callable[[Path], bool] | None = None) -> str:
    """Fingerprint of a file's bytes, or of the names and bytes of those files below a folder that count."""
    path, digest = Path(path), hashlib.sha256()
    below = (one for one in path.rglob("*") if one.is_file() and (counts is None or counts(one)))
    for file in sorted(below) if path.is_dir() else [path]:
        if path.is_dir():
            digest.update(os.fsencode(file.relative_to(path)) + b"\0")
        _update(digest, file)
    return digest.hexdigest()[:LENGTH]


def fingerprint_text(text: str) -> str:
    """Fingerprint of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:LENGTH]


def fingerprint_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Fingerprint of named tensors, whatever their order.

    Floating-point values count as float32: weights that are stored as fp16 have the fingerprint of the network they
    were loaded into.
    """
    import torch  # here: the command line reads files with this module, and its help does not wait for torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu()
        value = value.float() if value.is_floating_point() else value
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\0".encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:LENGTH]


def canonical_json(settings: Any) -> str:
    """JSON settings as one line, the same for settings that mean the same: keys sorted, nulls left out, 2 as 2.0."""
    return json.dumps(_canonical(settings), sort_keys=True)


def _canonical(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _canonical(entry) for key, entry in value.items() if entry is not None}
    if isinstance(value, (list, tuple)):
        return [_canonical(entry) for entry in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _update(digest: Any, file: Path) -> None:
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
