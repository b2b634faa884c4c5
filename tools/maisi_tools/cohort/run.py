"""Runs a cohort: in this process, under torchrun, or on Ray; started again it goes on."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from monai.bundle import ConfigParser
from tqdm import tqdm

from maisi_tools.bundles.settings import check_given
from maisi_tools.bundles.stage import Stage, config_files
from maisi_tools.cohort.generator import CONFIG, OWN_KEYS
from maisi_tools.cohort.layouts import LAYOUTS, label_names
from maisi_tools.cohort.spec import FIXED, SEEDS, USED, CohortSpec
from maisi_tools.cohort.worker import (
    DONE,
    FAILED,
    LEFT_OUT,
    RECORDS,
    SCRATCH,
    Worker,
    configs_of,
    mask_pool,
    numbered_labels,
    read_record,
    scans_of,
)
from maisi_tools.diffusion.editing import is_series
from maisi_tools.errors import InputError
from maisi_tools.files import (
    LOCK,
    canonical_json,
    expanded,
    fingerprint_file,
    fingerprint_text,
    held,
    sha256,
    write_csv,
    write_json,
)
from maisi_tools.masks.label_maps import LABEL_MAPS, read_label_map
from maisi_tools.metrics.judge import open_judge
from maisi_tools.settings import check_plain
from maisi_tools.volumes.inputs import fingerprint_input, stem_of

logger = logging.getLogger(__name__)

SPEC = "cohort.json"
MANIFEST = "manifest.csv"
ENGINES = ("process", "ray")

LEAST_RETRIES = 3
"""Of a sample whose worker died on Ray, however few the specification allows: it may have been killed from outside."""


def make_cohort(
    spec: CohortSpec,
    folder: str | Path,
    bundles: str | Path,
    engine: str = "process",
    workers: int = 1,
    device: str = "cpu",
    gpus: float = 0.0,
    threads: int = 1,
    address: str | None = None,
    judge: str | None = None,
    judge_label_map: str | None = None,
) -> dict[str, Any]:
    """Make what is missing of a cohort, and its manifest.

    Args:
        spec: the cohort.
        folder: where it goes.
        bundles: folder with the bundles.
        engine: "process": this one, or the ranks of torchrun, which share the samples; "ray": actors on a Ray cluster.
        workers: Ray actors; those that die are started anew, and their sample is tried again.
        device: for the networks.
        gpus: GPUs, or the fraction of one, for each Ray actor.
        threads: of torch on the CPU for each worker.
        address: of a running Ray cluster; None starts one on this machine.
        judge: segmenter by which samples that do not show their mask are left out, and how its labels are read; see
            :func:`~maisi_tools.metrics.segmenters.open_segmenter`. ``min_dice`` and ``redraws`` of the specification's
            ``ct`` say how strict it is.
        judge_label_map: see there.

    Returns:
        ``done``, ``left_out`` and ``failed`` (names), ``made`` (samples made in this run).

    Raises:
        InputError: an unknown engine, a folder with another cohort, a judge of edited scans, or a failing setup.
    """
    if engine not in ENGINES:
        raise InputError(f"engine is {engine!r}; allowed are {', '.join(ENGINES)}")
    folder, bundles = expanded(folder).resolve(), Path(bundles).resolve()
    _check_settings(spec, bundles)
    chosen: dict[str, Any] = {}
    seen: dict[str, Any] = {}
    if judge is not None:
        if spec.masks.source == "real":
            raise InputError("a judge is given with masks.source real; it looks at whole CTs: leave it out")
        check_plain(judge, "judge")
        chosen = {"judge": _absolute(judge), "judge_label_map": _absolute(judge_label_map)}
        opened = open_judge(chosen["judge"], chosen["judge_label_map"], spec.ct.get("min_dice"))
        assert opened is not None
        judging = opened.segmenter
        seen = {**chosen, "weights": judging.fingerprint, "config": judging.config, "ids": judging.label_map.ids}
    else:
        open_judge(None, judge_label_map, spec.ct.get("min_dice"))  # refuses what only a judge would use
    rank, ranks = idist.get_rank(), idist.get_world_size()
    taken = f"another run makes the cohort in {folder}; wait for its end, or give another folder"
    with held(folder, taken) if rank == 0 else contextlib.nullcontext():
        open_ones: list[int] = []
        if rank == 0:
            _claim(spec, folder, bundles, seen)
            open_ones = [index for index in range(spec.count) if not _is_done(spec, folder, index)]
        if ranks > 1:  # one looks for all: what a rank made meanwhile would shorten the list of the next
            told = [open_ones]
            torch.distributed.broadcast_object_list(told, src=0)
            (open_ones,) = told
        share = open_ones[rank::ranks]
        arguments = (spec, folder, bundles, device, threads, chosen)
        results = _on_ray(arguments, share, workers, gpus, address) if engine == "ray" else _here(arguments, share)
        done = spec.count - len(open_ones)
        with tqdm(results, total=len(share), desc=f"{spec.name}, {done} of {spec.count} there", unit="sample") as bar:
            for record in bar:
                if record["status"] != DONE:
                    logger.warning("%s %s: %s", record["name"], record["status"], record["error"])
        idist.barrier()
        if rank:
            return {}
        # Of a killed process there may be a study that it was writing (maisi_tools.dicom.study.PART), too.
        for left in (folder / SCRATCH, *folder.glob(".part-*")):
            shutil.rmtree(left, ignore_errors=True)
        return {**write_manifest(spec, folder, bundles), "made": len(open_ones)}


def write_manifest(spec: CohortSpec, folder: Path, bundles: Path) -> dict[str, Any]:
    """Write ``manifest.csv`` (a row a sample) and what describes the data set in its layout, from the records."""
    records = [read_record(folder / RECORDS / f"{spec.sample_name(i)}.json") for i in range(spec.count)]
    write_csv(folder / MANIFEST, [{key: _text(value) for key, value in record.items()} for record in records])
    named = {one: [record["name"] for record in records if record["status"] == one] for one in (LEFT_OUT, FAILED)}
    done = [record for record in records if record["status"] == DONE]
    names = _names(spec, bundles, {label for record in done for label in record["labels"]})
    LAYOUTS[spec.layout].describe(folder, spec.name, [record["name"] for record in done], names)
    return {"done": len(done), "left_out": named[LEFT_OUT], "failed": named[FAILED]}


def _names(spec: CohortSpec, bundles: Path, seen: Iterable[int]) -> dict[int, str]:
    """Number in the masks -> name, see :func:`~maisi_tools.cohort.layouts.label_names`."""
    numbered = numbered_labels(spec, _config(bundles, spec))
    return label_names(LAYOUTS[spec.layout], *numbered, seen, read_label_map(spec.masks.label_map).own_names)


def _here(arguments: tuple, share: Iterable[int]) -> Iterator[dict[str, Any]]:
    share = list(share)
    if not share:
        return
    worker = Worker(*arguments)
    try:
        for index in share:
            yield worker.make(index)
    finally:
        worker.close()


def _on_ray(
    arguments: tuple, share: list[int], workers: int, gpus: float, address: str | None
) -> Iterator[dict[str, Any]]:
    try:
        import ray
        from ray import exceptions
    except ImportError as error:
        raise InputError(
            "engine ray needs the extra 'ray'; install it with: pip install 'maisi-bundles[ray]'"
        ) from error
    if not share:
        return
    started = not ray.is_initialized()
    if started:
        # This package as it is here, also where it is not installed.
        paths = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]).strip(os.pathsep)
        environment = {"env_vars": {"PYTHONPATH": paths}}
        ray.init(address=address, runtime_env=environment, include_dashboard=False, log_to_driver=False)
    if address is None and workers > (most := int(ray.cluster_resources().get("CPU", 1))):
        # On a cluster that scales itself nodes may come; here, an actor without a core would wait for ever.
        logger.warning("%d workers were asked for, but this machine has %d cores: %d are started", workers, most, most)
        workers = most
    try:
        spec, folder = arguments[:2]
        actor = ray.remote(num_cpus=1, num_gpus=gpus)(Worker)
        waiting, deaths = deque(share), Counter[int]()
        idle: list[Any] = [actor.remote(*arguments) for _ in range(min(workers, len(share)))]
        running: dict[Any, tuple[Any, int]] = {}
        # Not by Ray's own restarts: these would try a sample that kills its worker for ever, or not say which it was.
        while waiting or running:
            while waiting and idle:
                one, index = idle.pop(), waiting.popleft()
                running[one.make.remote(index)] = one, index
            (ready,), _ = ray.wait(list(running), num_returns=1)
            one, index = running.pop(ready)
            try:
                record = ray.get(ready)
            except (exceptions.RayActorError, exceptions.OutOfMemoryError, exceptions.NodeDiedError) as error:
                if getattr(error, "actor_init_failed", False):
                    raise
                ray.kill(one)  # where it only went out of reach, it must not hold what the next one needs
                deaths[index] += 1
                if again := deaths[index] <= max(spec.retries, LEAST_RETRIES):
                    waiting.append(index)
                if waiting:
                    idle.append(actor.remote(*arguments))
                if again:
                    continue
                record = _lost(spec, folder, index, deaths[index])
            else:
                idle.append(one)
            yield record
    finally:
        if started:
            ray.shutdown()


def _lost(spec: CohortSpec, folder: Path, index: int, deaths: int) -> dict[str, Any]:
    """The record of a sample whose workers died, which is that of a failure unless one of them had written its own."""
    name = spec.sample_name(index)
    path = folder / RECORDS / f"{name}.json"
    record = read_record(path)
    if record.get("status") not in (DONE, LEFT_OUT):
        error = f"its worker died {deaths} times, of too little memory perhaps"
        record = {"index": index, "name": name, "status": FAILED, "error": error, "attempts": deaths}
        write_json(path, record)
    return record


def _absolute(given: str | None) -> str | None:
    """The path of a file or of a bundle as it is from everywhere, since a worker may run elsewhere; a name as it is."""
    if given is None:
        return None
    path = expanded(given)
    return str(path.resolve()) if path.is_file() or (path / "configs").is_dir() else given


def _check_settings(spec: CohortSpec, bundles: Path) -> None:
    """Refuse settings without use for the stages, scans of another form, and labels of one name.

    All of it before any network is loaded.
    """
    check_given(config_files(bundles / "maisi_controlnet", configs_of(spec)), spec.ct, "ct", FIXED)
    if spec.masks.source == "generator":
        check_given(config_files(bundles / "maisi_ldm", CONFIG), spec.masks.settings, "masks.settings", OWN_KEYS)
    if spec.format == "dicom":
        for scan in scans_of(spec):
            if not is_series(scan["image"]):
                raise InputError(
                    f"format is dicom, and {scan['image']} in {spec.masks.path} is no DICOM series, so there is no "
                    "study for the edited scan to join; allowed are folders and zip files of one CT series each: give "
                    "these, or format: nifti"
                )
    _names(spec, bundles, ())


def _config(bundles: Path, spec: CohortSpec) -> dict[str, Any]:
    """What makes the CTs, with the specification's settings."""
    return {**ConfigParser.load_config_files(config_files(bundles / "maisi_controlnet", configs_of(spec))), **spec.ct}


def _made_by(spec: CohortSpec, bundles: Path) -> dict[str, Any]:
    """What samples depend on beside their number and the specification's text."""
    config, weights = _config(bundles, spec), _weights(bundles / "maisi_controlnet", configs_of(spec))
    found: dict[str, Any] = {"config": fingerprint_text(canonical_json(config)), "seeds": SEEDS}
    if LAYOUTS[spec.layout].consecutive:
        found["numbering"] = numbered_labels(spec, config)[0]
    if spec.masks.source == "generator":
        weights |= _weights(bundles / "maisi_ldm", [CONFIG])
        (path,) = config_files(bundles / "maisi_ldm", CONFIG)
        found["generator"] = fingerprint_text(json.dumps(ConfigParser.load_config_file(path)))  # in its order
    if spec.masks.path:
        label_map = read_label_map(spec.masks.label_map)
        found["label_map"] = {str(label): id for label, id in label_map.ids.items()}
        # By these a flip finds the other side of a placeholder, and files name it.
        found["class_names"] = {str(id): name for id, name in label_map.own_names.items()}
        scans = scans_of(spec)
        masks = [Path(scan["mask"]) for scan in scans] or mask_pool(spec)
        listed = [f"{stem_of(path)} {fingerprint_file(path)}" for path in masks]
        listed += [f"{stem_of(scan['image'])} {_bytes_of(Path(scan['image']))}" for scan in scans]
        found["masks"] = fingerprint_text("\n".join(listed))
        if scans:  # beside their sizes, which are all that an earlier version recorded
            found["scans"] = fingerprint_text("\n".join(fingerprint_input(scan["image"]) for scan in scans))
    return {**found, "weights": weights}


def _bytes_of(scan: Path) -> int:
    """Of a CT's file, or of a series' files."""
    files = scan.rglob("*") if scan.is_dir() else [scan]
    return sum(file.stat().st_size for file in files if file.is_file())


def _weights(bundle: Path, names: Sequence[str]) -> dict[str, str]:
    """SHA-256 of the weights that a bundle's configs load."""
    files = map(Path, Stage(bundle, names).parser.get_parsed_content("weights"))
    return {f"{bundle.name}/models/{file.name}": sha256(file) for file in files}


def _claim(spec: CohortSpec, folder: Path, bundles: Path, judge: Mapping[str, Any]) -> None:
    """Make the folder this cohort's, or make sure that it is."""
    made_by = _made_by(spec, bundles)
    content = json.loads(json.dumps({"spec": _resolved(spec.as_dict()), **made_by, "judge": judge}))
    path = folder / SPEC
    if path.is_file():
        try:
            earlier = json.loads(path.read_text())
            count, earlier["spec"] = int(earlier["spec"]["count"]), _resolved(earlier["spec"])
            earlier["weights"]  # noqa: B018 - must be there
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise InputError(f"{path} describes no cohort ({error!r}); give another folder") from error
        free = ("count", "retries")
        then, now = _entries(earlier["spec"]), _entries(content["spec"])
        changed = [key for key, value in now.items() if then.get(key) != value and key not in free]
        # Organs are drawn for in the order in which they stand.
        same = [key for key in now if key not in (*changed, *free)]
        changed += [f"order of {key}" for key in same if _ordered(then.get(key)) != _ordered(now[key])]
        if earlier.get("judge"):  # whose config an earlier version did not record
            earlier["judge"] = {"config": judge.get("config"), **earlier["judge"]}
        # An earlier version recorded the weights of all configs, and numbered what they know, whatever was labelled.
        before = {name: earlier["weights"].get(name) for name in content["weights"]}
        known = _config(bundles, spec)["keep_labels"]
        # It also drew seeds of 31 bits, of which two samples could have one.
        earlier = {**content, "judge": {}, "numbering": known, "seeds": None, **earlier, "weights": before}
        changed += [what for what in content if what != "spec" and earlier[what] != content[what]]
        begun = any((folder / RECORDS).glob("*.json"))  # without a sample there is nothing to fit to
        if changed and begun:
            raise InputError(
                f"{folder} holds a cohort made with other {', '.join(changed)}; only count and retries "
                "may change: give another folder"
            )
        if spec.count < count and begun:
            raise InputError(
                f"{folder} holds a cohort of {count} samples, and count is {spec.count}; allowed is {count} or "
                "more, or another folder"
            )
        # Of more than 10 000 samples all names were once as long as the last one's.
        if old := next((folder / RECORDS).glob(f"{spec.name}_0????*.json"), None):
            raise InputError(
                f"{folder} has samples named as {old.stem}, where an earlier version made them; names are now as "
                f"{spec.sample_name(0)}: give another folder"
            )
    elif any(entry.name != LOCK for entry in folder.iterdir()):
        raise InputError(f"{folder} holds other files; give a new or empty folder")
    write_json(path, content)


def _resolved(spec: Mapping[str, Any]) -> dict[str, Any]:
    """A specification whose paths are whole, of what its source takes; an earlier version wrote all, as they came."""
    masks = {key: value for key, value in spec["masks"].items() if key in ("source", *USED[spec["masks"]["source"]])}
    for key in ("path", "label_map"):
        if masks.get(key) is not None and masks[key] not in LABEL_MAPS:
            masks[key] = str(Path(masks[key]).resolve())
    return {**spec, "masks": masks}


def _entries(spec: Mapping[str, Any]) -> dict[str, Any]:
    """A specification's keys, and those of its masks, whose own order says nothing."""
    masks = {f"masks.{key}": value for key, value in spec["masks"].items()}
    return {**{key: value for key, value in spec.items() if key != "masks"}, **masks}


def _ordered(value: Any) -> Any:
    """JSON with lists of pairs for mappings, which are the same only where their order is."""
    if isinstance(value, Mapping):
        return [(key, _ordered(entry)) for key, entry in value.items()]
    return [_ordered(entry) for entry in value] if isinstance(value, list) else value


def _is_done(spec: CohortSpec, folder: Path, index: int) -> bool:
    path = folder / RECORDS / f"{spec.sample_name(index)}.json"
    record = read_record(path)
    if record.get("status") != DONE:
        return record.get("status") == LEFT_OUT
    there = all((folder / record[what]).exists() for what in ("ct", "mask") if what in record)
    if not there:
        path.unlink()
    return there


def _text(value: Any) -> Any:
    return " ".join(map(str, value)) if isinstance(value, list) else value
