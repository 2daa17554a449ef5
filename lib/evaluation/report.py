"""Metrics as people read them: a table with both directions side by side, and a line for logs."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lib.evaluation.bootstrap import LEVEL
from lib.evaluation.metrics import RECALL_AT, RECALLS, WAYS, chance_metrics

COLUMNS = (*RECALLS, "avg", "medr", "meanr")
HEADINGS = {
    **{f"r{k}": f"R@{k}" for k in RECALL_AT},
    **{"avg": "avg R", "medr": "med r", "meanr": "mean r", "map_at_r": "mAP@R", "r_precision": "R-P"},
}
TITLES = {"i2t": "image to text", "t2i": "text to image", "i2i": "image to image", "t2t": "text to text"}
WIDTH = 7
INTERVALS = f"{LEVEL} %: interval of the figure above, by bootstrap over images (docs/evaluation.md)"


class Row(NamedTuple):
    """A line of a table. A figure that it lacks (ranks at chance level) stays blank."""

    name: str
    metrics: dict
    form: str = ".1f"


def table(rows: Sequence[Row], columns: Sequence[str] = COLUMNS, ways: Sequence[str] = WAYS) -> str:
    """A table of metrics. columns: names of figures; ways: which two directions."""
    names = max(len(row.name) for row in rows) + 2
    side = WIDTH * len(columns)
    rsum = any("rsum" in row.metrics for row in rows)
    headings = _cells([HEADINGS[column] for column in columns])
    lines = [
        " " * names + "  ".join(TITLES[way].center(side) for way in ways),
        " " * names + "  ".join(headings for _ in ways) + (f"{'rSum':>{WIDTH + 2}}" if rsum else ""),
    ]
    for name, metrics, form in rows:
        sides = [_cells([_figure(metrics.get(way, {}).get(column), form) for column in columns]) for way in ways]
        total = f"{_figure(metrics.get('rsum'), form):>{WIDTH + 2}}" if rsum else ""
        lines.append(f"{name:<{names}}{'  '.join(sides)}{total}")
    return "\n".join(line.rstrip() for line in lines)


def with_interval(name: str, metrics: dict, form: str = ".1f") -> list[Row]:
    """Rows of a table: metrics, and below them the ends of the intervals that they carry."""
    ends = enumerate(("from", "to"))
    intervals = [Row(f"  {LEVEL} % {word}", _end(metrics["interval"], which), form) for which, word in ends]
    return [Row(name, metrics, form), *intervals]


def figure_rows(name: str, figures: dict, images: int, with_folds: bool = True) -> list[Row]:
    """Rows of what an evaluation has found; of folds their mean, all images, and each of them where wanted."""
    if not figures["folds"]:
        return with_interval(name, figures)
    number = len(figures["folds"])
    rows = [Row(f"{name}, fold {k}", fold) for k, fold in enumerate(figures["folds"], start=1) if with_folds]
    rows += with_interval(f"{name}, mean of {number} folds of {images // number}", figures)
    return rows + with_interval(f"{name}, all {images} images", figures["full"])


def chance_rows(image_of_caption: np.ndarray, folds: int) -> list[Row]:
    """Rows of what random scores would give."""
    every = chance_metrics(image_of_caption)
    if not folds:
        return [Row("chance", every)]
    images = int(image_of_caption[-1]) + 1
    size = images // folds
    of_fold = chance_metrics(image_of_caption[image_of_caption < size])
    return [Row(f"chance, {size} images", of_fold), Row(f"chance, {images} images", every)]


def line(metrics: dict) -> str:
    """The six recalls and their sum in one line."""
    ways = [" ".join(f"{metrics[way][name]:.1f}" for name in RECALLS) for way in ("i2t", "t2i")]
    return f"image to text {ways[0]}, text to image {ways[1]}, rSum {metrics['rsum']:.1f}"


def _end(interval: dict, which: int) -> dict:
    """One end of all intervals, in the form of metrics."""
    return {
        way: {name: ends[which] for name, ends in figures.items()} if isinstance(figures, dict) else figures[which]
        for way, figures in interval.items()
    }


def _cells(texts) -> str:
    return "".join(f"{text:>{WIDTH}}" for text in texts)


def _figure(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"
