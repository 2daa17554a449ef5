"""The similarities and gates there are, by the names of --similarity and --gate: module and class.

A new one is a file beside this one and a line here; docs/similarities.md shows how. Nothing is imported before it is
asked for, so flags can be read without PyTorch.
"""

from importlib import import_module

SIMILARITIES = {
    "xdim": "lib.model.similarity:Similarity",
    "independent": "lib.model.independent:IndependentSimilarity",
    "gpo": "lib.model.gpo:GpoSimilarity",
}
GATES = {
    "adaptive": "lib.model.gate:DependencyGate",
    "open": "lib.model.gate:OpenGate",
    "fixed": "lib.model.gate:FixedGate",
    "dense": "lib.model.gate:DenseGate",
    "diagonal": "lib.model.gate:DiagonalGate",
}
GATED, OWN_GATE = "xdim", "adaptive"  # the similarity that has a gate, and the paper's
PUBLISHED_GATES = (OWN_GATE, "open", "fixed")  # once trained the published code computes them all alike


def make_similarity(similarity: str, embed_size: int, gate: str):
    """A similarity of random weights, by name; gate: of the one that has a gate."""
    made = _find(SIMILARITIES[similarity])
    return made(embed_size, _find(GATES[gate])(embed_size)) if similarity == GATED else made(embed_size)


def takes_unit_vectors(similarity: str) -> bool:
    """Whether a similarity, by name, takes regions and words that are normalised one by one."""
    return _find(SIMILARITIES[similarity]).unit_vectors


def _find(place: str) -> type:
    module, name = place.split(":")
    return getattr(import_module(module), name)
