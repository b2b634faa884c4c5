"""The process that makes what is asked for: ``python -m maisi_tools.studio.worker FOLDER BUNDLES DEVICE``.

It is told jobs, one JSON a line, and answers in lines, too. MONAI is imported once; the work is done in a fork, so that
one that is killed (a job was cancelled, memory ran out) is replaced in no time. It ends when its input does.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import monai.engines  # noqa: F401  so that no fork has to import it
import monai.handlers  # noqa: F401
import nibabel as nib
import numpy as np
from scipy import ndimage

import maisi_tools.networks  # noqa: F401
from maisi_tools.errors import find_input_error
from maisi_tools.files import RUN_RECORD
from maisi_tools.masks.intensity import hu_ranges
from maisi_tools.masks.vocabulary import display_name
from maisi_tools.studio.folders import DISK_FULL, JOB, Folders
from maisi_tools.studio.jobs import parsed
from maisi_tools.studio.notes import Notes
from maisi_tools.studio.recipe import MASK, Networks, command_of, result_of, steps_of, uploads_of

Say = Callable[[Mapping[str, Any]], None]


def main(root: str, bundles: str, device: str) -> None:
    """Fork workers, one after another, until the input ends."""
    with os.fdopen(os.dup(1), "w", buffering=1) as answers:
        os.dup2(2, 1)  # what others print is no answer

        def say(answer: Mapping[str, Any]) -> None:
            try:
                answers.write(f"\n{json.dumps(answer)}\n")  # what a killed fork left cut ends here
            except BrokenPipeError:
                os._exit(0)  # the server has gone; the job is made again when it is back

        while True:
            pid = os.fork()
            if pid == 0:
                _serve(Folders(Path(root), Path(bundles)), device, say)
            _, status = os.waitpid(pid, 0)
            code = os.waitstatus_to_exitcode(status)
            if code == 0:
                return
            say({"gone": pid, "why": signal.Signals(-code).name if code < 0 else f"status {code}"})


def _serve(folders: Folders, device: str, say: Say) -> None:
    """Make one job after another; never returns."""
    jobs: queue.Queue[dict[str, Any]] = queue.Queue()

    def listen() -> None:
        with open(0, "rb", closefd=False) as lines:
            for job in parsed(lines):
                if job["for"] == os.getpid():  # not what a fork was given that was killed before it read it
                    jobs.put(job)
        os._exit(0)  # likewise

    threading.Thread(target=listen, daemon=True).start()
    networks = Networks(device)
    say({"ready": os.getpid()})
    while True:
        job = jobs.get()
        try:
            say({"id": job["id"], "state": "done", **make(job, folders, networks, say)})
        except Exception as error:  # whatever is wrong with one job, the others are made
            traceback.print_exc()
            say({"id": job["id"], "state": "failed", "error": _words(error)})


def make(job: Mapping[str, Any], folders: Folders, networks: Networks, say: Say) -> dict[str, Any]:
    """Make a job's files in its folder, and return what is to be known of them.

    Args:
        job: with ``id``, ``request`` and ``overlays``.
        folders: of the studio.
        networks: that are in memory.
        say: is told the progress.

    Returns:
        ``command``, ``volumes``, ``metrics`` (of a CT: median HU of each structure, with the range of plausible ones)
        and ``notes``, what the run, and the reading of the uploads it uses, warned of.
    """
    folder = folders.job(job["id"])
    for path in folder.iterdir():  # of an attempt that was interrupted
        if path.name != JOB:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    command = command_of(job, folders, job["overlays"])
    sys.argv = [command]  # what the run's record will say
    used = uploads_of(job["request"], folders)
    notes = Notes({one["path"]: one["name"] for one in used}, before=[note for one in used for note in one["notes"]])
    with notes:
        for step in steps_of(job, folders, job["overlays"]):

            def told(done: int | None, of: int | None, about: str = step.about) -> None:
                what = about if about == MASK or of is None else "sampling" if done != of else "decoding"
                say({"id": job["id"], "progress": {"what": what, "step": done, "steps": of}})

            told(None, None)
            step(networks, told)
    found = result_of(job, folders)
    metrics = organs_of(found["ct"], found["mask"], folder / RUN_RECORD) if "ct" in found else []
    return {"command": command, "volumes": list(found), "metrics": metrics, "notes": notes.found}


def organs_of(ct: Path, mask: Path, record: Path) -> list[dict[str, Any]]:
    """Median HU of each structure of a mask: ``name``, ``hu`` and the plausible range ``low``, ``high``, if known.

    Args:
        ct, mask: NIfTI files on one grid, the mask in the vocabulary.
        record: of the run, which may have ranges of its own.
    """
    values, labels = (np.asarray(nib.as_closest_canonical(nib.load(path)).dataobj) for path in (ct, mask))
    ranges = hu_ranges(json.loads(record.read_text())["settings"].get("hu_ranges"))
    found = []
    for label, box in enumerate(ndimage.find_objects(labels), start=1):
        if box is not None:
            low, high = ranges.get(label, (None, None))
            hu = round(float(np.median(values[box][labels[box] == label])), 1)
            found.append({"name": display_name(label), "hu": hu, "low": low, "high": high})
    return found


def _words(error: BaseException) -> str:
    """What to say of an error to the person who pressed the button."""
    if (known := find_input_error(error)) is not None:
        return str(known)
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
        return "there is not enough memory; give a memory_limit, a coarser spacing or a smaller field of view"
    if isinstance(error, OSError):
        do = "; make room on the disk, or give another --output_dir" if error.errno in DISK_FULL else ""
        return f"a file could not be read or written: {error}{do}"
    return f"{type(error).__name__}: {error}; the worker's log has the details"


if __name__ == "__main__":
    main(*sys.argv[1:])
