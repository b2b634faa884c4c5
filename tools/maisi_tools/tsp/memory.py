"""How much memory there is, and sizes as people write them."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from maisi_tools.tsp.errors import TSPError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}

CGROUP = Path("/sys/fs/cgroup")
"""Where the kernel tells a container its limits (cgroup v2)."""

HEADROOM = 0.9
"""How much of a device's free memory is planned with; the rest is for the convolution library and fragmentation."""


def parse_bytes(size: str | int | None) -> int | None:
    """Return a number of bytes given as such or as text with a unit, as "12GiB" or "800 MB".

    Raises:
        TSPError: it is neither.
    """
    if size is None or (isinstance(size, int) and not isinstance(size, bool) and size > 0):
        return size
    match = re.fullmatch(r"\s*([0-9.]+)\s*([kmgt]?i?)b?\s*", str(size), re.IGNORECASE)
    try:
        count = int(float(match[1]) * _UNITS[match[2].lower()]) if match else 0
    except (ValueError, KeyError):
        count = 0
    if count <= 0:
        raise TSPError(f"memory_limit is {size!r}; give a size such as 12GiB or 800MB, or None for what is free")
    return count


def free_bytes(device: torch.device, base: int) -> int | None:
    """What a call may take of a device, with ``base`` bytes of it there already; None where the system does not say."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return base + int(HEADROOM * (free + held))
    available = _available_host_memory()
    return None if device.type != "cpu" or available is None else base + int(HEADROOM * available)


def _available_host_memory() -> int | None:
    """What the kernel says can be had without swapping, within the container's limit; None where it does not say."""
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        available = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    try:
        limit, used = (int((CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        parts = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        # Of files that were read the kernel keeps a copy, which counts as used and is given back when it is needed.
        room = limit - used + int(parts["inactive_file"])
    except (OSError, KeyError, ValueError):  # no limit, or no such group
        return available
    return max(0, min(available, room))
