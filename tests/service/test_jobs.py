from __future__ import annotations

import sqlite3
import threading
from pathlib import Path

import pytest

from maisi_tools.errors import InputError
from maisi_tools.service.jobs import JobQueue


def test_jobs_are_taken_once_and_in_order(tmp_path):
    queue = JobQueue(tmp_path / "q.sqlite")
    assert queue.add("1.1", "SEG", "1", tmp_path) and queue.add("1.2", "CT", "1", tmp_path)
    assert not queue.add("1.1", "SEG", "1", tmp_path)
    first, second = queue.take(), queue.take()
    assert (first.key, first.attempts, second.key) == ("1.1", 1, "1.2") and queue.take() is None
    queue.finish(first, 2.5)
    assert not queue.add("1.1", "SEG", "1", tmp_path)  # done counts, too
    assert queue.counts() == {"waiting": 0, "running": 1, "done": 1, "dead": 0} and queue.seconds() == 2.5


def test_running_jobs_wait_again_after_a_crash_with_the_same_date(tmp_path):
    queue = JobQueue(tmp_path / "q.sqlite")
    queue.add("1.1", "SEG", "1", tmp_path)
    job = queue.take()
    again = JobQueue(tmp_path / "q.sqlite").take()  # the first one was never closed
    assert (again.key, again.received, again.attempts) == (job.key, job.received, 2)


def test_looking_at_the_jobs_changes_nothing(tmp_path):
    queue = JobQueue(tmp_path / "q.sqlite")
    queue.add("1.1", "SEG", "1", tmp_path)
    queue.take()
    assert JobQueue(tmp_path / "q.sqlite", recover=False).counts()["running"] == 1


def test_failures_come_back_later_or_never(tmp_path):
    queue = JobQueue(tmp_path / "q.sqlite")
    queue.add("1.1", "SEG", "1", tmp_path)
    queue.fail(queue.take(), "no connection", 3600)
    assert queue.take() is None and queue.counts()["waiting"] == 1
    queue.add("1.2", "SEG", "1", tmp_path)
    queue.fail(queue.take(), "no mask", None)
    assert queue.counts()["dead"] == 1 and queue.in_use("1")
    assert [(state, job.error) for state, job in queue.listed()] == [("waiting", "no connection"), ("dead", "no mask")]
    assert queue.revive("1.2") and not queue.revive("1.1")
    assert queue.take().attempts == 1


def test_a_dead_letter_keeps_no_study(tmp_path):
    """A study with one object that cannot be used would fill the disk for ever."""
    queue = JobQueue(tmp_path / "q.sqlite")
    queue.add("1.1", "CT", "1", tmp_path)
    assert queue.in_use("1") and not queue.in_use("2")
    queue.fail(queue.take(), "no volume", None)
    assert not queue.in_use("1")
    assert queue.revive("1.1") and queue.in_use("1")


@pytest.mark.parametrize("earlier", ["0123456789abcdef" * 2, "01234567 89abcdef"])
def test_a_part_that_comes_again_is_nothing_new(tmp_path, earlier):
    """What was done is done anew where something is there that was not before."""
    queue = JobQueue(tmp_path / "q.sqlite")
    queue.add("1.1", "CT", "1", tmp_path, "aaaaaaaaaaaaaaaa bbbbbbbbbbbbbbbb")
    queue.finish(queue.take(), 1.0, "2.1")
    assert queue.add("1.1", "CT", "1", tmp_path, "bbbbbbbbbbbbbbbb") == ""
    assert queue.add("1.1", "CT", "1", tmp_path, "aaaaaaaaaaaaaaaa bbbbbbbbbbbbbbbb") == "" and queue.superseded() == 0
    assert queue.add("1.1", "CT", "1", tmp_path, "aaaaaaaaaaaaaaaa bbbbbbbbbbbbbbbb cccccccccccccccc") == "queued anew"
    queue.finish(queue.take(), 1.0, "2.2")
    with queue._transaction() as file:
        file.execute("UPDATE jobs SET content=?", (earlier,))
    assert queue.add("1.1", "CT", "1", tmp_path, "aaaaaaaaaaaaaaaa") == ""
    assert queue.add("1.1", "CT", "1", tmp_path, "aaaaaaaaaaaaaaaa dddddddddddddddd") == "queued anew"
    with queue._transaction() as file:
        file.execute("UPDATE jobs SET content=?", (earlier,))
    job = queue.take()
    assert queue.add("1.1", "CT", "1", tmp_path, "aaaaaaaaaaaaaaaa dddddddddddddddd") == ""  # looked at while it runs
    queue.finish(job, 1.0, "2.3")
    assert queue.counts()["done"] == 1


def test_what_is_moved_to_another_study_is_done_there(tmp_path):
    """As a PACS merges patients: the same objects, and what an earlier version knew of them."""
    queue = JobQueue(tmp_path / "q.sqlite")
    for state, content in (("done", "a" * 16), ("done", "01234567"), ("dead", "b" * 16)):
        queue.add(state + content, "CT", "1", tmp_path / "1", content)
        job = queue.take()
        queue.finish(job, 1.0, "2.1") if state == "done" else queue.fail(job, "no volume", None)
        assert queue.add(state + content, "CT", "2", tmp_path / "2", content) == "queued anew"
        job = queue.take()
        assert (job.study, job.folder, job.attempts) == ("2", str(tmp_path / "2"), 1)
        assert job.replaces == ("2.1" if state == "done" else "")
        queue.finish(job, 1.0, "2.2")
    queue.add("1.1", "CT", "1", tmp_path / "1", "a" * 16)
    assert queue.add("1.1", "CT", "2", tmp_path / "2", "a" * 16) == ""  # it still waits
    job = queue.take()
    assert job.study == "2" and queue.in_use("2") and not queue.in_use("1")
    assert queue.add("1.1", "CT", "3", tmp_path / "3", "a" * 16) == ""  # while it runs
    queue.finish(job, 1.0, "2.3")
    assert queue.take().study == "3"


def test_a_dead_letter_whose_study_comes_again_is_tried_again(tmp_path):
    queue = JobQueue(tmp_path / "q.sqlite")
    queue.add("1.1", "SEG", "1", tmp_path, "aaaaaaaaaaaaaaaa")
    queue.fail(queue.take(), "no mask", None)
    assert queue.add("1.1", "SEG", "1", tmp_path, "aaaaaaaaaaaaaaaa") == ""
    queue.forget("1")
    assert queue.add("1.1", "SEG", "1", tmp_path, "aaaaaaaaaaaaaaaa") == "queued anew"
    assert queue.take().attempts == 1 and queue.superseded() == 0


def test_attempts_that_do_not_count(tmp_path):
    queue = JobQueue(tmp_path / "q.sqlite", attempts=2)
    queue.add("1.1", "SEG", "1", tmp_path)
    for _ in range(5):
        job = queue.take()
        assert job.attempts == 1
        queue.fail(job, "the archive is away", 0.0, counts=False)
    queue.take()
    assert JobQueue(tmp_path / "q.sqlite", attempts=2).counts()["waiting"] == 1  # killed once, not twice


def test_threads_share_it(tmp_path):
    queue = JobQueue(tmp_path / "q.sqlite")
    taken: list[str] = []

    def work(number: int) -> None:
        for i in range(10):
            queue.add(f"{number}.{i}", "CT", "1", Path("x"))
        while (job := queue.take()) is not None:
            taken.append(job.key)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == len(set(taken)) == 40


def test_a_job_that_kills_the_process_is_given_up(tmp_path):
    """As one that runs out of memory: every start takes it, and dies; the others come first after its first time."""
    path = tmp_path / "q.sqlite"
    JobQueue(path).add("1.1", "SEG", "1", tmp_path, "a")
    assert JobQueue(path, attempts=3).take().key == "1.1"
    JobQueue(path, attempts=3).add("1.2", "SEG", "1", tmp_path, "a")
    taken = [(job.key, job.attempts) for job in (JobQueue(path, attempts=3).take() for _ in range(4))]
    assert taken == [("1.2", 1), ("1.1", 2), ("1.2", 2), ("1.1", 3)]
    queue = JobQueue(path, attempts=3)
    assert queue.counts() == {"waiting": 1, "running": 0, "done": 0, "dead": 1}
    (dead,) = [job for state, job in queue.listed() if state == "dead"]
    assert dead.key == "1.1" and "died each of the 3 times" in dead.error


def test_what_changes_while_its_job_runs_is_done_anew(tmp_path):
    queue = JobQueue(tmp_path / "q.sqlite")
    queue.add("1.1", "CT", "1", tmp_path, "six slices")
    job = queue.take()
    assert queue.add("1.1", "CT", "1", tmp_path, "twelve slices") == ""
    queue.finish(job, 1.0, "7.7")
    again = queue.take()
    assert (again.content, again.replaces, again.attempts) == ("twelve slices", "7.7", 1) and queue.superseded() == 1
    assert queue.add("1.1", "CT", "1", tmp_path, "thirteen slices") == ""
    queue.fail(again, "no mask", None)  # a dead letter that was no result
    third = queue.take()
    assert (third.content, third.replaces, third.error) == ("thirteen slices", "7.7", "") and queue.superseded() == 1
    assert queue.seconds() == 1.0  # a counter, which never falls
    queue.fail(third, "no mask", None)
    assert queue.add("1.1", "CT", "1", tmp_path, "fourteen slices") == "queued anew"


@pytest.mark.parametrize("trouble", ["locked", "full"])
def test_a_queue_that_could_not_be_written_goes_on_afterwards(tmp_path, trouble):
    path = tmp_path / "q.sqlite"
    queue = JobQueue(path)
    queue.add("1.1", "SEG", "1", tmp_path)
    other = sqlite3.connect(path, isolation_level=None)
    if trouble == "locked":
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            queue.take()
        other.execute("ROLLBACK")
    else:
        (pages,) = queue._file.execute("PRAGMA page_count").fetchone()
        queue._file.execute(f"PRAGMA max_page_count={pages}")
        with pytest.raises(sqlite3.OperationalError, match="full"):  # and no other error in its place
            for number in range(1000):
                queue.add(f"2.{number}", "SEG", "1" * 64, tmp_path)
        queue._file.execute("PRAGMA max_page_count=100000")
    assert queue.take().key == "1.1"
    assert queue.add("3.1", "SEG", "1", tmp_path) == "queued"


def test_a_file_that_is_no_queue_is_refused_by_name(tmp_path):
    path = tmp_path / "q.sqlite"
    path.write_bytes(b"something else, and longer than a header of SQLite is" * 40)
    with pytest.raises(InputError, match=r"q\.sqlite cannot be used.*move it away"):
        JobQueue(path)


def test_the_file_is_its_owners_and_an_older_one_goes_on(tmp_path):
    path = tmp_path / "q.sqlite"
    old = sqlite3.connect(path)
    old.execute(
        "CREATE TABLE jobs (key TEXT PRIMARY KEY, kind TEXT, study TEXT, folder TEXT, received TEXT, "
        "attempts INTEGER DEFAULT 0, error TEXT DEFAULT '', state TEXT DEFAULT 'waiting', due REAL DEFAULT 0, "
        "seconds REAL DEFAULT 0)"
    )
    old.execute(
        "INSERT INTO jobs (key, kind, study, folder, received, state) VALUES ('1.1','CT','1','x','2026','done')"
    )
    old.commit()
    old.close()
    path.chmod(0o644)
    queue = JobQueue(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert queue.add("1.1", "CT", "1", tmp_path, "its content") == ""  # done before contents were known
    assert queue.add("1.1", "CT", "1", tmp_path, "another") == "queued anew"


def test_errors_are_kept_as_one_line_whatever_is_in_them(tmp_path):
    queue = JobQueue(tmp_path / "q.sqlite")
    queue.add("1.1", "SEG", "1", tmp_path)
    queue.fail(queue.take(), "a\n\x1b[2J\udc80" + "x" * 10000, None)
    ((_, job),) = queue.listed()
    assert job.error.startswith(r"a\n\x1b[2J\udc80xxx") and len(job.error) < 2100
