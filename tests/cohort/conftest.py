from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from maisi_tools.weights import save_weights

SPEC = """
name: heads
count: 3
seed: 7
masks:
  source: phantom
  region: [head]
  field_of_view: [240, 240, 160]
  spacing: [5.0, 5.0, 3.4]
flip: 0.5
ct:
  num_inference_steps: 1
"""


@pytest.fixture
def write_spec(tmp_path: Path):
    """``write_spec(key="value", ...)`` writes a small specification with lines changed or added, returns its path."""

    def write(text: str = SPEC, **changes: str) -> Path:
        content = yaml.safe_load(text) | {key: yaml.safe_load(value) for key, value in changes.items()}
        path = tmp_path / "spec.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write


@pytest.fixture(scope="session")
def bundles(tiny_bundles: Path) -> Path:
    return tiny_bundles


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a cohort, by its path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="session")
def files_of():
    return content


@pytest.fixture
def bundle(tmp_path) -> Path:
    """A MONAI bundle as a model zoo has it: class 2 is what is denser than 250 HU, class 1 never comes out.

    It sees a third of the resolution in plane, and does not undo that.
    """
    root = tmp_path / "zoo"
    (root / "configs").mkdir(parents=True)
    config = {
        "bundle_root": ".",
        "device": "$torch.device('cpu')",
        "network_def": {"_target_": "torch.nn.Conv3d", "in_channels": 1, "out_channels": 3, "kernel_size": 1},
        "preprocessing": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": "LoadImaged", "keys": "image", "ensure_channel_first": True},
                {"_target_": "Orientationd", "keys": "image", "axcodes": "LPS", "labels": None},
                {"_target_": "Spacingd", "keys": "image", "pixdim": [15.0, 15.0, 3.4], "mode": "nearest"},
            ],
        },
        "inferer": {"_target_": "SimpleInferer"},
        "postprocessing": {
            "_target_": "Compose",
            "transforms": [{"_target_": "AsDiscreted", "keys": "pred", "argmax": True}],
        },
    }
    (root / "configs" / "inference.json").write_text(json.dumps(config))
    classes = {"0": "background", "1": "mystery", "2": "skull"}
    outputs = {"pred": {"channel_def": classes}}
    (root / "configs" / "metadata.json").write_text(json.dumps({"network_data_format": {"outputs": outputs}}))
    weight, bias = torch.tensor([0.0, -1.0, 1.0]).reshape(3, 1, 1, 1, 1), torch.tensor([0.0, -2000.0, -250.0])
    (root / "models").mkdir()
    save_weights(root / "models" / "model.pt", {"weight": weight, "bias": bias})
    return root
