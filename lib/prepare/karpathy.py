"""Make a data set of Karpathy's captions and splits, dataset_flickr30k.json or dataset_coco.json (Karpathy and Fei-Fei
2015), and of features by image id. Flickr30K: train, dev (his val), test. COCO: train (with his restval), testall and
devall (his test and val), test and dev (the first 1,000 of those). The first five captions of an image count. An
interrupted run goes on when the same command is given again."""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lib.cli import InputError, reason
from lib.data.dataset import CAPTIONS_PER_IMAGE
from lib.prepare import dataset
from lib.prepare.dataset import Image, clean_caption, target_folder, write_dataset
from lib.prepare.sources import Features

JSON_BYTES = 2**30  # dataset_coco.json has 144 MB
MOST_ID = 10**15
SPLITS = ("train", "restval", "val", "test")
FIRST = 1_000  # images of COCO's val and test that the published dev and test are


class Entry(NamedTuple):
    """An image of the JSON file. captions: the first five at most; left_out: how many more were empty."""

    split: str
    cocoid: int | None
    filename: str
    imgid: int | None
    captions: list[str]
    left_out: int

    @property
    def id(self) -> str:
        return str(self.imgid if self.cocoid is None else self.cocoid)


# How an entry's features may be called
KEYS: dict[str, Callable[[Entry], list[str]]] = {
    "cocoid": lambda entry: [] if entry.cocoid is None else [str(entry.cocoid)],
    "filename": lambda entry: [entry.filename, Path(entry.filename).stem] if entry.filename else [],
    "imgid": lambda entry: [] if entry.imgid is None else [str(entry.imgid)],
}


def add_flags(flags: argparse.ArgumentParser) -> None:
    flags.add_argument("dataset", type=Path, metavar="DATASET.json", help="dataset_flickr30k.json or dataset_coco.json")
    dataset.add_flags(flags)


def run(args: argparse.Namespace) -> None:
    folder = target_folder(args)
    name, entries = read_karpathy(args.dataset)
    features = Features(args.features)
    key, found = find_features(entries, features)
    print(f"features found by {key}")
    if left_out := sum(entry.left_out for entry in entries):
        print(f"{left_out:,} empty captions left out")
    images = [Image(entry.id, one, entry.captions) for entry, one in zip(entries, found, strict=True)]
    splits = assign_splits(name, [entry.split for entry in entries], images)
    write_dataset(folder, splits, features, {"command": "karpathy", "dataset": name})


def read_karpathy(path: Path) -> tuple[str, list[Entry]]:
    """The name of the data set ("coco") and its images. Raises InputError, with the image's place in the file."""
    try:
        with open(path, "rb") as file:
            content = file.read(JSON_BYTES + 1)
        if len(content) > JSON_BYTES:
            raise ValueError(f"more than {JSON_BYTES} bytes")
        data = json.loads(content)
        images, name = _field(data, "images", list), _field(data, "dataset", str)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a file of Karpathy's splits ({reason(error)}); download it again") from None
    entries, first = [], {}
    for index, image in enumerate(images):
        try:
            entries.append(_entry(image))
            if (other := first.setdefault(entries[-1].id, index)) != index:
                raise ValueError(f"has the id of image {other}, {entries[-1].id}")
        except ValueError as error:
            raise InputError(f"{path}: image {index} (counted from 0): {reason(error)}") from None
    if not entries:
        raise InputError(f"{path}: no images in it")
    return name, entries


def find_features(entries: Sequence[Entry], features: Features) -> tuple[str, list[str | None]]:
    """The key by which most images are found, the first of KEYS where several find as many; and what it finds."""
    found = {
        key: [next(filter(None, map(features.find, names(entry))), None) for entry in entries]
        for key, names in KEYS.items()
    }
    best = max(found, key=lambda key: len(entries) - found[key].count(None))
    return best, found[best]


def assign_splits(name: str, splits: Sequence[str], images: Sequence[Image]) -> dict[str, list[Image]]:
    """Our splits of images that are in these of his.

    The published COCO files call the first 1,000 of his test `test`, all of it `testall`, and have the first 1,000 of
    his val as `dev`; all of that is `devall` here.
    """
    train, val, test = (
        [image for split, image in zip(splits, images, strict=True) if split in taken]
        for taken in (("train", "restval"), ("val",), ("test",))
    )
    if name == "coco":
        return {"train": train, "dev": val[:FIRST], "devall": val, "test": test[:FIRST], "testall": test}
    return {"train": train, "dev": val, "test": test}


def _entry(image: Any) -> Entry:
    """An image as the file has it. Raises ValueError."""
    split, filename = _field(image, "split", str), _field(image, "filename", str, "")
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is none of {', '.join(SPLITS)}")
    if not filename.isprintable():
        raise ValueError("filename holds what cannot be printed")
    sentences = [_caption(sentence) for sentence in _field(image, "sentences", list)]
    captions = [caption for caption in sentences if caption][:CAPTIONS_PER_IMAGE]
    if not captions:
        raise ValueError("no captions")
    cocoid, imgid = _id(image, "cocoid"), _id(image, "imgid")
    if cocoid is None and imgid is None:
        raise ValueError("neither cocoid nor imgid")
    return Entry(split, cocoid, filename, imgid, captions, sentences.count(""))


def _caption(sentence: Any) -> str:
    """A sentence as it was written, else its words; nothing where there are none."""
    text = _field(sentence, "raw", str, "")
    if not text.strip():
        text = " ".join(_text(token) for token in _field(sentence, "tokens", list, []))
    return clean_caption(text) if text.strip() else ""


def _id(image: dict, name: str) -> int | None:
    number = _field(image, name, int, None)
    if number is not None and not 0 <= number <= MOST_ID:
        raise ValueError(f"{name} {number} is no id")
    return number


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("tokens are not all text")
    return value


def _field(holder: Any, name: str, kind: type, *default: Any) -> Any:
    """A field of a JSON object, or its default. Raises ValueError where it is of another type, or not there."""
    if not isinstance(holder, dict):
        raise ValueError(f"{name}: expected a JSON object around it, found {type(holder).__name__}")
    value = holder.get(name)
    if value is None and default:
        return default[0]
    if type(value) is not kind:
        raise ValueError(f"{name} is {type(value).__name__}, expected {kind.__name__}")
    return value
