"""The training loader on files of the real size: time to open, pairs a second, memory of each process over an epoch.

    python benchmarks/loader.py                        # makes 25 GB of random features below --folder, once
    python benchmarks/loader.py --files flickr30k      # 8.5 GB of them

Flickr30K: 29,000 x 36 x 2,048 in float32; COCO: 113,287 x 36 x 2,048 in float16; five captions of random words each.
Batches are taken as fast as they come, augmented, in float16. Memory is what a process shares with no other
(/proc/PID/smaps_rollup, so on Linux only), at its highest over the epoch above what it was at the first batch. The
second table is of a file that has been put out of the page cache: shuffled without and with telling the system which
images come next, and in the file's order.
"""

import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Subset
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import common  # noqa: E402
from lib.data.batches import EpochBatches, loader, on_device  # noqa: E402
from lib.data.dataset import Split, open_split  # noqa: E402
from lib.data.token_cache import tokenize_split  # noqa: E402
from lib.data.tokenizer import Tokenizer, load_tokenizer  # noqa: E402
from lib.files import check_space, replacing  # noqa: E402

IMG_DIM = 2048
FILES = {"flickr30k": (29_000, np.float32), "coco": (113_287, np.float16)}
BLOCK = 250  # images written at a time
WORDS = 8_000
COLD_BATCHES = 100
NEVER = 10**9


def main() -> None:
    flags = common.parser(__doc__.splitlines()[0])
    flags.add_argument("--folder", default="data/loader_benchmark", help="where the files are, or are made")
    flags.add_argument("--files", nargs="+", choices=FILES, default=list(FILES), help="which of them")
    flags.add_argument("--workers", type=int, default=2, help="processes that read features")
    flags.add_argument("--batch_size", type=int, default=128, help="pairs")
    flags.add_argument("--batches", type=int, default=0, help="batches of an epoch that are taken; 0: all")
    flags.set_defaults(rounds=1)
    settings = flags.parse_args()
    folder = Path(settings.folder)
    tokenizer = make_tokenizer(folder)
    figures = {}
    for name in settings.files:
        make(folder, name)
        figures[name] = measure(settings, folder, name, tokenizer)
    report(settings, figures)


# The files


def make_tokenizer(folder: Path) -> Tokenizer:
    folder.mkdir(parents=True, exist_ok=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{number}" for number in range(WORDS))]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    return load_tokenizer(str(folder), 512, len(words))


def make(folder: Path, name: str) -> None:
    """Write a data set of one split, train, unless it is there."""
    images, dtype = FILES[name]
    path = folder / name / "train_ims.npy"
    if path.exists():
        return
    shape, rng = (images, common.REGIONS, IMG_DIM), np.random.default_rng(0)
    check_space(folder, int(np.prod(shape)) * np.dtype(dtype).itemsize, name)
    with replacing(folder / name / "train_caps.txt") as file:
        for count in rng.integers(8, 14, size=5 * images):
            file.write(" ".join(f"word{word}" for word in rng.integers(WORDS, size=count)).encode() + b"\n")
    with replacing(path) as file:
        header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for first in tqdm(range(0, images, BLOCK), desc=f"writing {path}", leave=False, disable=None):
            block = rng.random((min(BLOCK, images - first), *shape[1:]), dtype=np.float32)
            file.write(torch.from_numpy(block).to(torch.float16 if dtype == np.float16 else torch.float32).numpy().data)


# Measurements


def measure(settings, folder: Path, name: str, tokenizer: Tokenizer) -> dict:
    seconds, split = common.clock(lambda: open_split(str(folder), name, "train", IMG_DIM), "cpu")
    tokens_s, captions = common.clock(lambda: tokenize_split(tokenizer, split), "cpu")
    epoch = EpochBatches(split, captions, tokenizer, settings.batch_size, seed=0, epoch=0, half=True)
    cold = {way: run_cold(settings, epoch, split, way) for way in ("shuffled", "read ahead", "in order")}
    warm_up(split)
    batches = Subset(epoch, range(min(settings.batches or len(epoch), len(epoch))))
    return {
        "bytes": os.path.getsize(split.features.path),
        "cached_bytes": cached_bytes(split),
        "open_s": seconds,
        "tokens_s": tokens_s,
        **take(settings, batches),
        "cold_pairs_a_second": cold,
    }


def take(settings, batches) -> dict:
    """Take all batches; pairs a second from the second hundred on, and each process's memory above its first."""
    device, first, most, begun = torch.device("cpu"), {}, {}, None
    skipped = min(100, len(batches) // 2)
    for number, _ in enumerate(on_device(loader(batches, settings.workers, device), device)):
        if number == skipped:
            begun = time.perf_counter()
        if number % 25 == 0 or number == len(batches) - 1:
            for process, held in unshared().items():
                first.setdefault(process, held)
                most[process] = max(most.get(process, 0), held)
    pairs = (len(batches) - skipped - 1) * settings.batch_size
    own = os.getpid()
    return {
        "batches": len(batches),
        "pairs_a_second": pairs / (time.perf_counter() - begun),
        "main_growth_bytes": most[own] - first[own],
        "worker_growth_bytes": max((most[one] - first[one] for one in most if one != own), default=0),
        "worker_bytes": max((most[one] for one in most if one != own), default=0),
    }


def unshared() -> dict[int, int]:
    """Bytes that this process and each of its workers share with no other."""
    held = {}
    for process in (os.getpid(), *(worker.pid for worker in multiprocessing.active_children())):
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue  # it has just ended
        held[process] = sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Private_"))
    return held


def run_cold(settings, epoch: EpochBatches, split: Split, way: str) -> float:
    """Pairs a second of some batches, none of whose features are in memory."""
    forget(split)
    pairs, ahead = epoch.pairs, epoch.read_ahead
    if way == "in order":
        epoch.pairs = np.arange(pairs.size).reshape(pairs.shape) * 5 % pairs.size  # another image each
    epoch.read_ahead = NEVER if way == "shuffled" else ahead
    device = torch.device("cpu")
    batches = Subset(epoch, range(min(COLD_BATCHES, len(epoch))))
    started = time.perf_counter()
    count = sum(1 for _ in on_device(loader(batches, settings.workers, device), device))
    epoch.pairs, epoch.read_ahead = pairs, ahead
    return count * settings.batch_size / (time.perf_counter() - started)


def forget(split: Split) -> None:
    """Put a file out of the page cache."""
    with open(split.features.path, "rb") as file:
        os.fdatasync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def warm_up(split: Split) -> None:
    """Read a file once, so that as much of it as fits is in the page cache."""
    block = bytearray(2**24)
    with open(split.features.path, "rb", buffering=0) as file:
        while file.readinto(block):
            pass


def cached_bytes(split: Split) -> int | None:
    """Bytes of a file in the page cache; None where `fincore` is not there."""
    try:
        command = ["fincore", "--bytes", "--noheadings", "--output", "RES", str(split.features.path)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def report(settings, figures: dict[str, dict]) -> None:
    columns = ["file", "GB", "in cache", "open s", "tokens s", "pairs/s", "main +MB", "worker +MB", "worker MB"]
    rows = []
    for name, one in figures.items():
        cached = "?" if one["cached_bytes"] is None else f"{100 * one['cached_bytes'] / one['bytes']:.0f} %"
        memory = (one[f"{part}_bytes"] / 1e6 for part in ("main_growth", "worker_growth", "worker"))
        cells = [f"{one['bytes'] / 1e9:.1f}", cached, f"{one['open_s']:.2f}", f"{one['tokens_s']:.1f}"]
        rows.append([name, *cells, f"{one['pairs_a_second']:.0f}", *(f"{value:.0f}" for value in memory)])
    title = f"batches of {settings.batch_size} pairs, {settings.workers} workers, an epoch or --batches of it"
    common.show(title, columns, rows, "cpu")
    print()
    ways = list(next(iter(figures.values()))["cold_pairs_a_second"])
    cold = [[name, *(f"{one['cold_pairs_a_second'][way]:.0f}" for way in ways)] for name, one in figures.items()]
    common.show(f"pairs/s of {COLD_BATCHES} batches that are not in memory", ["file", *ways], cold, "cpu")
    common.write_json(settings.json, {"figures": figures}, "cpu")


if __name__ == "__main__":
    main()
