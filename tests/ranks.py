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
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

DEADLINE = 600.0  # seconds after which a job is killed and its test fails: no time limit, as it would hang forever
GRACE = 30.0  # seconds that the other ranks get to end after one has failed
HEAVY = (
    "torch",
    "transformers",
    "lance_namespace",
    "eval",
    "train",
    "lib.evaluation.evaluate",
    "lib.training.loop",
    "tests.conftest",
)
ENVIRONMENT = {
    **{"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},  # as in conftest.py
    "TRITON_INTERPRET": os.environ.get("TRITON_INTERPRET", "1"),
    **{"MASTER_ADDR": "127.0.0.1", "TORCH_CPP_LOG_LEVEL": "ERROR"},
}
ROOT = Path(__file__).resolve().parents[1]

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(list(HEAVY))


class Outcome(NamedTuple):
    """The outcome of one rank."""

    value: Any  # what the function returned, None if it raised
    out: str  # all of its stdout
    err: str  # and of its stderr
    exitcode: int | None  # of the process: 0 if the function returned, 1 if it raised, -9 if it was killed
    error: Exception | None  # what the function raised; the cause holds the rank's traceback


class RankFailed(Exception):
    """A rank that was killed, that hung or that raised what cannot be pickled; the message holds all of the output."""


def run_ranks(target: Callable, count: int, *args: Any, check: bool = True) -> list[Outcome]:
    """Run target(*args) in `count` ranks of one job, on one thread each; returns the outcomes in order of ranks.

    target: a function of a module. Raises what the first rank to fail has raised; check=False: raises nothing. A job
    that takes longer than the deadline is killed and RankFailed raised in any case.
    """
    with socket.socket() as free:
        free.bind((ENVIRONMENT["MASTER_ADDR"], 0))
        environment = {**ENVIRONMENT, "MASTER_PORT": str(free.getsockname()[1])}
    environment |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    work = pickle.dumps((target, args))
    start_server()
    with tempfile.TemporaryDirectory() as folder:
        processes, pipes = [], []
        try:
            for rank in range(count):
                pipe, theirs = _context.Pipe(duplex=False)
                own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                process = _context.Process(target=_run, args=(theirs, work, own, f"{folder}/{rank}", 0.9 * DEADLINE))
                process.start()
                theirs.close()
                processes.append(process)
                pipes.append(pipe)
            results, failed = _receive(pipes)
        finally:
            for process, pipe in zip(processes, pipes, strict=True):
                process.join(GRACE if pipe.closed else 0)  # one that has reported ends by itself
                process.kill()
                process.join()
        streams = [[Path(f"{folder}/{rank}.{end}") for end in ("out", "err")] for rank in range(count)]
        texts = [[file.read_text(errors="replace") if file.exists() else "" for file in files] for files in streams]
    outcomes = [
        Outcome(value, *said, process.exitcode, error)
        for (value, error), said, process in zip(results, texts, processes, strict=True)
    ]
    output = "\n".join(f"rank {rank} printed:\n{out}{err}" for rank, (out, err) in enumerate(texts))
    if failed is None and (hanging := [rank for rank, pipe in enumerate(pipes) if not pipe.closed]):
        raise RankFailed(f"ranks {hanging} hang: killed after {DEADLINE:.0f} s\n{output}")
    if check and failed is not None:
        raise outcomes[failed].error or RankFailed(
            f"rank {failed} was killed, exit code {outcomes[failed].exitcode}\n{output}"
        )
    return outcomes


def start_server() -> None:
    """Start the server, if it does not run, from which multiprocessing's context "forkserver" forks."""
    with patch.dict(os.environ, ENVIRONMENT, PYTHONPATH=str(ROOT)):
        forkserver.ensure_running()


def start(target: Callable, *args: Any) -> ForkServerProcess:
    """A process of its own, and no job, that runs target(*args) on one thread."""
    start_server()
    process = _context.Process(target=_run_alone, args=(target, args))
    process.start()
    return process


def _run_alone(target: Callable, args: tuple) -> None:
    import torch

    torch.set_num_threads(1)
    target(*args)


def _receive(pipes: list[Connection]) -> tuple[list[tuple], int | None]:
    """(value, error) of each rank, and the first rank to fail, after which the others have GRACE left."""
    results, failed, until = [(None, None)] * len(pipes), None, time.monotonic() + DEADLINE
    running = list(pipes)
    while running and (ready := wait(running, max(0, until - time.monotonic()))):
        for pipe in ready:
            running.remove(pipe)
            rank = pipes.index(pipe)
            try:
                value, error, trace = pickle.loads(pipe.recv_bytes())
                if error:
                    error.__cause__ = RankFailed(f"in rank {rank}:\n{trace}")
                results[rank] = value, error
            except EOFError:
                error = True
            pipe.close()
            if error and failed is None:
                failed, until = rank, min(until, time.monotonic() + GRACE)
    return results, failed


def _run(pipe: Connection, work: bytes, environment: dict[str, str], files: str, patience: float) -> None:
    """Within a rank: do the work and report (value, error, traceback)."""
    os.environ.update(environment)
    for stream, end in ((sys.stdout, "out"), (sys.stderr, "err")):
        descriptor = os.open(f"{files}.{end}", os.O_WRONLY | os.O_CREAT)
        os.dup2(descriptor, stream.fileno())  # what libraries print goes there, too
        os.close(descriptor)
        stream.reconfigure(line_buffering=True)
    faulthandler.dump_traceback_later(patience)  # where it hangs
    import torch

    torch.set_num_threads(1)
    shorten_waits()
    try:
        target, args = pickle.loads(work)
        report, code = pickle.dumps((target(*args), None, "")), 0
    except BaseException as error:
        report, code = _describe(error), 1
    pipe.send_bytes(report)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    faulthandler.cancel_dump_traceback_later()
    sys.exit(code)


def shorten_waits() -> None:
    """Let the program wait a shorter time where it waits for other processes."""
    from lib import distributed

    distributed.CHECK_INTERVAL, distributed.STAGGER, distributed.EXIT_WAIT = 0.5, 1.0, 2.0  # the last is the longest


def _describe(error: BaseException) -> bytes:
    """The error itself if it can be pickled and would not end the tests; otherwise RankFailed."""
    trace = traceback.format_exc()
    try:
        report = pickle.dumps((None, error, trace))
        pickle.loads(report)
        if isinstance(error, Exception):
            return report
    except Exception:
        pass
    return pickle.dumps((None, RankFailed(trace), trace))
