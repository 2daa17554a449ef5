"""train.py itself on a file of Flickr30K's size, for a limited time: pairs a second, with features from the file and
kept on the device.

    python benchmarks/real_training.py                 # writes 4.3 GB below --folder, removed at the end

Random features in float16, as `python -m lib.prepare pack` writes them, captions of random words, BERT-base with random
weights, hardest negatives. The rate is the median of the lines of the run's log, without the first two. The file has
just been written: it is read from the page cache if that holds it, not from the disk.

--step compares the rate with that of the training step alone, which benchmarks/training.py has measured. What is
missing to 100 % is time spent on loading, copying and logging. It can be above 100 %: a run drops a fifth of the
regions, which the step alone does not.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import common  # noqa: E402
from benchmarks.evaluate import write_bert, write_data  # noqa: E402

BLOCK = 500  # different images; the file repeats them, rotated by one image more each time
FLICKR30K = 29_000  # images
SPEED = re.compile(r"step \d+ .* ([\d.]+) pairs/s")
WAYS = {"features from the file": [], "features on the device": ["--device_features"]}
START = 30.0  # seconds that a run may take before the first line of its log


def main() -> None:
    flags = common.parser(__doc__.splitlines()[0])
    flags.add_argument("--images", type=int, default=FLICKR30K, help="images; five captions each")
    flags.add_argument("--img_dim", type=int, default=2048, help="numbers of a region")
    flags.add_argument("--batch_size", type=int, default=128, help="pairs")
    flags.add_argument("--precision", default="bf16", help="of the products")
    flags.add_argument("--seconds", type=float, default=15, help="of training, in each way")
    flags.add_argument("--log_step", type=int, default=50, help="steps that a line of the log is the mean of")
    flags.add_argument("--step", default="", help="figures of benchmarks/training.py, to compare with")
    flags.add_argument("--folder", default=None, help="where the file is written; default: the system's temporary one")
    settings = common.parse(flags, images=8, img_dim=8, batch_size=4, log_step=2)
    with tempfile.TemporaryDirectory(dir=settings.folder) as folder:
        bytes_of_image = common.REGIONS * settings.img_dim * 2
        images = min(settings.images, shutil.disk_usage(folder).free // 2 // bytes_of_image)
        bert = write_bert(Path(folder), **common.bert_sizes(settings))
        data = write_data(Path(folder), {"dev": 8}, settings.img_dim)
        write_train(data, images, settings.img_dim)
        figures = {}
        for name, way in list(WAYS.items())[: 1 if settings.toy else None]:
            figures[name] = {**train(settings, data, bert, way), "images": images}
            common.write_json(settings.json, {"figures": figures}, settings.device)
    report(settings, figures)


def write_train(folder: Path, images: int, img_dim: int) -> None:
    """Features in float16 and captions of the train split."""
    rng = np.random.default_rng(0)
    block = rng.standard_normal((min(BLOCK, images), common.REGIONS, img_dim), dtype=np.float32).astype(np.float16)
    with open(folder / "train_ims.npy", "wb") as file:
        header = {"descr": "<f2", "fortran_order": False, "shape": (images, common.REGIONS, img_dim)}
        np.lib.format.write_array_header_1_0(file, header)
        for number, first in enumerate(range(0, images, len(block))):
            file.write(np.roll(block, number, axis=0)[: images - first].data)
    lengths = np.clip(rng.normal(11, 4, 5 * images).round().astype(int), 3, 20)
    words = [f"word{number}" for number in rng.integers(2000, size=lengths.sum())]
    ends = lengths.cumsum()
    captions = (" ".join(words[end - length : end]) for end, length in zip(ends, lengths, strict=True))
    (folder / "train_caps.txt").write_text("\n".join(captions) + "\n", encoding="utf-8")


def train(settings, data: Path, bert: Path, way: list[str]) -> dict[str, float]:
    """Pairs a second of a run that is ended after a while, and the seconds that it took to its first line."""
    run = data.parent / f"run{len(way)}"
    command = [
        *(sys.executable, str(ROOT / "train.py"), "--data_path", str(data.parent), "--data_name", data.name),
        *("--bert", str(bert), "--bert_from_scratch", "--img_dim", str(settings.img_dim), *way),
        *("--embed_size", str(settings.embed_size)),
        *("--batch_size", str(settings.batch_size), "--device", settings.device, "--precision", settings.precision),
        *("--max_violation", "--num_epochs", "1", "--log_step", str(settings.log_step), "--model_name", str(run)),
    ]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    first = None
    while process.poll() is None and time.perf_counter() - (first or started + START) < settings.seconds:
        time.sleep(0.2)
        first = first or (time.perf_counter() if speeds(run) else None)
    if process.poll() is None:
        process.kill()
        process.wait()
    elif process.returncode:
        sys.exit(process.returncode)
    rates = speeds(run)
    rate = common.median(rates[2:] or rates[-1:] or [0.0])
    figures = {"pairs_a_second": rate, "lines": len(rates), "start_seconds": (first or time.perf_counter()) - started}
    if step := alone(settings):
        figures["of_the_step_alone"] = figures["pairs_a_second"] / step
    return figures


def speeds(run: Path) -> list[float]:
    log = run / "run.log"
    return [float(speed) for speed in SPEED.findall(log.read_text())] if log.exists() else []


def alone(settings) -> float:
    """Pairs a second of the same step without a loader, 0 where it was not measured."""
    if not settings.step or not Path(settings.step).exists():
        return 0.0
    figures = json.loads(Path(settings.step).read_text())["figures"]
    return figures.get(f"{settings.precision}, hinge", {}).get("pairs_a_second", 0.0)


def report(settings, figures: dict[str, dict]) -> None:
    rows = []
    for name, one in figures.items():
        share = f"{100 * one['of_the_step_alone']:.0f} %" if "of_the_step_alone" in one else ""
        rows.append([name, f"{one['pairs_a_second']:.0f}", share, f"{one['start_seconds']:.1f}"])
    title = f"train.py, {figures[name]['images']} images, batches of {settings.batch_size} pairs, {settings.precision}"
    common.show(title, ["", "pairs/s", "of the step alone", "s to the first line"], rows, settings.device)


if __name__ == "__main__":
    main()
