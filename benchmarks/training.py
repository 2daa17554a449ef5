"""Whole training steps with BERT: seconds, pairs a second, and on a GPU how much of the time it is busy.

    python benchmarks/training.py                      # BERT-base; on a CPU name a smaller --batch_size

Batches of random features and tokens wait in memory (pinned for a GPU), so that the loader is left out. Memory is the
most that was held above what model and optimiser take. Busy is the share of the time in which the profiler saw a kernel
or a copy run, gap the longest time between two of them.
"""

import sys
from itertools import cycle, islice
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common
from lib.data.batches import Batch, on_device
from lib.losses import Loss, hinge, hinge_all, ramped
from lib.runtime import choose_compute
from lib.training.loop import BatchLoss, train_step
from lib.training.optim import build_optimizer

IMG_DIM = 2048
MARGIN = 0.2
FLICKR30K = 145_000  # pairs of an epoch
PRECISIONS = {"cpu": ("fp32", "bf16"), "cuda": ("fp32", "tf32", "bf16")}


def main() -> None:
    flags = common.parser(__doc__.splitlines()[0])
    flags.add_argument("--batch_size", type=int, default=128, help="pairs")
    flags.add_argument("--steps", type=int, default=5, help="steps of a measurement, after as many to warm up")
    settings = flags.parse_args()
    results = {}
    for precision in PRECISIONS[settings.device]:
        for loss in (hinge_all, hinge, ramped):
            name = f"{precision}, {loss.__name__}"
            results[name] = [measure(settings, precision, loss) for _ in range(settings.rounds)]
    report(settings, results)


def measure(settings, precision: str, loss: Loss) -> dict:
    """Milliseconds a step; on a GPU memory, and what the profiler saw of two further steps."""
    run, batches = start(settings, precision)
    with run.compute.in_force():
        return measure_steps(settings, run, batches, loss)


def measure_steps(settings, run: SimpleNamespace, batches: list[Batch], loss: Loss) -> dict:

    def steps(count: int) -> None:
        for batch in on_device(islice(cycle(batches), count), run.compute.device):
            train_step(run, batch, loss)

    steps(settings.steps)
    if settings.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    seconds, _ = common.clock(lambda: steps(settings.steps), settings.device)
    figures = {"milliseconds": 1e3 * seconds / settings.steps}
    if settings.device == "cuda":
        figures["bytes"] = common.peak_memory(settings.device) - before
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            common.clock(lambda: steps(2), settings.device)
        spans = [event.time_range for event in profiler.events() if event.device_type.name == "CUDA"]
        figures["busy"], figures["gap_milliseconds"] = busy_share([(span.start, span.end) for span in spans])
    return figures


def start(settings, precision: str) -> tuple[SimpleNamespace, list[Batch]]:
    """What train_step takes: a model around BERT-base of random weights, and two batches."""
    from transformers import BertConfig

    from lib.model import registry
    from lib.model.xdim import XDim

    compute = choose_compute(settings.device, precision)
    torch.manual_seed(0)
    architecture = registry.describe({"img_dim": IMG_DIM, "embed_size": settings.embed_size})
    architecture["text_encoder"]["options"]["config"] = BertConfig(**common.bert_sizes(settings)).to_dict()
    model = XDim.build(architecture)
    model = model.to(compute.device).train()
    parts = {"model": model, "batch_loss": BatchLoss(model, MARGIN), "optimizer": build_optimizer(model, 5e-4)}
    run = SimpleNamespace(settings=SimpleNamespace(grad_clip=2.0), compute=compute, **parts)
    return run, [random_batch(settings) for _ in range(2)]


def random_batch(settings) -> Batch:
    size = settings.batch_size
    lengths = common.random_lengths(size, torch.default_generator)
    ids = torch.randint(1, 30_000, (size, int(lengths.max())))
    ids[torch.arange(ids.shape[1]) >= lengths[:, None]] = 0
    features = torch.randn(size * common.REGIONS, IMG_DIM).half()
    batch = (features, torch.full((size,), common.REGIONS), ids, lengths)
    return Batch(*(part.pin_memory() if settings.device == "cuda" else part for part in batch))


def busy_share(spans: list[tuple[float, float]]) -> tuple[float, float]:
    """The share of the time that spans in microseconds cover, from the first to the last; the longest gap in ms."""
    spans = sorted(spans)
    busy, gap, end = 0.0, 0.0, spans[0][0]
    for begin, stop in spans:
        gap = max(gap, begin - end)
        busy += max(0.0, stop - max(begin, end))
        end = max(end, stop)
    return busy / (end - spans[0][0]), gap / 1e3


def report(settings, results: dict[str, list[dict]]) -> None:
    rows, figures = [], {}
    for name, rounds in results.items():
        one = figures[name] = {key: common.median(figure[key] for figure in rounds) for key in rounds[0]}
        epoch = FLICKR30K / settings.batch_size * one["milliseconds"] / 1e3
        one["pairs_a_second"] = 1e3 * settings.batch_size / one["milliseconds"]
        cells = [f"{one['milliseconds']:.1f}", f"{one['pairs_a_second']:.0f}", f"{epoch / 60:.1f}"]
        if "busy" in one:
            cells += [f"{one['bytes'] / 1e9:.2f}", f"{100 * one['busy']:.0f} %", f"{one['gap_milliseconds']:.2f}"]
        rows.append([name, *cells])
    columns = ["step", "ms", "pairs/s", "minutes an epoch of Flickr30K"]
    columns += ["GB", "busy", "longest gap, ms"] if settings.device == "cuda" else []
    title = (
        f"{settings.batch_size} pairs, BERT-base, {settings.embed_size} dimensions, median of {settings.rounds} rounds"
    )
    common.show(title, columns, rows, settings.device)
    common.write_json(settings.json, {"figures": figures}, settings.device)


if __name__ == "__main__":
    main()
