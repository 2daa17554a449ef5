"""A training step's memory and time where BERT takes fewer captions at a time (--micro_batch).

    python benchmarks/micro_batch.py                   # BERT-base; on a CPU name a smaller --batch_size

A round measures every size once, each in a process of its own, with hardest negatives; a ratio is the median of the
rounds' ratios. Memory is the most that is held above what model, gradients, optimiser and a step of two pairs took. The
difference is that of the first step's loss or gradient norm from the whole batch's, the larger one, relative to it,
without dropout. On a CPU the whole batch is computed in groups too (lib/model/encoders.py), which are all kept.
"""

import multiprocessing
import sys
from argparse import Namespace
from itertools import cycle, islice
from pathlib import Path

from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common
from benchmarks.training import random_batch, start
from lib.data.batches import Batch, on_device
from lib.losses import hinge
from lib.training.loop import train_step

WHOLE = 0
SIZES = (WHOLE, 64, 32, 16, 8, 4)


def main() -> None:
    flags = common.parser(__doc__.splitlines()[0])
    flags.add_argument("--batch_size", type=int, default=128, help="pairs")
    flags.add_argument("--precision", default="", help="fp32, tf32 or bf16; else fp32 on a CPU, tf32 on CUDA")
    flags.add_argument(
        "--steps", type=int, default=3, help="steps that are timed, after the one that memory is read of"
    )
    settings = flags.parse_args()
    sizes = [size for size in SIZES if size < settings.batch_size]
    report(settings, [{size: measure(settings, size) for size in sizes} for _ in range(settings.rounds)])


def measure(settings: Namespace, micro_batch: int) -> dict:
    """Bytes, milliseconds, and the first step's loss and gradient norm, measured in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measure, (settings, micro_batch))


def _measure(settings: Namespace, micro_batch: int) -> dict:
    return {**later_steps(settings, micro_batch), "loss_and_norm": first_step(settings, micro_batch)}


def later_steps(settings: Namespace, micro_batch: int) -> dict:
    """Bytes and milliseconds of steps for which the optimiser has its state."""
    run, batches = start(settings, settings.precision)
    steps(run, [random_batch(Namespace(batch_size=2, device=settings.device))])
    run.model.text_encoder.micro_batch = micro_batch
    before = common.start_peak_memory(settings.device)
    steps(run, batches[:1])
    held = common.peak_memory(settings.device) - before
    timed = list(islice(cycle(batches), settings.steps))
    seconds, _ = common.clock(lambda: steps(run, timed), settings.device)
    return {"bytes": held, "milliseconds": 1e3 * seconds / settings.steps}


def first_step(settings: Namespace, micro_batch: int) -> list[float]:
    """The loss and the gradient's norm of new weights, without dropout."""
    run, batches = start(settings, settings.precision)
    run.model.text_encoder.micro_batch = micro_batch
    for part in run.model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    return steps(run, batches[:1]).tolist()


def steps(run, batches: list[Batch]) -> Tensor:
    """Train on batches; the last one's loss and gradient norm."""
    with run.compute.in_force():
        for batch in on_device(batches, run.compute.device):
            figures = train_step(run, batch, hinge)
    return figures[:2]


def report(settings: Namespace, rounds: list[dict[int, dict]]) -> None:
    rows, figures = [], {}
    for size in rounds[0]:
        name = f"{size}" if size else "0 (whole)"
        pairs = [(one[WHOLE], one[size]) for one in rounds]
        took, held = (common.median(of[key] for _, of in pairs) for key in ("milliseconds", "bytes"))
        less = common.median(whole["bytes"] / max(of["bytes"], 1) for whole, of in pairs)
        slower = common.median(of["milliseconds"] / whole["milliseconds"] for whole, of in pairs)
        difference = max(
            abs(ours / expected - 1)
            for whole, of in pairs
            for ours, expected in zip(of["loss_and_norm"], whole["loss_and_norm"], strict=True)
        )
        rows.append([name, f"{held / 1e9:.2f}", f"{took:.0f}", f"{less:.1f}", f"{slower:.2f}", f"{difference:.0e}"])
        figures[name] = {"bytes": held, "milliseconds": took, "times_less": less, "times_slower": slower}
        figures[name]["difference"] = difference
    precision = settings.precision or {"cpu": "fp32", "cuda": "tf32"}[settings.device]
    title = (
        f"a step of {settings.batch_size} pairs, BERT-base, {settings.embed_size} dimensions, {precision}, hardest "
        f"negatives, median of {len(rounds)} rounds"
    )
    columns = ["micro batch", "GB", "ms a step", "times less memory", "times slower", "difference"]
    common.show(title, columns, rows, settings.device)
    common.write_json(settings.json, {"figures": figures}, settings.device)


if __name__ == "__main__":
    main()
