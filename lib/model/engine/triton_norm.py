"""FactorNorm as one Triton kernel for CUDA: correspondences never leave the chip.

A program takes some words of one image. For each block of the factor's rows it goes through the dimensions: context
from attention and regions, times the word, times the factor, added up in registers; only the squared norms are written.
With a triangular factor it begins at the diagonal. Context is computed again for each block, which costs a quarter of
the products at blocks of 256 rows, and saves writing and reading several thousand bytes for a word and an image.
"""

import warnings
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from lib.model.engine.norms import FactorNorm, Norm
from lib.model.layers import EPSILON

# Words of a program, rows of the factor and dimensions at a time; for float32, which takes twice the space, fewer.
BLOCKS = {
    torch.bfloat16: {"WORDS": 128, "ROWS": 256, "DIMS": 64},
    torch.float32: {"WORDS": 64, "ROWS": 128, "DIMS": 32},
}
LAUNCH = {"num_warps": 8, "num_stages": 2}


class TritonNorm(Norm):
    """||x F^T|| in bfloat16 or TF32 products; see FactorNorm, whose place it takes."""

    def __init__(self, factor: Tensor, triangular: bool):
        """factor: F (D, D) with F^T F = D^T D. triangular: F is zero below its diagonal."""
        self.factor, self.triangular = factor.contiguous(), triangular

    def __call__(self, attention: Tensor, regions: Tensor, weights: Tensor) -> Tensor:
        images, words, count = attention.shape
        attention, regions, weights = (part.contiguous() for part in (attention, regions, weights))
        squares = torch.empty(images, words, dtype=torch.float32, device=attention.device)
        blocks = BLOCKS[self.factor.dtype]
        _squares[(triton.cdiv(words, blocks["WORDS"]), images)](
            *(attention, regions, weights, self.factor, squares, words, len(self.factor)),
            *(0 if len(weights) == 1 else words * len(self.factor),),
            COUNT=count,
            PADDED=max(16, triton.next_power_of_2(count)),
            TRIANGULAR=self.triangular,
            **blocks,
            **LAUNCH,
        )
        return squares.sqrt_() + EPSILON**2


@cache
def works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel can be built here (Triton needs a C compiler) and gives what plain products give."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 5, 3), (2, 3, 80), (1, 5, 80), (80, 80))
    *inputs, factor = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    try:
        fused, plain = TritonNorm(factor.triu(), True)(*inputs), FactorNorm(factor.triu(), True)(*inputs)
        found = "" if torch.allclose(fused, plain, rtol=0.02) else "it computes other norms than plain products"
    except Exception as error:  # whatever compilers and drivers raise
        found = f"{type(error).__name__}: {error}".splitlines()[0]
    if found:
        warnings.warn(f"the Triton kernel is not used on {device}, scoring is slower: {found}", stacklevel=2)
    return not found


@triton.jit
def _squares(
    attention,  # (images, words, COUNT)
    regions,  # (images, COUNT, dims)
    weights,  # (1 or images, words, dims)
    factor,  # (dims, dims)
    squares,  # (images, words), the result
    words,
    dims,
    weights_step,  # from one image's weights to the next one's
    COUNT: tl.constexpr,
    PADDED: tl.constexpr,
    TRIANGULAR: tl.constexpr,
    WORDS: tl.constexpr,
    ROWS: tl.constexpr,
    DIMS: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    word = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    region, dim, row = tl.arange(0, PADDED), tl.arange(0, DIMS), tl.arange(0, ROWS)
    real = word < words
    attended = tl.load(
        attention + (image * words + word[:, None]) * COUNT + region[None, :],
        mask=real[:, None] & (region < COUNT)[None, :],
        other=0.0,
    )
    of_regions = regions + (image * COUNT + region[:, None]) * dims + dim[None, :]
    of_weights = weights + image * weights_step + word[:, None].to(tl.int64) * dims + dim[None, :]
    total = tl.zeros((WORDS,), tl.float32)
    for first in range(0, dims, ROWS):
        of_factor = factor + (first + row[None, :]) * dims + dim[:, None]
        product = tl.zeros((WORDS, ROWS), tl.float32)
        start = first if TRIANGULAR else 0
        for k in range(start, dims, DIMS):
            inside = k + dim < dims
            seen = tl.load(of_regions + k, mask=(region < COUNT)[:, None] & inside[None, :], other=0.0)
            context = tl.dot(attended, seen)  # in float32
            weight = tl.load(of_weights + k, mask=real[:, None] & inside[None, :], other=0.0)
            rows = tl.load(of_factor + k, mask=inside[:, None] & (first + row < dims)[None, :], other=0.0)
            product = tl.dot((context * weight.to(tl.float32)).to(rows.dtype), rows, product)
        total += tl.sum(product * product, axis=1)
    tl.store(squares + image * words + word, total, mask=real)
