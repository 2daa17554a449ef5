"""Store a data set in float16, one row an image: half the size, a fifth of that where images stood there five times. A
run that was interrupted begins again."""

import argparse
import os
from collections.abc import Iterator

import numpy as np

from lib.cli import with_bar
from lib.data.dataset import Split, names_of, read_boxes
from lib.files import new_folder
from lib.prepare import io


def add_flags(flags: argparse.ArgumentParser) -> None:
    io.add_data_flags(flags, "f30k_precomp")
    flags.add_argument("--to", default="", help="name of the packed data set (default: DATA_NAME_packed)")


def run(args: argparse.Namespace) -> None:
    folder, names = io.find_splits(args)
    target, rows = args.data_path / (args.to or f"{args.data_name}_packed"), []
    splits = [io.open_features(folder, name) for name in names]
    with new_folder(target, "--to") as temporary:
        io.keep_encoder([folder], temporary)
        for split in splits:
            io.write_split(temporary, split.name, _halve(split), np.float16)
            sizes = [os.path.getsize(at / split.features.path.name) / 1e9 for at in (folder, temporary)]
            rows.append((split.name, f"{len(split.features):,}", *(f"{size:.2f}" for size in sizes)))
    print(f"{target}: float16, one row an image\n\n{io.table(('split', 'images', 'GB before', 'GB after'), rows)}")


def _halve(split: Split) -> Iterator[io.Image]:
    """The images in float16. Raises InputError on NaN and on what float16 cannot hold, with the row in the file."""
    images, arrays = len(split.features), (read_boxes(split), read_boxes(split, "objects", io.OBJECT))
    ids = names_of(split)
    ends = np.searchsorted(split.image_of_caption, np.arange(images + 1))
    for place, image_id in enumerate(with_bar(ids, split.name)):
        image = io.read_image(split, arrays, np.float16, place, image_id)
        yield image._replace(captions=split.captions[ends[place] : ends[place + 1]])
