"""Whatever happens while a checkpoint is written, there are never fewer sound checkpoints than before."""

import builtins
import contextlib
import errno
import os
import resource
import shutil
import sys

import pytest
import torch

import train
from lib.checkpoints.native import read_checkpoint
from lib.checkpoints.record import read_record
from lib.cli import InputError, TrainingStopped
from lib.config import TrainSettings
from lib.training import run_folder as module
from lib.training.log import RunLog
from lib.training.run_folder import Progress, RunFolder, checkpoints, command_to_resume
from tests import mishap
from tests.ranks import run_ranks


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(module, "WAITS", (0, 0))


@pytest.fixture(scope="module")
def state(trained_run):
    return torch.load(trained_run / "last.pt", weights_only=True)


def epoch_at(step):
    """An epoch's entry in the history, which ended at a step."""
    return {"epoch": 1, "step": step, "dev": {"rsum": 1.0}}


def save(folder, state, step, best=False, said=None, keep=2):
    progress = Progress(epoch=step, step=step, best_rsum=1.0, best_epoch=step if best else 1, history=[epoch_at(step)])
    with RunFolder(folder, keep, [].append if said is None else said.append, record={"run": "ours"}) as run_folder:
        run_folder.save({**state, "progress": vars(progress)}, progress)


def sound(folder):
    """Steps of the checkpoints in a folder that can be read, by file name."""
    steps = {}
    for path in checkpoints(folder):
        with contextlib.suppress(InputError):
            steps[path.name] = read_checkpoint(path)["progress"]["step"]
    return steps


@pytest.fixture
def run(tmp_path, state):
    """A run folder after saves at steps 1, 2 (the best) and 3."""
    for step in (1, 2, 3):
        save(tmp_path / "run", state, step, best=step == 2)
    return tmp_path / "run"


def test_last_best_and_the_newest_by_number_are_kept(run, state):
    assert sound(run) == {"step-00000002.pt": 2, "step-00000003.pt": 3, "last.pt": 3, "model_best.safetensors": 2}
    save(run, state, 99_999_999)
    save(run, state, 100_000_001)
    assert list(sound(run)) == ["step-100000001.pt", "step-99999999.pt", "last.pt", "model_best.safetensors"]
    assert sound(run)["model_best.safetensors"] == 2
    assert read_record(run)["progress"]["step"] == 100_000_001


def test_last_takes_no_room_and_is_a_copy_where_there_are_no_hard_links(run, state, monkeypatch):
    assert os.path.samefile(run / "last.pt", run / "step-00000003.pt")
    module._link(run / "step-00000003.pt", run / "last.pt")  # as a run does that is resumed there
    assert not list(run.glob("*.tmp"))
    monkeypatch.setattr(os, "link", fail(errno.EPERM))
    save(run, state, 4, best=True)
    assert sound(run) == {"step-00000004.pt": 4, "step-00000003.pt": 3, "last.pt": 4, "model_best.safetensors": 4}
    assert not os.path.samefile(run / "last.pt", run / "step-00000004.pt")
    assert not list(run.glob("*.tmp"))


def fail(number):
    """A function of the system that fails."""

    def call(*_, **__):
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


def replace_fails_for(patch, words, replace=os.replace):
    def replacing(source, target):
        if words in str(target):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        replace(source, target)

    patch.setattr(os, "replace", replacing)


FAULTS = {
    "no space after most of it": lambda patch: full_disk(patch, 300_000),
    "os.fsync fails": lambda patch: patch.setattr(os, "fsync", fail(errno.EIO)),
    "os.replace fails for the step file": lambda patch: replace_fails_for(patch, "step-"),
    "os.replace fails for the best": lambda patch: replace_fails_for(patch, "model_best"),
    "os.replace fails for run.json": lambda patch: replace_fails_for(patch, "run.json"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_leaves_no_fewer_sound_checkpoints_and_is_said(run, state, monkeypatch, fault):
    before, said = sound(run), []
    with monkeypatch.context() as patch:
        FAULTS[fault](patch)
        with pytest.raises(TrainingStopped) as stopped:
            save(run, state, 4, best=True, said=said)
    after = sound(run)
    assert len(after) >= len(before)
    assert all(after[name] >= step for name, step in before.items() if not name.startswith("step"))
    assert len([name for name in after if name.startswith("step")]) >= 2
    assert len(said) == 2  # a warning for each further attempt
    assert "could not be written" in said[0]
    assert command_to_resume(run) in str(stopped.value)
    assert len(str(stopped.value).splitlines()) == 1
    assert not list(run.glob("*.tmp"))
    save(run, state, 4, best=True)
    assert sound(run) == {"step-00000004.pt": 4, "step-00000003.pt": 3, "last.pt": 4, "model_best.safetensors": 4}


def test_a_limit_of_the_system_on_file_size_is_a_fault_like_any(run, state):
    """The kernel itself cuts the file short in the middle of torch.save."""
    before, bounds = sound(run), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, bounds[1]))
    try:
        with pytest.raises(TrainingStopped, match="File too large"):
            save(run, state, 4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, bounds)
    assert sound(run) == before


def test_a_fault_that_passes_costs_nothing(run, state, monkeypatch):
    said, results = [], iter([fail(errno.EIO)])
    monkeypatch.setattr(os, "fsync", lambda file: next(results, lambda: None)())
    save(run, state, 4, said=said)
    assert sound(run)["last.pt"] == 4
    assert len(said) == 1
    assert "trying again in 0 seconds" in said[0]


def test_a_folder_that_is_deleted_is_made_again_unless_another_run_has_it(tmp_path, state):
    progress = Progress(epoch=1, step=15, best_rsum=1.0, best_epoch=1, history=[epoch_at(15)])
    said, folder = [], tmp_path / "run"
    with RunFolder(folder, 2, said.append, record={"run": "ours"}) as run_folder:
        run_folder.save(state, progress)
        shutil.rmtree(folder)
        run_folder.save(state, progress)
        assert set(sound(folder)) == {"step-00000015.pt", "last.pt", "model_best.safetensors"}
        assert said == [f"warning: {folder} has been deleted and is made again"]
        shutil.rmtree(folder)
        with RunFolder(folder, 2, said.append, record={"run": "theirs"}) as other:
            other.save(state, Progress(step=3))
            with pytest.raises(TrainingStopped, match="another process is training there"):
                run_folder.save(state, progress)
        with pytest.raises(TrainingStopped, match="holds another run now"):
            run_folder.save(state, progress)
    assert set(sound(folder)) == {"step-00000003.pt", "last.pt"}
    assert read_record(folder)["run"] == "theirs"


def test_a_folder_that_cannot_be_looked_at_is_a_fault_like_any(tmp_path, state):
    said, progress, folder = [], Progress(step=15), tmp_path / "run"
    with RunFolder(folder, 2, said.append, record={"run": "ours"}) as run_folder:
        run_folder.save(state, progress)
        folder.rename(tmp_path / "away")
        folder.touch()
        with pytest.raises(TrainingStopped, match="cannot be looked at"):
            run_folder.save(state, progress)
        assert len(said) == len(module.WAITS)
        folder.unlink()
        (tmp_path / "away").rename(folder)
        run_folder.save(state, progress)
    assert sound(folder)["last.pt"] == 15


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_tensorboards_files_that_are_deleted_are_one_line(tmp_path, capsys):
    with RunLog(tmp_path, tmp_path / "events", 0, TrainSettings()) as log:
        shutil.rmtree(tmp_path / "events")
        for step in range(3):
            log.scalars(step, "train", {"loss": 1.0})
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: TensorBoard's files cannot be written (No such file or directory)")


def test_files_that_the_run_does_not_write_are_left_alone(run, state):
    """What a kill left half written is removed at the start."""
    half = ["last.pt.123.tmp", "step-00000002.pt.7.tmp", "run.json.5.tmp", "model_best.safetensors.1.tmp"]
    users = ["step-00000001-backup.pt", "step-1.pt", "notes.tmp", "last.pt.tmp", "step-00000001.pt.gz"]
    for name in (*half, *users):
        (run / name).write_bytes(b"of the user")
    (run / "step-99999999.pt").mkdir()
    before = set(sound(run))
    for step in (4, 5, 6):
        save(run, state, step)
    written = {"step-00000005.pt", "step-00000006.pt", "last.pt", "model_best.safetensors", "run.json", "run.lock"}
    assert {path.name for path in run.iterdir()} == {*users, "step-99999999.pt", *written}
    assert before - set(sound(run)) == {"step-00000002.pt", "step-00000003.pt"}
    assert sound(run)["last.pt"] == 6


def test_a_run_does_not_start_where_another_one_has_been_or_gone_on_meanwhile(run, state):
    progress, record = Progress(step=2), {"run": "ours", "sessions": []}
    for resumed, words in ((None, "holds a run already"), (run / "step-00000002.pt", "step-00000003.pt is later")):
        with RunFolder(run, 2, print, record) as folder, pytest.raises(InputError, match=words):
            folder.begin(state, progress, resumed, {})
    assert sound(run)["last.pt"] == 3


def test_a_training_on_a_full_disk_stops_in_order_and_continues_when_there_is_room(
    tiny_flags, tmp_path, monkeypatch, capsys
):
    """Within the run as a whole: the disk fills up after the first checkpoint."""
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        write = module.write_state

        def full_from_the_second_on(path, state):
            if checkpoints(path.parent):
                full_disk(patch, 1000)
            write(path, state)

        patch.setattr(module, "write_state", full_from_the_second_on)
        assert train.main([*tiny_flags, "--save_steps", "4", "--model_name", str(folder)]) == 1
    out, err = capsys.readouterr()
    assert "No space left on device" in out
    assert err.startswith("error: ")
    assert f"then continue with: python train.py --resume {folder}" in err
    assert set(sound(folder)) == {"step-00000004.pt", "last.pt"}
    assert train.main(["--resume", str(folder)]) == 0
    assert read_checkpoint(folder / "last.pt")["progress"]["epoch"] == 1


def train_into_full_disk(flags):
    os.dup2(os.open("/dev/full", os.O_WRONLY), sys.stdout.fileno())
    return train.main(flags)


def test_output_that_cannot_be_printed_costs_a_run_nothing_and_is_one_line_at_the_start(tiny_flags, tmp_path):
    flags = [*tiny_flags, "--model_name", str(tmp_path / "run"), "--log_step", "1"]
    (outcome,) = run_ranks(train_into_full_disk, 1, flags)
    assert (outcome.value, outcome.err) == (2, "error: the output: No space left on device\n")
    (outcome,) = run_ranks(mishap.main, 1, "output closed", 3, flags)
    assert (outcome.value, outcome.err) == (0, "")
    log = (tmp_path / "run" / "run.log").read_text()
    assert log.count("warning: output cannot be printed (Broken pipe); the run goes on") == 1
    assert "best dev rSum" in log
    assert sound(tmp_path / "run")["last.pt"] == 15


def test_a_log_that_cannot_be_written_costs_the_run_nothing(tiny_flags, tmp_path, monkeypatch, capsys):
    def opening(path, mode="r", *args, open=builtins.open, **kwargs):
        if mode == "a" and str(path).endswith("run.log"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return open(path, mode, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", opening)
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", fail(errno.ENOSPC))
    assert train.main([*tiny_flags, "--model_name", str(tmp_path / "run")]) == 0
    err = capsys.readouterr().err
    assert err.count("run.log cannot be written") == 1
    assert err.count("TensorBoard's files cannot be written") == 1
    assert sound(tmp_path / "run")["last.pt"] == 15
