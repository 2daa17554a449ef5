"""What a run reports: lines on the terminal and in run.log, scalars in TensorBoard, warnings about its losses."""

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from lib.cli import LINE_INTERVAL, TrainingStopped, reason, refusing
from lib.distributed import is_first
from lib.training.run_folder import Progress

READ_EVERY = 10  # steps
COLLAPSED_STEPS = 25  # in a row, before the warning
COLLAPSED = 0.1  # of the margin: a smaller spread of a batch's scores cannot tell pairs apart by a margin
COLLAPSE = (
    "warning: for {steps} steps the standard deviation of a batch's scores has been below {limit:g} (the margin is "
    "{margin:g}): the scores have collapsed to one value, where the loss has no useful gradient. Start again with a "
    "lower --learning_rate or a loss that is gentler at first (--loss ramped, or more --vse_mean_warmup_epochs)"
)


class RunLog:
    """Prints lines beside the progress bar, keeps them in FOLDER/run.log and writes TensorBoard's scalars.

    Only the job's first process writes files. A file that cannot be written is reported once; the run goes on.
    """

    def __init__(self, folder: Path, tensorboard_folder: Path, step: int):
        """step: finished steps; scalars of later ones, left by the run that is now resumed, are dropped."""
        self._path, self._tensorboard_folder, self._step = folder / "run.log", tensorboard_folder, step
        self._writer: SummaryWriter | None = None
        self._reported = set()

    def __enter__(self) -> "RunLog":
        if is_first():
            with refusing(f"--logger_name {self._tensorboard_folder}: cannot be written"):
                purge = self._step + 1 if self._step else None
                self._writer = SummaryWriter(self._tensorboard_folder, purge_step=purge)
        return self

    def __exit__(self, *_) -> None:
        if self._writer:
            self._attempt("TensorBoard's files", self._writer.close)

    def say(self, text: str) -> None:
        """Print lines and keep them."""
        tqdm.write(text)
        if is_first():
            self._attempt(str(self._path), self._append, text)

    def scalars(self, step: int, group: str, values: dict[str, float]) -> None:
        """Write a step's values to TensorBoard as GROUP/NAME; NaN means that there is none."""
        for name, value in values.items():
            if self._writer and not math.isnan(value):
                self._attempt("TensorBoard's files", self._writer.add_scalar, f"{group}/{name}", value, step)

    def _append(self, text: str) -> None:
        with open(self._path, "a", encoding="utf-8") as file:  # opened each time: its folder may be deleted meanwhile
            file.write(text + "\n")

    def _attempt(self, what: str, write: Callable, *arguments: Any) -> None:
        try:
            write(*arguments)
        except (OSError, RuntimeError) as error:
            if what not in self._reported:
                self._reported.add(what)
                print(f"warning: {what} cannot be written ({reason(error)}); the run goes on", file=sys.stderr)


class StepFigures:
    """Loss, gradient norm and spread of scores of each step, which stay on the device until they are read.

    Reading waits for the device. Read after every step they would leave it idle while Python prepares the next one, so
    they are read every READ_EVERY steps, and before a log line or a checkpoint is written.
    """

    def __init__(self, margin: float, log: RunLog, progress: Progress, folder: str):
        self._margin, self._log, self._progress, self._folder = margin, log, progress, folder
        self._unread: list[tuple[int, Tensor]] = []
        self._unsaid: list[list[float]] = []  # of the steps since the last line
        self._since, self._has_line = 0.0, False  # when they began; whether there was a line

    def add(self, step: int, figures: Tensor) -> bool:
        """figures: (3,) on the device, as `train_step` returns them. Raises as `read` does.

        Returns whether a line is overdue: the first one, or another one after LINE_INTERVAL.
        """
        self._unread.append((step, figures))
        if len(self._unread) >= READ_EVERY:
            self.read()
        return not self._has_line or time.perf_counter() - self._since > LINE_INTERVAL

    def read(self) -> None:
        """Raises TrainingStopped where a step's loss or gradient is not finite."""
        if self._unread:
            steps, figures = zip(*self._unread, strict=True)
            self._unread = []
            for step, of_step in zip(steps, torch.stack(figures).tolist(), strict=True):
                self._check(step, *of_step)
                self._unsaid.append(of_step)

    def begin_epoch(self) -> None:
        """Start the clock by which speed is measured."""
        self._since = time.perf_counter()

    def mean(self) -> tuple[float, ...]:
        """Means of the steps since the last line, and steps a second: NaN at first, where the device warms up."""
        self.read()
        now, unsaid = time.perf_counter(), self._unsaid
        speed = len(unsaid) / (now - self._since) if self._has_line else math.nan
        self._since, self._unsaid, self._has_line = now, [], True
        return *(sum(column) / len(unsaid) for column in zip(*unsaid, strict=True)), speed

    def _check(self, step: int, loss: float, gradient_norm: float, spread: float) -> None:
        if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
            raise TrainingStopped(
                f"step {step}: the loss is {loss}, the gradient norm {gradient_norm}; the last checkpoint in "
                f"{self._folder} is from before; start again with a lower --learning_rate or with --precision fp32"
            )
        limit, progress = COLLAPSED * self._margin, self._progress
        progress.collapsed = progress.collapsed + 1 if spread < limit else 0  # NaN is not below
        if progress.collapsed == COLLAPSED_STEPS:
            self._log.say(COLLAPSE.format(steps=COLLAPSED_STEPS, limit=limit, margin=self._margin))
