"""`prepare scenes`: the embedded data set."""

import argparse
import json
import time
from pathlib import Path

from lib.prepare.scenes import write_scenes


def add_flags(flags: argparse.ArgumentParser) -> None:
    flags.add_argument("--data_path", type=Path, default=Path("data"), help="folder of the data sets")
    flags.add_argument("--data_name", default="scenes_precomp", help="name of the data set, a folder in there")
    flags.add_argument("--vocab", type=Path, default=Path("vocab/scenes"), help="folder of the vocabulary")
    flags.add_argument("--images", type=int, default=2000, help="train pictures; dev has a tenth, testall half of them")
    flags.add_argument("--seed", type=int, default=0, help="another seed draws other pictures")


def run(args: argparse.Namespace) -> None:
    started = time.perf_counter()
    folder = args.data_path / args.data_name
    if not write_scenes(folder, args.vocab, args.images, args.seed):
        print(f"{folder} and {args.vocab} are already there")
        return
    settings = json.loads((folder / "scenes.json").read_text(encoding="utf-8"))
    captions = (folder / "train_caps.txt").read_text(encoding="utf-8").splitlines()
    sizes = ", ".join(f"{split} {count} ({5 * count} captions)" for split, count in settings["splits"].items())
    print(f"{folder}: images {sizes}; {settings['regions']} regions of img_dim {settings['img_dim']} each")
    print(f"{args.vocab}: the vocabulary")
    print(f'captions such as "{captions[0]}" and "{captions[1]}"')
    print(f"{time.perf_counter() - started:.0f} seconds")
