"""An evaluation of COCO's size, all protocols from one scoring: seconds of each part, and memory.

    pip install eccv_caption
    python benchmarks/protocols.py

Makes 5,000 images with COCO's ids and 25,000 captions, of random features and words, as many right answers for PMRP and
CxC as those have, and a checkpoint with a small BERT that has taken a step; runs eval.py with everything it can report.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import common  # noqa: E402
from benchmarks.evaluate import evaluate, train, write_bert, write_data  # noqa: E402

IMG_DIM = 64
SMALL_BERT = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
PLAUSIBLE = {"image": 1500, "caption": 300}  # right answers of a query: 7.5 million pairs, files of some 120 MB
RATED = 45_000  # pairs of images, and of captions


def main() -> None:
    flags = common.parser(__doc__.splitlines()[0])
    flags.set_defaults(embed_size=64)
    settings = flags.parse_args()
    images, protocols = (10, ["--fold5"]) if settings.toy else (5000, ["--fold5", "--eccv"])
    with tempfile.TemporaryDirectory() as folder:
        data = write_data(Path(folder), {"train": 8, "dev": 8, "testall": images}, IMG_DIM)
        if not settings.toy:
            write_annotations(data)
        train(settings, data, write_bert(Path(folder), **SMALL_BERT), "--img_dim", str(IMG_DIM))
        files = ("--save_sims", str(data / "sims.npy"), "--ranks", str(data / "ranks.jsonl"))
        found = evaluate(settings, data, ["--split", "testall", *protocols, *files], 1)
        sizes = {name: (data / name).stat().st_size for name in ("sims.npy", "ranks.jsonl")}
    report(settings, found, sizes)


def write_annotations(data: Path) -> None:
    """COCO's ids, and random right answers in the forms of PMRP's files and CxC's."""
    from eccv_caption import Metrics

    package, rng = Metrics(), np.random.default_rng(0)
    captions, image_of = package.coco_ids, package.coco_gts["t2i"]
    images = np.array([image_of[caption][0] for caption in captions[::5]])
    (data / "testall_ids.txt").write_text("".join(f"{image}\n" for image in images))
    folder = data / "cxc_annots"
    folder.mkdir()
    for query, queries, items in (("image", images, captions), ("caption", captions, images)):
        right = {str(one): rng.choice(items, PLAUSIBLE[query], replace=False).tolist() for one in queries}
        other = "caption" if query == "image" else "image"
        (folder / f"pm_{query}_to_{other}.json").write_text(json.dumps(right))
    for name, ids, form in (
        ("sis", images, "COCO_val2014_{:012}.jpg"),
        ("sts", captions, "COCO_val2014:sentid:{}"),
    ):
        pairs = ((form.format(a), form.format(b), rng.uniform(0, 5)) for a, b in rng.choice(ids, (RATED, 2)))
        lines = ["one,other,agg_score,sampling_method", *(f"{a},{b},{rating:.2f},random" for a, b, rating in pairs)]
        (folder / f"{name}_test.csv").write_text("\n".join(lines) + "\n")


def report(settings, found: dict, sizes: dict[str, int]) -> None:
    parts = ("load", "encode", "similarity", "rank", "protocols")
    columns = ["", "command s", *(f"{part} s" for part in parts), "GB of memory", *(f"{name} MB" for name in sizes)]
    row = ["all protocols", f"{found['command_s']:.0f}", *(f"{found['timing'][f'{part}_s']:.1f}" for part in parts)]
    row += [f"{found['bytes'] / 1e9:.2f}", *(f"{size / 1e6:.0f}" for size in sizes.values())]
    title = (
        f"eval.py --fold5 --eccv --ranks --save_sims, 5000 images x 25000 captions, {settings.embed_size} dimensions"
    )
    common.show(title, columns, [row], settings.device)
    common.write_json(settings.json, {"figures": found, "bytes_written": sizes}, settings.device)


if __name__ == "__main__":
    main()
