"""From images and captions to scores: a trained model embeds both and scores every pair, exactly or coarse to fine.

I images, C captions, R regions of an image, W words of a caption, D shared dimensions. Images are embedded and scored
in blocks, captions are embedded in groups, whatever the number of processes. Each process takes whole blocks and groups
and leaves zeros where others compute; the sum is the same to the last bit on any number of processes.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from torch.utils.data import Subset

from lib import collectives
from lib.checkpoints.native import build_model, find_checkpoint, read_checkpoint, trained_encoder
from lib.cli import InputError, reason, refusing, with_bar
from lib.config import ENGINES, PRECISIONS
from lib.data.batches import ImageBatches, Images, loader
from lib.data.dataset import Split
from lib.data.features import ranges
from lib.data.images import Look, NotAPicture, Size, load_picture
from lib.data.tokenizer import TokenizedCaptions, Tokenizer
from lib.evaluation.metrics import RECALL_AT, Part, Ranks, rank_parts
from lib.model.engine import CombinedScorer
from lib.model.layers import Shard, real_rows, upload
from lib.model.pooling import MeanPooling
from lib.model.vision import Regions, VisionModel, load_recorded
from lib.model.xdim import XDim
from lib.runtime import Compute, choose_compute

BLOCK = 64  # images
SEEN = 8  # pictures that a vision model takes at a time
CHUNK = {"cpu": 512, "cuda": 4096}  # captions prepared for the scorer at a time, by kind of device


class Block(NamedTuple):
    """Embeddings of consecutive images."""

    images: slice
    regions: Tensor  # (n, R, D) with R the most regions of an image in the block
    real: Tensor | None  # (n, R), False for padding, whose rows may hold anything; None if nothing is padded


class Embeddings(NamedTuple):
    """A split in the shared dimensions, on the device: this process's images, and all captions."""

    blocks: list[Block]
    images: int  # of the whole split
    words: Tensor  # (sum of W, D), the words of all captions one after the other
    lengths: Tensor  # (C,) words of each caption, on the CPU
    shard: Shard

    def pieces(self, scorer: Any) -> Iterator[tuple[slice, Any, Block]]:
        """Consecutive captions, the same prepared for the scorer, and each block of images with them."""
        lengths, first = self.lengths.split(CHUNK[self.words.device.type]), 0
        for some, words in zip(lengths, self.words.split([int(some.sum()) for some in lengths]), strict=True):
            captions, chunk = slice(first, first := first + len(some)), scorer.captions(words, some)
            yield from ((captions, chunk, block) for block in self.blocks)


class Matcher:
    """A trained model in evaluation mode. content: the checkpoint's, without weights."""

    def __init__(
        self, model: XDim, tokenizer: Tokenizer, compute: Compute, content: Any = None, image_weights: str = ""
    ):
        """image_weights: file of the weights that made the regions, where they were not the library's own."""
        self.model, self.image_weights = model.to(compute.device).eval(), image_weights
        self.tokenizer, self.compute, self.content = tokenizer, compute, content or {}

    def score(self, images: Iterable, captions: Sequence[str], batch_size: int = 128) -> Tensor:
        """Scores (images, captions) float32 on the CPU.

        images: paths of pictures or PIL pictures; or, for models of region features, these features (images, R,
        img_dim) as array or tensor, or a list of (R, img_dim) with any R. captions: plain sentences. Raises InputError
        if shapes do not fit, features are NaN or infinite, or the model is not one for pictures.
        """
        sentences = [] if isinstance(captions, str) or captions is None else [*captions]
        if not sentences or not all(isinstance(one, str) for one in sentences):
            raise InputError("captions: expected a list of one sentence or more")
        prepared, size = [features for features, _ in self.take(images)], min(batch_size, BLOCK)
        batches = (self.batch(prepared[first : first + size]) for first in range(0, len(prepared), size))
        words, lengths = self.embed_captions(self.tokenizer.tokenize(sentences), batch_size)
        blocks = self.embed_images(batches)
        with self.compute.in_force():
            return score_all(self.scorer(), Embeddings(blocks, len(prepared), words, lengths, Shard(len(blocks))))

    @torch.inference_mode()
    def dependency(self) -> Tensor | None:
        """The dependency matrix D (D, D); None where dimensions count as independent, or are not compared at all."""
        return getattr(self.model.similarity, "dependency", lambda: None)()

    @cached_property
    def vision(self) -> VisionModel:
        """What pictures go through: the model's own, or what made the regions it was trained on. Raises InputError."""
        if self.model.vision:
            return self.model.vision
        record = trained_encoder(self.content)
        if not record:
            what = "images: nothing says which program made the regions that this model was trained on"
            shape = f"(images, regions, {self.model.image_encoder.img_dim})"
            raise InputError(f"{what}; give such regions, as arrays {shape}")
        where = "load(..., image_weights=FILE) says where its weights are now"
        with refusing(f"images: the model's regions were made by {record['encoder']}; {where}"):
            return load_recorded(record, self.image_weights).to(self.compute.device).eval()

    def take(self, images: Iterable) -> list[tuple[Tensor, Tensor | None]]:
        """What the model takes of images, as `score` gets them; boxes (R, 4), None for features. Raises InputError."""
        listed: list[Any] = [*images] if isinstance(images, Iterable) and not isinstance(images, str) else []
        if not listed:
            raise InputError("images: expected a list of one path or PIL picture or more, or regions of as many images")
        if not all(isinstance(image, str | Path | PIL.Image.Image) for image in listed):
            if look_of(self.model):
                raise InputError("images: this model starts from pixels: expected paths of pictures, or PIL pictures")
            return [(features, None) for features in self._check_regions(listed)]
        preprocessing, seen = self.vision.preprocessing, []
        for part in with_bar([listed[first : first + SEEN] for first in range(0, len(listed), SEEN)], "pictures"):
            seen += self.see(*zip(*(_load(image, preprocessing) for image in part), strict=True))
        return [(one.features, one.boxes) for one in seen]

    @torch.inference_mode()
    def see(self, pixels: Sequence[Tensor], sizes: Sequence[Size]) -> list[Regions]:
        """What the model takes of loaded pictures of some (height, width): pixels (3, H, W), or regions (R, img_dim) as
        `prepare images` makes them; with boxes (R, 4) in the pictures."""
        if vision := self.model.vision:
            boxes = [vision.boxes * torch.tensor([width, height, width, height]) for height, width in sizes]
            return [Regions(*pair) for pair in zip(pixels, boxes, strict=True)]
        with self.compute.in_force(), self.compute.autocast():
            regions = self.vision.describe(pixels, sizes)
        return [Regions(one.features.half().cpu(), one.boxes.cpu()) for one in regions]

    def _check_regions(self, listed: Sequence[Any]) -> list[Tensor]:
        img_dim = self.model.image_encoder.img_dim
        try:
            images = [torch.as_tensor(image) for image in listed]
            if any(image.is_complex() or image.dtype == torch.bool for image in images):
                raise TypeError("complex or bool")
            images = [image if image.dtype == torch.float16 else image.float() for image in images]
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"images: expected (images, regions, {img_dim}) numbers ({reason(error)})") from None
        if any(image.ndim != 2 or image.shape[1] != img_dim or not len(image) for image in images):
            found = sorted({tuple(image.shape) for image in images})
            raise InputError(f"images: expected (images, regions, {img_dim}), found {len(images)} images of {found}")
        if not all(image.isfinite().all() for image in images):
            raise InputError("images: NaN or infinite features")
        return images

    def batch(self, part: Sequence[Tensor]) -> Images:
        """A batch of what `see` or the caller gave."""
        if look := look_of(self.model):
            return Images(torch.stack([*part]), torch.full((len(part),), look.cells))
        return Images(torch.cat([*part]), torch.tensor([len(image) for image in part]))

    @torch.inference_mode()
    def embed_images(self, batches: Iterable[Images], first: int = 0) -> list[Block]:
        """A block of each batch of images, in order. first: number of the first image."""
        blocks = []
        for images, counts in with_bar(batches, "images"):
            images = upload(images, self.compute.device)
            with self.compute.in_force(), self.compute.autocast():
                regions, counts = self.model.encode_images(images, counts)
            blocks.append(Block(slice(first, first := first + len(counts)), regions, real_rows(counts, regions.device)))
        return blocks

    @torch.inference_mode()
    def embed_captions(
        self, captions: TokenizedCaptions, batch_size: int, share: Callable = Shard
    ) -> tuple[Tensor, Tensor]:
        """Words (sum of W, D) on the device, lengths (C,) on the CPU. share: divides groups among processes."""
        lengths = torch.as_tensor(self.tokenizer.pad(captions)[1])
        groups = lengths.argsort(stable=True).split(batch_size)  # of like length, so that little is padded
        starts = lengths.cumsum(0) - lengths
        shard, mixed = share(len(groups)), np.random.default_rng(0).permutation(len(groups))  # short and long for all
        words = torch.zeros(int(lengths.sum()), self.model.text_encoder.width, device=self.compute.device)
        for group in with_bar([groups[k] for k in mixed[shard.own]], "captions"):
            ids = torch.as_tensor(self.tokenizer.pad(captions.select(group.numpy()))[0])
            with self.compute.in_force(), self.compute.autocast():
                embedded = self.model.encode_captions(upload(ids, words.device), lengths[group])
            places = ranges(starts[group].numpy(), lengths[group].numpy())
            words[upload(torch.from_numpy(places), words.device)] = embedded
        return shard.sum(words), lengths

    def scorer(self, coarse: bool = False) -> Any:
        """Scores embeddings in this matcher's precision. coarse: a cheaper score that ranks almost alike."""
        with self.compute.in_force(), self.compute.autocast():
            return self.model.engine.scorer(coarse)


def _load(image: Any, preprocessing: Any) -> tuple[Tensor, tuple[int, int]]:
    try:
        return load_picture(image, preprocessing)
    except NotAPicture as error:
        raise InputError(f"images: {image}: {error}") from None


def look_of(model: XDim) -> Look | None:
    """What a model that starts from pixels takes of a picture; None for models of region features."""
    return model.vision and Look(model.vision.preprocessing, model.vision.regions)


def load(
    checkpoint: str | Path, bert: str, device: str, precision: str, engine: str, image_weights: str = ""
) -> Matcher:
    """See `lib.load`."""
    for name, value, known in (("precision", precision, PRECISIONS), ("engine", engine, ENGINES)):
        if value and value not in known:
            raise InputError(f"--{name} {value}: expected {' or '.join(known)}")
    compute, path = choose_compute(device, precision), find_checkpoint(str(checkpoint))
    content = read_checkpoint(path, mapped=True)
    model, tokenizer = build_model(content, bert)
    model.use_engine(engine := engine or content["settings"].get("engine") or "tiled")
    notes = content["notes"] + ["scored by the plain formula (--engine plain)"] * (engine == "plain")
    content = {**content, "model": None, "notes": notes}
    return Matcher(model, tokenizer, compute, content, image_weights)


def embed_split(
    matcher: Matcher, split: Split, captions: TokenizedCaptions, batch_size: int, workers: int
) -> Embeddings:
    """Embed every image and caption of a split once. All processes of a job must call this."""
    size = min(batch_size, BLOCK)
    batches = ImageBatches(split.features, size, matcher.compute.half_features, look_of(matcher.model))
    shard = collectives.shard(len(batches))
    own = Subset(batches, range(len(batches))[shard.own])
    blocks = matcher.embed_images(loader(own, workers, matcher.compute.device), first=size * shard.own.start)
    words, lengths = matcher.embed_captions(captions, batch_size, collectives.shard)
    return Embeddings(blocks, len(split.features), words, lengths, shard)


def score_all(scorer: Any, embeddings: Embeddings) -> Tensor:
    """Scores (I, C) of all pairs, on the CPU of every process."""
    scores = embeddings.words.new_zeros(embeddings.images, len(embeddings.lengths))
    number = -(-len(embeddings.lengths) // CHUNK[scores.device.type]) * len(embeddings.blocks)
    for captions, chunk, block in with_bar(embeddings.pieces(scorer), "scores", number):
        scores[block.images, captions] = scorer.all_pairs(block.regions, chunk, block.real)
    return embeddings.shard.sum(scores).cpu()


def score_pairs(pairs: Callable, embeddings: Embeddings, images: Tensor, captions: Tensor, added: Any = None) -> Tensor:
    """Scores (P,) of pairs, indices (P,) of images and captions, by a scorer's `pairs`, plus theirs of added (I, C)."""
    scores = embeddings.words.new_zeros(len(images))
    for block in with_bar(embeddings.blocks, "exact scores"):
        some = ((images >= block.images.start) & (images < block.images.stop)).nonzero().squeeze(1)
        if len(some):
            chosen = images[some] - block.images.start, captions[some]
            exact = pairs(block.regions, embeddings.words, embeddings.lengths, *chosen, block.real)
            scores[upload(some, scores.device)] = exact
    scores = embeddings.shard.sum(scores).cpu()
    return scores if added is None else scores + added[images, captions]


@torch.inference_mode()
def pool(pooling: MeanPooling, embeddings: Embeddings) -> tuple[Tensor, Tensor]:
    """The unit vectors of each image (I, D) and of each caption (C, D), on the CPU of every process.

    X-Dim scores images against captions only; this is what compares two images, or two captions, and finds what X-Dim
    then ranks. pooling: a model's. Call it without autocast.
    """
    words, lengths = embeddings.words, embeddings.lengths
    some = lengths.split(CHUNK[words.device.type])
    parts = zip(words.split([int(part.sum()) for part in some]), some, strict=True)
    captions = torch.cat([pooling.pool_captions(*part) for part in parts])
    images = captions.new_zeros(embeddings.images, captions.shape[1])
    for block in embeddings.blocks:
        images[block.images] = pooling.pool_images(block.regions, block.real)
    return embeddings.shard.sum(images).cpu(), captions.cpu()


def coarse_and_exact(scorer: Any, coarse_scorer: Any, embeddings: Embeddings) -> tuple[Tensor, Callable]:
    """Cheap scores (I, C) of all pairs, a global head's where there is one, and what scores chosen pairs exactly."""
    if not isinstance(scorer, CombinedScorer):
        return score_all(coarse_scorer, embeddings), partial(score_pairs, scorer.pairs, embeddings)
    images, captions = pool(scorer.head, embeddings)
    coarse = images @ captions.T
    added = scorer.weight.cpu() * coarse
    return coarse, partial(score_pairs, scorer.own.pairs, embeddings, added=added)


class Reranker:
    """Ranks by a cheap score of all pairs and the exact score of the best K of each query.

    The K best by coarse score are put in the order of their exact scores; all others stay behind them, in coarse order.
    """

    def __init__(self, coarse: Tensor, exact: Callable, image_of_caption: np.ndarray, parts: list[Part]):
        """coarse: (I, C). exact: images (P,), captions (P,) -> scores (P,); it is asked for no pair twice."""
        self.coarse, self.score_pairs, self.parts = coarse, exact, parts
        self.image_of_caption = torch.from_numpy(image_of_caption)
        self.coarse_ranks = rank_parts(coarse.numpy(), image_of_caption, parts)
        self.exact = torch.full_like(coarse, float("nan"))  # (I, C), NaN where not computed yet
        self.exact_pairs = 0  # that have been computed

    def ranks_until_stable(self) -> tuple[list[Ranks], int]:
        """Double K until no query enters or leaves the first 1, 5 or 10 any more. Returns the last K too."""
        k = max(RECALL_AT)
        ranks = self.ranks(k)
        while k < max(self.coarse.shape):
            k, before, ranks = 2 * k, ranks, self.ranks(2 * k)
            if np.array_equal(_recalled(before), _recalled(ranks)):
                break
        return ranks, k

    def ranks(self, k: int) -> list[Ranks]:
        """The ranks within each part, with the best k of each query in exact order. Raises InputError on NaN."""
        return [self._rank(part, coarse, k) for part, coarse in zip(self.parts, self.coarse_ranks, strict=True)]

    def _rank(self, part: Part, coarse_ranks: Ranks, k: int) -> Ranks:
        scores, exact = self.coarse[part], self.exact[part]
        is_right = self.image_of_caption[part.captions] == torch.arange(part.images.start, part.images.stop)[:, None]
        best = []  # whether each item is among the query's best, for i2t and t2i
        for dim in (1, 0):
            places = scores.topk(min(k, scores.shape[dim]), dim=dim).indices
            best.append(torch.zeros_like(is_right).scatter_(dim, places, True))
        images, captions = ((best[0] | best[1]) & exact.isnan()).nonzero(as_tuple=True)
        found = self.score_pairs(images + part.images.start, captions + part.captions.start).to(exact)
        if found.isnan().any():
            raise InputError("the exact scores hold NaN: the checkpoint or the features are damaged")
        exact[images, captions] = found  # `exact` is a view
        self.exact_pairs += len(found)
        ranks = []
        for dim, is_best, of_coarse in zip((1, 0), best, coarse_ranks, strict=True):
            right = exact.masked_fill(~(is_best & is_right), float("-inf")).amax(dim, keepdim=True)
            before = (is_best & ~is_right & (exact >= right)).sum(dim)
            ranks.append(np.where((is_best & is_right).any(dim), before, of_coarse))
        return Ranks(*ranks)


def _recalled(ranks: Sequence[Ranks]) -> np.ndarray:
    """For which K of R@K each query of each part counts."""
    return np.searchsorted(RECALL_AT, np.concatenate([of_way for part in ranks for of_way in part]), side="right")
