"""A job of which one process fails: all of it ends, one process says why, nothing is left behind."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from lib.checkpoints.native import read_checkpoint
from lib.distributed import is_restarted, job, rank, world_size
from tests import mishap
from tests.ranks import run_ranks

ROOT = Path(train.__file__).parent


@pytest.fixture
def flags(tiny_flags, tmp_path):
    return [*tiny_flags, "--save_steps", "5", "--model_name", str(tmp_path / "run")]


def torchrun(*arguments):
    """The outcome of a job of two processes; arguments: of torchrun, then a mishap's."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def processes_of(folder):
    """Processes that mention a folder in their command."""
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.is_file()]
    return [command for command in commands if str(folder).encode() in command]


def test_a_killed_process_ends_the_job_and_is_named(flags, tmp_path):
    done = torchrun("-m", "tests.mishap", "killed", "7", *flags)
    assert done.returncode == 1
    assert "error: " not in done.stderr  # the survivor has nothing to say: torchrun does it
    root_cause = done.stderr.split("Root Cause")[1]
    assert "rank      : 1" in root_cause
    assert "Signal 9 (SIGKILL)" in root_cause
    assert read_checkpoint(tmp_path / "run" / "last.pt")["progress"]["step"] == 5
    assert not processes_of(tmp_path)


def test_torchruns_restart_goes_on_from_the_last_checkpoint_and_ends_with_the_same_weights(flags, tmp_path):
    done = torchrun("--max_restarts", "1", "-m", "tests.mishap", "killed", "7", *flags)
    assert done.returncode == 0, done.stderr
    assert f"goes on from {tmp_path / 'run' / 'step-00000005.pt'}: 5 steps done" in done.stdout
    run_ranks(mishap.main, 2, "none", 0, [*flags, "--model_name", str(tmp_path / "undisturbed")])
    ours, theirs = (read_checkpoint(tmp_path / name / "last.pt")["model"] for name in ("run", "undisturbed"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_restart_does_not_go_on_with_another_jobs_run(flags, monkeypatch, capsys):
    assert train.main(flags) == 0
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another job")
    capsys.readouterr()
    assert train.main(flags) == 2
    assert "holds a run already" in capsys.readouterr().err


def test_a_process_that_hangs_is_named_and_the_job_ends(flags):
    ranks = run_ranks(mishap.main, 3, "hanging", 7, flags, check=False)
    assert {rank.exitcode for rank in ranks} == {1}
    said = "error: rank 2 hangs: no process of the job has made progress for 4 seconds; the last checkpoint stays\n"
    assert "".join(rank.err for rank in ranks) == said


@pytest.mark.parametrize(
    ("what", "code", "said"),
    [
        ("out of memory", 1, "error: rank 1: out of memory (CUDA out of memory. Tried to allocate 2.00 GiB.); take a"),
        ("wrong input", 2, "error: rank 1: x.npy: NaN or infinite features\n"),
    ],
)
def test_the_process_that_fails_says_why_and_no_other(flags, what, code, said):
    ranks = run_ranks(mishap.main, 2, what, 7, flags, check=False)
    assert ranks[1].value == code
    assert ranks[1].err.startswith(said)
    assert "error: rank 0: another process of the job has ended" in ranks[0].err


def test_without_torchrun_there_is_one_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    assert (world_size(), rank(), is_restarted()) == (1, 0, False)
    monkeypatch.setenv("WORLD_SIZE", "4")  # some schedulers set it for other purposes
    assert (world_size(), rank()) == (1, 0)


def test_a_job_is_known_by_torchruns_name_for_it_or_by_its_torchrun(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a name")
    assert job() == "a name"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("MASTER_ADDR", "node")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert job() == f"node:29500 {os.getppid()}"
