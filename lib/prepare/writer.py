"""Writes a split image by image; no file has its final name before all of the split is there.

Under way every file is called NAME.part, and {split}_progress.json says how far the features have come: after an
interruption, a kill too, the same command goes on from there. {split}_made.json stays and says what the split was made
from.
"""

import fcntl
import io
import json
import os
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.lib import format as npy

from lib.cli import InputError, one_line, reason
from lib.data.dataset import CAPTIONS_PER_IMAGE
from lib.data.features import MOST_REGIONS
from lib.files import sync_folder, writing_to

HEADER_BYTES = 128  # what NumPy writes for these shapes
SYNC_BYTES = 2**28  # features written between two records of how far the work has come
BOX_NUMBERS = 4  # x1 y1 x2 y2
ID_CHARACTERS = 500

FEATURES, BOXES, PROGRESS, MADE = "ims.npy", "boxes.npy", "progress.json", "made.json"
DATA_FILES = (BOXES, "offsets.npy", "ids.txt", "sizes.txt", "caps.txt", "caps_counts.txt")  # that go with the features


class Written(NamedTuple):
    """An image in the file. position: what the caller can go on from after it."""

    id: str
    regions: int
    size: tuple[int, int] | None
    position: Any


class SplitWriter:
    """Use as a context, then `add` images and `finish`; `finished` and `images` say what is there already.

    images: those written by an interrupted try, in order. position: what the caller handed to `add` with the last of
    them.
    """

    def __init__(self, folder: Path, split: str, made_from: dict, dtype: type = np.float32, boxes: bool = False):
        """made_from: plain types that identify the source and how it is read; of another one nothing is gone on from.

        Raises InputError where the split is there but was made from something else.
        """
        self.folder, self.split, self.dtype, self.boxes = Path(folder), split, np.dtype(dtype), boxes
        self.made_from = json.loads(json.dumps({**made_from, "dtype": self.dtype.name, "boxes": boxes}))
        self.finished = self._is_finished()
        self._written: list[Written] = []
        self.img_dim = 0
        self._files: dict[str, BinaryIO] = {}
        self._unrecorded = 0  # bytes

    @property
    def images(self) -> int:
        return len(self._written)

    @property
    def ids(self) -> list[str]:
        return [image.id for image in self._written]

    @property
    def position(self) -> Any:
        return self._written[-1].position if self._written else None

    @property
    def bytes_there(self) -> int:
        """What the files under way, or the finished ones, occupy; to be taken off the space that is needed."""
        paths = [path(name) for name in (FEATURES, BOXES) for path in (self._part, self._final)]
        return sum(path.stat().st_size for path in paths if path.is_file())

    def __enter__(self) -> "SplitWriter":
        if self.finished:
            self._tidy()
            return self
        with writing_to(self.folder), ExitStack() as files:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._files[FEATURES] = files.enter_context(self._lock())
            self.finished = self._is_finished()
            if self.finished:  # by another process, between the first look and the lock
                self._part(FEATURES).unlink()
                return self
            if self.boxes:
                self._files[BOXES] = files.enter_context(self._open_boxes())
            self._go_on()
            files.pop_all()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        """What has been written stays for the next try, even where a full disk ended this one."""
        try:
            if self._unrecorded:
                with suppress(InputError) if error else nullcontext():
                    self._record()
        finally:
            for file in self._files.values():
                with suppress(OSError):  # what it still holds is not in the record
                    file.close()

    def add(
        self,
        features: np.ndarray,
        image_id: str,
        boxes: np.ndarray | None = None,
        position: Any = None,
        size: tuple[int, int] | None = None,
        origin: str = "",
    ) -> None:
        """Append an image: features (r, img_dim), boxes (r, 4) and size (width, height) in pixels.

        origin: the file and line it comes from. Raises InputError, with the origin, where it cannot be used.
        """
        try:
            arrays = self._arrays(np.asarray(features), boxes, image_id)
        except (ValueError, TypeError) as error:
            raise InputError(f"{origin or f'image {one_line(image_id)}'}: {reason(error)}") from None
        with writing_to(self.folder):
            for name, file in self._files.items():
                file.write(arrays[name].data)
        _, self.img_dim = arrays[FEATURES].shape
        self._unrecorded += arrays[FEATURES].nbytes
        self._written.append(Written(image_id, len(features), size, position))  # at once, whatever interrupts
        if self._unrecorded >= SYNC_BYTES:
            self._record()

    def finish(self, captions: Sequence[Sequence[str]] | None = None, texts: dict[str, str] | None = None) -> None:
        """Give everything its final name, features last.

        captions: those of each image; other than five each, their numbers go to {split}_caps_counts.txt. texts: further
        files, {split}_NAME.txt. Raises InputError where no image was added.
        """
        if not self._written:
            raise InputError(f"{self.folder}: no images for the split {self.split}")
        self._record()
        with writing_to(self.folder):
            self._write_headers()
            others = self._contents(captions, texts or {})
            for name, content in others.items():
                self._write(name, content)
            for name in (*others, *reversed(self._files)):
                os.replace(self._part(name), self._final(name))
            sync_folder(self.folder)
        self.finished = True
        self._tidy()

    # What is there

    def _is_finished(self) -> bool:
        if not self._final(FEATURES).exists():
            return False
        if _read_json(self._final(MADE)) != self.made_from:
            raise InputError(
                f"{self._final(FEATURES)} is already there and was made from something else, or in another way; "
                f"delete {self.split}_* there, or choose another --data_name"
            )
        return True

    def _lock(self) -> BinaryIO:
        """Open the features under way, which no other process may be writing."""
        path = self._part(FEATURES)
        file = _open(path)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        except BlockingIOError:
            pass
        file.close()
        raise InputError(f"{path}: another process is writing it; wait until it has ended")

    def _open_boxes(self) -> BinaryIO:
        """After a kill between the last two renamings the boxes have their final name, the features not yet."""
        if self._final(BOXES).exists() and self._recorded():
            os.replace(self._final(BOXES), self._part(BOXES))
        return _open(self._part(BOXES))

    def _recorded(self) -> dict:
        """What an interrupted try of the same has recorded; nothing where there is no sound record."""
        progress = _read_json(self._final(PROGRESS))
        return progress if isinstance(progress, dict) and progress.get("made_from") == self.made_from else {}

    def _go_on(self) -> None:
        """Take up what is recorded, if the files hold it; otherwise begin anew."""
        progress = self._recorded()
        images = [Written(*image, progress["position"]) for image in progress.get("images", ())]
        sizes = self._sizes(images, progress.get("img_dim", 0))
        if images and all(os.fstat(file.fileno()).st_size >= sizes[name] for name, file in self._files.items()):
            self._written, self.img_dim = images, progress["img_dim"]
        else:
            self._refuse_to_replace()
        for name, file in self._files.items():
            file.truncate(self._sizes(self._written, self.img_dim)[name])
            file.seek(0, os.SEEK_END)

    def _refuse_to_replace(self) -> None:
        """Files of this split that no try of the same has left are not ours to write over."""
        for name in DATA_FILES:
            if self._final(name).exists():
                raise InputError(
                    f"{self._final(name)} is already there, but not {self._final(FEATURES).name}; "
                    f"delete {self.split}_* there, or choose another --data_name"
                )

    # What is written

    def _record(self) -> None:
        progress = {
            "made_from": self.made_from,
            "img_dim": self.img_dim,
            "position": self.position,
            "images": [image[:-1] for image in self._written],
        }
        with writing_to(self.folder):
            for file in self._files.values():
                _sync(file)
            self._write(PROGRESS, json.dumps(progress).encode())
            os.replace(self._part(PROGRESS), self._final(PROGRESS))
            sync_folder(self.folder)
        self._unrecorded = 0

    def _write_headers(self) -> None:
        for name, file in self._files.items():
            numbers, dtype = (self.img_dim, self.dtype) if name == FEATURES else (BOX_NUMBERS, np.dtype(np.float32))
            file.seek(0)
            file.write(_header((*self._shape(), numbers), dtype))
            _sync(file)

    def _contents(self, captions: Sequence[Sequence[str]] | None, texts: dict[str, str]) -> dict[str, bytes]:
        """The small files."""
        files = {f"{name}.txt": text.encode() for name, text in texts.items()}
        files["ids.txt"] = _lines(self.ids)
        if all(image.size for image in self._written):
            files["sizes.txt"] = _lines(
                f"{width} {height}" for width, height in (image.size for image in self._written)
            )
        if len(self._shape()) == 1:
            offsets = io.BytesIO()
            np.save(offsets, np.cumsum([0, *(image.regions for image in self._written)], dtype=np.int64))
            files["offsets.npy"] = offsets.getvalue()
        if captions is not None:
            files["caps.txt"] = _lines(caption for of_image in captions for caption in of_image)
            if any(len(of_image) != CAPTIONS_PER_IMAGE for of_image in captions):
                files["caps_counts.txt"] = _lines(len(of_image) for of_image in captions)
        return {**files, MADE: json.dumps(self.made_from, indent=2).encode() + b"\n"}

    def _write(self, name: str, content: bytes) -> None:
        with open(self._part(name), "wb") as file:
            file.write(content)
            _sync(file)

    def _tidy(self) -> None:
        with suppress(OSError):
            self._final(PROGRESS).unlink()

    # Names and sizes

    def _final(self, name: str) -> Path:
        return self.folder / f"{self.split}_{name}"

    def _part(self, name: str) -> Path:
        return self.folder / f"{self.split}_{name}.part"

    def _shape(self) -> tuple[int, ...]:
        """Of all images, but for the numbers of a region: (regions of all images,) where they differ in regions."""
        regions = {image.regions for image in self._written}
        return (self.images, *regions) if len(regions) == 1 else (sum(image.regions for image in self._written),)

    def _sizes(self, images: list[Written], img_dim: int) -> dict[str, int]:
        """Bytes of the files under way."""
        regions = sum(image.regions for image in images)
        return {
            FEATURES: HEADER_BYTES + regions * img_dim * self.dtype.itemsize,
            BOXES: HEADER_BYTES + regions * BOX_NUMBERS * np.dtype(np.float32).itemsize,
        }

    def _arrays(self, features: np.ndarray, boxes: np.ndarray | None, image_id: str) -> dict[str, np.ndarray]:
        """What is written of an image. Raises ValueError where it cannot be used."""
        if not 0 < len(image_id) <= ID_CHARACTERS or not image_id.isprintable():
            raise ValueError(f"an image id must be 1 to {ID_CHARACTERS} printable characters")
        if features.ndim != 2 or features.dtype.kind != "f" or not 1 <= len(features) <= MOST_REGIONS:
            found = f"found {features.dtype} {features.shape}"
            raise ValueError(f"expected features (regions, numbers), 1 to {MOST_REGIONS} regions of floats, {found}")
        if features.shape[1] < 1 or self.img_dim not in (0, features.shape[1]):
            raise ValueError(f"features of {features.shape[1]} numbers, those before have {self.img_dim or 'some'}")
        with np.errstate(over="ignore"):
            arrays = {FEATURES: np.ascontiguousarray(features, self.dtype)}
        if not np.isfinite(arrays[FEATURES]).all():
            beyond = f"a feature beyond the largest number of {self.dtype}, {np.finfo(self.dtype).max:.0f}"
            raise ValueError(beyond if np.isfinite(features).all() else "NaN or infinite features")
        if self.boxes:
            arrays[BOXES] = np.ascontiguousarray(boxes, np.float32)
            if arrays[BOXES].shape != (len(features), BOX_NUMBERS) or not np.isfinite(arrays[BOXES]).all():
                raise ValueError(f"expected boxes ({len(features)}, {BOX_NUMBERS}) of finite numbers")
        return arrays


def identify(path: Path) -> dict:
    """What tells a file from another, for `made_from`. Raises InputError where it cannot be read."""
    try:
        status = path.stat()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({reason(error)})") from None
    return {"file": path.name, "bytes": status.st_size, "mtime_ns": status.st_mtime_ns}


def _open(path: Path) -> BinaryIO:
    """For reading and writing, made where it is not there, never emptied."""
    return open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _header(shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    header = io.BytesIO()
    npy.write_array_header_1_0(header, {"descr": dtype.str, "fortran_order": False, "shape": shape})
    assert len(header.getvalue()) == HEADER_BYTES
    return header.getvalue()


def _read_json(path: Path) -> Any:
    """What a file of ours holds; None where there is none, or a damaged one."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def _lines(entries: Iterable) -> bytes:
    return "".join(f"{entry}\n" for entry in entries).encode()
