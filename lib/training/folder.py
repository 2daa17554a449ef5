"""A run folder's checkpoints: the newest as step-00001234.pt, last.pt for the very last, model_best.pt for the best.

last.pt and model_best.pt are second names (hard links) of step files, or copies where the file system has no links.
"""

import os
import shlex
import shutil
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from lib import distributed
from lib.checkpoints.native import BEST, LAST, find_checkpoint, read_checkpoint, verify, write_state
from lib.checkpoints.record import write_record
from lib.cli import InputError, TrainingStopped
from lib.files import TEMPORARY, replacing, sync_folder
from lib.training.progress import Progress

LOCK = "run.lock"
DAMAGED = ".damaged"  # ending that a file gets which cannot be read
WAITS = (5, 20, 60)  # seconds before each further attempt at a save


def step_files(folder: Path) -> list[Path]:
    """The numbered checkpoints, newest first."""
    return sorted(folder.glob("step-*.pt"), key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """The step that a numbered checkpoint's name states; -1 if it states none."""
    number = path.stem.removeprefix("step-")
    return int(number) if number.isdecimal() else -1


def checkpoints(folder: Path) -> list[Path]:
    """All checkpoints that a run could go on from, newest first."""
    return [path for path in (*step_files(folder), folder / LAST, folder / BEST) if path.is_file()]


@dataclass
class Newest:
    """The newest sound checkpoint of a folder, and the damaged ones that were passed over."""

    path: Path
    content: dict
    damaged: dict[Path, str] = field(default_factory=dict)  # to what is wrong with it


def newest_sound(folder: Path) -> Newest:
    """Read the newest checkpoint that is whole. Raises InputError where there is none."""
    damaged = {}
    for path in checkpoints(folder):
        try:
            return Newest(path, read_checkpoint(path), damaged)
        except InputError as error:
            damaged[path] = str(error)
    if damaged:
        raise InputError(f"{folder}: none of its {len(damaged)} checkpoints is whole; {next(iter(damaged.values()))}")
    raise InputError(f"{folder}: no checkpoint in it; --resume auto starts the run where there is none yet")


def is_of_this_job(folder: Path) -> bool:
    """Whether it was this job, before torchrun started its processes anew, that trained in a folder last."""
    try:
        return (folder / LOCK).read_text() == distributed.job()
    except OSError:
        return False


class RunFolder:
    """Saves a run's checkpoints so that at every moment the last sound one is there.

    Held by one process at a time.
    """

    def __init__(self, folder: Path, keep: int):
        """keep: step files that stay. Raises InputError where another process holds it."""
        self.path, self.keep = folder, keep
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = open(folder / LOCK, "a")
        except OSError as error:
            raise InputError(f"--model_name {folder}: cannot be written ({error.strerror or error})") from None
        self._take_lock()
        self._lock.truncate(0)
        self._lock.write(distributed.job())
        self._lock.flush()
        for path in folder.glob(f"*{TEMPORARY}"):  # cut off by a kill
            path.unlink(missing_ok=True)

    def _take_lock(self) -> None:
        with suppress(ImportError):  # Windows has none
            import fcntl

            try:
                fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released with the process, however it ends
            except (BlockingIOError, PermissionError):
                raise InputError(f"--model_name {self.path}: another process is training there") from None
            except OSError:  # a file system without locks
                pass

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_) -> None:
        self._lock.close()

    def set_aside(self, damaged: Iterable[Path]) -> None:
        """Rename files that cannot be read, so that they are neither counted nor taken for the newest."""
        for path in damaged:
            with suppress(FileNotFoundError):
                path.replace(path.with_name(path.name + DAMAGED))

    def settle(self, newest: Path, progress: Progress) -> None:
        """Give the newest checkpoint its second names, which a kill right after its writing may have cut off."""
        if newest.name not in (LAST, BEST):
            _name_too(newest, self.path / LAST)
        if progress.is_best and newest.name != BEST:
            _name_too(newest, self.path / BEST)

    def check_best(self, progress: Progress, say: Callable[[str], None]) -> None:
        """Let the best epoch count anew where its checkpoint is gone or damaged, for it would never be replaced."""
        if progress.best_epoch:
            try:
                verify(find_checkpoint(str(self.path)))
            except InputError as error:
                say(f"warning: {error}; the best epoch, {progress.best_epoch}, is lost and counts anew")
                self.set_aside([self.path / BEST])
                progress.best_rsum, progress.best_epoch = Progress.best_rsum, Progress.best_epoch

    def save(self, content: dict, best: bool, record: dict, say: Callable[[str], None]) -> None:
        """Write checkpoint and record, trying again for a while. Raises TrainingStopped where it stays impossible."""
        for wait in (*WAITS, None):
            try:
                if not self.path.is_dir():
                    say(f"warning: {self.path} has vanished and is made again")
                return self._write(content, best, record)
            except InputError as error:
                if wait is None:
                    raise TrainingStopped(f"{error}; {self._after_failure()}") from None
                say(f"warning: {error}; trying again in {wait} seconds")
                time.sleep(wait)

    def _after_failure(self) -> str:
        left = checkpoints(self.path)
        if not left:
            return f"no checkpoint was written before; mend that and start again with --model_name {self.path}"
        return f"{left[0]} stays: mend that, then go on with: {command_to_go_on(self.path)}"

    def _write(self, content: dict, best: bool, record: dict) -> None:
        newest = self.path / f"step-{content['progress']['step']:08d}.pt"
        write_state(newest, content)
        for name in (BEST, LAST) if best else (LAST,):
            _name_too(newest, self.path / name)
        for path in step_files(self.path)[self.keep :]:
            path.unlink(missing_ok=True)
        write_record(self.path, record)


def _name_too(file: Path, name: Path) -> None:
    """Let a second name stand for a file, in place of what it stood for; a copy where there are no hard links."""
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


def command_to_go_on(folder: Path) -> str:
    """What to type to go on with a run."""
    return f"python train.py --resume {shlex.quote(str(folder))}"
