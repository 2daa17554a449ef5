"""Pairs of images and captions in tiles whose captions all have one length, so that nothing is padded."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# The largest tensor of a tile, (word, image) pairs x D numbers: it stays in a CPU's cache, it fills a GPU.
TILE_BYTES = {"cpu": 2**23, "cuda": 2**27}
# Images of a tile, where there are as many.
TILE_IMAGES = {"cpu": 8, "cuda": 32}


class Tile(NamedTuple):
    """G images, each against c captions of n words: either the same captions for all (1) or each image its own (G)."""

    images: slice | Tensor  # consecutive ones where they share captions, else indices (G,)
    words: Tensor  # (1 or G, c, n) indices of the captions' words among all words
    places: Tensor  # (G, c) where the scores belong in the flattened result


def rows_of_tile(device: torch.device, dtype: torch.dtype, dims: int) -> int:
    """How many (word, image) pairs make a tile on a device."""
    return max(1, TILE_BYTES.get(device.type, TILE_BYTES["cuda"]) // (dims * dtype.itemsize))


def all_tiles(images: int, lengths: Tensor, rows: int, device: torch.device) -> Iterator[Tile]:
    """Every image against every caption once. lengths: (C,), on the CPU; rows: (word, image) pairs of a tile."""
    images_of_tile = min(images, TILE_IMAGES.get(device.type, TILE_IMAGES["cuda"]))
    starts = lengths.cumsum(0) - lengths
    for captions, words in _group_by_length(lengths, starts, max(1, rows // images_of_tile), device):
        first, words = 0, words[None]
        for block in torch.arange(images, device=device).split(max(1, rows // words.numel())):
            places = block[:, None] * len(lengths) + captions
            yield Tile(slice(first, first + len(block)), words, places)
            first += len(block)


def pair_tiles(images: Tensor, captions: Tensor, lengths: Tensor, rows: int, device: torch.device) -> Iterator[Tile]:
    """Image k against caption k alone, for indices (P,) on the CPU; the result is (P,)."""
    starts, images = lengths.cumsum(0) - lengths, _upload(images, device)
    for pairs, words in _group_by_length(lengths[captions], starts[captions], rows, device):
        yield Tile(images[pairs], words[:, None], pairs[:, None])


def _group_by_length(
    lengths: Tensor, starts: Tensor, words: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Indices (c,) of entries that have one length n, at most `words` words in all, and the words' indices (c, n).

    All indices go to the device at once: were each group's sent alone, Python would wait for the device each time.
    """
    ordered, order = lengths.sort(stable=True)
    ends = ordered.cumsum(0)
    shift = torch.repeat_interleave(starts[order] - (ends - ordered), ordered)
    indices, order = _upload(torch.arange(len(shift)) + shift, device), _upload(order, device)
    first = begin = 0
    for length, count in zip(*(one.tolist() for one in ordered.unique_consecutive(return_counts=True)), strict=True):
        step = max(1, words // length)
        for size in (min(step, count - done) for done in range(0, count, step)):
            end = begin + size * length
            yield order[first : first + size], indices[begin:end].view(size, length)
            first, begin = first + size, end


def _upload(indices: Tensor, device: torch.device) -> Tensor:
    return indices.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else indices
