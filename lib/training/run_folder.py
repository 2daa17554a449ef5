"""A run's folder: checkpoints, record and lock. At every moment it holds the last sound checkpoint.

step-00001234.pt         the whole state of training after step 1234; the newest --keep of them stay
last.pt                  a second name (hard link, or a copy where there are none) of the newest
model_best.safetensors   the weights of the best epoch on dev
run.json                 how the run came about (lib/checkpoints/record.py)
run.lock                 held while a process trains here
"""

import os
import re
import shlex
import shutil
import time
from collections.abc import Callable, Container
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from filelock import FileLock

from lib import distributed
from lib.checkpoints.native import BEST, LAST, OLD_BEST, Damaged, find_checkpoint, verify, write_state, write_weights
from lib.checkpoints.record import RECORD, read_record, write_record
from lib.cli import InputError, TrainingStopped, reason
from lib.files import TEMPORARY, hold_lock, replacing, sync_folder

LOCK = "run.lock"
OTHERS = (LAST, BEST, OLD_BEST)
STEP = re.compile(r"step-(\d{8,})\.pt")
HALF = re.compile(rf"({STEP.pattern}|{'|'.join(map(re.escape, (LAST, BEST, RECORD)))})\.\d+{re.escape(TEMPORARY)}")
DAMAGED = ".damaged"  # ending given to a checkpoint that cannot be read
WAITS = (5, 20, 60)  # seconds before each further attempt at a save


@dataclass
class Progress:
    """Position in the schedule and metrics on dev so far: plain numbers that travel in checkpoints and in run.json."""

    epoch: int = 0  # finished epochs
    batch: int = 0  # finished batches of the current epoch
    step: int = 0  # finished steps of the whole run
    collapsed: int = 0  # steps in a row whose scores were nearly equal, see StepFigures
    best_rsum: float = -1.0
    best_epoch: int = 0  # counted from 1; 0: none yet
    history: list[dict] = field(default_factory=list)  # of each finished epoch: epoch, step, dev (its metrics)

    def end_epoch(self, metrics: dict) -> None:
        """Note the metrics on dev after the epoch's last batch."""
        self.epoch, self.batch = self.epoch + 1, 0
        self.history.append({"epoch": self.epoch, "step": self.step, "dev": metrics})
        if metrics["rsum"] > self.best_rsum:
            self.best_rsum, self.best_epoch = metrics["rsum"], self.epoch

    def forget_best(self) -> None:
        """Let any later epoch be the best."""
        self.best_rsum, self.best_epoch = Progress.best_rsum, Progress.best_epoch

    @property
    def is_best(self) -> bool:
        """Whether the epoch that has just ended is the best so far."""
        return 0 < self.best_epoch == self.epoch and self.history[-1]["step"] == self.step


def step_files(folder: Path) -> list[Path]:
    """The numbered checkpoints, newest first."""
    return sorted((path for path in folder.glob("step-*.pt") if step_of(path) >= 0), key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """The step of a numbered checkpoint; -1 for what is none, whatever its name begins with."""
    found = STEP.fullmatch(path.name)
    return int(found[1]) if found and path.is_file() else -1


def checkpoints(folder: Path) -> list[Path]:
    """All checkpoints that a run could resume from, newest first."""
    return [path for path in (*step_files(folder), *(folder / name for name in OTHERS)) if path.is_file()]


def command_to_resume(folder: Path) -> str:
    """What to type to continue a run."""
    return f"python train.py --resume {shlex.quote(str(folder))}"


def refuse_used(folder: Path, progress: Progress, resumed: Path | None, damaged: Container[Path]) -> None:
    """Raises InputError where a folder holds another run, or later steps than those that the run goes on from.

    resumed: the folder's own checkpoint from which it does, None for a new run. damaged: what does not count.
    """
    if resumed is None and checkpoints(folder):
        raise InputError(f"--model_name {folder}: holds a run already; --resume {folder} continues it, or name another")
    later = [path for path in step_files(folder) if path not in damaged and step_of(path) > progress.step]
    if resumed and later:
        advice = f"continue with --resume {folder}, or branch off into a new folder with --model_name"
        raise InputError(f"--resume {resumed}: {later[0]} is later; {advice}")


class RunFolder:
    """The folder that a run writes to. The job's first process alone writes; on the others all methods do nothing."""

    def __init__(self, path: Path, keep: int, say: Callable[[str], None], record: dict):
        """keep: step files that stay. say: prints a warning. record: run.json but for what changes in training."""
        self.path, self.keep, self._say, self._record = path, keep, say, record
        self._lock: FileLock | None = None

    def __enter__(self) -> "RunFolder":
        """Raises InputError where another process is training there, or the folder cannot be written."""
        if distributed.is_first():
            self._take()
            for path in self.path.glob(f"*{TEMPORARY}"):
                if HALF.fullmatch(path.name) and path.is_file():  # left by a kill
                    path.unlink(missing_ok=True)
        return self

    def __exit__(self, *_) -> None:
        if self._lock:
            self._lock.release()

    def _take(self) -> None:
        """Make the folder where it is missing, and hold its lock. Raises InputError."""
        self._lock = hold_lock(self.path / LOCK, f"--model_name {self.path}", "training there")
        self._inode = os.stat(self.path / LOCK).st_ino

    def _take_again(self) -> None:
        """Make the folder again where somebody has deleted it. Raises TrainingStopped where another run is in it."""
        try:
            if os.stat(self.path / LOCK).st_ino == self._inode:
                return
        except FileNotFoundError:
            pass
        except OSError as error:
            raise InputError(f"{self.path}: cannot be looked at ({reason(error)})") from None
        try:
            self._take()
            there = (read_record(self.path) or {"run": self._record["run"]}).get("run")
        except InputError as error:
            raise TrainingStopped(f"{self.path} has been deleted, and is not this run's any more: {error}") from None
        if there != self._record["run"]:
            raise TrainingStopped(f"{self.path} has been deleted, and holds another run now: this one cannot be saved")
        self._say(f"warning: {self.path} has been deleted and is made again")

    def begin(self, state: dict, progress: Progress, resumed: Path | None, damaged: dict[Path, str]) -> None:
        """Repair what a kill may have left, and write the first record, with the sessions of an earlier one.

        state: of training, as in `save`. resumed: this folder's checkpoint that the run continues from, if any.
        damaged: checkpoints that cannot be read: renamed, so that they are neither counted nor taken for the newest.
        """
        if not distributed.is_first():
            return
        refuse_used(self.path, progress, resumed, damaged)  # again: now nobody else can write here
        for path in damaged:
            with suppress(FileNotFoundError):
                path.replace(path.with_name(path.name + DAMAGED))
        if resumed:
            try:
                before = read_record(self.path) or {}
                self._record["sessions"][:0] = before.get("sessions", [])
                self._record["run"] = before.get("run", self._record["run"])
            except InputError as error:
                self._say(f"warning: {error}; it begins anew")
        if resumed and step_of(resumed) > 0:  # a kill may have come before the files that follow a step file
            self._write_after(resumed, state, progress)
        if progress.best_epoch:
            try:
                if not any((self.path / name).is_file() for name in (BEST, OLD_BEST)):
                    raise Damaged(f"{self.path / BEST} is missing")
                verify(find_checkpoint(str(self.path)))
            except Damaged as error:
                self._say(f"warning: {error}; the best epoch, {progress.best_epoch}, is lost and counts anew")
                progress.forget_best()
        write_record(self.path, self._record, asdict(progress))

    def save(self, state: dict, progress: Progress) -> None:
        """Write checkpoint and record, trying again for a while. Raises TrainingStopped where it stays impossible."""
        if not distributed.is_first():
            return
        for wait in (*WAITS, None):
            try:
                self._take_again()
                return self._write(state, progress)
            except InputError as error:
                if wait is None:
                    advice = "repair that and start again: there is no checkpoint yet"
                    if left := checkpoints(self.path):
                        resume = command_to_resume(self.path)
                        advice = f"{left[0]} is intact: repair that, then continue with: {resume}"
                    raise TrainingStopped(f"{error}; {advice}") from None
                self._say(f"warning: {error}; trying again in {wait} seconds")
                time.sleep(wait)

    def _write(self, state: dict, progress: Progress) -> None:
        newest = self.path / f"step-{progress.step:08d}.pt"
        write_state(newest, state)
        self._write_after(newest, state, progress)
        for path in step_files(self.path)[self.keep :]:
            path.unlink(missing_ok=True)
        write_record(self.path, self._record, asdict(progress))

    def _write_after(self, newest: Path, state: dict, progress: Progress) -> None:
        """What a step file entails."""
        if progress.is_best:
            write_weights(self.path / BEST, state)
        _link(newest, self.path / LAST)


def _link(file: Path, name: Path) -> None:
    """Give a file a second name in place of what had that name; a copy where there are no hard links."""
    if name.exists() and name.samefile(file):
        return  # os.replace would do nothing, and leave the temporary name
    link = name.with_name(f"{name.name}.{os.getpid()}{TEMPORARY}")
    try:
        os.link(file, link)
        os.replace(link, name)
    except OSError:
        with suppress(OSError):
            link.unlink()
        with open(file, "rb") as source, replacing(name) as copy:
            shutil.copyfileobj(source, copy, 2**24)
    else:
        sync_folder(name.parent)
