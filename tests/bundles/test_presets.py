"""--preset in stages 2 and 3."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest
from monai.bundle import ConfigParser

from maisi_tools.volumes.presets import PRESETS

NARROW = PRESETS["small"]["head_neck_narrow"]


def test_stage_2_takes_size_spacing_region_and_modality(bundles):
    """In place of what is given beside it; without a preset all is as given."""

    def conditions(overlay, **settings):
        parser = ConfigParser()
        parser.read_config([str(bundles / "maisi_ldm" / "configs" / name) for name in ("inference.json", overlay)])
        for key, value in settings.items():
            parser[key] = value
        return parser.get_parsed_content("conditions")

    made = conditions("full_rflow.json", preset="head_chest", output_size=[64, 64, 64], region=["lower"])
    assert (made.size, made.spacing, made.region) == ((512, 512, 128), (0.645, 0.645, 2.219), ("head", "chest"))
    assert made.modality == "ct"
    made = conditions("full_rflow_mr.json", preset="abdomen_t2")
    assert (made.modality, made.region) == ("mri_t2", ())
    assert [n * mm for n, mm in zip(made.size, made.spacing, strict=True)] == pytest.approx([350, 350, 246], abs=0.1)
    made = conditions("full_rflow_mr_brain.json", preset="sagittal", modality="mri_swi")
    assert (made.modality, made.size) == ("mri_swi", (128, 256, 256))
    made = conditions("full_rflow.json", output_size=[64, 64, 64], region=["lower"])
    assert (made.size, made.region) == ((64, 64, 64), ("lower",))


def test_stage_3_puts_the_mask_on_the_presets_grid(open_bundle, mask_file, phantom_labels, tmp_path, caplog):
    """The body's centre stays in the middle; the phantom's own, smaller field of view is said to be far."""
    given = {"input": str(mask_file), "output_dir": str(tmp_path)}
    workflow = open_bundle("maisi_controlnet", "inference.json", preset="head_neck_narrow", **given)
    mask = workflow.parser.get_parsed_content("preprocessing")({"image": str(mask_file)})["image"]
    assert tuple(mask.shape[1:]) == NARROW.size and np.allclose(mask.pixdim, NARROW.spacing)
    inside, before = np.count_nonzero(mask) * 40.0, np.count_nonzero(phantom_labels) * 85.0  # mm3 a voxel
    assert inside == pytest.approx(before, rel=0.02)
    assert "head_neck_narrow" not in "".join(one.getMessage() for one in caplog.records if "is far" in one.getMessage())
    open_bundle("maisi_controlnet", "inference.json", **given)
    assert any("nearest is preset head_neck_narrow" in record.getMessage() for record in caplog.records)
    settings = json.loads((tmp_path / "run.json").read_text())["settings"]
    assert settings["preset"] is None
    assert nib.load(mask_file).shape == phantom_labels.shape


@pytest.mark.parametrize("bundle", ["maisi_ldm", "maisi_controlnet"])
def test_unknown_presets_are_refused(cause, open_bundle, mask_file, tmp_path, bundle):
    given = {"input": str(mask_file)} if bundle == "maisi_controlnet" else {}
    with pytest.raises(Exception) as raised:
        open_bundle(bundle, "inference.json", preset="chest", output_dir=str(tmp_path), **given)
    assert "preset is 'chest'; allowed for these weights are head_neck" in str(cause(raised.value))
