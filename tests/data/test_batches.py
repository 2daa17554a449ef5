"""Batches: each pair once an epoch, each image once an evaluation, and the same ones whoever asks."""

import os
import subprocess
import sys
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from lib.cli import InputError
from lib.data import batches
from lib.data.batches import Batch, EpochBatches, ImageBatches, loader, on_device
from lib.data.dataset import open_split
from lib.data.tokenizer import load_tokenizer
from lib.runtime import ROOT
from tests.conftest import TINY_BERT

BATCH_SIZE, CPU = 16, torch.device("cpu")


@pytest.fixture(scope="module")
def split(tiny_data):
    return open_split(*tiny_data, "train", 16)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(TINY_BERT), 64, 10**6)


@pytest.fixture(scope="module")
def epoch_batches(split, tokenizer):
    """The batches of an epoch: 120 pairs, of which the last 8 are left out."""
    captions = tokenizer.tokenize(split.captions)
    return lambda seed=0, epoch=0: EpochBatches(split, captions, tokenizer, BATCH_SIZE, seed, epoch)


def equal(batch, other):
    return all(torch.equal(tensor, its) for tensor, its in zip(batch, other, strict=True))


@pytest.fixture
def two_workers(monkeypatch):
    """As many workers as asked for, on a machine of one core too."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(2), raising=False)


# Training


@pytest.mark.parametrize("resident", [False, True])
def test_parts_of_a_batch_put_together_are_the_batch(split, tokenizer, resident):
    captions = tokenizer.tokenize(split.captions)
    whole, *parts = (
        EpochBatches(split, captions, tokenizer, BATCH_SIZE, 0, 0, resident=resident, part=part)[3]
        for part in (slice(None), slice(0, 5), slice(5, 11), slice(11, 16))
    )
    assert torch.equal(torch.cat([part.features for part in parts]), whole.features)
    assert torch.equal(torch.cat([part.ids for part in parts]), whole.ids)
    for part in parts:  # of all pairs: every process pads and counts alike
        assert torch.equal(part.counts, whole.counts)
        assert torch.equal(part.lengths, whole.lengths)


def test_an_epoch_visits_every_pair_once_but_for_the_remainder(epoch_batches):
    batches = epoch_batches()
    assert len(batches) == 120 // BATCH_SIZE
    pairs = batches.pairs.ravel()
    assert len(set(pairs.tolist())) == len(pairs) == 112
    assert set(pairs.tolist()) <= set(range(120))


def test_other_epochs_leave_out_other_pairs(epoch_batches):
    seen = {pair for epoch in range(20) for pair in epoch_batches(epoch=epoch).pairs.ravel().tolist()}
    assert seen == set(range(120))


def test_a_batch_holds_regions_and_words_of_the_same_pair(epoch_batches, split, tokenizer, monkeypatch):
    monkeypatch.setattr("lib.data.batches.disturb_words", lambda captions, *_: captions)
    batches = epoch_batches()
    images = split.features.read(np.arange(len(split.features))).reshape(-1, 6, 16)
    for k, pairs in enumerate(batches.pairs):
        features, counts, ids, lengths = batches[k]
        expected_ids, expected_lengths = tokenizer.pad(tokenizer.tokenize([split.captions[pair] for pair in pairs]))
        assert np.array_equal(ids, expected_ids)
        assert np.array_equal(lengths, expected_lengths)
        assert features.shape == (counts.sum(), 16)
        of_images = np.split(features.numpy(), np.cumsum(counts.numpy())[:-1])
        for regions, image in zip(of_images, images[split.image_of_caption[pairs]], strict=True):
            assert all((row == image).all(axis=1).any() for row in regions)


def test_a_batch_depends_on_seed_epoch_and_its_number_only(epoch_batches):
    forwards, backwards = epoch_batches(), epoch_batches()
    numbers = range(len(forwards))
    in_order = [forwards[k] for k in numbers]
    torch.manual_seed(7)
    np.random.seed(7)
    reverse = [backwards[k] for k in reversed(numbers)][::-1]
    assert all(map(equal, in_order, reverse))
    assert all(map(equal, in_order, [forwards[k] for k in numbers]))


@pytest.mark.usefixtures("two_workers")
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_the_loader_gives_the_same_batches_with_any_number_of_workers(epoch_batches, workers):
    batches = epoch_batches(seed=3, epoch=2)
    loaded = list(loader(batches, workers, CPU))
    assert len(loaded) == len(batches)
    assert all(equal(batch, batches[k]) for k, batch in enumerate(loaded))


@pytest.mark.parametrize("other", [{"seed": 1}, {"epoch": 1}])
def test_another_seed_or_epoch_gives_another_order_and_other_augmentation(epoch_batches, other):
    batches, others = epoch_batches(), epoch_batches(**other)
    assert not np.array_equal(batches.pairs, others.pairs)
    others.pairs = batches.pairs
    assert not any(map(equal, [batches[k] for k in range(7)], [others[k] for k in range(7)]))


def test_batches_of_an_epoch_are_augmented_differently(epoch_batches):
    batches = epoch_batches()
    batches.pairs = np.repeat(batches.pairs[:1], 2, axis=0)
    assert not equal(batches[0], batches[1])


@pytest.mark.usefixtures("two_workers")
@pytest.mark.parametrize("workers", [0, 2])
def test_loading_leaves_the_random_state_of_the_run_untouched(epoch_batches, workers):
    before = torch.get_rng_state()
    for _ in loader(epoch_batches(), workers, CPU):
        pass
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.usefixtures("two_workers")
def test_shared_memory_without_room_is_one_clear_line(epoch_batches, monkeypatch):
    def full(size):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.UntypedStorage, "_new_shared", full)
    assert len(list(loader(epoch_batches(), 0, CPU))) == 7
    with pytest.raises(InputError, match=r"--workers: no room in shared memory .* --workers 0.* --shm-size"):
        list(loader(epoch_batches(), 1, CPU))


def test_no_more_workers_than_cores(epoch_batches, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(3), raising=False)
    assert [loader(epoch_batches(), workers, CPU).num_workers for workers in (0, 2, 3, 10)] == [0, 2, 3, 3]


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_features_keep_the_precision_of_the_file(make_data, tmp_path, tokenizer, dtype):
    make_data(tmp_path / "precomp", images={"train": 4}, dtype=dtype)
    split = open_split(str(tmp_path), "precomp", "train", 16)
    expected = {np.float16: torch.float16, np.float32: torch.float32}[dtype]
    batches = EpochBatches(split, tokenizer.tokenize(split.captions), tokenizer, 20, 0, 0)
    assert batches[0].features.dtype == expected
    assert ImageBatches(split.features, 3)[0].features.dtype == expected


def test_a_program_that_still_holds_a_loader_ends_all_the_same(tiny_data):
    """Its workers ignore the SIGTERM by which multiprocessing would end them."""
    program = """
import sys, torch
from lib.data.batches import ImageBatches, loader
from lib.data.dataset import open_split
held = iter(loader(ImageBatches(open_split(*sys.argv[1:], "train").features, 2), 1, torch.device("cpu")))
print(len(next(held).counts))
"""
    command = [sys.executable, "-c", program, *tiny_data]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert (ended.returncode, ended.stdout) == (0, "2\n"), ended.stderr


# Evaluation


@pytest.mark.usefixtures("two_workers")
@pytest.mark.parametrize("name", ["train", "dev"])  # one row an image, and five
@pytest.mark.parametrize("batch_size", [1, 4, 7, 100])
@pytest.mark.parametrize("workers", [0, 2])
def test_each_image_is_read_once_and_in_order(tiny_data, name, batch_size, workers):
    split = open_split(*tiny_data, name, 16)
    batches = list(loader(ImageBatches(split.features, batch_size), workers, CPU))
    images = len(split.features)
    full, rest = divmod(images, batch_size)
    assert [len(batch.counts) for batch in batches] == [batch_size] * full + [rest] * (rest > 0)
    assert all((batch.counts == 6).all() for batch in batches)
    features = torch.cat([batch.features for batch in batches])
    assert torch.equal(features, torch.from_numpy(split.features.read(np.arange(images))))
    assert len(features.unique(dim=0)) == 6 * images == 6 * len(split.captions) / 5


@pytest.mark.parametrize("count", [0, 1, 5])
def test_on_cuda_each_batch_is_copied_ahead_and_waited_for_in_order(monkeypatch, count):
    """With stand-ins for CUDA's streams, so that it runs anywhere: the order in which things are enqueued."""
    happened = []

    class Stream:
        def record_event(self):
            happened.append("copied")
            return len([what for what in happened if what == "copied"]) - 1

        def wait_event(self, event):
            happened.append(f"wait {event}")

    class Part:
        device = "cuda"

        def record_stream(self, stream):
            happened.append("keep")

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(batches, "_move", lambda batch, device: Batch(Part(), Part(), Part(), batch))
    for batch in on_device(range(count), torch.device("cuda")):
        happened.append(f"step {batch.lengths}")
    of_step = lambda k: [f"wait {k}", *["keep"] * 2, f"step {k}"]  # noqa: E731
    expected = [what for k in range(1, count) for what in ("copied", *of_step(k - 1))]
    assert happened == (["copied", *expected, *of_step(count - 1)] if count else [])
