"""Word pieces as BERT's own tokenizer makes them, with the word that each piece belongs to."""

import json
import re
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertTokenizer

from lib.data import tokenizer as module
from lib.data.tokenizer import Tokenizer, load_tokenizer
from tests.conftest import GOLDEN, TINY_BERT
from tests.damage import changes, cuts, grow, memory_below, refusal, spoil, unless_refused, write_bytes

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
    assert (captions.ids.dtype, captions.words.dtype) == (np.int32, np.int16)


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


@pytest.mark.parametrize("at_once", [1, 3, len(CAPTIONS)])
def test_it_does_not_matter_how_many_captions_are_split_at_a_time(tokenizer, monkeypatch, at_once):
    expected = tokenizer.tokenize(CAPTIONS)
    monkeypatch.setattr(module, "AT_ONCE", at_once)
    found = tokenizer.tokenize(CAPTIONS)
    for name in ("ids", "words", "starts"):
        assert np.array_equal(getattr(found, name), getattr(expected, name)), name


# Folders


@pytest.fixture
def bert(tmp_path):
    """A folder of a BERT that a test may damage."""
    return shutil.copytree(TINY_BERT, tmp_path / "bert")


def load(bert):
    return load_tokenizer(str(bert), MAX_LENGTH, 10**6)


def pieces_of(tokenizer):
    return tokenizer.tokenize(CAPTIONS).ids.tolist()


def test_line_ends_of_a_vocabulary_do_not_matter(bert, tokenizer):
    (bert / "vocab.txt").write_bytes("\r\n".join(VOCABULARY).encode())
    assert pieces_of(load(bert)) == pieces_of(tokenizer)


@pytest.mark.parametrize("lower", [True, False])
def test_both_forms_of_a_saved_tokenizer_give_the_same_pieces(bert, tokenizer, lower):
    saved = BertTokenizer(str(bert / "vocab.txt"), do_lower_case=lower)
    saved.save_pretrained(bert)
    from_json = pieces_of(load(bert))
    (bert / "tokenizer.json").unlink()
    assert pieces_of(load(bert)) == from_json
    assert (from_json == pieces_of(tokenizer)) == lower


def test_a_configuration_of_the_tokenizer_can_name_neither_files_nor_code(bert, tokenizer, tmp_path):
    (tmp_path / "other.txt").write_text("\n".join(VOCABULARY[:5]))
    (bert / "evil.py").write_text("raise SystemExit")
    evil = {"vocab": str(tmp_path / "other.txt"), "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    evil |= {"tokenizer_class": "Evil", "trust_remote_code": True, "unk_token": "dog", "init_inputs": ["/dev/zero"]}
    (bert / "tokenizer_config.json").write_text(json.dumps(evil))
    assert pieces_of(load(bert)) == pieces_of(tokenizer)


# What is refused


def refused(bert):
    """The line with which a folder or name is refused."""
    message = refusal(load, bert)
    assert message.startswith(f"--bert {bert}: ")
    return message


def test_a_folder_without_vocabulary_is_named(bert):
    (bert / "vocab.txt").unlink()
    message = refused(bert)
    assert str(bert) in message
    assert "vocab.txt" in message


def test_a_missing_folder_is_named(tmp_path):
    assert str(tmp_path / "nothing") in refused(tmp_path / "nothing")


@pytest.mark.parametrize("token", ["[CLS]", "[SEP]", "[MASK]", "[UNK]"])
def test_a_vocabulary_without_a_special_token_is_refused(bert, token):
    (bert / "vocab.txt").write_text("\n".join(word for word in VOCABULARY if word != token), encoding="utf-8")
    assert token in refused(bert)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_tokenizer_file_is_refused(bert, name):
    (bert / name).write_text('{"version": ')
    assert str(bert) in refused(bert)


def test_a_vocabulary_that_is_not_utf8_is_refused(bert):
    (bert / "vocab.txt").write_bytes(b"[PAD]\n[CLS]\n[SEP]\n[MASK]\n[UNK]\ncaf\xe9\n")
    assert str(bert) in refused(bert)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no [PAD], [UNK]"),
        ("\n".join(VOCABULARY).encode("utf-16"), "UTF-8"),
        ("\n".join(VOCABULARY).encode("utf-8-sig"), "no [PAD]"),
        ("\r".join(VOCABULARY).encode(), "no [PAD], [UNK]"),
        ("\n".join([*VOCABULARY, "dog"]).encode(), "twice"),
        ("\n".join([*VOCABULARY[1:], "[PAD]"]).encode(), "[PAD] is not its first entry"),
    ],
)
def test_a_vocabulary_that_is_not_berts_is_refused(bert, content, words):
    (bert / "vocab.txt").write_bytes(content)
    assert words in refused(bert)


@pytest.mark.parametrize("name", ["vocab.txt", "tokenizer.json", "tokenizer_config.json"])
def test_gigabytes_are_refused_before_they_are_read(bert, name):
    (bert / name).touch()
    grow(bert / name, 2**33)
    with memory_below(2**20):
        assert f"{name} is larger than 16 MB" in refused(bert)


SPECIFICATION = json.loads(load_tokenizer(str(TINY_BERT), MAX_LENGTH, 10**6).specification)
WORDS = SPECIFICATION["model"]["vocab"]


def altered(**model):
    return json.dumps(SPECIFICATION | {"model": SPECIFICATION["model"] | model})


NOT_TOKENIZERS = {
    "nothing": "",
    "no text": None,
    "a number": "3",
    "a list": "[]",
    "no parts": "{}",
    "cut": json.dumps(SPECIFICATION)[:-5],
    "deep": "[" * 10**5,
    "another model": altered(type="BPE", merges=[]),
    "another pre-tokenizer": json.dumps(
        SPECIFICATION | {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated"}}
    ),
    "no normalizer": json.dumps(SPECIFICATION | {"normalizer": None}),
    "another unknown word": altered(unk_token="dog"),
    "a number left out": altered(vocab=WORDS | {"dog": 10**6}),
    "a number twice": altered(vocab=WORDS | {"dog": 5}),
    "a negative number": altered(vocab=WORDS | {"dog": -1}),
    "a number that is none": altered(vocab=WORDS | {"dog": "5"}),
    "a broken number": altered(vocab={word: float(number) for word, number in WORDS.items()}),
    "a list of words": altered(vocab=list(WORDS)),
    "no prefix": altered(continuing_subword_prefix=None),
    "no longest word": altered(max_input_chars_per_word=-1),
}


@pytest.mark.parametrize("damage", NOT_TOKENIZERS)
def test_a_damaged_specification_is_refused(damage):
    assert refusal(Tokenizer, NOT_TOKENIZERS[damage], MAX_LENGTH).startswith(
        "the tokenizer is damaged, or not BERT's ("
    )


class PanicException(BaseException):
    """As Rust's panics arrive in Python: by this name, and not as an Exception."""


def test_a_panic_of_the_library_is_refused_too(monkeypatch):
    def panic(specification):
        raise PanicException("called `Option::unwrap()` on a `None` value")

    monkeypatch.setattr(module.Backend, "from_str", panic, raising=False)
    assert "Option::unwrap" in refusal(Tokenizer, json.dumps(SPECIFICATION), MAX_LENGTH)


def test_an_interruption_is_not_taken_for_damage(monkeypatch):
    def interrupt(specification):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_build_backend", interrupt)
    with pytest.raises(KeyboardInterrupt):
        Tokenizer(json.dumps(SPECIFICATION), MAX_LENGTH)


# Whatever the bytes are


def uses_its_vocabulary(tokenizer):
    """Whether captions become entries of the vocabulary, special tokens around them."""
    ids, lengths = tokenizer.pad(tokenizer.tokenize(CAPTIONS))
    return ids.max() < tokenizer.vocab_size and (lengths <= MAX_LENGTH).all() and (ids[:, 0] == tokenizer.cls_id).all()


SOUND = "".join(f"{word}\n" for word in VOCABULARY)
WHITE_END = re.compile(r"[^\S\x1c-\x1f]+\Z")  # which the library takes off a line
BROKEN_WORDS = ["", "dog", "[PAD]", "[CLS]", "##", " ", "\r", "\ufeff", "\u2028", "größe", "x" * 1000]


@settings(deadline=None, max_examples=1000)
@given(
    encoding=st.sampled_from(["utf-8"] * 5 + ["utf-8-sig", "utf-16", "utf-7"]),
    kept=cuts(600),
    changed=changes(600),
    surplus=st.lists(st.sampled_from(BROKEN_WORDS), max_size=2).map(lambda words: "\n".join(words).encode()),
)
def test_any_vocabulary_numbers_its_lines_or_is_refused(tmp_path_factory, encoding, kept, changed, surplus):
    folder = tmp_path_factory.getbasetemp() / "any_vocabulary"
    folder.mkdir(exist_ok=True)
    content = spoil(SOUND.encode(encoding), kept, changed, surplus)
    write_bytes(folder / "vocab.txt", content)
    tokenizer = unless_refused(lambda: load(folder), f"--bert {folder}: ")
    if content == SOUND.encode():
        assert tokenizer is not None
    if tokenizer is not None:
        lines = content.decode().removesuffix("\n").split("\n")
        numbers = json.loads(tokenizer.specification)["model"]["vocab"]
        assert numbers == {WHITE_END.sub("", line): number for number, line in enumerate(lines)}
        assert tokenizer.vocab_size == len(lines)
        assert uses_its_vocabulary(tokenizer)


COMPACT = json.dumps(SPECIFICATION, separators=(",", ":")).encode()


@settings(deadline=None, max_examples=1000)
@given(kept=cuts(len(COMPACT)), changed=changes(len(COMPACT)))
def test_any_specification_is_a_working_tokenizer_or_refused(kept, changed):
    content = spoil(COMPACT, kept, changed).decode("latin-1")
    tokenizer = unless_refused(lambda: Tokenizer(content, MAX_LENGTH), "the tokenizer is damaged, or not BERT's (")
    assert tokenizer is None or uses_its_vocabulary(tokenizer)
    if content.encode("latin-1") == COMPACT:
        assert pieces_of(tokenizer) == pieces_of(load_tokenizer(str(TINY_BERT), MAX_LENGTH, 10**6))
