"""Batches of tensors for training and for evaluation."""

import math
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import InitVar, dataclass, field
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from lib import distributed
from lib.cli import refusing
from lib.data.dataset import Split
from lib.data.features import FeatureFile
from lib.data.images import CHANGES, Look
from lib.data.tokenizer import TokenizedCaptions, Tokenizer
from lib.model.encoders import Pixels

KEEP_REGION = 0.8
THIN_OUT, LOSE_CELL = 0.8, 0.2  # share of the pictures that lose cells, largest probability for one
CHOOSE_WORD = 0.2
MASK_CHOSEN, REPLACE_CHOSEN = 0.5, 0.1  # what happens to a chosen word; the rest is left out
READ_AHEAD = 8  # batches whose features the system is told to fetch beforehand; measured in docs/data.md


def choose_regions(starts: np.ndarray, counts: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Keep each region with probability 0.8, at least one of each image.

    starts, counts: (images,) the row of each image's first region, and how many regions it has. Returns the rows of the
    kept regions (n,), image after image, ascending within each, and how many regions each image keeps (images,).
    """
    keep = rng.random((len(counts), counts.max())) < KEEP_REGION
    keep &= np.arange(keep.shape[1]) < counts[:, None]
    survivor = rng.integers(counts)
    emptied = ~keep.any(axis=1)
    keep[emptied, survivor[emptied]] = True
    return (starts[:, None] + np.arange(keep.shape[1]))[keep], keep.sum(axis=1)


def choose_cells(images: int, cells: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Leave out cells of pictures: with probability 0.8 an image loses each with a probability drawn from 0 to 0.2.

    At least one stays. Returns cells that are kept (n,), counted through all images, and how many of each (images,).
    """
    share = LOSE_CELL * rng.random(images) * (rng.random(images) < THIN_OUT)
    keep = rng.random((images, cells)) >= share[:, None]
    keep[np.arange(images), rng.integers(cells, size=images)] |= ~keep.any(axis=1)
    return np.flatnonzero(keep), keep.sum(axis=1)


def disturb_words(
    captions: TokenizedCaptions, mask_id: int | None, vocab_size: int, rng: np.random.Generator
) -> TokenizedCaptions:
    """Choose each word with probability 0.2; a chosen word is masked (0.5), replaced (0.1) or left out (0.4).

    The pieces of a word share its fate: one mask token, or one random vocabulary entry (any entry), for each piece.
    Where the vocabulary has no mask token (mask_id None), words are left out instead of masked.
    """
    caption = np.repeat(np.arange(len(captions)), np.diff(captions.starts))
    starts_word = np.ones(len(captions.ids), dtype=bool)
    starts_word[1:] = (captions.words[1:] != captions.words[:-1]) | (caption[1:] != caption[:-1])
    word = np.cumsum(starts_word) - 1  # counted over the whole batch

    fate = rng.random(starts_word.sum())[word] / CHOOSE_WORD  # below 1: chosen
    masked = fate < MASK_CHOSEN
    replaced = ~masked & (fate < MASK_CHOSEN + REPLACE_CHOSEN)
    dropped = (fate < 1) & ~replaced & (~masked | (mask_id is None))

    ids = np.where(masked, mask_id or 0, captions.ids)
    ids = np.where(replaced, rng.integers(vocab_size, size=len(ids)), ids)
    lengths = np.bincount(caption[~dropped], minlength=len(captions))
    return TokenizedCaptions(ids[~dropped], captions.words[~dropped], np.concatenate([[0], np.cumsum(lengths)]))


class Batch(NamedTuple):
    """B image-caption pairs of which a process holds its own part; image i of the batch belongs to caption i."""

    images: Tensor | Pixels  # (n, img_dim) region features of the own images, image after image; or (n,) their rows
    counts: Tensor  # (B,) regions of each image of the whole batch, on the CPU
    ids: Tensor  # (own captions, N) token ids, padded beyond `lengths`
    lengths: Tensor  # (B,) tokens of each caption of the whole batch, on the CPU
    image_of: Tensor  # (B,) the number in the split of each pair's image, of the whole batch, on the CPU


class Images(NamedTuple):
    """Consecutive images of a split."""

    images: Tensor  # (n, img_dim) region features, image after image, or uint8 (images, 3, H, W)
    counts: Tensor  # (images,) regions of each


@dataclass(eq=False)
class EpochBatches(Dataset):
    """The training batches of one epoch: every pair once, shuffled and augmented, the last incomplete batch dropped.

    The order of the pairs is a function of (seed, epoch), batch k one of (seed, epoch, k): the number of workers, the
    order of requests and the part of the batch that is asked for change nothing.
    """

    split: InitVar[Split]
    captions: TokenizedCaptions
    tokenizer: Tokenizer
    batch_size: InitVar[int]
    seed: int
    epoch: int
    part: slice = field(default_factory=lambda: slice(None))  # this process's pairs of each batch
    half: bool = False  # features in float16
    indexed: bool = False  # no features: give their rows of DeviceFeatures
    look: Look | None = None  # of the vision model, where images are pictures

    def __post_init__(self, split: Split, batch_size: int):
        self.features, self.image_of_caption, self.read_ahead = split.features, split.image_of_caption, READ_AHEAD
        order = self._rng(0).permutation(len(self.captions))
        self.pairs = order[: len(order) // batch_size * batch_size].reshape(-1, batch_size)

    def _rng(self, stream: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, self.epoch, stream])  # stream 0: order; 1 + k: batch k

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, k: int) -> Batch:
        rng, pairs = self._rng(1 + k), self.pairs[k]
        images = self.image_of_caption[pairs]
        if self.look:
            rows, counts = choose_cells(len(pairs), self.look.cells, rng)
            changes = rng.random((len(pairs), CHANGES))[self.part]
        else:
            rows, counts = choose_regions(self.features.starts[images], self.features.counts[images], rng)
        rows = np.concatenate(np.split(rows, np.cumsum(counts)[:-1])[self.part])
        words = disturb_words(self.captions.select(pairs), self.tokenizer.mask_id, self.tokenizer.vocab_size, rng)
        ids, lengths = self.tokenizer.pad(words)
        rest = map(torch.from_numpy, (counts, ids[self.part], lengths, images))
        if self.look:
            pictures = self.features.read(images[self.part], self.look, changes)
            rows -= (self.part.start or 0) * self.look.cells  # counted from the own pictures
            return Batch(Pixels(pictures, torch.from_numpy(rows)), *rest)
        if self.indexed:
            return Batch(torch.from_numpy(rows), *rest)
        if k + self.read_ahead < len(self):
            self.features.read_ahead(self.image_of_caption[self.pairs[k + self.read_ahead][self.part]])
        return Batch(_read(self.features, rows, self.half), *rest)


def share_beside_own_image(image_of_caption: np.ndarray, batch_size: int) -> float:
    """About the share of a batch's pairs, on average, that have another caption of their image in the batch."""
    captions = np.bincount(image_of_caption)
    beside = (batch_size - 1) / (len(image_of_caption) - 1)  # how many of the other pairs are in the batch
    return float(np.average(1 - (1 - beside) ** (captions - 1), weights=captions))


class ImageBatches(Dataset):
    """All images of a split in order, `batch_size` at a time, with all their regions."""

    def __init__(self, features: Any, batch_size: int, half: bool = False, look: Look | None = None):
        """features: FeatureFile, or PictureFiles with the vision model's look."""
        self.features, self.batch_size, self.half, self.look = features, batch_size, half, look

    def __len__(self) -> int:
        return -(-len(self.features) // self.batch_size)

    def __getitem__(self, k: int) -> Images:
        if self.look:
            pictures = np.arange(len(self.features))[k * self.batch_size : (k + 1) * self.batch_size]
            return Images(self.features.read(pictures, self.look), torch.full((len(pictures),), self.look.cells))
        starts = self.features.starts[k * self.batch_size : (k + 1) * self.batch_size + 1]
        images = _read(self.features, np.arange(starts[0], starts[-1]), self.half)
        return Images(images, torch.from_numpy(np.diff(starts)))


def _read(features: FeatureFile, rows: np.ndarray, half: bool) -> Tensor:
    """Features (n, img_dim) of rows (n,), in float16 if `half`, else in the file's precision."""
    dtype = torch.float16 if half or features.dtype == np.float16 else torch.float32
    read = allocate((len(rows), features.img_dim), dtype)
    features.read_rows(rows, out=read.numpy())
    return read


def allocate(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An empty tensor; in a worker it lies in shared memory, which saves a copy on its way to the main process."""
    if get_worker_info() is None:
        return torch.empty(shape, dtype=dtype)
    with refusing("--workers: no room in shared memory for a batch; use --workers 0, or docker run --shm-size=8g"):
        storage = torch.UntypedStorage._new_shared(math.prod(shape) * dtype.itemsize)  # as in default_collate
    return torch.empty(0, dtype=dtype).set_(storage).view(shape)


def loader(batches: Dataset, workers: int, device: torch.device) -> DataLoader:
    """Load batches in order by up to `workers` processes, but no more than there are cores for this process."""
    return _Loader(
        batches,
        batch_size=None,
        num_workers=min(workers, distributed.own_cores()),
        pin_memory=device.type == "cuda",
        worker_init_fn=_leave_signals_to_the_main_process,
        generator=torch.Generator(),  # without one of its own, iter() draws from the global random state
    )


class _Loader(DataLoader):
    """A loader that says "DataLoader worker" of each that has died, as PyTorch does of those it has seen ending."""

    def __iter__(self) -> Any:
        try:
            yield from super().__iter__()
        except (ConnectionError, EOFError) as error:  # a batch's memory is asked for from the worker that made it
            raise RuntimeError("DataLoader worker died with a batch that it had announced") from error


def in_threads(work: Callable, items: Iterable, threads: int, alone: bool = False) -> Iterator:
    """work(item) of each item, in order; so many threads do it in advance, this one where there are none.

    alone: no operation has threads of its own, which would wait for each other, and its bits depend on their number.
    """
    if not threads:
        yield from map(work, items)
        return
    before, waiting = torch.get_num_threads(), deque[Future]()
    executor = ThreadPoolExecutor(threads, initializer=partial(torch.set_num_threads, 1) if alone else None)
    try:
        for item in items:
            waiting.append(executor.submit(work, item))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        executor.shutdown(cancel_futures=True)
        torch.set_num_threads(before)


def on_device(batches: Iterable[Batch], device: torch.device, resident: Any = None) -> Iterator[Batch]:
    """Batches with images and ids on a device; the rest stays on the CPU, since Python takes shapes from it.

    resident: DeviceFeatures that rows are of. On CUDA a batch is copied on another stream while the last one computes.
    """
    if device.type != "cuda":
        yield from (_move(batch, device, resident) for batch in batches)
        return
    copies, ahead = _copy_stream(device), None
    copies.wait_stream(torch.cuda.current_stream(device))  # which may still be filling `resident`
    if resident:
        resident.rows.record_stream(copies)
    for batch in batches:
        with torch.cuda.stream(copies):
            moved = _move(batch, device, resident), copies.record_event()
        if ahead:
            yield _hand_over(*ahead)
        ahead = moved
    if ahead:
        yield _hand_over(*ahead)


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream for all epochs: each new one would keep freed memory of its own."""
    return torch.cuda.Stream(device)


def _move(batch: Batch, device: torch.device, resident: Any) -> Batch:
    if isinstance(batch.images, Pixels):
        images: Any = Pixels(*(tensor.to(device, non_blocking=True) for tensor in batch.images))
    else:
        images = batch.images.to(device, non_blocking=True)
        images = images if images.is_floating_point() else resident.rows.index_select(0, images)
    return batch._replace(images=images, ids=batch.ids.to(device, non_blocking=True))


def _hand_over(batch: Batch, copied: torch.cuda.Event) -> Batch:
    """Have the computing stream wait for the copy, and the batch's memory stay until that stream is done with it."""
    stream = torch.cuda.current_stream(batch.ids.device)
    stream.wait_event(copied)
    images = batch.images if isinstance(batch.images, Pixels) else (batch.images,)
    for tensor in (*images, batch.ids):
        tensor.record_stream(stream)
    return batch


def _leave_signals_to_the_main_process(_worker: int) -> None:
    """Ctrl-C and a scheduler's SIGTERM reach workers too; they go on until the main process ends them, see lib.cli."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
