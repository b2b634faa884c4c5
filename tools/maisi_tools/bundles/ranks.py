"""The processes that torchrun starts for a bundle: joining, and leaving when all are done."""

from __future__ import annotations

import datetime
import os

import torch
from torch import distributed


def rank_device() -> torch.device:
    """The device of this rank: its own GPU, or the CPU where there is none."""
    return torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")


def join_ranks(device: torch.device | str, backend: str | None = None, timeout: float | None = None) -> None:
    """Join the process group, unless this process is in one already.

    Args:
        device: of this rank.
        backend: "nccl" or "gloo"; None takes nccl where there is a GPU.
        timeout: seconds that a rank waits for the others; None for PyTorch's own.
    """
    if not distributed.is_initialized():
        wait = None if timeout is None else datetime.timedelta(seconds=timeout)
        distributed.init_process_group(backend or ("nccl" if torch.cuda.is_available() else "gloo"), timeout=wait)
    if torch.device(device).type == "cuda":
        torch.cuda.set_device(device)


def leave_ranks() -> None:
    """Wait for the other ranks, and end the process group."""
    distributed.barrier()
    distributed.destroy_process_group()
