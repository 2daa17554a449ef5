"""What gives scores: a checkpoint, which embeds the split, or a file of saved scores."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch

from lib import distributed
from lib.cli import InputError
from lib.config import SAVED_SCORES, ScoringSettings
from lib.data.dataset import Split, open_split
from lib.evaluation.embed import Timing, embed_split
from lib.evaluation.matcher import Embeddings, load_matcher, make_scorer
from lib.evaluation.metrics import FOLDS
from lib.evaluation.parts import Part, Shares, folds, whole
from lib.evaluation.provenance import Caveat, find_caveats, quote_checkpoint, quote_run
from lib.evaluation.scores import Scores, open_matrix, saved_scores, scores_of_model
from lib.model.registry import PAPERS_GATE
from lib.runtime import Compute, choose_compute


class CheckpointSource:
    """A checkpoint. Once it has embedded a split, its encoders' memory is free for the scores."""

    def __init__(self, checkpoint: str, settings: ScoringSettings):
        self.matcher = load_matcher(checkpoint, settings.bert, settings.device, settings.precision)
        self.matcher.model.use_engine(settings.engine)
        self.checkpoint = self.matcher.checkpoint
        self.name = _name_model(self.checkpoint["architecture"])
        self.scorer = partial(make_scorer, self.matcher.model.engine, self.matcher.compute)
        self.embeddings: Embeddings | None = None

    def describe(self, label: str) -> str:
        """Lines of a heading."""
        run = quote_run(self.checkpoint["path"])
        return f"{label:<12}{quote_checkpoint(self.checkpoint)}" + (f"\n{'run':<12}{run}" if run else "")

    def caveats(self, split: Split, data_name: str) -> list[Caveat]:
        return find_caveats(self.checkpoint, split, data_name)

    def embed(self, split: Split, settings: ScoringSettings, timing: Timing) -> None:
        with timing.clock("load_s"), distributed.local_main_first():
            captions = self.matcher.tokenizer.tokenize(split.captions)
        self.embeddings = embed_split(self.matcher, split, captions, settings.batch_size, settings.workers, timing)
        self.matcher = None

    def scores(self, split: Split, shares: Shares, device: torch.device) -> Scores:
        return scores_of_model(self.scorer(), self.embeddings, split.image_of_caption)


class SavedSource:
    """Scores in a .npy file, images x captions, as --save_sims writes them."""

    name = "saved scores"
    checkpoint = None
    embeddings = None

    def __init__(self, path: str):
        self.path, self.matrix = path, open_matrix(path)

    def describe(self, label: str) -> str:
        """Lines of a heading."""
        return f"{label:<12}{self.path}"

    def caveats(self, split: Split, data_name: str) -> list[Caveat]:
        return []

    def embed(self, split: Split, settings: ScoringSettings, timing: Timing) -> None:
        """Nothing to do but to see whether they are scores of this split. Raises InputError."""
        expected = (len(split.features), len(split.captions))
        if self.matrix.shape != expected:
            raise InputError(
                f"{self.path}: {self.matrix.shape[0]} x {self.matrix.shape[1]} scores, but {split.folder} {split.name} "
                f"has {expected[0]} images and {expected[1]} captions"
            )

    def scores(self, split: Split, shares: Shares, device: torch.device) -> Scores:
        return saved_scores(self.matrix, split.image_of_caption, shares, device)


Source = CheckpointSource | SavedSource


def _name_model(architecture: dict) -> str:
    """What a table calls a model."""
    similarity = architecture["similarity"]
    name = "X-Dim" if similarity["name"] == "xdim" else similarity["name"]
    gate = similarity["options"].get("gate", {"name": PAPERS_GATE})["name"]
    return name if gate == PAPERS_GATE else f"{name}, {gate} gate"


class Opened(NamedTuple):
    """What an evaluation works on."""

    sources: list[Source]
    split: Split
    parts: list[Part]  # what is ranked among itself: all of the split, then its folds
    compute: Compute
    caveats: list[list[Caveat]]  # of each source


@contextmanager
def opened(given: Sequence[str], settings: ScoringSettings, timing: Timing) -> Iterator[Opened]:
    """Checkpoints and files of scores, and the split that the flags name. Within this context the job's processes work
    together. Raises InputError."""
    with timing.clock("load_s"):
        sources = [SavedSource(one) if one.endswith(SAVED_SCORES) else CheckpointSource(one, settings) for one in given]
        compute = choose_compute(settings.device, settings.precision)
    with distributed.joined(compute.device):
        with timing.clock("load_s"):
            split, data_name = _open_split(sources, settings)
            parts = [whole(len(split.features), len(split.captions))]
            parts += folds(FOLDS, len(split.features), split.image_of_caption) if settings.fold5 else []
            caveats = [source.caveats(split, data_name) for source in sources]
        yield Opened(sources, split, parts, compute, caveats)


def _open_split(sources: Sequence[Source], settings: ScoringSettings) -> tuple[Split, str]:
    """A split and its data set's name: what the flags say, else what the first checkpoint was trained on.

    Raises InputError.
    """
    checkpoints = [source.checkpoint for source in sources if source.checkpoint]
    trained = checkpoints[0]["settings"] if checkpoints else {}
    data_path = settings.data_path or trained.get("data_path")
    data_name = settings.data_name or trained.get("data_name")
    if not data_path or not data_name:
        what = f"{checkpoints[0]['path']}: a published checkpoint" if checkpoints else "saved scores alone"
        missing = "--data_path" if data_name else "--data_path and --data_name"
        raise InputError(f"{what}; say with {missing} where the data is")
    dims = {checkpoint["architecture"]["image_encoder"]["options"]["img_dim"] for checkpoint in checkpoints}
    if len(dims) > 1:
        sizes = " and of ".join(map(str, sorted(dims)))
        raise InputError(f"the checkpoints take features of {sizes} numbers, which no data set has at once")
    return open_split(data_path, data_name, settings.split, *dims), data_name
