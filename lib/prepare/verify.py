"""Read a whole data set once and say everything that is wrong with it."""

import argparse
import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from lib.cli import InputError, one_line
from lib.data.dataset import Split, read_ids
from lib.data.features import FeatureFile
from lib.prepare.splits import find_splits, open_any, read_boxes, read_sizes, table

BLOCK_BYTES = 2**24  # of features read at a time
NAMED = 5  # of rows or ids that are wrong, so many are named
# A collection of photographs may hold a few of them twice; where more images than this are alike, something is wrong.
MAY_BE_ALIKE = 0.001
# No image may be in two of these: what is measured would have been trained on, or chosen by.
APART = (("train", "dev"), ("train", "test"), ("train", "testall"), ("dev", "test"), ("dev", "testall"))
HEADER = ("split", "images", "rows", "regions", "img_dim", "type", "captions", "an image", "GB", "fingerprint")


class Finding(NamedTuple):
    """Something to be said of a data set; a fault is what training would refuse, or what makes results wrong."""

    is_fault: bool
    text: str


class Contents(NamedTuple):
    """What identifies the images of a split."""

    digests: dict[bytes, int]  # of the features, and the first image that has them
    ids: list[str]  # empty where none are known


class Scan(NamedTuple):
    """What reading all features of a split has shown; rows are those of the array in the file."""

    digests: dict[bytes, int]
    not_finite: list[int]  # rows, the first of each image where the numbers of regions vary
    unequal: list[int]  # first rows of images whose repeated rows differ
    alike: list[int]  # rows whose features an image before has


def add_flags(flags: argparse.ArgumentParser) -> None:
    flags.add_argument("--data_path", type=Path, default=Path("data"), help="folder of the data sets")
    flags.add_argument("--data_name", default="f30k_precomp", help="name of the data set, a folder in there")


def run(args: argparse.Namespace) -> None:
    folder, names = find_splits(args.data_path, args.data_name)
    rows, findings, contents, sizes = [], [], {}, {}
    for name in names:
        try:
            split = open_any(args.data_path, args.data_name, name)
            scan = _scan(split)
        except InputError as error:
            findings.append(Finding(True, str(error)))
            continue
        rows.append(_describe(split))
        ids, of_ids = _check_ids(split)
        findings += [*_check_features(split, scan), *of_ids, *_check_images(split), *_check_captions(split)]
        contents[name], sizes[name] = Contents(scan.digests, ids), split.features.img_dim
    findings += [*_check_sizes(sizes), *_check_apart(contents)]
    print(table(HEADER, rows))
    _report(folder, findings)


def _report(folder: Path, findings: list[Finding]) -> None:
    """Print what was found, faults first. Raises InputError where there are any."""
    faults = [finding.text for finding in findings if finding.is_fault]
    notes = [finding.text for finding in findings if not finding.is_fault]
    print()
    for kind, texts in (("fault", faults), ("note", notes)):
        for text in texts:
            print(f"{kind}  {text}")
    if faults:
        raise InputError(f"{folder}: {_count(len(faults), 'fault')}")
    print(f"{folder}: no faults")


def _describe(split: Split) -> tuple[str, ...]:
    """A split's row of the table."""
    features = split.features
    captions = np.bincount(split.image_of_caption, minlength=len(features))
    try:
        fingerprint = split.fingerprint()
    except InputError:  # features that are no numbers are among the findings
        fingerprint = "-"
    return (
        split.name,
        str(len(features)),
        str(features.repeats),
        _range(features.counts),
        str(features.img_dim),
        str(features.dtype),
        str(len(split.captions)),
        _range(captions),
        f"{os.path.getsize(features.path) / 1e9:.2f}",
        fingerprint,
    )


# All features


def _scan(split: Split) -> Scan:
    """Read all features once. Raises InputError where the file cannot be read."""
    features = split.features
    scan = Scan({}, [], [], [])
    stored = tqdm(
        _stored_images(features), split.name, len(features), leave=False, disable=None, unit=" images", unit_scale=True
    )
    for image, rows in enumerate(stored):
        first = features.row_of(features.starts[image])
        finite = np.isfinite(rows).all(axis=1)
        if not finite.all():
            scan.not_finite.extend((first + np.flatnonzero(~finite)).tolist())
            continue
        if not (rows[1:] == rows[0]).all():
            scan.unequal.append(first)
        digest = hashlib.blake2b(rows[0], digest_size=16).digest()
        if scan.digests.setdefault(digest, image) != image:
            scan.alike.append(first)
    return scan


def _stored_images(features: FeatureFile) -> Iterator[np.ndarray]:
    """Each image as it stands in the file: (repeats, numbers), NaN or not. Raises InputError on a failing disk."""
    image_bytes = features.repeats * features.regions * features.img_dim * features.dtype.itemsize
    counts = features.counts * features.repeats
    step = max(1, BLOCK_BYTES // image_bytes)
    try:
        with open(features.path, "rb") as file:
            file.seek(-int(counts.sum()) * features.img_dim * features.dtype.itemsize, os.SEEK_END)
            for first in range(0, len(counts), step):
                ends = np.cumsum(counts[first : first + step]).tolist()
                block = np.fromfile(file, features.dtype, ends[-1] * features.img_dim).reshape(ends[-1], -1)
                for begin, end in pairwise([0, *ends]):
                    yield block[begin:end].reshape(features.repeats, -1)
    except (OSError, ValueError) as error:  # ValueError: the file has become shorter
        raise InputError(f"{features.path}: cannot be read to its end ({error})") from None


def _check_features(split: Split, scan: Scan) -> Iterator[Finding]:
    file, images = split.features.path.name, len(split.features)
    if scan.not_finite:
        bad = _count(len(scan.not_finite), "row")
        yield Finding(True, f"{file}: NaN or infinite features in {bad}: {_name(scan.not_finite)}")
    if scan.unequal:
        which = _name([f"{row} to {row + split.features.repeats - 1}" for row in scan.unequal])
        yield Finding(True, f"{file}: holds each image five times, but these rows differ: {which}")
    if scan.alike:
        alike = f"{_count(len(scan.alike), 'image')} with the very features of one before, in rows {_name(scan.alike)}"
        yield Finding(len(scan.alike) > MAY_BE_ALIKE * images, f"{file}: {alike}")


# What stands beside them


def _check_ids(split: Split) -> tuple[list[str], list[Finding]]:
    """The ids, none where they only number the images, and what is wrong with them."""
    try:
        ids = read_ids(split)
    except InputError as error:
        return [], [Finding(True, str(error))]
    if ids is None:
        return [], [Finding(False, f"{split.name}: no {split.name}_ids.txt, so nobody knows which images these are")]
    twice = [one_line(one) for one, times in Counter(ids).items() if times > 1]
    if twice:
        return ids, [Finding(True, f"{split.name}_ids.txt: {_count(len(twice), 'id')} more than once: {_name(twice)}")]
    return ([] if ids == [str(number) for number in range(len(ids))] else ids), []


def _check_images(split: Split) -> Iterator[Finding]:
    """Boxes and sizes."""
    for read in (read_boxes, read_sizes):
        try:
            read(split)
        except InputError as error:
            yield Finding(True, str(error))


def _check_captions(split: Split) -> Iterator[Finding]:
    if not split.captions:
        yield Finding(False, f"{split.name}: no captions; features to make splits from")
    repeated = len(split.captions) - len(set(split.captions))
    if repeated:
        yield Finding(False, f"{split.name}_caps.txt: repeated captions: {repeated}")


# All splits together


def _check_sizes(sizes: dict[str, int]) -> Iterator[Finding]:
    if len(set(sizes.values())) > 1:
        said = ", ".join(f"{name} {size}" for name, size in sizes.items())
        yield Finding(True, f"features of different size, no model takes both: {said}")


def _check_apart(contents: dict[str, Contents]) -> Iterator[Finding]:
    for one, other in APART:
        if one in contents and other in contents:
            yield from _check_pair(one, other, contents[one], contents[other])


def _check_pair(one: str, other: str, images: Contents, others: Contents) -> Iterator[Finding]:
    ids = sorted(set(images.ids).intersection(others.ids))
    if ids:
        which = _name([one_line(same) for same in ids])
        yield Finding(True, f"{one} and {other} share {_count(len(ids), 'image')}, by id: {which}")
    rows = sorted(images.digests[same] for same in images.digests.keys() & others.digests.keys())
    if rows and not ids:
        text = f"{one} and {other} share {_count(len(rows), 'image')}, by features: images {_name(rows)} of {one}"
        yield Finding(len(rows) > MAY_BE_ALIKE * len(others.digests), text)


def _name(wrong: Sequence) -> str:
    """The first of what is wrong, separated by commas."""
    return ", ".join(map(str, wrong[:NAMED])) + (", ..." if len(wrong) > NAMED else "")


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _range(numbers: np.ndarray) -> str:
    least, most = int(numbers.min()), int(numbers.max())
    return str(most) if least == most else f"{least} to {most}"
