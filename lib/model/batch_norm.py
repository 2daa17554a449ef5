"""BatchNorm over a batch that several processes share."""

import torch
from torch import Tensor, nn

from lib.collectives import add_up_parts
from lib.distributed import world_size


class BatchNorm(nn.BatchNorm1d):
    """nn.BatchNorm1d whose statistics in training are those of the rows of all processes.

    PyTorch's SyncBatchNorm does the same on GPUs only; so every job computes what the tests on CPUs have checked.
    """

    def forward(self, rows: Tensor) -> Tensor:
        """Rows (n, D), n may differ between processes. Returns (n, D)."""
        if not self.training or world_size() == 1:
            return super().forward(rows)
        exact = rows.to(torch.promote_types(rows.dtype, torch.float32))
        total, count = add_up_parts(torch.cat([exact.sum(dim=0), exact.new_full((1,), len(exact))])).tensor_split([-1])
        mean = total / count
        centred = exact - mean
        variance = add_up_parts(centred.square().sum(dim=0)) / count
        self._remember(mean.detach(), variance.detach() * count / (count - 1))
        return (centred * (variance + self.eps).rsqrt() * self.weight + self.bias).to(rows.dtype)

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        """Move the running statistics, those of evaluation, towards a batch's."""
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance, self.momentum)
