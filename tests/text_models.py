"""Tiny text models of random weights, written as the real ones lie on the hub: configuration, tokenizer, weights."""

from pathlib import Path

import tokenizers
import torch
import transformers
from tokenizers import normalizers, pre_tokenizers, processors, trainers

from tests.conftest import TINY_BERT

TEXTS = ["a man holding a red ball near the park", "two dogs on a black bench, a child's skateboard is jumping!"] * 3
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
KINDS = ("bert", "roberta", "modernbert", "clip", "siglip")


def make_text_model(kind: str, folder: Path) -> Path:
    """Write a text model of one of KINDS with its tokenizer into a folder."""
    tokenizer = TOKENIZERS[kind](folder)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(CONFIGS[kind](tokenizer))
    model.save_pretrained(folder)
    return folder


def _byte_pairs(folder: Path, special: list[str], **options) -> tuple[dict, list]:
    """Vocabulary and merges of a byte-level BPE tokenizer learned from TEXTS."""
    learned = tokenizers.Tokenizer(tokenizers.models.BPE(**options))
    learned.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    end = options.get("end_of_word_suffix", "")
    learned.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(vocab_size=340, special_tokens=special, initial_alphabet=alphabet, end_of_word_suffix=end),
    )
    folder.mkdir(parents=True, exist_ok=True)
    learned.model.save(str(folder))
    merges = [tuple(line.split(" ")) for line in (folder / "merges.txt").read_text().splitlines()[1:]]
    return learned.get_vocab(), merges


def _roberta(folder: Path):
    vocabulary, merges = _byte_pairs(folder, ["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    return transformers.RobertaTokenizer(vocab=vocabulary, merges=merges, model_max_length=20)


def _modernbert(folder: Path):
    """A byte-level BPE whose special tokens come after the vocabulary."""
    vocabulary, merges = _byte_pairs(folder, [])
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    names = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"]
    backend.add_special_tokens(names)
    around = [(name, backend.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=around)
    kinds = dict(zip(("unk_token", "cls_token", "sep_token", "pad_token", "mask_token"), names, strict=True))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **kinds)


def _clip(folder: Path):
    special = ["<|startoftext|>", "<|endoftext|>"]
    vocabulary, merges = _byte_pairs(folder, special, end_of_word_suffix="</w>")
    ends = [f"{letter}</w>" for letter in pre_tokenizers.ByteLevel.alphabet()]
    ends = sorted(end for end in ends if end not in vocabulary)
    vocabulary |= {end: number for number, end in enumerate(ends, len(vocabulary))}
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=16)


def _siglip(folder: Path):
    """Unigram pieces over words marked by an underline, as SentencePiece makes them; </s> ends and pads."""
    backend = tokenizers.Tokenizer(tokenizers.models.Unigram())
    backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace("!", "")])
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    backend.train_from_iterator(
        TEXTS, trainers.UnigramTrainer(vocab_size=60, special_tokens=special, unk_token="<unk>", show_progress=False)
    )
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", backend.token_to_id("</s>"))]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", pad_token="</s>", unk_token="<unk>", model_max_length=12
    )


def _two_towers(kind: str, tokenizer, positions: int):
    vision = {**SIZES, "image_size": 8, "patch_size": 4}
    text = {**SIZES, "vocab_size": len(tokenizer), "max_position_embeddings": positions}
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = {"clip": transformers.CLIPConfig, "siglip": transformers.SiglipConfig}[kind]
    more = {"projection_dim": 16} if kind == "clip" else {"projection_size": 16}
    return config(text_config={**text, **ids, **more}, vision_config=vision)


TOKENIZERS = {
    "bert": lambda folder: transformers.AutoTokenizer.from_pretrained(TINY_BERT),
    "roberta": _roberta,
    "modernbert": _modernbert,
    "clip": _clip,
    "siglip": _siglip,
}
CONFIGS = {
    "bert": lambda tokenizer: transformers.AutoConfig.from_pretrained(TINY_BERT),
    "roberta": lambda tokenizer: transformers.RobertaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=22, type_vocab_size=1, **SIZES
    ),
    "modernbert": lambda tokenizer: transformers.ModernBertConfig(
        vocab_size=len(tokenizer) + 3,
        max_position_embeddings=64,
        local_attention=4,
        global_attn_every_n_layers=2,
        pad_token_id=tokenizer.pad_token_id,
        cls_token_id=tokenizer.cls_token_id,
        sep_token_id=tokenizer.sep_token_id,
        **SIZES,
    ),
    "clip": lambda tokenizer: _two_towers("clip", tokenizer, 16),
    "siglip": lambda tokenizer: _two_towers("siglip", tokenizer, 12),
}
