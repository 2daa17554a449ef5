"""How scores are computed, apart from what they are. Nobody who changes the model needs to open this package.

An engine is called as `engine(regions, words, lengths, real) -> scores (I, C)`, differentiable, with arguments as
XDimSimilarity.forward takes them, and has `sum_over_negatives` (a loss summed over all wrong pairs) and `scorer`
(scores without gradients).
"""

from typing import Any

from lib.model.engine.autograd import TiledEngine
from lib.model.engine.plain import Embedded, PlainEngine, PlainScorer

ENGINES = ("tiled", "plain")
__all__ = ["ENGINES", "Embedded", "PlainEngine", "PlainScorer", "TiledEngine", "make_engine"]


def make_engine(name: str, similarity: Any) -> PlainEngine:
    """The engine of a similarity; one without attention has no faster way than its own formula."""
    return (TiledEngine if name == "tiled" and hasattr(similarity, "attention") else PlainEngine)(similarity)
