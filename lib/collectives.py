"""What the processes of a job compute together: each has a part of a batch or of a split, and sees all of it.

With one process every function here returns what it was given. The loss is the job's: every process computes the same
one from all scores, and differentiates its own part of the way there. The gradients of the processes' parameters are
then parts of one sum. (PyTorch's own differentiable collectives are deprecated or private.)
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from lib.distributed import give_sign_of_life, rank, world_size


def divide(total: int, parts: int) -> list[slice]:
    """Consecutive parts of `total` things, one a process, whose sizes differ by one at most."""
    edges = [total * k // parts for k in range(parts + 1)]
    return [slice(*edges[k : k + 2]) for k in range(parts)]


def gather(rows: Tensor, sizes: Sequence[int]) -> Tensor:
    """The rows of all processes, one after the other; sizes: how many each has. Without gradient."""
    if world_size() == 1:
        return rows
    give_sign_of_life()
    gathered = _buffer(rows, sizes)
    mine = rows.new_zeros(gathered.shape[1:])
    mine[: len(rows)] = rows
    dist.all_gather(list(gathered.unbind()), mine)
    return torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)])


def gather_parts(rows: Tensor, sizes: Sequence[int]) -> Tensor:
    """`gather` of what each process then uses in its own way: the gradient is the sum of all processes' ones."""
    return rows if world_size() == 1 else _GatherParts.apply(rows, sizes)


def gather_results(rows: Tensor, sizes: Sequence[int]) -> Tensor:
    """`gather` of that from which all processes compute the same loss: the gradient needs no exchange."""
    return rows if world_size() == 1 else _GatherResults.apply(rows, sizes)


def add_up(tensor: Tensor) -> Tensor:
    """The sum of all processes' tensors, without gradient; in place."""
    if world_size() > 1:
        give_sign_of_life()
        dist.all_reduce(tensor)
    return tensor


def add_up_parts(tensor: Tensor) -> Tensor:
    """The sum of all processes' tensors, which each then uses in its own way: so is the gradient."""
    return tensor if world_size() == 1 else _AddUpParts.apply(tensor)


def broadcast(tensor: Tensor, owner: int) -> Tensor:
    """What one process, the owner, has in a tensor, without gradient; in place."""
    if world_size() > 1:
        give_sign_of_life()
        dist.broadcast(tensor, owner)
    return tensor


def largest(number: int) -> int:
    """The largest of all processes' numbers."""
    if world_size() == 1:
        return number
    give_sign_of_life()
    numbers = torch.tensor(number)  # on the CPU: Python has to know it
    dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return int(numbers)


class _GatherParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, sizes: Sequence[int]) -> Tensor:
        ctx.sizes = sizes
        return gather(rows, sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        give_sign_of_life()
        parts = _buffer(gradient, ctx.sizes).zero_()
        for part, of_process in zip(parts, gradient.split(list(ctx.sizes)), strict=True):
            part[: len(of_process)] = of_process
        mine = torch.empty_like(parts[0])
        dist.reduce_scatter(mine, list(parts.unbind()))
        return mine[: ctx.sizes[rank()]], None


class _GatherResults(_GatherParts):
    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        return gradient.split(list(ctx.sizes))[rank()], None


class _AddUpParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: Tensor) -> Tensor:
        return add_up(tensor.clone())

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        return add_up(gradient.clone())


def _buffer(rows: Tensor, sizes: Sequence[int]) -> Tensor:
    """Room for the rows of all processes, all padded to the most: (processes, most, ...)."""
    return rows.new_empty(len(sizes), max(sizes), *rows.shape[1:])
