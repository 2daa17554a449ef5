"""From captions and features by image id to a data set; what `karpathy` and `own` share."""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from lib.cli import InputError, with_bar
from lib.files import check_space, new_folder
from lib.prepare.io import Image, add_data_flags, name_some, span, table, write_lines, write_split
from lib.prepare.sources import Features

HEADER = ("split", "images", "captions", "an image", "regions", "missing")


class Captioned(NamedTuple):
    """An image with captions. found: the id under which its features are found; empty where they are not."""

    id: str
    found: str
    captions: list[str]


def add_flags(flags: argparse.ArgumentParser) -> None:
    """The flags that say where the features are and where the data set goes."""
    flags.add_argument(
        "--features",
        type=Path,
        nargs="+",
        action="extend",
        required=True,
        metavar="PATH",
        help="features by image id: what `tsv` wrote or another data set (FOLDER, or FOLDER/SPLIT), "
        "or a folder of ID.npy or ID.npz; several are searched in turn",
    )
    add_data_flags(flags)


def write_dataset(folder: Path, splits: Mapping[str, Sequence[Captioned]], features: Features) -> None:
    """Write a data set, and print what it holds.

    Images without features are left out, named, and listed in {split}_missing.txt; images without captions are listed
    in without_captions.txt. Raises InputError where no image has features, the name is taken, the disk has not the
    room, or features are not sound.
    """
    every = [image for images in splits.values() for image in images]
    used = [image.found for image in every if image.found]
    if not used:
        raise InputError(
            f"--features: none of the images is there; the captions are of {name_some([image.id for image in every])}, "
            f"the features of {name_some(features.ids)}"
        )
    size, dtype = features.summarise(used)
    rows, notes = [], []
    with new_folder(folder, "--data_name") as temporary:
        check_space(folder, size, "the data set")

        def leave_out(file: str, what: str, ids: list[str]) -> None:
            if ids:
                write_lines(temporary / file, ids)
                notes.append(f"{what}: {len(ids):,} images, {name_some(ids)}; all are in {folder / file}")

        for split, images in splits.items():
            there = [image for image in images if image.found]
            missing = [image.id for image in images if not image.found]
            regions = write_split(temporary, split, _read(split, there, features), dtype) if there else []
            leave_out(f"{split}_missing.txt", f"no features for {split}", missing)
            each = [len(image.captions) for image in there]
            rows.append((split, f"{len(each):,}", f"{sum(each):,}", span(each), span(regions), f"{len(missing):,}"))
        leave_out("without_captions.txt", "no captions", sorted(set(features.ids).difference(used)))
    print(f"{folder}\n\n{table(HEADER, rows)}", *notes, sep="\n")


def clean_caption(text: str) -> str:
    """The text on one line, its white space made single blanks. Raises ValueError where UTF-8 cannot hold it."""
    caption = " ".join(text.replace("\0", " ").split())
    caption.encode()
    return caption


def _read(split: str, images: Sequence[Captioned], features: Features) -> Iterator[Image]:
    for image in with_bar(images, split, len(images)):
        yield features.read(image.found)._replace(id=image.id, captions=image.captions)
