"""A trained model ready for use: features and sentences in, scores out."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lib import collectives
from lib.checkpoints.native import build_model, find_checkpoint, read_checkpoint
from lib.cli import InputError, with_bar
from lib.data.batches import Images
from lib.data.features import ranges
from lib.data.tokenizer import TokenizedCaptions, Tokenizer
from lib.evaluation.parts import Shares, blocks, blocks_of, chunks, count, overlap, unshared, within
from lib.model.engine import PlainEngine, TiledEngine
from lib.model.engine.autograd import Scorer
from lib.model.layers import pad_rows, real_rows
from lib.model.xdim import XDim
from lib.runtime import Compute, choose_compute

LIKE_COUNTS = 8  # images padded to one number of regions, where the numbers differ

Strips = Iterator[tuple[int, Tensor]]  # first caption, scores (own images, captions) of consecutive captions


class Embeddings(NamedTuple):
    """A process's share of a split's images and captions in the shared dimensions, on the device that scores them."""

    regions: Tensor  # (regions, D), of the share's images one after the other
    counts: Tensor  # (own images,) regions of each, on the CPU
    words: Tensor  # (words, D), of the share's captions one after the other
    lengths: Tensor  # (captions,) words of each caption of the split, on the CPU
    shares: Shares

    def padded(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Regions (images, longest, D) of some own images, counted from the first of them, ascending (images,), and
        which are real; None: all."""
        counts, ends = self.counts[images], self.counts.cumsum(0)
        first, last = int(images[0]), int(images[-1])
        if last - first + 1 == len(images):  # copied, since products may depend on where in memory their factors start
            rows = self.regions[ends[first] - self.counts[first] : ends[last]].clone()
        else:
            places = ranges((ends[images] - counts).numpy(), counts.numpy())
            rows = self.regions[torch.from_numpy(places).to(self.regions.device)]
        return pad_rows(rows, counts), real_rows(counts, rows.device)

    def own_words(self, captions: slice) -> Tensor:
        """Words (words, D) of consecutive captions of the share."""
        first = self._words_before(self.shares.mine.captions.start)
        return self.words[self._words_before(captions.start) - first : self._words_before(captions.stop) - first]

    def words_of(self, captions: slice) -> Tensor:
        """Words (words, D) of consecutive captions of the split, which all processes have to ask for."""
        if len(self.shares.parts) == 1:
            return self.own_words(captions)
        first = self._words_before(captions.start)
        words = self.words.new_empty(self._words_before(captions.stop) - first, self.words.shape[1])
        for owner, share in enumerate(self.shares.parts):
            owned = overlap(captions, share.captions)
            if count(owned):
                piece = words[self._words_before(owned.start) - first : self._words_before(owned.stop) - first]
                if owner == self.shares.own:
                    piece.copy_(self.own_words(owned))
                collectives.broadcast(piece, owner)
        return words

    def _words_before(self, caption: int) -> int:
        return int(self.lengths[:caption].sum())


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
        img_dim = self.model.image_encoder.img_dim
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
        counts = torch.tensor([len(image) for image in images])
        batches = (slice(first, first + batch_size) for first in range(0, len(images), batch_size))
        regions = self.embed_images((Images(torch.cat(images[some]), counts[some]) for some in batches), counts)
        tokens = self.tokenizer.tokenize(list(captions))
        words, lengths = self.embed_captions(tokens, [slice(0, len(captions))], batch_size)
        embeddings = Embeddings(regions, counts, words, lengths, unshared(len(images), len(captions)))
        return gather_scores(score_strips(self.scorer(), embeddings), embeddings).cpu()

    @torch.inference_mode()
    def embed_images(self, batches: Iterable[Images], counts: Tensor) -> Tensor:
        """Region embeddings (regions, D) of images one after the other, on the device, float32.

        counts: (images,) regions of each.
        """
        dims, end = self.model.image_encoder.width, 0
        embedded = torch.empty(int(counts.sum()), dims, device=self.compute.device)
        for images in with_bar(batches, "images"):
            features = images.images.to(self.compute.device, non_blocking=True).float()
            begin, end = end, end + len(features)
            with self.compute.autocast():
                padded, of_each = self.model.encode_images(features, images.counts)
            real = real_rows(of_each, padded.device)
            embedded[begin:end] = padded.flatten(0, 1) if real is None else padded[real]
        return embedded

    @torch.inference_mode()
    def embed_captions(
        self, captions: TokenizedCaptions, groups: Sequence[slice], batch_size: int
    ) -> tuple[Tensor, Tensor]:
        """Word embeddings (words, D) of some captions one after the other, on the device; lengths (captions,) of all.

        groups: consecutive captions to encode, one group after the other. Captions of like length of a group are
        encoded together, so that little is padded.
        """
        lengths = torch.from_numpy(self.tokenizer.pad(captions)[1])
        batches = [
            group.start + some for group in groups for some in lengths[group].argsort(stable=True).split(batch_size)
        ]
        encoded = slice(groups[0].start, groups[-1].stop) if groups else slice(0, 0)
        starts = lengths.cumsum(0) - lengths - lengths[: encoded.start].sum()
        dims = self.model.text_encoder.width
        words = torch.empty(int(lengths[encoded].sum()), dims, device=self.compute.device)
        for batch in with_bar(batches, "captions"):
            ids, _ = self.tokenizer.pad(captions.select(batch.numpy()))
            with self.compute.autocast():
                embedded = self.model.encode_captions(torch.from_numpy(ids).to(words.device), lengths[batch])
            places = ranges(starts[batch].numpy(), lengths[batch].numpy())
            words[torch.from_numpy(places).to(words.device)] = embedded
        return words, lengths

    def scorer(self, coarse: bool = False) -> Scorer:
        """What scores embeddings in this matcher's precision; see Similarity.scorer."""
        return make_scorer(self.model.engine, self.compute, coarse)


def make_scorer(engine: TiledEngine | PlainEngine, compute: Compute, coarse: bool = False) -> Scorer:
    """What scores embeddings in a precision; it needs no encoder. coarse: see Similarity.scorer."""
    with compute.autocast():
        return engine.scorer(coarse)


def score_strips(scorer: Scorer, embeddings: Embeddings) -> Strips:
    """Scores of own images and all captions, a chunk of captions at a time, on their device.

    Images of a block that differ in their number of regions are scored with those that have like numbers.
    """
    of_images, of_captions = blocks(len(embeddings.counts)), chunks(len(embeddings.lengths))
    steps = with_bar(range(len(of_images) * len(of_captions)), "scores")
    for chunk in of_captions:
        yield chunk.start, _score_chunk(scorer, embeddings, chunk, zip(of_images, steps, strict=False))


def _score_chunk(scorer: Scorer, embeddings: Embeddings, chunk: slice, steps: Iterable[tuple[slice, int]]) -> Tensor:
    """Scores (own images, captions) of a chunk."""
    words, lengths = embeddings.words_of(chunk), embeddings.lengths[chunk]
    scores = words.new_empty(len(embeddings.counts), len(lengths))
    for block, _ in steps:
        for images in _of_like_counts(embeddings.counts[block]):
            regions, real = embeddings.padded(block.start + images)
            scores[(block.start + images).to(scores.device)] = scorer.all_pairs(regions, words, lengths, real)
    return scores


def gather_scores(strips: Strips, embeddings: Embeddings) -> Tensor:
    """All scores (images, captions), on every process: this memory does not fall with the number of processes."""
    shares, every = embeddings.shares, None
    for first, scores in strips:
        scores = shares.gather_images(scores)
        if every is None:
            every = scores.new_empty(len(scores), len(embeddings.lengths))
        every[:, first : first + scores.shape[1]] = scores
    return every


def score_true_pairs(scorer: Scorer, embeddings: Embeddings, image_of_caption: np.ndarray) -> Tensor:
    """Scores (captions,) of each caption and its own image, on every process. image_of_caption: (captions,)."""
    scores = [embeddings.words.new_empty(0)]
    for images, captions in with_bar(blocks_of(embeddings.shares.mine, image_of_caption), "true pairs"):
        block = within(images, embeddings.shares.mine.images)
        regions, real = embeddings.padded(torch.arange(block.start, block.stop))
        pairs = torch.from_numpy(image_of_caption[captions] - images.start), torch.arange(count(captions))
        words, lengths = embeddings.own_words(captions), embeddings.lengths[captions]
        scores.append(scorer.pairs(regions, words, lengths, *pairs, real))
    return embeddings.shares.gather_captions(torch.cat(scores))


def pool(embeddings: Embeddings) -> tuple[Tensor, Tensor]:
    """The mean region of each image (images, D) and the mean word of each caption (captions, D), as unit vectors.

    On every process. X-Dim itself scores images against captions only: this is what compares two of a kind.
    """
    shares = embeddings.shares
    lengths = embeddings.lengths[shares.mine.captions]
    images, captions = (
        F.normalize(torch.segment_reduce(rows, "mean", lengths=of_each.to(rows.device)), dim=1)
        for rows, of_each in ((embeddings.regions, embeddings.counts), (embeddings.words, lengths))
    )
    return shares.gather_images(images), shares.gather_captions(captions)


def score_pairs(scorer: Scorer, embeddings: Embeddings, images: Tensor, captions: Tensor) -> Tensor:
    """Scores (P,) of chosen pairs, given as indices (P,) of images and of captions, on every process.

    All processes have to ask for the same pairs.
    """
    images, captions = images.cpu() - embeddings.shares.mine.images.start, captions.cpu()
    of_images, of_captions = blocks(len(embeddings.counts)), chunks(len(embeddings.lengths))
    steps = with_bar(range(len(of_images) * len(of_captions)), "exact scores")
    scores = embeddings.words.new_zeros(len(images))
    for chunk in of_captions:
        of_chunk = _inside(captions, chunk)
        words, lengths = embeddings.words_of(chunk) if len(of_chunk) else None, embeddings.lengths[chunk]
        for block, _ in zip(of_images, steps, strict=False):
            some = of_chunk[_inside(images[of_chunk], block)]
            if len(some):
                regions, real = embeddings.padded(torch.arange(block.start, block.stop))
                pairs = images[some] - block.start, captions[some] - chunk.start
                scores[some.to(scores.device)] = scorer.pairs(regions, words, lengths, *pairs, real)
    return embeddings.shares.add_up(scores)


def _inside(numbers: Tensor, part: slice) -> Tensor:
    """Indices of the numbers that are in a part, ascending."""
    return ((numbers >= part.start) & (numbers < part.stop)).nonzero().squeeze(1)


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
    about = {name: content[name] for name in ("settings", "progress", "architecture", "data") if name in content}
    return Matcher(model, tokenizer, compute, {**about, "path": path})
