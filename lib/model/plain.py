"""A similarity from one formula: what a subclass computes is differentiated by autograd, all pairs at once.

Enough for a similarity that is cheap, or that is tried out. One that attends with each word to all regions wants the
tiles of similarity.py at full size.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lib.model.similarity import PairLoss, all_scores, sum_over_wrong


class PlainSimilarity(nn.Module):
    """A subclass gives `forward` alone: scores (I, C), differentiable.

    regions: (I, R, D). words: (W, D), the captions' words one after the other. lengths: (C,) words of each caption.
    real: (I, R), false for padding regions; None: all take part.
    """

    unit_vectors = True  # takes regions and words one by one as unit vectors

    def sum_over_negatives(self, loss: PairLoss, *embeddings: Tensor | None) -> Tensor:
        """As similarity.py's."""
        return sum_over_wrong(loss, all_scores(self(*embeddings)))

    def scorer(self, coarse: bool = False) -> "PlainScorer":
        """What scores without gradients; no scores are coarser than others."""
        return PlainScorer(self)

    def figures(self) -> dict[str, float]:
        """For logs."""
        return {}


class PlainScorer:
    """Scores without gradients."""

    def __init__(self, similarity: Callable[..., Tensor]):
        self.similarity = similarity

    @torch.no_grad()
    def all_pairs(self, regions: Tensor, words: Tensor, lengths: Tensor, real: Tensor | None = None) -> Tensor:
        """Scores (I, C)."""
        return self.similarity(regions, words, lengths, real)

    def pairs(
        self,
        regions: Tensor,
        words: Tensor,
        lengths: Tensor,
        images: Tensor,
        captions: Tensor,
        real: Tensor | None = None,
    ) -> Tensor:
        """Scores (P,) of image k and caption k, for indices (P,) of both."""
        return self.all_pairs(regions, words, lengths, real)[images.to(regions.device), captions.to(regions.device)]
