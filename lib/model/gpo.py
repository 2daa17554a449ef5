"""GPO, the generalised pooling operator of VSE-infinity (Chen et al., CVPR 2021), as a baseline: one vector a side.

The values of each dimension over an image's regions (a caption's words) are sorted in descending order and summed with
learned weights of the places: a BiGRU over the places' sine and cosine encodings, both directions averaged, a linear
layer to one number, softmax at temperature 0.1. The pooled vectors are normalised; their cosine is the score.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from lib.model.norm import l2_normalize
from lib.model.plain import PlainScorer, PlainSimilarity
from lib.model.regions import pad_regions

ENCODING = 32  # numbers of a place's encoding
HIDDEN = 32  # units of the GRU in each direction
TEMPERATURE = 0.1


class GpoSimilarity(PlainSimilarity):
    """Scores images against captions by the cosine of their pooled vectors.

    Under autocast too in float32: it costs next to nothing, and bfloat16's cosines are a 256th apart.
    """

    unit_vectors = False  # what is pooled is not normalised, the result is

    def __init__(self, embed_size: int):
        super().__init__()
        self.image_pooling, self.caption_pooling = GeneralizedPooling(), GeneralizedPooling()

    def forward(self, regions: Tensor, words: Tensor, lengths: Tensor, real: Tensor | None = None) -> Tensor:
        with torch.autocast(regions.device.type, enabled=False):
            return self.pool_images(regions, real) @ self.pool_captions(words, lengths).T

    def pool_images(self, regions: Tensor, real: Tensor | None) -> Tensor:
        """Unit vectors (I, D)."""
        counts = torch.full((len(regions),), regions.shape[1]) if real is None else real.sum(dim=1).cpu()
        return l2_normalize(self.image_pooling(regions, counts))

    def pool_captions(self, words: Tensor, lengths: Tensor) -> Tensor:
        """Unit vectors (C, D)."""
        return l2_normalize(self.caption_pooling(pad_regions(words, lengths.cpu()), lengths.cpu()))

    def scorer(self, coarse: bool = False) -> "PooledScorer":
        return PooledScorer(self)


class PooledScorer(PlainScorer):
    """Pools captions that are scored against several blocks of images, one after the other, once."""

    words = captions = None  # those of the last call

    @torch.no_grad()
    def all_pairs(self, regions: Tensor, words: Tensor, lengths: Tensor, real: Tensor | None = None) -> Tensor:
        with torch.autocast(regions.device.type, enabled=False):
            if words is not self.words:
                self.words, self.captions = words, self.similarity.pool_captions(words, lengths)
            return self.similarity.pool_images(regions, real) @ self.captions.T


class GeneralizedPooling(nn.Module):
    """Pools sets of vectors by learned weights of the places in each dimension's order."""

    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(ENCODING, HIDDEN, batch_first=True, bidirectional=True)
        self.linear = nn.Linear(HIDDEN, 1, bias=False)  # softmax would not notice a bias

    def forward(self, vectors: Tensor, counts: Tensor) -> Tensor:
        """Pool sets (S, N, D), of which the first `counts` (S,), on the CPU, are there. Returns (S, D)."""
        sizes, which = counts.unique(return_inverse=True)
        weights = self.weights(sizes, vectors)[which.to(vectors.device)]  # (S, N)
        padding = torch.arange(vectors.shape[1]) >= counts[:, None]
        padding = padding.to(vectors.device)[..., None]
        ordered = vectors.masked_fill(padding, float("-inf")).sort(dim=1, descending=True).values
        return (ordered.masked_fill(padding, 0) * weights[..., None]).sum(dim=1)

    def weights(self, sizes: Tensor, like: Tensor) -> Tensor:
        """Weights of places (sizes, N) for sets of some sizes (sizes,), 0 from a set's own size on."""
        places = _encode_places(like.shape[1]).to(like).expand(len(sizes), -1, -1)
        packed = pack_padded_sequence(places, sizes, batch_first=True, enforce_sorted=False)
        states, _ = pad_packed_sequence(self.gru(packed)[0], batch_first=True, total_length=like.shape[1])
        forwards, backwards = states.unflatten(-1, (2, HIDDEN)).unbind(dim=-2)
        scores = self.linear((forwards + backwards) / 2).squeeze(-1) / TEMPERATURE
        padding = torch.arange(like.shape[1]) >= sizes[:, None]
        return scores.masked_fill(padding.to(scores.device), float("-inf")).softmax(dim=-1)


def _encode_places(number: int) -> Tensor:
    """Sine and cosine encodings (number, ENCODING) of places (Vaswani et al. 2017)."""
    rates = torch.exp(torch.arange(0, ENCODING, 2, dtype=torch.float64) * (-math.log(10_000) / ENCODING))
    angles = torch.arange(number)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)
