"""Images have different numbers of regions: packed one image after the other, or padded to the longest."""

import torch
from torch import Tensor


def pad_regions(rows: Tensor, counts: Tensor, longest: int | None = None) -> Tensor:
    """Rows (n, d) of all images, one image after the other, as (images, longest, d), zero beyond an image's count.

    counts: (images,), on the CPU, so that nothing has to wait for a device. longest: at least the largest count, which
    it is if left out.
    """
    longest = longest or int(counts.max())
    if len(rows) == len(counts) * longest:
        return rows.view(len(counts), longest, -1)
    places = (torch.arange(longest) < counts[:, None]).flatten().nonzero().squeeze(1)
    padded = rows.new_zeros(len(counts) * longest, rows.shape[1])
    return padded.index_copy(0, places.to(rows.device, non_blocking=True), rows).view(len(counts), longest, -1)


def real_regions(counts: Tensor, device: torch.device) -> Tensor | None:
    """Which of the padded regions are none of the padding, (images, longest); None where nothing is padded."""
    longest = counts.max()
    if (counts == longest).all():
        return None
    return (torch.arange(longest) < counts[:, None]).to(device, non_blocking=True)
