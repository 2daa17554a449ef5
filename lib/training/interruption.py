"""Ctrl-C and SIGTERM as a wish to end, which the training loop grants between two steps."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from lib import distributed
from lib.collectives import largest

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class EndNow(Exception):
    """The wish to end, in a part of the run that need not be finished first."""


class Interruption:
    """Within this context the first signal is only noted; a second one ends the process as it always did.

    In a job of several processes all signals are only noted, for torchrun passes each on that the processes have seen
    already; and torchrun ends those that do not end in time.
    """

    def __init__(self):
        self.noted: signal.Signals | None = None
        self._previous = {}
        self._at_once = False

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():  # only there may handlers be set
            self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, _kind, error: BaseException | None, _traceback) -> None:
        self._restore()
        if self.noted and distributed.is_lost_connection(error):
            distributed.end_at_once(self.noted)  # the signal was torchrun's, after the other process had gone

    def agree(self) -> signal.Signals | None:
        """The signal that this process, or another of its job, has noted. All of the job's processes ask together."""
        number = largest(self.noted or 0)
        return signal.Signals(number) if number else None

    def _restore(self) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())

    def _note(self, number: int, _frame) -> None:
        self.noted = signal.Signals(number)
        if distributed.world_size() > 1:
            return
        self._restore()
        if self._at_once:
            raise EndNow

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """A part of the run, such as an evaluation, that a signal leaves right away by raising EndNow.

        In a job of several processes it does so at its beginning only: one that left alone would leave the others
        waiting.
        """
        self._at_once = True
        try:
            if self.agree():
                raise EndNow
            yield
        finally:
            self._at_once = False
