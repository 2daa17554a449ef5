"""X-Dim's similarity of images and captions (paper, section 3.3), computed over tiles of images x words.

For a caption's words T and an image's regions V, with the gate's dependency matrix D and delta = column sums of D:

    Z = T diag(delta) V^T;  A = leaky_relu(tanh(Z), 0.1), normalised over the caption's words for each region
    A = softmax over regions of (temperature * A);  C = rows of A V, normalised;  S = C * T
    similarity = mean over words of the sum of the normalised row of S D^T

Two identities save work without changing a score. With x = (A V) * T before C's normalisation, the sum of a row of
x D^T is sum_r A_r Z_r, which the attention already has; and C's scale cancels between numerator and norm up to the 1e-8
that guards each division:  word score = sum_r A_r Z_r / (||x D^T|| + 1e-8 (||A V|| + 1e-8)).

What remains is ||x D^T||, about D^2/2 multiply-adds for a word and an image (dependent_norm.py). The backward pass of
scores differentiates those that the loss turns out to depend on, scoring them once more; a sum over all negatives that
depends on most of them is differentiated while it is computed.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lib.collectives import add_up, divide, gather, gather_results
from lib.distributed import rank, world_size
from lib.model.dependent_norm import DiagonalNorm, Norm, differentiable_norm, scoring_norm
from lib.model.gate import DependencyGate, initial_log_temperature
from lib.model.norm import EPSILON
from lib.model.tiles import Tile, all_tiles, pair_tiles, rows_of_tile

# Pairs are differentiated one by one where the loss depends on no more than this share of them.
FEW_PAIRS = 0.4
ONE_IN = 8  # of the images, one in so many tells how large that share is

PairLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


class AttentionSimilarity(nn.Module):
    """Scores images against captions by each word's attention over regions; under autocast, products in bfloat16.

    What a subclass says: `_of_gate`, how words meet regions, and what norms are taken by, `_gram` and `_scoring_norm`.
    """

    unit_vectors = True  # takes regions and words one by one as unit vectors

    def __init__(self):
        super().__init__()
        self.log_temperature = nn.Parameter(initial_log_temperature())

    def _of_gate(self) -> tuple[Tensor | None, Tensor]:
        """The dependency matrix D and delta (D,)."""
        raise NotImplementedError

    def _gram(self, dependency: Tensor | None) -> Tensor | None:
        """K or its diagonal, by which norms are differentiated; None: by neither."""
        raise NotImplementedError

    def _scoring_norm(self, dependency: Tensor | None, dtype: torch.dtype, once=False, coarse=False) -> Norm:
        """What computes norms without gradients; see dependent_norm.py."""
        raise NotImplementedError

    def forward(self, regions: Tensor, words: Tensor, lengths: Tensor, real: Tensor | None = None) -> Tensor:
        """Similarity of all pairs, differentiable.

        regions: (I, R, D). words: (W, D), the captions' words one after the other. lengths: (C,) words of each caption,
        each at least 1. real: (I, R), false for padding regions that must not be attended to; None: all take part.
        Returns (I, C).
        """
        dtype = product_dtype(regions)
        with torch.autocast(regions.device.type, enabled=False):
            dependency, *parameters = self._parameters_of_pairs()
            norm = self._scoring_norm(dependency, dtype, once=True)
            return _AllPairs.apply(regions, words, *parameters, lengths, real, dtype, norm)

    def sum_over_negatives(
        self, loss: PairLoss, regions: Tensor, words: Tensor, lengths: Tensor, real: Tensor | None = None
    ) -> Tensor:
        """Sum of a loss over all wrong pairs, where image k belongs to caption k.

        loss: of scores (G, c), the true scores of their images (G, 1) and the true scores of their captions (c,), one
        number for each pair (G, c), differentiable. The others: as in `forward`; where several processes share the
        images (see `_Pairs`) regions and real are this one's, words and lengths are all. Returns a scalar,
        differentiable, the same for all processes.
        """
        inputs = (regions, words, lengths, real)
        if self._share_that_counts(loss, *inputs) <= FEW_PAIRS:
            return sum_over_wrong(loss, all_scores(self(*inputs)))
        dtype = product_dtype(regions)
        with torch.autocast(regions.device.type, enabled=False):
            _, *parameters = self._parameters_of_pairs()
            return _SumOverNegatives.apply(regions, words, *parameters, lengths, real, dtype, loss)

    def _parameters_of_pairs(self) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor]:
        """The dependency matrix D, and what scores are differentiated in: delta, K, the attention's temperature."""
        dependency, delta = self._of_gate()  # before K: so are D's gradients added up
        return dependency, delta, self._gram(dependency), self.log_temperature.exp()

    @torch.no_grad()
    def _share_that_counts(self, loss: PairLoss, regions, words, lengths, real) -> float:
        """The share of pairs whose loss is not zero, estimated from coarse scores of some of the images."""
        scorer, pairs = self.scorer(coarse=True), _Pairs(len(lengths))
        true = pairs.gather(scorer.pairs(regions, words, lengths, pairs.images, pairs.captions, real))
        some = slice(None, None, ONE_IN)
        scores = scorer.all_pairs(regions[some], words, lengths, None if real is None else real[some])
        counts = loss(scores, true[pairs.own][some, None], true) != 0
        return (add_up(counts.sum()) / add_up(counts.new_tensor(counts.numel(), dtype=torch.long))).item()

    @torch.no_grad()
    def scorer(self, coarse: bool = False) -> "Scorer":
        """The gate computed once, for scoring without gradients; coarse: with K = D^T D replaced by its diagonal."""
        dtype = product_dtype(self.log_temperature)
        with torch.autocast(self.log_temperature.device.type, enabled=False):
            dependency, delta = self._of_gate()
            norm = self._scoring_norm(dependency, dtype, coarse=coarse)
            return Scorer(delta, self.log_temperature.exp(), norm, dtype)

    def figures(self) -> dict[str, float]:
        """For logs."""
        return {"temperature": self.log_temperature.exp().item()}


class Similarity(AttentionSimilarity):
    """X-Dim's. gate: what makes the dependency matrix, one of gate.py's; None: X-Dim's own."""

    def __init__(self, embed_size: int, gate: nn.Module | None = None):
        super().__init__()
        self.gate = gate or DependencyGate(embed_size)

    def _of_gate(self) -> tuple[Tensor, Tensor]:
        dependency = self.gate()
        return dependency, dependency.sum(dim=0)

    def _gram(self, dependency: Tensor) -> Tensor:
        return dependency.square().sum(dim=0) if self.gate.diagonal else dependency.T @ dependency

    def _scoring_norm(self, dependency: Tensor, dtype: torch.dtype, once=False, coarse=False) -> Norm:
        if coarse or self.gate.diagonal:
            return DiagonalNorm(dependency.detach())
        return scoring_norm(dependency.detach(), dtype, once)

    def figures(self) -> dict[str, float]:
        return {**self.gate.figures(), **super().figures()}


def all_scores(scores: Tensor) -> Tensor:
    """The scores (B, B) of a batch from those that each process has of its images (I, B), differentiable."""
    return gather_results(scores, _Pairs(scores.shape[1]).sizes)


def sum_over_wrong(loss: PairLoss, scores: Tensor) -> Tensor:
    """Sum of a loss over all wrong pairs of scores (B, B), where image k belongs to caption k."""
    true = scores.diagonal()
    wrong = ~torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    return loss(scores, true[:, None], true).where(wrong, 0).sum()


class _Pairs:
    """The true pairs of a batch whose images several processes share: each has as many, in order; captions are all."""

    def __init__(self, total: int):
        parts = divide(total, world_size())
        self.own = parts[rank()]  # of all pairs, those of this process's images
        self.sizes = [part.stop - part.start for part in parts]
        self.images = torch.arange(self.sizes[rank()])  # counted among this process's
        self.captions = self.images + self.own.start

    def gather(self, values: Tensor) -> Tensor:
        """Values (B,) of all pairs from those of each process's."""
        return gather(values, self.sizes)


class Scorer:
    """Scores pairs without gradients, or with them where a tile's inputs ask for it."""

    def __init__(self, delta: Tensor, temperature: Tensor, norm: Norm, dtype):
        """delta: column sums of D (D,). norm: see dependent_norm.py. dtype: of the products."""
        self.delta, self.temperature, self.norm, self.dtype = delta, temperature, norm, dtype

    @torch.no_grad()
    def all_pairs(self, regions: Tensor, words: Tensor, lengths: Tensor, real: Tensor | None = None) -> Tensor:
        """Scores (I, C); arguments as Similarity.forward takes them."""
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
        indices, prepared = None, ()
        for tile in tiles:
            if tile.words is not indices:  # tiles that share captions come one after the other
                indices, prepared = tile.words, self.prepare(words[tile.words])
            mask = None if real is None else real[tile.images]
            scores.view(-1)[tile.places] = self.tile(regions[tile.images], *prepared, mask)
        return scores

    def rows(self, regions: Tensor) -> int:
        """(word, image) pairs of a tile."""
        return rows_of_tile(regions.device, self.dtype, regions.shape[-1])

    def prepare(self, words: Tensor) -> tuple[Tensor, Tensor]:
        """What `tile` takes for words (1 or G, c, n, D): as they meet regions, and as they meet their context."""
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
            differentiator = _Differentiator(*inputs, real, dtype)
            for tile in tiles:
                differentiator.add(tile, lambda _, tile=tile: gradient[tile.places])
            return *differentiator.gradients(), None, None, None, None


class _SumOverNegatives(torch.autograd.Function):
    """A loss summed over all wrong pairs; its gradients are computed along with it."""

    @staticmethod
    def forward(ctx, regions, words, delta, gram, temperature, lengths, real, dtype, loss):
        inputs = (regions, words, delta, gram, temperature, real)
        exact = regions.dtype  # of the true pairs, which are few
        lengths, pairs = lengths.cpu(), _Pairs(len(lengths))
        images_captions = (pairs.images, pairs.captions)
        scorer = Scorer(delta, temperature, differentiable_norm(gram, exact), exact)
        negatives = _Negatives(loss, pairs.gather(scorer.pairs(regions, words, lengths, *images_captions, real)), pairs)
        wrong, true = _Differentiator(*inputs, dtype), _Differentiator(*inputs, exact)
        rows = rows_of_tile(regions.device, dtype, regions.shape[-1])
        for tile in all_tiles(len(regions), lengths, rows, regions.device):
            wrong.add(tile, lambda scores, tile=tile: negatives.add(scores, tile.places))
        total, of_true = add_up(negatives.sum), add_up(negatives.of_true)[pairs.own]
        for tile in pair_tiles(*images_captions, lengths, scorer.rows(regions), regions.device):
            true.add(tile, lambda _, tile=tile: of_true[tile.places])
        both = zip(wrong.gradients(), true.gradients(), strict=True)
        ctx.save_for_backward(*(None if a is None else a + b for a, b in both))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        return *(None if one is None else gradient * one for one in ctx.saved_tensors), None, None, None, None


class _Negatives:
    """Adds up a loss over wrong pairs, and its gradients in the scores of the true ones."""

    def __init__(self, loss: PairLoss, true: Tensor, pairs: _Pairs):
        """true: (B,) scores of image k and caption k."""
        self.loss, self.true, self.first = loss, true, pairs.own.start
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

    def gradients(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Of all tiles added so far, in regions, words, delta, K and temperature."""
        *before, of_temperature = self.totals
        return *before, self.norm.gradient(), of_temperature


def product_dtype(like: Tensor) -> torch.dtype:
    """The type of matrix products: autocast's where it is on, else that of the tensor."""
    kind = like.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else like.dtype
