from __future__ import annotations

import logging
import subprocess

import pytest

from maisi_tools.errors import InputError
from maisi_tools.volumes.door import check_inputs


def test_every_input_is_prepared_once_and_stays_as_it_was():
    data = [{"image": "a"}, {"image": "b"}]
    seen = []

    def preprocessing(item):
        seen.append(item["image"])
        item["image"] = "prepared"

    assert check_inputs(data, preprocessing) is None
    assert seen == ["a", "b"] and data == [{"image": "a"}, {"image": "b"}]
    check_inputs([], preprocessing)
    assert seen == ["a", "b"]


def test_the_first_bad_input_ends_the_check():
    seen = []

    def preprocessing(item):
        seen.append(item["image"])
        if item["image"] != "a":
            raise InputError(f"{item['image']} is damaged")

    with pytest.raises(InputError, match="b is damaged"):
        check_inputs([{"image": name} for name in "abc"], preprocessing)
    assert seen == ["a", "b"]


def test_what_is_said_of_an_input_at_the_door_is_said_once(caplog):
    logger = logging.getLogger("maisi_tools.tests.door")

    def preprocessing(item):
        logger.warning("%s is small", item["image"])

    for run in range(2):  # the second has a door of its own
        caplog.clear()
        check_inputs([{"image": "a"}, {"image": "b"}], preprocessing)
        for name in "abca":
            preprocessing({"image": name})
        assert caplog.messages == ["a is small", "b is small", "c is small", "a is small"], run
    with pytest.raises(InputError):
        check_inputs([{"image": "a"}], lambda item: (preprocessing(item), (_ for _ in ()).throw(InputError("damaged"))))
    caplog.clear()
    preprocessing({"image": "a"})
    assert caplog.messages == ["a is small"]  # the run did not begin


def test_what_is_said_at_the_door_is_seen_without_a_logging_configuration(python):
    """Warnings then go to stderr by logging's last resort."""
    code = """
import logging
from maisi_tools.volumes.door import check_inputs
say = lambda item: logging.getLogger("maisi_tools.x").warning("%s is small", item["image"])
logging.getLogger("maisi_tools.x").handlers.clear()
logging.root.handlers.clear()
check_inputs([{"image": "a"}], say)
say({"image": "a"})
say({"image": "b"})
"""
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=100, check=True)
    assert done.stderr.split("\n") == ["a is small", "b is small", ""]
