"""What a run starts from: a checkpoint to continue, or another run's weights, and which settings may differ then."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch

from lib import collectives, distributed
from lib.checkpoints.native import UNKNOWN, Damaged, find_checkpoint, read_checkpoint, with_vision
from lib.checkpoints.record import RECORD, read_record
from lib.cli import InputError, reason, refusing
from lib.config import ModelSettings, RecipeSettings, TrainSettings
from lib.model.registry import is_from_pixels, parse_part
from lib.runtime import random_state, restore_random_state, seed_everything
from lib.training.optim import restore_optimizer
from lib.training.run_folder import Progress, checkpoints, refuse_used

OF_ONE_START = ("resume", "init_from", "allow_changes", "model_name", "logger_name")  # not taken from a checkpoint
LANGUAGE_MODEL = {"bert", "bert_from_scratch"}
ARCHITECTURE = ModelSettings.__annotations__.keys() - LANGUAGE_MODEL - {"image_weights", "mask_padding"}
RECIPE = RecipeSettings.__annotations__.keys() | {"seed", "mask_padding", "precision", "engine", "device_features"}
RECIPE -= {"num_epochs"}
ORDER = ("batch_size", "seed")  # the order of pairs depends on them
OF_A_NODE = ("data_path", "image_path", "bert", "workers")  # may differ between the machines of a job


@dataclass
class Origin:
    """A checkpoint that a run starts from."""

    path: Path
    content: dict
    defaults: dict  # its settings, instead of the program's defaults, with `model_name` where it lies in a run's folder
    progress: Progress = field(default_factory=Progress)  # where the run stands
    exact: bool = False  # whether it holds optimiser and random state, to continue to the bit
    in_place: bool = False  # whether the run stays in its folder
    damaged: dict[Path, str] = field(default_factory=dict)  # newer ones that cannot be read, with what is wrong
    notes: list[str] = field(default_factory=list)  # what the run's log says about it

    def accept(self, change: str, allowed: bool, refusal: str, reorders: bool) -> None:
        """Note a change that is allowed; one that reorders the pairs begins an unfinished epoch again."""
        if not allowed:
            raise InputError(f"{self.path}: {refusal}")
        self.notes.append(f"changed {change}")
        if reorders and self.progress.batch:
            self.notes.append(f"epoch {self.progress.epoch + 1} begins again: its pairs come in another order now")
            self.progress.batch = 0


def find_origin(settings: TrainSettings) -> Origin | None:
    """What --resume finds, else the checkpoint of --init_from; None for a run from the start. Raises InputError."""
    path = Path(settings.model_name if settings.resume == "auto" else settings.resume)
    if settings.resume and (settings.resume != "auto" or checkpoints(path)):
        return _newest_sound(path) if path.is_dir() else _checkpoint(find_checkpoint(str(path)))
    return _weights(find_checkpoint(settings.init_from), settings) if settings.init_from else None


def find_own_checkpoint(settings: TrainSettings) -> Origin | None:
    """The last checkpoint of a job that torchrun has restarted after a failure; None if the job has saved none."""
    folder = Path(settings.model_name)
    try:
        is_own = (read_record(folder) or {})["sessions"][-1]["job"] == distributed.job()
    except (InputError, LookupError, TypeError):
        return None
    return _newest_sound(folder) if is_own and checkpoints(folder) else None


def _newest_sound(folder: Path) -> Origin:
    """The newest checkpoint of a run folder that is not damaged. Raises InputError where none is, or cannot be read."""
    damaged: dict[Path, str] = {}
    for path in checkpoints(folder):
        try:
            origin = _checkpoint(path)
        except Damaged as error:
            damaged[path] = str(error)
            continue
        origin.damaged = damaged
        origin.notes[:0] = [f"warning: {error}; continuing from {path.name}" for error in damaged.values()]
        return origin
    if damaged:
        first = next(iter(damaged.values()))
        raise InputError(f"{folder}: none of its {len(damaged)} checkpoints can be read; {first}")
    raise InputError(f"{folder}: no checkpoint in it; --resume auto starts a run where there is none yet")


def _checkpoint(path: Path) -> Origin:
    """A checkpoint to continue from. Raises InputError."""
    content, folder = read_checkpoint(path), path.parent
    with refusing(f"{path}: {UNKNOWN}"):
        progress, then = Progress(**content["progress"]), content["settings"]
    defaults = {name: value for name, value in then.items() if name not in OF_ONE_START}
    notes, exact = list(content["notes"]), "optimizer" in content
    if not exact:
        notes.append(f"{path} holds weights only: the optimiser starts fresh, at epoch {progress.epoch + 1}")
        progress.batch = 0
    if exact or (folder / RECORD).is_file():
        defaults["model_name"] = str(folder)
        if then.get("model_name") == str(folder):  # the folder has not been moved
            defaults["logger_name"] = then.get("logger_name", "")
    return Origin(path, content, defaults, progress, exact, notes=notes)


def _weights(path: Path, settings: TrainSettings) -> Origin:
    """Any checkpoint, of which a new run takes the weights, on any data."""
    content = read_checkpoint(path)
    notes = [f"all weights start from {content['path']}"]
    taken = ARCHITECTURE | (LANGUAGE_MODEL if "tokenizer" in content else set())
    defaults = {name: value for name, value in content["settings"].items() if name in taken}
    wanted = parse_part("image_encoder", settings.image_encoder)
    if is_from_pixels(wanted) and not is_from_pixels(content["architecture"]["image_encoder"]):
        content = with_vision(content, wanted["options"]["model"], settings.image_weights)
        defaults |= {"image_encoder": settings.image_encoder, "img_dim": 0}
        notes.append(f"those of {wanted['options']['model']} are the ones that made the regions")
    return Origin(path, {**content, "data": {}}, defaults, notes=[*notes, *content["notes"]])


def refuse_changes(settings: TrainSettings, origin: Origin) -> None:
    """Compare a run's settings with its checkpoint's; what may change with --allow_changes becomes a note.

    Raises InputError naming the settings that differ and may not, and where the run would overwrite another one.
    """
    defaults = {name: getattr(TrainSettings, name) for name in ARCHITECTURE} | origin.defaults  # older ones lack some
    both = {name: (getattr(settings, name), then) for name, then in defaults.items()}
    changed = {name: f"--{name} {now} (was {then})" for name, (now, then) in both.items() if now != then}

    def described(names: Iterable[str]) -> str:
        return ", ".join(change for name, change in changed.items() if name in names)

    if refused := described(ARCHITECTURE):
        raise InputError(f"{origin.path}: its weights were made with other settings: {refused}")
    if "tokenizer" in origin.content and (elsewhere := described(LANGUAGE_MODEL)):
        origin.notes.append(f"{elsewhere}: not read, {origin.path} holds language model and vocabulary")
    if recipe := described(RECIPE):
        advice = "leave them as they were, or say --allow_changes to continue with the new ones"
        refusal, reorders = f"these settings differ: {recipe}; {advice}", any(name in ORDER for name in changed)
        origin.accept(f"settings: {recipe}", settings.allow_changes, refusal, reorders)
    _choose_folder(settings, origin)


def refuse_changed_data(origin: Origin, data: dict, allowed: bool) -> None:
    """Compare the splits' fingerprints with the checkpoint's. Raises InputError where they differ, unless allowed."""
    then = origin.content.get("data") or {}
    changed = [name for name in data if name in then and then[name]["fingerprint"] != data[name]["fingerprint"]]
    if where := ", ".join(f"{name} in {data[name]['folder']}" for name in changed):
        advice = "name the old data with --data_path and --data_name, or say --allow_changes to continue with the new"
        origin.accept(f"data: {where}", allowed, f"was trained on other data than {where}; {advice}", reorders=True)


def _choose_folder(settings: TrainSettings, origin: Origin) -> None:
    """A run folder holds one line of checkpoints: no run starts over another one or over its own later steps."""
    folder, lies_in = Path(settings.model_name), origin.defaults.get("model_name", "")
    origin.in_place = bool(lies_in) and Path(lies_in).resolve() == folder.resolve()
    if not origin.in_place:
        refuse_used(folder, origin.progress, None, ())
        origin.progress.forget_best()
        if settings.logger_name == origin.defaults.get("logger_name"):  # else it would purge the other run's curves
            settings.logger_name = settings.model_name
        if origin.exact:
            origin.notes.append(f"branches off {lies_in} into {folder}; the best epoch is counted from here on")
        return
    refuse_used(folder, origin.progress, origin.path, origin.damaged)


def restore(origin: Origin, optimizer: torch.optim.AdamW, device: torch.device) -> None:
    """Bring optimiser and random numbers to where an exact checkpoint left them, and let go of its gigabytes.

    Raises InputError where they do not fit.
    """
    content, origin.content = origin.content, {}
    if not origin.exact:
        return
    try:
        restore_optimizer(optimizer, content["optimizer"])
        states = [content["random_state"], *content["random_state"].get("others", [])]
        then, now = len(states), distributed.world_size()
        if then == now or distributed.is_first():
            restore_random_state(states[distributed.rank()], device)
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise InputError(f"{origin.path}: its optimiser or random state does not fit ({reason(error)})") from None
    if then != now:
        origin.notes.append(
            f"number of processes: {then} before, {now} now, so dropout draws other random numbers; batches, their "
            "order and augmentation stay the same"
        )


def all_random_states(device: torch.device) -> dict:
    """The first process's state of all generators; `others` lists those of the other processes."""
    first, *others = collectives.all_gather(random_state(device))
    return {**first, "others": others} if others else first


def seed_process(seed: int, step: int) -> None:
    """Give each process but the first random numbers of its own; the first continues those of a single process.

    Only dropout draws from them: weights are made before, order and augmentation depend on (seed, epoch, batch).
    """
    if not distributed.is_first():
        sequence = np.random.SeedSequence([seed, step, distributed.rank()])
        seed_everything(int(sequence.generate_state(1, np.uint64)[0]) >> 1)


def refuse_disagreement(settings: TrainSettings, progress: Progress) -> None:
    """Raises InputError where the processes were started with different flags, or found different checkpoints."""
    own = {f"--{name}": value for name, value in asdict(settings).items() if name not in OF_A_NODE}
    collectives.refuse_disagreement({**own, "step of the checkpoint": progress.step})
