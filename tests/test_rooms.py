"""The plan of rooms: no module imports one of a room above its own, and what was moved says where it is now."""

from __future__ import annotations

import ast
import importlib
import json
import re
import traceback
from pathlib import Path
from pydoc import locate

import pytest
from monai.bundle import ConfigParser

import maisi_tools
from maisi_tools.bundles.packaging import needed_files
from maisi_tools.errors import InputError, find_input_error

PACKAGE = Path(maisi_tools.__file__).parent

ROOMS = (
    *("convolution", "tsp", "errors", "files", "settings", "autocast"),
    *("volumes", "masks", "dicom", "weights", "networks", "diffusion"),
    *("datasets", "training", "mask_generator", "coarse"),
    *("bundles", "metrics", "report", "cohort", "service", "studio", "cli"),
)
"""From the ground up; docs/architecture.md says what is in each."""


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """The rooms that a module imports from, inside functions, too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} imports relatively"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    parts = [name.split(".") for name in names if name.split(".")[0] == "maisi_tools"]
    return {one[1] for one in parts if len(one) > 1} - {"refuse_moved"}


MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def test_the_plan_names_every_room():
    assert {room(path) for path in MODULES} == set(ROOMS)


def test_no_import_runs_upward():
    upward = [
        f"{path.relative_to(PACKAGE)} imports {other}"
        for path in MODULES
        for other in imported_rooms(path)
        if ROOMS.index(other) > ROOMS.index(room(path))
    ]
    assert not upward, "\n".join(upward)


def test_the_ground_needs_nothing_of_what_is_built_on_it():
    for path in MODULES:
        if room(path) == "tsp":
            assert imported_rooms(path) <= {"tsp", "convolution"}, path
        if room(path) in ("files", "settings"):
            assert imported_rooms(path) <= {"errors"}, path
        if room(path) == "networks":
            assert "diffusion" not in imported_rooms(path)


@pytest.mark.parametrize(
    ("bundle", "names"),
    [
        ("maisi_vae", ["inference.json", "decode.json", "evaluate.json"]),
        ("maisi_ldm", ["inference.json"]),
        ("maisi_controlnet", ["inference.json", "edit.json", "dicom.json"]),
    ],
)
def test_inference_needs_no_training(repo_root, bundle, names):
    configs = [repo_root / "bundles" / bundle / "configs" / name for name in names]
    found = {room(path) for path in needed_files(configs) if path.parent != PACKAGE or path.name != "__init__.py"}
    assert "diffusion" in found and "training" not in found


def test_architecture_names_every_room(repo_root):
    page = (repo_root / "docs" / "architecture.md").read_text()
    table = page[page.index("## The rooms") : page.index("## Eight files")]
    assert {name for row in re.findall(r"^\| (.*?) \|", table, re.M) for name in re.findall(r"`(\w+)/?`", row)} == set(
        ROOMS
    )


# --- what was moved ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("old", "new"), maisi_tools.MOVED.items())
def test_an_old_path_is_answered_with_the_new_one(old, new):
    module, _, name = f"maisi_tools.{old}".rpartition(".")
    with pytest.raises(
        InputError, match=rf"maisi_tools\.{re.escape(old)} has moved; write maisi_tools\.{re.escape(new)} "
    ):
        getattr(importlib.import_module(module), name, None) or importlib.import_module(f"maisi_tools.{old}")
    assert locate(f"maisi_tools.{new}") is not None


@pytest.mark.parametrize(
    "config",
    [
        {"_target_": "maisi_tools.metrics.intensity.TissueIntensitiesd", "keys": "pred"},
        {"_target_": "maisi_tools.networks.MaskUNet"},
    ],
)
def test_an_old_target_of_a_users_config_is_answered_with_the_new_one(config):
    with pytest.raises(Exception) as raised:
        ConfigParser({"made": config}).get_parsed_content("made")
    old = config["_target_"].removeprefix("maisi_tools.")
    new = next(new for name, new in maisi_tools.MOVED.items() if old.startswith(name))
    assert f"maisi_tools.{new}" in str(find_input_error(raised.value))


def test_an_old_import_of_a_users_config_is_answered_with_the_new_one():
    config = {"imports": ["$from maisi_tools.run_record import record_run"], "made": "$record_run()"}
    with pytest.raises(Exception) as raised:
        ConfigParser(json.loads(json.dumps(config))).get_parsed_content("made")
    assert "write maisi_tools.bundles.record in its place" in "".join(traceback.format_exception(raised.value))


def test_what_never_was_there_is_missing_as_ever():
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("maisi_tools.nowhere")
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        getattr(importlib.import_module("maisi_tools.networks"), "Nothing")  # noqa: B009
