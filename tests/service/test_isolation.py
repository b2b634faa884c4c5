"""A listener whose jobs, queue, disk or callers fail: what is wrong with one is said, and the rest goes on."""

from __future__ import annotations

import json
import socket
import sqlite3
import threading
import time
import urllib.error
import urllib.request

import pytest

pytest.importorskip("pynetdicom", reason="needs the extra 'dicom'")

from pydicom.uid import CTImageStorage

from maisi_tools.cli.service import listen
from maisi_tools.errors import InputError
from maisi_tools.service import listener as listener_module
from maisi_tools.service import troubles as troubles_module
from maisi_tools.service.association import ArchiveAway, ArchiveRefuses
from maisi_tools.service.chain import Made
from maisi_tools.service.listener import HTTP_REQUESTS, Listener
from maisi_tools.service.settings import read_settings


@pytest.fixture
def listener(write_settings):
    return Listener(read_settings(write_settings(4242, attempts=2, retry_seconds=0.1)[0]))


@pytest.fixture
def running(listener):
    """The listener, serving in a thread."""
    thread = threading.Thread(target=listener.run)
    thread.start()
    listener.url = f"http://{listener.settings.http}"
    deadline = time.monotonic() + 10
    while True:
        try:
            urllib.request.urlopen(f"{listener.url}/health", timeout=5).close()
            break
        except OSError:
            assert time.monotonic() < deadline and thread.is_alive()
    yield listener
    listener.stop()
    thread.join(20)
    assert not thread.is_alive()


def until(ready, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def jobs(monkeypatch):
    """Key -> what its job raises; all others succeed."""
    raised: dict[str, BaseException] = {}
    done: list[str] = []

    def run_job(job, *_):
        done.append(job.key)
        if job.key in raised:
            raise raised[job.key]
        return Made([], "1.1")

    monkeypatch.setattr(listener_module, "run_job", run_job)
    monkeypatch.setattr(listener_module, "check_reachable", lambda *_: None)
    monkeypatch.setattr(listener_module, "send", lambda *_: None)
    raised["runs"] = done  # type: ignore[assignment]
    return raised


def test_whatever_a_job_raises_the_next_one_is_done(listener, jobs):
    jobs |= {"1.1": InputError("no mask"), "1.2": SystemExit(3), "1.3": MemoryError(), "1.4": RecursionError("deep")}
    for key in ("1.1", "1.2", "1.3", "1.4", "1.5"):
        listener.queue.add(key, "SEG", "1", listener.incoming)
    deadline = time.monotonic() + 10
    while listener.queue.counts()["dead"] < 4:
        listener.work()
        assert time.monotonic() < deadline
    assert listener.queue.counts() == {"waiting": 0, "running": 0, "done": 1, "dead": 4}
    errors = {job.key: job.error for _, job in listener.queue.listed()}
    assert errors["1.1"] == "no mask" and errors["1.2"] == "SystemExit: 3" and errors["1.4"] == "RecursionError: deep"
    assert sorted(path.parent.name for path in listener.dead.glob("*/reason.txt")) == ["1.1", "1.2", "1.3", "1.4"]
    assert listener.health()["status"] == "ok"


@pytest.mark.parametrize("key", ["../../../x", "/tmp/maisi-outside-of-the-spool", "9" * 300, "1.2\0.3", ".."])
def test_a_reason_stays_in_the_folder_of_the_dead(listener, jobs, tmp_path, key):
    """Keys of a queue that an older version wrote, which took what came."""
    jobs[key] = InputError("wrong")
    listener.queue.add(key, "SEG", "1", listener.incoming)
    before = set(tmp_path.rglob("*"))
    assert listener.work()
    (folder, reason) = sorted(set(tmp_path.rglob("*")) - before)
    assert (
        folder.parent == listener.dead and folder.name.startswith("no-uid-") and reason.read_text().endswith("wrong\n")
    )
    assert listener.queue.counts()["dead"] == 1


def test_a_result_that_could_not_be_noted_is_noted_later(listener, jobs, monkeypatch):
    listener.queue.add("1.1", "SEG", "1", listener.incoming)
    real, failures = listener.queue.finish, [sqlite3.OperationalError("disk is full")] * 2

    def finish(*arguments):
        if failures:
            raise failures.pop()
        real(*arguments)

    monkeypatch.setattr(listener.queue, "finish", finish)
    for _ in range(2):
        with pytest.raises(sqlite3.OperationalError):
            listener.work()
    assert not listener.work() and listener.queue.counts()["done"] == 1
    assert jobs["runs"] == ["1.1"]  # and the job is not run for it once more


def test_a_locked_queue_is_health_degraded_and_goes_on(running, jobs):
    running.queue.add("1.1", "SEG", "1", running.incoming)
    until(lambda: running.queue.counts()["done"] == 1)
    assert json.load(urllib.request.urlopen(f"{running.url}/health", timeout=10))["status"] == "ok"
    other = sqlite3.connect(running.spool / "queue.sqlite", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    until(lambda: "queue" in running.troubles.recent(), 20)
    answer = json.load(urllib.request.urlopen(f"{running.url}/health", timeout=10))
    assert answer["status"] == "degraded" and "locked" in answer["troubles"]["queue"]
    with pytest.raises(urllib.error.HTTPError, match="503"):
        urllib.request.urlopen(f"{running.url}/metrics", timeout=10)
    other.execute("ROLLBACK")
    running.queue.add("1.2", "SEG", "1", running.incoming)
    until(lambda: running.queue.counts()["done"] == 2, 20)
    metrics = urllib.request.urlopen(f"{running.url}/metrics", timeout=10).read().decode()
    assert 'maisi_troubles_total{part="queue"}' in metrics and 'part="queue"} 0' not in metrics


def test_silent_http_callers_keep_monitoring_out_for_seconds_alone(running):
    host, port = running.settings.http.split(":")
    silent = [socket.create_connection((host, int(port))) for _ in range(HTTP_REQUESTS + 20)]

    def trickle() -> None:
        try:
            for byte in b"GET /health HTTP/1.0" * 20:
                silent[0].send(bytes([byte]))
                time.sleep(0.1)
        except OSError:
            pass

    threading.Thread(target=trickle, daemon=True).start()
    start = time.monotonic()

    def answered() -> bool:
        try:
            return json.load(urllib.request.urlopen(f"{running.url}/health", timeout=2))["status"] == "ok"
        except OSError:
            return False

    until(answered, 8)
    assert time.monotonic() - start < 8
    silent[0].settimeout(8)
    try:
        assert silent[0].recv(1) == b""  # cut, though it kept talking
    except ConnectionResetError:
        pass


def test_the_spool_is_its_owners_and_free_of_parts(write_settings, tmp_path):
    settings = read_settings(write_settings(4242)[0])
    Listener(settings)
    for folder in ("incoming/1.2", "work/1.2.3"):
        (tmp_path / "spool" / folder).mkdir(mode=0o755)
    (tmp_path / "spool" / "dead").chmod(0o755)
    (tmp_path / "spool" / "incoming" / "1.2" / ".77-78-1.2.3.dcm").write_bytes(b"half")
    (tmp_path / "spool" / "incoming" / "1.2" / "1.2.4.dcm").write_bytes(b"whole")
    listener = Listener(settings)
    assert not list(listener.work_folder.iterdir())
    for folder in (listener.spool, listener.incoming, listener.dead, listener.work_folder):
        assert folder.stat().st_mode & 0o777 == 0o700
    assert (listener.spool / "queue.sqlite").stat().st_mode & 0o777 == 0o600
    assert [path.name for path in listener.incoming.rglob("*")] == ["1.2", "1.2.4.dcm"]
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="spool .*file/x cannot be used"):
        Listener(read_settings(write_settings(4242, spool="file/x")[0]))


def test_a_folder_that_no_listener_made_is_no_spool_and_stays_as_it_is(write_settings, tmp_path):
    """Of somebody's work, with folders called as ours; one that is empty, or a disk of its own, will do."""
    settings = read_settings(write_settings(4242)[0])
    (tmp_path / "spool" / "lost+found").mkdir(parents=True, mode=0o755)
    for name in ("work/results.csv", "incoming/letter.pdf", ".1-2-mine.txt"):
        (tmp_path / "spool" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "spool" / name).write_text("mine")
    (tmp_path / "spool").chmod(0o755)
    before = {path: path.stat().st_mode for path in [tmp_path / "spool", *(tmp_path / "spool").rglob("*")]}
    for start in (lambda: Listener(settings), lambda: listen(str(tmp_path / "listen.yaml"))):
        with pytest.raises(
            InputError, match=r"holds .1-2-mine.txt, incoming, work and no queue.sqlite.* allowed is a new"
        ):
            start()
    assert before == {path: path.stat().st_mode for path in [tmp_path / "spool", *(tmp_path / "spool").rglob("*")]}
    for name in ("work", "incoming", ".1-2-mine.txt"):
        (tmp_path / "spool" / name).rename(tmp_path / name)
    Listener(settings)
    Listener(settings)
    assert (tmp_path / "spool").stat().st_mode & 0o777 == 0o700


@pytest.fixture
def refusals(listener, jobs, monkeypatch):
    """What sending raises, one after another, then nothing; ``refusals.checks`` are those of the archive."""

    class Refusals(list):
        checks: list = []

    raised = Refusals()
    raised.checks = []

    def send(*_):
        if raised:
            raise raised.pop(0)

    monkeypatch.setattr(listener_module, "send", send)
    monkeypatch.setattr(listener_module, "check_reachable", lambda *given: raised.checks.append(given[2]))
    monkeypatch.setattr(listener_module, "sop_classes", lambda files: {"CT", "SEG"})
    return raised


def work(listener, times: int) -> None:
    for _ in range(times):
        listener.queue._due.clear()
        assert listener.work()


def test_a_result_that_the_archive_refuses_is_computed_once_and_given_up(listener, jobs, refusals):
    listener.queue.add("1.1", "SEG", "1", listener.incoming)
    refusals += [ArchiveRefuses("takes no SEG")] * 2
    work(listener, 1)
    assert listener.health()["status"] == "degraded" and "takes no SEG" in listener.health()["troubles"]["archive"]
    work(listener, 1)
    assert jobs["runs"] == ["1.1"] and listener.queue.counts()["dead"] == 1 and not listener._unsent
    listener.queue.add("1.2", "SEG", "1", listener.incoming)
    work(listener, 1)
    assert refusals.checks == [{CTImageStorage}, {"CT", "SEG"}]  # the next one is asked for what the last one had


def test_a_result_waits_for_an_archive_that_is_away_and_is_sent_as_it_is(listener, jobs, refusals, monkeypatch):
    listener.queue.add("1.1", "SEG", "1", listener.incoming)
    refusals += [ArchiveAway("no room")] * 5
    work(listener, 5)
    monkeypatch.setattr(troubles_module, "DEGRADED_SECONDS", 0.0)
    assert listener.health()["troubles"] == {"archive": "jobs that wait for ARCHIVE: 1"}
    work(listener, 1)
    assert jobs["runs"] == ["1.1"] and listener.queue.counts()["done"] == 1 and listener.health()["status"] == "ok"
    listener.queue.add("1.2", "SEG", "1", listener.incoming, "a" * 16)
    refusals.append(ArchiveAway("no room"))
    work(listener, 1)
    listener.queue.add("1.2", "SEG", "1", listener.incoming, "b" * 16)  # another one than was computed
    work(listener, 1)
    assert jobs["runs"] == ["1.1", "1.2", "1.2"] and listener.queue.counts()["done"] == 2


def test_no_more_results_wait_than_a_disk_may_hold(listener, jobs, refusals, monkeypatch):
    monkeypatch.setattr(listener_module, "UNSENT", 2)
    for key in ("1.1", "1.2", "1.3"):
        listener.queue.add(key, "SEG", "1", listener.incoming)
        (listener.work_folder / key).mkdir()  # as running it would
        refusals.append(ArchiveAway("no room"))
        assert listener.work()
        listener.queue._due = dict.fromkeys(listener.queue._due, float("inf"))
    assert sorted(path.name for path in listener.work_folder.iterdir()) == ["1.2", "1.3"]
    work(listener, 3)
    assert jobs["runs"] == ["1.1", "1.2", "1.3", "1.1"] and not list(listener.work_folder.iterdir())


def test_nothing_is_computed_for_an_archive_that_is_away(listener, jobs, refusals, monkeypatch):
    def check(*_):
        raise ArchiveAway("no connection")

    monkeypatch.setattr(listener_module, "check_reachable", check)
    listener.queue.add("1.1", "SEG", "1", listener.incoming)
    work(listener, 3)
    assert not jobs["runs"] and listener.queue.counts()["waiting"] == 1
