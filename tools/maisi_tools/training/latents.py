"""The latent cache that stages 2 and 3 train from: a folder of ``*_latent.nii.gz`` with their sidecars."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from monai.transforms import Compose
from torch import nn
from tqdm import tqdm

from maisi_tools.datasets.complete import check_cts
from maisi_tools.datasets.datalist import belongs
from maisi_tools.diffusion.conditions import check_scaled, modality_of
from maisi_tools.errors import InputError, first_few
from maisi_tools.files import canonical_json, expanded, read_json
from maisi_tools.masks.vocabulary import checked_regions
from maisi_tools.training.patches import RandLatentCropd
from maisi_tools.training.views import make_views
from maisi_tools.volumes.checks import UNRECORDED_FACTOR
from maisi_tools.volumes.inputs import check_earlier, check_targets, fingerprint_input, of_a_run, stem_of
from maisi_tools.volumes.nifti import read_nifti_grid
from maisi_tools.volumes.normalise import MR_PERCENTILES, checked_window
from maisi_tools.volumes.reading import read_sidecar, sidecar_if_any
from maisi_tools.volumes.writing import write_sidecar
from maisi_tools.weights import check_shared, encoder_fingerprint, read_autoencoder, read_factor

logger = logging.getLogger(__name__)

SUFFIX = "_latent.nii.gz"
"""What ``maisi_vae``'s encode.json appends to the name of a case's view."""

SIGMA_SUFFIX = "_sigma.nii.gz"
"""What it appends for the posterior's standard deviation."""

COARSE_SUFFIX = "_coarse.nii.gz"
"""What it appends for the coarse CT, see :mod:`maisi_tools.coarse`."""

BESIDE = {"sigma": SIGMA_SUFFIX, "coarse_size": COARSE_SUFFIX}
"""Setting of an encoding -> what lies beside each latent for it."""

MADE_FROM = ("autoencoder", "source", "settings")
"""What a latent was made from, in its sidecar: fingerprints of the encoder's weights and of the volume's file, and all
settings that its values depend on. A latent is up to date as long as none of them changed."""

CACHED = ("view", *MADE_FROM)
"""What the sidecar of a cached latent holds beside :data:`maisi_tools.volumes.latents.SIDECAR`."""

LABELS = ("keep_labels", "merge_labels")
"""Of the shared settings those that a training may change which goes on from weights."""


def latents_to_encode(
    items: Sequence[Mapping[str, Any]],
    output_dir: str | Path,
    autoencoder: nn.Module,
    views: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
    modality: str | int,
    seed: int = 0,
    rank: int = 0,
    ranks: int = 1,
) -> list[dict[str, Any]]:
    """List what is still to be encoded: every view of every volume whose latent is missing or out of date.

    A latent whose region or modality alone is to change has its sidecar rewritten here; it is not encoded again.

    Args:
        items: volumes under ``image``, with their body ``region`` and ``modality`` (all CT, or all MR) where it is
            known. What an earlier run wrote beside them is passed over.
        output_dir: the cache.
        autoencoder: the network with its weights.
        views: see :func:`maisi_tools.training.views.make_views`.
        settings: what else the latents depend on, JSON values (the padding, the HU window).
        modality: the condition that is written for items without one of their own, a name or a code.
        seed: of what views draw.
        rank, ranks: this process takes every ``ranks``-th latent, from the ``rank``-th on.

    Returns:
        Items with ``image``, ``modality``, ``region`` where it is known, ``case`` (the volume's stem), ``stem`` (what
        the latent's file name begins with) and :data:`CACHED`.

    Raises:
        InputError: an unknown modality, or one that the settings' window is not for; a padding that the autoencoder's
            factor does not divide; bad views, two latents of one name, an MR among CTs or the reverse, a latent that
            would be written over an input or with its sigma or coarse CT over what no run wrote, or a rank that is
            none.
    """
    if not (isinstance(rank, int) and isinstance(ranks, int) and 0 <= rank < ranks):
        raise InputError(f"rank is {rank!r} of {ranks!r} ranks; allowed are whole numbers, 0 <= rank < ranks")
    folder = expanded(output_dir)
    if "window" in settings:  # masks have none
        check_scaled(modality, "mr" if list(settings["window"]) == list(MR_PERCENTILES) else "ct")
    multiple, factor = settings.get("multiple"), getattr(autoencoder, "factor", 1)
    if multiple and multiple % factor:
        raise InputError(
            f"multiple is {multiple}; allowed are multiples of {factor}, the autoencoder's factor: latents of others "
            "would not cover their images"
        )
    encoder = encoder_fingerprint(autoencoder)
    seen = [
        {
            "view": view.name,
            "autoencoder": encoder,
            "settings": canonical_json({**settings, "view": view.settings(seed)}),
        }
        for view in make_views(views)
    ]
    jobs: dict[str, dict[str, Any]] = {}
    for item in items:
        case = stem_of(item["image"])
        imaged = modality_of(item, modality)
        for view in seen:
            stem = f"{case}_{view['view']}" if view["view"] else case
            if stem in jobs:
                raise InputError(
                    f"view {view['view']!r} of {item['image']} and {jobs[stem]['image']} would both be {stem}{SUFFIX}; "
                    "rename the file or the view"
                )
            # An empty list does not survive MONAI's collation.
            region = {"region": list(checked_regions(item["region"]))} if item.get("region") else {}
            jobs[stem] = {"image": str(item["image"]), "modality": imaged, **region, "case": case, "stem": stem, **view}
    written = {path.resolve() for stem in jobs for path in _left_of(folder, stem)}
    if own := {stem for stem, job in jobs.items() if Path(job["image"]).resolve() in written}:
        logger.info("%s: passed over %d files that an earlier run left there", output_dir, len(own))
        jobs = {stem: job for stem, job in jobs.items() if stem not in own}
    endings = _endings(settings)
    targets = [folder / f"{stem}{ending}" for stem in jobs for ending in endings]
    check_targets([job["image"] for job in jobs.values()], targets, output_dir)
    if rank == 0 and (others := sorted(set(_stems(folder)) - jobs.keys())):
        logger.warning(
            "%s has %d latents of no volume and view that are given now, and a training would see them, too: %s; "
            "delete them, or encode into another folder",
            *(output_dir, len(others), first_few(others)),
        )
    share = list(jobs.values())[rank::ranks]
    # All that a run may write or remove; the other ranks may be writing theirs. In a cache of ours, a sigma or coarse
    # CT without its latent is of a run that was killed.
    begun = any(map(of_a_run, folder.glob(f"*{SUFFIX}")))
    for job in share:
        check_earlier([folder / f"{job['stem']}{end}" for end in (SUFFIX, *(() if begun else BESIDE.values()))])
    sources: dict[str, str] = {}
    outdated = []
    for job in tqdm(share, desc="comparing with the cache", unit="latent", delay=2, disable=rank > 0):
        if job["image"] not in sources:
            sources[job["image"]] = fingerprint_input(job["image"])
        job["source"] = sources[job["image"]]
        if not _is_up_to_date(folder, endings, job):
            outdated.append(job)
    logger.info("%s: %d latents up to date, %d to encode", output_dir, len(share) - len(outdated), len(outdated))
    return outdated


def find_latents(
    latents_dir: str | Path,
    held_out: Sequence[str] | str | Path = (),
    masks_dir: str | Path | None = None,
    mask_suffix: str = "_mask.nii.gz",
    autoencoder: str | Path | None = None,
    coarse: bool = False,
) -> dict[str, list[dict[str, str]]]:
    """List the cached latents, split by patient into "training" and "validation".

    Args:
        latents_dir: folder written by ``maisi_vae``'s encode.json.
        held_out: case names kept out of training, or a JSON file with them under "held_out" (such as the datalist of
            `maisi prepare`). A latent belongs to a case when its stem is the name or begins with the name and an
            underscore (``pt_1_ct``, ``pt_1_ct_flip``).
        masks_dir: folder with one mask a case, ``<stem>`` + ``mask_suffix``, where a view without a mask of its own
            takes its case's; latents without a mask are left out, which is said.
        autoencoder: weights that all latents must come from.
        coarse: whether each needs the coarse CT beside it, see :mod:`maisi_tools.coarse`.

    Returns:
        Items with ``latent`` and, where there is one, ``mask`` and ``sigma``; with ``coarse`` where that is needed.

    Raises:
        InputError: no latents, or none with a mask, or none of those held out; a latent without a sidecar, or without
            the coarse CT it needs; coarse CTs of several sizes; CTs of a window of their own, or masks of several sets
            of labels; latents of different autoencoders, or of another than ``autoencoder``; a case's mask that was
            completed from another CT than its latents were encoded from; or a held-out name that no latent belongs to,
            because a misspelt name would put its patient into training.
    """
    root = Path(latents_dir)
    stems = _stems(root)
    found = [root / f"{stem}{SUFFIX}" for stem in stems]
    if not found:
        raise InputError(f"no *{SUFFIX} in {root}; make them with configs/encode.json of the maisi_vae bundle")
    names = _names(held_out)
    unknown = [name for name in names if not any(belongs(stem, name) for stem in stems)]
    if unknown:
        raise InputError(f"held-out cases {', '.join(unknown)} have no latent in {root}; correct the names")
    sidecars = [read_sidecar(path) for path in found]
    _check_autoencoder(root, dict(zip(stems, sidecars, strict=True)), autoencoder)
    lists: dict[str, list[dict[str, str]]] = {"training": [], "validation": []}
    bare: list[str] = []  # without a mask
    encoded: list[tuple[str, str | None]] = []  # a case's mask and the CT of a latent
    settings = [_settings_of(path, sidecar) for path, sidecar in zip(found, sidecars, strict=True)]
    _check_settings(root, dict(zip(stems, settings, strict=True)))
    if coarse:
        _check_coarse(root, dict(zip(stems, settings, strict=True)))
    for path, stem, sidecar, made in zip(found, stems, sidecars, settings, strict=True):
        item = {"latent": str(path)}
        if made.get("sigma"):
            item["sigma"] = str(root / f"{stem}{SIGMA_SUFFIX}")
        if coarse:
            item["coarse"] = str(root / f"{stem}{COARSE_SUFFIX}")
        if masks_dir is not None:
            case = stem.removesuffix(f"_{sidecar['view']}") if sidecar.get("view") else stem
            masks = [Path(masks_dir) / f"{name}{mask_suffix}" for name in (stem, case)]
            mask = next((mask for mask in masks if mask.is_file()), None)
            if mask is None:
                bare.append(stem)
                continue
            item["mask"] = str(mask)
            if mask == masks[-1]:  # a view's own may be of a CT that was made as the view is
                encoded.append((item["mask"], sidecar.get("source")))
        kept_out = any(belongs(stem, name) for name in names)
        lists["validation" if kept_out else "training"].append(item)
    check_cts(encoded)
    if not lists["training"] and not lists["validation"]:
        raise InputError(f"none of the latents in {root} has a mask *{mask_suffix} in {masks_dir}")
    if bare:
        some = first_few(bare)
        if names and not lists["validation"]:
            raise InputError(
                f"none of the held-out cases has a mask *{mask_suffix} in {masks_dir} ({some}), so that nothing would "
                "be validated on; make their masks with `maisi complete_masks`, or hold out others"
            )
        logger.warning("left out %d latents without a mask *%s in %s: %s", len(bare), mask_suffix, masks_dir, some)
    if unsaid := [stem for stem, sidecar in zip(stems, sidecars, strict=True) if not sidecar.get("region")]:
        some = "no latent" if len(unsaid) == len(stems) else f"not every latent ({first_few(unsaid)})"
        logger.warning(
            "%s in %s says which body region it shows, so nothing is learnt of regions from those; encode from the "
            "cases.json of `maisi complete_masks`, which has them (the latents that are there are kept)",
            *(some, root),
        )
    if not names:
        logger.warning("no case is held out, so nothing is validated on unseen patients; name some with held_out")
    return lists


def made_by(
    latents: Mapping[str, Sequence[Mapping[str, str]]],
    *checkpoints: str | Path | None,
    shared: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What weights record of the autoencoder that made the latents they are trained on, and of how they are trained.

    Args:
        latents: as :func:`find_latents` lists them.
        checkpoints: weights to go on from; None among them are passed over.
        shared: settings that whoever uses the weights must share, plain values. Weights to go on from must have been
            trained with them, but for :data:`LABELS`, which may become others.

    Returns:
        ``factor`` (image voxels per latent voxel along each axis), ``shared`` where it is given and, where the latents
        say it, ``autoencoder``, the fingerprint of its encoder: a decoder that was trained on leaves latents, and what
        knows them, valid.

    Raises:
        InputError: latents of several factors, or weights of another factor, for latents of another encoder, or
            trained with other shared settings.
    """
    paths = [item["latent"] for section in latents.values() for item in section]
    starts = [path for path in checkpoints if path is not None]
    sidecars = {path: read_sidecar(path) for path in paths}
    by_factor = {sidecar.get("factor") or UNRECORDED_FACTOR: path for path, sidecar in sidecars.items()}
    found = {f"latent {path}": factor for factor, path in by_factor.items()}
    found |= {f"weights {path}": read_factor(path) for path in starts}
    if len(set(found.values())) > 1:
        listed = ", ".join(f"{name} {factor}" for name, factor in found.items())
        raise InputError(
            f"factors differ (image voxels per latent voxel): {listed}; allowed is one for all: encode the CTs again "
            "with the autoencoder the weights were trained for, or train without these weights"
        )
    encoder = sidecars[paths[0]].get("autoencoder")  # all have the same, see find_latents
    kept = {name: value for name, value in (shared or {}).items() if name not in LABELS}
    for path in starts:
        if encoder is not None and (other := read_autoencoder(path)) not in (None, encoder):
            raise InputError(
                f"weights {path} were trained on latents of an autoencoder with {other}, and {paths[0]} comes from one "
                f"with {encoder}; allowed is one for all: encode the CTs again with the autoencoder the weights were "
                "trained for, or train without these weights"
            )
        check_shared(path, kept)
    record = {"factor": next(iter(by_factor)), "autoencoder": encoder, "shared": shared}
    return {name: value for name, value in record.items() if value is not None}


def check_latent_sizes(
    latents: Mapping[str, Sequence[Mapping[str, str]]], network: nn.Module, preprocessing: Compose
) -> None:
    """Refuse latents that a U-Net cannot see whole, before a step is made.

    Args:
        latents: as :func:`find_latents` lists them.
        network: to be trained; one without :attr:`~maisi_tools.networks.DiffusionUNet.latent_multiple` sees something
            of one size in their place, coarse CTs or masks.
        preprocessing: of the training; where it crops them, only those of the validation are seen whole.

    Raises:
        InputError: with the first of another size.
    """
    multiple = getattr(network, "latent_multiple", 1)
    crops = any(isinstance(one, RandLatentCropd) for one in preprocessing.flatten().transforms)
    for item in [*latents["validation"], *(() if crops else latents["training"])]:
        size = read_nifti_grid(item["latent"], "latent")[0][:3]
        if any(side % multiple for side in size):
            factor = read_sidecar(item["latent"]).get("factor") or UNRECORDED_FACTOR
            raise InputError(
                f"{item['latent']} has {' x '.join(map(str, size))} cells; the network takes multiples of {multiple} "
                f"along each axis: encode again with --multiple {multiple * factor}"
            )


def _stems(folder: Path) -> list[str]:
    """Of the latents in a folder, sorted; without what a process is writing."""
    return [path.name.removesuffix(SUFFIX) for path in sorted(folder.glob(f"*{SUFFIX}")) if path.name[0] != "."]


def _is_up_to_date(folder: Path, endings: Sequence[str], job: Mapping[str, Any]) -> bool:
    path = folder / f"{job['stem']}{SUFFIX}"
    sidecar = sidecar_if_any(path)
    files = [folder / f"{job['stem']}{ending}" for ending in endings]
    if not all(file.is_file() for file in files) or any(sidecar.get(name) != job[name] for name in MADE_FROM):
        return False
    # What a list does not say stays as a list with regions said it.
    wanted = {**sidecar, "region": job.get("region", sidecar.get("region", [])), "modality": job["modality"]}
    if wanted != sidecar:
        write_sidecar(path, wanted)
    return True


def _endings(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """What the names of the files end in that are written with some settings."""
    return (SUFFIX, *(ending for name, ending in BESIDE.items() if settings.get(name)))


def _left_of(folder: Path, stem: str) -> list[Path]:
    """The files that an earlier run wrote for a latent."""
    path = folder / f"{stem}{SUFFIX}"
    sidecar = sidecar_if_any(path)
    if not sidecar.keys() >= set(MADE_FROM):
        return []
    try:
        settings = _settings_of(path, sidecar)
    except InputError:  # damaged: the latent is made again
        settings = {}
    return [folder / f"{stem}{ending}" for ending in _endings(settings)]


def _settings_of(path: Path, sidecar: Mapping[str, Any]) -> dict[str, Any]:
    """The settings a latent was encoded with, which its sidecar has as one line of JSON."""
    given = sidecar.get("settings", "{}")
    try:
        settings = json.loads(given)
    except (TypeError, ValueError):
        settings = None
    if not isinstance(settings, dict):
        raise InputError(f"the sidecar of {path} has settings that are no JSON object: {given!r:.80}; encode it again")
    return settings


def _check_autoencoder(root: Path, sidecars: Mapping[str, Mapping], wanted: str | Path | None) -> None:
    """Refuse latents that no single decoder can decode."""
    by_autoencoder: dict[str | None, list[str]] = {}
    for stem, sidecar in sidecars.items():
        by_autoencoder.setdefault(sidecar.get("autoencoder"), []).append(stem)
    do = "encode them again with configs/encode.json of the maisi_vae bundle: what is up to date is kept"
    if len(by_autoencoder) > 1:
        counts = ", ".join(f"{len(of)} of {name or 'unknown weights'} ({of[0]})" for name, of in by_autoencoder.items())
        raise InputError(f"the latents in {root} come from different autoencoders: {counts}; allowed is one: {do}")
    if wanted is not None and (other := encoder_fingerprint(wanted)) not in by_autoencoder:
        (name,) = by_autoencoder
        raise InputError(
            f"the latents in {root} come from an autoencoder with {name or 'unknown weights'}, not from {wanted} "
            f"({other}); {do}, or give the weights that made them"
        )


def _check_settings(root: Path, settings: Mapping[str, Mapping]) -> None:
    """Refuse CTs encoded with a window that decoding does not know, and masks of several sets of labels."""
    labels: dict[str, str] = {}  # -> a latent with them
    for stem, made in settings.items():
        if len(window := made.get("window", ())) == 4:  # of a CT
            checked_window(window, f"the window of {root / stem}{SUFFIX}")
        if "keep_labels" in made:
            labels.setdefault(canonical_json([made["keep_labels"], made.get("merge_labels")]), stem)
    if len(labels) > 1:
        listed = ", ".join(f"{found} ({stem})" for found, stem in labels.items())
        raise InputError(
            f"the latents in {root} are of masks with several keep_labels and merge_labels: {listed}; allowed is one "
            "for all: encode the masks again into one folder"
        )


def _check_coarse(root: Path, settings: Mapping[str, Mapping]) -> None:
    """Refuse latents without a coarse CT, and coarse CTs of several sizes."""
    sizes: dict[str, str] = {}  # -> a latent beside one
    for stem, made in settings.items():
        sizes[str(made.get("coarse_size"))] = stem
        if not made.get("coarse_size") or not (root / f"{stem}{COARSE_SUFFIX}").is_file():
            raise InputError(
                f"{root / stem}{SUFFIX} has no coarse CT beside it; encode with --coarse_size '[48,32,48]' of "
                "encode.json, or train a U-Net alone: --cascade False"
            )
    if len(sizes) > 1:
        listed = ", ".join(f"{size} ({stem}{SUFFIX})" for size, stem in sizes.items())
        raise InputError(
            f"{root} has coarse CTs of several sizes: {listed}; allowed is one: encode all with one --coarse_size"
        )


def _names(held_out: Sequence[str] | str | Path) -> list[str]:
    """The names as text: of a case that is called 3, the command line and JSON make a number."""
    if isinstance(held_out, Sequence) and not isinstance(held_out, str):
        return [str(name) for name in held_out]
    if not str(held_out).endswith(".json"):
        raise InputError(f"held_out is {held_out!r}; give a list of names, or a JSON file with one in 'held_out'")
    try:
        names = read_json(held_out)["held_out"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{held_out} is no JSON file with a list of names under 'held_out' ({error!r})") from error
    if not isinstance(names, list):
        raise InputError(f"{held_out} has {names!r:.80} under 'held_out'; allowed is a list of names")
    return [str(name) for name in names]
