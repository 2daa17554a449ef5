"""The hinge triplet loss over a batch's matrix of scores (VSE++, Faghri et al. 2018)."""

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


def violations(scores: Tensor, true_of_images: Tensor, true_of_captions: Tensor, margin: float) -> Tensor:
    """The loss of each wrong pair, both directions added.

    scores: (I, C). true_of_images: (I, 1), true_of_captions: (C,), scores of the true pairs. Returns (I, C).
    """
    return (margin + scores - true_of_images).clamp(min=0) + (margin + scores - true_of_captions).clamp(min=0)
