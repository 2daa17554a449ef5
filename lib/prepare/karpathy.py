"""Make a data set of Karpathy's captions and splits, dataset_flickr30k.json or dataset_coco.json (Karpathy and Fei-Fei
2015), and of features by image id. Flickr30K: train, dev (his val), test. COCO: train (with his restval), testall and
devall (his test and val), test and dev (the first 1,000 of those). The first five captions of an image count. A run
that was interrupted begins again."""

import argparse
from pathlib import Path
from typing import NamedTuple

from lib.cli import InputError
from lib.data.dataset import CAPTIONS_PER_IMAGE
from lib.prepare import assemble
from lib.prepare.assemble import Captioned, clean_caption, write_dataset
from lib.prepare.io import read_json, target_folder
from lib.prepare.sources import Features

SPLITS = {"train": "train", "restval": "train", "val": "dev", "test": "test"}
FIRST = 1_000  # images of COCO's val and test that the published dev and test are
KEYS = ("cocoid", "filename", "imgid")  # how an image's features may be called


class Entry(NamedTuple):
    """An image of the JSON file. split: train, dev or test; names: those of KEYS, empty where it has none."""

    id: str
    split: str
    names: dict[str, str]
    captions: list[str]


def add_flags(flags: argparse.ArgumentParser) -> None:
    flags.add_argument("dataset", type=Path, metavar="DATASET.json", help="dataset_flickr30k.json or dataset_coco.json")
    assemble.add_flags(flags)


def run(args: argparse.Namespace) -> None:
    folder = target_folder(args)
    name, entries = read_karpathy(args.dataset)
    features = Features(args.features)
    key, found = find_features(entries, features)
    splits: dict[str, list[Captioned]] = {split: [] for split in SPLITS.values()}
    for entry, one in zip(entries, found, strict=True):
        splits[entry.split].append(Captioned(entry.id, one, entry.captions))
    if name == "coco":
        dev, test = splits["dev"], splits["test"]
        splits |= {"dev": dev[:FIRST], "devall": dev, "test": test[:FIRST], "testall": test}
    print(f"features found by {key}")
    write_dataset(folder, {split: images for split, images in splits.items() if images}, features)


def read_karpathy(path: Path) -> tuple[str, list[Entry]]:
    """The name of the data set ("coco") and its images. Raises InputError, with the image's place in the file."""
    data, entries = read_json(path), {}
    if not isinstance(data, dict) or not data.get("images") or "dataset" not in data:
        raise InputError(f"{path}: not a file of Karpathy's splits, which holds `dataset` and `images`")
    for index, image in enumerate(data["images"]):
        try:
            entry = _entry(image)
            if entries.setdefault(entry.id, entry) is not entry:
                raise ValueError(f"its id {entry.id} is that of an image before")
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise InputError(f"{path}: image {index} (counted from 0) is not sound ({error!r})") from None
    return data["dataset"], list(entries.values())


def find_features(entries: list[Entry], features: Features) -> tuple[str, list[str]]:
    """The key by which most images are found, the first of KEYS where several find as many; and what it finds."""
    found = {key: [features.find(entry.names[key]) for entry in entries] for key in KEYS}
    stems = [features.find(Path(entry.names["filename"]).stem) for entry in entries]
    found["filename"] = [name or stem for name, stem in zip(found["filename"], stems, strict=True)]
    best = max(KEYS, key=lambda key: len(entries) - found[key].count(""))
    return best, found[best]


def _entry(image: dict) -> Entry:
    """An image as the file has it; a caption as it was written (`raw`), else its words (`tokens`)."""
    texts = [sentence.get("raw", "").strip() or " ".join(sentence["tokens"]) for sentence in image["sentences"]]
    captions = [caption for caption in map(clean_caption, texts) if caption][:CAPTIONS_PER_IMAGE]
    names = {key: str(image.get(key, "")) for key in KEYS}
    image_id = names["cocoid"] or names["imgid"]
    if not captions or not image_id:
        raise ValueError("no captions" if image_id else "neither cocoid nor imgid")
    return Entry(image_id, SPLITS[image["split"]], names, captions)
