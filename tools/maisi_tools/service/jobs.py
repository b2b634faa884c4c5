"""The durable queue: one SQLite file, whose jobs survive a kill -9 of the listener, none lost and none twice."""

from __future__ import annotations

import dataclasses
import datetime
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from maisi_tools.errors import InputError
from maisi_tools.service.troubles import printable

QUEUE = "queue.sqlite"
"""The file's name in the spool, which is known by it."""

STATES = ("waiting", "running", "done", "dead")

CONTENT_LETTERS = 16
"""Of the digest of a file; earlier versions had 8, of its name alone."""

COLUMNS = {
    "kind": "TEXT",
    "study": "TEXT",
    "folder": "TEXT",
    "received": "TEXT",
    "attempts": "INTEGER DEFAULT 0",
    "error": "TEXT DEFAULT ''",
    "state": "TEXT DEFAULT 'waiting'",
    "seconds": "REAL DEFAULT 0",
    "content": "TEXT DEFAULT ''",
    "result": "TEXT DEFAULT ''",
    "replaces": "TEXT DEFAULT ''",
}
"""Of the table, beside its key; those that an older file lacks are added."""


@dataclass(frozen=True)
class Job:
    """One object that a chain is to be run for.

    Attributes:
        key: UID of what set it off: of a SEG's or RTSTRUCT's instance, or of a CT's series.
        kind: its modality.
        study: Study Instance UID.
        folder: of the study in the spool.
        received: ISO 8601; results carry it, so that a repeated job writes the same UIDs.
        attempts: how often it has been tried.
        error: of the last failure.
        content: digests of what it reads, see :class:`maisi_tools.service.receive.Trigger`.
        replaces: Series Instance UID of its older result, made before the series changed; "" for none.
    """

    key: str
    kind: str
    study: str
    folder: str
    received: str
    attempts: int = 0
    error: str = ""
    content: str = ""
    replaces: str = ""


class JobQueue:
    """Jobs in a SQLite file, which its owner alone may read; safe to use from several threads.

    Args:
        path: of the file.
        attempts: how often a job may be tried. One that was running as often when the listener died is given up: it may
            be what kills it.
        recover: let jobs wait again that were running when the listener died; only the listener itself may.

    Raises:
        InputError: the file is no such queue, or cannot be written.
    """

    def __init__(self, path: Path, attempts: int = 5, recover: bool = True) -> None:
        self._lock = threading.Lock()
        self._due: dict[str, float] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
            path.chmod(0o600)
            self._file = sqlite3.connect(path, timeout=2.0, check_same_thread=False, isolation_level=None)
            self._file.execute("PRAGMA journal_mode=WAL")
            self._file.execute("PRAGMA synchronous=FULL")
            with self._transaction() as file:
                file.execute("CREATE TABLE IF NOT EXISTS jobs (key TEXT PRIMARY KEY)")
                file.execute("CREATE TABLE IF NOT EXISTS superseded (key TEXT, result TEXT, received TEXT)")
                present = {row[1] for row in file.execute("PRAGMA table_info(jobs)")}
                for name in set(COLUMNS) - present:
                    file.execute(f"ALTER TABLE jobs ADD COLUMN {name} {COLUMNS[name]}")
        except (OSError, sqlite3.Error) as error:
            raise InputError(
                f"the queue {path} cannot be used ({error}); allowed is a file that this user may write and `maisi "
                "listen` wrote: make room or permissions, or move it away (results that are done are then done again)"
            ) from error
        if recover:
            reason = f"the listener died each of the {attempts} times that this was run; it may need too much memory"
            with self._transaction() as file:
                file.execute(
                    "UPDATE jobs SET state='dead', error=? WHERE state='running' AND attempts>=?", (reason, attempts)
                )
                file.execute("UPDATE jobs SET state='waiting' WHERE state='running'")

    def add(self, key: str, kind: str, study: str, folder: Path, content: str = "") -> str:
        """Queue a job, unless there is or was one with this key and content.

        One with content that was not there before, or in another study, is done anew, under a new date; its older
        result then counts as superseded.

        Returns:
            "queued", "queued anew", or "" where nothing is to be done.
        """
        with self._transaction() as file:
            found = file.execute("SELECT state, content, study FROM jobs WHERE key=?", (key,)).fetchone()
            if found is None:
                row = (key, kind, study, str(folder), _now(), content)
                file.execute("INSERT INTO jobs (key, kind, study, folder, received, content) VALUES (?,?,?,?,?,?)", row)
                return "queued"
            state, before, study_before = found
            moved = study != study_before
            if not moved and before and not set(content.split()) - set(before.split()):
                return ""  # what was there before, or a part of it that came again
            file.execute("UPDATE jobs SET content=?, study=?, folder=? WHERE key=?", (content, study, str(folder), key))
            if state in ("waiting", "running"):  # `settle` will see it
                return ""
            sent_again = state == "dead" and not before
            if _is_earlier(before) and not moved and not sent_again:
                return ""
            _anew(file, key)
            self._due.pop(key, None)
            return "queued anew"

    def take(self) -> Job | None:
        """The next job that is due, now running, one that was tried before behind the others; None where there is none.

        The attempt counts from here on, whatever becomes of the process.
        """
        with self._transaction() as file:
            rows = file.execute(
                "SELECT key, kind, study, folder, received, attempts, error, content, replaces FROM jobs "
                "WHERE state='waiting' ORDER BY attempts, received, key"
            )
            now = time.monotonic()
            row = next((row for row in rows if self._due.get(row[0], 0.0) <= now), None)
            if row is None:
                return None
            file.execute("UPDATE jobs SET state='running', attempts=attempts+1 WHERE key=?", (row[0],))
            return dataclasses.replace(Job(*row), attempts=row[5] + 1)

    def finish(self, job: Job, seconds: float, result: str = "") -> None:
        """The job's result, the CT series `result`, is stored."""
        with self._transaction() as file:
            file.execute(
                "UPDATE jobs SET state='done', error='', seconds=seconds+?, result=? WHERE key=?",
                (seconds, result, job.key),
            )
            self._settle(file, job)

    def fail(self, job: Job, error: str, retry_in: float | None, counts: bool = True) -> None:
        """The job failed; None makes it a dead letter; without `counts` it has as many attempts as at first."""
        state = "dead" if retry_in is None else "waiting"
        with self._transaction() as file:
            values = state, printable(error), counts, job.key
            file.execute("UPDATE jobs SET state=?, error=?, attempts=attempts*? WHERE key=?", values)
            self._due[job.key] = time.monotonic() + (retry_in or 0.0)
            self._settle(file, job)

    def _settle(self, file: sqlite3.Connection, job: Job) -> None:
        """Do a job anew whose content, or study, has changed while it ran."""
        content, study = file.execute("SELECT content, study FROM jobs WHERE key=?", (job.key,)).fetchone()
        if study != job.study or (content != job.content and not _is_earlier(job.content)):
            _anew(file, job.key)
            self._due.pop(job.key, None)

    def revive(self, key: str) -> bool:
        """Let a dead letter wait again, its attempts counted anew; whether there is such a one."""
        with self._transaction() as file:
            changed = file.execute("UPDATE jobs SET state='waiting', attempts=0 WHERE key=? AND state='dead'", (key,))
            return changed.rowcount > 0

    def counts(self) -> dict[str, int]:
        """State -> jobs."""
        with self._transaction() as file:
            found = dict(file.execute("SELECT state, COUNT(*) FROM jobs GROUP BY state").fetchall())
        return {state: found.get(state, 0) for state in STATES}

    def superseded(self) -> int:
        """Results that a later one of the same job replaces."""
        with self._transaction() as file:
            return int(file.execute("SELECT COUNT(*) FROM superseded").fetchone()[0])

    def seconds(self) -> float:
        """That all runs which ended well took together, those of superseded results, too."""
        with self._transaction() as file:
            return float(file.execute("SELECT COALESCE(SUM(seconds), 0) FROM jobs").fetchone()[0])

    def in_use(self, study: str) -> bool:
        """Whether a job that is still to be done needs a study; a dead letter keeps none."""
        with self._transaction() as file:
            query = "SELECT 1 FROM jobs WHERE study=? AND state IN ('waiting', 'running') LIMIT 1"
            return file.execute(query, (study,)).fetchone() is not None

    def forget(self, study: str) -> None:
        """A study is removed: where it comes again, its dead letters are tried again."""
        with self._transaction() as file:
            file.execute("UPDATE jobs SET content='' WHERE study=? AND state='dead'", (study,))

    def listed(self) -> list[tuple[str, Job]]:
        """(state, job) of every job, oldest first; superseded results, too, with their series in place of an error."""
        with self._transaction() as file:
            rows = file.execute(
                "SELECT state, key, kind, study, folder, received, attempts, error FROM jobs UNION ALL "
                "SELECT 'superseded', s.key, j.kind, j.study, j.folder, s.received, 0, s.result "
                "FROM superseded s JOIN jobs j ON j.key=s.key ORDER BY received, key"
            ).fetchall()
        return [(row[0], Job(*row[1:])) for row in rows]

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._file.execute("BEGIN IMMEDIATE")
            try:
                yield self._file
                self._file.execute("COMMIT")
            except BaseException:
                if self._file.in_transaction:  # a full disk may have ended it already
                    self._file.execute("ROLLBACK")
                raise


def _is_earlier(content: str) -> bool:
    """Whether an earlier version wrote it: nothing, one digest of all, or digests of names alone."""
    return all(len(one) in (8, 32) for one in content.split())


def _anew(file: sqlite3.Connection, key: str) -> None:
    """Let a job wait again as if it had just come; a result that it has is superseded."""
    file.execute("INSERT INTO superseded SELECT key, result, received FROM jobs WHERE key=? AND state='done'", (key,))
    file.execute(
        "UPDATE jobs SET replaces=CASE state WHEN 'done' THEN result ELSE replaces END, state='waiting', attempts=0, "
        "error='', received=? WHERE key=?",
        (_now(), key),
    )


def _now() -> str:
    return datetime.datetime.now().isoformat(timespec="seconds")
