"""Ctrl-C and SIGTERM as a wish to end, which the training loop grants between two steps."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class EndNow(Exception):
    """The wish to end, in a part of the run that need not be finished first."""


class Interruption:
    """Within this context the first signal is only noted (`signal`); a second one ends the process as it always did."""

    def __init__(self):
        self.signal: signal.Signals | None = None
        self._previous = {}
        self._at_once = False

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():  # only there may handlers be set
            self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())

    def _note(self, number: int, _frame) -> None:
        self.signal = signal.Signals(number)
        self.__exit__()
        if self._at_once:
            raise EndNow

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """A part of the run, such as an evaluation, that a signal leaves right away by raising EndNow."""
        self._at_once = True
        try:
            if self.signal:
                raise EndNow
            yield
        finally:
            self._at_once = False
