"""`prepare images` against a plain loop, one picture at a time through Pillow and the vision model: pictures a second.

    python benchmarks/images.py --photos PHOTOS --encoder torchvision:squeezenet1_1 --weights squeezenet1_1.pth

Both take the same pictures in turns, --rounds times, and the medians are shown; the command's figures are without
loading the model. CPU: seconds of all threads for a thousand pictures, which other programs disturb less.
"""

import itertools
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import common  # noqa: E402
from lib.data.images import list_pictures  # noqa: E402
from lib.model.vision import VisionModel, build_vision, load_vision  # noqa: E402
from lib.prepare.images import BATCH_SIZE, BATCH_SIZE_OF_GPU, PictureBatches, write_part  # noqa: E402
from lib.runtime import choose_compute  # noqa: E402


def main() -> None:
    flags = common.parser(__doc__.splitlines()[0])
    flags.add_argument("--photos", default="", help="folder of pictures; without one they are made of noise")
    flags.add_argument(
        "--encoder", default="torchvision:squeezenet1_1", help="vision model, its map pooled to 36 cells"
    )
    flags.add_argument("--weights", default="", help="its weights; without a file they are random")
    flags.add_argument("--pictures", type=int, default=512, help="the first so many of the folder")
    flags.add_argument("--image_size", type=int, default=0, help="pixels of each side; 0: the vision model's own")
    settings = common.parse(flags, pictures=4, image_size=64)
    batch_size = BATCH_SIZE_OF_GPU if settings.device == "cuda" else BATCH_SIZE
    with tempfile.TemporaryDirectory() as work:
        folder = Path(settings.photos or make_pictures(Path(work) / "photos", settings.pictures))
        names = list_pictures(folder)[0][: settings.pictures]

        def command(model: VisionModel) -> None:
            batches = PictureBatches(folder, names, batch_size, model.preprocessing)
            with choose_compute(settings.device).in_force():
                write_part(Path(work), batches, model, choose_compute(settings.device), workers=10)

        ways = {"plain loop": lambda model: loop(folder, names, model, settings.device), "command": command}
        figures = measure(ways, settings, len(names))
    rows = [[way, f"{one['pictures_s']:.1f}", f"{one['cpu_s']:.1f}"] for way, one in figures.items()]
    title = f"{settings.encoder}, {len(names)} pictures, batches of {batch_size}"
    common.show(title, ["way", "pictures/s", "CPU s for 1,000"], rows, settings.device)
    common.write_json(settings.json, {"figures": figures}, settings.device)


def make_pictures(folder: Path, count: int) -> Path:
    """JPEGs of noise, 500 x 375 pixels."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(count):
        PIL.Image.fromarray(rng.integers(0, 256, (375, 500, 3), np.uint8)).save(folder / f"{number}.jpg")
    return folder


def loop(folder: Path, names: list[str], model: VisionModel, device: str) -> None:
    """What a script of ten lines does: the network as its library makes it, a picture at a time."""
    model.to(device).to(memory_format=torch.contiguous_format)
    height, width = model.preprocessing.size
    for name in names:
        picture = PIL.Image.open(folder / name).convert("RGB").resize((width, height))
        with torch.no_grad():
            pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()[None].to(device)
            features = model.feature_map(model.normalize(pixels))
            torch.nn.functional.adaptive_avg_pool2d(features, 6).half().cpu().numpy()


def measure(ways: dict[str, Callable[[VisionModel], None]], settings, pictures: int) -> dict[str, dict[str, float]]:
    """Pictures a second, and CPU seconds for a thousand of them, of each way: medians of the rounds."""
    models = {}
    for way in ways:
        if settings.weights:
            models[way] = load_vision(settings.encoder, 36, settings.weights, settings.image_size)
        else:
            models[way] = build_vision(settings.encoder, {}, 36, settings.image_size)
    taken: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for _, way in itertools.product(range(settings.rounds), ways):
        used = time.process_time()
        seconds, _ = common.clock(lambda way=way: ways[way](models[way]), settings.device)
        taken[way].append((pictures / seconds, 1000 * (time.process_time() - used) / pictures))
    medians = {way: map(common.median, zip(*rounds, strict=True)) for way, rounds in taken.items()}
    return {way: dict(zip(("pictures_s", "cpu_s"), values, strict=True)) for way, values in medians.items()}


if __name__ == "__main__":
    main()
