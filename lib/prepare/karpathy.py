"""Make a data set of Karpathy's captions and splits, dataset_flickr30k.json or dataset_coco.json (Karpathy and Fei-Fei
2015), and of features by image id. Flickr30K: train, dev (his val), test. COCO: train (with his restval), testall and
devall (his test and val), test and dev (the first 1,000 of those). The first five captions of an image count. A run
that was interrupted begins again."""

import argparse
from pathlib import Path

from lib.cli import InputError
from lib.data.dataset import CAPTIONS_PER_IMAGE
from lib.prepare import assemble
from lib.prepare.assemble import SPLITS, Features, clean_caption, write_dataset
from lib.prepare.io import read_json

FIRST = 1_000  # images of COCO's val and test that the published dev and test are
KEYS = ("cocoid", "filename", "imgid")  # how an image's features may be called


def add_flags(flags: argparse.ArgumentParser) -> None:
    flags.add_argument("dataset", type=Path, metavar="DATASET.json", help="dataset_flickr30k.json or dataset_coco.json")
    assemble.add_flags(flags)


def run(args: argparse.Namespace) -> None:
    splits, names = read_karpathy(args.dataset)
    write_dataset(args.data_path / args.data_name, splits, names, Features(args.features))


def read_karpathy(path: Path) -> tuple[dict[str, dict[str, list[str]]], dict[str, dict[str, str]]]:
    """Captions by split, without empty ones, and image id; names of images by KEYS and image id. Raises InputError."""
    data = read_json(path)
    names: dict[str, dict[str, str]] = {key: {} for key in KEYS}
    if isinstance(data, dict) and "annotations" in data:
        raise InputError(f"{path}: captions in COCO's own form, not Karpathy's splits: give the file to `own`")
    if not isinstance(data, dict) or not data.get("images") or "dataset" not in data:
        raise InputError(f"{path}: not a file of Karpathy's splits, which holds `dataset` and `images`")
    splits: dict[str, dict[str, list[str]]] = {split: {} for split in SPLITS.values()}
    for index, image in enumerate(data["images"]):
        try:
            known = {key: str(image[key]) for key in KEYS if str(image.get(key, ""))}
            image_id = known.get("cocoid") or known["imgid"]
            if any(image_id in images for images in names.values()):
                raise ValueError(f"its id {image_id} is that of an image before")
            split = splits[SPLITS[image["split"]]]
            texts = [one.get("raw", "").strip() or " ".join(one["tokens"]) for one in image["sentences"]]
            if captions := [caption for caption in map(clean_caption, texts) if caption][:CAPTIONS_PER_IMAGE]:
                split[image_id] = captions
            for key, name in known.items():
                names[key][image_id] = name
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            what = f"image {index} (counted from 0) is not sound ({error!r}); other forms of captions go to `own`"
            raise InputError(f"{path}: {what}") from None
    if data["dataset"] == "coco":
        first = {split: dict(list(splits[split].items())[:FIRST]) for split in ("dev", "test")}
        splits = {"train": splits["train"], **first, "devall": splits["dev"], "testall": splits["test"]}
    return {split: captions for split, captions in splits.items() if captions}, names
