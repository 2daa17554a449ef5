"""The hinge triplet loss over a batch's scores (VSE++, Faghri et al. 2018), and one whose hardness is ramped."""

import torch
from torch import Tensor


def hinge_triplet_loss(scores: Tensor, margin: float, hardest: bool) -> Tensor:
    """Sum of max(0, margin + score of a negative - score of the true pair) over both directions.

    scores: (B, B), row = image, column = caption, true pairs on the diagonal.
    hardest: only the worst negative of each row and of each column counts; else all of them do.
    Returns a scalar: the sum, not the mean.
    """
    true = scores.diagonal()
    diagonal = torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    if not hardest:
        return violations(scores, true[:, None], true, margin).masked_fill(diagonal, 0).sum()
    of_images = (margin + scores - true[:, None]).clamp(min=0).masked_fill(diagonal, 0)
    of_captions = (margin + scores - true).clamp(min=0).masked_fill(diagonal, 0)
    return of_images.max(dim=1).values.sum() + of_captions.max(dim=0).values.sum()


def ramped_triplet_loss(scores: Tensor, margin: float) -> Tensor:
    """The hinge triplet loss, harder the better the batch is retrieved already; no epoch decides on it.

    In each direction, with recall = the share of queries whose true pair beats all their negatives in the batch, a
    query's loss is  recall x its hardest negative's + (1 - recall) x the mean over its negatives within the margin.
    So an untrained model learns from many negatives, a trained one mostly from the hardest, and one whose scores have
    become equal is at recall 0 and gets the gradients that it started with. docs/training.md has measurements.

    scores: (B, B), row = image, column = caption, true pairs on the diagonal. Returns a scalar: the sum over queries.
    """
    return _ramped_over_rows(scores, margin) + _ramped_over_rows(scores.T, margin)


def _ramped_over_rows(scores: Tensor, margin: float) -> Tensor:
    true = scores.diagonal()[:, None]
    diagonal = torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    recall = (scores.detach().masked_fill(diagonal, float("-inf")) < true).all(dim=1).to(scores.dtype).mean()
    violated = (margin + scores - true).clamp(min=0).masked_fill(diagonal, 0)
    mean = violated.sum(dim=1) / (violated > 0).sum(dim=1).clamp(min=1)
    return (recall * violated.max(dim=1).values + (1 - recall) * mean).sum()


def violations(scores: Tensor, true_of_images: Tensor, true_of_captions: Tensor, margin: float) -> Tensor:
    """The loss of each wrong pair, both directions added.

    scores: (I, C). true_of_images: (I, 1), true_of_captions: (C,), scores of the true pairs. Returns (I, C).
    """
    return (margin + scores - true_of_images).clamp(min=0) + (margin + scores - true_of_captions).clamp(min=0)
