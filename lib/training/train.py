"""The training run, from top to bottom in the order things happen."""

import dataclasses
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from lib.bert import start_bert
from lib.checkpoint import (
    BEST,
    LAST,
    build_model,
    describe_architecture,
    find_checkpoint,
    new_model,
    read_checkpoint,
    write_checkpoint,
)
from lib.compute import Compute, choose_compute
from lib.config import ModelSettings, RecipeSettings, TrainSettings
from lib.data.batches import EpochBatches, loader
from lib.data.precomp import Split, open_split
from lib.data.tokenizer import TokenizedCaptions, Tokenizer, load_tokenizer
from lib.errors import InputError, TrainingStopped
from lib.evaluation import report
from lib.evaluation.evaluate import Timing, measure, score_split
from lib.evaluation.matcher import Matcher
from lib.loss import hinge_triplet_loss
from lib.model.xdim import XDim
from lib.training.collapse import CollapseWatch
from lib.training.log import RunLog
from lib.training.optimizer import build_optimizer, learning_rate_of, set_learning_rate
from lib.training.progress import Progress


@dataclass
class Run:
    """Everything a run needs at hand."""

    settings: TrainSettings
    compute: Compute
    model: XDim
    tokenizer: Tokenizer
    optimizer: torch.optim.Optimizer
    train: Split
    train_captions: TokenizedCaptions
    dev: Split
    dev_captions: TokenizedCaptions
    progress: Progress = field(default_factory=Progress)


def train(settings: TrainSettings, checkpoint: dict | None = None) -> None:
    """Train X-Dim, evaluate on dev after each epoch, keep the last and the best checkpoint.

    checkpoint: the content of the one to go on from, where the run is resumed. Raises InputError for wrong settings or
    files, TrainingStopped when the loss is no longer a number.
    """
    run = start(settings, checkpoint)
    log = RunLog(Path(settings.model_name), Path(settings.logger_name), run.progress.step)
    try:
        introduce(run, log)
        for epoch in range(run.progress.epoch, settings.num_epochs):
            train_epoch(run, epoch, log)
            run.progress.epoch = epoch + 1
            validate(run, log)
            save(run)
        best = f"{run.progress.best_rsum:.1f} after epoch {run.progress.best_epoch}"
        log.say(f"best dev rSum {best}: {Path(settings.model_name) / BEST}")
    finally:
        log.close()


def start(settings: TrainSettings, checkpoint: dict | None) -> Run:
    """Open the data and build the model and optimiser, new or as a checkpoint left them."""
    compute = choose_compute(settings.device, settings.precision)
    folder = Path(settings.model_name)
    if checkpoint is None and (folder / LAST).exists():
        raise InputError(
            f"--model_name {folder}: holds a run already; go on with --resume {folder} or name another folder"
        )
    train_split = open_split(settings.data_path, settings.data_name, "train", settings.img_dim)
    dev_split = open_split(settings.data_path, settings.data_name, "dev", settings.img_dim)
    if settings.batch_size > len(train_split.captions):
        raise InputError(
            f"--batch_size {settings.batch_size}: larger than the {len(train_split.captions)} pairs of train"
        )

    torch.manual_seed(settings.seed)
    if checkpoint is None:
        bert, origin = start_bert(settings.bert)
        print(origin)
        tokenizer = load_tokenizer(settings.bert, bert.config.max_position_embeddings, bert.config.vocab_size)
        model = new_model(bert, dataclasses.asdict(settings))
    else:
        model, tokenizer = build_model(checkpoint)
    model.to(compute.device)
    optimizer = build_optimizer(model, settings.learning_rate)
    captions = [tokenizer.tokenize(split.captions) for split in (train_split, dev_split)]
    run = Run(settings, compute, model, tokenizer, optimizer, train_split, captions[0], dev_split, captions[1])
    if checkpoint is not None:
        continue_from(run, checkpoint)
    return run


def continue_from(run: Run, content: dict) -> None:
    """Bring optimiser, progress and random state to where a checkpoint left them."""
    run.optimizer.load_state_dict(content["optimizer"])
    run.progress = Progress(**content["progress"])
    torch.set_rng_state(content["random_state"]["cpu"])
    if run.compute.device.type == "cuda" and content["random_state"]["cuda"] is not None:
        torch.cuda.set_rng_state(content["random_state"]["cuda"], run.compute.device)


def introduce(run: Run, log: RunLog) -> None:
    """Say what is trained on what, and where it is written."""
    settings = run.settings
    counts = run.model.parameter_counts()
    steps = len(run.train.captions) // settings.batch_size
    parts = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    log.say(
        f"data        {run.train.folder}: train {len(run.train.features)} images, {len(run.train.captions)} captions; "
        f"dev {len(run.dev.features)} images, {len(run.dev.captions)} captions\n"
        f"parameters  {sum(counts.values()):,}: {parts}\n"
        f"steps       {settings.num_epochs} epochs of {steps}, batches of {settings.batch_size} pairs\n"
        f"device      {run.compute}\n"
        f"written to  {settings.model_name} ({LAST}, {BEST}, run.log), TensorBoard: {settings.logger_name}\n"
        f"settings    {' '.join(f'{name}={value}' for name, value in dataclasses.asdict(settings).items())}"
    )
    if run.progress.epoch:
        log.say(f"resumed after epoch {run.progress.epoch}, best dev rSum so far {run.progress.best_rsum:.1f}")


def train_epoch(run: Run, epoch: int, log: RunLog) -> None:
    """One pass over all pairs."""
    settings, model, progress = run.settings, run.model, run.progress
    rate = learning_rate_of(epoch, settings.learning_rate, settings.lr_update)
    set_learning_rate(run.optimizer, rate)
    hardest = settings.max_violation or epoch >= settings.vse_mean_warmup_epochs
    watch = CollapseWatch(settings.margin, settings.batch_size)
    batches = EpochBatches(run.train, run.train_captions, run.tokenizer, settings.batch_size, settings.seed, epoch)
    bar = tqdm(
        loader(batches, settings.workers, run.compute.device), desc=f"epoch {epoch + 1}", leave=False, disable=None
    )
    model.train()
    since, pairs = time.perf_counter(), 0
    for batch in bar:
        loss, gradient_norm = train_step(run, batch, hardest)
        progress.step += 1
        pairs += settings.batch_size
        warning = watch.warning(loss) if hardest else None
        if warning:
            log.say(warning)
        if progress.step % settings.log_step == 0:
            speed = pairs / (time.perf_counter() - since)
            since, pairs = time.perf_counter(), 0
            log.say(
                f"epoch {epoch + 1} step {progress.step} loss {loss:.4f} gradient {gradient_norm:.2f} "
                f"rate {rate:.1e} {speed:.0f} pairs/s"
            )
            log_step(run, log, loss, gradient_norm, speed)


def train_step(run: Run, batch, hardest: bool) -> tuple[float, float]:
    """One optimisation step. Returns the loss and the gradient's global norm before clipping."""
    settings = run.settings
    features, counts, ids, lengths = (tensor.to(run.compute.device, non_blocking=True) for tensor in batch)
    with run.compute.autocast():
        scores = run.model(features.float(), counts, ids, lengths)
    loss = hinge_triplet_loss(scores, settings.margin, hardest)
    run.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), settings.grad_clip or math.inf)
    loss_value, norm_value = torch.stack([loss.detach(), norm]).tolist()
    if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
        raise TrainingStopped(
            f"step {run.progress.step + 1}: the loss is {loss_value}, its gradient's norm {norm_value}; checkpoints of "
            f"finished epochs stay in {settings.model_name}; start again with a lower --learning_rate or in fp32"
        )
    run.optimizer.step()
    return loss_value, norm_value


def log_step(run: Run, log: RunLog, loss: float, gradient_norm: float, speed: float) -> None:
    """Figures of a step for TensorBoard."""
    similarity = run.model.similarity
    rate, bert_rate = (group["lr"] for group in run.optimizer.param_groups)
    log.figures(
        run.progress.step,
        train_loss=loss,
        train_gradient_norm=gradient_norm,
        train_pairs_per_second=speed,
        rate_learning=rate,
        rate_bert=bert_rate,
        gate_sparsity=similarity.gate.sparsity(),
        gate_sharpness=similarity.gate.log_sharpness.exp().item(),
        gate_temperature=similarity.log_temperature.exp().item(),
    )


def validate(run: Run, log: RunLog) -> None:
    """Recall on the whole of dev; says whether it is the best so far."""
    progress, settings = run.progress, run.settings
    matcher = Matcher(run.model, run.tokenizer, run.compute)
    scores = score_split(matcher, run.dev, run.dev_captions, settings.batch_size, settings.workers, Timing())
    metrics = measure(scores, run.dev)
    figures = {name: metrics[name] for name in ("rsum", "i2t", "t2i")}
    progress.history.append({"epoch": progress.epoch, "step": progress.step, "dev": figures})
    best = metrics["rsum"] > progress.best_rsum
    if best:
        progress.best_rsum, progress.best_epoch = metrics["rsum"], progress.epoch
    log.say(f"epoch {progress.epoch} dev: {report.line(metrics)}{' (best)' if best else ''}")
    recalls = {f"dev_{way}_{name}": metrics[way][name] for way in ("i2t", "t2i") for name in ("r1", "r5", "r10")}
    log.figures(progress.step, dev_rsum=metrics["rsum"], **recalls)


def save(run: Run) -> None:
    """Write the checkpoints: the best first, so that a kill in between loses no best model."""
    settings, device = dataclasses.asdict(run.settings), run.compute.device
    content = {
        "model": run.model.state_dict(),
        **describe_architecture(run.model, settings, run.tokenizer),
        "settings": settings,
        "progress": dataclasses.asdict(run.progress),
        "optimizer": run.optimizer.state_dict(),
        "random_state": {
            "cpu": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        },
        "versions": {},
        "data": {},
    }
    folder = Path(run.settings.model_name)
    if run.progress.best_epoch == run.progress.epoch:
        write_checkpoint(folder / BEST, content)
    write_checkpoint(folder / LAST, content)


FIXED = [name for group in (ModelSettings, RecipeSettings) for name in group.__annotations__ if name != "num_epochs"]


def resume(checkpoint: str) -> tuple[dict, dict]:
    """Read the checkpoint to go on from: its content, and its settings as defaults of that run. Raises InputError."""
    path = find_checkpoint(checkpoint, LAST)
    content = read_checkpoint(path)
    if "optimizer" not in content:
        raise InputError(f"--resume {path}: a published checkpoint has no optimiser state; it can only be evaluated")
    defaults = {**content["settings"], "resume": str(path), "model_name": str(path.parent)}
    if content["settings"]["logger_name"] == content["settings"]["model_name"]:
        defaults["logger_name"] = str(path.parent)
    return content, defaults


def refuse_changes(settings: TrainSettings, defaults: dict) -> None:
    """Raises InputError naming settings that a resumed run may not change without becoming another run."""
    changed = [name for name in FIXED if getattr(settings, name) != defaults[name]]
    if changed:
        changes = ", ".join(f"--{name} {getattr(settings, name)} (was {defaults[name]})" for name in changed)
        raise InputError(
            f"--resume {settings.resume}: a resumed run keeps its model and recipe, but these differ: {changes}"
        )
