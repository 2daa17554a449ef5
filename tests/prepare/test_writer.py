"""The writer of splits: what it writes, and that no interruption at any point leaves half a file or another result."""

import io
import os
import shutil
from contextlib import redirect_stderr

import numpy as np
import pytest

from lib.cli import InputError, program
from lib.data.dataset import open_split
from lib.data.features import FeatureFile
from lib.prepare.writer import SplitWriter
from tests.damage import refusal
from tests.prepare.interruptions import (
    check_final,
    contents,
    files_at_most,
    final,
    kill,
    press_ctrl_c,
    record_every,
    restore,
    states,
)

IMG_DIM = 4
COUNTS = [3, 1, 2, 5]
SOURCE = {"command": "test", "version": 1}


def make_images(counts=COUNTS, dtype=np.float32):
    rng = np.random.default_rng(0)
    return [(rng.normal(size=(n, IMG_DIM)).astype(dtype), rng.random((n, 4), np.float32)) for n in counts]


def write(folder, counts=COUNTS, dtype=np.float32, boxes=True, source=SOURCE, added=None, split="train"):
    """What a command does: go on with the images that are not there yet, then finish. added: collects their numbers."""
    images = make_images(counts, dtype)
    with SplitWriter(folder, split, source, dtype, boxes) as writer:
        if writer.finished:
            return
        assert writer.position == ([writer.images] if writer.images else None)
        for number in range(writer.images, len(images)):
            features, of_image = images[number]
            writer.add(features, f"id {number}", of_image, [number + 1], (640, 480 + number))
            if added is not None:
                added.append(number)
        captions = [[f"caption {k} of {number}" for k in range(number + 1)] for number in range(len(images))]
        writer.finish(captions, {"missing": "x\n"})


@pytest.fixture
def often(monkeypatch):
    """How far the work has come is recorded at about every second image; nothing waits for the disk."""
    record_every(60, monkeypatch)


@pytest.fixture
def expected(tmp_path):
    """All files of an uninterrupted run."""
    write(tmp_path / "whole")
    return contents(tmp_path / "whole")


def half_way(work, folder):
    """Leave what a kill leaves once something is recorded, before anything is finished."""
    recorded = [state for state in states(work, folder) if "train_progress.json" in state]
    shutil.rmtree(folder)
    restore(folder, recorded[0])
    assert not final(folder)


# What is written


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("counts", [COUNTS, [3, 3, 3]])
def test_a_split_comes_back_to_the_bit(tmp_path, counts, dtype):
    write(tmp_path / "new", counts, dtype)
    images = make_images(counts, dtype)
    split = open_split(str(tmp_path), "new", "train", IMG_DIM)
    assert split.features.dtype == dtype
    assert split.features.counts.tolist() == counts
    assert np.array_equal(split.features.read(np.arange(len(counts))), np.concatenate([f for f, _ in images]))
    assert split.image_of_caption.tolist() == [image for image in range(len(counts)) for _ in range(image + 1)]
    assert split.captions[:3] == ["caption 0 of 0", "caption 0 of 1", "caption 1 of 1"]
    boxes = np.load(tmp_path / "new" / "train_boxes.npy")
    assert boxes.dtype == np.float32
    assert np.array_equal(boxes.reshape(-1, 4), np.concatenate([boxes for _, boxes in images]))
    assert (tmp_path / "new" / "train_ids.txt").read_text().split("\n")[:2] == ["id 0", "id 1"]
    assert (tmp_path / "new" / "train_sizes.txt").read_text().split("\n")[:2] == ["640 480", "640 481"]


@pytest.mark.parametrize(("counts", "varies"), [(COUNTS, True), ([3, 3, 3], False), ([7], False)])
def test_equal_counts_are_stored_in_the_form_of_the_field(tmp_path, counts, varies):
    write(tmp_path, counts)
    shape = (sum(counts), IMG_DIM) if varies else (len(counts), counts[0], IMG_DIM)
    assert np.load(tmp_path / "train_ims.npy").shape == shape
    assert np.load(tmp_path / "train_boxes.npy").shape == (*shape[:-1], 4)
    assert (tmp_path / "train_offsets.npy").exists() == varies


def test_five_captions_each_need_no_counts(tmp_path):
    with SplitWriter(tmp_path / "new", "dev", SOURCE) as writer:
        for number, (features, _) in enumerate(make_images()):
            writer.add(features, str(number))
        writer.finish([[f"caption {number}"] * 5 for number in range(len(COUNTS))])
    assert sorted(contents(tmp_path / "new")) == [
        *("dev_caps.txt", "dev_ids.txt", "dev_ims.npy", "dev_made.json", "dev_offsets.npy")
    ]
    assert len(open_split(str(tmp_path), "new", "dev", IMG_DIM).captions) == 5 * len(COUNTS)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"features": np.zeros((2, 3), np.float32)}, "features of 3 numbers, those before have 4"),
        ({"features": np.zeros((0, 4), np.float32)}, "expected features"),
        ({"features": np.zeros(4, np.float32)}, "expected features"),
        ({"features": np.zeros((2, 4), np.int64)}, "expected features"),
        ({"features": np.full((2, 4), np.nan, np.float32)}, "NaN or infinite"),
        ({"features": np.full((2, 4), np.inf, np.float32)}, "NaN or infinite"),
        ({"features": np.full((2, 4), 70_000, np.float32)}, "beyond the largest number of float16, 65504"),
        ({"boxes": None}, "expected boxes (2, 4)"),
        ({"boxes": np.zeros((3, 4), np.float32)}, "expected boxes (2, 4)"),
        ({"boxes": np.full((2, 4), np.nan, np.float32)}, "expected boxes (2, 4) of finite numbers"),
        ({"boxes": np.array([["a"] * 4] * 2)}, "could not convert"),
        ({"image_id": "a\nb"}, "printable"),
        ({"image_id": ""}, "printable"),
    ],
)
def test_an_image_that_cannot_be_used_is_refused_with_its_origin_and_leaves_no_trace(tmp_path, change, words):
    sound = {"features": np.ones((2, 4), np.float32), "image_id": "7", "boxes": np.ones((2, 4), np.float32)}
    with SplitWriter(tmp_path, "train", SOURCE, np.float16, boxes=True) as writer:
        writer.add(**sound)
        message = refusal(lambda: writer.add(**{**sound, **change}, origin="x.tsv: line 3"))
        writer.finish()
    assert message.startswith("x.tsv: line 3: ")
    assert words in message
    assert np.array_equal(np.load(tmp_path / "train_ims.npy"), np.ones((1, 2, 4)))


def test_a_split_without_images_is_refused(tmp_path):
    with pytest.raises(InputError, match="no images for the split train"):
        write(tmp_path, [])
    assert not final(tmp_path)


# What is there already


def test_a_finished_split_is_not_written_again(tmp_path):
    write(tmp_path)
    before, added = contents(tmp_path), []
    write(tmp_path, added=added)
    assert not added
    assert contents(tmp_path) == before


def test_a_split_made_from_something_else_is_not_touched(tmp_path):
    write(tmp_path)
    before = contents(tmp_path)
    assert "made from something else" in refusal(lambda: write(tmp_path, source={"command": "other"}))
    assert "made from something else" in refusal(lambda: write(tmp_path, dtype=np.float16))
    (tmp_path / "train_made.json").unlink()
    assert "made from something else" in refusal(lambda: write(tmp_path))
    assert contents(tmp_path).items() <= before.items()


@pytest.mark.parametrize("name", ["caps.txt", "ids.txt", "boxes.npy", "caps_counts.txt"])
def test_a_file_of_the_users_is_never_written_over(tmp_path, name):
    (tmp_path / f"train_{name}").write_text("precious")
    assert f"train_{name} is already there" in refusal(lambda: write(tmp_path))
    assert final(tmp_path) == {f"train_{name}": b"precious"}


def test_splits_do_not_get_into_each_others_way(tmp_path):
    write(tmp_path, split="test")
    write(tmp_path, split="testall")
    assert len(FeatureFile(tmp_path / "test_ims.npy")) == len(FeatureFile(tmp_path / "testall_ims.npy")) == len(COUNTS)


def test_work_from_another_source_is_not_gone_on_from(tmp_path, often, expected):
    half_way(lambda: write(tmp_path / "new", [9, 9, 9], source={"command": "other"}), tmp_path / "new")
    added = []
    write(tmp_path / "new", added=added)
    assert added == [0, 1, 2, 3]
    assert contents(tmp_path / "new") == expected


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"[" * 100_000, b"\xff"])
def test_a_damaged_record_means_to_begin_anew(tmp_path, often, expected, damage):
    half_way(lambda: write(tmp_path / "new"), tmp_path / "new")
    (tmp_path / "new" / "train_progress.json").write_bytes(damage)
    write(tmp_path / "new")
    assert contents(tmp_path / "new") == expected


def test_features_shorter_than_the_record_says_mean_to_begin_anew(tmp_path, often, expected):
    half_way(lambda: write(tmp_path / "new"), tmp_path / "new")
    os.truncate(tmp_path / "new" / "train_ims.npy.part", 130)
    write(tmp_path / "new")
    assert contents(tmp_path / "new") == expected


def test_two_at_once_are_refused_and_the_first_goes_on(tmp_path, expected):
    with SplitWriter(tmp_path / "new", "train", SOURCE, boxes=True) as first:
        features, of_image = make_images()[0]
        first.add(features, "id 0", of_image, [1], (640, 480))
        assert "another process is writing it" in refusal(lambda: write(tmp_path / "new"))
    added = []
    write(tmp_path / "new", added=added)
    assert added == [1, 2, 3]
    assert contents(tmp_path / "new") == expected


def test_one_that_was_finished_meanwhile_is_seen(tmp_path, expected):
    late = SplitWriter(tmp_path / "new", "train", SOURCE, boxes=True)
    write(tmp_path / "new")
    with late:
        assert late.finished
    assert contents(tmp_path / "new") == expected


# Interruptions


def test_a_kill_at_any_line_leaves_no_half_file_and_the_rerun_ends_right(tmp_path, often, expected):
    left = states(lambda: write(tmp_path / "new"), tmp_path / "new")
    assert len(left) > 30
    for number, state in enumerate(left):
        folder = tmp_path / str(number)
        restore(folder, state)
        check_final(folder, expected)
        write(folder)
        assert contents(folder) == expected


def test_ctrl_c_at_any_line_leaves_no_half_file_and_the_rerun_ends_right(tmp_path, often, expected):
    folder, stops = tmp_path / "new", 0
    while press_ctrl_c(lambda: write(folder), stops + 1):
        stops += 1
        check_final(folder, expected)
        write(folder)
        assert contents(folder) == expected, f"after Ctrl-C at line {stops}"
        shutil.rmtree(folder)
    assert stops > 300


LINES_BETWEEN_KILLS = 400  # of the writer; finishing alone takes some 300


def test_one_kill_after_the_other_comes_to_the_end(tmp_path, often, expected):
    folder, kills = tmp_path / "new", 0
    while kill(lambda: write(folder), LINES_BETWEEN_KILLS):
        kills += 1
        assert kills < 10
        check_final(folder, expected)
    assert kills >= 2
    assert contents(folder) == expected


def test_a_rerun_goes_on_from_the_last_record(tmp_path, often):
    firsts = set()
    for line in range(40, 320, 40):
        folder, added = tmp_path / str(line), []
        assert kill(lambda folder=folder: write(folder), line)
        write(folder, added=added)
        assert added == list(range(len(COUNTS) - len(added), len(COUNTS)))
        firsts.add(len(COUNTS) - len(added))
    assert firsts == {0, 2, 4}  # a record is made after every second image


def test_a_disk_that_fills_at_any_point_gives_one_line_and_the_rerun_ends_right(tmp_path, often, expected):
    folder, refused = tmp_path / "new", 0
    for size in range(0, 600, 4):
        said = io.StringIO()
        with files_at_most(size), redirect_stderr(said):
            code = program(lambda argv: write(folder))()
        check_final(folder, expected)
        if code:
            refused += 1
            assert code == 2
            assert "could not be written: File too large" in said.getvalue()
            assert len(said.getvalue().splitlines()) == 1
        write(folder)
        assert contents(folder) == expected
        shutil.rmtree(folder)
    assert 50 < refused < 150


def test_what_gets_its_final_name_is_on_the_disk_before(tmp_path, monkeypatch):
    synced, renamed = set(), []
    sync, replace = os.fsync, os.replace

    def record_sync(descriptor):
        sync(descriptor)
        status = os.fstat(descriptor)
        synced.add((status.st_ino, status.st_size, status.st_mtime_ns))

    def record_rename(source, target):
        status = os.stat(source)
        assert (status.st_ino, status.st_size, status.st_mtime_ns) in synced, source
        replace(source, target)
        renamed.append(target.name)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(os, "replace", record_rename)
    write(tmp_path)
    assert set(contents(tmp_path)) <= set(renamed)
    assert renamed[-1] == "train_ims.npy"


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    assert "could not be written" in refusal(lambda: write(tmp_path / "file"))
