"""`prepare verify`: silent on sound data, and each fault of a data set is found, named and does not hide the others."""

import os
import shutil

import numpy as np
import pytest

from lib.data.dataset import open_split
from tests.prepare.samples import prepare, write_lines

IMAGES = {"train": 12, "dev": 4, "testall": 6}
REGIONS, IMG_DIM = 3, 4
FIRST_ID = {"train": 100, "dev": 200, "testall": 300}


def write_split(folder, split, features, ids, repeats=1):
    np.save(folder / f"{split}_ims.npy", features.repeat(repeats, axis=0))
    write_lines(folder / f"{split}_caps.txt", [f"{k} of {one} in {split}" for one in ids for k in range(5)])
    write_lines(folder / f"{split}_ids.txt", ids)
    np.save(folder / f"{split}_boxes.npy", np.ones((*features.shape[:2], 4), np.float32))


@pytest.fixture
def folder(tmp_path):
    """A sound data set: dev and testall hold each image five times; test is the beginning of testall."""
    folder = tmp_path / "some_precomp"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for split, images in IMAGES.items():
        features = rng.normal(size=(images, REGIONS, IMG_DIM)).astype(np.float32)
        ids = range(FIRST_ID[split], FIRST_ID[split] + images)
        write_split(folder, split, features, ids, 1 if split == "train" else 5)
    write_split(folder, "test", features[:2], list(ids)[:2])
    return folder


@pytest.fixture
def run(folder, capsys):
    """Runs the command: what it printed, and its error."""
    flags = ("--data_path", folder.parent, "--data_name", folder.name)
    return lambda *more: prepare(capsys, "verify", *flags, *more)[1:]


def findings(out, kind):
    return [line.removeprefix(f"{kind}  ") for line in out.splitlines() if line.startswith(f"{kind}  ")]


def change(path, act):
    """Store what `act` makes of an array."""
    np.save(path, act(np.load(path)))


# Sound data


def test_sound_data_is_a_table_and_nothing_else(folder, run):
    out, err = run()
    assert err == ""
    header, *rows = out.split("\n\n")[0].splitlines()
    assert header.split()[:4] == ["split", "images", "rows", "regions"]
    assert [row.split()[:8] for row in rows] == [
        ["train", "12", "1", "3", "4", "float32", "60", "5"],
        ["dev", "4", "5", "3", "4", "float32", "20", "5"],
        ["test", "2", "1", "3", "4", "float32", "10", "5"],
        ["testall", "6", "5", "3", "4", "float32", "30", "5"],
    ]
    for row in rows:
        assert row.split()[-1] == open_split(str(folder.parent), folder.name, row.split()[0]).fingerprint()
    assert out.endswith(f"\n\n{folder}: no faults\n")


def test_varying_numbers_are_said_as_ranges(folder, run):
    counts = np.array([2, 1, 4, 3])
    np.save(folder / "dev_ims.npy", np.random.default_rng(1).normal(size=(10, IMG_DIM)).astype(np.float16))
    np.save(folder / "dev_offsets.npy", np.cumsum([0, *counts]))
    np.save(folder / "dev_boxes.npy", np.ones((10, 4), np.float32))
    write_lines(folder / "dev_caps_counts.txt", [1, 2, 7, 3])
    write_lines(folder / "dev_caps.txt", [f"caption {k}" for k in range(13)])
    out, err = run()
    assert err == ""
    (row,) = (line for line in out.splitlines() if line.startswith("dev "))
    row = row.replace(" (median 2.5)", "")  # of regions and of captions
    assert row.split()[1:-2] == ["4", "1", "1", "to", "4", "4", "float16", "13", "1", "to", "7"]


def test_ids_that_only_number_the_images_tell_nothing_of_leaks(folder, run):
    for split, images in IMAGES.items():
        write_lines(folder / f"{split}_ids.txt", range(images))
    assert run()[1] == ""


def test_ids_five_times_in_a_row_are_those_of_the_images(folder, run):
    write_lines(folder / "dev_ids.txt", np.arange(200, 204).repeat(5))
    assert run()[1] == ""


def test_a_store_of_features_needs_no_captions(folder, run):
    np.save(folder / "all_ims.npy", np.load(folder / "train_ims.npy"))
    shutil.copy(folder / "train_ids.txt", folder / "all_ids.txt")
    out, err = run()
    assert err == ""
    assert findings(out, "note") == ["all: no captions; features to make splits from"]


def test_what_is_odd_but_no_fault_is_a_note(folder, run):
    (folder / "dev_ids.txt").unlink()
    write_lines(folder / "train_caps.txt", ["the same"] * 3 + [f"caption {k}" for k in range(57)])
    out, err = run()
    assert err == ""
    assert findings(out, "fault") == []
    notes = findings(out, "note")
    assert len(notes) == 2
    assert notes[0].startswith("train_caps.txt: repeated captions: 2")
    assert notes[1].startswith("dev: no dev_ids.txt")


def test_a_picture_or_two_in_very_many_is_no_fault(folder, run):
    features = np.random.default_rng(1).normal(size=(2000, 1, IMG_DIM)).astype(np.float32)
    features[1999] = features[3]
    write_split(folder, "train", features, range(1000, 3000))
    out, err = run()
    assert err == ""
    (note,) = findings(out, "note")
    assert note == "train_ims.npy: 1 row (1999) with the features of an image before"


# Faults


def poke(place, value):
    def act(array):
        array[place] = value
        return array

    return act


def array(name, act):
    return lambda folder: change(folder / f"{name}.npy", act)


def lines(name, change):
    def act(folder):
        write_lines(folder / name, change((folder / name).read_text().splitlines()))

    return act


def raw(name, content):
    return lambda folder: (folder / name).write_bytes(content)


FAULTS = {
    "NaN": (array("train_ims", poke([3, 5], np.nan)), "train_ims.npy: NaN or infinite features in 2 rows (3, 5)"),
    "NaN in a repeated row": (array("testall_ims", poke((8, 0, 0), np.nan)), "infinite features in 1 row (8)"),
    "repeated rows that differ": (
        array("testall_ims", poke((11, 0, 0), 1)),
        "testall_ims.npy: holds each image five times, but not the same in 1 place (rows 10 to 14)",
    ),
    "images alike": (
        array("train_ims", lambda rows: poke(slice(4, 6), rows[0])(rows)),
        "train_ims.npy: 2 rows (4, 5) with the features of an image before",
    ),
    "too few ids": (lines("train_ids.txt", lambda ids: ids[:11]), "train_ids.txt: 11 ids do not fit 12 images"),
    "an id twice": (
        lines("train_ids.txt", lambda ids: [*ids[:11], ids[3]]),
        "train_ids.txt: 1 id (103) more than once",
    ),
    "ids not in fives": (
        lines("dev_ids.txt", lambda ids: [*np.repeat(ids, 5)[:19], "9"]),
        "dev_ids.txt: line 20 differs",
    ),
    "train in dev": (
        lines("dev_ids.txt", lambda ids: [*ids[:3], "105"]),
        "train and dev share 1 image (105) by id",
    ),
    "train in dev under other ids": (
        lambda folder: np.save(folder / "dev_ims.npy", np.load(folder / "train_ims.npy")[[2, 3, 9, 4]]),
        "train and dev share 4 images (2, 3, 4, 9) by features, as numbered in train",
    ),
    "boxes that are NaN": (
        array("dev_boxes", poke((0, 0, 0), np.nan)),
        "make it again (NaN or infinite)",
    ),
    "boxes of half the images": (
        array("dev_boxes", lambda boxes: boxes[:2]),
        "dev_boxes.npy: no boxes of these features",
    ),
    "another feature size": (
        array("dev_ims", lambda rows: rows[..., :2]),
        "features of different size, no model takes both: train 4, dev 2, test 4, testall 4",
    ),
    "captions not UTF-8": (raw("dev_caps.txt", b"caf\xe9\n" * 20), "dev_caps.txt: line 1 is not UTF-8"),
    "too few captions": (lines("dev_caps.txt", lambda lines: lines[1:]), "dev_caps.txt: 19 captions do not fit"),
    "a truncated file": (lambda folder: os.truncate(folder / "dev_ims.npy", 200), "dev_ims.npy: truncated"),
    "no captions": (lambda folder: (folder / "dev_caps.txt").unlink(), "dev_caps.txt is missing"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_named_and_the_only_one(folder, run, fault):
    damage, words = FAULTS[fault]
    damage(folder)
    out, err = run()
    (said,) = findings(out, "fault")
    assert words in said
    assert err == f"error: {folder}: 1 fault\n"


def test_a_broken_split_does_not_hide_the_faults_of_the_others(folder, run):
    for fault in ("NaN", "repeated rows that differ", "captions not UTF-8", "an id twice"):
        FAULTS[fault][0](folder)
    out, err = run()
    assert err == f"error: {folder}: 4 faults\n"
    assert len(findings(out, "fault")) == 4
    assert [line.split()[0] for line in out.split("\n\n")[0].splitlines()] == ["split", "train", "test", "testall"]
