"""Training: an epoch, a step, dev and a save in the order things happen; what comes before the first step is below."""

import math
import signal
import sys
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Subset

from lib import collectives, distributed
from lib.checkpoints.native import BEST, LAST, build_model, new_model
from lib.checkpoints.record import RECORD, begin_record, describe_data
from lib.cli import InputError, Interrupted, refusing, with_bar
from lib.config import TrainSettings
from lib.data.batches import Batch, EpochBatches, loader, on_device, share_beside_own_image
from lib.data.dataset import Split, open_split
from lib.data.features import DeviceFeatures
from lib.data.images import open_pictures
from lib.data.tokenizer import TokenizedCaptions, Tokenizer
from lib.evaluation import report
from lib.evaluation.attention import Pair, attention, draw_words, find_pairs
from lib.evaluation.evaluate import measure_split
from lib.evaluation.metrics import chance_metrics
from lib.evaluation.score import Matcher, look_of
from lib.losses import Loss, loss_of_epoch, rank_distillation
from lib.model.engine import Embedded
from lib.model.layers import Shard, upload
from lib.model.registry import find, is_from_pixels, parse_part
from lib.model.xdim import XDim
from lib.runtime import Compute, choose_compute, seed_everything
from lib.training import resume
from lib.training.log import RunLog, StepFigures, draw_matrix
from lib.training.optim import ENCODER_FACTORS, build_optimizer, set_learning_rate, thawed_stages
from lib.training.resume import Origin
from lib.training.run_folder import Progress, RunFolder, command_to_resume, refuse_used
from lib.training.signals import EndNow, Signals

PAIRS = 4  # of dev, whose attention TensorBoard shows


@dataclass
class Run:
    """The state of a training. Only the job's first process writes: on the others `folder` and `log` write nothing."""

    settings: TrainSettings
    compute: Compute
    model: XDim
    tokenizer: Tokenizer
    batch_loss: nn.Module  # BatchLoss of the model, whose gradients are averaged over the job's processes
    optimizer: torch.optim.Optimizer
    train: tuple[Split, TokenizedCaptions]
    dev: tuple[Split, TokenizedCaptions]
    resident: DeviceFeatures | None  # train's features, where they are kept on the device
    record: dict  # run.json, but for what changes in training
    progress: Progress
    folder: RunFolder
    log: RunLog
    figures: StepFigures
    signals: Signals
    pairs: list[Pair] | None = None  # of dev, whose attention TensorBoard shows; None before the first epoch's end


def train(settings: TrainSettings, origin: Origin | None = None) -> None:
    """Train, evaluate on dev after each epoch, keep checkpoints from which the run can be resumed to the bit.

    origin: the checkpoint to start from. Raises InputError for wrong settings or files, TrainingStopped where the loss
    is not finite or nothing can be saved, Interrupted where a signal has ended the run.
    """
    compute = choose_compute(settings.device, settings.precision)
    with compute.in_force(), distributed.joined(compute.device):
        run = prepare(settings, compute, origin)
        with run.folder, run.log, run.signals:
            introduce(run, origin)
            while run.progress.epoch < settings.num_epochs:
                train_epoch(run)
                evaluate_on_dev(run)
                save(run)
            if run.progress.best_epoch:
                best = f"{run.progress.best_rsum:.1f} after epoch {run.progress.best_epoch}"
                run.log.say(f"best dev rSum {best}: {run.folder.path / BEST}")


def train_epoch(run: Run) -> None:
    """One pass over all pairs, or over those that are left of the current epoch."""
    settings, progress, vision = run.settings, run.progress, run.model.vision
    rates = partial(set_learning_rate, run.optimizer, progress.epoch, settings.learning_rate, settings.lr_update)
    rate, loss_function = rates(), loss_of(settings, progress.epoch)
    steps = len(run.train[1]) // settings.batch_size
    if vision:
        run.model.image_encoder.thaw(thawed_stages(progress.epoch, settings.freeze_epochs, settings.thaw_epochs))
        run.batch_loss = average_gradients(getattr(run.batch_loss, "module", run.batch_loss))
    warmth, warms_up = 1.0, vision and 0 < settings.freeze_epochs == progress.epoch
    run.model.train()
    run.figures.begin_epoch()
    for batch in batches_left(run):
        if warms_up:
            warmth = (progress.batch + 1) / steps
            rates(warmth)
        figures = train_step(run, batch, loss_function, warmth)
        progress.step += 1
        progress.batch += 1
        overdue = run.figures.add(progress.step, figures)
        if progress.step % settings.log_step == 0 or progress.batch == steps or overdue:
            say_progress(run, rate, (settings.num_epochs - progress.epoch) * steps - progress.batch)
        if run.signals.agree() or (settings.save_steps and progress.step % settings.save_steps == 0):
            save(run)


def say_progress(run: Run, rate: float, steps_left: int) -> None:
    """A line of the log, and TensorBoard's scalars, on the steps since the last one."""
    progress, rates = run.progress, [group["lr"] for group in run.optimizer.param_groups]
    loss, gradient_norm, spread, speed = run.figures.mean()
    pairs = run.settings.batch_size * speed
    line = f"epoch {progress.epoch + 1} step {progress.step} loss {loss:.4f} gradient {gradient_norm:.2f}"
    line += f" rate {rate:.1e}"
    if not math.isnan(speed):
        line += f" {pairs:.1f} pairs/s, {timedelta(seconds=round(steps_left / speed))} left"
    run.log.say(line)
    scalars = {"loss": loss, "gradient_norm": gradient_norm, "spread": spread, "pairs_per_second": pairs}
    run.log.scalars(progress.step, "train", scalars)
    names = ("learning", "bert", "vision")[: len(rates)]
    run.log.scalars(progress.step, "rate", dict(zip(names, rates, strict=True)))
    run.log.scalars(progress.step, "gate", run.model.figures())


def loss_of(settings: TrainSettings, epoch: int) -> Loss:
    """The loss function of an epoch. Raises InputError for options that it does not take."""
    part, warmup_epochs = parse_part("loss", settings.loss), settings.vse_mean_warmup_epochs
    try:
        if settings.max_violation and not hasattr(find("loss", part["name"]), "warmup"):
            raise ValueError(f"--max_violation: --loss {part['name']} has no warm-up to leave out")
        loss = loss_of_epoch(part, epoch, 0 if settings.max_violation else warmup_epochs)
        loss(torch.zeros(2, 2), settings.margin)
    except (TypeError, ValueError) as error:
        raise InputError(f"{error}" if str(error).startswith("--") else f"--loss {settings.loss}: {error}") from None
    return loss


def batches_left(run: Run) -> Iterator[Batch]:
    """This process's part of each batch that is left of the epoch, on the device but for counts and lengths."""
    settings, progress, size = run.settings, run.progress, run.settings.batch_size
    own, half, indexed = collectives.shard(size).own, run.compute.half_features, run.resident is not None
    look = look_of(run.model)
    batches = EpochBatches(*run.train, run.tokenizer, size, settings.seed, progress.epoch, own, half, indexed, look)
    left = loader(Subset(batches, range(progress.batch, len(batches))), settings.workers, run.compute.device)
    shown = with_bar(left, f"epoch {progress.epoch + 1}") if sys.stderr.isatty() else left  # else lines say as much
    try:
        for batch in on_device(shown, run.compute.device, run.resident):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would raise in the middle of a step
            yield batch
    except RuntimeError as error:
        if "DataLoader worker" in str(error) and distributed.world_size() == 1:  # it was killed, between two steps
            save(run)
        raise


def train_step(run: Run, batch: Batch, loss_function: Loss, warmth: float = 1.0) -> Tensor:
    """Forward, loss, backward, clip, step. The device may still be computing when this returns.

    warmth: what the loss is scaled by, 0 to 1 over the first epoch in which a vision model trains. Returns (3,) on the
    device: loss, global gradient norm before clipping, standard deviation of the scores or NaN.
    """
    distributed.heartbeat()
    run.optimizer.zero_grad(set_to_none=True)  # before the forward pass, whose activations take their memory
    with run.compute.autocast():
        loss, spread = run.batch_loss(batch, loss_function)
    scale = warmth * distributed.world_size()  # the gradients of the processes add up, but DDP averages them
    (loss * scale).backward()
    norm = nn.utils.clip_grad_norm_(run.model.parameters(), run.settings.grad_clip or math.inf)
    run.optimizer.step()  # also where the loss is NaN: that is found before the next checkpoint is written
    return torch.stack([loss.detach(), norm, spread])


class BatchLoss(nn.Module):
    """The loss of a whole batch: each process embeds its own pairs and scores its own images against all captions."""

    def __init__(self, model: XDim, margin: float, same_image_negatives: bool = True):
        super().__init__()
        self.model, self.margin, self.same_image_negatives = model, margin, same_image_negatives

    def forward(self, batch: Batch, loss_function: Loss) -> tuple[Tensor, Tensor]:
        """The loss and the standard deviation of the scores, see batch_loss; the same on all processes."""
        shard = collectives.shard(len(batch.lengths))
        embedded = self.model.embed(batch.images, batch.counts, batch.ids, batch.lengths, shard)
        image_of = None if self.same_image_negatives else upload(batch.image_of, embedded.regions.device)
        return batch_loss(self.model.engine, embedded, loss_function, self.margin, shard, image_of)


def batch_loss(
    engine: Any,
    embedded: Embedded,
    loss_function: Loss,
    margin: float,
    shard: Shard | None = None,
    image_of: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The loss of a batch, computed with the least scoring and differentiating; the scores' standard deviation.

    The latter is NaN for a pairwise loss (lib/losses.py), for which the scores are never held all at once. With a
    global head it is the loss of the combined scores, and that of the cosines (pooling.GpoHead). engine: as
    lib/model/engine describes it. image_of: (B,) numbers, equal where pairs have the same image: its other captions are
    then no negatives of it, nor it of them.
    """
    shard = shard or Shard(len(embedded.lengths))
    head, pairwise = engine.head, getattr(loss_function, "pairwise", None)
    if pairwise and not head:
        loss = engine.sum_over_negatives(partial(pairwise, margin=margin), embedded, shard, image_of)
        return loss, torch.full_like(loss, math.nan)
    own = engine.both(*embedded) if head else (engine(*embedded),)
    scores = [shard.gather_outputs(one, shard.sizes) for one in own]
    spread = scores[0].detach().std()
    if image_of is not None:
        beside = (image_of[:, None] == image_of).fill_diagonal_(False)
        scores = [one.masked_fill(beside, -math.inf) for one in scores]
    loss = loss_function(scores[0], margin)
    if head:
        loss = loss + head.loss * loss_function(scores[1], margin)
        loss = loss + head.distill * rank_distillation(scores[1], scores[0].detach(), head.temperature)
    return loss, spread


def average_gradients(batch_loss: nn.Module) -> nn.Module:
    """A batch_loss whose backward pass averages the gradients of what trains now over the job's processes.

    DistributedDataParallel rebuilds its buckets after the first step, which changes the order of additions; a resumed
    run would differ in the last bits. With find_unused_parameters (there are none) it keeps the first buckets.
    """
    if distributed.world_size() == 1:
        return batch_loss
    return DistributedDataParallel(batch_loss, find_unused_parameters=True, gradient_as_bucket_view=True)


def save(run: Run) -> None:
    """Write a checkpoint that holds the whole state of training; then end with Interrupted where a signal has come."""
    run.figures.read()  # raises TrainingStopped where the loss is NaN
    random_state = resume.all_random_states(run.compute.device)  # asks all processes
    run.folder.save({**state_of(run), "random_state": random_state}, run.progress)
    if received := run.signals.agree():
        command = command_to_resume(run.folder.path)
        raise Interrupted(f"{received.name}: saved after step {run.progress.step}; continue with: {command}", received)


def state_of(run: Run) -> dict:
    """What a checkpoint holds, but for the random state."""
    return {
        "model": run.model.state_dict(),
        "architecture": run.model.architecture,
        "tokenizer": run.tokenizer.specification,
        "settings": asdict(run.settings),
        "progress": asdict(run.progress),
        "optimizer": run.optimizer.state_dict(),
        "versions": run.record["sessions"][-1]["versions"],
        "data": run.record["data"],
    }


def evaluate_on_dev(run: Run) -> None:
    """Recall on the whole of dev ends the epoch; the best rSum so far selects the model."""
    progress, settings = run.progress, run.settings
    run.figures.read()
    try:
        with run.signals.at_once():
            matcher = Matcher(run.model, run.tokenizer, run.compute)
            metrics = measure_split(matcher, *run.dev, settings.batch_size, settings.workers)
    except EndNow:
        save(run)  # raises Interrupted; the resumed run evaluates
    progress.end_epoch({name: metrics[name] for name in ("rsum", "i2t", "t2i")})
    best = " (best)" if progress.is_best else ""
    chance = chance_metrics(run.dev[0].image_of_caption)["rsum"]
    run.log.say(f"epoch {progress.epoch} dev: {report.line(metrics)}{best}; chance {chance:.1f}")
    recalls = {f"{way}_{name}": metrics[way][name] for way in ("i2t", "t2i") for name in ("r1", "r5", "r10")}
    run.log.scalars(progress.step, "dev", {"rsum": metrics["rsum"], **recalls})
    if distributed.is_first():
        run.log.attempt("TensorBoard's pictures", draw_epoch, run, matcher)


@torch.no_grad()
def draw_epoch(run: Run, matcher: Matcher) -> None:
    """TensorBoard's pictures: the dependency matrix, the gate's mask, and what words of some pairs of dev look at."""
    similarity, step = run.model.similarity, run.progress.step
    D = similarity.dependency() if hasattr(similarity, "dependency") else None
    if D is not None:
        run.log.matrix(step, "gate/dependency", draw_matrix(D))
    if D is not None and hasattr(similarity.gate, "mask"):
        run.log.matrix(step, "gate/mask", draw_matrix(similarity.gate.mask()[0], white=1.0))
    if run.pairs is None:
        run.pairs = dev_pairs(run, matcher)
    for number, pair in enumerate(run.pairs, start=1):
        found = attention(matcher, pair.image, pair.caption)
        run.log.photograph(step, f"attention/{number}", draw_words(pair, found))


def dev_pairs(run: Run, matcher: Matcher) -> list[Pair]:
    """PAIRS images of dev, evenly spaced; none where pictures, boxes of regions or attention are missing."""
    dev = run.dev[0]
    places = np.linspace(0, len(dev.features) - 1, min(PAIRS, len(dev.features))).astype(int).tolist()
    if hasattr(run.model.similarity, "explain"):
        with suppress(InputError):
            return find_pairs(matcher, dev, places, run.settings.image_path)
    return []


# Before the first step


def prepare(settings: TrainSettings, compute: Compute, origin: Origin | None) -> Run:
    """Open the data and build model and optimiser, fresh or as a checkpoint left them."""
    progress, processes = origin.progress if origin else Progress(), distributed.world_size()
    resume.refuse_disagreement(settings, progress)
    loss_of(settings, progress.epoch)  # refuses wrong options before anything is read
    path, start = Path(settings.model_name), origin.path if origin else None
    log = RunLog(path, Path(settings.logger_name), progress.step, settings)
    if origin is None:
        refuse_used(path, progress, None, ())
    train_split, dev_split = open_train_and_dev(settings)
    data = {split.name: describe_data(split) for split in (train_split, dev_split)}
    collectives.refuse_disagreement({f"the data of {name}": one["fingerprint"] for name, one in data.items()})
    pairs = len(train_split.captions)
    if not processes <= settings.batch_size <= pairs:
        limit = f"fewer pairs than the {processes} processes"
        if settings.batch_size > pairs:
            fits = max(2, processes, 2 ** int(math.log2(pairs) - 3))  # about ten steps an epoch
            limit = f"larger than the {pairs} pairs of train; --batch_size {fits} fits"
        raise InputError(f"--batch_size {settings.batch_size}: {limit}")
    if origin:
        resume.refuse_changed_data(origin, data, settings.allow_changes)
    settings.mask_padding |= train_split.features.varies

    seed_everything(settings.seed)
    with distributed.local_main_first():  # the others find what the first one has fetched
        if origin:
            model, tokenizer = build_model(origin.content, settings.bert)
        else:
            model, tokenizer, note = new_model(asdict(settings))
            print(note)
    collectives.refuse_disagreement({"the vocabulary of --bert": zlib.crc32(tokenizer.specification.encode())})
    model.image_encoder.mask_padding = settings.mask_padding
    if "mask_padding" in (options := model.architecture["image_encoder"]["options"]):
        options["mask_padding"] = settings.mask_padding
    for encoder in (model.image_encoder, model.text_encoder):
        encoder.micro_batch = settings.micro_batch
    if settings.gradient_checkpointing:
        with refusing("--gradient_checkpointing"):
            model.checkpoint_activations()
    model.use_engine(settings.engine or "tiled")
    model.to(compute.device)
    settings.encoder_lr = settings.encoder_lr or ENCODER_FACTORS.get(options.get("model", "").partition(":")[0], 0.0)
    optimizer = build_optimizer(model, settings.learning_rate, settings.encoder_lr)
    resume.seed_process(settings.seed, progress.step)
    if origin:
        resume.restore(origin, optimizer, compute.device)

    record = begin_record(asdict(settings), data, str(compute), start, progress.step)
    return Run(
        settings,
        compute,
        model,
        tokenizer,
        average_gradients(BatchLoss(model, settings.margin, not settings.no_same_image_negatives)),
        optimizer,
        (train_split, tokenizer.tokenize_split("train", train_split.captions)),
        (dev_split, tokenizer.tokenize_split("dev", dev_split.captions)),
        DeviceFeatures(train_split.features, compute.device) if settings.device_features else None,
        record,
        progress,
        RunFolder(path, settings.keep, log.say, record),
        log,
        StepFigures(settings.margin, log, progress, settings.model_name),
        Signals(progress),
    )


def open_train_and_dev(settings: TrainSettings) -> tuple[Split, Split]:
    """Both splits: of pictures where the model starts from pixels, else of features, whose size the settings get."""
    folder = (settings.data_path, settings.data_name)
    if is_from_pixels(parse_part("image_encoder", settings.image_encoder)):
        if settings.device_features:
            raise InputError("--device_features: a model from pixels has no features, leave it out")
        if settings.img_dim:
            raise InputError(f"--img_dim {settings.img_dim}: the vision model says it, leave it out")
        return open_pictures(*folder, "train", settings.image_path), open_pictures(*folder, "dev", settings.image_path)
    train_split = open_split(*folder, "train", settings.img_dim or None)
    settings.img_dim = train_split.features.img_dim
    return train_split, open_split(*folder, "dev", settings.img_dim)


def introduce(run: Run, origin: Origin | None) -> None:
    """Say what is trained on what, from where, and where it is written; begin the record."""
    settings, progress, (train_split, _), (dev_split, _) = run.settings, run.progress, run.train, run.dev
    counts, features = run.model.parameter_counts(), train_split.features
    chosen = [f"{name}={value}" for name, value in asdict(settings).items() if value != getattr(TrainSettings, name)]
    lines = [
        f"data        {train_split.folder}: train {len(features)} images, {len(train_split.captions)} captions; "
        f"dev {len(dev_split.features)} images, {len(dev_split.captions)} captions",
        f"parameters  {sum(counts.values()):,}: {', '.join(f'{name} {count:,}' for name, count in counts.items())}",
        f"steps       {settings.num_epochs} epochs of {len(train_split.captions) // settings.batch_size}, "
        f"batches of {settings.batch_size} pairs",
        f"device      {run.compute}",
        f"written to  {settings.model_name} ({LAST}, {BEST}, {RECORD}, run.log), TensorBoard: {settings.logger_name}",
        fill(f"settings    {' '.join(chosen)}", 120, subsequent_indent=" " * 12, break_long_words=False),
    ]
    if features.varies:
        regions = f"{features.counts.min()} to {features.regions} of an image"
        lines.insert(1, f"regions     {regions}; padding is masked (--mask_padding)")
    if look := look_of(run.model):
        pixels = f"{look.cells} cells of pictures of {look.preprocessing.size[0]} x {look.preprocessing.size[1]} pixels"
        thaws = f"a stage every {settings.thaw_epochs}" if settings.thaw_epochs else "all of it"
        when = f"frozen for {settings.freeze_epochs} epochs, then {thaws} trains at {settings.encoder_lr:g} of the rate"
        lines.insert(1, f"vision      {run.model.vision.name}: {pixels}; {when}")
    beside = share_beside_own_image(train_split.image_of_caption, settings.batch_size)
    if beside > 0.01:
        share = f"{100 * beside:.0f} % of a batch's pairs have another caption of their image in the batch, which is "
        treated = "left out" if settings.no_same_image_negatives else "a negative; --no_same_image_negatives drops it"
        lines.append(f"negatives   {share}{treated}")
    lines += origin.notes if origin else []
    if origin and origin.exact:
        done = f"{progress.step} steps done, {progress.batch} of them in epoch {progress.epoch + 1}"
        lines.append(f"continues {origin.path}: {done}")
    if progress.epoch >= settings.num_epochs:
        lines.append(f"all {settings.num_epochs} epochs are done; a larger --num_epochs continues")
    run.log.say("\n".join(lines))
    here = origin if origin and origin.in_place else None
    run.folder.begin(state_of(run), progress, here.path if here else None, here.damaged if here else {})
