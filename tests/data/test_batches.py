"""Batches: each pair once an epoch, each image once an evaluation, and the same ones whoever asks."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from lib.data import batches as module
from lib.data.batches import Batch, EpochBatches, ImageBatches, loader, on_device, share_beside_own_image
from lib.data.dataset import open_split
from lib.data.features import DeviceFeatures, FeatureFile
from lib.data.tokenizer import load_tokenizer
from lib.runtime import ROOT
from tests.conftest import TINY_BERT
from tests.data.samples import refusal

BATCH_SIZE, CPU = 16, torch.device("cpu")


@pytest.fixture(scope="module")
def split(tiny_data):
    return open_split(*tiny_data, "train", 16)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(TINY_BERT))


@pytest.fixture(scope="module")
def epoch_batches(split, tokenizer):
    """The batches of an epoch: 120 pairs, of which the last 8 are left out."""

    def make(seed=0, epoch=0, of=split, **options):
        return EpochBatches(of, tokenizer.tokenize(of.captions), tokenizer, BATCH_SIZE, seed, epoch, **options)

    return make


def equal(batch, other):
    return all(torch.equal(tensor, its) for tensor, its in zip(batch, other, strict=True))


@pytest.fixture
def two_workers(monkeypatch):
    """As many workers as asked for, on a machine of one core too."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(2), raising=False)


# Training


def test_an_epoch_visits_every_pair_once_but_for_a_remainder_that_changes(epoch_batches):
    pairs = [epoch_batches(epoch=epoch).pairs for epoch in range(20)]
    assert all(one.shape == (7, BATCH_SIZE) and len(np.unique(one)) == 112 for one in pairs)
    assert set(np.concatenate(pairs).ravel().tolist()) == set(range(120))


def test_a_batch_holds_regions_and_words_of_the_same_pair(epoch_batches, split, tokenizer, monkeypatch):
    monkeypatch.setattr(module, "disturb_words", lambda captions, *_: captions)
    batches = epoch_batches()
    images = split.features.read(np.arange(len(split.features))).reshape(-1, 6, 16)
    for k, pairs in enumerate(batches.pairs):
        batch = batches[k]
        ids, lengths = tokenizer.pad(tokenizer.tokenize([split.captions[pair] for pair in pairs]))
        assert np.array_equal(batch.ids, ids)
        assert np.array_equal(batch.lengths, lengths)
        assert np.array_equal(batch.image_of, split.image_of_caption[pairs])
        of_images = np.split(batch.images.numpy(), np.cumsum(batch.counts.numpy())[:-1])
        for regions, image in zip(of_images, images[split.image_of_caption[pairs]], strict=True):
            assert all((row == image).all(axis=1).any() for row in regions)


@pytest.mark.usefixtures("two_workers")
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_are_the_same_in_any_order_and_with_any_number_of_workers(epoch_batches, workers):
    batches = epoch_batches(seed=3, epoch=2)
    backwards = [batches[k] for k in reversed(range(7))][::-1]
    torch.manual_seed(workers)
    before = torch.get_rng_state()
    loaded = list(loader(batches, workers, CPU))
    assert torch.equal(torch.get_rng_state(), before)  # nothing is drawn from the run's own random state
    assert len(loaded) == 7
    assert all(map(equal, loaded, backwards))


def test_another_seed_epoch_or_number_gives_another_augmentation(epoch_batches):
    batches = [epoch_batches(), epoch_batches(seed=1), epoch_batches(epoch=1)]
    assert len({one.pairs.tobytes() for one in batches}) == 3
    for one in batches:
        one.pairs = np.repeat(batches[0].pairs[:1], 2, axis=0)
    drawn = [batches[0][0], batches[0][1], batches[1][0], batches[2][0]]
    assert not any(equal(drawn[a], drawn[b]) for a in range(4) for b in range(a))


@pytest.mark.parametrize("indexed", [False, True])
def test_the_parts_of_a_batch_put_together_are_the_batch(epoch_batches, indexed):
    whole, *parts = (
        epoch_batches(indexed=indexed, part=part)[3] for part in (slice(None), slice(0, 5), slice(5, 11), slice(11, 16))
    )
    assert torch.equal(torch.cat([part[0] for part in parts]), whole[0])  # images, or their rows
    assert torch.equal(torch.cat([part.ids for part in parts]), whole.ids)
    for part in parts:  # counts and lengths of the whole batch, so that every process pads alike
        assert torch.equal(part.counts, whole.counts)
        assert torch.equal(part.lengths, whole.lengths)
        assert torch.equal(part.image_of, whole.image_of)


def test_the_share_of_pairs_beside_another_caption_of_their_image_is_the_one_that_batches_have():
    captions_of_image = np.random.default_rng(0).integers(1, 8, size=60)
    image_of_caption = np.repeat(np.arange(60), captions_of_image)
    drawn = [np.random.default_rng(k).permutation(image_of_caption)[:40] for k in range(2000)]
    counted = np.mean([(np.bincount(images)[images] > 1).mean() for images in drawn])
    assert share_beside_own_image(image_of_caption, 40) == pytest.approx(counted, rel=0.02)
    assert share_beside_own_image(np.repeat(np.arange(29_000), 5), 128) < 0.01  # Flickr30K
    assert share_beside_own_image(np.arange(9), 9) == 0
    assert share_beside_own_image(np.zeros(9, int), 9) == 1


@pytest.mark.usefixtures("two_workers")
@pytest.mark.parametrize(
    ("workers", "dtype", "repeats"), [(0, np.float32, ()), (0, np.float16, ("train",)), (2, np.float32, ("train",))]
)
def test_features_on_the_device_give_to_the_bit_the_batches_of_features_in_float16(
    epoch_batches, make_data, tmp_path, monkeypatch, workers, dtype, repeats
):
    make_data(tmp_path / "precomp", images={"train": 24}, dtype=dtype, repeats=repeats)
    monkeypatch.setattr("lib.data.features.UPLOAD_BYTES", 5000)
    split = open_split(str(tmp_path), "precomp", "train")
    for batch in (epoch_batches(of=split)[0], ImageBatches(split.features, 3)[0]):
        assert batch.images.numpy().dtype == dtype
    expected = list(on_device(epoch_batches(of=split, half=True), CPU))
    resident = DeviceFeatures(split.features, CPU)
    monkeypatch.delattr(FeatureFile, "read_rows")  # nothing is read from here on
    loaded = loader(epoch_batches(of=split, indexed=True), workers, CPU)
    given = list(on_device(loaded, CPU, resident))
    assert all(isinstance(batch, Batch) and batch.images.dtype == torch.float16 for batch in given)
    assert len(given) == 7
    assert all(map(equal, given, expected))


# Workers


@pytest.mark.usefixtures("two_workers")
def test_shared_memory_without_room_is_one_clear_line(epoch_batches, monkeypatch):
    def full(size):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.UntypedStorage, "_new_shared", full)
    assert len(list(loader(epoch_batches(), 0, CPU))) == 7
    monkeypatch.setattr(module, "get_worker_info", lambda: "a worker")
    message = refusal(lambda: epoch_batches()[0])
    assert message.startswith("--workers: no room in shared memory")
    assert "--workers 0" in message
    assert "--shm-size" in message


def test_a_worker_that_dies_with_a_batch_that_it_has_announced_is_named(epoch_batches, monkeypatch):
    """Before PyTorch has seen that it is dead: the memory of a batch comes from the worker's own socket."""
    batches = iter(loader(epoch_batches(), 1, CPU))
    next(batches)
    time.sleep(1)  # the two batches after it are made ahead
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    (worker,) = multiprocessing.active_children()
    worker.kill()
    worker.join()
    said = iter([True] * 4)
    monkeypatch.setattr(type(worker), "is_alive", lambda self: next(said, False))
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        list(batches)


def test_no_more_workers_than_cores(epoch_batches, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(3), raising=False)
    assert [loader(epoch_batches(), workers, CPU).num_workers for workers in (0, 2, 3, 10)] == [0, 2, 3, 3]


def test_a_program_whose_traceback_still_holds_a_loader_ends_all_the_same(tiny_data):
    """Its workers ignore the SIGTERM by which multiprocessing would end them."""
    program = """
import sys, torch
from lib.cli import program
from lib.data.batches import ImageBatches, loader
from lib.data.dataset import open_split
@program
def main(argv):
    held = iter(loader(ImageBatches(open_split(*sys.argv[1:], "train").features, 2), 1, torch.device("cpu")))
    print(len(next(held).counts))
    raise RuntimeError("a bug")
main()
"""
    command = [sys.executable, "-c", program, *tiny_data]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert (ended.returncode, ended.stdout) == (1, "2\n"), ended.stderr
    assert "RuntimeError: a bug" in ended.stderr


# Evaluation


@pytest.mark.parametrize("name", ["train", "dev"])  # one row an image, and five
@pytest.mark.parametrize("batch_size", [7, 100])
def test_each_image_is_read_once_and_in_order(tiny_data, name, batch_size):
    split = open_split(*tiny_data, name, 16)
    batches = list(loader(ImageBatches(split.features, batch_size), 0, CPU))
    images = len(split.features)
    full, rest = divmod(images, batch_size)
    assert [len(batch.counts) for batch in batches] == [batch_size] * full + [rest] * (rest > 0)
    assert torch.cat([batch.counts for batch in batches]).tolist() == [6] * images
    read = torch.cat([batch.images for batch in batches])
    assert torch.equal(read, torch.from_numpy(split.features.read(np.arange(images))))


# On a GPU


@pytest.mark.parametrize("count", [0, 1, 3])
def test_on_cuda_each_batch_is_copied_ahead_and_waited_for_in_order(monkeypatch, count):
    """With stand-ins for CUDA's streams, so that it runs anywhere: the order in which things are enqueued."""
    stream, happened = Mock(), []
    stream.record_event.side_effect = lambda: happened.append("copy") or happened.count("copy") - 1
    stream.wait_event.side_effect = lambda event: happened.append(f"wait {event}")
    monkeypatch.setattr(module, "_copy_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(module, "_move", lambda batch, *_: Batch(Mock(), Mock(), Mock(), batch, Mock()))
    for batch in on_device(range(count), torch.device("cuda")):
        batch.images.record_stream.assert_called_once_with(stream)
        batch.ids.record_stream.assert_called_once_with(stream)
        happened.append(f"step {batch.lengths}")
    expected = ["copy", "copy", "wait 0", "step 0", "copy", "wait 1", "step 1", "wait 2", "step 2"]
    assert happened == {0: [], 1: ["copy", "wait 0", "step 0"], 3: expected}[count]
    stream.wait_stream.assert_called_once()  # features on the device are there before the first copy
