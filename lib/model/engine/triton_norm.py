"""FactorNorm as one Triton kernel for CUDA: correspondences never leave the chip.

A program takes some words of one image. For each block of the factor's rows it goes through the dimensions: context
from attention and regions, times the word, times the factor, added up in registers; only the squared norms are written.
With a triangular factor it begins at the diagonal. Context is computed again for each block, which costs a quarter of
the products at blocks of 256 rows, and saves writing and reading several thousand bytes for a word and an image.
"""

import warnings
from contextlib import nullcontext
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from lib.model.engine.norms import FactorNorm
from lib.model.layers import EPSILON

# Words of a program, rows of the factor and dimensions at a time, by bytes of a number and for up to how many regions.
# They fit the shared memory of all GPUs from compute capability 8.0 on. For more regions than these, computing context
# anew for each block of rows would cost more than it saves.
BLOCKS = {2: {64: (128, 256, 64), 256: (64, 128, 32)}, 4: {128: (64, 128, 32)}}
LAUNCH = {"num_warps": 8, "num_stages": 2}


class TritonNorm(FactorNorm):
    """||x F^T|| in bfloat16 or TF32 products, by the kernel where images share their words and its blocks fit, else by
    FactorNorm.
    """

    def __init__(self, factor: Tensor, triangular: bool):
        """factor: F (D, D) with F^T F = D^T D. triangular: F is zero below its diagonal."""
        super().__init__(factor, triangular)
        self.factor, self.triangular = factor.contiguous(), triangular

    def wide(self, regions: Tensor, pairs: bool = False) -> int:
        """0 where the kernel runs, which is not for pairs."""
        runs = not pairs and works(self.factor.device, self.factor.dtype, padded(regions))
        return 0 if runs else super().wide(regions)

    def __call__(self, attention: Tensor, regions: Tensor, weights: Tensor) -> Tensor:
        if len(weights) > 1 or not works(self.factor.device, self.factor.dtype, padded(regions)):
            return super().__call__(attention, regions, weights)
        return norms(attention, regions.contiguous(), weights.contiguous(), self.factor, self.triangular)


def padded(regions: Tensor) -> int:
    """Regions (I, R, D) that the kernel computes with: a power of two, as Triton wants it."""
    return max(16, triton.next_power_of_2(regions.shape[1]))


def blocks_for(dtype: torch.dtype, regions: int) -> tuple[int, int, int] | None:
    """Words, rows and dimensions of a block; None for more regions than the kernel takes."""
    return next((blocks for most, blocks in BLOCKS[dtype.itemsize].items() if regions <= most), None)


def norms(attention: Tensor, regions: Tensor, weights: Tensor, factor: Tensor, triangular: bool) -> Tensor:
    """The norms (G, W), plus 1e-16: attention (G, W, R), regions (G, R, D), weights (1, W, D), factor (D, D)."""
    images, words, count = attention.shape
    squares = torch.empty(images, words, dtype=torch.float32, device=attention.device)
    blocks = blocks_for(factor.dtype, padded(regions))
    assert blocks is not None
    with torch.cuda.device(attention.device) if attention.is_cuda else nullcontext():  # where Triton launches
        _squares[(triton.cdiv(words, blocks[0]), images)](
            *(attention, regions, weights, factor, squares, words, len(factor), count),
            *(attention.stride(0), attention.stride(1)),
            PADDED=padded(regions),
            TRIANGULAR=triangular,
            **dict(zip(("WORDS", "ROWS", "DIMS"), blocks, strict=True)),
            **LAUNCH,
        )
    return squares.sqrt_().add_(EPSILON**2)


@cache
def works(device: torch.device, dtype: torch.dtype, regions: int) -> bool:
    """Whether the kernel can be built and run here (Triton needs a C compiler) and gives what plain products give.

    regions: see `padded`. A warning says why it does not run; for too many regions there is none.
    """
    if blocks_for(dtype, regions) is None:
        return False
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 5, regions), (2, regions, 80), (1, 5, 80), (80, 80))
    inputs = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    attention, some, weights, factor = inputs
    factor = factor.triu()
    try:
        fused = norms(attention, some, weights, factor, True)
        plain = FactorNorm(factor, True)(attention, some, weights)
        found = "" if torch.allclose(fused, plain, rtol=0.02) else "it computes other norms than plain products"
    except Exception as error:  # whatever compilers and drivers raise, and Triton where shared memory is short
        found = f"{type(error).__name__}: {error}".splitlines()[0]
    if found:
        what = f"the Triton kernel is not used on {device} for {regions} regions"
        warnings.warn(f"{what}, scoring is slower: {found}", stacklevel=2)
    return not found


@triton.jit(do_not_specialize=["words", "count", "image_step", "word_step"])
def _squares(
    attention,  # (images, words, count), any strides of images and words
    regions,  # (images, count, dims)
    weights,  # (words, dims)
    factor,  # (dims, dims)
    squares,  # (images, words), the result
    words,
    dims,
    count,
    image_step,  # strides of attention
    word_step,
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
        attention + image * image_step + word[:, None].to(tl.int64) * word_step + region[None, :],
        mask=real[:, None] & (region < count)[None, :],
        other=0.0,
    )
    of_regions = regions + (image * count + region[:, None]) * dims + dim[None, :]
    of_weights = weights + word[:, None].to(tl.int64) * dims + dim[None, :]
    total = tl.zeros((WORDS,), tl.float32)
    for first in range(0, dims, ROWS):
        of_factor = factor + (first + row[None, :]) * dims + dim[:, None]
        product = tl.zeros((WORDS, ROWS), tl.float32)
        start = first if TRIANGULAR else 0
        for k in range(start, dims, DIMS):
            inside = k + dim < dims
            seen = tl.load(of_regions + k, mask=(region < count)[:, None] & inside[None, :], other=0.0)
            context = tl.dot(attended, seen)  # in float32
            weight = tl.load(of_weights + k, mask=real[:, None] & inside[None, :], other=0.0)
            rows = tl.load(of_factor + k, mask=inside[:, None] & (first + row < dims)[None, :], other=0.0)
            product = tl.dot((context * weight.to(tl.float32)).to(rows.dtype), rows, product)
        total += tl.sum(product * product, axis=1)
    tl.store(squares + image * words + word, total, mask=real)
