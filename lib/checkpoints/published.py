"""Checkpoints of the published X-Dim release: into this project's entries and back.

They hold `model`, a list of three state dicts (image, text, similarity) with the prefix `module.`, and `opt`, an
argparse.Namespace, beside `epoch` (finished ones), `best_rsum` and `Eiters` (steps); docs/checkpoints.md says which
of their names is which symbol of the paper.
"""

import argparse
from collections import ChainMap, OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np

from lib.cli import InputError
from lib.model.registry import PUBLISHED_GATES, describe

NEVER = "never_used."  # start of our names for weights that the published model has and never uses
# Published name -> ours, for each of the three state dicts. One that ends in a dot stands for all that start so.
NAMES = (
    {
        "fc.": "image_encoder.linear.",
        "mlp.layers.0.": "image_encoder.mlp.0.",
        "mlp.bns.0.": "image_encoder.mlp.1.",
        "mlp.layers.1.": "image_encoder.mlp.3.",
        "mlp.bns.1.": f"{NEVER}mlp.bns.1.",
    },
    {
        "bert.pooler.": f"{NEVER}bert.pooler.",
        "bert.embeddings.position_ids": f"{NEVER}bert.embeddings.position_ids",
        "bert.": "text_encoder.backbone.",
        "linear.": "text_encoder.linear.",
    },
    {
        "weights.weight": "similarity.gate.joint_logits",
        "sim_map.weight": "similarity.gate.threshold_scale",
        "temp_learnable.weight": "similarity.gate.log_sharpness",
        "temp_scale.weight": "similarity.log_temperature",
        "sim_eval.weight": f"{NEVER}sim_eval.weight",
    },
)
# What are vectors and scalars here are matrices (1, D) and (1, 1) there.
MATRICES = ("similarity.gate.threshold_scale", "similarity.gate.log_sharpness", "similarity.log_temperature")
PUBLISHED = tuple({ours: theirs for theirs, ours in names.items()} for names in NAMES)
PREFIX = "module."
# The fields of `opt` that are settings here too; its paths, worker count and such are of the machine it came from.
SETTINGS = (
    *("data_name", "margin", "num_epochs", "batch_size", "learning_rate", "lr_update", "grad_clip", "max_violation"),
    *("vse_mean_warmup_epochs", "log_step", "img_dim", "embed_size", "no_imgnorm", "no_txtnorm", "mask_padding"),
)


def is_published(content: Any) -> bool:
    """Whether a loaded file has the published form."""
    entries = content if isinstance(content, dict) else {}
    return isinstance(entries.get("opt"), argparse.Namespace) and len(entries.get("model", ())) == len(NAMES)


def convert(content: dict[str, Any]) -> dict[str, Any]:
    """A published checkpoint in this project's entries, without those of the optimiser and the tokenizer.

    Weights that are never used are among `model` under names of their own, and `opt` is in `published`, so that
    `revert` can give both back. Weights of unknown names keep them; no model that is built takes these.
    """
    weights = {}
    for part, names in zip(content["model"], NAMES, strict=True):
        for key, weight in part.items():
            name = _renamed(key.removeprefix(PREFIX), names)
            weights[name] = weight.squeeze() if name in MATRICES else weight
    content = _with_pythons_numbers(content)
    options = _with_pythons_numbers(vars(content["opt"]))
    settings = {"similarity": "xdim", "gate": "adaptive"}
    settings |= {name: options[name] for name in SETTINGS if name in options}
    position = {"epoch": content.get("epoch", 0), "batch": 0, "step": content.get("Eiters", 0)}
    best = {"best_rsum": content.get("best_rsum", -1.0), "best_epoch": 0, "history": []}
    entries = {"architecture": describe(settings), "settings": settings, "progress": position | best}
    return {"model": weights, **entries, "data": {}, "versions": {}, "published": {"opt": options}}


def _with_pythons_numbers(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value.item() if isinstance(value, np.generic) else value for name, value in values.items()}


def revert(content: dict[str, Any]) -> dict[str, Any]:
    """The content of a published file, from a checkpoint's entries.

    One that was published gets its weights, `opt` and figures back; another one gets an `opt` of its own settings, and
    none of the weights that are never used. Raises InputError for a model that the published code does not know.
    """
    image, text, similarity = (
        content["architecture"][part] for part in ("image_encoder", "text_encoder", "similarity")
    )
    gate = similarity["options"].get("gate", {"name": ""})["name"]
    language = text["options"].get("config", {}).get("model_type", "bert")  # a published file does not carry it
    known = {
        f"{similarity['name']} {gate}".rstrip(): similarity["name"] == "xdim" and gate in PUBLISHED_GATES,
        "a global head": "global_head" not in content["architecture"],
        f"--image_encoder {image['name']}": image["name"] == "regions",
        f"a language model of the kind {language}": language == "bert",
    }
    if unknown := ", ".join(part for part, is_known in known.items() if not is_known):
        raise InputError(f"{content['path']}: the published code does not know {unknown}")
    parts = [OrderedDict() for _ in NAMES]
    for name, weight in content["model"].items():
        for part, names in zip(parts, PUBLISHED, strict=True):
            if (key := _renamed(name, names)) != name:
                part[PREFIX + key] = weight.reshape(1, -1) if name in MATRICES else weight
    progress, options = content["progress"], content.get("published", {"opt": content["settings"]})["opt"]
    figures = {"best_rsum": progress["best_rsum"], "opt": argparse.Namespace(**options), "Eiters": progress["step"]}
    return {"epoch": progress["epoch"], "model": parts, **figures}


def published_name(name: str) -> str:
    """The name, without the prefix, that a weight of ours has in its published state dict; ours where it has none."""
    return _renamed(name, ChainMap(*PUBLISHED))


def _renamed(name: str, names: Mapping[str, str]) -> str:
    """A name by the first of the names old -> new that it fits; itself where it fits none."""
    for old, new in names.items():
        if name.startswith(old) if old.endswith(".") else name == old:
            return new + name[len(old) :]
    return name
