"""Masks of other programs: which structures they become, on which grid, and what is said of the rest."""

from __future__ import annotations

import copy
import json
import logging

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from matplotlib.path import Path as MatplotlibPath
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes

from maisi_tools.dicom.ct import to_lps
from maisi_tools.dicom.painting import Structure, paint
from maisi_tools.dicom.structures import fill_polygon, outline
from maisi_tools.dicom.study import read_mask
from maisi_tools.errors import InputError
from maisi_tools.volumes.series import read_slices, slice_affine

from .conftest import SIZE, foreign_segmentation, oblique_affine


@settings(max_examples=60, deadline=None)
@given(st_numpy.arrays(bool, st.tuples(st.integers(1, 12), st.integers(1, 12)), elements=st.booleans()))
def test_outlines_fill_to_the_same_voxels(inside):
    """Holes, islands in holes, voxels that touch at corners: each polygon alone, united or by XOR, gives the mask."""
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 1e-5, 2)
    drawn = [fill_polygon(polygon + noise, inside.shape) for polygon in outline(inside)]
    assert np.array_equal(np.logical_or.reduce([np.zeros_like(inside), *drawn]), inside)
    assert np.array_equal(np.logical_xor.reduce([np.zeros_like(inside), *drawn]), inside)


def test_filling_agrees_with_matplotlib():
    rng = np.random.default_rng(3)
    centres = np.stack(np.meshgrid(np.arange(20), np.arange(15), indexing="ij"), -1).reshape(-1, 2)
    for _ in range(20):
        angle = np.sort(rng.uniform(0, 2 * np.pi, 12))
        polygon = [9, 7] + rng.uniform(2, 11, (12, 1)) * np.stack([np.cos(angle), np.sin(angle)], 1)
        expected = MatplotlibPath(np.vstack([polygon, polygon[:1]])).contains_points(centres).reshape(20, 15)
        assert np.array_equal(fill_polygon(polygon, (20, 15)), expected)


def test_smaller_structures_are_on_top_in_whatever_order(caplog):
    body, organ, tumor = (np.zeros((8, 8, 8), bool) for _ in range(3))
    body[1:7], organ[2:6, 2:6, 2:6], tumor[3:5, 3:5, 5:8] = True, True, True
    made = [Structure("b", 200, lambda: body), Structure("l", 1, lambda: organ), Structure("t", 26, lambda: tumor)]
    expected = np.where(tumor, 26, np.where(organ, 1, np.where(body, 200, 0)))
    caplog.set_level(logging.INFO)
    for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0]):
        assert np.array_equal(paint([made[i] for i in order], (8, 8, 8), [], "x"), expected)
    overlap = (body & organ).sum() + (tumor & (body | organ)).sum()
    assert f"overlap in {overlap} voxels" in caplog.text


def blocks():
    liver, kidney, other = (np.zeros((SIZE[2], SIZE[1], SIZE[0]), np.uint8) for _ in range(3))
    liver[3:9, 4:20, 5:25], kidney[5:8, 10:16, 20:30], other[10:12, 2:5, 2:5] = 1, 1, 1
    return liver, kidney, other


def test_foreign_segmentation(slices, studies, tmp_path, caplog):
    liver, kidney, other = blocks()
    ds = foreign_segmentation(
        slices,
        [("Leber", codes.SCT.Liver, liver), ("Niere li", codes.SCT.Kidney, kidney), ("GTV", codes.SCT.Mass, other)],
    )
    ds.save_as(tmp_path / "seg.dcm")
    mask = read_mask(tmp_path / "seg.dcm", studies / "slices" / "CT")[0].numpy()
    assert np.array_equal(mask, liver.T)
    assert "left out: Niere li, GTV" in caplog.text and "--names" in caplog.text
    names = tmp_path / "names.json"
    names.write_text(json.dumps({"Niere li": "left kidney", "GTV": 0}))
    caplog.clear()
    mask = read_mask(tmp_path / "seg.dcm", studies / "slices" / "CT", names)[0].numpy()
    assert np.array_equal(mask, np.where(kidney.T, 14, liver.T)) and "left out" not in caplog.text


def test_fractional_segments_count_from_one_half(slices, tmp_path):
    liver, *_ = blocks()
    ds = foreign_segmentation(
        slices, [("x", codes.SCT.Liver, liver * 0.8)], segmentation_type="FRACTIONAL", max_fractional_value=100
    )
    ds.save_as(tmp_path / "seg.dcm")
    found = read_mask(tmp_path / "seg.dcm")
    assert np.count_nonzero(found) == liver.sum()


@pytest.mark.parametrize("kind", ["BINARY", "FRACTIONAL", "LABELMAP"])
def test_segments_on_a_tilted_series(slices, studies, tmp_path, kind):
    """Frames that form no volume of right angles land on the series' slices, whatever the type."""
    liver, kidney, _ = blocks()
    for number, ds in enumerate(slices):
        ds.ImagePositionPatient = (np.asarray(ds.ImagePositionPatient, float) + np.array([0, 1.3, 0]) * number).tolist()
        (tmp_path / "CT").mkdir(exist_ok=True)
        ds.save_as(tmp_path / "CT" / f"{number}.dcm")
    parts = [("x", codes.SCT.Liver, liver), ("y", codes.SCT.Spleen, kidney * (1 - liver))]
    if kind == "FRACTIONAL":
        parts = [(name, code, part * 0.8) for name, code, part in parts]
    foreign_segmentation(slices[::-1], [(n, c, p[::-1]) for n, c, p in parts], segmentation_type=kind).save_as(
        tmp_path / "seg.dcm"
    )
    found = read_mask(tmp_path / "seg.dcm", tmp_path / "CT")[0].numpy()
    assert np.array_equal(found, np.where(liver, 1, 3 * kidney).T)
    # Of one segment alone all frames share the number.
    foreign_segmentation(slices, parts[:1], segmentation_type=kind).save_as(tmp_path / "seg.dcm")
    assert np.array_equal(read_mask(tmp_path / "seg.dcm", tmp_path / "CT")[0].numpy(), liver.T)


def test_segments_on_a_part_of_the_series(slices, studies, tmp_path):
    """A Segmentation of some slices, in their reverse order, still lands in its place."""
    liver, *_ = blocks()
    ds = foreign_segmentation(slices[10:2:-1], [("x", codes.SCT.Liver, liver[10:2:-1])])
    ds.save_as(tmp_path / "seg.dcm")
    found = read_mask(tmp_path / "seg.dcm", studies / "slices" / "CT")
    assert np.array_equal(found[0].numpy(), liver.T)
    own = read_mask(tmp_path / "seg.dcm")
    place = np.asarray(own.affine) @ [*np.argwhere(own[0].numpy())[0], 1]
    assert np.allclose(np.asarray(found.affine) @ [*np.argwhere(found[0].numpy())[0], 1], place, atol=1e-3)


def structure_file(path, slices, rois):
    """A structure set with contours given in voxels: {name: [(slice, [(i, j), ...]), ...]}."""
    ds = Dataset()
    ds.file_meta = copy.deepcopy(slices[0].file_meta)
    ds.preamble = b"\0" * 128
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.481.3"
    ds.SOPInstanceUID, ds.Modality = "1.2.3", "RTSTRUCT"
    frame = Dataset()
    frame.FrameOfReferenceUID = slices[0].FrameOfReferenceUID
    ds.ReferencedFrameOfReferenceSequence = [frame]
    ds.StructureSetROISequence, ds.ROIContourSequence = [], []
    affine = np.diag([-1, -1, 1, 1]) @ slice_affine(slices)
    for number, (name, contours) in enumerate(rois.items(), start=1):
        roi, item = Dataset(), Dataset()
        roi.ROINumber, roi.ROIName, item.ReferencedROINumber = number, name, number
        item.ContourSequence = []
        for k, points in contours:
            contour = Dataset()
            contour.ContourGeometricType = "CLOSED_PLANAR" if len(points) > 1 else "POINT"
            data = np.column_stack([points, np.full(len(points), k), np.ones(len(points))]) @ affine[:3].T
            contour.ContourData = [f"{value:.3f}" for value in data.ravel()]
            item.ContourSequence.append(contour)
        ds.StructureSetROISequence.append(roi)
        ds.ROIContourSequence.append(item)
    ds.save_as(path, enforce_file_format=True)
    return path


def box(low, high):
    return [(low, low), (high, low), (high, high), (low, high)]


@pytest.mark.parametrize("name", ["SEG.dcm", "RTSTRUCT.dcm"])
def test_the_file_of_an_enhanced_ct_is_a_series(studies, name):
    folder = studies / "enhanced"
    of_file, of_folder = (read_mask(folder / name, series) for series in (folder / "CT" / "CT.dcm", folder / "CT"))
    assert np.array_equal(of_file, of_folder) and np.array_equal(of_file.affine, of_folder.affine)


def test_foreign_structure_set(slices, studies, tmp_path, caplog):
    """A ring by two contours; planes between the slices, the nearest of which counts; points; an unknown ROI."""
    path = structure_file(
        tmp_path / "rt.dcm",
        slices,
        {
            "SpinalCord": [(4, box(2.6, 9.4)), (4, box(4.6, 6.4))],
            "Parotid_L": [(7.1, box(11.5, 13.5)), (7.4, box(11.5, 30.5)), (6.45, box(11.5, 20.5))],
            "PTV 70": [(4, box(1, 20))],
            "Isocenter": [(4, [(5, 5)])],
        },
    )
    mask = read_mask(path, studies / "slices" / "CT")[0].numpy()
    expected = np.zeros(mask.shape, np.uint8)
    expected[3:10, 3:10, 4] = 121
    expected[5:7, 5:7, 4] = 0
    expected[12:14, 12:14, 7] = 18
    expected[12:21, 12:21, 6] = 18
    assert np.array_equal(mask, expected)
    assert "left out: PTV 70;" in caplog.text
    assert "structures that cannot be drawn: Isocenter (without closed contours)" in caplog.text


def test_a_contour_that_is_there_twice_counts_once(slices, studies, tmp_path, caplog):
    """Wherever it begins and whichever way it runs; a hole, by a contour of its own, stays one."""
    outer, hole = box(2.6, 9.4), box(4.6, 6.4)
    contours = [(4, outer), (4, hole), (4, (outer[2:] + outer[:2])[::-1]), (5, outer), (5, outer), (6, outer)]
    path = structure_file(tmp_path / "rt.dcm", slices, {"Liver": contours})
    mask = read_mask(path, studies / "slices" / "CT")[0].numpy()
    expected = np.zeros(mask.shape, np.uint8)
    expected[3:10, 3:10, 4:7] = 1
    expected[5:7, 5:7, 4] = 0
    assert np.array_equal(mask, expected)
    assert "the ROI Liver has 2 contours twice, which are taken once" in caplog.text


def test_what_is_not_as_it_was_drawn_is_said(slices, studies, tmp_path, caplog):
    """Contours that cross, beyond the series on each of its sides, an ROI without an item of contours."""
    above = [(k, box(2.6, 9.4)) for k in range(SIZE[2] - 2, SIZE[2] + 3)]
    rois = {
        "Liver": [(4, box(2.6, 9.4)), (4, box(6.6, 12.4)), (5, box(2.6, 9.4)), (5, box(6.6, 12.4))],
        "Spleen": above,
        "Pancreas": [(9, box(-7.5, 3.5))],
        "Aorta": [(12, box(0, 3))],
        "Brain": [(12, box(-0.5, 3.5))],  # with the outermost voxels, not beyond them
        "Larynx": [(15, box(3, 5))],
    }
    ds = pydicom.dcmread(structure_file(tmp_path / "rt.dcm", slices, rois))
    del ds.ROIContourSequence[-1]
    ds.save_as(tmp_path / "rt.dcm")
    mask = read_mask(tmp_path / "rt.dcm", studies / "slices" / "CT")[0].numpy()
    assert np.count_nonzero(mask[:, :, 4]) == 7 * 7 + 6 * 6 - 2 * 3 * 3
    assert np.count_nonzero(mask == 4) == 4 * 4 and np.count_nonzero(mask == 3) == 2 * 7 * 7
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert said == [
        "the ROI Spleen: 3 of 5 planes of contours lie above or below the series",
        "the ROI Pancreas reaches up to 7 voxels beyond the slices' edges, where it is cut",
        f"{tmp_path / 'rt.dcm'} has structures that cannot be drawn: Larynx (without closed contours)",
        "the ROI Liver has contours that cross each other in 2 planes, first in slice 5 of the series: what both hold "
        "is taken for a hole",
    ]


def test_a_series_that_misses_some_of_the_mask_or_is_another_is_said(slices, studies, tmp_path, mask, caplog):
    """A segmentation's frames beyond it; a series of the same frame of reference that the mask does not name."""
    for number, ds in enumerate(slices[:12]):
        ds.save_as(tmp_path / f"{number}.dcm")
    turned, _ = to_lps(mask, oblique_affine())
    found = read_mask(studies / "slices" / "SEG.dcm", tmp_path)[0].numpy()
    assert np.array_equal(found, turned[:, :, :12])
    lost = 100 * np.count_nonzero(turned[:, :, 12:]) / np.count_nonzero(turned)
    assert f"{lost:.0f} % of what it draws lies outside of the series" in caplog.text
    caplog.clear()
    for file in tmp_path.iterdir():
        ds = pydicom.dcmread(file)
        ds.SeriesInstanceUID, ds.SOPInstanceUID = "1.2.3.9", f"1.2.3.9.{ds.InstanceNumber}"
        ds.save_as(file)
    read_mask(studies / "slices" / "RTSTRUCT.dcm", tmp_path)
    assert f"was drawn on the series {slices[0].SeriesInstanceUID}, and {tmp_path} has others" in caplog.text


def test_masks_that_are_refused(slices, studies, tmp_path):
    series = studies / "slices" / "CT"
    path = structure_file(tmp_path / "rt.dcm", slices, {"PTV": [(4, box(1, 5))]})
    with pytest.raises(InputError, match="contours and no grid; give the CT series .* --series"):
        read_mask(path)
    with pytest.raises(InputError, match=r"no structure of MAISI's vocabulary \(it has: PTV\)"):
        read_mask(path, series)
    structure_file(path, slices, {"Liver": [(400, box(1, 5))]})
    with pytest.raises(InputError, match="covers no voxel of the series"):
        read_mask(path, series)
    ds = pydicom.dcmread(structure_file(path, slices, {"Liver": [(4, box(1, 5))]}))
    ds.ROIContourSequence[0].ContourSequence[0].ContourData[2::3] = ["0", "20", "40", "60"]
    ds.save_as(path)
    with pytest.raises(InputError, match="across the slices of the series"):
        read_mask(path, series)
    ds.ReferencedFrameOfReferenceSequence[0].FrameOfReferenceUID = "1.2.3.4"
    ds.save_as(path)
    with pytest.raises(InputError, match="frame of reference 1.2.3.4 .*allowed is the series that it was drawn on"):
        read_mask(path, series)
    for wrong, message in [(series, "no DICOM Segmentation and no RT"), (tmp_path / "none", "does not exist")]:
        with pytest.raises(InputError, match=message):
            read_mask(wrong)
    for wrong, message in [(path, "no image slice"), (tmp_path / "none", "does not exist")]:
        with pytest.raises(InputError, match=message):
            read_mask(path, wrong)


def test_the_referenced_series_is_found_among_others(slices, studies, tmp_path, mask):
    folder = tmp_path / "mixed"
    folder.mkdir()
    for number, ds in enumerate(slices):
        ds.save_as(folder / f"a{number}.dcm")
        ds.SeriesInstanceUID, ds.SOPInstanceUID = "1.2.3.9", f"1.2.3.9.{number}"
        ds.save_as(folder / f"b{number}.dcm", enforce_file_format=True)
    with pytest.raises(InputError, match="holds 2 DICOM series"):
        read_slices(folder)
    for name in ("SEG.dcm", "RTSTRUCT.dcm"):
        found = read_mask(studies / "slices" / name, folder)[0].numpy()
        assert np.array_equal(found, to_lps(mask, oblique_affine())[0])


def cone(radius, k):
    """A circle of many corners about (20, 18), as wide as `radius` at slice k."""
    angle = np.linspace(0, 2 * np.pi, 200, endpoint=False)
    return list(np.stack([20 + radius(k) * np.cos(angle), 18 + radius(k) * np.sin(angle)], 1))


def test_planes_of_every_second_slice_give_a_whole_organ(slices, studies, tmp_path, caplog):
    """A box of 12 x 12 voxels, and a cone, which must not become one of steps: the shape between is that between."""
    ct = studies / "slices" / "CT"
    drawn = {"Liver": [(k, box(3.5, 15.5)) for k in range(2, 15, 2)]}
    mask = read_mask(structure_file(tmp_path / "rt.dcm", slices, drawn), ct)[0].numpy()
    assert [int(np.count_nonzero(mask[..., k])) for k in range(18)] == [0] * 2 + [144] * 13 + [0] * 3

    def radius(k):
        return 3 + 0.8 * k

    sparse = structure_file(tmp_path / "s.dcm", slices, {"Liver": [(k, cone(radius, k)) for k in range(0, 16, 3)]})
    dense = structure_file(tmp_path / "d.dcm", slices, {"Liver": [(k, cone(radius, k)) for k in range(16)]})
    found, true = (read_mask(path, ct)[0].numpy() > 0 for path in (sparse, dense))
    assert np.array_equal(found[..., ::3], true[..., ::3])
    for k in range(16):
        dice = 2 * (found[..., k] & true[..., k]).sum() / (found[..., k].sum() + true[..., k].sum())
        assert dice > 0.94, k  # by no more than a circle of some voxels is uneven
    areas = found.sum(axis=(0, 1))[:16]
    assert np.all(np.diff(areas) > 0)
    assert "no contours" not in caplog.text


def test_planes_midway_between_slices_leave_no_stripes(slices, studies, tmp_path):
    """Rounded to the nearest even number, planes at 0.5, 1.5, 2.5 ... would fill every second slice alone."""
    drawn = {"Liver": [(k + 0.5, box(3.5, 15.5)) for k in range(2, 8)]}
    mask = read_mask(structure_file(tmp_path / "rt.dcm", slices, drawn), studies / "slices" / "CT")[0].numpy()
    assert [int(np.count_nonzero(mask[..., k])) for k in range(10)] == [0] * 2 + [144] * 6 + [0] * 2


@pytest.mark.parametrize("decimals", [0, 1, 2])
def test_rounded_contours_of_an_oblique_slice_are_of_one_plane(slices, studies, tmp_path, decimals):
    """Four parts in each slice, of various corners, their heights uneven by the rounding: no part is lost.

    They lie a two-hundredth off their slices, as far from one hundredth as from the next.
    """
    drawn = [
        (k, [(x + r * np.cos(a), y + r * np.sin(a)) for a in np.linspace(0, 2 * np.pi, corners, endpoint=False)])
        for k in range(3, 9)
        for x, y, r, corners in ((7.3, 7.4, 2.2, 5), (28.6, 8.2, 4.1, 40), (8.4, 25.1, 5.3, 13), (28.3, 26.7, 7.2, 60))
    ]
    exact = structure_file(tmp_path / "exact.dcm", slices, {"Liver": drawn})
    expected = read_mask(exact, studies / "slices" / "CT")[0].numpy()
    off = structure_file(tmp_path / "off.dcm", slices, {"Liver": [(k + 0.005, points) for k, points in drawn]})
    ds = pydicom.dcmread(off)
    for contour in ds.ROIContourSequence[0].ContourSequence:
        contour.ContourData = [f"{float(value):.{decimals}f}" for value in contour.ContourData]
    ds.save_as(tmp_path / "rounded.dcm")
    found = read_mask(tmp_path / "rounded.dcm", studies / "slices" / "CT")[0].numpy()
    assert np.count_nonzero(expected, axis=(0, 1)).tolist() == [0] * 3 + [np.count_nonzero(expected[..., 3])] * 6 + (
        [0] * 9
    )
    assert np.count_nonzero(found != expected) < 0.06 * np.count_nonzero(expected)  # a centre that lies on an outline


def test_planes_of_finer_slices_are_not_thrown_together(slices, studies, tmp_path):
    """Drawn on slices of a tenth of the distance: by XOR of two of them nothing would be left."""
    drawn = {"Liver": [(2 + k / 10, box(3.5, 15.5)) for k in range(31)]}
    mask = read_mask(structure_file(tmp_path / "rt.dcm", slices, drawn), studies / "slices" / "CT")[0].numpy()
    assert np.count_nonzero(mask, axis=(0, 1)).tolist() == [0] * 2 + [144] * 4 + [0] * 12


@pytest.mark.parametrize(
    "drawn, filled",
    [
        ({26: (1, 10)}, {26: (1, 10)}),
        ({26: (3, 4, 11)}, {26: (3, 4, 11)}),
        ({1: range(1, 14), 26: (3, 4, 11)}, {26: (3, 4, 11)}),
        ({26: (1, 10), 1: (2, 12)}, {26: (1, 10), 1: (2, 12)}),
        ({26: (2, 4)}, {26: (2, 3, 4)}),  # a slice left out
        ({1: (0, 4, 8, 9, 12, 16, 20)}, {1: range(18)}),  # every fourth, and one between; the series has 18
    ],
)
def test_separate_lesions_are_not_joined(slices, studies, tmp_path, caplog, drawn, filled):
    """The distance of two lesions does not say what is usual in their ROI."""
    names = {26: ("Hepatic Tumor", box(20.5, 24.5)), 1: ("Liver", box(18.5, 30.5))}
    rois = {names[label][0]: [(k, names[label][1]) for k in planes] for label, planes in drawn.items()}
    mask = read_mask(structure_file(tmp_path / "rt.dcm", slices, rois), studies / "slices" / "CT")[0].numpy()
    for label, expected in filled.items():
        assert np.flatnonzero((mask == label).any(axis=(0, 1))).tolist() == list(expected)
    assert ("taken for two parts" in caplog.text) == any(
        10 in planes or 11 in planes for planes in filled.values() if len(planes) < 5
    )


def test_a_gap_is_said_and_a_wide_one_stays_open(slices, studies, tmp_path, caplog):
    ct = studies / "slices" / "CT"
    drawn = {
        "Liver": [(k, box(3.5, 15.5)) for k in (0, 1, 2, 5, 6, 7)],
        "Spleen": [(k, box(20.5, 26.5)) for k in (0, 1, 2, 8, 9, 10)],
    }
    mask = read_mask(structure_file(tmp_path / "rt.dcm", slices, drawn), ct)[0].numpy()
    assert [int((mask[..., k] == 1).sum()) for k in range(9)] == [144] * 8 + [0]
    assert [int((mask[..., k] == 3).sum()) for k in range(12)] == [36] * 3 + [0] * 5 + [36] * 3 + [0]
    assert "the ROI Liver has no contours over 15.0 mm (slices 4 to 5 of the series), where its planes are 5.0 mm" in (
        caplog.text
    )
    assert "they are interpolated" in caplog.text
    assert "the ROI Spleen has no contours over 30.0 mm" in caplog.text and "taken for two parts" in caplog.text
    # Of two planes alone nobody knows; the other ROIs of the file tell what is usual.
    drawn["Heart"] = [(1, box(30.5, 34.5)), (12, box(30.5, 34.5))]
    mask = read_mask(structure_file(tmp_path / "rt.dcm", slices, drawn), ct)[0].numpy()
    assert np.flatnonzero((mask == 115).any(axis=(0, 1))).tolist() == [1, 12]


def test_snomed_rt_codes_are_those_of_snomed_ct(slices, tmp_path):
    """As 3D Slicer and dcmqi wrote them until 2020; the side, too."""
    liver, kidney, other = blocks()
    path = tmp_path / "seg.dcm"
    foreign_segmentation(
        slices, [("a", codes.SCT.Liver, liver), ("b", codes.SCT.Kidney, kidney), ("c", codes.SCT.Spleen, other)]
    ).save_as(path)
    ds = pydicom.dcmread(path)
    values, schemes = ("T-62000", "T-71000", "T-C3000"), ("SRT", "SNM3", "99SDM")
    for item, value, scheme in zip(ds.SegmentSequence, values, schemes, strict=True):
        kind = item.SegmentedPropertyTypeCodeSequence[0]
        kind.CodeValue, kind.CodingSchemeDesignator = value, scheme
    modifier = Dataset()
    modifier.CodeValue, modifier.CodingSchemeDesignator, modifier.CodeMeaning = "G-A101", "SRT", "Left"
    ds.SegmentSequence[1].SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence = [modifier]
    ds.save_as(path)
    mask = read_mask(path)[0].numpy()
    assert sorted(np.unique(mask)) == [0, 1, 3, 14]
    assert [int((mask == label).sum()) for label in (1, 3, 14)] == [
        int((liver * (1 - kidney)).sum()),
        int(other.sum()),
        int(kidney.sum()),
    ]
