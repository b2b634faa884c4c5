from __future__ import annotations

import numpy as np
import pytest

from maisi_tools.cohort.spec import draw, read_spec
from maisi_tools.errors import InputError


def test_a_specification_is_read(write_spec):
    spec = read_spec(write_spec(tumors="[{lesion: lung tumor, diameter_mm: [8, 20], probability: 0.5}]"))
    assert (spec.count, spec.seed, spec.layout, spec.format) == (3, 7, "nnunet", "nifti")
    assert spec.masks.request.field_of_view == [240, 240, 160]
    assert spec.tumors[0].diameter_mm == [8, 20]
    assert spec.sample_name(2) == "heads_0002"


def test_paths_are_relative_to_the_file(write_spec, tmp_path):
    spec = read_spec(write_spec(masks="{source: files, path: masks}"))
    assert spec.masks.path == str(tmp_path / "masks")


def test_a_sample_depends_on_seed_and_number_alone(write_spec):
    spec = read_spec(write_spec())
    more = read_spec(write_spec(count="500"))
    other = read_spec(write_spec(seed="8"))
    first = [spec.random(i).random() for i in range(3)]
    assert first == [more.random(i).random() for i in range(3)] and len(set(first)) == 3
    assert first != [other.random(i).random() for i in range(3)]


def test_numbers_and_ranges():
    random = np.random.default_rng(0)
    assert draw(random, 3) == 3.0
    drawn = [draw(random, [2, 4]) for _ in range(200)]
    assert 2 <= min(drawn) < 2.2 and 3.8 < max(drawn) <= 4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"count": "0"}, "count is 0"),
        ({"count": "1.5"}, "count is 1.5"),
        ({"layout": "zip"}, "nnunet, msd, bids, folders"),
        ({"format": "png"}, "nifti, dicom"),
        ({"format": "dicom"}, "layout folders"),
        ({"flip": "2"}, "flip is 2"),
        ({"colour": "red"}, "colour.*allowed are count"),
        ({"name": "a b"}, "letters"),
        ({"ct": "{seed: 4}"}, "seed, which the cohort sets"),
        ({"masks": "{source: files}"}, "no masks.path"),
        ({"masks": "{source: magic}"}, "phantom, files, library, generator"),
        ({"masks": "{region: [tail]}"}, "tail"),
        ({"masks": "{organs: [nose]}"}, "nose"),
        ({"masks": "{source: generator, region: [head]}"}, "organ_sizes"),
        ({"tumors": "[{lesion: liver, diameter_mm: 3}]"}, "no lesion"),
        ({"tumors": "[{lesion: lung tumor}]"}, "no diameter_mm"),
        ({"tumors": "[{lesion: lung tumor, diameter_mm: [9, 3]}]"}, "lowest, highest"),
        ({"tumors": "3"}, "tumors is 3"),
        ({"resize": "{liver: -1}"}, "resize.liver"),
        ({"created": "soon"}, "created is 'soon'"),
    ],
)
def test_wrong_specifications_are_refused(write_spec, change, words):
    with pytest.raises(InputError, match=words):
        read_spec(write_spec(**change))


@pytest.mark.parametrize("text", ["name: [", "3", ""])
def test_what_is_no_specification_is_refused(tmp_path, text):
    (tmp_path / "spec.yaml").write_text(text)
    with pytest.raises(InputError):
        read_spec(tmp_path / "spec.yaml")
    with pytest.raises(InputError, match="absent.yaml"):
        read_spec(tmp_path / "absent.yaml")


def test_no_count(write_spec):
    with pytest.raises(InputError, match="no count"):
        read_spec(write_spec("name: heads"))
