"""From captions and region features by image id to a data set; what `karpathy` and `own` share."""

import argparse
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from lib.cli import InputError, optional, refusing, with_bar
from lib.data.dataset import read_boxes, read_ids
from lib.data.images import WAYS, without_ending
from lib.files import new_folder
from lib.prepare import io
from lib.prepare.io import FEATURES, Image, some, span

SPLITS = {"train": "train", "restval": "train", "dev": "dev", "val": "dev", "validation": "dev", "test": "test"}
HEADER = ("split", "images", "captions", "an image", "regions", "missing")
SAMPLED = 16  # images looked at to tell the type of all
LEAST_SHARE = 0.5  # of the images or features, whichever are fewer, that must match by another than the first name
# Arrays of a .npz file, as different tools call them.
FEATURE_NAMES, ID_NAMES = ("features", "feat", "x", "image_features", "arr_0"), ("ids", "image_ids", "image_id")
BOX_NAMES, COUNT_NAMES = ("boxes", "bbox"), ("num_boxes", "num_bbox")
Splits = Mapping[str, Mapping[str, Sequence[str]]]  # name -> image -> captions
Names = Mapping[str, Mapping[str, str]]  # kind of name -> image id -> name


def add_flags(flags: argparse.ArgumentParser) -> None:
    """The flags that say where the features are and where the data set goes."""
    places = "what `tsv` wrote or another data set (FOLDER, or FOLDER/SPLIT), a folder of ID.npy or ID.npz, or HDF5"
    where = f"features by image id: {places}; several are searched in turn"
    flags.add_argument("--features", type=Path, nargs="+", action="extend", required=True, metavar="PATH", help=where)
    io.add_data_flags(flags)


class Features:
    """The features of all paths together; of an id that several have, the first counts."""

    def __init__(self, paths: Sequence[Path]):
        """Raises InputError where a path holds no features, or damaged ones."""
        self._readers: dict[str, Callable[[], Image]] = {}
        for image_id, reader in (one for path in paths for one in _open(path)):
            self._readers.setdefault(image_id, reader)
        self.ids, self.folders = list(self._readers), [path if path.is_dir() else path.parent for path in paths]
        self.notes: dict[str, set[str]] = defaultdict(set)  # what is worth a line, and of which ids

    def read(self, found: str) -> Image:
        """The image of one of `ids`. Raises InputError where it is not sound."""
        image = self._readers[found]()
        if image.was_transposed:
            self.notes["stored as (numbers, regions), and turned"].add(found)
        if not np.any(image.features[-1:]):
            self.notes["end in a region of zeros; if it is padding, store num_boxes"].add(found)
        return image

    def dtype_of(self, found: Sequence[str]) -> np.dtype:
        """The type to write these images in: float16 if all of a sample have it, else float32."""
        sample = found[:: max(1, len(found) // SAMPLED)]
        types = {self.read(one).features.dtype for one in sample}
        return np.dtype(np.float16 if types == {np.dtype(np.float16)} else np.float32)


def match(names: Names, ids: Sequence[str], flag: str, what: str) -> dict[str, str]:
    """Image id -> the one of `ids` that is its own, where there is one; prints how they were matched, and an example.

    One kind of name (`filename`) and one of WAYS count for all images: those that find most. flag: what gave the ids,
    those of `what`, for messages. Raises InputError where none are found, or a small part by other than the first.
    """
    images = list(dict.fromkeys(image_id for wanted in names.values() for image_id in wanted))
    tried = [
        (f"{kind}, {way}", _pair(part, wanted, ids))
        for (way, part), (kind, wanted) in product(WAYS.items(), names.items())
    ]
    how, found = max(tried, key=lambda one: len(one[1]))  # of equal ones the first
    if not found or (how != tried[0][0] and len(found) < LEAST_SHARE * min(len(images), len(ids))):
        common = f"{len(found) or 'none'} in common" + f" (by {how})" * bool(found)
        sides = f"the captions are of {some(images, 'image')}, the {what} of {some(ids, 'image')}"
        raise InputError(f"{flag}: {sides}: {common}")
    image_id, example = next(iter(found.items()))
    print(f"matched by {how}: {len(found):,} of {len(images):,} images, {image_id} is {example}")
    return found


def write_dataset(folder: Path, splits: Splits, names: Names, features: Features) -> None:
    """Write a data set, and print what it holds.

    names: what the features of an image may be called, see `match`. Images without features are left out, named, and
    listed in {split}_missing.txt, those without captions in without_captions.txt. Raises InputError where few images
    have features, these are not sound, the name is taken.
    """
    captioned = {image_id for captions in splits.values() for image_id in captions}
    without = sorted({image_id for wanted in names.values() for image_id in wanted}.difference(captioned))
    found = match(names, features.ids, "--features", "features")
    if captioned.isdisjoint(found):
        raise InputError(f"--features: no image that has features has captions, {next(iter(found))} for one")
    with new_folder(folder, "--data_name") as temporary:
        without += sorted(set(features.ids).difference(found.values()))
        io.keep_encoder(features.folders, temporary)
        report = fill(temporary, folder, splits, found, features, {"without_captions.txt": ("no captions", without)})
    print(report)


def fill(
    temporary: Path, folder: Path, splits: Splits, found: Mapping[str, str], features: Features, left_out: Mapping
) -> str:
    """Write the files of a data set to a folder that will be called `folder`; returns what it holds, in lines.

    found: image id -> id of its features; other images are left out. left_out: file -> what those in it lack, and their
    ids, of images that are in no split.
    """
    used = [found[image_id] for captions in splits.values() for image_id in captions if image_id in found]
    dtype = features.dtype_of(used)
    rows, lacking, counts = [], {}, []
    for split, captions in splits.items():
        there = [image_id for image_id in captions if image_id in found]
        missing = [image_id for image_id in captions if image_id not in found]
        images = (features.read(found[one])._replace(id=one, captions=captions[one]) for one in with_bar(there, split))
        regions = io.write_split(temporary, split, images, dtype) if there else []
        lacking[f"{split}_missing.txt"] = f"no features for {split}", missing
        counts.extend(regions)
        each = [len(captions[image_id]) for image_id in there]
        rows.append((split, f"{len(each):,}", f"{sum(each):,}", span(each), span(regions), f"{len(missing):,}"))
    lacking = {file: (what, images) for file, (what, images) in (lacking | dict(left_out)).items() if images}
    for file, (_, images) in lacking.items():
        io.write_lines(temporary / file, images)
    img_dim = features.read(next(iter(found.values()))).features.shape[1]
    lines = [f"{folder}\n\n{io.table(HEADER, rows)}\n", io.describe(counts, [str(dtype)], img_dim)]
    lines += [f"{what}: {some(sorted(ids), 'image')}" for what, ids in features.notes.items()]
    lines += [f"{what}: {some(ids, 'image')}; all are in {folder / file}" for file, (what, ids) in lacking.items()]
    return "\n".join(lines)


def _pair(part: Callable[[str], str], wanted: Mapping[str, str], ids: Sequence[str]) -> dict[str, str]:
    """Image id -> id of its features, where parts of their names are equal; none at all where a name has no such part,
    two share one, or names on both sides lose more than an ending by it."""
    there, parts = {part(one): one for one in ids}, {image_id: part(name) for image_id, name in wanted.items()}
    unique = len(there) == len(ids) and len(set(parts.values())) == len(parts)
    whole = any(all(part(one) in (one, without_ending(one)) for one in names) for names in (wanted.values(), ids))
    if not (unique and whole) or "" in there or "" in parts.values():
        return {}
    return {image_id: there[one] for image_id, one in parts.items() if one in there}


def clean_caption(text: str) -> str:
    """The text on one line, its white space made single blanks. Raises ValueError where UTF-8 cannot hold it."""
    caption = " ".join(text.replace("\0", " ").split())
    caption.encode()
    return caption


def _open(path: Path) -> Iterator[tuple[str, Callable[[], Image]]]:
    """Image ids and what reads each: in all splits of a folder that have ids, one split, a folder of files, or HDF5."""
    if Path(f"{path}{FEATURES}").is_file():
        yield from _open_split(path.parent, path.name)
    elif path.suffix in (".h5", ".hdf5") and path.is_file():
        yield from _open_hdf5(path)
    elif not path.is_dir():
        absent = f"no such folder, nor a file {path.name}{FEATURES} in {path.parent}"
        wrong = "expected a folder, or a file .h5; make a folder of TSV files with `tsv`"
        raise InputError(f"--features {path}: {wrong if path.is_file() else absent}")
    elif splits := sorted(file.name.removesuffix(FEATURES) for file in path.glob(f"?*{FEATURES}")):
        for split in [one for one in splits if (path / f"{one}_ids.txt").is_file()] or splits:
            yield from _open_split(path, split)
    elif files := sorted(file for file in path.rglob("*") if file.suffix in (".npy", ".npz")):
        for file in files:
            image_id = file.relative_to(path).with_suffix("").as_posix()
            yield image_id, partial(_read, partial(np.load, file, allow_pickle=False), image_id, str(file))
    else:
        wanted = f"NAME{FEATURES} with NAME_ids.txt in it, nor ID.npy or ID.npz"
        raise InputError(f"--features {path}: neither {wanted}; of HDF5 give the file itself")


def _open_split(folder: Path, name: str) -> Iterator[tuple[str, Callable[[], Image]]]:
    split = io.open_features(folder, name)
    ids, arrays = read_ids(split), (read_boxes(split), read_boxes(split, "objects", io.OBJECT))
    if ids is None:
        raise InputError(f"--features {split.features.path}: needs {name}_ids.txt beside it, an image id a line")
    read = partial(io.read_image, split, arrays, split.features.dtype)
    yield from ((one, partial(read, place, one)) for place, one in enumerate(ids))


def _open_hdf5(path: Path) -> Iterator[tuple[str, Callable[[], Image]]]:
    """Arrays by name, one row an image, and their ids; or below each id an array of features, or a group of arrays."""
    h5py = optional("h5py", f"--features {path}: HDF5")
    with refusing(f"--features {path}: not a file of features and ids of images"):
        file = h5py.File(path)
        images = _rows_of(file) if any(name in file for name in FEATURE_NAMES) else _groups(file)
        for image_id, content in images:
            yield image_id, partial(_read, content, image_id, f"{path}: image {image_id}")


def _rows_of(file: Mapping[str, Any]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Image ids, and what gives the row of each array. Raises ValueError where arrays have other numbers of rows."""
    known = {name: file[name] for name in (*FEATURE_NAMES, *BOX_NAMES, *COUNT_NAMES) if name in file}
    ids = [one.decode() if isinstance(one, bytes) else str(one) for one in _named(ID_NAMES, file, needed=True)[:]]
    if lengths := {len(array) for array in known.values()}.difference([len(ids)]):
        raise ValueError(f"{len(ids)} ids, but arrays of {min(lengths)} rows")
    for place, image_id in enumerate(ids):
        yield image_id, partial(lambda row: {name: array[row] for name, array in known.items()}, place)


def _groups(file: Mapping[str, Any], folder: str = "") -> Iterator[tuple[str, Callable[[], Any]]]:
    """Image ids, with the groups they are in, and what gives the array or group of arrays of each."""
    for name, one in file.items():
        if hasattr(one, "ndim") or any(known in one for known in FEATURE_NAMES):
            yield f"{folder}{name}", partial(file.__getitem__, name)
        else:
            yield from _groups(one, f"{folder}{name}/")


def _read(content: Callable[[], Any], image_id: str, origin: str) -> Image:
    """An image of features (r, img_dim), (1, r, img_dim) or (img_dim,), or of arrays by name.

    These may be boxes (r, 4), or r, the number of boxes: features as (img_dim, r) are turned by them, and rows beyond r
    are padding. Raises InputError where they do not fit each other.
    """
    with refusing(f"{origin}: not an image's features; copy or extract it again, or save its arrays with np.savez"):
        arrays = content()
        arrays = {FEATURE_NAMES[0]: arrays} if hasattr(arrays, "ndim") else arrays
        features, boxes = _rows(_named(FEATURE_NAMES, arrays, needed=True)), _rows(_named(BOX_NAMES, arrays))
        count = _named(COUNT_NAMES, arrays)
        regions = len(features if boxes is None else boxes) if count is None else np.asarray(count).item()
        was_transposed = len(features) != regions and features.shape[1:] == (regions,)
        features = features.T if was_transposed else features
        if count is not None:
            features, boxes = features[:regions], None if boxes is None else boxes[:regions]
        if len(features) != regions:
            raise ValueError(f"{regions} boxes, but features of shape {features.shape}")
        return Image(image_id, features, boxes, origin=origin, was_transposed=was_transposed)


def _named(names: Sequence[str], arrays: Mapping[str, Any], needed: bool = False) -> Any:
    """The array that has one of the names; None where none has, or ValueError if it is needed."""
    found = [name for name in names if name in arrays]
    if len(found) > 1:
        raise ValueError(f"both {' and '.join(found)} are in it; keep one of them")
    if needed and not found:
        raise ValueError(f"none of {', '.join(arrays)} is called {' or '.join(names)}")
    return arrays[found[0]] if found else None


def _rows(array: Any) -> Any:
    """(r, n) of that, of (1, r, n) or of (n,); None of None."""
    return array[0] if np.ndim(array) == 3 and len(array) == 1 else array if array is None else np.atleast_2d(array)
