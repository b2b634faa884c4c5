"""What a file says about a stage stays a value: MONAI's parser, the real one, gets nothing to evaluate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from monai.bundle import ConfigParser

from maisi_tools.errors import InputError
from maisi_tools.settings import check_plain, check_stage_settings, read_yaml

CONFIG = {
    "imports": ["$import os"],
    "displayable_configs": {"steps": 10, "solver": "ab2"},
    "steps": "@displayable_configs#steps",
    "solver": "@displayable_configs#solver",
    "spacing": None,
    "guidance_scale": 2.0,
    "merge": {"bone": 120},
    "progress": True,
    "path": "$os.getcwd()",
    "network_def": {"_target_": "torch.nn.Identity"},
    "seed": 0,
}


def writes(path: Path) -> str:
    return f"__import__('pathlib').Path({str(path)!r}).touch()"


ACTIVE = [
    lambda path: "$" + writes(path),
    lambda path: ["$" + writes(path)],
    lambda path: {"bone": "$" + writes(path)},
    lambda path: {"_target_": "pathlib.Path.touch", "self": {"_target_": "pathlib.Path", "args": str(path)}},
    lambda path: {"bone": {"_target_": "os.mkdir", "path": str(path)}},
    lambda path: "@network_def",
    lambda path: f"%{path}.json#key",
]


@pytest.mark.parametrize("number", range(len(ACTIVE)))
@pytest.mark.parametrize("key", ["steps", "solver", "spacing", "merge", "progress"])
def test_nothing_of_a_value_is_run(tmp_path, key, number):
    with pytest.raises(InputError, match=key):
        check_stage_settings(CONFIG, {key: ACTIVE[number](tmp_path / "ran")}, "ct")
    assert not (tmp_path / "ran").exists()


def test_the_parser_would_have_run_it(tmp_path):
    """Why it is refused: the same value, set as it was before, creates the file."""
    parser = ConfigParser(json.loads(json.dumps(CONFIG)))
    parser["spacing"] = "$" + writes(tmp_path / "ran")
    parser.get_parsed_content("spacing")
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"stepz": 3}, "has stepz, which is no key of the config; did you mean steps"),
        ({"colour": 3}, "is no key of the config; allowed are guidance_scale, merge, progress, solver, spacing, steps"),
        ({"network_def": {"a": 1}}, "network_def, which is computed by the config"),
        ({"path": "/x"}, "path, which is computed by the config"),
        ({"imports": []}, "imports, which is computed"),
        ({"displayable_configs": {}}, "displayable_configs, which is computed"),
        ({"network_def#_target_": "os.system"}, "the key 'network_def#_target_'"),
        ({"displayable_configs::steps": 3}, "the key 'displayable_configs::steps'"),
        ({"_meta_": {}}, "the key '_meta_'"),
        ({3: 3}, "the key 3"),
        ({"seed": 3}, "seed, which is set for you"),
        ({"steps": "10"}, "ct.steps is '10'; allowed is a number, such as 10"),
        ({"steps": True}, "ct.steps is True; allowed is a number"),
        ({"steps": None}, "ct.steps is None; allowed is a number"),
        ({"solver": 1}, "ct.solver is 1; allowed is text"),
        ({"progress": 1}, "allowed is true or false"),
        ({"merge": [1]}, "allowed is a mapping"),
        ({"steps": float("nan")}, "ct.steps is nan; allowed is a finite number"),
        ({"spacing": {1, 2}}, "ct.spacing is a set"),
        ({"spacing": [[[[[[1]]]]]]}, "nested deeper than 4"),
        ({"guidance_scale": -1}, "ct.guidance_scale is -1; allowed is a number from 0 to 50"),
        ([1], r"ct is \[1\]; allowed is a mapping"),
    ],
)
def test_what_is_refused(settings, words):
    with pytest.raises(InputError, match=words):
        check_stage_settings(CONFIG, settings, "ct", fixed=("seed",))


def test_values_come_through():
    settings = {
        "steps": 3,
        "solver": "euler",
        "spacing": [1.5, 1, 2],
        "merge": {"bone": 7, "lung": 8},
        "progress": False,
    }
    assert check_stage_settings(CONFIG, settings, "ct") == settings
    parser = ConfigParser(json.loads(json.dumps(CONFIG)))
    for key, value in settings.items():
        parser[key] = value
        assert parser.get_parsed_content(key) == value


def test_a_value_in_itself_ends():
    endless: list = []
    endless.append(endless)
    with pytest.raises(InputError, match="nested deeper"):
        check_plain(endless, "ct")


def test_a_key_that_stands_twice_is_refused(tmp_path):
    path = tmp_path / "spec.yaml"
    path.write_text("count: 2\nstage: &it\n  seed: 1\nother:\n  <<: *it\n  seed: 3\n")
    assert read_yaml(path, "settings", "page.md") == {"count": 2, "stage": {"seed": 1}, "other": {"seed": 3}}
    path.write_bytes(b"\xef\xbb\xbfcount: 2\n")  # as Windows writes it
    assert read_yaml(path, "settings", "page.md") == {"count": 2}
    path.write_text("count: 2\nstage:\n  seed: 1\n  seed: 3\n")
    with pytest.raises(InputError, match=r"'seed' stands there more than once(.|\n)*line 3"):
        read_yaml(path, "settings", "page.md")
