"""The queue: jobs on disk, worker processes that make them, and whoever waits for news of them.

All of it happens in the server's event loop, but for the threads that read what workers say. A job's file is written
when its state changes, so what a killed server left is taken up again.
"""

from __future__ import annotations

import asyncio
import datetime
import json
import logging
import os
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from maisi_tools.files import write_json
from maisi_tools.studio.folders import JOB, Folders

logger = logging.getLogger(__name__)

FINAL = ("done", "failed", "cancelled")
"""States that a job stays in; before them it is "waiting" or "running"."""

ATTEMPTS = 2
"""How often a job is begun whose worker was killed."""

RESTARTS = 3
"""How often in a row a worker may end before it was ready."""


@dataclass
class Job:
    """A job, as its file has it; ``progress`` and ``command`` as docs/how-to/studio.md says."""

    id: str
    request: dict[str, Any]
    created: str
    overlays: list[str] = field(default_factory=list)
    state: str = "waiting"
    started: str | None = None
    finished: str | None = None
    attempts: int = 0
    progress: dict[str, Any] | None = None
    error: str | None = None
    command: str | None = None
    volumes: list[str] = field(default_factory=list)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def device(self) -> str:
        """On which it is made."""
        return self.request["settings"]["device"]


class Full(Exception):
    """As many jobs wait as may."""


def parsed(lines: Iterable[str | bytes]) -> Iterator[dict[str, Any]]:
    """JSON of one line each; what a process that was killed left cut is passed over."""
    for line in lines:
        try:
            content = json.loads(line)
        except ValueError:
            continue
        yield content


class Worker:
    """A worker process, as the server sees it.

    Attributes:
        job: that it was given.
        pid: of the fork that works, None while there is none.
    """

    def __init__(self, folders: Folders, device: str) -> None:
        self.device, self.job, self.pid = device, None, None  # type: tuple[str, Job | None, int | None]
        self.failed_starts = 0
        self._command = [sys.executable, "-m", "maisi_tools.studio.worker", *map(str, vars(folders).values()), device]
        self._log = folders.root / f"worker-{device.replace(':', '')}.log"
        self.start()

    def start(self) -> None:
        """Start the process."""
        with open(self._log, "ab") as log:
            self.process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
                text=True,
            )

    def listen(self, loop: asyncio.AbstractEventLoop, told: Any) -> None:
        """Have `told` called in the loop with this worker and each of its answers; None when it has ended."""

        def read(lines: Any) -> None:
            with suppress(RuntimeError):  # the loop has closed, and with it the server
                for answer in parsed(lines):
                    loop.call_soon_threadsafe(told, self, answer)
                loop.call_soon_threadsafe(told, self, None)

        threading.Thread(target=read, args=(self.process.stdout,), daemon=True).start()

    def give(self, job: Job) -> None:
        """Let it make a job."""
        self.job = job
        assert self.process.stdin is not None
        with suppress(OSError):  # it has ended, and is about to be started again
            # a fork that is killed before it has read this leaves it to the next one, for which it is not
            line = json.dumps({"for": self.pid, "id": job.id, "request": job.request, "overlays": job.overlays})
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()

    def interrupt(self) -> None:
        """Kill the fork that works, at once; another one takes its place."""
        if self.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            self.pid = None

    def close(self) -> None:
        """End it, with what it is doing."""
        self.interrupt()
        assert self.process.stdin is not None
        with suppress(OSError):
            self.process.stdin.close()


class Jobs:
    """See the module.

    Args:
        folders: of the studio.
        workers: one a device.
        waiting: jobs that may wait.
    """

    def __init__(self, folders: Folders, workers: Sequence[Worker], waiting: int) -> None:
        self.folders, self.workers, self.waiting = folders, workers, waiting
        self.closing = False
        self._news = asyncio.Event()
        self._jobs = {job.id: job for job in _stored(folders)}
        devices = [worker.device for worker in workers]
        for job in self._jobs.values():
            if job.state == "waiting" and job.device not in devices:
                self._end(job, "failed", error=f"this studio has no {job.device}; it was started with another --device")

    # --- what clients do ----------------------------------------------------------------------------------------------

    def __getitem__(self, id: str) -> Job:
        return self._jobs[id]

    def newest_first(self) -> list[Job]:
        """All jobs."""
        return sorted(self._jobs.values(), key=lambda job: (job.created, job.id), reverse=True)

    def position(self, job: Job) -> int | None:
        """How many jobs are before a waiting one on its device."""
        return self._queue(job.device).index(job) if job.state == "waiting" else None

    def add(self, request: dict[str, Any], overlays: Sequence[str]) -> Job:
        """Queue a request that was checked.

        Raises:
            Full: too many jobs wait.
            OSError: it cannot be written down.
        """
        if sum(job.state == "waiting" for job in self._jobs.values()) >= self.waiting:
            raise Full
        now = datetime.datetime.now().astimezone()
        id = f"{now:%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"
        job = Job(id, request, now.isoformat(), list(overlays))
        self._write(job)
        self._jobs[id] = job
        self._go_on()
        return job

    def cancel(self, job: Job) -> None:
        """Cancel a job that is not final; a running one is interrupted."""
        self._end(job, "cancelled")
        for worker in self.workers:
            if worker.job is job:
                worker.job = None
                worker.interrupt()
        self._go_on()

    async def changes(self, job: Job, patience: float) -> AsyncIterator[bool]:
        """Yield at once and at each change, up to and with the final state; False where none came for `patience` s."""
        seen: tuple[Any, ...] = ()
        while True:
            now = self._seen(job)
            yield now != seen
            seen = now
            if job.state in FINAL or self.closing:
                return
            while self._seen(job) == seen and not self.closing:
                try:
                    await asyncio.wait_for(self._news.wait(), patience)
                except asyncio.TimeoutError:
                    break

    async def finished(self, jobs: Sequence[Job]) -> None:
        """Wait until jobs are final."""
        for job in jobs:
            async for _ in self.changes(job, 3600):
                pass

    # --- what workers do ----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to listen to the workers, in the running loop."""
        loop = asyncio.get_running_loop()
        for worker in self.workers:
            worker.listen(loop, self._told)

    def close(self) -> None:
        """End the workers and whoever waits for news; what is running is made again by the next server."""
        self.closing = True
        self._tell()
        for worker in self.workers:
            worker.close()

    @property
    def ready(self) -> bool:
        """Whether every worker could take a job, or works on one."""
        return all(worker.pid is not None for worker in self.workers)

    def _told(self, worker: Worker, answer: Mapping[str, Any] | None) -> None:
        if self.closing:
            return
        if answer is None:
            self._ended(worker)
        elif "ready" in answer:
            worker.pid, worker.failed_starts = answer["ready"], 0
        elif "gone" in answer:
            worker.pid = None
            self._killed(worker, answer["why"])
        elif worker.job is not None and answer["id"] == worker.job.id:
            if "progress" in answer:
                worker.job.progress = answer["progress"]
                self._tell()
                return
            job, worker.job = worker.job, None
            self._end(job, **{name: value for name, value in answer.items() if name != "id"})
        self._go_on()

    def _killed(self, worker: Worker, why: str) -> None:
        """Try the job that a worker died of once more, or give it up."""
        job, worker.job = worker.job, None
        if job is None:
            return
        if job.attempts < ATTEMPTS:
            job.state, job.progress = "waiting", None
            job.notes = [f"the worker process was killed ({why}); it is tried once more"]
            self._save(job)
            return
        self._end(
            job,
            "failed",
            error=f"the worker process was killed {job.attempts} times while it made this ({why}), perhaps because "
            "memory ran out; give a memory_limit, a coarser spacing or a smaller field of view",
        )

    def _ended(self, worker: Worker) -> None:
        """Start a worker again that has ended as a whole."""
        started, worker.pid = worker.pid is not None, None
        self._killed(worker, "it ended")
        worker.failed_starts += not started
        if worker.failed_starts < RESTARTS:
            worker.start()
            worker.listen(asyncio.get_running_loop(), self._told)
        else:
            logger.error("the worker for %s does not start; its log in the studio's folder says why", worker.device)

    def _go_on(self) -> None:
        """Give a waiting job to every worker that is free."""
        if self.closing:
            return
        for worker in self.workers:
            queue = self._queue(worker.device)
            if worker.pid is not None and worker.job is None and queue:
                job = queue[0]
                job.state, job.started, job.attempts = "running", _now(), job.attempts + 1
                self._save(job)
                worker.give(job)
        self._tell()

    def _queue(self, device: str) -> list[Job]:
        waiting = [job for job in self._jobs.values() if job.state == "waiting" and job.device == device]
        return sorted(waiting, key=lambda job: (job.created, job.id))

    def _seen(self, job: Job) -> tuple[Any, ...]:
        """What tells that a job has changed."""
        steps = () if job.progress is None else tuple(job.progress.values())
        return job.state, job.attempts, self.position(job), *steps

    def _end(self, job: Job, state: str, **found: Any) -> None:
        notes = [*job.notes, *found.pop("notes", ())]
        for name, value in {**found, "notes": notes, "progress": None, "finished": _now(), "state": state}.items():
            setattr(job, name, value)
        self._save(job)

    def _save(self, job: Job) -> None:
        try:
            self._write(job)
        except OSError as error:  # a full disk: what is in memory holds until there is room
            logger.error("job %s cannot be written down: %s", job.id, error)
            job.notes = [*job.notes, f"could not be written down: {error}"]
        self._tell()

    def _write(self, job: Job) -> None:
        write_json(self.folders.job(job.id) / JOB, {**asdict(job), "progress": None})

    def _tell(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()


def _stored(folders: Folders) -> list[Job]:
    """The jobs on disk; those that a killed server left running wait again."""
    found, names = [], {one.name for one in fields(Job)}
    for path in sorted((folders.root / "jobs").glob(f"*/{JOB}")):
        try:
            content = json.loads(path.read_text())
            job = Job(**{name: value for name, value in content.items() if name in names})
            known = job.device, job.created, job.request["makes"], job.request["source"]["kind"]
            if folders.job(job.id) != path.parent or not all(isinstance(text, str) for text in known):
                raise ValueError("its id is not its folder's name, or its request is none")
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            logger.error("%s is no job and is passed over: %r", path, error)
            continue
        if job.state == "running":
            job.state, job.started, job.attempts = "waiting", None, 0
        found.append(job)
    return found


def _now() -> str:
    return datetime.datetime.now().astimezone().isoformat()
