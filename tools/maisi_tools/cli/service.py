"""Commands that serve: the listener beside a PACS, and the studio.

Imports stay inside the commands, so that `maisi --help` does not wait for torch and MONAI.
"""

from __future__ import annotations

from pathlib import Path

from maisi_tools.cli.options import bundles_folder, listed, need_extra
from maisi_tools.errors import InputError


def listen(settings: str) -> None:
    """Run beside a PACS: what comes in goes through a chain of bundles, and results are stored back (docs/hospital.md).

    Args:
        settings: YAML file.
    """
    need_extra("dicom", "highdicom", "pynetdicom")

    import logging
    import os
    import signal

    from maisi_tools.files import held
    from maisi_tools.service.listener import Listener, take_over
    from maisi_tools.service.settings import read_settings

    wanted = read_settings(str(settings))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("pynetdicom").setLevel(logging.CRITICAL)  # tracebacks of what callers do; we say it in a line
    os.umask(0o077)
    taken = f"another listener works on the spool {wanted.spool}; stop it, or give this one a spool of its own"
    take_over(Path(wanted.spool))
    with held(Path(wanted.spool), taken):
        listener = Listener(wanted)
        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, lambda *_: listener.stop())
        listener.run()


def jobs(settings: str, revive: str | None = None) -> None:
    """List the jobs of `maisi listen`, or let a dead letter be tried again.

    Args:
        settings: its YAML file.
        revive: key of a dead job.
    """
    from maisi_tools.service.jobs import QUEUE, JobQueue
    from maisi_tools.service.settings import read_settings

    path = Path(read_settings(str(settings)).spool) / QUEUE
    if not path.is_file():
        raise InputError(f"{path} does not exist; start `maisi listen {settings}` first")
    queue = JobQueue(path, recover=False)
    if revive is not None and not queue.revive(str(revive)):
        raise InputError(f"there is no dead job {revive}; `maisi jobs {settings}` lists them")
    for state, job in queue.listed():
        print(f"{state:10} {job.kind:9} {job.received} {job.attempts} {job.key} {job.error}")


def studio(
    port: int = 8765,
    host: str = "127.0.0.1",
    output_dir: str = "studio",
    device: str = "cpu",
    token: str | None = None,
    tls_cert: str | None = None,
    tls_key: str | None = None,
    open: bool = True,
    bundles: str | None = None,
) -> None:
    """Serve a page, and an HTTP API, in which a patient is designed and a CT of it made (docs/how-to/studio.md).

    Args:
        port: to listen at; 0 takes a free one.
        host: address to listen at; another one than 127.0.0.1 needs a token and TLS.
        output_dir: folder of jobs, uploads and label maps; started again, the studio goes on.
        device: cpu or cuda, or several: cuda:0,cuda:1. Each works on a job of its own.
        token: that every request needs; by default that of the environment variable MAISI_STUDIO_TOKEN, if any.
        tls_cert: PEM file of a certificate, for TLS.
        tls_key: PEM file of its key.
        open: whether to open the page in a browser.
        bundles: folder with the bundles; by default the one of the checkout you are in.
    """
    need_extra("studio", "fastapi", "uvicorn")

    import os

    from maisi_tools.settings import check_device, check_number
    from maisi_tools.studio.folders import Folders
    from maisi_tools.studio.guard import check_access, listen_at
    from maisi_tools.studio.jobs import Worker

    check_number("port", port, 0, 65535, whole=True)
    token = token or os.environ.get("MAISI_STUDIO_TOKEN") or None
    check_access(host, token, tls_cert, tls_key)
    devices = listed(device)
    if len({check_device(name) for name in devices}) < max(1, len(devices)):
        raise InputError(f"device is {device!r}; allowed is at least one, and each once: cpu, or cuda:0,cuda:1.")
    folders = Folders(Path(output_dir).resolve(), bundles_folder(bundles).resolve())
    os.umask(0o077)
    with folders.held(), listen_at(host, port) as listening:
        workers = [Worker(folders, name) for name in devices]  # they import MONAI while this process does
        try:
            from maisi_tools.studio.app import serve

            serve(folders, workers, listening, host, token, tls_cert, tls_key, open)
        finally:
            for worker in workers:
                worker.close()
