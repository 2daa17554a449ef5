"""Tokenised captions kept beside a data set: DATA_PATH/DATA_NAME/tokens/{split}.{vocabulary}.safetensors.

One file for each split and vocabulary. It says which captions it was made from and is made anew where those are others,
so that it is never stale; it can be deleted at any time.
"""

import hashlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import tokenizers
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from lib.cli import InputError
from lib.data.dataset import Split
from lib.data.tokenizer import TokenizedCaptions, Tokenizer
from lib.files import replacing

TYPES = {"ids": np.int32, "words": np.int16, "lengths": np.int32}


def tokenize_split(tokenizer: Tokenizer, split: Split) -> TokenizedCaptions:
    """The captions of a split as `Tokenizer.tokenize` gives them, from the cache where it holds them.

    A folder that cannot be written to only costs the time to tokenise again.
    """
    vocabulary = _hash(tokenizers.__version__, tokenizer.specification)
    path = split.folder / "tokens" / f"{split.name}.{vocabulary}.safetensors"
    made_from = _hash(*split.captions)
    captions = _read(path, made_from, tokenizer.vocab_size)
    if captions is None or len(captions) != len(split.captions):
        captions = tokenizer.tokenize(split.captions)
        with suppress(InputError):
            _write(path, made_from, captions)
    return captions


def _hash(*texts: str) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(f"{text}\n".encode())
    return digest.hexdigest()[:16]


def _read(path: Path, made_from: str, vocab_size: int) -> TokenizedCaptions | None:
    """What a file holds; None where there is none, a damaged one, or one of other captions."""
    try:
        with safe_open(path, "numpy") as file:
            if (file.metadata() or {}).get("captions") != made_from:
                return None
            ids, words, lengths = (file.get_tensor(name) for name in TYPES)
    except (OSError, SafetensorError):
        return None
    captions = TokenizedCaptions(ids, words, np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]))
    return captions if _is_sound(captions, lengths, vocab_size) else None


def _is_sound(captions: TokenizedCaptions, lengths: np.ndarray, vocab_size: int) -> bool:
    arrays = (captions.ids, captions.words, lengths)
    if any(array.ndim != 1 or array.dtype != dtype for array, dtype in zip(arrays, TYPES.values(), strict=True)):
        return False
    fits = len(captions.ids) == len(captions.words) == captions.starts[-1] and (lengths >= 0).all()
    return bool(fits and ((captions.ids >= 0) & (captions.ids < vocab_size)).all() and (captions.words >= 0).all())


def _write(path: Path, made_from: str, captions: TokenizedCaptions) -> None:
    arrays = (captions.ids, captions.words, np.diff(captions.starts))
    tensors = {name: array.astype(dtype) for (name, dtype), array in zip(TYPES.items(), arrays, strict=True)}
    with replacing(path) as file:
        file.write(save(tensors, {"captions": made_from}))
