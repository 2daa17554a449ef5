"""BERT by name or folder: its configuration, and its weights for a training that starts."""

import json
from pathlib import Path

from huggingface_hub.utils import logging as hub_logging
from transformers import BertConfig, BertModel
from transformers.utils import logging

from lib.errors import InputError, reason

BERT_BASE = "bert-base-uncased"
WEIGHT_FILES = (
    "model.safetensors",
    "pytorch_model.bin",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
)


def read_config(bert: str) -> BertConfig:
    """The configuration of a BERT; bert-base-uncased's is known without the network. Raises InputError."""
    if bert == BERT_BASE and not Path(bert).is_dir():
        return BertConfig()  # the class's defaults are that model's
    if Path(bert).is_dir() and not (Path(bert) / "config.json").is_file():
        raise InputError(f"--bert {bert}: the folder holds no config.json")  # transformers would take its defaults
    try:
        return BertConfig.from_pretrained(bert, local_files_only=Path(bert).is_dir())
    except Exception as error:  # whatever a damaged file leads to
        raise _not_to_be_had(bert, error) from None


def build_bert(config: dict) -> BertModel:
    """A BERT of random weights from a configuration's plain dict, without its pooling layer. Raises InputError."""
    try:
        return BertModel(BertConfig.from_dict(config), add_pooling_layer=False)
    except (ValueError, TypeError, RuntimeError) as error:
        raise InputError(f"BERT's config.json describes no model that can be built ({reason(error)})") from None


def start_bert(bert: str) -> tuple[BertModel, str]:
    """The BERT that a training starts from, and a sentence that says where its weights come from.

    A name is fetched from the Hugging Face hub unless cached; a folder without weights starts at random.
    Raises InputError where neither is to be had.
    """
    folder = Path(bert)
    if folder.is_dir() and not any((folder / name).is_file() for name in WEIGHT_FILES):
        return build_bert(plain(read_config(bert))), f"BERT starts at random: {bert} holds no weights"
    logging.disable_progress_bar()
    if not folder.is_dir():
        print(
            f"{bert}: taken from the cache, or fetched from the Hugging Face hub (bert-base-uncased: 440 MB)",
            flush=True,
        )
    verbosity = logging.get_verbosity()
    hub_logging.set_verbosity_error()  # its six attempts without a network; how it ended is said below
    logging.set_verbosity_error()  # the report of pooling and head weights that are left out on purpose
    try:
        model, loaded = BertModel.from_pretrained(
            bert, add_pooling_layer=False, local_files_only=folder.is_dir(), output_loading_info=True
        )
    except Exception as error:  # whatever a damaged file leads to
        raise _not_to_be_had(bert, error) from None
    finally:
        logging.set_verbosity(verbosity)
    if loaded["missing_keys"]:  # transformers would leave them random
        raise InputError(f"--bert {bert}: its weights lack {', '.join(sorted(loaded['missing_keys']))}")
    return model.float(), f"BERT starts from the weights of {bert}"


def plain(config: BertConfig) -> dict:
    """A configuration as plain types, for a checkpoint."""
    return json.loads(config.to_json_string(use_diff=False))


def _not_to_be_had(bert: str, error: Exception) -> InputError:
    if Path(bert).is_dir():
        return InputError(f"--bert {bert}: its config.json or weights are damaged, or not BERT's ({reason(error)})")
    return InputError(
        f"--bert {bert}: not a folder with config.json and vocab.txt, not cached, "
        f"and not to be fetched from the Hugging Face hub ({reason(error)})"
    )
