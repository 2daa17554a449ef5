"""Whole training steps with BERT: seconds, pairs a second, and on a GPU what the profiler saw.

    python benchmarks/training.py                      # BERT-base; on a CPU name a smaller --batch_size

Batches of random features and tokens wait in memory (pinned for a GPU), so that the loader is left out; the learning
rate is 0, so that all is measured with the same weights. Memory is the most that was held above what model and
optimiser take. Of a step the profiler counts launches (kernels, copies, fills) and waits (calls in which Python waits
for the GPU); busy is the share of the time in which a kernel or a copy ran, gap the longest time between two of them.
"""

import sys
from collections import defaultdict
from collections.abc import Callable
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
PAIRS = {"Flickr30K": 145_000, "COCO": 566_435}  # of an epoch
PRECISIONS = {"cpu": ("fp32", "bf16"), "cuda": ("bf16", "tf32", "fp32")}
PROFILED = 3  # steps
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy")
KERNELS = 15  # lines of the table of kernels


def main() -> None:
    flags = common.parser(__doc__.splitlines()[0])
    flags.add_argument("--batch_size", type=int, default=128, help="pairs")
    flags.add_argument("--steps", type=int, default=0, help="steps of a measurement, after as many to warm up")
    settings = common.parse(flags, batch_size=4, steps=1)
    settings.steps = settings.steps or {"cpu": 5, "cuda": 20}[settings.device]
    precisions = PRECISIONS[settings.device]
    run, batches = start(settings, precisions[0])
    figures, kernels = {}, {}
    for precision in precisions:
        run.compute = choose_compute(settings.device, precision)
        for loss in (hinge_all, hinge, ramped):
            name = f"{precision}, {loss.__name__}"
            with run.compute.in_force():
                figures[name], kernels[name] = measure(settings, run, batches, loss)
            common.write_json(settings.json, {"figures": figures, "kernels": kernels}, settings.device)
    report(settings, figures, kernels)


def measure(settings, run: SimpleNamespace, batches: list[Batch], loss: Loss) -> tuple[dict, dict]:
    """Milliseconds a step and what follows from it; on a GPU memory, and what the profiler saw of further steps."""

    def steps(count: int) -> None:
        for batch in on_device(islice(cycle(batches), count), run.compute.device):
            train_step(run, batch, loss)

    steps(settings.steps)
    before = common.start_peak_memory(settings.device)
    seconds = common.median(
        common.clock(lambda: steps(settings.steps), settings.device)[0] for _ in range(settings.rounds)
    )
    step = seconds / settings.steps
    figures = {"milliseconds": 1e3 * step, "pairs_a_second": settings.batch_size / step}
    for name, pairs in PAIRS.items():
        figures[f"minutes_an_epoch_of_{name}"] = pairs / settings.batch_size * step / 60
    if settings.device == "cpu":
        return figures, {}
    figures["bytes"] = common.peak_memory(settings.device) - before
    seen, kernels = look_at(lambda: steps(PROFILED))
    return figures | seen, kernels


def look_at(steps: Callable[[], None]) -> tuple[dict[str, float], dict[str, list[float]]]:
    """What the profiler saw of PROFILED steps; by name of kernel how often a step launches it and its milliseconds."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        steps()
        torch.cuda.synchronize()
    events = [event for event in profiler.events() if not getattr(event, "is_user_annotation", False)]
    on_gpu = [event for event in events if event.device_type.name == "CUDA"]
    if not on_gpu:  # a profiler that may not look
        return {}, {}
    busy, gap = busy_share([(event.time_range.start, event.time_range.end) for event in on_gpu])
    kernels = defaultdict(lambda: [0.0, 0.0])
    for event in on_gpu:
        kernels[event.name][0] += 1 / PROFILED
        kernels[event.name][1] += (event.time_range.end - event.time_range.start) / 1e3 / PROFILED
    waits = sum(event.name in WAITS for event in events)
    seen = {"launches": len(on_gpu) / PROFILED, "waits": waits / PROFILED, "busy": busy, "gap_milliseconds": gap}
    return seen, dict(sorted(kernels.items(), key=lambda kernel: -kernel[1][1])[:KERNELS])


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
    parts = {"model": model, "batch_loss": BatchLoss(model, MARGIN), "optimizer": build_optimizer(model, 0.0)}
    run = SimpleNamespace(settings=SimpleNamespace(grad_clip=2.0), compute=compute, **parts)
    return run, [random_batch(settings) for _ in range(2)]


def random_batch(settings) -> Batch:
    size = settings.batch_size
    lengths = common.random_lengths(size, torch.default_generator)
    ids = torch.randint(1, 30_000, (size, int(lengths.max())))
    ids[torch.arange(ids.shape[1]) >= lengths[:, None]] = 0
    features = torch.randn(size * common.REGIONS, IMG_DIM).half()
    batch = (features, torch.full((size,), common.REGIONS), ids, lengths, torch.arange(size))
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


def report(settings, figures: dict[str, dict], kernels: dict[str, dict]) -> None:
    columns = ["step", "ms", "pairs/s", *(f"minutes an epoch of {name}" for name in PAIRS)]
    more = {
        "bytes": "GB",
        "launches": "launches",
        "waits": "waits",
        "busy": "busy",
        "gap_milliseconds": "longest gap, ms",
    }
    columns += more.values() if settings.device == "cuda" else []
    rows = []
    for name, one in figures.items():
        cells = [f"{one['milliseconds']:.1f}", f"{one['pairs_a_second']:.0f}"]
        cells += [f"{one[f'minutes_an_epoch_of_{name}']:.1f}" for name in PAIRS]
        if settings.device == "cuda":
            cells.append(f"{one['bytes'] / 1e9:.2f}")
            cells += [f"{one[key]:.2f}" if key in one else "" for key in list(more)[1:]]
        rows.append([name, *cells])
    title = (
        f"{settings.batch_size} pairs, BERT-base, {settings.embed_size} dimensions, median of {settings.rounds} rounds"
    )
    common.show(title, columns, rows, settings.device)
    for name, of_step in kernels.items():
        lines = [[kernel[:80], f"{launches:.1f}", f"{took:.3f}"] for kernel, (launches, took) in of_step.items()]
        if lines:
            print()
            common.print_table([f"{name}: kernels of a step", "launches", "ms"], lines)


if __name__ == "__main__":
    main()
