"""A small WordPiece vocabulary of the captions, and the settings of a small BERT to go with it, without weights."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from string import ascii_lowercase, digits, punctuation

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

SIZE = 450  # entries at most
SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
BERT = {
    "model_type": "bert",
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
}


def train_vocabulary(captions: Iterable[str]) -> list[str]:
    """WordPieces of captions in BERT's uncased conventions, [PAD] first; the place in the list is the token id.

    All of ASCII is in it, letters and digits also as they stand inside a word, so that any plain English has pieces.
    """
    characters = sorted(ascii_lowercase + digits)
    # Pieces that are given keep this order; those that the trainer finds itself it numbers by chance
    given = [*SPECIALS, *punctuation, *characters, *(f"##{character}" for character in characters)]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=SIZE, special_tokens=given, show_progress=False)
    tokenizer.train_from_iterator(sorted(captions), trainer)
    ids = tokenizer.get_vocab()
    return sorted(ids, key=ids.get)


def write_bert(folder: Path, vocabulary: Sequence[str]):
    """Write vocab.txt and config.json into an existing folder. Without weights it means a BERT of random start."""
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    config = json.dumps(BERT | {"vocab_size": len(vocabulary)}, indent=2)
    (folder / "config.json").write_text(config + "\n", encoding="utf-8")
