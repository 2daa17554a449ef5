"""What training writes into run.json; the file itself is lib/record.py's."""

from dataclasses import asdict
from datetime import UTC, datetime

from lib.checkpoints.native import BEST
from lib.checkpoints.record import read_record
from lib.cli import InputError
from lib.data.dataset import Split
from lib.runtime import versions
from lib.training.origin import Origin
from lib.training.progress import Progress


def describe_data(split: Split) -> dict:
    """Which data a split is, wherever it lies."""
    sizes = {"images": len(split.features), "captions": len(split.captions)}
    return {"folder": str(split.folder), **sizes, "fingerprint": split.fingerprint()}


def begin_record(settings: dict, data: dict, device: str, origin: Origin | None) -> dict:
    """The part that stays while this process trains; earlier sessions of the same run folder stay in it."""
    session = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "from": str(origin.path) if origin else None,
        "step": origin.progress.step if origin else 0,
        "device": device,
        "versions": versions(),
    }
    before = _sessions_before(origin) if origin and origin.in_place else []
    return {"settings": settings, "data": data, "sessions": [*before, session]}


def record_now(record: dict, progress: Progress) -> dict:
    """The whole record: what stays, and where the run stands."""
    chosen = {"split": "dev", "epoch": progress.best_epoch, "rsum": progress.best_rsum, "checkpoint": BEST}
    history = asdict(progress)["history"]
    position = {"epoch": progress.epoch, "batch": progress.batch, "step": progress.step}
    return {**record, "progress": position, "history": history, "chosen": chosen if progress.best_epoch else None}


def _sessions_before(origin: Origin) -> list[dict]:
    try:
        return (read_record(origin.path.parent) or {}).get("sessions", [])
    except InputError as error:
        origin.notes.append(f"warning: {error}; it begins anew")
        return []
