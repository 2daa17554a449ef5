"""Figures of training steps, read late: were Python to wait for each step, the device would then wait for Python."""

from collections.abc import Callable

import torch
from torch import Tensor


class LateFigures:
    """Looks at each step's figures, in order, only when the next step has been enqueued, or when asked to."""

    def __init__(self, look: Callable[..., None]):
        """look: called with a step's number and its figures; what it raises comes out of `add` or `settle`."""
        self._look = look
        self._pending: tuple[int, Tensor, torch.cuda.Event | None] | None = None
        self._last: list[float] = []

    def add(self, step: int, figures: Tensor) -> None:
        """Take the figures (numbers,) of a step that has just been enqueued; looks at those of the step before."""
        copy = figures.to("cpu", non_blocking=True)  # enqueued now: later it would come after the next step
        copied = torch.cuda.current_stream(figures.device).record_event() if figures.is_cuda else None
        self.settle()
        self._pending = step, copy, copied

    def settle(self) -> list[float]:
        """Look at what has not been looked at yet, waiting for the device. Returns the last step's figures."""
        if self._pending:
            (step, copy, copied), self._pending = self._pending, None
            if copied:
                copied.synchronize()
            self._last = copy.tolist()
            self._look(step, *self._last)
        return self._last
