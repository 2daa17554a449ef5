"""The training loader: time to open a data set, pairs a second, memory of each process over an epoch.

    python benchmarks/loader.py                            # 0.3 GB of random features, in seconds
    python benchmarks/loader.py --files flickr30k coco     # the real sizes: writes 25 GB below --folder, once

Files hold images x 36 x 2,048 numbers and five captions of random words an image. Batches are taken as fast as they
come, augmented, in float16. Memory is what a process shares with no other (Linux only), at its highest over the epoch
above what it was at the first batch. The second table is of a file that is not in the page cache: shuffled without
telling the system which images come next, shuffled with telling it, and in the file's order.
"""

import json
import multiprocessing
import os
import sys
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset, Subset

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import common  # noqa: E402
from lib.cli import with_bar  # noqa: E402
from lib.data.batches import EpochBatches, loader, on_device  # noqa: E402
from lib.data.dataset import open_split  # noqa: E402
from lib.data.tokenizer import Tokenizer, load_tokenizer  # noqa: E402
from lib.files import replacing  # noqa: E402

FILES = {"small": (1_000, np.float32), "flickr30k": (29_000, np.float32), "coco": (113_287, np.float16)}  # images, type
BLOCK = 250  # images written at a time
WORDS = 8_000
COLD_BATCHES = 100
CPU = torch.device("cpu")


def main() -> None:
    flags = common.parser(__doc__.splitlines()[0])
    flags.add_argument("--folder", default="data/loader_benchmark", help="where the files are, or are made")
    flags.add_argument("--files", nargs="+", choices=FILES, default=["small"], help="which of them")
    flags.add_argument("--img_dim", type=int, default=2048, help="numbers of a region")
    flags.add_argument("--workers", type=int, default=2, help="processes that read features")
    flags.add_argument("--batch_size", type=int, default=128, help="pairs")
    flags.add_argument("--batches", type=int, default=0, help="batches of an epoch that are taken; 0: all")
    settings = flags.parse_args()
    folder = Path(settings.folder)
    tokenizer = make_tokenizer(folder)
    figures = {name: measure(settings, make(folder, name, settings.img_dim), tokenizer) for name in settings.files}
    report(figures, f"batches of {settings.batch_size} pairs, {settings.workers} workers")
    common.write_json(settings.json, {"figures": figures}, "cpu")


def make_tokenizer(folder: Path) -> Tokenizer:
    folder.mkdir(parents=True, exist_ok=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{number}" for number in range(WORDS))]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "vocab_size": len(words)}))
    return load_tokenizer(str(folder))


def make(folder: Path, name: str, img_dim: int) -> Path:
    """The folder of a data set of one split, train, which is written unless it is there."""
    images, dtype = FILES[name]
    target = folder / f"{name}_{img_dim}"
    if (target / "train_ims.npy").exists():
        return target
    shape, rng = (images, common.REGIONS, img_dim), np.random.default_rng(0)
    with replacing(target / "train_caps.txt") as file:
        for count in rng.integers(8, 14, size=5 * images):
            file.write(" ".join(f"word{word}" for word in rng.integers(WORDS, size=count)).encode() + b"\n")
    with replacing(target / "train_ims.npy") as file:
        header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for first in with_bar(range(0, images, BLOCK), f"writing {target}"):
            block = rng.random((min(BLOCK, images - first), *shape[1:]), dtype=np.float32)
            file.write(block.astype(dtype).data)
    return target


def measure(settings: Namespace, folder: Path, tokenizer: Tokenizer) -> dict:
    open_s, split = common.clock(lambda: open_split(str(folder.parent), folder.name, "train"), "cpu")
    tokens_s, captions = common.clock(lambda: tokenizer.tokenize(split.captions), "cpu")
    epoch = EpochBatches(split, captions, tokenizer, settings.batch_size, seed=0, epoch=0, half=True)
    wanted = range(min(settings.batches or len(epoch), len(epoch)))
    cold, pairs, ahead = {}, epoch.pairs, epoch.read_ahead
    for way in ("shuffled", "read ahead", "in order"):
        if way == "in order":
            epoch.pairs = np.arange(pairs.size).reshape(pairs.shape) * 5 % pairs.size  # another image each
        epoch.read_ahead = ahead if way == "read ahead" else len(epoch)
        forget(split.features.path)
        cold[way] = take(Subset(epoch, wanted[:COLD_BATCHES]), settings)["pairs_s"]
    epoch.pairs, epoch.read_ahead = pairs, ahead
    with open(split.features.path, "rb") as file:  # so that as much of it as fits is in the page cache
        while file.read(2**24):
            pass
    size = os.path.getsize(split.features.path)
    return {
        "bytes": size,
        "open_s": open_s,
        "tokens_s": tokens_s,
        **take(Subset(epoch, wanted), settings),
        "cold": cold,
    }


def take(batches: Dataset, settings: Namespace) -> dict[str, float]:
    """Take all batches: pairs a second, and the growth of each process's memory since its first batch, in bytes."""
    first, most, started = {}, {}, time.perf_counter()
    for number, _ in enumerate(on_device(loader(batches, settings.workers, CPU), CPU)):
        if number % 25 == 0:
            for process, held in unshared().items():
                first.setdefault(process, held)
                most[process] = max(most.get(process, 0), held)
    seconds = time.perf_counter() - started
    growth = {process: most[process] - first[process] for process in most}
    main = growth.pop(os.getpid(), 0)
    return {
        "pairs_s": len(batches) * settings.batch_size / seconds,
        "main_growth": main,
        "worker_growth": max(growth.values(), default=0),
    }


def unshared() -> dict[int, int]:
    """Bytes that this process and each of its workers share with no other process."""
    held = {}
    for process in (os.getpid(), *(worker.pid for worker in multiprocessing.active_children())):
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue  # it has just ended, or the system is not Linux
        held[process] = sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Private_"))
    return held


def forget(path: Path) -> None:
    """Put a file out of the page cache."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def report(figures: dict[str, dict], title: str) -> None:
    rows = [
        [name, f"{one['bytes'] / 1e9:.1f}", f"{one['open_s']:.2f}", f"{one['tokens_s']:.1f}", f"{one['pairs_s']:.0f}"]
        + [f"{one[growth] / 1e6:.0f}" for growth in ("main_growth", "worker_growth")]
        for name, one in figures.items()
    ]
    common.show(title, ["file", "GB", "open s", "tokens s", "pairs/s", "main +MB", "worker +MB"], rows, "cpu")
    print()
    ways = list(next(iter(figures.values()))["cold"])
    rows = [[name, *(f"{pairs_s:.0f}" for pairs_s in one["cold"].values())] for name, one in figures.items()]
    common.show(f"pairs/s of up to {COLD_BATCHES} batches that are not in memory", ["file", *ways], rows, "cpu")


if __name__ == "__main__":
    main()
