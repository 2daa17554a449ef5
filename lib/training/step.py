"""The loss of a batch that several processes share, and its gradients."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lib import collectives
from lib.distributed import world_size
from lib.losses import Loss
from lib.model.engine import PlainEngine, TiledEngine
from lib.model.shard import Shard
from lib.model.xdim import Embedded, XDim


class BatchLoss(nn.Module):
    """The loss of a whole batch, of which each process embeds its own pairs.

    A process then scores its own images against all captions, so that all B x B scores are computed once altogether;
    from these every process computes the same loss.
    """

    def __init__(self, model: XDim, margin: float):
        super().__init__()
        self.model, self.margin = model, margin

    def forward(
        self, features: Tensor, counts: Tensor, ids: Tensor, lengths: Tensor, loss: Loss
    ) -> tuple[Tensor, Tensor]:
        """features: (n, img_dim) of the own images' regions, on the device; the others as in data.batches.Batch.

        Returns two scalars, see batch_loss, the same for all processes.
        """
        shard = collectives.shard(len(lengths))
        embedded = self.model.embed(features, counts, ids, lengths, shard)
        return batch_loss(self.model.engine, embedded, loss, self.margin, shard)


def batch_loss(
    engine: TiledEngine | PlainEngine, embedded: Embedded, loss: Loss, margin: float, shard: Shard | None = None
) -> tuple[Tensor, Tensor]:
    """The loss of a batch, in the way that scores and differentiates least, and the standard deviation of its scores.

    The latter is NaN for a pairwise loss (lib/losses.py), for which the scores are never all held.
    """
    shard = shard or Shard(len(embedded.lengths))
    if pairwise := getattr(loss, "pairwise", None):
        value = engine.sum_over_negatives(partial(pairwise, margin=margin), *embedded, shard=shard)
        return value, torch.full_like(value, float("nan"))
    scores = shard.gather_outputs(engine(*embedded), shard.sizes)
    return loss(scores, margin), scores.detach().std()


def share_loss(loss: BatchLoss) -> nn.Module:
    """The same, with gradients that are the mean over all processes after each backward pass.

    Buckets that PyTorch rebuilt after the first step would be added up in another order than after a resume; with
    find_unused_parameters (there are none) it leaves them as they are, and a resumed run equal to the bit.
    """
    if world_size() == 1:
        return loss
    return DistributedDataParallel(loss, find_unused_parameters=True, gradient_as_bucket_view=True)


def backward(loss: Tensor) -> None:
    """Compute gradients: of the loss in all parameters, on every process."""
    (loss * world_size()).backward()  # each process's part is one of a sum, but share_loss takes the mean
