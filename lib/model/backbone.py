"""Language models of the transformers library, by name or folder: configuration, random or pretrained weights.

Of a two-tower model (CLIP, SigLIP) this is the text tower. Layers that only pooled outputs need are left out: nothing
here uses them, and parameters without gradients stop a training on several processes.
"""

import inspect
import json
import os
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedModel

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # or their .index.json where they are in parts
TOWERS = {  # AutoModel does not know all of these, or gives the two-tower model
    "clip_text_model": "CLIPTextModel",
    "siglip_text_model": "SiglipTextModel",
    "siglip2_text_model": "Siglip2TextModel",
}


def read_config(name: str) -> dict:
    """The configuration of a text model, as plain types, from a folder or by its name on the Hugging Face hub.

    Raises OSError or ValueError, as transformers does, where there is none.
    """
    config = AutoConfig.from_pretrained(name, local_files_only=os.path.isdir(name))
    config = getattr(config, "text_config", config)
    return json.loads(config.to_json_string(use_diff=False))


def check_weights(folder: str) -> None:
    """Raises ValueError where a folder holds no weights that are read, listing what it holds."""
    found = {path.name for path in Path(folder).iterdir() if path.is_file()}
    if found.isdisjoint(f"{name}{part}" for name in WEIGHT_FILES for part in ("", ".index.json")):
        wanted = " nor ".join(WEIGHT_FILES)
        raise ValueError(f"neither {wanted} among its files, which are {', '.join(sorted(found))}")


def build_backbone(config: dict) -> PreTrainedModel:
    """A language model of random weights, of the default dtype. Raises ValueError where its kind is unknown."""
    make, options = _model_class(config)
    return _without_head(make._from_config(**options))


def load_backbone(name: str) -> PreTrainedModel:
    """A pretrained language model of the default dtype, from a folder or by its name on the Hugging Face hub.

    Raises OSError or ValueError, as transformers does, and ValueError where weights are missing in the file.
    """
    make, options = _model_class(read_config(name))
    model, loaded = make.from_pretrained(
        name, local_files_only=os.path.isdir(name), output_loading_info=True, **options
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
