"""Encoding a split once, each process of a job its share, and clocks for the parts of an evaluation."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.utils.data import Subset

from lib.data.batches import ImageBatches, loader
from lib.data.dataset import Split
from lib.data.tokenizer import TokenizedCaptions
from lib.evaluation.matcher import Embeddings, Matcher
from lib.evaluation.parts import blocks_of, images_at_a_time, share_out


@dataclass
class Timing:
    """Seconds of each part of an evaluation. `compile_s` is 0: nothing is compiled."""

    load_s: float = 0.0
    encode_s: float = 0.0
    compile_s: float = 0.0
    similarity_s: float = 0.0  # all pairs, exactly or coarsely
    rank_s: float = 0.0  # with --rerank the exact scores too
    protocols_s: float = 0.0  # intervals, --eccv, --ranks

    @contextmanager
    def clock(self, part: str) -> Iterator[None]:
        """Within this context time counts as that of a part."""
        started = time.perf_counter()
        yield
        setattr(self, part, getattr(self, part) + time.perf_counter() - started)

    def __str__(self) -> str:
        return ", ".join(f"{name.removesuffix('_s')} {value:.1f}" for name, value in vars(self).items())


def embed_split(
    matcher: Matcher, split: Split, captions: TokenizedCaptions, batch_size: int, workers: int, timing: Timing
) -> Embeddings:
    """Encode every image and caption of a split once: each process those of its share."""
    with timing.clock("encode_s"):
        shares = share_out(len(split.features), split.image_of_caption)
        own, size = shares.mine.images, images_at_a_time(batch_size)
        counts = torch.from_numpy(split.features.counts[own])
        batches = ImageBatches(split.features, size, matcher.compute.half_features)
        images = Subset(batches, range(own.start // size, -(-own.stop // size)))
        regions = matcher.embed_images(loader(images, workers, matcher.compute.device), counts)
        groups = [block.captions for block in blocks_of(shares.mine, split.image_of_caption)]
        embeddings = Embeddings(regions, counts, *matcher.embed_captions(captions, groups, batch_size), shares)
        matcher.compute.synchronize()
    return embeddings
