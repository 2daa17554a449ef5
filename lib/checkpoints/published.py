"""Checkpoints of the published X-Dim release, brought into this project's form and back.

They hold `model`, a list of three state dicts (image, text, similarity) with the prefix `module.`, and `opt`, an
argparse.Namespace, beside `epoch` (finished ones), `best_rsum` and `Eiters` (steps); docs/checkpoints.md says which
of their names is which symbol of the paper.
"""

import argparse
from collections import Counter, OrderedDict
from pathlib import Path

from torch import Tensor

from lib.cli import InputError
from lib.model.similarities import GATED, PUBLISHED_GATES

# Published name -> ours, for each of the three state dicts; those that end in a dot are starts of names.
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
# The published model has these and never uses them; the only weights that may be absent or surplus.
NEVER_USED = (("mlp.bns.1.",), ("bert.pooler.", "bert.embeddings.position_ids"), ("sim_eval.weight",))
KEPT = "never_used."  # start of our names for them
# The published similarity keeps everything in tables; what has fewer dimensions here has leading ones there.
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
ARCHITECTURE = {"img_dim": 2048, "embed_size": 1024, "no_imgnorm": False, "no_txtnorm": False, "mask_padding": False}


def is_published(content: object) -> bool:
    """Whether a loaded file has the published form."""
    return (
        isinstance(content, dict)
        and isinstance(content.get("opt"), argparse.Namespace)
        and all(isinstance(name, str) for name in vars(content["opt"]))
        and isinstance(content.get("model"), list)
        and len(content["model"]) == len(NAMES)
        and all(isinstance(part, dict) for part in content["model"])
    )


def convert(content: dict, path: Path) -> dict:
    """A published checkpoint in this project's form, without optimiser, BERT configuration and tokenizer.

    Its entry `published` holds what our form has no place for; `shapes` there describe the weights as they are in the
    file. Raises InputError listing weights of unknown names, or such that occur with and without the prefix.
    """
    weights = rename(content["model"], path)
    options = vars(content["opt"])
    used = {name: weight for name, weight in weights.items() if not name.startswith(KEPT)}
    return {
        "model": {name: _from_table(name, weight) for name, weight in used.items()},
        "architecture": {name: options.get(name, value) for name, value in ARCHITECTURE.items()},
        "settings": {name: options[name] for name in SETTINGS if name in options},
        "progress": {
            **{"epoch": content.get("epoch", 0), "batch": 0, "step": content.get("Eiters", 0)},
            **{"best_rsum": content.get("best_rsum", -1.0), "best_epoch": 0, "history": []},
        },
        "published": {
            "entries": [name for name in content if name in ENTRIES],
            "opt": options,
            "keys": [list(part) for part in content["model"]],
            "never_used": {name: weight for name, weight in weights.items() if name.startswith(KEPT)},
            "shapes": {published_name(name)[1]: describe(weight) for name, weight in used.items()},
        },
    }


def revert(content: dict) -> dict:
    """The content of a published file from a checkpoint in this project's form.

    One that was published once becomes what it was, to the bit; another one gets an `opt` of its own settings, and no
    weights that are never used. Raises InputError for a model that the published code does not know.
    """
    for name, known in (("similarity", (GATED,)), ("gate", PUBLISHED_GATES)):
        if (found := content["architecture"].get(name, known[0])) not in known:
            raise InputError(f"{content['path']}: the published code does not know --{name} {found}")
    origin = content.get("published") or _origin(content)
    weights = {**content["model"], **origin["never_used"]}
    parts = [
        OrderedDict((key, to_published(name, weights[name])) for key, name in zip(keys, names, strict=True))
        for keys, names in zip(origin["keys"], our_names(origin["keys"]), strict=True)
    ]
    progress = content["progress"]
    entries = {
        **{"epoch": progress["epoch"], "model": parts, "best_rsum": progress["best_rsum"]},
        **{"opt": argparse.Namespace(), "Eiters": progress["step"]},
    }
    vars(entries["opt"]).update(origin["opt"])
    return {name: entries[name] for name in origin["entries"]}


def _origin(content: dict) -> dict:
    """The entry `published` for a checkpoint that never was."""
    keys = [[] for _ in NAMES]
    for name in content["model"]:
        part, key = published_name(name)
        keys[part].append(PREFIX + key)
    options = {**content["settings"], **content["architecture"]}
    return {"entries": list(ENTRIES), "opt": options, "keys": keys, "never_used": {}}


def rename(parts: list[dict], path: Path) -> dict[str, Tensor]:
    """All weights of the three state dicts by our names. Raises InputError."""
    keys = [key for part in parts for key in part]
    weights = [weight for part in parts for weight in part.values()]
    names = [name for part in our_names(parts) for name in part]
    if strange := [key for key, weight in zip(keys, weights, strict=True) if not isinstance(weight, Tensor)]:
        raise InputError(f"{path}: no tensors, where weights were expected: {listed(strange)}")
    if unknown := [key for key, name in zip(keys, names, strict=True) if name is None]:
        raise InputError(f"{path}: surplus weights {listed(unknown)}")
    times = Counter(names)
    if twice := [key for key, name in zip(keys, names, strict=True) if times[name] > 1]:
        raise InputError(f"{path}: weights that are there with and without {PREFIX}: {listed(twice)}")
    return dict(zip(names, weights, strict=True))


def our_names(parts: list) -> list[list[str | None]]:
    """Our names for the keys of the three state dicts; None for a key that is none of theirs."""
    return [[_our_name(part, str(key)) for key in keys] for part, keys in enumerate(parts)]


def _our_name(part: int, key: str) -> str | None:
    key = key.removeprefix(PREFIX)
    if any(_means(entry, key) for entry in NEVER_USED[part]):
        return KEPT + key
    return next((ours + key[len(entry) :] for entry, ours in NAMES[part].items() if _means(entry, key)), None)


def published_name(name: str) -> tuple[int, str]:
    """Which state dict a weight of ours belongs to, and its name there without the prefix. Raises KeyError."""
    for part, names in enumerate(NAMES):
        for key, ours in names.items():
            if _means(ours, name):
                return part, key + name[len(ours) :]
    raise KeyError(name)


def _means(entry: str, name: str) -> bool:
    return name.startswith(entry) if entry.endswith(".") else name == entry


def to_published(name: str, weight: Tensor) -> Tensor:
    """A weight of ours in its published shape: the gate's thresholds are 1 x D, scalars 1 x 1."""
    return weight.reshape((1,) * (2 - DIMENSIONS[name]) + weight.shape) if name in DIMENSIONS else weight


def _from_table(name: str, weight: Tensor) -> Tensor:
    leading = 2 - DIMENSIONS.get(name, 2)
    fits = weight.ndim == 2 and weight.shape[:leading] == (1,) * leading
    return weight.reshape(weight.shape[leading:]) if fits else weight


def describe(weight: Tensor) -> str:
    """Shape and kind of a weight, for comparison and for error texts."""
    return str(tuple(weight.shape)) + ("" if weight.is_floating_point() else " of integers")


def listed(problems: list[str], most: int = 20) -> str:
    """The first of many, and how many more there are."""
    more = f" and {len(problems) - most} more" if len(problems) > most else ""
    return ", ".join(ascii(problem[:200])[1:-1] for problem in map(str, problems[:most])) + more
