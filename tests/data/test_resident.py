"""Features kept on the device: the same batches to the bit, no reading, one clear line where they cannot be."""

import os

import numpy as np
import pytest
import torch

from lib.cli import InputError
from lib.data import features as resident
from lib.data.batches import EpochBatches, loader
from lib.data.dataset import open_split
from lib.data.features import FeatureFile, ResidentFeatures
from lib.data.tokenizer import load_tokenizer
from tests.conftest import TINY_BERT

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(TINY_BERT), 64, 10**6)


@pytest.fixture
def open_train(make_data, tmp_path):
    """Writes a data set and opens its train split."""

    def opening(name="some_precomp", spoil=None, **options):
        folder = make_data(tmp_path / name, images={"train": 24}, **options)
        if spoil:
            features = np.load(folder / "train_ims.npy")
            spoil(features)
            np.save(folder / "train_ims.npy", features)
        return open_split(str(tmp_path), name, "train", 16)

    return opening


def batches_of(split, tokenizer, **options):
    return EpochBatches(split, tokenizer.tokenize(split.captions), tokenizer, 16, seed=3, epoch=1, **options)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("repeats", [(), ("train",)], ids=["once", "five times in a row"])
@pytest.mark.parametrize("block_bytes", [1, 5000, 2**26])
def test_batches_equal_those_of_features_rounded_to_float16_to_the_bit(
    open_train, tokenizer, monkeypatch, dtype, repeats, block_bytes
):
    monkeypatch.setattr(resident, "BLOCK_BYTES", block_bytes)
    split = open_train("kept", dtype=dtype, repeats=repeats)
    features = ResidentFeatures(split.features, CPU)
    expected = list(batches_of(open_train("rounded", dtype=np.float16), tokenizer))
    given = list(batches_of(split, tokenizer, resident=True))
    assert len(given) == len(expected) == 7
    for batch, other in zip(given, expected, strict=True):
        gathered = features.gather(batch.features)
        assert gathered.dtype == torch.float16
        assert torch.equal(gathered, other.features)
        assert all(map(torch.equal, batch[1:], other[1:]))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_reads_no_features_then(open_train, tokenizer, monkeypatch, workers):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(2), raising=False)
    split = open_train()
    expected = list(batches_of(split, tokenizer, resident=True))
    monkeypatch.delattr(FeatureFile, "read_rows")
    for batch, other in zip(loader(batches_of(split, tokenizer, resident=True), workers, CPU), expected, strict=True):
        assert all(map(torch.equal, batch, other))


def put(value, row):
    def spoil(features):
        features[row, 2, 3] = value

    return spoil


def test_what_float16_cannot_hold_is_refused_with_its_row(open_train):
    assert ResidentFeatures(open_train("fits", put(-65504, 20)).features, CPU)
    with pytest.raises(InputError, match=r"train_ims.npy: row 20 holds a feature beyond float16's largest .* 65504"):
        ResidentFeatures(open_train("large", put(1e5, 20)).features, CPU)
    with pytest.raises(InputError, match="row 100 holds a feature beyond"):
        ResidentFeatures(open_train("five", put(-1e5, slice(100, 105)), repeats=("train",)).features, CPU)
    with pytest.raises(InputError, match="row 20 holds NaN or infinite features"):
        ResidentFeatures(open_train("infinite", put(np.inf, 20)).features, CPU)


def test_too_little_memory_is_said_with_what_is_needed(open_train, monkeypatch):
    features = open_train(regions=36).features
    monkeypatch.setattr(resident, "_available", lambda device: 2 * 24 * 36 * 16)
    assert ResidentFeatures(features, CPU)
    monkeypatch.setattr(resident, "_available", lambda device: 2 * 24 * 36 * 16 - 1)
    with pytest.raises(
        InputError, match=r"--device_features: .* take 0.0 GB of cpu's memory, of which 0.0 GB are free"
    ):
        ResidentFeatures(features, CPU)

    def full(*_, **__):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(resident, "_available", lambda device: None)
    monkeypatch.setattr(resident.torch, "empty", full)
    with pytest.raises(InputError, match=r"take 0.0 GB of cpu's memory; train without it"):
        ResidentFeatures(features, CPU)
