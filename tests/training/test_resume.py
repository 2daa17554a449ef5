"""A run that was interrupted anywhere and goes on equals one that was not; what may change meanwhile is said."""

import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch

import train
from lib.checkpoints.native import build_model, read_checkpoint
from lib.training import folder as folder_module
from lib.training import train as training
from lib.training.interruption import SIGNALS, Interruption
from tests.conftest import GOLDEN, TINY_BERT

LOSS = re.compile(r"step (\d+) loss ([\d.]+) gradient ([\d.]+) rate ([\d.e-]+)")
PUBLISHED = GOLDEN / "official_format_checkpoint.pth.tar"
STEPS = 15  # of an epoch


class Crash(Exception):
    """What no part of the program expects."""


@pytest.fixture(scope="module")
def flags(tiny_flags):
    return [*tiny_flags, "--num_epochs", "3", "--lr_update", "2", "--log_step", "1", "--save_steps", "4", "--keep", "3"]


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    """The folder of a run of three epochs that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert train.main([*flags, "--model_name", str(folder)]) == 0
    return folder


@pytest.fixture
def cut(whole, tmp_path):
    """A copy of the run as it stood 10 steps before its end: checkpoints of steps 32, 36 and 45 are its newest."""
    shutil.copytree(whole, tmp_path / "cut")
    return tmp_path / "cut"


def losses(folder):
    """Figures by step, as the log states them last."""
    return {int(step): rest for step, *rest in LOSS.findall((folder / "run.log").read_text())}


def assert_equal_runs(one, other):
    assert losses(one) == losses(other)
    for name in ("last.pt", "model_best.pt"):
        a, b = (read_checkpoint(folder / name) for folder in (one, other))
        assert a["model"].keys() == b["model"].keys()
        assert all(torch.equal(a["model"][key], b["model"][key]) for key in a["model"])
        assert a["progress"] == b["progress"]
        assert torch.equal(a["random_state"]["torch"], b["random_state"]["torch"])


def crash_at(monkeypatch, step, happening):
    """Let something happen as training comes to a step: before its update, or in the evaluation after its epoch."""
    train_step, embed_split = training.train_step, training.embed_split

    def stepping(run, *args):
        if run.progress.step + 1 == step:
            happening(run)
        return train_step(run, *args)

    def scoring(*args):
        if step == "dev":
            happening(None)
        return embed_split(*args)

    monkeypatch.setattr(training, "train_step", stepping)
    monkeypatch.setattr(training, "embed_split", scoring)


def crash(_run):
    raise Crash


# Equal to a run that was not interrupted


@pytest.mark.parametrize("step", [2, 5, 15, 16, 33, "dev"])
def test_a_run_that_crashed_anywhere_ends_as_if_it_had_not(flags, whole, tmp_path, monkeypatch, step):
    command = [*flags, "--model_name", str(tmp_path / "run"), "--resume", "auto"]
    with monkeypatch.context() as patch:
        crash_at(patch, step, crash)
        with pytest.raises(Crash):
            train.main(command)
    assert train.main(command) == 0
    assert_equal_runs(tmp_path / "run", whole)


@pytest.mark.parametrize("name", ["model_best.pt", "last.pt"])
def test_a_kill_between_a_checkpoint_and_its_second_names_loses_neither(flags, whole, tmp_path, monkeypatch, name):
    best = read_checkpoint(whole / "model_best.pt")["progress"]["epoch"]
    short = [*flags, "--num_epochs", str(best if name == "model_best.pt" else 3), "--model_name", str(tmp_path / "run")]
    cut_at = f"step-{STEPS * best:08d}.pt" if name == "model_best.pt" else "step-00000045.pt"

    def cut_off(file, second, plain=folder_module._name_too):
        if (file.name, second.name) == (cut_at, name):
            raise Crash
        plain(file, second)

    with monkeypatch.context() as patch:
        patch.setattr(folder_module, "_name_too", cut_off)
        with pytest.raises(Crash):
            train.main(short)
    assert train.main(["--resume", str(tmp_path / "run"), "--num_epochs", "3"]) == 0
    assert_equal_runs(tmp_path / "run", whole)


@pytest.mark.parametrize(
    "extra", [["--mask_padding", "--no_imgnorm", "--no_txtnorm"], ["--workers", "2"], ["--device_features"]]
)
def test_so_does_one_with_other_settings(flags, tmp_path, monkeypatch, extra):
    command = [*flags, *extra, "--num_epochs", "2"]
    assert train.main([*command, "--model_name", str(tmp_path / "whole")]) == 0
    with monkeypatch.context() as patch:
        crash_at(patch, 23, crash)
        with pytest.raises(Crash):
            train.main([*command, "--model_name", str(tmp_path / "cut")])
    assert train.main(["--resume", str(tmp_path / "cut")]) == 0
    assert_equal_runs(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("step", [7, 15, "dev"])
def test_a_signal_ends_the_step_saves_and_says_how_to_go_on(flags, whole, tmp_path, monkeypatch, capsys, number, step):
    with monkeypatch.context() as patch:
        crash_at(patch, step, lambda run: os.kill(os.getpid(), number))
        assert train.main([*flags, "--model_name", str(tmp_path / "run")]) == 128 + number
    said = capsys.readouterr().err
    done = {7: 7, 15: 15, "dev": 15}[step]
    go_on = f"python train.py --resume {tmp_path / 'run'}"
    assert said == f"{number.name}: saved after step {done}; go on with: {go_on}\n"
    assert read_checkpoint(tmp_path / "run" / "last.pt")["progress"]["batch"] == done
    assert train.main(go_on.split()[2:]) == 0
    assert_equal_runs(tmp_path / "run", whole)


def test_a_second_signal_ends_the_process_as_it_always_did():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background may ignore it
    with Interruption() as interruption:
        os.kill(os.getpid(), signal.SIGINT)
        assert interruption.agree() == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler


def test_loader_workers_leave_signals_to_the_main_process(flags, whole, tmp_path):
    """A scheduler's SIGTERM reaches the whole process group: workers go on until the step is saved."""
    program = [sys.executable, train.__file__, *flags, "--workers", "2", "--model_name", str(tmp_path / "run")]
    slow = "import sys, os, signal, lib.training.train as t; sys.argv = sys.argv[1:]; step = t.train_step\n"
    slow += "def kill(run, *rest):\n    if run.progress.step == 5: os.killpg(0, signal.SIGTERM)\n"
    slow += "    return step(run, *rest)\nt.train_step = kill\nimport train; sys.exit(train.main(sys.argv[1:]))"
    command = [program[0], "-c", slow, *program[1:]]
    root = os.path.dirname(train.__file__)
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, start_new_session=True)
    assert done.returncode == 143, done.stderr
    assert done.stderr.startswith("SIGTERM: saved after step 6; go on with: ")
    assert train.main(["--resume", str(tmp_path / "run")]) == 0
    assert_equal_runs(tmp_path / "run", whole)


# Where to go on


def test_auto_starts_a_run_where_there_is_none_and_then_goes_on_with_it(flags, tmp_path, capsys):
    command = [*flags, "--num_epochs", "1", "--model_name", str(tmp_path / "run"), "--resume", "auto"]
    assert train.main(command) == 0
    assert "goes on" not in capsys.readouterr().out
    assert train.main(command) == 0
    out = capsys.readouterr().out
    assert f"goes on from {tmp_path / 'run' / 'step-00000015.pt'}: 15 steps done" in out
    assert "all 1 epochs are done; a larger --num_epochs goes on" in out


def test_a_larger_num_epochs_extends_a_finished_run_at_the_rate_of_its_epoch(whole, cut):
    assert train.main(["--resume", str(cut), "--num_epochs", "4", "--log_step", "1"]) == 0
    before, after = (read_checkpoint(folder / "last.pt")["progress"] for folder in (whole, cut))
    assert (before["epoch"], after["epoch"], after["step"]) == (3, 4, 60)
    assert after["history"][:3] == before["history"]
    assert after["best_rsum"] >= before["best_rsum"]
    assert {rate for _, _, rate in list(losses(cut).values())[-STEPS:]} == {"5.0e-05"}


@pytest.mark.parametrize("damaged", [["step-00000045.pt", "last.pt"], ["step-00000045.pt", "step-00000044.pt"]])
def test_the_newest_sound_checkpoint_is_used_and_damage_is_said(whole, cut, capsys, damaged):
    for name in damaged:
        content = bytearray((cut / name).read_bytes())
        content[len(content) // 2] ^= 4
        (cut / name).unlink()  # another file: last.pt may be its second name
        (cut / name).write_bytes(content)
    assert train.main(["--resume", str(cut)]) == 0
    out = capsys.readouterr().out
    for name in damaged:
        if name != "last.pt":
            assert f"warning: {cut / name}: damaged" in out
            assert (cut / f"{name}.damaged").is_file()
    assert_equal_runs(cut, whole)


def test_a_folder_without_any_sound_checkpoint_is_refused(cut, capsys):
    for path in cut.glob("*.pt"):
        path.unlink()
    for name in ("step-00000045.pt", "model_best.pt"):
        (cut / name).write_bytes(b"PK nothing")
    assert train.main(["--resume", str(cut)]) == 2
    assert f"error: {cut}: none of its 2 checkpoints is whole; " in capsys.readouterr().err


def test_a_lost_best_checkpoint_counts_anew(cut, capsys):
    (cut / "model_best.pt").unlink()
    assert train.main(["--resume", str(cut), "--num_epochs", "4"]) == 0
    assert "is lost and counts anew" in capsys.readouterr().out
    assert read_checkpoint(cut / "model_best.pt")["progress"]["epoch"] == 4


def test_going_back_needs_another_folder_and_loses_nothing(whole, cut, capsys, tmp_path):
    older = cut / "step-00000044.pt"
    names = sorted(path.name for path in cut.iterdir())
    assert train.main(["--resume", str(older)]) == 2
    assert f"{cut / 'step-00000045.pt'} is later; go on with --resume {cut}" in capsys.readouterr().err
    assert sorted(path.name for path in cut.iterdir()) == names
    assert train.main(["--resume", str(older), "--model_name", str(tmp_path / "branch")]) == 0
    assert f"branches off {cut} into {tmp_path / 'branch'}" in capsys.readouterr().out
    a, b = (read_checkpoint(folder / "last.pt")["model"] for folder in (whole, tmp_path / "branch"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert read_checkpoint(tmp_path / "branch" / "model_best.pt")["progress"]["epoch"] == 3


def test_a_run_folder_may_be_moved(whole, cut, tmp_path):
    shutil.move(cut, tmp_path / "moved")
    assert train.main(["--resume", str(tmp_path / "moved"), "--num_epochs", "4"]) == 0
    assert read_checkpoint(tmp_path / "moved" / "last.pt")["progress"]["epoch"] == 4
    assert not cut.exists()
    assert len(list((tmp_path / "moved").glob("events*"))) == 2


def test_a_checkpoint_cannot_send_logs_out_of_its_folder(cut, tmp_path):
    content = torch.load(cut / "last.pt", weights_only=True)
    content["settings"]["model_name"] = "runs/x"
    content["settings"]["logger_name"] = "runs/x/../../../elsewhere"
    content["progress"]["step"] = 46
    torch.save(content, cut / "step-00000046.pt")
    assert train.main(["--resume", str(cut)]) == 0
    assert not (tmp_path / "elsewhere").exists()
    assert len(list(cut.glob("events*"))) == 2


def test_two_processes_cannot_train_into_one_folder(flags, tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    hold = "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.lockf(file, fcntl.LOCK_EX); print(); "
    hold += "sys.stdout.flush(); input()"
    with subprocess.Popen(
        [sys.executable, "-c", hold, folder / "run.lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        other.stdout.readline()
        assert train.main([*flags, "--model_name", str(folder)]) == 2
        other.communicate(b"\n")
    assert f"--model_name {folder}: another process is training there" in capsys.readouterr().err


# What may change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--learning_rate", "0.001"], "--learning_rate 0.001 (was 0.0005)"),
        (["--device_features"], "--device_features True (was False)"),
        (["--batch_size", "4", "--seed", "3"], "--batch_size 4 (was 8), --seed 3 (was 0)"),
    ],
)
def test_changed_settings_are_refused_unless_allowed(flags, tmp_path, monkeypatch, capsys, change, said):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        crash_at(patch, 23, crash)
        with pytest.raises(Crash):
            train.main([*flags, "--model_name", str(folder)])
    assert train.main(["--resume", str(folder), *change]) == 2
    assert said in capsys.readouterr().err
    assert train.main(["--resume", str(folder), "--num_epochs", "2", *change, "--allow_changes"]) == 0
    out = capsys.readouterr().out
    assert f"changed settings: {said}" in out
    again = "--batch_size" in change
    assert ("epoch 2 begins again" in out) == again
    assert len(losses(folder)) == (20 + 30 if again else 30)
    assert train.main(["--resume", str(folder), "--num_epochs", "3"]) == 0  # the new ones are the run's settings now
    assert read_checkpoint(folder / "last.pt")["settings"]["allow_changes"] is False


@pytest.mark.parametrize("flag", [["--embed_size", "8"], ["--no_imgnorm"], ["--bert", "other"]])
def test_what_is_built_into_the_weights_cannot_change(cut, capsys, flag):
    assert train.main(["--resume", str(cut), *flag, "--allow_changes"]) == 2
    assert f"its weights were made with other settings: {flag[0]}" in capsys.readouterr().err


def test_other_data_are_refused_unless_allowed(cut, make_data, tmp_path, capsys):
    other = make_data(tmp_path / "other_precomp", images={"train": 22, "dev": 10})
    flags = ["--resume", str(cut), "--data_path", str(tmp_path), "--data_name", other.name, "--num_epochs", "4"]
    assert train.main(flags) == 2
    assert f"was trained on other data than train in {other}" in capsys.readouterr().err
    assert train.main([*flags, "--allow_changes"]) == 0
    assert f"changed data: train in {other}" in capsys.readouterr().out


def test_the_same_data_elsewhere_are_the_same(cut, tiny_data, tmp_path):
    shutil.copytree("/".join(tiny_data), tmp_path / "moved_precomp")
    assert train.main(["--resume", str(cut), "--data_path", str(tmp_path), "--data_name", "moved_precomp"]) == 0


# Weights alone


def test_init_from_starts_a_new_run_from_weights_alone(flags, whole, tmp_path, monkeypatch, capsys):
    first = []

    def spy(run, *args, train_step=training.train_step):
        if not first:
            first.append({name: weight.clone() for name, weight in run.model.state_dict().items()})
            assert not run.optimizer.state
        return train_step(run, *args)

    monkeypatch.setattr(training, "train_step", spy)
    new = tmp_path / "new"
    size = flags.index("--embed_size")
    fewer = flags[:size] + flags[size + 2 :]  # the size comes from the checkpoint
    command = [*fewer, "--init_from", str(whole), "--num_epochs", "1", "--model_name", str(new)]
    assert train.main(command) == 0
    assert f"weights, BERT's too, start from {whole / 'model_best.pt'}" in capsys.readouterr().out
    weights = read_checkpoint(whole / "model_best.pt")["model"]
    assert all(torch.equal(first[0][name], weights[name]) for name in weights)
    progress = read_checkpoint(new / "last.pt")["progress"]
    assert (progress["epoch"], progress["step"], len(progress["history"])) == (1, STEPS, 1)
    assert train.main(["--resume", str(new), "--num_epochs", "2"]) == 0
    assert (
        train.main([*flags, "--init_from", str(whole), "--embed_size", "8", "--model_name", str(tmp_path / "x")]) == 2
    )
    assert "--embed_size 8 (was 16)" in capsys.readouterr().err


def test_init_from_and_resume_exclude_each_other(flags, whole, capsys):
    assert train.main([*flags, "--init_from", str(whole), "--resume", "auto"]) == 2
    assert "--init_from: starts a new run, --resume goes on with one" in capsys.readouterr().err


def test_a_published_checkpoint_goes_on_with_a_fresh_optimiser(make_data, tmp_path, capsys):
    make_data(tmp_path / "f30k_precomp", img_dim=48)
    flags = ["--data_path", str(tmp_path), "--bert", str(TINY_BERT), "--device", "cpu", "--workers", "0"]
    command = ["--resume", str(PUBLISHED), *flags, "--model_name", str(tmp_path / "run")]
    assert train.main([*command, "--num_epochs", "3", "--lr_update", "2", "--log_step", "1"]) == 2
    assert "--lr_update 2 (was 15)" in capsys.readouterr().err
    assert train.main([*command, "--num_epochs", "3", "--log_step", "1"]) == 0
    assert f"{PUBLISHED} holds weights and settings only: the optimiser starts fresh, at epoch 2" in (
        capsys.readouterr().out
    )
    content = read_checkpoint(tmp_path / "run" / "last.pt")
    assert (content["settings"]["batch_size"], content["settings"]["max_violation"]) == (16, True)
    assert (content["progress"]["epoch"], content["progress"]["step"]) == (3, 6 + 2 * 7)
    assert build_model(content)[0].image_encoder.linear.in_features == 48
    assert train.main(["--resume", str(tmp_path / "run"), "--num_epochs", "4"]) == 0
