"""The studio as a program sees it: a real server and its worker, with tiny networks."""

from __future__ import annotations

import gzip
import io
import json
import shlex
import subprocess
import zipfile

import nibabel as nib
import numpy as np
import pytest

from maisi_tools.masks.edits import volumes_ml
from maisi_tools.masks.phantom import make_phantom
from maisi_tools.report.run_report import write_report

PHANTOM = {"kind": "phantom", "size": [48, 48, 48], "spacing": [5.0, 5.0, 3.4]}
QUICK = {"num_inference_steps": 1}
EDITED = [{"insert": {"bone lesion": [20, 12]}, "seed": 3}, {"resize": {"left parotid gland": 1.2}}, {"flip": True}]


def ras(path):
    return np.asarray(nib.as_closest_canonical(nib.load(path)).dataobj)


def shown(answer):
    """The array that the page gets."""
    header = json.loads(answer.headers["X-Volume"])
    values = np.frombuffer(gzip.decompress(answer.content), header["type"])
    return header, values.reshape(header["size"], order="F")


def again(job, folder):
    """Run a job's command in a folder of its own, with as many threads as the studio has: those of the environment."""
    told = {"cwd": folder, "capture_output": True, "text": True}
    for command in job["command"].split(" && "):
        done = subprocess.run(shlex.split(command), **told, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    return folder / "out"


@pytest.fixture(scope="module")
def made(studio):
    """A CT of an edited phantom."""
    return studio.make({"makes": "ct", "source": PHANTOM, "edits": EDITED, "settings": {**QUICK, "seed": 4}})


def test_health_options_and_openapi(studio):
    assert studio.ask("/v1/health/live").json == {"status": "live"}
    options = studio.ask("/v1/options").json
    assert [one["name"] for one in options["weights"]] == ["small"] and options["devices"] == ["cpu"]
    assert {"name": "left parotid", "low_ml": 10, "high_ml": 53}.items() <= options["organs"][4].items()
    assert options["limits"] == {"upload_bytes": 3_000_000, "jobs": 100}
    assert "left parotid gland" in options["structures"] and "placeholder 129" not in options["structures"]
    assert options["defaults"]["solver"] == "ab2"
    assert "guidance_scale" not in options["defaults"]  # weights have their own, and edits
    paths = studio.ask("/openapi.json").json["paths"]
    assert {"/v1/jobs", "/v1/jobs/{id}/events", "/v1/uploads", "/v1/maisi/run"} <= paths.keys()


def test_a_ct_is_made_and_everything_of_it_is_there(studio, made):
    assert made["state"] == "done" and made["error"] is None and made["volumes"] == ["ct", "mask"]
    assert {file["name"] for file in made["files"]} >= {"phantom_ct.nii.gz", "phantom_mask.nii.gz", "run.json"}
    folder = studio.folder / "jobs" / made["id"]
    header, values = shown(studio.ask(f"/v1/jobs/{made['id']}/volumes/ct"))
    assert header["type"] == "int16" and header["spacing"] == [5.0, 5.0, 3.4]
    assert np.array_equal(values, ras(folder / "phantom_ct.nii.gz"))
    header, labels = shown(studio.ask(f"/v1/jobs/{made['id']}/volumes/mask"))
    assert header["type"] == "uint8" and np.array_equal(labels, ras(folder / "phantom_mask.nii.gz"))
    assert header["labels"]["18"][1] == "left parotid gland" and {int(k) for k in header["labels"]} == {
        *np.unique(labels)
    } - {0}
    one = next(entry for entry in made["metrics"] if entry["name"] == "left parotid gland")
    assert one == {
        "name": "left parotid gland",
        "hu": round(float(np.median(values[labels == 18])), 1),
        "low": -179,
        "high": 171,
    }
    assert write_report(folder).is_file()
    path = f"/v1/jobs/{made['id']}/files/phantom_ct.nii.gz"
    assert studio.ask(path).content == (folder / "phantom_ct.nii.gz").read_bytes()
    assert studio.ask(f"/v1/jobs/{made['id']}/picture.png").content[:4] == b"\x89PNG"


def test_the_printed_command_makes_the_same_bytes(studio, made, tmp_path):
    assert """--device '$torch.device('"'"'cpu'"'"')'""" in made["command"]  # on a machine with a GPU, too
    out, folder = again(made, tmp_path), studio.folder / "jobs" / made["id"]
    for name in ("phantom_ct.nii.gz", "phantom_mask.nii.gz", "phantom_ct.json"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()


def test_the_commands_of_a_mask_make_the_same_bytes(studio, made, tmp_path):
    job = studio.make({"makes": "mask", "source": PHANTOM, "edits": EDITED, "settings": {"seed": 4}})
    out, folder = again(job, tmp_path), studio.folder / "jobs" / job["id"]
    assert job["volumes"] == ["mask"] and len(job["command"].split(" && ")) == 4
    assert (out / "phantom_mask.nii.gz").read_bytes() == (folder / "phantom_mask.nii.gz").read_bytes()
    # the mask that the CT was made of, and what the edits were to do
    assert (folder / "phantom_mask.nii.gz").read_bytes() == (
        studio.folder / "jobs" / made["id"] / "input" / "phantom.nii.gz"
    ).read_bytes()
    drawn, edited = make_phantom("head_neck", (48, 48, 48), (5.0, 5.0, 3.4), 4), ras(folder / "phantom_mask.nii.gz")
    before, after = (volumes_ml(one, (5.0, 5.0, 3.4)) for one in (drawn, edited))
    assert after[20] == pytest.approx(1.2 * before[18], abs=0.1)  # mirrored: the left one is the right one now
    assert after[128] == pytest.approx(np.pi / 6 * (2.0**3 + 1.2**3), rel=0.1)


def test_a_mask_of_the_generator_becomes_a_ct(studio, tmp_path):
    asked = {"kind": "generator", "organ_sizes": {"left parotid": 30}}
    mask = studio.make({"makes": "mask", "source": asked, "settings": {**QUICK, "seed": 5}})
    assert mask["state"] == "done", mask["error"]
    folder = studio.folder / "jobs" / mask["id"]
    assert (again(mask, tmp_path) / "sample_seed5_mask.nii.gz").read_bytes() == (
        folder / "sample_seed5_mask.nii.gz"
    ).read_bytes()
    ct = studio.make({"makes": "ct", "source": {"kind": "job", "id": mask["id"]}, "settings": QUICK})
    assert ct["state"] == "done", ct["error"]
    _, labels = shown(studio.ask(f"/v1/jobs/{ct['id']}/volumes/mask"))
    assert np.array_equal(labels > 0, ras(folder / "sample_seed5_mask.nii.gz") > 0)


def test_events_begin_with_the_state_and_end_with_the_last(studio):
    id = studio.ask("/v1/jobs", {"makes": "ct", "source": PHANTOM, "settings": {"num_inference_steps": 3}}).json["id"]
    states = list(studio.events(id))
    steps = [one["progress"] for one in states if one["progress"]]
    assert states[-1]["state"] == "done" and states[-1]["progress"] is None
    assert {"what": "sampling", "step": 1, "steps": 3} in steps and {"what": "decoding", "step": 3, "steps": 3} in steps
    assert [one["state"] for one in studio.events(id)] == ["done"]  # who comes later, or again, gets the present state


def test_a_cancelled_job_ends_at_once_and_the_next_one_is_made(studio):
    long = {"makes": "ct", "source": PHANTOM, "settings": {"num_inference_steps": 1000}}
    running, waiting = (studio.ask("/v1/jobs", long).json["id"] for _ in range(2))
    for state in studio.events(running):
        if state["progress"] and state["progress"]["step"]:
            break
    assert studio.ask(f"/v1/jobs/{waiting}").json["position"] == 0
    for id in (waiting, running):
        assert studio.ask(f"/v1/jobs/{id}", method="DELETE").json["state"] == "cancelled"
    assert [one["state"] for one in studio.events(running)] == ["cancelled"]
    assert studio.ask(f"/v1/jobs/{running}", method="DELETE").status == 409
    assert studio.ask(f"/v1/jobs/{running}/volumes/ct").status == 409
    assert studio.make({"makes": "mask", "source": PHANTOM})["state"] == "done"
    assert [job["id"] for job in studio.ask("/v1/jobs").json][1:3] == [waiting, running]


def test_two_clients_at_once_get_their_own(studio, in_background):
    found = {}

    def client(seed):
        found[seed] = studio.make({"makes": "ct", "source": PHANTOM, "settings": {**QUICK, "seed": seed}})

    threads = [in_background(lambda seed=seed: client(seed)) for seed in (11, 12)]
    for thread in threads:
        thread.join(60)
    assert {seed: (job["state"], job["request"]["settings"]["seed"]) for seed, job in found.items()} == {
        11: ("done", 11),
        12: ("done", 12),
    }


def test_an_uploaded_mask_is_read_mapped_and_becomes_a_ct(studio, files, labels, tmp_path):
    own = np.where(labels > 0, labels.astype(np.uint16) + 300, 0).astype(np.uint16)  # a vocabulary nobody knows
    nib.save(nib.Nifti1Image(own, np.diag([-5.0, 5.0, 3.4, 1.0])), tmp_path / "own.nii.gz")
    mask = studio.upload(tmp_path / "own.nii.gz", "mask", name="..%2F..%2Fetc%2Fown.nii.gz").json
    assert mask["size"] == [48, 48, 48] and mask["name"] == "../../etc/own.nii.gz"
    values = [entry["value"] for entry in mask["labels"]]
    assert values == [int(label) + 300 for label in np.unique(labels) if label] and mask["labels"][0]["voxels"] > 0
    source = {"kind": "upload", "id": mask["id"], "label_map": "maisi"}
    refused = studio.ask("/v1/jobs", {"makes": "ct", "source": source})
    assert refused.status == 422 and "the label map maisi does not know" in refused.detail and "500 (" in refused.detail

    names = {entry["id"]: entry["name"] for entry in studio.ask("/v1/options").json["vocabulary"]}
    wanted = {str(value): names[value - 300] for value in values} | {"318": None}
    assert studio.ask("/v1/label_maps", {"name": "our clinic", "labels": wanted}).status == 201
    read = studio.ask(f"/v1/uploads/{mask['id']}/labels?label_map=our%20clinic").json
    assert {entry["value"]: entry["meaning"] for entry in read}[422] == "thyroid gland" if 422 in values else True
    assert {entry["value"]: entry["meaning"] for entry in read}[318] is None
    assert "our clinic" in studio.ask("/v1/options").json["label_maps"]
    job = studio.make({"makes": "ct", "source": {**source, "label_map": "our clinic"}, "settings": QUICK})
    assert job["state"] == "done", job["error"]
    _, seen = shown(studio.ask(f"/v1/jobs/{job['id']}/volumes/mask"))
    expected = np.where(labels == 18, 0, labels)[::-1]
    assert np.array_equal(np.where(expected > 0, seen, 0), np.where(expected > 0, expected, 0))
    assert studio.ask(f"/v1/jobs/{job['id']}/volumes/before").status == 404


def test_a_real_ct_is_edited_and_stays_what_it_was_elsewhere(studio, files, tmp_path):
    ct, mask = (studio.upload(files[what], what).json for what in ("ct", "mask"))
    source = {"kind": "ct", "id": ct["id"], "mask_id": mask["id"], "label_map": "maisi"}
    edits = [{"resize": {"left parotid gland": 0.6}}]
    job = studio.make({"makes": "ct", "source": source, "edits": edits, "settings": QUICK})
    assert job["state"] == "done" and job["volumes"] == ["ct", "mask", "before"], job["error"]
    (_, after), (_, before), (_, labels) = (
        shown(studio.ask(f"/v1/jobs/{job['id']}/volumes/{what}")) for what in ("ct", "before", "mask")
    )
    assert np.array_equal(before, ras(files["ct"]))
    weight = ras(studio.folder / "jobs" / job["id"] / "scan_weight.nii.gz")
    assert (weight > 0).any() and np.array_equal(after[weight == 0], before[weight == 0])
    assert (labels == 18).sum() == round(0.6 * (ras(files["mask"]) == 18).sum())
    out = again(job, tmp_path)
    assert (out / "scan_ct.nii.gz").read_bytes() == (studio.folder / "jobs" / job["id"] / "scan_ct.nii.gz").read_bytes()
    assert studio.ask(f"/v1/jobs/{job['id']}/dicom.zip").status == 404  # it shows a patient whom nothing names


def test_an_edited_series_stays_with_its_patient(studio, files, tmp_path):
    pydicom = pytest.importorskip("pydicom", minversion="3")
    study = pytest.importorskip("maisi_tools.dicom.study", reason="needs the extra 'dicom'")
    image = nib.load(files["ct"])
    series = study.write_study(tmp_path / "study", np.asarray(image.dataobj), image.affine)
    with zipfile.ZipFile(tmp_path / "series.zip", "w") as archive:
        for file in series:
            ds = pydicom.dcmread(file)
            ds.PatientID = "their-patient"
            ds.save_as(file)
            archive.write(file, file.name)
    ct, mask = studio.upload(tmp_path / "series.zip", "ct").json, studio.upload(files["mask"], "mask").json
    source = {"kind": "ct", "id": ct["id"], "mask_id": mask["id"]}
    job = studio.make({"makes": "ct", "source": source, "edits": [{"redraw": "larynx"}], "settings": QUICK})
    assert job["state"] == "done", job["error"]
    assert np.array_equal(shown(studio.ask(f"/v1/jobs/{job['id']}/volumes/before"))[1], ras(files["ct"]))
    content = studio.ask(f"/v1/jobs/{job['id']}/dicom.zip").content
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        ds = pydicom.dcmread(io.BytesIO(archive.read("CT/0001.dcm")))
    assert ds.PatientID == "their-patient" and ds.SyntheticData == "YES"


def test_dicom_says_that_it_is_synthetic(studio, made):
    pydicom = pytest.importorskip("pydicom", minversion="3")
    pytest.importorskip("highdicom")
    answer = studio.ask(f"/v1/jobs/{made['id']}/dicom.zip")
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        names = archive.namelist()
        ds = pydicom.dcmread(io.BytesIO(archive.read("CT/0001.dcm")))
    assert made["dicom"] and "SEG.dcm" in names and len(names) == 48 + 2 and ds.SyntheticData == "YES"
    assert studio.ask(f"/v1/jobs/{made['id']}/dicom.zip").content == answer.content


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/v1/jobs", b"{", 422, "is no JSON"),
        ("/v1/jobs", b"[" * 100_000, 422, "is no JSON"),
        ("/v1/jobs", b"[]", 422, "allowed is a mapping"),
        ("/v1/jobs", b" " * (1 << 21), 413, "larger than 1048576 bytes"),
        ("/v1/jobs", {"makes": "ct", "source": {"kind": "job", "id": "../../etc"}}, 422, "there is no job"),
        ("/v1/jobs", {"makes": "ct", "source": {"kind": "upload", "id": "../../etc"}}, 422, "there is no upload"),
        ("/v1/jobs", {"makes": "ct", "source": {"kind": "upload", "id": "0000"}}, 422, "there is no upload"),
        ("/v1/label_maps", {"name": "../../evil", "labels": {"1": "liver"}}, 422, "names no label map"),
        ("/v1/label_maps", {"name": "maisi", "labels": {"1": "liver"}}, 422, "give another one"),
        ("/v1/label_maps", {"name": "x", "labels": {"1": "livver"}}, 422, "did you mean liver"),
        ("/v1/uploads?kind=mask&name=a.txt", b"x", 422, "allowed are .nii.gz"),
        ("/v1/uploads?kind=mask&name=a.nii.gz", b"", 422, "the body is empty"),
        ("/v1/uploads?kind=mask&name=a.nii.gz", b"not gzip", 422, "cannot be read"),
        ("/v1/uploads?kind=cat&name=a.nii.gz", b"x", 422, "allowed are mask, ct"),
        ("/v1/uploads?kind=ct&name=a.nii", b"x" * 3_000_001, 413, "larger than 3000000 bytes"),
        ("/v1/uploads?name=a.nii", b"x", 422, "kind: Field required"),
        ("/v1/plan", {"size": [1, 2]}, 422, "allowed are three numbers"),
        ("/v1/plan", {"size": [1024, 1024, 1024]}, 422, "has 1073741824 voxels"),
        ("/v1/maisi/run", {"num_output_samples": 1, "body_region": ["abdomen"]}, 422, "allowed are head"),
    ],
)
def test_wrong_input_is_refused_in_plain_words(studio, path, body, status, words):
    answer = studio.ask(path, body)
    assert (answer.status, words in answer.detail) == (status, True), answer.content
    assert not list((studio.folder / "uploads").glob("*/*.nii"))


def test_what_is_not_there_is_404(studio, made):
    paths = ["/v1/jobs/x", "/v1/jobs/..%2F..", "/v1/uploads/0000", f"/v1/jobs/{made['id']}/volumes/x"]
    paths += [f"/v1/jobs/{made['id']}/files/{name}" for name in ("job.json", "..%2Fjob.json", "input", ".lock")]
    assert [studio.ask(path).status for path in paths] == [404] * len(paths)
    assert studio.ask("/static/..%2Fapp.py").status == 404


def test_an_upload_without_a_length_is_cut_off_at_the_limit(studio):
    import http.client
    from urllib.parse import urlsplit

    connection = http.client.HTTPConnection(urlsplit(studio.url).netloc, timeout=30)
    try:
        connection.request(
            "POST", "/v1/uploads?kind=ct&name=a.nii", (b"x" * 100_000 for _ in range(400)), encode_chunked=True,
            headers={"Transfer-Encoding": "chunked"},
        )  # fmt: skip
        assert connection.getresponse().status == 413
    except (BrokenPipeError, ConnectionResetError):
        pass  # the server has hung up
    assert not list((studio.folder / "uploads").glob("*/scan.nii"))


def test_plan_says_what_it_needs(studio, made):
    plan = studio.ask("/v1/plan", {"size": [48, 48, 48]}).json
    assert plan["fits"] and plan["peak_bytes"] == max(stage["bytes"] for stage in plan["stages"])
    assert studio.ask("/v1/plan", {"source": {"kind": "job", "id": made["id"]}}).json == plan
    small = studio.ask("/v1/plan", {"size": [48, 48, 48], "memory_limit": "1MB"}).json
    assert not small["fits"] and "does not fit" in small["words"]
    preset = studio.ask("/v1/plan", {"source": {"kind": "phantom"}, "preset": "head_neck"}).json
    assert preset["size"] == [112, 80, 112]


def test_nvidias_request_gets_pairs(studio):
    body = {"num_output_samples": 2, "body_region": ["head"], "controllable_anatomy_size": [["larynx", 0.5]]}
    answer = studio.ask("/v1/maisi/run", {**body, "anatomy_list": ["larynx"], "label_output_ext": ".nii"})
    assert answer.status == 200, answer.content
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        names = archive.namelist()
        image = nib.Nifti1Image.from_bytes(gzip.decompress(archive.read(names[0])))
        label = nib.Nifti1Image.from_bytes(archive.read(names[1]))
    ids = answer.headers["X-Jobs"].split(",")
    assert names == [f"sample_{id}_{what}" for id in ids for what in ("image.nii.gz", "label.nii")]
    assert image.shape == label.shape == (48, 48, 48) and image.get_data_dtype() == np.int16
    assert studio.ask("/v1/jobs/" + ids[0]).json["request"]["source"]["organ_sizes"] == {"larynx": 32.5}
    assert "larynx" in studio.ask("/v1/maisi/info").json["anatomy_list"]
    assert "Apache" in studio.ask("/v1/license").json["LICENSE"]


def test_a_killed_server_goes_on_where_it_was(start_studio, tmp_path, waits):
    first = start_studio(tmp_path / "studio")
    first.wait_ready()
    done = first.make({"makes": "mask", "source": PHANTOM})
    long = first.ask("/v1/jobs", {"makes": "ct", "source": PHANTOM, "settings": {"num_inference_steps": 8}}).json["id"]
    later = first.ask("/v1/jobs", {"makes": "mask", "source": PHANTOM, "settings": {"seed": 9}}).json["id"]
    waits(lambda: first.ask(f"/v1/jobs/{long}").json["state"] == "running")
    (first.folder / "uploads" / "0123456789abcdef").mkdir(parents=True)  # as an upload that was interrupted
    first.kill()
    waits(lambda: _is_free(first.folder))
    second = start_studio(tmp_path / "studio")
    assert [*second.events(long)][-1]["state"] == "done" and [*second.events(later)][-1]["state"] == "done"
    assert second.ask(f"/v1/jobs/{done['id']}").json == done
    assert not (first.folder / "uploads" / "0123456789abcdef").exists()
    with pytest.raises(AssertionError, match="another studio runs in"):
        start_studio(tmp_path / "studio")


def _is_free(folder):
    """Whether no process holds a studio's folder."""
    import fcntl

    with open(folder / ".lock") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True
