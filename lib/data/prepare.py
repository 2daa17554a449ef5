"""Prepare a data set for training: `python -m lib.data.prepare scenes`."""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from lib.cli import Parser, program
from lib.data.scenes import write_scenes


@program
def main(argv: Sequence[str] | None = None):
    parser = Parser(prog="python -m lib.data.prepare", description="Prepare a data set for training.")
    commands = parser.add_subparsers(title="data sets", required=True, metavar="DATA_SET")
    _add_scenes(commands)
    args = parser.parse_args(argv)
    args.run(args)


def _add_scenes(commands):
    summary = "draw the project's own data set: pictures of shapes, their captions and region features"
    scenes = commands.add_parser("scenes", help=summary, description=summary)
    scenes.add_argument("--data_path", type=Path, default=Path("data"), help="folder of the data sets")
    scenes.add_argument("--data_name", default="scenes_precomp", help="name of the data set, a folder in there")
    scenes.add_argument("--vocab", type=Path, default=Path("vocab/scenes"), help="folder of the vocabulary")
    scenes.add_argument(
        "--images", type=int, default=2000, help="train pictures; dev has a tenth, testall half of them"
    )
    scenes.add_argument("--seed", type=int, default=0, help="another seed draws other pictures")
    scenes.set_defaults(run=_run_scenes)


def _run_scenes(args):
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


if __name__ == "__main__":
    sys.exit(main())
