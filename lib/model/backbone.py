"""Language models of the transformers library, by name or folder: configuration, random or pretrained weights.

Of a two-tower model (CLIP, SigLIP) this is the text tower. Layers that only pooled outputs need are left out: nothing
here uses them, and parameters without gradients stop a training on several processes.
"""

import inspect
import json
import os
from multiprocessing.pool import ThreadPool
from typing import Any

import torch
import transformers
from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
from torch import nn
from transformers import AutoConfig, PreTrainedModel

HUB_SECONDS = 8  # to the first answer of the Hugging Face hub
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
WEIGHT_FILES = {f"{name}{ending}" for name in WEIGHTS for ending in ("", ".index.json")}  # the latter if in parts
VOCABULARIES = {"tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model"}
SMALL_FILES = ("*.json", "*.txt", "*.model")  # configuration and vocabulary
TOWERS = {  # AutoModel does not know all of these, or gives the two-tower model
    "clip_text_model": "CLIPTextModel",
    "siglip_text_model": "SiglipTextModel",
    "siglip2_text_model": "Siglip2TextModel",
}


def fetch(name: str, weights: bool = False) -> str:
    """The folder of a text model: `name` itself, or the Hugging Face hub's files of that name, cached or fetched.

    weights: they must be there, too. Raises ValueError where they are not, or what huggingface_hub raises.
    """
    folder, wanted = name, WEIGHT_FILES if weights else VOCABULARIES
    if not os.path.isdir(name):
        if os.path.isdir(os.path.dirname(name)):
            raise ValueError("no such folder")
        config = try_to_load_from_cache(name, "config.json")
        folder = os.path.dirname(config) if isinstance(config, str) else ""
        if not folder or wanted.isdisjoint(os.listdir(folder)):
            folder = _download(name, weights)
    found = sorted(os.listdir(folder))
    if weights and WEIGHT_FILES.isdisjoint(found):
        raise ValueError(f"neither {' nor '.join(WEIGHTS)} among its files, which are {', '.join(found)}")
    return folder


def _download(name: str, weights: bool) -> str:
    what = f"{name}: {'weights' if weights else 'configuration and vocabulary'}"
    print(f"{what} are not in the cache; the Hugging Face hub has {HUB_SECONDS} seconds to answer", flush=True)
    with ThreadPool(1) as thread:  # each address of the hub, and the name server, has a time limit of its own
        about = thread.apply_async(HfApi().model_info, (name,), {"timeout": HUB_SECONDS}).get(HUB_SECONDS)
    files = {one.rfilename for one in about.siblings or ()}
    kinds = [kind for kind in WEIGHTS if weights and files.intersection((kind, f"{kind}.index.json"))]
    patterns = [kind.replace(".", "*.") + "*" for kind in kinds[:1]]  # the index and the parts, too
    return snapshot_download(name, allow_patterns=[*SMALL_FILES, *patterns], etag_timeout=HUB_SECONDS)


def read_config(name: str) -> dict:
    """The configuration of a text model, as plain types, from a folder or by its name on the Hugging Face hub.

    Raises OSError or ValueError, as transformers does, where there is none, and what `fetch` raises.
    """
    config = AutoConfig.from_pretrained(fetch(name), local_files_only=True)
    config = getattr(config, "text_config", config)
    return json.loads(config.to_json_string(use_diff=False))


def build_backbone(config: dict) -> PreTrainedModel:
    """A language model of random weights, of the default dtype. Raises ValueError where its kind is unknown."""
    make, options = _model_class(config)
    return _without_head(make._from_config(**options))


def load_backbone(name: str) -> PreTrainedModel:
    """A pretrained language model of the default dtype, from a folder or by its name on the Hugging Face hub.

    Raises OSError or ValueError, as transformers does, ValueError where weights are missing in the file, and what
    `fetch` raises.
    """
    make, options = _model_class(read_config(name))
    model, loaded = make.from_pretrained(
        fetch(name, weights=True), local_files_only=True, output_loading_info=True, **options
    )
    model = _without_head(model)
    if missing := sorted(set(loaded["missing_keys"]) & set(model.state_dict())):  # transformers would leave them random
        raise ValueError(f"its weights lack {', '.join(missing)}")
    return model


def _model_class(config: dict) -> tuple[Any, dict]:
    """The class of a text model, and what to make it with: configuration, dtype, no pooling layer."""
    settings = AutoConfig.for_model(**config)
    tower = TOWERS.get(settings.model_type)
    make: Any = getattr(transformers, tower) if tower else transformers.MODEL_MAPPING.get(type(settings), None)
    if make is None:
        raise ValueError(f"{settings.model_type} is not a text model that the transformers library can build")
    options = {"config": settings, "dtype": torch.get_default_dtype()}
    if "add_pooling_layer" in inspect.signature(make).parameters:
        options["add_pooling_layer"] = False
    return make, options


def _without_head(model: PreTrainedModel) -> PreTrainedModel:
    if hasattr(model, "head"):  # SigLIP's projection of the pooled output
        model.head = nn.Identity()
    return model
