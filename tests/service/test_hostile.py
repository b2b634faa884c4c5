"""Mutated CT, SEG and RTSTRUCT objects, through the running listener and the readers.

Nothing raw, nothing outside the spool, nothing stopped, memory below 1 GB. ``MAISI_MUTANTS=200`` takes that many of
each kind in place of a few.
"""

from __future__ import annotations

import io
import json
import os
import random
import re
import sqlite3
import uuid
from pathlib import Path

import numpy as np
import pydicom
import pytest

pytest.importorskip("highdicom", reason="needs the extra 'dicom'")
pytest.importorskip("pynetdicom", reason="needs the extra 'dicom'")

from pydicom.filewriter import dcmwrite
from pynetdicom import AE

from maisi_tools.dicom.study import read_mask, write_study
from maisi_tools.errors import InputError
from maisi_tools.volumes.reading import read_volume

from .test_listener import Archive

COUNT = int(os.environ.get("MAISI_MUTANTS", "8"))
SEED = 20
SHAPE = (24, 20, 6)
OUTSIDE = "/tmp/maisi-hostile-outside"
RAW = re.compile(r"^\w*(Error|Exception|Warning): ")

VALUES = {
    "UI": ["", "..", "../../../x", OUTSIDE, "1" * 300, "1.2\0.3", "1..2", "a b"],
    "DS": ["", "nan", "inf", "-inf", "0", "-1", "1e300", "1e-300", "x", "1\\2\\3\\4\\5\\6\\7"],
    "IS": ["", "0", "-1", "99999999999", "x", "1.5"],
    "US": [0, 1, 4000, 65535],
    "CS": ["", "YES", "../../x", "\x1b[2J", "A" * 300, "CT", "SEG", "RTSTRUCT", "MR"],
    "SQ": [[]],
    "text": ["", "../../../x", "\n\x1b[2J\0", "x" * 5000, "$import os", "\N{SNOWMAN}", "{input}"],
}


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A study of a CT, SEG and RTSTRUCT, which does not say that it is synthetic."""
    mask = np.zeros(SHAPE, np.uint8)
    mask[2:20, 2:18], mask[5:12, 5:12, 1:5], mask[14:17, 6:10, 2:4] = 200, 1, 3
    hu = np.where(mask > 0, 40, -1000).astype(np.int16)
    files = write_study(tmp_path_factory.mktemp("original") / "study", hu, np.diag([5.0, 5.0, 3.4, 1.0]), mask)
    found: dict[str, list[pydicom.Dataset]] = {}
    for path in files:
        ds = pydicom.dcmread(path)
        del ds.SyntheticData
        found.setdefault(ds.Modality, []).append(ds)
    return found


def walk(ds):
    """(dataset, element) of a dataset, those in sequences included."""
    for element in list(ds):
        yield ds, element
        if element.VR == "SQ":
            for item in element.value:
                yield from walk(item)


def new_study(originals, kind):
    """Copies of the objects that a job of a kind needs, the mutated one or ones first, under UIDs of their own."""
    wanted = {"CT": ["CT"], "SEG": ["SEG"], "RTSTRUCT": ["RTSTRUCT", "CT"]}[kind]
    copies = [pydicom.dcmread(io.BytesIO(encoded(ds, meta=True))) for one in wanted for ds in originals[one]]
    renamed: dict[str, str] = {}
    for ds in copies:
        for owner, element in walk(ds):
            if element.VR == "UI" and str(element.value).startswith("2.25."):
                if str(element.value) not in renamed:
                    renamed[str(element.value)] = f"2.25.{uuid.uuid4().int}"
                owner[element.tag].value = renamed[str(element.value)]
        ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    return copies


def encoded(ds, meta=False) -> bytes:
    buffer = io.BytesIO()
    dcmwrite(buffer, ds, enforce_file_format=True)
    content = buffer.getvalue()
    return content if meta else content[144 + int.from_bytes(content[140:144], "little") :]  # as written, not as read


def mutate(chance: random.Random, objects: list[pydicom.Dataset], kind: str) -> list[bytes]:
    """The objects as they are sent, without file meta; those of the kind changed in one of five ways, once or twice."""
    mutated = [ds for ds in objects if ds.Modality == kind]
    if kind == "RTSTRUCT" and chance.random() < 0.3:
        mutated = [ds for ds in objects if ds.Modality == "CT"]
    positions = chance.random()
    for _ in range(chance.choice([1, 1, 2])):
        way = chance.choice(["set", "set", "delete", "number"])
        index, value = chance.random(), chance.random()
        for ds in mutated if chance.random() < 0.7 else mutated[:1]:
            elements = [pair for pair in walk(ds) if pair[1].VR not in ("OW", "OB") or positions < 0.1]
            owner, element = elements[int(index * len(elements))]
            if way == "delete":
                del owner[element.tag]
            elif way == "number" and element.VR in ("DS", "FD", "US", "IS") and element.value not in (None, ""):
                values = list(element.value) if element.VM > 1 else [element.value]
                values[int(value * len(values))] = float(values[0]) * 1000 if element.VR != "US" else 1000
                element._value = [str(one)[:16] for one in values] if element.VR in ("DS", "IS") else values[0]
            else:
                choices = VALUES.get(element.VR, VALUES["text"])
                element._value = choices[int(value * len(choices))]
                if element.VR == "SQ":
                    owner[element.tag].value = []
    contents = []
    for ds in objects:
        try:
            contents.append(encoded(ds))
        except Exception:  # pydicom cannot write it so
            contents.append(encoded_original(ds))
    if chance.random() < 0.4:
        number = contents[0] and 0
        content = bytearray(contents[number])
        for _ in range(chance.randint(1, 8)):
            content[chance.randrange(len(content))] = chance.randrange(256)
        cut = chance.randrange(len(content)) if chance.random() < 0.3 else len(content)
        contents[number] = bytes(content[:cut])
    return contents


def encoded_original(ds) -> bytes:
    """The file that `ds` was read from, with bytes of its header changed in place of elements."""
    content = bytearray(io.BytesIO(ds.buffer.getvalue()).getvalue()) if getattr(ds, "buffer", None) else bytearray(64)
    content[len(content) // 3] ^= 0xFF
    return bytes(content[144:])


def send(port: int, contents: list[bytes], objects: list[pydicom.Dataset]) -> list[int]:
    """C-STORE of datasets whatever is in them; their status, -1 for none."""
    ae = AE("ARCHIVE")
    kinds = {str(ds.file_meta.MediaStorageSOPClassUID) for ds in objects}
    for kind in kinds:
        ae.add_requested_context(kind, objects[0].file_meta.TransferSyntaxUID)
    found = []
    association = ae.associate("127.0.0.1", port, ae_title="MAISI")
    assert association.is_established
    for content, ds in zip(contents, objects, strict=True):
        carrier = pydicom.Dataset()
        carrier.file_meta = ds.file_meta
        carrier.SOPClassUID, carrier.SOPInstanceUID = (
            ds.file_meta.MediaStorageSOPClassUID,
            ds.file_meta.MediaStorageSOPInstanceUID,
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("pynetdicom.association.encode", lambda *_, content=content, **__: content)
            answer = association.send_c_store(carrier)
        found.append(answer.Status if answer else -1)
    association.release()
    return found


@pytest.fixture
def copying_bundle(tmp_path):
    """A bundle that writes its input as NAME_ct.nii.gz: what is tried here is the way in and out."""
    configs = tmp_path / "copies" / "configs"
    configs.mkdir(parents=True)
    run = ["$os.makedirs(@output_dir)", "$shutil.copy(@input, @output_dir + '/x_ct.nii.gz')"]
    content = {"imports": ["$import os", "$import shutil"], "input": "", "output_dir": "", "initialize": [], "run": run}
    (configs / "inference.json").write_text(json.dumps(content))
    (configs / "metadata.json").write_text(json.dumps({"version": "0", "name": "copies"}))
    return tmp_path / "copies"


@pytest.fixture
def archive(free_port):
    found = Archive(free_port())
    yield found
    found.close()


def gigabytes(listener, name: str) -> float:
    """Memory of the listener now: RssAnon is its own, RssFile the pages of libraries' files, which can be dropped."""
    text = Path(f"/proc/{listener.process.pid}/status").read_text()
    return int(re.search(rf"{name}:\s+(\d+)", text)[1]) / 1e6


def read_queue(path: Path) -> list[tuple[str, str, str]]:
    """(key, state, error) of every job."""
    return sqlite3.connect(f"file:{path}?mode=ro", uri=True).execute("SELECT key, state, error FROM jobs").fetchall()


@pytest.mark.timeout(3600)
def test_mutants_stop_nothing(listen, archive, originals, copying_bundle, tmp_path, capsys):
    chance = random.Random(SEED)
    chains = [{"when": kind, "steps": [{"bundle": str(copying_bundle)}]} for kind in ("CT", "SEG", "RTSTRUCT")]
    listener = listen(archive.port, real=True, chains=chains, attempts=2, retry_seconds=0.1)  # its memory is read
    port = listener.settings["listen"]["port"]
    taken = dict.fromkeys(("CT", "SEG", "RTSTRUCT"), 0)
    memory, libraries = [gigabytes(listener, "RssAnon")], gigabytes(listener, "RssFile")
    before = {path for path in tmp_path.rglob("*") if "spool" not in path.parts}
    for kind in taken:
        for _ in range(COUNT):
            objects = new_study(originals, kind)
            statuses = send(port, mutate(chance, objects, kind), objects)
            taken[kind] += statuses[0] == 0
            memory.append(gigabytes(listener, "RssAnon"))
            assert set(statuses) <= {0, 0xC000, -1} and listener.process.poll() is None
    good = new_study(originals, "RTSTRUCT")
    assert set(send(port, [encoded(ds) for ds in good], good)) == {0}
    queue = tmp_path / "spool" / "queue.sqlite"

    def over() -> bool:
        memory.append(gigabytes(listener, "RssAnon"))
        health = listener.health()
        states = {key: state for key, state, _ in read_queue(queue)}
        return states.get(str(good[0].SOPInstanceUID)) == "done" and health["waiting"] + health["running"] == 0

    listener.wait(over, 60 + 6 * COUNT)
    jobs = read_queue(queue)
    raw = [error for _, _, error in jobs if RAW.match(error)]
    log = listener.log.read_text()
    memory.append(gigabytes(listener, "RssAnon"))
    made = {path for path in tmp_path.rglob("*") if "spool" not in path.parts} - before
    with capsys.disabled():
        states = {state: sum(one == state for _, one, _ in jobs) for state in ("done", "dead")}
        print(f"\n{COUNT} of each: {taken} taken, {states}, {len(archive.objects)} objects back; memory from", end=" ")
        print(f"{memory[0]:.2f} to {max(memory):.2f} GB, and {libraries:.2f} GB of libraries' files")
    assert not raw and "Traceback" not in log
    assert not made and not list(Path("/tmp").glob("maisi-hostile-outside*"))
    assert max(memory) < 1.0
    stray = [path for path in (tmp_path / "spool" / "incoming").rglob("*") if len(path.parts) > len(tmp_path.parts) + 4]
    assert not stray
    listener.stop()
    assert listener.process.returncode == 0


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", ["CT", "SEG", "RTSTRUCT"])
def test_mutants_are_read_or_refused_in_words(originals, tmp_path, kind):
    """The readers themselves, on files: also what the listener would not take."""
    chance = random.Random(SEED + 1)
    for number in range(COUNT):
        objects = new_study(originals, kind)
        folder = tmp_path / str(number)
        (folder / "series").mkdir(parents=True)
        for index, (content, ds) in enumerate(zip(mutate(chance, objects, kind), objects, strict=True)):
            path = folder / ("series" if ds.file_meta.MediaStorageSOPClassUID.endswith(".2") else "") / f"{index}.dcm"
            meta = encoded(originals[kind][0], meta=True)[: 144 + originals[kind][0].file_meta[0x00020000].value]
            path.write_bytes(meta + content)
        try:
            if kind == "CT":
                read_volume(folder / "series", "ct")
            else:
                read_mask(folder / "0.dcm", None if kind == "SEG" else folder / "series")
        except InputError as error:
            assert len(str(error)) > 20
