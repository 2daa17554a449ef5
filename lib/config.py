"""Every setting of the programs: one dataclass field each, from which the command line's flags are made.

A field's name is its flag (`--batch_size`), its default the published program's. Wrong values and contradictions are
refused here, in the flags' own names; what a part (`--gate NAME:option=value`) takes is checked when it is built.
"""

import argparse
import dataclasses
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from lib.cli import InputError, Parser
from lib.model.registry import PAPERS_GATE, PARTS, parse_part

PRECISIONS = ("fp32", "tf32", "bf16")
ENGINES = ("tiled", "plain")
HUB_NAME = re.compile(r"(\w[\w.-]*)/(\w[\w.-]*)(?:@([\w./-]+))?")  # OWNER/NAME@REVISION of the Hugging Face hub
SAVED_SCORES = ".npy"  # ending of a file of scores, which can be given instead of a checkpoint


def flag(default: Any, help: str, **options: Any) -> Any:
    """A dataclass field that is also a command-line flag.

    options: `least` or `above` limit a number, `part` is a kind of the registry; the others are argparse's.
    """
    return dataclasses.field(default=default, metadata={"help": help, **options})


def part(kind: str, default: str, help: str) -> Any:
    """A flag that names a part of the registry, with its options: NAME or NAME:option=value,option=value."""
    return flag(default, f"{help}: {', '.join(PARTS[kind])}", part=kind)


@dataclass
class Settings:
    """Numbers within their limits, and parts by names that exist."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, options = getattr(self, field.name), field.metadata
            given = f"--{field.name} {value}: "
            if isinstance(value, int | float):
                _refuse(not abs(value) < 2**63, f"{given}must be finite and below 2**63")  # as PyTorch's integers
                least, above = options.get("least", value), options.get("above", -math.inf)
                _refuse(value < least, f"{given}must be at least {least}")
                _refuse(value <= above, f"{given}must be above {above}")
            if "part" in options and value != field.default:
                try:
                    parse_part(options["part"], value)
                except ValueError as error:
                    raise InputError(str(error)) from None


@dataclass
class DataSettings(Settings):
    """data and order"""

    data_path: str = flag("data", "folder of the data sets")
    data_name: str = flag("f30k_precomp", "data set: DATA_PATH/DATA_NAME/, or DATA_PATH/precomp/ if only that exists")
    image_path: str = flag("", "folder of the pictures, for models from pixels (default: where the data set says)")
    workers: int = flag(10, "processes that read features; at most one for each core", least=0)
    seed: int = flag(0, "seed of weights, order, augmentation and dropout", least=0)


@dataclass
class ModelSettings(Settings):
    """architecture; a part can have options: NAME:option=value,option=value"""

    similarity: str = part("similarity", "xdim", "how images and captions are compared")
    gate: str = part("gate", PAPERS_GATE, "what computes X-Dim's dependency matrix")
    global_head: str = part("global_head", "", "one vector a side beside X-Dim, which finds what X-Dim ranks")
    image_encoder: str = part("image_encoder", "regions", "what embeds images; torchvision:NAME, hf:NAME from pixels")
    image_weights: str = flag("", "file of the vision model's first weights (default: its library's, fetched once)")
    image_size: int = flag(0, "pixels of a picture's sides (default: 256, for hf: the model's own)", least=0)
    text_encoder: str = part("text_encoder", "transformer", "what embeds captions, or the same as --bert")
    bert: str = flag("bert-base-uncased", "text model: a name (fetched once) or a folder")
    bert_from_scratch: bool = flag(False, "the text model starts from random weights")
    img_dim: int = flag(0, "size of a region feature (default: that of the data)", least=0)
    embed_size: int = flag(1024, "dimensions that images and captions share", least=2)
    no_imgnorm: bool = flag(False, "do not normalise region embeddings")
    no_txtnorm: bool = flag(False, "do not normalise word embeddings")
    mask_padding: bool = flag(False, "keep padding regions out of attention and BatchNorm (published: they take part)")


@dataclass
class RecipeSettings(Settings):
    """recipe"""

    batch_size: int = flag(128, "image-caption pairs of a step", least=2)
    num_epochs: int = flag(30, "epochs to train", least=1)
    learning_rate: float = flag(0.0005, "learning rate; the text model's is a tenth of it", above=0)
    lr_update: int = flag(15, "epoch, counted from 0, from which on the learning rate is a tenth", least=0)
    loss: str = part("loss", "hinge", "loss function")
    margin: float = flag(0.2, "margin of the loss", above=0)
    vse_mean_warmup_epochs: int = flag(1, "first epochs with --loss hinge over all negatives, not the hardest", least=0)
    max_violation: bool = flag(False, "hardest negatives from the first step on: no warm-up")
    no_same_image_negatives: bool = flag(False, "an image's other captions in a batch are no negatives of it")
    grad_clip: float = flag(2.0, "largest global gradient norm; 0 = no clipping", least=0)
    encoder_lr: float = flag(0.0, "vision model's share of the rate (default: 0.01, for hf: 0.1)", least=0)
    freeze_epochs: int = flag(2, "first epochs in which the vision model does not train", least=0)
    thaw_epochs: int = flag(
        5, "epochs after which one more of its stages trains, from the top; 0 = all at once", least=0
    )


@dataclass
class RunSettings(Settings):
    """run"""

    model_name: str = flag("", "run folder for checkpoints, run.json and run.log (default: runs/DATA_NAME)")
    logger_name: str = flag("", "folder for TensorBoard files (default: the run folder)")
    track: str = flag("", "package that gets the metrics too: trackio or wandb", choices=("trackio", "wandb"))
    log_step: int = flag(100, "steps between two lines of the log, which come every 30 seconds at least", least=1)
    save_steps: int = flag(1000, "steps between two checkpoints in an epoch; 0 = only after each epoch", least=0)
    keep: int = flag(2, "newest checkpoints to keep, besides the best", least=1)
    resume: str = flag("", "run folder or checkpoint to go on from, with its settings; auto: newest of MODEL_NAME")
    init_from: str = flag("", "checkpoint from which a new run takes only the weights")
    allow_changes: bool = flag(False, "resume although settings or data differ from the checkpoint's")


@dataclass
class ComputeSettings(Settings):
    """device"""

    device: str = flag("auto", "auto, cpu, cuda or cuda:N")
    precision: str = flag("", "fp32, tf32 or bf16 (default: fp32 on a CPU, tf32 on CUDA)", choices=PRECISIONS)
    engine: str = flag("", "tiled or plain, lib/model/xdim.py (default: the checkpoint's, else tiled)", choices=ENGINES)


@dataclass
class TrainSettings(ComputeSettings, RunSettings, RecipeSettings, ModelSettings, DataSettings):
    """memory"""

    device_features: bool = flag(False, "keep train's features on the device (Flickr30K: 4.3 GB, COCO: 16.7 GB)")
    micro_batch: int = flag(0, "captions or pictures that a model takes at a time: less memory; 0 = all", least=0)
    gradient_checkpointing: bool = flag(False, "text and vision model recompute activations: less memory, same loss")

    def __post_init__(self):
        if self.text_encoder.partition(":")[0] not in PARTS["text_encoder"]:  # --text_encoder bert-base-uncased
            self.text_encoder, self.bert = "transformer", self.text_encoder
        super().__post_init__()
        resumes = self.resume not in ("", "auto")  # auto may start a new run
        _refuse(resumes and self.init_from, "--init_from: starts a new run; --resume goes on with one: give one")
        self.model_name = self.model_name or str(Path("runs") / self.data_name)
        self.logger_name = self.logger_name or self.model_name


@dataclass
class ScoringSettings(ComputeSettings):
    """data; default: the checkpoint's"""

    data_path: str = flag("", "folder of the data sets")
    data_name: str = flag("", "data set below DATA_PATH")
    image_path: str = flag("", "folder of the pictures, for models from pixels")
    bert: str = flag("", "text model's name or folder, for published checkpoints; others carry their own")
    batch_size: int = flag(128, "images or captions encoded at a time", least=1)
    workers: int = flag(10, "processes that read features; at most one for each core", least=0)
    json: str = flag("", "write the results to this file")


@dataclass
class SplitSettings(ScoringSettings):
    """split"""

    split: str = flag("test", "split to evaluate: dev, test, testall, train")
    fold5: bool = flag(False, "mean over five equal consecutive folds, and the full split")


@dataclass
class CheckpointSettings(ScoringSettings):
    """what is evaluated, and how"""

    run: tuple[str, ...] = flag((), "the same as --checkpoint RUN", positional=True, nargs="*")
    checkpoint: tuple[str, ...] = flag(
        (),
        "checkpoint, run folder (its best), published file or saved scores (.npy); several times: each alone, and the "
        "mean of their scores (default: newest best below runs/)",
        action="append",
    )
    rerank: str = flag("", "score exactly only the K best of coarse scores: K, or auto (default: all pairs exactly)")
    eccv: bool = flag(False, "ECCV Caption, CxC and its 1K and 5K recalls, for COCO's testall (needs eccv_caption)")
    ranks: str = flag("", "write each query's true ranks and top 10 to this file (JSON lines)")
    save_sims: str = flag("", "write the scores to this .npy file (float32, images x captions)")

    def __post_init__(self):
        super().__post_init__()
        self.checkpoint, self.run = tuple([*self.run, *(self.checkpoint or ())] or [""]), ()
        known = re.fullmatch("(auto|0*[1-9][0-9]*)?", self.rerank)
        _refuse(not known, f"--rerank {self.rerank}: expected a number above 0, or auto")
        for name in ("eccv", "ranks", "save_sims"):
            wanted = self.rerank and getattr(self, name)
            _refuse(wanted, f"--{name}: needs every pair's exact score, leave out --rerank")
        several = len(self.checkpoint) > 1 or self.checkpoint[0].endswith(SAVED_SCORES)
        _refuse(self.rerank and several, "--rerank: for a single checkpoint, leave it out")


@dataclass
class EvaluationSettings(SplitSettings, CheckpointSettings):
    """Settings of eval.py."""


@dataclass
class CompareSettings(SplitSettings):
    """what is compared"""

    a: str = flag("", "checkpoint, run folder or saved scores (.npy)", positional=True)
    b: str = flag("", "the same, to compare with A", positional=True)


@dataclass
class AblationSettings(Settings):
    """variants and seeds; flags for train.py follow after --"""

    folder: str = flag("runs/ablation", "folder of the run folders, the table and the curves")
    variants: tuple[str, ...] = flag(
        ("xdim", "independent"),
        "SIMILARITY or SIMILARITY:GATE and further flags in quotes ('xdim --mask_padding'); the first is the reference",
        nargs="+",
    )
    seeds: tuple[int, ...] = flag((0, 1, 2), "seeds of each variant", nargs="+", type=int)
    split: str = flag("dev", "split to compare on")

    def __post_init__(self):
        self.variants, self.seeds = tuple(self.variants), tuple(self.seeds)
        _refuse(not all(map(str.split, self.variants)), "--variants: one is empty")
        for name in ("variants", "seeds"):
            values = getattr(self, name)
            _refuse(len(set(values)) < len(values), f"--{name} {' '.join(map(str, values))}: one is there twice")


@dataclass
class SearchSettings(ComputeSettings):
    """index"""

    index: str = flag("", "folder of the index, or a URI that LanceDB takes (s3://, gs://, db://)")
    checkpoint: str = flag("", "run folder or checkpoint (default: the index's own; for a new one the newest best)")
    bert: str = flag("", "text model's name or folder, for published checkpoints; others carry their own")
    image_weights: str = flag("", "file of the vision model's weights, where they are elsewhere now")

    def __post_init__(self):
        super().__post_init__()
        _refuse(not self.index, "--index: say where the index is, or shall be")


@dataclass
class IndexSettings(SearchSettings):
    """pictures: a folder, or a data set's split"""

    photos: str = flag("", "folder of pictures, which may have folders in it", positional=True, nargs="?")
    data_name: str = flag("", "data set below DATA_PATH, instead of a folder")
    data_path: str = flag("", "folder of the data sets (default: the checkpoint's)")
    image_path: str = flag("", "folder of the data set's pictures, for models from pixels")
    split: str = flag("test", "split of the data set")
    compress: str = flag("", "how regions are stored (default: float16)", choices=("float32", "float16", "int8"))
    workers: int = flag(10, "threads that read pictures; at most one for each core", least=0)

    def __post_init__(self):
        super().__post_init__()
        _refuse(bool(self.photos) == bool(self.data_name), "give a folder of pictures, or --data_name: one of them")


@dataclass
class QuerySettings(SearchSettings):
    """query: a sentence, or a picture"""

    text: str = flag("", "what is to be seen, a sentence", positional=True, nargs="*")
    image: str = flag("", "a picture, instead of a sentence: what is like it")
    top: int = flag(10, "answers", least=1)
    candidates: int = flag(200, "nearest pictures that are scored exactly, at least --top", least=1)
    json: bool = flag(False, "print JSON")

    def __post_init__(self):
        super().__post_init__()
        self.text = self.text if isinstance(self.text, str) else " ".join(self.text)  # quotes may be missing
        _refuse(bool(self.text) == bool(self.image), "give a sentence, or --image PICTURE: one of them")


@dataclass
class ServeSettings(SearchSettings):
    """page"""

    port: int = flag(7860, "where the page is, http://HOST:PORT; 0 = one that is free", least=0)
    host: str = flag("127.0.0.1", "address that is listened to; 0.0.0.0: whoever reaches this machine may search")


@dataclass
class FigureSettings(Settings):
    """figure"""

    out: str = flag("", "file of the figure; its ending says of which kind")

    endings = ".png .pdf .svg"

    def __post_init__(self):
        super().__post_init__()
        known = Path(self.out).suffix.lower() in self.endings.split()
        _refuse(not known, f"--out {self.out}: expected a file's name that ends in {' or '.join(self.endings.split())}")


@dataclass
class ShowSettings(FigureSettings, ComputeSettings):
    """model"""

    checkpoint: str = flag("", "run folder or checkpoint (default: newest best below runs/)")
    bert: str = flag("", "text model's name or folder, for published checkpoints; others carry their own")


@dataclass
class ShowDataSettings(ShowSettings):
    """data set; default: the checkpoint's"""

    data_path: str = flag("", "folder of the data sets")
    data_name: str = flag("", "data set below DATA_PATH")
    image_path: str = flag("", "folder of its pictures (default: where the data set says)")
    split: str = flag("test", "split of the data set")


@dataclass
class AttentionSettings(ShowDataSettings):
    """pair"""

    image: str = flag("", "a picture's path, or the id or number of an image of the data set")
    caption: str = flag("", "what is said of it, in quotes (default: the data set's first caption)")


@dataclass
class DimensionSettings(ShowDataSettings):
    """what is asked"""

    dimension: int = flag(0, "number of the dimension, from 0", positional=True, type=int, least=0)
    pairs: int = flag(1000, "images with a caption of theirs that are looked at, evenly spaced", least=1)


@dataclass
class ShareSettings(Settings):
    """what is sent, and where"""

    run: str = flag("", "run folder (its best epoch) or checkpoint", positional=True)
    name: str = flag("", "OWNER/NAME on the Hugging Face hub", positional=True)
    private: bool = flag(False, "the repository is private where it is made now")
    dry_run: str = flag("", "write what would be sent to this new folder, and send nothing")
    results: str = flag("", "evaluation for the model card, by eval.py --json (default: test.json in the run folder)")
    licence: str = flag("", "licence of the weights, as the hub names it: mit, apache-2.0, cc-by-nc-4.0 ...")

    def __post_init__(self):
        super().__post_init__()
        named = HUB_NAME.fullmatch(self.name)
        _refuse(not named or named[3], f"{self.name}: expected OWNER/NAME, your name on the hub and the model's")
        _refuse(not re.fullmatch(r"[\w.-]*", self.licence), f"--licence {self.licence}: expected a name such as mit")


@dataclass
class GallerySettings(ShowDataSettings):
    """gallery"""

    queries: int = flag(200, "queries each way, the worst first; the others are left out", least=1)
    batch_size: int = flag(128, "images or captions encoded at a time", least=1)
    workers: int = flag(10, "processes that read features; at most one for each core", least=0)

    endings = ".html"


@dataclass
class CurvesSettings(FigureSettings):
    """runs"""

    run: tuple[str, ...] = flag((), "run folders", positional=True, nargs="+")


Chosen = TypeVar("Chosen", bound=Settings)


def parse(
    settings: type[Chosen],
    description: str,
    argv: Sequence[str] | None,
    defaults: dict[str, Any] | None = None,
    command: str | None = None,
) -> Chosen:
    """Read the flags of a settings class. defaults: instead of the class's own. command: the program's name.

    Raises InputError for values that are refused; ends the program, as argparse does, if flags cannot be read.
    """
    parser, fields = Parser(description=description, prog=command), settings.__dataclass_fields__
    for group in reversed(settings.__mro__[:-1]):
        arguments = parser.add_argument_group((group.__doc__ or "").rstrip("."))
        for name in group.__annotations__:
            _add_flag(arguments, fields[name])
    if issubclass(settings, TrainSettings):  # other programs of this family have it, and no other value is in use
        parser.add_argument("--precomp_enc_type", choices=["basic"], default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    parser.set_defaults(**(defaults or {}))
    values = vars(parser.parse_args(argv))
    values.pop("precomp_enc_type", None)
    return settings(**values)


def parse_command(commands: dict[str, tuple[type[Settings], str]], argv: Sequence[str] | None) -> Any:
    """The settings of `PROGRAM COMMAND flags`, as `parse` reads them. commands: settings and a line about each.

    The class of what is returned says which command was given. Raises InputError where it is none of them.
    """
    program, argv = Path(sys.argv[0]).name, sys.argv[1:] if argv is None else argv
    if argv and argv[0] in ("-h", "--help"):
        lines = [f"{program} {name:<13} {about}" for name, (_, about) in commands.items()]
        print("\n".join([*lines, f"{program} COMMAND --help: its flags"]))
        sys.exit(0)
    if not argv or argv[0] not in commands:
        raise InputError(f"expected {program} {' or '.join(commands)}, and flags (see {program} --help)")
    settings, about = commands[argv[0]]
    return parse(settings, about, argv[1:], command=f"{program} {argv[0]}")


def _add_flag(arguments: argparse._ArgumentGroup, field: dataclasses.Field) -> None:
    options = {name: value for name, value in field.metadata.items() if name not in ("least", "above", "part")}
    if options.pop("positional", False):
        arguments.add_argument(field.name, metavar=field.name.upper(), default=field.default, **options)
        return
    if field.type is bool:
        options["action"] = "store_true"
    else:
        options.setdefault("type", str if "action" in options or "nargs" in options else field.type)
        options.setdefault("metavar", field.name.upper())
    default = None if options.get("action") == "append" else field.default
    arguments.add_argument(f"--{field.name}", default=default, **options)


def _refuse(wrong: Any, message: str) -> None:
    if wrong:
        raise InputError(message)
