"""How far a run is, as plain numbers that travel in its checkpoints and in run.json."""

from dataclasses import dataclass, field


@dataclass
class Progress:
    """Position in the schedule, and what dev said so far."""

    epoch: int = 0  # finished epochs
    batch: int = 0  # finished batches of the epoch that is under way
    step: int = 0  # finished steps of the whole run
    best_rsum: float = -1.0
    best_epoch: int = 0  # counted from 1; 0: none yet
    history: list[dict] = field(default_factory=list)  # of each finished epoch: epoch, step, dev (its metrics)
