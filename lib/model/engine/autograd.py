"""X-Dim's scores and their gradients, tile by tile (paper, section 3.3; the plain formula: lib/model/xdim.py).

With K = D^T D and x = (A V) * t, the unnormalised correspondence of a word t, two identities save work without changing
a score. The sum of a row of x D^T is sum_r A_r Z_r, which the attention already has; and the norm of the context A V
cancels between numerator and denominator up to the 1e-8 that guards each division:

    word score = sum_r A_r Z_r / (||x D^T|| + 1e-8 (||A V|| + 1e-8))

What remains is ||x D^T||, about D^2 / 2 multiply-adds for a word and an image (norms.py). The backward pass of scores
differentiates only the pairs on which the loss turns out to depend, scoring them once more; a sum over all negatives
that depends on most pairs is differentiated while it is computed.
"""

from collections.abc import Callable, Iterable
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lib.model.engine.norms import ContextNorm, DiagonalNorm, FactorNorm, Norm, differentiable_norm
from lib.model.engine.plain import Embedded, PairLoss, PlainEngine
from lib.model.engine.tiles import Tile, all_tiles, pair_tiles, rows_of_tile
from lib.model.layers import EPSILON, Shard

# Pairs are differentiated one by one where the loss depends on no more than this share of them.
FEW_PAIRS = 0.4
ONE_IN = 8  # every eighth image is scored coarsely to estimate that share


class TiledEngine(PlainEngine):
    """Scores by attention of words over regions; products in bfloat16 under autocast, the rest in float32.

    similarity: has dependency() (D or None), diagonal, log_temperature; see XDimSimilarity.
    """

    def __call__(self, regions: Tensor, words: Tensor, lengths: Tensor, real: Tensor | None = None) -> Tensor:
        """Scores (I, C) of all pairs, differentiable. Arguments as XDimSimilarity.forward takes them."""
        dtype = product_dtype(regions)
        with torch.autocast(regions.device.type, enabled=False):
            dependency, *parameters = self._parameters(regions)
            norm = self._scoring_norm(dependency, dtype, once=True)
            return _AllPairs.apply(regions, words, *parameters, lengths, real, dtype, norm)

    def sum_over_negatives(self, loss: PairLoss, embedded: Embedded, shard: Shard | None = None) -> Tensor:
        """As PlainEngine's; differentiated while it is computed where most pairs count."""
        regions, words, lengths, real = embedded
        shard = shard or Shard(len(lengths))
        if self._share_of_violations(loss, embedded, shard) <= FEW_PAIRS:
            return super().sum_over_negatives(loss, embedded, shard)
        dtype = product_dtype(regions)
        with torch.autocast(regions.device.type, enabled=False):
            _, *parameters = self._parameters(regions)
            return _SumOverNegatives.apply(regions, words, *parameters, lengths, real, dtype, loss, shard)

    @torch.no_grad()
    def scorer(self, coarse: bool = False) -> "Scorer":
        """The gate computed once, for scores without gradients; coarse: with K = D^T D replaced by its diagonal."""
        log_temperature = self.similarity.log_temperature
        dtype = product_dtype(log_temperature)
        with torch.autocast(log_temperature.device.type, enabled=False):
            dependency, delta = self._gate(log_temperature)
            norm = self._scoring_norm(dependency, dtype, coarse=coarse)
            return Scorer(delta, log_temperature.exp(), norm, dtype)

    def _gate(self, like: Tensor) -> tuple[Tensor | None, Tensor]:
        """The dependency matrix D and delta, its column sums (D,)."""
        dependency = self.similarity.dependency()
        return dependency, like.new_ones(like.shape[-1:] or 1) if dependency is None else dependency.sum(dim=0)

    def _parameters(self, regions: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor]:
        """D, and what scores are differentiated in: delta, K (or its diagonal, or None), the attention's
        temperature.
        """
        dependency, delta = self._gate(regions)  # delta before K: D's gradients are added up in this order
        if dependency is None:
            gram = None
        else:
            gram = dependency.square().sum(dim=0) if self.similarity.diagonal else dependency.T @ dependency
        return dependency, delta, gram, self.similarity.log_temperature.exp()

    def _scoring_norm(self, dependency: Tensor | None, dtype: torch.dtype, once=False, coarse=False) -> Norm:
        if dependency is None:
            return ContextNorm()
        if coarse or self.similarity.diagonal:
            return DiagonalNorm(dependency.detach())
        return scoring_norm(dependency.detach(), dtype, once)

    @torch.no_grad()
    def _share_of_violations(self, loss: PairLoss, embedded: Embedded, shard: Shard) -> float:
        """The share of pairs whose loss is not zero, estimated from coarse scores of some of the images."""
        regions, words, lengths, real = embedded
        scorer, images = self.scorer(coarse=True), torch.arange(len(regions))
        true = shard.gather(scorer.pairs(regions, words, lengths, images, images + shard.own.start, real), shard.sizes)
        some = slice(None, None, ONE_IN)
        scores = scorer.all_pairs(regions[some], words, lengths, None if real is None else real[some])
        counts = loss(scores, true[shard.own][some, None], true) != 0
        return (shard.sum(counts.sum()) / shard.sum(counts.new_tensor(counts.numel(), dtype=torch.long))).item()


def scoring_norm(dependency: Tensor, dtype: torch.dtype, once: bool = False) -> Norm:
    """||x D^T||, exact, by what is fastest on the device of D (D, D) with products in `dtype`.

    once: for a single batch, where on a GPU the QR decomposition would take longer than the products that it saves.
    """
    triangular = not (once and dependency.is_cuda)
    factor = torch.linalg.qr(dependency.double(), mode="r").R if triangular else dependency
    fused = _triton_norm(dependency.device, dtype)
    return (fused or FactorNorm)(factor.to(dtype), triangular)


def _triton_norm(device: torch.device, dtype: torch.dtype) -> Callable[..., Norm] | None:
    """The Triton kernel, where its products are as precise as was asked for and it runs."""
    rounded = dtype == torch.bfloat16 or (dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest")
    if device.type != "cuda" or not rounded or find_spec("triton") is None:
        return None
    from lib.model.engine.triton_norm import TritonNorm, works

    return TritonNorm if works(device, dtype) else None


class Scorer:
    """Scores pairs without gradients; `tile` is differentiable where its inputs are."""

    def __init__(self, delta: Tensor, temperature: Tensor, norm: Norm, dtype):
        """delta: column sums of D (D,). norm: see norms.py. dtype: of the products."""
        self.delta, self.temperature, self.norm, self.dtype = delta, temperature, norm, dtype

    @torch.no_grad()
    def all_pairs(self, regions: Tensor, words: Tensor, lengths: Tensor, real: Tensor | None = None) -> Tensor:
        """Scores (I, C); arguments as XDimSimilarity.forward takes them."""
        tiles = all_tiles(len(regions), lengths.cpu(), self.rows(regions), regions.device)
        return self._fill(regions.new_empty(len(regions), len(lengths)), tiles, regions, words, real)

    @torch.no_grad()
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
        tiles = pair_tiles(images.cpu(), captions.cpu(), lengths.cpu(), self.rows(regions), regions.device)
        return self._fill(regions.new_empty(len(images)), tiles, regions, words, real)

    def _fill(self, scores: Tensor, tiles: Iterable[Tile], regions: Tensor, words: Tensor, real: Tensor | None):
        regions = regions.to(self.dtype)
        indices: Tensor | None = None
        for tile in tiles:
            if tile.words is not indices:  # tiles that share captions come one after the other
                indices = tile.words
                queries, weights = self.prepare(words[indices])
            mask = None if real is None else real[tile.images]
            scores.view(-1)[tile.places] = self.tile(regions[tile.images], queries, weights, mask)
        return scores

    def rows(self, regions: Tensor) -> int:
        """(word, image) pairs of a tile."""
        return rows_of_tile(regions.device, self.dtype, regions.shape[-1])

    def prepare(self, words: Tensor) -> tuple[Tensor, Tensor]:
        """Words (1 or G, c, n, D) as `tile` takes them: times delta, for the affinity, and weighted, for the norm."""
        return (words * self.delta).to(self.dtype), self.norm.weigh(words).to(self.dtype)

    def tile(self, regions: Tensor, queries: Tensor, weights: Tensor, real: Tensor | None = None) -> Tensor:
        """Scores (G, c) of regions (G, R, D) and captions of n words, shared by all images (1) or each its own (G).

        queries, weights: (1 or G, c, n, D), see `prepare`. real: (G, R).
        """
        exact = torch.promote_types(self.dtype, torch.float32)  # of norms, exp and softmax
        shape = (len(regions), *queries.shape[1:3])  # (G, c, n)
        queries, weights = queries.flatten(1, 2), weights.flatten(1, 2)  # (1|G, W, D)

        if len(queries) == 1:  # one product for all images
            affinity = (queries[0] @ regions.flatten(0, 1).T).unflatten(1, regions.shape[:2]).transpose(0, 1)
        else:
            affinity = torch.bmm(queries, regions.mT)
        affinity = affinity.to(exact).unflatten(1, shape[1:])  # Z (G, c, n, R)
        attention = F.leaky_relu(affinity.tanh(), 0.1)
        squares = attention.square().sum(dim=2, keepdim=True)
        norms = squares.clamp(min=1e-30).sqrt()  # the clamp keeps the gradient of a masked region's zeros finite
        attention = attention * (self.temperature / (norms + EPSILON))
        if real is not None:
            attention = attention.masked_fill(~real[:, None, None], float("-inf"))
        attention = attention.softmax(dim=-1)

        dependent = self.norm(attention.flatten(1, 2).to(self.dtype), regions, weights).view(shape)
        return ((attention * affinity).sum(dim=-1) / dependent).mean(dim=-1)


class _AllPairs(torch.autograd.Function):
    """Scores of all pairs, of which the backward pass differentiates those that have a gradient, tile by tile."""

    @staticmethod
    def forward(ctx, regions, words, delta, gram, temperature, lengths, real, dtype, norm):
        ctx.save_for_backward(regions, words, delta, gram, temperature, lengths, real)
        ctx.dtype = dtype
        return Scorer(delta, temperature, norm, dtype).all_pairs(regions, words, lengths, real)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        *inputs, lengths, real = ctx.saved_tensors
        with torch.autocast(gradient.device.type, enabled=False):
            tiles, gradient, dtype = _tiles_with_gradient(gradient, inputs[0], lengths.cpu(), ctx.dtype)
            differentiator = _Differentiator(*inputs, real, dtype)  # type: ignore[call-arg]
            for tile in tiles:
                differentiator.add(tile, lambda _, tile=tile: gradient[tile.places])  # type: ignore[misc]
            return *differentiator.gradients(), None, None, None, None


class _SumOverNegatives(torch.autograd.Function):
    """A loss summed over all wrong pairs; its gradients are computed along with it."""

    @staticmethod
    def forward(ctx, regions, words, delta, gram, temperature, lengths, real, dtype, loss, shard):
        inputs = (regions, words, delta, gram, temperature, real)
        exact = regions.dtype  # of the true pairs, which are few
        lengths, images = lengths.cpu(), torch.arange(len(regions))
        true_pairs = (images, images + shard.own.start)
        scorer = Scorer(delta, temperature, differentiable_norm(gram, exact), exact)
        true_scores = shard.gather(scorer.pairs(regions, words, lengths, *true_pairs, real), shard.sizes)
        negatives = _Negatives(loss, true_scores, shard.own.start)
        wrong, true = _Differentiator(*inputs, dtype), _Differentiator(*inputs, exact)
        rows = rows_of_tile(regions.device, dtype, regions.shape[-1])
        for tile in all_tiles(len(regions), lengths, rows, regions.device):
            wrong.add(tile, lambda scores, tile=tile: negatives.add(scores, tile.places))
        total, of_true = shard.sum(negatives.sum), shard.sum(negatives.of_true)[shard.own]
        for tile in pair_tiles(*true_pairs, lengths, scorer.rows(regions), regions.device):
            true.add(tile, lambda _, tile=tile: of_true[tile.places])
        both = zip(wrong.gradients(), true.gradients(), strict=True)
        ctx.save_for_backward(*(None if a is None else a + b for a, b in both))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        return *(None if one is None else gradient * one for one in ctx.saved_tensors), None, None, None, None, None


class _Negatives:
    """Adds up a loss over wrong pairs, and its gradients in the scores of the true ones."""

    def __init__(self, loss: PairLoss, true: Tensor, first: int):
        """true: (B,) scores of image k and caption k. first: this process's first image among all."""
        self.loss, self.true, self.first = loss, true, first
        self.sum, self.of_true = true.new_zeros(()), torch.zeros_like(true)

    def add(self, scores: Tensor, places: Tensor) -> Tensor:
        """The gradient in scores (G, c) of pairs, given as places in the flattened matrix of this process's scores."""
        images, captions = self.first + places[:, 0] // len(self.true), places[0] % len(self.true)
        with torch.enable_grad():
            parts = [part.detach().requires_grad_() for part in (scores, self.true[images, None], self.true[captions])]
            loss = self.loss(*parts).masked_fill(images[:, None] == captions, 0).sum()
        of_scores, of_images, of_captions = torch.autograd.grad(loss, parts)
        self.sum += loss.detach()
        self.of_true.index_add_(0, images, of_images[:, 0]).index_add_(0, captions, of_captions)
        return of_scores


def _tiles_with_gradient(
    gradient: Tensor, regions: Tensor, lengths: Tensor, dtype: torch.dtype
) -> tuple[Iterable[Tile], Tensor, torch.dtype]:
    """Tiles of the pairs to differentiate, the scores' gradients that their places mean, the type of the products."""
    images, captions = gradient.nonzero().cpu().unbind(dim=1)
    if len(images) > FEW_PAIRS * gradient.numel():
        rows = rows_of_tile(regions.device, dtype, regions.shape[-1])
        return all_tiles(len(regions), lengths, rows, regions.device), gradient.flatten(), dtype
    dtype = regions.dtype  # exact products cost little where few pairs remain
    rows = rows_of_tile(regions.device, dtype, regions.shape[-1])
    chosen = gradient[gradient != 0]  # in the same order
    return pair_tiles(images, captions, lengths, rows, regions.device), chosen, dtype


class _Differentiator:
    """Scores tiles and adds up their gradients in regions, words, delta, K and the temperature."""

    def __init__(self, regions, words, delta, gram, temperature, real: Tensor | None, dtype: torch.dtype):
        self.inputs, self.real, self.dtype = (regions.to(dtype), words, delta, temperature), real, dtype
        self.totals = [torch.zeros_like(tensor) for tensor in (regions, words, delta, temperature)]
        self.norm = differentiable_norm(gram, dtype)

    def add(self, tile: Tile, gradient_of: Callable[[Tensor], Tensor]) -> None:
        """gradient_of: takes the tile's scores (G, c), returns the loss's gradient in them."""
        mask = None if self.real is None else self.real[tile.images]
        parts = (self.inputs[0][tile.images], self.inputs[1][tile.words], *self.inputs[2:])
        regions, words, delta, temperature = parts = [part.detach().requires_grad_() for part in parts]
        with torch.enable_grad():
            scorer = Scorer(delta, temperature, self.norm, self.dtype)
            scores = scorer.tile(regions, *scorer.prepare(words), mask)
        leaves = [*parts, *self.norm.leaves]
        of_regions, of_words, *others = torch.autograd.grad(scores, leaves, gradient_of(scores.detach()))
        if isinstance(tile.images, slice):
            self.totals[0][tile.images] += of_regions
        else:
            self.totals[0].index_add_(0, tile.images, of_regions)
        self.totals[1].index_add_(0, tile.words.flatten(), of_words.flatten(0, 2))
        for total, other in zip([*self.totals[2:], *self.norm.totals], others, strict=True):
            total += other

    def gradients(self) -> tuple[Tensor | None, ...]:
        """Of all tiles added so far, in regions, words, delta, K and temperature."""
        *before, of_temperature = self.totals
        return *before, self.norm.gradient(), of_temperature


def product_dtype(like: Tensor) -> torch.dtype:
    """The type of matrix products: autocast's where it is on, else that of the tensor."""
    kind = like.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else like.dtype
