"""The norm of a word's correspondence under the dependency matrix D, the one costly part of the similarity.

For a word t with attention A over the regions V of an image, the unnormalised correspondence is x = (A V) * t, and the
score divides by ||x D^T||. It depends on D only through K = D^T D, so D may be replaced by any F with F^T F = K, such
as the triangular factor of a QR decomposition of D (in float64: a Cholesky factorisation of K fails for half-open
gates).

Each class is called with attention (G, W, R), regions (G, R, D) and weights (1 or G, W, D), which are the words as its
`weigh` has prepared them. It returns the divisor (G, W), in float32 at least: ||x D^T|| + 1e-8 (||A V|| + 1e-8), where
the second term is what the formula's two guards against division by zero amount to.
"""

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lib.model.layers import EPSILON

# Rows of a triangular factor that are multiplied at once: the fewer, the less of its zero half is touched, but the more
# launches on a device where they cost.
BLOCK = {"cpu": 128, "cuda": 512}


class Scratch:
    """Buffers that tiles reuse one after the other: on a CPU, touching fresh pages costs more than the arithmetic."""

    def __init__(self):
        self._buffers: dict[str, Tensor] = {}

    def __call__(self, name: str, like: Tensor, *shape: int) -> Tensor:
        """An uninitialised tensor of a shape, as `like`, always of one type; overwrites the last one of that name."""
        buffer, size = self._buffers.get(name), math.prod(shape)
        if buffer is None or len(buffer) < size:
            buffer = self._buffers[name] = like.new_empty(size)
        return buffer[:size].view(shape)


class Norm:
    """Divisors (G, W) for G images and W words.

    leaves: what they are differentiated in besides the arguments.
    """

    leaves: tuple[Tensor, ...] = ()

    def wide(self, regions: Tensor, pairs: bool = False) -> int:
        """How many tensors of D numbers a call holds for each word and image. pairs: in a tile of pairs."""
        return 2

    def weigh(self, words: Tensor) -> Tensor:
        """The words as the norm takes them."""
        return words

    def __call__(self, attention: Tensor, regions: Tensor, weights: Tensor) -> Tensor:
        raise NotImplementedError

    def gradient(self, of_leaves: list[Tensor]) -> Tensor | None:
        """Gradient in K, or in its rows, of all calls that were differentiated so far, from that in the leaves."""
        return None


class FactorNorm(Norm):
    """||x F^T||, exact. A triangular F halves the products."""

    def __init__(self, factor: Tensor, triangular: bool):
        """factor: F (D, D) with F^T F = D^T D. triangular: F is zero below its diagonal."""
        step = BLOCK[factor.device.type] if triangular else len(factor)
        self.blocks = [factor[i : i + step, i * triangular :].clone().T for i in range(0, len(factor), step)]
        self.scratch = Scratch()

    def __call__(self, attention: Tensor, regions: Tensor, weights: Tensor) -> Tensor:
        x, guard = _correspond(attention, regions, weights, self.scratch)
        norms = x.new_empty(len(self.blocks), len(x), dtype=torch.promote_types(x.dtype, torch.float32))
        for columns, norm in zip(self.blocks, norms, strict=True):
            product = self.scratch("product", x, len(x), columns.shape[1])
            torch.mm(x[:, -len(columns) :], columns, out=product)
            torch.linalg.vector_norm(product, dim=-1, dtype=norm.dtype, out=norm)
        return torch.linalg.vector_norm(norms, dim=0).view(attention.shape[:2]) + guard


class RowsNorm(Norm):
    """sqrt(sum_j k_j x_j^2 + sum_n (w_n . x)^2), for K = diag(k) + sum_n w_n w_n^T as rows (1 + N, D) k, w_1, ..., w_N.

    (1 + N) D instead of D^2 / 2 multiply-adds: for gates with such a K, and with any K's diagonal for coarse scores.
    """

    def __init__(self, rows: Tensor, dtype: torch.dtype):
        self.scale = rows[0].sqrt()
        self.others = (rows[1:] / self.scale).T.to(dtype)  # of words that are scaled already, see `weigh`
        self.scratch = Scratch()

    def weigh(self, words: Tensor) -> Tensor:
        """Words times sqrt(k_j), so that x needs no scaling of its own."""
        return words * self.scale

    def __call__(self, attention: Tensor, regions: Tensor, weights: Tensor) -> Tensor:
        x, guard = _correspond(attention, regions, weights, self.scratch)
        norms = _norms(x)
        if self.others.shape[1]:
            norms = torch.hypot(norms, _norms(x @ self.others))
        return norms.view(attention.shape[:2]) + guard


def differentiable_norm(gram: Tensor | None, dtype: torch.dtype) -> Norm:
    """The norm with gradients: by K (D, D), by rows (1, 1 + N, D) of it, or without K the norm of the context."""
    if gram is None:
        return ContextNorm()
    return GramNorm(gram, dtype) if gram.ndim == 2 else DifferentiableRowsNorm(gram)


class ContextNorm(Norm):
    """||A V|| + 1e-8, which makes a word's score its cosine with its context: no dependencies (`independent`)."""

    def __call__(self, attention: Tensor, regions: Tensor, weights: Tensor) -> Tensor:
        return _norms(torch.bmm(attention, regions)) + EPSILON


class DifferentiableRowsNorm(Norm):
    """As RowsNorm, with gradients, for rows (1, 1 + N, D), a leaf."""

    def __init__(self, rows: Tensor):
        self.leaves = (rows.detach().requires_grad_(),)

    def wide(self, regions: Tensor, pairs: bool = False) -> int:
        """Context, x and its squares, which autograd keeps, and two gradients."""
        return 5

    def __call__(self, attention: Tensor, regions: Tensor, weights: Tensor) -> Tensor:
        context = torch.bmm(attention, regions)
        exact, x = torch.promote_types(context.dtype, torch.float32), context * weights
        rows = self.leaves[0][0].to(context.dtype)
        squares = (x.square() * rows[0]).sum(dim=-1, dtype=exact)
        if len(rows) > 1:
            squares = squares + (x @ rows[1:].T).to(exact).square().sum(dim=-1)
        return squares.clamp(min=1e-30).sqrt() + _guard(context)

    def gradient(self, of_leaves: list[Tensor]) -> Tensor:
        return of_leaves[0]


class GramNorm(Norm):
    """sqrt((x K) . x) with gradients: in x a multiple of x K, which the forward pass has computed; in K, x^T x.

    K's gradient is summed over all calls; `gradient()` returns it after the backward passes. Each call must be
    differentiated before the next one, which reuses its buffers.
    """

    def __init__(self, gram: Tensor, dtype: torch.dtype):
        self.gram = gram.to(dtype)
        self.upper = torch.zeros_like(gram)  # blocks on and above the diagonal
        self.scratch = Scratch()

    def wide(self, regions: Tensor, pairs: bool = False) -> int:
        """Context, x, x K and one more."""
        return 4

    def __call__(self, attention: Tensor, regions: Tensor, weights: Tensor) -> Tensor:
        return _GramNorm.apply(attention, regions, weights, self)

    def gradient(self, of_leaves: list[Tensor]) -> Tensor:
        return 0.5 * (self.upper.triu() + self.upper.triu(1).T)


class _GramNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, attention: Tensor, regions: Tensor, weights: Tensor, norm: GramNorm) -> Tensor:
        context = _attend(attention, regions, norm.scratch)
        guard = _guard(context)
        x = torch.mul(context, weights, out=norm.scratch("x", context, *context.shape)).flatten(0, 1)
        product = torch.mm(x, norm.gram, out=norm.scratch("product", x, *x.shape))
        each = torch.mul(x, product, out=norm.scratch("each", x, *x.shape))
        squares = each.sum(dim=-1, dtype=torch.promote_types(x.dtype, torch.float32))
        norms = squares.clamp(min=1e-30).sqrt()  # sqrt has no finite gradient at 0
        ctx.save_for_backward(attention, regions, weights, norms)
        ctx.norm, ctx.context, ctx.x, ctx.product, ctx.each = norm, context, x, product, each
        return norms.view(attention.shape[:2]) + guard

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        attention, regions, weights, norms = ctx.saved_tensors
        context, x, product, upper = ctx.context, ctx.x, ctx.product, ctx.norm.upper
        scale = (gradient.flatten() / norms)[:, None].to(x.dtype)
        scaled = torch.mul(x, scale, out=ctx.each)
        step = BLOCK[x.device.type]
        for i in range(0, x.shape[1], step):
            upper[i : i + step, i:].add_(scaled[:, i : i + step].T @ x[:, i:])
        of_x = product.mul_(scale).view_as(context)
        of_weights = torch.mul(of_x, context, out=ctx.each.view_as(context))
        of_weights = of_weights.sum(dim=0, keepdim=True) if len(weights) == 1 else of_weights.clone()
        of_context = of_x.mul_(weights)
        if x.dtype == torch.float64:
            of_context += EPSILON * gradient[..., None] * context / context.norm(dim=-1, keepdim=True).clamp(min=1e-30)
        return torch.bmm(of_context, regions.mT), torch.bmm(attention.mT, of_context), of_weights, None


def _correspond(attention: Tensor, regions: Tensor, weights: Tensor, scratch: Scratch) -> tuple[Tensor, Tensor | float]:
    """Correspondences x (G * W, D), and the guard against division by zero."""
    context = _attend(attention, regions, scratch)
    guard = _guard(context)
    return context.mul_(weights).flatten(0, 1), guard


def _attend(attention: Tensor, regions: Tensor, scratch: Scratch) -> Tensor:
    """The words' context A V (G, W, D), not normalised."""
    shape = (*attention.shape[:2], regions.shape[-1])
    return torch.bmm(attention, regions, out=scratch("context", regions, *shape))


def _norms(rows: Tensor) -> Tensor:
    """Norms of rows (..., D), in float32 at least."""
    return torch.linalg.vector_norm(rows, dim=-1, dtype=torch.promote_types(rows.dtype, torch.float32))


def _guard(context: Tensor) -> Tensor | float:
    """1e-8 (||A V|| + 1e-8); in float32 the first term is below the rounding of the norm that it is added to."""
    if context.dtype == torch.float64:
        return EPSILON * (context.norm(dim=-1) + EPSILON)
    return EPSILON**2
