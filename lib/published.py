"""Checkpoints of the published X-Dim release, brought into this project's form.

They hold `model`, a list of three state dicts (image, text, similarity) with the prefix `module.`, and `opt`, an
argparse.Namespace; see docs/method.md for which of their names is which symbol of the paper.
"""

import argparse
from pathlib import Path

from torch import Tensor

from lib.errors import InputError

ALLOWED_TYPES = [argparse.Namespace]  # the only type beside tensors and plain ones that loading may create

# Start of a published name -> start of ours, for each of the three state dicts.
NAMES = (
    {
        "fc.": "image_encoder.linear.",
        "mlp.layers.0.": "image_encoder.mlp.0.",
        "mlp.bns.0.": "image_encoder.mlp.1.",
        "mlp.layers.1.": "image_encoder.mlp.3.",
    },
    {"bert.": "text_encoder.bert.", "linear.": "text_encoder.linear."},
    {
        "weights.weight": "similarity.gate.joint_logits",
        "sim_map.weight": "similarity.gate.threshold_scale",
        "temp_learnable.weight": "similarity.gate.log_sharpness",
        "temp_scale.weight": "similarity.log_temperature",
    },
)
NEVER_USED = ("bert.pooler.", "bert.embeddings.position_ids", "mlp.bns.1.", "sim_eval.weight")


def is_published(content: object) -> bool:
    """Whether a loaded file has the published form."""
    return (
        isinstance(content, dict)
        and isinstance(content.get("opt"), argparse.Namespace)
        and isinstance(content.get("model"), list)
        and len(content["model"]) == len(NAMES)
    )


def convert(content: dict, path: Path) -> dict:
    """A published checkpoint in this project's form, without optimiser, BERT configuration and tokenizer.

    Raises InputError listing weights of unknown names.
    """
    options = vars(content["opt"])
    weights, unknown = {}, []
    for names, part in zip(NAMES, content["model"], strict=True):
        for name, weight in part.items():
            name = name.removeprefix("module.")
            start = next((start for start in names if name.startswith(start)), None)
            if start is not None and not name.startswith(NEVER_USED):
                weights[names[start] + name[len(start) :]] = _reshape(name, weight)
            elif not name.startswith(NEVER_USED):
                unknown.append(name)
    if unknown:
        raise InputError(f"{path}: surplus weights {', '.join(unknown)}")
    return {
        "model": weights,
        "architecture": {
            "img_dim": options.get("img_dim", 2048),
            "embed_size": options.get("embed_size", 1024),
            "no_imgnorm": options.get("no_imgnorm", False),
            "no_txtnorm": options.get("no_txtnorm", False),
            "mask_padding": False,
        },
        "settings": {"data_name": options.get("data_name", "")},
        "progress": {
            **{"epoch": content.get("epoch"), "batch": 0, "step": content.get("Eiters")},
            **{"best_rsum": content.get("best_rsum"), "best_epoch": 0, "history": []},
        },
    }


def _reshape(name: str, weight: Tensor) -> Tensor:
    """Published scalars are 1 x 1 and the threshold scales 1 x D tables."""
    if name.startswith("temp_"):
        return weight.reshape(()) if weight.numel() == 1 else weight
    return weight.squeeze(0) if name == "sim_map.weight" else weight
