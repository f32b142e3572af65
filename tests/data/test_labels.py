"""Label tables as data sets write them, and splits; whatever is wrong in one line."""

import json

import pytest

from mambamim_jax.data.datasets import DatasetError
from mambamim_jax.data.labels import Region, make_split, read_table, take_share

CT = {"channel_names": {"0": "CT"}}
REGIONS = {"background": 0, "whole": [1, 2], "core": 2}
MRI = {"channel_names": {"0": "T1", "1": "T2", "10": "FLAIR", "2": "T1c"}}


def write(folder, **content):
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


def test_nnunet_and_decathlon_tables(tmp_path):
    table = read_table(write(tmp_path, labels={"background": 0, "liver": 2, "spleen": 1}, **CT))
    assert table.names == ("background", "spleen", "liver")
    assert (table.classes, table.foreground, table.channels) == (3, ("spleen", "liver"), ("CT",))
    decathlon = {"labels": {"0": "background", "1": "lung", "2": "cancer"}, "modality": {"0": "CT"}}
    assert read_table(write(tmp_path, **decathlon)).names == ("background", "lung", "cancer")
    table = read_table(write(tmp_path, labels={"background": 0, "a": 1}, **MRI))
    assert table.channels == ("T1", "T2", "T1c", "FLAIR")
    assert read_table(write(tmp_path, labels={"background": 0, "a": 1.0}, **CT)).names == ("background", "a")


def test_regions(tmp_path):
    labels = {"background": 0, "whole": [1, 2, 3], "core": [1, 3], "enhancing": 3}
    table = read_table(write(tmp_path, labels=labels, regions_class_order=[2, 1, 3], **MRI))
    assert table.regions == (
        Region("whole", (1, 2, 3), 2),
        Region("core", (1, 3), 1),
        Region("enhancing", (3,), 3),
    )
    assert table.classes == 3
    assert table.names == ("background", "label_1", "label_2", "enhancing")
    with pytest.raises(DatasetError, match="regions_class_order None, expected the value that each of whole"):
        read_table(write(tmp_path, labels=labels, **MRI))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({}, "expected labels and channel_names"),
        ({"labels": {"background": 0, "liver": 2}, **CT}, r"label values \[0, 2\]"),
        ({"labels": {"background": 0}, **CT}, r"label values \[0\]"),
        ({"labels": {"background": 0, "liver": None}, **CT}, "without a gap"),
        ({"labels": {"background": 0, "liver": 1, "ignore": 2}, **CT}, "an 'ignore' label"),
        ({"labels": {"background": 0, "liver": 1}, "channel_names": ["CT"]}, "channel_names"),
        ({"labels": {"background": 0, "liver": 1}, "channel_names": {"CT": 0}}, r"channel_names {'CT': 0}"),
        ({"labels": {"background": "0", "liver": "1"}, **CT}, "labels {'background': '0', 'liver': '1'}"),
        ({"labels": {"background": 0, "a": 1, "b": []}, **CT}, r"'b': \[\]}, expected such as"),
        ({"labels": {"background": 0, "a": 1.5}, **CT}, "'a': 1.5}, expected such as"),
        (
            {"labels": REGIONS, "regions_class_order": [[1], 2], **CT},
            r"regions_class_order \[\[1\], 2\], expected",
        ),
        (
            {"labels": REGIONS, "regions_class_order": [1, 1], **CT},
            r"regions_class_order \[1, 1\], expected .* none twice",
        ),
        ({"labels": REGIONS, "regions_class_order": [0, 2], **CT}, r"\[0, 2\], expected .* not 0"),
    ],
)
def test_tables_that_cannot_be(tmp_path, content, says):
    with pytest.raises(DatasetError, match=says) as caught:
        read_table(write(tmp_path, **content))
    assert "\n" not in str(caught.value)
    assert "dataset.json" in str(caught.value)


def test_no_table(tmp_path):
    with pytest.raises(DatasetError, match="no such file"):
        read_table(tmp_path)


IDS = [f"case_{n}" for n in range(10)]


def test_random_splits_are_seeded():
    split = make_split(IDS, None, held_out=0.3, seed=1)
    assert len(split.held_out) == 3
    assert sorted(split.train + split.held_out) == IDS
    assert split == make_split(IDS[::-1], None, held_out=0.3, seed=1)
    assert split != make_split(IDS, None, held_out=0.3, seed=2)
    with pytest.raises(DatasetError, match="1 labelled cases, expected at least 2"):
        make_split(IDS[:1], None)


def test_split_files(tmp_path):
    file = tmp_path / "splits_final.json"
    folds = [{"train": IDS[2:], "val": IDS[:2]}, {"train": IDS[:2], "val": IDS[1:]}]
    folds += [{"train": IDS[2:], "val": [*IDS[:2], "case_3", "case_3"]}]
    file.write_text(json.dumps(folds))
    assert make_split(IDS, file).held_out == ("case_0", "case_1")
    for ids, fold, says in (
        (IDS, 3, "no fold 3, it has 3"),
        (IDS[:-1], 0, "names 1 cases without an image and a label, first 'case_9'"),
        (IDS, 1, "case 'case_1' in both train and val"),
        (IDS, 2, "fold 2 names case 'case_3' twice on one side"),
    ):
        with pytest.raises(DatasetError, match=says):
            make_split(ids, file, fold=fold)
    file.write_text("[{}]")
    with pytest.raises(DatasetError, match="expected a list of"):
        make_split(IDS, file)


def test_shares_are_nested():
    small, large = take_share(IDS, 0.2, 3), take_share(IDS, 0.5, 3)
    assert (len(small), len(large)) == (2, 5)
    assert set(small) < set(large)
    assert take_share(IDS, 1.0, 3) == tuple(IDS)
    assert len(take_share(IDS, 0.01, 3)) == 1
