"""Files of region features.

    {split}_ims.npy      float32 or float16, (images, regions, img_dim); or all regions of all images one after the
                         other, (regions of all images, img_dim), and with it
    {split}_offsets.npy  (images + 1,): image i has the rows from offsets[i] to offsets[i + 1]

Nothing is read before it is asked for, and nothing is mapped: mapped pages of a file count as memory of each process
that has touched them, reads at an offset do not, and they are faster (docs/log.md).
"""

import io
import math
import os
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from lib.cli import InputError, one_line, reason, with_bar


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """start, start + 1, ... of each group (groups,), `length` numbers each, one after the other: (sum of lengths,)."""
    ends = np.cumsum(lengths)
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(ends[-1] if len(ends) else 0)


# What is read at most of files that may hold anything
HEADER_BYTES = 16_384  # of a .npy file; NumPy writes 128 and parses no more than 10,000
MOST_REGIONS = 4_096  # of an image
MOST_IMAGES = 10**8

READ_AHEAD_BYTES = 2**17  # Linux reads no more than this ahead for one call, on some disks
BLOCK_BYTES = 2**20  # read, converted and checked at a time, so that it stays in the processor's cache

# The bits of +infinity, as a signed and as an unsigned integer of as many bits
INFINITY = {
    np.dtype(np.float32): (np.int32, np.uint32, 0x7F800000),
    np.dtype(np.float16): (np.int16, np.uint16, 0x7C00),
}


class FeatureFile:
    """Region features of a split; regions are numbered through all images, each image once.

    starts: (images + 1,), image i has the regions from starts[i] to starts[i + 1]. counts: (images,) regions of each.
    regions: the most of an image. varies: whether they differ in number. An instance travels to loader workers without
    features; each opens the file for itself.
    """

    def __init__(self, path: Path, repeats: int = 1):
        """Open {split}_ims.npy; each image stands `repeats` times in a row. Raises InputError where it is not sound."""
        self.path, self.repeats = path, repeats
        shape, self.dtype, self._data_at = _open_header(path)
        self.img_dim, self._row_bytes = shape[-1], shape[-1] * self.dtype.itemsize
        self.starts = (
            np.arange(shape[0] // repeats + 1) * shape[1] if len(shape) == 3 else _read_offsets(path, shape[0])
        )
        self.counts = np.diff(self.starts)
        self.regions = int(self.counts.max())
        self.varies = bool((self.counts != self.regions).any())
        self._is_packed = len(shape) == 2
        self._file = None

    def __len__(self) -> int:
        return len(self.counts)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_file": None}

    def read(self, images: np.ndarray) -> np.ndarray:
        """All regions (n, img_dim) of some images, one image after the other; see `read_rows`."""
        return self.read_rows(ranges(self.starts[images], self.counts[images]))

    def read_rows(self, rows: np.ndarray, half: bool = False) -> np.ndarray:
        """Features (n, img_dim) of regions (n,), in the file's precision or in float16; see `read_into`."""
        features = np.empty((len(rows), self.img_dim), np.float16 if half else self.dtype)
        self.read_into(features, rows)
        return features

    def read_into(self, features: np.ndarray, rows: np.ndarray) -> None:
        """Fill features (n, img_dim), float32 or float16, with those of regions (n,).

        Raises InputError where the file cannot be read, on NaN and infinity, and on what is too large for float16.
        """
        step = max(1, BLOCK_BYTES // self._row_bytes)
        converts = features.dtype != self.dtype
        buffer = np.empty((min(step, len(rows)), self.img_dim), self.dtype) if converts else None
        for first in range(0, len(rows), step):
            some, given = rows[first : first + step], features[first : first + step]
            read = buffer[: len(some)] if converts else given
            self._fill(read, self._stored(some))
            if converts:
                torch.from_numpy(given).copy_(torch.from_numpy(read))
            if not _is_finite(given):
                self._refuse(some, read)

    def read_ahead(self, images: np.ndarray) -> None:
        """Have the system fetch the features of some images meanwhile, where it can."""
        if not hasattr(os, "posix_fadvise"):
            return
        begins = self._stored(self.starts[images]) * self._row_bytes + self._data_at
        sizes = self.counts[images] * self._row_bytes
        for begin, end in zip(begins.tolist(), (begins + sizes).tolist(), strict=True):
            for first in range(begin, end, READ_AHEAD_BYTES):
                with suppress(OSError):
                    length = min(READ_AHEAD_BYTES, end - first)
                    os.posix_fadvise(self._descriptor(), first, length, os.POSIX_FADV_WILLNEED)

    def row_of(self, region: int) -> int:
        """The row of a region in the file's array: its image's (first) row, or its own where images are packed."""
        return int(region if self._is_packed else region // self.regions * self.repeats)

    def _stored(self, rows: np.ndarray) -> np.ndarray:
        """Where regions stand in the file, which may hold each image several times."""
        return rows if self.repeats == 1 else rows + rows // self.regions * (self.regions * (self.repeats - 1))

    def _fill(self, features: np.ndarray, rows: np.ndarray) -> None:
        """Read rows of the file, consecutive ones at once."""
        size = self._row_bytes
        target = memoryview(features).cast("B")
        cuts = (np.flatnonzero(np.diff(rows) != 1) + 1).tolist()
        begins, ends = [0, *cuts], [*cuts, len(rows)]
        for begin, end, row in zip(begins, ends, rows[begins].tolist(), strict=True):
            self._read_at(self._data_at + row * size, target[begin * size : end * size])

    def _read_at(self, place: int, target: memoryview) -> None:
        while target:
            try:
                count = os.preadv(self._descriptor(), [target], place)
            except OSError as error:
                raise InputError(f"{self.path}: cannot be read ({reason(error)})") from None
            if not count:
                raise InputError(f"{self.path}: has become shorter while it was open; copy or download it again")
            place, target = place + count, target[count:]

    def _descriptor(self) -> int:
        if self._file is None:
            try:
                self._file = open(self.path, "rb", buffering=0)
            except OSError as error:
                raise InputError(f"{self.path}: cannot be read ({reason(error)})") from None
        return self._file.fileno()

    def _refuse(self, rows: np.ndarray, features: np.ndarray) -> None:
        """Name the first row, of the array in the file, that cannot be used."""
        finite = np.isfinite(features).all(axis=1)
        bad = ~finite if not finite.all() else (np.abs(features) > np.finfo(np.float16).max).any(axis=1)
        row = self.row_of(rows[bad][0])
        if not finite.all():
            raise InputError(
                f"{self.path}: row {row} holds NaN or infinite features; extract or download the file again"
            )
        raise InputError(
            f"{self.path}: row {row} holds a feature beyond float16's largest number, {np.finfo(np.float16).max:.0f}; "
            "use --precision fp32, without --device_features"
        )


def _is_finite(features: np.ndarray) -> bool:
    """Whether no number is NaN or infinite: as bits these are above all others of their sign, whichever it is."""
    signed, unsigned, infinity = INFINITY[features.dtype]
    negative = infinity + np.iinfo(signed).max + 1
    return int(features.view(signed).max()) < infinity and int(features.view(unsigned).max()) < negative


def _open_header(path: Path) -> tuple[tuple[int, ...], np.dtype, int]:
    """Shape and type of a feature file and where its data starts. Raises InputError where it is not sound."""
    try:
        shape, fortran_order, dtype, offset, size = _read_header(path)
    except Exception as error:  # a damaged header makes NumPy raise almost anything
        raise InputError(f"{path}: truncated or not a .npy file ({reason(error)}); copy or download it again") from None
    fits = len(shape) in (2, 3) and dtype in (np.float32, np.float16) and min(shape) >= 1
    if not fits or (len(shape) == 3 and (shape[0] > MOST_IMAGES or shape[1] > MOST_REGIONS)):
        raise InputError(
            f"{path}: expected float32 or float16 of shape (images, regions, img_dim), at most {MOST_REGIONS} regions, "
            f"found {one_line(f'{dtype} {shape}')}"
        )
    _check_size(path, size, offset + math.prod(shape) * dtype.itemsize)
    if fortran_order:
        raise InputError(
            f"{path}: stored by columns (Fortran order), in which an image lies all over the file; write it again with "
            "numpy.save(new, numpy.ascontiguousarray(numpy.load(old)))"
        )
    return shape, dtype, offset


def _read_offsets(path: Path, rows: int) -> np.ndarray:
    """Where each image starts among all rows (images + 1,). Raises InputError where that cannot be."""
    offsets_path = path.with_name(path.name.removesuffix("_ims.npy") + "_offsets.npy")
    if not os.path.isfile(offsets_path):
        raise InputError(
            f"{path}: of shape (regions of all images, img_dim), so {offsets_path.name} must stand beside it and say "
            "where each image starts"
        )
    try:
        shape, _, dtype, offset, size = _read_header(offsets_path)
        _check_size(offsets_path, size, offset + math.prod(shape) * dtype.itemsize)
        if len(shape) != 1 or dtype not in (np.int64, np.int32) or not 2 <= shape[0] <= rows + 1:
            raise ValueError(f"{dtype} {shape}, expected int64 (images + 1,)")
        offsets = np.fromfile(offsets_path, dtype, offset=offset).astype(np.int64)
        counts = np.diff(offsets)
        if offsets[0] != 0 or offsets[-1] != rows or counts.min() < 1 or counts.max() > MOST_REGIONS:
            raise ValueError(f"must rise from 0 to {rows} by 1 to {MOST_REGIONS} for each image")
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{offsets_path}: no offsets into {path.name} ({reason(error)}); prepare it again") from None
    return offsets


def _check_size(path: Path, size: int, expected: int) -> None:
    if size != expected:
        raise InputError(
            f"{path}: {'truncated' if size < expected else 'more in it than its header says'}, {size} bytes instead of "
            f"{expected}; copy or download it again"
        )


def _read_header(path: Path) -> tuple[tuple[int, ...], bool, np.dtype, int, int]:
    """Shape, whether in Fortran order, type, where the data starts, and the file's size; raises whatever NumPy does.

    NumPy's own `np.load` would read a header of any length, up to 4 GB, before it refuses it.
    """
    with open(path, "rb") as file:
        head, size = io.BytesIO(file.read(HEADER_BYTES)), os.fstat(file.fileno()).st_size
    version = npy.read_magic(head)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"version {version} of the format, expected 1.0 or 2.0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on odd text in it; what matters is said in the error
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        return *read(head), head.tell(), size


BLOCK_BYTES = 2**26  # read at a time


class ResidentFeatures:
    """All features of a split in float16, one row a region, on a device."""

    def __init__(self, features: FeatureFile, device: torch.device):
        """Read the whole file once. Raises InputError on NaN, on values beyond float16, and where memory is short."""
        self._rows = _allocate(features, device)  # (all regions, img_dim)
        step = max(1, BLOCK_BYTES // (features.img_dim * features.dtype.itemsize))
        for start in with_bar(range(0, len(self._rows), step), "features"):
            rows = np.arange(start, min(start + step, len(self._rows)))
            self._rows[start : start + len(rows)] = torch.from_numpy(features.read_rows(rows, half=True))

    def gather(self, rows: Tensor) -> Tensor:
        """Features (n, img_dim) in float16 of regions (n,), given on the device as `FeatureFile` numbers them."""
        return self._rows.index_select(0, rows)


def _allocate(features: FeatureFile, device: torch.device) -> Tensor:
    """An empty tensor (all regions, img_dim). Raises InputError where memory is short."""
    shape = int(features.starts[-1]), features.img_dim
    needed = 2 * math.prod(shape)  # bytes
    available = _available(device)
    if available is None or needed <= available:
        with suppress(RuntimeError):  # torch.OutOfMemoryError is one
            return torch.empty(shape, dtype=torch.float16, device=device)
    left = "" if available is None else f", of which {available / 1e9:.1f} GB are free"
    raise InputError(
        f"--device_features: the features of {features.path} take {needed / 1e9:.1f} GB of {device}'s memory{left}; "
        "train without it"
    )


def _available(device: torch.device) -> int | None:
    """Free bytes of a device's memory; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with suppress(OSError, StopIteration), open("/proc/meminfo") as lines:
        return 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
    return None
