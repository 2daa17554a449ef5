"""Training by several processes: the same run as by one; where one of them fails, all end and one says why."""

import os
import re
import shutil
import signal
import sys
import threading
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed import run

import eval as eval_program
import train
from lib import distributed
from lib.checkpoints.native import BEST
from lib.cli import InputError
from lib.distributed import is_restarted, job, rank, world_size
from lib.model.engine import autograd
from lib.training import loop
from tests import mishap
from tests.conftest import TINY_BERT, assert_same_weights, bert_without_dropout
from tests.ranks import run_ranks, start_server

EXACT = 1e-8


@pytest.fixture(scope="module")
def flags(tiny_flags, tmp_path_factory):
    """A run without dropout, whose random numbers each process draws for itself."""
    return [*tiny_flags, "--bert", bert_without_dropout(tmp_path_factory.mktemp("model"))]


# In float64 equal to one process


class Seen(Exception):
    """What a run was started for."""


def train_in_float64(flags, steps, few_pairs=None):
    """A rank's run: figures and gradients of each of the first steps, and the weights after them."""
    torch.set_default_dtype(torch.float64)
    autograd.FEW_PAIRS["cpu"] = few_pairs or autograd.FEW_PAIRS["cpu"]
    seen, train_step = [], loop.train_step

    def spy(run, *args):
        figures = train_step(run, *args)
        gradients = {name: weight.grad.clone() for name, weight in run.model.named_parameters()}
        seen.append((figures.tolist(), gradients))
        if len(seen) == steps:
            raise Seen(seen, {name: weight.clone() for name, weight in run.model.state_dict().items()})
        return figures

    loop.train_step = spy
    try:
        train.main(flags)
    except Seen as all_seen:
        return all_seen.args
    finally:
        loop.train_step = train_step


def assert_close(tensors, others, exact=EXACT):
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        largest = max(others[name].abs().max().item(), 1e-3)
        assert (tensor - others[name]).abs().max().item() <= exact * largest, name


RECIPES = {
    "all negatives, captions in micro batches": (["--micro_batch", "2"], None),
    "hardest negatives, uneven batches": (["--batch_size", "11", "--max_violation", "--mask_padding"], None),
    "hardest negatives, only the pairs that count differentiated": (["--max_violation"], 1.0),
    "ramped, the diagonal gate": (
        ["--loss", "ramped", "--batch_size", "11", "--gate", "diagonal", "--no_same_image_negatives"],
        None,
    ),
    "global head": (
        ["--global_head", "gpo", "--loss", "ramped", "--batch_size", "11", "--no_same_image_negatives"],
        None,
    ),
    "pooled": (["--similarity", "gpo", "--batch_size", "11", "--mask_padding"], None),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_losses_gradients_and_weights_are_those_of_one_process(flags, tmp_path, recipe):
    extra, few_pairs = RECIPES[recipe]
    runs = []
    for count in (1, 3):
        folder = ["--model_name", str(tmp_path / str(count))]
        runs.append(run_ranks(train_in_float64, count, [*flags, *extra, *folder], 4, few_pairs))
    ((whole,), ranks) = runs
    for one in ranks:
        for (figures, gradients), (others, theirs) in zip(one.value[0], whole.value[0], strict=True):
            assert figures == pytest.approx(others, rel=EXACT, nan_ok=True)
            assert_close(gradients, theirs)
        assert_close(one.value[1], whole.value[1])


def seed_of_a_rank(flags):
    """What its random numbers start from in the first step."""
    loop.train_step = lambda *_: mishap.fail(Seen(torch.initial_seed()))
    try:
        train.main(flags)
    except Seen as seen:
        return seen.args[0]


def test_each_process_draws_dropout_of_its_own_and_the_first_one_that_of_a_single_process(tiny_flags, tmp_path):
    ranks = run_ranks(seed_of_a_rank, 2, [*tiny_flags, "--model_name", str(tmp_path / "run")])
    assert ranks[0].value == 0 != ranks[1].value


# Whole runs


def run_program(flags, own_seed=False):
    return train.main([*flags, "--seed", str(distributed.rank())] if own_seed else flags)


def start(flags, count, folder, *more):
    """A whole run by a number of processes; the outcomes of its ranks."""
    return run_ranks(run_program, count, [*flags, "--model_name", str(folder), "--log_step", "1", *more])


@pytest.fixture(scope="module")
def by_two(tiny_flags, tmp_path_factory):
    """The folder of a run of two epochs by two processes, with dropout."""
    folder = tmp_path_factory.mktemp("runs") / "two"
    ranks = start(tiny_flags, 2, folder, "--num_epochs", "2", "--keep", "99", "--save_steps", "10")
    assert [rank.value for rank in ranks] == [0, 0]
    assert "epoch 1 step 15 loss" in ranks[0].out
    assert "2 processes" in ranks[0].out
    assert [ranks[1].out, ranks[0].err, ranks[1].err] == ["", "", ""]
    names = {path.name for path in folder.iterdir() if not path.name.startswith("events.")}
    steps = {f"step-{step:08d}.pt" for step in (10, 15, 20, 30)}
    assert names == {*steps, "last.pt", BEST, "run.json", "run.log", "run.lock"}  # the first process alone writes
    assert len(list(folder.glob("events.*"))) == 1
    return folder


def test_a_signal_to_one_process_ends_all_after_the_same_step_and_the_resumed_run_equals_to_the_bit(
    tiny_flags, by_two, tmp_path
):
    """Each process's dropout continues where it was."""
    folder = tmp_path / "run"
    flags = [*tiny_flags, "--num_epochs", "2", "--model_name", str(folder), "--save_steps", "10"]
    ranks = run_ranks(mishap.main, 2, "SIGTERM", 7, flags)
    assert [rank.value for rank in ranks] == [143, 143]
    said = f"SIGTERM: saved after step 7; continue with: python train.py --resume {folder}\n"
    assert [rank.err for rank in ranks] == [said, ""]
    run_ranks(run_program, 2, ["--resume", str(folder)])
    assert_same_weights(folder, by_two)


def test_another_number_of_processes_continues_and_says_what_changes(flags, tmp_path):
    whole, folder = tmp_path / "whole", tmp_path / "changing"
    start(flags, 1, whole, "--num_epochs", "2")
    start(flags, 2, folder, "--num_epochs", "1")
    (outcome,) = run_ranks(run_program, 1, ["--resume", str(folder), "--num_epochs", "2"])
    assert "number of processes: 2 before, 1 now, so dropout draws other random numbers" in outcome.out
    losses = [re.findall(r"step \d+ loss ([\d.]+)", (one / "run.log").read_text()) for one in (folder, whole)]
    assert list(map(float, losses[0])) == pytest.approx(list(map(float, losses[1])), rel=1e-3)


def test_processes_with_different_flags_and_fewer_pairs_than_processes_are_refused(tiny_flags, tmp_path):
    flags = [*tiny_flags, "--model_name", str(tmp_path / "run")]
    ranks = run_ranks(run_program, 2, flags, True)
    assert [rank.value for rank in ranks] == [2, 2]
    assert ranks[0].err.startswith("error: rank 0: --seed: 0 of rank 0 but 1 of rank 1; start all processes with")
    ranks = run_ranks(run_program, 3, [*flags, "--batch_size", "2"])
    assert [rank.value for rank in ranks] == [2, 2, 2]
    assert "--batch_size 2: fewer pairs than the 3 processes" in ranks[0].err


def on_own_data(flags, paths, program):
    return (train if program == "train" else eval_program).main([*flags, "--data_path", paths[distributed.rank()]])


@pytest.mark.parametrize("program", ["train", "eval"])
def test_processes_that_see_different_data_are_refused(tiny_flags, tiny_data, trained_run, tmp_path, program):
    other = tmp_path / tiny_data[1]
    shutil.copytree(Path(*tiny_data), other)
    for split in ("train", "test"):
        captions = (other / f"{split}_caps.txt").read_text()
        (other / f"{split}_caps.txt").write_text(captions.replace("ball", "bell", 1))
    flags = [*tiny_flags, "--model_name", str(tmp_path / "run")]
    if program == "eval":
        flags = ["--checkpoint", str(trained_run), "--data_name", tiny_data[1], "--workers", "0", "--device", "cpu"]
    ranks = run_ranks(on_own_data, 2, flags, [tiny_data[0], str(tmp_path)], program)
    assert [rank.value for rank in ranks] == [2, 2]
    assert re.match(r"error: rank 0: the data.*: '\w+' of rank 0 but '\w+' of rank 1; start all", ranks[0].err)
    assert not (tmp_path / "run").exists()


def test_processes_that_see_different_vocabularies_are_refused(tiny_flags, tmp_path):
    bert = shutil.copytree(TINY_BERT, tmp_path / "bert")
    words = (bert / "vocab.txt").read_text().split("\n")
    words[-3], words[-2] = words[-2], words[-3]
    (bert / "vocab.txt").write_text("\n".join(words))
    ranks = run_ranks(with_own_bert, 2, [*tiny_flags, "--model_name", str(tmp_path / "run")], str(bert))
    assert [rank.value for rank in ranks] == [2, 2]
    assert "the vocabulary of --bert: " in ranks[0].err


def with_own_bert(flags, bert):
    return train.main([*flags, "--bert", bert] if distributed.rank() else flags)


# Mishaps


@pytest.fixture
def unlucky(tiny_flags, tmp_path):
    return [*tiny_flags, "--save_steps", "5", "--model_name", str(tmp_path / "run")]


@pytest.fixture
def torchrun(monkeypatch, capfd, tmp_path):
    """Starts a job of two processes in torchrun's way, by flags of its own; each is forked like those of `run_ranks`.

    Returns the exit code, what torchrun says, and what the processes print, of each of its attempts and in this order.
    """
    handlers = {one: signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)}

    def launch(happening, *flags):
        def launcher(config, entrypoint, elastic_launch=run.elastic_launch):
            forking = replace(config, start_method="forkserver")
            return lambda *_: elastic_launch(forking, end_with_code)(*happening)

        monkeypatch.setattr(run, "elastic_launch", launcher)
        logs = ["--redirects", "3", "--log_dir", str(tmp_path / "logs")]
        monkeypatch.setattr(sys, "argv", ["torchrun", "--standalone", "--nproc_per_node", "2", *flags, *logs, "train"])
        start_server()
        capfd.readouterr()
        code = distributed.launch()
        files = [sorted((tmp_path / "logs").rglob(f"{name}.log")) for name in ("stdout", "stderr")]
        return code, capfd.readouterr().err, *("".join(path.read_text() for path in paths) for paths in files)

    yield launch
    for one, handler in handlers.items():
        signal.signal(one, handler)


def end_with_code(*happening):
    torch.set_num_threads(1)
    sys.exit(mishap.main(*happening))


def test_torchrun_names_a_killed_process_restarts_the_job_and_it_ends_with_the_same_weights(
    unlucky, by_two, torchrun, tmp_path
):
    size = unlucky.index("--img_dim")  # left out: what the data gives is among the checkpoint's settings
    flags = unlucky[:size] + unlucky[size + 2 :]
    code, said, out, err = torchrun(("killed", 7, flags), "--max_restarts", "1")
    assert code == 0, said
    assert "Signal 9 (SIGKILL)" in said or "exitcode: -9" in said
    assert "error: " not in err  # the survivor has nothing to say
    assert f"continues {tmp_path / 'run' / 'step-00000005.pt'}: 5 steps done" in out
    left = []
    for output in Path("/proc").glob("[0-9]*/fd/1"):
        with suppress(OSError):
            left += [output] * str(output.readlink()).startswith(str(tmp_path))
    assert not left
    assert_same_weights(tmp_path / "run", by_two / "step-00000015.pt")


def test_a_missing_data_set_is_one_line_and_no_traceback_where_the_scripts_start_processes(unlucky, torchrun, tmp_path):
    code, _, _, err = torchrun(("none", 0, [*unlucky, "--data_path", str(tmp_path)]))
    assert code == 2  # of torchrun's own program it would be an exception
    assert err.count("\n") == err.count(f"error: rank 0: no data set at {tmp_path}") == 1


def fail_within_the_job():
    """Where the other process has given no sign of life yet. Returns how many threads are left."""
    if distributed.rank() == 1:
        distributed._watch = threading.Event.wait
    with suppress(InputError), distributed.joined(torch.device("cpu")):
        torch.distributed.barrier()  # else the first may end, and the store with it, while the other one still connects
        raise InputError("wrong")
    return threading.active_count()


def test_a_process_that_fails_leaves_no_thread_that_would_abort_it_while_it_ends():
    assert [rank.value for rank in run_ranks(fail_within_the_job, 2)] == [1, 1]


def test_a_restart_does_not_continue_another_jobs_run(unlucky, monkeypatch, capsys):
    assert train.main(unlucky) == 0
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another job")
    assert train.main(unlucky) == 2
    assert "holds a run already" in capsys.readouterr().err


def test_a_process_that_hangs_is_named_and_the_job_ends(unlucky):
    ranks = run_ranks(mishap.main, 3, "hanging", 7, unlucky, check=False)
    assert {rank.exitcode for rank in ranks} == {1}
    said = "error: rank 2 hangs: no process of the job has made progress for 4 seconds; what was saved stays\n"
    assert "".join(rank.err for rank in ranks) == said


@pytest.mark.parametrize(
    ("what", "code", "said"),
    [
        ("out of memory", 1, "error: rank 1: out of memory (CUDA out of memory. Tried to allocate 2.00 GiB.); take a"),
        ("wrong input", 2, "error: rank 1: x.npy: NaN or infinite features\n"),
    ],
)
def test_the_process_that_fails_says_why_and_no_other(unlucky, what, code, said):
    ranks = run_ranks(mishap.main, 2, what, 7, unlucky, check=False)
    assert ranks[1].value == code
    assert ranks[1].err.startswith(said)
    assert "error: rank 0: another process of the job has ended" in ranks[0].err


def test_the_job_and_its_processes_are_known_from_torchruns_environment(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "4")  # some schedulers set it for other purposes
    assert (world_size(), rank(), is_restarted()) == (1, 0, False)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a name")
    assert job() == "a name"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("MASTER_ADDR", "node")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert job() == f"node:29500 {os.getppid()}"
