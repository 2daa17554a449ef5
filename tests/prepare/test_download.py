"""`prepare download`: from a stand-in for kagglehub, files wherever they are, links that replace nothing."""

import sys
from types import SimpleNamespace

import pytest

from lib.prepare import download
from tests.prepare.samples import prepare

HELD = {"f30k": ("train", "dev", "test"), "coco": ("train", "dev", "test", "testall")}
ENDINGS = ("ims.npy", "caps.txt", "ids.txt")


def fill(folder, data_set, without=()):
    """Write the files of a data set; what is in them says where they came from."""
    folder.mkdir(parents=True)
    for name in (f"{split}_{ending}" for split in HELD[data_set] for ending in ENDINGS):
        if name not in without:
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
    return kaggle


@pytest.fixture
def run(tmp_path, capsys):
    """Runs the command: exit code, what it printed, and its error."""
    return lambda *flags: prepare(capsys, "download", "--data_path", tmp_path / "data", *flags)


def linked(tmp_path, data_set):
    folder = tmp_path / "data" / f"{data_set}_precomp"
    return {path.name: path for path in folder.iterdir()} if folder.exists() else {}


def check_in_place(tmp_path, data_set):
    files = linked(tmp_path, data_set)
    assert sorted(files) == sorted(f"{split}_{ending}" for split in HELD[data_set] for ending in ENDINGS)
    assert all(path.is_symlink() and path.read_text() == f"{data_set} {name}" for name, path in files.items())


@pytest.mark.parametrize(
    ("f30k", "coco"),
    [
        ("f30k_precomp", "coco_precomp"),
        ("data/data/f30k_precomp", "data/data/coco_precomp"),
        ("Flickr30K/precomp", "MS-COCO/features"),
        ("f30k", "f30k/more/coco_precomp"),
        ("coco_and_f30k/f30k", "coco_and_f30k/coco"),
    ],
)
def test_files_are_found_wherever_they_are_and_only_once_asked_for(kaggle, run, root, tmp_path, f30k, coco):
    fill(root / f30k, "f30k")
    fill(root / coco, "coco")
    fill(root / "flickr8k", "f30k")
    (root / "train_ims.npy").write_text("of no data set")
    code, out, _ = run()
    assert code == 0
    assert "f30k_precomp: 9 links" in out
    assert "coco_precomp: 12 links" in out
    for data_set in HELD:
        check_in_place(tmp_path, data_set)
    assert run()[1].count("is already there") == 2
    assert kaggle.asked == [download.HANDLE]


def test_only_the_wanted_data_set_is_linked_and_ids_and_cocos_test_split_may_be_missing(kaggle, run, root, tmp_path):
    fill(root / "f30k_precomp", "f30k")
    fill(root / "coco", "coco", without=("train_ids.txt", "test_ims.npy", "test_caps.txt", "test_ids.txt"))
    assert run("--data_set", "coco")[0] == 0
    assert len(linked(tmp_path, "coco")) == 8
    assert not linked(tmp_path, "f30k")


@pytest.mark.parametrize(
    ("without", "second", "words"),
    [
        (("dev_ims.npy",), "", "no dev_ims.npy in a folder that names f30k"),
        ((), "old/f30k_precomp", "twice (f30k_precomp/dev_caps.txt and old/f30k_precomp/dev_caps.txt)"),
    ],
)
def test_what_is_missing_or_there_twice_is_named_and_nothing_linked(
    kaggle, run, root, tmp_path, without, second, words
):
    fill(root / "f30k_precomp", "f30k", without)
    if second:
        fill(root / second, "f30k")
    code, _, error = run("--data_set", "f30k")
    assert code == 2
    assert words in error
    assert not linked(tmp_path, "f30k")


def test_what_is_there_stays_and_what_is_missing_is_completed(kaggle, run, root, tmp_path):
    fill(root / "f30k_precomp", "f30k")
    mine = tmp_path / "data" / "f30k_precomp" / "test_caps.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    assert run("--data_set", "f30k")[0] == 0
    assert mine.read_text() == "mine"
    mine.unlink()
    assert run("--data_set", "f30k")[0] == 0
    check_in_place(tmp_path, "f30k")


@pytest.mark.parametrize("error", [RuntimeError("403 Client Error\n\nYou don't have permission"), ValueError()])
def test_a_download_that_fails_is_one_line_with_its_reason_and_can_be_repeated(kaggle, run, root, tmp_path, error):
    fill(root / "f30k_precomp", "f30k")
    kaggle.error = error
    code, _, said = run("--data_set", "f30k")
    assert code == 2
    assert f"({str(error).partition(chr(10))[0] or 'ValueError'})" in said
    assert "run this again" in said
    assert not linked(tmp_path, "f30k")
    kaggle.error = None
    assert run("--data_set", "f30k")[0] == 0


def test_without_kagglehub_it_is_said_how_to_get_it(monkeypatch, run):
    monkeypatch.setitem(sys.modules, "kagglehub", None)
    code, _, error = run()
    assert code == 2
    assert "pip install kagglehub" in error
