"""The bundles as repositories of the Hugging Face Hub: by MONAI's own command, from a server that speaks its calls."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import re
import shutil
import subprocess
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nibabel as nib
import numpy as np
import pytest
import yaml

from maisi_tools.bundles.hub import model_card, pipeline_tag
from maisi_tools.bundles.packaging import package_bundle
from maisi_tools.cli import main
from maisi_tools.files import sha256
from maisi_tools.masks.phantom import flat_ct, make_phantom

BUNDLES = Path(__file__).resolve().parents[2] / "bundles"
TAG = "v" + json.loads((BUNDLES / "maisi_vae" / "configs" / "metadata.json").read_text())["version"]
WANTED = {"maisi_vae": None, "maisi_ldm": None, "maisi_controlnet": TAG}
"""Bundle -> version to ask MONAI for."""

NAMES = tuple(WANTED)
SIZE = (24, 24, 24)
LARGE = ".pt"
"""Files that the server keeps in large file storage, as the Hub's does by its .gitattributes."""


class Hub(http.server.ThreadingHTTPServer):
    """What of the Hub's API `huggingface_hub` calls for a download: refs, a revision, its tree, its files.

    Each repository has one commit, the branch main and the tag TAG. Large files are redirected, as to the
    Hub's CDN, with their SHA-256 as ETag; small ones have git's.
    """

    def __init__(self, repositories: dict[str, Path]) -> None:
        super().__init__(("127.0.0.1", 0), HubCalls)
        self.repositories, self.seen = repositories, []
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.cdn = f"http://localhost:{self.server_port}"  # another host: a client asks the Hub alone for the ETag

    def commit(self, repository: str) -> str:
        return hashlib.sha1(repository.encode()).hexdigest()


def blob(path: Path) -> str:
    """The id that git gives a file."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class HubCalls(http.server.BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int, headers: dict[str, str] | None = None, body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, code: str) -> None:
        self.answer(404, {"X-Error-Code": code, "X-Error-Message": code})

    def do_GET(self) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        self.server.seen.append(f"{self.command} {'/'.join(parts)}")
        if parts[0] == "cdn":
            return self.answer(200, body=Path(*("/", *parts[1:])).read_bytes())
        api = parts[:2] == ["api", "models"]
        repository, (what, *rest) = "/".join(parts[2:4] if api else parts[:2]), parts[4:] if api else parts[2:]
        if repository not in self.server.repositories:
            return self.refuse("RepoNotFound")
        commit = self.server.commit(repository)
        folder = self.server.repositories[repository]
        if what != "refs" and rest[0] not in (commit, TAG, "main"):
            return self.refuse("RevisionNotFound")
        if what == "resolve":
            return self.file(folder.joinpath(*rest[1:]), commit)
        found = {"refs": self.refs, "revision": self.revision, "tree": self.tree}[what](repository, folder, commit)
        self.answer(200, {"Content-Type": "application/json"}, json.dumps(found).encode())

    do_HEAD = do_GET

    def refs(self, repository: str, folder: Path, commit: str) -> dict:
        tags = [{"name": TAG, "ref": f"refs/tags/{TAG}", "targetCommit": commit}]
        branches = [{"name": "main", "ref": "refs/heads/main", "targetCommit": commit}]
        return {"tags": tags, "branches": branches, "converts": []}

    def revision(self, repository: str, folder: Path, commit: str) -> dict:
        files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        return {"id": repository, "sha": commit, "siblings": [{"rfilename": name} for name in files]}

    def tree(self, repository: str, folder: Path, commit: str) -> list[dict]:
        entries = []
        for path in sorted(folder.rglob("*")):
            entry = {"path": path.relative_to(folder).as_posix(), "type": "directory" if path.is_dir() else "file"}
            entry |= {"oid": commit, "size": 0} if path.is_dir() else {"oid": blob(path), "size": path.stat().st_size}
            if path.suffix == LARGE:
                entry["lfs"] = {"oid": sha256(path), "size": path.stat().st_size, "pointerSize": 134}
            entries.append(entry)
        return entries

    def file(self, path: Path, commit: str) -> None:
        if not path.is_file():
            return self.refuse("EntryNotFound")
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if path.suffix != LARGE:
            return self.answer(200, headers | {"ETag": f'"{blob(path)}"'}, path.read_bytes())
        linked = {"X-Linked-Etag": f'"{sha256(path)}"', "X-Linked-Size": str(path.stat().st_size)}
        self.answer(302, headers | linked | {"Location": f"{self.server.cdn}/cdn{path}"})


@pytest.fixture(scope="module")
def folders(repo_root, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    where = ["--output_dir", str(folder), "--bundles", str(repo_root / "bundles")]
    assert main(["package", *where, "--layout", "hub", "--org", "somebody"]) == 0
    return folder


@pytest.fixture(scope="module")
def hub(folders) -> Iterator[Hub]:
    with Hub({f"somebody/{name}": folders / name for name in NAMES}) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def got(hub, bare_python, tmp_path_factory) -> tuple[Path, dict[str, str | None]]:
    """A folder with 'of ORG VERSION'/NAME of all downloads, beside ``out`` of a run; and what each download raised.

    All in one process, a real one, that has no maisi_tools but the downloaded one, of a user without a token.
    """
    folder = tmp_path_factory.mktemp("got")
    labels = make_phantom("head_neck", (48, 48, 48), (5.0, 5.0, 3.4), 0)[12:36, 12:36, 12:36]
    nib.save(nib.Nifti1Image(flat_ct(labels), np.diag([5.0, 5.0, 3.4, 1.0])), folder / "ct.nii.gz")
    wanted = [(f"somebody/{name}", version) for name, version in WANTED.items()]
    wanted += [("nobody/maisi_vae", TAG), ("somebody/maisi_vae", "v9")]
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith(("HF_", "HUGGING")):
                patch.delenv(name)
        for name, value in {"ENDPOINT": hub.url, "HOME": str(folder / "home"), "HUB_DISABLE_TELEMETRY": "1"}.items():
            patch.setenv(f"HF_{name}", value)
        done = bare_python(folder, "-c", f"wanted = {wanted}\n{USER}")
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, json.loads((folder / "said.json").read_text())


USER = """
import json, os, sys, monai.bundle
said = {}
for repository, version in wanted:
    name, folder = repository.split("/")[1], f"of {repository.split('/')[0]} {version}"
    said[f"{repository} {version}"] = None
    try:
        monai.bundle.download(name, version, folder, source="huggingface_hub", repo=repository)
    except Exception as error:
        said[f"{repository} {version}"] = f"{type(error).__name__}: {error}"
print(said, file=sys.stderr)
os.chdir("of somebody None/maisi_vae")
monai.bundle.run(config_file="configs/inference.json", input="../../ct.nii.gz", output_dir="../../out")
import maisi_tools
said["ran"] = maisi_tools.__file__
with open("../../said.json", "w") as file:
    json.dump(said, file)
"""


def content(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize(("name", "version"), WANTED.items())
def test_monai_downloads_what_was_packaged(name, version, hub, folders, got):
    """Without a version MONAI asks for the tags, and takes the last of them."""
    folder, said = got
    assert said[f"somebody/{name} {version}"] is None
    there = content(folder / f"of somebody {version}" / name)
    assert {path: data for path, data in there.items() if not path.startswith(".cache/")} == content(folders / name)
    assert hub.seen.count(f"GET api/models/somebody/{name}/refs") == (version is None)
    assert f"GET api/models/somebody/{name}/revision/{TAG}" in hub.seen
    for weights in (folders / name / "models").iterdir():
        assert hub.seen.count(f"GET cdn{weights}") == 1


def test_a_downloaded_bundle_runs_by_itself(got):
    folder, said = got
    assert Path(said["ran"]).resolve() == folder / "of somebody None" / "maisi_vae" / "maisi_tools" / "__init__.py"
    assert nib.load(folder / "out" / "ct_recon.nii.gz").shape == SIZE
    assert json.loads((folder / "out" / "ct_recon.json").read_text())


def test_what_is_not_there_is_said(got):
    _, said = got
    assert said[f"nobody/maisi_vae {TAG}"].startswith("RepositoryNotFoundError")
    assert said["somebody/maisi_vae v9"].startswith("RevisionNotFoundError")


# --- what is written --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_it_holds_what_the_zip_file_does_with_the_page_as_card(name, folders, repo_root, tmp_path):
    with zipfile.ZipFile(package_bundle(repo_root / "bundles" / name, tmp_path)) as archive:
        zipped = {entry.removeprefix(f"{name}/"): archive.read(entry) for entry in archive.namelist()}
    written = content(folders / name)
    assert written.keys() - zipped.keys() == {"README.md"} and zipped.keys() - written.keys() == {"docs/README.md"}
    assert all(written[path] == zipped[path] for path in written.keys() & zipped.keys())


def test_hashes_are_printed_as_sha256sum_reads_them(repo_root, tmp_path, capsys):
    where = ["--output_dir", str(tmp_path / "h"), "--bundles", str(repo_root / "bundles")]
    assert main(["package", "maisi_vae", *where, "--layout", "hub", "--org", "somebody"]) == 0
    (tmp_path / "SUMS").write_text(capsys.readouterr().out)
    done = subprocess.run(["sha256sum", "-c", tmp_path / "SUMS"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(": OK\n") == len(content(tmp_path / "h" / "maisi_vae"))
    assert not list((tmp_path / "h").glob(".*"))


def without_links(text: str) -> str:
    return re.sub(r"\[([^\]]*)\]\([^)\s]+\)", r"\1", text)


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("maisi_vae", "image-to-image"),
        ("maisi_ldm", "unconditional-image-generation"),
        ("maisi_controlnet", "image-to-image"),
    ],
)
def test_the_card_has_what_the_hub_reads(name, task, folders, repo_root):
    hub_cards = pytest.importorskip("huggingface_hub").ModelCard
    card = hub_cards.load(folders / name / "README.md")
    found = card.data.to_dict()
    assert found.pop("tags")[:2] == ["monai", "medical"]
    assert found == {"license": "apache-2.0", "library_name": "monai", "pipeline_tag": task}
    assert f"--repo somebody/{name} " in card.text
    metadata = json.loads((repo_root / "bundles" / name / "configs" / "metadata.json").read_text())
    for key in ("version", "data_source", "intended_use", "monai_version"):
        assert metadata[key] in card.text, key
    page = (repo_root / "bundles" / name / "docs" / "README.md").read_text()
    head, rest = without_links(page).split("\n## ", 1)
    assert head in without_links(card.text) and rest.strip() in without_links(card.text)
    linked = re.findall(r"\]\(([^)\s]+)\)", card.text)
    assert linked and all(re.match("https://|#", one) or (folders / name / one).is_file() for one in linked)


def test_links_out_of_a_bundle_lead_to_the_pages(repo_root):
    root = repo_root / "bundles" / "maisi_ldm"
    card = model_card(root, "somebody", "https://example.org/repository/blob/v0.1.0/")
    linked = set(re.findall(r"\]\(https://example\.org/repository/blob/v0\.1\.0/([^)#]+)[^)]*\)", card))
    assert "bundles/maisi_controlnet/docs/README.md" in linked and "docs/how-to/mr.md" in linked
    assert all((repo_root / path).is_file() for path in linked)
    assert "](docs/data_license.txt)" in card and "../" not in "".join(re.findall(r"\]\(([^)]+)\)", card))


def test_a_page_keeps_its_code_and_a_licence_of_its_own_is_linked(repo_root, tmp_path):
    root = tmp_path / "mine"
    shutil.copytree(repo_root / "bundles" / "maisi_vae" / "configs", root / "configs")
    (root / "docs").mkdir()
    (root / "docs" / "README.md").write_text(
        "# Mine\n\n```python\na[0](b)\n```\n\n## Run\n\n[c](../../d.md) [e](#run)\n"
    )
    (root / "LICENSE").write_text("My licence\n")
    card = model_card(root, "somebody")
    assert "a[0](b)" in card and "\n\nc [e](#run)\n" in card
    front = yaml.safe_load(card.split("---\n")[1])
    assert (front["license"], front["license_link"]) == ("other", "LICENSE")


def test_a_segmentation_network_has_its_own_task(repo_root):
    metadata = json.loads((repo_root / "evaluation" / "segmentation" / "configs" / "metadata.json").read_text())
    assert pipeline_tag(metadata["network_data_format"]) == "image-segmentation"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--layout", "tar"], "give zip or hub"),
        (["--layout", "hub"], "--org NAME"),
        (["--org", "somebody"], "--layout hub"),
        (["--layout", "hub", "--org", "some body"], "letters and digits, with . _ - between"),
        (["--layout", "hub", "--org", "a/b"], "letters and digits, with . _ - between"),
        (["--layout", "hub", "--org", "somebody", "--pages", "docs"], "https://"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, said, repo_root, tmp_path, capsys):
    where = ["--output_dir", str(tmp_path), "--bundles", str(repo_root / "bundles")]
    assert main(["package", "maisi_vae", *where, *options]) == 2
    assert said in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_nothing_that_is_there_is_written_over(repo_root, tmp_path, capsys):
    """The bundles' own folder above all."""
    copied = tmp_path / "bundles" / "maisi_vae"
    shutil.copytree(repo_root / "bundles" / "maisi_vae", copied)
    before = content(copied)
    where = ["--output_dir", str(copied.parent), "--bundles", str(copied.parent)]
    assert main(["package", "maisi_vae", *where, "--layout", "hub", "--org", "somebody"]) == 2
    assert "exists; remove it" in capsys.readouterr().err and content(copied) == before


@pytest.mark.parametrize("lacking", ["LICENSE", "docs/README.md", "configs/metadata.json"])
def test_a_bundle_that_a_card_cannot_be_made_of_is_refused(lacking, repo_root, tmp_path, capsys):
    copied = tmp_path / "bundles" / "maisi_vae"
    shutil.copytree(repo_root / "bundles" / "maisi_vae", copied)
    if lacking.endswith(".json"):
        metadata = json.loads((copied / lacking).read_text())
        del metadata["data_source"]
        (copied / lacking).write_text(json.dumps(metadata))
    else:
        (copied / lacking).unlink()
    where = ["--output_dir", str(tmp_path / "dist"), "--bundles", str(copied.parent)]
    assert main(["package", "maisi_vae", *where, "--layout", "hub", "--org", "somebody"]) == 2
    said = capsys.readouterr().err
    assert str(copied / lacking) in said and ("data_source" in said) == lacking.endswith(".json")
    assert not (tmp_path / "dist").exists()
