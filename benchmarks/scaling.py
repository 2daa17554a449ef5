"""How a training step divides among processes: what each computes and sends, counted and measured.

    python benchmarks/scaling.py                      # on a CPU: 1 and 2 processes; name a small --batch_size
    python benchmarks/scaling.py --processes 1 2 4 8  # with as many GPUs, over NCCL
    python benchmarks/scaling.py --count              # the counts alone, with the rates that they are divided by

Bytes are what a process sends in a step, in a ring, whose every process sends the same. They are measured on the
loopback device, so on a CPU under Linux only, where nothing else uses it.
"""

import json
import os
import subprocess
import sys
from itertools import cycle, islice
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common, training
from lib import distributed
from lib.collectives import largest, shard
from lib.data.batches import Batch
from lib.losses import hinge
from lib.model.layers import Shard
from lib.training.loop import average_gradients, train_step

FLOAT = 4  # bytes
WORDS = 14  # of a caption, [CLS] and [SEP] counted, on average
PADDED = 1.4  # words that BERT computes for each real one, where a batch is one group
BERT_LAYERS = 85_054_464  # parameters of BERT-base but its embeddings: two operations for each and word
HIDDEN = 768
RATES = {"computes": 300e12, "NVLink": 300e9, "100 Gbit/s": 12.5e9, "10 Gbit/s": 1.25e9}  # operations, bytes a second
BATCHES, PROCESSES = (128, 256, 512, 1024, 2048, 4096), (1, 2, 4, 8, 16, 32, 64)


def operations(batch_size: int, count: int, dims: int) -> dict[str, float]:
    """Floating-point operations of one process in a step on hardest negatives."""
    pairs = batch_size / count
    encoder = training.IMG_DIM * dims + training.IMG_DIM * dims / 2 + dims**2 / 2
    return {
        "BERT": 6 * BERT_LAYERS * WORDS * PADDED * pairs,
        "projections": 6 * (encoder * common.REGIONS + HIDDEN * dims * WORDS) * pairs,
        "scores": pairs * batch_size * WORDS * common.scoring_work(dims),
        "gradients": 3 * pairs * WORDS * common.gradient_work(dims),
        "gate": 6 * dims**3,  # D^T D and its gradient: by every process
    }


def bytes_sent(lengths: torch.Tensor, count: int, dims: int, parameters: int) -> dict[str, float]:
    """What one process sends in a step on hardest negatives."""
    batch_size, others = len(lengths), count - 1
    sizes = Shard(batch_size, processes=count).sizes
    words = max(int(part.sum()) for part in lengths.split(sizes))  # a process with fewer pads its own
    pairs = max(sizes)
    share = 2 * others / count  # of a tensor that is added up
    return {
        "words": others * words * dims * FLOAT,
        "their gradients": others * words * dims * FLOAT,
        "scores": others * pairs * batch_size * FLOAT,
        "parameters' gradients": share * parameters * FLOAT,
        "BatchNorm": share * 2 * (dims + 1) * FLOAT,
    }


def main() -> None:
    flags = common.parser(__doc__.splitlines()[0])
    flags.add_argument("--batch_size", type=int, default=128, help="pairs of all processes together")
    flags.add_argument("--steps", type=int, default=5, help="steps of a measurement, after as many to warm up")
    flags.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="numbers of processes")
    flags.add_argument("--precision", default="", help="fp32, tf32 or bf16 (default: the device's)")
    flags.add_argument("--count", action="store_true", help="count, measure nothing")
    settings = flags.parse_args()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        measure(settings)
    elif settings.count:
        show_counts(settings)
    else:
        report(settings)


# Counted


def show_counts(settings) -> None:
    """What a process computes and sends, and how much faster a step then is than on one process."""
    parameters = sum(p.numel() for p in training.start(_small(settings), "fp32")[0].model.parameters())
    counted = {
        (batch_size, count): (
            operations(batch_size, count, settings.embed_size),
            bytes_sent(torch.full((batch_size,), WORDS), count, settings.embed_size, parameters),
        )
        for batch_size in BATCHES
        for count in PROCESSES
    }
    for number, unit, what in ((0, 1e12, "TFLOP that a process computes"), (1, 1e6, "MB that a process sends")):
        rows = [
            [
                f"{batch_size} pairs, {count} process{'es' if count > 1 else ''}",
                *(f"{part / unit:.2f}" for part in parts[number].values()),
            ]
            for (batch_size, count), parts in counted.items()
            if batch_size in BATCHES[::5] and count in PROCESSES[::3]
        ]
        print(f"\n{what}\n")
        common.print_table(["", *counted[BATCHES[0], 1][number]], rows)
    for link in list(RATES)[1:]:
        seconds = {key: _seconds(*parts, link) for key, parts in counted.items()}
        rows = [
            [str(batch_size), f"{1e3 * seconds[batch_size, 1]:.0f}"]
            + [f"{seconds[batch_size, 1] / seconds[batch_size, count]:.1f}" for count in PROCESSES[1:]]
            for batch_size in BATCHES
        ]
        rates = f"{RATES['computes'] / 1e12:.0f} TFLOP/s, {link} ({RATES[link] / 1e9:g} GB/s)"
        print(f"\ntimes faster than one process, if nothing is sent while something is computed; {rates}\n")
        common.print_table(["pairs", "ms of one", *(f"{count} processes" for count in PROCESSES[1:])], rows)


def _seconds(computes: dict[str, float], sends: dict[str, float], link: str) -> float:
    return sum(computes.values()) / RATES["computes"] + sum(sends.values()) / RATES[link]


def _small(settings):
    """The settings with two pairs, where only the model is looked at."""
    return type(settings)(**{**vars(settings), "batch_size": 2})


# Measured


def measure(settings) -> None:
    """One process of a job: steps, and on the first one their figures as a line of JSON."""
    distributed.keep_quiet()
    precision = settings.precision or ("tf32" if settings.device == "cuda" else "fp32")
    run, batches = training.start(settings, precision)
    batches = [_own_part(batch) for batch in batches]
    with run.compute.in_force(), distributed.joined(run.compute.device):
        run.batch_loss = average_gradients(run.batch_loss)

        def steps() -> None:
            for batch in islice(cycle(batches), settings.steps):
                moved = (batch.images.to(run.compute.device), batch.counts, batch.ids.to(run.compute.device))
                train_step(run, Batch(*moved, batch.lengths, batch.image_of), hinge)
            largest(0)  # wait for the slowest process

        steps()
        before = _sent()
        seconds, _ = common.clock(steps, settings.device)
        sent = (_sent() - before) / settings.steps / distributed.world_size()
        lengths = torch.stack([batch.lengths for batch in batches])
        parameters = sum(p.numel() for p in run.model.parameters())
        parts = [bytes_sent(one, distributed.world_size(), settings.embed_size, parameters) for one in lengths]
        counted = {name: sum(part[name] for part in parts) / len(parts) for name in parts[0]}
        print(json.dumps({"ms": 1e3 * seconds / settings.steps, "sent": sent, "counted": counted}))


def _own_part(batch: Batch) -> Batch:
    own = shard(len(batch.lengths)).own
    regions = slice(own.start * common.REGIONS, own.stop * common.REGIONS)
    return batch._replace(images=batch.images[regions], ids=batch.ids[own])


def _sent() -> int:
    """Bytes that this machine has sent to itself."""
    try:
        with open("/proc/net/dev", encoding="utf-8") as lines:
            return int(next(line for line in lines if line.strip().startswith("lo:")).split()[9])
    except (OSError, StopIteration):
        return 0


def report(settings) -> None:
    figures = {count: _job(count) for count in settings.processes}
    rows = []
    for count, one in figures.items():
        counted = sum(one["counted"].values())
        cells = [f"{one['ms']:.0f}", f"{1e3 * settings.batch_size / one['ms']:.0f}", f"{counted / 1e6:.1f}"]
        cells += [f"{one['sent'] / 1e6:.1f}", f"{one['sent'] / counted:.3f}"] if count > 1 and one["sent"] else ["", ""]
        rows.append([str(count), *cells])
    title = f"{settings.batch_size} pairs, BERT-base, {settings.embed_size} dimensions, hardest negatives"
    columns = ["processes", "ms a step", "pairs/s", "MB counted", "MB sent", "sent / counted"]
    common.show(title, columns, rows, settings.device)
    last = figures[max(figures)]["counted"]
    print(f"\nof {max(figures)} processes: " + ", ".join(f"{name} {size / 1e6:.2f} MB" for name, size in last.items()))
    common.write_json(settings.json, {"figures": figures}, settings.device)


def _job(count: int) -> dict:
    """The figures of this program on a number of processes."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    threads = str(max(1, (os.cpu_count() or 1) // count))
    environment = {"OMP_NUM_THREADS": threads, "TORCH_CPP_LOG_LEVEL": "ERROR", **os.environ}
    done = subprocess.run([*launch, *sys.argv], env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
