"""The processes that torchrun starts for a bundle: joining, and leaving when all are done."""

from __future__ import annotations

import datetime
import os

import torch
from torch import distributed

from maisi_tools.errors import InputError, report_input_errors


def of_torchrun(name: str) -> int:
    """The number that torchrun gives each of its processes under a name: RANK, LOCAL_RANK or WORLD_SIZE.

    Raises:
        InputError: torchrun did not start this process.
    """
    report_input_errors()  # this may come before all that a config begins with
    if name not in os.environ:
        raise InputError(
            f"a multi_gpu config is run without torchrun, which sets {name}; allowed is one process or more that it "
            "starts: torchrun --nproc_per_node=N -m monai.bundle run ..., or leave out the multi_gpu config"
        )
    return int(os.environ[name])


def rank_device() -> torch.device:
    """The device of this rank: its own GPU, or the CPU where there is none.

    Raises:
        InputError: see :func:`of_torchrun`.
    """
    return torch.device("cuda", of_torchrun("LOCAL_RANK")) if torch.cuda.is_available() else torch.device("cpu")


def join_ranks(device: torch.device | str, backend: str | None = None, timeout: float | None = None) -> None:
    """Join the process group, unless this process is in one already.

    Args:
        device: of this rank.
        backend: "nccl" or "gloo"; None takes nccl where there is a GPU.
        timeout: seconds that a rank waits for the others; None for PyTorch's own.

    Raises:
        InputError: see :func:`of_torchrun`.
    """
    if not distributed.is_initialized():
        of_torchrun("RANK")
        wait = None if timeout is None else datetime.timedelta(seconds=timeout)
        distributed.init_process_group(backend or ("nccl" if torch.cuda.is_available() else "gloo"), timeout=wait)
    if torch.device(device).type == "cuda":
        torch.cuda.set_device(device)


def leave_ranks() -> None:
    """Wait for the other ranks, and end the process group."""
    distributed.barrier()
    distributed.destroy_process_group()
