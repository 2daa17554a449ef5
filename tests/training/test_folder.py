"""Whatever happens while a checkpoint is written, there are never fewer sound checkpoints than before."""

import builtins
import contextlib
import errno
import os
import resource
import shutil

import pytest
import torch

import train
from lib.checkpoints.native import read_checkpoint
from lib.checkpoints.record import read_record
from lib.cli import InputError, TrainingStopped
from lib.training import folder as folders
from lib.training.folder import RunFolder, checkpoints, command_to_go_on, newest_sound


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(folders, "WAITS", (0, 0))


@pytest.fixture(scope="module")
def content(trained_run):
    return torch.load(trained_run / "last.pt", weights_only=True)


def save(folder, content, step, best=False, said=None, keep=2):
    with RunFolder(folder, keep) as run_folder:
        content = {**content, "progress": {**content["progress"], "step": step}}
        run_folder.save(content, best, {"step": step}, [].append if said is None else said.append)


def sound(folder):
    """Steps of the checkpoints in a folder that can be read, by file name."""
    steps = {}
    for path in folder.glob("*.pt"):
        with contextlib.suppress(InputError):
            steps[path.name] = read_checkpoint(path)["progress"]["step"]
    return steps


@pytest.fixture
def run(tmp_path, content):
    """A run folder after saves at steps 1, 2 (the best) and 3."""
    for step in (1, 2, 3):
        save(tmp_path / "run", content, step, best=step == 2)
    return tmp_path / "run"


def test_last_best_and_the_newest_are_kept(run, content):
    names = {"step-00000002.pt": 2, "step-00000003.pt": 3, "last.pt": 3, "model_best.pt": 2}
    assert sound(run) == names
    save(run, content, 123456789, keep=1)
    assert sound(run) == {"step-123456789.pt": 123456789, "last.pt": 123456789, "model_best.pt": 2}
    assert sorted(path.name for path in run.iterdir() if path.suffix != ".pt") == ["run.json", "run.lock"]
    assert read_record(run)["step"] == 123456789


def test_second_names_take_no_room(run):
    assert os.path.samefile(run / "last.pt", run / "step-00000003.pt")
    assert os.path.samefile(run / "model_best.pt", run / "step-00000002.pt")


def test_without_hard_links_second_names_are_copies(run, content, monkeypatch):
    monkeypatch.setattr(os, "link", fail(errno.EPERM))
    save(run, content, 4, best=True)
    assert sound(run) == {"step-00000003.pt": 3, "step-00000004.pt": 4, "last.pt": 4, "model_best.pt": 4}
    assert not os.path.samefile(run / "last.pt", run / "step-00000004.pt")
    assert not list(run.glob("*.tmp"))


def test_numbers_order_checkpoints_not_letters(run, content):
    save(run, content, 100_000_001)
    save(run, content, 99_999_999, keep=3)
    assert [path.name for path in checkpoints(run)][:2] == ["step-100000001.pt", "step-99999999.pt"]
    assert newest_sound(run).content["progress"]["step"] == 100_000_001


def fail(number, after=0):
    """A function of the system that fails with an error from its call number `after` on."""
    calls = []

    def call(*_, **__):
        calls.append(1)
        if len(calls) > after:
            raise OSError(number, os.strerror(number))

    return call


class FullDisk:
    """A file that takes some bytes and then no more."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        if len(data) > self.room:
            self.file.write(bytes(data)[: self.room])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.room -= len(data)
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


def full_disk(patch, room):
    def opening(path, mode="r", *args, open=builtins.open, **kwargs):
        file = open(path, mode, *args, **kwargs)
        return FullDisk(file, room) if "w" in mode and str(path).endswith(".tmp") else file

    patch.setattr(builtins, "open", opening)


def denied(patch, words):
    def opening(path, mode="r", *args, open=builtins.open, **kwargs):
        if mode[0] in "wa" and words in str(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return open(path, mode, *args, **kwargs)

    patch.setattr(builtins, "open", opening)


def replace_fails_for(patch, words, replace=os.replace):
    def replacing(source, target):
        if words in str(target):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        replace(source, target)

    patch.setattr(os, "replace", replacing)


FAULTS = {
    "no space for a byte": lambda patch: full_disk(patch, 0),
    "no space after 1000 bytes": lambda patch: full_disk(patch, 1000),
    "no space after most of it": lambda patch: full_disk(patch, 300_000),
    "no permission": lambda patch: denied(patch, ".tmp"),
    "no permission for the record": lambda patch: denied(patch, "run.json"),
    "os.fsync fails": lambda patch: patch.setattr(os, "fsync", fail(errno.EIO)),
    "os.replace fails": lambda patch: patch.setattr(os, "replace", fail(errno.EIO)),
    "os.replace fails for last.pt": lambda patch: replace_fails_for(patch, "last.pt"),
    "os.replace fails for model_best.pt": lambda patch: replace_fails_for(patch, "model_best.pt"),
    "os.replace fails for run.json": lambda patch: replace_fails_for(patch, "run.json"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_leaves_no_fewer_sound_checkpoints_and_is_said(run, content, monkeypatch, fault):
    before, said = sound(run), []
    with monkeypatch.context() as patch:
        FAULTS[fault](patch)
        with pytest.raises(TrainingStopped) as stopped:
            save(run, content, 4, best=True, said=said)
        attempts = len(said)
    after = sound(run)
    assert len(after) >= len(before)
    assert all(after[name] >= step for name, step in before.items() if not name.startswith("step"))
    assert set(after) >= {"last.pt", "model_best.pt"}
    assert len([name for name in after if name.startswith("step")]) >= 2
    assert attempts == 2
    assert "could not be written" in said[0]
    assert command_to_go_on(run) in str(stopped.value)
    assert len(str(stopped.value).splitlines()) == 1
    assert not list(run.glob("*.tmp"))
    save(run, content, 4, best=True)
    assert sound(run) == {"step-00000003.pt": 3, "step-00000004.pt": 4, "last.pt": 4, "model_best.pt": 4}


@pytest.mark.parametrize("limit", [100, 10_000, 200_000])
def test_a_limit_of_the_system_on_file_size_is_a_fault_like_any(run, content, limit):
    """The kernel itself cuts the file short in the middle of torch.save."""
    before, bounds = sound(run), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, bounds[1]))
    try:
        with pytest.raises(TrainingStopped, match="File too large"):
            save(run, content, 4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, bounds)
    assert sound(run) == before


def test_a_fault_that_passes_costs_nothing(run, content, monkeypatch):
    said, results = [], iter([fail(errno.EIO)])
    monkeypatch.setattr(os, "fsync", lambda file: next(results, lambda: None)())
    save(run, content, 4, said=said)
    assert sound(run)["last.pt"] == 4
    assert len(said) == 1
    assert "trying again in 0 seconds" in said[0]


def test_a_folder_that_vanishes_is_made_again(tmp_path, content):
    said = []
    with RunFolder(tmp_path / "run", 2) as run_folder:
        run_folder.save(content, False, {}, said.append)
        shutil.rmtree(tmp_path / "run")
        run_folder.save(content, True, {}, said.append)
    assert set(sound(tmp_path / "run")) == {"step-00000015.pt", "last.pt", "model_best.pt"}
    assert said == [f"warning: {tmp_path / 'run'} has vanished and is made again"]


def test_what_a_kill_left_half_written_is_removed_at_the_next_start(run):
    (run / "last.pt.123.tmp").write_bytes(b"half")
    with RunFolder(run, 2):
        assert not list(run.glob("*.tmp"))


@pytest.mark.parametrize("save_steps", ["4", "0"])
def test_a_training_on_a_full_disk_stops_in_order_and_goes_on_when_there_is_room(
    tiny_flags, tmp_path, monkeypatch, capsys, save_steps
):
    """Within the run as a whole: the disk fills up after the first checkpoint."""
    flags = [*tiny_flags, "--num_epochs", "2", "--save_steps", save_steps, "--model_name", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        write = folders.write_state

        def full_from_the_second_on(path, content):
            if checkpoints(path.parent):
                full_disk(patch, 1000)
            write(path, content)

        patch.setattr(folders, "write_state", full_from_the_second_on)
        assert train.main(flags) == 1
    out, err = capsys.readouterr()
    assert "No space left on device" in out
    assert err.startswith("error: ")
    assert f"then go on with: python train.py --resume {tmp_path / 'run'}" in err
    first = {"4": "step-00000004.pt", "0": "step-00000015.pt"}[save_steps]
    assert first in sound(tmp_path / "run")
    assert train.main(["--resume", str(tmp_path / "run")]) == 0
    assert read_checkpoint(tmp_path / "run" / "last.pt")["progress"]["epoch"] == 2


def test_a_log_that_cannot_be_written_costs_the_run_nothing(tiny_flags, tmp_path, monkeypatch, capsys):
    denied(monkeypatch, "run.log")
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", fail(errno.ENOSPC))
    assert train.main([*tiny_flags, "--model_name", str(tmp_path / "run")]) == 0
    err = capsys.readouterr().err
    assert err.count("run.log cannot be written") == 1
    assert err.count("TensorBoard's files cannot be written") == 1
    assert sound(tmp_path / "run")["last.pt"] == 15
