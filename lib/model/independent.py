"""The baseline that X-Dim argues against: dimensions are aggregated one by one, as if they were independent.

The same attention with delta = 1; a word's score is the sum of its correspondences S = C * T, the cosine of the word
and its context. There is no gate.
"""

import torch
from torch import Tensor

from lib.model.dependent_norm import ContextNorm, Norm
from lib.model.similarity import AttentionSimilarity


class IndependentSimilarity(AttentionSimilarity):
    """Scores images against captions without dependencies between dimensions."""

    def __init__(self, embed_size: int):
        super().__init__()
        self.register_buffer("delta", torch.ones(embed_size), persistent=False)

    def _of_gate(self) -> tuple[None, Tensor]:
        return None, self.delta

    def _gram(self, dependency: None) -> None:
        return None

    def _scoring_norm(self, dependency: None, dtype: torch.dtype, once=False, coarse=False) -> Norm:
        return ContextNorm()
