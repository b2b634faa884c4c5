from __future__ import annotations

from pathlib import Path

import pytest
import yaml

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
def bundles(repo_root: Path) -> Path:
    return repo_root / "bundles"


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a cohort, by its path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="session")
def files_of():
    return content
