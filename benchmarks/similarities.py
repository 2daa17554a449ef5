"""What the similarities cost at full size: scores, and a training step's forward and backward.

    python benchmarks/similarities.py

A round measures each of them once, one after the other; a ratio is the median of the rounds' ratios to X-Dim. BERT and
the image encoder, which all of them need, are not in it.
"""

import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common
from lib.losses import Loss, hinge_all, ramped
from lib.model.engine import Embedded, make_engine
from lib.training.loop import batch_loss

MARGIN = 0.2
VARIANTS = {  # name: (similarity, gate)
    "xdim": ("xdim", "adaptive"),
    "xdim:diagonal": ("xdim", "diagonal"),
    "xdim:uniform": ("xdim", "uniform"),
    "independent": ("independent", "adaptive"),
    "gpo": ("gpo", "adaptive"),
}
WORK = ("scores", "step, ramped", "step, all negatives")


class Subject:
    """A similarity, and the batch that it is measured on."""

    def __init__(self, variant: str, settings):
        self.similarity = common.random_similarity(settings.embed_size, settings.device, *VARIANTS[variant])
        self.engine = make_engine("tiled", self.similarity)
        size = settings.batch_size
        self.inputs = common.random_embeddings(size, size, settings.embed_size, settings.device)
        self.settings = settings

    def work(self, name: str) -> None:
        half = self.settings.precision == "bf16"
        with torch.autocast(self.settings.device, torch.bfloat16, enabled=half):
            if name == "scores":
                scorer = self.engine.scorer()
                scorer.all_pairs(self.inputs[0], scorer.captions(*self.inputs[1:]))
            else:
                self.gradients(ramped if "ramped" in name else hinge_all)

    def gradients(self, loss: Loss) -> tuple[Tensor, ...]:
        regions, words, lengths = self.inputs
        wanted = [regions.requires_grad_(), words.requires_grad_(), *self.similarity.parameters()]
        value, _ = batch_loss(self.engine, Embedded(regions, words, lengths, None), loss, MARGIN)
        return torch.autograd.grad(value, wanted)


def main() -> None:
    flags = common.parser(__doc__.splitlines()[0])
    flags.add_argument("--batch_size", type=int, default=128, help="images, and captions")
    flags.add_argument("--precision", default="fp32", choices=("fp32", "bf16"), help="of products")
    settings = flags.parse_args()
    subjects = {name: Subject(name, settings) for name in VARIANTS}
    for subject in subjects.values():
        subject.work("scores")  # first uses take longer
    report(settings, [measure(settings, subjects) for _ in range(settings.rounds)])


def measure(settings, subjects: dict[str, Subject]) -> dict[str, dict[str, float]]:
    """Seconds by work and variant."""
    return {
        work: {name: common.clock(partial(one.work, work), settings.device)[0] for name, one in subjects.items()}
        for work in WORK
    }


def report(settings, rounds: list[dict]) -> None:
    rows, figures = [], {}
    for name in VARIANTS:
        cells = []
        for work in WORK:
            took = common.median(one[work][name] for one in rounds)
            faster = common.median(one[work]["xdim"] / one[work][name] for one in rounds)
            cells += [f"{1000 * took:.0f}", f"{faster:.1f}"]
            figures.setdefault(name, {})[work] = {"seconds": took, "times_faster": faster}
        rows.append([name, *cells])
    title = (
        f"{settings.batch_size} images x {settings.batch_size} captions, {common.REGIONS} regions, "
        f"{settings.embed_size} dimensions, {settings.precision}, median of {len(rounds)} rounds"
    )
    columns = ["", *(column for work in WORK for column in (f"{work} ms", "times faster"))]
    common.show(title, columns, rows, settings.device)
    common.write_json(settings.json, {"figures": figures, "seconds": rounds}, settings.device)


if __name__ == "__main__":
    main()
