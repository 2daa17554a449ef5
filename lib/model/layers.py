"""Small pieces that the parts of the model share: normalisation, padding, and what they ask of other processes."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

EPSILON = 1e-8


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in float32, or in float64 where it is: what autocast rounds to bfloat16 must not be added up in it."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def l2_normalize(vectors: Tensor) -> Tensor:
    """x / (||x|| + 1e-8) over the last dimension, in float32 at least: the one normalisation of X-Dim."""
    vectors = at_least_float32(vectors)
    return vectors / (vectors.norm(dim=-1, keepdim=True) + EPSILON)


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device. From the CPU to CUDA it is copied from pinned memory, so that Python does not wait."""
    pinned = tensor.pin_memory() if device.type == "cuda" and tensor.device.type == "cpu" else tensor
    return pinned.to(device, non_blocking=True)


def pad_rows(rows: Tensor, counts: Tensor, longest: int | None = None) -> Tensor:
    """Packed rows (sum of counts, D) as (items, longest, D), zero beyond each item's count.

    counts: (items,), on the CPU, so that nothing waits for the device. longest: at least the largest count, the
    default.
    """
    longest = longest or int(counts.max())
    if len(rows) == len(counts) * longest:
        return rows.view(len(counts), longest, -1)
    places = (torch.arange(longest) < counts[:, None]).flatten().nonzero().squeeze(1)
    padded = rows.new_zeros(len(counts) * longest, rows.shape[1])
    return padded.index_copy(0, upload(places, rows.device), rows).view(len(counts), longest, -1)


def real_rows(counts: Tensor, device: torch.device) -> Tensor | None:
    """Mask (items, longest) that is False for padding; None where nothing is padded. counts: (items,), on the CPU."""
    longest = int(counts.max())
    if (counts == longest).all():
        return None
    return upload(torch.arange(longest) < counts[:, None], device)


class Shard:
    """One process: it has all pairs of the batch, and every method returns what it was given.

    total: pairs of the batch (B). sizes: pairs of each process, which differ by one at most. own: this process's pairs
    among all of them.
    """

    def __init__(self, total: int, rank: int = 0, processes: int = 1):
        edges = [total * k // processes for k in range(processes + 1)]
        self.total, self.own = total, slice(edges[rank], edges[rank + 1])
        self.sizes = [stop - start for start, stop in pairwise(edges)]

    def gather(self, rows: Tensor, sizes: Sequence[int]) -> Tensor:
        """All-gather along the first axis, without gradient. sizes: rows of each process, which may differ."""
        return rows

    def gather_inputs(self, rows: Tensor, sizes: Sequence[int]) -> Tensor:
        """All-gather of what each process then uses in its own way. Backward: reduce-scatter of the gradients."""
        return rows

    def gather_outputs(self, rows: Tensor, sizes: Sequence[int]) -> Tensor:
        """All-gather of what all processes compute the same loss from. Backward: the own slice of the gradient."""
        return rows

    def sum(self, tensor: Tensor) -> Tensor:
        """All-reduce (sum), without gradient, in place."""
        return tensor

    def sum_inputs(self, tensor: Tensor) -> Tensor:
        """All-reduce (sum) of what each process then uses in its own way. Backward: all-reduce of the gradients."""
        return tensor


class BatchNorm(nn.BatchNorm1d):
    """nn.BatchNorm1d with statistics over the rows of all processes. (PyTorch's SyncBatchNorm works on GPUs only.)"""

    def forward(self, rows: Tensor, shard: Shard | None = None) -> Tensor:
        """rows: (n, D), n may differ between processes. Returns (n, D)."""
        if not self.training or shard is None or len(shard.sizes) == 1:
            return super().forward(rows)
        return _normalize(self, rows, shard)


class BatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d with statistics over the maps of all processes. shard: to be set before each forward pass."""

    shard: Shard | None = None

    def forward(self, maps: Tensor) -> Tensor:
        """maps: (n, D, h, w), n may differ between processes."""
        if not self.training or self.shard is None or len(self.shard.sizes) == 1:
            return super().forward(maps)
        last = maps.movedim(1, -1)
        return _normalize(self, last.flatten(0, -2), self.shard).view(last.shape).movedim(-1, 1)


def _normalize(norm: Any, rows: Tensor, shard: Shard) -> Tensor:
    """BatchNorm in training mode: rows (n, D) of this process by the statistics of all processes' rows."""
    exact = at_least_float32(rows)
    sums = torch.cat([exact.sum(dim=0), exact.new_full((1,), len(exact))])
    total, count = shard.sum_inputs(sums).tensor_split([-1])
    mean = total / count
    centred = exact - mean
    variance = shard.sum_inputs(centred.square().sum(dim=0)) / count
    with torch.no_grad():
        norm.num_batches_tracked += 1
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(variance * count / (count - 1), norm.momentum)
    return (centred * (variance + norm.eps).rsqrt() * norm.weight + norm.bias).to(rows.dtype)
