"""A training step of the similarity, forward and backward, against automatic differentiation of the plain formula.

    python benchmarks/train_step.py

A round measures every way once, one after the other; a ratio is the median of the rounds' ratios. Memory is what a
process holds at most above what it held before the step, on a CPU each way in a process of its own.
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
from lib.runtime import choose_compute
from lib.training.loop import batch_loss

MARGIN = 0.2
LOSSES = {False: hinge_all, True: hinge}  # by whether the hardest negatives alone count
Way = tuple[bool, bool, str]
WAYS: dict[str, Way] = {  # name: (by the loop, hardest negatives, precision)
    "loop, all negatives": (True, False, "fp32"),
    "float32, all negatives": (False, False, "fp32"),
    "tf32, all negatives": (False, False, "tf32"),
    "bfloat16, all negatives": (False, False, "bf16"),
    "loop, hardest negatives": (True, True, "fp32"),
    "float32, hardest negatives": (False, True, "fp32"),
    "tf32, hardest negatives": (False, True, "tf32"),
    "bfloat16 search, hardest negatives": (False, True, "bf16"),
}
EXACT = {"fp32": "fp32", "tf32": "tf32", "bf16": "fp32"}  # in what few pairs are differentiated


def ways(device: str) -> dict[str, Way]:
    return {name: way for name, way in WAYS.items() if device == "cuda" or way[2] != "tf32"}


class Step:
    """A batch of random pairs and the step of one way."""

    def __init__(self, batch_size: int, dims: int, device: str):
        regions, words, self.lengths = common.random_embeddings(batch_size, batch_size, dims, device)
        self.similarity = common.random_similarity(dims, device)
        self.engine = make_engine("tiled", self.similarity)
        self.inputs = [regions.requires_grad_(), words.requires_grad_(), *self.similarity.parameters()]
        self.device = device

    def gradients(self, loop: bool, hardest: bool, precision: str) -> tuple[Tensor, ...]:
        """Gradients of the loss in embeddings and parameters."""
        compute = choose_compute(self.device, precision)
        with compute.in_force():
            if loop:
                loss = LOSSES[hardest](self.similarity(*self.inputs[:2], self.lengths), MARGIN)
            else:
                with compute.autocast():
                    embedded = Embedded(*self.inputs[:2], self.lengths, None)
                    loss, _ = batch_loss(self.engine, embedded, LOSSES[hardest], MARGIN)
            return torch.autograd.grad(loss, self.inputs)

    def same_negatives(self, hardest: bool, precision: str) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Gradients of the loss in ours and in the loop's scores, both for the negatives that our scores choose."""
        compute = choose_compute(self.device, precision)
        with compute.in_force():
            with compute.autocast():
                scores = self.engine(*self.inputs[:2], self.lengths)
            (of_scores,) = torch.autograd.grad(LOSSES[hardest](scores, MARGIN), scores, retain_graph=True)
            ours = torch.autograd.grad(scores, self.inputs, of_scores)
        with choose_compute(self.device, "fp32").in_force():
            plain = self.similarity(*self.inputs[:2], self.lengths)
            return ours, torch.autograd.grad(plain, self.inputs, of_scores)


def main() -> None:
    flags = common.parser(__doc__.splitlines()[0])
    flags.add_argument("--batch_size", type=int, default=128, help="pairs")
    settings = common.parse(flags, batch_size=4)
    step = Step(settings.batch_size, settings.embed_size, settings.device)
    memory = {name: measure_memory(settings, way) for name, way in ways(settings.device).items()}
    differences, rounds = compare(step), []
    for _ in range(settings.rounds):
        rounds.append(measure(settings, step))
        figures = figures_of(*zip(*rounds, strict=True), memory, differences)
        common.write_json(settings.json, {"figures": figures, "rounds": rounds}, settings.device)
    report(settings, figures)


def measure(settings, step: Step) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of each way; the least that its products would take at the machine's rate, measured beside it."""
    seconds, floors = {}, {}
    rates = {}
    for precision in {precision for *_, precision in ways(settings.device).values()}:
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        with choose_compute(settings.device, precision).in_force():
            rates[precision] = common.product_rate(settings.embed_size, dtype, settings.device)
    for name, way in ways(settings.device).items():
        seconds[name], _ = common.clock(partial(step.gradients, *way), settings.device, warm=True)
        floors[name] = floor(settings, step, *way[1:], rates)
    return seconds, floors


def floor(settings, step: Step, hardest: bool, precision: str, rates: dict[str, float]) -> float:
    """Seconds: of all pairs; with hardest negatives all are scored, three for each pair differentiated, not in bf16."""
    pairs = settings.batch_size * step.lengths.sum().item()  # of words and images
    if not hardest:
        return pairs * common.gradient_work(settings.embed_size) / rates[precision]
    chosen = 3 * pairs / settings.batch_size * common.gradient_work(settings.embed_size) / rates[EXACT[precision]]
    return pairs * common.scoring_work(settings.embed_size) / rates[precision] + chosen


def compare(step: Step) -> dict[str, float]:
    """Each way's largest difference from the loop's gradients, relative to the largest entry of each.

    A bfloat16 search may choose other hardest negatives, whose gradients are others: there the loop gets the same ones.
    """
    plain = step.gradients(True, False, "fp32")
    both = {
        name: step.same_negatives(hardest, precision) if hardest else (step.gradients(loop, hardest, precision), plain)
        for name, (loop, hardest, precision) in ways(step.device).items()
        if not loop
    }
    return {
        name: max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(*pair, strict=True))
        for name, pair in both.items()
    }


def measure_memory(settings, way: Way) -> float:
    """Bytes that a step takes at most, on a CPU measured in a process of its own."""
    if settings.device == "cuda" or settings.toy:
        return _memory(settings.batch_size, settings.embed_size, settings.device, way)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_memory, (settings.batch_size, settings.embed_size, settings.device, way))


def _memory(batch_size: int, dims: int, device: str, way: Way) -> float:
    Step(2, 64, device).gradients(*way)  # libraries are loaded on first use
    step = Step(batch_size, dims, device)
    before = common.start_peak_memory(device)
    step.gradients(*way)
    return common.peak_memory(device) - before


def figures_of(seconds: list[dict], floors: list[dict], memory: dict, differences: dict) -> dict[str, dict]:
    """Medians of the rounds, by the name of the way."""
    figures = {}
    for name in memory:
        reference = f"loop, {'hardest' if WAYS[name][1] else 'all'} negatives"
        one = {"seconds": common.median(one[name] for one in seconds)}
        one["times_faster"] = common.median(one[reference] / one[name] for one in seconds)
        if name in differences:
            shares = (least[name] / one[name] for one, least in zip(seconds, floors, strict=True))
            one |= {"share_of_product_rate": common.median(shares), "gradient_difference": differences[name]}
        figures[name] = {**one, "bytes": memory[name], "times_less": memory[reference] / max(memory[name], 1)}
    return figures


def report(settings, figures: dict[str, dict]) -> None:
    rows = []
    for name, one in figures.items():
        loop = "gradient_difference" not in one
        share = "" if loop else f"{100 * one['share_of_product_rate']:.0f} %"
        cells = [f"{one['seconds']:.{2 if settings.device == 'cpu' else 4}f}", f"{one['times_faster']:.2f}", share]
        cells += [f"{one['bytes'] / 1e9:.2f}", f"{one['times_less']:.0f}"]
        rows.append([name, *cells, "" if loop else f"{one['gradient_difference']:.1e}"])
    title = (
        f"similarity, {settings.batch_size} pairs, {common.REGIONS} regions, {settings.embed_size} dimensions, forward "
        f"and backward, median of {settings.rounds} rounds"
    )
    columns = ["", "seconds", "times faster", "of the product rate", "GB", "times less", "difference of gradients"]
    common.show(title, columns, rows, settings.device)


if __name__ == "__main__":
    main()
