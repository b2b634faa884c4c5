"""The application by itself, asked without a server: what goes wrong is said in plain words, and stops nothing else."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
import threading
import time
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest

from maisi_tools.studio import app as studio_app
from maisi_tools.studio import nvidia, planner, results, uploads
from maisi_tools.studio.app import make_app
from maisi_tools.studio.requests import Settings

PHANTOM = {"kind": "phantom", "body": "head_neck", "size": [48, 48, 48], "spacing": [5.0, 5.0, 3.4]}


@pytest.fixture
def store(folders, files):
    """``store(id)`` puts a job on disk as it is when it is done, with a CT and a mask; returns its folder."""

    def store(id, state="done", source=PHANTOM, **other):
        folder = folders.root / "jobs" / id
        folder.mkdir(parents=True)
        request = {"makes": "ct", "source": source, "edits": [], "settings": {"seed": 0, "device": "cpu"}}
        job = {"id": id, "request": request, "created": "2026-01-01", "state": state, "volumes": ["ct", "mask"]}
        (folder / "job.json").write_text(json.dumps({**job, **other}))
        for what in ("ct", "mask"):
            shutil.copy(files[what], folder / f"phantom_{what}.nii.gz")
        return folder

    return store


@pytest.fixture
def open_app(folders, python, monkeypatch):
    """``open_app()`` gives the application of what is on disk, with a worker that never takes a job."""
    monkeypatch.setattr(sys, "executable", python)  # of the process that plans
    return lambda: make_app(folders, [SimpleNamespace(device="cpu", pid=None, job=None)])


async def asked(app, method, path, body=b"", cut=False, leaves=False):
    """Status and JSON (or bytes) of the answer; with `cut` the client leaves before it has sent all, or else after."""
    path, _, query = path.partition("?")
    incoming = [{"type": "http.request", "body": body, "more_body": cut}]
    incoming += [{"type": "http.disconnect"}] * (cut or leaves)
    answer = {"body": b""}
    scope = {"type": "http", "method": method, "path": path, "query_string": query.encode(), "headers": []}
    scope |= {"http_version": "1.1", "scheme": "http", "server": ("127.0.0.1", 1), "root_path": ""}

    async def receive():
        return incoming.pop(0) if incoming else await asyncio.Event().wait()

    async def send(message):
        answer.update(message, body=answer["body"] + message.get("body", b""))

    await app(scope, receive, send)
    kind = dict(answer["headers"]).get(b"content-type", b"")
    return answer["status"], json.loads(answer["body"]) if kind == b"application/json" else answer["body"]


def ask(app, method, path, body=b"", **how):
    return asyncio.run(asked(app, method, path, body if isinstance(body, bytes) else json.dumps(body).encode(), **how))


def test_a_label_map_never_changes_its_meaning(open_app, folders):
    app = open_app()
    ours = {"name": "ours", "labels": {"7": "liver", "8": None}}
    assert ask(app, "POST", "/v1/label_maps", ours)[0] == 201
    status, answer = ask(app, "POST", "/v1/label_maps", {"name": "ours", "labels": {"7": "spleen", "8": None}})
    assert status == 409 and "the label map ours says something else" in answer["detail"]
    assert json.loads((folders.root / "label_maps" / "ours.json").read_text()) == {"7": "liver", "8": 0}
    assert ask(app, "POST", "/v1/label_maps", {"name": "ours", "labels": {"08": None, "7": "Liver"}})[0] == 201
    assert ask(app, "POST", "/v1/label_maps", {"name": "theirs", "labels": {"7": "spleen"}})[0] == 201


def test_an_entry_that_is_there_twice_is_refused(open_app, folders):
    app = open_app()
    job = (
        b'{"makes": "mask", "source": {"kind": "phantom"}, "edits": [{"insert": {"bone lesion": 9, "bone lesion": 8}}]}'
    )
    label_map = b'{"name": "ours", "labels": {"1": "liver", "1": "spleen"}}'
    for path, body, key in (("/v1/jobs", job, "'bone lesion'"), ("/v1/label_maps", label_map, "'1'")):
        status, answer = ask(app, "POST", path, body)
        assert status == 422 and f"{key} stands there more than once" in answer["detail"]
    assert not (folders.root / "label_maps").exists() and not (folders.root / "jobs").exists()


def test_what_nobody_waits_for_any_more_is_not_made(open_app, monkeypatch):
    monkeypatch.setattr(studio_app, "STILL_THERE", 0.01)
    app, wanted = open_app(), {"num_output_samples": 3, "body_region": ["head"]}

    async def states():
        return [job["state"] for job in (await asked(app, "GET", "/v1/jobs"))[1]]

    async def stays():
        waits = asyncio.create_task(asked(app, "POST", "/v1/maisi/run", json.dumps(wanted).encode()))
        await asyncio.sleep(0.2)
        found = await states()
        waits.cancel()
        return found

    assert ask(app, "POST", "/v1/maisi/run", wanted, leaves=True)[0] == 400
    assert asyncio.run(states()) == ["cancelled"] * 3
    assert asyncio.run(stays())[:3] == ["waiting"] * 3


@pytest.mark.parametrize("beside", [{"source": PHANTOM}, {"preset": "head_neck"}, {"source": PHANTOM, "preset": "x"}])
def test_a_plan_is_of_a_size_or_of_something_that_has_one(open_app, beside):
    status, answer = ask(open_app(), "POST", "/v1/plan", {"size": [48, 48, 48], **beside})
    words = f"the plan has size and {' and '.join(beside)}, which would change nothing; give one of them"
    assert (status, answer["detail"]) == (422, words)


def test_a_plan_that_takes_too_long_is_refused_and_the_next_one_made(open_app, monkeypatch):
    app = open_app()
    monkeypatch.setattr(planner, "PLANNING", 0.01)
    for _ in range(2):
        status, answer = ask(app, "POST", "/v1/plan", {"size": [48, 48, 48]})
        assert status == 422 and answer["detail"].startswith("planning a CT of 48 x 48 x 48 voxels takes longer than")
    monkeypatch.setattr(planner, "PLANNING", 60.0)
    status, answer = ask(app, "POST", "/v1/plan", {"size": [48, 48, 32]})
    assert status == 200 and answer["fits"]


def test_what_was_planned_waits_for_no_other_plan(open_app, monkeypatch):
    app, waits = open_app(), threading.Event()
    stages = [{"stage": "decoder", "bytes": 5, "refusal": ""}]
    monkeypatch.setattr(planner.Planner, "_ask", lambda self, asked: {"stages": stages})
    plan = {"size": [48, 48, 48]}
    first = ask(app, "POST", "/v1/plan", plan)
    monkeypatch.setattr(planner.Planner, "_ask", lambda self, asked: waits.wait(30) and {"stages": stages})

    async def at_once():
        async def asked_for(size):
            return await asked(app, "POST", "/v1/plan", json.dumps({"size": size}).encode())

        slow = asyncio.create_task(asked_for([64, 64, 64]))
        await asyncio.sleep(0.2)
        quick = await asyncio.wait_for(asked_for([48, 48, 48]), 10)
        assert not slow.done()
        waits.set()
        return quick, (await slow)[0]

    assert asyncio.run(at_once()) == (first, 200) and first[0] == 200


ODD = [None, True, 5, 1.5, "x", "\ud800", [], [[1]], ["x"], {}, {"a": 1}, [5, 5, [5]], {"\ud800": 1}, [{"a": [{}]}]]


SOURCES = {
    "phantom": {"body": "torso", "preset": None, "size": [9, 9, 9], "spacing": [4, 4, 4]},
    "generator": {"organ_sizes": {}},
    "upload": {"id": "bb", "label_map": "maisi"},
    "job": {"id": "cc"},
    "ct": {"id": "aa", "mask_id": "bb", "label_map": "maisi"},
}


def test_no_json_is_a_fault(open_app, folders):
    """Whatever is in the place of whichever field, the answer is that it is wrong, or that it is not."""
    for id, kind in (("aa", "ct"), ("bb", "mask")):
        known = {"id": id, "kind": kind, "file": "x.nii", "name": "x.nii", "size": [9, 9, 9], "spacing": [4, 4, 3]}
        known |= {"labels": [{"value": 1, "voxels": 9}]}
        (folders.root / "uploads" / id).mkdir(parents=True)
        (folders.root / "uploads" / id / "upload.json").write_text(json.dumps(known))
    app = open_app()
    job = {"makes": "ct", "source": {"kind": "phantom"}}
    plan = {"source": {"kind": "phantom"}, "memory_limit": "1"}
    run = {"num_output_samples": 1, "body_region": "head", "controllable_anatomy_size": [["liver", 1]]}  # wrong at last
    ours = {"name": "ours", "labels": {"1": "liver"}}
    verbs = ("insert", "resize", "remove", "augment", "flip", "shift_mm", "seed", "\ud800")
    planned = (*plan, "size", "spacing", "weights", "device", "preset")
    bodies = []
    for odd in ODD:
        bodies += [(path, odd) for path in ("/v1/jobs", "/v1/plan", "/v1/maisi/run", "/v1/label_maps")]
        bodies += [("/v1/jobs", {**job, name: odd}) for name in ("makes", "source", "edits", "settings", "\ud800")]
        for kind, right in SOURCES.items():
            sources = [{"kind": kind, **right, name: odd} for name in right]
            bodies += [("/v1/jobs", {**job, "source": one, "edits": [{"remove": "liver"}]}) for one in sources]
        bodies += [("/v1/jobs", {**job, "edits": [{"flip": True, verb: odd}]}) for verb in verbs]
        bodies += [("/v1/jobs", {**job, "settings": {name: odd}}) for name in (*Settings.__annotations__, "\ud800")]
        bodies += [("/v1/plan", {**plan, name: odd}) for name in planned]
        names = [name for name in nvidia.Body.__annotations__ if name not in run or odd not in (None, [])]
        bodies += [("/v1/maisi/run", {**run, name: odd}) for name in names]
        bodies += [("/v1/label_maps", {**ours, name: odd}) for name in ours]
        bodies += [("/v1/label_maps", {**ours, "labels": {"1": odd}})]

    async def answers():
        return [(*one, *await asked(app, "POST", one[0], json.dumps(one[1]).encode())) for one in bodies]

    assert not [one for one in asyncio.run(answers()) if one[2] not in (200, 201, 202, 409, 422, 429)]


def test_a_volume_is_read_while_no_other_one_is(open_app, store, monkeypatch):
    store("one")
    now, most = [], []

    def raw(path, what):
        now.append(what)
        most.append(len(now))
        time.sleep(0.05)
        now.remove(what)
        return {}, b""

    monkeypatch.setattr(results, "raw", raw)
    monkeypatch.setattr(results, "picture", lambda *args: raw(None, "picture") and args[0] / "job.json")
    monkeypatch.setattr(uploads, "describe_upload", lambda *args: raw(None, "upload")[0])
    app = open_app()

    async def at_once():
        paths = [("GET", f"/v1/jobs/one/{path}") for path in ("volumes/ct", "volumes/mask", "picture.png")]
        paths += [("POST", "/v1/uploads?kind=mask&name=a.nii")] * 2
        return await asyncio.gather(*(asked(app, *path, b"x") for path in paths))

    answers = asyncio.run(at_once())
    assert [status for status, _ in answers] == [200, 200, 200, 201, 201] and most == [1] * 5


@pytest.mark.parametrize(
    ("error", "status", "words", "others"),
    [
        (OSError(28, "No space left on device"), 507, "make room on its disk", "fault"),
        (OSError(30, "Read-only file system"), 507, "another --output_dir", "fault"),
        (PermissionError(13, "Permission denied", "x.nii"), 500, "cannot be read or written ([Errno 13]", "make room"),
        (OSError(5, "Input/output error"), 500, "Input/output error", "make room"),
        (MemoryError(), 413, "too large for this machine's memory", "fault"),
    ],
)
def test_what_the_machine_lacks_is_said(open_app, folders, monkeypatch, error, status, words, others):
    def fail(*_):
        raise error

    monkeypatch.setattr(uploads, "describe_upload", fail)
    found, answer = ask(open_app(), "POST", "/v1/uploads?kind=mask&name=a.nii", b"x")
    assert found == status and words in answer["detail"] and others not in answer["detail"]
    assert not list((folders.root / "uploads").iterdir())


@pytest.mark.parametrize("path", ["/v1/uploads?kind=mask&name=a.nii", "/v1/jobs"])
def test_a_client_that_leaves_is_no_fault(open_app, folders, path):
    ask(open_app(), "POST", path, b"{", cut=True)  # raised, it would be a traceback in the terminal
    assert not list((folders.root / "uploads").glob("*"))


def test_a_job_whose_folder_was_removed_stops_no_other(open_app, store):
    removed, kept = store("removed"), store("kept")
    app = open_app()
    shutil.rmtree(removed)
    status, jobs = ask(app, "GET", "/v1/jobs")
    found = {job["id"]: [file["name"] for file in job["files"]] for job in jobs}
    assert status == 200 and found == {"removed": [], "kept": sorted(path.name for path in kept.glob("*.gz"))}
    assert ask(app, "GET", "/v1/jobs/removed/volumes/ct")[0] == 404
    assert ask(app, "GET", "/v1/jobs/removed/picture.png")[0] == 404


def test_a_mask_is_taken_from_a_job_that_is_done(open_app, store):
    store("running", state="running")
    store("failed", state="failed")
    half = store("done") / ".1-2-phantom_mask.nii.gz"
    nib.save(nib.Nifti1Image(np.zeros((9, 9, 9), np.uint8), np.eye(4)), half)
    app = open_app()
    for id in ("running", "failed"):
        status, answer = ask(app, "POST", "/v1/jobs", {"makes": "mask", "source": {"kind": "job", "id": id}})
        assert status == 422 and "wait until it is done" in answer["detail"]
    plan = ask(app, "POST", "/v1/plan", {"source": {"kind": "job", "id": "done"}})[1]
    assert plan["size"] == [48, 48, 48]


def test_a_job_says_whether_there_is_dicom(open_app, store, folders, monkeypatch):
    monkeypatch.setattr(studio_app, "has_dicom", lambda: True)
    real = {"kind": "ct", "id": "aa", "mask_id": "bb"}
    store("made")
    store("edited", source=real)
    (store("series", source=real) / "scan_dicom").mkdir()
    store("mask", volumes=["mask"])
    store("waits", state="waiting")
    app = open_app()
    found = {job["id"]: job["dicom"] for job in ask(app, "GET", "/v1/jobs")[1]}
    assert found == {"made": True, "edited": False, "series": True, "mask": False, "waits": False}
    monkeypatch.setattr(studio_app, "has_dicom", lambda: False)
    assert not any(job["dicom"] for job in ask(app, "GET", "/v1/jobs")[1])


def test_a_half_read_upload_goes_and_a_folder_of_the_users_own_stays(open_app, folders):
    for name in ("0123456789abcdef", "patient 7", "0123456789abcdef_copy"):
        (folders.root / "uploads" / name).mkdir(parents=True)
        (folders.root / "uploads" / name / "scan.nii.gz").write_bytes(b"")
    open_app()
    assert {path.name for path in (folders.root / "uploads").iterdir()} == {"patient 7", "0123456789abcdef_copy"}


def test_an_edited_ct_is_there_without_the_upload_it_was_made_of(open_app, store, folders, files):
    store("edited", source={"kind": "ct", "id": "aa", "mask_id": "bb"}, volumes=["ct", "mask", "before"])
    folder = folders.root / "uploads" / "aa"
    folder.mkdir(parents=True)
    shutil.copy(files["ct"], folder / "scan.nii.gz")
    (folder / "upload.json").write_text(
        json.dumps({"id": "aa", "kind": "ct", "file": "scan.nii.gz", "name": "x.nii.gz"})
    )
    app = open_app()
    assert ask(app, "GET", "/v1/jobs/edited")[1]["volumes"] == ["ct", "mask", "before"]
    assert ask(app, "GET", "/v1/jobs/edited/volumes/before")[0] == 200
    for remove in ((folder / "scan.nii.gz").unlink, lambda: shutil.rmtree(folder)):
        remove()
        assert ask(app, "GET", "/v1/jobs/edited")[1]["volumes"] == ["ct", "mask"]  # what the page asks for
        paths = ("volumes/ct", "volumes/mask", "picture.png", "volumes/before", "dicom.zip")
        found = [ask(app, "GET", f"/v1/jobs/edited/{path}")[0] for path in paths]
        assert found == [200, 200, 200, 404, 404]  # it was no DICOM
