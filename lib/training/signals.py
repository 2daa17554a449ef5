"""Ctrl-C and SIGTERM: training finishes its step, saves, and only then ends."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from lib import distributed
from lib.collectives import largest
from lib.training.run_folder import Progress

SIGNALS = (signal.SIGINT, signal.SIGTERM)
END = b"\0"  # ends the thread; closing the pipe would not, since the loader's workers hold it open


class EndNow(Exception):
    """A signal came in a part of the run that need not be finished."""


class Signals:
    """Within this context the first signal is only noted, and answered; a second one ends the process as usual.

    In a job of several processes all signals are only noted: torchrun passes on those that the processes have already
    received, and ends processes that take too long.
    """

    def __init__(self, progress: Progress) -> None:
        self.noted: signal.Signals | None = None
        self._progress, self._at_once = progress, False
        self._previous: dict = {}

    def __enter__(self) -> "Signals":
        self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        received, self._wakeup = os.pipe()
        os.set_blocking(self._wakeup, False)
        self._wakeup_before = signal.set_wakeup_fd(self._wakeup)
        self._answering = threading.Thread(target=self._answer, args=(received,), daemon=True)
        self._answering.start()
        return self

    def __exit__(self, _kind, error: BaseException | None, _traceback) -> None:
        self._restore()
        signal.set_wakeup_fd(self._wakeup_before)
        os.write(self._wakeup, END)
        os.close(self._wakeup)
        self._answering.join()
        if self.noted and distributed.is_lost_connection(error):
            signal.signal(self.noted, signal.SIG_DFL)  # torchrun is ending the job after another process has failed
            signal.raise_signal(self.noted)

    def agree(self) -> signal.Signals | None:
        """The signal that this process, or another of its job, has received. All processes call this together."""
        number = largest(self.noted or 0)
        return signal.Signals(number) if number else None

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """A part of the run, such as an evaluation, that a signal leaves at the next heartbeat by raising EndNow.

        In a job of several processes only at its beginning: a process that left alone would let the others wait. Not
        from the signal's handler: an exception within a lock or a fork is lost, or leaves them half done.
        """
        if self.agree():
            raise EndNow
        self._at_once, distributed.at_heartbeat = True, self._leave if distributed.world_size() == 1 else None
        try:
            yield
        finally:
            self._at_once, distributed.at_heartbeat = bool(self.noted), None  # the answer may come later than the end

    def _leave(self) -> None:
        if self.noted:
            raise EndNow

    def _answer(self, received: int) -> None:
        """Answer the first signal from another thread: handlers wait until the main one's operation of PyTorch ends."""
        answered = False
        while (number := os.read(received, 1)) != END:
            if number[0] in SIGNALS and not answered and distributed.is_first():
                answered = True
                step = "" if self._at_once else f"finishing step {self._progress.step + 1}, then "
                again = "" if distributed.world_size() > 1 else "; again to leave at once"
                print(f"{signal.Signals(number[0]).name}: {step}saving{again}", file=sys.stderr, flush=True)
        os.close(received)

    def _restore(self) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.noted = signal.Signals(number)
        if distributed.world_size() > 1:
            return
        self._restore()
