"""Pairs of images and captions in tiles: what is scored at once, and how its tensors are laid out.

A tile knows where its images and words are, how affinities are computed, and how to add over a caption's words. Nothing
in it makes Python wait for the device: sizes come from lengths on the CPU.
"""

from bisect import bisect_right
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lib.model.layers import upload

# On a CPU tiles are small: the largest tensor, (word, image) pairs x D numbers, stays in the cache. Elsewhere they are
# large, as each launch of a kernel costs time: all tensors of a tile together take about MEMORY_SHARE of the device's
# memory. Of all of it: as a share of what is free, the order of additions would depend on what else runs there.
CACHE_BYTES = {"cpu": 2**23}
CACHE_IMAGES = 8  # images of a small tile, where there are as many
MEMORY_SHARE = 1 / 8
NARROW = 10  # tensors of R numbers, in float32, for each (word, image) pair of a tile
OWN = 4  # tensors of D numbers for each word and each region that a tile of pairs copies, gradients counted


class Bags(NamedTuple):
    """Where the words of packed captions are: rows of consecutive captions, one bag for each. On the device."""

    rows: Tensor  # (W,) 0, 1, 2, ...
    starts: Tensor  # (c,) each caption's first row
    bag_of_row: Tensor  # (W,)
    sizes: Tensor  # (c, 1) words of each caption
    lengths: Tensor  # (c,) the same, on the CPU

    @classmethod
    def of_lengths(cls, lengths: Tensor, device: torch.device) -> "Bags":
        """lengths: (C,), on the CPU."""
        sizes = [len(lengths), int(lengths.sum()), len(lengths)]
        bag_of_row = torch.arange(len(lengths)).repeat_interleave(lengths)
        numbers = upload(torch.cat([lengths.cumsum(0) - lengths, bag_of_row, lengths]), device)
        starts, bag_of_row, uploaded = numbers.split(sizes)
        return cls(torch.arange(sizes[1], device=device), starts, bag_of_row, uploaded[:, None], lengths)

    def part(self, captions: slice, words: slice) -> "Bags":
        """The bags of consecutive captions alone. words: the rows of these captions."""
        if captions.stop - captions.start == len(self.starts):
            return self
        starts, bag_of_row = self.starts[captions] - words.start, self.bag_of_row[words] - captions.start
        rows = self.rows[: len(bag_of_row)]
        return Bags(rows, starts, bag_of_row, self.sizes[captions], self.lengths[captions])


class _Sum(torch.autograd.Function):
    """Sums (c, ...) of the rows of each bag, of x (W, ...): one kernel, which always adds in the same order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bags: Bags) -> Tensor:
        ctx.bags = bags
        return torch.embedding_bag(x.flatten(1), bags.rows, bags.starts)[0].view(-1, *x.shape[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Spread.apply(gradient, ctx.bags), None


class _Spread(torch.autograd.Function):
    """Gives each row what its bag has: (W, ...) of x (c, ...)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bags: Bags) -> Tensor:
        ctx.bags = bags
        return x.index_select(0, bags.bag_of_row)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Sum.apply(gradient, ctx.bags), None


class SharedTile(NamedTuple):
    """G images, each against the same c consecutive captions of W words. Tensors of words are (W, G, ...)."""

    images: slice
    words: slice
    place: tuple[slice, slice]  # of the scores (G, c) among all scores: images, captions
    bags: Bags

    def affinity(self, queries: Tensor, regions: Tensor) -> Tensor:
        """Products (W, G, R) of queries (W, D) with regions (G, R, D)."""
        return (queries @ regions.flatten(0, 1).T).unflatten(1, regions.shape[:2])

    def over_words(self, x: Tensor) -> Tensor:
        """Sums over each caption's words: (W, G, ...) -> (c, G, ...)."""
        return _Sum.apply(x, self.bags)

    def to_words(self, x: Tensor) -> Tensor:
        """For each word what its caption has: (c, G, R) -> (W, G, R)."""
        return _Spread.apply(x, self.bags)

    def by_image(self, x: Tensor) -> Tensor:
        """(W, G, ...) -> (G, W, ...), and back."""
        return x.transpose(0, 1)

    def mean(self, x: Tensor) -> Tensor:
        """Means over each caption's words: (W, G) -> (G, c)."""
        return (self.over_words(x) / self.bags.sizes).T

    def mask(self, real: Tensor) -> Tensor:
        """What broadcasts to (W, G, R), of (I, R)."""
        return real[self.images]

    def add(self, total: Tensor | None, rows: slice, gradient: Tensor, like: Tensor) -> Tensor:
        """Add gradients in the images or words `rows` to those in all of them, which are like `like`."""
        if total is None and len(gradient) == len(like):
            return gradient.to(like.dtype)
        total = torch.zeros_like(like) if total is None else total
        total[rows].add_(gradient)  # += would copy the slice onto itself
        return total


class PairTile(NamedTuple):
    """P pairs of an image and its caption, padded to n words. Tensors of words are (P, n, ...)."""

    images: Tensor  # (P,)
    words: Tensor  # (P, n), the caption's last word for padding
    place: Tensor  # (P,) of the scores among all of the pairs
    inside: Tensor  # (P, n, 1) one for a word of the caption, zero for padding
    sizes: Tensor  # (P,) words of each caption

    def affinity(self, queries: Tensor, regions: Tensor) -> Tensor:
        """Products (P, n, R) of queries (P, n, D) with regions (P, R, D); 0 for padding, which then adds nothing."""
        return torch.bmm(queries, regions.mT) * self.inside

    def over_words(self, x: Tensor) -> Tensor:
        """Sums over each caption's words: (P, n, R) -> (P, 1, R)."""
        return x.sum(dim=1, keepdim=True)

    def to_words(self, x: Tensor) -> Tensor:
        """What broadcasts to (P, n, R)."""
        return x

    def by_image(self, x: Tensor) -> Tensor:
        """They are by image already."""
        return x

    def mean(self, x: Tensor) -> Tensor:
        """Means over each caption's words: (P, n) -> (P,)."""
        return x.sum(dim=1) / self.sizes

    def mask(self, real: Tensor) -> Tensor:
        """What broadcasts to (P, n, R), from (I, R) of all images."""
        return real[self.images][:, None]

    def add(self, total: Tensor | None, rows: Tensor, gradient: Tensor, like: Tensor) -> Tensor:
        """Add gradients in the images or words `rows` to those in all of them, which are like `like`."""
        total = torch.zeros_like(like) if total is None else total
        return total.index_add_(0, rows.flatten(), gradient.flatten(0, rows.ndim - 1))


Tile = SharedTile | PairTile


def rows_of_tile(regions: Tensor, dtype: torch.dtype, wide: float, longest: int = 0) -> int:
    """How many (word, image) pairs of regions (I, R, D) make a tile. wide: tensors of D numbers that each takes.

    longest: words of the longest caption, in a tile of pairs, where each pair has copies of its words and regions.
    """
    count, dims = regions.shape[1:]
    if cached := CACHE_BYTES.get(regions.device.type):
        return max(1, cached // (dims * dtype.itemsize))
    wide += OWN * (1 + count / longest) if longest else 0
    return int(max(1, MEMORY_SHARE * memory(regions.device) // (wide * dims * dtype.itemsize + NARROW * count * 4)))


@cache
def memory(device: torch.device) -> int:
    """Bytes of a device."""
    return torch.cuda.get_device_properties(device).total_memory


def shared_tiles(images: int, bags: Bags, rows: int) -> Iterator[SharedTile]:
    """Every image against every caption once. rows: (word, image) pairs of a tile."""
    images_of_tile = min(images, CACHE_IMAGES) if bags.rows.device.type in CACHE_BYTES else images
    ends, first = [0, *bags.lengths.cumsum(0).tolist()], 0
    while first < len(bags.lengths):
        last = max(first + 1, bisect_right(ends, ends[first] + rows // images_of_tile) - 1)
        captions, words = slice(first, last), slice(ends[first], ends[last])
        part, step = bags.part(captions, words), max(1, rows // (ends[last] - ends[first]))
        for image in range(0, images, step):
            block = slice(image, min(image + step, images))
            yield SharedTile(block, words, (block, captions), part)
        first = last


def pair_tiles(images: Tensor, captions: Tensor, bags: Bags, rows: int, dtype: torch.dtype) -> Iterator[PairTile]:
    """Image k against caption k alone, for indices (P,) on the CPU or on the device; the result is (P,).

    dtype: of the words. Pairs known on the CPU are ordered by length, so that little is padded.
    """
    if not len(images):
        return
    device, lengths, longest = bags.rows.device, bags.lengths, int(bags.lengths.max())
    step, places = max(1, rows // longest), torch.arange(len(images), device=captions.device)
    widths = [longest] * -(-len(images) // step)
    if captions.device.type == "cpu":
        places = lengths[captions].argsort(stable=True)
        images, captions = images[places], captions[places]
        widths = [int(some.max()) for some in lengths[captions].split(step)]
    position = bags.rows[:longest]
    parts = (upload(one, device).split(step) for one in (images, captions, places))
    for n, some_images, some, place in zip(widths, *parts, strict=True):
        size = bags.sizes[some]
        words = bags.starts[some, None] + torch.minimum(position[:n], size - 1)
        inside = (position[:n] < size).to(dtype)
        yield PairTile(some_images, words, place, inside[..., None], size[:, 0])
