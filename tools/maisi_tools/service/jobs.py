"""The durable queue: one SQLite file, whose jobs survive a kill -9 of the listener, none lost and none twice."""

from __future__ import annotations

import datetime
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

STATES = ("waiting", "running", "done", "dead")


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
    """

    key: str
    kind: str
    study: str
    folder: str
    received: str
    attempts: int = 0
    error: str = ""


class JobQueue:
    """Jobs in a SQLite file; safe to use from several threads.

    Args:
        path: of the file.
        recover: let jobs wait again that were running when the listener died; only the listener itself may.
    """

    def __init__(self, path: Path, recover: bool = True) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._file = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        self._file.execute("PRAGMA journal_mode=WAL")
        self._file.execute("PRAGMA synchronous=FULL")
        self._file.execute(
            "CREATE TABLE IF NOT EXISTS jobs (key TEXT PRIMARY KEY, kind TEXT, study TEXT, folder TEXT, received TEXT, "
            "attempts INTEGER DEFAULT 0, error TEXT DEFAULT '', state TEXT DEFAULT 'waiting', due REAL DEFAULT 0, "
            "seconds REAL DEFAULT 0)"
        )
        if recover:
            with self._transaction() as file:
                file.execute("UPDATE jobs SET state='waiting', due=0 WHERE state='running'")

    def add(self, key: str, kind: str, study: str, folder: Path) -> bool:
        """Queue a job, unless there is or was one with this key; whether it is new."""
        received = datetime.datetime.now().isoformat(timespec="seconds")
        with self._transaction() as file:
            row = (key, kind, study, str(folder), received)
            added = file.execute(
                "INSERT OR IGNORE INTO jobs (key, kind, study, folder, received) VALUES (?,?,?,?,?)", row
            )
            return added.rowcount > 0

    def take(self) -> Job | None:
        """The next job that is due, now running; None where there is none."""
        with self._transaction() as file:
            row = file.execute(
                "SELECT key, kind, study, folder, received, attempts, error FROM jobs WHERE state='waiting' AND due<=? "
                "ORDER BY received, key LIMIT 1",
                (time.time(),),
            ).fetchone()
            if row is None:
                return None
            file.execute("UPDATE jobs SET state='running', attempts=attempts+1 WHERE key=?", (row[0],))
            return Job(row[0], row[1], row[2], row[3], row[4], row[5] + 1, row[6])

    def finish(self, job: Job, seconds: float) -> None:
        """The job's result is stored."""
        with self._transaction() as file:
            file.execute("UPDATE jobs SET state='done', error='', seconds=? WHERE key=?", (seconds, job.key))

    def fail(self, job: Job, error: str, retry_in: float | None) -> None:
        """The job failed; None makes it a dead letter."""
        state, due = ("dead", 0.0) if retry_in is None else ("waiting", time.time() + retry_in)
        with self._transaction() as file:
            file.execute("UPDATE jobs SET state=?, error=?, due=? WHERE key=?", (state, error, due, job.key))

    def revive(self, key: str) -> bool:
        """Let a dead letter wait again, its attempts counted anew; whether there is such a one."""
        with self._transaction() as file:
            changed = file.execute(
                "UPDATE jobs SET state='waiting', attempts=0, due=0 WHERE key=? AND state='dead'", (key,)
            )
            return changed.rowcount > 0

    def counts(self) -> dict[str, int]:
        """State -> jobs."""
        with self._transaction() as file:
            found = dict(file.execute("SELECT state, COUNT(*) FROM jobs GROUP BY state").fetchall())
        return {state: found.get(state, 0) for state in STATES}

    def seconds(self) -> float:
        """That all jobs which are done took together."""
        with self._transaction() as file:
            return float(file.execute("SELECT COALESCE(SUM(seconds), 0) FROM jobs WHERE state='done'").fetchone()[0])

    def in_use(self, folder: Path) -> bool:
        """Whether a job that is not finished needs the folder of a study."""
        with self._transaction() as file:
            query = "SELECT 1 FROM jobs WHERE folder=? AND state!='done' LIMIT 1"
            return file.execute(query, (str(folder),)).fetchone() is not None

    def listed(self) -> list[tuple[str, Job]]:
        """(state, job) of every job, oldest first."""
        with self._transaction() as file:
            rows = file.execute(
                "SELECT state, key, kind, study, folder, received, attempts, error FROM jobs ORDER BY received, key"
            ).fetchall()
        return [(row[0], Job(*row[1:])) for row in rows]

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._file.execute("BEGIN IMMEDIATE")
            try:
                yield self._file
            except BaseException:
                self._file.execute("ROLLBACK")
                raise
            self._file.execute("COMMIT")
