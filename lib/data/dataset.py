"""Data sets of region features and captions on disk, in the layout of SCAN ("precomp", Lee et al. 2018).

    DATA_PATH/DATA_NAME/{split}_ims.npy          region features (features.py)
                        {split}_caps.txt         UTF-8, one caption a line, five consecutive lines for each image, or
                        {split}_caps_counts.txt  says how many, one number a line
                        {split}_ids.txt          the images' ids, one a line (optional)
                        {split}_boxes.npy        where each region lies in its picture, x1 y1 x2 y2 (optional)
                        encoder.json             the vision model that made the features (lib/prepare/images.py)

GPO keeps the same files in data/f30k/precomp/ and data/coco/precomp/. The files that people download hold each image of
dev, test and testall five times in a row, one row a caption. That is recognised, and an image is one row here.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lib.cli import InputError, refusing
from lib.data.features import FeatureFile
from lib.files import read_lines

CAPTIONS_PER_IMAGE = 5  # where there is no file of counts
FINGERPRINT_IMAGES = 64
ENCODER = "encoder.json"
BOX = 4  # numbers of a box: x1 y1 x2 y2 in pixels

HOW_TO_GET_DATA = (
    "usually obtained from the Kaggle data set kuanghueilee/scan-features (see docs/data.md); "
    "`sh train_demo.sh` needs no download: it makes its own data"
)


@dataclass
class Split:
    """One split of a data set: features of each image, captions, and which image a caption belongs to."""

    name: str
    folder: Path
    features: Any  # FeatureFile, or PictureFiles (images.py) for models that start from pixels
    captions: list[str]
    image_of_caption: np.ndarray  # (captions,), ascending

    def fingerprint(self) -> str:
        """16 hex digits that identify the data, found without reading all the features.

        SHA-256 of the number of images, regions, img_dim and type, all captions, and 64 evenly spaced images (all if
        there are fewer), pictures by their files. The folder, the split's name and whether the file repeats images make
        no difference. Raises InputError on NaN.
        """
        features = self.features
        digest = hashlib.sha256(features.describe().encode())
        captions_of_image = np.bincount(self.image_of_caption)
        if features.varies:
            digest.update(features.counts.tobytes())
        if (captions_of_image != CAPTIONS_PER_IMAGE).any():
            digest.update(captions_of_image.tobytes())
        for caption in self.captions:
            digest.update(f"{caption}\n".encode())
        for image in np.linspace(0, len(features) - 1, min(len(features), FINGERPRINT_IMAGES)).astype(int):
            digest.update(features.content(image))
        return digest.hexdigest()[:16]


def open_split(data_path: str, data_name: str, split: str, img_dim: int | None = None) -> Split:
    """Open a split and check all that can be checked without reading the features.

    img_dim: the size that the features must have; None: any. Raises InputError naming the flag or file: missing,
    truncated or damaged files, another feature size, captions that are no captions or do not fit the images.
    """
    folder = find_folder(data_path, data_name)
    features_path, captions_path = split_files(folder, split, "ims.npy")
    features, captions = FeatureFile(features_path), read_captions(captions_path)
    if img_dim not in (None, features.img_dim):
        found = f"features of {features.img_dim} numbers"
        raise InputError(f"{features_path}: {found}, but the model takes --img_dim {img_dim}")
    has_counts = (folder / f"{split}_caps_counts.txt").is_file()
    if not has_counts and len(captions) == len(features) and _repeats_images(features):
        features = FeatureFile(features_path, repeats=CAPTIONS_PER_IMAGE)
    return join(split, folder, features, features_path, captions)


def split_files(folder: Path, split: str, images: str) -> list[Path]:
    """The files of a split's images and captions. Raises InputError where one is missing."""
    paths = [folder / f"{split}_{ending}" for ending in (images, "caps.txt")]
    for path in paths:
        if not path.is_file():
            splits = sorted(one.name.removesuffix(f"_{images}") for one in folder.glob(f"?*_{images}"))
            there = f"of its splits there are {', '.join(splits)}" if splits else HOW_TO_GET_DATA
            raise InputError(f"{path} is missing: {folder.name} needs it for the split {split}; {there}")
    return paths


def join(split: str, folder: Path, images: Any, path: Path, captions: list[str]) -> Split:
    """A split of images, which `path` lists, and captions. Raises InputError where they do not fit."""
    counts_path, captions_path = folder / f"{split}_caps_counts.txt", folder / f"{split}_caps.txt"
    if counts_path.is_file():
        counts = _read_counts(counts_path, len(images))
        expected = f"{counts.sum()} captions, as {counts_path.name} says"
    else:
        counts = np.full(len(images), CAPTIONS_PER_IMAGE)
        expected = f"{CAPTIONS_PER_IMAGE} captions for each image, or each image's number in {counts_path.name}"
    if counts.sum() != len(captions):
        found = f"{len(captions)} captions do not fit the {len(images)} rows of {path.name}"
        raise InputError(f"{captions_path}: {found}; expected {expected}")
    return Split(split, folder, images, captions, np.repeat(np.arange(len(images)), counts))


def find_folder(data_path: str, data_name: str) -> Path:
    """The data set's folder: DATA_PATH/DATA_NAME (SCAN), or DATA_PATH/precomp (GPO) if DATA_PATH is that set's folder.

    Both names must begin alike, data/f30k/precomp for f30k_precomp: a typo opens no other set. Raises InputError.
    """
    folder, of_gpo = Path(data_path) / data_name, Path(data_path) / "precomp"
    if folder.is_dir():
        return folder
    if of_gpo.is_dir():
        if Path(data_path).resolve().name.startswith(data_name.split("_")[0]):
            return of_gpo
        raise InputError(f"no data set at {folder}; if {of_gpo} is the one that is meant: --data_name precomp")
    files = "train_ims.npy, train_caps.txt and the same for dev and test (COCO: testall)"
    raise InputError(f"no data set at {folder} or {of_gpo}: expected there {files}, {HOW_TO_GET_DATA}")


def read_encoder(folder: Path) -> dict | None:
    """What made a data set's regions of pictures, from encoder.json; None where nothing says it. Raises InputError."""
    path = folder / ENCODER
    if not path.is_file():
        return None
    with refusing(f"{path}: damaged; make the data set again"):
        record = json.loads(path.read_bytes())
        describe_encoder(record)  # which needs its entries
    return record


def is_same_encoder(one: dict, other: dict) -> bool:
    """Whether two records of `read_encoder` are of vision models that make the same regions. Names and folders of
    equal weights may differ."""
    return all(one[name] == other[name] for name in ("weights", "preprocessing", "regions", "whole"))


def describe_encoder(record: dict) -> str:
    """A vision model in a few words."""
    words = "{encoder} (weights {weights}, {regions} regions, whole picture {whole}, size {preprocessing[size]})"
    return words.format(**record)


def read_captions(path: Path) -> list[str]:
    """The captions of a file, one a line (see `read_lines`). Raises InputError on empty lines, NUL, or no line."""
    captions = []
    for number, caption in read_lines(path):
        if "\0" in caption:
            raise InputError(f"{path}: line {number} holds a NUL byte; convert the file to UTF-8, or copy it again")
        if not caption.strip():
            raise InputError(f"{path}: line {number} is an empty caption; every line must hold one")
        captions.append(caption)
    if not captions:
        raise InputError(f"{path}: no captions in it")
    return captions


def names_of(split: Split) -> list[str]:
    """The id of each image, or its number from 0 where there are no ids. Raises InputError, as `read_ids` does."""
    return read_ids(split) or list(map(str, range(len(split.features))))


def read_ids(split: Split) -> list[str] | None:
    """The id of each image, from {split}_ids.txt with one line, or five equal lines, an image; None: no such file.

    Raises InputError where there is another number of lines, one holds no printable id, or five lines differ.
    """
    path, images = split.folder / f"{split.name}_ids.txt", len(split.features)
    if not path.is_file():
        return None
    ids = [line.strip() for _, line in read_lines(path)]
    if len(ids) not in (images, CAPTIONS_PER_IMAGE * images):
        raise InputError(f"{path}: {len(ids)} ids do not fit {images} images; expected one for each image")
    repeats = len(ids) // images
    for number, one in enumerate(ids):
        if not (one and one.isprintable()):
            raise InputError(f"{path}: line {number + 1} is not an image id")
        if one != ids[number - number % repeats]:
            raise InputError(f"{path}: line {number + 1} differs, though five lines in a row belong to one image")
    return ids[::repeats]


def read_boxes(split: Split, name: str = "boxes", width: int = BOX) -> np.ndarray | None:
    """Boxes (all regions, 4), or objects (..., 2), from {split}_{name}.npy if it is there. Raises InputError."""
    path, features = split.folder / f"{split.name}_{name}.npy", split.features
    if not path.is_file():
        return None
    regions = int(features.starts[-1])
    with refusing(f"{path}: no {name} of these features; delete it, or make it again"):
        boxes = np.load(path, allow_pickle=False)
        if boxes.shape[-1] != width or boxes.size != regions * width:
            raise ValueError(f"{width} numbers for each of {regions} regions expected, shape {boxes.shape} found")
        if not np.isfinite(boxes).all():
            raise ValueError("NaN or infinite")
    return boxes.reshape(-1, width)


def _read_counts(path: Path, images: int) -> np.ndarray:
    """Captions of each image (images,)."""
    counts = []
    for number, line in read_lines(path):
        if not line.strip().isdecimal() or int(line) < 1:
            raise InputError(f"{path}: line {number} is not a number of captions, 1 or more")
        counts.append(int(line))
    if len(counts) != images:
        raise InputError(f"{path}: {len(counts)} lines for {images} images; expected each image's number of captions")
    return np.array(counts)


def _repeats_images(features: FeatureFile) -> bool:
    """Whether rows come in equal groups of five; looks at the first, middle and last group."""
    groups, rest = divmod(len(features), CAPTIONS_PER_IMAGE)
    if rest or features.varies:
        return False
    images = CAPTIONS_PER_IMAGE * np.array([[0], [groups // 2], [groups - 1]]) + np.arange(CAPTIONS_PER_IMAGE)
    rows = features.read(images.ravel()).reshape(3, CAPTIONS_PER_IMAGE, -1)
    return bool((rows == rows[:, :1]).all())
