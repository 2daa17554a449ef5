"""Read a whole data set once and say everything that is wrong with it."""

import argparse
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lib.cli import InputError, with_bar
from lib.data.dataset import Split, read_boxes, read_ids
from lib.data.features import FeatureFile
from lib.prepare.io import KNOWN_SPLITS, add_data_flags, find_splits, open_features, some, span, table

# A collection of photographs may hold a few of them twice; where more images than this are alike, something is wrong.
MAY_BE_ALIKE = 0.001
# No image may be in two of these: the model would have been trained on what is measured, or chosen by it.
APART = (("train", "dev"), ("train", "test"), ("train", "testall"), ("dev", "test"), ("dev", "testall"))
HEADER = ("split", "images", "rows", "regions", "img_dim", "type", "captions", "an image", "GB", "fingerprint")


class Findings(NamedTuple):
    faults: list[str]  # what training would refuse, or what makes results wrong
    notes: list[str]  # what is odd but may be right

    def read(self, reader: Callable, *arguments: object) -> Any:
        """What a reader returns; where it refuses, None and a fault."""
        try:
            return reader(*arguments)
        except InputError as error:
            self.faults.append(str(error))
            return None


class Contents(NamedTuple):
    """What identifies the images of a split."""

    split: Split
    digests: dict[bytes, int]  # of an image's features -> the first image that has them
    ids: list[str]  # empty where none are known


def add_flags(flags: argparse.ArgumentParser) -> None:
    add_data_flags(flags, "f30k_precomp")


def run(args: argparse.Namespace) -> None:
    folder, names = find_splits(args)
    found, contents = Findings([], []), {}
    for name in names:
        if each := found.read(_check_split, folder, name, found):
            contents[name] = each
    if len({each.split.features.img_dim for each in contents.values()}) > 1:
        sizes = ", ".join(f"{name} {each.split.features.img_dim}" for name, each in contents.items())
        found.faults.append(f"features of different size, no model takes both: {sizes}")
    for one, other in APART:
        if one in contents and other in contents:
            _check_apart(contents[one], contents[other], found)
    print(table(HEADER, [_describe(each.split) for each in contents.values()]), end="\n\n")
    for text in (*(f"fault  {fault}" for fault in found.faults), *(f"note  {note}" for note in found.notes)):
        print(text)
    if found.faults:
        raise InputError(f"{folder}: {len(found.faults)} fault{'s' * (len(found.faults) > 1)}")
    print(f"{folder}: no faults")


def _check_split(folder: Path, name: str, found: Findings) -> Contents:
    """Raises InputError where the split cannot be read at all."""
    split = open_features(folder, name)
    if not split.captions and name in KNOWN_SPLITS:
        raise InputError(f"{folder / name}_caps.txt is missing")
    digests = _check_features(split, found)
    ids = found.read(read_ids, split)
    found.read(read_boxes, split)
    if not split.captions:
        found.notes.append(f"{name}: no captions; features to make splits from")
    if repeated := len(split.captions) - len(set(split.captions)):
        found.notes.append(f"{name}_caps.txt: repeated captions: {repeated:,}")
    if not (folder / f"{name}_ids.txt").exists():
        found.notes.append(f"{name}: no {name}_ids.txt, so nobody knows which images these are")
    if twice := [one for one, times in Counter(ids).items() if times > 1]:
        found.faults.append(f"{name}_ids.txt: {some(twice, 'id')} more than once")
    only_numbers = ids == list(map(str, range(len(split.features))))
    return Contents(split, digests, [] if only_numbers else ids or [])


def _check_features(split: Split, found: Findings) -> dict[bytes, int]:
    """Read all features once. Returns the digest of each image's, with the first image that has it."""
    features, name = split.features, split.features.path.name
    not_finite, unequal, alike, digests = [], [], [], {}
    for image, rows in enumerate(with_bar(_stored_images(features), split.name, len(features))):
        first = features.row_of(features.starts[image])
        finite = np.isfinite(rows).all(axis=1)
        if not finite.all():
            not_finite += (first + np.flatnonzero(~finite)).tolist()
            continue
        if not (rows[1:] == rows[0]).all():
            unequal.append(f"rows {first} to {first + features.repeats - 1}")
        if digests.setdefault(hashlib.blake2b(rows[0], digest_size=16).digest(), image) != image:
            alike.append(first)
    if not_finite:
        found.faults.append(f"{name}: NaN or infinite features in {some(not_finite, 'row')}")
    if unequal:
        found.faults.append(f"{name}: holds each image five times, but not the same in {some(unequal, 'place')}")
    if alike:
        kind = found.faults if len(alike) > MAY_BE_ALIKE * len(features) else found.notes
        kind.append(f"{name}: {some(alike, 'row')} with the features of an image before")
    return digests


def _stored_images(features: FeatureFile) -> Iterator[np.ndarray]:
    """Each image as it stands in the file, which may hold it several times: (repeats, numbers), NaN or not."""
    sizes = features.counts * features.repeats * features.img_dim
    with open(features.path, "rb") as file:
        file.seek(-int(sizes.sum()) * features.dtype.itemsize, os.SEEK_END)
        for size in sizes:
            yield np.fromfile(file, features.dtype, size).reshape(features.repeats, -1)


def _check_apart(one: Contents, other: Contents, found: Findings) -> None:
    """That no image is in both splits, by its id or by its features."""
    share = f"{one.split.name} and {other.split.name} share"
    if ids := sorted(set(one.ids).intersection(other.ids)):
        found.faults.append(f"{share} {some(ids, 'image')} by id")
    elif numbers := sorted(one.digests[same] for same in one.digests.keys() & other.digests.keys()):
        kind = found.faults if len(numbers) > MAY_BE_ALIKE * len(other.digests) else found.notes
        kind.append(f"{share} {some(numbers, 'image')} by features, as numbered in {one.split.name}")


def _describe(split: Split) -> list[str]:
    """A split's row of the table."""
    features, captions = split.features, np.bincount(split.image_of_caption, minlength=len(split.features))
    try:
        fingerprint = split.fingerprint()
    except InputError:  # NaN, which is among the faults
        fingerprint = "-"
    form = map(str, (features.repeats, span(features.counts), features.img_dim, features.dtype))
    size = f"{os.path.getsize(features.path) / 1e9:.2f}"
    return [split.name, f"{len(features):,}", *form, f"{len(split.captions):,}", span(captions), size, fingerprint]
