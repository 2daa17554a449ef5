"""Runs a function in several processes that take themselves for a job that torchrun has started.

Each is forked from a server that has imported the heavy modules once, so that a job starts in a fraction of a second.
"""

import faulthandler
import multiprocessing
import os
import pickle
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

DEADLINE = 120.0  # seconds after which a job is killed and its test fails
GRACE = 5.0  # seconds that the others get to end by themselves where one has failed
HEAVY = ("torch", "transformers", "eval", "train", "lib.evaluation.evaluate", "lib.training.train", "tests.conftest")
ENVIRONMENT = {
    **{"HF_HUB_OFFLINE": "1", "TRITON_INTERPRET": "1"},  # as conftest.py sets it
    **{"TORCH_CPP_LOG_LEVEL": "ERROR"},  # as lib.distributed.keep_quiet does, which is too late for a forked process
    "MASTER_ADDR": "127.0.0.1",
}

ROOT = Path(__file__).resolve().parents[1]

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(list(HEAVY))


class Outcome(NamedTuple):
    """What became of one rank."""

    value: Any  # what the function returned, None where it raised
    out: str  # all of its stdout
    err: str  # and of its stderr
    exitcode: int | None  # of the process: 0 where the function returned, 1 where it raised, -9 where it was killed
    error: BaseException | None  # what the function raised; its cause holds the rank's traceback


class RankFailed(Exception):
    """A rank that died without a word, hung, or raised what cannot be handed over; the message holds all it said."""


def run_ranks(
    target: Callable, count: int, *args, deadline: float = DEADLINE, check: bool = True, **environment: str
) -> list[Outcome]:
    """Run target(*args) in each of `count` ranks of one job, on one thread each; the outcomes in order of ranks.

    target: a function of a module; it can ask lib.distributed who it is. environment: further variables. Raises what
    the first rank to fail has raised, with that rank's traceback as its cause; check=False: nothing is raised,
    the outcomes tell. A job that takes longer than the deadline is killed in any case, and RankFailed raised.
    """
    work, environment = pickle.dumps((target, args)), {"MASTER_PORT": str(_free_port()), **environment}
    _start_server()
    with tempfile.TemporaryDirectory() as folder:
        ranks = []
        try:
            for number in range(count):
                ranks.append(_Rank(number, count, work, environment, Path(folder), deadline))
            failed = _wait_for(ranks, deadline)
        finally:
            for rank in ranks:
                rank.end()
        outcomes = [rank.outcome() for rank in ranks]
    if hanging := [rank.number for rank in ranks if rank.killed and failed is None]:
        raise RankFailed(f"ranks {hanging} hang: killed after {deadline:.0f} s\n{_all_said(outcomes)}")
    if check and failed is not None:
        outcome = outcomes[failed]
        raise outcome.error or RankFailed(
            f"rank {failed} died without a word, exit code {outcome.exitcode}\n{_all_said(outcomes)}"
        )
    return outcomes


class _Rank:
    """A process of the job, seen from outside."""

    def __init__(self, number: int, count: int, work: bytes, environment: dict, folder: Path, deadline: float):
        self.number, self.killed = number, False
        self.files = [folder / f"{number}.{stream}" for stream in ("out", "err")]
        self.value = self.error = None
        ranks = {"RANK": number, "WORLD_SIZE": count, "LOCAL_RANK": number, "LOCAL_WORLD_SIZE": count}
        environment = {**ENVIRONMENT, **{name: str(value) for name, value in ranks.items()}, **environment}
        self.connection, theirs = _context.Pipe(duplex=False)
        self.process = _context.Process(target=_run, args=(theirs, work, environment, self.files, 0.9 * deadline))
        self.process.start()
        theirs.close()

    def receive(self) -> bool:
        """Take what the rank has to say at its end; whether all went well."""
        try:
            self.value, self.error = pickle.loads(self.connection.recv_bytes())
        except EOFError:
            return False
        finally:
            self.connection.close()
        return self.error is None

    def end(self) -> None:
        """See to it that nothing is left of the process. One that has reported ends by itself, or else is ended."""
        self.process.join(GRACE if self.connection.closed else 0)
        if self.process.is_alive():
            self.killed = True
            self.process.kill()
            self.process.join()

    def outcome(self) -> Outcome:
        said = [file.read_text(errors="replace") if file.exists() else "" for file in self.files]
        return Outcome(self.value, *said, self.process.exitcode, self.error)


def _wait_for(ranks: list[_Rank], deadline: float) -> int | None:
    """Wait until all ranks are done, or one has failed and the others have had their chance; the one that failed."""
    until, failed = time.monotonic() + deadline, None
    running = {rank.connection: rank for rank in ranks}
    while running and (ready := wait(list(running), max(0, until - time.monotonic()))):
        for connection in ready:
            rank = running.pop(connection)
            if not rank.receive() and failed is None:
                failed, until = rank.number, min(until, time.monotonic() + GRACE)
    return failed


def _all_said(outcomes: list[Outcome]) -> str:
    return "\n".join(f"rank {k} said:\n{one.out}{one.err}" for k, one in enumerate(outcomes))


def _start_server() -> None:
    """The server looks for modules in the current folder alone, which may be any."""
    with patch.dict(os.environ, ENVIRONMENT, PYTHONPATH=str(ROOT)):
        forkserver.ensure_running()


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind((ENVIRONMENT["MASTER_ADDR"], 0))
        return listening.getsockname()[1]


# Within a rank


def _run(connection: Connection, work: bytes, environment: dict, files: list[Path], patience: float) -> None:
    """Do the work and report (value, None) or (None, error)."""
    os.environ.update(environment)
    streams = (sys.stdout, sys.stderr)
    for stream, file in zip(streams, files, strict=True):
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT)
        os.dup2(descriptor, stream.fileno())  # what libraries print goes there, too
        os.close(descriptor)
        stream.reconfigure(line_buffering=True)
    faulthandler.dump_traceback_later(patience)  # where it hangs
    import torch

    torch.set_num_threads(1)
    try:
        target, args = pickle.loads(work)
        report = pickle.dumps((target(*args), None))
        code = 0
    except BaseException as error:
        report, code = _pickle_error(error, traceback.format_exc()), 1
    connection.send_bytes(report)
    for stream in streams:
        stream.flush()
    faulthandler.cancel_dump_traceback_later()
    sys.exit(code)


class _Carried:
    """An exception on its way: pickle forgets its cause."""

    def __init__(self, error: Exception, said: str):
        self.error, self.said = error, said

    def __reduce__(self):
        return _with_cause, (self.error, self.said)


def _with_cause(error: Exception, said: str) -> Exception:
    error.__cause__ = RankFailed(said)
    return error


def _pickle_error(error: BaseException, trace: str) -> bytes:
    """The error itself where it can be handed over, and is none that would end the tests."""
    said = f"in rank {os.environ['RANK']}:\n{trace}"
    try:
        report = pickle.dumps((None, _Carried(error, said)))
        pickle.loads(report)
        if isinstance(error, Exception):
            return report
    except Exception:
        pass
    return pickle.dumps((None, RankFailed(said)))
