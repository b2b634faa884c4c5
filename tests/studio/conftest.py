from __future__ import annotations

import json
import os
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

pytest.importorskip("fastapi", reason="needs the extra 'studio'")
pytest.importorskip("uvicorn", reason="needs the extra 'studio'")

from maisi_tools.masks.phantom import flat_ct, make_phantom
from maisi_tools.studio.catalogue import Catalogue
from maisi_tools.studio.folders import Folders
from preloaded import WAITS

SIZE, SPACING = (48, 48, 48), (5.0, 5.0, 3.4)

PHANTOM = {"kind": "phantom", "size": list(SIZE), "spacing": list(SPACING)}


@pytest.fixture
def folders(tmp_path: Path, tiny_bundles: Path) -> Folders:
    (tmp_path / "studio").mkdir()
    return Folders(tmp_path / "studio", tiny_bundles)


@pytest.fixture
def catalogue(folders: Folders) -> Catalogue:
    return Catalogue(folders, ["cpu"])


@pytest.fixture(scope="session")
def labels() -> np.ndarray:
    return make_phantom("head_neck", SIZE, SPACING, 3)


@pytest.fixture(scope="session")
def files(labels: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A phantom's ``mask`` and ``ct`` as NIfTI files."""
    folder = tmp_path_factory.mktemp("given")
    noise = np.random.default_rng(0).normal(0, 10, labels.shape)
    hu = (flat_ct(labels) + noise * (labels > 0)).clip(-1000, 1000).astype(np.int16)
    found = {"mask": folder / "labels.nii.gz", "ct": folder / "head.nii.gz"}
    for what, values in (("mask", labels), ("ct", hu)):
        nib.save(nib.Nifti1Image(values, np.diag([*SPACING, 1.0])), found[what])
    return found


class Answer:
    """What a server answered: ``status``, ``headers``, ``content``, and ``json``."""

    def __init__(self, response: Any) -> None:
        self.status, self.headers, self.content = response.status, response.headers, response.read()

    @property
    def json(self) -> Any:
        return json.loads(self.content)

    @property
    def detail(self) -> str:
        return self.json["detail"]


class Running:
    """`maisi studio` in a process of its own."""

    def __init__(self, python: str, folder: Path, bundles: Path, *options: str, **environment: str) -> None:
        command = [python, "-m", "maisi_tools.cli", "studio", "--port", "0", "--open", "False"]
        command += ["--output_dir", str(folder), "--bundles", str(bundles), *options]
        self.folder, self.errors = folder, folder.with_name(f"{folder.name}.log")
        given = {**os.environ, **environment}
        with open(self.errors, "ab") as log:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=given)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("MAISI Studio: "), line + self.errors.read_text()[-3000:]
        self.address = line.removeprefix("MAISI Studio: ").strip()
        self.url = self.address.split("?")[0].rstrip("/")

    def ask(self, path: str, body: Any = None, method: str | None = None, **headers: str) -> Answer:
        """Ask; `body` is JSON, or bytes as they are."""
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return Answer(response)
        except urllib.error.HTTPError as error:
            return Answer(error)

    def upload(self, path: Path, kind: str, name: str | None = None) -> Answer:
        return self.ask(f"/v1/uploads?kind={kind}&name={name or path.name}", path.read_bytes())

    def wait_ready(self) -> None:
        wait(lambda: self.ask("/v1/health/ready").status == 200)

    def events(self, id: str) -> Iterator[dict[str, Any]]:
        with urllib.request.urlopen(f"{self.url}/v1/jobs/{id}/events", timeout=60) as lines:
            for line in lines:
                if line.startswith(b"data: "):
                    yield json.loads(line.removeprefix(b"data: "))

    def make(self, request: Any) -> dict[str, Any]:
        """Make a job, to its end."""
        answer = self.ask("/v1/jobs", request)
        assert answer.status == 202, answer.content
        *_, last = self.events(answer.json["id"])
        return last

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(30)


def wait(until: Callable[[], bool], seconds: float = WAITS) -> None:
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.05)


@pytest.fixture(scope="session")
def start_studio(python: str, tiny_bundles: Path) -> Iterator[Callable[..., Running]]:
    """``start_studio(folder, *options, **environment)`` starts one with the tiny bundles, till the end of the tests."""
    started: list[Running] = []

    def start(folder: Path, *options: str, bundles: Path = tiny_bundles, **environment: str) -> Running:
        started.append(Running(python, folder, bundles, *options, **environment))
        return started[-1]

    yield start
    for one in started:
        one.kill()


@pytest.fixture(scope="session")
def studio(start_studio: Callable[..., Running], tmp_path_factory: pytest.TempPathFactory) -> Running:
    """One that tests share."""
    running = start_studio(tmp_path_factory.mktemp("shared") / "studio", MAISI_MAX_FILE_BYTES="3000000")
    running.wait_ready()
    return running


@pytest.fixture(scope="session")
def waits() -> Callable[..., None]:
    return wait


@pytest.fixture
def in_background() -> Iterator[Callable[[Callable[[], Any]], threading.Thread]]:
    threads: list[threading.Thread] = []

    def run(work: Callable[[], Any]) -> threading.Thread:
        threads.append(threading.Thread(target=work, daemon=True))
        threads[-1].start()
        return threads[-1]

    yield run
    for thread in threads:
        thread.join(30)
