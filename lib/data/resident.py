"""Features that stay on the compute device, where batches are gathered from them."""

import math
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from lib.data.precomp import FeatureFile
from lib.errors import InputError

BLOCK_BYTES = 2**26  # read at a time


class ResidentFeatures:
    """All features of a split in float16, one row a region, on a device."""

    def __init__(self, features: FeatureFile, device: torch.device):
        """Read the whole file once. Raises InputError on NaN, on values beyond float16, and where memory is short."""
        kept = _allocate(features, device)
        images = max(1, BLOCK_BYTES // (features.regions * features.img_dim * features.dtype.itemsize))
        for start in tqdm(range(0, len(features), images), desc="features", leave=False, disable=None):
            block = slice(start, min(start + images, len(features)))
            kept[block] = torch.from_numpy(_halve(features, np.arange(block.start, block.stop)))
        self._rows = kept.flatten(0, 1)  # (images * R, img_dim)

    def gather(self, places: Tensor) -> Tensor:
        """Features (B, longest, img_dim) in float16 of places (B, longest) on the device, zero where a place is -1."""
        gathered = self._rows.index_select(0, places.clamp(min=0).flatten()).view(*places.shape, -1)
        return gathered.masked_fill_((places < 0)[..., None], 0)


def places_of(images: np.ndarray, order: np.ndarray, regions: int) -> np.ndarray:
    """Where `ResidentFeatures` holds the regions `order` (B, longest) of images (B,); -1 stays -1."""
    return np.where(order < 0, -1, images[:, None] * regions + order)


def _allocate(features: FeatureFile, device: torch.device) -> Tensor:
    """An empty tensor (images, R, img_dim). Raises InputError where memory is short."""
    shape = len(features), features.regions, features.img_dim
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


def _halve(features: FeatureFile, images: np.ndarray) -> np.ndarray:
    """Features (images, R, img_dim) of some images in float16. Raises InputError on NaN and on what is too large."""
    block = features.read(images)
    with np.errstate(over="ignore"):  # said below
        half = block.astype(np.float16)
    if not np.isfinite(half).all():
        row = int(images[~np.isfinite(half).all(axis=(1, 2))][0]) * features.repeats
        raise InputError(
            f"{features.path}: row {row} holds a feature beyond float16's largest number, "
            f"{np.finfo(np.float16).max:.0f}; train without --device_features"
        )
    return half
