"""train.py with a mishap in one process of a job.

In a step the last rank is killed, hangs, gets a signal, runs out of memory or finds wrong data; not after a restart.
"""

import multiprocessing
import os
import signal
import sys
import time

import train
from lib import distributed
from lib.cli import InputError
from lib.training import loop

OutOfMemoryError = type("OutOfMemoryError", (RuntimeError,), {})  # as PyTorch names it


def fail(error: Exception) -> None:
    raise error


def close_output() -> None:
    """What was printed had a reader, who has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(writer, stream.fileno())


MISHAPS = {
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "SIGTERM": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "SIGTERM to the group": lambda: os.killpg(0, signal.SIGTERM),
    "worker killed": lambda: [process.kill() for process in multiprocessing.active_children()],
    "output closed": close_output,
    "hanging": lambda: time.sleep(600),
    "out of memory": lambda: fail(OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")),
    "wrong input": lambda: fail(InputError("x.npy: NaN or infinite features")),
}


def main(what: str, step: int, flags: list[str]) -> int:
    if what == "SIGTERM to the group":
        os.setsid()
    train_step = loop.train_step

    def stepping(run, *args):
        if run.progress.step + 1 == step and not distributed.is_restarted():
            distributed.HANG_TIMEOUT = 4.0  # seconds; not before, as the first steps may be slow
            if distributed.rank() == distributed.world_size() - 1:
                MISHAPS[what]()
        return train_step(run, *args)

    loop.train_step = stepping
    return train.main(flags)
