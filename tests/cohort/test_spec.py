from __future__ import annotations

import numpy as np
import pytest

from maisi_tools.cohort.spec import draw, draw_seed, read_spec
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


def test_paths_are_the_same_from_everywhere(write_spec, tmp_path, monkeypatch):
    """From its folder, from below, and through a link to the folder; a label map's, too, unless it has a known name."""
    path = write_spec(masks="{source: files, path: masks, label_map: map.json}")
    (tmp_path / "map.json").write_text('{"1": "liver"}')
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "link").symlink_to(tmp_path)
    for folder, given in ((tmp_path, path.name), (tmp_path / "below", f"../{path.name}"), ("/", path)):
        monkeypatch.chdir(folder)
        masks = read_spec(given).masks
        assert (masks.path, masks.label_map) == (str(tmp_path / "masks"), str(tmp_path / "map.json"))
    assert read_spec(tmp_path / "below" / "link" / path.name).masks.path == str(tmp_path / "masks")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "btcv").touch()
    assert read_spec(write_spec(masks="{source: files, path: masks, label_map: btcv}")).masks.label_map == "btcv"


def test_a_sample_depends_on_seed_and_number_alone(write_spec):
    spec = read_spec(write_spec())
    more = read_spec(write_spec(count="500"))
    other = read_spec(write_spec(seed="8"))
    first = [spec.random(i).random() for i in range(3)]
    assert first == [more.random(i).random() for i in range(3)] and len(set(first)) == 3
    most = read_spec(write_spec(count="10002"))
    assert [one.sample_name(2) for one in (spec, more, most)] == ["heads_0002"] * 3
    assert most.sample_name(10_001) == "heads_10001"
    assert not set(first) & {other.random(i).random() for i in range(3)}  # seed 7's second is not seed 8's first


def test_no_two_samples_have_one_seed(write_spec):
    """Of 31 bits these two numbers had one, and samples of one mask then the same bytes and patient."""
    first, large = read_spec(write_spec(seed="0")), read_spec(write_spec(seed=str(2**32)))
    seeds = [draw_seed(one.random(i)) for one, i in ((first, 10548), (first, 56884), (first, 1), (large, 0))]
    assert len(set(seeds)) == 4 and max(seeds) > 2**32
    assert all(0 <= seed < 2**53 for seed in seeds)


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
        ({"name": "/x"}, "name is '/x'"),
        ({"name": "é"}, "letters"),
        ({"name": "x" * 65}, "up to 64"),
        ({"count": "1000001"}, "from 1 to 1000000"),
        ({"seed": "-1"}, "seed is -1"),
        ({"seed": str(2**63)}, "from 0 to 9223372036854775807"),
        ({"retries": "101"}, "from 0 to 100"),
        ({"ct": "{seed: 4}"}, "seed, which the cohort sets"),
        ({"ct": "{solver: $print(1)}"}, "ct.solver is '.print"),
        ({"ct": "{hu_ranges: {liver: ['@seed', 3]}}"}, r"ct.hu_ranges.liver\[0\] is '@seed'"),
        ({"ct": "{spacing: {_target_: os.getcwd}}"}, "the key '_target_'"),
        ({"ct": "{'network_def#unet': 3}"}, "the key 'network_def#unet'"),
        ({"ct": "3"}, "ct is 3"),
        ({"masks": "{source: generator, settings: {solver: $print(1)}}"}, "masks.settings.solver is"),
        ({"masks": "{source: generator, organ_sizes: {$x: 3}}"}, "masks.organ_sizes has the key"),
        ({"masks": "{source: generator, organ_sizes: {left parotid: 300000}}"}, "from 0.001 to 200000"),
        ({"masks": "{source: generator, organ_sizes: 3}"}, "organ_sizes is 3"),
        ({"masks": "3"}, "masks is 3"),
        ({"masks": "{spacing: [0.01, 1, 1]}"}, "spacing is .0.01, 1, 1.; allowed are three numbers from 0.1 to 20"),
        ({"masks": "{spacing: [1, 1]}"}, "three numbers from 0.1"),
        ({"masks": "{spacing: [1, 1, .inf]}"}, "three numbers from 0.1"),
        ({"masks": "{spacing: 4}"}, "spacing is 4"),
        ({"masks": "{field_of_view: [2501, 300, 300]}"}, "three numbers from 10 to 2500"),
        ({"masks": "{field_of_view: abc}"}, "field_of_view is 'abc'"),
        ({"masks": "{field_of_view: [2500, 2500, 2500], spacing: [1, 1, 1]}"}, r"1.56e\+10 voxels"),
        ({"masks": "{region: head}"}, "masks.region is 'head'; allowed is a list"),
        ({"masks": "{organs: [3]}"}, r"masks.organs is \[3\]"),
        ({"masks": "{source: files, path: 3, label_map: 3}"}, "label_map is 3"),
        ({"tumors": "[{lesion: 3, diameter_mm: 3}]"}, "the lesion 3"),
        ({"tumors": "[{lesion: lung tumor, diameter_mm: 301}]"}, "from 0.1 to 300"),
        ({"tumors": "[{lesion: lung tumor, diameter_mm: [3, .inf]}]"}, "from 0.1 to 300"),
        ({"tumors": "[{lesion: lung tumor, diameter_mm: true}]"}, "from 0.1 to 300"),
        ({"resize": "{liver: 21}"}, "from 0.05 to 20"),
        ({"resize": "{3: 2}"}, "resize has the key 3"),
        ({"resize": "3"}, "resize is 3"),
        ({"masks": "{source: files}"}, "no masks.path"),
        ({"masks": "{source: magic}"}, "phantom, files, library, generator"),
        ({"masks": "{region: [tail]}"}, "region tail is unknown; allowed are head"),
        ({"masks": "{organs: [nose]}"}, "'nose' is no label; allowed are"),
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


def test_bounds_are_allowed_themselves(write_spec):
    spec = read_spec(
        write_spec(
            count="1000000", resize="{liver: [0.05, 20]}", tumors="[{lesion: lung tumor, diameter_mm: [0.1, 300]}]"
        )
    )
    assert spec.count == 1_000_000 and spec.sample_name(7) == "heads_0007"
    assert spec.resize["liver"] == [0.05, 20] and spec.tumors[0].diameter_mm == [0.1, 300]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: [", "cannot be read as YAML .while parsing a flow node"),
        ("3", "spec.yaml is 3; allowed is a mapping with some of count, name"),
        ("", "spec.yaml is None; allowed is a mapping"),
        ("[" * 5000, "cannot be read as YAML"),
        ("count: 3\ncreated: 2026-13-45", "cannot be read as YAML .month must be in"),
    ],
)
def test_what_is_no_specification_is_refused(tmp_path, text, words):
    (tmp_path / "spec.yaml").write_text(text)
    with pytest.raises(InputError, match=words):
        read_spec(tmp_path / "spec.yaml")
    with pytest.raises(InputError, match="absent.yaml"):
        read_spec(tmp_path / "absent.yaml")


def test_no_count(write_spec):
    with pytest.raises(InputError, match="no count"):
        read_spec(write_spec("name: heads"))
