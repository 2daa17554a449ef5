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

    def end_epoch(self, metrics: dict) -> None:
        """Take note of what dev says after the epoch's last batch."""
        self.epoch, self.batch = self.epoch + 1, 0
        self.history.append({"epoch": self.epoch, "step": self.step, "dev": metrics})
        if metrics["rsum"] > self.best_rsum:
            self.best_rsum, self.best_epoch = metrics["rsum"], self.epoch

    @property
    def is_best(self) -> bool:
        """Whether the epoch that has just ended is the best so far."""
        return self.batch == 0 and 0 < self.best_epoch == self.epoch
