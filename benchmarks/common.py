"""What the benchmarks share: random embeddings, clocks, memory, the machine, tables."""

import argparse
import json
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date

import torch
from torch import Tensor
from torch.nn import functional as F

from lib.files import replacing
from lib.model import registry
from lib.model.xdim import XDimSimilarity

REGIONS = 36
TOY_BERT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def parser(description: str) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    made.add_argument("--embed_size", type=int, default=1024, help="shared dimensions")
    made.add_argument("--rounds", type=int, default=3, help="times that everything is measured, one after the other")
    made.add_argument("--json", default="", help="write the figures to this file too")
    made.add_argument("--toy", action="store_true", help="tiny BERT and data: measures nothing, tests the benchmark")
    return made


def parse(flags: argparse.ArgumentParser, **toy: object) -> argparse.Namespace:
    """The settings; toy: what --toy sets, unless a flag says otherwise."""
    if flags.parse_known_args()[0].toy:
        flags.set_defaults(embed_size=16, rounds=1, **toy)
    return flags.parse_args()


def bert_sizes(settings: argparse.Namespace) -> dict[str, int]:
    """What differs from BERT-base's configuration."""
    return TOY_BERT if settings.toy else {}


def random_embeddings(images: int, captions: int, dims: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Unit vectors: regions (images, 36, dims), packed words, and lengths of captions."""
    generator = torch.Generator().manual_seed(0)
    lengths = random_lengths(captions, generator)
    regions = F.normalize(torch.randn(images, REGIONS, dims, generator=generator), dim=-1)
    words = F.normalize(torch.randn(int(lengths.sum()), dims, generator=generator), dim=-1)
    return regions.to(device), words.to(device), lengths


def random_lengths(captions: int, generator: torch.Generator) -> Tensor:
    """Words of each caption, [CLS] and [SEP] counted: about 14."""
    return (torch.randn(captions, generator=generator) * 4 + 14).round().clamp(5, 35).long()


def random_similarity(dims: int, device: str, similarity: str = "xdim", gate: str = "adaptive") -> XDimSimilarity:
    torch.manual_seed(0)
    part = registry.describe({"similarity": similarity, "gate": gate})["similarity"]
    return registry.build("similarity", part, dims).to(device)


def clock(work: Callable[[], object], device: str, warm: bool = False) -> tuple[float, object]:
    """Seconds that some work takes, and what it returns. warm: on a GPU do it once before, which compiles kernels."""
    if warm and device == "cuda":
        work()
    synchronize(device)
    started = time.perf_counter()
    result = work()
    synchronize(device)
    return time.perf_counter() - started, result


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def product_rate(dims: int, dtype: torch.dtype, device: str, repeats: int = 8) -> float:
    """Floating-point operations a second of a plain product (rows, dims) x (dims, dims), at the best number of rows."""
    rates = []
    for rows in (512, 1024, 2048, 4096) if device == "cpu" else (2**14, 2**16):
        a, b = (torch.randn(n, dims, device=device).to(dtype) for n in (rows, dims))
        out = torch.mm(a, b)
        seconds, _ = clock(lambda a=a, b=b, out=out: [torch.mm(a, b, out=out) for _ in range(repeats)], device)
        rates.append(2 * repeats * rows * dims**2 / seconds)
    return max(rates)


def scoring_work(dims: int) -> float:
    """Floating-point operations that scoring a word and an image takes: half a product with D, attention, context."""
    return 2 * (dims * (dims + 1) / 2 + 2 * REGIONS * dims)


def gradient_work(dims: int) -> float:
    """Likewise for scoring and differentiating: a product with K, half of one for K's gradient, attention and context
    with the gradients of both factors of each."""
    return 2 * (dims**2 + dims * (dims + 1) / 2 + 6 * REGIONS * dims)


def peak_memory(device: str) -> float:
    """Bytes: the most that this process has ever held on a device."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def start_peak_memory(device: str) -> float:
    """Begin to measure peak_memory anew, where that can be; bytes that are held now, or were at most."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    return peak_memory(device)


def median(values) -> float:
    return statistics.median(values)


def machine(device: str) -> str:
    name = torch.cuda.get_device_name() if device == "cuda" else _processor()
    where = name if device == "cuda" else f"{torch.get_num_threads()} threads of {name}"
    return f"{where}, Python {platform.python_version()}, torch {torch.__version__}, {date.today()}"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def show(title: str, columns: list[str], rows: list[list[str]], device: str) -> None:
    """Print a table under the machine it was measured on."""
    print(f"{title}\n{machine(device)}\n")
    print_table(columns, rows)


def print_table(columns: list[str], rows: list[list[str]]) -> None:
    """Names to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    for row in (columns, *rows):
        cells = [f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)]
        print(f"{row[0]:<{widths[0]}}", *cells[1:], sep="  ")


def write_json(path: str, figures: dict, device: str) -> None:
    """Write what was measured so far; a benchmark that is ended while it writes leaves the file as it was."""
    if path:
        with replacing(path) as file:
            text = json.dumps({"machine": machine(device), "cores": os.cpu_count(), **figures}, indent=2)
            file.write(f"{text}\n".encode())
