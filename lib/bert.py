"""BERT by name or folder: its configuration, and its weights for a training that starts."""

import json
from pathlib import Path

from transformers import BertConfig, BertModel

from lib.cli import InputError, reason
from lib.hub import is_folder, quiet

BERT_BASE = "bert-base-uncased"
WEIGHT_FILES = (
    "model.safetensors",
    "pytorch_model.bin",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
)

# What is taken from a configuration: nothing else in it shapes the encoder, and some of it makes transformers build
# endless lists (num_labels) or choose an implementation by name. Names, least and most of what is accepted.
NUMBERS = {
    "vocab_size": (5, 10**6),  # the five special tokens
    "hidden_size": (1, 8_192),
    "num_hidden_layers": (1, 100),
    "num_attention_heads": (1, 256),
    "intermediate_size": (1, 65_536),
    "max_position_embeddings": (3, 65_536),  # [CLS], a word, [SEP]
    "type_vocab_size": (1, 1_000),
    "hidden_dropout_prob": (0.0, 1.0),
    "attention_probs_dropout_prob": (0.0, 1.0),
    "initializer_range": (0.0, 10.0),
    "layer_norm_eps": (0.0, 1.0),
}
FIXED = {"model_type": "bert", "position_embedding_type": "absolute", "is_decoder": False}  # another is not this model
MOST_PARAMETERS = 10**9  # BERT-large has 335 million, the largest multilingual one 471 million


def read_config(bert: str) -> BertConfig:
    """The configuration of a BERT; bert-base-uncased's is known without the network. Raises InputError."""
    folder = is_folder(bert)
    if bert == BERT_BASE and not folder:
        return BertConfig()  # the class's defaults are that model's
    path = Path(bert) / "config.json"
    if folder and not path.is_file():
        raise InputError(f"--bert {bert}: the folder holds no config.json")
    try:
        with quiet():
            content = json.loads(path.read_bytes()) if folder else BertConfig.get_config_dict(bert)[0]
        return make_config(content)
    except Exception as error:  # whatever a damaged file leads to
        raise _not_to_be_had(bert, folder, error) from None


def make_config(content: dict) -> BertConfig:
    """The configuration that a config.json's content describes. Raises ValueError where it is no BERT of sane size."""
    if not isinstance(content, dict):
        raise ValueError("not a table of settings")
    for name, expected in FIXED.items():
        if content.get(name, expected) != expected:
            raise ValueError(f"{name} is {content[name]!r}, expected {expected!r}")
    for name, (least, most) in NUMBERS.items():
        kinds = int if isinstance(least, int) else (int, float)
        value = content.get(name, least)
        if not isinstance(value, kinds) or isinstance(value, bool) or not least <= value <= most:
            raise ValueError(f"{name} is {value!r}, expected a number from {least} to {most}")
    config = BertConfig(**{name: content[name] for name in (*NUMBERS, "hidden_act") if name in content})
    tables = config.vocab_size + config.max_position_embeddings + config.type_vocab_size
    layer = 4 * config.hidden_size + 2 * config.intermediate_size
    parameters = config.hidden_size * (tables + config.num_hidden_layers * layer)
    if parameters > MOST_PARAMETERS:
        raise ValueError(f"it describes {parameters:,} parameters, more than {MOST_PARAMETERS:,}")
    return config


def build_bert(config: dict) -> BertModel:
    """A BERT of random weights from a configuration's plain dict, without its pooling layer. Raises InputError."""
    try:
        return BertModel(make_config(config), add_pooling_layer=False)
    except Exception as error:  # whatever a damaged configuration leads to
        raise InputError(f"BERT's config.json describes no model that can be built ({reason(error)})") from None


def start_bert(bert: str) -> tuple[BertModel, str]:
    """The BERT that a training starts from, and a sentence that says where its weights come from.

    A name is fetched from the Hugging Face hub unless cached; a folder without weights starts at random.
    Raises InputError where neither is to be had.
    """
    folder = is_folder(bert)
    if folder and not any((Path(bert) / name).is_file() for name in WEIGHT_FILES):
        return build_bert(plain(read_config(bert))), f"BERT starts at random: {bert} holds no weights"
    if not folder:
        print(
            f"{bert}: taken from the cache, or fetched from the Hugging Face hub (bert-base-uncased: 440 MB)",
            flush=True,
        )
    config = read_config(bert)
    try:
        with quiet():
            model, loaded = BertModel.from_pretrained(
                bert, config=config, add_pooling_layer=False, local_files_only=folder, output_loading_info=True
            )
    except Exception as error:  # whatever a damaged file leads to
        raise _not_to_be_had(bert, folder, error) from None
    if loaded["missing_keys"]:  # transformers would leave them random
        raise InputError(f"--bert {bert}: its weights lack {', '.join(sorted(loaded['missing_keys']))}")
    return model.float(), f"BERT starts from the weights of {bert}"


def plain(config: BertConfig) -> dict:
    """A configuration as plain types, for a checkpoint."""
    return json.loads(config.to_json_string(use_diff=False))


def _not_to_be_had(bert: str, folder: bool, error: Exception) -> InputError:
    if folder:
        return InputError(f"--bert {bert}: its config.json or weights are damaged, or not BERT's ({reason(error)})")
    return InputError(
        f"--bert {bert}: not a folder with config.json and vocab.txt, not cached, "
        f"and not to be fetched from the Hugging Face hub ({reason(error)})"
    )
