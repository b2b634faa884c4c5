"""Damaged volumes at the door: each is read or refused with an error of ours that names the file, in little memory."""

from __future__ import annotations

import os
import resource
import time

import numpy as np
import pytest

from maisi_tools.errors import InputError
from maisi_tools.masks.class_folder import read_mask
from maisi_tools.masks.label_maps import LABEL_MAPS
from maisi_tools.volumes.reading import read_volume

from .mutants import make_mutant

SAMPLE = int(os.environ.get("MAISI_MUTANTS", "60"))
"""MAISI_MUTANTS=300 is the whole hunt."""


@pytest.fixture
def memory_bound():
    """No more than 1 GB of address space beyond what the process has: an allocation that is tried fails."""
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def outcome(path, read):
    try:
        volume = read(path)
    except InputError as error:
        assert str(path) in str(error), f"the refusal does not name the file: {error}"
        assert "memory" not in str(error) or "this machine's memory of" in str(error), f"it was tried: {error}"
        return "refused"
    assert volume.ndim == 4 and volume.affine.shape == (4, 4)
    assert np.isfinite(volume.affine).all() and np.isfinite(np.asarray(volume)).all()
    return "read"


def test_mutants_are_read_or_refused_and_nothing_raw(tmp_path, memory_bound):
    found, slowest = [], 0.0
    for number in range(SAMPLE):
        path = make_mutant(tmp_path, number)
        start = time.perf_counter()
        found.append(outcome(path, lambda file: read_volume(file, "ct")))
        outcome(path, lambda file: read_mask(file, LABEL_MAPS["maisi"]))
        slowest = max(slowest, time.perf_counter() - start)
    print(f"{SAMPLE} mutants: {found.count('refused')} refused, {found.count('read')} read, {slowest:.2f} s at most")
    assert found.count("refused") > SAMPLE / 2 and found.count("read") > 0 and slowest < 20


def test_the_same_seed_gives_the_same_mutant(tmp_path):
    for number in range(6):
        first = make_mutant(tmp_path, number).read_bytes()
        assert first == make_mutant(tmp_path, number).read_bytes()
        assert first != make_mutant(tmp_path, number, seed=1).read_bytes()
