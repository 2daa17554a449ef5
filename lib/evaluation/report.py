"""Metrics as people read them: a table with both directions side by side, and a line for logs."""

from lib.evaluation.metrics import RECALL_AT

COLUMNS = (*(f"r{k}" for k in RECALL_AT), "medr", "meanr")
HEADINGS = (*(f"R@{k}" for k in RECALL_AT), "med r", "mean r")
WIDTH = 7


def table(rows: dict[str, dict]) -> str:
    """A table of named metrics; a figure that a row lacks (ranks at chance level) stays blank."""
    names = max(len(name) for name in rows) + 2
    side = WIDTH * len(COLUMNS)
    lines = [
        " " * names + "image to text".center(side) + "  " + "text to image".center(side),
        " " * names + _cells(HEADINGS) + "  " + _cells(HEADINGS) + f"{'rSum':>{WIDTH + 2}}",
    ]
    for name, metrics in rows.items():
        sides = [_cells([_figure(metrics[way].get(column)) for column in COLUMNS]) for way in ("i2t", "t2i")]
        lines.append(f"{name:<{names}}{sides[0]}  {sides[1]}{metrics['rsum']:>{WIDTH + 2}.1f}")
    return "\n".join(lines)


def line(metrics: dict) -> str:
    """The six recalls and their sum in one line."""
    ways = [" ".join(f"{metrics[way][f'r{k}']:.1f}" for k in RECALL_AT) for way in ("i2t", "t2i")]
    return f"image to text {ways[0]}, text to image {ways[1]}, rSum {metrics['rsum']:.1f}"


def _cells(texts) -> str:
    return "".join(f"{text:>{WIDTH}}" for text in texts)


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
