"""Feature files: any rows of any form are read, damage is named, and copies on a device hold the same numbers."""

import errno
import io
import os
import pickle
from itertools import product
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.data import features as module
from lib.data.features import DeviceFeatures, FeatureFile
from tests.data.samples import IMAGES, IMG_DIM, REGIONS, make_features, refusal

CPU = torch.device("cpu")
ROWS = IMAGES * REGIONS
OFFSETS = np.array([0, 1, 6, 9, 21])


def save(folder, form, dtype=np.float32, spoil=None):
    """A feature file in some form: each image once, five times, or packed. spoil: (row, column, value)."""
    features = make_features(dtype=dtype)
    if spoil:
        row, column, value = spoil
        features.reshape(-1, IMG_DIM)[row, column] = value
    if form == "packed":
        np.save(folder / "dev_offsets.npy", OFFSETS)
        features = features.reshape(-1, IMG_DIM)
    np.save(folder / "dev_ims.npy", features.repeat(5, axis=0) if form == "five times" else features)
    return FeatureFile(folder / "dev_ims.npy", 5 if form == "five times" else 1)


FORMS = ["once", "five times", "packed"]


@settings(deadline=None)
@given(
    rows=st.lists(st.integers(0, ROWS - 1)),
    form=st.sampled_from(FORMS),
    stored=st.sampled_from([np.float16, np.float32]),
    wanted=st.sampled_from([None, np.float16, np.float32]),
    block=st.sampled_from([1, 3, 1000]),
)
def test_any_rows_in_any_order_are_read_in_any_precision(tmp_path_factory, rows, form, stored, wanted, block):
    file = save(tmp_path_factory.mktemp("files"), form, stored)
    rows, out = np.array(rows, int), None if wanted is None else np.empty((len(rows), IMG_DIM), wanted)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK_BYTES", block * IMG_DIM * np.dtype(stored).itemsize)
        read = file.read_rows(rows, out)
    assert read.dtype == (wanted or stored)
    assert np.array_equal(read, make_features().reshape(-1, IMG_DIM)[rows])  # exact in float16 too


def test_images_of_packed_files_have_the_rows_between_their_offsets(tmp_path):
    file = save(tmp_path, "packed")
    assert (len(file), file.counts.tolist(), file.regions, file.varies) == (4, [1, 5, 3, 12], 12, True)
    images = np.split(make_features().reshape(-1, IMG_DIM), OFFSETS[1:-1])
    assert np.array_equal(file.read(np.array([3, 0, 2])), np.concatenate([images[3], images[0], images[2]]))


@pytest.mark.filterwarnings("error")
def test_a_file_that_nobody_refers_to_is_closed_without_a_warning(tmp_path):
    features = save(tmp_path, "once")
    descriptor = features._file.fileno()
    del features
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_workers_get_no_features_but_open_the_file_for_themselves(tmp_path, monkeypatch):
    file = save(tmp_path, "once")
    expected = file.read(np.array([2, 4]))
    assert len(pickle.dumps(file)) < 2000
    copy = pickle.loads(pickle.dumps(file))
    assert np.array_equal(copy.read(np.array([2, 4])), expected)
    monkeypatch.setattr(os, "preadv", Mock(side_effect=OSError(errno.EIO, os.strerror(errno.EIO))))
    assert refusal(copy.read, np.array([0])) == f"{tmp_path / 'dev_ims.npy'}: cannot be read (Input/output error)"


# What is refused


@pytest.mark.parametrize(("form", "named"), [("once", 4), ("five times", 20), ("packed", 14)])
def test_features_that_are_not_finite_are_named_with_their_row_in_the_file(tmp_path, form, named):
    for value, dtype in product((np.nan, np.inf, -np.inf), (np.float16, np.float32)):
        file = save(tmp_path, form, dtype, (14, 1, value))
        file.read_rows(np.delete(np.arange(ROWS), 14))
        message = refusal(file.read_rows, np.array([20, 14, 1]))
        assert message.startswith(f"{tmp_path / 'dev_ims.npy'}: row {named} holds NaN or infinite features")


@pytest.mark.parametrize("value", [1e5, -7e4])
def test_what_float16_cannot_hold_is_refused_only_where_float16_is_asked_for(tmp_path, value):
    file = save(tmp_path, "once", spoil=(10, 2, value))
    assert file.read(np.array([3]))[1, 2] == np.float32(value)
    message = refusal(DeviceFeatures, file, CPU)
    assert message.startswith(f"{tmp_path / 'dev_ims.npy'}: row 3 holds a feature beyond float16's limit")
    save(tmp_path, "once", spoil=(10, 2, -65504))
    assert DeviceFeatures(file, CPU)


@pytest.mark.parametrize("repeats", [1, 5])
def test_without_offsets_rows_are_images_of_one_region(tmp_path, repeats):
    np.save(tmp_path / "dev_ims.npy", make_features()[:, 0].repeat(repeats, 0))
    file = FeatureFile(tmp_path / "dev_ims.npy", repeats)
    assert file.counts.tolist() == [1] * IMAGES
    assert np.array_equal(file.read(np.arange(IMAGES)), make_features()[:, 0])


def as_npy(array):
    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue()


SOUND = as_npy(make_features())
DAMAGE = {
    "cut in the header": (SOUND[:40], "truncated or not a .npy file"),
    "cut in the data": (SOUND[:-1], "463 bytes instead of 464"),
    "a web page": (b"<!DOCTYPE html>\n<html>\n" * 50, "truncated or not a .npy file"),
    "float64": (as_npy(make_features(dtype=np.float64)), "expected float32 or float16"),
    "numbers of one image": (as_npy(make_features()[0, 0]), "of shape (images, regions, img_dim)"),
    "by columns": (as_npy(np.asfortranarray(make_features())), "stored by columns"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_file_that_does_not_hold_features_is_named(tmp_path, damage):
    path = tmp_path / "dev_ims.npy"
    content, words = DAMAGE[damage]
    path.write_bytes(content)
    message = refusal(FeatureFile, path)
    assert message.startswith(f"{path}: ")
    assert words in message


@pytest.mark.parametrize("offsets", [[1, 6, 21], [0, 6, 20], [0, 9, 6, 21], None])
def test_offsets_that_do_not_fit_are_named(tmp_path, offsets):
    file, path = save(tmp_path, "packed"), tmp_path / "dev_offsets.npy"
    path.write_bytes(path.read_bytes()[:-1]) if offsets is None else np.save(path, np.array(offsets))
    assert str(path) in refusal(FeatureFile, file.path)


def test_a_file_cut_while_it_is_open_is_named(tmp_path):
    file = save(tmp_path, "once")
    file.read(np.array([0]))
    os.truncate(file.path, 150)
    assert refusal(file.read, np.array([0])).startswith(f"{file.path}: has become shorter")


def test_too_little_memory_for_device_features_is_said_with_what_is_needed(tmp_path):
    file = save(tmp_path, "once")
    file.starts[-1] = 2**50
    message = refusal(DeviceFeatures, file, CPU)
    assert message.startswith("--device_features: ")
    assert "takes 9007199.3 GB, more than cpu has free; train without it" in message
