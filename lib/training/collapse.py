"""Notices the known way in which training on hardest negatives dies: all scores become equal.

A loss that only sees the hardest negative is lowest, for a model that cannot tell it from the true pair, where all
scores are the same: 2 x margin x batch size. From there no gradient says which pair is the true one.
"""

WATCHED_STEPS = 25
EQUAL = 0.1  # of the margin: a smaller spread of a batch's scores cannot tell pairs apart by a margin

ADVICE = (
    "warning: for {steps} steps the scores of a batch have differed by less than {most:g} (standard deviation; the "
    "margin is {margin:g}): they have collapsed to one value, more steps will not mend it. Start again with {remedy}"
)
REMEDIES = {
    "hinge": "--loss ramped, more --vse_mean_warmup_epochs, or a lower --learning_rate",
}


class CollapseWatch:
    """Says when batches' scores have long been nearly equal: once, until they differ again."""

    def __init__(self, margin: float, loss: str):
        self.margin, self.loss = margin, loss
        self.steps = 0  # in a row

    def warning(self, spread: float) -> str | None:
        """Take note of the standard deviation of a step's scores; returns the warning when it is due, else None.

        NaN, where the step had no matrix of scores, is no sign of a collapse.
        """
        most = EQUAL * self.margin
        self.steps = self.steps + 1 if spread < most else 0
        if self.steps != WATCHED_STEPS:
            return None
        remedy = REMEDIES.get(self.loss, "a lower --learning_rate")
        return ADVICE.format(steps=WATCHED_STEPS, most=most, margin=self.margin, remedy=remedy)
