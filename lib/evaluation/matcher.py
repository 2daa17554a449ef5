"""A trained model ready for use: features and sentences in, scores out."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from lib.checkpoint import build_model, find_checkpoint, read_checkpoint
from lib.compute import Compute, choose_compute
from lib.data.tokenizer import TokenizedCaptions, Tokenizer
from lib.errors import InputError
from lib.model.similarity import Scorer
from lib.model.xdim import XDim

SCORE_IMAGES = 64  # images scored between two moves of the progress bar
SCORE_PAIRS = 10_000  # likewise, where pairs are scored one by one


class Embeddings(NamedTuple):
    """Images and captions of a split in the shared dimensions, on the device that scores them."""

    images: Tensor  # (images, R, D)
    words: Tensor  # (words, D), of all captions one after the other
    lengths: Tensor  # (captions,) words of each, on the CPU


class Matcher:
    """Embeds and scores without gradients, in evaluation mode.

    model, tokenizer: what was trained. compute: where and how exactly. checkpoint: where the model came from, for
    reports.
    """

    def __init__(self, model: XDim, tokenizer: Tokenizer, compute: Compute, checkpoint: dict | None = None):
        self.model = model.to(compute.device).eval()
        self.tokenizer = tokenizer
        self.compute = compute
        self.checkpoint = checkpoint or {}

    def score(self, regions, captions: Sequence[str], batch_size: int = 128) -> Tensor:
        """How well each caption fits each image.

        regions: (images, regions, img_dim) array or tensor of features. captions: plain sentences.
        Returns (images, captions) float32 on the CPU. Raises InputError where shapes do not fit or features are not
        finite.
        """
        features = torch.as_tensor(regions)
        img_dim = self.model.image_encoder.linear.in_features
        if features.ndim != 3 or features.shape[2] != img_dim or 0 in features.shape:
            raise InputError(f"regions: expected (images, regions, {img_dim}), found {tuple(features.shape)}")
        if not torch.isfinite(features).all():
            raise InputError("regions: NaN or infinite features")
        if isinstance(captions, str) or not captions:
            raise InputError("captions: expected a list of one sentence or more")
        images = self.embed_images(features.split(batch_size))
        words, lengths = self.embed_captions(self.tokenizer.tokenize(list(captions)), batch_size)
        return torch.cat([scores.cpu() for _, scores in score_blocks(self.scorer(), images, words, lengths)])

    @torch.inference_mode()
    def embed_images(self, batches: Iterable[Tensor], total: int | None = None) -> Tensor:
        """Region embeddings (images, R, D) of batches of features (B, R, img_dim), on the device, float32."""
        embedded = []
        for features in tqdm(batches, desc="images", total=total, leave=False, disable=None):
            features = features.to(self.compute.device, non_blocking=True).float()
            counts = torch.full((len(features),), features.shape[1], device=features.device)
            with self.compute.autocast():
                embedded.append(self.model.encode_images(features, counts))
        return torch.cat(embedded)

    @torch.inference_mode()
    def embed_captions(self, captions: TokenizedCaptions, batch_size: int) -> tuple[Tensor, Tensor]:
        """Word embeddings (words, D) of all captions one after the other, on the device, and lengths (captions,).

        Captions of like length are encoded together, so that little is padded.
        """
        ids, lengths = (torch.from_numpy(array) for array in self.tokenizer.pad(captions))
        starts = lengths.cumsum(0) - lengths
        words = None
        for batch in tqdm(lengths.argsort(stable=True).split(batch_size), desc="captions", leave=False, disable=None):
            batch_ids = ids[batch, : lengths[batch].max()].to(self.compute.device)
            with self.compute.autocast():
                embedded = self.model.encode_captions(batch_ids, lengths[batch])
            if words is None:
                words = embedded.new_empty(int(lengths.sum()), embedded.shape[1])
            places = [torch.arange(length) + start for start, length in zip(starts[batch], lengths[batch], strict=True)]
            words[torch.cat(places).to(words.device)] = embedded
        return words, lengths

    def scorer(self, coarse: bool = False) -> Scorer:
        """What scores embeddings in this matcher's precision; see Similarity.scorer."""
        with self.compute.autocast():
            return self.model.similarity.scorer(coarse)


def score_blocks(scorer: Scorer, images: Tensor, words: Tensor, lengths: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Scores of all pairs as (first image, scores (images, captions)), some images at a time, on their device."""
    for first in tqdm(range(0, len(images), SCORE_IMAGES), desc="scores", leave=False, disable=None):
        yield first, scorer.all_pairs(images[first : first + SCORE_IMAGES], words, lengths)


def score_pairs_in_chunks(scorer: Scorer, images: Tensor, words: Tensor, lengths: Tensor, *pairs: Tensor) -> Tensor:
    """Scores (P,) of chosen pairs, given as indices (P,) of images and of captions, some pairs at a time."""
    chunks = zip(*(indices.split(SCORE_PAIRS) for indices in pairs), strict=True)
    bar = tqdm(list(chunks), desc="exact scores", leave=False, disable=None)
    return torch.cat([scorer.pairs(images, words, lengths, *chunk) for chunk in bar])


def load_matcher(checkpoint, bert: str = "", device: str = "auto", precision: str = "") -> Matcher:
    """Load a trained model.

    checkpoint: a checkpoint file, a run folder (its best), or a published checkpoint. bert: name or folder of BERT's
    configuration and vocabulary; needed for a published checkpoint that is not BERT-base, a checkpoint of this project
    carries its own. device: auto, cpu, cuda or cuda:N. precision: fp32, tf32 (CUDA) or bf16; empty for the device's
    default. Returns a Matcher, whose `score(regions, captions)` scores. Raises InputError saying what is wrong.
    """
    compute = choose_compute(device, precision)
    path = find_checkpoint(str(checkpoint))
    content = read_checkpoint(path, mapped=True)
    model, tokenizer = build_model(content, bert)
    about = {name: content[name] for name in ("settings", "progress", "architecture")}
    return Matcher(model, tokenizer, compute, {**about, "path": path})
