"""What a reader sees: tables of metrics, where a checkpoint comes from, and what its row in a table must say."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from lib.checkpoints.record import quote, read_record
from lib.cli import InputError, printable
from lib.data.dataset import Split
from lib.evaluation.metrics import LEVEL, RECALL_AT, RECALLS, WAYS
from lib.files import read_lines

COLUMNS = (*RECALLS, "avg", "medr", "meanr")
HEADINGS = {
    **{f"r{k}": f"R@{k}" for k in RECALL_AT},
    **{"avg": "avg R", "medr": "med r", "meanr": "mean r", "map_at_r": "mAP@R", "r_precision": "R-P"},
}
TITLES = {"i2t": "image to text", "t2i": "text to image", "i2i": "image to image", "t2t": "text to text"}
WIDTH = 7
INTERVALS = f"{LEVEL} %: interval of the figure above, by bootstrap over images (docs/evaluation.md)"


class Row(NamedTuple):
    """A line of a table. Metrics that it lacks stay blank (chance has no ranks)."""

    name: str
    metrics: dict
    form: str = ".1f"


def table(rows: Sequence[Row], columns: Sequence[str] = COLUMNS, ways: Sequence[str] = WAYS) -> str:
    """A table with the metrics `columns` of two directions side by side."""
    names = max(len(row.name) for row in rows) + 2
    rsum = any("rsum" in row.metrics for row in rows)
    headings = _cells(HEADINGS[column] for column in columns)
    lines = [" " * names + "  ".join(TITLES[way].center(WIDTH * len(columns)) for way in ways)]
    lines += [" " * names + "  ".join([*(headings for _ in ways), _cells(["rSum"] if rsum else [])])]
    for name, metrics, form in rows:
        sides = [_cells((metrics.get(way, {}).get(column) for column in columns), form) for way in ways]
        total = _cells([metrics.get("rsum")], form) if rsum else ""
        lines.append(f"{name:<{names}}{'  '.join([*sides, total])}")
    return "\n".join(line.rstrip() for line in lines)


def with_interval(name: str, metrics: dict, form: str = ".1f") -> list[Row]:
    """A row of metrics, and below it both ends of the intervals that they carry."""
    ends = [Row(f"  {LEVEL} % {word}", _end(metrics["interval"], k), form) for k, word in enumerate(("from", "to"))]
    return [Row(name, metrics, form), *ends]


def named_parts(metrics: dict, images: int, folds: int) -> dict[str, dict]:
    """Metrics by what follows a row's name: those of the folds' mean and any of the whole split, or the only ones."""
    if not folds:
        return {"": metrics}
    whole = {f", all {images} images": metrics["full"]} if "full" in metrics else {}
    return {f", mean of {folds} folds of {images // folds}": metrics, **whole}


def line(metrics: dict) -> str:
    """The six recalls and their sum in one line, for logs."""
    ways = [" ".join(f"{metrics[way][name]:.1f}" for name in RECALLS) for way in WAYS]
    return f"image to text {ways[0]}, text to image {ways[1]}, rSum {metrics['rsum']:.1f}"


def _end(intervals: dict, which: int) -> dict:
    """The lower (0) or upper (1) ends of all intervals, in the form of metrics."""
    return {name: _end(one, which) if isinstance(one, dict) else one[which] for name, one in intervals.items()}


def _cells(values: Iterable[str | float | None], form: str = "") -> str:
    """Values side by side, None as blank."""
    return "".join(("" if value is None else f"{value:{form}}").rjust(WIDTH) for value in values)


def describe_source(path: str, content: dict, label: str) -> str:
    """Lines of a heading: the file, its epochs and its rSum on dev, how it was chosen. content: empty for scores."""
    if not content:
        return f"{label:<12}{path}"
    progress = content["progress"]
    dev = progress["history"][-1]["dev"]["rsum"] if progress["history"] else progress["best_rsum"]
    measured = f", dev rSum {dev:.1f}" if dev >= 0 else ""  # none before the first evaluation
    lines = [f"{label:<12}{content['path']}, {progress['epoch']} epochs{measured}"]
    lines += [f"{'note':<12}{note}" for note in content.get("notes", [])]
    try:
        record = read_record(Path(content["path"]).parent)
        lines += [f"{'run':<12}{quote(record)}"] if record else []
    except InputError as error:
        lines.append(f"{'run':<12}{error}")
    return "\n".join(map(printable, lines))


def find_caveats(content: dict, split: Split, data_name: str) -> list[tuple[str, str]]:
    """How the split was used in training the checkpoint: a label for the row's name, a text for below the table.

    Whether it belongs to the training's data set (copies elsewhere and in float16 do) is decided by the numbers of
    captions of train and dev if both files are there, else by them and the name, data_name.
    """
    data, settings = content.get("data") or {}, content.get("settings", {})
    train, dev = (data.get(name, {}) for name in ("train", "dev"))
    trained = printable(str(train.get("folder") or settings.get("data_name") or ""))
    if not trained:
        return []
    files = [(one, split.folder / f"{name}_caps.txt") for name, one in (("train", train), ("dev", dev))]
    there = [(one["captions"], path) for one, path in files if "captions" in one and path.is_file()]
    equal = [sum(1 for _ in read_lines(path)) == captions for captions, path in there]
    if not all(equal) or (len(equal) < 2 and data_name != settings.get("data_name")):
        return [("zero-shot", f"trained on {trained}, evaluated on {split.folder}")]
    found = split.fingerprint() if data else None
    if split.name == "train" or found == train.get("fingerprint", ""):
        return [("seen in training", f"the model was trained on {split.folder} {split.name}")]
    if split.name == "dev" or found == dev.get("fingerprint", ""):
        return [("chosen on this split", f"{split.name} is what the run's best epoch was chosen on")]
    return []
