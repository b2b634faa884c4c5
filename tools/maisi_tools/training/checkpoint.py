"""Checkpoints that a training run goes on from as if it had not been interrupted."""

from __future__ import annotations

import functools
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from maisi_tools.errors import InputError, TrainingError
from maisi_tools.files import canonical_json, fingerprint_file, fingerprint_text, replacing
from maisi_tools.training.loaders import ranks
from maisi_tools.training.steps import is_optimizer_step
from maisi_tools.volumes.inputs import glimpse_input, sidecar_path

NAME = "checkpoint.pt"
"""The last checkpoint, in a run's ``ckpt_dir``."""

WEIGHTS = ("model.pt", "model_best.pt", "unet.pt")
"""Weights that the stages write beside it; not every run writes each."""

FILES = ("image", "label", "mask", "latent", "sigma", "coarse")
"""Of an item to train on or to validate on what names a file or folder."""

log = logging.getLogger(__name__)


def find_checkpoint(ckpt_dir: str | Path, resume: bool | str | Path) -> Path | None:
    """Return the checkpoint to go on from, or None to start anew.

    Args:
        ckpt_dir: where the run writes its checkpoints.
        resume: False to start anew; True to go on from the checkpoint in ``ckpt_dir``, where there is one; or the path
            of a checkpoint.

    Raises:
        InputError: ``resume`` is a path without a file; or it is False, or the path of another checkpoint, and
            ``ckpt_dir`` has one, which the run would overwrite; or it has :data:`WEIGHTS` alone, which a new run would
            overwrite, or which would lie beside its own as if they were of one run.
    """
    last = Path(ckpt_dir) / NAME
    start = last if resume is True and last.is_file() else None
    if not isinstance(resume, bool):
        start = Path(resume)
    if start is not None and not start.is_file():
        raise InputError(f"resume is {str(resume)!r}, which is no file; give a checkpoint, True or False")
    if last.is_file() and (start is None or not last.samefile(start)):
        raise InputError(
            f"{last} is the checkpoint of an earlier run and would be overwritten; go on from it with --resume True, "
            "or give another --ckpt_dir, or delete it"
        )
    if not last.is_file() and (others := [name for name in WEIGHTS if (last.parent / name).is_file()]):
        raise InputError(
            f"{last.parent} has {', '.join(others)} without the {NAME} of their run; a new run would overwrite them or "
            "leave them beside its own; allowed is a folder without weights: give another --ckpt_dir, or move them away"
        )
    return start


def fingerprint_items(items: Sequence[Any]) -> str:
    """Fingerprint of a data list: of the names and sizes of its files, wherever they lie, and of its other values."""
    names = [[_told(value) for _, value in sorted(item.items()) if value is not None] for item in items]
    return f"{len(names)} items {fingerprint_text(json.dumps(names))}"


def data_of(name: str, items: Sequence[Any]) -> dict[str, str]:
    """What a data list is compared by when a run is resumed: two settings, as earlier versions had the first alone.

    Args:
        name: of the data.
        items: each with :data:`FILES` and other values.

    Returns:
        ``name`` -> :func:`fingerprint_items`, and ``name_contents`` -> a fingerprint of what the files hold, as far as
        :func:`~maisi_tools.volumes.inputs.glimpse_input` sees it, and of the latents' sidecars, whose conditions are
        trained on.
    """
    contents = [[_content(key, item[key]) for key in FILES if item.get(key) is not None] for item in items]
    return {
        name: fingerprint_items(items),
        f"{name}_contents": f"{len(contents)} items {fingerprint_text(json.dumps(contents))}",
    }


SHAPE = ("power", "shape")
"""Of a schedule of the learning rate, what it falls by."""

PLAIN = (bool, int, float, str, list, tuple, dict, type(None))


def constants_of(name: str, part: Any) -> dict[str, Any]:
    """What a setting is to be compared by: a plain value itself; of a component its class and its own plain values.

    Args:
        name: of the setting.
        part: a value, an optimizer, a schedule (its :data:`SHAPE`), a function (with arguments given), or any object.

    Returns:
        ``name`` -> the value or the name of the class or function, and ``name#attribute`` -> value.
    """
    if isinstance(part, PLAIN):
        return {name: part}
    made = part.func if isinstance(part, functools.partial) else part
    values = part.keywords if isinstance(part, functools.partial) else vars(part) if hasattr(part, "__dict__") else {}
    values = part.defaults if isinstance(part, torch.optim.Optimizer) else values
    if isinstance(part, torch.optim.lr_scheduler.LRScheduler):  # whose other values move, or follow from max_epochs
        values = {key: value for key, value in values.items() if key in SHAPE}
    own = {
        f"{name}#{key}": value
        for key, value in values.items()
        if _is_constant(value) and key != "training" and not key.startswith("_")
    }
    return {name: getattr(made, "__name__", type(made).__name__), **own}


def _is_constant(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_constant, value))
    return isinstance(value, (bool, int, float, str))


def _told(value: Any) -> Any:
    if isinstance(value, (str, Path)):
        return f"{Path(value).name} {_size(value)}"
    if isinstance(value, (list, tuple)):
        return [_told(one) for one in value]
    return canonical_json(value) if isinstance(value, (Mapping, int, float)) else None  # a tensor, say, is no text


def _content(key: str, value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_content(key, one) for one in value]
    if not isinstance(value, (str, Path)) or not os.path.exists(value):  # reading refuses the latter
        return None
    beside = sidecar_path(value)
    return [glimpse_input(value), fingerprint_file(beside) if key == "latent" and beside.is_file() else None]


def _size(path: str | Path) -> int | None:
    return os.path.getsize(path) if os.path.isfile(path) else None


class Checkpointer:
    """Writes everything a run needs to go on to ``ckpt_dir/checkpoint.pt``, and starts the run from such a file.

    Written every ``minutes``, at the end of each epoch and of the run; by rank 0, atomically, and only after all
    values were found finite: the file is always a good checkpoint. Besides ``objects`` it has the trainer's iteration
    and the gradient scalers' state. It has to be the last of the trainer's handlers. Random numbers need no saving, see
    :class:`maisi_tools.training.loaders.TrainingLoader`.

    Args:
        ckpt_dir: folder, made when needed.
        objects: name -> network, average, optimizer, scheduler, loader, ...: what has ``state_dict`` and
            ``load_state_dict``. Call the network "model", then the file also serves as ``init_ckpt``.
        minutes: between two checkpoints.
        resume_from: checkpoint to go on from, see :func:`find_checkpoint`.
        extra: plain values that lie beside, such as ``scale_factor``.
        settings: plain values that the run depends on and its objects do not hold, or would put back in silence, such
            as ``learning_rate``. A checkpoint without them, of an earlier version, passes.

    Raises:
        TrainingError: a value to be written is not finite.
        InputError: the checkpoint to go on from was written by a run with other settings.
    """

    def __init__(
        self,
        ckpt_dir: str | Path,
        objects: Mapping[str, Any],
        minutes: float,
        resume_from: str | Path | None = None,
        extra: Mapping[str, Any] | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = Path(ckpt_dir) / NAME
        self.objects = {
            name: thing.module if isinstance(thing, DistributedDataParallel) else thing
            for name, thing in objects.items()
        }
        self.seconds = 60 * float(minutes)
        self.resume_from = resume_from
        self.extra = dict(extra or {})
        # As they come back: lists, and names that are text.
        self.settings = json.loads(json.dumps(settings or {}, default=str))
        self.last = 0.0
        self.written = -1

    def attach(self, engine: Engine) -> None:
        """Load when the run starts; save as it goes on."""
        engine.add_event_handler(Events.STARTED, self.load)
        if ranks()[0] == 0:
            engine.add_event_handler(Events.ITERATION_COMPLETED, self._save_when_due)
            engine.add_event_handler(Events.EPOCH_COMPLETED, self.save)
            engine.add_event_handler(Events.TERMINATE, self.save)

    def load(self, engine: Engine) -> None:
        """Put the engine and all objects into the state of ``resume_from``, if there is one."""
        self.last = time.monotonic()
        if ranks()[0] == 0:  # left behind by processes that were killed while they wrote
            for part in self.path.parent.glob(f".*-{NAME}"):
                part.unlink()
        if self.resume_from is None:
            return
        path = self.resume_from
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file makes the reader fail in any way
            raise InputError(f"checkpoint {path} cannot be read ({error}); give one that this run wrote") from error
        wanted = {"trainer", "scalers", *self.objects}
        if not isinstance(state, Mapping) or not wanted <= state.keys():
            raise InputError(
                f"{path} is no checkpoint of this training run, it has to hold {', '.join(sorted(wanted))}; give a "
                f"{NAME} with --resume, or start from weights alone with --init_ckpt"
            )
        then = state["trainer"]
        old, now = {**state.get("settings", {}), **then}, {**self.settings, **self._trainer(engine)}
        if changed := [
            f"{k} {old[k]} (now {now[k]})" for k in now if k != "iteration" and old.get(k, now[k]) != now[k]
        ]:
            raise InputError(
                f"checkpoint {path} was written with {', '.join(changed)}; to resume give the same values, or start a "
                "new run from its weights with --init_ckpt"
            )
        for name, thing in self.objects.items():
            try:
                thing.load_state_dict(state[name])
            except InputError:
                raise
            except (RuntimeError, ValueError, KeyError) as error:  # other shapes, other names, another optimizer
                reason = "; ".join(line.strip() for line in str(error).splitlines()[:3])
                raise InputError(
                    f"{name} in checkpoint {path} does not fit this run ({reason}); to resume give the settings it was "
                    "written with, or start a new run from its weights with --init_ckpt"
                ) from error
        for name, scaler in _scalers(engine):
            scaler.load_state_dict(state["scalers"][name])
        engine.state.iteration = then["iteration"]
        engine.state.epoch = then["iteration"] // then["epoch_length"]
        self.written = then["iteration"]
        log.info("resumed from %s, iteration %d", path, then["iteration"])

    def save(self, engine: Engine) -> None:
        """Write the checkpoint."""
        if self.written == engine.state.iteration:
            return
        state = {
            **self.extra,
            **{name: thing.state_dict() for name, thing in self.objects.items()},
            "trainer": self._trainer(engine),
            "settings": self.settings,
            "scalers": {name: scaler.state_dict() for name, scaler in _scalers(engine)},
        }
        if bad := [name for name, value in _tensors(state) if not torch.isfinite(value).all()]:
            raise TrainingError(
                f"{len(bad)} values are not finite after iteration {engine.state.iteration}, the first is {bad[0]}; "
                f"{self.path} was left as it was. Resume from it with a lower learning rate or another seed"
            )
        with replacing(self.path) as part, open(part, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        self.last, self.written = time.monotonic(), engine.state.iteration

    def _save_when_due(self, engine: Engine) -> None:
        if is_optimizer_step(engine) and time.monotonic() - self.last >= self.seconds:
            self.save(engine)

    def _trainer(self, engine: Engine) -> dict[str, int]:
        names = ("iteration", "epoch_length", "max_epochs")
        steps = {"accumulation_steps": getattr(engine, "accumulation_steps", 1)}
        return {name: getattr(engine.state, name) for name in names} | steps


def _scalers(engine: Any) -> list[tuple[str, Any]]:
    """The gradient scaler of MONAI's ``SupervisedTrainer``, where one is in use."""
    scaler = getattr(engine, "scaler", None)
    return [] if scaler is None else [("scaler", scaler)]


def _tensors(state: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(state, Tensor):
        yield name, state
    elif isinstance(state, Mapping):
        for key, value in state.items():
            yield from _tensors(value, f"{name}.{key}" if name else str(key))
