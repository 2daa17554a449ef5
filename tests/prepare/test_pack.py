"""`prepare pack`: the same data in float16, one row an image, whatever interrupts it; and what it says of rounding."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from lib.data.dataset import open_split
from lib.data.features import FeatureFile
from lib.evaluation import rounding
from lib.evaluation.matcher import load_matcher
from lib.evaluation.rounding import compare_scores
from lib.prepare import pack, writer
from lib.prepare.__main__ import main
from lib.prepare.splits import open_any, read_boxes, read_ids, read_sizes
from tests.prepare.interruptions import check_final, contents, kill, record_every

REGIONS, IMG_DIM = 3, 4
COUNTS = [2, 1, 4, 3]
SPLITS = ("train", "dev", "test", "all")


def write_lines(path, lines):
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def write_source(folder, dtype=np.float32):
    """train: one row an image. dev: five. test: varying numbers of regions and captions. all: no captions, no ids."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)

    def make(*shape):
        return rng.normal(size=shape).astype(dtype)

    np.save(folder / "train_ims.npy", make(7, REGIONS, IMG_DIM))
    np.save(folder / "train_boxes.npy", rng.random((7, REGIONS, 4), np.float32))
    np.save(folder / "dev_ims.npy", make(4, REGIONS, IMG_DIM).repeat(5, axis=0))
    np.save(folder / "dev_boxes.npy", rng.random((4, REGIONS, 4), np.float32).repeat(5, axis=0))
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
    write_lines(folder / "test_sizes.txt", [f"640 {height}" for height in range(480, 484)])
    return folder


@pytest.fixture
def folder(tmp_path):
    return write_source(tmp_path / "some_precomp")


def pack_it(folder, *flags):
    return main(["pack", "--data_path", str(folder.parent), "--data_name", "some_precomp", *flags])


@pytest.fixture
def run(folder, capsys):
    """Runs the command: what it printed, and its error."""

    def run(*flags):
        code = pack_it(folder, *flags)
        out, err = capsys.readouterr()
        assert (code, len(err.splitlines())) in ((0, 0), (2, 1)), err
        return out, err

    return run


def packed(folder):
    return folder.with_name("some_precomp_packed")


def features(folder, split):
    file = open_any(folder.parent, folder.name, split).features
    return file.read(np.arange(len(file)))


def rows_of(folder, split):
    return np.load(folder / f"{split}_ims.npy")


# What is packed


@pytest.mark.parametrize("split", SPLITS)
def test_a_split_is_the_same_in_float16(folder, run, split):
    assert run()[1] == ""
    one, other = (open_any(folder.parent, at.name, split) for at in (folder, packed(folder)))
    assert other.features.dtype == np.float16
    assert np.array_equal(features(packed(folder), split), features(folder, split).astype(np.float16))
    assert other.features.counts.tolist() == one.features.counts.tolist()
    assert other.captions == one.captions
    assert other.image_of_caption.tolist() == one.image_of_caption.tolist()
    assert read_ids(other) == (read_ids(one) or ["0", "1", "2", "3", "4"])
    assert read_sizes(other) == read_sizes(one)
    assert (split == "all") == (read_boxes(one) is None)
    assert np.array_equal(read_boxes(other), read_boxes(one)) or split == "all"


def test_repeated_rows_ids_and_boxes_are_one_for_each_image(folder, run):
    assert len(rows_of(folder, "dev")) == 20
    run()
    assert rows_of(packed(folder), "dev").shape == (4, REGIONS, IMG_DIM)
    assert np.load(packed(folder) / "dev_boxes.npy").shape == (4, REGIONS, 4)
    assert (packed(folder) / "dev_ids.txt").read_text() == "10\n11\n12\n13\n"


def test_varying_numbers_stay_one_after_the_other_with_offsets(folder, run):
    run()
    assert rows_of(packed(folder), "test").shape == (sum(COUNTS), IMG_DIM)
    assert np.load(packed(folder) / "test_offsets.npy").tolist() == [0, 2, 3, 7, 10]
    assert (packed(folder) / "test_caps_counts.txt").read_text() == "1\n4\n1\n2\n"
    assert not list(packed(folder).glob("train_offsets*"))
    assert not list(packed(folder).glob("train_caps_counts*"))


def test_float16_stays_as_it_is(tmp_path, run, folder):
    shutil.rmtree(folder)
    write_source(folder, np.float16)
    out, err = run()
    assert err == ""
    assert "nothing was rounded" in out
    for split in SPLITS:
        assert np.array_equal(features(packed(folder), split), features(folder, split))


def test_layouts_of_scan_and_of_gpo_stand_side_by_side(folder, run, tmp_path):
    other = write_source(tmp_path / "other" / "precomp", np.float16)
    shutil.move(other, tmp_path / "precomp")
    run()
    assert np.array_equal(features(packed(folder), "train"), features(folder, "train").astype(np.float16))
    shutil.rmtree(packed(folder))
    shutil.rmtree(folder)
    run("--to", "some/packed")
    assert np.array_equal(features(tmp_path / "some" / "packed", "train"), features(tmp_path / "precomp", "train"))


def test_what_is_packed_has_no_faults(folder, run, capsys):
    run()
    assert main(["verify", "--data_path", str(folder.parent), "--data_name", packed(folder).name]) == 0


def test_packing_loads_no_evaluation(folder):
    flags = ["pack", "--data_path", str(folder.parent), "--data_name", folder.name]
    code = f"import sys; from lib.prepare.__main__ import main; assert main({flags!r}) == 0; "
    code += "assert not [name for name in sys.modules if name.startswith('lib.evaluation')]"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(pack.__file__).parents[2], capture_output=True)


# Interruptions


@pytest.fixture
def often(monkeypatch):
    """How far the work has come is recorded at about every second image; nothing waits for the disk."""
    record_every(40, monkeypatch)


@pytest.fixture
def expected(folder, often, capsys):
    """All files of an uninterrupted run, which is moved out of the way."""
    pack_it(folder)
    capsys.readouterr()
    files = contents(packed(folder))
    shutil.rmtree(packed(folder))
    return files


def test_a_kill_at_any_point_leaves_no_half_file_and_the_rerun_ends_right(folder, expected):
    kills = 0
    for line in range(1, 100_000, 29):  # the writer's own tests: at each
        if not kill(lambda: pack_it(folder), line):
            break
        kills += 1
        check_final(packed(folder), expected)
        assert pack_it(folder) == 0
        assert contents(packed(folder)) == expected, f"after a kill at line {line}"
        shutil.rmtree(packed(folder), ignore_errors=True)
    assert kills > 50


def test_one_kill_after_the_other_comes_to_the_end(folder, expected):
    kills = 0
    while kill(lambda: pack_it(folder), 400 + 50 * kills):
        kills += 1
        check_final(packed(folder), expected)
    assert kills >= 2
    assert contents(packed(folder)) == expected


def test_a_rerun_reads_only_what_is_not_there(folder, expected, monkeypatch):
    add, read, seen = writer.SplitWriter.add, FeatureFile.read, []

    def add_two_of_dev(self, *given):
        if (self.split, self.images) == ("dev", 2):
            raise KeyboardInterrupt
        add(self, *given)

    def see(self, images):
        seen.append((self.path.name, images.tolist()))
        return read(self, images)

    with monkeypatch.context() as patch:
        patch.setattr(writer.SplitWriter, "add", add_two_of_dev)
        assert pack_it(folder) == 130
    assert {path.name for path in packed(folder).glob("*_ims.npy")} == {"train_ims.npy"}
    monkeypatch.setattr(FeatureFile, "read", see)
    assert pack_it(folder) == 0
    assert ("dev_ims.npy", [2, 3]) in seen
    assert ("dev_ims.npy", [0, 1, 2, 3]) not in seen
    assert "train_ims.npy" not in dict(seen)
    assert contents(packed(folder)) == expected


def test_the_rounding_error_said_after_an_interruption_is_that_of_the_whole_split(folder, run, expected):
    whole = run()[0]
    shutil.rmtree(packed(folder))
    for line in range(40, 400, 40):
        assert kill(lambda: pack_it(folder), line)
        out = run()[0]
        assert out == whole
        shutil.rmtree(packed(folder))


def test_what_is_there_is_not_written_again(folder, run):
    run()
    before = {path: path.stat().st_mtime_ns for path in packed(folder).iterdir()}
    out, err = run()
    assert err == ""
    assert "there already: train, dev, test, all" in out
    assert {path: path.stat().st_mtime_ns for path in packed(folder).iterdir()} == before


def test_another_source_does_not_go_under_the_same_name(folder, run):
    run()
    before = contents(packed(folder))
    np.save(folder / "dev_ims.npy", rows_of(folder, "dev"))
    os.utime(folder / "dev_ims.npy", (1, 1))
    assert "dev_ims.npy is already there and was made from something else" in run()[1]
    assert contents(packed(folder)) == before


# Refusals


def test_a_disk_without_room_is_refused_before_anything_is_written(folder, run, monkeypatch):
    run()
    arrays, rest = (sum(p.stat().st_size for p in packed(folder).glob(f"*{e}")) for e in (".npy", ".txt"))
    shutil.rmtree(packed(folder))
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=arrays))
    assert "some_precomp_packed: the packed data set needs" in run()[1]
    assert not packed(folder).exists()
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=arrays + rest))
    assert run()[1] == ""


def test_what_is_there_needs_no_room(folder, run, expected, monkeypatch):
    assert kill(lambda: pack_it(folder), 900)
    there = sum(path.stat().st_size for path in packed(folder).glob("*.npy*"))
    all_of_it = sum(map(len, expected.values()))
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=all_of_it - there))
    assert run()[1] == ""


@pytest.mark.parametrize(("split", "place", "row"), [("train", 5, 5), ("dev", slice(10, 15), 10), ("test", 5, 3)])
@pytest.mark.parametrize("value", [65520, -1e30])
def test_what_float16_cannot_hold_is_refused_with_file_and_row(folder, run, split, place, row, value):
    change(folder, split, place, value)
    err = run()[1]
    assert err.startswith(f"error: {folder / f'{split}_ims.npy'}: row {row} holds a feature beyond float16's")
    assert not (packed(folder) / f"{split}_ims.npy").exists()


def test_what_float16_can_just_hold_is_packed(folder, run):
    change(folder, "train", 5, 65519)
    assert run()[1] == ""
    assert rows_of(packed(folder), "train").max() == 65504


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_no_numbers_are_refused_with_file_and_row(folder, run, value):
    change(folder, "train", 5, value)
    assert run()[1].startswith(f"error: {folder / 'train_ims.npy'}: row 5 holds NaN or infinite")
    assert not (packed(folder) / "train_ims.npy").exists()


def change(folder, split, place, value):
    rows = rows_of(folder, split)
    rows[place] = np.where(np.arange(IMG_DIM) == 1, np.float32(value), rows[place])
    np.save(folder / f"{split}_ims.npy", rows)


@pytest.mark.parametrize("to", ["some_precomp", "./some_precomp", "../some", "/tmp/some", "a/../../b", "\x1b[2J"])
def test_a_name_that_is_the_sources_or_leads_away_is_refused(folder, run, to):
    before = contents(folder)
    err = run("--to", to)[1]
    assert err.startswith("error: --to ")
    assert "\x1b" not in err
    assert contents(folder) == before
    assert list(folder.parent.iterdir()) == [folder]


# What rounding does


def test_the_largest_rounding_error_is_said(folder, run):
    out, _ = run()
    errors = [(np.abs(f - f.astype(np.float16)).max(), f) for f in (features(folder, split) for split in SPLITS)]
    relative = [(np.abs(f - f.astype(np.float16)) / np.maximum(np.abs(f), 2**-14)).max() for _, f in errors]
    said = re.search(r"largest rounding error (\S+), and (\S+) of the feature", out)
    assert float(said[1]) == pytest.approx(max(error for error, _ in errors), rel=0.05)
    assert float(said[2]) == pytest.approx(max(relative), rel=0.05)
    assert float(said[2]) < 2**-11 * 1.02


def test_the_sizes_are_said(folder, run):
    rows = [line.split() for line in run()[0].split("\n\n")[1].splitlines()]
    assert [row[:2] for row in rows[1:]] == [["train", "7"], ["dev", "4"], ["test", "4"], ["all", "5"], ["total", "20"]]


@pytest.fixture
def pair(tiny_data, tmp_path):
    """A copy of the tiny data set that a run was trained on."""
    shutil.copytree(Path(*tiny_data), tmp_path / "tiny_precomp")
    return tmp_path


def test_what_rounding_does_to_scores_is_what_the_checkpoint_scores(pair, trained_run, capsys, monkeypatch):
    monkeypatch.setattr(rounding, "BLOCK_IMAGES", 7)  # of 20
    flags = ["pack", "--data_path", str(pair), "--data_name", "tiny_precomp", "--split", "testall"]
    assert main([*flags, "--checkpoint", str(trained_run)]) == 0
    out = capsys.readouterr().out
    matcher = load_matcher(trained_run)
    splits = [open_split(str(pair), name, "testall") for name in ("tiny_precomp", "tiny_precomp_packed")]
    scores = []
    for split in splits:
        images = split.features.read(np.arange(len(split.features))).reshape(len(split.features), -1, 16)
        scores.append(matcher.score(images, split.captions).numpy())
    difference = np.abs(scores[0] - scores[1])
    assert difference.max() > 0
    found = compare_scores(matcher, *splits)
    assert found.largest == pytest.approx(difference.max(), abs=1e-6)
    assert found.mean == pytest.approx(difference.mean(), rel=0.02)
    assert found.spread == pytest.approx(scores[0].std(), rel=1e-4)
    assert (
        f"differ by {found.largest:.2g} at most and {found.mean:.2g} in the mean; they spread by {found.spread:.2g}"
        in out
    )
    figures = [
        re.findall(r"[\d.]+", line.split("  ", 1)[1]) for line in out.splitlines() if line.startswith("tiny_precomp")
    ]
    assert [row[-1] for row in figures] == [f"{metrics['rsum']:.1f}" for metrics in (found.before, found.after)]


@pytest.mark.parametrize("flags", [["--checkpoint", "no_such.pt"], ["--split", "val"]])
def test_a_comparison_that_cannot_be_made_is_refused_before_anything_is_written(pair, trained_run, flags, capsys):
    common = ["pack", "--data_path", str(pair), "--data_name", "tiny_precomp", "--checkpoint", str(trained_run)]
    assert main([*common, *flags]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert [path.name for path in pair.iterdir()] == ["tiny_precomp"]
