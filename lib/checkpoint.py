"""Checkpoints of this project: one file of plain types and tensors, complete enough to evaluate or to train on.

format         FORMAT
model          weights by name
architecture   img_dim, embed_size, no_imgnorm, no_txtnorm, mask_padding
bert_config    BERT's configuration         tokenizer      the tokenizer's JSON
settings       all settings of the run      progress       lib.training.progress.Progress: epoch, step, scores on dev
optimizer      AdamW's state                random_state   of every generator that training draws from
versions       of this code and its packages
data           fingerprints of the train and dev splits
"""

import warnings
from pathlib import Path

import torch

from lib import published
from lib.bert import BERT_BASE, build_bert, plain, read_config
from lib.data.tokenizer import Tokenizer, load_tokenizer
from lib.errors import InputError, reason
from lib.files import replacing
from lib.model.xdim import XDim

FORMAT = "x-dim checkpoint 2"
ARCHITECTURE = ("img_dim", "embed_size", "no_imgnorm", "no_txtnorm", "mask_padding")
TYPES = {
    **{"model": dict, "architecture": dict, "bert_config": dict, "tokenizer": str, "settings": dict, "progress": dict},
    **{"optimizer": dict, "random_state": dict, "versions": dict, "data": dict},
}
LAST, BEST = "last.pt", "model_best.pt"
LISTED = 20  # weights that do not fit, named in an error


def find_checkpoint(checkpoint: str, of_run: str = BEST, runs: str = "runs") -> Path:
    """The file that `checkpoint` means: itself, a run folder's `of_run`, or if empty the newest best below `runs`.

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
    path = path / of_run if path.is_dir() else path
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint")
    return path


def read_checkpoint(path: Path) -> dict:
    """The content of a checkpoint, this project's or a published one brought into this project's form.

    Never runs code from the file. Raises InputError where it is damaged or not a checkpoint.
    """
    try:
        with torch.serialization.safe_globals(published.ALLOWED_TYPES), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what PyTorch thinks of a file is said once, in the error
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling damaged bytes raises almost anything
        # The first sentence only: PyTorch goes on to advise loading without restriction.
        raise InputError(f"{path}: damaged, or not a checkpoint ({reason(error).split('. ')[0]})") from None
    if isinstance(content, dict) and content.get("format") == FORMAT:
        if missing := [name for name, kind in TYPES.items() if not isinstance(content.get(name), kind)]:
            raise InputError(f"{path}: an incomplete checkpoint, it lacks {', '.join(missing)}")
        return content
    if published.is_published(content):
        return published.convert(content, path)
    raise InputError(f"{path}: not a checkpoint of this project, nor one of the published form")


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


def build_model(content: dict, bert: str = "") -> tuple[XDim, Tokenizer]:
    """The model and tokenizer of a checkpoint, weights loaded.

    bert: name or folder of the configuration and vocabulary where the checkpoint carries none (a published one).
    Raises InputError where weights are missing, surplus or misshapen, listing them.
    """
    config = content.get("bert_config") or plain(read_config(bert or BERT_BASE))
    max_length = config["max_position_embeddings"]
    tokenizer = (
        Tokenizer(content["tokenizer"], max_length)
        if "tokenizer" in content
        else load_tokenizer(bert or BERT_BASE, max_length, config["vocab_size"])
    )
    model = new_model(build_bert(config), content["architecture"])
    load_weights(model, content["model"])
    return model, tokenizer


def new_model(bert, settings: dict) -> XDim:
    """An X-Dim of random weights around a BERT."""
    return XDim(
        bert,
        img_dim=settings["img_dim"],
        embed_size=settings["embed_size"],
        normalize_regions=not settings["no_imgnorm"],
        normalize_words=not settings["no_txtnorm"],
        mask_padding=settings["mask_padding"],
    )


def load_weights(model: XDim, weights: dict) -> None:
    """Load weights by name, all of them and no others. Raises InputError listing what does not fit."""
    own = model.state_dict()
    problems = [f"missing {name}" for name in own if name not in weights]
    problems += [f"surplus {name}" for name in weights if name not in own]
    problems += [
        f"{name} is {tuple(weights[name].shape)}, expected {tuple(own[name].shape)}"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    if problems:
        more = f" and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
        listed = ", ".join(problems[:LISTED]) + more
        raise InputError(f"the checkpoint's weights do not fit the model (is --bert right?): {listed}")
    model.load_state_dict(weights)
