"""The listener: receives, queues, runs one job at a time, stores results back, and says how it is."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import socket
import threading
import time
from collections.abc import Callable
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from pydicom.uid import CTImageStorage

from maisi_tools.dicom.uids import uid_name
from maisi_tools.errors import InputError, find_input_error
from maisi_tools.files import LOCK, is_part, replacing
from maisi_tools.service.archives import (
    Archive,
    DicomWebArchive,
    DimseArchive,
    fetch_new,
    read_seen,
    watch_again,
    write_seen,
)
from maisi_tools.service.association import ArchiveAway, ArchiveRefuses
from maisi_tools.service.chain import Made, check_reachable, run_job, send, sop_classes
from maisi_tools.service.jobs import QUEUE, Job, JobQueue
from maisi_tools.service.receive import Intake, came, forget_old_studies, queue_whole_studies, start_receiver
from maisi_tools.service.server import Server
from maisi_tools.service.settings import Poll, Query, Settings, http_address
from maisi_tools.service.troubles import Troubles, printable

logger = logging.getLogger(__name__)

TICK = 0.5  # seconds between looks at the spool and the queue

UNSENT = 8
"""Results at most that are kept until the archive takes them; those of further jobs are computed again."""

HTTP_SECONDS, HTTP_REQUESTS = 5.0, 16
"""How long a request of health or metrics may take, and how many are served at a time."""

LONGEST_PAUSE = 900.0
"""Seconds until a job is tried again for which the archive was away."""

STOP_SECONDS = 10.0
"""For which a listener that is told to stop waits for objects that are being stored."""


class Listener:
    """Everything that runs beside a PACS.

    Args:
        settings: see :mod:`maisi_tools.service.settings`.

    Attributes:
        queue: the jobs.
        troubles: what went wrong.

    Raises:
        InputError: the spool cannot be made, or its queue cannot be used.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.spool = Path(settings.spool)
        self.incoming, self.dead, self.work_folder = (self.spool / name for name in ("incoming", "dead", "work"))
        for node in (settings.send, settings.query):
            if node is not None:
                _ = node.context  # a certificate that cannot be read is said now, not by every job
        take_over(self.spool)
        self.queue = JobQueue(self.spool / QUEUE, settings.attempts)
        shutil.rmtree(self.work_folder, ignore_errors=True)
        for folder in (self.incoming, self.dead, self.work_folder):
            make_private(folder)
        for part in [path for path in self.spool.rglob(".*") if is_part(path)]:  # of a listener that was killed
            part.unlink(missing_ok=True)
        self.troubles = Troubles()
        self.intake = Intake(aside={path: came([path]) for path in self.dead.glob("*/*.dcm")})
        self.stopping = threading.Event()
        self._outcome: Callable[[], None] | None = None
        self._away: dict[str, int] = {}  # job -> how often the archive was away, one time after the other
        self._unsent: dict[str, tuple[Job, Made]] = {}  # job -> its result, which the archive has not taken yet
        self._classes: dict[str, set[str]] = {}  # job's kind -> SOP classes of the last result

    def run(self) -> None:
        """Serve until :meth:`stop`."""
        settings = self.settings
        http = _HealthServer(http_address(settings.http), _handler(self))
        receiver: Server | None = None
        if settings.listen is not None:
            receiver = start_receiver(settings.listen, self.incoming, self.troubles)
        threads = [threading.Thread(target=http.serve_forever, daemon=True)]
        archives: list[Callable[[], Archive]] = []
        if (poll := settings.poll) is not None:
            web = partial(DicomWebArchive, poll, self.incoming, self.troubles)
            archives.append(web)
            threads.append(threading.Thread(target=self._ask, args=(poll.url, web, poll, "polled.json"), daemon=True))
        if (query := settings.query) is not None and (listen := settings.listen) is not None:
            pacs = partial(DimseArchive, query, listen.ae_title, self.incoming)
            archives.append(pacs)
            place = f"{query.ae_title} at {query.host}:{query.port}"
            threads.append(threading.Thread(target=self._ask, args=(place, pacs, query, "queried.json"), daemon=True))
        threads.append(threading.Thread(target=self._watch, args=(archives,), daemon=True))
        for thread in threads:
            thread.start()
        logger.info("listening; health at http://%s/health", settings.http)
        try:
            while not self.stopping.is_set():
                try:
                    busy = self.work()
                except Exception as error:  # a locked queue may be free again, a full disk have room
                    self.troubles.add("queue", f"the queue cannot be used: {printable(error)}")
                    busy = False
                if not busy:
                    self.stopping.wait(TICK)
        finally:
            self.stopping.set()
            if receiver is not None:
                receiver.close(STOP_SECONDS)
            http.shutdown()
            for thread in threads:
                thread.join(STOP_SECONDS)

    def stop(self) -> None:
        """Let :meth:`run` end after the job it is at."""
        self.stopping.set()

    def work(self) -> bool:
        """Do the next job that is due; whether there was one.

        Raises:
            sqlite3.Error, OSError: the queue cannot be used now. What came of a job is not lost: the next call writes
                it first.
        """
        self._note()
        job = self.queue.take()
        if job is None:
            return False
        # Where an earlier listener was started elsewhere, its queue may know the folder by another path.
        job = dataclasses.replace(job, folder=str(self.incoming / job.study))
        calling = self.settings.listen.ae_title if self.settings.listen else "MAISI"
        start = time.perf_counter()
        try:
            made = self._result(job, calling)
            send(made.files, self.settings.send, calling)
        except (Exception, SystemExit) as error:  # one bad job must not stop the others, nor a bundle that exits
            self._failed(job, error)
        else:
            self._away.pop(job.key, None)
            self._unsent.pop(job.key, None)
            seconds = time.perf_counter() - start
            logger.info("%s %s done in %.1f s: %d objects stored", job.kind, job.key, seconds, len(made.files))
            self._outcome = partial(self.queue.finish, job, seconds, made.series)
        if len(self._unsent) > UNSENT:
            self._unsent.pop(next(iter(self._unsent)))
        wanted = {uid_name(key) for key in self._unsent}
        for folder in self.work_folder.glob("*"):
            if folder.name not in wanted:
                shutil.rmtree(folder, ignore_errors=True)
        self._note()
        return True

    def _result(self, job: Job, calling: str) -> Made:
        """A job's result: the one that the archive did not take before, or a new one, which it would take.

        Raises:
            Exception: it cannot be made, or would not be taken.
        """
        chain = self.settings.chain(job.kind)
        if chain is None:
            raise InputError(f"there is no chain for {job.kind} any more; add it, or leave the job")
        before, made = self._unsent.pop(job.key, (job, None))
        same = (before.study, before.content, before.received) == (job.study, job.content, job.received)
        if made is None or not same:
            check_reachable(self.settings.send, calling, self._classes.get(job.kind, {CTImageStorage}))
            made = run_job(job, chain, self.work_folder / uid_name(job.key), self.settings.device)
            self._classes[job.kind] = sop_classes(made.files)
        self._unsent[job.key] = job, made
        return made

    def _note(self) -> None:
        """Write what came of the last job into the queue, if that is not done yet."""
        if self._outcome is not None:
            self._outcome()
            self._outcome = None

    def health(self) -> dict[str, Any]:
        """Whether all is well, what went wrong lately, and what is in the queue."""
        late = time.monotonic() - self.intake.looked > 60
        try:
            counts: dict[str, Any] = dict(self.queue.counts())
        except Exception as error:
            self.troubles.add("queue", f"the queue cannot be used: {printable(error)}")
            counts = {}
        troubles = self.troubles.recent()
        if waiting := len(self._away):  # some for longer than a trouble is shown
            troubles.setdefault("archive", f"jobs that wait for {self.settings.send.ae_title}: {waiting}")
        status = "late" if late else "degraded" if troubles else "ok"
        return {"status": status, **counts, **({"troubles": troubles} if troubles else {})}

    def metrics(self) -> str:
        """In Prometheus's text format."""
        lines = ["# HELP maisi_jobs Jobs by state.", "# TYPE maisi_jobs gauge"]
        lines += [f'maisi_jobs{{state="{state}"}} {count}' for state, count in self.queue.counts().items()]
        lines += [
            "# HELP maisi_superseded_total Results that a later one of the same job replaces.",
            "# TYPE maisi_superseded_total counter",
            f"maisi_superseded_total {self.queue.superseded()}",
            "# HELP maisi_job_seconds_total Time that jobs took whose results were stored.",
            "# TYPE maisi_job_seconds_total counter",
            f"maisi_job_seconds_total {self.queue.seconds():.3f}",
            "# HELP maisi_troubles_total What went wrong since the start, by part.",
            "# TYPE maisi_troubles_total counter",
        ]
        lines += [f'maisi_troubles_total{{part="{part}"}} {count}' for part, count in self.troubles.counts().items()]
        return "\n".join(lines) + "\n"

    def _failed(self, job: Job, error: BaseException) -> None:
        known = find_input_error(error)
        text = printable(known if known else f"{type(error).__name__}: {error}")
        # What is wrong with the data stays wrong; an archive that is away comes back, if not within the hour.
        away = isinstance(error, ArchiveAway)
        if refused := away or isinstance(error, ArchiveRefuses):
            self.troubles.add("archive", text)
        absences = self._away.pop(job.key, 0) + 1
        if away:
            self._away[job.key] = absences
        times = absences if away else job.attempts
        last = known is not None or (not away and job.attempts >= self.settings.attempts)
        if last or not refused:
            self._unsent.pop(job.key, None)
        longest = max(self.settings.retry_seconds, LONGEST_PAUSE)
        pause = min(self.settings.retry_seconds * 2 ** min(times - 1, 20), longest)
        self._outcome = partial(self.queue.fail, job, text, None if last else pause, counts=not away)
        if not last:
            logger.warning("%s %s failed, again in %.0f s: %s", job.kind, job.key, pause, text)
            return
        logger.error("%s %s is given up: %s", job.kind, printable(job.key), text)
        try:
            with replacing(self.dead / uid_name(job.key) / "reason.txt") as part:
                part.write_text(f"{job.kind} of study {printable(job.study)}, attempt {job.attempts}: {text}\n")
        except OSError as full:  # the queue has the reason, too
            self.troubles.add("spool", f"the reason of {job.key} cannot be written: {full}")

    def _look(self, archives: list[Callable[[], Archive]]) -> None:
        asked = list(archives)

        def count(study: str, series: str) -> int | None:
            known = []
            for one in list(asked):
                try:
                    known += [found.instances or 0 for found in one().search("CT", study, series)]
                except Exception as error:  # without an answer, silence decides
                    asked.remove(one)
                    self.troubles.add("archive", f"the archive does not count series {series}: {printable(error)}")
            return max(known, default=None)

        queue_whole_studies(
            self.settings,
            self.incoming,
            self.queue,
            self.intake,
            self.troubles,
            self.dead,
            count if archives else None,
        )
        forget_old_studies(self.settings, self.incoming, self.queue, self.intake)

    def _ask(self, place: str, archive: Callable[[], Archive], settings: Poll | Query, memory: str) -> None:
        """Fetch what is new in an archive, again and again; the spool's file `memory` lists what was fetched."""
        path = self.spool / memory
        seen = read_seen(path)
        watched = watch_again(seen, self.incoming)
        kinds = {chain.when: chain.when != "CT" for chain in self.settings.chains}
        while not self.stopping.wait(settings.every_seconds):
            try:
                if fetch_new(archive(), kinds, seen, watched, self.troubles):
                    write_seen(path, seen)
            except Exception as error:  # the archive may be away for a while
                self.troubles.add("archive", f"{place} cannot be asked: {printable(error)}")

    def _watch(self, archives: list[Callable[[], Archive]]) -> None:
        while not self.stopping.wait(TICK):
            try:
                self._look(archives)
            except Exception as error:  # a full disk may have room again
                self.troubles.add("spool", f"the spool cannot be looked at: {printable(error)}")
            self.intake.looked = time.monotonic()


def take_over(spool: Path) -> None:
    """Make a folder the listener's own, in which files are removed.

    Raises:
        InputError: it holds what no listener wrote, or cannot be made.
    """
    try:
        others = {path.name for path in spool.iterdir()} - {LOCK, "lost+found"} if spool.exists() else set()
    except OSError as error:
        raise _unusable(spool, error) from error
    if others and QUEUE not in others:
        raise InputError(
            f"spool {spool} holds {', '.join(sorted(others)[:3])} and no {QUEUE}, so no listener made it; allowed is a "
            "new or empty folder, or one that `maisi listen` made: files in it are removed, and others kept out"
        )
    make_private(spool)


def make_private(folder: Path) -> None:
    """Make a folder that its owner alone may enter: patients' names are in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
    except OSError as error:
        raise _unusable(folder, error) from error


def _unusable(folder: Path, error: OSError) -> InputError:
    return InputError(
        f"spool {folder} cannot be used ({error.strerror}); allowed is a folder of this user, or one it may make"
    )


class _HealthServer(ThreadingHTTPServer):
    """Serves few requests at a time, each for a short time, however slowly it is asked."""

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        self.free = threading.Semaphore(HTTP_REQUESTS)
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self.free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:  # no thread could be started
            self.free.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        end = threading.Timer(HTTP_SECONDS, _hang_up, (request,))
        end.daemon = True
        end.start()
        try:
            super().process_request_thread(request, client_address)
        finally:
            end.cancel()
            self.free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A caller that hangs up is not worth a traceback."""
        logger.debug("the HTTP request of %s failed", client_address, exc_info=True)


def _hang_up(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:  # it is closed already
        pass


def _handler(listener: Listener) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = HTTP_SECONDS

        def do_GET(self) -> None:
            if self.path == "/health":
                content = listener.health()
                self._answer(503 if content["status"] == "late" else 200, json.dumps(content), "application/json")
            elif self.path == "/metrics":
                try:
                    self._answer(200, listener.metrics(), "text/plain; version=0.0.4")
                except Exception as error:
                    listener.troubles.add("queue", f"the queue cannot be used: {printable(error)}")
                    self._answer(503, "the queue cannot be used now\n", "text/plain")
            else:
                self._answer(404, "there is /health and /metrics\n", "text/plain")

        def _answer(self, status: int, body: str, kind: str) -> None:
            content = body.encode()
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            """Health checks come every few seconds and are not worth a line."""

    return Handler
