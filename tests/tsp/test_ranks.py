"""Several gloo ranks compute what one process computes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from rank_program import case

from maisi_tools.tsp.errors import TSPError
from maisi_tools.tsp.ranks import share_of
from maisi_tools.tsp.run import Call, Settings

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")


def start(python: str, ranks: int, folder: Path, *cases: str) -> list[subprocess.Popen]:
    """Start the ranks without a launcher, which would end the others when one dies."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(ranks),
    }
    program = [python, str(Path(__file__).with_name("rank_program.py")), str(folder), *cases]
    return [
        subprocess.Popen(program, env=environment | {"RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(ranks)
    ]


def finish(processes: list[subprocess.Popen], seconds: float = 120) -> list[tuple[int, str]]:
    deadline = time.monotonic() + seconds
    ended = []
    try:
        for process in processes:
            _, errors = process.communicate(timeout=max(deadline - time.monotonic(), 1))
            ended.append((process.returncode, errors))
    finally:
        for process in processes:
            process.kill()
    return ended


def results(python: str, folder: Path, ranks: int, *cases: str) -> list[list]:
    """What each case gave on each rank."""
    for code, errors in finish(start(python, ranks, folder, *cases)):
        assert code == 0, errors[-3000:]
    return [
        [torch.load(folder / f"{number}_{rank}.pt", weights_only=False) for rank in range(ranks)]
        for number in range(len(cases))
    ]


def bound(name: str) -> tuple[torch.Tensor, float]:
    """What the network gives in float64, and twice the error of the unsplit float32 network."""
    network, function, args = case(name)
    with torch.no_grad():
        single = function(*args)
        network.double()  # the function is bound to, or closes over, the network
        exact = function(*(arg.double() for arg in args))
    own = (single - exact).abs().max().item()
    return exact, 2 * own + 4 * torch.finfo(torch.float32).eps * exact.abs().max().item()


@pytest.mark.parametrize(
    ("ranks", "cases"),
    [
        (2, ["decoder:0:2:-", "unet:1:0:first", "segresnet:2:3:-", "encoder:0:1:-"]),
        (3, ["encoder:2:2:first", "thin decoder:1:4:-", "unet:0:2:-", "decoder:2:2:shards,first,write"]),
        (4, ["decoder:2:0:first", "thin decoder:0:1:first", "unet:0:2:-", "encoder:1:2:-"]),
    ],
)
def test_ranks_equal_the_unsplit_network_and_one_another(python, tmp_path, ranks, cases):
    computed = results(python, tmp_path, ranks, *cases)
    # of 100, 101, ...; of none, 51, 52, ...; of none anywhere
    assert all(torch.load(tmp_path / f"limits_{rank}.pt") == [100, 51, None] for rank in range(ranks))
    for text, found in zip(cases, computed, strict=True):
        name, _, _, options = text.split(":")
        exact, allowed = bound(name)
        if "shards" in options:
            assert [shard["rows"] for shard in found] == [(0, 12), (12, 24), (24, 36)]
            assert all(shard["axis"] == 4 and shard["shape"] == exact.shape for shard in found)
            found = [torch.cat([shard["tensor"] for shard in found], 4)]
        if "write" in options:
            volume = nib.load(tmp_path / "ct.nii")
            assert np.array_equal(np.asarray(volume.dataobj), np.rint(found[0][0, 0].numpy() * 100).astype(np.int16))
            assert volume.affine.tolist() == [[2, 0, 0, -9], [0, 3, 0, 4], [0, 0, 1.5, 7], [0, 0, 0, 1]]
            assert not list(tmp_path.glob("*.part"))
        for result in found:
            assert result.dtype == torch.float32 and result.shape == exact.shape
            assert torch.equal(result, found[0])
            assert (result - exact).abs().max().item() <= allowed


def test_a_killed_rank_ends_the_others_with_an_error(python, tmp_path):
    began = time.monotonic()
    ended = finish(start(python, 3, tmp_path, "decoder:2:2:die"))
    assert time.monotonic() - began < 60
    assert ended[2][0] == -9
    for code, errors in ended[:2]:
        assert code == 1
        assert "TSPError: another rank did not answer: it failed, was killed" in errors
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith("limits_")]


def test_ranks_without_a_process_group_are_refused():
    network, function, args = case("decoder")
    with torch.no_grad(), pytest.raises(TSPError, match=r"needs a process group.*torchrun"):
        Call(Settings(devices="ranks"), function, args, {})


@pytest.mark.parametrize(("rows", "ranks"), [(7, 3), (2, 4), (1, 1), (100, 7)])
def test_shares_cover_all_rows_once(rows, ranks):
    shares = [share_of(rows, rank, ranks) for rank in range(ranks)]
    assert [row for a, b in shares for row in range(a, b)] == list(range(rows))
    assert max(b - a for a, b in shares) - min(b - a for a, b in shares) <= 1
