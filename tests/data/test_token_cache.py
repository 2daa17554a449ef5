"""Tokenised captions come from the cache where it is right, and never from one that is not."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lib.data.dataset import open_split
from lib.data.token_cache import tokenize_split
from lib.data.tokenizer import Tokenizer, load_tokenizer
from tests.conftest import TINY_BERT


@pytest.fixture
def data(make_data, tmp_path):
    return make_data(tmp_path / "some_precomp")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(TINY_BERT), 64, 10**6)


@pytest.fixture
def tokenized(data, monkeypatch):
    """Tokenises a split of the data; says, too, how many captions had to be tokenised for it."""
    counted = []

    def spy(self, captions, tokenize=Tokenizer.tokenize):
        counted.append(len(captions))
        return tokenize(self, captions)

    monkeypatch.setattr(Tokenizer, "tokenize", spy)

    def of(tokenizer, split="train"):
        counted.clear()
        return tokenize_split(tokenizer, open_split(str(data.parent), data.name, split)), sum(counted)

    return of


def equal(captions, expected):
    arrays = ("ids", "words", "starts")
    return all(np.array_equal(getattr(captions, name), getattr(expected, name)) for name in arrays)


def other_vocabulary(tokenizer):
    """The same words with other numbers."""
    content = json.loads(tokenizer.specification)
    vocabulary = content["model"]["vocab"]
    vocabulary["man"], vocabulary["a"] = vocabulary["a"], vocabulary["man"]
    return Tokenizer(json.dumps(content), 64)


def test_captions_are_tokenised_once(tokenizer, tokenized, data):
    expected = tokenizer.tokenize((data / "train_caps.txt").read_text().splitlines())
    for again in (120, 0, 0):
        captions, count = tokenized(tokenizer)
        assert count == again
        assert equal(captions, expected)
        assert {name: getattr(captions, name).dtype for name in ("ids", "words")} == {"ids": "i4", "words": "i2"}


def test_each_split_and_vocabulary_has_its_own(tokenizer, tokenized, data):
    other = other_vocabulary(tokenizer)
    first, _ = tokenized(tokenizer)
    second, count = tokenized(other)
    assert count == 120
    assert not np.array_equal(first.ids, second.ids)
    assert tokenized(tokenizer, "dev")[1] == 50
    assert len(list((data / "tokens").iterdir())) == 3
    assert [tokenized(one)[1] for one in (tokenizer, other)] == [0, 0]


def change_words(lines):
    lines[3] = "two dogs"


@pytest.mark.parametrize("change", [change_words, lambda lines: lines.reverse()], ids=["one caption", "their order"])
def test_changed_captions_are_tokenised_again_in_place_of_the_old_ones(tokenizer, tokenized, data, change):
    tokenized(tokenizer)
    path = data / "train_caps.txt"
    lines = path.read_text().splitlines()
    change(lines)
    path.write_text("\n".join(lines) + "\n")
    captions, count = tokenized(tokenizer)
    assert count == 120
    assert equal(captions, tokenizer.tokenize(lines))
    assert len(list((data / "tokens").iterdir())) == 1
    assert tokenized(tokenizer)[1] == 0


def rewrite(path, **changed):
    from safetensors import safe_open

    with safe_open(path, "numpy") as file:
        metadata = file.metadata()
    save_file({**load_file(path), **changed}, path, metadata)


DAMAGES = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-10]),
    "empty": lambda path: path.write_bytes(b""),
    "something else": lambda path: path.write_bytes(b"not a cache" * 100),
    "a number beyond the vocabulary": lambda path: rewrite(path, ids=load_file(path)["ids"] + 10**6),
    "a negative number": lambda path: rewrite(path, ids=load_file(path)["ids"] - 100),
    "other types": lambda path: rewrite(path, ids=load_file(path)["ids"].astype(np.float32)),
    "fewer captions": lambda path: rewrite(path, lengths=np.array([len(load_file(path)["ids"])], np.int32)),
    "lengths beyond the end": lambda path: rewrite(path, lengths=load_file(path)["lengths"] + 1),
    "negative lengths": lambda path: rewrite(path, lengths=-load_file(path)["lengths"]),
    "an array missing": lambda path: save_file({"ids": np.zeros(3, np.int32)}, path, {"captions": "x"}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_made_again(tokenizer, tokenized, data, damage):
    expected, _ = tokenized(tokenizer)
    (path,) = (data / "tokens").iterdir()
    DAMAGES[damage](path)
    captions, count = tokenized(tokenizer)
    assert count == 120
    assert equal(captions, expected)
    assert tokenized(tokenizer)[1] == 0


def test_a_folder_that_cannot_be_written_to_costs_only_time(tokenizer, tokenized, data):
    (data / "tokens").write_text("a file in the way")
    expected = tokenizer.tokenize((data / "train_caps.txt").read_text().splitlines())
    for _ in range(2):
        captions, count = tokenized(tokenizer)
        assert count == 120
        assert equal(captions, expected)


def test_a_copied_data_set_takes_its_cache_along(tokenizer, tokenized, data):
    tokenized(tokenizer)
    copy = data.parent / "copy"
    shutil.copytree(data, copy)
    shutil.rmtree(data)
    copy.rename(data)
    assert tokenized(tokenizer)[1] == 0
