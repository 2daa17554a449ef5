"""Region features by image id, wherever they are: what `tsv` wrote, other data sets, a folder with a file an image."""

import io
import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.lib import format as npy

from lib.cli import InputError, reason
from lib.data.dataset import CAPTIONS_PER_IMAGE, Split, count_lines, read_ids
from lib.data.features import FeatureFile
from lib.prepare.splits import read_boxes, read_sizes
from lib.prepare.writer import identify

FEATURES = "_ims.npy"
IMAGE_BYTES = 2**28  # read at most of an image's file; 100 regions of bottom-up attention are 0.8 MB
SAMPLED = 16  # files looked at to tell how large they are, and of which type
FEATURE_NAMES, BOX_NAMES = ("features", "x"), ("boxes", "bbox")  # arrays of a .npz file, as different tools call them
IMAGE_FILES = (".npy", ".npz")


class Regions(NamedTuple):
    """An image: features (r, img_dim), boxes (r, 4) and size (width, height) in pixels, and where they come from."""

    features: np.ndarray
    boxes: np.ndarray | None
    size: tuple[int, int] | None
    origin: str


class Source(Protocol):
    """Where features come from. places: where each image id is in there; identity: plain types."""

    folder: Path
    places: Mapping[str, object]
    dtype: np.dtype
    has_boxes: bool
    identity: dict

    def read(self, image_id: str) -> Regions: ...

    def count_numbers(self, image_ids: Sequence[str]) -> int:
        """About how many the features of these images are."""


class Store:
    """A split with ids, with captions or without; of images with the same id the first counts."""

    def __init__(self, folder: Path, split: str):
        """Raises InputError where its files are not sound."""
        self.folder = folder
        path, ids_path = folder / f"{split}{FEATURES}", folder / f"{split}_ids.txt"
        self._features = FeatureFile(path)
        if not ids_path.is_file():
            raise InputError(f"--features {path}: needs {ids_path.name} beside it, an image id a line")
        if count_lines(ids_path) * CAPTIONS_PER_IMAGE == len(self._features):  # one row a caption, one id an image
            self._features = FeatureFile(path, repeats=CAPTIONS_PER_IMAGE)
        parts = Split(split, folder, self._features, [], np.zeros(0, np.int64))
        self.places: dict[str, int] = {}
        for place, image_id in enumerate(read_ids(parts)):
            self.places.setdefault(image_id, place)
        self.dtype = self._features.dtype
        self._boxes, self._sizes = read_boxes(parts), read_sizes(parts)
        self.has_boxes = self._boxes is not None
        self.identity = identify(path)

    def read(self, image_id: str) -> Regions:
        place = self.places[image_id]
        first, last = self._features.starts[place : place + 2]
        boxes = self._boxes[first:last] if self.has_boxes else None
        size = self._sizes[place] if self._sizes else None
        return Regions(self._features.read(np.array([place])), boxes, size, f"{self._features.path}: image {image_id}")

    def count_numbers(self, image_ids: Sequence[str]) -> int:
        places = [self.places[image_id] for image_id in image_ids]
        return int(self._features.counts[places].sum()) * self._features.img_dim


class Folder:
    """A file for each image: ID.npy (r, img_dim), or ID.npz with an array `features` or `x` and perhaps its boxes."""

    def __init__(self, folder: Path):
        """Raises InputError where one of the files looked at is not sound; not all are."""
        self.folder = folder
        files = sorted(_image_files(folder))
        self.places: dict[str, Path] = {}
        for path in files:
            self.places.setdefault(path.stem, path)
        sample = [self._read(path) for path in files[:: max(1, len(files) // SAMPLED)]]
        self.dtype = np.result_type(*(_kept_type(regions.features) for regions in sample))
        self.has_boxes = all(regions.boxes is not None for regions in sample)
        self._mean_numbers = sum(regions.features.size for regions in sample) / len(sample)
        statuses = [path.stat() for path in files]
        self.identity = {
            "files": len(files),
            "bytes": sum(status.st_size for status in statuses),
            "mtime_ns": max(status.st_mtime_ns for status in statuses),
        }

    def read(self, image_id: str) -> Regions:
        regions = self._read(self.places[image_id])
        if np.result_type(self.dtype, _kept_type(regions.features)) != self.dtype:
            raise InputError(
                f"{regions.origin}: {regions.features.dtype}, other files there are {self.dtype}; make them one type"
            )
        return regions

    def count_numbers(self, image_ids: Sequence[str]) -> int:
        return round(self._mean_numbers * len(image_ids))

    def _read(self, path: Path) -> Regions:
        """Raises InputError where the file is not what it should be; nothing in it is executed."""
        try:
            if path.suffix == ".npy":
                with open(path, "rb") as file:
                    features, boxes = _array(file.read(IMAGE_BYTES + 1)), None
            else:
                with zipfile.ZipFile(path) as archive:
                    features, boxes = _member(archive, FEATURE_NAMES), _member(archive, BOX_NAMES)
            if features is None or features.ndim != 2:
                found = "none" if features is None else f"shape {features.shape}"
                raise ValueError(
                    f"expected an array (regions, numbers), in .npz {' or '.join(FEATURE_NAMES)}, found {found}"
                )
        except Exception as error:  # damaged files make NumPy and zipfile raise almost anything
            raise InputError(f"{path}: not an image's features ({reason(error)}); copy or extract it again") from None
        return Regions(features, boxes, None, str(path))


class Features:
    """The features of all sources together; of an id that several have, the first counts.

    An id is found as it stands, and as the number at the end of a longer name (COCO_val2014_000000391895) where only
    one name ends in it.
    """

    def __init__(self, paths: Iterable[Path]):
        """Raises InputError where a path holds no features, or damaged ones."""
        self.sources: list[Source] = [source for path in paths for source in _open(Path(path))]
        self._homes: dict[str, Source] = {}
        for source in self.sources:
            for image_id in source.places:
                self._homes.setdefault(image_id, source)
        self._aliases = _aliases(self._homes)
        self.identity = [source.identity for source in self.sources]

    @property
    def ids(self) -> list[str]:
        return list(self._homes)

    def find(self, image_id: str) -> str | None:
        """The id under which the sources have an image, None where they do not."""
        return image_id if image_id in self._homes else self._aliases.get(image_id)

    def read(self, found: str) -> Regions:
        """What an id returned by `find` stands for. Raises InputError where it is not sound."""
        return self._homes[found].read(found)

    def summarise(self, found: Sequence[str]) -> tuple[int, np.dtype, bool]:
        """Of images to be written: about how many bytes, in which type, and whether all of them have boxes."""
        of_source: dict[Source, list[str]] = {}
        for image_id in found:
            of_source.setdefault(self._homes[image_id], []).append(image_id)
        dtype = np.result_type(*(source.dtype for source in of_source))
        has_boxes = all(source.has_boxes for source in of_source)
        size = sum(source.count_numbers(ids) * dtype.itemsize for source, ids in of_source.items())
        return size, dtype, has_boxes


def _open(path: Path) -> list[Source]:
    """The splits with ids in a folder, one split (FOLDER/SPLIT), or a folder of files."""
    if Path(f"{path}{FEATURES}").is_file():
        return [Store(path.parent, path.name)]
    if not path.is_dir():
        raise InputError(f"--features {path}: no such folder, nor a file {path.name}{FEATURES} in {path.parent}")
    splits = sorted(file.name.removesuffix(FEATURES) for file in path.glob(f"*{FEATURES}") if file.name.isprintable())
    with_ids = [split for split in splits if (path / f"{split}_ids.txt").is_file()]
    if splits:
        return [Store(path, split) for split in with_ids or splits]
    if not _image_files(path):
        raise InputError(f"--features {path}: neither NAME{FEATURES} with NAME_ids.txt in it, nor ID.npy or ID.npz")
    return [Folder(path)]


def _image_files(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.suffix in IMAGE_FILES and path.name.isprintable()]


def _aliases(names: Iterable[str]) -> dict[str, str]:
    """Number at the end of a name -> the name, where it is the only one."""
    ending: dict[str, list[str]] = {}
    for name in names:
        if digits := re.search("[0-9]+$", name):
            ending.setdefault(digits[0].lstrip("0") or "0", []).append(name)
    return {number: names[0] for number, names in ending.items() if len(names) == 1}


def _kept_type(features: np.ndarray) -> np.dtype:
    """float16 stays what it is, everything else becomes float32."""
    return np.dtype(np.float16 if features.dtype == np.float16 else np.float32)


def _member(archive: zipfile.ZipFile, names: Sequence[str]) -> np.ndarray | None:
    """The first of these arrays that a .npz file holds."""
    for name in names:
        if f"{name}.npy" in archive.namelist():
            with archive.open(f"{name}.npy") as file:
                return _array(file.read(IMAGE_BYTES + 1))
    return None


def _array(content: bytes) -> np.ndarray:
    if len(content) > IMAGE_BYTES:
        raise ValueError(f"more than {IMAGE_BYTES} bytes")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on odd text in the header; what matters is said in the error
        return npy.read_array(io.BytesIO(content), allow_pickle=False)
