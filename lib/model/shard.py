"""Which pairs of a batch this process holds, and how it sees those of the other processes.

The model asks a `Shard` for everything that concerns other processes, so it knows nothing of torch.distributed. The
base class is that of a single process. `lib.collectives.JobShard` does the same over the processes of a job.
"""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor


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
