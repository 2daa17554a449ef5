"""From captions and region features by image id to a data set; what `karpathy` and `own` share."""

import argparse
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from lib.cli import InputError, refusing, with_bar
from lib.data.dataset import read_ids
from lib.files import check_space, new_folder
from lib.prepare import io
from lib.prepare.io import FEATURES, Image, some, span

HEADER = ("split", "images", "captions", "an image", "regions", "missing")
SAMPLED = 16  # images looked at to tell how large all are, and of which type
FEATURE_NAMES, BOX_NAMES = ("features", "x"), ("boxes", "bbox")  # arrays of a .npz file, as different tools call them


def add_flags(flags: argparse.ArgumentParser) -> None:
    """The flags that say where the features are and where the data set goes."""
    flags.add_argument(
        "--features",
        type=Path,
        nargs="+",
        action="extend",
        required=True,
        metavar="PATH",
        help="features by image id: what `tsv` wrote or another data set (FOLDER, or FOLDER/SPLIT), "
        "or a folder of ID.npy or ID.npz; several are searched in turn",
    )
    io.add_data_flags(flags)


class Features:
    """The features of all paths together; of an id that several have, the first counts.

    An id is found as it stands, and as the number at the end of a longer name (COCO_val2014_000000391895) where only
    one name ends in it.
    """

    def __init__(self, paths: Iterable[Path]):
        """Raises InputError where a path holds no features, or damaged ones."""
        self._readers: dict[str, Callable[[], Image]] = {}
        for image_id, reader in (one for path in paths for one in _open(path)):
            self._readers.setdefault(image_id, reader)
        self.ids = list(self._readers)
        ends = {name: digits[0].lstrip("0") or "0" for name in self.ids if (digits := re.search("[0-9]+$", name))}
        times = Counter(ends.values())
        self._aliases = {number: name for name, number in ends.items() if times[number] == 1}

    def find(self, image_id: str) -> str:
        """The id under which an image is there; empty where it is not."""
        return image_id if image_id in self._readers else self._aliases.get(image_id, "")

    def read(self, found: str) -> Image:
        """What an id returned by `find` stands for. Raises InputError where it is not sound."""
        return self._readers[found]()

    def summarise(self, found: Sequence[str]) -> tuple[int, np.dtype]:
        """About how many bytes these images take, and in which type: float16 if all of a sample are, else float32."""
        sample = [self.read(one).features for one in found[:: max(1, len(found) // SAMPLED)]]
        dtype = np.dtype(np.float16 if all(features.dtype == np.float16 for features in sample) else np.float32)
        return round(np.mean([features.size for features in sample]) * dtype.itemsize * len(found)), dtype


def write_dataset(
    folder: Path, splits: Mapping[str, Mapping[str, Sequence[str]]], found: Mapping[str, str], features: Features
) -> None:
    """Write a data set, and print what it holds.

    splits: name -> image id -> captions. found: image id -> the id of its features, empty where there are none.
    Images without features are left out, named, and listed in {split}_missing.txt; images without captions are listed
    in without_captions.txt. Raises InputError where no image has features, the name is taken, the disk has not the
    room, or features are not sound.
    """
    ids = [image_id for captions in splits.values() for image_id in captions]
    used = [found[image_id] for image_id in ids if found[image_id]]
    if not used:
        captioned, featured = some(ids, "image"), some(features.ids, "image")
        raise InputError(f"--features: the captions are of {captioned}, the features of {featured}: none in common")
    size, dtype = features.summarise(used)
    rows, left_out = [], {}
    with new_folder(folder, "--data_name") as temporary:
        check_space(folder, size, "the data set")
        for split, captions in splits.items():
            there = [image_id for image_id in captions if found[image_id]]
            missing = [image_id for image_id in captions if not found[image_id]]
            images = (
                features.read(found[one])._replace(id=one, captions=captions[one]) for one in with_bar(there, split)
            )
            regions = io.write_split(temporary, split, images, dtype) if there else []
            left_out[f"{split}_missing.txt"] = f"no features for {split}", missing
            each = [len(captions[image_id]) for image_id in there]
            rows.append((split, f"{len(each):,}", f"{sum(each):,}", span(each), span(regions), f"{len(missing):,}"))
        left_out["without_captions.txt"] = "no captions", sorted(set(features.ids).difference(used))
        left_out = {file: (what, images) for file, (what, images) in left_out.items() if images}
        for file, (_, images) in left_out.items():
            io.write_lines(temporary / file, images)
    print(f"{folder}\n\n{io.table(HEADER, rows)}")
    for file, (what, images) in left_out.items():
        print(f"{what}: {some(images, 'image')}; all are in {folder / file}")


def clean_caption(text: str) -> str:
    """The text on one line, its white space made single blanks. Raises ValueError where UTF-8 cannot hold it."""
    caption = " ".join(text.replace("\0", " ").split())
    caption.encode()
    return caption


def _open(path: Path) -> Iterator[tuple[str, Callable[[], Image]]]:
    """Image ids and what reads each: in all splits of a folder that have ids, one split, or a folder of files."""
    if Path(f"{path}{FEATURES}").is_file():
        folder, splits = path.parent, [path.name]
    elif path.is_dir():
        folder, splits = path, sorted(file.name.removesuffix(FEATURES) for file in path.glob(f"?*{FEATURES}"))
        splits = [split for split in splits if (path / f"{split}_ids.txt").is_file()] or splits
    else:
        raise InputError(f"--features {path}: no such folder, nor a file {path.name}{FEATURES} in {path.parent}")
    for name in splits:
        split = io.open_features(folder, name)
        ids, boxes = read_ids(split), io.read_boxes(split)
        if ids is None:
            raise InputError(f"--features {split.features.path}: needs {name}_ids.txt beside it, an image id a line")
        yield from ((one, partial(io.read_image, split, boxes, place, one)) for place, one in enumerate(ids))
    if not splits:
        files = sorted(file for file in path.iterdir() if file.suffix in (".npy", ".npz"))
        if not files:
            raise InputError(f"--features {path}: neither NAME{FEATURES} with NAME_ids.txt in it, nor ID.npy or ID.npz")
        yield from ((file.stem, partial(_read_file, file)) for file in files)


def _read_file(path: Path) -> Image:
    """ID.npy (r, img_dim), or ID.npz with an array `features` or `x` and perhaps its boxes. Raises InputError."""
    with refusing(f"{path}: not an image's features; copy or extract it again"):
        content = np.load(path, allow_pickle=False)
        arrays = {FEATURE_NAMES[0]: content} if isinstance(content, np.ndarray) else content
        features, boxes = (
            next((arrays[name] for name in names if name in arrays), None) for names in (FEATURE_NAMES, BOX_NAMES)
        )
        if features is None:
            raise ValueError(f"no array {' or '.join(FEATURE_NAMES)}")
    return Image(path.stem, features, boxes, origin=str(path))
