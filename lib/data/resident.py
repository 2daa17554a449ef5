"""Features that stay on the compute device, where batches are gathered from them."""

import math
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor

from lib.bar import with_bar
from lib.data.features import FeatureFile
from lib.errors import InputError

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
