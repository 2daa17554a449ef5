"""Turn bottom-up attention TSV files into a store of region features by image id, from which `karpathy` and `own` make
data sets. Six columns without a header, as bottom-up attention (Anderson et al. 2018) writes them: image_id, image_w,
image_h, num_boxes, boxes, features; the last two base64 of float32. Images may differ in their number of boxes. A run
that was interrupted begins again."""

import argparse
import base64
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from lib.cli import InputError, progress_bar, reason
from lib.data.features import FeatureFile
from lib.files import check_space, new_folder
from lib.prepare.io import BOX, FEATURES, Image, add_data_flags, span, write_split


def add_flags(flags: argparse.ArgumentParser) -> None:
    flags.add_argument("files", type=Path, nargs="+", metavar="FILE", help="TSV files, all parts of them at once")
    add_data_flags(flags)


def run(args: argparse.Namespace) -> None:
    folder, repeated = args.data_path / args.data_name, []
    for file in args.files:
        if not file.is_file():
            raise InputError(f"{file}: no such file")
    with new_folder(folder, "--data_name") as temporary:
        size = sum(file.stat().st_size for file in args.files)
        check_space(folder, size * 3 // 4, "the store")  # base64 takes 4 bytes for 3
        with progress_bar("read", size, unit="B") as bar:
            counts = write_split(temporary, "all", _read(args.files, bar.update, repeated))
    features = FeatureFile(folder / f"all{FEATURES}")
    print(f"{features.path}: {len(counts):,} images, {span(counts)} regions, img_dim {features.img_dim}")
    print(f"repeated image ids left out: {len(repeated):,}")


def _read(paths: Sequence[Path], read: Callable[[int], object], repeated: list[str]) -> Iterator[Image]:
    """The images of TSV files; an id that was there before goes to `repeated`. `read` gets the bytes of each line."""
    seen: set[str] = set()
    for path in paths:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                read(len(line))
                if not line.strip():
                    continue
                image = _read_row(line, f"{path}: line {number}")
                if image.id in seen:
                    repeated.append(image.id)
                else:
                    seen.add(image.id)
                    yield image


def _read_row(line: bytes, origin: str) -> Image:
    try:
        image_id, *numbers, boxes, features = line.rstrip(b"\r\n").split(b"\t")
        width, height, regions = map(int, numbers)
        if min(width, height, regions) < 1:
            raise ValueError(f"{width} x {height} pixels, {regions} boxes")
        boxes, features = _floats(boxes).reshape(regions, BOX), _floats(features).reshape(regions, -1)
        return Image(image_id.decode(), features, boxes, origin=origin)
    except ValueError as error:
        what_to_do = "" if line.endswith(b"\n") else "; the file ends in this line: copy or download it again"
        raise InputError(f"{origin}: not a line of bottom-up attention ({reason(error)}){what_to_do}") from None


def _floats(field: bytes) -> np.ndarray:
    return np.frombuffer(base64.b64decode(field, validate=True), "<f4")
