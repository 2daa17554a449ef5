"""What a run reports: lines on the terminal and in run.log, what TensorBoard shows, warnings about its losses."""

import io
import math
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

from lib.cli import LINE_INTERVAL, Lasting, TrainingStopped, optional, reason, refusing
from lib.config import TrainSettings
from lib.distributed import is_first
from lib.training.run_folder import Progress, checkpoints

TENSORBOARD = "TensorBoard's files"
PROJECT = "x-dim"  # of the runs at a tracker
RESULT = "dev/rsum"  # the scalar that TensorBoard shows beside hyperparameters, by its last value
LARGEST = 512  # pixels of a matrix's side, so that files stay small
READ_EVERY = 10  # steps
COLLAPSED_STEPS = 25  # in a row, before the warning
COLLAPSED = 0.1  # of the margin: a smaller spread of a batch's scores cannot tell pairs apart by a margin
COLLAPSE = (
    "warning: for {steps} steps the standard deviation of a batch's scores has been below {limit:g} (the margin is "
    "{margin:g}): the scores have collapsed to one value, where the loss has no useful gradient. Start again with a "
    "lower --learning_rate or a loss that is gentler at first (--loss ramped, or more --vse_mean_warmup_epochs)"
)


class RunLog:
    """Prints lines beside the progress bar, keeps them in FOLDER/run.log, and writes TensorBoard's files.

    Scalars go to the tracker of --track too. Only the job's first process writes. What cannot be written is reported
    once; the run goes on.
    """

    def __init__(self, folder: Path, tensorboard_folder: Path, step: int, settings: TrainSettings):
        """step: finished ones; TensorBoard's of later ones are dropped. Raises InputError without --track's package."""
        self._path, self._tensorboard_folder, self._step = folder / "run.log", tensorboard_folder, step
        self._writer: Any = None  # SummaryWriter
        self._tracker, self._tracked, self._track = None, None, f"--track {settings.track}"
        self._settings, self._reported = settings, set()
        if settings.track and is_first():
            self._tracker = optional(settings.track, "--track")

    def __enter__(self) -> "RunLog":
        settings = asdict(self._settings)
        if self._tracker:
            with refusing(f"{self._track}: cannot be started"):
                resume = "allow" if self._step else "never"
                name = self._path.parent.resolve().name
                self._tracked = self._tracker.init(project=PROJECT, name=name, config=settings, resume=resume)
        if is_first():
            with refusing(f"--logger_name {self._tensorboard_folder}: cannot be written"):
                self._writer = SummaryWriter(self._tensorboard_folder, purge_step=self._step + 1)
            rows = [f"| {name} | `{value}` |" for name, value in settings.items()]
            text = "\n".join(["| setting | value |", "|---|---|", *rows])
            self.attempt(TENSORBOARD, self._writer.add_text, "settings", text, self._step)
            *begin, self._end = hparams(settings, {RESULT: None})  # `add_hparams` would make another run of them
            self._summaries(self._step, *begin)
        self._streams, self._hook = (sys.stdout, sys.stderr), threading.excepthook
        threading.excepthook = self._note_thread
        sys.stdout, sys.stderr = (Lasting(stream, self._note_silence) for stream in self._streams)
        return self

    def __exit__(self, error: type | None, *_) -> None:
        if self._writer:
            if not error:
                self._summaries(self._step, self._end)
            self.attempt(TENSORBOARD, self._writer.close)
        if self._tracked:
            self.attempt(self._track, self._tracked.finish)
        (sys.stdout, sys.stderr), threading.excepthook = self._streams, self._hook

    def _note_thread(self, failed: Any) -> None:
        """Leave what ends TensorBoard's own thread to the next write, which raises it."""
        if not type(failed.thread).__module__.startswith("tensorboard"):
            self._hook(failed)

    def _note_silence(self, why: str) -> None:
        """Say in run.log that the terminal, or what stands for it, gets nothing more."""
        if is_first():
            self.attempt(str(self._path), self._append, f"warning: output cannot be printed ({why}); the run goes on")

    def _summaries(self, step: int, *summaries: Any) -> None:
        """Write to TensorBoard what it has no method for."""
        for summary in summaries:
            self.attempt(TENSORBOARD, self._writer._get_file_writer().add_summary, summary, step)

    def say(self, text: str) -> None:
        """Print lines and keep them."""
        tqdm.write(text)
        if is_first():
            self.attempt(str(self._path), self._append, text)

    def scalars(self, step: int, group: str, values: dict[str, float]) -> None:
        """Write a step's values to TensorBoard and the tracker as GROUP/NAME; NaN means that there is none."""
        named = {f"{group}/{name}": value for name, value in values.items() if not math.isnan(value)}
        if self._writer:
            for name, value in named.items():
                self.attempt(TENSORBOARD, self._writer.add_scalar, name, value, step)
        if self._tracked and named:
            self.attempt(self._track, self._tracked.log, named, step)

    def matrix(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Write grey pixels (H, W), uint8, to TensorBoard as they are."""
        self.attempt(TENSORBOARD, self._writer.add_image, name, pixels, step, None, "HW")

    def photograph(self, step: int, name: str, picture: PIL.Image.Image) -> None:
        """Write a picture to TensorBoard as a JPEG, a tenth of what `add_image` would write."""
        picture.save(file := io.BytesIO(), "JPEG", quality=80)
        size = {"height": picture.height, "width": picture.width, "colorspace": 3}
        image = Summary.Image(encoded_image_string=file.getvalue(), **size)
        self._summaries(step, Summary(value=[Summary.Value(tag=name, image=image)]))

    def _append(self, text: str) -> None:
        with open(self._path, "a", encoding="utf-8") as file:  # opened each time: its folder may be deleted meanwhile
            file.write(text + "\n")

    def attempt(self, what: str, write: Callable, *arguments: Any) -> None:
        """Call what writes, and report once where it fails."""
        try:
            write(*arguments)
        except Exception as error:  # a tracker may raise anything
            if what not in self._reported:
                self._reported.add(what)
                print(f"warning: {what} cannot be written ({reason(error)}); the run goes on", file=sys.stderr)


def draw_matrix(matrix: Tensor, white: float | None = None) -> np.ndarray:
    """Grey pixels, uint8, of a matrix (D, D) of numbers from 0 on. white: the number drawn white; None: the largest.

    Of a matrix of more than LARGEST rows each pixel is the largest of a square of entries: the few that are open among
    many that are closed would fade in a mean.
    """
    square = -(-len(matrix) // LARGEST)
    shown = F.max_pool2d(matrix[None].float(), square, ceil_mode=True)[0]
    scale = 255 / (white or shown.max().clamp(min=torch.finfo(shown.dtype).tiny))
    return (shown * scale).round().byte().cpu().numpy()


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
        """Note a step's (3,), on the device. Whether a line is due, as every LINE_INTERVAL. Raises as `read`."""
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
            before = f"; the last checkpoint in {self._folder} is from before" * bool(checkpoints(Path(self._folder)))
            advice = "start again with a lower --learning_rate or with --precision fp32"
            found = f"the loss is {loss}, the gradient norm {gradient_norm}{before}"
            raise TrainingStopped(f"step {step}: {found}; {advice}")
        limit, progress = COLLAPSED * self._margin, self._progress
        progress.collapsed = progress.collapsed + 1 if spread < limit else 0  # NaN is not below
        if progress.collapsed == COLLAPSED_STEPS:
            self._log.say(COLLAPSE.format(steps=COLLAPSED_STEPS, limit=limit, margin=self._margin))
