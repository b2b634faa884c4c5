"""The pages: their links lead somewhere, their commands run, and their tables are those of the configs.

Every command of every page either runs here, in this process, on phantoms and with the settings of QUICK, or is named
in ELSEWHERE with the reason why not. A page's commands run in order, in a folder of their own, on the files of GIVEN.
"""

from __future__ import annotations

import inspect
import json
import logging
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import fire
import monai.bundle
import nibabel as nib
import numpy as np
import pytest
import yaml

import maisi_tools.cli
from maisi_tools.bundles.packaging import PARTS
from maisi_tools.cli import main
from maisi_tools.masks.label_maps import read_label_map
from maisi_tools.masks.phantom import flat_ct, make_phantom
from maisi_tools.masks.vocabulary import display_name
from maisi_tools.networks import autoencoder_settings, unet_settings

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("docs", "bundles", "benchmarks", "evaluation", "deploy")
PAGES = sorted(
    str(page.relative_to(ROOT)) for page in [*ROOT.glob("*.md"), *(p for r in ROOMS for p in (ROOT / r).rglob("*.md"))]
)

ELSEWHERE = {
    # pattern of a command -> why it does not run here, and what runs it
    r"make |\.ci/run|nice \.venv/bin/python": "runs whole suites; its target is checked below",
    r"pip install|unzip ": "installs, or unpacks what another command made",
    r"torchrun ": "several processes; tests/bundles/test_{slabs,training,cache}.py run these configs",
    r"maisi demo": "ten steps at the demo's size; tests/test_cli.py runs it",
    r"maisi weights": "a download; tests/test_weights.py runs it against a server of its own",
    r".*full_rflow(_mr)?\.json'": "needs the released weights; tests/test_networks.py holds the networks to MONAI's",
    r".*mask_inference\.json": "20 s a mask; tests/bundles/test_mask_generator.py runs it",
    r".*train_mask\.json|.*encode_mask\.json": "minutes; tests/training/test_mask_generator.py runs it",
    r"maisi realism .*RadImageNet": "needs RadImageNet's weights; the line without them runs",
    r"python evaluation/downstream": "many trainings; tests/evaluation/test_downstream.py runs it",
    r"maisi cohort .*--engine ray": "a cluster; make test-cohort runs it",
    r"maisi listen|maisi jobs": "needs a PACS; make test-orthanc and tests/service run them",
    r"maisi studio|MAISI_STUDIO_TOKEN": "serves until it is ended; tests/studio runs it",
    r"monailabel |curl ": "needs a server; make test-monailabel and tests/studio run them",
    r"python recipes/small/run\.py": "hours; tests/test_recipe.py runs it with --quick",
    r"python benchmarks/|bash benchmarks/": "minutes to hours; tests/benchmarks/test_scripts.py runs it with --quick",
    r"python app\.py": "needs MONAI Deploy's SDK",
}

QUICK = {
    # pattern of a command -> settings that are added to it
    r".*maisi_controlnet/configs/inference": "--num_inference_steps 1",
    r".*maisi_ldm/configs/inference": "--num_inference_steps 1 --num_samples 1 --output_size [48,48,48] "
    "--spacing [5,5,3.4]",
    r".*maisi_(ldm|controlnet)/configs/train": "--epoch_length 2 --max_epochs 1 --tensorboard False",
    r".*maisi_vae/configs/train": "--epoch_length 2 --max_epochs 1 --val_interval 1 --tensorboard False "
    "--min_patch_size [32,32,32] --max_patch_size [32,32,32] --perceptual_weight 0 --adversarial_weight 0",
    r".*segmentation/configs/train": "--epoch_length 10 --max_epochs 1 --val_interval 1 --patch_size [16,16,16]",
    r"maisi phantom": "--size 48,48,48 --spacing 5,5,3.4",
    r"maisi realism": "--size 32 --pairs 0",
    r"maisi compare": "--cases 1",
    r"maisi twin": "--settings {'num_inference_steps':1}",
    r"maisi complete_masks": "--workers 0",  # a worker imports MONAI
    r"maisi package --": "maisi_vae",
}


class Command(NamedTuple):
    """A command of a page, and the folder it runs in, relative to the repository."""

    words: tuple[str, ...]
    folder: str

    @property
    def text(self) -> str:
        return " ".join(self.words)

    @property
    def full(self) -> str:
        """The text, with the configs of a card's bundle by their path from the repository."""
        return re.sub(
            r"(?<![\w/])configs/", f"{self.folder}/configs/", self.text.replace("../maisi_", "bundles/maisi_")
        )

    @property
    def reason(self) -> str | None:
        """The pattern of ELSEWHERE that it falls under."""
        return next((pattern for pattern in ELSEWHERE if re.match(pattern, self.full)), None)


def commands_of(page: str) -> list[Command]:
    """The commands in a page's bash blocks, and in tables whose first column is headed "command"."""
    text = (ROOT / page).read_text()
    blocks = [
        (found.start(2), found.group(2))
        for found in re.finditer(r"^( *)```bash\n(.*?)^\1```", text, re.MULTILINE | re.DOTALL)
    ]
    for table in re.finditer(r"^\| command \|.*\n(?:\|.*\n?)+", text, re.MULTILINE):
        rows = re.finditer(r"^\| `(.+?)` \|", table.group(), re.MULTILINE)
        blocks += [(table.start() + row.start(), row.group(1)) for row in rows]
    folder = str(Path(page).parent.parent) if page.startswith("bundles/") else "."  # a card's commands run beside it
    found = []
    for _, block in sorted(blocks):
        for line in block.replace("\\\n", " ").splitlines():
            words: list[str] = []
            for word in [*shlex.split(line, comments=True), "&&"]:
                if word != "&&":
                    words.append(word)
                elif words:
                    found.append(Command(tuple(words), folder))
                    words = []
    return found


COMMANDS = {page: commands_of(page) for page in PAGES}
RUN_HERE = [page for page in PAGES if any(command.reason is None for command in COMMANDS[page])]


# --- links ------------------------------------------------------------------------------------------------------------


def prose(page: str) -> str:
    """A page without its code blocks."""
    return re.sub(r"^( *)```.*?^\1```", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them: lower case, no punctuation, a dash for each space."""
    headings = re.findall(r"^#+ (.+)$", prose(str(page.relative_to(ROOT))), re.MULTILINE)
    shown = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower().strip() for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in shown}


def broken_links(page: str) -> list[str]:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", path):
            continue
        file = (ROOT / page).parent / path if path else ROOT / page
        if not file.resolve().exists() or (anchor and anchor not in anchors(file.resolve())):
            broken.append(target)
    return broken


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page):
    assert broken_links(page) == []


def test_a_broken_link_is_found(tmp_path, monkeypatch):
    (tmp_path / "a.md").write_text("# One: `x`, two\n[a](#one-x-two) [b](#three) [c](b.md) [d](a.md#one-x-two)")
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    assert broken_links("a.md") == ["#three", "b.md"]


def test_code_names_pages_that_are_there():
    """Messages and docstrings name pages by their path from the repository, or from a bundle's folder."""
    files = [p for room in ("tools", "recipes", "benchmarks", "deploy", "tests") for p in (ROOT / room).rglob("*.py")]
    for file in files:
        for name in re.findall(r"(?<!/)\bdocs/[\w/-]+\.md\b", file.read_text()):
            found = [ROOT / name, file.parent / name, *ROOT.glob(f"bundles/*/{name}")]
            assert any(page.is_file() for page in found), f"{file}: {name}"


def test_every_page_is_reached_from_the_readme():
    reached, todo = set(), [ROOT / "README.md"]
    while todo:
        page = todo.pop()
        if page in reached:
            continue
        reached.add(page)
        targets = re.findall(r"\]\(([^)\s#]+\.md)(?:#[^)]*)?\)", page.read_text())
        todo += [(page.parent / target).resolve() for target in targets if not re.match(r"[a-z]+:", target)]
    assert {ROOT / page for page in PAGES if page.startswith("docs/")} <= reached


def test_readme_is_short_and_begins_with_its_two_commands():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 100
    first_screen = "\n".join(lines[:25])
    assert all(command in first_screen for command in ("make demo", "make test", "docs/images/demo.png"))


# --- commands ---------------------------------------------------------------------------------------------------------


def test_reasons_are_of_commands_that_are_there():
    used = {command.reason for commands in COMMANDS.values() for command in commands}
    assert ELSEWHERE.keys() - used == set()


def test_targets_and_scripts_exist():
    """Of `make TARGET`, `python FILE` and `bash FILE`, in blocks, tables and prose."""
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for page in PAGES:
        spans = re.findall(r"`([^`\n]+)`", prose(page)) + [command.text for command in COMMANDS[page]]
        for span in spans:
            if named := re.match(r"make (?:PYTHON=\S+ )?([\w-]+)", span):
                assert named.group(1) in targets, f"{page}: {span}"
            if named := re.match(r"(?:python|bash) ([\w./-]+\.(?:py|sh))", span):
                assert (ROOT / named.group(1)).is_file() or (ROOT / page).parent.joinpath(named.group(1)).is_file(), (
                    f"{page}: {span}"
                )


def test_options_in_prose_exist():
    """Of every `maisi COMMAND --option ...`, in blocks, tables and prose."""
    known = {command.__name__: inspect.signature(command).parameters for command in maisi_tools.cli.COMMANDS}
    for page in PAGES:
        spans = re.findall(r"`maisi ([^`]+)`", prose(page)) + [
            command.text.removeprefix("maisi ") for command in COMMANDS[page] if command.words[0] == "maisi"
        ]
        for span in spans:
            name, _, options = span.partition(" ")
            if name in ("--help", "COMMAND"):
                continue
            assert name in known, f"{page}: maisi {span}"
            for option in re.findall(r"(?:^| )--([\w]+)", options):
                assert option in known[name], f"{page}: maisi {span}"


def volume(path: Path, data: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(data, np.diag([5.0, 5.0, 3.4, 1.0])), path)


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> Path:
    """The files that the pages name as the reader's, made of one phantom."""
    folder = tmp_path_factory.mktemp("given")
    labels = make_phantom("head_neck", size=(48, 48, 48), spacing=(5.0, 5.0, 3.4), seed=3)
    noise = np.random.default_rng(0).normal(0, 10, labels.shape)
    hu = (flat_ct(labels) + noise * (labels > 0)).clip(-1000, 1000).astype(np.int16)
    for name in ("my_ct", "ct", "cts/one", "real_cts/one", "real_cts/two", "generated_cts/three", "generated_cts/four"):
        volume(folder / f"{name}.nii.gz", hu)
    for name in ("my_mask", "mask", "my_masks/one", "my_masks/two"):
        volume(folder / f"{name}.nii.gz", labels)

    def numbered(name: str) -> np.ndarray:
        """The phantom with the labels that another data set has, in its numbering."""
        numbering = np.zeros(256, np.uint8)
        for theirs, ours in read_label_map(name).items():
            numbering[ours] = theirs
        return numbering[labels]

    volume(folder / "my_mr" / "one.nii.gz", np.where(labels > 0, 300.0 + labels, 0).astype(np.int16))
    volume(folder / "total.nii.gz", numbered("totalsegmentator"))
    volume(folder / "scan.nii.gz", hu)
    volume(folder / "labels.nii.gz", numbered("openkbp"))
    crop = (slice(8, 40),) * 3
    for place, names in (("my_cts", ("case_1", "case_2")), ("openkbp", ("pt_1", "pt_50"))):
        for name in names:
            volume(folder / place / f"{name}_ct.nii.gz", hu[crop])
            volume(folder / place / f"{name}_seg.nii.gz", numbered("openkbp")[crop])
    cases = {
        name: {key: f"openkbp/{name}_{end}.nii.gz" for key, end in (("image", "ct"), ("label", "seg"))}
        for name in ("pt_1", "pt_50")
    }
    lists = {"training": [cases["pt_1"]], "validation": [cases["pt_50"]]}
    for name, content in {
        "datalist": {**lists, "held_out": ["pt_50"]},  # as `maisi prepare` leaves it
        "data/datalist": {section: [{"image": f"../{item['image']}"} for item in lists[section]] for section in lists},
        "held_out": {"held_out": ["pt_50"]},
        "docs/held_out": {"held_out": ["pt_50"]},
        "masks_of_100": {"training": [{"image": "mask.nii.gz", "seed": 1}]},
    }.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(content))
    people = [("a", "f", 30, "x"), ("b", "m", 50, "y"), ("c", "f", 70, "y"), ("d", "m", 45, "x")]
    rows = [f"{case},{sex},{age},{scanner}" for case, sex, age, scanner in people]
    (folder / "cases.csv").write_text("\n".join(["case,sex,age,scanner", *rows]))
    (folder / "metrics.csv").write_text("\n".join(["case,psnr", *(f"{row[0]},{30 + row[2] / 10}" for row in people)]))

    study = folder / "study_in"
    assert main(["dicom_write", *map(str, (folder / "ct.nii.gz", folder / "mask.nii.gz", "-o", study))]) == 0
    (study / "CT").rename(folder / "SERIES")
    for name in ("SEG.dcm", "RTSTRUCT.dcm"):
        (study / name).rename(folder / name)
    study.rmdir()
    return folder


@pytest.fixture
def workplace(given, tiny_bundles, tmp_path) -> Path:
    """A checkout's data rooms, its bundles with narrow networks, with the reader's files in its root."""
    shutil.copytree(given, tmp_path, dirs_exist_ok=True)
    for room in (*tiny_bundles.iterdir(), ROOT / "evaluation" / "segmentation"):
        here = tmp_path / room.parent.name / room.name
        here.mkdir(parents=True)
        for inside in room.iterdir():
            if inside.name in PARTS:
                (here / inside.name).symlink_to(inside)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    return tmp_path


@pytest.fixture
def quiet() -> Iterator[None]:
    """Takes back what bundles do to logging."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def cohort_files(page: str, folder: Path) -> None:
    """Write the specifications that a page shows and uses, each for one small sample."""
    for text in re.findall(r"^```yaml\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL):
        content = yaml.safe_load(text)
        if any(f"{content.get('name')}.yaml" in command.words for command in COMMANDS[page]):
            content |= {"count": 1, "tumors": []}
            content["masks"] |= {"field_of_view": [240, 240, 164], "spacing": [5.0, 5.0, 3.4]}
            content["ct"] |= {"num_inference_steps": 1, "redraws": 0}
            (folder / f"{content['name']}.yaml").write_text(yaml.safe_dump(content))


def run(command: Command) -> None:
    """Run a command in this process; one that fails raises."""
    words = list(command.words)
    for pattern, settings in QUICK.items():
        if re.match(pattern, command.full):
            words += shlex.split(settings)
    if words[0] == "maisi":
        assert main(words[1:]) == 0, command.text
    elif words[:3] == ["python", "-m", "monai.bundle"]:
        if words[3] == "run":
            words += ["--logging_file", "False"]
        fire.Fire({name: getattr(monai.bundle, name) for name in ("run", "verify_net_in_out")}, words[3:])
    else:
        raise AssertionError(f"{command.text} has no reason in ELSEWHERE, and nothing here can run it")


def test_a_command_without_a_way_to_run_or_a_reason_fails():
    with pytest.raises(AssertionError, match="gzip out has no reason"):
        run(Command(("gzip", "out"), "."))


@pytest.mark.parametrize("page", RUN_HERE)
def test_commands_run(page, workplace, monkeypatch, quiet):
    cohort_files(page, workplace)
    for command in COMMANDS[page]:
        if command.reason is None:
            here = workplace / command.folder
            if command.folder != "." and not (here / "openkbp").exists():
                for name in workplace.iterdir():
                    if name.name not in ("bundles", "evaluation", "docs", "recipes"):
                        (here / name.name).symlink_to(name)
            monkeypatch.chdir(here)
            run(command)


# --- the reference ----------------------------------------------------------------------------------------------------


def rows_under(heading: str) -> list[list[str]]:
    """The cells of the table under a heading of the reference, without its first two lines."""
    text = (ROOT / "docs" / "reference.md").read_text()
    section = re.split(r"^#+ ", text.split(f" {heading}\n", 1)[1], flags=re.MULTILINE)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def layered(bundle: str, configs: list[str]) -> dict:
    """The content of configs, each over those before it."""
    content: dict = {}
    for name in configs:
        for key, value in json.loads((ROOT / "bundles" / bundle / "configs" / name).read_text()).items():
            *path, last = key.split("#")
            place = content
            for part in path:
                place = place[part]
            place[last] = value
    return content


def numbers(cell: str) -> list[float]:
    return [float(text) for text in re.findall(r"[\d.]+", cell)]


@pytest.mark.parametrize("row", rows_under("Networks"), ids=lambda row: row[0])
def test_the_table_of_networks_is_that_of_the_configs(row):
    _, where, channels, latents, factor, multiple, spacing, _ = row
    bundle, *configs = re.findall(r"`([\w.]+)`", where)
    content = layered(bundle, configs)
    network, alone = content["network_def"], "autoencoder_def" not in content
    autoencoder = autoencoder_settings(**(network if alone else content["autoencoder_def"]))["num_channels"]
    levels = network.get("channels") or unet_settings(**network.get("unet", network))["num_channels"]
    own = autoencoder if alone else levels
    halvings = len(autoencoder) - 1
    assert numbers(channels) == own
    assert numbers(latents) == ([] if alone else autoencoder)
    assert int(factor) == 2**halvings
    assert int(multiple) == 2 ** (halvings + (0 if alone else len(own) - 1))
    if ranges := content.get("spacing_range"):
        one = [mm for mm, highest in ranges if mm == highest]
        assert numbers(spacing) == (one if len(one) == 3 else [mm for axis in ranges for mm in axis])
        assert ("alone" in spacing) == (len(one) == 3)
    else:
        assert spacing == "any"


def test_the_table_of_networks_has_every_overlay_of_inference():
    named = {name for row in rows_under("Networks") for name in re.findall(r"`([\w/]+\.json)`", row[1])}
    overlays = {path.name for path in ROOT.glob("bundles/*/configs/full*.json") if not path.stem.endswith("_train")}
    assert overlays | {"inference.json", "mask_inference.json"} == named


def test_labels_are_those_of_the_small_weights():
    content = layered("maisi_controlnet", ["inference.json"])
    assert [int(row[0]) for row in rows_under("Labels")] == content["keep_labels"]
    merged = {label: group for group, label in content["merge_labels"].items()}
    names = [merged.get(label) or display_name(label) for label in content["keep_labels"]]
    assert [row[1] for row in rows_under("Labels")] == names


def is_setting(value: object) -> bool:
    """Whether a config's value is plain, or a path in the bundle: what a user would set."""
    if isinstance(value, str):
        return value.startswith(("@displayable_configs", "$os.path.join(@bundle_root")) or value[:1] not in "$@%"
    return all(map(is_setting, value)) if isinstance(value, list) else not isinstance(value, dict)


@pytest.mark.parametrize("heading", ["Inference", "Training"])
def test_every_setting_has_its_row(heading):
    columns = ("maisi_vae", "maisi_ldm", "maisi_controlnet")
    names = ("inference", "encode", "decode", "mask_inference", "edit") if heading == "Inference" else ("train",)
    found: dict[str, list[set[str]]] = {}
    for column, bundle in enumerate(columns):
        for name in names:
            path = ROOT / "bundles" / bundle / "configs" / f"{name}.json"
            content = json.loads(path.read_text()) if path.is_file() else {}
            for key in content.keys() - {
                "imports",
                "start",
                "door",
                "check",
                "recorded",
                "initialize",
                "run",
                "weights",
                "judges",
            }:
                if is_setting(content[key]) and "#" not in key:  # of another config, which an overlay gives a value
                    found.setdefault(key, [set(), set(), set()])[column].add("x" if name == "train" else name)
    listed = {row[0].strip("`"): [set(re.findall(r"\w+", cell)) for cell in row[1:4]] for row in rows_under(heading)}
    assert listed == found
