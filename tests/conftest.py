from __future__ import annotations

import os
import random
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from maisi_tools.networks import Autoencoder, ControlledUNet, ControlNet, DiffusionUNet

from .preloaded import start
from .tiny import make_bundles

# On a busy machine, threads wait for one another a hundred times as long as the tests' small networks compute, and the
# workers keep all cores busy. The programs that tests start take it from the environment.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


@pytest.hookimpl(optionalhook=True)  # without pytest-xdist nobody asks
def pytest_xdist_auto_num_workers() -> int:
    """Half as many workers again as cores: tests of services and cohorts wait a third of their time."""
    return max(1, len(os.sched_getaffinity(0)) * 3 // 2)


@pytest.fixture(scope="session")
def repo_root() -> Path:
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def tiny_bundles(repo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the bundles with narrow networks, see tiny.py."""
    return make_bundles(repo_root / "bundles", tmp_path_factory.mktemp("tiny") / "bundles")


@pytest.fixture(scope="session")
def python() -> Iterator[str]:
    """The path of a Python that starts with MONAI imported, see preloaded.py."""
    with tempfile.TemporaryDirectory(prefix="maisi-") as folder:  # a socket's path has to be short
        program, process = start(Path(folder))
        yield str(program)
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def torchrun(python: str) -> Callable[..., subprocess.CompletedProcess[str]]:
    """``torchrun("monai.bundle", "run", ..., cwd=folder)`` runs a module on two ranks, which have to succeed."""

    def run(*arguments: Any, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        command = [python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
        done = subprocess.run(
            [*command, *map(str, arguments)],
            cwd=cwd,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done

    return run


@pytest.fixture
def pem_files(tmp_path: Path) -> dict[str, str]:
    """Paths of a ``certificate`` of 127.0.0.1, signed by itself, and its ``key``."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    names = {name: str(tmp_path / f"{name}.pem") for name in ("certificate", "key")}
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", names["key"], "-out", names["certificate"]]
    subprocess.run(command, check=True, capture_output=True)
    return names


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Give every test the same global random state, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """The CPU, and a GPU where there is one, on which float32 is then float32 throughout."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield request.param


@pytest.fixture(scope="session")
def assert_same() -> Callable[[Any, Any], None]:
    """Asserts that two nested states, such as checkpoints, are equal to the bit; where they are not is named."""

    def check(one: Any, other: Any, name: str = "") -> None:
        assert type(one) is type(other), name
        if isinstance(one, torch.Tensor):
            assert torch.equal(one, other), name
        elif isinstance(one, dict):
            assert one.keys() == other.keys(), name
            for key in one:
                check(one[key], other[key], f"{name}.{key}")
        elif isinstance(one, (list, tuple)):
            for i, pair in enumerate(zip(one, other, strict=True)):
                check(*pair, f"{name}.{i}")
        else:
            assert one == other, name

    return check


@pytest.fixture(scope="session")
def tiny_settings() -> dict[str, dict]:
    """Constructor arguments of "vae", "unet" and "controlnet", as small as they still have every kind of layer.

    The U-Net has two levels, so a legal image size is a multiple of 8.
    """
    vae = {
        "spatial_dims": 3,
        "in_channels": 1,
        "out_channels": 1,
        "latent_channels": 4,
        "num_channels": [8, 8, 16],
        "num_res_blocks": [1, 1, 1],
        "norm_num_groups": 4,
        "attention_levels": [False, False, False],
        "with_encoder_nonlocal_attn": False,
        "with_decoder_nonlocal_attn": False,
        "use_checkpointing": False,
        "use_convtranspose": False,
        "norm_float16": False,
        "num_splits": 1,
        "dim_split": 1,
        "save_mem": False,
    }
    levels = {
        "spatial_dims": 3,
        "in_channels": 4,
        "num_channels": [8, 16],
        "attention_levels": [False, True],
        "num_head_channels": [0, 8],
        "num_res_blocks": 1,
        "norm_num_groups": 4,
        "resblock_updown": False,
        "include_fc": False,
        "num_class_embeds": 128,
    }
    unet = {**levels, "out_channels": 4, "include_spacing_input": True, "include_top_region_index_input": True}
    controlnet = {
        **levels,
        "conditioning_embedding_in_channels": 8,
        "conditioning_embedding_num_channels": [8, 8, 8],
    }
    return {"vae": vae, "unet": unet, "controlnet": controlnet}


@pytest.fixture
def tiny_autoencoder(tiny_settings: dict[str, dict]) -> Autoencoder:
    torch.manual_seed(0)
    return Autoencoder(**tiny_settings["vae"]).eval()


@pytest.fixture
def tiny_unet(tiny_settings: dict[str, dict]) -> DiffusionUNet:
    torch.manual_seed(0)
    unet = DiffusionUNet(**tiny_settings["unet"]).eval()
    # MONAI starts the last layer of each block at zero: the output would be zero, and no condition would matter.
    for parameter in unet.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    return unet


@pytest.fixture
def tiny_controlled(tiny_settings: dict[str, dict], tiny_unet: DiffusionUNet) -> ControlledUNet:
    return ControlledUNet(tiny_unet, ControlNet(**tiny_settings["controlnet"])).eval()
