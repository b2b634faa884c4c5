"""Plans in a process of their own, which ends itself where one takes too long: no size holds up the others for good.

``python -m maisi_tools.studio.planner BUNDLES`` is asked in lines of JSON, one at a time, and answers in lines.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from maisi_tools.errors import InputError, find_input_error

PLANNING = 60.0
"""Seconds that one plan may take."""

KEPT = 64
"""Plans, and refusals, that are not made again."""


class Planner:
    """See the module; its process is started when it is needed.

    Args:
        bundles: their folder.
    """

    def __init__(self, bundles: Path) -> None:
        self.bundles = bundles
        self._process: subprocess.Popen[str] | None = None
        self._known: dict[str, dict[str, Any]] = {}

    def known(self, asked: Sequence[Any]) -> list[dict[str, Any]] | None:
        """What :meth:`plan` returned for the same, None where it was not asked.

        Raises:
            InputError: as it did.
        """
        answer = self._known.get(json.dumps(asked))
        if answer is not None and "error" in answer:
            raise InputError(answer["error"])
        return None if answer is None else answer["stages"]

    def plan(self, asked: Sequence[Any]) -> list[dict[str, Any]]:
        """What making a CT needs, see :func:`~maisi_tools.bundles.footprint.footprints`; one call at a time.

        Args:
            asked: overlays of the weights; voxels along x, y, z, legal for them; memory limit as text, or None; "cpu"
                or "cuda".

        Returns:
            A list of ``stage``, ``bytes`` at its peak, and ``refusal``, why it does not fit (``bytes`` is None then).

        Raises:
            InputError: it is refused, or takes longer than :data:`PLANNING`.
        """
        while (found := self.known(asked)) is None:
            answer = self._ask(asked)
            if len(self._known) >= KEPT:
                del self._known[next(iter(self._known))]
            self._known[json.dumps(asked)] = answer
        return found

    def close(self) -> None:
        """End the process, with what it is doing."""
        if self._process is not None:
            self._process.kill()

    def _ask(self, asked: Sequence[Any]) -> dict[str, Any]:
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(self.bundles)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,
                text=True,
            )
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        with suppress(BrokenPipeError):  # it has ended, which is seen below
            process.stdin.write(json.dumps([PLANNING, *asked]) + "\n")
            process.stdin.flush()
        if line := process.stdout.readline():
            return json.loads(line)
        if process.wait() != -signal.SIGALRM:
            raise RuntimeError(f"the process that plans has ended ({process.returncode})")
        shape = " x ".join(map(str, asked[1]))
        # Not kept: on a machine that is less busy it may be made in time.
        raise InputError(
            f"planning a CT of {shape} voxels takes longer than {PLANNING:g} s; allowed is what takes less: give a "
            "smaller size, or ask the command maisi plan, which takes its time"
        )


def main(bundles: str) -> None:
    """Plan what is asked for, until the input ends."""
    from maisi_tools.bundles.footprint import footprints
    from maisi_tools.bundles.stage import config_files
    from maisi_tools.studio.catalogue import CONTROLNET

    with os.fdopen(os.dup(1), "w", buffering=1) as answers:
        os.dup2(2, 1)  # what others print is no answer
        for line in sys.stdin:
            seconds, overlays, size, limit, device = json.loads(line)
            signal.setitimer(signal.ITIMER_REAL, seconds)  # its signal ends the process
            try:
                configs = config_files(Path(bundles) / CONTROLNET, ["inference.json", *overlays])
                found = footprints(configs, size, None, limit, device)
                stages = [
                    {"stage": one.stage, "bytes": one.plan.peak if one.plan else None, "refusal": one.refusal}
                    for one in found
                ]
                answer: dict[str, Any] = {"stages": stages}
            except Exception as error:
                if (known := find_input_error(error)) is None:
                    raise
                answer = {"error": str(known)}
            signal.setitimer(signal.ITIMER_REAL, 0)
            answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
