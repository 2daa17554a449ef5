"""Captions to token ids, word by word, as BERT's own tokenizer does."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # said explicitly, it does not warn when loader workers start

from tokenizers import Tokenizer as Backend

from lib.cli import InputError, reason, with_bar
from lib.data.features import ranges
from lib.hub import is_folder, quiet

PAD_ID = 0
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
PARTS = {"normalizer": "BertNormalizer", "pre_tokenizer": "BertPreTokenizer", "model": "WordPiece"}
OPTIONS = ("do_lower_case", "strip_accents", "tokenize_chinese_chars")
AT_ONCE = 1_000  # captions split at a time; the library's own result is many times larger than what is kept of it


@dataclass
class TokenizedCaptions:
    """Word pieces of many captions in flat arrays; [CLS] and [SEP] are not among them."""

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
    """A WordPiece tokenizer with BERT's special tokens.

    `max_length`: most tokens of a caption that BERT can take, [CLS] and [SEP] included.
    """

    def __init__(self, specification: str, max_length: int):
        """specification: the JSON of a `tokenizers` tokenizer, which a checkpoint carries along.

        Raises InputError where it is damaged, or not a BERT's.
        """
        self.specification = specification
        self.max_length = max_length
        with _refusing("the tokenizer is damaged, or not BERT's"):
            self._backend = _build_backend(specification)
        self.vocab_size = self._backend.get_vocab_size()
        _, _, self.cls_id, self.sep_id, self.mask_id = map(self._backend.token_to_id, SPECIAL_TOKENS)

    def tokenize(self, captions: list[str]) -> TokenizedCaptions:
        """Split captions into words (lower case, accents and punctuation as BERT does) and words into pieces."""
        starts = with_bar(range(0, len(captions) or 1, AT_ONCE), "tokens")
        blocks = [self._tokenize(captions[start : start + AT_ONCE]) for start in starts]
        ids, words, lengths = map(np.concatenate, zip(*blocks, strict=True))
        return TokenizedCaptions(ids, words, np.concatenate([[0], np.cumsum(lengths)]))

    def _tokenize(self, captions: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids and words of all pieces, and the number of pieces of each caption."""
        encodings = self._backend.encode_batch(captions, add_special_tokens=False)
        ids = [i for encoding in encodings for i in encoding.ids]
        words = [w for encoding in encodings for w in encoding.word_ids]
        return np.array(ids, np.int32), np.array(words, np.int16), np.array(list(map(len, encodings)), np.int64)

    def pad(self, captions: TokenizedCaptions) -> tuple[np.ndarray, np.ndarray]:
        """[CLS] pieces [SEP] of each caption, cut to `max_length` with [SEP] kept.

        Returns ids (captions, longest), padded with 0, and lengths (captions,).
        """
        lengths = np.diff(captions.starts)
        kept = np.minimum(lengths, self.max_length - 2)
        ids = np.full((len(captions), kept.max(initial=0) + 2), PAD_ID, dtype=np.int64)
        caption = np.repeat(np.arange(len(captions)), lengths)
        position = np.arange(len(captions.ids)) - captions.starts[caption]
        fits = position < kept[caption]
        ids[:, 0] = self.cls_id
        ids[caption[fits], position[fits] + 1] = captions.ids[fits]
        ids[np.arange(len(captions)), kept + 1] = self.sep_id
        return ids, kept + 2


def load_tokenizer(bert: str, max_length: int, entries: int) -> Tokenizer:
    """The tokenizer of a BERT by name (fetched unless cached) or folder (vocab.txt or tokenizer.json).

    entries: size of the vocabulary that the model's configuration states. Raises InputError where there is no tokenizer
    or the vocabulary is larger than that.
    """
    folder = is_folder(bert)
    if folder and not any((Path(bert) / name).is_file() for name in ("vocab.txt", "tokenizer.json")):
        raise InputError(f"--bert {bert}: the folder holds no vocab.txt")
    with _refusing(f"--bert {bert}: no tokenizer to be had; give a folder with config.json and vocab.txt"), quiet():
        specification = _read_folder(Path(bert)) if folder else _fetch(bert)
    try:
        loaded = Tokenizer(specification, max_length)
    except InputError as error:
        raise InputError(f"--bert {bert}: {error}") from None
    if loaded.vocab_size > entries:
        raise InputError(f"--bert {bert}: a vocabulary of {loaded.vocab_size} entries, but config.json says {entries}")
    return loaded


def _fetch(name: str) -> str:
    """The JSON of a tokenizer by name; raises whatever transformers does."""
    from transformers import BertTokenizer

    return BertTokenizer.from_pretrained(name).backend_tokenizer.to_str()


def _read_folder(folder: Path) -> str:
    """The JSON of a folder's tokenizer; raises whatever damage leads to.

    Nothing but OPTIONS is taken from tokenizer_config.json, which may else name files anywhere.
    """
    from transformers import BertTokenizer

    if (folder / "tokenizer.json").is_file():
        return (folder / "tokenizer.json").read_text(encoding="utf-8")
    config = folder / "tokenizer_config.json"
    settings = json.loads(config.read_bytes()) if config.is_file() else {}
    options = {name: settings[name] for name in OPTIONS if name in settings}
    return BertTokenizer(str(folder / "vocab.txt"), **options).backend_tokenizer.to_str()


def _build_backend(specification: str) -> Backend:
    """The tokenizer that a JSON describes, of BERT's own parts only; raises whatever damage leads to."""
    content = json.loads(specification)
    for name, kind in PARTS.items():
        if content[name]["type"] != kind:
            raise ValueError(f"its {name} is not {kind}")
    vocabulary = content["model"]["vocab"]
    if sorted(vocabulary.values()) != list(range(len(vocabulary))):
        raise ValueError("its vocabulary holds a word twice, or leaves out a number")
    if missing := [token for token in SPECIAL_TOKENS if token not in vocabulary]:
        raise ValueError(f"its vocabulary has no {', '.join(missing)}")
    if vocabulary["[PAD]"] != PAD_ID or content["model"]["unk_token"] != "[UNK]":
        raise ValueError("[PAD] is not its first entry, or [UNK] not its unknown word")
    parts = {name: content[name] for name in PARTS}
    parts["added_tokens"] = []  # so that a literal [MASK] in a caption is text
    return Backend.from_str(json.dumps({"version": "1.0", **parts}))


@contextmanager
def _refusing(message: str) -> Iterator[None]:
    """Turn whatever the tokenizers library raises into InputError: plain Exception, or a panic, which is none."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InputError(f"{message} ({reason(error)})") from None
