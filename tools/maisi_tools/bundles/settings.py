"""The settings of a run as a user gives them: keys that the config has, paths that are text, a device that is there."""

from __future__ import annotations

import difflib
import inspect
import pydoc
import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from monai.bundle import ComponentLocator, ConfigComponent, ConfigParser, ConfigWorkflow, ReferenceResolver
from monai.utils import set_determinism

from maisi_tools.errors import InputError, report_input_errors
from maisi_tools.settings import ALSO, check_device, check_stage_settings, check_value, is_expression
from maisi_tools.volumes.presets import presets_of

DISPLAYABLE = "displayable_configs"
"""Settings that MONAI Label shows; the config refers to them one by one."""

READ_BY_MONAI = {
    *("imports", "initialize", "run", "finalize", "_meta_", "bundle_root"),
    *("save_execute_config", "tracking_uri", "experiment_name", "run_name", "is_not_rank0"),
}
"""Keys that MONAI reads itself, with or without a reference to them."""

_INPUTS = {"input", "dataset_dir"}
_SWITCHES = {"presets", "trained_modalities", "merge_labels"}
"""Keys whose null turns off what weights of one's own need not have."""

_NEEDED_PATHS = {"output_dir", "ckpt_dir", "ckpt_path"}
_PATHS = {"input", "dataset_dir", "datalist", "label_map", "bundle_root"}
_PATH_ENDINGS = ("_dir", "_path", "_ckpt", "_config", "_file")


def begin(seed: int) -> None:
    """What every config begins with: errors of one line, its settings checked, and the global random state seeded.

    Raises:
        InputError: see :func:`check_settings`.
    """
    report_input_errors()
    check_settings()
    set_determinism(seed, use_deterministic_algorithms=False)


def check_settings() -> None:
    """Check the settings of the config that is being run; its ``initialize`` calls this first, in :func:`begin`.

    A path that python-fire made a number of, as of ``--input 20260101`` or ``--output_dir 1_000``, becomes the text
    that was typed; so does text that it cut, as ``--output_dir run#2`` and ``--input "(old)"``.

    Raises:
        InputError: a key that nothing in the config refers to, which a misspelt one is; a value of another kind than
            the configs' own; None on MONAI's command line; or a device that is not there.
    """
    workflow = running()
    if workflow is None:
        return
    parser = workflow.parser
    check_none(parser)
    config = parser.get()
    files = _configs_in(workflow.config_root_path)
    check_keys(config, files, (workflow.init_id, workflow.run_id, workflow.final_id))
    check_parts(config, files, parser.locator)
    for key, value in list(config.items()):
        is_text = isinstance(value, str) or (is_path(key) and isinstance(value, (int, float)))
        if is_text and (text := typed(key, value)) != value and not is_expression(text):
            parser[key] = literal(text)
    check_values(config, files)
    check_preset(config, files)
    check_samples(config, files)
    if "device" in config:
        check_device(parser.get_parsed_content("device"))


def check_keys(config: Mapping[str, Any], files: Sequence[Mapping[str, Any]] = (), ids: Collection[str] = ()) -> None:
    """Refuse values that nothing in a config refers to: they were given and would change nothing.

    A bundle's own components and expressions may stand for themselves, as alternatives to one that is used, and an
    overlay may leave a value of the config below it without use. So may what MONAI is told to run, by ``--run_id``.

    Args:
        config: merged from its files and what was given on the command line.
        files: the configs of the bundle, which the values of its own come from.
        ids: of what MONAI runs, where these are others than "initialize", "run" and "finalize".

    Raises:
        InputError: with the nearest key that the config has; or an overlay for several processes over a config for one.
    """
    referred = set(_references(config))
    if config.get("start") is not None and "start" not in referred:
        raise InputError(
            "start, by which a multi_gpu config joins its processes, is nothing that this config begins with; allowed "
            "are configs that do, as inference.json and train.json: leave the multi_gpu config out"
        )
    shown = config.get(DISPLAYABLE) or {}
    inner = {key.removeprefix(f"{DISPLAYABLE}::") for key in referred if key.startswith(f"{DISPLAYABLE}::")}
    if missing := sorted(inner.difference(shown)):
        raise InputError(
            f"{DISPLAYABLE} is {shown!r}, without {', '.join(missing)}; allowed is a mapping with all its keys: give a "
            f"key by itself, such as --{next(iter(shown), missing[0])}"
        )
    own = {name.removeprefix("+").split("#")[0] for file in files for name in file}
    known = [key for key in config if key in referred] + [key for key in shown if f"{DISPLAYABLE}::{key}" in referred]
    unknown = [
        key
        for key, value in config.items()
        if key not in {*referred, *READ_BY_MONAI, *ids}
        and not (_stands_in(files, key, value) if _is_plain(value) else key in own)
    ]
    shown_in = [file.get(DISPLAYABLE) or {} for file in files]
    shown_in += [{name.split("#")[-1]: value for name, value in file.items() if "#" in name} for file in files]
    unknown += [
        key
        for key, value in shown.items()
        if f"{DISPLAYABLE}::{key}" not in referred and not _stands_in(shown_in, key, value)
    ]
    if unknown:
        advice = []
        for key in unknown:
            nearest = difflib.get_close_matches(key, known, 1, 0.5)
            advice.append(f"{key} (nearest: {nearest[0]})" if nearest else key)
        settings = sorted(key for key in known if key != DISPLAYABLE and _is_plain(config.get(key, shown.get(key))))
        raise InputError(
            f"the config has no use for the key {', '.join(advice)}; allowed are {', '.join(settings)} "
            "and the keys of what they make up: correct the name"
        )


def check_given(files: Sequence[str | Path], settings: Any, where: str, fixed: Collection[str] = ()) -> dict[str, Any]:
    """Settings from data for the config that `files` merge into, each of which it has a use for.

    Args:
        files: a bundle's config and overlays, in one folder.
        settings, where, fixed: see :func:`~maisi_tools.settings.check_stage_settings`.

    Raises:
        InputError: see there; or a key that an overlay leaves without use, as edit.json does ``redraws``.
    """
    config = ConfigParser.load_config_files(list(files))
    given = check_stage_settings(config, settings, where, fixed)
    check_keys({**config, **given}, _configs_in(Path(files[0]).parent))
    return given


def _configs_in(folder: Path) -> list[dict[str, Any]]:
    """All of a bundle's configs; whatever else a user keeps beside them, a datalist or notes, is none."""
    found = []
    for file in [file for ending in ("json", "yaml", "yml") for file in folder.glob(f"*.{ending}")]:
        try:
            found.append(ConfigParser.load_config_file(file))
        except Exception:  # whatever the readers of JSON and YAML raise; MONAI itself has read those of the run
            continue
    return [config for config in found if isinstance(config, dict)]


def check_none(parser: ConfigParser) -> None:
    """Refuse ``--KEY None``: MONAI's command leaves it out, and the run would go on with the config's own value.

    Raises:
        InputError: with the key and that value, where it is another one.
    """
    if Path(sys.argv[0]).parts[-3:] != ("monai", "bundle", "__main__.py"):  # others pass None on, or take none
        return
    for key, text in _options(sys.argv[1:]):
        value = parser.get(key)
        while isinstance(value, str) and value.startswith("@"):
            value = parser.get(value[1:])
        if text == "None" and value not in (None, "$None"):
            raise InputError(
                f"{key} is None on the command line, which MONAI takes for not given: it would stay {value!r:.80}. "
                f'Give it in a file of its own, {{"{key}": null}}, after the config in --config_file'
            )


def check_values(config: Mapping[str, Any], files: Sequence[Mapping[str, Any]]) -> None:
    """Refuse plain values of another kind than those that the files have for their keys, and numbers out of bounds.

    Of a key that a file computes, any kind passes; so do expressions, components, and null where a file has it.

    Args:
        config: merged from its files and what was given on the command line.
        files: the configs of the bundle.

    Raises:
        InputError: see :func:`~maisi_tools.settings.check_value`.
    """
    own: dict[str, list[Any]] = {}
    computed, shown_as = set(), {}
    for file in files:
        shown = {f"{DISPLAYABLE}#{key}": value for key, value in file.get(f"+{DISPLAYABLE}", {}).items()}
        shown |= {f"{DISPLAYABLE}#{key}": value for key, value in file.get(DISPLAYABLE, {}).items()}
        for name, value in {**shown, **file}.items():
            key = name.removeprefix(f"{DISPLAYABLE}#")
            if isinstance(value, str) and value.startswith(f"@{DISPLAYABLE}#"):
                shown_as[key] = value.removeprefix(f"@{DISPLAYABLE}#")
            elif not _is_plain(value):
                computed.add(key)
            else:
                own.setdefault(key, []).append(value)
    for key, value in [*config.items(), *(config.get(DISPLAYABLE) or {}).items()]:
        if is_path(key) and _is_plain(value) and (key in own or key in computed):
            _check_path(key, value)
        if is_path(key) or key in {*READ_BY_MONAI, DISPLAYABLE} or not _is_plain(value):
            continue
        known = own.get(shown_as.get(key, key), [None])
        if key in computed:  # of a few of these the kind is known
            known = [ALSO[key]] if isinstance(ALSO.get(key), bool) else [None]
        check_value(key, value, [*known, value] if value is None and key in _SWITCHES else known)


def _check_path(key: str, value: Any) -> None:
    """Refuse what is no path, or no path where one is needed; an input may be a list, too."""
    if value is None and key not in _NEEDED_PATHS or key in _INPUTS and isinstance(value, (list, tuple, Mapping)):
        return
    if not isinstance(value, (str, Path)):
        raise InputError(f"{key} is {value!r}; allowed is a path, as text")


def check_preset(config: Mapping[str, Any], files: Sequence[Mapping[str, Any]]) -> None:
    """Refuse what a preset stands in place of, where it was given beside one.

    Args:
        config: merged from its files and what was given on the command line.
        files: the configs of the bundle, whose own values give way to the preset.

    Raises:
        InputError: with the keys.
    """
    name, weights = config.get("preset"), config.get("presets")
    if not isinstance(name, str) or not isinstance(weights, str) or is_expression(name) or is_expression(weights):
        return
    preset = presets_of(weights).get(name)
    stands_for = {"output_size": True, "spacing": True} | {
        key: bool(getattr(preset, key, None)) for key in ("region", "modality")
    }
    given = [
        key for key, used in stands_for.items() if used and key in config and not _stands_in(files, key, config[key])
    ]
    if given:
        raise InputError(
            f"preset is {name!r}, and {', '.join(f'{key} is {config[key]!r}' for key in given)}; a preset stands in "
            "place of these: leave out either"
        )


def check_samples(config: Mapping[str, Any], files: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a number of samples or their first seed beside a list of samples, which has the seeds itself.

    Args:
        config: merged from its files and what was given on the command line.
        files: the configs of the bundle, whose own values give way to the list.

    Raises:
        InputError: with the keys.
    """
    if config.get("input") is None or "num_samples" not in config:
        return
    given = []
    for key in ("seed", "num_samples"):
        value = config[DISPLAYABLE].get(key) if is_expression(config[key]) else config[key]
        if not _stands_in([file.get(DISPLAYABLE) or {} for file in files], key, value):
            given.append(f"{key} is {value!r}")
    if given:
        raise InputError(
            f"input is a list of samples with their seeds, and {', '.join(given)}, which is for samples without a "
            "list; leave out either"
        )


def check_parts(config: Any, files: Sequence[Mapping[str, Any]], locator: ComponentLocator) -> None:
    """Refuse arguments that a component does not take; those that a file gives it are not looked at.

    Args:
        config: merged from its files and what was given on the command line.
        files: the configs of the bundle.
        locator: of the parser, which finds MONAI's components by their names alone.

    Raises:
        InputError: with the nearest argument that it takes.
    """
    given = {path for file in files for path, _ in _walk(file)}
    for path, part in _walk(config):
        if not isinstance(part, Mapping) or is_expression(part.get("_target_", "$")):
            continue
        new = [key for key in part if not key.startswith("_") and (*path, key) not in given]
        if not new:
            continue
        found = ConfigComponent(dict(part), locator=locator).resolve_module_name()
        try:
            takes = inspect.signature(pydoc.locate(found)).parameters  # type: ignore[arg-type]
        except (TypeError, ValueError, pydoc.ErrorDuringImport):  # what is not there, or does not tell
            continue
        if any(one.kind is one.VAR_KEYWORD for one in takes.values()):
            continue
        for key in new:
            if key not in takes:
                nearest = difflib.get_close_matches(key, takes, 1, 0.5)
                raise InputError(
                    f"{'#'.join(path)} has no use for the key {key}"
                    + (f" (nearest: {nearest[0]})" if nearest else "")
                    + f"; allowed are {', '.join(takes)}: correct the name"
                )


def _walk(config: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Each value in a config with its path; that of an overlay's "a#b" is a, b."""
    entries = config.items() if isinstance(config, Mapping) else enumerate(config) if isinstance(config, list) else ()
    for key, entry in entries:
        inner = (*path, *str(key).removeprefix("+").split("#"))
        yield inner, entry
        yield from _walk(entry, inner)


def is_path(key: str) -> bool:
    """Whether a setting of this name holds a path or the name of something."""
    return key in _PATHS or key.endswith(_PATH_ENDINGS)


def literal(value: Any) -> Any:
    """A value for MONAI's parser, which makes :: of any # in text; an expression may hold it, escaped."""
    if isinstance(value, Mapping):
        return {key: literal(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [literal(entry) for entry in value]
    if not isinstance(value, str) or "#" not in value or is_expression(value):
        return value
    return "$" + repr(value).replace("#", r"\x23").replace("@", r"\x40")


def typed(key: str, value: int | float | str, words: Sequence[str] | None = None) -> str:
    """What was typed for an option where python-fire and MONAI made `value` of it; else `value` as text.

    Fire makes 1000 of 1_000, and of run#2 and (old), as of Python with a comment and brackets, run and old. MONAI makes
    run::2 of 'run#2'.

    Args:
        key: of the option.
        value: what it became.
        words: of the command line, by default this process's.
    """
    from fire.parser import DefaultParseValue  # MONAI needs it for command lines alone

    for name, text in _options(sys.argv[1:] if words is None else words):
        if name == key:
            made = DefaultParseValue(text)
            if made == value or (isinstance(made, str) and ReferenceResolver.normalize_id(made) == value):
                is_quoted = text[:1] in ("'", '"') and text[1:-1] == made
                return str(made) if is_quoted else text
    return str(value)


def _options(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Names and texts of a command line's options: ``--a=b`` and ``--a b``."""
    for word, following in zip(words, [*words, ""][1:], strict=True):
        name, equals, text = word.partition("=")
        if word.startswith("-"):
            yield name.lstrip("-").replace("-", "_"), text if equals else following


def _stands_in(files: Sequence[Mapping[str, Any]], key: str, value: Any) -> bool:
    return any(key in file and file[key] == value for file in files)


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return not any("_target_" in part for part in (value, *value.values()) if isinstance(part, Mapping))
    return not is_expression(value)


def _references(config: Any) -> Iterator[str]:
    """Every key that a string in the config refers to, and the path of two to it: "a" and "a::b" of "@a#b#c"."""
    if isinstance(config, str):
        if config.startswith(("$", "@", "%")):
            for found in re.findall(r"[@%](\w+(?:(?:#|::)\w+)*)", config):
                parts = re.split("#|::", found)
                yield parts[0]
                yield "::".join(parts[:2])
    elif isinstance(config, (Mapping, list)):
        for part in config.values() if isinstance(config, Mapping) else config:
            yield from _references(part)


def running() -> ConfigWorkflow | None:
    """The workflow that is evaluating the expression which called; MONAI gives expressions no other way to it."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if isinstance(found := frame.f_locals.get("self"), ConfigWorkflow):
            return found
        frame = frame.f_back
    return None
