from __future__ import annotations

import datetime
import functools
import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import yaml

pytest.importorskip("highdicom", reason="needs the extra 'dicom'")
pytest.importorskip("pynetdicom", reason="needs the extra 'dicom'")

from maisi_tools.dicom.study import write_study
from maisi_tools.masks.phantom import flat_ct, make_phantom
from preloaded import WAITS

SIZE, SPACING = (48, 48, 48), (5.0, 5.0, 3.4)


@functools.cache
def _made(seed: int) -> tuple[tempfile.TemporaryDirectory, list[Path]]:
    """A study in a folder that is removed at the end, and its files."""
    import pydicom

    folder = tempfile.TemporaryDirectory(prefix="maisi-")
    labels = make_phantom("head_neck", SIZE, SPACING, seed)
    affine = np.diag([*SPACING, 1.0])
    created = datetime.datetime(2026, 1, 1 + seed % 28)
    study = Path(folder.name) / "study"
    files = write_study(study, flat_ct(labels), affine, labels, seed=seed, created=created)
    for path in files:
        ds = pydicom.dcmread(path)
        del ds.SyntheticData
        ds.save_as(path)
    return folder, [path.relative_to(study) for path in files]


def make_study(folder: Path, seed: int) -> list[Path]:
    """A CT series with its SEG and RTSTRUCT, which does not say that it is synthetic: as a hospital would send it.

    Of a seed that was asked for before, it is a copy.
    """
    made, files = _made(seed)
    shutil.copytree(Path(made.name) / "study", folder)
    return [folder / path for path in files]


def find_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Running:
    """`maisi listen` in a process of its own, started by the interpreter ``python``."""

    def __init__(self, config: Path, settings: dict, python: str) -> None:
        self.config, self.settings, self.python = config, settings, python
        self.url = f"http://{settings['http']}"
        self.log = config.with_suffix(".log")
        self.start()

    def start(self) -> None:
        command = [self.python, "-m", "maisi_tools.cli", "listen", str(self.config)]
        environment = {**os.environ, "MAISI_DICOMWEB_PASSWORD": "secret"}
        with open(self.log, "a") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        self.wait(self.health)

    def kill(self) -> None:
        """As a power cut would."""
        self.process.kill()
        self.process.wait()
        while self.health():  # the program that the process stands for ends a little later
            time.sleep(0.05)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(60)

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=10) as answer:
            return answer.read().decode()

    def health(self) -> dict:
        try:
            return json.loads(self.get("/health"))
        except (OSError, http.client.HTTPException):  # the second: it ended in the midst of an answer
            return {}

    def wait(self, ready, seconds: float = WAITS) -> None:
        end = time.time() + seconds
        while time.time() < end:
            if ready():
                return
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            time.sleep(0.3)
        raise AssertionError(self.log.read_text()[-3000:])


@pytest.fixture
def write_settings(tmp_path, tiny_bundles):
    """``write_settings(send_port, key=value)`` writes settings for a fast chain, returns (path, content)."""

    def write(send_port: int, **changes) -> tuple[Path, dict]:
        fast = {"num_inference_steps": 1, "progress": False}
        step = {"bundle": str(tiny_bundles / "maisi_controlnet"), "settings": fast}
        content = {
            "spool": "spool",
            "send": {"ae_title": "ARCHIVE", "host": "127.0.0.1", "port": send_port},
            "listen": {
                "port": find_port(),
                "host": "127.0.0.1",
                "quiet_seconds": 1.0,
                "allowed": [{"ae_title": "ARCHIVE", "host": "127.0.0.1"}],
            },
            "chains": [{"when": "SEG", "steps": [step]}],
            "http": f"127.0.0.1:{find_port()}",
            "retry_seconds": 1.0,
            **changes,
        }
        path = tmp_path / "listen.yaml"
        path.write_text(yaml.safe_dump(content))
        return path, content

    return write


@pytest.fixture
def listen(write_settings, python):
    """``listen(send_port, ...)`` starts a listener, which is stopped at the end; ``real`` starts it from nothing."""
    running: list[Running] = []

    def start(send_port: int, real: bool = False, **changes) -> Running:
        running.append(Running(*write_settings(send_port, **changes), sys.executable if real else python))
        return running[-1]

    yield start
    for one in running:
        if one.process.poll() is None:
            one.kill()


@pytest.fixture(scope="session")
def real_study():
    """``real_study(folder, seed)``, see :func:`make_study`."""
    return make_study


@pytest.fixture(scope="session")
def free_port():
    """``free_port()`` is a port that nobody listens at."""
    return find_port
