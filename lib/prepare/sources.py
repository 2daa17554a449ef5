"""Region features by image id, wherever they are. Another kind of place is a function that returns a Source."""

import re
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lib.cli import InputError, reason
from lib.data.dataset import read_ids
from lib.prepare.io import FEATURES, Image, open_features, read_boxes

SAMPLED = 16  # images looked at to tell how large all are, and of which type
FEATURE_NAMES, BOX_NAMES = ("features", "x"), ("boxes", "bbox")  # arrays of a .npz file, as different tools call them
IMAGE_FILES = (".npy", ".npz")


class Source(NamedTuple):
    """A place that holds features. places: image id -> what `read` takes to read that image."""

    places: Mapping[str, Any]
    read: Callable[[Any], Image]


def open_store(folder: Path, name: str) -> Source:
    """A split with ids, as `tsv` or any data set has it; of images with the same id the first counts."""
    split = open_features(folder, name)
    features, ids, boxes = split.features, read_ids(split), read_boxes(split)
    if ids is None:
        raise InputError(f"--features {features.path}: needs {name}_ids.txt beside it, an image id a line")

    def read(place: int) -> Image:
        first, last = features.starts[place : place + 2]
        of_image = boxes[first:last] if boxes is not None else None
        origin = f"{features.path}: image {ids[place]}"
        return Image(ids[place], features.read(np.array([place])), of_image, origin=origin)

    places: dict[str, int] = {}
    for place, image_id in enumerate(ids):
        places.setdefault(image_id, place)
    return Source(places, read)


def open_image_files(folder: Path) -> Source:
    """A file for each image: ID.npy (r, img_dim), or ID.npz with an array `features` or `x` and perhaps its boxes."""
    return Source({path.stem: path for path in sorted(_image_files(folder))}, _read_image_file)


class Features:
    """The features of all sources together; of an id that several have, the first counts.

    An id is found as it stands, and as the number at the end of a longer name (COCO_val2014_000000391895) where only
    one name ends in it.
    """

    def __init__(self, paths: Iterable[Path]):
        """Raises InputError where a path holds no features, or damaged ones."""
        self._homes: dict[str, Source] = {}
        for source in (source for path in paths for source in _open(path)):
            self._homes = dict.fromkeys(source.places, source) | self._homes
        endings: dict[str, list[str]] = {}
        for name in self._homes:
            if digits := re.search("[0-9]+$", name):
                endings.setdefault(digits[0].lstrip("0") or "0", []).append(name)
        self._aliases = {number: names[0] for number, names in endings.items() if len(names) == 1}

    @property
    def ids(self) -> list[str]:
        return list(self._homes)

    def find(self, image_id: str) -> str:
        """The id under which the sources have an image; empty where they do not."""
        return image_id if image_id in self._homes else self._aliases.get(image_id, "")

    def read(self, found: str) -> Image:
        """What an id returned by `find` stands for. Raises InputError where it is not sound."""
        source = self._homes[found]
        return source.read(source.places[found])

    def summarise(self, found: Sequence[str]) -> tuple[int, np.dtype]:
        """About how many bytes these images take, and in which type: float16 if all of a sample are, else float32."""
        sample = [self.read(one).features for one in found[:: max(1, len(found) // SAMPLED)]]
        dtype = np.dtype(np.float16 if all(features.dtype == np.float16 for features in sample) else np.float32)
        return round(np.mean([features.size for features in sample]) * dtype.itemsize * len(found)), dtype


def _open(path: Path) -> list[Source]:
    """All splits with ids in a folder, one split (FOLDER/SPLIT), or a folder of files."""
    if Path(f"{path}{FEATURES}").is_file():
        return [open_store(path.parent, path.name)]
    if not path.is_dir():
        raise InputError(f"--features {path}: no such folder, nor a file {path.name}{FEATURES} in {path.parent}")
    if splits := sorted(file.name.removesuffix(FEATURES) for file in path.glob(f"?*{FEATURES}")):
        with_ids = [split for split in splits if (path / f"{split}_ids.txt").is_file()]
        return [open_store(path, split) for split in with_ids or splits]
    if not _image_files(path):
        raise InputError(f"--features {path}: neither NAME{FEATURES} with NAME_ids.txt in it, nor ID.npy or ID.npz")
    return [open_image_files(path)]


def _image_files(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.suffix in IMAGE_FILES]


def _read_image_file(path: Path) -> Image:
    """Raises InputError where the file does not hold features."""
    try:
        content = np.load(path, allow_pickle=False)
        arrays = {FEATURE_NAMES[0]: content} if isinstance(content, np.ndarray) else content
        features, boxes = (
            next((arrays[name] for name in names if name in arrays), None) for names in (FEATURE_NAMES, BOX_NAMES)
        )
        if features is None:
            raise ValueError(f"no array {' or '.join(FEATURE_NAMES)}")
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: not an image's features ({reason(error)}); copy or extract it again") from None
    return Image(path.stem, features, boxes, origin=str(path))
