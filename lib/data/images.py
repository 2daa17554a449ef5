"""Files of any kind that Pillow reads -> upright pictures in RGB -> tensors; and where a data set's pictures are."""

import json
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import torch
from PIL.Image import Transpose
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from lib.cli import InputError, reason, refusing
from lib.data.dataset import CAPTIONS_PER_IMAGE, Split, find_folder, join, read_captions, read_encoder, split_files
from lib.files import read_lines

PICTURE = re.compile(r"\.(jpe?g|jpe|jfif|png|gif|bmp|webp|tiff?|avif|hei[cf]|jp2|p[gp]m)$", re.IGNORECASE)
SEPARATOR = re.compile("[-_./ ]")
ORIENTATION = 0x0112  # of EXIF: how the stored pixels must be turned
TURNS = {
    2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM, 5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE, 8: Transpose.ROTATE_90,
}  # fmt: skip
SIDEWAYS = (5, 6, 7, 8)  # of these width and height change places
# White, where pixels have more than 8 bits: the first of these that no pixel exceeds, else the brightest pixel.
WHITE = {"I": (65535.0,), "F": (1.0, 255.0, 65535.0)}
WHITE |= dict.fromkeys(("I;16", "I;16B", "I;16L", "I;16N"), (65535.0,))
NAMED = 3  # pictures that an error message names
LEAST_SIDE, FLIPPED = 0.6, 0.5  # of a picture's sides in training, share of the pictures
CHANGES = 5  # numbers that change a picture at random
MAPPING = "id_mapping.json"  # of GPO: file name by image id

Size = tuple[int, int]  # height, width


class NotAPicture(ValueError):
    """A file is no picture that can be used; the message says why, without its name."""


def open_picture(source: str | Path | PIL.Image.Image, at_least: Size | None = None) -> PIL.Image.Image:
    """The picture in RGB, upright as EXIF says: the first frame, on white where it is transparent.

    at_least: (height, width) in pixels; a JPEG of more than twice that may be decoded at a half to an eighth, faster.
    Raises NotAPicture for what Pillow cannot read, what is cut off, and more than PIL.Image.MAX_IMAGE_PIXELS.
    """
    return _decode(source, lambda *_: at_least)[0]


def load_picture(source: str | Path | PIL.Image.Image, preprocessing: Any) -> tuple[Tensor, Size]:
    """What a vision model takes: uint8 (3, H, W), and the upright picture's own (height, width). Raises NotAPicture."""
    wanted = partial(target_size, preprocessing)
    picture, size = _decode(source, wanted)
    height, width = wanted(*size)
    if picture.size != (width, height):
        resample = PIL.Image.Resampling[preprocessing.resample.upper()]
        picture = picture.resize((width, height), resample)  # Pillow's is antialiased
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1), size


def target_size(preprocessing: Any, height: int, width: int) -> Size:
    """The size that a picture of this height and width is given."""
    shorter, longer = preprocessing.limits
    if any(preprocessing.size) or not shorter:
        return preprocessing.size if any(preprocessing.size) else (height, width)
    scale = min(shorter / min(height, width), longer / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def _decode(source: str | Path | PIL.Image.Image, wanted: Callable) -> tuple[PIL.Image.Image, Size]:
    """The picture, perhaps smaller than it is, and its own size. wanted: size -> that which it will be resized to."""
    limit = PIL.Image.MAX_IMAGE_PIXELS
    try:
        with ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")  # of Pillow: about many pixels, refused below, and damaged EXIF
            if isinstance(source, PIL.Image.Image):
                picture = source
            elif os.path.exists(source) and not os.path.isfile(source):
                raise NotAPicture("not a file")  # a pipe would be waited for
            else:
                picture = stack.enter_context(PIL.Image.open(source))
            if picture.format == "EPS":
                raise NotAPicture("PostScript, a program that Pillow would run")
            if limit and picture.width * picture.height > limit:
                raise PIL.Image.DecompressionBombError
            if picture.format == "TIFF":
                picture.load()  # which turns it, as of no other format
            sideways = _orientation(picture) in SIDEWAYS
            size = picture.size if sideways else picture.size[::-1]
            if (least := wanted(*size)) and picture is not source:
                height, width = least[::-1] if sideways else least
                picture.draft(None, (2 * width, 2 * height))
            picture.load()
            turn = TURNS.get(_orientation(picture))
            picture = _to_rgb(picture)
            if turn is not None:
                picture = picture.transpose(turn)
                picture.info = {}  # which says how to turn it, as if it had not been
            return picture, size
    except NotAPicture:
        raise
    except PIL.Image.DecompressionBombError:
        raise NotAPicture(f"more than {limit:,} pixels, as many as Pillow takes for an attack") from None
    except PIL.UnidentifiedImageError:
        raise NotAPicture("not a picture, or of a kind that Pillow does not read") from None
    except Exception as error:  # of damaged bytes Pillow's readers raise a dozen kinds
        raise NotAPicture(reason(error)) from None


def _orientation(picture: PIL.Image.Image) -> int:
    try:
        return picture.getexif().get(ORIENTATION, 1)
    except Exception:  # damaged EXIF says nothing
        return 1


def _to_rgb(picture: PIL.Image.Image) -> PIL.Image.Image:
    if picture.mode in WHITE:
        pixels = np.nan_to_num(np.asarray(picture, np.float32))
        white = next((one for one in WHITE[picture.mode] if one >= pixels.max()), pixels.max())
        picture = PIL.Image.fromarray((pixels * (255 / white)).clip(0, 255).round().astype(np.uint8))
    if picture.getbands()[-1] in "Aa" or "transparency" in picture.info:
        white_paper = PIL.Image.new("RGBA", picture.size, "white")
        picture = PIL.Image.alpha_composite(white_paper, picture.convert("RGBA"))
    return picture if picture.mode == "RGB" else picture.convert("RGB")


# Names of pictures


def without_ending(name: str) -> str:
    """A name without the ending of a picture, a number without leading zeros."""
    stem = PICTURE.sub("", name)
    return stem.lstrip("0") or "0" if stem.isdecimal() else stem


def _number(name: str) -> str:
    """The number after the last separator, 391895 of COCO_val2014_000000391895.jpg; empty where none stands there."""
    end = SEPARATOR.split(without_ending(name))[-1]
    return without_ending(end) if end.isdecimal() else ""


# What of a name is compared with the same of another.
WAYS: dict[str, Callable[[str], str]] = {
    "whole name": str,
    "name without ending": without_ending,
    "name without folder and ending": lambda name: without_ending(re.split(r"[/\\]", name)[-1]),
    "number at the end": _number,
}


def list_pictures(folder: Path) -> tuple[list[str], int]:
    """Names of the pictures in a folder and those below it, relative and sorted; and how many other files are there.

    A picture is what has a picture's ending; hidden files and folders do not count. Links to folders are followed.
    """
    names, others, seen = [], 0, set()
    for where, folders, files in os.walk(folder, followlinks=True):
        seen.add(os.path.realpath(where))
        shown = {one: os.path.realpath(os.path.join(where, one)) for one in folders if one[0] != "."}
        folders[:] = [one for one, real in shown.items() if real not in seen]
        pictures = [one for one in files if PICTURE.search(one) and one[0] != "."]
        names += [Path(where, one).relative_to(folder).as_posix() for one in pictures]
        others += len(files) - len(pictures)
    return sorted(names), others


def list_photographs(folder: Path) -> tuple[list[str], list[str], int]:
    """Pictures whose names a file can list, "NAME: why" of others, the number of other files. Raises InputError."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder of pictures")
    found, others = list_pictures(folder)
    names = [name for name in found if name.isprintable() and name == name.strip()]
    if not names:
        raise InputError(f"{folder}: no pictures in it, nor in folders below it; other files: {others:,}")
    return names, [f"{name!a}: its name is not printable text" for name in sorted({*found}.difference(names))], others


def find_pictures(folder: Path, ids: Sequence[str], image_path: str = "") -> list[Path]:
    """The file of each picture of a data set.

    They lie in image_path if given, else in the folder that the data set's encoder.json names, in FOLDER/images,
    FOLDER/../flickr30k-images or FOLDER/../images. An id is the file's name or ends in the same number (WAYS), or
    id_mapping.json in FOLDER, above it or beside the pictures says which it is. Raises InputError naming missing ones.
    """
    places = [folder / (read_encoder(folder) or {}).get("folder", "images"), folder / "images"]
    places += [folder.parent / "flickr30k-images", folder.parent / "images"]
    roots = [Path(image_path)] if image_path else [one for one in dict.fromkeys(places) if one.is_dir()]
    found = [_find_in(root, folder, ids) for root in roots]
    best = max(found, key=len, default={})
    if missing := [one for one in ids if one not in best]:
        looked = ", ".join(map(str, roots or places))
        first = ", ".join(missing[:NAMED]) + ", ..." * (len(missing) > NAMED)
        what = f"{len(missing):,} of {len(ids):,} pictures are missing ({first}), looked for in {looked}"
        raise InputError(f"{folder}: {what}; say where they are with --image_path")
    return [best[one] for one in ids]


def _find_in(root: Path, folder: Path, ids: Sequence[str]) -> dict[str, Path]:
    """Those that are below a folder, by id."""
    mapped = {}
    for path in (place / MAPPING for place in (folder, folder.parent, root, root.parent)):
        if not path.is_file():
            continue
        with refusing(f"{path}: not a JSON object of file names by image id"):
            mapped = {one: str(name) for one, name in json.loads(path.read_bytes()).items()}
        break
    names, ways = list_pictures(root)[0], []
    for part in WAYS.values():
        parts = [part(name) for name in names]
        once = Counter(parts)
        there = {one: root / name for one, name in zip(parts, names, strict=True) if one and once[one] == 1}
        ways.append({one: there[key] for one in ids if (key := part(mapped.get(one, one))) in there})
    return max(ways, key=len)


# Training from pixels


class Look(NamedTuple):
    """What a vision model takes of a picture, and how many cells it makes of it."""

    preprocessing: Any  # lib.model.vision.Preprocessing, of one size for all pictures
    cells: int


class PictureFiles:
    """The pictures of a split, decoded when they are asked for."""

    varies = False  # all have the same number of regions

    def __init__(self, paths: Sequence[Path]):
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, images: np.ndarray, look: Look, changes: np.ndarray | None = None) -> Tensor:
        """Pictures (n, 3, H, W) uint8, as they are or `augment`ed by changes (n, CHANGES). Raises InputError."""
        size = look.preprocessing.size
        pictures = torch.empty(len(images), 3, *size, dtype=torch.uint8)
        for number, path in enumerate(self.paths[image] for image in images):
            try:
                if changes is None:
                    pictures[number] = load_picture(path, look.preprocessing)[0]
                else:
                    pictures[number] = augment(open_picture(path, size), look.preprocessing, changes[number])
            except NotAPicture as error:
                raise InputError(f"{path}: {error}; take it and its captions out of the data set") from None
        return pictures

    def describe(self) -> str:
        """The line that a data set's fingerprint begins with."""
        return f"{len(self)} pictures\n"

    def content(self, image: int) -> bytes:
        """The file of a picture."""
        return self.paths[image].read_bytes()


def augment(picture: PIL.Image.Image, preprocessing: Any, changes: np.ndarray) -> Tensor:
    """A part of a picture, 0.6 to 1 of each side, perhaps flipped: uint8 (3, H, W). changes: (CHANGES,) from 0 to 1."""
    sides = np.array(picture.size)
    kept = np.maximum(1, sides * (LEAST_SIDE + (1 - LEAST_SIDE) * changes[:2])).astype(int)
    (width, height), (left, top) = kept.tolist(), ((sides - kept) * changes[2:4]).astype(int).tolist()
    mode = InterpolationMode(preprocessing.resample)
    resized = transforms.resized_crop(picture, top, left, height, width, list(preprocessing.size), mode, antialias=True)
    pixels = transforms.pil_to_tensor(resized)
    return transforms.horizontal_flip(pixels) if changes[4] < FLIPPED else pixels


def open_pictures(data_path: str, data_name: str, split: str, image_path: str = "") -> Split:
    """Open a split for models that start from pixels. Raises InputError as `open_split` and `find_pictures` do."""
    folder = find_folder(data_path, data_name)
    ids_path, captions_path = split_files(folder, split, "ids.txt")
    ids, captions = [line.strip() for _, line in read_lines(ids_path)], read_captions(captions_path)
    every_fifth = ids[::CAPTIONS_PER_IMAGE]
    if len(ids) == len(captions) and ids == [one for one in every_fifth for _ in range(CAPTIONS_PER_IMAGE)]:
        ids = every_fifth
    return join(split, folder, PictureFiles(find_pictures(folder, ids, image_path)), ids_path, captions)
