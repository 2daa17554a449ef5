"""A trained model as a repository of the Hugging Face hub: what is sent, its model card, and sending it.

model_best.safetensors   the weights and all that `load` needs      README.md        the model card
config.json              architecture and data, for readers         tokenizer.json   the text model's
"""

import dataclasses
import json
import os
import re
import shlex
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import RepositoryNotFoundError

from lib.checkpoints import native
from lib.checkpoints.native import BEST, find_checkpoint, hub_says, read_checkpoint, trained_encoder
from lib.checkpoints.record import quote, read_record
from lib.cli import InputError, refusing
from lib.config import HUB_NAME, ShareSettings, TrainSettings
from lib.evaluation import report
from lib.files import new_folder
from lib.model.backbone import ask_hub
from lib.model.registry import is_from_pixels

UNRELATED = {".gitattributes", "README.md", "LICENSE"}  # what a repository may hold before a model is sent to it
OF_THIS_MACHINE = ("image_path", "image_weights", "model_name", "logger_name", "resume")  # settings
CARD, RESULTS = Path(__file__).with_name("model_card.md"), "test.json"  # the latter in a run folder, by eval.py --json
SPLIT = "| {} | {images:,} | {captions:,} | `{fingerprint}` |"
ENCODER = "Pictures: `{encoder}` makes {regions} regions of each. Its weights (fingerprint `{weights}`) are not inside"
ENCODER += '; they are fetched once, or taken from `load(..., image_weights="FILE")`. Others are refused.'
REGIONS = "Arrays of region features (images, regions, {img_dim}) as the data has them: what made them is not known."
NAMED = {"bert", "text_encoder", "image_encoder", "encoder", "model", "_name_or_path", "init_from"}  # or OWNER/NAME


def push(settings: ShareSettings) -> None:
    """Send a run's best checkpoint to the hub, or write what would be sent to a new folder. Raises InputError."""
    path, api, dry = find_checkpoint(settings.run), HfApi(), settings.dry_run
    where = f"{dry}: written, and not sent to {settings.name}"
    if not dry:
        is_private = check_access(api, settings)
        where = f"sending to {api.endpoint}/{settings.name}, {'private' if is_private else 'public'}"
    content = read_checkpoint(path)
    if "optimizer" in content and path.name != native.OLD_BEST:
        raise InputError(f"{path}: a state of training; name the run folder, whose best epoch is sent")
    content = without_paths(native.add_text(content, "")[0])
    card = model_card(settings, content, path)
    with new_folder(Path(dry), "--dry_run") if dry else TemporaryDirectory() as folder:
        print(f"{where}\n{write_files(Path(folder), content, card)}", flush=True)
        if not dry:
            try:
                ask_hub(api.create_repo, settings.name, private=is_private, exist_ok=True)
                sent = api.upload_folder(repo_id=settings.name, folder_path=folder, commit_message="A model of X-Dim")
            except Exception as error:
                raise InputError(f"{settings.name}: could not be sent ({hub_says(error)})") from None
            print(f'sent: load("{settings.name}"), or load("{settings.name}@{sent.oid}"), which stays what it is now')


def check_access(api: HfApi, settings: ShareSettings) -> bool:
    """Whether the repository is, or will be, private. Raises InputError where the model cannot be sent there."""
    if not get_token():
        advice = "hf auth login, or HF_TOKEN; --dry_run FOLDER writes the files without"
        raise InputError(f"{settings.name}: the Hugging Face hub wants a token: {advice}")
    try:
        ask_hub(api.whoami)
        about = ask_hub(api.model_info, settings.name)
    except RepositoryNotFoundError:
        return settings.private
    except Exception as error:
        raise InputError(f"{settings.name}: {api.endpoint} does not answer, or refuses ({hub_says(error)})") from None
    others = {file.rfilename for file in about.siblings or ()} - UNRELATED
    if others and BEST not in others:
        raise InputError(f"{settings.name}: holds something else ({min(others)}); choose another name")
    if settings.private and not about.private:
        raise InputError(f"{settings.name}: is public already; make it private on its page, or leave out --private")
    return bool(about.private)


def write_files(folder: Path, content: dict, card: str) -> str:
    """Write all files. Returns a line on each of them."""
    config = {"library": "x-dim", "format": native.FORMAT, "weights": BEST, "regions_by": trained_encoder(content)}
    config |= {name: content.get(name) for name in ("architecture", "data", "versions")}
    native.write_weights(folder / BEST, content)
    texts = {"config.json": json.dumps(config, indent=2), "tokenizer.json": content["tokenizer"], "README.md": card}
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    sizes = {file.name: file.stat().st_size / 1e6 for file in sorted(folder.iterdir())}
    return "\n".join(f"{size:10.3f} MB  {name}" for name, size in (sizes | {"in all": sum(sizes.values())}).items())


def without_paths(content: dict) -> dict:
    """A checkpoint without names of this machine's folders and files, of which `load` needs none."""
    plain = {name: value if name in ("model", "tokenizer") else _shorten(value) for name, value in content.items()}
    plain["settings"] |= dict.fromkeys(OF_THIS_MACHINE, "") | {"data_path": TrainSettings.data_path}
    for split in (plain.get("data") or {}).values():
        if "encoder" in split:
            split["encoder"] |= {"weights_file": "", "folder": ""}
    return plain


def _shorten(value: Any, key: str = "") -> Any:
    """Paths by their last part: hf:/home/me/vit becomes hf:vit. OWNER/NAME stays where the hub can be meant."""
    if isinstance(value, dict):
        return {name: _shorten(one, name) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_shorten(one, key) for one in value]
    if not isinstance(value, str) or "/" not in value:
        return value
    prefix, name = re.fullmatch(r"((?:[^/:=]*[:=])*)(.*)", value, re.DOTALL).groups()  # type: ignore[union-attr]
    is_of_hub = key in NAMED and HUB_NAME.fullmatch(name) and not os.path.isdir(Path(name).parts[0])
    return value if is_of_hub else prefix + Path(name).name


def read_results(settings: ShareSettings, path: Path) -> str:
    """A table of the evaluation of --results or RUN/test.json; a sentence where there is none. Raises InputError."""
    file = Path(settings.results or path.with_name(RESULTS))
    if not settings.results and not file.is_file():
        return "No evaluation on a test split came with the model."
    if not settings.results and file.stat().st_mtime < path.stat().st_mtime:
        raise InputError(f"{file}: older than {path.name}; evaluate again, or delete it")
    with refusing(f"{file}: not the results of eval.py --json of one checkpoint"):
        results = json.loads(file.read_bytes())
        if results["singles"]:
            raise ValueError("there are several")
        parts = report.named_parts(results, results["images"], len(results["folds"]))
        rows = [row for part, one in parts.items() for row in report.with_interval(results["row"] + part, one)]
        about = "{split} of {data}, {images:,} images and {captions:,} captions"
        about = about.format(**results | {"data": Path(results["data"]).name})
        return f"On {about}, with 95 % intervals by bootstrap over images:\n\n```\n{report.table(rows)}\n```"


def model_card(settings: ShareSettings, content: dict, path: Path) -> str:
    """README.md of the repository. content: a checkpoint without paths. path: its file, beside the run's record."""
    data, trained, progress = content.get("data") or {}, content["settings"], content["progress"]
    parts, encoder, bert = content["architecture"], trained_encoder(content), trained.get("bert", "")
    on = data.get("train", {}).get("folder") or trained.get("data_name", "unknown data")
    image, takes, record = parts["image_encoder"], '["a.jpg", "b.jpg"]', read_record(path.parent)
    if is_from_pixels(image):
        images = f"Pictures: the vision model ({image['options']['model']}) is inside."
    elif encoder and encoder["encoder"] == "scenes":
        images = "Pictures, as `python -m lib.prepare scenes` draws them: it has seen no photograph."
    elif encoder:
        images = ENCODER.format(**encoder)
    else:
        takes, images = "regions", REGIONS.format(**image["options"])
    dev = [report.Row("dev", one["dev"]) for one in progress["history"] if one["epoch"] == progress["best_epoch"]]
    scratch, is_known = trained.get("bert_from_scratch"), "/" in bert or bert == TrainSettings.bert
    return CARD.read_text(encoding="utf-8").format(
        **{"name": settings.name, "title": settings.name.partition("/")[2], "licence": settings.licence or "unknown"},
        **{"base": f"\nbase_model: {bert}" if is_known and not scratch else "", "on": on},
        **{"takes": takes, "images": images, "recipe": recipe(trained), "test": read_results(settings, path)},
        millions=sum(weight.numel() for weight in content["model"].values()) / 1e6,
        similarity=parts["similarity"]["name"],
        text=parts["text_encoder"]["options"]["config"]["model_type"],
        chosen=quote(record) if record else "no record of it is here",
        dev=f"```\n{report.table(dev)}\n```\n" if dev else "",
        splits="\n".join(SPLIT.format(name, **one) for name, one in data.items()),
        versions=", ".join(f"{name} {version}" for name, version in (content.get("versions") or {}).items() if version),
        started="started at random" if scratch else f"started as {bert or 'one that is not known'}",
    )


def recipe(settings: dict) -> str:
    """The settings that differ from their defaults, as a command."""
    flags = []
    for field in dataclasses.fields(TrainSettings):
        if (value := settings.get(field.name, field.default)) not in (field.default, ""):
            flags += [f"--{field.name}"] if value is True else [f"--{field.name}", str(value)]
    return f"python train.py {shlex.join(flags)}"
