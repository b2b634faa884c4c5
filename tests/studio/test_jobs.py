"""The queue with real workers: one that is killed, one that ends, a disk that is full, a server that comes back."""

from __future__ import annotations

import asyncio
import datetime
import json
import os
import signal
import sys

import nibabel as nib
import numpy as np
import pytest

from maisi_tools.studio.folders import Folders
from maisi_tools.studio.jobs import Full, Jobs, Worker, parsed
from maisi_tools.studio.uploads import describe_upload
from preloaded import WAITS

PHANTOM = {"kind": "phantom", "body": "head_neck", "size": [48, 48, 48], "spacing": [5.0, 5.0, 3.4]}
LONG = {
    "makes": "ct",
    "source": PHANTOM,
    "edits": [],
    "settings": {"seed": 0, "device": "cpu", "weights": "small", "num_inference_steps": 1000},
}
SHORT = {"makes": "mask", "source": PHANTOM, "edits": [], "settings": {"seed": 0, "device": "cpu"}}


@pytest.fixture
def play(folders: Folders, python: str, monkeypatch: pytest.MonkeyPatch):
    """``play(scene)`` runs ``scene(jobs, worker)`` in a loop, with a worker."""
    monkeypatch.setattr(sys, "executable", python)

    def play(scene, waiting: int = 100):
        async def run():
            worker = Worker(folders, "cpu")
            jobs = Jobs(folders, [worker], waiting)
            jobs.start()
            try:
                return await asyncio.wait_for(scene(jobs, worker), WAITS)
            finally:
                jobs.close()

        return asyncio.run(run())

    return play


async def until(true):
    while not true():
        await asyncio.sleep(0.02)


def test_a_job_whose_worker_is_killed_is_tried_once_more_and_others_go_on(play):
    async def scene(jobs, worker):
        job, next_one = jobs.add(LONG, []), jobs.add(SHORT, [])
        for attempt in (1, 2):
            await until(lambda: job.attempts == attempt and job.progress and job.progress["step"])  # noqa: B023
            if attempt == 2:
                assert "tried once more" in job.notes[0] and "SIGKILL" in job.notes[0]
            os.kill(worker.pid, signal.SIGKILL)
            await until(lambda: job.attempts > attempt or job.state == "failed")  # noqa: B023
        await jobs.finished([job, next_one])
        assert job.state == "failed" and "was killed 2 times" in job.error and "memory_limit" in job.error
        assert next_one.state == "done"

    play(scene)


def test_a_job_is_never_made_by_a_fork_that_was_not_given_it(play, folders):
    async def scene(jobs, worker):
        await until(lambda: worker.pid is not None)
        os.kill(worker.pid, signal.SIGSTOP)  # it will not read what it is given
        cancelled = jobs.add(SHORT, [])
        jobs.cancel(cancelled)
        await until(lambda: worker.pid is not None)
        os.kill(worker.pid, signal.SIGSTOP)
        twice = jobs.add(SHORT, [])
        os.kill(worker.pid, signal.SIGKILL)
        await jobs.finished([twice])
        next_one = jobs.add(SHORT, [])
        await jobs.finished([next_one])
        return cancelled, twice, next_one

    cancelled, twice, next_one = play(scene)
    assert [job.state for job in (cancelled, twice, next_one)] == ["cancelled", "done", "done"]
    assert [path.name for path in folders.job(cancelled.id).iterdir()] == ["job.json"]
    first, last = (folders.job(job.id) / "phantom_mask.nii.gz" for job in (twice, next_one))
    assert twice.finished < next_one.started and first.stat().st_mtime < last.stat().st_mtime
    assert first.stat().st_mtime <= datetime.datetime.fromisoformat(twice.finished).timestamp()  # not made once more


def test_half_a_line_stops_no_worker(play):
    async def scene(jobs, worker):
        await until(lambda: worker.pid is not None)
        worker.process.stdin.write('": 3}}\n')
        job = jobs.add(SHORT, [])
        await jobs.finished([job])
        assert job.state == "done"

    play(scene)
    assert list(parsed(['{"id": "x", "prog', "\n", '{"gone": 5}\n'])) == [{"gone": 5}]


def test_a_worker_that_ends_as_a_whole_is_started_again(play):
    async def scene(jobs, worker):
        await until(lambda: worker.pid is not None)
        job = jobs.add(LONG, [])
        await until(lambda: job.progress is not None)
        first = worker.process
        worker.interrupt()
        first.kill()
        next_one = jobs.add(SHORT, [])
        await until(lambda: job.attempts == 2)
        jobs.cancel(job)
        await jobs.finished([job, next_one])
        assert (job.state, next_one.state) == ("cancelled", "done") and worker.process is not first

    play(scene)


def test_a_worker_that_cannot_start_is_given_up(play, folders, monkeypatch, tmp_path, caplog):
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho broken >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))

    async def run():
        jobs = Jobs(folders, [Worker(folders, "cpu")], 9)
        jobs.start()
        await until(lambda: "does not start" in caplog.text)
        assert not jobs.ready
        jobs.close()

    asyncio.run(asyncio.wait_for(run(), 30))
    assert (folders.root / "worker-cpu.log").read_text().count("broken") == 3


def test_what_goes_wrong_in_a_job_is_said_in_plain_words(play):
    def edited(edit):
        return {**SHORT, "edits": [edit]}

    async def scene(jobs, worker):
        made = [
            jobs.add(edited({"insert": {"bone lesion": 400}}), []),
            jobs.add(edited({"insert": {"colon cancer primaries": 20}}), []),
            jobs.add(edited({"remove": ["hepatic tumor"]}), []),
            jobs.add(SHORT, []),
        ]
        await jobs.finished(made)
        assert [job.state for job in made] == ["failed"] * 3 + ["done"]
        assert "no organ in the mask has room" in made[0].error
        assert "allowed is a mask with the organ" in made[1].error
        assert "hepatic tumor is not in the mask" in made[2].error
        assert "Traceback" not in "".join(job.error for job in made[:3])

    play(scene)


def test_what_was_left_out_of_an_upload_is_among_the_notes_of_its_jobs(play, folders):
    folder = folders.root / "uploads" / "aa"
    folder.mkdir(parents=True)
    (affine := np.diag([4.0, 4.0, 2.5, 1.0]))[0, 1] = 1.0  # a sheared grid is warned of once more when the job reads it
    nib.save(nib.Nifti1Image(np.ones((20, 10, 6), np.uint8), affine), folder / "mask.nii.gz")
    known = describe_upload(folder, "mask.nii.gz", "theirs.nii.gz", "mask")
    left_out = "theirs.nii.gz: what is left out, so that it counts as body: GTV primary (27 voxels)"
    (folder / "upload.json").write_text(json.dumps({**known, "notes": [left_out, *known["notes"]]}))

    async def scene(jobs, worker):
        job = jobs.add({**SHORT, "source": {"kind": "upload", "id": "aa", "label_map": "maisi"}}, [])
        await jobs.finished([job])
        assert job.state == "done" and job.notes == [left_out, *known["notes"]], (job.error, job.notes)

    assert known["notes"][0].startswith("theirs.nii.gz is sheared")
    play(scene)


def test_a_full_disk_is_said_and_nothing_is_lost(play, folders, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    async def scene(jobs, worker):
        job = jobs.add(SHORT, [])
        monkeypatch.setattr("maisi_tools.studio.jobs.write_json", full)
        with pytest.raises(OSError, match="No space left"):
            jobs.add(SHORT, [])
        await jobs.finished([job])
        assert job.state == "done" and "No space left on device" in job.notes[-1]
        assert len(jobs.newest_first()) == 1
        monkeypatch.undo()

    play(scene)
    assert [job.state for job in Jobs(folders, [], 9).newest_first()] in (["failed"], ["waiting"])  # not made, or again


def test_so_many_jobs_may_wait(play):
    async def scene(jobs, worker):
        first = jobs.add(LONG, [])
        await until(lambda: first.state == "running")
        waiting = [jobs.add(SHORT, []) for _ in range(2)]
        with pytest.raises(Full):
            jobs.add(SHORT, [])
        assert [jobs.position(job) for job in (first, *waiting)] == [None, 0, 1]
        jobs.cancel(waiting[0])
        assert jobs.position(waiting[1]) == 0
        jobs.cancel(first)
        await jobs.finished([first, *waiting])
        assert [job.state for job in (first, *waiting)] == ["cancelled", "cancelled", "done"]

    play(scene, waiting=2)


def test_jobs_on_disk_are_taken_up_again(play, folders):
    async def before(jobs, worker):
        done = jobs.add(SHORT, [])
        await jobs.finished([done])
        running, waiting = jobs.add(LONG, []), jobs.add(SHORT, [])
        await until(lambda: running.progress is not None)
        return done, running, waiting

    done, running, waiting = play(before)
    damaged = folders.root / "jobs" / "damaged"
    damaged.mkdir()
    (damaged / "job.json").write_text("{")

    async def after(jobs, worker):
        assert jobs.newest_first()[-1] == done and len(jobs.newest_first()) == 3
        await until(lambda: jobs[running.id].progress is not None)
        jobs.cancel(jobs[running.id])
        await jobs.finished([jobs[waiting.id]])
        assert jobs[waiting.id].state == "done"

    play(after)


@pytest.mark.parametrize(
    "changes",
    [
        {"request": {}},
        {"request": None},
        {"request": {**SHORT, "settings": {}}},
        {"request": {**SHORT, "settings": {"device": ["cpu"]}}},
        {"request": {key: SHORT[key] for key in ("edits", "settings")}},
        {"created": None},
        {"id": "another"},
        {"id": "../x"},
    ],
)
def test_an_odd_job_is_passed_over(folders, caplog, changes):
    right = {"id": "odd", "request": SHORT, "created": "2026-01-01"}
    for id, job in (("odd", {**right, **changes}), ("right", {**right, "id": "right"})):
        (folders.root / "jobs" / id).mkdir(parents=True)
        (folders.root / "jobs" / id / "job.json").write_text(json.dumps(job))
    assert [job.id for job in Jobs(folders, [], 9).newest_first()] == ["right"]
    assert "odd/job.json is no job and is passed over" in caplog.text


def test_a_job_of_a_device_that_is_gone_fails_in_plain_words(folders):
    other = Jobs(folders, [type("Nobody", (), {"device": "cuda:1", "pid": None, "job": None})()], 9)
    job = other.add({**SHORT, "settings": {"seed": 0, "device": "cuda:1"}}, [])
    (found,) = Jobs(folders, [], 9).newest_first()
    assert found.id == job.id and found.state == "failed" and "no cuda:1" in found.error
