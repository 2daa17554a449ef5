"""Whatever ends a command, no half of a data set is left under its name, and what was there before stays."""

import os
import resource
import signal
import traceback
from contextlib import ExitStack

import numpy as np
import pytest

from lib.files import new_folder
from lib.prepare import io
from lib.prepare.__main__ import main
from tests.prepare.samples import (
    contents,
    entry,
    make_images,
    prepare,
    write_captions,
    write_image_files,
    write_karpathy,
    write_store,
    write_tsv,
)

SPLITS = ("train", "val", "test") * 4


@pytest.fixture(params=["tsv", "own", "karpathy", "pack"])
def command(request, tmp_path):
    """A command that writes data/new from twelve images, and the file of features that it reads last."""
    images = make_images(range(12), (3, 10, 1, 6))
    if request.param == "tsv":
        argv = [write_tsv(tmp_path / "a.tsv", images)]
    elif request.param == "pack":
        write_store(tmp_path / "data" / "old", make_images(range(12)))
        argv = ["--to", "new"]
    else:
        files = ["--features", write_image_files(tmp_path / "files", images, ".npz")]
        if request.param == "own":
            rows = [{"image_id": image_id, "caption": "a dog"} for image_id in images]
            argv = [write_captions(tmp_path / "c.jsonl", rows), *files]
        else:
            entries = [entry(number, split) for number, split in enumerate(SPLITS)]
            argv = [write_karpathy(tmp_path / "d.json", entries), *files]
    name = "old" if request.param == "pack" else "new"
    return [request.param, *argv, "--data_path", tmp_path / "data", "--data_name", name]


def kill(argv, image):
    """Run a command in a process that is killed when it writes its n-th image."""
    child = os.fork()
    if child == 0:
        try:
            check, seen = io.check, []

            def check_or_die(*arguments):
                seen.append(arguments)
                if len(seen) == image:
                    os.kill(os.getpid(), signal.SIGKILL)
                check(*arguments)

            io.check = check_or_die
            main(list(map(str, argv)))
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def names(folder):
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def test_killed_in_the_middle_nothing_has_the_name_and_the_next_run_is_complete(tmp_path, capsys, command):
    data = tmp_path / "data"
    before = names(data)
    for image in (1, 7, 12):
        kill(command, image)
        assert names(data) - before == {".new.tmp"}
    assert prepare(capsys, *command)[0] == 0
    assert names(data) - before == {"new"}
    whole = contents(data / "new")
    (data / "new").rename(tmp_path / "moved")
    assert prepare(capsys, *command)[0] == 0
    assert contents(data / "new") == whole


def test_a_disk_that_fills_half_way_is_one_line_and_leaves_nothing(tmp_path, capsys, command):
    before = names(tmp_path / "data")
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))
    try:
        code, _, error = prepare(capsys, *command)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert code == 2
    assert "could not be written: File too large" in error
    assert names(tmp_path / "data") == before


def test_a_data_set_that_is_there_stays_as_it_is(tmp_path, capsys, command):
    folder = tmp_path / "data" / "new"
    folder.mkdir(parents=True)
    (folder / "train_ims.npy").write_bytes(b"mine")
    code, _, error = prepare(capsys, *command)
    assert code == 2
    assert f"{folder} is already there; delete it, or choose another --" in error
    assert contents(folder) == {"train_ims.npy": b"mine"}


def test_a_second_process_is_refused(tmp_path, capsys, command):
    with ExitStack() as first:
        folder = first.enter_context(new_folder(tmp_path / "data" / "new", "--data_name"))
        (folder / "mine").touch()
        code, _, error = prepare(capsys, *command)
        assert code == 2
        assert "another process is writing it" in error
        assert names(folder) == {"mine"}
    assert names(tmp_path / "data" / "new") == {"mine"}


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
@pytest.mark.filterwarnings("ignore:overflow")
def test_features_that_float32_cannot_hold_are_named_and_leave_nothing(tmp_path, capsys, value):
    images = make_images(range(4), dtype=np.float64)
    images["2"][0][1, 1] = value
    folder = write_image_files(tmp_path / "files", images)
    captions = write_captions(tmp_path / "c.jsonl", [{"image_id": n, "caption": "a dog"} for n in range(4)])
    flags = ["--features", folder, "--data_path", tmp_path / "data", "--data_name", "new"]
    code, _, error = prepare(capsys, "own", captions, *flags)
    assert code == 2
    assert error == f"error: {folder / '2.npy'}: NaN or infinite features\n"
    assert names(tmp_path / "data") == set()
