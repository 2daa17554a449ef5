"""Exchange folders: a checkpoint as safetensors weights and JSON, for other programs to read.

weights.safetensors   weights by our names; those of a published file that are never used start with `never_used.`
bert_config.json      BERT's configuration, where known
tokenizer.json        the tokenizer, as the tokenizers library writes it, where known
settings.json         format        FORMAT
                      architecture, settings, progress   as in a checkpoint
                      published     what else published.revert needs to write the file that this was, or null
                      sha256        of each of the other files
                      checksum      SHA-256 of all of the above: their JSON with sorted keys and no spaces

settings.json is written last: a folder without it is not complete. The weights' file format is that of
https://github.com/huggingface/safetensors.
"""

import hashlib
import json
from pathlib import Path

import safetensors.torch
import torch

from lib.checkpoints import published
from lib.cli import InputError, reason
from lib.files import replacing

FORM = "x-dim exchange "
FORMAT = FORM + "1"
WEIGHTS, SETTINGS, BERT, TOKENIZER = "weights.safetensors", "settings.json", "bert_config.json", "tokenizer.json"
LARGEST = {SETTINGS: 2**23, BERT: 2**20, TOKENIZER: 2**25}  # bytes that are read at most
PARTS = ("architecture", "settings", "progress")
ORIGIN = {"entries": list, "opt": dict, "keys": list}  # the fields of `published`
PUBLISHED_ENDINGS = (".pth.tar", ".pth", ".tar")


def is_exchange(path: Path) -> bool:
    """Whether a path is an exchange folder, complete or not."""
    return any((Path(path) / name).is_file() for name in (WEIGHTS, SETTINGS))


def export(content: dict, out: str) -> list[Path]:
    """Write a checkpoint as a published file, where `out` ends as those do, or else as an exchange folder.

    content: as native.read_checkpoint gives it. Returns the files written. Raises InputError where something is
    there already, or cannot be written.
    """
    path = Path(out)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise InputError(f"{path}: is there already; name another place")
    if not path.name.endswith(PUBLISHED_ENDINGS):
        return write(path, content)
    if path.is_dir():
        raise InputError(f"{path}: a folder; a published checkpoint is a file")
    with replacing(path) as file:
        torch.save(_compact(published.revert(content)), file)
    return [path]


def _compact(content: dict) -> dict:
    """A published checkpoint whose tensors share nothing, so that each is written by itself."""
    content["model"] = [
        type(part)((name, weight.clone(memory_format=torch.contiguous_format)) for name, weight in part.items())
        for part in content["model"]
    ]
    return content


def write(folder: Path, content: dict) -> list[Path]:
    """Write an exchange folder. Returns its files. Raises InputError."""
    origin = content.get("published")
    weights = {**content["model"], **(origin["never_used"] if origin else {})}
    weights = {name: weight.clone(memory_format=torch.contiguous_format) for name, weight in weights.items()}
    files = {WEIGHTS: safetensors.torch.save(weights)}
    if "bert_config" in content:
        files[BERT] = _encode(content["bert_config"], content["path"])
        files[TOKENIZER] = content["tokenizer"].encode()
    settings = {
        "format": FORMAT,
        **{name: content[name] for name in PARTS},
        "published": {name: origin[name] for name in ORIGIN} if origin else None,
        "sha256": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
    }
    files[SETTINGS] = _encode({**settings, "checksum": _checksum(settings)}, content["path"])
    for name, data in files.items():  # the settings come last
        with replacing(folder / name) as file:
            file.write(data)
    return [folder / name for name in files]


def _encode(settings: dict, path: str) -> bytes:
    """As JSON. Raises InputError where that could not give the settings back."""
    try:
        text = json.dumps(settings, indent=2)
        kept = repr(json.loads(text)) == repr(settings)
    except (TypeError, ValueError, RecursionError):
        kept = False
    if not kept:
        raise InputError(f"{path}: its settings hold values that JSON cannot keep (tuples, or keys that are no text)")
    return text.encode()


def _checksum(settings: dict) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def verify(folder: Path) -> dict:
    """Compare the checksums of an exchange folder. Returns its settings. Raises InputError."""
    settings = _read_json(folder / SETTINGS)
    form = settings.get("format")
    if isinstance(form, str) and form.startswith(FORM) and form != FORMAT:
        raise InputError(f"{folder / SETTINGS}: {form!a}, from another version of this code; this one reads {FORMAT!r}")
    if form != FORMAT or settings.pop("checksum", None) != _checksum(settings):
        raise InputError(f"{folder / SETTINGS}: damaged, or not written by convert.py (its checksum is wrong)")
    sums = settings.get("sha256")
    if not isinstance(sums, dict) or WEIGHTS not in sums or not sums.keys() <= {WEIGHTS, BERT, TOKENIZER}:
        raise InputError(f"{folder / SETTINGS}: damaged (it lists no checksums of files)")
    for name, expected in sums.items():
        if _sha256(folder / name) != expected:
            raise InputError(f"{folder / name}: damaged (its checksum is not the one in {SETTINGS})")
    return settings


def read(folder: Path) -> dict:
    """The content of an exchange folder in the form of a checkpoint. Raises InputError."""
    settings = verify(folder)
    try:
        weights = safetensors.torch.load_file(folder / WEIGHTS)
    except Exception as error:  # a header that lies can lead to any
        raise InputError(f"{folder / WEIGHTS}: damaged, or not of safetensors ({reason(error)})") from None
    if wrong := [name for name in PARTS if not isinstance(settings.get(name), dict)]:
        raise InputError(f"{folder / SETTINGS}: damaged (it lacks {', '.join(wrong)})")
    content = {
        "model": {name: weight for name, weight in weights.items() if not name.startswith(published.KEPT)},
        **{name: settings[name] for name in PARTS},
    }
    if settings.get("published") is not None:
        content["published"] = _origin(settings["published"], weights, folder)
    if BERT in settings["sha256"] and TOKENIZER in settings["sha256"]:
        content |= {"bert_config": _read_json(folder / BERT), "tokenizer": _read_text(folder / TOKENIZER)}
    return content


def _origin(origin: object, weights: dict, folder: Path) -> dict:
    """The entry `published` of a checkpoint, once it fits the weights. Raises InputError."""
    sound = isinstance(origin, dict) and all(isinstance(origin.get(name), kind) for name, kind in ORIGIN.items())
    sound = sound and len(origin["keys"]) == len(published.NAMES)
    sound = sound and all(name in published.ENTRIES for name in origin["entries"])
    sound = sound and all(name in origin["entries"] for name in ("model", "opt"))
    sound = sound and all(isinstance(keys, list) for keys in origin["keys"])
    names = [name for part in published.our_names(origin["keys"]) for name in part] if sound else []
    if not sound or sorted(map(str, names)) != sorted(weights):
        raise InputError(f"{folder / SETTINGS}: damaged (what it says of the published file does not fit {WEIGHTS})")
    never_used = {name: weight for name, weight in weights.items() if name.startswith(published.KEPT)}
    return {**{name: origin[name] for name in ORIGIN}, "never_used": never_used}


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: damaged, or not JSON ({reason(error)})") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: damaged, or not of an exchange folder")
    return content


def _read_text(path: Path) -> str:
    """A small file. Raises InputError where it is missing, not small or not UTF-8."""
    _expect_file(path)
    with open(path, "rb") as file:
        data = file.read(LARGEST[path.name] + 1)
    if len(data) > LARGEST[path.name]:
        raise InputError(f"{path}: larger than {LARGEST[path.name]} bytes, which no checkpoint needs")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: damaged, or not UTF-8 ({reason(error)})") from None


def _sha256(path: Path) -> str:
    _expect_file(path)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _expect_file(path: Path) -> None:
    if not path.is_file():
        raise InputError(f"{path}: missing; the folder is not complete")
