"""Coarse-to-fine ranking: a cheap score for all pairs, the exact one for the best K of each query.

A query's K best by coarse score are put in the order of their exact scores; what is not among them stays behind, in
coarse order. Ties count against the query, as everywhere.
"""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from lib.evaluation.metrics import RECALL_AT
from lib.evaluation.parts import Part
from lib.evaluation.ranks import Ranks, rank_matrix

FIRST_K = max(RECALL_AT)

ScorePairs = Callable[[Tensor, Tensor], Tensor]  # images (P,), captions (P,) -> exact scores (P,)


class Reranker:
    """Reranks with any K, or with one that is large enough; no exact score is computed twice."""

    def __init__(self, coarse: Tensor, score_pairs: ScorePairs, image_of_caption: np.ndarray, parts: Iterable[Part]):
        """coarse: (I, C). score_pairs: gives exact scores. parts: what is ranked among itself."""
        self.coarse, self.score_pairs, self.parts = coarse, score_pairs, list(parts)
        self.image_of_caption = torch.as_tensor(image_of_caption, device=coarse.device)
        self.coarse_ranks = rank_matrix(coarse, image_of_caption, self.parts)  # raises on NaN
        self.known = torch.empty(0, dtype=torch.long, device=coarse.device)  # pairs, image * C + caption, ascending
        self.exact = torch.empty(0, dtype=coarse.dtype, device=coarse.device)  # their exact scores

    def ranks(self, k: int) -> list[Ranks]:
        """The ranks of each part, with the best k of each query in exact order."""
        return [self._rank_part(part, coarse, k) for part, coarse in zip(self.parts, self.coarse_ranks, strict=True)]

    def ranks_until_they_stay(self) -> tuple[list[Ranks], int]:
        """Double K until no query enters or leaves the first 1, 5 or 10 any more; returns the last K too."""
        k, ranks = FIRST_K, self.ranks(FIRST_K)
        while k < max(self.coarse.shape):
            k, before, ranks = 2 * k, ranks, self.ranks(2 * k)
            if all(np.array_equal(_recalled(a), _recalled(b)) for a, b in zip(before, ranks, strict=True)):
                break
        return ranks, k

    def _rank_part(self, part: Part, coarse_ranks: Ranks, k: int) -> Ranks:
        scores = self.coarse[part.images, part.captions]
        captions = scores.topk(min(k, scores.shape[1]), dim=1).indices + part.captions.start  # (images, k)
        images = scores.topk(min(k, scores.shape[0]), dim=0).indices.T + part.images.start  # (captions, k)
        of_images = torch.arange(part.images.start, part.images.stop, device=scores.device)[:, None]
        of_captions = torch.arange(part.captions.start, part.captions.stop, device=scores.device)[:, None]
        i2t, t2i = self._pair(of_images, captions), self._pair(images, of_captions)
        self._learn(torch.cat([i2t.flatten(), t2i.flatten()]))
        return Ranks(
            self._rank(i2t, self.image_of_caption[captions] == of_images, coarse_ranks.i2t),
            self._rank(t2i, images == self.image_of_caption[of_captions], coarse_ranks.t2i),
        )

    def _pair(self, images: Tensor, captions: Tensor) -> Tensor:
        return images * self.coarse.shape[1] + captions

    def _learn(self, pairs: Tensor) -> None:
        """Score those of the pairs that are not known yet."""
        pairs = pairs.unique()
        pairs = pairs[~torch.isin(pairs, self.known, assume_unique=True)]
        captions = self.coarse.shape[1]
        self.exact = torch.cat([self.exact, self.score_pairs(pairs // captions, pairs % captions).to(self.exact)])
        self.known, order = torch.cat([self.known, pairs]).sort()
        self.exact = self.exact[order]

    def _rank(self, pairs: Tensor, is_true: Tensor, coarse_ranks: np.ndarray) -> np.ndarray:
        """Ranks (queries,) from candidates (queries, k); the coarse rank where no true item is among them."""
        scores = self.exact[torch.searchsorted(self.known, pairs.contiguous())]
        best = scores.masked_fill(~is_true, float("-inf")).amax(dim=1, keepdim=True)
        ranks = ((scores >= best) & ~is_true).sum(dim=1).cpu().numpy()
        return np.where(is_true.any(dim=1).cpu().numpy(), ranks, coarse_ranks)


def _recalled(ranks: Ranks) -> np.ndarray:
    """Which K of R@K each query counts for."""
    return np.searchsorted(RECALL_AT, np.concatenate(ranks), side="right")
