"""Checkpoints of the published X-Dim release: into this project's entries and back.

They hold `model`, a list of three state dicts (image, text, similarity) with the prefix `module.`, and `opt`, an
argparse.Namespace, beside `epoch` (finished ones), `best_rsum` and `Eiters` (steps); docs/checkpoints.md says which
of their names is which symbol of the paper.
"""

import argparse
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from lib.cli import InputError
from lib.model.registry import PUBLISHED_GATES, describe

# Published name -> ours, for each of the three state dicts; those that end in a dot are starts of names.
NAMES = (
    {
        "fc.": "image_encoder.linear.",
        "mlp.layers.0.": "image_encoder.mlp.0.",
        "mlp.bns.0.": "image_encoder.mlp.1.",
        "mlp.layers.1.": "image_encoder.mlp.3.",
    },
    {"bert.": "text_encoder.backbone.", "linear.": "text_encoder.linear."},
    {
        "weights.weight": "similarity.gate.joint_logits",
        "sim_map.weight": "similarity.gate.threshold_scale",
        "temp_learnable.weight": "similarity.gate.log_sharpness",
        "temp_scale.weight": "similarity.log_temperature",
    },
)
# The published model has these and never uses them; the only weights that may be absent or surplus.
NEVER_USED = (("mlp.bns.1.",), ("bert.pooler.", "bert.embeddings.position_ids"), ("sim_eval.weight",))
KEPT = "never_used."  # start of our names for them
# The published similarity keeps vectors and scalars as matrices of 1 x D and 1 x 1.
DIMENSIONS = {
    "similarity.gate.threshold_scale": 1,
    "similarity.gate.log_sharpness": 0,
    "similarity.log_temperature": 0,
}
PREFIX = "module."
ENTRIES = ("epoch", "model", "best_rsum", "opt", "Eiters")
# The fields of `opt` that are settings here too; its paths, worker count and such are of the machine it came from.
SETTINGS = (
    *("data_name", "margin", "num_epochs", "batch_size", "learning_rate", "lr_update", "grad_clip", "max_violation"),
    *("vse_mean_warmup_epochs", "log_step", "img_dim", "embed_size", "no_imgnorm", "no_txtnorm", "mask_padding"),
)


def is_published(content: object) -> bool:
    """Whether a loaded file has the published form."""
    return (
        isinstance(content, dict)
        and isinstance(content.get("opt"), argparse.Namespace)
        and isinstance(content.get("model"), list)
        and len(content["model"]) == len(NAMES)
        and all(isinstance(part, dict) for part in content["model"])
    )


def convert(content: dict, path: Path) -> dict:
    """A published checkpoint in this project's entries, without those of the optimiser and the text model.

    Its entry `published` holds what `revert` needs beside them. Raises InputError listing weights of unknown names.
    """
    weights = _rename(content["model"], path)
    options = vars(content["opt"])
    settings = {"similarity": "xdim", "gate": "adaptive"}
    settings |= {name: options[name] for name in SETTINGS if name in options}
    return {
        "model": {name: _to_ours(name, weight) for name, weight in weights.items() if not name.startswith(KEPT)},
        "architecture": describe(settings),
        "settings": settings,
        "progress": {
            **{"epoch": content.get("epoch", 0), "batch": 0, "step": content.get("Eiters", 0)},
            **{"best_rsum": content.get("best_rsum", -1.0), "best_epoch": 0, "history": []},
        },
        **{"data": {}, "versions": {}},
        "published": {
            "entries": [name for name in content if name in ENTRIES],
            "opt": options,
            "keys": [list(part) for part in content["model"]],
            "never_used": {name: weight for name, weight in weights.items() if name.startswith(KEPT)},
        },
    }


def revert(content: dict) -> dict:
    """The content of a published file, from a checkpoint's entries.

    One that was published becomes what it was, to the bit; another one gets an `opt` of its own settings, and none of
    the weights that are never used. Raises InputError for a model that the published code does not know.
    """
    similarity = content["architecture"]["similarity"]
    gate = similarity["options"].get("gate", {"name": ""})
    if similarity["name"] != "xdim" or gate["name"] not in PUBLISHED_GATES:
        model = " ".join(part["name"] for part in (similarity, gate))
        raise InputError(f"{content['path']}: the published code does not know the similarity {model}")
    origin = content.get("published") or _origin(content)
    weights = {**content["model"], **origin["never_used"]}
    parts = [
        OrderedDict((key, _to_published(name, weights[name])) for key, name in zip(keys, names, strict=True))
        for keys, names in zip(origin["keys"], map(_our_names, range(len(NAMES)), origin["keys"]), strict=True)
    ]
    progress = content["progress"]
    entries = {
        **{"epoch": progress["epoch"], "model": parts, "best_rsum": progress["best_rsum"]},
        **{"opt": argparse.Namespace(**origin["opt"]), "Eiters": progress["step"]},
    }
    return {name: entries[name] for name in origin["entries"]}


def _origin(content: dict) -> dict:
    """The entry `published` for a checkpoint that never was."""
    keys = [[] for _ in NAMES]
    for name in content["model"]:
        keys[_part_of(name)].append(PREFIX + published_name(name))
    return {"entries": list(ENTRIES), "opt": content["settings"], "keys": keys, "never_used": {}}


def _rename(parts: list[dict], path: Path) -> dict[str, Tensor]:
    """All weights of the three state dicts by our names. Raises InputError."""
    keys = [key for part in parts for key in part]
    names = [name for part, keys_of in enumerate(parts) for name in _our_names(part, keys_of)]
    if unknown := [key for key, name in zip(keys, names, strict=True) if name is None]:
        raise InputError(f"{path}: surplus weights {listed(unknown)}")
    if twice := [key for key, name in zip(keys, names, strict=True) if names.count(name) > 1]:
        raise InputError(f"{path}: weights that are there with and without {PREFIX}: {listed(twice)}")
    return dict(zip(names, [weight for part in parts for weight in part.values()], strict=True))


def _our_names(part: int, keys: Iterable[str]) -> list[str | None]:
    """Our names for the keys of one of the three state dicts; None for an unknown key."""
    return [_our_name(part, str(key).removeprefix(PREFIX)) for key in keys]


def _our_name(part: int, key: str) -> str | None:
    if any(_means(entry, key) for entry in NEVER_USED[part]):
        return KEPT + key
    return next((ours + key[len(entry) :] for entry, ours in NAMES[part].items() if _means(entry, key)), None)


def published_name(name: str) -> str:
    """The name, without the prefix, that a weight of ours has in its published state dict; ours where it has none."""
    names = ((key, ours) for of_part in NAMES for key, ours in of_part.items())
    return next((key + name[len(ours) :] for key, ours in names if _means(ours, name)), name)


def _part_of(name: str) -> int:
    """Which of the three state dicts a weight of ours belongs to."""
    return next(part for part, names in enumerate(NAMES) if any(_means(ours, name) for ours in names.values()))


def _means(entry: str, name: str) -> bool:
    return name.startswith(entry) if entry.endswith(".") else name == entry


def _to_published(name: str, weight: Tensor) -> Tensor:
    return weight.reshape((1,) * (2 - DIMENSIONS[name]) + weight.shape) if name in DIMENSIONS else weight


def _to_ours(name: str, weight: Tensor) -> Tensor:
    leading = 2 - DIMENSIONS.get(name, 2)
    fits = weight.ndim == 2 and weight.shape[:leading] == (1,) * leading
    return weight.reshape(weight.shape[leading:]) if fits else weight


def listed(problems: list, most: int = 20) -> str:
    """The first of many, and how many more there are."""
    more = f" and {len(problems) - most} more" if len(problems) > most else ""
    return ", ".join(map(str, problems[:most])) + more
