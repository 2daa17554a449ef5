"""How scores are computed, apart from what they are. Whoever changes the formula trains with `--engine plain` first.

An engine is called as `engine(regions, words, lengths, real) -> scores (I, C)`, differentiable, with arguments as
XDimSimilarity.forward takes them, and has `sum_over_negatives` (a loss summed over all wrong pairs) and `scorer`
(scores without gradients).
"""

from typing import Any

from lib.model.engine.autograd import TiledEngine
from lib.model.engine.plain import CombinedEngine, CombinedScorer, Embedded, PlainEngine

__all__ = ["CombinedScorer", "Embedded", "TiledEngine", "make_engine"]


def make_engine(name: str, similarity: Any, global_head: Any = None) -> PlainEngine:
    """The engine of a similarity: tiled where that is asked for and its forward() is the formula that tiles compute.

    global_head: whose cosines are added to the scores.
    """
    kind = type(similarity)
    tiled = name == "tiled" and getattr(kind, "tiled", None) is kind.forward
    engine = TiledEngine(similarity) if tiled else PlainEngine(similarity)
    return CombinedEngine(engine, global_head) if global_head else engine
