"""A run that was interrupted anywhere and resumed equals one that was not; what may change meanwhile is said."""

import ctypes
import errno
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from itertools import count
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

import train
from lib.checkpoints import native
from lib.checkpoints.native import BEST, LAST, build_model, read_checkpoint
from lib.checkpoints.record import read_record
from lib.cli import InputError, with_bar
from lib.config import TrainSettings
from lib.training import loop
from lib.training import run_folder as run_folder_module
from lib.training.resume import Origin, refuse_changes
from lib.training.run_folder import Progress
from lib.training.signals import SIGNALS, EndNow, Signals
from tests import mishap
from tests.conftest import PUBLISHED, TINY_BERT, assert_same_weights
from tests.ranks import run_ranks, start

LOSS = re.compile(r"step (\d+) loss ([\d.]+) gradient ([\d.]+) rate ([\d.e-]+)")
STEPS = 15  # of an epoch


class Crash(Exception):
    """What no part of the program expects."""


@pytest.fixture(scope="module")
def flags(tiny_flags):
    return [*tiny_flags, "--num_epochs", "2", "--lr_update", "1", "--log_step", "1", "--save_steps", "4", "--keep", "3"]


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    """The folder of a run of two epochs that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert train.main([*flags, "--model_name", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def longer(whole, tmp_path_factory):
    """The folder of that run, moved and continued for a third epoch."""
    folder = shutil.copytree(whole, tmp_path_factory.mktemp("longer") / "moved")
    assert train.main(["--resume", str(folder), "--num_epochs", "3"]) == 0
    return folder


@pytest.fixture
def cut(whole, tmp_path):
    """A copy of that run, to be resumed: checkpoints of steps 24, 28 and 30 are its newest."""
    shutil.copytree(whole, tmp_path / "cut")
    return tmp_path / "cut"


def losses(folder):
    """Figures by step, as the log states them last."""
    return {int(step): rest for step, *rest in LOSS.findall((folder / "run.log").read_text())}


def assert_equal_runs(one, other):
    assert losses(one) == losses(other)
    for name in (BEST, LAST):
        assert_same_weights(one / name, other / name)
        ours, theirs = (read_checkpoint(folder / name) for folder in (one, other))
        assert ours["progress"] == theirs["progress"]
    assert torch.equal(*(content["random_state"]["torch"] for content in (ours, theirs)))


def at(monkeypatch, step, happening):
    """Let something happen as training comes to a step: before its update, or in the evaluation after its epoch."""
    train_step, measure_split = loop.train_step, loop.measure_split

    def stepping(run, *args):
        if run.progress.step + 1 == step:
            happening()
        return train_step(run, *args)

    def embedding(*args):
        if step == "dev":
            happening()
        return measure_split(*args)

    monkeypatch.setattr(loop, "train_step", stepping)
    monkeypatch.setattr(loop, "measure_split", embedding)


def crash():
    raise Crash


def crashed(monkeypatch, step, command):
    """Start a run that crashes at a step."""
    with monkeypatch.context() as patch:
        at(patch, step, crash)
        with pytest.raises(Crash):
            train.main(command)


# Equal to a run that was not interrupted


@pytest.mark.parametrize("step", [2, 15, "dev"])
def test_a_run_that_crashed_anywhere_ends_as_if_it_had_not(flags, whole, tmp_path, monkeypatch, capsys, step):
    command = [*flags, "--model_name", str(tmp_path / "run"), "--resume", "auto"]
    counter = SimpleNamespace(get=count(100).__next__)  # TensorBoard's files of one second are read by name: 9 after 10
    monkeypatch.setattr(event_file_writer, "_global_uid", counter)
    crashed(monkeypatch, step, command)
    assert train.main(command) == 0
    assert ("continues" in capsys.readouterr().out) == (step != 2)  # when nothing had been saved
    assert_equal_runs(tmp_path / "run", whole)
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [*range(1, 2 * STEPS + 1)]
    assert train.main(command) == 0
    out = capsys.readouterr().out
    assert f"continues {tmp_path / 'run' / 'step-00000030.pt'}: 30 steps done" in out
    assert "all 2 epochs are done; a larger --num_epochs continues" in out


def test_so_does_one_with_other_settings(flags, tmp_path, monkeypatch):
    command = [*flags, "--global_head", "gpo", "--mask_padding", "--workers", "2", "--device_features"]
    assert train.main([*command, "--model_name", str(tmp_path / "whole")]) == 0
    crashed(monkeypatch, 23, [*command, "--model_name", str(tmp_path / "cut")])
    assert train.main(["--resume", str(tmp_path / "cut")]) == 0
    assert_equal_runs(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.parametrize("what", ["write_weights", "_link"])
def test_a_kill_between_a_step_file_and_those_that_follow_it_loses_nothing(flags, whole, tmp_path, monkeypatch, what):
    best = read_record(whole)["chosen"]["epoch"]
    command = [*flags, "--num_epochs", str(best), "--model_name", str(tmp_path / "run")]
    plain = getattr(run_folder_module, what)

    def cut_off(*args):
        if (tmp_path / "run" / f"step-{STEPS * best:08d}.pt").is_file():
            raise Crash
        plain(*args)

    with monkeypatch.context() as patch:
        patch.setattr(run_folder_module, what, cut_off)
        with pytest.raises(Crash):
            train.main(command)
    assert train.main(["--resume", str(tmp_path / "run"), "--num_epochs", "2"]) == 0
    assert_equal_runs(tmp_path / "run", whole)


@pytest.mark.parametrize(("number", "step"), [(signal.SIGINT, 7), (signal.SIGTERM, "dev")])
def test_a_signal_ends_the_step_saves_and_says_how_to_continue(
    flags, whole, tmp_path, monkeypatch, capsys, number, step
):
    with monkeypatch.context() as patch:
        at(patch, step, lambda: os.kill(os.getpid(), number))
        assert train.main([*flags, "--model_name", str(tmp_path / "run")]) == 128 + number
    done = STEPS if step == "dev" else step
    answer = "saving" if step == "dev" else f"finishing step {step}, then saving"
    resume = f"python train.py --resume {tmp_path / 'run'}"
    saved = f"saved after step {done}; continue with: {resume}"
    name = number.name
    assert capsys.readouterr().err == f"{name}: {answer}; again to leave at once\n{name}: {saved}\n"
    assert read_checkpoint(tmp_path / "run" / "last.pt")["progress"]["batch"] == done
    assert train.main(resume.split()[2:]) == 0
    assert_equal_runs(tmp_path / "run", whole)


def test_a_signal_in_an_evaluation_raises_nothing_where_it_comes_but_ends_it_at_the_next_block():
    went_on = []

    def blocks():
        os.kill(os.getpid(), signal.SIGTERM)  # within a lock or a fork, say
        went_on.append(True)
        yield 1

    with Signals(Progress()) as signals:
        with pytest.raises(EndNow), signals.at_once():
            list(with_bar(blocks(), "blocks"))
        assert went_on
        assert list(with_bar([1], "blocks")) == [1]


def test_a_second_signal_ends_the_process_as_usual():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background may ignore it
    with Signals(Progress()) as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.agree() == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler


def test_a_loaders_workers_do_not_hold_up_a_run_that_ends_on_an_error():
    with Signals(Progress()):
        worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(20,))
        worker.start()
    assert worker.is_alive()
    worker.kill()
    worker.join()


def test_loader_workers_leave_signals_to_the_main_process(flags, tmp_path):
    """A scheduler's SIGTERM reaches the whole process group: workers go on until the step is saved."""
    command = [*flags, "--workers", "2", "--model_name", str(tmp_path / "run")]
    (outcome,) = run_ranks(mishap.main, 1, "SIGTERM to the group", 6, command)
    assert outcome.value == 143
    assert "SIGTERM: saved after step 6; continue with: " in outcome.err


def test_a_loader_worker_that_is_killed_is_one_line_and_the_step_before_is_saved(flags, whole, tmp_path):
    """As the system does where memory is short."""
    command = [*flags, "--workers", "1", "--save_steps", "0", "--model_name", str(tmp_path / "run")]
    (outcome,) = run_ranks(mishap.main, 1, "worker killed", 6, command)
    assert outcome.value == 1
    assert outcome.err.startswith("error: a process that reads data has ended (DataLoader worker")
    assert outcome.err.count("\n") == 1
    assert read_checkpoint(tmp_path / "run" / "last.pt")["progress"]["step"] >= 6
    assert train.main(["--resume", str(tmp_path / "run"), "--workers", "0"]) == 0
    assert_equal_runs(tmp_path / "run", whole)


def block_within_an_operation(pipe):
    """Here one that ends with the process alone; PyTorch's let other threads run too."""
    sys.stderr = SimpleNamespace(write=pipe.send, flush=list)
    with Signals(Progress(step=6)):
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        pipe.send("ready")
        ctypes.CDLL(None).pause()


def test_a_signal_is_answered_while_the_main_thread_is_within_an_operation():
    here, there = multiprocessing.Pipe()
    process = start(block_within_an_operation, there)
    assert here.recv() == "ready"
    os.kill(process.pid, signal.SIGINT)
    assert here.recv() == "SIGINT: finishing step 7, then saving; again to leave at once"
    process.kill()


# Where to continue


def test_a_larger_num_epochs_extends_a_finished_run_at_the_rate_of_its_epoch_wherever_it_was_moved(whole, longer):
    assert len(list(longer.glob("events*"))) == 2
    before, after = (read_checkpoint(folder / "last.pt")["progress"] for folder in (whole, longer))
    assert (before["epoch"], after["epoch"], after["step"]) == (2, 3, 3 * STEPS)
    assert after["history"][:2] == before["history"]
    assert after["best_rsum"] >= before["best_rsum"]
    assert {rate for _, _, rate in list(losses(longer).values())[-STEPS:]} == {"5.0e-05"}
    record = read_record(longer)
    assert [session["step"] for session in record["sessions"]] == [0, 2 * STEPS]
    assert [session["from"] for session in record["sessions"]] == [None, str(longer / "step-00000030.pt")]
    assert [entry["epoch"] for entry in record["history"]] == [1, 2, 3]
    best = max(record["history"], key=lambda entry: entry["dev"]["rsum"])
    assert (record["chosen"]["epoch"], record["chosen"]["rsum"]) == (best["epoch"], best["dev"]["rsum"])


@pytest.mark.parametrize("damaged", [["step-00000030.pt", "last.pt"], ["step-00000030.pt", "step-00000028.pt"]])
def test_the_newest_sound_checkpoint_is_used_and_damage_is_said(whole, cut, capsys, damaged):
    (cut / "run.json").write_text("not JSON")
    for name in damaged:
        content = bytearray((cut / name).read_bytes())
        content[len(content) // 2] ^= 4
        (cut / name).unlink()  # another file: last.pt may be its second name
        (cut / name).write_bytes(content)
    assert train.main(["--resume", str(cut)]) == 0
    out = capsys.readouterr().out
    assert f"warning: {cut / 'run.json'}: damaged" in out
    assert len(read_record(cut)["sessions"]) == 1
    for name in damaged:
        if name != "last.pt":
            assert f"warning: {cut / name}: damaged" in out
            assert (cut / f"{name}.damaged").is_file()
    assert_equal_runs(cut, whole)
    for path in run_folder_module.checkpoints(cut):
        path.unlink()
    (cut / "step-00000030.pt").write_bytes(b"PK nothing")
    assert train.main(["--resume", str(cut)]) == 2
    assert f"error: {cut}: none of its 1 checkpoints can be read; " in capsys.readouterr().err


def test_a_newest_checkpoint_that_cannot_be_read_now_ends_the_program_and_stays(cut, capsys, monkeypatch):
    """It is not damaged: what another version has written, and what may not be opened."""
    newest = cut / "step-00000030.pt"
    names = run_folder_module.checkpoints(cut)
    content = torch.load(newest, weights_only=True)
    (cut / "last.pt").unlink()
    torch.save({**content, "format": "x-dim checkpoint 9"}, newest)
    os.link(newest, cut / "last.pt")
    assert train.main(["--resume", str(cut)]) == 2
    assert "from another version" in capsys.readouterr().err
    torch.save(content, newest)
    monkeypatch.setattr(native, "open", forbidden(newest), raising=False)
    assert train.main(["--resume", str(cut)]) == 2
    assert f"error: {newest}: cannot be read (Permission denied)" in capsys.readouterr().err
    monkeypatch.setattr(native, "open", forbidden(cut / BEST), raising=False)
    assert train.main(["--resume", str(cut), "--num_epochs", "3"]) == 2
    assert f"error: {cut / BEST}: cannot be read (Permission denied)" in capsys.readouterr().err
    assert run_folder_module.checkpoints(cut) == names


def forbidden(path):
    """A function open() that may not open one file: root may open all."""

    def opening(file, *args):
        if file == path:
            raise PermissionError(errno.EACCES, "Permission denied", str(file))
        return open(file, *args)

    return opening


def test_a_lost_best_checkpoint_counts_anew(cut, capsys):
    (cut / BEST).unlink()
    assert train.main(["--resume", str(cut), "--num_epochs", "3"]) == 0
    if read_record(cut)["chosen"]["epoch"] == 3:
        assert "is lost and counts anew" in capsys.readouterr().out
    assert (cut / BEST).is_file()


def test_going_back_needs_another_folder_and_loses_nothing(whole, cut, capsys, tmp_path):
    older, names = cut / "step-00000028.pt", sorted(path.name for path in cut.iterdir())
    curves = {path: path.read_bytes() for path in whole.glob("events.*")}
    assert train.main(["--resume", str(older)]) == 2
    assert f"{cut / 'step-00000030.pt'} is later; continue with --resume {cut}" in capsys.readouterr().err
    assert sorted(path.name for path in cut.iterdir()) == names
    unmoved = whole / older.name  # whose settings name the folder of its curves
    assert train.main(["--resume", str(unmoved), "--model_name", str(tmp_path / "branch")]) == 0
    out = capsys.readouterr().out
    assert f"branches off {whole} into {tmp_path / 'branch'}" in out
    assert "is lost" not in out
    assert_same_weights(tmp_path / "branch", whole)
    assert read_record(tmp_path / "branch")["chosen"]["epoch"] == 2
    assert curves == {path: path.read_bytes() for path in whole.glob("events.*")}


def test_one_process_at_a_time_trains_into_a_folder_and_a_killed_one_leaves_it_free(flags, tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    hold = "import sys, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print('held', flush=True)\n"
    command = [sys.executable, "-c", f"{hold}sys.stdin.read()", str(folder / run_folder_module.LOCK)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        assert train.main([*flags, "--model_name", str(folder)]) == 2
        other.kill()
    assert f"--model_name {folder}: another process is training there" in capsys.readouterr().err
    assert train.main([*flags, "--model_name", str(folder), "--num_epochs", "1"]) == 0
    assert train.main([*flags, "--model_name", str(folder)]) == 2
    assert f"--model_name {folder}: holds a run already" in capsys.readouterr().err


# What may change


@pytest.mark.parametrize(
    ("change", "said", "steps"),
    [
        (["--learning_rate", "0.001"], ["--learning_rate 0.001 (was 0.0005)"], 30),
        (["--batch_size", "4", "--margin", "0.1"], ["--batch_size 4 (was 8)", "--margin 0.1 (was 0.2)"], 20 + 30),
        (["--seed", "3"], ["--seed 3 (was 0)"], 20 + 15),
    ],
)
def test_changes_of_the_recipe_are_refused_unless_allowed(flags, tmp_path, monkeypatch, capsys, change, said, steps):
    """Another order of pairs lets the epoch begin again, from the last checkpoint."""
    folder = tmp_path / "run"
    crashed(monkeypatch, 23, [*flags, "--model_name", str(folder)])
    best = (folder / BEST).read_bytes()
    assert train.main(["--resume", str(folder), *change]) == 2
    error = capsys.readouterr().err
    assert all(setting in error for setting in said)
    crashed(monkeypatch, 21, ["--resume", str(folder), *change, "--allow_changes"])
    assert (folder / BEST).read_bytes() == best
    assert train.main(["--resume", str(folder), *change, "--allow_changes"]) == 0
    out = capsys.readouterr().out
    assert all(setting in out[out.index("changed settings: ") :] for setting in said)
    assert ("epoch 2 begins again" in out) == (steps != 30)
    assert len(losses(folder)) == steps
    assert train.main(["--resume", str(folder), "--num_epochs", "3"]) == 0  # the new ones are the run's settings now
    assert read_checkpoint(folder / "last.pt")["settings"]["allow_changes"] is False


def test_a_setting_that_an_older_checkpoint_does_not_have_was_at_its_default(tmp_path):
    origin = Origin(tmp_path / "old.pt", {}, {})
    refuse_changes(TrainSettings(model_name=str(tmp_path)), origin)
    with pytest.raises(InputError, match=r"made with other settings: --global_head gpo \(was \)"):
        refuse_changes(TrainSettings(model_name=str(tmp_path), global_head="gpo"), origin)


@pytest.mark.parametrize("flag", [["--embed_size", "8"], ["--no_imgnorm"], ["--gate", "open"]])
def test_what_is_built_into_the_weights_cannot_change(cut, capsys, flag):
    assert train.main(["--resume", str(cut), *flag, "--allow_changes"]) == 2
    assert f"its weights were made with other settings: {flag[0]}" in capsys.readouterr().err


def test_the_folder_of_bert_may_have_moved_for_a_checkpoint_holds_all_of_it(cut, whole, tmp_path, capsys):
    run = shutil.copytree(cut, tmp_path / "run")
    assert train.main(["--resume", str(run), "--bert", "moved"]) == 0
    assert f"--bert moved (was {TINY_BERT}): not read, {run}" in capsys.readouterr().out
    assert_equal_runs(run, whole)


def test_other_data_are_refused_unless_allowed_and_the_same_elsewhere_are_the_same(
    cut, make_data, tiny_data, tmp_path, capsys
):
    shutil.copytree("/".join(tiny_data), tmp_path / "moved_precomp")
    assert train.main(["--resume", str(cut), "--data_path", str(tmp_path), "--data_name", "moved_precomp"]) == 0
    other = make_data(tmp_path / "other_precomp", images={"train": 22, "dev": 10})
    flags = ["--resume", str(cut), "--data_path", str(tmp_path), "--data_name", other.name, "--num_epochs", "3"]
    assert train.main(flags) == 2
    assert f"was trained on other data than train in {other}" in capsys.readouterr().err
    assert train.main([*flags, "--allow_changes"]) == 0
    assert f"changed data: train in {other}" in capsys.readouterr().out


# Weights alone


def test_the_best_weights_alone_continue_with_a_fresh_optimiser_where_nothing_else_is_left(cut, capsys):
    for path in run_folder_module.checkpoints(cut):
        if path.name != BEST:
            path.unlink()
    best = read_checkpoint(cut / BEST)["progress"]
    assert train.main(["--resume", str(cut), "--num_epochs", "3"]) == 0
    said = f"{cut / BEST} holds weights only: the optimiser starts fresh, at epoch {best['epoch'] + 1}"
    assert said in capsys.readouterr().out
    progress = read_checkpoint(cut / "last.pt")["progress"]
    assert progress["step"] == 3 * STEPS
    assert progress["best_rsum"] >= best["best_rsum"]


def test_a_run_folder_from_before_there_were_safetensors_continues_to_the_bit(whole, longer, cut):
    """There model_best.pt was a second name of a step file."""
    best = read_record(whole)["chosen"]["epoch"]
    old = torch.load(whole / "last.pt", weights_only=True)
    assert old["progress"]["epoch"] == 2
    (cut / BEST).unlink()
    torch.save(old, cut / "model_best.pt")
    assert train.main(["--resume", str(cut), "--num_epochs", "3"]) == 0
    assert read_record(cut)["chosen"]["epoch"] in (best, 3)  # it counts as the best
    assert losses(cut) == losses(longer)


def test_init_from_takes_other_data_too(flags, whole, make_data, tmp_path):
    make_data(tmp_path / "other", images={"train": 10, "dev": 5})
    run = ["--init_from", str(whole), "--data_path", str(tmp_path), "--data_name", "other", "--num_epochs", "1"]
    assert train.main([*flags, *run, "--model_name", str(tmp_path / "run")]) == 0


def test_init_from_starts_a_new_run_from_weights_alone(flags, whole, tmp_path, monkeypatch, capsys):
    first = []

    def spy(run, *args, train_step=loop.train_step):
        if not first:
            first.append({name: weight.clone() for name, weight in run.model.state_dict().items()})
            assert not run.optimizer.state
        return train_step(run, *args)

    monkeypatch.setattr(loop, "train_step", spy)
    new, size = tmp_path / "new", flags.index("--embed_size")
    fewer = flags[:size] + flags[size + 2 :]  # the size comes from the checkpoint
    elsewhere = ["--num_epochs", "1", "--model_name", str(new), "--bert", "elsewhere"]
    assert train.main([*fewer, "--init_from", str(whole), *elsewhere]) == 0
    best, out = whole / BEST, capsys.readouterr().out
    assert f"all weights start from {best}" in out
    assert f"--bert elsewhere (was {TINY_BERT}): not read, {best} holds language model and vocabulary" in out
    weights = read_checkpoint(best)["model"]
    assert all(torch.equal(first[0][name], weights[name]) for name in weights)
    progress = read_checkpoint(new / "last.pt")["progress"]
    assert (progress["epoch"], progress["step"], len(progress["history"])) == (1, STEPS, 1)
    auto, longer = ["--init_from", str(whole), "--resume", "auto"], ["--num_epochs", "2"]  # as a job queue repeats it
    assert train.main([*fewer, *elsewhere, *auto]) == 0  # at its end
    assert train.main([*fewer, *elsewhere[2:], *longer, *auto]) == 0
    assert read_checkpoint(new / "last.pt")["progress"]["step"] == 2 * STEPS
    once = ["--model_name", str(tmp_path / "once"), "--bert", "elsewhere"]
    assert train.main([*fewer, *once, *longer, *auto]) == 0
    assert losses(tmp_path / "once") == losses(new)
    refused = [*flags, "--init_from", str(whole), "--embed_size", "8", "--model_name", str(tmp_path / "x")]
    assert train.main(refused) == 2
    assert "--embed_size 8 (was 16)" in capsys.readouterr().err


def test_a_published_checkpoint_continues_with_a_fresh_optimiser(make_data, tmp_path, capsys):
    make_data(tmp_path / "f30k_precomp", img_dim=48)
    flags = ["--data_path", str(tmp_path), "--bert", str(TINY_BERT), "--device", "cpu", "--workers", "0"]
    command = ["--resume", str(PUBLISHED), *flags, "--model_name", str(tmp_path / "run"), "--num_epochs", "3"]
    assert train.main([*command, "--lr_update", "2"]) == 2
    assert "--lr_update 2 (was 15)" in capsys.readouterr().err
    assert train.main(command) == 0
    assert f"{PUBLISHED} holds weights only: the optimiser starts fresh, at epoch 2" in capsys.readouterr().out
    content = read_checkpoint(tmp_path / "run" / "last.pt")
    assert (content["settings"]["batch_size"], content["settings"]["max_violation"]) == (16, True)
    assert (content["progress"]["epoch"], content["progress"]["step"]) == (3, 6 + 2 * 7)
    assert build_model(content)[0].image_encoder.linear.in_features == 48
    assert train.main(["--resume", str(tmp_path / "run"), "--num_epochs", "4"]) == 0
