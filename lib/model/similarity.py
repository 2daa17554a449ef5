"""X-Dim's similarity of images and captions (paper, section 3.3), computed over tiles of images x words.

For a caption's words T and an image's regions V, with the gate's dependency matrix D and delta = column sums of D:

    Z = T diag(delta) V^T;  A = leaky_relu(tanh(Z), 0.1), normalised over the caption's words for each region
    A = softmax over regions of (temperature * A);  C = rows of A V, normalised;  S = C * T
    similarity = mean over words of the sum of the normalised row of S D^T

Two identities save work without changing a score. With x = (A V) * T before C's normalisation, the sum of a row of
x D^T is sum_r A_r Z_r, which the attention already has; and C's scale cancels between numerator and norm up to the 1e-8
that guards each division:  word score = sum_r A_r Z_r / (||x D^T|| + 1e-8 (||A V|| + 1e-8)).
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lib.model.gate import DependencyGate, initial_log_temperature
from lib.model.norm import EPSILON

# The largest tensor of a tile, images x words x D numbers: small enough for a CPU's cache, large enough to fill a GPU.
TILE_NUMBERS = {"cpu": 2**21, "cuda": 2**26}
# With gradients, tiles are recomputed in the backward pass where keeping them would take more than this many numbers.
KEEP_NUMBERS = 2**26


class Similarity(nn.Module):
    """Scores every image against every caption from their embeddings."""

    def __init__(self, embed_size: int):
        super().__init__()
        self.gate = DependencyGate(embed_size)
        self.log_temperature = nn.Parameter(initial_log_temperature())

    def forward(self, regions: Tensor, words: Tensor, lengths: Tensor, real: Tensor | None = None) -> Tensor:
        """Similarity of all pairs.

        regions: (I, R, D). words: (W, D), the captions' words one after the other. lengths: (C,) words of each caption,
        each at least 1. real: (I, R), false for padding regions that must not be attended to; None: all take part.
        Returns (I, C).
        """
        dependency = self.gate()  # (D, D)
        queries = words * dependency.sum(dim=0)  # (W, D)
        temperature = self.log_temperature.exp()
        recompute = torch.is_grad_enabled() and len(regions) * words.numel() > KEEP_NUMBERS
        image_blocks, caption_blocks = tile_blocks(len(regions), lengths.tolist(), regions)
        rows = []
        for images in image_blocks:
            row = []
            for captions, span in caption_blocks:
                tile = (
                    regions[images],
                    words[span],
                    queries[span],
                    lengths[captions],
                    dependency,
                    temperature,
                    None if real is None else real[images],
                )
                row.append(checkpoint(score_tile, *tile, use_reentrant=False) if recompute else score_tile(*tile))
            rows.append(torch.cat(row, dim=1))
        return torch.cat(rows)


def score_tile(
    regions: Tensor,  # (I, R, D)
    words: Tensor,  # (W, D)
    queries: Tensor,  # (W, D) words * delta
    lengths: Tensor,  # (C,)
    dependency: Tensor,  # (D, D)
    temperature: Tensor,  # ()
    real: Tensor | None,  # (I, R)
) -> Tensor:
    """Scores (I, C) of one tile: a chain of matrix products over (word, image) pairs."""
    images, region_count, _ = regions.shape
    exact = words.dtype  # norms, softmax and sums stay in it when autocast runs the products in bfloat16
    caption = torch.repeat_interleave(torch.arange(len(lengths), device=words.device), lengths, output_size=len(words))

    affinity = (queries @ regions.flatten(0, 1).T).view(-1, images, region_count).to(exact)  # Z (W, I, R)
    attention = F.leaky_relu(affinity.tanh(), 0.1)
    squares = affinity.new_zeros(len(lengths), images, region_count).index_add(0, caption, attention.square())
    norms = squares.clamp(min=1e-30).sqrt()  # (C, I, R); the clamp keeps the gradient of a masked region's zeros finite
    attention = temperature * attention / (norms.index_select(0, caption) + EPSILON)
    if real is not None:
        attention = attention.masked_fill(~real, float("-inf"))
    attention = attention.softmax(dim=-1)  # (W, I, R)

    context = torch.bmm(attention.transpose(0, 1), regions).to(exact)  # A V (I, W, D), not normalised
    dependent = ((context * words) @ dependency.T).norm(dim=-1, dtype=exact)  # ||x D^T|| (I, W)
    scale = dependent + EPSILON * (context.norm(dim=-1) + EPSILON)
    word_scores = (attention * affinity).sum(dim=-1) / scale.T  # (W, I)
    sums = word_scores.new_zeros(len(lengths), images).index_add(0, caption, word_scores)
    return (sums / lengths[:, None]).T  # (I, C)


def tile_blocks(images: int, lengths: list[int], like: Tensor) -> tuple[list[slice], list[tuple[slice, slice]]]:
    """Cut all pairs into tiles that suit the device of `like` (whose last dimension is D).

    Returns the blocks of images, and the blocks of captions as (slice of captions, slice of their words).
    A caption is never cut; one longer than a block is a block of its own.
    """
    pairs = TILE_NUMBERS.get(like.device.type, TILE_NUMBERS["cuda"]) // like.shape[-1]  # (word, image) pairs of a tile
    words_of_block = 4 * max(1, math.isqrt(pairs))
    images_of_block = max(1, pairs // words_of_block)
    image_blocks = [slice(i, min(i + images_of_block, images)) for i in range(0, images, images_of_block)]

    caption_blocks, first, first_word, end_word = [], 0, 0, 0
    for caption, length in enumerate(lengths):
        if caption > first and end_word + length - first_word > words_of_block:
            caption_blocks.append((slice(first, caption), slice(first_word, end_word)))
            first, first_word = caption, end_word
        end_word += length
    caption_blocks.append((slice(first, len(lengths)), slice(first_word, end_word)))
    return image_blocks, caption_blocks
