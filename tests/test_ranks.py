"""The helper that runs ranks: what a test is told about one that fails or hangs."""

import os
import signal
import time

import pytest

from lib import distributed
from lib.cli import InputError
from tests.ranks import RankFailed, run_ranks


def fail_in_the_second(kind):
    print("it starts")
    if distributed.rank() != 1 or kind == "hang":
        time.sleep(60)
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    raise InputError("wrong")


@pytest.mark.parametrize(
    ("kind", "error", "words"),
    [
        ("error", InputError, "wrong"),
        ("kill", RankFailed, "rank 1 was killed, exit code -9"),
        ("hang", RankFailed, r"(?s)ranks \[0, 1\] hang.*it starts.*in fail_in_the_second"),
    ],
)
def test_the_first_rank_to_fail_is_told_with_its_traceback_and_all_are_ended(monkeypatch, kind, error, words):
    monkeypatch.setattr("tests.ranks.GRACE", 0.1)
    monkeypatch.setattr("tests.ranks.DEADLINE", 1.0 if kind == "hang" else 60.0)
    with pytest.raises(error, match=words) as caught:
        run_ranks(fail_in_the_second, 2, kind)
    assert kind == "kill" or "in fail_in_the_second" in str(caught.value.__cause__ or caught.value)
