"""train.py with a mishap in one process of a job: torchrun ... -m tests.mishap WHAT STEP FLAGS...

The last rank is killed, hangs, runs out of memory or fails in some other way in a step; never again after a restart.
"""

import os
import signal
import sys
import time

import train
from lib import distributed
from lib.training import train as training

MISHAPS = {
    "none": lambda: None,
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "hanging": lambda: time.sleep(600),
    "out of memory": lambda: (_ for _ in ()).throw(MemoryOfCuda("CUDA out of memory. Tried to allocate 2.00 GiB.")),
    "wrong input": lambda: (_ for _ in ()).throw(training.InputError("x.npy: NaN or infinite features")),
}
PATIENCE = 4.0  # seconds, in place of minutes


class MemoryOfCuda(RuntimeError):
    """What PyTorch raises."""


MemoryOfCuda.__name__ = "OutOfMemoryError"


def main(what: str, step: int, flags: list[str]) -> int:
    distributed.HANG_TIMEOUT, distributed.CHECK_INTERVAL, distributed.EXIT_WAIT = PATIENCE, 0.5, 2.0
    train_step = training.train_step

    def stepping(run, *args):
        unlucky = distributed.rank() == distributed.world_size() - 1 and not distributed.is_restarted()
        if unlucky and run.progress.step + 1 == step:
            MISHAPS[what]()
        return train_step(run, *args)

    training.train_step = stepping
    return train.main(flags)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), sys.argv[3:]))
