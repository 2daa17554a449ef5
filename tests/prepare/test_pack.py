"""`prepare pack`: the same data in float16, one row an image."""

import shutil

import numpy as np
import pytest

from lib.data.dataset import read_boxes, read_ids
from lib.prepare.io import open_features
from tests.prepare.samples import contents, prepare, write_lines

REGIONS, IMG_DIM = 3, 4
COUNTS = [2, 1, 4, 3]
SPLITS = ("train", "dev", "test", "all")


def write_source(folder, dtype=np.float32):
    """train: one row an image. dev: five. test: varying numbers of regions and captions. all: no captions, no ids."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)

    def make(*shape):
        return rng.normal(size=shape).astype(dtype)

    np.save(folder / "train_ims.npy", make(7, REGIONS, IMG_DIM))
    np.save(folder / "train_boxes.npy", rng.random((7, REGIONS, 4), np.float32))
    np.save(folder / "dev_ims.npy", make(4, REGIONS, IMG_DIM).repeat(5, axis=0))
    np.save(folder / "dev_boxes.npy", rng.random((4, REGIONS, 4), np.float32))
    np.save(folder / "dev_objects.npy", rng.random((4, REGIONS, 2), np.float32))
    np.save(folder / "test_ims.npy", make(sum(COUNTS), IMG_DIM))
    np.save(folder / "test_boxes.npy", rng.random((sum(COUNTS), 4), np.float32))
    np.save(folder / "test_offsets.npy", np.cumsum([0, *COUNTS]))
    np.save(folder / "all_ims.npy", make(5, REGIONS, IMG_DIM))
    for split, captions in (("train", 35), ("dev", 20), ("test", 8)):
        write_lines(folder / f"{split}_caps.txt", [f"{split} läuft {k}" for k in range(captions)])
    write_lines(folder / "test_caps_counts.txt", [1, 4, 1, 2])
    write_lines(folder / "train_ids.txt", range(70, 77))
    write_lines(folder / "dev_ids.txt", np.arange(10, 14).repeat(5))
    write_lines(folder / "test_ids.txt", ["a.jpg", "b.jpg", "c.jpg", "d.jpg"])
    return folder


@pytest.fixture
def folder(tmp_path):
    return write_source(tmp_path / "some_precomp")


@pytest.fixture
def run(tmp_path, capsys):
    """Runs the command: what it printed, and its error."""
    flags = ["--data_path", tmp_path, "--data_name", "some_precomp"]
    return lambda *more: prepare(capsys, "pack", *flags, *more)[1:]


def packed(folder):
    return folder.with_name("some_precomp_packed")


def features(folder, split):
    file = open_features(folder, split).features
    return file.read(np.arange(len(file)))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_every_split_is_the_same_in_float16(tmp_path, run, dtype):
    folder = write_source(tmp_path / "some_precomp", dtype)
    out, _ = run()
    assert [line.split()[:2] for line in out.splitlines()[3:]] == [
        ["train", "7"],
        ["dev", "4"],
        ["test", "4"],
        ["all", "5"],
    ]
    for split in SPLITS:
        one, other = open_features(folder, split), open_features(packed(folder), split)
        assert other.features.dtype == np.float16
        assert np.array_equal(features(packed(folder), split), features(folder, split).astype(np.float16))
        assert other.features.counts.tolist() == one.features.counts.tolist()
        assert other.captions == one.captions
        assert other.image_of_caption.tolist() == one.image_of_caption.tolist()
        assert read_ids(other) == (read_ids(one) or ["0", "1", "2", "3", "4"])
        assert (split == "all") == (read_boxes(one) is None)
        assert np.array_equal(read_boxes(other), read_boxes(one)) or split == "all"


def test_repeated_rows_are_one_for_each_image_and_varying_numbers_keep_their_offsets(folder, run, capsys):
    run()
    assert np.load(packed(folder) / "dev_ims.npy").shape == (4, REGIONS, IMG_DIM)
    assert np.load(packed(folder) / "dev_boxes.npy").shape == (4, REGIONS, 4)
    assert np.load(packed(folder) / "dev_objects.npy").shape == (4, REGIONS, 2)
    assert (packed(folder) / "dev_ids.txt").read_text() == "10\n11\n12\n13\n"
    assert np.load(packed(folder) / "test_offsets.npy").tolist() == [0, 2, 3, 7, 10]
    assert (packed(folder) / "test_caps_counts.txt").read_text() == "1\n4\n1\n2\n"
    assert not list(packed(folder).glob("train_offsets*")) + list(packed(folder).glob("*/train_caps_counts*"))
    name = packed(folder).name
    assert prepare(capsys, "verify", "--data_path", folder.parent, "--data_name", name)[0] == 0


def test_gpos_layout_is_packed_too(folder, run, tmp_path):
    shutil.move(folder, tmp_path / "precomp")
    run("--data_name", "precomp", "--to", "some/packed")
    expected = features(tmp_path / "precomp", "train").astype(np.float16)
    assert np.array_equal(features(tmp_path / "some" / "packed", "train"), expected)


def test_the_data_set_itself_is_not_replaced(folder, run):
    before = contents(folder)
    assert "is already there; delete it, or choose another --to" in run("--to", "some_precomp")[1]
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("split", "place", "row", "value", "words"),
    [
        ("train", 5, 5, 65520, "a feature beyond float16's limit, 65504"),
        ("dev", slice(10, 15), 10, -1e30, "a feature beyond float16's limit, 65504"),
        ("test", 5, 5, 1e6, "a feature beyond float16's limit, 65504"),
        ("train", 5, 5, np.nan, "NaN or infinite"),
    ],
)
def test_what_float16_cannot_hold_is_refused_with_file_and_row(folder, run, split, place, row, value, words):
    rows = np.load(folder / f"{split}_ims.npy")
    rows[place] = np.where(np.arange(IMG_DIM) == 1, np.float32(value), rows[place])
    np.save(folder / f"{split}_ims.npy", rows)
    assert run()[1].startswith(f"error: {folder / f'{split}_ims.npy'}: row {row} holds {words}")
    assert [path.name for path in folder.parent.iterdir()] == ["some_precomp"]


def test_what_float16_can_just_hold_is_packed(folder, run):
    rows = np.load(folder / "train_ims.npy")
    rows[3, 1, 2] = 65519
    np.save(folder / "train_ims.npy", rows)
    assert run()[1] == ""
    assert np.load(packed(folder) / "train_ims.npy").max() == 65504
