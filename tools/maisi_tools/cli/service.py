"""Commands of the listener beside a PACS.

Imports stay inside the commands, so that `maisi --help` does not wait for torch and MONAI.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from maisi_tools.cli.options import need_dicom
from maisi_tools.errors import InputError


def listen(settings: str) -> None:
    """Run beside a PACS: what comes in goes through a chain of bundles, and results are stored back (docs/hospital.md).

    Args:
        settings: YAML file.
    """
    need_dicom()
    if importlib.util.find_spec("pynetdicom") is None:
        raise InputError("this command needs the extra 'dicom'; install it with: pip install 'maisi-bundles[dicom]'.")

    import logging
    import os
    import signal

    from maisi_tools.service.listener import Listener
    from maisi_tools.service.settings import read_settings

    wanted = read_settings(str(settings))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("pynetdicom").setLevel(logging.CRITICAL)  # tracebacks of what callers do; we say it in a line
    os.umask(0o077)
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
    from maisi_tools.service.jobs import JobQueue
    from maisi_tools.service.settings import read_settings

    path = Path(read_settings(str(settings)).spool) / "queue.sqlite"
    if not path.is_file():
        raise InputError(f"{path} does not exist; start `maisi listen {settings}` first")
    queue = JobQueue(path, recover=False)
    if revive is not None and not queue.revive(str(revive)):
        raise InputError(f"there is no dead job {revive}; `maisi jobs {settings}` lists them")
    for state, job in queue.listed():
        print(f"{state:10} {job.kind:9} {job.received} {job.attempts} {job.key} {job.error}")
