"""Data sets of region features and captions on disk, in the layout of SCAN ("precomp", Lee et al. 2018).

    DATA_PATH/DATA_NAME/{split}_ims.npy    float32 or float16, images x regions x img_dim (other forms: features.py)
    DATA_PATH/DATA_NAME/{split}_caps.txt   UTF-8, one caption a line, five consecutive lines for each image, or
                        {split}_caps_counts.txt says how many (captions.py)

GPO keeps the same files in DATA_PATH/precomp/. The files that people download hold dev, test and testall images five
times in a row, one row a caption: both are recognised, and an image is one row here.
"""

import hashlib
import os
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from lib.cli import InputError, one_line
from lib.data.features import FeatureFile
from lib.files import read_lines

CAPTIONS_PER_IMAGE = 5  # where no file of counts says otherwise

MOST_CAPTIONS = 10_000  # of an image


def count_captions(folder: Path, split: str, images: int) -> np.ndarray:
    """Captions of each image (images,): five, or what {split}_caps_counts.txt says, one number a line.

    Raises InputError where a line is no number from 1 to MOST_CAPTIONS, or their number is not that of the images.
    """
    path = folder / f"{split}_caps_counts.txt"
    if not os.path.isfile(path):
        return np.full(images, CAPTIONS_PER_IMAGE)
    counts = [_count(path, *line) for line in islice(read_lines(path), images + 1)]
    if len(counts) != images:
        raise InputError(f"{path}: {count_lines(path)} lines for {images} images; every line counts one's captions")
    return np.array(counts)


def read_captions(path: Path, most: int | None = None) -> list[str]:
    """The captions of a file, one a line (see `read_lines`), no more than the first `most`.

    Raises InputError on bad UTF-8, a line that is empty, too long or holds NUL, or no line at all.
    """
    captions = [_caption(path, *line) for line in islice(read_lines(path), most)]
    if not captions:
        raise InputError(f"{path}: no captions in it")
    return captions


def _caption(path: Path, number: int, caption: str) -> str:
    if "\0" in caption:
        raise InputError(f"{path}: line {number} holds a NUL byte; convert the file to UTF-8, or copy it again")
    if not caption.strip():
        raise InputError(f"{path}: line {number} is an empty caption; every line must hold one")
    return caption


def _count(path: Path, number: int, line: str) -> int:
    text = line.strip()
    if not (text.isascii() and text.isdigit() and len(text) < 9 and 1 <= int(text) <= MOST_CAPTIONS):
        raise InputError(f"{path}: line {number} is not a number of captions from 1 to {MOST_CAPTIONS}")
    return int(text)


def count_lines(path: Path) -> int:
    """Lines of a file of any size, with lines of any length."""
    count, end = 0, b"\n"
    with open(path, "rb") as file:
        while block := file.read(2**20):
            count, end = count + block.count(b"\n"), block[-1:]
    return count + (end != b"\n")


def read_ids(split: "Split") -> list[str] | None:
    """The id of each image, from {split}_ids.txt; None where there is no such file.

    The file has one line for each image, or five equal ones. Raises InputError where it has another number of them,
    where one is empty or not printable, or where five lines differ.
    """
    path, images = split.folder / f"{split.name}_ids.txt", len(split.features)
    if not path.is_file():
        return None
    ids = []
    for number, line in read_lines(path):
        ids.append(line.strip())
        if not (ids[-1] and ids[-1].isprintable()):
            raise InputError(f"{path}: line {number} is not an image id")
    if len(ids) == images:
        return ids
    if len(ids) != CAPTIONS_PER_IMAGE * images:
        raise InputError(f"{path}: {len(ids)} ids do not fit {images} images; expected one for each image")
    for line, one in enumerate(ids):
        if one != ids[line - line % CAPTIONS_PER_IMAGE]:
            raise InputError(f"{path}: line {line + 1} differs, though five lines in a row belong to one image")
    return ids[::CAPTIONS_PER_IMAGE]


NAME_BYTES = 200  # of a data set's or split's name

FINGERPRINT_ROWS = 64

HOW_TO_GET_DATA = (
    "usually obtained from the Kaggle data set kuanghueilee/scan-features (see docs/data.md); "
    "`sh train_demo.sh` needs no download: it makes its own data"
)


@dataclass
class Split:
    """One split of a data set: features of each image, captions, and which image a caption belongs to."""

    name: str
    folder: Path
    features: FeatureFile
    captions: list[str]
    image_of_caption: np.ndarray  # (captions,), ascending

    def fingerprint(self) -> str:
        """16 hex digits that differ where the data does; found without reading all the features.

        SHA-256 of the number of images, regions, img_dim and type, all captions, and 64 evenly spaced images (all
        where there are fewer). Neither the folder, nor the split's name, nor how the file holds the images matters.
        Raises InputError on NaN.
        """
        features = self.features
        digest = hashlib.sha256(f"{len(features)} {features.regions} {features.img_dim} {features.dtype}\n".encode())
        captions_of_image = np.bincount(self.image_of_caption)
        if features.varies:
            digest.update(features.counts.tobytes())
        if (captions_of_image != CAPTIONS_PER_IMAGE).any():
            digest.update(captions_of_image.tobytes())
        for caption in self.captions:
            digest.update(f"{caption}\n".encode())
        for image in np.linspace(0, len(features) - 1, min(len(features), FINGERPRINT_ROWS)).astype(int):
            digest.update(features.read(image[None]).tobytes())
        return digest.hexdigest()[:16]


def open_split(data_path: str, data_name: str, split: str, img_dim: int | None = None) -> Split:
    """Open a split for reading, checking all that can be checked without reading the features.

    img_dim: what the features must have; None: any. Raises InputError naming the flag or file: a name that leads out of
    its folder, a file that is missing, truncated or not features, wrong feature size, captions that are no captions, or
    whose number does not fit the images.
    """
    check_name("--split", split)
    folder = find_folder(data_path, data_name)
    features_path, captions_path = folder / f"{split}_ims.npy", folder / f"{split}_caps.txt"
    for path in (features_path, captions_path):
        if not os.path.isfile(path):
            raise InputError(
                f"{path} is missing: {data_name} needs {features_path.name} and {captions_path.name} there, "
                f"{HOW_TO_GET_DATA}"
            )
    features = FeatureFile(features_path)
    if img_dim not in (None, features.img_dim):
        raise InputError(
            f"{features_path}: features of {features.img_dim} numbers, but the model takes --img_dim {img_dim}"
        )
    counts = count_captions(folder, split, len(features))
    captions = read_captions(captions_path, most=int(counts.sum()) + 1)  # one more tells of many more
    if counts.sum() != len(captions) == len(features) and _holds_each_image_five_times(features):
        features = FeatureFile(features_path, repeats=CAPTIONS_PER_IMAGE)
        counts = counts[: len(features)]
    if counts.sum() != len(captions):
        expected = f"{counts[0]} captions for each image" if len(set(counts)) == 1 else f"{counts.sum()} captions"
        raise InputError(
            f"{captions_path}: {count_lines(captions_path)} captions do not fit the {len(features)} rows of "
            f"{features_path.name}; expected {expected}, or a file {split}_caps_counts.txt with each image's number"
        )
    return Split(split, folder, features, captions, np.repeat(np.arange(len(features)), counts))


def find_folder(data_path: str, data_name: str) -> Path:
    """The data set's folder: DATA_PATH/DATA_NAME (SCAN) or DATA_PATH/precomp (GPO).

    Raises InputError where there is neither, or where the name leads out of DATA_PATH.
    """
    check_name("--data_name", data_name, nested=True)
    folders = [Path(data_path) / data_name, Path(data_path) / "precomp"]
    for folder in folders:
        if os.path.isdir(folder):
            return folder
    raise InputError(
        f"no data set at {folders[0]} or {folders[1]}: expected there train_ims.npy, train_caps.txt and the same "
        f"for dev and test (COCO: testall), {HOW_TO_GET_DATA}"
    )


def check_name(flag: str, name: str, nested: bool = False) -> None:
    """Raises InputError for what is no plain name below a folder, such as "../other" or "/etc".

    nested: "coco/precomp" is one too.
    """
    parts = Path(name).parts if isinstance(name, str) and name.isprintable() else ()
    stays = bool(parts) and ".." not in parts and not Path(name).anchor and (nested or name == parts[0])
    if not stays or len(os.fsencode(name)) > NAME_BYTES:
        below = " below --data_path" if nested else ""
        raise InputError(
            f"{flag} {one_line(str(name))!r}: must be a plain name{below}, without '..', no absolute path, "
            f"at most {NAME_BYTES} bytes"
        )


def _holds_each_image_five_times(features: FeatureFile) -> bool:
    """Whether rows come in equal groups of five; looks at the first, middle and last group."""
    groups, rest = divmod(len(features), CAPTIONS_PER_IMAGE)
    if rest or features.varies:
        return False
    for group in (0, groups // 2, groups - 1):
        rows = features.read(group * CAPTIONS_PER_IMAGE + np.arange(CAPTIONS_PER_IMAGE))
        rows = rows.reshape(CAPTIONS_PER_IMAGE, -1)
        if not (rows == rows[:1]).all():
            return False
    return True
