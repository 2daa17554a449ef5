"""What a run starts from: a checkpoint to go on from, or another run's weights; and which settings may change then."""

from dataclasses import dataclass, field
from pathlib import Path

from lib.checkpoints.native import find_checkpoint, read_checkpoint
from lib.cli import InputError
from lib.config import RecipeSettings, TrainSettings
from lib.training.folder import checkpoints, is_of_this_job, newest_sound, step_files, step_of
from lib.training.progress import Progress

OF_ONE_START = ("resume", "init_from", "allow_changes", "model_name", "logger_name")  # not taken from a checkpoint
# In the weights: nothing can change these
BUILT_IN = ("img_dim", "embed_size", "no_imgnorm", "no_txtnorm", "similarity", "gate")
RECIPE = (
    "mask_padding",
    *(name for name in RecipeSettings.__annotations__ if name != "num_epochs"),
    "precision",
    "device_features",
)
ORDER = ("batch_size", "seed")  # the order of pairs depends on them


@dataclass
class Origin:
    """A checkpoint that a run starts from.

    defaults: its settings, in place of the program's defaults. progress: where the run stands. exact: whether optimiser
    and random state are in it. in_place: whether the run stays in its folder. notes: what the run has to say of it.
    """

    path: Path
    content: dict
    defaults: dict
    progress: Progress = field(default_factory=Progress)
    exact: bool = False
    in_place: bool = False
    damaged: dict[Path, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def find_origin(settings: TrainSettings) -> Origin | None:
    """The checkpoint that --resume or --init_from names; None for a run from nothing. Raises InputError."""
    if settings.init_from:
        return _weights(find_checkpoint(settings.init_from))
    if not settings.resume:
        return None
    path = Path(settings.model_name if settings.resume == "auto" else settings.resume)
    if settings.resume == "auto" and not checkpoints(path):
        return None
    if path.is_dir():
        newest = newest_sound(path)
        return _run(newest.path, newest.content, newest.damaged)
    path = find_checkpoint(str(path))
    content = read_checkpoint(path)
    return _run(path, content, {}) if "optimizer" in content else _weights_and_settings(path, content)


def find_own_checkpoint(settings: TrainSettings) -> Origin | None:
    """The checkpoint that a job, which torchrun has started anew after a failure, has itself saved last.

    None where it has saved none.
    """
    folder = Path(settings.model_name)
    if not (is_of_this_job(folder) and checkpoints(folder)):
        return None
    newest = newest_sound(folder)
    return _run(newest.path, newest.content, newest.damaged)


def _run(path: Path, content: dict, damaged: dict[Path, str]) -> Origin:
    """A checkpoint of this project, to go on exactly."""
    folder = path.parent
    defaults = {**_defaults(content), "model_name": str(folder)}
    notes = [f"warning: {error}; going on from {path.name}" for error in damaged.values()]
    logger, model = (Path(content["settings"].get(name, "")) for name in ("logger_name", "model_name"))
    if logger != model:
        if logger.is_relative_to(model) and ".." not in logger.parts:
            defaults["logger_name"] = str(folder / logger.relative_to(model))
        else:
            notes.append(f"TensorBoard's files went to {logger}; without --logger_name they go to the run folder now")
    progress = Progress(**content["progress"])
    return Origin(path, content, defaults, progress, exact=True, damaged=damaged, notes=notes)


def _weights_and_settings(path: Path, content: dict) -> Origin:
    """Weights and settings without an optimiser: the schedule goes on, the optimiser starts fresh."""
    then = content["progress"]
    progress = Progress(epoch=then["epoch"], step=then["step"])
    notes = [
        f"{path} holds weights and settings only: the optimiser starts fresh, at epoch {progress.epoch + 1}, "
        "and the best epoch counts from here on"
    ]
    return Origin(path, content, _defaults(content), progress, notes=notes)


def _weights(path: Path) -> Origin:
    """Any checkpoint, of which a new run takes the weights."""
    content = read_checkpoint(path)
    notes = [f"weights, BERT's too, start from {path}"]
    defaults = {name: value for name, value in content["settings"].items() if name in BUILT_IN}
    return Origin(path, content, defaults, notes=notes)


def _defaults(content: dict) -> dict:
    return {name: value for name, value in content["settings"].items() if name not in OF_ONE_START}


def refuse_changes(settings: TrainSettings, origin: Origin) -> None:
    """Compare a resumed run's settings with its checkpoint's; what may change with --allow_changes is noted.

    Raises InputError naming the settings that differ and may not, and where a later checkpoint would be lost.
    """
    fixed = [*BUILT_IN, "bert"] if origin.exact else BUILT_IN
    if changes := _changes(settings, origin, fixed):
        raise InputError(f"{origin.path}: its weights were made with other settings: {', '.join(changes)}")
    changes = _changes(settings, origin, RECIPE)
    if changes and not settings.allow_changes:
        raise InputError(
            f"{origin.path}: these settings differ: {', '.join(changes)}; leave them as they were, "
            "or say --allow_changes to go on with the new ones"
        )
    if changes:
        origin.notes.append(f"changed settings: {', '.join(changes)}")
    if any(getattr(settings, name) != origin.defaults.get(name, getattr(settings, name)) for name in ORDER):
        begin_epoch_again(origin)
    _choose_folder(settings, origin)


def refuse_changed_data(origin: Origin, data: dict, allowed: bool) -> None:
    """Compare the splits' fingerprints with the checkpoint's. Raises InputError where they differ, unless allowed."""
    then = origin.content.get("data", {})
    changed = [f"{split} in {about['folder']}" for split, about in data.items() if _differs(then.get(split), about)]
    if changed and not allowed:
        raise InputError(
            f"{origin.path}: was trained on other data than {' and '.join(changed)}; say --data_path and --data_name "
            "of those, or --allow_changes to go on with these"
        )
    if changed:
        origin.notes.append(f"changed data: {', '.join(changed)}")
        begin_epoch_again(origin)


def begin_epoch_again(origin: Origin) -> None:
    """An epoch that was under way cannot be continued in another order."""
    if origin.progress.batch:
        origin.notes.append(f"epoch {origin.progress.epoch + 1} begins again, its pairs come in another order now")
        origin.progress.batch = 0


def _changes(settings: TrainSettings, origin: Origin, names) -> list[str]:
    return [
        f"--{name} {getattr(settings, name)} (was {origin.defaults[name]})"
        for name in names
        if name in origin.defaults and getattr(settings, name) != origin.defaults[name]
    ]


def _differs(then: dict | None, now: dict) -> bool:
    return isinstance(then, dict) and then.get("fingerprint") != now["fingerprint"]


def _choose_folder(settings: TrainSettings, origin: Origin) -> None:
    """A run folder holds one line of checkpoints: nothing is started over another run or over later work."""
    folder = Path(settings.model_name)
    origin.in_place = origin.exact and origin.path.parent.resolve() == folder.resolve()
    if origin.in_place:
        return _refuse_to_go_back(folder, origin)
    refuse_used_folder(folder)
    origin.progress.best_rsum, origin.progress.best_epoch = Progress.best_rsum, Progress.best_epoch
    if origin.exact:
        origin.notes.append(f"branches off {origin.path.parent} into {folder}; the best epoch counts from here on")


def _refuse_to_go_back(folder: Path, origin: Origin) -> None:
    later = [path for path in step_files(folder) if step_of(path) > origin.progress.step]
    later = [path for path in later if path not in origin.damaged]
    if later:
        raise InputError(
            f"--resume {origin.path}: {later[0]} is later; go on with --resume {folder}, "
            "or branch off into a new folder with --model_name"
        )


def refuse_used_folder(folder: Path) -> None:
    """Raises InputError where a folder that a new run would write to holds a run already."""
    if checkpoints(folder):
        raise InputError(
            f"--model_name {folder}: holds a run already; go on with --resume {folder} or name another folder"
        )
