"""Files of region features.

    {split}_ims.npy      float32 or float16, (images, regions, img_dim), or packed: (regions of all images, img_dim)
    {split}_offsets.npy  of packed features: (images + 1,) integers, image i has the rows offsets[i] to offsets[i + 1];
                         without this file they are (images, img_dim), one region each

Features are read at an offset when they are asked for. They are not memory-mapped: mapped pages count as memory of each
process that touches them, and reading them is slower (docs/log.md).
"""

import math
import os
import warnings
import weakref
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from numpy.lib import format as npy

from lib.cli import InputError, one_line, reason, refusing, with_bar

READ_AHEAD_BYTES = 2**17  # Linux reads no more than this ahead for one call, on some disks
BLOCK_BYTES = 2**20  # read, converted and checked at a time, so that it stays in the processor's cache
UPLOAD_BYTES = 2**26  # copied to a device at a time
EXPONENT: dict[int, np.uint16 | np.uint32] = {2: np.uint16(0x7C00), 4: np.uint32(0x7F800000)}  # its bits, by bytes


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """start, start + 1, ..., start + length - 1 of each group (groups,), one after the other: (sum of lengths,)."""
    ends = np.cumsum(lengths)
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(ends[-1] if len(ends) else 0)


class FeatureFile:
    """Region features of a split. Rows are regions, numbered through all images, each image once.

    starts: (images + 1,), image i has the rows from starts[i] to starts[i + 1]. counts: (images,) regions of each.
    regions: the largest count. varies: whether counts differ.
    """

    def __init__(self, path: Path, repeats: int = 1):
        """Open {split}_ims.npy, which holds each image `repeats` times in a row. Raises InputError if it is damaged."""
        self.path, self.repeats = path, repeats
        shape, self.dtype, self._data_at = _read_header(path)
        self.img_dim, self._row_bytes = shape[-1], shape[-1] * self.dtype.itemsize
        self._is_packed = len(shape) == 2 and _offsets_path(path).is_file()
        if self._is_packed:
            self.starts = _read_offsets(path, shape[0])
        else:
            self.starts = np.arange(shape[0] // repeats + 1) * (shape[1] if len(shape) == 3 else 1)
        self.counts = np.diff(self.starts)
        self.regions = int(self.counts.max())
        self.varies = bool((self.counts != self.regions).any())
        self._file = open(path, "rb", buffering=0)
        weakref.finalize(self, self._file.close)

    def __len__(self) -> int:
        return len(self.counts)

    def describe(self) -> str:
        """The line that a data set's fingerprint begins with."""
        return f"{len(self)} {self.regions} {self.img_dim} {self.dtype}\n"

    def content(self, image: int) -> bytes:
        """The features of an image."""
        return self.read(np.array([image])).tobytes()

    def __reduce__(self) -> tuple:  # a loader's worker opens the file for itself
        return FeatureFile, (self.path, self.repeats)

    def read(self, images: np.ndarray) -> np.ndarray:
        """All regions (n, img_dim) of some images, image after image; see `read_rows`."""
        return self.read_rows(ranges(self.starts[images], self.counts[images]))

    def read_rows(self, rows: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Features (n, img_dim) of rows (n,), in the file's precision or into `out`, which is float32 or float16.

        Raises InputError where the file cannot be read, on NaN and infinity, and on what a float16 `out` cannot hold.
        """
        out = np.empty((len(rows), self.img_dim), self.dtype) if out is None else out
        step, converts = max(1, BLOCK_BYTES // self._row_bytes), out.dtype != self.dtype
        buffer = np.empty((min(step, len(rows)), self.img_dim), self.dtype) if converts else None
        for first in range(0, len(rows), step):
            some, features = rows[first : first + step], out[first : first + step]
            stored = features if buffer is None else buffer[: len(some)]
            self._fill(stored, self._stored(some))
            if converts:
                torch.from_numpy(features).copy_(torch.from_numpy(stored))  # faster than NumPy's conversion
            exponent = EXPONENT[features.itemsize]  # all ones in NaN and infinity: much faster than np.isfinite
            if (features.view(exponent.dtype) & exponent).max() == exponent:
                self._refuse(some, stored)
        return out

    def read_ahead(self, images: np.ndarray) -> None:
        """Have the system fetch the features of some images in the background, where it can."""
        if not hasattr(os, "posix_fadvise"):
            return
        begins = self._stored(self.starts[images]) * self._row_bytes + self._data_at
        ends = begins + self.counts[images] * self._row_bytes
        with suppress(OSError):
            for begin, end in zip(begins.tolist(), ends.tolist(), strict=True):
                for at in range(begin, end, READ_AHEAD_BYTES):
                    size = min(READ_AHEAD_BYTES, end - at)
                    os.posix_fadvise(self._file.fileno(), at, size, os.POSIX_FADV_WILLNEED)

    def row_of(self, row: int) -> int:
        """The index into the file's array for error messages: of the row if it is packed, else of its (first) image."""
        return int(row if self._is_packed else row // self.regions * self.repeats)

    def _stored(self, rows: np.ndarray) -> np.ndarray:
        """Where rows lie in the file, which may hold each image several times."""
        return rows if self.repeats == 1 else rows + rows // self.regions * (self.regions * (self.repeats - 1))

    def _fill(self, features: np.ndarray, stored: np.ndarray) -> None:
        """Read rows of the file, consecutive ones in one call."""
        size, target = self._row_bytes, features.data.cast("B")
        cuts = (np.flatnonzero(np.diff(stored) != 1) + 1).tolist()
        begins, ends = [0, *cuts], [*cuts, len(stored)]
        try:
            for begin, end, row in zip(begins, ends, stored[begins].tolist(), strict=True):
                place, part = self._data_at + row * size, target[begin * size : end * size]
                while part:
                    if not (count := os.preadv(self._file.fileno(), [part], place)):
                        what = "has become shorter while it was open; copy or download it again"
                        raise InputError(f"{self.path}: {what}")
                    place, part = place + count, part[count:]
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read ({reason(error)})") from None

    def _refuse(self, rows: np.ndarray, features: np.ndarray) -> None:
        """Raise InputError naming the first image or row that cannot be used."""
        bad, problem = ~np.isfinite(features), "NaN or infinite features; extract or download the file again"
        if not bad.any():
            bad = np.abs(features) > np.finfo(np.float16).max
            problem = "a feature beyond float16's limit, 65504: keep float32 (--precision fp32, no --device_features)"
        raise InputError(f"{self.path}: row {self.row_of(rows[bad.any(axis=1)][0])} holds {problem}")


def _read_header(path: Path) -> tuple[tuple[int, ...], np.dtype, int]:
    """Shape and type of a file of features and where they start in it. Raises InputError if it is damaged."""
    with (
        refusing(f"{path}: truncated or not a .npy file of features; copy or download it again"),
        open(path, "rb") as file,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # NumPy's about files written by Python 2, as SCAN's are
        read = npy.read_array_header_1_0 if npy.read_magic(file) == (1, 0) else npy.read_array_header_2_0
        shape, fortran_order, dtype = read(file)
        data_at, size = file.tell(), os.fstat(file.fileno()).st_size
        expected = data_at + math.prod(shape) * dtype.itemsize
        if size != expected:
            raise ValueError(f"{size} bytes instead of {expected}")
    if len(shape) not in (2, 3) or dtype not in (np.float32, np.float16) or min(shape) < 1 or fortran_order:
        order = " stored by columns: write numpy.ascontiguousarray of it" if fortran_order else ""
        found = one_line(f"{dtype} {shape}") + order
        raise InputError(f"{path}: expected float32 or float16 of shape (images, regions, img_dim), found {found}")
    return shape, dtype, data_at


def _offsets_path(path: Path) -> Path:
    return path.with_name(path.name.removesuffix("_ims.npy") + "_offsets.npy")


def _read_offsets(path: Path, rows: int) -> np.ndarray:
    """The offsets (images + 1,) that belong to a packed feature file. Raises InputError if they do not fit it."""
    what = f"integers (images + 1,) that rise from 0 to {rows}"
    with refusing(f"{path}: of shape (regions of all images, img_dim), so {_offsets_path(path)} must hold {what}"):
        offsets = np.load(_offsets_path(path), allow_pickle=False)
        if offsets.ndim != 1 or offsets.dtype.kind != "i" or offsets[0] != 0 or offsets[-1] != rows:
            raise ValueError(f"{offsets.dtype} {offsets.shape}")
        if not (np.diff(offsets) > 0).all():
            raise ValueError("they do not rise")
    return offsets.astype(np.int64)


class DeviceFeatures:
    """All features of a split in float16 in a device's memory (--device_features): rows (n, img_dim)."""

    def __init__(self, features: FeatureFile, device: torch.device):
        """Read the whole file once. Raises InputError where memory is short, on NaN, and on values beyond float16."""
        shape = int(features.starts[-1]), features.img_dim
        try:
            self.rows = torch.empty(shape, dtype=torch.float16, device=device)
        except RuntimeError:  # torch.OutOfMemoryError is one
            size = f"{features.path} takes {2 * math.prod(shape) / 1e9:.1f} GB"
            raise InputError(f"--device_features: {size}, more than {device} has free; train without it") from None
        step = max(1, UPLOAD_BYTES // (2 * features.img_dim))
        for start in with_bar(range(0, len(self.rows), step), "features"):
            rows = np.arange(start, min(start + step, len(self.rows)))
            block = features.read_rows(rows, out=np.empty((len(rows), features.img_dim), np.float16))
            self.rows[start : start + len(rows)] = torch.from_numpy(block)
