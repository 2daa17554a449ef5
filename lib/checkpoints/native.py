"""Checkpoints: files of trained models, and how they become a model again.

Two forms of this project, with the same entries:
  model_best.safetensors      weights for use. Their metadata hold the other entries as JSON, and a SHA-256 of all
  step-00001234.pt, last.pt   what training needs to go on: torch.save of plain types, optimizer and random_state too

model          weights by name              architecture   what the model is built from: name and options of each part
tokenizer      its specification            settings       all settings of the run
progress       epoch, step, scores on dev   data           fingerprints of the train and dev splits
versions       of this code and its packages
optimizer      AdamW's state                random_state   of every generator that training draws from

Files of the published release are read into the same entries (published.py). See docs/checkpoints.md.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from lib.checkpoints import published
from lib.cli import InputError, reason
from lib.config import TrainSettings
from lib.data.tokenizer import Tokenizer, complete, load_tokenizer
from lib.files import replacing
from lib.model.backbone import build_backbone, has_weights, load_backbone, read_config
from lib.model.registry import describe
from lib.model.xdim import XDim

FORMAT = "x-dim checkpoint 3"
OLD_FORMAT = "x-dim checkpoint 2"
BEST, LAST = "model_best.pt", "last.pt"  # BEST becomes model_best.safetensors once training writes weights there
OLD_BEST = "model_best.pt"
ENTRIES = ("architecture", "tokenizer", "settings", "progress", "data", "versions")
STATE = ("model", *ENTRIES, "optimizer", "random_state")
BERT_BASE = "bert-base-uncased"
OLD_SETTINGS = {"hardness": ("loss", {"epochs": "hinge", "recall": "ramped"})}  # old name: new name, values


def find_checkpoint(checkpoint: str, runs: str = "runs") -> Path:
    """The file that `checkpoint` means: itself, the best of a run folder, or if empty the newest best below `runs`.

    Raises InputError where there is none.
    """
    bests = (BEST, OLD_BEST)
    if not checkpoint:
        found = [path for name in bests for path in Path(runs).glob(f"**/{name}")]
        if not found:
            raise InputError(
                f"no {BEST} below {runs}/: train first (sh train_demo.sh), or name a file with --checkpoint"
            )
        return max(found, key=lambda path: path.stat().st_mtime)
    path = Path(checkpoint)
    if path.is_dir():
        path = next((path / name for name in bests if (path / name).is_file()), path / BEST)
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint")
    return path


def verify(path: Path) -> None:
    """Compare a checkpoint's checksums with its content. Raises InputError where it is damaged."""
    with _refusing_damage(path):
        if _is_zip(path):
            _compare_checksums(path)
        else:
            _read_safetensors(path)


def read_checkpoint(path: Path, mapped: bool = False) -> dict:
    """The entries of a checkpoint of any form, `path`, and `notes`: a list of sentences on what was not taken from it.

    mapped: tensors of torch files are read from the disk when they are used, so that an optimiser's state that nobody
    uses takes no memory; the file must not change until then. No code in the file is run. Raises InputError where the
    file is damaged or not a checkpoint.
    """
    with _refusing_damage(path):
        if _is_zip(path):
            _compare_checksums(path)
            content = _load_torch(path, mapped)
        else:
            content = _read_safetensors(path)
    content = published.convert(content, path) if published.is_published(content) else _checked(content, path)
    content["path"] = str(path)
    content["settings"], content["notes"] = _known_settings(content["settings"])
    return content


def write_weights(path: Path, content: dict) -> None:
    """Write weights for use with all entries but optimizer and random_state. Raises InputError where that fails."""
    about = {"format": FORMAT, **{name: content[name] for name in ENTRIES if name in content}}
    weights = {name: weight.detach().cpu().contiguous() for name, weight in content["model"].items()}
    if origin := content.get("published"):
        weights |= origin["never_used"]
        about["published"] = {name: value for name, value in origin.items() if name != "never_used"}
    text = json.dumps(about)
    data = safetensors.torch.save(weights, {"about": text, "sha256": _digest(text, weights)})
    with replacing(path) as file:
        file.write(data)


def write_state(path: Path, content: dict) -> None:
    """Write all that training needs to go on, in place of an older file, which stays until the new one is on the disk.

    Raises InputError where that fails.
    """
    with replacing(path) as file:
        torch.save({"format": FORMAT, **{name: content[name] for name in STATE if name in content}}, file)


def write_published(path: Path, content: dict) -> None:
    """Write a checkpoint in the published form. Raises InputError where the published code does not know its model."""
    entries = published.revert(content)
    with replacing(path) as file:
        torch.save(entries, file)


@contextmanager
def _refusing_damage(path: Path) -> Iterator[None]:
    """Turn what a library raises for damaged bytes, which can be almost any exception, into InputError."""
    try:
        yield
    except Exception as error:
        # The first sentence: PyTorch goes on to advise loading without restriction.
        raise InputError(f"{path}: damaged, or not a checkpoint ({reason(error).split('. ')[0]})") from None


def _is_zip(path: Path) -> bool:
    with open(path, "rb") as file:
        start = file.read(4)
    if start == b"\x80\x02\x8a\n":
        raise ValueError("no checksums, as before PyTorch 1.6; torch.load it and torch.save it again")
    return start == b"PK\x03\x04"


def _compare_checksums(path: Path) -> None:
    """torch.load compares none of the CRC-32 that torch.save writes."""
    with zipfile.ZipFile(path) as archive:
        if damaged := archive.testzip():
            raise ValueError(f"the checksum of its record {damaged} is wrong")


def _load_torch(path: Path, mapped: bool) -> object:
    with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)


def _read_safetensors(path: Path) -> dict:
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if "about" not in metadata:
        raise ValueError("its metadata do not say what model its weights belong to")
    if metadata.get("sha256") != _digest(metadata["about"], weights):
        raise ValueError("its checksum is wrong")
    content = json.loads(metadata["about"])
    content["model"] = {name: weight for name, weight in weights.items() if not name.startswith(published.KEPT)}
    if "published" in content:
        never_used = {name: weight for name, weight in weights.items() if name.startswith(published.KEPT)}
        content["published"]["never_used"] = never_used
    return content


def _digest(about: str, weights: dict[str, Tensor]) -> str:
    """SHA-256 of the entries' JSON and of every weight's name, type, shape and bytes."""
    digest = hashlib.sha256(about.encode())
    for name, weight in sorted(weights.items()):
        digest.update(f"\n{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
        digest.update(weight.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _checked(content: object, path: Path) -> dict:
    """The entries of a file of this project, an older one's too. Raises InputError where it is none, or incomplete."""
    form = content.get("format") if isinstance(content, dict) else None
    if form not in (FORMAT, OLD_FORMAT):
        newer = f" (its format is {form!a}, from another version)" if str(form).startswith("x-dim") else ""
        raise InputError(f"{path}: not a checkpoint of this project, nor one of the published form{newer}")
    if missing := [name for name in ("model", *ENTRIES) if name not in content]:
        raise InputError(f"{path}: an incomplete checkpoint, it lacks {', '.join(missing)}")
    return content if form == FORMAT else _upgraded(content)


def _upgraded(content: dict) -> dict:
    """A checkpoint of OLD_FORMAT, whose architecture were flags and whose text model was always a BERT, in today's."""
    config = content.pop("bert_config")
    architecture = _with_text(describe(content["architecture"]), config, 0)
    weights = {
        name.replace("text_encoder.bert.", "text_encoder.backbone.", 1): weight
        for name, weight in content["model"].items()
    }
    tokenizer = complete(content["tokenizer"], config["max_position_embeddings"], "[PAD]", 0)
    return {**content, "format": FORMAT, "architecture": architecture, "model": weights, "tokenizer": tokenizer}


def _with_text(architecture: dict, config: dict, pad_id: int | None) -> dict:
    """An architecture completed by the text model's configuration."""
    text = architecture["text_encoder"]
    return {
        **architecture,
        "text_encoder": {**text, "options": {**text["options"], "config": config, "pad_id": pad_id}},
    }


def _known_settings(settings: dict) -> tuple[dict, list[str]]:
    """The settings that this version knows, and a note on the others."""
    kinds = {field.name: field.type for field in dataclasses.fields(TrainSettings)}
    for name, (new_name, values) in OLD_SETTINGS.items():
        if name in settings and new_name in kinds:
            settings = {**settings, new_name: values[settings[name]]}
            del settings[name]
    known = {name: value for name, value in settings.items() if _is_a(value, kinds.get(name))}
    ignored = [f"{name}={value!r}" for name, value in settings.items() if name not in known]
    notes = [f"settings that this version does not know are ignored: {', '.join(ignored)}"] if ignored else []
    return known, notes


def _is_a(value: object, kind: type | None) -> bool:
    return type(value) is kind or (kind is float and type(value) is int)


# To a model


def new_model(settings: dict) -> tuple[XDim, Tokenizer, str]:
    """A model to train, around a pretrained language model, with its tokenizer.

    settings: flags by name. Returns a sentence, too, on where the language model's weights come from. Raises
    InputError where there is no such language model, or parts do not fit each other.
    """
    name = settings["bert"]
    if os.path.isfile(name):
        raise InputError(f"--bert {name}: is a file; give the folder that holds config.json and the vocabulary")
    if not os.path.isdir(name):
        print(f"{name}: taken from the cache, or fetched from the Hugging Face hub", flush=True)
    with _refusing(f"--bert {name}: no language model of the transformers library"):
        config = read_config(name)
        pretrained = not os.path.isdir(name) or has_weights(name)
        backbone = load_backbone(name) if pretrained else build_backbone(config)
    tokenizer = load_tokenizer(name)
    try:
        model = XDim.build(_with_text(describe(settings), config, tokenizer.own_pad_id), backbone)
    except ValueError as error:  # it names the flag
        raise InputError(str(error)) from None
    kind = config["model_type"]
    note = f"starts from the weights of {name}" if pretrained else f"starts at random: {name} holds no weights"
    return model, tokenizer, f"the language model ({kind}) {note}"


def build_model(content: dict, bert: str = "") -> tuple[XDim, Tokenizer]:
    """The model and tokenizer of a checkpoint, weights loaded.

    bert: name or folder of the language model's configuration and vocabulary where the checkpoint carries none (a
    published one). Raises InputError where weights are missing, surplus or misshapen, listing them.
    """
    content = add_text(content, bert)
    model = XDim.build(content["architecture"])
    model.load_state_dict(content["model"])
    return model, Tokenizer(content["tokenizer"])


def add_text(content: dict, bert: str) -> dict:
    """A checkpoint with its language model's configuration and tokenizer: those of `bert` where it carries none.

    Raises InputError where they and the weights do not fit each other.
    """
    if "tokenizer" not in content:
        name = bert or BERT_BASE
        with _refusing(f"--bert {name}: no language model of the transformers library"):
            config = read_config(name)
        tokenizer = load_tokenizer(name)
        architecture = _with_text(content["architecture"], config, tokenizer.own_pad_id)
        content = {**content, "architecture": architecture, "tokenizer": tokenizer.specification}
    _check_weights(content)
    return content


@contextmanager
def _refusing(message: str) -> Iterator[None]:
    """Turn whatever a wrong name, a damaged file or sizes that do not fit each other lead to into InputError."""
    try:
        yield
    except Exception as error:
        raise InputError(f"{message} ({reason(error)})") from None


def _check_weights(content: dict) -> None:
    """Compare names and shapes of the weights with those of the model that the checkpoint describes.

    That model is built on the meta device, without memory. Raises InputError listing the weights that do not fit.
    """
    with _refusing(f"{content['path']}: describes no model that can be built"), torch.device("meta"):
        expected = XDim.build(content["architecture"]).state_dict()
    name_of = published.published_name if "published" in content else lambda name: name
    found, wanted = (
        {name: str(tuple(weight.shape)) for name, weight in weights.items()} for weights in (content["model"], expected)
    )
    problems = [f"missing {name_of(name)}" for name in wanted if name not in found]
    problems += [f"surplus {name_of(name)}" for name in found if name not in wanted]
    problems += [
        f"{name_of(name)} is {found[name]}, expected {shape}"
        for name, shape in wanted.items()
        if found.get(name, shape) != shape
    ]
    if problems:
        raise InputError(
            f"{content['path']}: its weights do not fit the model (is --bert right?): {published.listed(problems)}"
        )
