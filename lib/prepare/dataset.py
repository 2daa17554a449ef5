"""From captions and features by image id to a data set; what `karpathy` and `own` share."""

import argparse
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from lib.cli import InputError, one_line
from lib.data.dataset import check_name
from lib.data.features import FeatureFile
from lib.files import LINE_BYTES, check_space, replacing
from lib.prepare.sources import Features
from lib.prepare.splits import table
from lib.prepare.writer import SplitWriter

NAMED = 5  # missing images that a message names


class Image(NamedTuple):
    """found: the id under which its features are found, None where they are not."""

    id: str
    found: str | None
    captions: list[str]


@dataclass
class Job:
    """A split to be written: the images that have features, and the ids of those that do not."""

    split: str
    images: list[Image]
    missing: list[str]
    writer: SplitWriter | None  # none where no image has features
    bytes: int


def add_flags(flags: argparse.ArgumentParser) -> None:
    """The flags that say where the features are and where the data set goes."""
    flags.add_argument(
        "--features",
        type=Path,
        nargs="+",
        action="extend",
        required=True,
        default=argparse.SUPPRESS,
        metavar="PATH",
        help="features by image id: what `tsv` wrote or another data set (FOLDER, or FOLDER/SPLIT), "
        "or a folder of ID.npy or ID.npz; several are searched in turn",
    )
    add_target_flags(flags)


def add_target_flags(flags: argparse.ArgumentParser) -> None:
    flags.add_argument("--data_path", type=Path, default=Path("data"), help="folder of the data sets")
    flags.add_argument(
        "--data_name", required=True, default=argparse.SUPPRESS, help="name of the new data set, a folder in there"
    )


def target_folder(args: argparse.Namespace) -> Path:
    """Where the data set goes. Raises InputError where the name leads out of --data_path."""
    check_name("--data_name", args.data_name, nested=True)
    return args.data_path / args.data_name


def write_dataset(folder: Path, splits: Mapping[str, Sequence[Image]], features: Features, made_from: dict) -> None:
    """Write the splits that are not there yet, and print what the data set holds.

    Images without features are left out, named, and listed in {split}_missing.txt. Raises InputError where no image
    has features, something else has the name, the disk has not the room, or features are not sound.
    """
    started = time.perf_counter()
    if folder.resolve() in {source.folder.resolve() for source in features.sources}:
        raise InputError(f"--features {folder}: is where the data set goes; choose another --data_name")
    check_found("image", [image for images in splits.values() for image in images], features)
    jobs = [_plan(folder, split, images, features, made_from) for split, images in splits.items() if images]
    unfinished = [job for job in jobs if job.writer and not job.writer.finished]
    if not unfinished:
        print(f"{folder} is already there")
    check_space(folder, sum(job.bytes - job.writer.bytes_there for job in unfinished), "the data set")
    for job in jobs:
        _write(folder, job, features)
    print(table(("split", "images", "captions", "each", "regions", "missing"), [_row(folder, job) for job in jobs]))
    for job in jobs:
        if job.missing:
            listed = folder / f"{job.split}_missing.txt"
            print(f"no features for {len(job.missing):,} of {job.split}: {name_some(job.missing)}; all are in {listed}")
    print(f"{folder}: {time.perf_counter() - started:.0f} seconds")


def check_found(what: str, images: Sequence[Image], features: Features) -> None:
    """Raises InputError, naming some ids of both sides, where no image has features."""
    if all(image.found is None for image in images):
        raise InputError(
            f"--features: no {what} has any there; the captions are of {name_some([image.id for image in images])}, "
            f"the features of {name_some(features.ids)}"
        )


def clean_caption(text: str) -> str:
    """White space inside made single blanks. Raises ValueError where that is no line of a caption file."""
    caption = " ".join(text.split())
    try:
        size = len(caption.encode())
    except UnicodeEncodeError:
        raise ValueError("the caption holds half a character (a lone surrogate)") from None
    if not caption:
        raise ValueError("the caption is empty")
    if "\0" in caption:
        raise ValueError("the caption holds a NUL character")
    if size > LINE_BYTES:
        raise ValueError(f"the caption is longer than {LINE_BYTES} bytes")
    return caption


def describe_counts(counts: Sequence[int] | np.ndarray) -> str:
    """ "36", or "10 to 100, mean 47.2" """
    fewest, most = min(counts), max(counts)
    return f"{fewest}" if fewest == most else f"{fewest} to {most}, mean {np.mean(counts):.1f}"


def name_some(image_ids: Sequence[str]) -> str:
    """The first few of them."""
    return one_line(", ".join([*image_ids[:NAMED], *(["..."] if len(image_ids) > NAMED else [])]))


def _plan(folder: Path, split: str, images: Sequence[Image], features: Features, made_from: dict) -> Job:
    there = [image for image in images if image.found is not None]
    missing = [image.id for image in images if image.found is None]
    if not there:
        return Job(split, [], missing, None, 0)
    size, dtype, boxes = features.summarise([image.found for image in there])
    digest = hashlib.sha256(json.dumps([*there, *missing]).encode()).hexdigest()
    writer = SplitWriter(folder, split, {**made_from, "features": features.identity, "images": digest}, dtype, boxes)
    return Job(split, there, missing, writer, size)


def _write(folder: Path, job: Job, features: Features) -> None:
    missing = "".join(f"{image_id}\n" for image_id in job.missing)
    if job.writer is None:
        with replacing(folder / f"{job.split}_missing.txt") as file:
            file.write(missing.encode())
        return
    with job.writer as writer:
        if writer.finished:
            return
        rest, total = job.images[writer.images :], len(job.images)
        for image in tqdm(rest, job.split, total, False, initial=writer.images, disable=None, unit=" images"):
            regions = features.read(image.found)
            writer.add(regions.features, image.id, regions.boxes, size=regions.size, origin=regions.origin)
        writer.finish([image.captions for image in job.images], {"missing": missing} if missing else {})


def _row(folder: Path, job: Job) -> list[str]:
    """A line of the table."""
    each = [len(image.captions) for image in job.images]
    if not each:
        return [job.split, "0", "0", "", "", f"{len(job.missing):,}"]
    regions = describe_counts(FeatureFile(folder / f"{job.split}_ims.npy").counts)
    figures = f"{len(each):,}", f"{sum(each):,}", describe_counts(each), regions, f"{len(job.missing):,}"
    return [job.split, *figures]
