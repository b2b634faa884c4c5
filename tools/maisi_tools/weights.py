"""Checkpoints: reading them key by key, writing them small, fetching the released ones."""

from __future__ import annotations

import functools
import hashlib
import http.client
import logging
import pickle
import shutil
import urllib.error
import urllib.request
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from tqdm import tqdm

from maisi_tools.errors import InputError, first_few
from maisi_tools.files import canonical_json, fingerprint_tensors, replacing
from maisi_tools.volumes.checks import UNRECORDED_FACTOR, checked_scale_factor

logger = logging.getLogger(__name__)

# Where a checkpoint may keep its state dict, in the order looked up: ours and MONAI's CheckpointSaver ("model"), the
# usual name, and those of MAISI's released files.
STATE_DICT_KEYS = ("model", "state_dict", "unet_state_dict", "controlnet_state_dict", "autoencoder_state_dict")
LARGE_FILES = ("large_files.yml", "large_files.yaml", "large_files.json")  # the names that MONAI looks for
LIST_FORM = "It must read `large_files:` followed by entries with path, url, hash_val and hash_type."
HASH_TYPES = ("sha256", "sha512", "sha1", "md5")
ENCODER = ("encoder.", "quant_conv_")  # what of an autoencoder makes a latent; another decoder leaves it valid
PARALLEL, COMPILED = "module.", "_orig_mod."  # what DistributedDataParallel and torch.compile add to names
CHUNK = 1 << 20  # bytes
TIMEOUT = 60  # seconds without a byte before a download is given up


def load_weights(network: nn.Module, path: str | Path, key: str | None = None) -> nn.Module:
    """Load a checkpoint into `network`, in place, matched key by key, and return the network.

    Understands plain state dicts, checkpoints that hold one under `key` or one of `STATE_DICT_KEYS`, names with what
    DistributedDataParallel and torch.compile add to them, and safetensors. Values take the dtype of the network's
    parameters.

    Raises:
        InputError: see :func:`read_weights`, or its keys, shapes or kinds of numbers are not the network's.
    """
    state = read_weights(path, key, mapped=True)  # no copy of the file beside the network
    wanted = network.state_dict()
    both = [(name, state[name], value) for name, value in wanted.items() if name in state]
    reshaped = [
        f"{name} (file {tuple(given.shape)}, network {tuple(value.shape)})"
        for name, given, value in both
        if given.shape != value.shape
    ]
    retyped = [
        f"{name} (file {given.dtype}, network {value.dtype})"
        for name, given, value in both
        if given.is_floating_point() != value.is_floating_point()
    ]
    too_large = [
        name
        for name, given, value in both
        if given.is_floating_point()
        and value.is_floating_point()
        and torch.finfo(value.dtype).max < torch.finfo(given.dtype).max
        and not torch.isfinite(given.to(value.dtype)).all()
    ]
    faults = {
        "missing in the file": sorted(wanted.keys() - state.keys()),
        "unknown to the network": sorted(state.keys() - wanted.keys()),
        "of another shape": reshaped,
        "of another kind of number": retyped,
        "with values too large for the network's type": too_large,
    }
    if any(faults.values()):
        listed = "; ".join(f"{len(keys)} keys {kind}: {first_few(keys)}" for kind, keys in faults.items() if keys)
        raise InputError(
            f"weights {path} do not fit {type(network).__name__} with {len(wanted)} keys: {listed}. The weights must "
            "come from the same network_def. The released full-size weights need the full-size networks: add "
            "--config_file \"['configs/inference.json','configs/full.json']\" (see the bundle's configs for its "
            "full*.json); the weights shipped with the bundle need inference.json alone."
        )
    network.load_state_dict(state)
    return network


def read_weights(path: str | Path, key: str | None = None, mapped: bool = False) -> dict[str, Tensor]:
    """Return the state dict of a checkpoint, in any of the forms that :func:`load_weights` understands.

    Args:
        path: the file.
        key: under which it is in the file; None looks for it.
        mapped: leave the tensors in the file, which must then stay as it is while they are used.

    Raises:
        InputError: the file is missing or no checkpoint, or a tensor in it is not dense, real and finite.
    """
    path = Path(path)
    state = _state_dict(_read(path, mapped), path, key)
    faults = [f"{name} is {fault}" for name, value in state.items() if (fault := _fault(value))]
    if faults:
        raise InputError(
            f"weights {path} cannot be used: {len(faults)} of {len(state)} tensors, {first_few(faults)}. Allowed are "
            "dense tensors of real, finite numbers; train the network again or fetch its weights again."
        )
    return state


def read_scale_factor(path: str | Path) -> float:
    """Return the "scale_factor" (1 / standard deviation of the latents) stored beside the weights in a checkpoint.

    Raises:
        InputError: the file is missing or no checkpoint, or has no positive scale factor.
    """
    found = _said(path, "scale_factor")
    if found is None:
        raise InputError(
            f"checkpoint {path} has no 'scale_factor'; it must be one of a diffusion U-Net or ControlNet written by "
            "this project's train.json or released with MAISI, or give the scale factor in the config."
        )
    return checked_scale_factor(found, f"checkpoint {path}", "train the network again or fetch its weights again")


def read_factor(path: str | Path) -> int:
    """Return the "factor" (image voxels per latent voxel along each axis) that a checkpoint's network was trained for.

    A file that does not say is of :data:`~maisi_tools.volumes.checks.UNRECORDED_FACTOR`.

    Raises:
        InputError: the file is missing or no checkpoint, or its factor is no whole number from 1 on.
    """
    factor = _said(path, "factor", UNRECORDED_FACTOR)
    if not isinstance(factor, int) or isinstance(factor, bool) or factor < 1:
        raise InputError(f"checkpoint {path} has factor {factor!r}; allowed is a whole number: fetch its weights again")
    return factor


def read_autoencoder(path: str | Path) -> str | None:
    """Return the "autoencoder" (:func:`encoder_fingerprint`) of the latents that a checkpoint's network was trained on.

    None where the file does not say, as those of earlier versions and the released ones do not.

    Raises:
        InputError: the file is missing or no checkpoint.
    """
    found = _said(path, "autoencoder")
    return found if isinstance(found, str) else None


def check_shared(path: str | Path, wanted: Mapping[str, Any]) -> None:
    """Refuse weights that were trained with other settings than they are used with, where nothing else would tell.

    Args:
        path: a checkpoint, which may record the settings of its training under "shared".
        wanted: the settings it is to be used with, plain values. What only one of both names is not compared. Of
            ``keep_labels`` and ``merge_labels`` weights may be shown fewer than they know, which is said.

    Raises:
        InputError: a setting differs, or the file is missing or no checkpoint.
    """
    recorded = _said(path, "shared")
    trained = recorded if isinstance(recorded, Mapping) else {}
    faults = [
        f"{name} is {value!r}, they were trained with {trained[name]!r}"
        for name, value in wanted.items()
        if name in trained and not FITS.get(name, _same)(trained[name], value)
    ]
    if faults:
        raise InputError(
            f"weights {path} do not fit these settings: {'; '.join(faults)}. Allowed are those of their training: give "
            "them in the config (a process by its scheduler), or other weights"
        )
    known, shown = trained.get("keep_labels"), wanted.get("keep_labels")
    if known and shown and (left_out := sorted(set(known) - set(shown))):
        logger.warning(
            "weights %s know labels that keep_labels leaves out, so that no CT shows them: %s; keep_labels is %s",
            path,
            ", ".join(map(str, left_out)),
            ", ".join(map(str, shown)),
        )


def _same(trained: Any, wanted: Any) -> bool:
    return canonical_json(trained) == canonical_json(wanted)


def _keep_fits(trained: Any, wanted: Any) -> bool:
    return trained is None or (wanted is not None and set(wanted) <= set(trained))


def _merge_fits(trained: Any, wanted: Any) -> bool:
    return all((trained or {}).get(group, label) == label for group, label in (wanted or {}).items())


FITS = {"keep_labels": _keep_fits, "merge_labels": _merge_fits}
"""Whether weights that were trained with one value of a setting can be used with another; other settings: as equal."""


def weight_shapes(path: str | Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a checkpoint's state dict by their keys, without reading its values.

    Raises:
        InputError: the file is missing or no checkpoint.
    """
    return {name: tuple(value.shape) for name, value in _state_dict(_outline(path), Path(path), None).items()}


def save_weights(path: str | Path, network_state: Mapping[str, Tensor], **extra: Any) -> None:
    """Write a state dict under "model", floating-point values as fp16, with `extra` (such as scale_factor) beside it.

    Raises:
        ValueError: a value is not finite in fp16 (largest magnitude 65504). OSError: `path` cannot be written.
    """
    state = {}
    for name, value in network_state.items():
        value = value.detach().cpu()
        state[name] = value.half().contiguous() if value.is_floating_point() else value.contiguous()
        if not torch.isfinite(state[name]).all():
            raise ValueError(f"{name} has values that are not finite in fp16; {path} was not written")
    with replacing(path) as part:
        torch.save({**extra, "model": state}, part)


def fetch_weights(bundle_dir: str | Path, names: Iterable[str] | None = None) -> list[Path]:
    """Download the files that a bundle's large_files.yml lists and return their paths.

    The list is MONAI's: ``large_files: [{path, url, hash_val, hash_type}]``, paths relative to the bundle. A file that
    is there already is only verified. A download goes to ``PATH.part`` first; when it breaks off, the next call goes on
    where it stopped, if the server allows (HTTP Range) and still has the same file: it is the same ETag, or the hash of
    the whole is in the list. Redirects are followed to https alone.

    Args:
        names: paths or file names of the entries to fetch; None for all.

    Raises:
        InputError: no or a wrong list, an unknown name, a failed download, or a hash that does not match.
    """
    bundle_dir = Path(bundle_dir)
    entries = _large_files(bundle_dir)
    if names is not None:
        names = list(names)
        known = {name for entry in entries for name in (entry["path"], Path(entry["path"]).name)}
        if unknown := sorted(set(names) - known):
            listed = ", ".join(entry["path"] for entry in entries)
            raise InputError(f"{bundle_dir} lists no large file {', '.join(unknown)}; choose among: {listed}.")
        entries = [entry for entry in entries if {entry["path"], Path(entry["path"]).name} & set(names)]
    return [_fetch(bundle_dir, entry) for entry in entries]


def _fault(value: Tensor) -> str | None:
    """What keeps a tensor from being weights, in words."""
    if value.layout != torch.strided:
        return f"sparse ({value.layout})"
    if value.is_quantized or value.is_meta:
        return "quantized" if value.is_quantized else "without values"
    if value.is_complex():
        return f"complex ({value.dtype})"
    if value.is_floating_point():
        value = value.float() if value.element_size() < 4 else value
        if not (finite := torch.isfinite(value)).all():
            return f"not finite in {value.numel() - int(finite.sum())} of {value.numel()} values"
    return None


def _said(path: str | Path, name: str, default: Any = None) -> Any:
    """What a checkpoint says of itself under a name."""
    checkpoint = _outline(path)
    return checkpoint.get(name, default) if isinstance(checkpoint, Mapping) else default


def _outline(path: str | Path) -> Any:
    """A checkpoint without its values: tensors are on "meta", but for those of one element.

    What is asked of a file before its weights are loaded needs no more. It is kept as long as the file is not changed.
    """
    path = Path(path)
    _check_exists(path)
    found = path.stat()
    return _outline_of(path, (found.st_mtime_ns, found.st_size, found.st_ino))


@functools.lru_cache(maxsize=16)
def _outline_of(path: Path, state: tuple[int, ...]) -> Any:
    def without_values(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.clone() if leaf.numel() == 1 else torch.empty(leaf.shape, device="meta")

    return tree_map(without_values, _read(path, mapped=True))


def _check_exists(path: Path) -> None:
    if not path.is_file():
        bundle = path.resolve().parent.parent
        listed = {entry["path"] for entry in _large_files(bundle)} if (bundle / "large_files.yml").is_file() else set()
        if f"models/{path.name}" in listed:
            do = f"fetch the released ones with `maisi weights {bundle.name}`"
        elif not path.is_absolute() and not path.parent.is_dir():
            do = f"there is no folder {path.parent} here: give the bundle's folder as --bundle_root, or the file's path"
        else:
            do = "train them with the bundle's configs/train.json, or take the repository's own"
        raise InputError(f"weights {path} do not exist; {do}.")


def _read(path: Path, mapped: bool = False) -> Any:
    """Read a checkpoint; `mapped`: see :func:`read_weights`."""
    _check_exists(path)
    if is_safe := path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file  # of torch's ecosystem, but not among its packages
        except ImportError as error:
            raise InputError(
                f"weights {path} need the package safetensors; install it with: pip install safetensors"
            ) from error
    try:
        if is_safe:
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped and zipfile.is_zipfile(path))
    except (PermissionError, MemoryError):
        raise
    except pickle.UnpicklingError as error:
        raise InputError(
            f"weights {path} are no checkpoint of tensors: {_reason(error)}. Only files that load with "
            "torch.load(weights_only=True) are read; save the state dict alone, or fetch the file again."
        ) from error
    except Exception as error:  # a damaged file makes the reader fail in any way
        raise InputError(
            f"weights {path} ({path.stat().st_size} bytes) cannot be read: {_reason(error)}. The file is damaged or no "
            "PyTorch checkpoint; delete it and fetch or train it again."
        ) from error


def _reason(error: Exception) -> str:
    """Return the first sentence of torch's message, which may go on for a page about how to load unsafe files."""
    return str(error).split("\n")[0].split(". ")[0].rstrip(".") or type(error).__name__


def _state_dict(checkpoint: Any, path: Path, key: str | None) -> dict[str, Tensor]:
    if isinstance(checkpoint, Mapping) and key is not None:
        if key not in checkpoint:
            raise InputError(
                f"checkpoint {path} has no {key!r}; its keys are {first_few([str(k) for k in checkpoint])}."
            )
        checkpoint = checkpoint[key]
    seen: set[int] = set()
    while isinstance(checkpoint, Mapping) and id(checkpoint) not in seen:
        seen.add(id(checkpoint))
        if checkpoint and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in checkpoint.items()):
            state = {name.replace(COMPILED, ""): value for name, value in checkpoint.items()}
            shared = PARALLEL if all(name.startswith(PARALLEL) for name in state) else ""
            return {name.removeprefix(shared): value for name, value in state.items()}
        found = [name for name in STATE_DICT_KEYS if name in checkpoint]
        if not found:
            break
        checkpoint = checkpoint[found[0]]
    given = f"keys {first_few([str(k) for k in checkpoint])}" if isinstance(checkpoint, Mapping) else type(checkpoint)
    raise InputError(
        f"checkpoint {path} holds no state dict, but {given}. It must be one (names to tensors), or hold one under one "
        f"of {', '.join(STATE_DICT_KEYS)}."
    )


def _large_files(bundle_dir: Path) -> list[dict[str, str]]:
    lists = [bundle_dir / name for name in LARGE_FILES if (bundle_dir / name).is_file()]
    if not lists:
        raise InputError(f"{bundle_dir} has no {LARGE_FILES[0]}; give the folder of a bundle that lists large files.")
    try:
        entries = ConfigParser.load_config_file(lists[0])["large_files"]
        entries = [{name: str(value or "") for name, value in entry.items()} for entry in entries]
        complete = all(entry["path"] and entry["url"] for entry in entries)
    except Exception as error:  # whatever the YAML or JSON reader raises, and every wrong shape of the list
        raise InputError(f"{lists[0]} is not a list of large files: {error!r}. {LIST_FORM}") from error
    if not complete:
        raise InputError(f"{lists[0]} has an entry without path or url. {LIST_FORM}")
    for entry in entries:
        if not (bundle_dir / entry["path"]).resolve().is_relative_to(bundle_dir.resolve()):
            raise InputError(f"{lists[0]} names {entry['path']!r}, which is outside the bundle; name a path inside it.")
        if not entry["url"].startswith(("https://", "http://")):
            raise InputError(f"{lists[0]} names the URL {entry['url']!r}; it must begin with https:// or http://.")
        if entry.get("hash_val") and entry.get("hash_type", "") not in HASH_TYPES:
            raise InputError(
                f"{lists[0]} names hash_type {entry.get('hash_type')!r} for {entry['path']}; use one of "
                f"{', '.join(HASH_TYPES)}."
            )
    return entries


def _fetch(bundle_dir: Path, entry: Mapping[str, str]) -> Path:
    target, url = bundle_dir / entry["path"], entry["url"]
    expected, kind = entry.get("hash_val", "").lower(), entry.get("hash_type", "")
    if target.exists():
        if expected and (got := _digest(target, kind)) != expected:
            raise InputError(
                f"{target} is not the file that {bundle_dir} lists: {kind} expected {expected}, got {got}. Move or "
                "delete it, then fetch it again."
            )
        return target
    part = target.with_name(target.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        _download(url, part, bool(expected))
    except (OSError, http.client.HTTPException) as error:
        kept = f" {part.stat().st_size} bytes are kept in {part};" if part.exists() else ""
        raise InputError(
            f"download of {url} failed: {error}.{kept} run the same command again to go on, or download the file in "
            f"another way (a page may ask for a login) and put it at {target}."
        ) from error
    if not expected:
        warnings.warn(f"{target} was not verified: large_files.yml of {bundle_dir} gives no hash for it", stacklevel=3)
    elif (got := _digest(part, kind)) != expected:
        _forget(part)
        raise InputError(
            f"{url} gave a file with another hash: {kind} expected {expected}, got {got}. It was deleted; run the same "
            "command again, and if that does not help, the file at the URL has changed."
        )
    part.replace(target)
    _forget(part)
    return target


class _HttpsRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to https alone."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if not newurl.lower().startswith("https://"):
            raise InputError(
                f"{req.full_url} redirects to {newurl}; allowed is https: correct the URL in large_files.yml, or "
                "download the file in another way"
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _tag_path(part: Path) -> Path:
    """Where the ETag of a download that broke off is kept."""
    return part.with_name(part.name + ".etag")


def _forget(part: Path) -> None:
    part.unlink(missing_ok=True)
    _tag_path(part).unlink(missing_ok=True)


def _download(url: str, part: Path, hashed: bool) -> None:
    """Append to `part` what it lacks of `url`, from its beginning when the server cannot continue or has another file.

    Args:
        url: of the file.
        part: what there is of it.
        hashed: whether the whole is verified afterwards; then a part without an ETag is continued, too.

    Raises:
        OSError: the download failed (urllib's errors are OSErrors) or ended early; `part` keeps what came.
        InputError: a redirect to something else than https.
    """
    tag = _tag_path(part).read_text() if _tag_path(part).exists() else ""
    if not tag and not hashed:
        _forget(part)
    have = part.stat().st_size if part.exists() else 0
    headers = {"Range": f"bytes={have}-"} if have else {}
    if have and tag:
        headers["If-Range"] = tag
    request = urllib.request.Request(url, headers=headers)
    try:
        response = urllib.request.build_opener(_HttpsRedirects).open(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # range not satisfiable: nothing is left after `have` bytes
            raise
        if error.headers.get("Content-Range", "") == f"bytes */{have}":
            return
        _forget(part)  # longer than the file at the URL, so not a part of it
        return _download(url, part, hashed)
    with response:
        now = response.headers.get("ETag", "")
        if response.status == 206 and tag and now and now != tag:  # a server that does not know If-Range
            _forget(part)
            return _download(url, part, hashed)
        continues = response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        have = have if response.status == 206 and continues else 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        with (
            part.open("ab" if have else "wb") as output,
            tqdm.wrapattr(response, "read", total=total, initial=have, desc=part.stem) as stream,
        ):
            if not have:  # the part is empty by now, so that it never stands beside the tag of another file
                _tag_path(part).unlink(missing_ok=True)
                if now and not now.startswith("W/"):  # a weak one does not promise the same bytes
                    _tag_path(part).write_text(now)
            shutil.copyfileobj(stream, output, CHUNK)
    if total is not None and part.stat().st_size != total:
        raise ConnectionError(f"the connection ended after {part.stat().st_size} of {total} bytes")


def _digest(path: Path, kind: str) -> str:
    digest = hashlib.new(kind, usedforsecurity=False)
    with (
        path.open("rb") as file,
        tqdm.wrapattr(file, "read", total=path.stat().st_size, desc=f"{kind} of {path.name}", delay=2) as stream,
    ):
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def encoder_fingerprint(autoencoder: nn.Module | Mapping[str, Tensor] | str | Path) -> str:
    """Fingerprint of what encodes, the same for a network, its state dict and its checkpoint file.

    Raises:
        InputError: the file is missing or no checkpoint, or there is no encoder in it.
    """
    if isinstance(autoencoder, nn.Module):
        state: Mapping[str, Tensor] = autoencoder.state_dict()
    else:
        state = autoencoder if isinstance(autoencoder, Mapping) else read_weights(autoencoder, mapped=True)
    encoder = {name: value for name, value in state.items() if name.startswith(ENCODER)}
    if not encoder:
        raise InputError(f"{autoencoder} holds no encoder; give the weights of the maisi_vae bundle")
    return fingerprint_tensors(encoder)
