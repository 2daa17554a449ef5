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
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lib.model.engine.norms import ContextNorm, FactorNorm, Norm, RowsNorm, differentiable_norm
from lib.model.engine.plain import Embedded, PairLoss, PlainEngine
from lib.model.engine.tiles import CACHE_BYTES, Bags, SharedTile, Tile, pair_tiles, rows_of_tile, shared_tiles
from lib.model.layers import EPSILON, Shard, l2_normalize

# Pairs are differentiated one by one, in float32, where the loss depends on no more than this share of them. A GPU
# multiplies float32 so much more slowly than bfloat16 that all pairs soon take less time (by count, not measured).
FEW_PAIRS = {"cpu": 0.4, "cuda": 0.1}
ONE_IN = 8  # every eighth image is scored coarsely to estimate that share


class TiledEngine(PlainEngine):
    """Scores by attention of words over regions; products in bfloat16 under autocast, the rest in float32.

    similarity: has dependency() (D or None), gram_rows(D), log_temperature; see XDimSimilarity.
    """

    def __call__(self, regions: Tensor, words: Tensor, lengths: Tensor, real: Tensor | None = None) -> Tensor:
        """Scores (I, C) of all pairs, differentiable. Arguments as XDimSimilarity.forward takes them."""
        dtype = product_dtype(regions)
        with torch.autocast(regions.device.type, enabled=False):
            dependency, *parameters = self._parameters(regions)
            norm = self._scoring_norm(dependency, dtype, once=True)
            return _AllPairs.apply(regions, words, *parameters, lengths, real, dtype, norm)

    def sum_over_negatives(
        self, loss: PairLoss, embedded: Embedded, shard: Shard | None = None, image_of: Tensor | None = None
    ) -> Tensor:
        """As PlainEngine's; differentiated while it is computed where tiles are small and most pairs count."""
        regions, words, lengths, real = embedded
        shard, few = shard or Shard(len(lengths)), FEW_PAIRS[regions.device.type]
        if regions.device.type not in CACHE_BYTES or self._share_of_violations(loss, embedded, shard) <= few:
            return super().sum_over_negatives(loss, embedded, shard, image_of)
        dtype = product_dtype(regions)
        with torch.autocast(regions.device.type, enabled=False):
            _, *parameters = self._parameters(regions)
            return _SumOverNegatives.apply(regions, words, *parameters, lengths, real, dtype, loss, shard, image_of)

    @torch.no_grad()
    def scorer(self, coarse: bool = False) -> "Scorer":
        """The gate computed once, for scores without gradients; coarse: with an approximate K, see `coarse_rows`."""
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
        """D, and what scores are differentiated in: delta, K (or its rows, or None), the attention's temperature."""
        dependency, delta = self._gate(regions)  # delta before K: D's gradients are added up in this order
        if dependency is None:
            gram = None
        elif (gram := self.similarity.gram_rows(dependency)) is not None:
            gram = gram[None]  # of three dimensions, which tells them from K
        else:
            gram = dependency.T @ dependency
        return dependency, delta, gram, self.similarity.log_temperature.exp()

    def _scoring_norm(self, dependency: Tensor | None, dtype: torch.dtype, once=False, coarse=False) -> Norm:
        if dependency is None:
            return ContextNorm()
        rows = self.similarity.gram_rows(dependency)
        if rows is None and coarse:
            rows = coarse_rows(dependency)
        return scoring_norm(dependency.detach(), dtype, once) if rows is None else RowsNorm(rows.detach(), dtype)

    @torch.no_grad()
    def _share_of_violations(self, loss: PairLoss, embedded: Embedded, shard: Shard) -> float:
        """The share of pairs whose loss is not zero, estimated from coarse scores of some of the images."""
        regions, words, lengths, real = embedded
        scorer, images = self.scorer(coarse=True), torch.arange(len(regions))
        true = shard.gather(scorer.pairs(regions, words, lengths, images, images + shard.own.start, real), shard.sizes)
        some = slice(None, None, ONE_IN)
        scores = scorer.all_pairs(regions[some], scorer.captions(words, lengths), None if real is None else real[some])
        counts = loss(scores, true[shard.own][some, None], true) != 0
        return (shard.sum(counts.sum()) / shard.sum(counts.new_tensor(counts.numel(), dtype=torch.long))).item()


def coarse_rows(dependency: Tensor) -> Tensor:
    """Rows (2, D) k, w of diag(k) + w w^T, which has the diagonal of K = D^T D and what all dimensions have in common:
    w = K 1 / sqrt(1^T K 1), the Nystroem approximation of K by the vector of ones.
    """
    w = dependency.T @ l2_normalize(dependency.sum(dim=1))
    k = dependency.square().sum(dim=0) - w.square()
    return torch.stack([k.clamp(min=1e-8), w])  # 0 for a dimension that no other depends on


def scoring_norm(dependency: Tensor, dtype: torch.dtype, once: bool = False) -> Norm:
    """||x D^T||, exact, by what is fastest on the device of D (D, D) with products in `dtype`.

    once: for a single batch, where on a GPU the QR decomposition would take longer than the products that it saves.
    """
    triangular = not (once and dependency.is_cuda)
    factor = torch.linalg.qr(dependency.double(), mode="r").R if triangular else dependency
    return _factor_norm(dependency.device, dtype)(factor.to(dtype), triangular)


def _factor_norm(device: torch.device, dtype: torch.dtype) -> type[FactorNorm]:
    """The Triton kernel's, on CUDA where its products are as precise as was asked for."""
    rounded = dtype == torch.bfloat16 or (dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest")
    if device.type != "cuda" or not rounded or find_spec("triton") is None:
        return FactorNorm
    from lib.model.engine.triton_norm import TritonNorm

    return TritonNorm


class Captions(NamedTuple):
    """Captions as a scorer takes them for all pairs."""

    queries: Tensor  # words (sum of W, D) times delta
    weights: Tensor  # words as the norm takes them
    bags: Bags


class Scorer:
    """Scores pairs without gradients; `score` is differentiable where its inputs are."""

    def __init__(self, delta: Tensor, temperature: Tensor, norm: Norm, dtype: torch.dtype):
        """delta: column sums of D (D,). norm: see norms.py. dtype: of the products."""
        self.delta, self.temperature, self.norm, self.dtype = delta, temperature, norm, dtype

    @torch.no_grad()
    def captions(self, words: Tensor, lengths: Tensor) -> Captions:
        """Words (sum of W, D) and lengths (C,), on the CPU, prepared once for any number of images."""
        return Captions(*self.prepare(words), Bags.of_lengths(lengths, words.device))

    @torch.no_grad()
    def all_pairs(self, regions: Tensor, captions: Captions, real: Tensor | None = None) -> Tensor:
        """Scores (I, C). regions: (I, R, D). real: (I, R), False for padding."""
        queries, weights, bags = captions
        scores, regions = regions.new_empty(len(regions), len(bags.lengths)), regions.to(self.dtype)
        rows = rows_of_tile(regions, self.dtype, self.norm.wide(regions))
        for tile in shared_tiles(len(regions), bags, rows):
            some = self.score(tile, regions[tile.images], queries[tile.words], weights[tile.words], real)
            if some.shape == scores.shape:
                return some
            scores[tile.place] = some
        return scores

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
        scores, regions = regions.new_empty(len(images)), regions.to(self.dtype)
        rows = rows_of_tile(regions, self.dtype, self.norm.wide(regions, pairs=True), int(lengths.max()))
        for tile in pair_tiles(images, captions, Bags.of_lengths(lengths, words.device), rows, words.dtype):
            scores[tile.place] = self.score(tile, regions[tile.images], *self.prepare(words[tile.words]), real)
        return scores

    def prepare(self, words: Tensor) -> tuple[Tensor, Tensor]:
        """Words (..., D) as `score` takes them: times delta, for the affinity, and weighted, for the norm."""
        return (words * self.delta).to(self.dtype), self.norm.weigh(words).to(self.dtype)

    def score(self, tile: Tile, regions: Tensor, queries: Tensor, weights: Tensor, real: Tensor | None) -> Tensor:
        """A tile's scores, from its own regions and words (see `prepare`); real: of all images."""
        exact = torch.promote_types(self.dtype, torch.float32)  # of norms, exp and softmax
        affinity = tile.affinity(queries, regions).to(exact)  # Z
        attention = F.leaky_relu(affinity.tanh(), 0.1)
        norms = tile.over_words(attention.square()).clamp(min=1e-30).sqrt()  # sqrt has no finite gradient at 0
        attention = attention * tile.to_words(self.temperature / (norms + EPSILON))
        if real is not None:
            attention = attention.masked_fill(~tile.mask(real), float("-inf"))
        attention = attention.softmax(dim=-1)
        weights = weights.view(-1, *weights.shape[-2:])  # (1 or images, words, D)
        dependent = self.norm(tile.by_image(attention).to(self.dtype), regions, weights)
        return tile.mean((attention * affinity).sum(dim=-1) / tile.by_image(dependent))


class _AllPairs(torch.autograd.Function):
    """Scores of all pairs, of which the backward pass differentiates those that have a gradient, tile by tile."""

    @staticmethod
    def forward(ctx, regions, words, delta, gram, temperature, lengths, real, dtype, norm):
        ctx.save_for_backward(regions, words, delta, gram, temperature, real)
        scorer = Scorer(delta, temperature, norm, dtype)
        captions = scorer.captions(words, lengths)
        ctx.bags, ctx.dtype = captions.bags, dtype
        return scorer.all_pairs(regions, captions, real)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        *inputs, real = ctx.saved_tensors
        chosen = gradient.nonzero()  # the one time in a step that Python waits for the device
        few = len(chosen) <= FEW_PAIRS[gradient.device.type] * gradient.numel()
        with torch.autocast(gradient.device.type, enabled=False):
            dtype = inputs[0].dtype if few else ctx.dtype  # exact products cost little where few pairs remain
            differentiator = _Differentiator(*inputs, ctx.bags, real, dtype)  # type: ignore[call-arg]
            if few:
                images, captions = chosen.unbind(dim=1)
                gradient = gradient[images, captions]
            for tile in differentiator.pair_tiles(images, captions) if few else differentiator.shared_tiles():
                differentiator.add(tile, lambda _, tile=tile: gradient[tile.place])  # type: ignore[misc]
            return *differentiator.gradients(), None, None, None, None


class _SumOverNegatives(torch.autograd.Function):
    """A loss summed over all wrong pairs; its gradients are computed along with it."""

    @staticmethod
    def forward(ctx, regions, words, delta, gram, temperature, lengths, real, dtype, loss, shard, image_of):
        inputs = (regions, words, delta, gram, temperature, Bags.of_lengths(lengths, words.device), real)
        exact = regions.dtype  # of the true pairs, which are few
        images = torch.arange(len(regions))
        true_pairs = (images, images + shard.own.start)
        scorer = Scorer(delta, temperature, differentiable_norm(gram, exact), exact)
        true_scores = shard.gather(scorer.pairs(regions, words, lengths, *true_pairs, real), shard.sizes)
        negatives = _Negatives(loss, true_scores, shard.own.start, image_of)
        wrong, true = _Differentiator(*inputs, dtype), _Differentiator(*inputs, exact)
        for tile in wrong.shared_tiles():
            wrong.add(tile, lambda scores, tile=tile: negatives.add(scores, *tile.place))
        total, of_true = shard.sum(negatives.sum), shard.sum(negatives.of_true)[shard.own]
        for tile in true.pair_tiles(*true_pairs):
            true.add(tile, lambda _, tile=tile: of_true[tile.place])
        both = zip(wrong.gradients(), true.gradients(), strict=True)
        ctx.save_for_backward(*(a if b is None else a + b for a, b in both))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        return *(None if one is None else gradient * one for one in ctx.saved_tensors), *(None,) * 6


class _Negatives:
    """Adds up a loss over wrong pairs, and its gradients in the scores of the true ones."""

    def __init__(self, loss: PairLoss, true: Tensor, first: int, image_of: Tensor | None):
        """true: (B,) scores of image k and caption k. first: of this process's images. image_of: see PlainEngine's."""
        self.loss, self.true, self.first = loss, true, first
        self.image_of = torch.arange(len(true), device=true.device) if image_of is None else image_of
        self.sum, self.of_true = true.new_zeros(()), torch.zeros_like(true)

    def add(self, scores: Tensor, images: slice, captions: slice) -> Tensor:
        """The gradient in scores (G, c) of this process's images and of captions."""
        images = slice(self.first + images.start, self.first + images.stop)
        with torch.enable_grad():
            parts = [part.detach().requires_grad_() for part in (scores, self.true[images, None], self.true[captions])]
            own = self.image_of[images, None] == self.image_of[captions]
            loss = self.loss(*parts).masked_fill(own, 0).sum()
        of_scores, of_images, of_captions = torch.autograd.grad(loss, parts)
        self.sum += loss.detach()
        self.of_true[images].add_(of_images[:, 0])
        self.of_true[captions].add_(of_captions)
        return of_scores


class _Differentiator:
    """Scores tiles and adds up their gradients in regions, words, delta, K and the temperature."""

    def __init__(self, regions, words, delta, gram, temperature, bags: Bags, real: Tensor | None, dtype: torch.dtype):
        self.inputs = regions, words, delta, gram, temperature
        self.regions, self.words, self.others = regions.to(dtype), words, (delta, temperature)
        self.bags, self.real, self.dtype = bags, real, dtype
        self.of_rows: list[Tensor | None] = [None, None]  # regions, words
        self.of_others: list[Tensor] = []  # delta, temperature, leaves of the norm
        self.norm = differentiable_norm(gram, dtype)
        self.wide = self.norm.wide(self.regions)

    def shared_tiles(self) -> Iterable[SharedTile]:
        """Tiles of all pairs."""
        rows = rows_of_tile(self.regions, self.dtype, self.wide)
        return shared_tiles(len(self.regions), self.bags, rows)

    def pair_tiles(self, images: Tensor, captions: Tensor) -> Iterable[Tile]:
        """Tiles of image k and caption k, for indices (P,) of both."""
        rows = rows_of_tile(self.regions, self.dtype, self.wide, int(self.bags.lengths.max()))
        return pair_tiles(images, captions, self.bags, rows, self.words.dtype)

    def add(self, tile: Tile, gradient_of: Callable[[Tensor], Tensor]) -> None:
        """gradient_of: takes the tile's scores, returns the loss's gradient in them."""
        parts = (self.regions[tile.images], self.words[tile.words], *self.others)
        regions, words, delta, temperature = parts = [part.detach().requires_grad_() for part in parts]
        with torch.enable_grad():
            scorer = Scorer(delta, temperature, self.norm, self.dtype)
            scores = scorer.score(tile, regions, *scorer.prepare(words), self.real)
        leaves = [*parts, *self.norm.leaves]
        of_regions, of_words, *others = torch.autograd.grad(scores, leaves, gradient_of(scores.detach()))
        rows: Any = zip(self.of_rows, (tile.images, tile.words), (of_regions, of_words), self.inputs[:2], strict=True)
        self.of_rows = [tile.add(*one) for one in rows]
        self.of_others = [a + b for a, b in zip(self.of_others, others, strict=True)] if self.of_others else others

    def gradients(self) -> tuple[Tensor | None, ...]:
        """Of all tiles added so far, in regions, words, delta, K and temperature."""
        if not self.of_others:  # no pair has a gradient
            return tuple(None if one is None else torch.zeros_like(one) for one in self.inputs)
        of_delta, of_temperature, *of_leaves = self.of_others
        return *self.of_rows, of_delta, self.norm.gradient(of_leaves), of_temperature


def product_dtype(like: Tensor) -> torch.dtype:
    """The type of matrix products: autocast's where it is on, else that of the tensor."""
    kind = like.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else like.dtype
