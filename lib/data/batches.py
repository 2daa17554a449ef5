"""Batches of tensors for training and for evaluation."""

import os
import signal
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lib.data.augment import choose_regions, disturb_words, gather_regions
from lib.data.precomp import FeatureFile, Split
from lib.data.resident import places_of
from lib.data.tokenizer import TokenizedCaptions, Tokenizer


class Batch(NamedTuple):
    """B image-caption pairs; row i of the images belongs to caption i."""

    features: (
        Tensor  # (B, R, img_dim) in the file's precision, zero rows beyond `counts`; or places of ResidentFeatures
    )
    counts: Tensor  # (B,) regions of each image
    ids: Tensor  # (B, N) token ids, 0 beyond `lengths`
    lengths: Tensor  # (B,) tokens of each caption


class EpochBatches(Dataset):
    """The training batches of one epoch: every pair once, shuffled and augmented, the last incomplete batch dropped.

    Batch k is a function of (seed, epoch, k) alone, whoever asks for it and in whatever order.
    """

    def __init__(
        self,
        split: Split,
        captions: TokenizedCaptions,
        tokenizer: Tokenizer,
        batch_size: int,
        seed: int,
        epoch: int,
        resident: bool = False,
    ):
        """resident: the features are on the device already: none are read, batches hold their places (B, R) instead."""
        self.resident = resident
        self.split, self.captions, self.tokenizer = split, captions, tokenizer
        self.seed, self.epoch = seed, epoch
        order = self._rng(0).permutation(len(captions))
        self.pairs = order[: len(order) // batch_size * batch_size].reshape(-1, batch_size)

    def _rng(self, stream: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, self.epoch, stream])  # stream 0: order; 1 + k: batch k

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, k: int) -> Batch:
        rng, pairs = self._rng(1 + k), self.pairs[k]
        images, regions = self.split.image_of_caption[pairs], self.split.features.regions
        order, counts = choose_regions(len(images), regions, rng)
        if self.resident:
            features = places_of(images, order, regions)
        else:
            features = gather_regions(self.split.features.read(images), order)
        words = disturb_words(self.captions.select(pairs), self.tokenizer.mask_id, self.tokenizer.vocab_size, rng)
        return Batch(*map(torch.from_numpy, (features, counts, *self.tokenizer.pad(words))))


class ImageBatches(Dataset):
    """Features of consecutive images, each image once: item k is (images, R, img_dim)."""

    def __init__(self, features: FeatureFile, batch_size: int):
        self.features, self.batch_size = features, batch_size

    def __len__(self) -> int:
        return -(-len(self.features) // self.batch_size)

    def __getitem__(self, k: int) -> Tensor:
        first = k * self.batch_size
        return torch.from_numpy(self.features.read(np.arange(first, min(first + self.batch_size, len(self.features)))))


def loader(batches: Dataset, workers: int, device: torch.device) -> DataLoader:
    """Read whole batches in order with up to `workers` processes, no more than there are cores."""
    return DataLoader(
        batches,
        batch_size=None,
        num_workers=min(
            workers, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        ),
        pin_memory=device.type == "cuda",
        worker_init_fn=_leave_signals_to_the_main_process,
        generator=torch.Generator(),  # else opening a loader would draw from the run's random state
    )


def on_device(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Batches on a device, but for the lengths, from which Python takes shapes.

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
    moved = (tensor.to(device, non_blocking=True) for tensor in batch[:-1])
    return Batch(*moved, batch.lengths)


def _hand_over(batch: Batch, copied: torch.cuda.Event) -> Batch:
    """The batch, for the stream that computes: it waits for the copy, and its memory is not reused before."""
    stream = torch.cuda.current_stream(batch.features.device)
    stream.wait_event(copied)
    for tensor in batch[:-1]:
        tensor.record_stream(stream)
    return batch


def _leave_signals_to_the_main_process(_worker: int) -> None:
    """Ctrl-C and a scheduler's SIGTERM reach workers too; they go on until the main process lets them end."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
