"""The norm ||x D^T|| of correspondences x under the dependency matrix D, the one costly part of the similarity.

It depends on D only through K = D^T D, so any factor F with F^T F = K serves. Each class below is called with
x (rows, D) and returns (rows,), in float32 at least.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Rows of a triangular factor that are multiplied at once: the fewer, the less of the zero half is touched.
BLOCK = 128


class FactorNorm:
    """||x F^T||, exact. A triangular F, from a QR decomposition of D in float64, halves the products."""

    def __init__(self, dependency: Tensor, dtype: torch.dtype, triangular: bool = True):
        """dependency: D (D, D). dtype: of the products. triangular: worth its cost where F serves often."""
        factor = torch.linalg.qr(dependency.double(), mode="r").R if triangular else dependency
        step = BLOCK if triangular else len(factor)
        self.blocks = [factor[i : i + step, i * triangular :].to(dtype).T for i in range(0, len(factor), step)]

    def weigh(self, words: Tensor) -> Tensor:
        return words

    def __call__(self, x: Tensor) -> Tensor:
        exact = torch.promote_types(x.dtype, torch.float32)
        squares = x.new_zeros(len(x), dtype=exact)
        for columns in self.blocks:
            squares += torch.linalg.vector_norm(x[:, -len(columns) :] @ columns, dim=-1, dtype=exact).square_()
        return squares.sqrt_()


class DiagonalNorm:
    """sqrt(sum_j K_jj x_j^2), a cheap stand-in: D instead of D^2 products."""

    def __init__(self, dependency: Tensor):
        self.scale = dependency.norm(dim=0)

    def weigh(self, words: Tensor) -> Tensor:
        """Words scaled so that x, which holds them as a factor, needs no scaling of its own."""
        return words * self.scale

    def __call__(self, x: Tensor) -> Tensor:
        return torch.linalg.vector_norm(x, dim=-1, dtype=torch.promote_types(x.dtype, torch.float32))


class GramNorm:
    """sqrt((x K) . x) with gradients: that in x is a multiple of x K, which is there already, that in K is x^T x.

    K's gradient is summed up over all calls: `gradient()` gives it after the backward passes.
    """

    def __init__(self, gram: Tensor, dtype: torch.dtype):
        self.gram = gram.to(dtype)
        self.upper = torch.zeros_like(gram)  # blocks on and above the diagonal

    def weigh(self, words: Tensor) -> Tensor:
        return words

    def __call__(self, x: Tensor) -> Tensor:
        return _GramNorm.apply(x, self.gram, self.upper)

    def gradient(self) -> Tensor:
        """Gradient (D, D) of all that was computed and differentiated so far, in K."""
        return self.upper.triu() + self.upper.triu(1).T


class _GramNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, gram: Tensor, upper: Tensor) -> Tensor:
        product = x @ gram
        squares = torch.linalg.vecdot(x.to(upper.dtype), product.to(upper.dtype))
        norms = squares.clamp(min=1e-30).sqrt()  # a correspondence of zeros must not divide by zero
        ctx.save_for_backward(x, product, norms)
        ctx.upper = upper
        return norms

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        x, product, norms = ctx.saved_tensors
        scale = (gradient / norms)[:, None]
        half = x * (0.5 * scale).to(x.dtype)
        for i in range(0, x.shape[1], BLOCK):
            ctx.upper[i : i + BLOCK, i:] += half[:, i : i + BLOCK].T @ x[:, i:]
        return product * scale.to(x.dtype), None, None
