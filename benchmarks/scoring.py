"""Scoring whole splits on one device, from embeddings to ranks: Flickr30K's test split, COCO's 5K one.

    python benchmarks/scoring.py                       # on a CPU name a smaller --sizes

Embeddings are random, in the blocks and chunks of an evaluation (lib/evaluation/score.py). They are scored in three
ways: every pair exactly; every pair coarsely and the best K of each query exactly, as eval.py --rerank K does; the same
with the cosines of a global head for coarse scores. Memory is the peak, embeddings included.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common
from lib.evaluation.metrics import parts_of_split, rank_matrix
from lib.evaluation.score import BLOCK, Block, Embeddings, Reranker, coarse_and_exact, score_all
from lib.model.engine import make_engine
from lib.model.layers import Shard
from lib.model.pooling import GpoHead
from lib.runtime import choose_compute


def main() -> None:
    flags = common.parser(__doc__.splitlines()[0])
    flags.add_argument(
        "--sizes", type=int, nargs="+", default=[1000, 5000], help="numbers of images, five captions each"
    )
    flags.add_argument("--rerank", type=int, default=20, help="K of the coarse-to-fine ranking")
    flags.add_argument("--skip", type=int, default=0, help="of the three ways, leave out so many of the first")
    flags.add_argument("--precision", default="bf16", help="of the products")
    flags.set_defaults(rounds=1)
    settings = common.parse(flags, sizes=[8], rerank=2)
    compute = choose_compute(settings.device, settings.precision)
    similarity = common.random_similarity(settings.embed_size, settings.device)
    with compute.in_force(), compute.autocast(), torch.no_grad():
        head, best, figures = GpoHead(settings.embed_size).to(settings.device), f"best {settings.rerank}", {}
        alone, headed = make_engine("tiled", similarity), make_engine("tiled", similarity, head)
        ways = {
            "all pairs": (all_pairs, alone, settings.embed_size),
            best: (coarse_to_fine, alone, settings.embed_size),
            f"{best} by a global head": (coarse_to_fine, headed, head.width),
        }
        ways = {name: ways[name] for name in list(ways)[settings.skip :]}
        for way, engine, width in ways.values():  # kernels are compiled and libraries loaded at their first use
            way(settings, engine, random_split(settings, 2 * BLOCK if settings.device == "cuda" else 2, width))
        for images in settings.sizes:
            for name, (way, engine, width) in ways.items():
                split = random_split(settings, images, width)
                rounds = [measure(settings, way, engine, split) for _ in range(settings.rounds)]
                medians = {key: common.median(one[key] for one in rounds) for key in rounds[0]}
                figures[f"{images} x {5 * images}, {name}"] = medians
                common.write_json(settings.json, {"figures": figures}, settings.device)
    report(settings, figures)


def random_split(settings, images: int, dims: int) -> Embeddings:
    device, generator = settings.device, torch.Generator().manual_seed(0)
    lengths = common.random_lengths(5 * images, generator)
    words = F.normalize(torch.randn(int(lengths.sum()), dims, device=device), dim=-1)
    slices = [slice(first, min(first + BLOCK, images)) for first in range(0, images, BLOCK)]
    blocks = [
        Block(some, F.normalize(torch.randn(some.stop - some.start, common.REGIONS, dims, device=device), dim=-1), None)
        for some in slices
    ]
    return Embeddings(blocks, images, words, lengths, Shard(len(blocks)))


def measure(settings, way, engine, split: Embeddings) -> dict[str, float]:
    common.start_peak_memory(settings.device)
    score_seconds, rank_seconds = way(settings, engine, split)
    pairs = split.images * len(split.lengths)
    seconds = score_seconds + rank_seconds
    figures = {"scores_seconds": score_seconds, "ranks_seconds": rank_seconds, "pairs_a_second": pairs / seconds}
    return {**figures, "bytes": common.peak_memory(settings.device)}


def all_pairs(settings, engine, split: Embeddings) -> tuple[float, float]:
    """Seconds for the scores, and for the ranks."""
    image_of_caption = np.arange(len(split.lengths)) // 5
    score_seconds, scores = common.clock(lambda: score_all(engine.scorer(), split), settings.device)
    rank_seconds, _ = common.clock(lambda: rank_matrix(scores.numpy(), image_of_caption), settings.device)
    return score_seconds, rank_seconds


def coarse_to_fine(settings, engine, split: Embeddings) -> tuple[float, float]:
    """Seconds for the coarse scores, and for the ranks, which ask for exact scores."""
    image_of_caption = np.arange(len(split.lengths)) // 5
    scorers = engine.scorer(), engine.scorer(coarse=True)
    with torch.autocast(settings.device, enabled=False):
        score_seconds, found = common.clock(lambda: coarse_and_exact(*scorers, split), settings.device)

    def rank():
        return Reranker(*found, image_of_caption, parts_of_split(image_of_caption)).ranks(settings.rerank)

    rank_seconds, _ = common.clock(rank, settings.device)
    return score_seconds, rank_seconds


def report(settings, figures: dict[str, dict]) -> None:
    rows = []
    for name, one in figures.items():
        cells = [f"{one['scores_seconds']:.2f}", f"{one['ranks_seconds']:.2f}", f"{one['pairs_a_second'] / 1e6:.1f}"]
        rows.append([name, *cells, f"{one['bytes'] / 1e9:.1f}"])
    title = f"images x captions, {common.REGIONS} regions, {settings.embed_size} dimensions, {settings.precision}"
    common.show(title, ["", "scores s", "ranks s", "million pairs/s", "GB"], rows, settings.device)


if __name__ == "__main__":
    main()
