"""run.json, the record of a run beside its checkpoints: what was trained, on what, by what, and how it was chosen.

format      FORMAT
settings    all settings                data      of train and dev: folder, images, captions, fingerprint
sessions    of each start: when, from where, at which step, on which device, with which versions
progress    epoch, batch, step          history   of each finished epoch: epoch, step, dev (its metrics)
chosen      split (always dev), epoch, rsum, checkpoint; null before the first epoch has ended
"""

import json
from pathlib import Path

from lib.cli import InputError
from lib.files import replacing

RECORD = "run.json"
FORMAT = "x-dim run 1"
LARGEST = 2**24  # bytes; the record of a thousand epochs is far below


def write_record(folder: Path, record: dict) -> None:
    """Write FOLDER/run.json in place of an older one. Raises InputError where it cannot be written."""
    with replacing(folder / RECORD) as file:
        file.write(json.dumps({"format": FORMAT, **record}, indent=1).encode() + b"\n")


def read_record(folder: Path) -> dict | None:
    """The content of FOLDER/run.json, None where there is none. Raises InputError where it is damaged."""
    path = folder / RECORD
    if not path.is_file():
        return None
    try:
        with open(path, "rb") as file:
            text = file.read(LARGEST + 1)
        record = json.loads(text) if len(text) <= LARGEST else None
    except (OSError, ValueError, RecursionError):
        record = None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise InputError(f"{path}: damaged, or not the record of a run")
    return record


def quote(record: dict) -> str:
    """One line that says how a run's best epoch was chosen. Raises InputError where the record does not say it."""
    try:
        chosen, progress, settings = record["chosen"], record["progress"], record["settings"]
        git = record["sessions"][-1]["versions"]["git"]
        choice = (
            f"epoch {chosen['epoch']} of {progress['epoch']} chosen on {chosen['split']} (rSum {chosen['rsum']:.1f})"
            if chosen
            else "no epoch chosen yet"
        )
        line = f"{choice}, seed {settings['seed']}" + (f", commit {git[:10]}" if git else "")
        return " ".join(line.split())  # one line, whatever the file holds
    except (KeyError, IndexError, TypeError, ValueError):
        raise InputError(f"{RECORD}: damaged, it does not say how the checkpoint was chosen") from None
