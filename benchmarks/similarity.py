"""Scoring images against captions: each way of it against the plain formula, in one run.

    python benchmarks/similarity.py

Times are a pair's: the plain formula, a loop over captions, is measured on all images and some captions, exact scores,
as in an evaluation, on some images and all captions, the coarse-to-fine ranking on all of both. A round measures
everything once; a ratio is the median of the rounds' ratios. The machine's rate of products is the best of several
sizes, before and after.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common
from lib.evaluation.metrics import parts_of_split
from lib.evaluation.score import BLOCK, Reranker
from lib.model.engine import make_engine


def main() -> None:
    flags = common.parser(__doc__.splitlines()[0])
    flags.add_argument("--images", type=int, default=1000, help="images")
    flags.add_argument("--captions", type=int, default=1000, help="captions")
    flags.add_argument("--some", type=int, default=BLOCK, help="images on which exact scores are measured")
    flags.add_argument("--loop", type=int, default=8, help="captions on which the loop is measured")
    flags.add_argument("--rerank", type=int, default=20, help="K of the coarse-to-fine ranking")
    settings = flags.parse_args()
    rounds = [measure(settings) for _ in range(settings.rounds)]
    report(settings, rounds)


@torch.no_grad()
def measure(settings) -> dict:
    """Seconds a pair of each way, rates of products, differences of scores."""
    device, dims = settings.device, settings.embed_size
    regions, words, lengths = common.random_embeddings(settings.images, settings.captions, dims, device)
    similarity = common.random_similarity(dims, device)
    engine = make_engine("tiled", similarity)
    seconds, scores, rates = {}, {}, {}

    few = lengths[: settings.loop]
    time, scores["loop"] = common.clock(lambda: similarity(regions, words[: int(few.sum())], few), device)
    # a caption's share of the words, not of the captions: the first ones may be longer or shorter
    seconds["loop"] = time / (settings.images * few.sum().item())

    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        before = common.product_rate(dims, dtype, device)
        with torch.autocast(device, dtype, enabled=dtype == torch.bfloat16):
            time, scores[name] = common.clock(
                lambda: engine.scorer().all_pairs(regions[: settings.some], words, lengths),
                device,
            )
        seconds[name] = time / (settings.some * lengths.sum().item())
        rates[name] = max(before, common.product_rate(dims, dtype, device))

    time, reranker = common.clock(lambda: coarse_to_fine(settings, similarity, regions, words, lengths), device)
    seconds["coarse"] = time / (settings.images * lengths.sum().item())
    return {
        "seconds": seconds,
        "rates": rates,
        "exact_share": reranker.exact_pairs / reranker.coarse.numel(),
        "differences": {
            name: (scores[name][:, : settings.loop] - scores["loop"][: settings.some]).abs().max().item()
            for name in ("float32", "bfloat16")
        },
    }


def coarse_to_fine(settings, similarity, regions, words, lengths) -> Reranker:
    image_of_caption = torch.arange(settings.captions) * settings.images // settings.captions
    engine = make_engine("tiled", similarity)
    exact = engine.scorer()

    def score_pairs(images, captions):
        return exact.pairs(regions, words, lengths, images, captions)

    coarse = engine.scorer(coarse=True).all_pairs(regions, words, lengths)
    image_of_caption = image_of_caption.numpy()
    reranker = Reranker(coarse.cpu(), score_pairs, image_of_caption, parts_of_split(image_of_caption))
    reranker.ranks(settings.rerank)
    return reranker


def report(settings, rounds: list[dict]) -> None:
    dims = settings.embed_size
    words_of_pair = 14
    rows, figures = [], {}
    for way in ("loop", "float32", "bfloat16", "coarse"):
        seconds = common.median(one["seconds"][way] for one in rounds)
        ratio = common.median(one["seconds"]["loop"] / one["seconds"][way] for one in rounds)
        share = difference = float("nan")
        if way in ("float32", "bfloat16"):
            share = common.median(common.scoring_work(dims) / one["seconds"][way] / one["rates"][way] for one in rounds)
            difference = max(one["differences"][way] for one in rounds)
        figures[way] = {"seconds_a_word_and_image": seconds, "ratio": ratio, "share": share, "difference": difference}
        name = {"coarse": f"float32, coarse, best {settings.rerank} exact"}.get(way, way)
        rows.append(
            [
                name,
                f"{seconds * 1e6 * words_of_pair:.1f}",
                f"{ratio:.2f}",
                "" if share != share else f"{100 * share:.0f} %",
                "" if difference != difference else f"{difference:.1e}",
            ]
        )
    title = (
        f"{settings.images} images x {settings.captions} captions, {common.REGIONS} regions, {dims} dimensions, "
        f"median of {len(rounds)} rounds"
    )
    columns = ["scores", "µs a pair of 14 words", "times the loop", "of the product rate", "largest difference"]
    common.show(title, columns, rows, settings.device)
    rate, half = (common.median(one["rates"][name] for one in rounds) / 1e9 for name in ("float32", "bfloat16"))
    print(f"\nmatrix products: float32 {rate:.0f}, bfloat16 {half:.0f} GFLOP/s")
    print(f"scored exactly after the coarse scores: {100 * rounds[0]['exact_share']:.1f} % of the pairs")
    common.write_json(settings.json, {"figures": figures, "rounds": rounds}, settings.device)


if __name__ == "__main__":
    main()
