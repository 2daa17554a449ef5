"""Language and vision models of the transformers library, by name or folder: configuration, weights.

Of a two-tower model (CLIP, SigLIP) this is one tower. Layers that only pooled outputs need are left out: nothing here
uses them, and parameters without gradients stop a training on several processes.
"""

import inspect
import json
import os
from collections.abc import Callable
from multiprocessing.pool import ThreadPool
from typing import Any

import torch
import transformers
from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

HUB_SECONDS = 8  # to the first answer of the Hugging Face hub
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
WEIGHT_FILES = {f"{name}{ending}" for name in WEIGHTS for ending in ("", ".index.json")}  # the latter if in parts
VOCABULARIES = {"tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model"}
IMAGE_PROCESSORS = {"preprocessor_config.json", "processor_config.json"}
SMALL_FILES = ("*.json", "*.txt", "*.model")  # configuration, vocabulary, image processor
TOWERS = {  # AutoModel does not know all of these, or gives the two-tower model
    "clip_text_model": "CLIPTextModel",
    "siglip_text_model": "SiglipTextModel",
    "siglip2_text_model": "Siglip2TextModel",
}


def fetch(name: str, weights: bool = False, beside: set[str] = VOCABULARIES) -> str:
    """The folder of a model: `name` itself, or the Hugging Face hub's files of that name, cached or fetched.

    weights: they must be there, too. beside: one of these files is wanted otherwise. Raises ValueError where there are
    no weights, or what huggingface_hub raises.
    """
    folder, wanted = name, WEIGHT_FILES if weights else beside
    if not os.path.isdir(name):
        if os.path.isdir(os.path.dirname(name)):
            raise ValueError("no such folder")
        config = try_to_load_from_cache(name, "config.json")
        folder = os.path.dirname(config) if isinstance(config, str) else ""
        if not folder or wanted.isdisjoint(os.listdir(folder)):
            beside_it = "vocabulary" if beside is VOCABULARIES else "image processor"
            folder = _download(name, weights, "weights" if weights else f"configuration and {beside_it}")
    found = sorted(os.listdir(folder))
    if weights and WEIGHT_FILES.isdisjoint(found):
        raise ValueError(f"neither {' nor '.join(WEIGHTS)} among its files, which are {', '.join(found)}")
    return folder


def _download(name: str, weights: bool, what: str) -> str:
    print(f"{name}: {what} are not in the cache; the Hugging Face hub has {HUB_SECONDS} seconds to answer", flush=True)
    about = ask_hub(HfApi().model_info, name)
    files = {one.rfilename for one in about.siblings or ()}
    kinds = [kind for kind in WEIGHTS if weights and files.intersection((kind, f"{kind}.index.json"))]
    patterns = [kind.replace(".", "*.") + "*" for kind in kinds[:1]]  # the index and the parts, too
    return snapshot_download(name, allow_patterns=[*SMALL_FILES, *patterns], etag_timeout=HUB_SECONDS)


def ask_hub(question: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """What a method of HfApi gives within HUB_SECONDS. Raises TimeoutError, or what huggingface_hub raises."""
    with ThreadPool(1) as thread:  # each address of the hub, and the name server, has a time limit of its own
        return thread.apply_async(question, arguments, options).get(HUB_SECONDS)


def read_config(name: str, tower: str = "text_config", beside: set[str] = VOCABULARIES) -> dict:
    """The configuration of a model, as plain types, from a folder or by its name on the Hugging Face hub.

    tower: of two-tower models, text_config or vision_config. Raises OSError or ValueError, as transformers does, where
    there is none, and what `fetch` raises.
    """
    config = AutoConfig.from_pretrained(fetch(name, beside=beside), local_files_only=True)
    config = getattr(config, tower, config)
    return json.loads(config.to_json_string(use_diff=False))


def build_backbone(config: dict) -> PreTrainedModel:
    """A model of random weights, of the default dtype. Raises ValueError where its kind is unknown."""
    make, options = _model_class(config)
    return _without_head(make._from_config(**options))


def load_backbone(name: str, config: dict | None = None, state: dict[str, Tensor] | None = None) -> PreTrainedModel:
    """A pretrained model of the default dtype, from a folder or by its name on the Hugging Face hub.

    config: of a vision model; None: the text model's. state: weights instead of the named ones. Raises OSError or
    ValueError, as transformers does, ValueError where weights are missing, and what `fetch` raises.
    """
    make, options = _model_class(config or read_config(name))
    folder = fetch(name, weights=True) if state is None else None
    model, loaded = make.from_pretrained(
        folder, state_dict=state, local_files_only=True, output_loading_info=True, **options
    )
    model = _without_head(model)
    if missing := sorted(set(loaded["missing_keys"]) & set(model.state_dict())):  # transformers would leave them random
        raise ValueError(f"its weights lack {', '.join(missing[:3])}{' ...' * (len(missing) > 3)}")
    return model


def checkpoint_activations(model: PreTrainedModel) -> None:
    """In training, keep only activations between layers and compute the others again. ValueError where it cannot."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable  # as it was
    enable({"use_reentrant": False})


def _model_class(config: dict) -> tuple[Any, dict]:
    """The class of a model, and what to make it with: configuration, dtype, no pooling layer."""
    settings = AutoConfig.for_model(**config)
    tower = TOWERS.get(settings.model_type)
    make: Any = getattr(transformers, tower) if tower else transformers.MODEL_MAPPING.get(type(settings), None)
    if make is None:
        raise ValueError(f"{settings.model_type} is not a model that the transformers library can build")
    options = {"config": settings, "dtype": torch.get_default_dtype()}
    if "add_pooling_layer" in inspect.signature(make).parameters:
        options["add_pooling_layer"] = False
    return make, options


def _without_head(model: PreTrainedModel) -> PreTrainedModel:
    """The model without what only its pooled output (SigLIP's head, CLIP's last norm) or its pretraining needs."""
    unused = ["head", "pooler"] + ["post_layernorm"] * ("clip" in model.config.model_type)
    for path, module in list(model.named_modules()):
        if path.rpartition(".")[2] in unused:
            model.set_submodule(path, nn.Identity())
        if getattr(module, "mask_token", None) is not None:
            module.mask_token = None
    return model
