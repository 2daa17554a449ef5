"""Collectives over the processes of a job, differentiable where training needs it.

Every process computes the same loss from the scores of the whole batch and differentiates its own part of the way
there; the parameters' gradients of the processes then add up to the single-process gradient. (PyTorch's own
differentiable collectives are deprecated or private.)
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from lib.cli import InputError
from lib.distributed import heartbeat, rank, world_size
from lib.model.layers import Shard


class JobShard(Shard):
    """This process's share of a batch, and what the job's processes compute together."""

    def gather(self, rows: Tensor, sizes: Sequence[int]) -> Tensor:
        heartbeat()
        gathered = _padded(rows, sizes)
        own = rows.new_zeros(gathered.shape[1:])
        own[: len(rows)] = rows
        dist.all_gather(list(gathered.unbind()), own)
        return torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)])

    def gather_inputs(self, rows: Tensor, sizes: Sequence[int]) -> Tensor:
        return _GatherInputs.apply(rows, sizes, self)

    def gather_outputs(self, rows: Tensor, sizes: Sequence[int]) -> Tensor:
        return _GatherOutputs.apply(rows, sizes, self)

    def sum(self, tensor: Tensor) -> Tensor:
        heartbeat()
        dist.all_reduce(tensor)
        return tensor

    def sum_inputs(self, tensor: Tensor) -> Tensor:
        return _SumInputs.apply(tensor, self)


def shard(total: int) -> Shard:
    """This process's shard of a batch of `total` pairs."""
    return Shard(total) if world_size() == 1 else JobShard(total, rank(), world_size())


def largest(number: int) -> int:
    """The largest of all processes' numbers."""
    one_each = shard(world_size())
    return int(one_each.gather(torch.tensor([number]), one_each.sizes).max())


def from_first(value: Any) -> Any:
    """What the first process gives, anything that can be pickled, on all processes."""
    given = [value]
    if world_size() > 1:
        heartbeat()
        dist.broadcast_object_list(given, device=torch.device("cpu"))
    return given[0]


def all_gather(own: Any) -> list:
    """What each process gives, anything that can be pickled, on all processes."""
    gathered = [own] * world_size()
    if world_size() > 1:
        heartbeat()
        dist.all_gather_object(gathered, own)
    return gathered


def refuse_disagreement(own: dict[str, Any]) -> None:
    """Raises InputError on all processes where they differ in what each has found, by name. All call this together."""
    first, *others = all_gather(own)
    for number, other in enumerate(others, 1):
        for name, value in first.items():
            if other[name] != value:
                raise InputError(
                    f"{name}: {value!r} of rank 0 but {other[name]!r} of rank {number}; start all processes with the "
                    "same flags, on the same data, and with a run folder that all of them see"
                )


class _GatherInputs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: Sequence[int], shard: JobShard) -> Tensor:
        ctx.sizes = sizes
        return shard.gather(rows, sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        heartbeat()
        parts = _padded(gradient, ctx.sizes).zero_()
        for part, of_process in zip(parts, gradient.split(list(ctx.sizes)), strict=True):
            part[: len(of_process)] = of_process
        own = torch.empty_like(parts[0])
        dist.reduce_scatter(own, list(parts.unbind()))
        return own[: ctx.sizes[rank()]], None, None


class _GatherOutputs(_GatherInputs):
    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient.split(list(ctx.sizes))[rank()], None, None


class _SumInputs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, shard: JobShard) -> Tensor:
        ctx.shard = shard
        return shard.sum(tensor.clone())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.shard.sum(gradient.clone()), None


def _padded(rows: Tensor, sizes: Sequence[int]) -> Tensor:
    """Uninitialised memory for the rows of all processes, each padded to the longest: (processes, longest, ...)."""
    return rows.new_empty(len(sizes), max(sizes), *rows.shape[1:])
