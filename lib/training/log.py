"""What a run says: to the terminal, to run.log, to TensorBoard."""

import sys
import threading
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from lib.cli import InputError, reason


class RunLog:
    """Prints lines beside a progress bar, keeps them in FOLDER/run.log, and writes figures for TensorBoard.

    A log that can no longer be written is said once and costs the run nothing else.
    """

    def __init__(self, folder: Path, tensorboard_folder: Path, step: int):
        """step: finished steps; figures of later ones, left by a run that is now resumed, are dropped."""
        self._path = folder / "run.log"
        self._complained = set()
        self._threads_hook, threading.excepthook = threading.excepthook, self._thread_failed
        flag, place = "--model_name", folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._path.open("a").close()
            flag, place = "--logger_name", tensorboard_folder
            self._writer = SummaryWriter(tensorboard_folder, purge_step=step + 1 if step else None)
        except OSError as error:
            threading.excepthook = self._threads_hook
            raise InputError(f"{flag} {place}: cannot be written ({error.strerror or error})") from None

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_) -> None:
        self._attempt("TensorBoard's files", self._writer.close)
        threading.excepthook = self._threads_hook

    def say(self, text: str) -> None:
        """Print lines and keep them."""
        tqdm.write(text)
        self._attempt(self._path, self._append, text)

    def figures(self, step: int, **values: float) -> None:
        """Write figures of a step; a name's first underscore-separated word is its group in TensorBoard."""
        for name, value in values.items():
            self._attempt("TensorBoard's files", self._writer.add_scalar, name.replace("_", "/", 1), value, step)

    def _thread_failed(self, failure: threading.ExceptHookArgs) -> None:
        """TensorBoard writes in a thread, whose failure the next write reports: no need of its traceback."""
        if not type(failure.thread).__module__.startswith("tensorboard"):
            self._threads_hook(failure)

    def _append(self, text: str) -> None:
        with open(self._path, "a", encoding="utf-8") as file:  # opened anew, for its folder may vanish and come back
            file.write(text + "\n")

    def _attempt(self, what, write, *arguments) -> None:
        try:
            write(*arguments)
        except (OSError, RuntimeError) as error:
            if what not in self._complained:
                self._complained.add(what)
                print(f"warning: {what} cannot be written ({reason(error)}); the run goes on", file=sys.stderr)


class Silence:
    """The log of a job's processes that have none."""

    def say(self, text: str) -> None:
        """Say nothing."""

    def figures(self, step: int, **values: float) -> None:
        """Write nothing."""
