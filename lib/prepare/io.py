"""What the commands share: an image as they pass it on, writing a split, reading what a data set's folder holds."""

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.lib import format as npy
from numpy.typing import DTypeLike

from lib.cli import InputError, refusing
from lib.data.dataset import BOX, CAPTIONS_PER_IMAGE, ENCODER, Split, find_folder, open_split
from lib.data.features import FeatureFile

KNOWN_SPLITS = ("train", "dev", "test", "testall")  # what training and evaluation open; these need captions
FEATURES = "_ims.npy"
HEADER_BYTES = 128  # of a .npy file, as NumPy pads it for up to three dimensions
OBJECT = 2  # numbers of what a detector sees in a box: label, score
NAMED = 5  # ids or rows that a message names


class Image(NamedTuple):
    """An image on its way into a data set."""

    id: str
    features: np.ndarray  # (r, img_dim), one row a region
    boxes: np.ndarray | None = None  # (r, 4), x1 y1 x2 y2 in pixels
    captions: Sequence[str] = ()
    was_transposed: bool = False  # the file has them as (img_dim, r)
    objects: np.ndarray | None = None  # (r, 2), label and score
    origin: str = ""  # the file and line that it was read from, for error messages


def add_data_flags(flags: argparse.ArgumentParser, default: str | None = None) -> None:
    """--data_path and --data_name; without a default the name is required, that of a new data set."""
    what = "the data set" if default else "the new data set"
    flags.add_argument("--data_path", type=Path, default=Path("data"), help="folder of the data sets")
    flags.add_argument("--data_name", default=default, required=not default, help=f"name of {what}, a folder in there")


def write_split(folder: Path, split: str, images: Iterable[Image], dtype: DTypeLike = np.float32) -> np.ndarray:
    """Write a split image by image, features in float32 or float16. Returns each image's number of regions (images,).

    Boxes, objects and captions are written where the images have them. Where images differ in their number of regions,
    these stand one after the other, with {split}_offsets.npy. Raises InputError, with the image's origin, where its
    features cannot be used, and where there are no images.
    """
    written, counts, shape = [], [], (0, 0)  # features go to the file, the rest stays in memory
    with open(folder / f"{split}{FEATURES}", "wb") as file:
        file.write(bytes(HEADER_BYTES))
        for image in images:
            check(image, shape, np.dtype(dtype))
            shape = image.features.shape
            counts.append(len(image.features))
            file.write(np.ascontiguousarray(image.features, dtype).data)
            written.append(image._replace(features=np.empty(0)))
        if not written:
            raise InputError(f"no images for the split {split}")
        varies = len(set(counts)) > 1
        rows = (sum(counts),) if varies else (len(counts), counts[0])
        header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (*rows, shape[1])}
        file.seek(0)
        npy.write_array_header_1_0(file, header)
        assert file.tell() == HEADER_BYTES
    for name, width in (("boxes", BOX), ("objects", OBJECT)):
        of_images = [getattr(image, name) for image in written if getattr(image, name) is not None]
        if len(of_images) == len(written):
            np.save(folder / f"{split}_{name}.npy", np.concatenate(of_images, dtype=np.float32).reshape(*rows, width))
    if varies:
        np.save(folder / f"{split}_offsets.npy", np.cumsum([0, *counts], dtype=np.int64))
    write_lines(folder / f"{split}_ids.txt", (image.id for image in written))
    if any(image.captions for image in written):
        write_lines(folder / f"{split}_caps.txt", (caption for image in written for caption in image.captions))
        if any(len(image.captions) != CAPTIONS_PER_IMAGE for image in written):
            write_lines(folder / f"{split}_caps_counts.txt", (len(image.captions) for image in written))
    return np.array(counts)


def keep_encoder(sources: Iterable[Path], folder: Path) -> None:
    """Copy encoder.json to a data set's folder, where the folders that its features are from agree on it."""
    files = [source / ENCODER for source in sources]
    contents = {file.read_bytes() if file.is_file() else b"" for file in files}
    if len(contents) == 1 and any(contents):
        (folder / ENCODER).write_bytes(contents.pop())


def write_lines(path: Path, lines: Iterable[object]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")


@np.errstate(over="ignore")  # what overflows float16 or float32 is refused as infinite
def check(image: Image, before: tuple[int, int], dtype: np.dtype) -> None:
    """Raises InputError where an image cannot be written. before: shape of the image before, (0, 0) for the first."""
    features, boxes, problem = image.features, image.boxes, ""
    if not image.id.isprintable() or image.id != (image.id.strip() or None):
        problem = f"the image id {image.id!a} must be printable text without blanks around it"
    elif features.ndim != 2 or features.dtype.kind != "f" or not features.size:
        problem = f"expected floats of shape (regions, img_dim), found {features.dtype} {features.shape}"
    elif features.shape[1] != (before[1] or features.shape[1]):
        problem = f"features of {features.shape[1]} numbers, but the images before have {before[1]}"
        if len(features) in before and len(features) > features.shape[1]:
            problem += f"; their shape {features.shape} looks like (numbers, regions): turn them, or store boxes too"
    elif dtype == np.float16 and features.dtype != np.float16:
        problem = f"{features.dtype} features, but other images have float16; make them one type"
    elif not np.isfinite(np.asarray(features, dtype)).all():
        problem = "NaN or infinite features"
    elif boxes is not None and (boxes.shape != (len(features), BOX) or not np.isfinite(boxes).all()):
        problem = f"expected boxes ({len(features)}, {BOX}) without NaN, found {boxes.shape}"
    if problem:
        raise InputError(f"{image.origin or f'image {image.id!r}'}: {problem}")


def find_splits(args: argparse.Namespace) -> tuple[Path, list[str]]:
    """The data set's folder and the names of all splits in it, `train` first. InputError where there are none."""
    folder = find_folder(str(args.data_path), args.data_name)
    names = {path.name.removesuffix(FEATURES) for path in folder.glob(f"?*{FEATURES}")}
    if not names:
        open_split(str(args.data_path), args.data_name, "train")  # says what is missing
    known = [name for name in KNOWN_SPLITS if name in names]
    return folder, known + sorted(names.difference(known))


def open_features(folder: Path, name: str) -> Split:
    """A split, with captions where there are some. Raises InputError where its files are not sound."""
    if (folder / f"{name}_caps.txt").is_file():
        folder = folder.resolve()
        return open_split(str(folder.parent), folder.name, name)
    return Split(name, folder, FeatureFile(folder / f"{name}{FEATURES}"), [], np.zeros(0, np.int64))


def read_image(split: Split, arrays: Iterable, dtype: Any, place: int, image_id: str) -> Image:
    """The image at a place of a split. arrays: boxes and objects of all images, or None. dtype: of its features."""
    features, (first, last) = split.features, split.features.starts[place : place + 2]
    rows = features.read_rows(np.arange(first, last), out=np.empty((last - first, features.img_dim), dtype))
    boxes, objects = (None if array is None else array[first:last] for array in arrays)
    return Image(image_id, rows, boxes, objects=objects, origin=f"{features.path}: image {image_id}")


def read_json(path: Path) -> Any:
    """Raises InputError where the file is not JSON."""
    with refusing(f"{path}: not JSON; copy or download it again, or call it .jsonl if each line is an object"):
        return json.loads(path.read_bytes())


def some(names: Sequence[object], what: str) -> str:
    """ "2 rows (3, 5)": how many there are, and the first few."""
    first = ", ".join([*map(str, names[:NAMED]), *(["..."] if len(names) > NAMED else [])])
    return f"{len(names):,} {what}{'s' * (len(names) != 1)} ({first})"


def span(numbers: Sequence[int] | np.ndarray) -> str:
    """ "36", or "10 to 100 (median 36)"; empty where there are none."""
    if not len(numbers):
        return ""
    least, most = min(numbers), max(numbers)
    return str(least) if least == most else f"{least} to {most} (median {np.median(numbers):g})"


def describe(counts: Sequence[int] | np.ndarray, types: Iterable[str], img_dim: int) -> str:
    """Regions, types and size of features, in a line. counts: regions of each image."""
    turned = ": more regions than numbers, are they stored as (numbers, regions)?" if min(counts) > img_dim else ""
    return f"features: {span(counts)} regions of {img_dim:,} numbers, {', '.join(types)}{turned}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lines of columns, names to the left and figures to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = ([name.ljust(widths[0]), *map(str.rjust, figures, widths[1:])] for name, *figures in (header, *rows))
    return "\n".join(map("  ".join, lines))
