"""How a job is made, in steps that are each a command of the shell, too: what the studio makes, the commands make."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maisi_tools.bundles.stage import Stage, config_files
from maisi_tools.errors import InputError
from maisi_tools.masks.edits import edit_file
from maisi_tools.masks.label_maps import read_label_map
from maisi_tools.masks.phantom import write_phantom
from maisi_tools.studio.catalogue import CONTROLNET, LDM, MASK_CONFIG
from maisi_tools.studio.folders import Folders
from maisi_tools.volumes.inputs import stem_of

EDIT_CONFIG = "edit.json"

KEPT = ("network", "autoencoder", "scale_factor", "factor")
"""What a config builds from its weights alone."""

OUT = Path("out")
"""Where a printed command writes to, in the folder that it is run in."""

Told = Callable[[int | None, int | None], None]
"""Is told how many steps of how many a network has taken; None where that is not known."""

MASK, CT = "drawing the mask", "making the CT"
"""What a step is about."""


class Networks:
    """Runs configs of bundles; networks stay in memory from one run to the next."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._kept: dict[tuple[str, ...], dict[str, Any]] = {}

    def run(
        self, bundle: Path, configs: Sequence[str], settings: Mapping[str, Any], paths: Mapping[str, Any], told: Told
    ) -> None:
        """Run configs as ``python -m monai.bundle run`` does.

        Args:
            bundle: its folder.
            configs: names, each over the ones before.
            settings: keys and values of a request: they are checked, never evaluated.
            paths: keys and values of the studio's own.
            told: of the sampler's steps.
        """
        key = (str(bundle), *(name for name in configs if name != EDIT_CONFIG))
        kept = self._kept.get(key, {})
        stage = Stage(bundle, configs, self.device, settings, progress=told, **paths, **kept)
        stage.run()
        self._kept[key] = kept or {name: stage.parser.get_parsed_content(name) for name in KEPT}


@dataclass(frozen=True)
class Phantom:
    """``maisi phantom``."""

    output: Path
    body: str
    size: Sequence[int]
    spacing: Sequence[float]
    seed: int
    about: str = MASK

    @property
    def words(self) -> list[str]:
        """The command."""
        options = {"kind": self.body, "size": self.size, "spacing": self.spacing, "seed": self.seed}
        return _maisi("phantom", str(self.output), options)

    def __call__(self, networks: Networks, told: Told) -> None:
        write_phantom(self.output, self.body, self.size, self.spacing, self.seed)


@dataclass(frozen=True)
class Edit:
    """``maisi edit``; without an edit it writes the mask in the vocabulary."""

    mask: Path
    output: Path
    label_map: str
    edit: Mapping[str, Any]
    seed: int
    about: str = MASK

    @property
    def words(self) -> list[str]:
        """The command."""
        options = {"label_map": self.label_map, **self.edit, "seed": self.seed}
        renamed = {"shift_mm": "shift", "elastic_mm": "elastic"}
        given = {renamed.get(name, name): value for name, value in options.items()}
        if "remove" in given:
            given["remove"] = ",".join(given["remove"])
        return _maisi("edit", str(self.mask), {"output": str(self.output), **given})

    def __call__(self, networks: Networks, told: Told) -> None:
        edit = {name: value for name, value in self.edit.items() if name != "seed"}
        self.output.parent.mkdir(parents=True, exist_ok=True)
        edit_file(self.mask, self.output, read_label_map(self.label_map), **edit, seed=self.seed)


@dataclass(frozen=True)
class Run:
    """``python -m monai.bundle run``; as a step of a worker it runs on the worker's device, which is the job's."""

    bundle: Path
    configs: Sequence[str]
    device: str
    settings: Mapping[str, Any]
    paths: Mapping[str, str]
    about: str = CT

    @property
    def words(self) -> list[str]:
        """The command."""
        files = config_files(self.bundle, self.configs)
        options = {
            "config_file": files[0] if len(files) == 1 else files,
            "meta_file": str(self.bundle / "configs" / "metadata.json"),
            "logging_file": str(self.bundle / "configs" / "logging.conf"),
            "bundle_root": str(self.bundle),
            "device": f"$torch.device({self.device!r})",  # else the config takes a GPU where there is one
            **self.paths,
            **self.settings,
        }
        return [sys.executable, "-m", "monai.bundle", "run", *_flags(options)]

    def __call__(self, networks: Networks, told: Told) -> None:
        networks.run(self.bundle, self.configs, self.settings, self.paths, told)


Step = Phantom | Edit | Run
"""One of the commands that make a job: ``words`` are the command, calling it does the same in this process."""


def steps_of(job: Mapping[str, Any], folders: Folders, overlays: Sequence[str]) -> list[Step]:
    """The steps of a job, which write into its folder.

    Args:
        job: with ``id`` and ``request``, see :func:`~maisi_tools.studio.requests.check_request`.
        folders: of the studio.
        overlays: of the weights.
    """
    folder = folders.job(job["id"])
    return _steps(job["request"], folders, overlays, folder / "input", folder)


def command_of(job: Mapping[str, Any], folders: Folders, overlays: Sequence[str]) -> str:
    """The command that makes a job's files again, in :data:`OUT`; a CT from the mask that the job kept."""
    folder, request = folders.job(job["id"]), job["request"]
    if request["makes"] == "ct":
        steps = _steps(request, folders, overlays, folder / "input", OUT)[-1:]
    else:
        steps = _steps(request, folders, overlays, OUT, OUT)
    return " && ".join(shlex.join(step.words) for step in steps)


def _steps(request: Mapping[str, Any], folders: Folders, overlays: Sequence[str], made: Path, out: Path) -> list[Step]:
    """Masks on the way go to `made`, what is asked for to `out`."""
    source, settings, seed = request["source"], dict(request["settings"]), request["settings"]["seed"]
    device = settings.pop("device")
    settings.pop("weights", None)
    controlnet = folders.bundles / CONTROLNET
    if source["kind"] == "ct":
        mask = folders.upload(source["mask_id"])
        labels = made / "labels.nii.gz"
        paths = {"input": folders.upload(source["id"])["path"], "mask": str(labels), "output_dir": str(out)}
        return [
            Edit(Path(mask["path"]), labels, folders.label_map(source["label_map"]), {}, seed),
            Run(
                controlnet,
                ["inference.json", *overlays, EDIT_CONFIG],
                device,
                {**settings, "edits": request["edits"]},
                paths,
            ),
        ]
    if request["makes"] == "mask":
        as_drawn = source["kind"] == "generator" and not request["edits"]
        name = f"sample_seed{seed}" if as_drawn else source["kind"]
        return _mask_steps(request, settings, folders, made, out / f"{name}_mask.nii.gz")
    target = made / f"{source['kind']}.nii.gz"
    paths = {"input": str(target), "output_dir": str(out)}
    return [
        *_mask_steps(request, {"seed": seed}, folders, made, target),
        Run(controlnet, ["inference.json", *overlays], device, settings, paths),
    ]


def _mask_steps(
    request: Mapping[str, Any], settings: Mapping[str, Any], folders: Folders, made: Path, target: Path
) -> list[Step]:
    source, edits, seed = request["source"], request["edits"], settings["seed"]
    steps: list[Step] = []
    label_map = "maisi"
    if source["kind"] == "phantom":
        given = made / "drawn.nii.gz" if edits else target
        steps.append(Phantom(given, source["body"], source["size"], source["spacing"], seed))
    elif source["kind"] == "generator":
        given = (made if edits else target.parent) / f"sample_seed{seed}_mask.nii.gz"
        sizes = {"organ_sizes": source["organ_sizes"]} if source["organ_sizes"] else {}
        paths = {"output_dir": str(given.parent)}
        device = request["settings"]["device"]
        steps.append(Run(folders.bundles / LDM, [MASK_CONFIG], device, {**settings, **sizes}, paths, MASK))
    elif source["kind"] == "job":
        made_there = _made_in(folders.job(source["id"]))
        if "mask" not in made_there:
            raise InputError(f"job {source['id']}, whose mask this takes, is no longer there; name another one")
        given = made_there["mask"]
    else:
        given = Path(folders.upload(source["id"])["path"])
        label_map = folders.label_map(source["label_map"])
    if not edits and given == target:
        return steps
    for number, edit in enumerate(edits or [{}], start=1):
        output = target if number == max(len(edits), 1) else made / f"edited{number}.nii.gz"
        steps.append(Edit(given, output, label_map, edit, edit.get("seed", seed + number - 1)))
        given, label_map = output, "maisi"
    return steps


def uploads_of(request: Mapping[str, Any], folders: Folders) -> list[dict[str, Any]]:
    """What is known of the uploads that a request names.

    Raises:
        InputError: one of them is gone.
    """
    source = request["source"]
    names = {"upload": ("id",), "ct": ("id", "mask_id")}.get(source["kind"], ())
    return [folders.upload(source[name]) for name in names]


def result_of(job: Mapping[str, Any], folders: Folders) -> dict[str, Path]:
    """The volumes of a finished job: "ct" and "mask" with their files; of an edited scan also "before".

    A scan that was uploaded as DICOM is its folder or zip file; one whose upload was removed is left out.
    """
    source, found = job["request"]["source"], _made_in(folders.job(job["id"]))
    if source["kind"] == "ct":
        with suppress(InputError):
            before = Path(folders.upload(source["id"])["path"])
            found |= {"before": before} if before.exists() else {}
    return found


def _made_in(folder: Path) -> dict[str, Path]:
    """What a job's folder has of "ct" and "mask", less what is half-written."""
    found = {what: folder.glob(f"*_{what}.nii.gz") for what in ("ct", "mask")}
    return {what: path for what, paths in found.items() for path in paths if path.name[0] != "."}


def name_of(job: Mapping[str, Any], folders: Folders) -> str:
    """What the files of a job begin with."""
    return stem_of(result_of(job, folders)["mask"]).removesuffix("_mask")


def _maisi(command: str, first: str, options: Mapping[str, Any]) -> list[str]:
    return [sys.executable, "-m", "maisi_tools.cli", command, first, *_flags(options)]


def _flags(options: Mapping[str, Any]) -> list[str]:
    texts = {k: json.dumps(v) if isinstance(v, (Mapping, list, tuple)) else str(v) for k, v in options.items()}
    return [word for name, text in texts.items() for word in (f"--{name}", text)]
