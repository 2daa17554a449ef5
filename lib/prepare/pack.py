"""Store a data set in float16, one row an image: half the size, a fifth of that where images stood there five times."""

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from lib.cli import InputError
from lib.data.dataset import Split, check_name, open_split, read_ids
from lib.data.features import FeatureFile
from lib.files import check_space
from lib.prepare.splits import (
    captions_of_images,
    find_splits,
    open_any,
    read_boxes,
    read_sizes,
    table,
)
from lib.prepare.writer import BOX_NUMBERS, HEADER_BYTES, SplitWriter, identify

BLOCK_BYTES = 2**22  # of features read at a time; more goes through memory instead of the cache
SMALLEST = float(np.finfo(np.float16).smallest_normal)  # below it float16 is evenly spaced
HEADER = ("split", "images", "GB before", "GB after")


class Rounding(NamedTuple):
    """The largest differences between features and their float16."""

    absolute: float = 0.0
    relative: float = 0.0  # to the feature; to SMALLEST where that is larger

    def and_of(self, features: np.ndarray, half: np.ndarray) -> "Rounding":
        """With those of further features, which are written over."""
        error = np.abs(half.astype(features.dtype) - features)
        absolute = float(error.max())
        size = np.maximum(np.abs(features, out=features), SMALLEST, out=features)
        relative = float(np.divide(error, size, out=error).max())
        return Rounding(max(self.absolute, absolute), max(self.relative, relative))


class Source(NamedTuple):
    """A split to be packed, and what packs it."""

    split: Split
    ids: list[str]
    boxes: np.ndarray | None  # (regions of all images, 4)
    sizes: list[tuple[int, int]] | None
    writer: SplitWriter


def add_flags(flags: argparse.ArgumentParser) -> None:
    flags.add_argument("--data_path", type=Path, default=Path("data"), help="folder of the data sets")
    flags.add_argument("--data_name", default="f30k_precomp", help="name of the data set, a folder in there")
    flags.add_argument("--to", default="", help="name of the packed data set (default: DATA_NAME_packed)")
    flags.add_argument("--checkpoint", default="", help="say what rounding does to the scores of this trained model")
    flags.add_argument("--split", default="dev", help="split that --checkpoint scores")


def run(args: argparse.Namespace) -> None:
    folder, names = find_splits(args.data_path, args.data_name)
    args.to = args.to or f"{args.data_name}_packed"
    target = _target(args, folder)
    matcher = _load_matcher(args)
    sources = [_open(args, name, target) for name in names]
    check_space(target, sum(map(_bytes_to_write, sources)), "the packed data set")
    roundings = [_pack(source) for source in sources]
    print(f"{target}: float16, one row an image\n\n{_describe(sources, target)}\n\n{_say_rounding(sources, roundings)}")
    if matcher:
        print(_compare_scores(matcher, args))


def _target(args: argparse.Namespace, folder: Path) -> Path:
    """The packed data set's folder. Raises InputError where it is not below --data_path, or the source's."""
    check_name("--to", args.to, nested=True)
    target = args.data_path / args.to
    if target.resolve() == folder.resolve():
        raise InputError(f"--to {args.to}: is the data set itself; choose another name")
    return target


def _open(args: argparse.Namespace, name: str, target: Path) -> Source:
    split = open_any(args.data_path, args.data_name, name)
    boxes = read_boxes(split)
    writer = SplitWriter(target, name, _identify(split), np.float16, boxes is not None)
    ids = read_ids(split) or list(map(str, range(len(split.features))))
    return Source(split, ids, boxes, read_sizes(split), writer)


def _identify(split: Split) -> dict:
    """Names, sizes and times of the files that a split is made from."""
    endings = ("ims.npy", "offsets.npy", "caps.txt", "caps_counts.txt", "ids.txt", "sizes.txt", "boxes.npy")
    paths = [split.folder / f"{split.name}_{ending}" for ending in endings]
    return {"command": "pack", "sources": [identify(path) for path in paths if path.exists()]}


def _bytes_to_write(source: Source) -> int:
    """What a split will take on the disk, less what an interrupted try has written."""
    split, writer = source.split, source.writer
    if writer.finished:
        return 0
    rows, images = int(split.features.starts[-1]), len(split.features)
    arrays = [rows * split.features.img_dim * np.dtype(np.float16).itemsize]
    if source.boxes is not None:
        arrays.append(rows * BOX_NUMBERS * np.dtype(np.float32).itemsize)
    if split.features.varies:
        arrays.append((images + 1) * np.dtype(np.int64).itemsize)
    texts = sum(len(line.encode()) + 1 for line in (*split.captions, *source.ids))
    return max(0, sum(HEADER_BYTES + array for array in arrays) + texts - writer.bytes_there)


def _pack(source: Source) -> Rounding | None:
    """Write a split, or what of it is not there yet. Returns None where it was there already."""
    split, ids, boxes, sizes, writer = source
    starts, total = split.features.starts, len(split.features)
    with writer:
        if writer.finished:
            return None
        rounding, done = Rounding(*(writer.position or ())), writer.images
        rest = _images(split.features, done)
        bar = tqdm(rest, split.name, total, initial=done, leave=False, disable=None, unit=" images")
        for image, features in enumerate(bar, start=done):
            half, rounding = _halve(split.features, image, features, rounding)
            of_image = None if boxes is None else boxes[starts[image] : starts[image + 1]]
            writer.add(half, ids[image], of_image, rounding, sizes and sizes[image])
        writer.finish(captions_of_images(split) if split.captions else None)
    return rounding


def _images(features: FeatureFile, first: int) -> Iterator[np.ndarray]:
    """Features (regions, img_dim) of each image from the first on. Raises InputError on NaN."""
    step = max(1, BLOCK_BYTES // (features.regions * features.img_dim * features.dtype.itemsize))
    for start in range(first, len(features), step):
        images = np.arange(start, min(start + step, len(features)))
        yield from np.split(features.read(images), np.cumsum(features.counts[images])[:-1])


def _halve(file: FeatureFile, image: int, features: np.ndarray, so_far: Rounding) -> tuple[np.ndarray, Rounding]:
    """An image's features in float16 and the rounding with theirs. Raises InputError on what float16 cannot hold."""
    if features.dtype == np.float16:
        return features, so_far
    with np.errstate(over="ignore"):  # said below
        half = features.astype(np.float16)
        rounding = so_far.and_of(features, half)
    if not np.isfinite(rounding.absolute):
        raise InputError(
            f"{file.path}: row {file.row_of(file.starts[image])} holds a feature beyond float16's largest number, "
            f"{np.finfo(np.float16).max:.0f}; this data set has to stay in float32"
        )
    return half, rounding


# What is said


def _describe(sources: list[Source], target: Path) -> str:
    """A table of the sizes, with their sum."""
    sizes = []
    for split in (source.split for source in sources):
        before, after = os.path.getsize(split.features.path), os.path.getsize(target / split.features.path.name)
        sizes.append((split.name, len(split.features), before, after))
    total = ("total", *(sum(size[column] for size in sizes) for column in (1, 2, 3)))
    rows = [(name, str(images), f"{b / 1e9:.2f}", f"{a / 1e9:.2f}") for name, images, b, a in (*sizes, total)]
    return table(HEADER, rows)


def _say_rounding(sources: list[Source], roundings: list[Rounding | None]) -> str:
    measured = [rounding for rounding in roundings if rounding is not None]
    there = [source.split.name for source, rounding in zip(sources, roundings, strict=True) if rounding is None]
    lines = []
    if measured:
        absolute, relative = (max(column) for column in zip(*measured, strict=True))
        of_feature = f"{relative:.2g} of the feature (of {SMALLEST:.2g}, for a smaller one)"
        lines.append(f"largest rounding error {absolute:.2g}, and {of_feature}" if absolute else "nothing was rounded")
    if there:
        lines.append(f"there already: {', '.join(there)}")
    return "\n".join(lines)


# What rounding does to scores


def _load_matcher(args: argparse.Namespace):
    """The trained model, before anything is written; None where none was asked for. Raises InputError."""
    if not args.checkpoint:
        return None
    from lib.evaluation.matcher import load_matcher  # here, since packing itself needs no model

    matcher = load_matcher(args.checkpoint)
    open_split(str(args.data_path), args.data_name, args.split, matcher.checkpoint["architecture"]["img_dim"])
    return matcher


def _compare_scores(matcher, args: argparse.Namespace) -> str:
    from lib.evaluation import report
    from lib.evaluation.rounding import compare_scores

    before, after = (open_split(str(args.data_path), name, args.split) for name in (args.data_name, args.to))
    found = compare_scores(matcher, before, after)
    difference = f"by {found.largest:.2g} at most and {found.mean:.2g} in the mean; they spread by {found.spread:.2g}"
    names = f"{args.data_name}, {before.features.dtype}", f"{args.to}, float16"
    rows = [report.Row(name, metrics) for name, metrics in zip(names, (found.before, found.after), strict=True)]
    return (
        f"\n{matcher.checkpoint['path']} on {args.split} ({matcher.compute}): scores differ {difference} (standard "
        f"deviation)\n\n{report.table(rows)}"
    )
