from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from maisi_tools.errors import InputError
from maisi_tools.masks.label_maps import read_label_map
from maisi_tools.masks.phantom import make_phantom, write_phantom
from maisi_tools.masks.vocabulary import BODY, VOCABULARY, label_id, labels_in_group, region_of

GRIDS = {"head_neck": ((64, 56, 64), (5.6, 5.6, 4.2)), "torso": ((60, 44, 64), (6.0, 6.0, 7.0))}
KINDS = sorted(GRIDS)


@pytest.fixture(scope="module")
def phantoms():
    return {kind: [make_phantom(kind, *GRIDS[kind], seed=seed) for seed in range(4)] for kind in KINDS}


def centers(labels: np.ndarray, kind: str) -> dict[int, np.ndarray]:
    """Label -> mean position in mm."""
    found = [int(label) for label in np.unique(labels) if label]
    middles = ndimage.center_of_mass(labels > 0, labels, found)
    return {label: np.array(middle) * GRIDS[kind][1] for label, middle in zip(found, middles, strict=True)}


@pytest.mark.parametrize("kind", KINDS)
def test_labels_are_in_the_vocabulary(phantoms, kind):
    for labels in phantoms[kind]:
        assert labels.dtype == np.uint8 and labels.shape == GRIDS[kind][0]
        assert set(np.unique(labels)) <= {0, *VOCABULARY}
        assert {0, BODY, label_id("spinal cord"), label_id("airway" if kind == "head_neck" else "trachea")} <= set(
            np.unique(labels)
        )


def test_what_is_in_view(phantoms):
    for labels in phantoms["head_neck"]:
        assert set(read_label_map("openkbp").values()) <= set(np.unique(labels))
        assert region_of(np.unique(labels)) == ("head", "chest")
    for labels in phantoms["torso"]:
        assert {1, 115, *labels_in_group("lung"), 3, 4, 5, 14, 6, 7, 12, 97, *range(33, 44)} <= set(np.unique(labels))
        assert region_of(np.unique(labels))[:2] == ("chest", "abdomen")


@pytest.mark.parametrize("kind", KINDS)
def test_seeds(phantoms, kind):
    again = make_phantom(kind, *GRIDS[kind], seed=0)
    assert np.array_equal(again, phantoms[kind][0])
    assert all(np.mean(again != other) > 0.01 for other in phantoms[kind][1:])


@pytest.mark.parametrize("kind", KINDS)
def test_left_is_at_low_x(phantoms, kind):
    pairs = [
        (label.id, label_id(label.name.replace("left", "right")))
        for label in VOCABULARY.values()
        if label.side == "left" and label.name != "left atrial appendage"
    ]
    pairs.append((18, 20))  # parotid glands
    for labels in phantoms[kind]:
        middle = centers(labels, kind)
        seen = [(left, right) for left, right in pairs if left in middle and right in middle]
        assert len(seen) > 5
        assert all(middle[left][0] < middle[right][0] for left, right in seen)
    if kind == "torso":
        assert middle[label_id("spleen")][0] < middle[label_id("aorta")][0] < middle[label_id("liver")][0]


@pytest.mark.parametrize("kind", KINDS)
def test_front_and_back_top_and_bottom(phantoms, kind):
    for labels in phantoms[kind]:
        middle = centers(labels, kind)
        cord = middle[label_id("spinal cord")]
        assert middle[label_id("trachea")][1] > cord[1]
        visible = [label for label in range(33, 57) if label in middle]  # L5 ... C1, upwards
        assert len(visible) >= 9 and np.all(np.diff([middle[label][2] for label in visible]) > 0)


@pytest.mark.parametrize("kind", KINDS)
def test_cord_is_in_one_piece(phantoms, kind):
    for labels in phantoms[kind]:
        assert ndimage.label(labels == label_id("spinal cord"), np.ones((3, 3, 3)))[1] == 1


@pytest.mark.parametrize("kind", KINDS)
def test_airways_and_organs_lie_inside_the_body(phantoms, kind):
    """What is not body fills no voxel that a plane of background sees through: the body closes around it."""
    for labels in phantoms[kind]:
        airway = np.isin(labels, labels_in_group("airway"))
        assert airway.any()
        touches_air = ndimage.binary_dilation(labels == 0) & airway
        assert touches_air.sum() <= 0.01 * airway.sum()
        assert ndimage.label(labels > 0)[1] == 1


def test_sizes_are_those_of_a_human(phantoms):
    def millilitres(kind: str, name: str) -> float:
        voxel = np.prod(GRIDS[kind][1]) / 1000
        return float(np.mean([np.count_nonzero(labels == label_id(name)) for labels in phantoms[kind]]) * voxel)

    for name, low, high in [("liver", 900, 2200), ("spleen", 80, 350), ("left kidney", 90, 250), ("heart", 350, 900)]:
        assert low < millilitres("torso", name) < high, name
    parotid, brainstem = millilitres("head_neck", "placeholder 18"), millilitres("head_neck", "placeholder 2")
    assert 12 < parotid < 45 and 12 < brainstem < 45


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "size, spacing",
    [
        ((17, 31, 23), (9.0, 7.0, 11.0)),
        ((32, 32, 32), (8, 8, 8)),
        ((64, 3, 40), (5.0, 5.0, 5.0)),
        ((1, 1, 1), (4, 4, 4)),
        ((40, 40, 40), (0.5, 0.5, 0.5)),
    ],
)
def test_odd_grids(kind, size, spacing):
    labels = make_phantom(kind, size, spacing, seed=1)
    assert labels.shape == size and set(np.unique(labels)) <= {0, *VOCABULARY}
    cord = labels == label_id("spinal cord")
    assert ndimage.label(cord, np.ones((3, 3, 3)))[1] <= 1


def test_the_grid_only_samples_the_anatomy():
    """Every second voxel of a fine phantom is the coarse one, but for tubes that coarse voxels would break."""
    coarse = make_phantom("head_neck", (33, 27, 29), (8.0, 8.0, 8.0), seed=2)
    fine = make_phantom("head_neck", (65, 53, 57), (4.0, 4.0, 4.0), seed=2)[::2, ::2, ::2]
    assert fine.shape == coarse.shape
    assert np.mean((fine > 0) != (coarse > 0)) == 0
    assert np.mean(fine != coarse) < 0.05


@pytest.mark.parametrize(
    "change, said",
    [
        ({"kind": "foot"}, "'foot' is unknown; allowed are head_neck, torso"),
        ({"size": (8, 8)}, r"size \(8, 8\)"),
        ({"size": (8, 8, 0)}, r"size \(8, 8, 0\)"),
        ({"size": (8, 8, 8.5)}, "whole numbers"),
        ({"spacing": (1, 1, 0)}, r"spacing \(1, 1, 0\)"),
        ({"spacing": (1, 1, float("nan"))}, "positive lengths"),
        ({"seed": -1}, "seed -1"),
    ],
)
def test_bad_input(change, said, tmp_path):
    options = {"kind": "torso", "size": (8, 8, 8), "spacing": (9.0, 9.0, 9.0), "seed": 0, **change}
    with pytest.raises(InputError, match=said):
        make_phantom(**options)
    with pytest.raises(InputError, match=said):
        write_phantom(tmp_path / "a.nii.gz", **options)
    assert list(tmp_path.iterdir()) == []


def test_write(tmp_path):
    path = write_phantom(tmp_path / "new" / "a.nii.gz", "head_neck", (20, 22, 24), (12, 11, 10), 3)
    image = nib.load(path)
    assert np.array_equal(np.asarray(image.dataobj), make_phantom("head_neck", (20, 22, 24), (12, 11, 10), 3))
    assert image.get_data_dtype() == np.uint8 and nib.aff2axcodes(image.affine) == ("R", "A", "S")
    assert image.header.get_zooms() == (12, 11, 10)
    assert np.allclose(image.affine @ [9.5, 10.5, 11.5, 1], [0, 0, 0, 1])
    assert [file.name for file in path.parent.iterdir()] == ["a.nii.gz"]
    with pytest.raises(InputError, match=r"name it .*a\.png\.nii\.gz"):
        write_phantom(tmp_path / "a.png")
