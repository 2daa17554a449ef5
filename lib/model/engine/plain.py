"""Scores by a similarity's own formula, differentiated by ordinary autograd: `--engine plain`, and any cheap
similarity.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lib.model.layers import Shard, upload

PairLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


class Embedded(NamedTuple):
    """What a similarity takes: own images (I, R, D), words of all captions (sum of W, D), lengths (C,), real (I, R)."""

    regions: Tensor
    words: Tensor
    lengths: Tensor
    real: Tensor | None = None


class PlainEngine:
    """Scores by a similarity's own forward(), differentiated by ordinary autograd."""

    head: Any = None  # of a CombinedEngine

    def __init__(self, similarity: Any):
        self.similarity = similarity

    def __call__(self, regions: Tensor, words: Tensor, lengths: Tensor, real: Tensor | None = None) -> Tensor:
        """Scores (I, C)."""
        return self.similarity(regions, words, lengths, real)

    def sum_over_negatives(
        self, loss: PairLoss, embedded: Embedded, shard: Shard | None = None, image_of: Tensor | None = None
    ) -> Tensor:
        """Sum of a loss over all wrong pairs, where image k belongs to caption k.

        loss: of scores (G, c), the true scores of their images (G, 1) and of their captions (c,); a number for each
        pair (G, c), differentiable. shard: the images are this process's pairs, the captions are all. image_of: (B,)
        numbers, equal where pairs have the same image: its captions are then not wrong. Returns a scalar,
        differentiable, the same on all processes.
        """
        shard = shard or Shard(len(embedded.lengths))
        scores = shard.gather_outputs(self(*embedded), shard.sizes)
        true = scores.diagonal()
        image_of = torch.arange(len(scores), device=scores.device) if image_of is None else image_of
        return loss(scores, true[:, None], true).where(image_of[:, None] != image_of, 0).sum()

    def scorer(self, coarse: bool = False) -> Any:
        """Scores without gradients; there are no coarser ones."""
        own = getattr(self.similarity, "scorer", None)
        return own() if own else PlainScorer(self.similarity)


class CombinedEngine(PlainEngine):
    """The scores of a similarity's engine plus a global head's weight times its cosines.

    Regions (I, R, D + G) and words (sum of W, D + G) hold those of the similarity, not yet normalised, and the head's.
    """

    def __init__(self, engine: PlainEngine, head: Any):
        super().__init__(engine.similarity)
        self.engine, self.head = engine, head

    def both(
        self, regions: Tensor, words: Tensor, lengths: Tensor, real: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Combined scores (I, C) and the head's cosines (I, C)."""
        cosines = self.head(regions, words, lengths, real)
        scores = self.engine(self.head.of_xdim(regions), self.head.of_xdim(words), lengths, real)
        return scores + self.head.weight * cosines, cosines

    def __call__(self, regions: Tensor, words: Tensor, lengths: Tensor, real: Tensor | None = None) -> Tensor:
        """Combined scores (I, C)."""
        return self.both(regions, words, lengths, real)[0]

    def scorer(self, coarse: bool = False) -> Any:
        """coarse: the cosines alone."""
        return self.head.scorer() if coarse else CombinedScorer(self.engine.scorer(), self.head)


class CombinedScorer:
    """The scores of a similarity's scorer plus a global head's, without gradients."""

    def __init__(self, scorer: Any, head: Any):
        """own: the similarity's share, for those who have the cosines."""
        self.own, self.head = UnitScorer(scorer, head), head
        self.cosines, self.weight = head.scorer(), head.weight.detach()

    def captions(self, words: Tensor, lengths: Tensor) -> Any:
        """Captions as `all_pairs` takes them."""
        return self.own.captions(words, lengths), self.cosines.captions(words, lengths)

    def all_pairs(self, regions: Tensor, captions: Any, real: Tensor | None = None) -> Tensor:
        """Scores (I, C)."""
        words, vectors = captions
        return self.own.all_pairs(regions, words, real) + self.weight * self.cosines.all_pairs(regions, vectors, real)

    def pairs(self, *arguments: Any) -> Tensor:
        """Scores (P,) of chosen pairs; arguments as PlainScorer.pairs takes them."""
        return self.own.pairs(*arguments) + self.weight * self.cosines.pairs(*arguments)


class UnitScorer:
    """A similarity's scorer, of regions (I, R, D) or (I, R, D + G) and words that a head's model gives."""

    def __init__(self, scorer: Any, head: Any):
        self.scorer, self.head = scorer, head

    def captions(self, words: Tensor, lengths: Tensor) -> Any:
        """Captions as `all_pairs` takes them."""
        return self.scorer.captions(self.head.of_xdim(words), lengths)

    def all_pairs(self, regions: Tensor, captions: Any, real: Tensor | None = None) -> Tensor:
        """Scores (I, C)."""
        return self.scorer.all_pairs(self.head.of_xdim(regions), captions, real)

    def pairs(self, regions: Tensor, words: Tensor, *others: Any) -> Tensor:
        """Scores (P,) of chosen pairs; arguments as PlainScorer.pairs takes them."""
        return self.scorer.pairs(self.head.of_xdim(regions), self.head.of_xdim(words), *others)


class PlainScorer:
    """Scores without gradients, in the precision that autocast had when it was made."""

    def __init__(self, similarity: Any):
        self.similarity = similarity
        kinds = {parameter.device.type for parameter in similarity.parameters()} or {"cpu"}
        self.autocast = {kind: (torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)) for kind in kinds}

    def captions(self, words: Tensor, lengths: Tensor) -> Any:
        """Captions as `all_pairs` takes them: words (sum of W, D) and lengths (C,)."""
        return words, lengths

    @torch.no_grad()
    def all_pairs(self, regions: Tensor, captions: Any, real: Tensor | None = None) -> Tensor:
        """Scores (I, C) of regions (I, R, D) and `captions`; real: (I, R), False for padding."""
        kind = regions.device.type
        dtype, enabled = self.autocast.get(kind, (torch.bfloat16, False))
        with torch.autocast(kind, dtype, enabled):
            return self.similarity(regions, *captions, real)

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
        scores = self.all_pairs(regions, self.captions(words, lengths), real)
        return scores[upload(images, scores.device), upload(captions, scores.device)]
