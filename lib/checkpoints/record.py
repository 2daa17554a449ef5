"""run.json, the record of a run beside its checkpoints: what was trained, on what data, with which versions, and how
the best epoch was chosen.

format      FORMAT                      run       a number of its own, which a resumed run keeps
settings    all settings                data      train and dev: folder, images, captions, fingerprint
sessions    each start of the program: time, checkpoint it started from, step, device, job, versions
progress    epoch, batch, step          history   each finished epoch: epoch, step, dev (its metrics)
chosen      split (always dev), epoch, rsum, checkpoint; null before the first epoch has ended
"""

import json
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

from lib import distributed
from lib.checkpoints.native import BEST
from lib.cli import refusing
from lib.data.dataset import Split, read_encoder
from lib.data.features import FeatureFile
from lib.files import replacing
from lib.runtime import versions

RECORD = "run.json"
FORMAT = "x-dim run 1"


def describe_data(split: Split) -> dict:
    """Which data a split holds; the fingerprint does not depend on where it lies."""
    sizes = {"images": len(split.features), "captions": len(split.captions)}
    encoder = read_encoder(split.folder) if isinstance(split.features, FeatureFile) else None
    made_by = {"encoder": encoder} if encoder else {}
    return {"folder": str(split.folder), **sizes, "fingerprint": split.fingerprint(), **made_by}


def begin_record(settings: dict, data: dict, device: str, started_from: Path | None, step: int) -> dict:
    """What of a record does not change in training. data: `describe_data` by split. step: of the file started from."""
    start = {"started": datetime.now(UTC).isoformat(timespec="seconds"), "from": started_from and str(started_from)}
    session = {**start, "step": step, "device": device, "job": distributed.job(), "versions": versions()}
    return {"run": uuid4().hex, "settings": settings, "data": data, "sessions": [session]}


def write_record(folder: Path, record: dict, progress: dict) -> None:
    """Write FOLDER/run.json: what `begin_record` gave, and training's Progress as a dict. Raises InputError."""
    position = {name: progress[name] for name in ("epoch", "batch", "step")}
    best = {"split": "dev", "epoch": progress["best_epoch"], "rsum": progress["best_rsum"], "checkpoint": BEST}
    now = {"progress": position, "history": progress["history"], "chosen": best if progress["best_epoch"] else None}
    with replacing(folder / RECORD) as file:
        file.write(json.dumps({"format": FORMAT, **record, **now}, indent=1).encode() + b"\n")


def read_record(folder: Path) -> dict | None:
    """The content of FOLDER/run.json, None where there is none. Raises InputError where it is damaged."""
    path = folder / RECORD
    if not path.is_file():
        return None
    with refusing(f"{path}: damaged, or not the record of a run"):
        record = json.loads(path.read_bytes())
        if record["format"] != FORMAT:
            raise ValueError(f"its format is {record['format']!a}")
    return record


def quote(record: dict) -> str:
    """One line that says how a run's best epoch was chosen. Raises InputError where the record does not say it."""
    with refusing(f"{RECORD}: damaged, it does not say how the checkpoint was chosen"):
        chosen, git = record["chosen"], record["sessions"][-1]["versions"]["git"]
        form = "epoch {epoch} of {finished} chosen on {split} (rSum {rsum:.1f})"
        choice = form.format(**chosen, finished=record["progress"]["epoch"]) if chosen else "no epoch chosen yet"
        return f"{choice}, seed {record['settings']['seed']}" + (f", commit {git[:10]}" if git else "")
