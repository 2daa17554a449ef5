"""`prepare download`: from a stand-in for kagglehub, files wherever they are, links that replace nothing."""

import os
import sys
from types import SimpleNamespace

import pytest

from lib.prepare import download
from lib.prepare.__main__ import main

HELD = {"f30k": ("train", "dev", "test"), "coco": ("train", "dev", "test", "testall")}


def fill(folder, data_set, without=()):
    """Write the files of a data set; what is in them says where they came from."""
    folder.mkdir(parents=True)
    for split in HELD[data_set]:
        for ending in ("ims.npy", "caps.txt", "ids.txt"):
            if (name := f"{split}_{ending}") not in without:
                (folder / name).write_text(f"{data_set} {name}")


@pytest.fixture
def root(tmp_path):
    """Where the stand-in puts what it downloads."""
    return tmp_path / "cache" / "datasets" / download.HANDLE / "versions" / "1"


@pytest.fixture
def kaggle(monkeypatch, root):
    """A stand-in for kagglehub; `asked` are the data sets it was asked for, `error` is what it raises."""
    kaggle = SimpleNamespace(asked=[], error=None)

    def dataset_download(handle):
        kaggle.asked.append(handle)
        if kaggle.error:
            raise kaggle.error
        return str(root)

    kaggle.dataset_download = dataset_download
    monkeypatch.setitem(sys.modules, "kagglehub", kaggle)
    monkeypatch.setenv("KAGGLEHUB_CACHE", str(root.parents[4]))
    monkeypatch.setattr(download, "NEEDED_BYTES", 10_000)
    return kaggle


@pytest.fixture
def run(tmp_path, capsys):
    """Runs the command: exit code, what it printed, and its error."""

    def run(*flags):
        code = main(["download", "--data_path", str(tmp_path / "data"), *flags])
        out, err = capsys.readouterr()
        assert len(err.splitlines()) == (code != 0), err
        return code, out, err

    return run


def linked(tmp_path, data_set):
    folder = tmp_path / "data" / f"{data_set}_precomp"
    return {path.name: path for path in folder.iterdir()} if folder.exists() else {}


def assert_in_place(tmp_path, data_set):
    files = linked(tmp_path, data_set)
    assert sorted(files) == sorted(f"{s}_{e}" for s in HELD[data_set] for e in ("ims.npy", "caps.txt", "ids.txt"))
    for name, path in files.items():
        assert path.is_symlink()
        assert path.read_text() == f"{data_set} {name}"


LAYOUTS = {
    "side by side": {"f30k": "f30k_precomp", "coco": "coco_precomp"},
    "below data": {"f30k": "data/data/f30k_precomp", "coco": "data/data/coco_precomp"},
    "other names": {"f30k": "Flickr30K/precomp", "coco": "MS-COCO/features"},
    "one in the other": {"f30k": "f30k", "coco": "f30k/more/coco_precomp"},
    "both in a folder's name": {"f30k": "coco_and_f30k/f30k", "coco": "coco_and_f30k/coco"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_files_are_found_wherever_they_are(kaggle, run, root, tmp_path, layout):
    for data_set, folder in LAYOUTS[layout].items():
        fill(root / folder, data_set)
    (root / "readme.txt").write_text("hello")
    (root / "train_ims.npy").write_text("of no data set")
    code, out, _ = run()
    assert code == 0
    assert kaggle.asked == [download.HANDLE]
    assert "f30k_precomp: 9 links" in out
    assert "coco_precomp: 12 links" in out
    assert "KAGGLEHUB_CACHE" in out
    for data_set in HELD:
        assert_in_place(tmp_path, data_set)


def test_only_the_wanted_data_set_is_linked(kaggle, run, root, tmp_path):
    fill(root / "f30k_precomp", "f30k")
    fill(root / "coco_precomp", "coco")
    assert run("--data_set", "coco")[0] == 0
    assert_in_place(tmp_path, "coco")
    assert not linked(tmp_path, "f30k")


def test_what_is_there_is_said_and_nothing_asked_for(kaggle, run, root):
    fill(root / "f30k_precomp", "f30k")
    fill(root / "coco_precomp", "coco")
    run()
    kaggle.error = RuntimeError("asked again")
    code, out, _ = run()
    assert code == 0
    assert out.count("is already there") == 2
    assert len(kaggle.asked) == 1


def test_without_ids_and_without_cocos_test_split_it_is_enough(kaggle, run, root, tmp_path):
    fill(root / "coco", "coco", without=("train_ids.txt", "test_ims.npy", "test_caps.txt", "test_ids.txt"))
    assert run("--data_set", "coco")[0] == 0
    assert len(linked(tmp_path, "coco")) == 8


def test_an_incomplete_data_set_is_named_and_the_other_linked(kaggle, run, root, tmp_path):
    fill(root / "f30k_precomp", "f30k", without=("dev_ims.npy",))
    fill(root / "coco_precomp", "coco")
    code, _, err = run()
    assert code == 2
    assert "no dev_ims.npy in it" in err
    assert not linked(tmp_path, "f30k")
    assert_in_place(tmp_path, "coco")


def test_an_archive_within_the_archive_is_named(kaggle, run, root):
    root.mkdir(parents=True)
    (root / "data.zip").write_text("")
    code, _, err = run("--data_set", "f30k")
    assert code == 2
    assert "unpack data.zip there" in err


def test_files_that_are_there_twice_are_not_chosen_between(kaggle, run, root, tmp_path):
    fill(root / "f30k_precomp", "f30k")
    fill(root / "old" / "f30k_precomp", "f30k")
    code, _, err = run("--data_set", "f30k")
    assert code == 2
    assert "more than once (f30k_precomp/dev_caps.txt and old/f30k_precomp/dev_caps.txt)" in err
    assert not linked(tmp_path, "f30k")


def test_flickr8k_is_not_flickr30k(kaggle, run, root, tmp_path):
    fill(root / "flickr8k", "f30k")
    fill(root / "flickr30k", "f30k")
    assert run("--data_set", "f30k")[0] == 0
    assert {path.resolve().parent.name for path in linked(tmp_path, "f30k").values()} == {"flickr30k"}


@pytest.mark.parametrize("kind", ["file", "link", "dangling link"])
def test_nothing_is_overwritten(kaggle, run, root, tmp_path, kind):
    fill(root / "f30k_precomp", "f30k")
    mine = tmp_path / "data" / "f30k_precomp" / "test_caps.txt"
    mine.parent.mkdir(parents=True)
    (tmp_path / "other").write_text("mine")
    if kind == "file":
        mine.write_text("mine")
    else:
        mine.symlink_to(tmp_path / ("other" if kind == "link" else "gone"))
    code, _, err = run("--data_set", "f30k")
    assert code == 2
    assert f"{mine} is already there and something else" in err
    assert list(linked(tmp_path, "f30k")) == ["test_caps.txt"]
    if kind != "dangling link":
        assert mine.read_text() == "mine"


def test_links_that_are_half_there_are_completed(kaggle, run, root, tmp_path):
    fill(root / "f30k_precomp", "f30k")
    run("--data_set", "f30k")
    for name in ("train_ims.npy", "dev_ids.txt"):
        os.unlink(linked(tmp_path, "f30k")[name])
    assert run("--data_set", "f30k")[0] == 0
    assert_in_place(tmp_path, "f30k")


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("Max retries exceeded\nwith url"),
        OSError(28, "No space left on device"),
        RuntimeError("403 Client Error.\n\nYou don't have permission \x1b[2J to access"),
        ValueError(),
    ],
)
def test_a_download_that_fails_is_one_line_with_its_reason_and_goes_on_next_time(kaggle, run, root, tmp_path, error):
    fill(root / "f30k_precomp", "f30k")
    kaggle.error = error
    code, _, err = run("--data_set", "f30k")
    assert code == 2
    assert "\x1b" not in err
    assert (" ".join(str(error).replace("\x1b", "?").split()) or "ValueError") in err
    assert "run this again" in err
    assert not linked(tmp_path, "f30k")
    kaggle.error = None
    assert run("--data_set", "f30k")[0] == 0
    assert_in_place(tmp_path, "f30k")


def test_without_kagglehub_it_is_said_how_to_get_it(monkeypatch, run):
    monkeypatch.setitem(sys.modules, "kagglehub", None)
    code, _, err = run()
    assert code == 2
    assert "pip install kagglehub" in err


def test_a_disk_without_room_is_refused_before_anything_is_asked_for(kaggle, run, root, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "NEEDED_BYTES", 10**18)
    code, _, err = run()
    assert code == 2
    assert "needs 1000000000.00 GB" in err
    assert kaggle.asked == []
    assert not (tmp_path / "data").exists()


def test_what_is_in_the_cache_already_needs_no_room(kaggle, run, root, monkeypatch):
    fill(root / "f30k_precomp", "f30k")
    archive = root.parents[1] / "1.archive"
    archive.write_bytes(bytes(600))
    there = 600 + sum(path.stat().st_size for path in (root / "f30k_precomp").iterdir())
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=100))
    monkeypatch.setattr(download, "NEEDED_BYTES", there + 101)
    assert run("--data_set", "f30k")[0] == 2
    monkeypatch.setattr(download, "NEEDED_BYTES", there + 100)
    assert run("--data_set", "f30k")[0] == 0


def test_a_complete_download_needs_no_room(kaggle, run, root, monkeypatch):
    fill(root / "f30k_precomp", "f30k")
    (root.parents[1] / "1.complete").touch()
    monkeypatch.setattr(download, "NEEDED_BYTES", 10**18)
    assert run("--data_set", "f30k")[0] == 0


def test_the_stated_sizes_are_those_of_the_files():
    assert round(download.F30K_BYTES / 1e9, 1) == 11.5
    assert round(download.COCO_BYTES / 1e9, 1) == 43.7
