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
import errno
import hashlib
import json
import os
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError, RevisionNotFoundError
from torch import Tensor

from lib.checkpoints import published
from lib.cli import QUOTED, InputError, reason, refusing
from lib.config import HUB_NAME, TrainSettings
from lib.data.tokenizer import Tokenizer, complete, load_tokenizer
from lib.files import replacing
from lib.model.backbone import HUB_SECONDS, ask_hub, build_backbone, fetch, load_backbone, read_config
from lib.model.registry import describe, is_from_pixels
from lib.model.vision import VisionModel, load_recorded, load_vision
from lib.model.xdim import XDim

FORMAT, OLD_FORMAT = "x-dim checkpoint 3", "x-dim checkpoint 2"
BEST, LAST = "model_best.safetensors", "last.pt"
OLD_BEST = "model_best.pt"  # of run folders from before there was BEST; it holds the state of training too
ENTRIES = ("architecture", "tokenizer", "settings", "progress", "data", "versions")
STATE = ("model", *ENTRIES, "optimizer", "random_state")
IMAGE_SIZE = 256  # pixels of a picture's sides, as published
BERT_BASE = "bert-base-uncased"
OLD_HARDNESS = {"epochs": "hinge", "recall": "ramped"}  # --hardness, as it was, to --loss
SCALAR: Any = np.float64().__reduce__()[0]  # what makes a NumPy number of its bytes; NumPy 1 has another name for it
NUMBERS = [type(np.dtype(kind)) for kind in np.typecodes["AllInteger"] + np.typecodes["Float"] + "?"]
PLAIN = [argparse.Namespace, np.dtype, *NUMBERS, SCALAR, (SCALAR, "numpy.core.multiarray.scalar")]  # beside tensors
DAMAGED = "damaged, or not a checkpoint"
UNKNOWN = "holds what no version of this program writes"
ENDINGS = (".safetensors", ".pt", ".pth", ".tar")  # of files that are checkpoints, not of names on the hub
HUB_ERRORS = {
    RepositoryNotFoundError: "no such model, or one that needs a token: hf auth login, or HF_TOKEN",
    RevisionNotFoundError: "no such revision",
    OfflineModeIsEnabled: "HF_HUB_OFFLINE is set",
}
MOST_LISTED = 20  # of the weights that do not fit


def find_checkpoint(checkpoint: str, runs: str = "runs") -> Path:
    """The file that `checkpoint` means: itself, the best of a run folder, or if empty the newest best below `runs`.

    Else OWNER/NAME or OWNER/NAME@REVISION is a model of the Hugging Face hub, fetched once. Raises InputError.
    """
    path = Path(checkpoint or runs)
    found = [file for name in (BEST, OLD_BEST) for file in path.glob(name if checkpoint else f"**/{name}")]
    if found:
        return max(found, key=lambda file: file.stat().st_mtime)
    if not checkpoint:
        raise InputError(f"no {BEST} below {runs}/: train first (sh train_demo.sh), or name a file with --checkpoint")
    if (path / LAST).is_file():
        raise InputError(f"{path / BEST}: no such checkpoint, no epoch has ended; {path / LAST} is the newest one")
    if path.is_file():
        return path
    name = HUB_NAME.fullmatch(checkpoint)
    if name and not os.path.isdir(name[1]) and not checkpoint.endswith(ENDINGS):
        return _from_hub(checkpoint, f"{name[1]}/{name[2]}", name[3] or "main")
    raise InputError(f"{path / BEST if path.is_dir() else path}: no such checkpoint")


def _from_hub(given: str, name: str, revision: str) -> Path:
    """The weights of a model of the Hugging Face hub, in its library's cache: the newest of the revision.

    Where the hub does not answer they are those that were fetched before. Raises InputError where there are none.
    """
    kept = None
    try:
        cached = try_to_load_from_cache(name, BEST, revision=revision)
        kept = Path(cached) if isinstance(cached, str) else None
        if kept and kept.parent.name == revision:  # a commit, which does not change
            return kept
        about = ask_hub(HfApi().model_info, name, revision=revision, files_metadata=True)
    except Exception as error:
        if not kept:
            what = f"{given}: no such file or folder here, nor had from the Hugging Face hub"
            raise InputError(f"{what} ({hub_says(error)})") from None
        print(f"{known_as(kept)}: as fetched before, without the Hugging Face hub ({hub_says(error)})", flush=True)
        return kept
    sizes = {file.rfilename: file.size or 0 for file in about.siblings or ()}
    if BEST not in sizes:
        raise InputError(f"{given}: not a model of this project, there is no {BEST} among its files on the hub")
    if not isinstance(try_to_load_from_cache(name, BEST, revision=about.sha), str):
        print(f"{name}@{about.sha}: {sizes[BEST] / 1e6:.1f} MB are fetched from {HfApi().endpoint}", flush=True)
    with refusing(f"{given}: could not be fetched from the Hugging Face hub"):
        return Path(hf_hub_download(name, BEST, revision=revision, etag_timeout=HUB_SECONDS))


def hub_says(error: Exception) -> str:
    """Why the hub did not give what was asked, in a few words."""
    words = (words for kind, words in HUB_ERRORS.items() if isinstance(error, kind))
    return next(words, "") or reason(error).split(". ")[0]


def known_as(path: Path) -> str:
    """A path as given; of a file in the hub's cache OWNER/NAME@COMMIT, which find_checkpoint takes on any machine."""
    found = re.search(r"/models--([^/]+)/snapshots/(\w{40})/", path.as_posix())
    return f"{found[1].replace('--', '/')}@{found[2]}" if found else str(path)


class Damaged(InputError):
    """A file does not hold what was written: a checksum is wrong, or a part is missing."""


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns what libraries raise for damaged bytes into Damaged. InputError where a file cannot be read at all."""
    try:
        yield
    except InputError:
        raise
    except (OSError, MemoryError) as error:
        if isinstance(error, OSError) and error.errno in (None, errno.EINVAL):  # a place beyond the file's end
            raise Damaged(f"{path}: {DAMAGED} ({reason(error)})") from None
        raise InputError(f"{path}: cannot be read ({reason(error)})") from None
    except Exception as error:
        why = reason(error).split(". ")[0]  # PyTorch goes on to advise loading without restriction
        raise Damaged(f"{path}: {DAMAGED} ({why})") from None


def verify(path: Path) -> None:
    """Compare a checkpoint's checksums with its content. Raises Damaged, or InputError where it cannot be read."""
    with reading(path):
        if not _is_sound_archive(path):
            _read_safetensors(path)


def read_checkpoint(path: Path, mapped: bool = False) -> dict[str, Any]:
    """The entries of a checkpoint of any form, `path`, and `notes`: a list of sentences on what was not taken from it.

    mapped: tensors of torch files are read from the disk when they are used; the file must not change until then. No
    code in the file is run. Raises Damaged, or InputError where it cannot be read or is no checkpoint of these forms.
    """
    with reading(path):
        if _is_sound_archive(path):
            with torch.serialization.safe_globals(PLAIN):
                if others := torch.serialization.get_unsafe_globals_in_checkpoint(path):
                    how = "torch.load it where you trust it, torch.save plain types"
                    raise InputError(f"{path}: holds {others[0]}; {how}")
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        else:
            content = _read_safetensors(path)
    content = published.convert(content) if published.is_published(content) else _current(content, path)
    with refusing(f"{path}: {UNKNOWN}"):
        settings, notes = _known_settings(content["settings"])
        _check_values({} if "published" in content else settings, content["progress"])
    return {**content, "path": known_as(path), "settings": settings, "notes": notes}


def _is_sound_archive(path: Path) -> bool:
    """Whether a file is torch.save's zip archive. ValueError where a checksum is wrong: torch.load compares none."""
    with open(path, "rb") as file:
        start = file.read(4)
    if start == b"\x80\x02\x8a\n":
        raise InputError(f"{path}: no checksums, as before PyTorch 1.6; torch.load it and torch.save it again")
    if start != b"PK\x03\x04":
        return False
    with zipfile.ZipFile(path) as archive:
        if damaged := archive.testzip():
            raise ValueError(f"the checksum of its record {damaged} is wrong")
    return True


def _read_safetensors(path: Path) -> dict[str, Any]:
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if "about" not in metadata:
        raise InputError(f"{path}: its metadata do not say what model its weights belong to")
    if metadata.get("sha256") != digest(metadata["about"], weights):
        raise ValueError("its checksum is wrong")
    return {**json.loads(metadata["about"]), "model": weights, "sha256": metadata["sha256"]}


def digest(about: str, weights: dict[str, Tensor]) -> str:
    """SHA-256 of the entries' JSON and of every weight's name, type, shape and bytes."""
    digest = hashlib.sha256(about.encode())
    for name, weight in sorted(weights.items()):
        digest.update(f"\n{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
        digest.update(weight.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _current(content: Any, path: Path) -> dict[str, Any]:
    """The entries of a file of this project, an older one's in today's form. Raises InputError where it is none."""
    form = content.get("format") if isinstance(content, dict) else None
    if form not in (FORMAT, OLD_FORMAT):
        newer = f" (its format is {form!a}, from another version)" if str(form).startswith("x-dim") else ""
        raise InputError(f"{path}: not a checkpoint of this project, nor one of the published form{newer}")
    if form == FORMAT:
        return content
    config = content["bert_config"]  # the architecture were flags and the text model a BERT
    content["architecture"] = _with_text(describe(content["architecture"]), config, pad_id=0)
    content["tokenizer"] = complete(content["tokenizer"], config["max_position_embeddings"], "[PAD]", 0)
    content["model"] = {name.replace("_encoder.bert.", "_encoder.backbone."): w for name, w in content["model"].items()}
    return content


def _with_text(architecture: dict, config: dict, pad_id: int | None) -> dict:
    """An architecture with the language model's configuration among its text encoder's options."""
    text = architecture["text_encoder"]
    options = {**text["options"], "config": config, "pad_id": pad_id}
    return {**architecture, "text_encoder": {**text, "options": options}}


def _check_values(settings: dict, progress: dict) -> None:
    """Raises what Python does, or ValueError, where a setting is none that a flag gives, or progress is no numbers."""
    for name, value in settings.items():
        field = TrainSettings.__dataclass_fields__[name]
        kinds = {type(field.default), int} if type(field.default) is float else {type(field.default)}
        if type(value) not in kinds or (value and value not in field.metadata.get("choices", [value])):
            raise ValueError(f"{name}={value!a}")
    counts = [progress[name] for name in ("epoch", "batch", "step", "best_epoch")]
    if any(type(count) is not int or count < 0 for count in counts):
        raise ValueError(f"progress {counts!a}"[:QUOTED])
    numbers = [*counts, progress["best_rsum"]]
    numbers += [number for one in progress["history"] for number in (one["epoch"], one["step"], one["dev"]["rsum"])]
    for number in numbers:
        if type(number) not in (int, float) or not abs(number) < 2**63:
            raise ValueError(f"progress {number!a}"[:QUOTED])


def _known_settings(settings: dict) -> tuple[dict, list[str]]:
    """The settings that this version knows, and a note on the others."""
    if "hardness" in settings:
        settings = {"loss": OLD_HARDNESS[settings["hardness"]], **settings}
    names = TrainSettings.__dataclass_fields__
    ignored = [f"{name}={value!r}" for name, value in settings.items() if name not in (*names, "hardness")]
    notes = [f"settings that this version does not know are ignored: {', '.join(ignored)}"] if ignored else []
    return {name: value for name, value in settings.items() if name in names}, notes


def write_weights(path: Path, content: dict[str, Any]) -> None:
    """Write weights for use with all entries but optimizer and random_state. Raises InputError where that fails."""
    entries = {name: content[name] for name in (*ENTRIES, "published") if name in content}
    about = json.dumps({"format": FORMAT, **entries})
    weights = {name: weight.detach().cpu().contiguous() for name, weight in content["model"].items()}
    with replacing(path) as file:
        file.write(safetensors.torch.save(weights, {"about": about, "sha256": digest(about, weights)}))


def write_state(path: Path, content: dict[str, Any]) -> None:
    """Write all that training needs to go on. Raises InputError where that fails; an older file is there then."""
    with replacing(path) as file:
        torch.save({"format": FORMAT, **{name: content[name] for name in STATE if name in content}}, file)


def write_published(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint in the published form. Raises InputError where the published code does not know its model."""
    with replacing(path) as file:
        torch.save(published.revert(content), file)


def new_model(settings: dict[str, Any]) -> tuple[XDim, Tokenizer, str]:
    """A model to train, its tokenizer, and a sentence on where the language model's weights come from.

    settings: flags by name. Raises InputError where there is no such language model, or parts do not fit each other.
    """
    name = settings["bert"]
    if os.path.isfile(name):
        raise InputError(f"--bert {name}: is a file; give the folder that holds config.json and the vocabulary")
    config, tokenizer = _read_text(name)
    from_scratch = settings.get("bert_from_scratch", False)
    with refusing(f"--bert {name}: no weights to start from; --bert_from_scratch starts at random"):
        backbone = build_backbone(config) if from_scratch else load_backbone(name)
    try:
        architecture = _with_text(describe(settings), config, tokenizer.own_pad_id)
        model = XDim.build(architecture, backbone, _load_vision(architecture["image_encoder"], settings))
    except ValueError as error:  # it names the flag
        raise InputError(str(error)) from None
    note = "starts at random (--bert_from_scratch)" if from_scratch else f"starts from the weights of {name}"
    return model, tokenizer, f"the language model ({config['model_type']}) {note}"


def _load_vision(image: dict, settings: dict[str, Any]) -> VisionModel | None:
    """The pretrained vision model of an image encoder that has one; its options get what it is built from."""
    if not is_from_pixels(image):
        if given := [f"--{name}" for name in ("image_size", "image_weights") if settings.get(name)]:
            raise InputError(f"{', '.join(given)}: --image_encoder {image['name']} takes no pictures")
        return None
    options = image["options"]
    options["image_size"] = options["image_size"] or (0 if options["model"].startswith("hf:") else IMAGE_SIZE)
    with refusing(f"--image_encoder {options['model']}"):
        regions, whole, weights = options.get("regions", 0), options.get("whole", False), settings.get("image_weights")
        vision = load_vision(options["model"], regions, weights or "", options["image_size"], whole)
        vision.refuse_training()
    options["config"] = vision.config
    return vision


def with_vision(content: dict[str, Any], name: str, weights_file: str) -> dict[str, Any]:
    """A checkpoint on regions as one from pixels, by the vision model `name` that made them. Raises InputError."""
    record = trained_encoder(content) or {"encoder": "another program"}
    both_hf = name.startswith("hf:") and record["encoder"].startswith("hf:")  # of which weights say more than names
    if record["encoder"] != name and not both_hf:
        raise InputError(f"{content['path']}: its regions were made by {record['encoder']}, not by {name}")
    with refusing(f"--image_encoder {name}"):
        vision = load_recorded({**record, "encoder": name}, weights_file)
        vision.refuse_training()
    options = content["architecture"]["image_encoder"]["options"]
    given = {"model": name, "regions": record["regions"], "image_size": vision.preprocessing.size[0], "mlp": True}
    given |= {"whole": record["whole"], "config": vision.config}
    given |= {key: options[key] for key in ("normalize", "mask_padding", "mlp") if key in options}
    weights = {f"image_encoder.vision.{key}": weight for key, weight in vision.state_dict().items()}
    architecture = {**content["architecture"], "image_encoder": {"name": "pixels", "options": given}}
    return {**content, "architecture": architecture, "model": content["model"] | weights}


def trained_encoder(content: dict) -> dict | None:
    """What made the regions that a checkpoint was trained on, as its data set said (dataset.read_encoder)."""
    return (content.get("data") or {}).get("train", {}).get("encoder")


def build_model(content: dict[str, Any], bert: str = "") -> tuple[XDim, Tokenizer]:
    """The model and tokenizer of a checkpoint, weights loaded. bert, and what is raised: as of `add_text`."""
    content, tokenizer = add_text(content, bert)
    model = XDim.build(content["architecture"])
    model.load_state_dict(content["model"], strict=False)  # all that it uses are there, see add_text
    return model, tokenizer


def add_text(content: dict[str, Any], bert: str) -> tuple[dict[str, Any], Tokenizer]:
    """A checkpoint with its language model's configuration and tokenizer: those of `bert` where it carries none.

    Raises InputError where the tokenizer, or names or shapes of weights (listed), are not those of its model.
    """
    if "tokenizer" in content:
        again = "write it again from its training or, with a whole --bert folder, from the published file"
        with refusing(f"{content['path']}: its tokenizer cannot be used; {again}"):
            config = content["architecture"]["text_encoder"]["options"]["config"]
            tokenizer = Tokenizer(content["tokenizer"], config["vocab_size"], content["path"])
    else:
        config, tokenizer = _read_text(bert or BERT_BASE)
        architecture = _with_text(content["architecture"], config, tokenizer.own_pad_id)
        content = {**content, "architecture": architecture, "tokenizer": tokenizer.specification}
    path, name_of = content["path"], published.published_name if "published" in content else str
    with refusing(f"{path}: describes no model that can be built"), torch.device("meta"):  # which takes no memory
        wanted = _shapes(XDim.build(content["architecture"]).state_dict())
    found = _shapes(content["model"])
    problems = [
        f"{name_of(name)} is {found.get(name, 'missing')}, expected {wanted.get(name, 'no such weight')}"
        for name in wanted | found
        if found.get(name) != wanted.get(name)
    ]
    if problems:
        more = f" and {len(problems) - MOST_LISTED} more" if len(problems) > MOST_LISTED else ""
        listed = ", ".join(problems[:MOST_LISTED]) + more
        raise InputError(f"{path}: its weights do not fit the model (is --bert right?): {listed}")
    return content, tokenizer


def _read_text(name: str) -> tuple[dict, Tokenizer]:
    """Configuration and tokenizer of a language model. Raises InputError."""
    with refusing(f"--bert {name}: no such folder, nor had from the Hugging Face hub; give a whole model's folder"):
        fetch(name)
    with refusing(f"--bert {name}: no language model of the transformers library"):
        config = read_config(name)
    return config, load_tokenizer(name)


def _shapes(weights: dict[str, Tensor]) -> dict[str, tuple]:
    return {name: tuple(weight.shape) for name, weight in weights.items() if not name.startswith(published.NEVER)}
