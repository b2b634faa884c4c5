from __future__ import annotations

import pytest
import torch

from maisi_tools.tsp import memory

GIB = 2**30


def group(folder, limit: str, used: int, files: int):
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {files}\nactive_file 7\n")
    return folder


@pytest.mark.parametrize(
    ("limit", "used", "files", "room"),
    [
        (str(GIB), GIB // 4, 0, GIB * 3 // 4),
        (str(GIB), GIB, GIB // 2, GIB // 2),  # what the kernel kept of files that were read can be had
        (str(GIB), GIB + 100, 0, 0),
    ],
)
def test_a_container_may_take_what_its_limit_leaves(tmp_path, monkeypatch, limit, used, files, room):
    monkeypatch.setattr(memory, "CGROUP", group(tmp_path, limit, used, files))
    monkeypatch.setattr(memory, "HEADROOM", 1.0)
    assert memory.free_bytes(torch.device("cpu"), 10) == 10 + room


def test_without_a_limit_there_is_what_the_machine_has(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "CGROUP", group(tmp_path, "max", 5, 0))
    found = memory.free_bytes(torch.device("cpu"), 0)
    monkeypatch.setattr(memory, "CGROUP", tmp_path / "nowhere")
    assert found == pytest.approx(memory.free_bytes(torch.device("cpu"), 0), rel=0.2)
