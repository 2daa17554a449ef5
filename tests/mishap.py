"""train.py with a mishap in one process of a job: torchrun ... -m tests.mishap WHAT STEP FLAGS...

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


MISHAPS = {
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "SIGTERM": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "SIGTERM to the group": lambda: os.killpg(0, signal.SIGTERM),
    "worker killed": lambda: [process.kill() for process in multiprocessing.active_children()],
    "hanging": lambda: time.sleep(600),
    "out of memory": lambda: fail(OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")),
    "wrong input": lambda: fail(InputError("x.npy: NaN or infinite features")),
}


def main(what: str, step: int, flags: list[str]) -> int:
    distributed.HANG_TIMEOUT, distributed.CHECK_INTERVAL = 4.0, 0.5  # seconds
    distributed.STAGGER, distributed.EXIT_WAIT = 1.0, 2.0  # the first is the shorter one, as in the program
    if what == "SIGTERM to the group":
        os.setsid()
    train_step = loop.train_step

    def stepping(run, *args):
        unlucky = distributed.rank() == distributed.world_size() - 1 and not distributed.is_restarted()
        if unlucky and run.progress.step + 1 == step:
            MISHAPS[what]()
        return train_step(run, *args)

    loop.train_step = stepping
    return train.main(flags)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), sys.argv[3:]))
