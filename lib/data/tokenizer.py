"""Captions to token ids, word by word, as a language model's own tokenizer does."""

import json
import os
from dataclasses import dataclass
from itertools import chain

import numpy as np

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # said explicitly, it does not warn when loader workers start

from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lib.cli import InputError, refusing, with_bar
from lib.data.features import ranges
from lib.model.backbone import fetch, read_config

MASK_TOKENS = ("[MASK]", "<mask>")  # BERT's and RoBERTa's families
COUNT_FROM_PAD = ("roberta", "xlm-roberta", "camembert", "mpnet")  # their first token has position pad_id + 1
LEAST_USED = 0.99  # of an embedding table: a few of its rows may be padding, or entries twice in the vocabulary
MOST_UNKNOWN, SAID = 0.5, 0.01  # share of captions' pieces that are [UNK]: refused above the one, said above the other
AT_ONCE = 10_000  # captions split at a time; the library's own result is many times larger than what is kept of it


@dataclass
class TokenizedCaptions:
    """Word pieces of many captions in flat arrays, without special tokens."""

    ids: np.ndarray  # (pieces,) vocabulary entries of all captions, one after the other
    words: np.ndarray  # (pieces,) index of the word, within its caption, that a piece belongs to
    starts: np.ndarray  # (captions + 1,) where in `ids` a caption starts

    def __len__(self) -> int:
        return len(self.starts) - 1

    def select(self, captions: np.ndarray) -> "TokenizedCaptions":
        """Some captions, in the order given."""
        lengths = np.diff(self.starts)[captions]
        pieces = ranges(self.starts[captions], lengths)
        return TokenizedCaptions(self.ids[pieces], self.words[pieces], np.concatenate([[0], np.cumsum(lengths)]))


class Tokenizer:
    """A language model's tokenizer, which knows the words that pieces belong to.

    specification: JSON of the `tokenizers` library, with truncation and padding; a checkpoint carries it. max_length:
    the most tokens of a caption, special ones included. vocab_size: rows of the embedding table that ids point to.
    pad_id: fills shorter captions. own_pad_id: None where it has another meaning too, as CLIP's end of text. mask_id,
    unknown_id: of the mask token and of pieces that are not in the vocabulary, None where there is none.
    """

    def __init__(self, specification: str, rows: int, source: str):
        """rows: of the model's embedding table. source: file, folder or name that it is from, for messages.

        Raises ValueError where the vocabulary is not the table's, and what the library does of a damaged specification.
        """
        content = json.loads(specification)
        whole = Backend.from_str(specification)
        entries = whole.get_vocab()
        if not entries.keys() - _special(content):
            raise ValueError("it knows special tokens only: its vocabulary is missing")
        self.vocab_size = max(entries.values()) + 1
        if self.vocab_size > rows or len(entries) < LEAST_USED * rows:
            sizes = f"{len(entries)} entries up to id {self.vocab_size - 1}"
            raise ValueError(f"a vocabulary of {sizes}, but the model's embedding table has {rows}")
        self._backend = Backend.from_str(json.dumps(_without_special_tokens(content)))
        if len(set(self._backend.encode("a dog").word_ids)) < 2:
            raise ValueError("it takes a whole caption for one word, so that words cannot be masked")
        self.specification, padding = specification, content["padding"]
        self.max_length, self.pad_id = content["truncation"]["max_length"], padding["pad_id"]
        self.source, model = source, content["model"]
        self.unknown_id = model.get("unk_id", entries.get(model.get("unk_token")))
        self.mask_id = next((entries[token] for token in MASK_TOKENS if token in entries), None)
        self.prefix, self.suffix = _around(whole)
        as_text = self._backend.encode(padding["pad_token"]).ids
        self.own_pad_id = None if self.pad_id in (*self.prefix, *self.suffix, *as_text) else self.pad_id

    def tokenize(self, captions: list[str]) -> TokenizedCaptions:
        """Split captions into words, and words into pieces; a special token's name in a caption is text."""
        ids, words, lengths = [np.empty(0, np.int32)], [np.empty(0, np.int16)], [0]
        for start in with_bar(range(0, len(captions), AT_ONCE), "tokens"):
            with refusing("captions: one is no valid Unicode text"):
                encodings = self._backend.encode_batch(captions[start : start + AT_ONCE], add_special_tokens=False)
            ids.append(np.fromiter(chain.from_iterable(e.ids for e in encodings), np.int32))
            words.append(np.fromiter(chain.from_iterable(e.word_ids for e in encodings), np.int16))
            lengths += map(len, encodings)
        return TokenizedCaptions(np.concatenate(ids), np.concatenate(words), np.cumsum(lengths))

    def spell(self, caption: str) -> tuple[list[int], list[str]]:
        """The number of the word that each piece of a caption belongs to, and each word as the caption has it."""
        encoding = self._backend.encode(caption, add_special_tokens=False)
        numbers = [number for number in encoding.word_ids if number is not None]  # without special tokens all are
        spans = [encoding.word_to_chars(number) or (0, 0) for number in range(max(numbers, default=-1) + 1)]
        return numbers, [caption[start:end].strip() for start, end in spans]

    def tokenize_split(self, name: str, captions: list[str]) -> TokenizedCaptions:
        """`tokenize` the captions of a split, after which `check_words` is said."""
        tokenized = self.tokenize(captions)
        if note := self.check_words(name, tokenized):
            print(f"warning: {note}")
        return tokenized

    def check_words(self, name: str, captions: TokenizedCaptions) -> str:
        """A sentence on the [UNK] pieces of a split, empty where they are few. Raises InputError above half of all."""
        unknown = np.flatnonzero(captions.ids == self.unknown_id)
        share = len(unknown) / max(1, len(captions.ids))
        if share <= SAID:
            return ""
        first = f"[UNK], first in caption {np.searchsorted(captions.starts, unknown[0], side='right')}"
        share_of = f"{100 * share:.0f} % of the captions' pieces ({first})"
        sentence = f"{name}: the vocabulary of {self.source} does not know {share_of}"
        if share > MOST_UNKNOWN:
            raise InputError(f"{sentence}; choose a --bert of the captions' language, with its whole vocabulary")
        return sentence

    def pad(self, captions: TokenizedCaptions) -> tuple[np.ndarray, np.ndarray]:
        """Ids (captions, longest) between the model's special tokens, cut and padded, and lengths (captions,)."""
        before, around = len(self.prefix), len(self.prefix) + len(self.suffix)
        lengths = np.diff(captions.starts)
        kept = np.minimum(lengths, self.max_length - around)
        ids = np.full((len(captions), kept.max(initial=0) + around), self.pad_id, dtype=np.int64)
        caption = np.repeat(np.arange(len(captions)), lengths)
        position = np.arange(len(captions.ids)) - captions.starts[caption]
        fits = position < kept[caption]
        ids[:, :before] = self.prefix
        ids[caption[fits], position[fits] + before] = captions.ids[fits]
        for place, token in enumerate(self.suffix, before):
            ids[np.arange(len(captions)), kept + place] = token
        return ids, kept + around


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of a language model, by folder or name on the hub. Raises InputError where there is none to fit."""
    with refusing(f"--bert {name}: no tokenizer found"):
        config, folder = read_config(name), fetch(name)
        loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        if not loaded.is_fast:
            loaded = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        reserved = config["pad_token_id"] + 1 if config["model_type"] in COUNT_FROM_PAD else 0
        longest = min(config["max_position_embeddings"] - reserved, loaded.model_max_length)
        specification = complete(loaded.backend_tokenizer.to_str(), longest, loaded.pad_token, loaded.pad_token_id)
    with refusing(f"--bert {name}: its tokenizer cannot be used"):
        tokenizer = Tokenizer(specification, config["vocab_size"], name)
        if not (tokenizer.prefix or tokenizer.suffix):
            raise ValueError("it adds no special tokens: a caption that loses its words in training would be empty")
        return tokenizer


def complete(specification: str, max_length: int, pad_token: str, pad_id: int) -> str:
    """The specification of a Tokenizer from a JSON of the `tokenizers` library."""
    backend = Backend.from_str(specification)
    backend.enable_truncation(max_length)
    backend.enable_padding(pad_id=pad_id, pad_token=pad_token)
    return backend.to_str()


def _special(content: dict) -> set[str]:
    return {token["content"] for token in content["added_tokens"] if token["special"]}


def _without_special_tokens(content: dict) -> dict:
    """The tokenizer that takes the names of special tokens for text and adds none."""
    special, model = _special(content), dict(content["model"])
    if model["type"] == "Unigram":  # which would find them among its pieces
        model["vocab"] = [[f"\0{piece}" if piece in special else piece, score] for piece, score in model["vocab"]]
    others = [token for token in content["added_tokens"] if not token["special"]]
    without = dict.fromkeys(("truncation", "padding", "post_processor"))
    return {**content, **without, "added_tokens": others, "model": model}


def _around(backend: Backend) -> tuple[list[int], list[int]]:
    """Ids of the special tokens that a model's captions begin and end with."""
    backend.no_truncation()
    backend.no_padding()
    encoding = backend.encode("a")
    text = [place for place, special in enumerate(encoding.special_tokens_mask) if not special]
    return encoding.ids[: text[0]], encoding.ids[text[-1] + 1 :]
