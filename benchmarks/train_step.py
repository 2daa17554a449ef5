"""A training step of the similarity, forward and backward, against automatic differentiation of the plain formula.

    python benchmarks/train_step.py

A round measures every way once, one after the other; a ratio is the median of the rounds' ratios. Memory is what a
process holds at most above what it held before the step, each way in a process of its own.
"""

import multiprocessing
import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common
from lib.losses import hinge, hinge_all
from lib.model.engine import Embedded, make_engine
from lib.training.loop import batch_loss

MARGIN = 0.2
LOSSES = {False: hinge_all, True: hinge}  # by whether the hardest negatives alone count
WAYS = {  # name: (by the loop, hardest negatives, bfloat16)
    "loop, all negatives": (True, False, False),
    "float32, all negatives": (False, False, False),
    "bfloat16, all negatives": (False, False, True),
    "loop, hardest negatives": (True, True, False),
    "float32, hardest negatives": (False, True, False),
    "bfloat16 search, hardest negatives": (False, True, True),
}


DTYPES = {False: torch.float32, True: torch.bfloat16}


class Step:
    """A batch of random pairs and the step of one way."""

    def __init__(self, batch_size: int, dims: int, device: str):
        regions, words, self.lengths = common.random_embeddings(batch_size, batch_size, dims, device)
        self.similarity = common.random_similarity(dims, device)
        self.engine = make_engine("tiled", self.similarity)
        self.inputs = [regions.requires_grad_(), words.requires_grad_(), *self.similarity.parameters()]
        self.device = device

    def loss(self, loop: bool, hardest: bool, half: bool) -> Tensor:
        if loop:
            return LOSSES[hardest](self.similarity(*self.inputs[:2], self.lengths), MARGIN)
        with torch.autocast(self.device, torch.bfloat16, enabled=half):
            embedded = Embedded(*self.inputs[:2], self.lengths, None)
            return batch_loss(self.engine, embedded, LOSSES[hardest], MARGIN)[0]

    def gradients(self, loop: bool, hardest: bool, half: bool) -> tuple[Tensor, ...]:
        """Gradients of the loss in embeddings and parameters."""
        return torch.autograd.grad(self.loss(loop, hardest, half), self.inputs)

    def same_negatives(self, hardest: bool, half: bool) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Gradients of the loss in ours and in the loop's scores, both for the negatives that our scores choose."""
        with torch.autocast(self.device, torch.bfloat16, enabled=half):
            scores = self.engine(*self.inputs[:2], self.lengths)
        (of_scores,) = torch.autograd.grad(LOSSES[hardest](scores, MARGIN), scores, retain_graph=True)
        ours = torch.autograd.grad(scores, self.inputs, of_scores)
        return ours, torch.autograd.grad(self.similarity(*self.inputs[:2], self.lengths), self.inputs, of_scores)


def main() -> None:
    flags = common.parser(__doc__.splitlines()[0])
    flags.add_argument("--batch_size", type=int, default=128, help="pairs")
    settings = flags.parse_args()
    step = Step(settings.batch_size, settings.embed_size, settings.device)
    memory = {name: measure_memory(settings, way) for name, way in WAYS.items()}
    rounds = [measure(settings, step) for _ in range(settings.rounds)]
    report(settings, *zip(*rounds, strict=True), memory, compare(step))


def measure(settings, step: Step) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of each way; the least that its products would take at the machine's rate, measured beside it."""
    seconds, floors = {}, {}
    rates = {half: common.product_rate(settings.embed_size, DTYPES[half], settings.device) for half in DTYPES}
    for name, way in WAYS.items():
        seconds[name], _ = common.clock(partial(step.gradients, *way), settings.device)
        floors[name] = floor(settings, step, *way[1:], rates)
    return seconds, floors


def floor(settings, step: Step, hardest: bool, half: bool, rates: dict[bool, float]) -> float:
    """Seconds: of all pairs; with hardest negatives all are scored, three for each pair differentiated, in float32."""
    pairs = settings.batch_size * step.lengths.sum().item()  # of words and images
    if not hardest:
        return pairs * common.gradient_work(settings.embed_size) / rates[half]
    chosen = 3 * pairs / settings.batch_size * common.gradient_work(settings.embed_size) / rates[False]
    return pairs * common.scoring_work(settings.embed_size) / rates[half] + chosen


def compare(step: Step) -> dict[str, float]:
    """Each way's largest difference from the loop's gradients, relative to the largest entry of each.

    A bfloat16 search may choose other hardest negatives, whose gradients are others: there the loop gets the same ones.
    """
    plain = step.gradients(True, False, False)
    both = {
        name: step.same_negatives(hardest, half) if hardest else (step.gradients(loop, hardest, half), plain)
        for name, (loop, hardest, half) in WAYS.items()
        if not loop
    }
    return {
        name: max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(*pair, strict=True))
        for name, pair in both.items()
    }


def measure_memory(settings, way: tuple[bool, bool, bool]) -> float:
    """Bytes that a step takes at most, measured in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_memory, (settings.batch_size, settings.embed_size, settings.device, way))


def _memory(batch_size: int, dims: int, device: str, way: tuple[bool, bool, bool]) -> float:
    Step(2, 64, device).gradients(*way)  # libraries are loaded on first use
    step = Step(batch_size, dims, device)
    before = common.peak_memory(device)
    step.gradients(*way)
    return common.peak_memory(device) - before


def report(settings, seconds: list[dict], floors: list[dict], memory: dict, differences: dict) -> None:
    rows, figures = [], {}
    for name, (loop, hardest, _) in WAYS.items():
        reference = f"loop, {'hardest' if hardest else 'all'} negatives"
        took = common.median(one[name] for one in seconds)
        faster = common.median(one[reference] / one[name] for one in seconds)
        less = memory[reference] / max(memory[name], 1)
        share = common.median(least[name] / one[name] for one, least in zip(seconds, floors, strict=True))
        difference = "" if loop else f"{differences[name]:.1e}"
        cells = [f"{took:.2f}", f"{faster:.2f}", "" if loop else f"{100 * share:.0f} %"]
        rows.append([name, *cells, f"{memory[name] / 1e9:.2f}", f"{less:.0f}", difference])
        figures[name] = {"seconds": took, "times_faster": faster, "share": share, "bytes": memory[name]}
        figures[name]["gradient_difference"] = differences.get(name)
    title = (
        f"similarity, {settings.batch_size} pairs, {common.REGIONS} regions, {settings.embed_size} dimensions, forward "
        f"and backward, median of {len(seconds)} rounds"
    )
    columns = ["", "seconds", "times faster", "of the product rate", "GB", "times less", "difference of gradients"]
    common.show(title, columns, rows, settings.device)
    common.write_json(settings.json, {"figures": figures, "seconds": seconds}, settings.device)


if __name__ == "__main__":
    main()
