from __future__ import annotations

import threading
from pathlib import Path

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
    assert queue.counts()["dead"] == 1 and queue.in_use(tmp_path)
    assert [(state, job.error) for state, job in queue.listed()] == [("waiting", "no connection"), ("dead", "no mask")]
    assert queue.revive("1.2") and not queue.revive("1.1")
    assert queue.take().attempts == 1


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
