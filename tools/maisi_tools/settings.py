"""Settings from outside: YAML fields, numbers, a device, and values for a stage that stay values.

Settings for a stage that come from data, such as a cohort's file, are never expressions. MONAI's ConfigParser evaluates
text that begins with "$", replaces "@" by another item and "%" by a file's content, instantiates a mapping with
``_target_``, and takes "a#b" and "a::b" for paths into the config. None of that may be reached from a file that
somebody sends.
"""

from __future__ import annotations

import dataclasses
import difflib
import ipaddress
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch

from maisi_tools.errors import InputError

_ACTIVE = ("$", "@", "%")
_PATHS = ("#", "::")
_DEEPEST = 4  # lists and mappings in one another: no setting needs more, and YAML's aliases make endless ones
_DISPLAYED = "@displayable_configs#"

ALSO: dict[str, Any] = {
    "modality": 1,
    "trained_modalities": [1, "ct"],
    "region": "head",
    "resume": "checkpoint.pt",
    "held_out": "held_out.json",
    "tensorboard": True,
    "complete_mask": True,
}
"""Further kinds that keys take, or that of keys which the configs compute, by an example."""

MOST_SEED = 2**62
"""PyTorch takes 64 bits, and further samples and draws have seeds above the first one's."""

COUNTS = {
    **dict.fromkeys(("seed", "redraws", "resample_steps", "num_workers", "adversarial_start", "prior_components"), 0),
    **dict.fromkeys(("num_samples", "splits", "multiple", "max_epochs", "epoch_length", "val_interval"), 1),
    **dict.fromkeys(("batch_size", "accumulation_steps"), 1),
    "num_inference_steps": 0,  # the sampler says which it takes
}
"""Whole numbers, from which on."""

HIGHEST = {
    "guidance_scale": 50.0,  # below 0, these two lead away from what is asked for
    "control_scale": 10.0,
    **dict.fromkeys(("condition_dropout", "modality_dropout", "modality_coarsening", "control_dropout"), 1.0),
    **dict.fromkeys(("mask_dropout", "size_dropout", "intensity_prob", "perceptual_slices"), 1.0),
    **dict.fromkeys(("cache_rate", "ema_momentum", "prior_until"), 1.0),
    **dict.fromkeys(("learning_rate", "discriminator_learning_rate", "minutes", "checkpoint_minutes"), math.inf),
}
"""Numbers from 0, up to which."""

_CHOICES = {"dtype": ("float32", "bfloat16", "float16", "float64")}


def read_yaml(path: Path, what: str, page: str) -> Any:
    """The content of a YAML file.

    Args:
        path: the file.
        what: what a message calls it.
        page: of the documentation, to look it up.

    Raises:
        InputError: no such file, no YAML, or a key that stands in a mapping twice, of which yaml would keep the last.
    """
    import yaml

    class EachKeyOnce(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            counts = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
            if twice := [key for key, count in counts.items() if count > 1]:
                words = f"{', '.join(map(repr, twice))} stands there more than once"
                raise yaml.constructor.ConstructorError(None, None, words, node.start_mark)
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(path.read_text(encoding="utf-8-sig"), EachKeyOnce)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:  # ValueError: bytes, dates or numbers
        raise InputError(f"{what} {path} cannot be read as YAML ({error}); see {page}") from error


def checked_fields(kind: Any, content: Any, where: str) -> dict[str, Any]:
    """A mapping whose keys are fields of the dataclass `kind`, none unknown and no needed one missing, as a new dict.

    Args:
        kind: the dataclass.
        content: what the file has.
        where: what a message calls it.

    Raises:
        InputError: it is no such mapping.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}
    if not isinstance(content, Mapping):
        raise InputError(f"{where} is {content!r}; allowed is a mapping with some of {', '.join(fields)}")
    if unknown := sorted(map(str, set(content) - set(fields))):
        raise InputError(f"{where} has {', '.join(unknown)}; allowed are {', '.join(fields)}")
    missing = [
        name
        for name, field in fields.items()
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING and name not in content
    ]
    if missing:
        raise InputError(f"{where} has no {', '.join(missing)}; add it")
    return dict(content)


def check_number(name: str, value: Any, low: float, high: float, whole: bool = False) -> None:
    """Refuse what is no number from `low` to `high`.

    Raises:
        InputError: something else; the message calls it `name`.
    """
    is_number = isinstance(value, Integral if whole else Real) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:
        upto = "on" if high == math.inf else f"to {high if whole else f'{high:g}'}"
        raise InputError(f"{name} is {value!r}; allowed is a {'whole ' if whole else ''}number from {low} {upto}")


def is_range(value: Any) -> bool:
    """Whether a value is two finite numbers, the lower one first."""
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != 2:
        return False
    numbers = [one for one in value if isinstance(one, Real) and not isinstance(one, bool) and math.isfinite(one)]
    return len(numbers) == 2 and numbers[0] < numbers[1]


def check_value(key: str, value: Any, own: Sequence[Any], where: str = "") -> None:
    """Refuse what a key of a config cannot be: another kind than its own values, a number or a word out of bounds.

    A list may have any number of entries, each of the kind of one of the config's own.

    Args:
        key: such as "seed"; of some the bounds are known, or further kinds (:data:`ALSO`).
        value: what was given. Text that the parser evaluates passes.
        own: the configs' values; null among them says nothing.
        where: what a message calls it, by default `key`.

    Raises:
        InputError: with an example.
    """
    where = where or key
    known = [example for example in own if example is not None]
    if value is None and None in own:
        return
    if known and not any(_fits(value, example) for example in [*known, *([ALSO[key]] if key in ALSO else [])]):
        raise InputError(f"{where} is {value!r}; allowed is {_kind(known[0])}, such as {known[0]!r:.80}")
    if is_expression(value):
        return
    if key in COUNTS and not (key == "splits" and isinstance(value, str) and (value.isdecimal() or not value)):
        most = MOST_SEED if key == "seed" else math.inf
        check_number(where, value, COUNTS[key], most, whole=True)  # splits are text in a form of MONAI Label
    if key in HIGHEST:
        check_number(where, value, 0, HIGHEST[key])
    if isinstance(value, str) and value not in _CHOICES.get(key, (value,)):
        raise InputError(f"{where} is {value!r}; allowed are {', '.join(_CHOICES[key])}")


def is_expression(value: Any) -> bool:
    """Whether MONAI's parser takes a value for an expression, a reference or a macro."""
    return isinstance(value, str) and value.startswith(_ACTIVE)


def on_this_machine(host: str) -> bool:
    """Whether an address is one that nobody else reaches."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_device(device: Any) -> torch.device:
    """The device of a name such as "cpu" or "cuda:0".

    Raises:
        InputError: no such name, or a device that this machine does not have.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    allowed = "cpu" + (f", cuda, cuda:0 to cuda:{count - 1}" if count else "; PyTorch finds no GPU on this machine")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (AssertionError, RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"device {device} cannot be used ({reason}); allowed is {allowed}") from error
    return found


def check_plain(value: Any, where: str, depth: int = 0) -> None:
    """Refuse a value that MONAI's parser could take for more than a value.

    Args:
        value: what the data say.
        where: what a message calls it.
        depth: of the lists and mappings around it.

    Raises:
        InputError: something else than finite numbers, text without "$", "@" and "%", booleans, null, and lists and
            mappings of these; a mapping's names are text that does not begin with "_".
    """
    if depth > _DEEPEST:
        raise InputError(f"{where} is nested deeper than {_DEEPEST} lists or mappings; give it flatter")
    if isinstance(value, Mapping):
        for name, entry in value.items():
            _check_name(name, where)
            check_plain(entry, f"{where}.{name}", depth + 1)
    elif isinstance(value, (list, tuple)):
        for index, entry in enumerate(value):
            check_plain(entry, f"{where}[{index}]", depth + 1)
    elif isinstance(value, str):
        if any(mark in value for mark in _ACTIVE):
            raise InputError(
                f"{where} is {value!r}; text with {', '.join(_ACTIVE)} is not allowed, give the value itself"
            )
    elif isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{where} is {value}; allowed is a finite number")
    elif value is not None and not isinstance(value, (bool, int, float)):
        raise InputError(f"{where} is a {type(value).__name__}; allowed are numbers, text, booleans and lists of these")


def check_stage_settings(
    config: Mapping[str, Any], settings: Any, where: str, fixed: Collection[str] = ()
) -> dict[str, Any]:
    """Settings from data for a stage's config, as a dict that can be set without being parsed.

    A key can be set where the config itself has a plain value, or one of its ``displayable_configs``. What the config
    computes or builds (networks, transforms, paths of weights) cannot.

    Args:
        config: of the stage, as in its file.
        settings: key -> value.
        where: what a message calls them.
        fixed: keys that the caller sets itself.

    Raises:
        InputError: no mapping, a key that is fixed, unknown or computed, a value of another kind than the config's
            own, or one that is no plain value (:func:`check_plain`).
    """
    if not isinstance(settings, Mapping):
        raise InputError(f"{where} is {settings!r}; allowed is a mapping of keys to values")
    declared = {key: value for key in config if key not in fixed for value in _declared(config, key)}
    for key, value in settings.items():
        _check_name(key, where)
        if key in fixed:
            raise InputError(f"{where} has {key}, which is set for you; leave it out")
        if key not in declared:
            near = difflib.get_close_matches(key, declared, 1)
            why = "is computed by the config" if key in config else "is no key of the config"
            raise InputError(
                f"{where} has {key}, which {why}; "
                + (f"did you mean {near[0]}?" if near else f"allowed are {', '.join(sorted(declared))}")
            )
        check_plain(value, f"{where}.{key}")
        check_value(key, value, [declared[key]], f"{where}.{key}")
    return dict(settings)


def _declared(config: Mapping[str, Any], key: str) -> list[Any]:
    """The value of a config's key in a list, which is empty where it is no plain value."""
    value = config[key]
    if key == "displayable_configs":
        return []
    if isinstance(value, str) and value.startswith(_DISPLAYED):
        value = config.get("displayable_configs", {}).get(value.removeprefix(_DISPLAYED))
    try:
        check_plain({key: value}, "")
    except InputError:
        return []
    return [value]


def _check_name(name: Any, where: str) -> None:
    if not isinstance(name, str) or name.startswith("_") or any(mark in name for mark in (*_ACTIVE, *_PATHS)):
        raise InputError(
            f"{where} has the key {name!r}; allowed is text that does not begin with _ and has none of "
            f"{', '.join((*_ACTIVE, *_PATHS))}"
        )


def _fits(value: Any, example: Any) -> bool:
    if is_expression(value) or is_expression(example):
        return True
    if isinstance(example, (list, tuple)) and isinstance(value, (list, tuple)):
        return not example or all(any(_fits(entry, one) for one in example) for entry in value)
    if isinstance(value, float) and not math.isfinite(value):
        return False
    return _kind(value) == _kind(example)


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, Real):
        return "a number"
    if isinstance(value, str):
        return "text"
    return "a mapping" if isinstance(value, Mapping) else "a list" if isinstance(value, (list, tuple)) else "an object"
