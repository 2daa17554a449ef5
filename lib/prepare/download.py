"""Download the region features that people share, and put them where training looks for them.

They come from the Kaggle data set kuanghueilee/scan-features: Flickr30K and COCO in one archive, which is fetched whole
by kagglehub (pip install kagglehub) into its own cache. --data_path gets links to the files there, wherever in the
archive they are; KAGGLEHUB_CACHE names another place for it. While the archive is extracted, that takes up to 111 GB.
After an interruption give the same command again.
"""

import argparse
import re
from pathlib import Path

from lib.cli import InputError, optional, refusing
from lib.files import writing_to

HANDLE = "kuanghueilee/scan-features"

FILE = re.compile(r"(train|dev|test|testall)_(ims\.npy|caps\.txt|ids\.txt)")
FOLDER = re.compile("f30k|flickr(?!8)|coco")  # the last of these in a path says of which data set a file is
SPLITS = {"f30k": ("train", "dev", "test"), "coco": ("train", "dev", "testall")}  # those that must be there


def add_flags(flags: argparse.ArgumentParser) -> None:
    flags.add_argument("--data_path", type=Path, default=Path("data"), help="folder of the data sets")
    what = "which to put there; both are downloaded"
    flags.add_argument("--data_set", choices=(*SPLITS, "both"), default="both", help=what)


def run(args: argparse.Namespace) -> None:
    root = None
    for data_set in SPLITS if args.data_set == "both" else (args.data_set,):
        folder = args.data_path / f"{data_set}_precomp"
        if all((folder / name).exists() for name in _needed(data_set)):
            print(f"{folder} is already there")
            continue
        root = root or _download()
        files = _find(data_set, root)
        with writing_to(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for name, path in files.items():
                if not (folder / name).exists():
                    (folder / name).symlink_to(path)
        print(f"{folder}: {len(files)} links to files in {root}; next: python -m lib.prepare verify")


def _needed(data_set: str) -> list[str]:
    return [f"{split}_{ending}" for split in SPLITS[data_set] for ending in ("ims.npy", "caps.txt")]


def _download() -> Path:
    """Fetch the archive, or what of it is not there yet. Returns its folder."""
    kagglehub = optional("kagglehub", "download")
    with refusing(
        f"the Kaggle data set {HANDLE} could not be downloaded; look at the network and at your Kaggle credentials "
        "(https://www.kaggle.com/settings, API; then ~/.kaggle/kaggle.json), and run this again: kagglehub goes on "
        "where it was"
    ):
        return Path(kagglehub.dataset_download(HANDLE)).absolute()


def _find(data_set: str, root: Path) -> dict[str, Path]:
    """The files of a data set, by name. Raises InputError where one is missing or stands there more than once."""
    found: dict[str, Path] = {}
    for path in sorted(root.rglob("*_*.*")):
        named = FOLDER.findall(str(path.parent.relative_to(root)).lower())
        if FILE.fullmatch(path.name) and named and (named[-1] == "coco") == (data_set == "coco"):
            if path.name in found:
                places = f"{found[path.name].relative_to(root)} and {path.relative_to(root)}"
                raise InputError(f"{root}: {path.name} is there twice ({places}); link the right files yourself")
            found[path.name] = path
    if missing := [name for name in _needed(data_set) if name not in found]:
        advice = "if they are there, packed or under another name, unpack or link them yourself"
        raise InputError(f"{root}: no {', '.join(missing)} in a folder that names {data_set}; {advice}")
    return found
