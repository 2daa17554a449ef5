"""What the processes of one training job have to agree on, and what each has of its own: its random numbers."""

import dataclasses

import numpy as np
import torch
import torch.distributed as dist

from lib import distributed
from lib.cli import InputError
from lib.config import TrainSettings
from lib.runtime import random_state, restore_random_state, seed_everything
from lib.training.progress import Progress

OF_A_NODE = ("data_path", "bert", "workers")  # may differ where processes run on several machines


def refuse_disagreement(settings: TrainSettings, progress: Progress) -> None:
    """Raises InputError where the processes were started with other settings, or found other checkpoints."""
    if distributed.world_size() == 1:
        return
    mine = {name: value for name, value in dataclasses.asdict(settings).items() if name not in OF_A_NODE}
    mine["step"] = progress.step
    everybody = _gather(mine)
    for name, value in everybody[0].items():
        others = [f"{one[name]!r} of rank {k}" for k, one in enumerate(everybody) if one[name] != value]
        if others and name == "step":
            raise InputError(
                f"--resume: rank 0 found a checkpoint of step {value}, {others[0].replace(' of', ' was found by')}; "
                "the run folder must be one that all nodes share"
            )
        if others:
            raise InputError(f"--{name}: {value!r} of rank 0 but {others[0]}; start all processes with the same flags")


def seed_process(seed: int, step: int) -> None:
    """Give each process but the first, which goes on as a single one would, random numbers of its own.

    They are dropout's alone: weights are made before, order and augmentation are functions of (seed, epoch, batch).
    """
    if not distributed.is_first():
        sequence = np.random.SeedSequence([seed, step, distributed.rank()])
        seed_everything(int(sequence.generate_state(1, np.uint64)[0]) >> 1)


def all_random_states(device: torch.device) -> dict:
    """The first process's state of all generators, with the other processes' ones as a list `others`."""
    mine = random_state(device)
    if distributed.world_size() == 1:
        return mine
    first, *others = _gather(mine)
    return {**first, "others": others}


def restore_own_random_state(states: dict, device: torch.device) -> list[str]:
    """Bring this process's generators to where they were; says what changes where their number was another then."""
    of_processes = [states, *states.get("others", [])]
    then, now = len(of_processes), distributed.world_size()
    if then == now or distributed.is_first():
        restore_random_state(of_processes[distributed.rank()], device)
    if then == now:
        return []
    return [
        f"trained by {_count(then)} before, by {_count(now)} now: BERT's dropout draws other random numbers; batches, "
        "their order and augmentation stay the same"
    ]


def _count(number: int) -> str:
    return f"{number} processes" if number > 1 else "one process"


def _gather(mine: dict) -> list[dict]:
    everybody = [None] * distributed.world_size()
    dist.all_gather_object(everybody, mine)
    return everybody
