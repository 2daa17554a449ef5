"""Batches of tensors for training and for evaluation."""

import atexit
import math
import multiprocessing
import os
import signal
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from lib import distributed
from lib.cli import InputError, reason
from lib.data.dataset import Split
from lib.data.features import FeatureFile
from lib.data.tokenizer import TokenizedCaptions, Tokenizer

KEEP_REGION = 0.8
CHOOSE_WORD = 0.2
# What happens to a chosen word; the rest is left out.
MASK_CHOSEN, REPLACE_CHOSEN = 0.5, 0.1


def choose_regions(starts: np.ndarray, counts: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Keep each region with probability 0.8, at least one of each image.

    starts, counts: (images,) number of each image's first region, and how many it has. Returns the numbers of the kept
    regions, one image after the other, ascending, and how many are kept (images,).
    """
    keep = rng.random((len(counts), counts.max())) < KEEP_REGION
    keep &= np.arange(keep.shape[1]) < counts[:, None]
    survivor = rng.integers(counts)
    emptied = ~keep.any(axis=1)
    keep[emptied, survivor[emptied]] = True
    return (starts[:, None] + np.arange(keep.shape[1]))[keep], keep.sum(axis=1)


def disturb_words(
    captions: TokenizedCaptions, mask_id: int, vocab_size: int, rng: np.random.Generator
) -> TokenizedCaptions:
    """Choose each word with probability 0.2; a chosen one is masked (0.5), replaced (0.1) or left out (0.4).

    A word's pieces share its fate: one [MASK] or one random vocabulary entry, any entry, for each piece.
    """
    caption = np.repeat(np.arange(len(captions)), np.diff(captions.starts))
    starts_word = np.ones(len(captions.ids), dtype=bool)
    starts_word[1:] = (captions.words[1:] != captions.words[:-1]) | (caption[1:] != caption[:-1])
    word = np.cumsum(starts_word) - 1  # counted over the whole batch

    fate = rng.random(starts_word.sum())[word] / CHOOSE_WORD  # below 1: chosen
    masked = fate < MASK_CHOSEN
    replaced = ~masked & (fate < MASK_CHOSEN + REPLACE_CHOSEN)
    dropped = ~masked & ~replaced & (fate < 1)

    ids = np.where(masked, mask_id, captions.ids)
    ids = np.where(replaced, rng.integers(vocab_size, size=len(ids)), ids)
    lengths = np.bincount(caption[~dropped], minlength=len(captions))
    return TokenizedCaptions(ids[~dropped], captions.words[~dropped], np.concatenate([[0], np.cumsum(lengths)]))


READ_AHEAD = 8  # batches that the system is told of beforehand; see docs/data.md


class Batch(NamedTuple):
    """B image-caption pairs, or the part of them that is one process's; image i belongs to caption i."""

    features: (
        Tensor  # (n, img_dim) of the part's regions, one image after the other; or their numbers in ResidentFeatures
    )
    counts: Tensor  # (B,) regions of each image of the whole batch
    ids: Tensor  # (b, N) token ids of the part's captions, 0 beyond `lengths`
    lengths: Tensor  # (B,) tokens of each caption of the whole batch


class Images(NamedTuple):
    """Consecutive images of a split."""

    features: Tensor  # (n, img_dim) of all regions, one image after the other
    counts: Tensor  # (images,) regions of each


class EpochBatches(Dataset):
    """The training batches of one epoch: every pair once, shuffled and augmented, the last incomplete batch dropped.

    Batch k is a function of (seed, epoch, k) alone, whoever asks for it, for whatever part and in whatever order.
    """

    def __init__(
        self,
        split: Split,
        captions: TokenizedCaptions,
        tokenizer: Tokenizer,
        batch_size: int,
        seed: int,
        epoch: int,
        half: bool = False,
        resident: bool = False,
        part: slice = slice(None),
    ):
        """half: features in float16. resident: none are read, batches hold the numbers of the regions instead.

        part: the pairs of each batch that are this process's.
        """
        self.features, self.image_of_caption = split.features, split.image_of_caption
        self.captions, self.tokenizer = captions, tokenizer
        self.seed, self.epoch = seed, epoch
        self.half, self.resident, self.part = half, resident, part
        order = self._rng(0).permutation(len(captions))
        self.pairs = order[: len(order) // batch_size * batch_size].reshape(-1, batch_size)

    def _rng(self, stream: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, self.epoch, stream])  # stream 0: order; 1 + k: batch k

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, k: int) -> Batch:
        rng, pairs = self._rng(1 + k), self.pairs[k]
        images = self.image_of_caption[pairs]
        rows, counts = choose_regions(self.features.starts[images], self.features.counts[images], rng)
        rows = np.concatenate(np.split(rows, np.cumsum(counts)[:-1])[self.part])
        features = torch.from_numpy(rows) if self.resident else self._read(k, rows)
        words = disturb_words(self.captions.select(pairs), self.tokenizer.mask_id, self.tokenizer.vocab_size, rng)
        ids, lengths = self.tokenizer.pad(words)
        return Batch(features, *map(torch.from_numpy, (counts, ids[self.part], lengths)))

    def _read(self, k: int, rows: np.ndarray) -> Tensor:
        if k + READ_AHEAD < len(self):
            self.features.read_ahead(self.image_of_caption[self.pairs[k + READ_AHEAD][self.part]])
        return _read(self.features, rows, self.half)


class ImageBatches(Dataset):
    """All regions of consecutive images, each image once."""

    def __init__(self, features: FeatureFile, batch_size: int, half: bool = False):
        self.features, self.batch_size, self.half = features, batch_size, half

    def __len__(self) -> int:
        return -(-len(self.features) // self.batch_size)

    def __getitem__(self, k: int) -> Images:
        starts = self.features.starts[k * self.batch_size : (k + 1) * self.batch_size + 1]
        features = _read(self.features, np.arange(starts[0], starts[-1]), self.half)
        return Images(features, torch.from_numpy(np.diff(starts)))


def _read(features: FeatureFile, rows: np.ndarray, half: bool) -> Tensor:
    """Features (n, img_dim) of regions."""
    dtype = torch.float16 if half or features.dtype == np.float16 else torch.float32
    read = _allocate((len(rows), features.img_dim), dtype)
    features.read_into(read.numpy(), rows)
    return read


def _allocate(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """An empty tensor; of a worker in memory that the main process sees too, so that it need not be copied there."""
    if get_worker_info() is None:
        return torch.empty(shape, dtype=dtype)
    try:  # as PyTorch's own default_collate does it
        storage = torch.UntypedStorage._new_shared(math.prod(shape) * dtype.itemsize)
    except RuntimeError as error:
        raise InputError(
            f"--workers: no room in shared memory for a batch ({reason(error)}); use --workers 0, or start the "
            "container with more of it (docker run --shm-size=8g)"
        ) from None
    return torch.empty(0, dtype=dtype).set_(storage, 0, shape)


def loader(batches: Dataset, workers: int, device: torch.device) -> DataLoader:
    """Read whole batches in order with up to `workers` processes, no more than the job's process has cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return DataLoader(
        batches,
        batch_size=None,
        num_workers=min(workers, max(1, cores // distributed.local_count())),
        pin_memory=device.type == "cuda",
        worker_init_fn=_leave_signals_to_the_main_process,
        generator=torch.Generator(),  # else opening a loader would draw from the run's random state
    )


def on_device(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Batches on a device, but for counts and lengths, from which Python takes shapes.

    On CUDA a batch is copied, by a stream of its own, while the step before it is computed.
    """
    if device.type != "cuda":
        for batch in batches:
            yield _move(batch, device)
        return
    copies, waiting = torch.cuda.Stream(device), None
    for batch in batches:
        with torch.cuda.stream(copies):
            batch = _move(batch, device)
        copied = copies.record_event()
        if waiting:
            yield _hand_over(*waiting)
        waiting = batch, copied
    if waiting:
        yield _hand_over(*waiting)


def _move(batch: Batch, device: torch.device) -> Batch:
    features, ids = (tensor.to(device, non_blocking=True) for tensor in (batch.features, batch.ids))
    return batch._replace(features=features, ids=ids)


def _hand_over(batch: Batch, copied: torch.cuda.Event) -> Batch:
    """The batch, for the stream that computes: it waits for the copy, and its memory is not reused before."""
    stream = torch.cuda.current_stream(batch.features.device)
    stream.wait_event(copied)
    for tensor in (batch.features, batch.ids):
        tensor.record_stream(stream)
    return batch


def _leave_signals_to_the_main_process(_worker: int) -> None:
    """Ctrl-C and a scheduler's SIGTERM reach workers too; they go on until the main process lets them end."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


@atexit.register  # after multiprocessing's own, so that it runs before
def _end_workers() -> None:
    """Workers of a loader that something still holds at the end of the program, a traceback for instance.

    multiprocessing would send them SIGTERM, which they ignore, and wait for ever.
    """
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()
