"""Every setting of the programs: one dataclass field each, from which the command line's flags are made.

A field's name is its flag (`--batch_size`), its default the published program's. Wrong values and contradictions are
refused here, in the flags' own names.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from lib.cli import InputError, Parser
from lib.model.registry import GATES, PAPERS_GATE, SIMILARITIES

Settings = TypeVar("Settings")
PRECISIONS = ("fp32", "tf32", "bf16")
HARDNESS = ("epochs", "recall")
SAVED_SCORES = ".npy"  # ending of a file of scores that is given where a checkpoint could be


def flag(default: Any, help: str, **options: Any) -> Any:
    """A dataclass field that is also a command-line flag; options go to argparse."""
    return dataclasses.field(default=default, metadata={"help": help, **options})


@dataclass
class DataSettings:
    """data"""

    data_path: str = flag("data", "folder of the data sets")
    data_name: str = flag(
        "f30k_precomp", "data set: DATA_PATH/DATA_NAME/, or DATA_PATH/precomp/ where only that exists"
    )
    workers: int = flag(10, "processes that read features; never more than there are cores")
    device_features: bool = flag(
        False, "keep train's features on the device, in float16 (Flickr30K: 4.3 GB, COCO: 16.7 GB)"
    )


@dataclass
class ModelSettings:
    """model"""

    bert: str = flag(
        "bert-base-uncased", "BERT by name (fetched once), or a folder; one without weights starts at random"
    )
    img_dim: int = flag(2048, "numbers of a region feature")
    embed_size: int = flag(1024, "dimensions that images and captions share")
    no_imgnorm: bool = flag(False, "do not normalise region embeddings")
    no_txtnorm: bool = flag(False, "do not normalise word embeddings")
    similarity: str = flag("xdim", f"how images and captions are compared: {', '.join(SIMILARITIES)}")
    gate: str = flag(PAPERS_GATE, f"what makes X-Dim's dependencies: {', '.join(GATES)}")
    mask_padding: bool = flag(False, "keep padding regions out of attention and BatchNorm (published: they take part)")


@dataclass
class RecipeSettings:
    """recipe"""

    batch_size: int = flag(128, "image-caption pairs of a step")
    num_epochs: int = flag(30, "epochs to train")
    learning_rate: float = flag(0.0005, "learning rate; BERT's is a tenth of it")
    lr_update: int = flag(15, "epoch, counted from 0, from which on the learning rate is a tenth")
    margin: float = flag(0.2, "margin of the hinge loss")
    hardness: str = flag(
        "epochs",
        "what lets the hardest negatives take over: epochs (published), or recall: the better batches are retrieved "
        "already, the more they count",
        choices=HARDNESS,
    )
    max_violation: bool = flag(False, "hardest negatives from the first step on")
    vse_mean_warmup_epochs: int = flag(
        1, "epochs with all negatives before the hardest ones take over (--hardness epochs)"
    )
    grad_clip: float = flag(2.0, "largest global gradient norm; 0 = no clipping")
    seed: int = flag(0, "seed of weights, order, augmentation and dropout")


@dataclass
class RunSettings:
    """run"""

    model_name: str = flag("", "run folder for checkpoints, run.json and run.log (default: runs/DATA_NAME)")
    logger_name: str = flag("", "folder for TensorBoard files (default: the run folder)")
    log_step: int = flag(100, "steps between two lines of the log")
    save_steps: int = flag(1000, "steps between two checkpoints within an epoch; 0 = only after each epoch")
    keep: int = flag(2, "newest checkpoints to keep; model_best.pt stays beside them")
    micro_batch: int = flag(
        0, "captions that BERT takes at a time in training, for less memory; the loss stays the whole batch's; 0 = all"
    )
    resume: str = flag(
        "", "run folder or checkpoint to go on from, its settings are the defaults then; auto: newest of MODEL_NAME"
    )
    init_from: str = flag("", "checkpoint whose weights alone a new run starts from")
    allow_changes: bool = flag(False, "resume although settings or data differ from the checkpoint's")


@dataclass
class ComputeSettings:
    """device"""

    device: str = flag("auto", "auto, cpu, cuda or cuda:N")
    precision: str = flag("", "fp32, tf32 or bf16 (default: fp32 on a CPU, tf32 on CUDA)", choices=PRECISIONS)


@dataclass
class TrainSettings(ComputeSettings, RunSettings, RecipeSettings, ModelSettings, DataSettings):
    """Settings of train.py."""

    def __post_init__(self):
        for name in ("img_dim", "batch_size", "num_epochs", "log_step", "keep", "learning_rate", "margin"):
            _refuse(not getattr(self, name) > 0, f"--{name} {getattr(self, name)}: must be above 0")  # NaN is not
        others = ("workers", "lr_update", "vse_mean_warmup_epochs", "grad_clip", "save_steps", "micro_batch", "seed")
        for name in others:
            _refuse(not getattr(self, name) >= 0, f"--{name} {getattr(self, name)}: must not be negative")
        _refuse(self.seed >= 2**63, f"--seed {self.seed}: must be below 2**63")
        _refuse(self.batch_size < 2, "--batch_size 1: a batch needs a second pair to take negatives from")
        _refuse(self.embed_size < 2, f"--embed_size {self.embed_size}: the gate needs at least 2 dimensions")
        for name, known in (("similarity", SIMILARITIES), ("gate", GATES)):
            _refuse(getattr(self, name) not in known, f"--{name} {getattr(self, name)}: expected {', '.join(known)}")
        _refuse(
            self.gate != PAPERS_GATE and self.similarity != "xdim",
            f"--gate {self.gate}: --similarity {self.similarity} has no gate",
        )
        _refuse(
            self.max_violation and self.hardness == "recall", "--max_violation: says what --hardness recall decides on"
        )
        _refuse(
            self.resume and self.init_from, "--init_from: starts a new run, --resume goes on with one; give one of them"
        )
        self.model_name = self.model_name or str(Path("runs") / self.data_name)
        self.logger_name = self.logger_name or self.model_name


@dataclass
class ScoringSettings(ComputeSettings):
    """data; what is left out is taken from the checkpoint"""

    data_path: str = flag("", "folder of the data sets")
    data_name: str = flag("", "data set below DATA_PATH")
    bert: str = flag("", "BERT's name or folder; a checkpoint of this project carries its own")
    batch_size: int = flag(128, "images or captions encoded at a time")
    workers: int = flag(10, "processes that read features; never more than there are cores")
    json: str = flag("", "write the results to this file")

    def __post_init__(self):
        _refuse(self.batch_size <= 0, f"--batch_size {self.batch_size}: must be above 0")
        _refuse(self.workers < 0, f"--workers {self.workers}: must not be negative")


@dataclass
class SplitSettings:
    """split"""

    split: str = flag("test", "split to evaluate: dev, test, testall, train")
    fold5: bool = flag(False, "mean over five equal consecutive folds, and the full split")


@dataclass
class CheckpointSettings(ScoringSettings):
    """what is evaluated, and how"""

    checkpoint: tuple[str, ...] = flag(
        (),
        "checkpoint, run folder (its best), published file, exchange folder, or saved scores (.npy); given several "
        "times: each alone, and the ensemble, the mean of their scores (default: newest best below runs/)",
        action="append",
    )
    rerank: str = flag(
        "", "score all pairs coarsely, the best K of each query exactly: K, or auto (default: all pairs exactly)"
    )
    eccv: bool = flag(
        False, "ECCV Caption, CxC and the package's 1K and 5K recalls; for COCO's testall (pip install eccv_caption)"
    )
    ranks: str = flag("", "write each query's true ranks and top 10 to this file (JSON lines)")
    save_sims: str = flag("", "write the scores to this .npy file (float32, images x captions)")

    def __post_init__(self):
        super().__post_init__()
        self.checkpoint = tuple(self.checkpoint or [""])
        _refuse(
            self.rerank not in ("", "auto")
            and not (self.rerank.isascii() and self.rerank.isdigit() and int(self.rerank)),
            f"--rerank {self.rerank}: expected a number above 0, or auto",
        )
        for name in ("eccv", "ranks", "save_sims"):
            _refuse(
                self.rerank and getattr(self, name), f"--{name}: needs every pair's exact score, leave out --rerank"
            )
        several = len(self.checkpoint) > 1 or self.checkpoint[0].endswith(SAVED_SCORES)
        _refuse(self.rerank and several, "--rerank: for a single checkpoint, leave it out")


@dataclass
class EvaluationSettings(SplitSettings, CheckpointSettings):
    """Settings of eval.py."""


@dataclass
class CompareSettings(SplitSettings, ScoringSettings):
    """what is compared"""

    a: str = flag("", "checkpoint, run folder or saved scores (.npy)", positional=True)
    b: str = flag("", "the same, to compare with A", positional=True)


@dataclass
class AblationSettings:
    """variants and seeds; flags for train.py follow after --"""

    folder: str = flag("runs/ablation", "folder of the run folders, the table and the curves")
    variants: tuple[str, ...] = flag(
        ("xdim", "independent"),
        "SIMILARITY or SIMILARITY:GATE, with further flags for train.py in quotes: 'xdim --mask_padding'; the first is "
        "what others are compared with",
        nargs="+",
    )
    seeds: tuple[int, ...] = flag((0, 1, 2), "seeds of each variant", nargs="+", type=int)
    split: str = flag("dev", "split to compare on")

    def __post_init__(self):
        self.variants, self.seeds = tuple(self.variants), tuple(self.seeds)
        for variant in self.variants:
            similarity, _, gate = next(iter(variant.split()), "").partition(":")
            _refuse(
                similarity not in SIMILARITIES
                or (gate or PAPERS_GATE) not in GATES
                or bool(gate and similarity != "xdim"),
                f"--variants {variant}: expected {', '.join(SIMILARITIES)}, or {'xdim'} with one of "
                f"{', '.join(f':{name}' for name in GATES)}",
            )
        for name in ("variants", "seeds"):
            values = getattr(self, name)
            _refuse(len(set(values)) < len(values), f"--{name} {' '.join(map(str, values))}: one is there twice")


def parse(
    settings: type[Settings],
    description: str,
    argv: Sequence[str] | None,
    defaults: dict | None = None,
    command: str | None = None,
) -> Settings:
    """Read the flags of a settings class; `defaults` replace the class's own. command: the program's name for this."""
    parser = Parser(description=description, prog=command)
    for group in reversed(settings.__mro__[:-1]):
        names = [name for name in group.__annotations__ if name in settings.__dataclass_fields__]
        arguments = parser.add_argument_group(group.__doc__.strip().rstrip("."))
        for name in names:
            _add_flag(arguments, settings.__dataclass_fields__[name])
    if "resume" in settings.__dataclass_fields__:
        parser.add_argument("--precomp_enc_type", choices=["basic"], default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    parser.set_defaults(**(defaults or {}))
    values = vars(parser.parse_args(argv))
    values.pop("precomp_enc_type", None)  # scripts of this family pass it; basic is what there is
    return settings(**values)


def _add_flag(arguments, field: dataclasses.Field) -> None:
    options = dict(field.metadata)
    if options.pop("positional", False):
        arguments.add_argument(field.name, metavar=field.name.upper(), **options)
        return
    if field.type is bool:
        options["action"] = "store_true"
    else:
        options.setdefault("type", str if "action" in options or "nargs" in options else field.type)
        options.setdefault("metavar", field.name.upper())
    default = None if "append" in options.values() else field.default
    arguments.add_argument(f"--{field.name}", default=default, **options)


def _refuse(wrong: bool, message: str) -> None:
    if wrong:
        raise InputError(message)
