"""The whole evaluation command, eval.py, with BERT-base and random features: seconds of each part, and memory.

    python benchmarks/evaluate.py
    python benchmarks/evaluate.py --processes 1 2 4    # jobs of torchrun, too: a GPU or a part of the cores each

Makes a data set of random features and captions of random words in a temporary folder, trains one step to have a
checkpoint, and evaluates it in each way in processes of their own. Memory counts all processes of the command, features
included, and the largest of them; it is read from /proc, so on Linux only.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import common  # noqa: E402

IMG_DIM = 2048
WAYS = {
    "float32": [],
    "bfloat16": ["--precision", "bf16"],
    "float32, best 20 exact": ["--rerank", "20"],
    "float32, best K exact": ["--rerank", "auto"],
}


def main() -> None:
    flags = common.parser(__doc__.splitlines()[0])
    flags.add_argument("--images", type=int, default=200, help="images; five captions each")
    flags.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="ways to evaluate")
    flags.add_argument("--processes", type=int, nargs="+", default=[1], help="numbers of processes")
    settings = flags.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = write_data(Path(folder), {"train": 8, "dev": 8, "test": settings.images}, IMG_DIM)
        bert = write_bert(Path(folder), **common.bert_sizes(settings))
        train(settings, data, bert)
        results = {
            name + (f", {count} processes" if count > 1 else ""): evaluate(settings, data, WAYS[name], count)
            for name in settings.ways
            for count in settings.processes
        }
    report(settings, results)


def write_data(folder: Path, images: dict[str, int], img_dim: int) -> Path:
    """Random unit-free features and captions of 3 to 20 words. images: how many in each split."""
    data, rng = folder / "random_precomp", np.random.default_rng(0)
    data.mkdir()
    for split, count in images.items():
        features = np.lib.format.open_memmap(
            data / f"{split}_ims.npy", "w+", np.float32, (count, common.REGIONS, img_dim)
        )
        for image in features:
            image[:] = rng.standard_normal(image.shape, dtype=np.float32)
        lengths = np.clip(rng.normal(11, 4, 5 * count).round().astype(int), 3, 20)
        captions = [" ".join(f"word{number}" for number in rng.integers(2000, size=length)) for length in lengths]
        (data / f"{split}_caps.txt").write_text("\n".join(captions) + "\n", encoding="utf-8")
    return data


def write_bert(folder: Path, **sizes: int) -> Path:
    """BERT-base's configuration, but for some sizes, and a vocabulary of its size; weights start at random."""
    from transformers import BertConfig

    bert = folder / "bert"
    BertConfig(**sizes).save_pretrained(bert)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{number}" for number in range(30_517))]
    (bert / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    return bert


def train(settings, data: Path, bert: Path, *flags: str) -> None:
    subprocess.run(
        [
            *(
                sys.executable,
                str(ROOT / "train.py"),
                "--data_path",
                str(data.parent),
                "--data_name",
                data.name,
                *flags,
            ),
            *("--bert", str(bert), "--bert_from_scratch", "--embed_size", str(settings.embed_size)),
            *("--batch_size", "8", "--num_epochs", "1"),
            *("--model_name", str(data.parent / "run"), "--device", settings.device, "--workers", "0"),
        ],
        check=True,
        stdout=subprocess.DEVNULL,
    )


def evaluate(settings, data: Path, flags: list[str], count: int) -> dict:
    """Run eval.py on the test split: its own timing and results, the whole command's seconds and its memory."""
    written = data.parent / "results.json"
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)] if count > 1 else []
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count))} if count > 1 else {}
    started = time.perf_counter()
    process = subprocess.Popen(
        [
            *(sys.executable, *launch, str(ROOT / "eval.py"), "--checkpoint", str(data.parent / "run"), *flags),
            *("--device", settings.device, "--json", str(written)),
        ],
        stdout=subprocess.DEVNULL,
        env={**os.environ, **threads},
    )
    in_all = largest = 0
    while process.poll() is None:
        held = held_by_those_that_mention(data.parent)
        in_all, largest = max(in_all, sum(held)), max(largest, *held, 0)
        time.sleep(0.1)
    if process.returncode:
        sys.exit(process.returncode)
    seconds = time.perf_counter() - started
    return {**json.loads(written.read_text()), "command_s": seconds, "bytes": in_all, "bytes_of_largest": largest}


def held_by_those_that_mention(folder: Path) -> list[int]:
    """Bytes of memory of each process whose command names a folder; what they share is divided among them."""
    held = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if str(folder).encode() in (process / "cmdline").read_bytes():
                lines = (process / "smaps_rollup").read_text().splitlines()
                held.append(next(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:")))
        except (OSError, StopIteration):
            continue  # it has just ended
    return held


def report(settings, results: dict[str, dict]) -> None:
    columns = [
        "",
        "command s",
        "load s",
        "encode s",
        "similarity s",
        "rank s",
        "exact pairs",
        "GB in all",
        "GB of the largest",
    ]
    rows = []
    for name, one in results.items():
        exact = 1.0 if one["rerank"] is None else one["rerank"]["exact_pairs"] / one["rerank"]["pairs"]
        name = name.replace("best K", f"best {one['rerank']['k']} (auto)") if one["rerank"] else name
        seconds = [one["command_s"], *(one["timing"][f"{part}_s"] for part in ("load", "encode", "similarity", "rank"))]
        memory = [f"{one[part] / 1e9:.2f}" for part in ("bytes", "bytes_of_largest")]
        rows.append([name, *(f"{value:.1f}" for value in seconds), f"{100 * exact:.1f} %", *memory])
    captions = 5 * settings.images
    title = f"eval.py, {settings.images} images x {captions} captions, BERT-base, {settings.embed_size} dimensions"
    common.show(title, columns, rows, settings.device)
    common.write_json(settings.json, {"figures": results}, settings.device)


if __name__ == "__main__":
    main()
