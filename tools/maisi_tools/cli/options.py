"""Options of commands: how they are read from the line, checked, and turned into what the package takes."""

from __future__ import annotations

import contextlib
import datetime
import functools
import importlib.util
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import fire

from maisi_tools.errors import InputError
from maisi_tools.files import expanded, read_json

# Fire keeps a command's parsers in an attribute of it, and lists public ones as what could follow it on the line.
fire.decorators.FIRE_METADATA = "_fire_metadata"

CONTROLNET = "maisi_controlnet"
# The phantom of the demo: a head and neck on a grid that a laptop samples in a minute or two.
KIND = "head_neck"
SIZE = (96, 80, 96)  # voxels
SPACING = (4.0, 4.0, 2.5)  # mm


class Planned:
    """A command with its arguments, for after Fire has parsed the whole line.

    Fire calls a function first and complains about what is left of the line afterwards; with the call put off, a
    misspelt option is refused before minutes of computing.
    """

    def __init__(self, execute: Callable[[], None]) -> None:
        self.execute = execute

    def __dir__(self) -> list[str]:
        return []  # nothing that Fire could take the rest of the line for


def planned(command: Callable[..., None]) -> Callable[..., Planned]:
    """The command for Fire, with the call put off; what is annotated as text stays as it was typed.

    Fire would make numbers of the folders 2027, 1_000 and 1e5, and of run#2 and (old) the folders run and old.
    """

    @functools.wraps(command)
    def plan(*args: Any, **kwargs: Any) -> Planned:
        return Planned(functools.partial(_checked, command, *args, **kwargs))

    signature = inspect.signature(command)
    plan.__signature__ = signature.replace(parameters=[*map(_shown, signature.parameters.values())])  # type: ignore[attr-defined]
    parsers: dict[str, Callable[[str], Any]] = {}
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_POSITIONAL:
            plan = fire.decorators.SetParseFn(_path)(plan)
        else:
            parsers[name] = _path if parameter.annotation in ("str", "str | None") else fire.parser.DefaultParseValue
        if name in _PARSERS:
            parsers[name] = _PARSERS[name]
    return fire.decorators.SetParseFns(**parsers)(plan)


def _shown(parameter: inspect.Parameter) -> inspect.Parameter:
    """The parameter for Fire's help, which shows the name of a class, and of text the quotes, too."""
    kind = str(parameter.annotation).removesuffix(" | None")  # Fire itself adds that it is optional
    return parameter.replace(annotation=type(kind, (), {}))


_KINDS: dict[str, tuple[type | tuple[type, ...], str]] = {
    "bool": (bool, "True or False"),
    "int": (int, "a whole number"),
    "float": ((int, float), "a number"),
}
"""Annotation of an option -> what it takes, and how a message says it."""


def _checked(command: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """Run the command with options of the kinds that it is annotated with: "no" is text, which Python takes for true.

    Raises:
        InputError: an option of another kind.
    """
    signature = inspect.signature(command)
    for name, value in signature.bind(*args, **kwargs).arguments.items():
        kind, optional, _ = signature.parameters[name].annotation.partition(" | None")
        if kind not in _KINDS or (value is None and optional):
            continue
        types, allowed = _KINDS[kind]
        if not isinstance(value, types) or isinstance(value, bool) != (kind == "bool"):
            raise InputError(f"{name} {value!r} is not usable; give {allowed}.")
    command(*args, **kwargs)


def _text(given: str) -> str | None:
    """An argument as it was typed, without the quotes that keep Fire from parsing it; None where it is none."""
    if given == "None":
        return None
    value = fire.parser.DefaultParseValue(given)
    return value if given[:1] in ("'", '"') and given[1:-1] == value else given


def _path(given: str) -> str | None:
    """Text that is a path, or a name, which has no ~ in front; a shell expands none in ``--output=~/x``."""
    text = _text(given)
    return str(expanded(text)) if text and text.startswith("~") else text


def _path_or_list(given: str) -> Any:
    value = fire.parser.DefaultParseValue(given)
    return value if isinstance(value, (list, tuple, dict)) else _path(given)


def _names(given: str) -> Any:
    """Names with commas as they were typed: Fire would take some for numbers or sums. A list in brackets is one."""
    return _path_or_list(given) if given[:1] in ("[", "(") else _path(given)


_PARSERS = {
    **dict.fromkeys(("reference", "generated", "overlay"), _path_or_list),
    **dict.fromkeys(("held_out", "by"), _names),
    **dict.fromkeys(("resize", "insert", "augment"), _text),  # see amounts
    **dict.fromkeys(("token", "patient_pattern"), _text),
}
"""Of options that take a path or name, or several, or amounts of some; or text that is neither path nor name."""


def bundles_folder(given: str | None) -> Path:
    """The folder with the bundles: what --bundles says, or that of the checkout around the working directory."""
    if given is not None:
        if not Path(str(given)).is_dir():
            raise InputError(f"bundles folder {given} does not exist; give the folder that holds {CONTROLNET}.")
        return Path(str(given))
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "bundles" / CONTROLNET).is_dir():
            return folder / "bundles"
    raise InputError(
        f"there is no bundles/{CONTROLNET} in {here} or above it; change into the checkout of MAISI Bundles, or give "
        "its bundles folder with --bundles DIR."
    )


def bundle_folder(bundle: Any, bundles: str | None) -> Path:
    """The folder of a bundle given by name or by its folder."""
    folder = Path(str(bundle))
    if not (folder / "configs").is_dir():
        root = bundles_folder(bundles)
        folder = root / str(bundle)
        if not (folder / "configs").is_dir():
            names = ", ".join(sorted(config.parent.name for config in root.glob("*/configs")))
            raise InputError(f"{bundle} is no bundle of {root} and no bundle's folder; choose among: {names}.")
    return folder


def amounts(option: str, text: str | None) -> dict[str, Any]:
    """Name -> number, or numbers in brackets, of an option as it was typed: of a name that stands there twice, Fire,
    which makes a dict of some, would keep the last.

    Raises:
        InputError: something else, or a name twice.
    """
    if text is None:
        return {}
    parts = re.split(r",(?![^\[(]*[\])])", text.strip(" {},"))  # not at a comma in brackets
    found: dict[str, Any] = {}
    for part in parts:
        name, _, amount = (piece.strip(" \"'") for piece in part.rpartition(":"))
        if name in found:
            several = ", with a list of diameters" if option == "insert" else ""
            raise InputError(f"{option} {text!r} has {name!r} more than once; give it once{several}.")
        try:
            many = [float(one) for one in amount.strip("[]()").split(",") if name]
            found[name] = many if amount[:1] in ("[", "(") else many[0]
        except (ValueError, IndexError):
            raise InputError(
                f'{option} {text!r} is not usable; give a number for each name: "{{liver: 1.2}}".'
            ) from None
    return found


def listed(value: Any) -> list[str]:
    """Names given as a list, or as one text with commas."""
    names = value if isinstance(value, (tuple, list)) else str(value).split(",")
    return [str(name).strip() for name in names if str(name).strip()]


RANKS_WAIT = datetime.timedelta(days=7)
"""How long a rank waits for the others. They share files or samples, of which one's may take hours longer than
another's; PyTorch's own half hour would end the run. A rank that dies ends it at once: torchrun sees to that."""


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Context of a process group of torchrun's ranks; outside torchrun, of this process alone."""
    import ignite.distributed as idist
    import torch.distributed

    if not torch.distributed.is_torchelastic_launched():
        yield
        return
    idist.initialize("gloo", timeout=RANKS_WAIT)
    try:
        yield
    finally:
        idist.finalize()


def check_seed(seed: Any) -> None:
    """Refuse what is no seed."""
    from maisi_tools.settings import MOST_SEED

    if not isinstance(seed, int) or not 0 <= seed <= MOST_SEED:
        raise InputError(f"seed {seed!r} is not usable; give a whole number from 0 to {MOST_SEED}.")


def need_extra(extra: str, *modules: str) -> None:
    """Refuse to go on without an extra of the package, which is there where its modules are."""
    if any(importlib.util.find_spec(module) is None for module in modules):
        raise InputError(
            f"this command needs the extra {extra!r}; install it with: pip install 'maisi-bundles[{extra}]'."
        )


def need_dicom() -> None:
    """Refuse to go on without the extra 'dicom'."""
    need_extra("dicom", "highdicom")


def nifti_path(output: Any) -> Path:
    """The path of a NIfTI file to write."""
    path = Path(str(output))
    if not path.name.endswith((".nii", ".nii.gz")):
        raise InputError(f"output {output} is no NIfTI file; name it .nii.gz or .nii.")
    return path


def hu_window(window: Any) -> Sequence[float]:
    """HU that are shown as black and as white."""
    from maisi_tools.settings import is_range

    if not is_range(window):
        raise InputError(
            f"window {window!r} is not usable; give two values in HU, the lower one first, such as --window=-160,240."
        )
    return window


def triple(name: str, value: Any, kind: type) -> tuple:
    """Three numbers of a kind, for x, y, z, of the option `name`."""
    try:
        x, y, z = (kind(part) for part in value)
        if (x, y, z) != tuple(value):  # 96.5 voxels
            raise ValueError
    except (TypeError, ValueError):
        raise InputError(f"{name} {value!r} is not usable; give three numbers, for x, y, z: --{name} A,B,C.") from None
    return x, y, z


def held_out_names(held_out: Any) -> set[str]:
    """Names given one by one, or in a JSON file as `maisi prepare` writes it."""
    if held_out is None:
        return set()
    if not str(held_out).endswith(".json"):
        return set(listed(held_out))
    path = Path(held_out)
    if not path.is_file():
        raise InputError(f"held-out list {path} does not exist; give a JSON file, or names as NAME,NAME.")
    try:
        found = read_json(path)
        found = found["held_out"] if isinstance(found, dict) else found
        if not isinstance(found, list):
            raise TypeError("no list")
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f'{path} is no list of names ({error}); write ["NAME", ...], or that under "held_out".') from (
            error
        )
    return {str(name) for name in found}
