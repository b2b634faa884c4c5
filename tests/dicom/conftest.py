"""A generated CT with its mask, from a phantom, and the studies written of it."""

from __future__ import annotations

import datetime

import numpy as np
import pydicom
import pytest

pytest.importorskip("highdicom", reason="needs the extra 'dicom'")

import highdicom as hd
from pydicom.sr.codedict import codes

from maisi_tools.dicom.study import write_study
from maisi_tools.masks.phantom import make_phantom

SIZE, SPACING = (40, 36, 18), (6.5, 7.0, 5.0)
CREATED = datetime.datetime(2026, 1, 31, 12, 0, 1)


def oblique_affine() -> np.ndarray:
    """Turned by some degrees about every axis, x to the patient's right."""
    turn, _ = np.linalg.qr(np.array([[1, 0.08, 0.05], [-0.1, 1, 0.07], [0.02, -0.1, 1]]))
    affine = np.eye(4)
    affine[:3, :3] = turn * np.sign(np.diag(turn)) * SPACING
    affine[:3, 3] = -120.25, -90.5, 33.125
    return affine


def foreign_segmentation(slices, segments, **options):
    """A Segmentation as another program writes it: segments may overlap; (name, code, mask (rows, columns) a slice)."""
    description = [
        hd.seg.SegmentDescription(number, name, codes.SCT.Organ, code, "MANUAL")
        for number, (name, code, _) in enumerate(segments, start=1)
    ]
    return hd.seg.Segmentation(
        source_images=slices,
        pixel_array=np.stack([mask for _, _, mask in segments], -1),
        segment_descriptions=description,
        **{"segmentation_type": "BINARY", **options},
        series_instance_uid=hd.UID(),
        series_number=5,
        sop_instance_uid=hd.UID(),
        instance_number=1,
        manufacturer="another",
        manufacturer_model_name="another",
        software_versions="1",
        device_serial_number="1",
    )


@pytest.fixture(scope="session")
def mask():
    return make_phantom("torso", SIZE, SPACING, seed=1)


@pytest.fixture(scope="session")
def hu(mask):
    values = np.random.default_rng(0).integers(-200, 1500, SIZE)
    return np.where(mask > 0, values, -1000).astype(np.int16)


@pytest.fixture(scope="session")
def studies(tmp_path_factory, hu, mask):
    """Folders of the study as slices and as Enhanced CT; for reading alone."""
    root = tmp_path_factory.mktemp("studies")
    conditions = {"num_inference_steps": 10, "spacing": [6.5, 7.0, 5.0]}
    for name, enhanced in (("slices", False), ("enhanced", True)):
        write_study(
            root / name,
            hu,
            oblique_affine(),
            mask,
            seed=7,
            conditions=conditions,
            enhanced=enhanced,
            created=CREATED,
        )
    (root / "enhanced" / "CT").mkdir()
    (root / "enhanced" / "CT.dcm").rename(root / "enhanced" / "CT" / "CT.dcm")
    return root


@pytest.fixture
def slices(studies):
    """The CT slices of a study, in order."""
    return [pydicom.dcmread(file) for file in sorted((studies / "slices" / "CT").iterdir())]
