"""Ctrl-C and SIGTERM: training finishes its step, saves, and only then ends."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from lib import distributed
from lib.collectives import largest

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class EndNow(Exception):
    """A signal came in a part of the run that need not be finished."""


class Signals:
    """Within this context the first signal is only noted; a second one ends the process as usual.

    In a job of several processes all signals are only noted: torchrun passes on those that the processes have already
    received, and ends processes that take too long.
    """

    def __init__(self) -> None:
        self.noted: signal.Signals | None = None
        self._previous = {}
        self._at_once = False

    def __enter__(self) -> "Signals":
        self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, _kind, error: BaseException | None, _traceback) -> None:
        self._restore()
        if self.noted and distributed.is_lost_connection(error):
            signal.signal(self.noted, signal.SIG_DFL)  # torchrun is ending the job after another process has failed
            signal.raise_signal(self.noted)

    def agree(self) -> signal.Signals | None:
        """The signal that this process, or another of its job, has received. All processes call this together."""
        number = largest(self.noted or 0)
        return signal.Signals(number) if number else None

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """A part of the run, such as an evaluation, that a signal leaves at once by raising EndNow.

        In a job of several processes only at its beginning: a process that left alone would let the others wait.
        """
        self._at_once = True
        try:
            if self.agree():
                raise EndNow
            yield
        finally:
            self._at_once = False

    def _restore(self) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.noted = signal.Signals(number)
        if distributed.world_size() > 1:
            return
        self._restore()
        if self._at_once:
            raise EndNow
