"""The loss of a batch that several processes share, and its gradients."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lib.collectives import divide, gather_parts
from lib.distributed import rank, world_size
from lib.losses import hinge_triplet_loss, ramped_triplet_loss, violations
from lib.model.similarity import Similarity, all_scores
from lib.model.xdim import XDim

ALL, HARDEST, RAMPED = "all negatives", "hardest negatives", "ramped hardness"  # what a batch's loss is taken over


class BatchLoss(nn.Module):
    """The loss of a whole batch, of which each process embeds its own pairs.

    A process then scores its own images against all captions, so that all B x B scores are computed once altogether;
    from these every process computes the same loss.
    """

    def __init__(self, model: XDim, margin: float):
        super().__init__()
        self.model, self.margin = model, margin

    def forward(
        self, features: Tensor, counts: Tensor, ids: Tensor, lengths: Tensor, negatives: str
    ) -> tuple[Tensor, Tensor]:
        """features: (n, img_dim) of the own images' regions, on the device; the others as in data.batches.Batch.

        Returns two scalars, see batch_loss, the same for all processes.
        """
        parts = divide(len(lengths), world_size())
        own = parts[rank()]
        regions, words, _, real = self.model.embed(features, counts[own], ids, lengths[own], int(counts.max()))
        words = gather_parts(words, [int(lengths[part].sum()) for part in parts])
        return batch_loss(self.model.similarity, (regions, words, lengths, real), self.margin, negatives)


def batch_loss(similarity: Similarity, embeddings: tuple, margin: float, negatives: str) -> tuple[Tensor, Tensor]:
    """The loss of a batch, by the way that scores and differentiates least.

    embeddings: what the similarity takes: of the own images, of all captions. negatives: ALL, HARDEST or RAMPED.
    Returns the loss, and the standard deviation of the batch's scores: NaN with ALL, where they are never all there.
    """
    if negatives == ALL:
        loss = similarity.sum_over_negatives(partial(violations, margin=margin), *embeddings)
        return loss, torch.full_like(loss, float("nan"))
    scores = all_scores(similarity(*embeddings))
    ramped = negatives == RAMPED
    loss = ramped_triplet_loss(scores, margin) if ramped else hinge_triplet_loss(scores, margin, hardest=True)
    return loss, scores.detach().std()


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
