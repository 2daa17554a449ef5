"""Captions to token ids, word by word, as BERT's own tokenizer does."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # said explicitly, it does not warn when loader workers start

from tokenizers import Tokenizer as Backend

from lib.errors import InputError, reason

PAD_ID = 0


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
        starts = np.concatenate([[0], np.cumsum(lengths)])
        pieces = np.repeat(self.starts[captions] - starts[:-1], lengths) + np.arange(starts[-1])
        return TokenizedCaptions(self.ids[pieces], self.words[pieces], starts)


class Tokenizer:
    """A WordPiece tokenizer with BERT's special tokens.

    `max_length`: most tokens of a caption that BERT can take, [CLS] and [SEP] included.
    """

    def __init__(self, specification: str, max_length: int):
        """specification: the JSON of a `tokenizers` tokenizer, which a checkpoint carries along."""
        self.specification = specification
        self.max_length = max_length
        content = json.loads(specification)
        content["added_tokens"] = []  # so that a literal [MASK] in a caption is text
        content["truncation"] = content["padding"] = None
        self._backend = Backend.from_str(json.dumps(content))
        self.vocab_size = self._backend.get_vocab_size()
        self.cls_id, self.sep_id, self.mask_id, _ = map(self._special, ("[CLS]", "[SEP]", "[MASK]", "[UNK]"))

    def _special(self, token: str) -> int:
        token_id = self._backend.token_to_id(token)
        if token_id is None:
            raise InputError(f"--bert: the vocabulary has no {token}; expected BERT's vocab.txt")
        return token_id

    def tokenize(self, captions: list[str]) -> TokenizedCaptions:
        """Split captions into words (lower case, accents and punctuation as BERT does) and words into pieces."""
        encodings = self._backend.encode_batch(captions, add_special_tokens=False)
        lengths = [len(encoding) for encoding in encodings]
        return TokenizedCaptions(
            np.array([i for encoding in encodings for i in encoding.ids], dtype=np.int64),
            np.array([w for encoding in encodings for w in encoding.word_ids], dtype=np.int64),
            np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]),
        )

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
    from transformers import AutoTokenizer

    folder = Path(bert)
    if folder.is_dir() and not any((folder / name).is_file() for name in ("vocab.txt", "tokenizer.json")):
        raise InputError(f"--bert {bert}: the folder holds no vocab.txt")
    try:
        tokenizer = AutoTokenizer.from_pretrained(bert, use_fast=True, local_files_only=folder.is_dir())
    except Exception as error:  # the tokenizers library raises plain Exception
        raise InputError(
            f"--bert {bert}: no tokenizer to be had ({reason(error)}); give a folder with config.json and vocab.txt"
        ) from None
    loaded = Tokenizer(tokenizer.backend_tokenizer.to_str(), max_length)
    if loaded.vocab_size > entries:
        raise InputError(f"--bert {bert}: a vocabulary of {loaded.vocab_size} entries, but config.json says {entries}")
    return loaded
