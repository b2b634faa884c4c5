"""DICOM files from outside: found in folders and zip files, and read within limits (:mod:`.limits`)."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pydicom
from pydicom.dataset import Dataset
from pydicom.filereader import read_dataset
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from maisi_tools.errors import InputError
from maisi_tools.volumes.inputs import PREFIX, is_dicom, is_zip, zipped_dicom
from maisi_tools.volumes.limits import check_limit

MAX_COMPRESSION = 4096
"""Bytes of pixels that a compressed byte may stand for. A slice of nothing but air is a few hundred bytes in JPEG 2000,
and its header as many."""

PREAMBLE = 132
"""Bytes before a file's first element, "DICM" at their end (DICOM PS3.10 section 7.1)."""


class DicomFile:
    """One DICOM file, in a folder or in a zip file.

    Args:
        path: the file, or the zip file.
        member: its name in the zip file.
        archive: the zip file, open, for all its members: it is as long to open as it has members.

    Attributes:
        name: for messages.
        size: in bytes, out of the zip file.
    """

    def __init__(self, path: Path, member: str | None = None, archive: zipfile.ZipFile | None = None) -> None:
        self.path, self.member = path, member
        self.name = str(path) if member is None else f"{member} in {path}"
        if member is None:
            self.size = path.stat().st_size
        else:
            self._archive = archive or zipfile.ZipFile(path)
            self.size = self._archive.getinfo(member).file_size

    def read(self, **options: Any) -> Dataset:
        """The dataset; of a zip file's member, no more is unpacked than is asked for.

        Args:
            options: of :func:`pydicom.dcmread`.

        Raises:
            InputError: it is beyond a limit, or no intact DICOM.
        """
        check_limit("MAISI_MAX_FILE_BYTES", self.size, f"{self.name} has {self.size} bytes")
        with reading(self.name), self._open() as file:
            self._check_deflated(file)
            file.seek(0)
            whole = self.member is not None and not options.get("stop_before_pixels")
            # What comes here was found to be DICOM; force is for a file without preamble, which does not say so.
            dataset = pydicom.dcmread(io.BytesIO(file.read()) if whole else file, force=True, **options)
            if "TransferSyntaxUID" not in dataset.file_meta:
                implicit, _ = dataset.original_encoding  # as pydicom found it
                dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
            return dataset

    def check_claim(self, header: Dataset) -> None:
        """Refuse a header that claims more pixels than its file can hold, before they are made room for.

        Raises:
            InputError: it does.
        """
        with reading(self.name):
            rows, columns, frames, samples, bits = (
                int(header.get(keyword) or default)
                for keyword, default in (
                    *(("Rows", 0), ("Columns", 0), ("NumberOfFrames", 1)),
                    *(("SamplesPerPixel", 1), ("BitsAllocated", 16)),
                )
            )
            syntax = header.file_meta.TransferSyntaxUID
            packed = MAX_COMPRESSION if syntax.is_compressed or syntax.is_deflated else 1
        claim = f"{self.name} claims {columns} x {rows} pixels in {frames} frames"
        if rows * columns * frames * samples * bits > 8 * packed * self.size:
            raise InputError(
                f"{claim}, which its {self.size} bytes cannot hold; allowed is an intact object: send it again"
            )

    def _open(self) -> Any:
        return open(self.path, "rb") if self.member is None else self._archive.open(self.member)

    def _check_deflated(self, file: IO[bytes]) -> None:
        """Refuse a deflated dataset that is beyond the limit, without keeping it.

        Raises:
            InputError: it is.
        """
        file.seek(0)
        file.seek(PREAMBLE if file.read(PREAMBLE)[PREFIX] == b"DICM" else 0)
        meta = read_dataset(file, False, True, stop_when=lambda tag, vr, length: tag.group != 2)  # type: ignore[arg-type]
        if meta.get("TransferSyntaxUID") != DeflatedExplicitVRLittleEndian:
            return
        inflate, total = zlib.decompressobj(-zlib.MAX_WBITS), 0
        while data := file.read(1 << 16):
            while data:
                total += len(inflate.decompress(data, 1 << 20))
                data = inflate.unconsumed_tail
                check_limit("MAISI_MAX_FILE_BYTES", total, f"{self.name} has {total} bytes and more, inflated")


def is_system_error(error: BaseException) -> bool:
    """Whether the disk or the network failed; for a damaged object pydicom raises an OSError, too, without a number."""
    return isinstance(error, OSError) and error.errno is not None


@contextmanager
def reading(name: str | Path) -> Iterator[None]:
    """Turn what the libraries raise at a damaged or hostile object, which is nearly anything, into an InputError.

    Args:
        name: of the file, for the message.

    Raises:
        InputError: in place of anything but an error of the disk or of memory.
    """
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as error:
        if is_system_error(error):
            raise
        raise InputError(
            f"{name} cannot be read as DICOM ({type(error).__name__}: {error}); allowed is an intact object: export it "
            "again"
        ) from error


def list_dicom(path: Path) -> list[DicomFile]:
    """The DICOM files in a folder (searched deeper only where it has none itself) or zip file, by name; or the file."""
    if is_zip(path):
        names = zipped_dicom(path)
        archive = zipfile.ZipFile(path)  # closed when the last of its members is let go
        return [DicomFile(path, name, archive) for name in names]
    if not path.is_dir():
        return [DicomFile(path)] if is_dicom(path) else []
    files = sorted(entry for entry in path.iterdir() if is_dicom(entry))
    return [DicomFile(file) for file in files] or list_below(path)


def list_below(path: Path) -> list[DicomFile]:
    """The DICOM files in the folders of a folder, at any depth, by name."""
    folders = sorted(entry for entry in path.iterdir() if entry.is_dir()) if path.is_dir() else []
    return [DicomFile(file) for folder in folders for file in sorted(folder.rglob("*")) if is_dicom(file)]
