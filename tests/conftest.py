from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

torch.set_num_threads(2)  # what the smallest machine that runs the tests has


@pytest.fixture(scope="session")
def repo_root() -> Path:
    return Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Give every test the same global random state, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
