"""The listener: receives, queues, runs one job at a time, stores results back, and says how it is."""

from __future__ import annotations

import json
import logging
import shutil
import threading
import time
from collections.abc import Callable
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from maisi_tools.atomic import write_json
from maisi_tools.errors import InputError, find_input_error
from maisi_tools.service.archives import Archive, DicomWebArchive, DimseArchive, fetch_new
from maisi_tools.service.chain import run_job, send
from maisi_tools.service.jobs import Job, JobQueue
from maisi_tools.service.receive import queue_whole_studies, start_receiver
from maisi_tools.service.settings import Poll, Query, Settings

logger = logging.getLogger(__name__)

TICK = 0.5  # seconds between looks at the spool and the queue


class Listener:
    """Everything that runs beside a PACS.

    Args:
        settings: see :mod:`maisi_tools.service.settings`.

    Attributes:
        queue: the jobs.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.spool = Path(settings.spool)
        self.incoming, self.dead = self.spool / "incoming", self.spool / "dead"
        for folder in (self.incoming, self.dead):
            folder.mkdir(parents=True, exist_ok=True)
        self.queue = JobQueue(self.spool / "queue.sqlite")
        self.queued: dict[str, int] = {}
        self.stopping = threading.Event()
        self.looked = time.time()

    def run(self) -> None:
        """Serve until :meth:`stop`."""
        receiver = None if self.settings.listen is None else start_receiver(self.settings.listen, self.incoming)
        host, _, port = self.settings.http.rpartition(":")
        http = ThreadingHTTPServer((host, int(port)), _handler(self))
        threads = [threading.Thread(target=http.serve_forever, daemon=True)]
        threads.append(threading.Thread(target=self._watch, daemon=True))
        if (poll := self.settings.poll) is not None:
            web = partial(DicomWebArchive, poll, self.incoming)
            threads.append(threading.Thread(target=self._ask, args=(poll.url, web, poll, "polled.json"), daemon=True))
        if (query := self.settings.query) is not None and (listen := self.settings.listen) is not None:
            pacs = partial(DimseArchive, query, listen.ae_title)
            place = f"{query.ae_title} at {query.host}:{query.port}"
            threads.append(threading.Thread(target=self._ask, args=(place, pacs, query, "queried.json"), daemon=True))
        for thread in threads:
            thread.start()
        logger.info("listening; health at http://%s/health", self.settings.http)
        try:
            while not self.stopping.is_set():
                if not self.work():
                    self.stopping.wait(TICK)
        finally:
            self.stopping.set()
            if receiver is not None:
                receiver.shutdown()
            http.shutdown()

    def stop(self) -> None:
        """Let :meth:`run` end after the job it is at."""
        self.stopping.set()

    def work(self) -> bool:
        """Do the next job that is due; whether there was one."""
        job = self.queue.take()
        if job is None:
            return False
        start = time.perf_counter()
        work = self.spool / "work"
        try:
            chain = self.settings.chain(job.kind)
            if chain is None:
                raise InputError(f"there is no chain for {job.kind} any more; add it, or leave the job")
            files = run_job(job, chain, work, self.settings.device)
            send(files, self.settings.send, self.settings.listen.ae_title if self.settings.listen else "MAISI")
        except Exception as error:  # one bad job must not stop the others
            self._failed(job, error)
        else:
            seconds = time.perf_counter() - start
            self.queue.finish(job, seconds)
            logger.info("%s %s done in %.1f s: %d objects stored", job.kind, job.key, seconds, len(files))
        shutil.rmtree(work, ignore_errors=True)
        return True

    def health(self) -> dict[str, Any]:
        """Whether all is well, and what is in the queue."""
        late = time.time() - self.looked > 60
        return {"status": "late" if late else "ok", **self.queue.counts()}

    def metrics(self) -> str:
        """In Prometheus's text format."""
        lines = ["# HELP maisi_jobs Jobs by state.", "# TYPE maisi_jobs gauge"]
        lines += [f'maisi_jobs{{state="{state}"}} {count}' for state, count in self.queue.counts().items()]
        lines += [
            "# HELP maisi_job_seconds_total Time that finished jobs took.",
            "# TYPE maisi_job_seconds_total counter",
        ]
        lines += [f"maisi_job_seconds_total {self.queue.seconds():.3f}"]
        return "\n".join(lines) + "\n"

    def _failed(self, job: Job, error: Exception) -> None:
        known = find_input_error(error)
        text = str(known) if known else f"{type(error).__name__}: {error}"
        # What is wrong with the data stays wrong; what is wrong with a connection may pass.
        last = known is not None or job.attempts >= self.settings.attempts
        pause = self.settings.retry_seconds * 2 ** (job.attempts - 1)
        self.queue.fail(job, text, None if last else pause)
        if last:
            folder = self.dead / job.key
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "reason.txt").write_text(f"{job.kind} of study {job.study}, attempt {job.attempts}: {text}\n")
            logger.error("%s %s is given up: %s", job.kind, job.key, text)
        else:
            logger.warning("%s %s failed, again in %.0f s: %s", job.kind, job.key, pause, text)

    def _look(self) -> None:
        queue_whole_studies(self.settings, self.incoming, self.queue, self.queued)
        for folder in self.incoming.iterdir():
            old = time.time() - folder.stat().st_mtime > self.settings.keep_hours * 3600
            if old and (folder / ".queued").is_file() and not self.queue.in_use(folder):
                shutil.rmtree(folder, ignore_errors=True)
                self.queued.pop(folder.name, None)

    def _ask(self, place: str, archive: Callable[[], Archive], settings: Poll | Query, memory: str) -> None:
        """Fetch what is new in an archive, again and again; the spool's file `memory` lists what was fetched."""
        path = self.spool / memory
        seen = set(json.loads(path.read_text())) if path.is_file() else set()
        kinds = {chain.when: chain.when != "CT" for chain in self.settings.chains}
        while not self.stopping.wait(settings.every_seconds):
            try:
                if fetch_new(archive(), kinds, seen):
                    write_json(path, sorted(seen))
            except Exception as error:  # the archive may be away for a while
                logger.warning("%s cannot be asked: %s", place, error)

    def _watch(self) -> None:
        while not self.stopping.wait(TICK):
            try:
                self._look()
                self.looked = time.time()
            except Exception as error:  # a full disk may have room again
                logger.error("the spool: %s", error)


def _handler(listener: Listener) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/health":
                content = listener.health()
                self._answer(200 if content["status"] == "ok" else 503, json.dumps(content), "application/json")
            elif self.path == "/metrics":
                self._answer(200, listener.metrics(), "text/plain; version=0.0.4")
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
