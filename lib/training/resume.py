"""What a run starts from: a checkpoint to continue, or another run's weights; which settings may differ then; random
numbers and agreement of the job's processes."""

from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from lib import distributed
from lib.checkpoints.native import find_checkpoint, read_checkpoint
from lib.checkpoints.record import RECORD, read_record
from lib.cli import InputError
from lib.config import ModelSettings, RecipeSettings, TrainSettings
from lib.runtime import random_state, restore_random_state, seed_everything
from lib.training.run_folder import Progress, checkpoints, step_files, step_of, trained_last_by_this_job

OF_ONE_START = ("resume", "init_from", "allow_changes", "model_name", "logger_name")  # not taken from a checkpoint
WITHOUT_WEIGHTS = ("bert", "mask_padding")  # of the model's settings: they do not shape its weights
ARCHITECTURE = [name for name in ModelSettings.__annotations__ if name not in WITHOUT_WEIGHTS]
RECIPE = [*RecipeSettings.__annotations__, "seed", "mask_padding", "precision", "engine", "device_features"]
RECIPE.remove("num_epochs")
ORDER = ("batch_size", "seed")  # the order of pairs depends on them
OF_A_NODE = ("data_path", "bert", "workers")  # may differ between the machines of a job


@dataclass
class Origin:
    """A checkpoint that a run starts from.

    defaults: its settings, in place of the program's defaults. progress: where the run stands. exact: whether it holds
    optimiser and random state, to continue to the bit. in_run_folder: whether it lies in a run's folder; in_place:
    whether the run stays there. damaged: newer checkpoints that cannot be read, with what is wrong. notes: what the
    run's log says about it.
    """

    path: Path
    content: dict
    defaults: dict
    progress: Progress = field(default_factory=Progress)
    exact: bool = False
    in_run_folder: bool = False
    in_place: bool = False
    damaged: dict[Path, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def find_origin(settings: TrainSettings) -> Origin | None:
    """The checkpoint that --resume or --init_from names; None for a run from the start. Raises InputError."""
    if settings.init_from:
        return _weights(find_checkpoint(settings.init_from))
    if not settings.resume:
        return None
    path = Path(settings.model_name if settings.resume == "auto" else settings.resume)
    if settings.resume == "auto" and not checkpoints(path):
        return None
    return _newest_sound(path) if path.is_dir() else _checkpoint(find_checkpoint(str(path)), {})


def find_own_checkpoint(settings: TrainSettings) -> Origin | None:
    """The last checkpoint of a job that torchrun has restarted after a failure; None if it has saved none."""
    folder = Path(settings.model_name)
    return _newest_sound(folder) if trained_last_by_this_job(folder) and checkpoints(folder) else None


def _newest_sound(folder: Path) -> Origin:
    """The newest checkpoint of a run folder that can be read. Raises InputError where there is none."""
    damaged = {}
    for path in checkpoints(folder):
        try:
            return _checkpoint(path, damaged)
        except InputError as error:
            damaged[path] = str(error)
    if damaged:
        raise InputError(
            f"{folder}: none of its {len(damaged)} checkpoints can be read; {next(iter(damaged.values()))}"
        )
    raise InputError(f"{folder}: no checkpoint in it; --resume auto starts a run where there is none yet")


def _checkpoint(path: Path, damaged: dict[Path, str]) -> Origin:
    """A checkpoint to continue from: to the bit where it holds optimiser and random state."""
    content = read_checkpoint(path)
    folder, then = path.parent, content["settings"]
    defaults, progress = _settings_of(content), Progress(**content["progress"])
    exact = "optimizer" in content
    in_run_folder = exact or (folder / RECORD).is_file()
    notes = [f"warning: {error}; continuing from {path.name}" for error in damaged.values()]
    notes += content["notes"]
    if not exact:
        notes.append(f"{path} holds weights only: the optimiser starts fresh, at epoch {progress.epoch + 1}")
        progress.batch = 0
    if in_run_folder:
        defaults["model_name"] = str(folder)
        if then.get("model_name") == str(folder):  # which has not been moved
            defaults["logger_name"] = then.get("logger_name", "")
    return Origin(path, content, defaults, progress, exact, in_run_folder, damaged=damaged, notes=notes)


def _weights(path: Path) -> Origin:
    """Any checkpoint, of which a new run takes the weights."""
    content = read_checkpoint(path)
    defaults = {name: value for name, value in _settings_of(content).items() if name in ARCHITECTURE}
    return Origin(path, content, defaults, notes=[f"all weights start from {path}", *content["notes"]])


def _settings_of(content: dict) -> dict:
    return {name: value for name, value in content["settings"].items() if name not in OF_ONE_START}


# What may differ from the checkpoint


def refuse_changes(settings: TrainSettings, origin: Origin) -> None:
    """Compare a run's settings with its checkpoint's; what may change with --allow_changes becomes a note.

    Raises InputError naming the settings that differ and may not, and where the run would overwrite another one.
    """
    changed = [name for name, then in origin.defaults.items() if getattr(settings, name) != then]

    def named(names: list[str]) -> str:
        return ", ".join(f"--{name} {getattr(settings, name)} (was {origin.defaults[name]})" for name in names)

    fixed = [*ARCHITECTURE, "bert"] if origin.exact else ARCHITECTURE
    if refused := [name for name in changed if name in fixed]:
        raise InputError(f"{origin.path}: its weights were made with other settings: {named(refused)}")
    recipe = [name for name in changed if name in RECIPE]
    if recipe and not settings.allow_changes:
        raise InputError(
            f"{origin.path}: these settings differ: {named(recipe)}; leave them as they were, "
            "or say --allow_changes to continue with the new ones"
        )
    if recipe:
        origin.notes.append(f"changed settings: {named(recipe)}")
    if any(name in ORDER for name in changed):
        _begin_epoch_again(origin)
    _choose_folder(Path(settings.model_name), origin)


def refuse_changed_data(origin: Origin, data: dict, allowed: bool) -> None:
    """Compare the splits' fingerprints with the checkpoint's. Raises InputError where they differ, unless allowed."""
    then = origin.content.get("data") or {}
    changed = [
        f"{split} in {now['folder']}"
        for split, now in data.items()
        if split in then and then[split]["fingerprint"] != now["fingerprint"]
    ]
    if changed and not allowed:
        raise InputError(
            f"{origin.path}: was trained on other data than {' and '.join(changed)}; name the old data with "
            "--data_path and --data_name, or say --allow_changes to continue with the new"
        )
    if changed:
        origin.notes.append(f"changed data: {', '.join(changed)}")
        _begin_epoch_again(origin)


def _begin_epoch_again(origin: Origin) -> None:
    """An unfinished epoch cannot be continued in another order."""
    if origin.progress.batch:
        origin.notes.append(f"epoch {origin.progress.epoch + 1} begins again: its pairs come in another order now")
        origin.progress.batch = 0


def _choose_folder(folder: Path, origin: Origin) -> None:
    """A run folder holds one line of checkpoints: no run starts over another one or over its own later steps."""
    origin.in_place = origin.in_run_folder and origin.path.parent.resolve() == folder.resolve()
    if not origin.in_place:
        refuse_used_folder(folder)
        origin.progress.forget_best()
        if origin.exact:
            origin.notes.append(
                f"branches off {origin.path.parent} into {folder}; the best epoch is counted from here on"
            )
        return
    later = [path for path in step_files(folder) if step_of(path) > origin.progress.step]
    if later := [path for path in later if path not in origin.damaged]:
        raise InputError(
            f"--resume {origin.path}: {later[0]} is later; continue with --resume {folder}, "
            "or branch off into a new folder with --model_name"
        )


def refuse_used_folder(folder: Path) -> None:
    """Raises InputError where the folder of a new run holds a run already."""
    if checkpoints(folder):
        raise InputError(
            f"--model_name {folder}: holds a run already; continue it with --resume {folder} or name another folder"
        )


def earlier_sessions(origin: Origin | None) -> list[dict]:
    """What run.json says of the earlier starts of a run that is continued in its folder."""
    if not (origin and origin.in_place):
        return []
    try:
        return (read_record(origin.path.parent) or {}).get("sessions", [])
    except InputError as error:
        origin.notes.append(f"warning: {error}; it begins anew")
        return []


# The processes of a job


def refuse_disagreement(settings: TrainSettings, progress: Progress) -> None:
    """Raises InputError where the processes were started with different flags, or found different checkpoints."""
    if distributed.world_size() == 1:
        return
    own = {name: value for name, value in asdict(settings).items() if name not in OF_A_NODE}
    first, *others = _gather({**own, "step": progress.step})
    for name, value in first.items():
        different = [(rank, other[name]) for rank, other in enumerate(others, 1) if other[name] != value]
        if different and name == "step":
            raise InputError(
                f"--resume: rank 0 found a checkpoint of step {value}, rank {different[0][0]} one of step "
                f"{different[0][1]}; all nodes must see the same run folder"
            )
        if different:
            raise InputError(
                f"--{name}: {value!r} of rank 0 but {different[0][1]!r} of rank {different[0][0]}; start all processes "
                "with the same flags"
            )


def seed_process(seed: int, step: int) -> None:
    """Give each process but the first random numbers of its own; the first continues those of a single process.

    Only dropout draws from them: weights are made before, and order and augmentation are functions of (seed, epoch,
    batch).
    """
    if not distributed.is_first():
        sequence = np.random.SeedSequence([seed, step, distributed.rank()])
        seed_everything(int(sequence.generate_state(1, np.uint64)[0]) >> 1)


def all_random_states(device: torch.device) -> dict:
    """The first process's state of all generators; `others` lists those of the other processes."""
    own = random_state(device)
    if distributed.world_size() == 1:
        return own
    first, *others = _gather(own)
    return {**first, "others": others}


def restore_own_random_state(states: dict, device: torch.device) -> list[str]:
    """Restore this process's generators. Returns a note where the number of processes was another then."""
    of_processes = [states, *states.get("others", [])]
    then, now = len(of_processes), distributed.world_size()
    if then == now or distributed.is_first():
        restore_random_state(of_processes[distributed.rank()], device)
    if then == now:
        return []
    return [
        f"number of processes: {then} before, {now} now, so dropout draws other random numbers; batches, their order "
        "and augmentation stay the same"
    ]


def _gather(own: dict) -> list[dict]:
    everybody = [{}] * distributed.world_size()
    dist.all_gather_object(everybody, own)
    return everybody
