"""Data sets of region features and captions on disk, in the layout of SCAN ("precomp", Lee et al. 2018).

    DATA_PATH/DATA_NAME/{split}_ims.npy    float32 or float16, images x regions x img_dim
    DATA_PATH/DATA_NAME/{split}_caps.txt   UTF-8, one caption a line, five consecutive lines for each image

GPO keeps the same files in DATA_PATH/precomp/. The files that people download hold dev, test and testall images five
times in a row, one row a caption: both are recognised, and an image is one row here.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lib.errors import InputError, reason

CAPTIONS_PER_IMAGE = 5

HOW_TO_GET_DATA = (
    "usually obtained from the Kaggle data set kuanghueilee/scan-features (see docs/data.md); "
    "`sh train_demo.sh` needs no download: it makes its own data"
)


class FeatureFile:
    """Region features of a split, memory-mapped: only rows that are asked for are read.

    An instance travels to loader workers as a path; each opens the file for itself.
    """

    def __init__(self, path: Path, repeats: int = 1):
        """Open {split}_ims.npy; each image stands `repeats` times in a row. Raises InputError where it is not sound."""
        self.path = path
        self.repeats = repeats
        self._rows = _map_features(path)
        self.images, self.regions, self.img_dim = len(self._rows) // repeats, *self._rows.shape[1:]

    def __len__(self) -> int:
        return self.images

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_rows": None}  # pickling a memory map would copy the whole file

    def read(self, images: np.ndarray) -> np.ndarray:
        """Features (images, regions, img_dim) of some images, in the file's precision. Raises InputError on NaN."""
        if self._rows is None:
            self._rows = _map_features(self.path)
        features = self._rows[np.asarray(images) * self.repeats]
        finite = np.isfinite(features).all(axis=(1, 2))
        if not finite.all():
            row = int(np.asarray(images)[~finite][0]) * self.repeats
            raise InputError(
                f"{self.path}: row {row} holds NaN or infinite features; extract or download the file again"
            )
        return features


@dataclass
class Split:
    """One split of a data set: features of each image, captions, and which image a caption belongs to."""

    name: str
    folder: Path
    features: FeatureFile
    captions: list[str]
    image_of_caption: np.ndarray  # (captions,), ascending


def open_split(data_path: str, data_name: str, split: str, img_dim: int) -> Split:
    """Open a split for reading, checking all that can be checked without reading the features.

    Raises InputError naming the file: missing, truncated, not features, wrong feature size, captions that are not
    UTF-8 or empty, or whose number does not fit the images.
    """
    folder = find_folder(data_path, data_name)
    features_path, captions_path = folder / f"{split}_ims.npy", folder / f"{split}_caps.txt"
    for path in (features_path, captions_path):
        if not path.is_file():
            raise InputError(
                f"{path} is missing: {data_name} needs {features_path.name} and {captions_path.name} there, "
                f"{HOW_TO_GET_DATA}"
            )
    captions = read_captions(captions_path)
    features = FeatureFile(features_path)
    if features.img_dim != img_dim:
        raise InputError(
            f"{features_path}: features of {features.img_dim} numbers, but the model takes --img_dim {img_dim}"
        )
    if len(features) == len(captions) and _holds_each_image_five_times(features):
        features = FeatureFile(features_path, repeats=CAPTIONS_PER_IMAGE)
    if len(features) * CAPTIONS_PER_IMAGE != len(captions):
        raise InputError(
            f"{captions_path}: {len(captions)} captions do not fit the {len(features)} rows of {features_path.name}; "
            f"expected {CAPTIONS_PER_IMAGE} captions for each image"
        )
    return Split(split, folder, features, captions, np.repeat(np.arange(len(features)), CAPTIONS_PER_IMAGE))


def find_folder(data_path: str, data_name: str) -> Path:
    """The data set's folder: DATA_PATH/DATA_NAME (SCAN) or DATA_PATH/precomp (GPO). Raises InputError."""
    folders = [Path(data_path) / data_name, Path(data_path) / "precomp"]
    for folder in folders:
        if folder.is_dir():
            return folder
    raise InputError(
        f"no data set at {folders[0]} or {folders[1]}: expected there train_ims.npy, train_caps.txt and the same "
        f"for dev and test (COCO: testall), {HOW_TO_GET_DATA}"
    )


def read_captions(path: Path) -> list[str]:
    """The captions of a file, one a line; lines end at \\n or \\r\\n only.

    Raises InputError on bad UTF-8, an empty line, or none at all.
    """
    raw = path.read_bytes()
    try:
        lines = raw.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}: line {line} is not UTF-8; convert the file to UTF-8") from None
    if lines[-1] == "":
        lines.pop()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            raise InputError(f"{path}: line {number} is an empty caption; every line must hold one")
    if not lines:
        raise InputError(f"{path}: no captions in it")
    return [line.removesuffix("\r") for line in lines]


def _map_features(path: Path) -> np.memmap:
    try:
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # a damaged header makes NumPy raise almost anything
        raise InputError(f"{path}: truncated or not a .npy file ({reason(error)}); copy or download it again") from None
    if (
        not isinstance(rows, np.ndarray)
        or rows.ndim != 3
        or rows.dtype not in (np.float32, np.float16)
        or 0 in rows.shape
    ):
        found = f"{rows.dtype} {rows.shape}" if isinstance(rows, np.ndarray) else type(rows).__name__
        raise InputError(f"{path}: expected float32 or float16 of shape (images, regions, img_dim), found {found}")
    return rows


def _holds_each_image_five_times(features: FeatureFile) -> bool:
    """Whether rows come in equal groups of five; looks at the first, middle and last group."""
    groups, rest = divmod(len(features), CAPTIONS_PER_IMAGE)
    if rest:
        return False
    sample = np.array([0, groups // 2, groups - 1])[:, None] * CAPTIONS_PER_IMAGE + np.arange(CAPTIONS_PER_IMAGE)
    rows = features.read(sample.ravel()).reshape(3, CAPTIONS_PER_IMAGE, -1)
    return bool((rows == rows[:, :1]).all())
