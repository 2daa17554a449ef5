"""Turn bottom-up attention TSV files into a store of region features by image id, from which `karpathy` and `own` make
data sets. Six columns without a header, as bottom-up attention (Anderson et al. 2018) writes them: image_id, image_w,
image_h, num_boxes, boxes, features; the last two base64 of float32 (float16 and float64 are recognised). Images may
differ in their number of boxes. LXMERT's files of ten columns will do, too. A run that was interrupted begins again."""

import argparse
import base64
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from lib.cli import InputError, progress_bar, reason
from lib.data.dataset import read_ids
from lib.files import new_folder
from lib.prepare.io import BOX, Image, add_data_flags, check, describe, open_features, some, write_lines, write_split

TYPES = (np.dtype("<f4"), np.dtype("<f8"), np.dtype("<f2"))  # of boxes and features, the usual one first
LOOKED_AT, TELLING = 4096, 256  # numbers that tell an image's type, bytes below which they do not


def add_flags(flags: argparse.ArgumentParser) -> None:
    flags.add_argument("files", type=Path, nargs="+", metavar="FILE", help="TSV files, all parts of them at once")
    flags.add_argument("--skip_damaged", action="store_true", help="leave lines out that are not sound, and list them")
    add_data_flags(flags)


def run(args: argparse.Namespace) -> None:
    folder, noted = args.data_path / args.data_name, defaultdict(list)
    for file in args.files:
        if not file.is_file():
            raise InputError(f"{file}: no such file")
    with new_folder(folder, "--data_name") as temporary:
        size = sum(file.stat().st_size for file in args.files)
        with progress_bar("read", size, unit="B") as bar:
            counts = write_split(temporary, "all", _read(args.files, bar.update, noted, args.skip_damaged))
        if damaged := noted["damaged"]:
            write_lines(temporary / "damaged.txt", damaged)
    store = open_features(folder, "all")
    print(f"{store.features.path}: {some(read_ids(store) or [], 'image')}")
    types = (f"{name} in {images:,} images" for name, images in Counter(noted["type"]).items())
    print(describe(counts, types, store.features.img_dim))
    if damaged:
        print(f"damaged lines left out: {len(damaged):,}, all in {folder / 'damaged.txt'}; the first is {damaged[0]}")
    print(f"repeated image ids left out: {len(noted['repeated']):,}")


def _read(paths: Sequence[Path], read: Callable, noted: dict[str, list], skip_damaged: bool) -> Iterator[Image]:
    """The images of TSV files. read: gets the bytes of each line. noted: gets ids that were there before (`repeated`),
    each image's `type`, and what is wrong with lines left out (`damaged`)."""
    seen, before = set(), (0, 0)
    for path in paths:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                read(len(line))
                if not line.strip():
                    continue
                try:
                    image = _read_row(line, f"{path}: line {number}")
                    check(image, before, TYPES[0])
                except InputError as error:
                    if not skip_damaged:
                        raise InputError(f"{error}; --skip_damaged leaves such lines out") from None
                    noted["damaged"].append(str(error))
                    continue
                before = image.features.shape
                if image.id in seen:
                    noted["repeated"].append(image.id)
                else:
                    seen.add(image.id)
                    noted["type"].append(str(image.features.dtype))
                    yield image


def _read_row(line: bytes, origin: str) -> Image:
    try:
        image_id, *numbers, boxes, features = line.rstrip(b"\r\n").split(b"\t")
        if len(numbers) not in (3, 7):  # LXMERT puts classes and attributes between the size and num_boxes
            raise ValueError(f"{len(numbers) + 3} columns, 6 or LXMERT's 10 expected")
        width, height, regions = map(int, (*numbers[:2], numbers[-1]))
        if min(width, height, regions) < 1:
            raise ValueError(f"{width} x {height} pixels, {regions} boxes")
        fields = (field.removeprefix(b"b'").removesuffix(b"'") for field in (boxes, features))  # Python's printed bytes
        boxes, features = (base64.b64decode(field, validate=True) for field in fields)
        box_type = next((one for one in TYPES if len(boxes) == regions * BOX * one.itemsize), None)
        if not box_type:
            raise ValueError(f"{len(boxes)} bytes of boxes, {BOX} floats for each of {regions} expected")
        of_boxes = np.frombuffer(boxes, box_type).reshape(regions, BOX)
        return Image(image_id.decode("utf-8-sig"), _features(features, regions), of_boxes, origin=origin)
    except ValueError as error:
        what_to_do = "" if line.endswith(b"\n") else "; the file ends in this line: copy or download it again"
        kind = f"not a line of bottom-up attention, with tabs and no header ({reason(error)})"
        raise InputError(f"{origin}: {kind}{what_to_do}") from None


def _features(content: bytes, regions: int) -> np.ndarray:
    """(regions, img_dim), of the type that gives values of the most alike sizes: the number of bytes leaves it open."""
    types = [one for one in TYPES if content and len(content) % (regions * one.itemsize) == 0]
    if not types:
        raise ValueError(f"{len(content)} bytes of features, floats for each of {regions} boxes expected")
    last = None if len(content) >= TELLING else 1
    return min((np.frombuffer(content, one).reshape(regions, -1) for one in types[:last]), key=_spread)


def _spread(features: np.ndarray) -> float:
    """Standard deviation of the sizes in octaves. Read as another type it is 8 times that of the features or more, or
    some are not finite, or, where all are exact in a shorter type, every second one is 0."""
    values = features.ravel()[:LOOKED_AT]
    if not np.isfinite(values).all() or (values.any() and not values[::2].any()):
        return np.inf
    octaves = np.log2(np.abs(values[values != 0], dtype=np.float64))
    return float(octaves.std()) if octaves.size else 0.0
