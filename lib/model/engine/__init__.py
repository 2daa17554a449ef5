"""How scores are computed, apart from what they are. Nobody who changes the model needs to open this package.

An engine is called as `engine(regions, words, lengths, real) -> scores (I, C)`, differentiable, with arguments as
XDimSimilarity.forward takes them, and has `sum_over_negatives` (a loss summed over all wrong pairs) and `scorer`
(scores without gradients). "plain" takes any similarity's own formula; "tiled" computes those with attention over
tiles.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lib.model.engine.autograd import TiledEngine
from lib.model.shard import Shard

ENGINES = ("tiled", "plain")

PairLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


def make_engine(name: str, similarity: Any) -> "TiledEngine | PlainEngine":
    """The engine of a similarity; one without attention has no faster way than its own formula."""
    return TiledEngine(similarity) if name == "tiled" and hasattr(similarity, "attention") else PlainEngine(similarity)


class PlainEngine:
    """Scores by a similarity's own forward(), differentiated by ordinary autograd."""

    def __init__(self, similarity: nn.Module):
        self.similarity = similarity

    def __call__(self, regions: Tensor, words: Tensor, lengths: Tensor, real: Tensor | None = None) -> Tensor:
        """Scores (I, C)."""
        return self.similarity(regions, words, lengths, real)

    def sum_over_negatives(
        self,
        loss: PairLoss,
        regions: Tensor,
        words: Tensor,
        lengths: Tensor,
        real: Tensor | None = None,
        shard: Shard | None = None,
    ) -> Tensor:
        """As TiledEngine's."""
        shard = shard or Shard(len(lengths))
        scores = shard.gather_outputs(self(regions, words, lengths, real), shard.sizes)
        true = scores.diagonal()
        wrong = ~torch.eye(len(scores), dtype=torch.bool, device=scores.device)
        return loss(scores, true[:, None], true).where(wrong, 0).sum()

    def scorer(self, coarse: bool = False) -> "PlainScorer":
        """Scores without gradients; there are no coarser ones."""
        own = getattr(self.similarity, "scorer", None)
        return own() if own else PlainScorer(self.similarity)


class PlainScorer:
    """Scores without gradients, in the precision that autocast had when it was made."""

    def __init__(self, similarity: nn.Module):
        self.similarity = similarity
        kinds = {parameter.device.type for parameter in similarity.parameters()} or {"cpu"}
        self.autocast = {kind: (torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)) for kind in kinds}

    @torch.no_grad()
    def all_pairs(self, regions: Tensor, words: Tensor, lengths: Tensor, real: Tensor | None = None) -> Tensor:
        """Scores (I, C)."""
        kind = regions.device.type
        dtype, enabled = self.autocast.get(kind, (torch.bfloat16, False))
        with torch.autocast(kind, dtype, enabled):
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
