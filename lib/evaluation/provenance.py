"""Where figures come from: the checkpoint and its run, and what the evaluated split had to do with training it."""

from pathlib import Path
from typing import NamedTuple

from lib.checkpoints.record import quote, read_record
from lib.cli import InputError
from lib.data.dataset import Split, count_lines


class Caveat(NamedTuple):
    """What a reader of a table has to know of a row."""

    label: str  # in the row's name
    text: str  # below the table


def quote_checkpoint(checkpoint: dict) -> str:
    """A line on a checkpoint: epochs, and rSum on dev where it was measured."""
    progress = checkpoint["progress"]
    dev = progress["history"][-1]["dev"]["rsum"] if progress["history"] else progress["best_rsum"]
    measured = f", dev rSum {dev:.1f}" if dev >= 0 else ""  # a checkpoint from before the first evaluation has none
    return f"{checkpoint['path']}, {progress['epoch']} epochs{measured}"


def quote_run(checkpoint: Path) -> str:
    """What the run's record says of how the checkpoint was chosen; empty where there is no record beside it."""
    try:
        record = read_record(checkpoint.parent)
        return quote(record) if record else ""
    except InputError as error:
        return str(error)


def find_caveats(checkpoint: dict, split: Split, data_name: str) -> list[Caveat]:
    """What the split had to do with the checkpoint's training, by the record that the checkpoint carries.

    data_name: under which name the split was asked for.
    """
    data, settings = checkpoint.get("data", {}), checkpoint["settings"]
    trained = _entry(data, "train").get("folder") or settings.get("data_name")
    if trained is None:
        return []
    if not _is_same_data_set(data, split, data_name == settings.get("data_name")):
        return [Caveat("zero-shot", f"trained on {trained}, evaluated on {split.folder}")]
    found = split.fingerprint() if data else None
    if split.name == "train" or found == _entry(data, "train").get("fingerprint", ""):
        return [Caveat("seen in training", f"the model was trained on {split.folder} {split.name}")]
    if split.name == "dev" or found == _entry(data, "dev").get("fingerprint", ""):
        return [Caveat("chosen on this split", f"{split.name} is what the run's best epoch was chosen on")]
    return []


def _is_same_data_set(data: dict, split: Split, same_name: bool) -> bool:
    """Whether a split belongs to the data set of a training: copies may lie anywhere, and hold float16 features.

    The numbers of captions in train and dev tell, where both are there; else they must not differ, nor the name.
    """
    equal = {}
    for name in ("train", "dev"):
        captions, path = _entry(data, name).get("captions"), split.folder / f"{name}_caps.txt"
        if captions is not None and path.is_file():
            equal[name] = count_lines(path) == captions
    return all(equal.values()) and (len(equal) == 2 or same_name)


def _entry(data: dict, split: str) -> dict:
    entry = data.get(split)
    return entry if isinstance(entry, dict) else {}
