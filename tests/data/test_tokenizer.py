"""Word pieces as BERT's own tokenizer makes them, with the word that each piece belongs to."""

import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.data.tokenizer import Tokenizer, load_tokenizer
from lib.errors import InputError
from tests.conftest import GOLDEN, TINY_BERT

MAX_LENGTH = 64
ENTRIES = json.loads((GOLDEN / "tokenization.json").read_text(encoding="utf-8"))
VOCABULARY = (TINY_BERT / "vocab.txt").read_text(encoding="utf-8").splitlines()
CAPTIONS = [entry["caption"] for entry in ENTRIES]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(TINY_BERT), MAX_LENGTH, 10**6)


def ids_of(tokenizer, caption):
    ids, lengths = tokenizer.pad(tokenizer.tokenize([caption]))
    assert lengths.tolist() == [ids.shape[1]]
    return ids[0].tolist()


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry["caption"][:20])
def test_pieces_ids_and_words_equal_those_of_the_published_tokenizer(tokenizer, entry):
    captions = tokenizer.tokenize([entry["caption"]])
    pieces = [VOCABULARY[piece] for piece in captions.ids]
    assert pieces == [piece for word in entry["pieces"] for piece in word]
    assert captions.words.tolist() == [i for i, word in enumerate(entry["pieces"]) for _ in word]
    assert ids_of(tokenizer, entry["caption"]) == entry["ids"]


def test_many_captions_at_once_give_what_each_gives_alone(tokenizer):
    ids, lengths = tokenizer.pad(tokenizer.tokenize(CAPTIONS))
    assert ids.shape == (len(CAPTIONS), max(len(entry["ids"]) for entry in ENTRIES))
    for row, length, entry in zip(ids, lengths, ENTRIES, strict=True):
        assert row[:length].tolist() == entry["ids"]
        assert not row[length:].any()


@pytest.mark.parametrize("token", ["[MASK]", "[CLS]", "[SEP]", "[PAD]"])
def test_a_literal_special_token_is_text(tokenizer, token):
    captions = tokenizer.tokenize([f"a {token} dog"])
    assert captions.words.max() == 4  # a, [, the name, ], dog
    assert VOCABULARY.index(token) not in captions.ids


@pytest.mark.parametrize("max_length", [3, 4, 8, 9, 64])
def test_long_captions_are_cut_with_the_last_token_kept(max_length):
    short = load_tokenizer(str(TINY_BERT), max_length, 10**6)
    ids, lengths = short.pad(short.tokenize(CAPTIONS))
    assert ids.shape[1] <= max_length
    for row, length, entry in zip(ids, lengths, ENTRIES, strict=True):
        pieces = entry["ids"][1:-1][: max_length - 2]
        assert row[:length].tolist() == [entry["ids"][0], *pieces, entry["ids"][-1]]


def test_a_caption_longer_than_bert_takes_is_cut(tokenizer):
    ids = ids_of(tokenizer, "a dog " * 100)
    assert len(ids) == MAX_LENGTH
    assert ids[-1] == tokenizer.sep_id


def test_no_captions_give_no_rows(tokenizer):
    captions = tokenizer.tokenize([])
    ids, lengths = tokenizer.pad(captions)
    assert len(captions) == len(ids) == len(lengths) == 0
    assert captions.ids.dtype == captions.words.dtype == np.int64


@settings(deadline=None)
@given(chosen=st.lists(st.integers(0, len(CAPTIONS) - 1)))
def test_select_gives_the_captions_asked_for_in_their_order(tokenizer, chosen):
    selected = tokenizer.tokenize(CAPTIONS).select(np.array(chosen, dtype=int))
    direct = tokenizer.tokenize([CAPTIONS[i] for i in chosen])
    assert len(selected) == len(chosen)
    for name in ("ids", "words", "starts"):
        assert np.array_equal(getattr(selected, name), getattr(direct, name)), name


@settings(deadline=None)
@given(caption=st.text())
def test_any_text_gives_whole_words_in_order(tokenizer, caption):
    captions = tokenizer.tokenize([caption])
    assert captions.starts.tolist() == [0, len(captions.ids)]
    assert ((captions.ids >= 0) & (captions.ids < tokenizer.vocab_size)).all()
    if len(captions.words):
        assert captions.words[0] == 0
        assert set(np.diff(captions.words)) <= {0, 1}


@settings(deadline=None)
@given(caption=st.text())
def test_the_specification_that_a_checkpoint_carries_gives_the_same_tokenizer(tokenizer, caption):
    copy = Tokenizer(json.loads(json.dumps(tokenizer.specification)), MAX_LENGTH)
    assert copy.specification == tokenizer.specification
    assert ids_of(copy, caption) == ids_of(tokenizer, caption)
    for name in ("cls_id", "sep_id", "mask_id", "vocab_size"):
        assert getattr(copy, name) == getattr(tokenizer, name)


def test_special_ids_and_size_are_those_of_the_vocabulary(tokenizer):
    assert tokenizer.vocab_size == len(VOCABULARY)
    for token, token_id in (
        ("[CLS]", tokenizer.cls_id),
        ("[SEP]", tokenizer.sep_id),
        ("[MASK]", tokenizer.mask_id),
        ("[PAD]", 0),
    ):
        assert VOCABULARY[token_id] == token


# What is refused


def refusal(bert):
    with pytest.raises(InputError) as caught:
        load_tokenizer(str(bert), MAX_LENGTH, 10**6)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert "--bert" in message
    return message


@pytest.fixture
def bert(tmp_path):
    """A folder of a BERT that a test may damage."""
    return shutil.copytree(TINY_BERT, tmp_path / "bert")


def test_a_folder_without_vocabulary_is_named(bert):
    (bert / "vocab.txt").unlink()
    message = refusal(bert)
    assert str(bert) in message
    assert "vocab.txt" in message


def test_a_missing_folder_is_named(tmp_path):
    assert str(tmp_path / "nothing") in refusal(tmp_path / "nothing")


@pytest.mark.parametrize("token", ["[CLS]", "[SEP]", "[MASK]", "[UNK]"])
def test_a_vocabulary_without_a_special_token_is_refused(bert, token):
    (bert / "vocab.txt").write_text("\n".join(word for word in VOCABULARY if word != token), encoding="utf-8")
    assert token in refusal(bert)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_tokenizer_file_is_refused(bert, name):
    (bert / name).write_text('{"version": ')
    assert str(bert) in refusal(bert)


def test_a_vocabulary_that_is_not_utf8_is_refused(bert):
    (bert / "vocab.txt").write_bytes(b"[PAD]\n[CLS]\n[SEP]\n[MASK]\n[UNK]\ncaf\xe9\n")
    assert str(bert) in refusal(bert)
