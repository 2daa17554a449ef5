"""The helper that runs ranks: what a test is told about them."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from lib import distributed
from lib.cli import InputError, Interrupted
from tests.ranks import RankFailed, run_ranks


def sum_of_ranks(start):
    print(f"rank {distributed.rank()} of {distributed.world_size()}")
    with distributed.joined(torch.device("cpu")):
        total = torch.tensor([start + distributed.rank()])
        dist.all_reduce(total)
    return total, torch.get_num_threads()


def test_ranks_form_a_job_and_return_values_and_output():
    outcomes = run_ranks(sum_of_ranks, 3, 10)
    assert [(total.item(), threads) for (total, threads), *_ in outcomes] == [(33, 1)] * 3
    assert [(one.out, one.exitcode) for one in outcomes] == [(f"rank {k} of 3\n", 0) for k in range(3)]


def fail_in_the_second(kind):
    if distributed.rank() != 1:
        time.sleep(60)
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    raise {"error": InputError("wrong"), "interrupted": Interrupted("ended", 2), "exit": SystemExit(3)}[kind]


@pytest.mark.parametrize(
    ("kind", "error", "words"),
    [
        ("error", InputError, "wrong"),
        ("interrupted", RankFailed, "ended"),
        ("exit", RankFailed, "SystemExit: 3"),
        ("kill", RankFailed, "rank 1 was killed, exit code -9"),
    ],
)
def test_what_the_first_rank_to_fail_raises_is_raised_with_its_traceback(monkeypatch, kind, error, words):
    monkeypatch.setattr("tests.ranks.GRACE", 0.1)
    with pytest.raises(error, match=words) as caught:
        run_ranks(fail_in_the_second, 2, kind)
    if kind != "kill":
        assert "in fail_in_the_second" in str(caught.value.__cause__ or caught.value)
    outcomes = run_ranks(fail_in_the_second, 2, kind, check=False)
    assert [one.exitcode for one in outcomes] == [-9, -9 if kind == "kill" else 1]


def sleep_in_the_first():
    print("it sleeps")
    if distributed.rank() == 0:
        time.sleep(60)


def test_a_job_that_hangs_is_killed_and_says_where():
    with pytest.raises(RankFailed, match=r"(?s)ranks \[0\] hang.*it sleeps.*in sleep_in_the_first"):
        run_ranks(sleep_in_the_first, 2, deadline=1)
