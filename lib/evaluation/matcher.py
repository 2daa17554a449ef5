"""A trained model ready for use: features and sentences in, scores out."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from lib.checkpoint import build_model, find_checkpoint, read_checkpoint
from lib.compute import Compute, choose_compute
from lib.data.batches import Images
from lib.data.ragged import ranges
from lib.data.tokenizer import TokenizedCaptions, Tokenizer
from lib.errors import InputError
from lib.model.regions import pad_regions, real_regions
from lib.model.similarity import Scorer
from lib.model.xdim import XDim

SCORE_IMAGES = 64  # images scored between two moves of the progress bar
LIKE_COUNTS = 8  # images padded to one number of regions, where the numbers differ
SCORE_PAIRS = 512  # images whose pairs are scored between two moves, where pairs are scored one by one


class Embeddings(NamedTuple):
    """Images and captions of a split in the shared dimensions, on the device that scores them."""

    regions: Tensor  # (regions, D), of all images one after the other
    counts: Tensor  # (images,) regions of each, on the CPU
    words: Tensor  # (words, D), of all captions one after the other
    lengths: Tensor  # (captions,) words of each, on the CPU

    def padded(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Regions (images, longest, D) of some images, ascending (images,), and which are real; None: all."""
        counts, ends = self.counts[images], self.counts.cumsum(0)
        first, last = int(images[0]), int(images[-1])
        if last - first + 1 == len(images):
            rows = self.regions[ends[first] - self.counts[first] : ends[last]]
        else:
            places = ranges((ends[images] - counts).numpy(), counts.numpy())
            rows = self.regions[torch.from_numpy(places).to(self.regions.device)]
        return pad_regions(rows, counts), real_regions(counts, rows.device)


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

        regions: (images, regions, img_dim) array or tensor of features; or a list of (regions, img_dim), where images
        have different numbers. captions: plain sentences. Returns (images, captions) float32 on the CPU. Raises
        InputError where shapes do not fit or features are not finite.
        """
        images = [torch.as_tensor(image) for image in regions]
        img_dim = self.model.image_encoder.linear.in_features
        if not images:
            raise InputError(f"regions: expected (images, regions, {img_dim}), found no images")
        for image in images:
            if image.ndim != 2 or image.shape[1] != img_dim or not len(image):
                raise InputError(
                    f"regions: expected (images, regions, {img_dim}), found an image of {tuple(image.shape)}"
                )
            if not torch.isfinite(image).all():
                raise InputError("regions: NaN or infinite features")
        if isinstance(captions, str) or not captions:
            raise InputError("captions: expected a list of one sentence or more")
        batches = (images[first : first + batch_size] for first in range(0, len(images), batch_size))
        embedded = self.embed_images(Images(torch.cat(some), torch.tensor(list(map(len, some)))) for some in batches)
        embeddings = Embeddings(*embedded, *self.embed_captions(self.tokenizer.tokenize(list(captions)), batch_size))
        return torch.cat([scores.cpu() for _, scores in score_blocks(self.scorer(), embeddings)])

    @torch.inference_mode()
    def embed_images(self, batches: Iterable[Images], total: int | None = None) -> tuple[Tensor, Tensor]:
        """Region embeddings (regions, D) of all images one after the other, on the device, float32, and their counts
        (images,)."""
        embedded, counts = [], []
        for images in tqdm(batches, desc="images", total=total, leave=False, disable=None):
            features = images.features.to(self.compute.device, non_blocking=True).float()
            with self.compute.autocast():
                embedded.append(self.model.encode_images(features))
            counts.append(images.counts)
        return torch.cat(embedded), torch.cat(counts)

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


def score_blocks(scorer: Scorer, embeddings: Embeddings) -> Iterator[tuple[int, Tensor]]:
    """Scores of all pairs as (first image, scores (images, captions)), some images at a time, on their device.

    Images of a block that differ in their number of regions are scored with those that have like numbers.
    """
    _, counts, words, lengths = embeddings
    for first in tqdm(range(0, len(counts), SCORE_IMAGES), desc="scores", leave=False, disable=None):
        of_block = counts[first : first + SCORE_IMAGES]
        scores = words.new_empty(len(of_block), len(lengths))
        for images in _of_like_counts(of_block):
            regions, real = embeddings.padded(first + images)
            scores[images.to(scores.device)] = scorer.all_pairs(regions, words, lengths, real)
        yield first, scores


def score_pairs_in_chunks(scorer: Scorer, embeddings: Embeddings, images: Tensor, captions: Tensor) -> Tensor:
    """Scores (P,) of chosen pairs, given as indices (P,) of images, ascending, and of captions."""
    images, captions, scores = images.cpu(), captions.cpu(), []
    steps = range(int(images[0]), int(images[-1]) + 1, SCORE_PAIRS) if len(images) else ()
    for first in tqdm(steps, desc="exact scores", leave=False, disable=None):
        pairs = slice(*torch.searchsorted(images, torch.tensor([first, first + SCORE_PAIRS])).tolist())
        if pairs.start < pairs.stop:
            block = torch.arange(first, min(first + SCORE_PAIRS, len(embeddings.counts)))
            regions, real = embeddings.padded(block)
            chosen = (images[pairs] - first, captions[pairs], real)
            scores.append(scorer.pairs(regions, embeddings.words, embeddings.lengths, *chosen))
    return torch.cat(scores) if scores else embeddings.words.new_empty(0)


def _of_like_counts(counts: Tensor) -> list[Tensor]:
    """Indices of images that are padded together, ascending."""
    if (counts == counts[0]).all():
        return [torch.arange(len(counts))]
    return [group.sort().values for group in counts.argsort(stable=True).split(LIKE_COUNTS)]


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
