"""Scoring images against captions: each way of it against the plain formula, in one run.

    python benchmarks/similarity.py

Times are a pair's: the plain formula, a loop over captions, is measured on all images and some captions, exact scores,
as in an evaluation, on some images (on a GPU on all) and all captions, the coarse-to-fine ranking on all of both. A
round measures everything once; a ratio is the median of the rounds' ratios to the loop in float32. The machine's rate
of products is the best of several sizes, before and after.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common
from lib.evaluation.metrics import parts_of_split
from lib.evaluation.score import BLOCK, Reranker
from lib.model.engine import make_engine
from lib.runtime import choose_compute

PRECISIONS = {"float32": "fp32", "tf32": "tf32", "bfloat16": "bf16"}
WORDS = 14  # of a caption
DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16}


def main() -> None:
    flags = common.parser(__doc__.splitlines()[0])
    flags.add_argument("--images", type=int, default=1000, help="images")
    flags.add_argument("--captions", type=int, default=1000, help="captions")
    flags.add_argument("--some", type=int, default=0, help="images on which exact scores are measured")
    flags.add_argument("--loop", type=int, default=8, help="captions on which the loop is measured")
    flags.add_argument("--rerank", type=int, default=20, help="K of the coarse-to-fine ranking")
    settings = common.parse(flags, images=4, captions=4, some=2, loop=2, rerank=2)
    settings.some = settings.some or (BLOCK if settings.device == "cpu" else settings.images)
    rounds = []
    for _ in range(settings.rounds):
        rounds.append(measure(settings))
        common.write_json(settings.json, {"figures": figures_of(settings, rounds), "rounds": rounds}, settings.device)
    report(settings, rounds)


def ways(device: str) -> list[str]:
    """Precisions of exact scores."""
    return [name for name in PRECISIONS if device == "cuda" or name != "tf32"]


@torch.no_grad()
def measure(settings) -> dict:
    """Seconds a pair of each way, rates of products, differences of scores."""
    device, dims = settings.device, settings.embed_size
    regions, words, lengths = common.random_embeddings(settings.images, settings.captions, dims, device)
    similarity = common.random_similarity(dims, device)
    engine = make_engine("tiled", similarity)
    seconds, scores, rates = {}, {}, {}

    few = lengths[: settings.loop]
    loops = ("float32", "bfloat16") if device == "cuda" else ("float32",)
    for name, precision in (("loop" if one == "float32" else f"loop, {one}", one) for one in loops):
        compute = choose_compute(device, PRECISIONS[precision])
        with compute.in_force(), compute.autocast():
            time, scores[name] = common.clock(
                lambda: similarity(regions, words[: int(few.sum())], few), device, warm=True
            )
        # a caption's share of the words, not of the captions: the first ones may be longer or shorter
        seconds[name] = time / (settings.images * few.sum().item())

    for name in ways(device):
        compute = choose_compute(device, PRECISIONS[name])
        with compute.in_force():
            before = common.product_rate(dims, DTYPES[name], device)
        with compute.in_force(), compute.autocast():
            time, scores[name] = common.clock(
                lambda: score_all_pairs(engine.scorer(), regions[: settings.some], words, lengths), device, warm=True
            )
        seconds[name] = time / (settings.some * lengths.sum().item())
        with compute.in_force():
            rates[name] = max(before, common.product_rate(dims, DTYPES[name], device))

    with choose_compute(device, "fp32").in_force():
        time, reranker = common.clock(
            lambda: coarse_to_fine(settings, similarity, regions, words, lengths), device, warm=True
        )
    seconds["coarse"] = time / (settings.images * lengths.sum().item())
    return {
        "seconds": seconds,
        "rates": rates,
        "exact_share": reranker.exact_pairs / reranker.coarse.numel(),
        "differences": {
            name: (scores[name][:, : settings.loop] - scores["loop"][: settings.some]).abs().max().item()
            for name in ways(device)
        },
    }


def score_all_pairs(scorer, regions, words, lengths) -> torch.Tensor:
    return scorer.all_pairs(regions, scorer.captions(words, lengths))


def coarse_to_fine(settings, similarity, regions, words, lengths) -> Reranker:
    image_of_caption = torch.arange(settings.captions) * settings.images // settings.captions
    engine = make_engine("tiled", similarity)
    exact = engine.scorer()

    def score_pairs(images, captions):
        return exact.pairs(regions, words, lengths, images, captions)

    coarse = score_all_pairs(engine.scorer(coarse=True), regions, words, lengths)
    image_of_caption = image_of_caption.numpy()
    reranker = Reranker(coarse.cpu(), score_pairs, image_of_caption, parts_of_split(image_of_caption))
    reranker.ranks(settings.rerank)
    return reranker


def figures_of(settings, rounds: list[dict]) -> dict[str, dict]:
    """Medians of the rounds, by the name of the way."""
    figures = {}
    for way in rounds[0]["seconds"]:
        seconds = common.median(one["seconds"][way] for one in rounds)
        one = {"microseconds_a_pair": 1e6 * WORDS * seconds}
        one["times_the_loop"] = common.median(one["seconds"]["loop"] / one["seconds"][way] for one in rounds)
        if way in rounds[0]["rates"]:
            work = common.scoring_work(settings.embed_size)
            one["share_of_product_rate"] = common.median(
                work / one["seconds"][way] / one["rates"][way] for one in rounds
            )
            one["difference"] = max(one["differences"][way] for one in rounds)
        figures[{"coarse": f"float32, coarse, best {settings.rerank} exact"}.get(way, way)] = one
    return figures


def report(settings, rounds: list[dict]) -> None:
    rows = []
    for name, one in figures_of(settings, rounds).items():
        share, difference = one.get("share_of_product_rate"), one.get("difference")
        cells = [
            f"{one['microseconds_a_pair']:.{1 if settings.device == 'cpu' else 4}f}",
            f"{one['times_the_loop']:.2f}",
        ]
        cells += ["", ""] if share is None else [f"{100 * share:.0f} %", f"{difference:.1e}"]
        rows.append([name, *cells])
    title = (
        f"{settings.images} images x {settings.captions} captions, {common.REGIONS} regions, {settings.embed_size} "
        f"dimensions, median of {len(rounds)} rounds"
    )
    columns = ["scores", f"µs a pair of {WORDS} words", "times the loop", "of the product rate", "largest difference"]
    common.show(title, columns, rows, settings.device)
    rates = {name: common.median(one["rates"][name] for one in rounds) / 1e9 for name in ways(settings.device)}
    print(f"\nmatrix products: {', '.join(f'{name} {rate:.0f}' for name, rate in rates.items())} GFLOP/s")
    print(f"scored exactly after the coarse scores: {100 * rounds[0]['exact_share']:.1f} % of the pairs")


if __name__ == "__main__":
    main()
