"""Notices the known way in which training on hardest negatives dies: all scores equal."""

from collections import deque

WATCHED_STEPS = 50
TOLERANCE = 0.02

ADVICE = (
    "warning: for {steps} steps the loss has stayed at 2 x margin x batch size = {level:.1f}: the scores have "
    "collapsed to one value. Start again with more --vse_mean_warmup_epochs or a lower --learning_rate; "
    "more steps will not mend it."
)


class CollapseWatch:
    """Says once when the loss on hardest negatives is stuck at 2 x margin x batch size, where equal scores put it."""

    def __init__(self, margin: float, batch_size: int):
        self.level = 2 * margin * batch_size
        self.near = deque(maxlen=WATCHED_STEPS)
        self.warned = False

    def warning(self, loss: float) -> str | None:
        """Take note of a step's loss; returns the warning when it is due, else None."""
        self.near.append(abs(loss - self.level) <= TOLERANCE * self.level)
        if self.warned or len(self.near) < WATCHED_STEPS or not all(self.near):
            return None
        self.warned = True
        return ADVICE.format(steps=WATCHED_STEPS, level=self.level)
