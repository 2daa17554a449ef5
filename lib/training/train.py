"""The training run, from top to bottom in the order things happen."""

import dataclasses
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from lib import distributed
from lib.checkpoints.native import BEST, LAST, build_model, new_model
from lib.checkpoints.record import RECORD, write_record
from lib.cli import InputError, Interrupted, TrainingStopped, reason, with_bar
from lib.collectives import divide
from lib.config import TrainSettings
from lib.data.batches import Batch, EpochBatches, loader, on_device
from lib.data.dataset import Split, open_split
from lib.data.features import DeviceFeatures, FeatureFile
from lib.data.tokenizer import TokenizedCaptions, Tokenizer
from lib.evaluation import report
from lib.evaluation.evaluate import measure_split
from lib.losses import Loss, loss_of_epoch
from lib.model.registry import parse_part
from lib.model.xdim import XDim
from lib.runtime import Compute, choose_compute, seed_everything
from lib.training.collapse import CollapseWatch
from lib.training.figures import LateFigures
from lib.training.folder import RunFolder, command_to_go_on
from lib.training.interruption import EndNow, Interruption
from lib.training.job import all_random_states, refuse_disagreement, restore_own_random_state, seed_process
from lib.training.log import RunLog, Silence
from lib.training.optimizer import build_optimizer, learning_rate_of, restore_optimizer, set_learning_rate
from lib.training.origin import Origin, refuse_changed_data, refuse_used_folder
from lib.training.progress import Progress
from lib.training.record import begin_record, describe_data, record_now
from lib.training.step import BatchLoss, backward, share_loss


@dataclass
class Run:
    """Everything a run needs at hand."""

    settings: TrainSettings
    compute: Compute
    model: XDim
    loss: nn.Module  # BatchLoss of the model, shared by the job's processes
    tokenizer: Tokenizer
    optimizer: torch.optim.Optimizer
    train: Split
    train_captions: TokenizedCaptions
    dev: Split
    dev_captions: TokenizedCaptions
    resident: DeviceFeatures | None  # train's, where they are kept on the device
    record: dict  # of run.json, what does not change while this process trains
    progress: Progress = field(default_factory=Progress)
    interruption: Interruption = field(default_factory=Interruption)


def train(settings: TrainSettings, origin: Origin | None = None) -> None:
    """Train X-Dim, evaluate on dev after each epoch, keep checkpoints from which the run can go on.

    origin: the checkpoint that the run starts from. Raises InputError for wrong settings or files, TrainingStopped
    when the loss is no longer a number or nothing can be saved, Interrupted when a signal has ended the run.
    """
    compute = choose_compute(settings.device, settings.precision)
    with distributed.joined(compute.device):
        run = start(settings, compute, origin)
        with output(run) as (folder, log), run.interruption:
            introduce(run, folder, origin, log)
            for epoch in range(run.progress.epoch, settings.num_epochs):
                train_epoch(run, epoch, folder, log)
                validate(run, folder, log)
                save(run, folder, log)
                end_if_asked(run)
            if run.progress.best_epoch:
                best = f"{run.progress.best_rsum:.1f} after epoch {run.progress.best_epoch}"
                log.say(f"best dev rSum {best}: {Path(settings.model_name) / BEST}")


def start(settings: TrainSettings, compute: Compute, origin: Origin | None) -> Run:
    """Open the data and build the model and optimiser, new or as a checkpoint left them."""
    refuse_disagreement(settings, origin.progress if origin else Progress())
    if settings.batch_size < distributed.world_size():
        raise InputError(
            f"--batch_size {settings.batch_size}: fewer pairs than the {distributed.world_size()} processes"
        )
    loss_of(0, settings)  # refuses wrong options
    if origin is None:
        refuse_used_folder(Path(settings.model_name))
    train_split = open_split(settings.data_path, settings.data_name, "train", settings.img_dim)
    dev_split = open_split(settings.data_path, settings.data_name, "dev", settings.img_dim)
    if settings.batch_size > len(train_split.captions):
        raise InputError(
            f"--batch_size {settings.batch_size}: larger than the {len(train_split.captions)} pairs of train"
        )
    data = {split.name: describe_data(split) for split in (train_split, dev_split)}
    if origin is not None:
        refuse_changed_data(origin, data, settings.allow_changes)

    seed_everything(settings.seed)
    with distributed.local_main_first():  # the others find what it has fetched and tokenised
        model, tokenizer = new_parts(settings) if origin is None else build_model(origin.content, settings.bert)
        captions = [tokenizer.tokenize(split.captions) for split in (train_split, dev_split)]
    seed_process(settings.seed, origin.progress.step if origin else 0)
    model.use_engine(settings.engine)
    model.image_encoder.mask_padding |= train_split.features.varies
    model.text_encoder.micro_batch = settings.micro_batch
    model.to(compute.device)
    loss = share_loss(BatchLoss(model, settings.margin))
    optimizer = build_optimizer(model, settings.learning_rate)
    record = begin_record(dataclasses.asdict(settings), data, str(compute), origin)
    resident = DeviceFeatures(train_split.features, compute.device) if settings.device_features else None
    splits = (train_split, captions[0], dev_split, captions[1])
    run = Run(settings, compute, model, loss, tokenizer, optimizer, *splits, resident, record)
    if origin is not None:
        continue_from(run, origin)
        origin.content = {}  # gigabytes at full size, which model and optimiser hold now
    return run


def new_parts(settings: TrainSettings) -> tuple[XDim, Tokenizer]:
    """A model around a pretrained language model, and its tokenizer."""
    model, tokenizer, note = new_model(dataclasses.asdict(settings))
    print(note)
    return model, tokenizer


def continue_from(run: Run, origin: Origin) -> None:
    """Bring progress, and where the checkpoint holds them optimiser and random state, to where they were left."""
    run.progress = origin.progress
    if not origin.exact:
        return
    try:
        restore_optimizer(run.optimizer, origin.content["optimizer"])
        origin.notes += restore_own_random_state(origin.content["random_state"], run.compute.device)
    except (ValueError, KeyError, TypeError, RuntimeError, IndexError) as error:
        raise InputError(f"{origin.path}: its optimiser or random state does not fit ({reason(error)})") from None


@contextmanager
def output(run: Run) -> Iterator[tuple[RunFolder | None, RunLog | Silence]]:
    """Run folder and log. Of the job's processes only the first one has them."""
    if not distributed.is_first():
        yield None, Silence()
        return
    path, settings = Path(run.settings.model_name), run.settings
    with RunFolder(path, settings.keep) as folder, RunLog(path, Path(settings.logger_name), run.progress.step) as log:
        yield folder, log


def introduce(run: Run, folder: RunFolder | None, origin: Origin | None, log: RunLog) -> None:
    """Say what is trained on what, from where, and where it is written; begin the record."""
    settings = run.settings
    counts = run.model.parameter_counts()
    steps = len(run.train.captions) // settings.batch_size
    parts = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    log.say(
        f"data        {run.train.folder}: train {len(run.train.features)} images, {len(run.train.captions)} captions; "
        f"dev {len(run.dev.features)} images, {len(run.dev.captions)} captions\n"
        f"{_describe_regions(run.train.features)}"
        f"parameters  {sum(counts.values()):,}: {parts}\n"
        f"steps       {settings.num_epochs} epochs of {steps}, batches of {settings.batch_size} pairs\n"
        f"device      {run.compute}\n"
        f"written to  {settings.model_name} ({LAST}, {BEST}, {RECORD}, run.log), TensorBoard: {settings.logger_name}\n"
        f"settings    {' '.join(f'{name}={value}' for name, value in dataclasses.asdict(settings).items())}"
    )
    for note in origin.notes if origin else ():
        log.say(note)
    if origin and origin.exact:
        progress = run.progress
        done = f"{progress.step} steps done, {progress.batch} of them in epoch {progress.epoch + 1}"
        log.say(f"goes on from {origin.path}: {done}")
    if run.progress.epoch >= settings.num_epochs:
        log.say(f"all {settings.num_epochs} epochs are done; a larger --num_epochs goes on")
    if not folder:
        return
    if origin and origin.in_place:
        folder.set_aside(origin.damaged)
        folder.settle(origin.path, run.progress)
    folder.check_best(run.progress, log.say)
    write_record(folder.path, record_now(run.record, run.progress))


def _describe_regions(features: FeatureFile) -> str:
    """A line on what differs from the recipe where images have different numbers of regions."""
    if not features.varies:
        return ""
    return (
        f"regions     {features.counts.min()} to {features.regions} of an image; padding is masked (--mask_padding)\n"
    )


def train_epoch(run: Run, epoch: int, folder: RunFolder | None, log: RunLog) -> None:
    """One pass over all pairs, or over those that are left of it."""
    settings, model, progress = run.settings, run.model, run.progress
    rate = learning_rate_of(epoch, settings.learning_rate, settings.lr_update)
    set_learning_rate(run.optimizer, rate)
    loss_function = loss_of(epoch, settings)
    watch = CollapseWatch(settings.margin, settings.loss)
    data = (run.train, run.train_captions, run.tokenizer)
    form = {"half": run.compute.half_features, "indexed": run.resident is not None}
    part = divide(settings.batch_size, distributed.world_size())[distributed.rank()]
    batches = EpochBatches(*data, settings.batch_size, settings.seed, epoch, part=part, **form)
    left = loader(Subset(batches, range(progress.batch, len(batches))), settings.workers, run.compute.device)
    model.train()
    figures = LateFigures(partial(check_figures, run, watch, log))
    since, pairs = time.perf_counter(), 0
    bar = with_bar(left, f"epoch {epoch + 1}", len(left))
    for batch in on_device(bar, run.compute.device, run.resident):
        enqueued = train_step(run, batch, loss_function)
        progress.step += 1
        progress.batch += 1
        pairs += settings.batch_size
        figures.add(progress.step, enqueued)
        if progress.step % settings.log_step == 0:
            loss, gradient_norm, spread = figures.settle()
            speed = pairs / (time.perf_counter() - since)
            since, pairs = time.perf_counter(), 0
            log.say(
                f"epoch {epoch + 1} step {progress.step} loss {loss:.4f} gradient {gradient_norm:.2f} "
                f"rate {rate:.1e} {speed:.0f} pairs/s"
            )
            log_step(run, log, loss, gradient_norm, spread, speed)
        if run.interruption.agree() or (settings.save_steps and progress.step % settings.save_steps == 0):
            figures.settle()
            save(run, folder, log)
            end_if_asked(run)
    figures.settle()


def loss_of(epoch: int, settings: TrainSettings) -> Loss:
    """An epoch's loss."""
    warmup = 0 if settings.max_violation else settings.vse_mean_warmup_epochs
    try:
        return loss_of_epoch(parse_part("loss", settings.loss), epoch, warmup)
    except ValueError as error:
        raise InputError(str(error)) from None


def train_step(run: Run, batch: Batch, loss_function: Loss) -> Tensor:
    """One optimisation step on a batch that is on the device, which may still be at it when this returns.

    Returns (3,) on the device: the loss, the gradient's global norm before clipping, and the scores' standard deviation
    (see batch_loss).
    """
    distributed.heartbeat()
    with run.compute.autocast():
        images = batch.images.to(torch.get_default_dtype())
        loss, spread = run.loss(images, batch.counts, batch.ids, batch.lengths, loss_function)
    run.optimizer.zero_grad(set_to_none=True)
    backward(loss)
    norm = nn.utils.clip_grad_norm_(run.model.parameters(), run.settings.grad_clip or math.inf)
    run.optimizer.step()  # even where they are no numbers: nothing is saved before the step's figures are checked
    return torch.stack([loss.detach(), norm, spread])


def check_figures(
    run: Run, watch: CollapseWatch, log: RunLog, step: int, loss: float, gradient_norm: float, spread: float
) -> None:
    """Stop where a step's figures are no numbers; warn of a collapse."""
    if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
        raise TrainingStopped(
            f"step {step}: the loss is {loss}, its gradient's norm {gradient_norm}; the last checkpoint stays in "
            f"{run.settings.model_name}; start again with a lower --learning_rate or in fp32"
        )
    if warning := watch.warning(spread):
        log.say(warning)


def log_step(run: Run, log: RunLog, loss: float, gradient_norm: float, spread: float, speed: float) -> None:
    """Figures of a step for TensorBoard."""
    rate, bert_rate = (group["lr"] for group in run.optimizer.param_groups)
    log.figures(
        run.progress.step,
        train_loss=loss,
        train_gradient_norm=gradient_norm,
        train_pairs_per_second=speed,
        **({} if math.isnan(spread) else {"train_spread": spread}),
        rate_learning=rate,
        rate_bert=bert_rate,
        **{f"gate_{name}": value for name, value in run.model.similarity.figures().items()},
    )


def validate(run: Run, folder: RunFolder | None, log: RunLog) -> None:
    """Recall on the whole of dev; says whether it is the best so far. Ends the epoch."""
    progress, settings = run.progress, run.settings
    try:
        with run.interruption.at_once():
            dev = (run.dev, run.dev_captions, settings.batch_size, settings.workers)
            metrics = measure_split(run.model, run.tokenizer, run.compute, *dev)
    except EndNow:  # dev is evaluated by the resumed run
        save(run, folder, log)
        end_if_asked(run)
    figures = {name: metrics[name] for name in ("rsum", "i2t", "t2i")}
    progress.end_epoch(figures)
    best = " (best)" if progress.is_best else ""
    log.say(f"epoch {progress.epoch} dev: {report.line(metrics)}{best}")
    recalls = {f"dev_{way}_{name}": metrics[way][name] for way in ("i2t", "t2i") for name in ("r1", "r5", "r10")}
    log.figures(progress.step, dev_rsum=metrics["rsum"], **recalls)


def save(run: Run, folder: RunFolder | None, log: RunLog) -> None:
    """Write a checkpoint that is complete, and the record."""
    random_states = all_random_states(run.compute.device)
    if not folder:
        return
    settings, progress = dataclasses.asdict(run.settings), run.progress
    content = {
        "model": run.model.state_dict(),
        "architecture": run.model.architecture,
        "tokenizer": run.tokenizer.specification,
        "settings": settings,
        "progress": dataclasses.asdict(progress),
        "optimizer": run.optimizer.state_dict(),
        "random_state": random_states,
        "versions": run.record["sessions"][-1]["versions"],
        "data": run.record["data"],
    }
    folder.save(content, progress.is_best, record_now(run.record, run.progress), log.say)


def end_if_asked(run: Run) -> None:
    """Raises Interrupted, after a save, where a signal has come."""
    if signal := run.interruption.agree():
        goes_on = command_to_go_on(Path(run.settings.model_name))
        raise Interrupted(f"{signal.name}: saved after step {run.progress.step}; go on with: {goes_on}", signal)
