"""The studio's page in real Chromium, on a real server with the shipped weights."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from maisi_tools.masks.phantom import make_phantom
from maisi_tools.masks.vocabulary import display_name
from maisi_tools.report.preview import label_colour, plane

pytestmark = [
    pytest.mark.browser,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        not (
            importlib.util.find_spec("playwright")
            and importlib.util.find_spec("fastapi")
            and importlib.util.find_spec("uvicorn")
            and shutil.which("chromium")
        ),
        reason="needs Chromium, playwright and the extra 'studio' (make test-browser)",
    ),
]

PAROTID = 18
"""MAISI's vocabulary leaves this id free; the small weights have the left parotid gland there."""

SOFT = ["--no-sandbox", "--enable-unsafe-swiftshader"]
"""Chromium in a container, WebGL2 computed by the processor."""

MAKING = 600_000
"""Milliseconds that a job may take on a busy machine."""


class Server:
    """A studio in a process of its own, that can be killed and started again."""

    def __init__(self, python: str, root: Path, bundles: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.python, self.root, self.bundles = python, root, bundles
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        command = [self.python, "-m", "maisi_tools.cli", "studio", "--port", str(self.port), "--open", "False"]
        command += ["--output_dir", str(self.root / "studio"), "--bundles", str(self.bundles)]
        self.process = subprocess.Popen(command)
        self.wait(lambda: self.ask("/v1/health/ready"), 300)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def wait(self, until: Callable[[], Any], seconds: float) -> Any:
        end = time.monotonic() + seconds
        while True:
            try:
                if found := until():
                    return found
            except OSError:  # not there yet: refused, or 503
                pass
            assert self.process.poll() is None, "the server has ended"
            assert time.monotonic() < end, "waited too long"
            time.sleep(0.2)

    def ask(self, path: str, body: Any = None, method: str | None = None) -> Any:
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} if data else {}
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            content = answer.read()
        return json.loads(content) if answer.headers["Content-Type"].startswith("application/json") else content

    def make(self, **request: Any) -> dict[str, Any]:
        """A job that is done, made without the page."""
        id = self.ask("/v1/jobs", request)["id"]

        def ended() -> Any:
            job = self.ask(f"/v1/jobs/{id}")
            return job if job["state"] in ("done", "failed", "cancelled") else None

        job = self.wait(ended, 600)
        assert job["state"] == "done", job["error"]
        return job

    def cancel(self, id: str) -> None:
        with contextlib.suppress(urllib.error.HTTPError):  # it has ended
            self.ask(f"/v1/jobs/{id}", method="DELETE")

    def volumes(self, job: dict[str, Any], folder: Path) -> SimpleNamespace:
        """The NIfTI files of a job, in `folder`."""
        found = {}
        for file in job["files"]:
            for what in ("ct", "mask"):
                if file["name"].endswith(f"_{what}.nii.gz"):
                    found[what] = folder / file["name"]
                    found[what].write_bytes(self.ask(f"/v1/jobs/{job['id']}/files/{file['name']}"))
        return SimpleNamespace(**found)


@pytest.fixture(scope="module")
def server(python: str, repo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    started = Server(python, tmp_path_factory.mktemp("studio"), repo_root / "bundles")
    yield started
    started.kill()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        yield playwright.chromium


@pytest.fixture(scope="module")
def browser(chromium: Any) -> Iterator[Any]:
    opened = chromium.launch(executable_path=shutil.which("chromium"), args=SOFT)
    yield opened
    opened.close()


@pytest.fixture
def open_page(browser: Any, server: Server) -> Iterator[Callable[..., Any]]:
    """Opens the page; nothing may go wrong in it, nothing may be asked of anyone else."""
    wrong: list[str] = []
    contexts = []

    def opened(address: str = "/", **settings: Any) -> Any:
        context = browser.new_context(accept_downloads=True, **settings)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: wrong.append(request.url) if outside(request.url) else None)
        page.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
        page.goto(server.url + address)
        page.wait_for_selector("body[data-ready]", timeout=60_000)
        return page

    def outside(url: str) -> bool:
        return not url.startswith((f"{server.url}/", "data:", f"blob:{server.url}"))

    yield opened
    for context in contexts:
        context.close()
    # Chromium reports each refused request as an error of its own; the page has to say it, and tests look there.
    assert [text for text in wrong if not text.startswith("Failed to load resource")] == []


@pytest.fixture(scope="module")
def phantom(server: Server, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A job without the page: the CT of a phantom in two steps, and its files."""
    job = server.make(
        makes="ct", source={"kind": "phantom", "body": "head_neck"}, settings={"seed": 3, "num_inference_steps": 2}
    )
    files = server.volumes(job, tmp_path_factory.mktemp("phantom"))
    return SimpleNamespace(job=job, ct=files.ct, mask=files.mask)


def soon(locator: Any) -> Any:
    """Waits for what a locator is to be; unlike wait_for_function without eval, which the page's policy forbids."""
    from playwright.sync_api import expect

    return expect(locator)


def steps(page: Any, number: int) -> None:
    """Sets the sampler's steps."""
    if not page.locator("#settings details").evaluate("details => details.open"):
        page.click("#settings summary")
    page.get_by_label("Steps", exact=True).fill(str(number))


def done(page: Any) -> str:
    """Waits for the result; returns the job's id."""
    page.wait_for_selector("#shown[data-job] .viewer[data-ready], #trouble:not(:empty)", timeout=MAKING)
    assert page.inner_text("#trouble") == ""
    id = page.get_attribute("#shown", "data-job")
    assert page.url.endswith(f"#job={id}")
    return id


def pixels(page: Any, name: str) -> np.ndarray:
    values = page.evaluate(
        "name => { const c = document.querySelector(`canvas.${name}`);"
        " return [c.height, c.width, [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]]; }",
        name,
    )
    return np.array(values[2]).reshape(values[0], values[1], 4)[..., :3]


def ras(path: Path) -> np.ndarray:
    return nib.as_closest_canonical(nib.load(path)).get_fdata()


def expected(hu: np.ndarray, labels: np.ndarray, name: str, voxel, window=(-160, 240), opacity=0.4) -> np.ndarray:
    grey = ((plane(hu, name, voxel) - window[0]) * 255 / (window[1] - window[0])).clip(0, 255)
    over = plane(labels, name, voxel)
    picture = np.repeat(grey[..., None], 3, axis=-1)
    for label in np.unique(over):
        if label not in (0, 200):
            inside = over == label
            picture[inside] = picture[inside] * (1 - opacity) + label_colour(int(label)) * 255 * opacity
    return picture[::-1]  # rows run downwards on a canvas


def looks_like(page: Any, hu: np.ndarray, labels: np.ndarray) -> None:
    """The three planes are the file's, mask over CT, at the slices that the sliders say."""
    slices = {name: int(page.input_value(f"input.{name}")) for name in ("sagittal", "coronal", "axial")}
    voxel = [slices[name] for name in ("sagittal", "coronal", "axial")]
    for name in slices:
        np.testing.assert_allclose(pixels(page, name), expected(hu, labels, name, voxel), atol=1.5, err_msg=name)


def without_barriers(page: Any) -> None:
    """axe-core finds nothing serious; it comes with axe-playwright-python."""
    spec = importlib.util.find_spec("axe_playwright_python")
    if spec is None or spec.origin is None:
        pytest.skip("needs axe-playwright-python (make test-browser)")
    page.evaluate(Path(spec.origin).with_name("axe.min.js").read_text())
    found = page.evaluate("axe.run()")["violations"]
    listed = [
        f"{one['id']} ({one['impact']}): {node['html'][:160]} {node['failureSummary']}"
        for one in found
        for node in one["nodes"][:3]
    ]
    assert listed == []


def test_from_a_slider_to_the_files_and_the_same_by_command(open_page, server, tmp_path, python) -> None:
    page = open_page()
    page.get_by_label("Organs by size").check()
    slider = page.get_by_label("left parotid, slider")
    assert slider.get_attribute("aria-valuetext") == "any size"
    slider.fill("40")
    assert page.get_by_label("left parotid in ml, empty for any").input_value() == "40"
    page.get_by_label("right parotid in ml, empty for any").fill("20")
    began = time.monotonic()
    page.click("#make-ct")
    id = done(page)
    print(f"\nslider to picture, defaults: {time.monotonic() - began:.1f} s")
    job = server.ask(f"/v1/jobs/{id}")
    assert job["request"]["source"]["organ_sizes"] == {"left parotid": 40, "right parotid": 20}

    saved = {}
    for link in page.locator(".files a").all():
        with page.expect_download() as download:
            link.click()
        saved[download.value.suggested_filename] = tmp_path / download.value.suggested_filename
        download.value.save_as(saved[download.value.suggested_filename])
    (ct,) = [path for name, path in saved.items() if name.endswith("_ct.nii.gz")]
    (mask,) = [path for name, path in saved.items() if name.endswith("_mask.nii.gz")]
    (picture,) = [path for name, path in saved.items() if name.endswith(".png")]
    assert picture.read_bytes().startswith(b"\x89PNG")
    hu, labels = ras(ct), ras(mask).astype(int)
    looks_like(page, hu, labels)
    ml = np.prod(nib.load(mask).header.get_zooms()) / 1000
    row = page.locator(".structures tr", has_text="left parotid gland")
    assert float(row.locator("td").nth(0).inner_text()) == pytest.approx((labels == PAROTID).sum() * ml, abs=0.51)
    assert 36 <= (labels == PAROTID).sum() * ml <= 44
    median = float(row.locator("td").nth(1).inner_text().replace("−", "-"))
    assert median == pytest.approx(np.median(ras(ct)[labels == PAROTID]), abs=0.51)

    # The command, as it is printed, in a folder of its own.
    command = page.inner_text(".command")
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.click(".copy")
    assert page.evaluate("navigator.clipboard.readText()") == command == job["command"]
    folder = tmp_path / "by command"
    folder.mkdir()
    subprocess.run(command, shell=True, cwd=folder, check=True, capture_output=True)
    for path in (ct, mask):
        (again,) = folder.rglob(path.name)
        assert again.read_bytes() == path.read_bytes()
    without_barriers(page)


def test_a_mask_is_drawn_and_looked_at_before_its_ct(open_page, server, tmp_path) -> None:
    """With an edit; the CT is made of the very mask, while the form says the same."""
    page = open_page()
    page.click("#add-edit")
    page.locator("#edit-list .verb").select_option(label="Change the size of")
    page.get_by_label("Structure", exact=True).select_option("left parotid gland")
    page.get_by_label("Size in percent of now").fill("150")
    page.click("#draw-mask")
    mask_id = done(page)
    job = server.ask(f"/v1/jobs/{mask_id}")
    labels = ras(server.volumes(job, tmp_path).mask).astype(int)
    plain = make_phantom("head_neck", labels.shape, (4.0, 4.0, 2.5), 0)
    assert (labels == PAROTID).sum() == pytest.approx(1.5 * (np.asarray(plain) == PAROTID).sum(), abs=2)
    slices = [int(page.input_value(f"input.{name}")) for name in ("sagittal", "coronal", "axial")]
    grey = np.where(labels > 0, 60, 0) * 400 / 255 - 160  # the body without a CT
    want = expected(grey, labels, "coronal", slices, opacity=1)
    np.testing.assert_allclose(pixels(page, "coronal"), want, atol=1.5)
    assert page.locator(".of-ct").count() == 0

    steps(page, 1)
    soon(page.locator("#hint")).to_contain_text("the mask that was drawn")
    page.click("#make-ct")
    page.wait_for_url(lambda url: not url.endswith(mask_id))
    id = done(page)
    job = server.ask(f"/v1/jobs/{id}")
    assert job["request"]["source"] == {"kind": "job", "id": mask_id}
    files = server.volumes(job, tmp_path)
    np.testing.assert_array_equal(ras(files.mask), labels)
    # Another seed draws another patient: the mask of before is not taken for it.
    page.get_by_label("Seed", exact=True).fill("9")
    assert page.inner_text("#hint") == ""


def test_a_mask_of_ones_own_with_labels_mapped_by_hand(open_page, server, phantom, tmp_path) -> None:
    image = nib.load(phantom.mask)
    labels = np.asanyarray(image.dataobj)
    own = np.where(labels == PAROTID, 240, labels).astype(np.uint8)
    own[:2, :2, :2] = 241
    hostile = tmp_path / "<img src=x onerror=alert(1)>.nii.gz"
    nib.save(nib.Nifti1Image(own, image.affine), hostile)
    page = open_page()
    page.get_by_label("A mask of mine").check()
    page.click("#make-ct")
    assert "Choose a mask first" in page.inner_text("#problem")
    part = page.locator("[data-kind=upload]")
    part.get_by_label("Mask", exact=True).set_input_files({"name": "x.nii.gz", "mimeType": "", "buffer": b"no volume"})
    page.wait_for_selector("[data-kind=upload] .refused:not(:empty)")
    part.get_by_label("Mask", exact=True).set_input_files(hostile)
    part.locator("[data-label='240']").wait_for()
    assert "<img src=x" in part.locator(".about").inner_text() and page.locator("img").count() == 0
    part.locator(".label-map").select_option("maisi")
    assert part.locator(".unknown").inner_text().startswith("2 labels are unknown")
    part.get_by_label("Structure of label 240").fill("left ear trumpet")
    part.get_by_label("Name of this reading").fill("by hand")
    part.locator(".save-map").click()
    part.locator(".refused", has_text="left ear trumpet").wait_for()
    part.get_by_label("Structure of label 240").fill(display_name(PAROTID))
    part.get_by_label("Structure of label 241").fill("")
    steps(page, 1)
    page.click("#make-ct")
    assert "Use and save it" in page.inner_text("#problem")
    part.locator(".save-map").click()
    part.locator(".map-file").wait_for()
    with page.expect_download() as download:
        part.locator(".map-file").click()
    saved = json.loads(Path(download.value.path()).read_text())
    assert saved["240"] == display_name(PAROTID) and saved["241"] is None
    assert part.locator(".label-map").input_value() == "by hand"
    page.click("#make-ct")
    id = done(page)
    files = server.volumes(server.ask(f"/v1/jobs/{id}"), tmp_path)
    made = ras(files.mask)
    np.testing.assert_array_equal(made == PAROTID, ras(phantom.mask) == PAROTID)
    looks_like(page, ras(files.ct), made.astype(int))

    # The page once more: the upload and its reading are still there.
    page.reload()
    done(page)
    soon(part.locator(".label-map")).to_have_value("by hand")
    assert part.get_by_label("Structure of label 240").input_value() == display_name(PAROTID)
    without_barriers(page)


def test_a_new_mask_is_not_read_as_the_one_before(open_page, files, tmp_path) -> None:
    zipped = tmp_path / "segmentations.zip"
    with zipfile.ZipFile(zipped, "w") as archive:
        for name in ("liver", "spleen"):
            voxels = np.zeros((16, 16, 16), np.uint8)
            voxels[4:8, 4:8, 4:8] = name == "liver"
            voxels[7:12, 7:12, 7:12] |= name == "spleen"
            nib.save(nib.Nifti1Image(voxels, np.diag([4.0, 4.0, 4.0, 1.0])), tmp_path / f"{name}.nii.gz")
            archive.write(tmp_path / f"{name}.nii.gz", f"{name}.nii.gz")
    page = open_page()
    page.get_by_label("A mask of mine").check()
    part = page.locator("[data-kind=upload]")
    part.get_by_label("Mask", exact=True).set_input_files(zipped)
    part.locator("[data-label='5']").wait_for()
    assert part.locator(".label-map").input_value() == "totalsegmentator"
    assert part.get_by_label("Structure of label 5").input_value() == "liver"
    said = "segmentations.zip: classes overlap, and the smaller one stays: spleen and liver (1 voxels)"
    assert part.locator(".notes").inner_text() == said
    part.get_by_label("Mask", exact=True).set_input_files(files["mask"])
    part.locator(f"[data-label='{PAROTID}']").wait_for()
    assert part.locator(".label-map").input_value() == "maisi" and part.locator(".notes").inner_text() == ""
    assert part.get_by_label(f"Structure of label {PAROTID}").input_value() == display_name(PAROTID)


def test_nothing_is_typed_into_a_reading_that_is_on_its_way_out(open_page, files) -> None:
    page = open_page()
    page.get_by_label("A mask of mine").check()
    part = page.locator("[data-kind=upload]")
    part.get_by_label("Mask", exact=True).set_input_files(files["mask"])
    gland = part.get_by_label(f"Structure of label {PAROTID}")
    gland.fill("")
    asked: list[Any] = []
    page.route("**/labels?*", lambda route: asked.append(route))
    part.locator(".label-map").select_option("totalsegmentator")
    soon(gland).to_be_disabled()
    assert part.locator(".save-map").is_disabled()
    asked.pop().continue_()
    page.unroute("**/labels?*")
    gland.fill("liver")  # waits until it can be written
    assert gland.get_attribute("data-was") != display_name(PAROTID)
    assert gland.input_value() == "liver" and part.locator(".save-map").is_enabled()
    # A reading that cannot be had shows no rows: those of the one before mean other structures.
    page.route("**/labels?*", lambda route: route.fulfill(status=404, json={"detail": "it is gone"}))
    part.locator(".label-map").select_option("maisi")
    part.locator(".refused", has_text="it is gone").wait_for()
    assert gland.count() == 0 and not part.locator(".save-map").is_visible()


def test_two_jobs_put_into_the_form_at_once_are_not_mixed(open_page, server, files) -> None:
    upload = server.ask("/v1/uploads?kind=mask&name=a.nii.gz", files["mask"].read_bytes())["id"]
    asked = {
        "upload": {"source": {"kind": "upload", "id": upload}, "edits": [{"insert": {"lung tumor": 15}}]},
        "phantom": {"source": {"kind": "phantom", "body": "head_neck"}, "edits": []},
    }
    page = open_page()
    held: list[Any] = []
    page.route(f"**/v1/uploads/{upload}", lambda route: held.append(route))
    for request in asked.values():
        job = server.ask("/v1/jobs", {"makes": "mask", **request})
        server.cancel(job["id"])
        page.evaluate(
            "id => { document.querySelector('#state').textContent = ''; location.hash = `job=${id}`; }", job["id"]
        )
        page.locator("#state", has_text=re.compile("Cancelled|Made|not work")).wait_for()
        page.click("#again")
        soon(page.locator("#form")).to_have_js_property("inert", True)
    soon(page.locator("[name=kind][value=upload]")).to_be_checked()
    for route in held:
        route.continue_()
    page.unroute(f"**/v1/uploads/{upload}")
    soon(page.locator("[name=kind][value=phantom]")).to_be_checked()
    soon(page.locator("#form")).to_have_js_property("inert", False)
    assert page.locator("#edit-list li").count() == 0


def test_a_reading_is_saved_under_a_name_of_its_own(open_page, files) -> None:
    page = open_page()
    page.get_by_label("A mask of mine").check()
    part = page.locator("[data-kind=upload]")
    part.get_by_label("Mask", exact=True).set_input_files(files["mask"])
    gland = part.get_by_label(f"Structure of label {PAROTID}")
    gland.fill("")
    name = part.get_by_label("Name of this reading")
    assert name.input_value() == "mine"
    said = "mine is the name of another reading"
    refused = {"status": 409, "json": {"detail": said}}
    page.route("**/v1/label_maps", lambda route: route.fulfill(**refused))
    part.locator(".save-map").click()
    part.locator(".name-refused:not(:empty)").wait_for()
    assert part.locator(".name-refused").inner_text() == said
    assert name.input_value() == "mine 2" and name.evaluate("name => name === document.activeElement")
    page.unroute("**/v1/label_maps")
    part.locator(".save-map").click()
    part.locator(".map-file").wait_for()
    assert part.locator(".label-map").input_value() == "mine 2" and not name.is_visible()
    gland.fill("liver")
    assert name.input_value() == "mine 3" and part.locator(".name-refused").inner_text() == ""


def test_a_job_put_into_the_form_asks_for_the_same(open_page, server, files) -> None:
    """All that a request may say, whatever the form was before; what no field says is shown in words."""
    options = server.ask("/v1/options")
    preset, solver = options["presets"][0]["name"], options["solvers"][-1]
    ids = {kind: server.ask(f"/v1/uploads?kind={kind}&name=a.nii.gz", files[kind].read_bytes())["id"] for kind in files}
    plain = {"kind": "phantom", "body": "head_neck"}
    drawn = server.make(makes="mask", source=plain, settings={"seed": 3})["id"]
    several = [
        {"insert": {"lung tumor": [20, 12]}, "resize": {"liver": 1.25}, "remove": "hepatic tumor", "flip": True},
        {"augment": {"lung tumor": 1.3}, "shift_mm": 5, "elastic_mm": 2.5, "seed": 4},
        {"insert": {"lung tumor": 15}, "seed": 8},
        {"resize": {"left parotid gland": 0.123456}},
        {"remove": "lung tumor"},
    ]
    in_words = [
        "Take out hepatic tumor, then change the size of liver to 125 % of now, then put in lung tumor of 20 and 12 mm,"
        " then swap left and right",
        "Change the diameter of lung tumor to 130 % of now, then move it by 5 mm, then deform it by 2.5 mm; seed 4",
    ]
    anew = [{"redraw": ["spinal cord", "left parotid gland"]}, {"redraw": "spinal cord"}]
    asked: list[tuple[dict[str, Any], str, list[str]]] = [
        ({"makes": "ct", "source": plain}, "phantom", []),
        (
            {
                "makes": "ct",
                "source": {"kind": "phantom", "body": "torso", "size": [64, 48, 56], "spacing": [4, 4.5, 3]},
                "edits": several,
                "settings": {"output_size": [64, 64, 64], "memory_limit": "800MB", "guidance_scale": 1.25, "seed": 5},
            },
            "phantom",
            [*in_words, "64 × 48 × 56", "64 × 64 × 64 voxels", "memory limit 800MB", "guidance scale 1.25"],
        ),
        (
            {
                "makes": "ct",
                "source": {**plain, "preset": preset},
                "settings": {"preset": preset, "num_inference_steps": 12, "memory_limit": "2GiB"},
            },
            "phantom",
            [],
        ),
        (
            {"makes": "ct", "source": {**plain, "preset": preset}, "settings": {"spacing": [4, 4, 3]}},
            "phantom",
            ["Drawn as in the result"],
        ),
        ({"makes": "mask", "source": {**plain, "preset": preset}, "edits": several[2:]}, "phantom", []),
        (
            {
                "makes": "mask",
                "source": {"kind": "generator", "organ_sizes": {"left parotid": 30}},
                "settings": {"num_inference_steps": 10, "solver": solver},
            },
            "generator",
            ["for a mask alone", "10 steps"],
        ),
        (
            {
                "makes": "ct",
                "source": {"kind": "upload", "id": ids["mask"]},
                "edits": [{"flip": True}, {"flip": False, "remove": "lung tumor"}],
            },
            "upload",
            ["Take out lung tumor (kept as it was asked for)"],
        ),
        (
            {"makes": "ct", "source": {"kind": "ct", "id": ids["ct"], "mask_id": ids["mask"]}, "edits": anew},
            "ct",
            ["Draw spinal cord anew, then draw left parotid gland anew"],
        ),
        ({"makes": "ct", "source": {"kind": "job", "id": drawn}, "settings": {"seed": 3}}, "phantom", []),
        ({"makes": "ct", "source": {"kind": "job", "id": drawn}, "settings": {"seed": 9}}, "job", []),
        ({"makes": "mask", "source": {"kind": "job", "id": drawn}, "edits": [{"flip": True}]}, "job", []),
    ]
    page = open_page()
    for request, kind, said in asked:
        job = server.ask("/v1/jobs", request)
        server.cancel(job["id"])
        # The form of something else.
        page.locator("[name=kind][value=phantom]").check()
        steps(page, 7)
        page.locator("[name=preset]").select_option(index=1)
        page.locator("[name=solver]").select_option(index=1)
        for name, value in (("seed", "99"), ("guidance_scale", "2"), ("memory_limit", "3")):
            page.locator(f"[name={name}]").fill(value)
        page.locator("[name=kind][value=generator]").check()
        page.locator(".organ .ml").nth(1).fill(page.locator(".organ .ml").nth(1).get_attribute("max"))
        page.click("#add-edit")
        page.evaluate(
            "id => { document.querySelector('#state').textContent = ''; location.hash = `job=${id}`; }", job["id"]
        )
        page.locator("#state", has_text=re.compile("Cancelled|Made|not work")).wait_for()
        page.click("#again")
        page.wait_for_selector("[name=kind]:focus")
        assert page.evaluate("document.querySelector('#form').elements.kind.value") == kind
        for words in said:
            assert words in page.inner_text("#form")
        with page.expect_response(
            lambda answer: answer.request.method == "POST" and answer.url.endswith("/v1/jobs")
        ) as sent:
            page.click("#make-ct" if request["makes"] == "ct" else "#draw-mask")
        again = sent.value.json()
        server.cancel(again["id"])
        assert again["request"] == job["request"]


def test_dicom_is_offered_where_there_is_some(open_page, server, phantom) -> None:
    page = open_page()
    path = f"/v1/jobs/{phantom.job['id']}"
    edited = {**phantom.job["request"], "source": {"kind": "ct", "id": "a", "mask_id": "b", "label_map": "maisi"}}
    for told, offered in (({"dicom": True}, 1), ({"dicom": False}, 0), ({"dicom": None, "request": edited}, 0)):
        answer = {"json": {**phantom.job, **told}}
        page.route(f"**{path}", functools.partial(lambda answer, route: route.fulfill(**answer), answer))
        page.goto("about:blank")
        page.goto(f"{server.url}/#job={phantom.job['id']}")
        done(page)
        assert page.locator(".files a", has_text="DICOM").count() == offered
        page.unroute(f"**{path}")


def test_a_ct_is_edited(open_page, server, phantom, tmp_path) -> None:
    page = open_page()
    page.get_by_label("A CT to edit").check()
    part = page.locator("[data-kind=ct]")
    part.get_by_label("CT", exact=True).set_input_files(phantom.ct)
    part.get_by_label("Mask", exact=True).set_input_files(phantom.mask)
    part.locator(f"[data-label='{PAROTID}']").wait_for()
    assert not page.locator("#draw-mask").is_visible()
    page.click("#make-ct")
    assert "Add a change first" in page.inner_text("#problem")
    page.click("#add-edit")
    assert "flip" not in page.locator("#edit-list .verb option").evaluate_all("all => all.map(one => one.value)")
    page.get_by_label("Structure", exact=True).select_option("left parotid gland")
    page.get_by_label("Size in percent of now").fill("60")
    steps(page, 2)
    page.click("#make-ct")
    id = done(page)
    files = server.volumes(server.ask(f"/v1/jobs/{id}"), tmp_path)
    before, after, labels = ras(phantom.ct), ras(files.ct), ras(files.mask).astype(int)
    looks_like(page, after, labels)
    page.get_by_label("before").check()
    looks_like(page, before, labels)
    changed = before != after
    assert changed.any() and changed.mean() < 0.2
    assert page.locator(".files a", has_text="DICOM").count() == 0  # it came as NIfTI: no series to join
    page.locator("canvas.axial").hover()
    assert " HU" in page.inner_text(".read")


def test_a_job_is_cancelled(open_page, server) -> None:
    page = open_page()
    steps(page, 900)
    page.click("#make-ct")
    page.wait_for_selector("#bar[value]", timeout=MAKING)  # it has begun
    page.click("#cancel")
    soon(page.locator("#state")).to_have_text("Cancelled.", timeout=60_000)
    assert page.locator("#shown .viewer").count() == 0 and not page.locator("#cancel").is_visible()
    id = page.url.rpartition("=")[2]
    assert server.ask(f"/v1/jobs/{id}")["state"] == "cancelled"
    soon(page.locator("#jobs li", has=page.locator("[aria-current]"))).to_contain_text("cancelled")  # asked for anew


def test_a_press_for_something_else_counts_while_one_is_on_its_way(open_page, server) -> None:
    """The same button twice is one job; the other one is another."""
    page = open_page()
    held: list[Any] = []
    page.route("**/v1/jobs", lambda route: held.append(route) if route.request.method == "POST" else route.continue_())
    steps(page, 900)
    for button in ("#draw-mask", "#draw-mask", "#make-ct", "#make-ct"):
        page.click(button)
    server.wait(lambda: len(held) >= 2 or page.wait_for_timeout(50), 10)
    page.wait_for_timeout(200)
    assert [json.loads(route.request.post_data)["makes"] for route in held] == ["mask", "ct"]
    for route in held:
        route.abort()


def test_a_reload_in_mid_job_and_another_page_lose_nothing(open_page) -> None:
    page = open_page()
    page.get_by_label("Part of the body").select_option("head_neck")
    steps(page, 25)
    page.get_by_label("Seed", exact=True).fill("17")
    page.click("#make-ct")
    page.wait_for_selector("#bar[value]", timeout=MAKING)
    address = "/" + page.url.rpartition("/")[2]
    page.reload()
    page.wait_for_selector("#bar[value]", timeout=MAKING)
    soon(page.locator("#state")).to_have_text(re.compile(r"step \d+ of 19"))  # `last_step` takes the others at once
    soon(page.locator("[name=seed]")).to_have_value("17")
    assert page.input_value("[name=num_inference_steps]") == "25"
    other = open_page(address)
    soon(other.locator("#result-name")).to_have_text(page.inner_text("#result-name"))
    assert done(page) == done(other)
    assert page.inner_text("#said") == page.inner_text("#state")  # what a screen reader was told last


def test_a_page_left_open_survives_a_restart_of_the_server(open_page, server) -> None:
    page = open_page()
    steps(page, 60)
    page.click("#make-ct")
    page.wait_for_selector("#bar[value]", timeout=MAKING)
    server.kill()
    page.wait_for_selector("#trouble:not(:empty)", timeout=30_000)
    assert "does not answer" in page.inner_text("#trouble")
    page.click("#another-seed")
    page.click("#make-ct")
    page.wait_for_selector("#problem:not(:empty)")
    server.start()
    soon(page.locator("#trouble")).not_to_contain_text("answer", timeout=60_000)
    if page.locator("#cancel").is_visible():  # it goes on by itself
        page.click("#cancel")
    soon(page.locator("#state")).to_have_text(re.compile("Cancelled|did not work|Made"), timeout=60_000)


def test_by_keyboard_alone(open_page) -> None:
    """Each stop shows where the focus is; from the page's top to a result without a mouse."""
    page = open_page()
    stops = []
    for _ in range(60):
        page.keyboard.press("Tab")
        stop = page.evaluate(
            "(e => [e.id || e.name || e.className || e.tagName, getComputedStyle(e).outlineStyle,"
            " parseFloat(getComputedStyle(e).outlineWidth)])(document.activeElement)"
        )
        stops.append(stop[0])
        assert stop[1] == "solid" and stop[2] >= 2, stop
        if stop[0] == "make-ct":
            break
        if stop[0] == "kind" and "kind" not in stops[:-1]:
            page.keyboard.press("ArrowDown")  # the next source, by the arrow keys of radio buttons
            assert page.locator("#organs").is_visible()
            page.keyboard.press("ArrowUp")
        if stop[0] == "SUMMARY":
            page.keyboard.press("Enter")
        if stop[0] == "num_inference_steps":
            page.keyboard.press("Control+A")
            page.keyboard.type("1")
    assert stops[-1] == "make-ct" and {"kind", "body", "add-edit", "draw-mask", "seed"} <= set(stops)
    page.keyboard.press("Enter")
    done(page)
    page.locator("canvas.axial").focus()
    slices = [int(page.input_value(f"input.{name}")) for name in ("sagittal", "coronal", "axial")]
    for key in ("ArrowRight", "ArrowUp", "PageUp"):
        page.keyboard.press(key)
    want = [slices[0] - 1, slices[1] + 1, slices[2] + 1]  # the patient's left is on the right, anterior is up
    assert page.inner_text(".read").startswith(f"voxel {want[0]}, {want[1]}, {want[2]}: ")


@pytest.mark.parametrize("width", [380, 1600])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_narrow_and_wide_without_barriers(open_page, phantom, width, scheme) -> None:
    page = open_page(
        f"/#job={phantom.job['id']}",
        viewport={"width": width, "height": 800},
        color_scheme=scheme,
        reduced_motion="reduce",
    )
    done(page)
    page.click("#settings summary")
    page.wait_for_selector("#plan p", timeout=60_000)
    page.click("#add-edit")
    page.locator("#edit-list .verb").select_option("insert")
    for kind in ("phantom", "generator", "upload", "ct"):
        page.locator(f"[name=kind][value={kind}]").check()
        assert page.evaluate("document.documentElement.scrollWidth") <= width, kind
    result, form = page.locator("#result").bounding_box(), page.locator("#form").bounding_box()
    assert (result["y"] >= form["y"] + form["height"]) == (width == 380)
    without_barriers(page)


def test_the_3d_view(open_page, phantom) -> None:
    page = open_page(f"/#job={phantom.job['id']}")
    done(page)

    def shot(mode: str) -> np.ndarray:
        page.wait_for_selector(f"canvas.volume[data-drawn='{mode} 480']", timeout=60_000)
        data = page.evaluate(
            "(() => { const c = document.createElement('canvas'); c.width = c.height = 480;"
            " const g = c.getContext('2d'); g.drawImage(document.querySelector('canvas.volume'), 0, 0);"
            " return [...g.getImageData(0, 0, 480, 480).data]; })()"
        )
        return np.array(data, np.uint8).reshape(480, 480, 4)[..., :3]

    organs = shot("organs")
    assert 0.1 < (organs.max(-1) > 20).mean() < 0.9
    page.get_by_label("3D shows").select_option("brightest")
    brightest = shot("brightest")
    # From the front at no angle, the brightest voxel of each ray is a maximum along y.
    page.locator(".turn").fill("0")
    page.locator(".tilt").fill("0")
    page.wait_for_timeout(1500)
    front = shot("brightest")[..., 0]
    assert np.abs(front.astype(int) - brightest[..., 0]).max() > 20
    hu = ras(phantom.ct)
    mm = np.array(hu.shape) * nib.load(phantom.ct).header.get_zooms()
    # Rows from the top, the patient's right on the left.
    want = ((hu.max(1) + 1000) / 2500 * 255).clip(0, 255)[::-1, ::-1].T
    half = mm / mm.max() / 1.1 * 240
    rows = (240 + (np.arange(want.shape[0]) + 0.5 - want.shape[0] / 2) / want.shape[0] * 2 * half[2]).astype(int)
    columns = (240 + (np.arange(want.shape[1]) + 0.5 - want.shape[1] / 2) / want.shape[1] * 2 * half[0]).astype(int)
    assert np.median(np.abs(front[np.ix_(rows, columns)] - want)) < 12
    for mode in ("bone", "skin"):
        page.get_by_label("3D shows").select_option(mode)
        assert (shot(mode).max(-1) > 20).mean() > 0.02
    page.get_by_label("3D shows").select_option("organs")
    page.locator("canvas.volume").scroll_into_view_if_needed()
    box = page.locator("canvas.volume").bounding_box()
    page.mouse.move(box["x"] + 50, box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] + 150, box["y"] + 50, steps=4)
    page.mouse.up()
    assert float(page.input_value(".turn")) != 0


def test_without_webgl_the_planes_are_there(chromium, server, phantom) -> None:
    browser = chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-3d-apis"])
    page = browser.new_page()
    page.goto(f"{server.url}/#job={phantom.job['id']}")
    done(page)
    assert "no WebGL2" in page.inner_text(".no-space") and not page.locator("canvas.volume").count()
    looks_like(page, ras(phantom.ct), ras(phantom.mask).astype(int))
    # A structure that is not shown is not painted.
    page.locator(".structures tr", has_text="left parotid gland").get_by_role("checkbox").uncheck()
    hidden = np.where(ras(phantom.mask) == PAROTID, 200, ras(phantom.mask)).astype(int)
    looks_like(page, ras(phantom.ct), hidden)
    browser.close()


def test_what_is_wrong_is_said_in_words(open_page, server) -> None:
    page = open_page("/#job=nothing-of-this-name")
    soon(page.locator("#state")).to_contain_text("not there any more")
    steps(page, 0)
    page.click("#make-ct")
    assert "Allowed is 1 to 1000" in page.inner_text("#problem")
    assert page.evaluate("document.activeElement.name") == "num_inference_steps"
    steps(page, 1)
    page.locator("[name=spacing]").first.fill("4")
    page.click("#make-ct")
    assert "all three voxel sizes" in page.inner_text("#problem")
    page.locator("[name=spacing]").first.fill("")
    page.locator("[name=memory_limit]").fill("0.1")
    page.wait_for_selector("#plan p", timeout=60_000)
    # A lesion that has no place in this anatomy: the server's words.
    page.locator("[name=memory_limit]").fill("")
    page.click("#add-edit")
    page.locator("#edit-list .verb").select_option("insert")
    page.get_by_label("Lesion", exact=True).select_option("hepatic tumor")
    page.click("#make-ct")
    page.wait_for_selector("#trouble:not(:empty), #problem:not(:empty)", timeout=MAKING)
    said = page.inner_text("#trouble") + page.inner_text("#problem")
    assert "liver" in said


@pytest.mark.skipif("STUDIO_PICTURES" not in os.environ, reason="draws the documentation's pictures on demand")
def test_pictures(open_page) -> None:
    """STUDIO_PICTURES=docs/images: the CT of a phantom, in a wide and in a narrow window; the time that it takes."""
    from PIL import Image

    folder, stored = Path(os.environ["STUDIO_PICTURES"]), 0
    page = open_page()
    began = time.monotonic()
    page.click("#make-ct")
    id = done(page)
    print(f"\nphantom: button to picture {time.monotonic() - began:.1f} s")
    for name, width, height in (("wide", 1400, 900), ("narrow", 380, 900)):
        page = open_page(f"/#job={id}", viewport={"width": width, "height": height})
        done(page)
        page.wait_for_selector("canvas.volume[data-drawn='organs 480']", timeout=60_000)
        if name == "narrow":
            page.evaluate("document.querySelector('#result').scrollIntoView()")
        page.screenshot(path=folder / f"studio_{name}.png")
        with Image.open(folder / f"studio_{name}.png") as picture:  # a quarter of the bytes
            small = picture.convert("RGB").quantize(200)
        small.save(folder / f"studio_{name}.png", optimize=True)
        stored += (folder / f"studio_{name}.png").stat().st_size
    assert stored < 200_000
