"""Word pieces as each model's own tokenizer makes them, with the word that each piece belongs to."""

import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers, pre_tokenizers
from transformers import AutoTokenizer

from lib.cli import InputError
from lib.data import tokenizer as module
from lib.data.tokenizer import Tokenizer, load_tokenizer
from tests.conftest import GOLDEN, TINY_BERT
from tests.data.samples import refusal
from tests.text_models import KINDS, TEXTS, make_text_model

ENTRIES = json.loads((GOLDEN / "tokenization.json").read_text(encoding="utf-8"))
VOCABULARY = (TINY_BERT / "vocab.txt").read_text(encoding="utf-8").splitlines()
CAPTIONS = [entry["caption"] for entry in ENTRIES]
SPECIAL = ("[MASK]", "[CLS]", "[SEP]", "[PAD]", "<s>", "</s>", "<pad>", "<mask>", "<|startoftext|>", "<|endoftext|>")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(TINY_BERT))


@pytest.fixture(scope="module", params=KINDS)
def model_folder(request, tmp_path_factory):
    """The folder of a tiny text model of each kind."""
    return make_text_model(request.param, tmp_path_factory.mktemp("model") / request.param)


def same(one, other):
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in ("ids", "words", "starts"))


# BERT, as published


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry["caption"][:20])
def test_pieces_ids_and_words_equal_those_of_the_published_tokenizer(tokenizer, entry):
    captions = tokenizer.tokenize([entry["caption"]])
    assert [VOCABULARY[piece] for piece in captions.ids] == [piece for word in entry["pieces"] for piece in word]
    assert captions.words.tolist() == [i for i, word in enumerate(entry["pieces"]) for _ in word]
    assert tokenizer.pad(captions)[0].tolist() == [entry["ids"]]


def test_many_captions_at_once_give_what_each_gives_alone(tokenizer, monkeypatch):
    ids, lengths = tokenizer.pad(tokenizer.tokenize(CAPTIONS))
    assert ids.shape == (len(CAPTIONS), max(len(entry["ids"]) for entry in ENTRIES))
    for row, length, entry in zip(ids, lengths, ENTRIES, strict=True):
        assert row[:length].tolist() == entry["ids"]
        assert not row[length:].any()
    expected = tokenizer.tokenize(CAPTIONS)
    monkeypatch.setattr(module, "AT_ONCE", 3)
    assert same(tokenizer.tokenize(CAPTIONS), expected)


@settings(deadline=None, max_examples=30)
@given(chosen=st.lists(st.integers(0, len(CAPTIONS) - 1)))
def test_select_gives_the_captions_asked_for_in_their_order(tokenizer, chosen):
    selected = tokenizer.tokenize(CAPTIONS).select(np.array(chosen, dtype=int))
    assert same(selected, tokenizer.tokenize([CAPTIONS[i] for i in chosen]))


def test_a_saved_tokenizer_is_read_with_its_options(tmp_path, tokenizer):
    bert = shutil.copytree(TINY_BERT, tmp_path / "bert")
    (bert / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    cased = load_tokenizer(str(bert)).tokenize(CAPTIONS).ids.tolist()
    AutoTokenizer.from_pretrained(bert).save_pretrained(bert)
    (bert / "vocab.txt").unlink()
    assert load_tokenizer(str(bert)).tokenize(CAPTIONS).ids.tolist() == cased
    assert cased != tokenizer.tokenize(CAPTIONS).ids.tolist()


# Models of every kind


def test_ids_equal_those_of_the_models_own_tokenizer_and_are_cut_as_there(model_folder):
    ours, own = load_tokenizer(str(model_folder)), AutoTokenizer.from_pretrained(model_folder)
    captions = [*TEXTS[:2], "dog", "a man's 2 dogs. " * 30]
    ids, lengths = ours.pad(ours.tokenize(captions))
    expected = own(captions, truncation=True, max_length=ours.max_length)["input_ids"]
    assert [row[:length].tolist() for row, length in zip(ids, lengths, strict=True)] == expected
    assert lengths[-1] == ours.max_length
    assert all((row[length:] == own.pad_token_id).all() for row, length in zip(ids, lengths, strict=True))


@settings(deadline=None, max_examples=30)
@given(caption=st.one_of(st.text(), st.sampled_from(CAPTIONS)))
def test_any_text_gives_whole_words_in_order(model_folder, caption):
    tokenizer = load_once(model_folder)
    captions = tokenizer.tokenize(["a dog", caption])
    assert captions.starts[-1] == len(captions.ids)
    assert ((captions.ids >= 0) & (captions.ids < tokenizer.vocab_size)).all()
    for start, end in zip(captions.starts[:-1], captions.starts[1:], strict=True):
        assert captions.words[start:end][:1].tolist() in ([], [0])
        assert set(np.diff(captions.words[start:end])) <= {0, 1}


def load_once(folder, loaded={}):  # noqa: B006
    return loaded.setdefault(folder, load_tokenizer(str(folder)))


def test_a_literal_special_token_is_text(model_folder):
    tokenizer, own = load_tokenizer(str(model_folder)), AutoTokenizer.from_pretrained(model_folder)
    captions = tokenizer.tokenize([f"a {token} dog" for token in SPECIAL])
    unknown = {own.unk_token_id} - {own.eos_token_id}
    assert not set(captions.ids.tolist()) & (set(own.all_special_ids) - unknown)


def test_what_special_tokens_a_model_has(model_folder):
    tokenizer, own = load_tokenizer(str(model_folder)), AutoTokenizer.from_pretrained(model_folder)
    ends_with_padding = model_folder.name in ("clip", "siglip")
    assert tokenizer.mask_id == (None if ends_with_padding else own.mask_token_id)
    assert tokenizer.own_pad_id == (None if ends_with_padding else own.pad_token_id)
    assert (
        tokenizer.max_length
        == {"bert": 64, "roberta": 20, "modernbert": 64, "clip": 16, "siglip": 12}[model_folder.name]
    )


def test_positions_that_roberta_reserves_are_not_for_captions(tmp_path):
    folder = make_text_model("roberta", tmp_path)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "model_max_length": 10**30}))
    assert load_tokenizer(str(folder)).max_length == 22 - 2


def test_the_specification_that_a_checkpoint_carries_gives_the_same_tokenizer(model_folder):
    tokenizer = load_tokenizer(str(model_folder))
    copy = Tokenizer(json.loads(json.dumps(tokenizer.specification)), tokenizer.vocab_size, "a checkpoint")
    assert same(copy.tokenize(CAPTIONS), tokenizer.tokenize(CAPTIONS))
    for name in ("max_length", "vocab_size", "pad_id", "own_pad_id", "mask_id", "prefix", "suffix"):
        assert getattr(copy, name) == getattr(tokenizer, name)


def test_a_tokenizer_that_takes_a_caption_for_one_word_is_refused(tmp_path):
    """As Gemma's, which SigLIP 2 uses: spaces are replaced before the text is split at them."""
    backend = AutoTokenizer.from_pretrained(make_text_model("siglip", tmp_path)).backend_tokenizer
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    with pytest.raises(ValueError, match="takes a whole caption for one word"):
        Tokenizer(module.complete(backend.to_str(), 12, "</s>", 1), backend.get_vocab_size(), "a checkpoint")


# What is refused


def refused(folder) -> str:
    message = refusal(load_tokenizer, str(folder))
    assert message.startswith(f"--bert {folder}")
    return message


def spoiled(folder, name, content):
    bert = shutil.copytree(TINY_BERT, folder / "bert")
    if content is None:
        (bert / name).unlink()
    else:
        (bert / name).write_bytes(content)
    return bert


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("vocab.txt", None, "it knows special tokens only"),
        ("vocab.txt", "\n".join(VOCABULARY[:5]).encode(), "it knows special tokens only"),
        ("vocab.txt", "\n".join(VOCABULARY[:128]).encode(), "128 entries up to id 127, but the model's embedding"),
        ("vocab.txt", "\n".join([*VOCABULARY, "zebra"]).encode(), "135 entries up to id 134, but the model's"),
        ("tokenizer.json", b'{"version": ', ""),
        ("config.json", None, "no tokenizer found"),
    ],
)
def test_a_folder_whose_tokenizer_is_missing_cut_off_or_another_models_is_named(tmp_path, name, content, words):
    assert words in refused(spoiled(tmp_path, name, content))
    refused(tmp_path / "nothing")


def test_a_tokenizer_without_special_tokens_is_refused_as_its_captions_could_become_empty(tmp_path):
    path = make_text_model("modernbert", tmp_path) / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "post_processor": None}))
    assert "it adds no special tokens" in refused(tmp_path)


def test_pieces_that_a_vocabulary_does_not_know_are_counted(tokenizer, model_folder):
    known, unknown = ["a dog"] * 50, "\u4e00 \u53ea \u72d7"
    assert tokenizer.check_words("dev", tokenizer.tokenize(known)) == ""
    note = f"dev: the vocabulary of {TINY_BERT} does not know 3 % of the captions' pieces ([UNK], first in caption 51)"
    assert tokenizer.check_words("dev", tokenizer.tokenize([*known, unknown])) == note
    with pytest.raises(InputError, match=r"does not know 100 % .*; choose a --bert of the captions' language"):
        tokenizer.check_words("dev", tokenizer.tokenize([unknown]))
    every_kind, captions = load_once(model_folder), ["a man holding a red ball", unknown]
    knows_bytes = model_folder.name in ("roberta", "modernbert", "clip")
    assert (every_kind.check_words("dev", every_kind.tokenize(captions)) == "") == knows_bytes
