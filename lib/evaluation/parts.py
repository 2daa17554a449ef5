"""Parts of a split: what is ranked among itself, what each process of a job has, what is computed at a time.

Images are encoded and scored in blocks, captions are encoded within the block of their images and scored in chunks.
Blocks and chunks are the same for any number of processes, each of which has whole blocks: so no number depends on how
many there are, not in the last bit either.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from lib import collectives, distributed
from lib.cli import InputError

BLOCK = 64  # images
# Captions whose words every process has at a time: few, for they are 14 words each, 120 MB in 1024 dimensions; many, so
# that those of one length, which are scored together, fill the tiles.
CHUNK = 2048


class Part(NamedTuple):
    """Consecutive images and their captions."""

    images: slice
    captions: slice


class Shares(NamedTuple):
    """The parts of a split that the processes of a job have. Where there is but one, nothing is exchanged."""

    parts: Sequence[Part]  # in the order of processes; empty ones, too, where there are more processes than blocks
    own: int  # which of them is this process's

    @property
    def mine(self) -> Part:
        return self.parts[self.own]

    def add_up(self, tensor: Tensor) -> Tensor:
        """The sum of all processes' tensors; in place."""
        return collectives.add_up(tensor) if len(self.parts) > 1 else tensor

    def gather_images(self, scores: Tensor) -> Tensor:
        """What all processes have of their own images: (own images, ...) -> (images, ...)."""
        return self._gather(scores, [count(part.images) for part in self.parts])

    def gather_captions(self, scores: Tensor) -> Tensor:
        """What all processes have of their own captions: (own captions, ...) -> (captions, ...)."""
        return self._gather(scores, [count(part.captions) for part in self.parts])

    def _gather(self, rows: Tensor, sizes: list[int]) -> Tensor:
        return collectives.gather(rows, sizes) if len(self.parts) > 1 else rows


def share_out(images: int, image_of_caption: np.ndarray) -> Shares:
    """Divide a split among the job's processes, in whole blocks. image_of_caption: (captions,), ascending."""
    of_processes = collectives.divide(-(-images // BLOCK), distributed.world_size())
    edges = [0, *(min(blocks.stop * BLOCK, images) for blocks in of_processes)]
    return Shares(_between(edges, image_of_caption), distributed.rank())


def unshared(images: int, captions: int) -> Shares:
    """All of a split as one process's share."""
    return Shares([whole(images, captions)], 0)


def whole(images: int, captions: int) -> Part:
    """All of a split."""
    return Part(slice(0, images), slice(0, captions))


def folds(number: int, images: int, image_of_caption: np.ndarray) -> list[Part]:
    """Equal consecutive parts of a split, each with its own captions. Raises InputError where they cannot be equal."""
    if images % number:
        raise InputError(f"--fold5: {images} images do not divide into {number} equal folds")
    return _between(np.arange(number + 1) * (images // number), image_of_caption)


def blocks_of(share: Part, image_of_caption: np.ndarray) -> list[Part]:
    """The blocks of a share, each with its captions."""
    edges = [*range(share.images.start, share.images.stop, BLOCK), share.images.stop]
    return _between(edges, image_of_caption)


def blocks(images: int) -> list[slice]:
    """The blocks of some images, counted from their first."""
    return _cut(images, BLOCK)


def chunks(captions: int) -> list[slice]:
    """The chunks of all captions."""
    return _cut(captions, CHUNK)


def images_at_a_time(batch_size: int) -> int:
    """The largest number up to `batch_size` of which a block is a multiple."""
    return max(size for size in range(1, min(batch_size, BLOCK) + 1) if BLOCK % size == 0)


def count(part: slice) -> int:
    """How many consecutive things there are."""
    return part.stop - part.start


def overlap(one: slice, other: slice) -> slice:
    """What is in both; an empty slice where nothing is."""
    first = max(one.start, other.start)
    return slice(first, max(first, min(one.stop, other.stop)))


def within(part: slice, whole: slice) -> slice:
    """A part counted from the start of what it is a part of."""
    return slice(part.start - whole.start, part.stop - whole.start)


def _between(edges: Sequence[int], image_of_caption: np.ndarray) -> list[Part]:
    """Parts from each edge to the next one, given as images."""
    captions = np.searchsorted(image_of_caption, edges)
    return [
        Part(slice(*map(int, edges[k : k + 2])), slice(*map(int, captions[k : k + 2]))) for k in range(len(edges) - 1)
    ]


def _cut(total: int, size: int) -> list[slice]:
    return [slice(first, min(first + size, total)) for first in range(0, total, size)]
