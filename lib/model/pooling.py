"""One vector an image and one a caption, compared by their cosine: cheap enough for all pairs of millions.

`gpo` is a similarity of its own (--similarity gpo), and the global head beside X-Dim (--global_head gpo).
"""

import math

import torch
from torch import Tensor, nn

from lib.model.engine.plain import PlainScorer
from lib.model.layers import l2_normalize, pad_rows, real_rows, upload

ENCODING = 32  # numbers of a position's encoding
HIDDEN = 32  # units of the GRU in each direction
TEMPERATURE = 0.1


class MeanPooling(nn.Module):
    """The cosine of the mean region and the mean word: what any model has, without being trained for it.

    In float32 under autocast too: it costs next to nothing, and neighbouring bfloat16 cosines are a 256th apart.
    """

    def forward(self, regions: Tensor, words: Tensor, lengths: Tensor, real: Tensor | None = None) -> Tensor:
        """Cosines (I, C); arguments as XDimSimilarity takes them."""
        with torch.autocast(regions.device.type, enabled=False):
            return self.pool_images(regions, real) @ self.pool_captions(words, lengths).T

    def pool_images(self, regions: Tensor, real: Tensor | None = None) -> Tensor:
        """Unit vectors (I, D) of regions (I, R, D); real: (I, R), False for padding, which may hold anything."""
        if real is not None:
            regions = regions.where(real[..., None], 0)  # a sum serves for a mean, as it is normalised
        return l2_normalize(regions.sum(dim=1))

    def pool_captions(self, words: Tensor, lengths: Tensor) -> Tensor:
        """Unit vectors (C, D) of words (sum of W, D); lengths: (C,), on the CPU."""
        return l2_normalize(torch.segment_reduce(words, "sum", lengths=upload(lengths, words.device)))

    def scorer(self) -> "PooledScorer":
        """Scores without gradients."""
        return PooledScorer(self)

    def figures(self) -> dict[str, float]:
        """Nothing to log."""
        return {}


class GpoSimilarity(MeanPooling):
    """The cosine of vectors that are pooled by learned weights (GPO of VSE-infinity, Chen et al., CVPR 2021)."""

    unit_vectors = False  # regions and words are pooled as they are; the pooled vectors are normalised

    def __init__(self, embed_size: int):
        super().__init__()
        self.image_pooling, self.caption_pooling = GeneralizedPooling(), GeneralizedPooling()

    def pool_images(self, regions: Tensor, real: Tensor | None = None) -> Tensor:
        return l2_normalize(self.image_pooling(regions, real))

    def pool_captions(self, words: Tensor, lengths: Tensor) -> Tensor:
        return l2_normalize(self.caption_pooling(pad_rows(words, lengths), real_rows(lengths, words.device)))


class GpoHead(GpoSimilarity):
    """The global head: a pair's score is X-Dim's plus a learned weight times the cosine of the pooled vectors.

    The encoders' outputs are wider for it, D + G: X-Dim takes the first D numbers of a region or word, normalised, and
    the head pools the others as they are. (Pooled from the same D, both are worse: docs/log.md.)

    dims: G; 0: as X-Dim's. weight: at the start. loss: share of the loss of the cosines alone. distill: share of what
    they are taught of the combined scores' ranking (losses.rank_distillation), at this temperature.
    """

    def __init__(
        self,
        embed_size: int,
        dims: int = 0,
        weight: float = 1.0,
        loss: float = 1.0,
        distill: float = 0.1,
        temperature: float = 0.1,
    ):
        super().__init__(embed_size)
        if min(weight, temperature) <= 0 or min(dims, loss, distill) < 0:
            raise ValueError(
                "--global_head gpo: weight and temperature must be above 0, dims, loss and distill at least 0"
            )
        self.shared, self.dims = embed_size, dims or embed_size
        self.width = self.shared + self.dims
        self.log_weight = nn.Parameter(torch.tensor(math.log(weight)))
        self.loss, self.distill, self.temperature = loss, distill, temperature

    def of_xdim(self, rows: Tensor) -> Tensor:
        """X-Dim's unit vectors (..., D) of regions or words (..., D + G)."""
        return l2_normalize(rows[..., : self.shared])

    def pool_images(self, regions: Tensor, real: Tensor | None = None) -> Tensor:
        """Unit vectors (I, G) of regions (I, R, D + G)."""
        return super().pool_images(regions[..., self.shared :], real)

    def pool_captions(self, words: Tensor, lengths: Tensor) -> Tensor:
        """Unit vectors (C, G) of words (sum of W, D + G)."""
        return super().pool_captions(words[..., self.shared :], lengths)

    @property
    def weight(self) -> Tensor:
        """What cosines are multiplied by in a score."""
        return self.log_weight.exp()

    def figures(self) -> dict[str, float]:
        """What the log says of it."""
        return {"global_weight": self.weight.item()}


class PooledScorer(PlainScorer):
    """Pools captions once for all images that they are scored against."""

    similarity: MeanPooling

    @torch.no_grad()
    def captions(self, words: Tensor, lengths: Tensor) -> Tensor:
        """The captions' unit vectors (C, D)."""
        with torch.autocast(words.device.type, enabled=False):
            return self.similarity.pool_captions(words, lengths)

    @torch.no_grad()
    def all_pairs(self, regions: Tensor, captions: Tensor, real: Tensor | None = None) -> Tensor:
        """Scores (I, C)."""
        with torch.autocast(regions.device.type, enabled=False):
            return self.similarity.pool_images(regions, real) @ captions.T


class GeneralizedPooling(nn.Module):
    """Pools sets of vectors, each dimension's values sorted in descending order, by learned weights of the positions.

    Weights: a BiGRU over the positions' sine and cosine encodings, both directions averaged, a linear layer to one
    number, softmax at temperature 0.1.
    """

    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(ENCODING, HIDDEN, batch_first=True, bidirectional=True)
        self.linear = nn.Linear(HIDDEN, 1, bias=False)  # softmax would cancel a bias

    def forward(self, vectors: Tensor, real: Tensor | None = None) -> Tensor:
        """Pool sets (S, N, D), of which real (S, N) is True for the first ones; None: for all. Returns (S, D)."""
        weights = self.weights(vectors)
        if real is None:
            return (vectors.sort(dim=1, descending=True).values * weights[-1, :, None]).sum(dim=1)
        ordered = vectors.masked_fill(~real[..., None], -math.inf).sort(dim=1, descending=True).values
        return (ordered.masked_fill(~real[..., None], 0) * weights[real.sum(dim=1) - 1, :, None]).sum(dim=1)

    def weights(self, like: Tensor) -> Tensor:
        """Weights (N, N) of the positions in sets of 1 to N vectors, a row for each size, 0 beyond it. like: (S, N, D).

        Of all sizes, so that the device need not be asked for any. Backwards the GRU begins a set at its last position,
        where a row of the input ends; forwards all sets begin alike.
        """
        size = like.shape[1]
        order = (torch.arange(1, size + 1)[:, None] + torch.arange(size)) % size  # (N, N), row 1: 2, ..., N - 1, 0, 1
        places = upload(order.argsort(dim=1), like.device)  # where each position stands in a row
        states = self.gru(upload(_encode_positions(size)[order].to(like.dtype), like.device))[0]
        forwards, backwards = self.linear(states.unflatten(-1, (2, HIDDEN))).squeeze(-1).unbind(dim=-1)
        scores = (forwards[-1] + backwards.gather(1, places)) / (2 * TEMPERATURE)
        return scores.masked_fill(torch.ones_like(places, dtype=torch.bool).triu(1), -math.inf).softmax(dim=1)


def _encode_positions(number: int) -> Tensor:
    """Sine and cosine encodings (number, ENCODING) of positions (Vaswani et al. 2017)."""
    rates = torch.exp(torch.arange(0, ENCODING, 2, dtype=torch.float64) * (-math.log(10_000) / ENCODING))
    angles = torch.arange(number)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)
