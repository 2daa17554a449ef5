"""Checkpoints: one file of plain types and tensors, complete enough to evaluate or to train on.

format         FORMAT
model          weights by name
architecture   img_dim, embed_size, no_imgnorm, no_txtnorm, mask_padding
bert_config    BERT's configuration         tokenizer      the tokenizer's JSON
settings       all settings of the run      progress       lib.training.progress.Progress: epoch, step, scores on dev
optimizer      AdamW's state                random_state   of every generator that training draws from
versions       of this code and its packages
data           fingerprints of the train and dev splits

Published files (published.py) and exchange folders (exchange.py) are read into the same form, without the last four
entries, and where nobody said what their BERT is, without bert_config and tokenizer. See docs/checkpoints.md.
"""

import dataclasses
import json
from pathlib import Path

import torch
from torch import Tensor

from lib.bert import BERT_BASE, build_bert, plain, read_config
from lib.checkpoints import archive, exchange, published
from lib.cli import InputError, reason
from lib.config import TrainSettings
from lib.data.tokenizer import Tokenizer, load_tokenizer
from lib.files import replacing
from lib.model.similarities import GATED, GATES, OWN_GATE, SIMILARITIES
from lib.model.xdim import XDim

FORM = "x-dim checkpoint "
FORMAT = FORM + "2"
TYPES = {
    **{"model": dict, "architecture": dict, "bert_config": dict, "tokenizer": str, "settings": dict, "progress": dict},
    **{"optimizer": dict, "random_state": dict, "versions": dict, "data": dict},
}
ARCHITECTURE = {
    **{"img_dim": int, "embed_size": int, "no_imgnorm": bool, "no_txtnorm": bool, "mask_padding": bool},
    **{"similarity": str, "gate": str},
}
ADDED = {"similarity": GATED, "gate": OWN_GATE}  # what checkpoints from before there was a choice do not say
PROGRESS = {"epoch": int, "batch": int, "step": int, "best_rsum": float, "best_epoch": int, "history": list}
# What of BERT's configuration decides over its layers; the rest could only make transformers do something else.
BERT_FIELDS = {
    **{"vocab_size": int, "hidden_size": int, "num_hidden_layers": int, "num_attention_heads": int},
    **{"intermediate_size": int, "max_position_embeddings": int, "type_vocab_size": int, "pad_token_id": int},
    **{"hidden_act": str, "layer_norm_eps": float, "initializer_range": float},
    **{"hidden_dropout_prob": float, "attention_probs_dropout_prob": float},
}
LAST, BEST = "last.pt", "model_best.pt"


def find_checkpoint(checkpoint: str, of_run: str = BEST, runs: str = "runs") -> Path:
    """What `checkpoint` means: a file or exchange folder itself, a run folder's `of_run`, or if empty the newest best
    below `runs`.

    Raises InputError where there is none.
    """
    if not checkpoint:
        found = sorted(Path(runs).glob(f"**/{BEST}"), key=lambda path: path.stat().st_mtime)
        if not found:
            raise InputError(
                f"no {BEST} below {runs}/: train first (sh train_demo.sh), or name a file with --checkpoint"
            )
        return found[-1]
    path = Path(checkpoint)
    if exchange.is_exchange(path):
        return path
    path = path / of_run if path.is_dir() else path
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint")
    return path


def verify(path: Path) -> None:
    """Compare all checksums of a checkpoint without loading it. Raises InputError where it is damaged."""
    (exchange if exchange.is_exchange(path) else archive).verify(path)


def read_checkpoint(path: Path, mapped: bool = False) -> dict:
    """The content of a checkpoint of any form in this project's form, checked; `path` is where it came from.

    mapped: weights are read when they are used, and an optimiser's state, twice as large, not at all; the file must not
    change until then. Never runs code from the file, and takes no more memory than it is large. Raises InputError where
    it is damaged or not a checkpoint.
    """
    content = exchange.read(path) if exchange.is_exchange(path) else _read_file(path, mapped)
    content["path"] = str(path)
    content["architecture"] = content["architecture"] | (ADDED | content["architecture"])
    for problem in _problems(content):
        raise InputError(f"{path}: not a sound checkpoint: {problem}")
    return content


def _read_file(path: Path, mapped: bool) -> dict:
    content = archive.load(path, mapped)
    if published.is_published(content):
        return published.convert(content, path)
    form = content.get("format") if isinstance(content, dict) else None
    if not isinstance(form, str) or not form.startswith(FORM):
        raise InputError(f"{path}: not a checkpoint of this project, nor one of the published form")
    if form != FORMAT:
        raise InputError(f"{path}: {form!a}, from another version of this code; this one reads {FORMAT!r}")
    if missing := [name for name, kind in TYPES.items() if not isinstance(content.get(name), kind)]:
        raise InputError(f"{path}: an incomplete checkpoint, it lacks {', '.join(missing)}")
    return {name: content[name] for name in ("format", *TYPES)}


def write_checkpoint(path: Path, content: dict) -> None:
    """Write a checkpoint in place of an older one, which stays until all of the new one is on the disk."""
    with replacing(path) as file:
        torch.save({"format": FORMAT, **content}, file)


def describe_architecture(model: XDim, settings: dict, tokenizer: Tokenizer) -> dict:
    """The parts of a checkpoint that say what to build before its weights can be loaded."""
    return {
        "architecture": {name: settings[name] for name in ARCHITECTURE},
        "bert_config": plain(model.text_encoder.bert.config),
        "tokenizer": tokenizer.specification,
    }


# What a checkpoint must hold


def _problems(content: dict):
    """What is wrong with the content of a checkpoint, one sentence each."""
    yield from _wrong_weights(content["model"])
    yield from _wrong_weights(content.get("published", {}).get("never_used", {}))
    yield from _wrong_fields("architecture", content["architecture"], ARCHITECTURE)
    yield from (
        f"architecture: {name} is {content['architecture'][name]}"
        for name in ("img_dim", "embed_size")
        if content["architecture"][name] < 1
    )
    yield from (
        f"architecture: unknown {name} {published.listed([content['architecture'][name]])}"
        for name, known in (("similarity", SIMILARITIES), ("gate", GATES))
        if content["architecture"][name] not in known
    )
    yield from _wrong_fields("progress", content["progress"], PROGRESS)
    yield from (f"progress: {name} is negative" for name in ("epoch", "batch", "step") if content["progress"][name] < 0)
    if not all(_is_measured(epoch) for epoch in content["progress"]["history"]):
        yield "progress: its history holds no scores on dev"
    yield from _wrong_settings(content["settings"])


def _wrong_weights(weights: dict):
    for name, weight in weights.items():
        if not isinstance(name, str) or not (name.isascii() and name.isprintable()):
            yield f"{name!a} is no name of a weight"
        elif type(weight) is not Tensor or weight.layout != torch.strided or weight.device.type != "cpu":
            yield f"{name} is no tensor of plain numbers"
        elif weight.is_quantized or weight.is_complex():
            yield f"{name} is a tensor of {weight.dtype}"


def _wrong_fields(part: str, values: dict, kinds: dict[str, type]):
    """Fields that are missing, surplus or of another type."""
    if set(values) != set(kinds):
        yield f"{part}: expected {', '.join(kinds)}, found {published.listed(list(values))}"
    for name, kind in kinds.items():
        if not _is_a(values[name], kind):
            yield f"{part}: {name} is no {kind.__name__}"


def _wrong_settings(settings: dict):
    kinds = {field.name: field.type for field in dataclasses.fields(TrainSettings)}
    for name, value in settings.items():
        if name not in kinds:
            yield f"settings: {name!a} is unknown"
        elif not _is_a(value, kinds[name]):
            yield f"settings: {name} is no {kinds[name].__name__}"


def _is_a(value: object, kind: type) -> bool:
    """Of that very type (True is no int), but an int will do for a float; numbers are finite and below 2**63."""
    if type(value) in (int, float) and not abs(value) < 2**63:
        return False
    return type(value) is kind or (kind is float and type(value) is int)


def _is_measured(epoch: object) -> bool:
    dev = epoch.get("dev") if isinstance(epoch, dict) else None
    return isinstance(dev, dict) and _is_a(dev.get("rsum"), float)


# From a checkpoint to a model


def build_model(content: dict, bert: str = "") -> tuple[XDim, Tokenizer]:
    """The model and tokenizer of a checkpoint, weights loaded.

    bert: name or folder of the configuration and vocabulary where the checkpoint carries none (a published one).
    Raises InputError where weights are missing, surplus or misshapen, listing them.
    """
    content = add_bert(content, bert or BERT_BASE)
    model = new_model(build_bert(_bert_fields(content)), content["architecture"])
    model.load_state_dict(content["model"])
    return model, _tokenizer(content)


def add_bert(content: dict, bert: str) -> dict:
    """A checkpoint with BERT's configuration and tokenizer, those of `bert` where it carries none itself.

    Raises InputError where they and the weights do not fit each other.
    """
    if "bert_config" not in content:
        config = plain(read_config(bert))
        tokenizer = load_tokenizer(bert, config["max_position_embeddings"], config["vocab_size"])
        content = {**content, "bert_config": config, "tokenizer": tokenizer.specification}
    _check_weights(content)
    _tokenizer(content)
    return content


def _bert_fields(content: dict) -> dict:
    """The fields of BERT's configuration that decide over its layers. Raises InputError."""
    config = {name: content["bert_config"].get(name) for name in BERT_FIELDS}
    problems = list(_wrong_fields("bert_config", config, BERT_FIELDS))
    sizes = [name for name, kind in BERT_FIELDS.items() if kind is int and name != "pad_token_id"]
    for problem in problems or [f"bert_config: {name} is {config[name]}" for name in sizes if config[name] < 1]:
        raise InputError(f"{content['path']}: {problem}")
    if config["num_hidden_layers"] > len(content["model"]):
        raise InputError(f"{content['path']}: too few weights for a BERT of {config['num_hidden_layers']} layers")
    return config


def _tokenizer(content: dict) -> Tokenizer:
    """The tokenizer that a checkpoint carries. Raises InputError where it is damaged or knows more words than BERT."""
    config = content["bert_config"]
    try:
        tokenizer = Tokenizer(content["tokenizer"], config["max_position_embeddings"])
        last = max(json.loads(content["tokenizer"])["model"]["vocab"].values())
    except Exception as error:  # the tokenizers library raises plain Exception
        raise InputError(f"{content['path']}: its tokenizer is damaged ({reason(error)})") from None
    if max(last + 1, tokenizer.vocab_size) > config["vocab_size"]:
        raise InputError(f"{content['path']}: its tokenizer knows more words than its BERT ({config['vocab_size']})")
    return tokenizer


def new_model(bert, settings: dict) -> XDim:
    """An X-Dim of random weights around a BERT."""
    return XDim(
        bert,
        img_dim=settings["img_dim"],
        embed_size=settings["embed_size"],
        normalize_regions=not settings["no_imgnorm"],
        normalize_words=not settings["no_txtnorm"],
        mask_padding=settings["mask_padding"],
        similarity=settings["similarity"],
        gate=settings["gate"],
    )


def _check_weights(content: dict) -> None:
    """Raises InputError listing the weights that do not fit the model that the checkpoint describes.

    That model is built without memory: what a damaged or hostile file describes may be larger than any.
    """
    config = _bert_fields(content)
    try:
        with torch.device("meta"):
            expected = new_model(build_bert(config), content["architecture"]).state_dict()
    except Exception as error:  # whatever sizes that do not fit each other lead to
        raise InputError(f"{content['path']}: describes no model that can be built ({reason(error)})") from None
    if problems := _misfits(content, expected):
        raise InputError(
            f"{content['path']}: its weights do not fit the model (is --bert right?): {published.listed(problems)}"
        )


def _misfits(content: dict, expected: dict[str, Tensor]) -> list[str]:
    """Weights that are missing, surplus or misshapen, by the names and shapes that they have in the file."""
    found = content.get("published", {}).get("shapes")
    if found is None:
        found = {name: published.describe(weight) for name, weight in content["model"].items()}
        wanted = {name: published.describe(weight) for name, weight in expected.items()}
    else:
        wanted = {
            published.published_name(name)[1]: published.describe(published.to_published(name, weight))
            for name, weight in expected.items()
        }
    problems = [f"missing {name}" for name in wanted if name not in found]
    problems += [f"surplus {name}" for name in found if name not in wanted]
    misshapen = [name for name in wanted if name in found and found[name] != wanted[name]]
    return problems + [f"{name} is {found[name]}, expected {wanted[name]}" for name in misshapen]
