"""Download the region features that people share, and put them where training looks for them.

They come from the Kaggle data set kuanghueilee/scan-features: Flickr30K and COCO in one archive, which is fetched whole
by kagglehub (pip install kagglehub) into its own cache. --data_path gets links to the files there, wherever in the
archive they are; KAGGLEHUB_CACHE names another place for it. After an interruption give the same command again.
"""

import argparse
import os
import re
from pathlib import Path

from lib.cli import InputError, one_line, reason
from lib.files import check_space, writing_to

HANDLE = "kuanghueilee/scan-features"
# Rows of 36 x 2,048 float32: train, five times dev and test of Flickr30K; train, five times dev, test, testall of COCO
ROWS = 29_000 + 5 * (1_014 + 1_000) + 113_287 + 5 * (1_000 + 1_000 + 5_000)
NEEDED_BYTES = 2 * ROWS * 36 * 2048 * 4  # the archive, hardly compressed, stays until all of it is extracted

FILE = re.compile(r"(train|dev|test|testall)_(ims\.npy|caps\.txt|ids\.txt)")
FOLDER = re.compile("f30k|flickr(?!8)|coco")  # the last of these in a path says of which data set a file is
SPLITS = {"f30k": ("train", "dev", "test"), "coco": ("train", "dev", "testall")}  # those that must be there


def add_flags(flags: argparse.ArgumentParser) -> None:
    flags.add_argument("--data_path", type=Path, default=Path("data"), help="folder of the data sets")
    flags.add_argument(
        "--data_set", choices=(*SPLITS, "both"), default="both", help="which to put there; both are downloaded"
    )


def run(args: argparse.Namespace) -> None:
    root = None
    for data_set in SPLITS if args.data_set == "both" else (args.data_set,):
        folder = args.data_path / f"{data_set}_precomp"
        if all((folder / name).exists() for name in _needed(data_set)):
            print(f"{folder} is already there")
            continue
        root = root or _download()
        files = _find(data_set, root)
        _link(files, folder)
        print(f"{folder}: {len(files)} links to files in {root}; next: python -m lib.prepare verify")


def _needed(data_set: str) -> list[str]:
    return [f"{split}_{ending}" for split in SPLITS[data_set] for ending in ("ims.npy", "caps.txt")]


def _download() -> Path:
    """Fetch the archive, or what of it is not there yet. Returns its folder. Raises InputError."""
    try:
        import kagglehub  # here: an optional dependency
    except ImportError as error:
        raise InputError(f"no kagglehub ({reason(error)}): pip install kagglehub, and run this again") from None
    cache = Path(os.environ.get("KAGGLEHUB_CACHE") or Path.home() / ".cache" / "kagglehub")
    there = cache / "datasets" / HANDLE
    if not any(there.glob("*.complete")):
        written = sum(path.stat().st_size for path in there.rglob("*") if path.is_file())
        check_space(cache, NEEDED_BYTES - written, "the archive and its files (KAGGLEHUB_CACHE names another folder)")
    try:
        return Path(kagglehub.dataset_download(HANDLE))
    except Exception as error:  # requests', kagglehub's own, the system's
        said = one_line(" ".join(str(error).split())) or repr(error)
        raise InputError(
            f"the Kaggle data set {HANDLE} could not be downloaded ({said}); look at the network and at your Kaggle "
            "credentials (https://www.kaggle.com/settings, API; then ~/.kaggle/kaggle.json), and run this again: "
            "kagglehub goes on where it was"
        ) from None


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
        raise InputError(
            f"{root}: no {', '.join(missing)} in a folder that names {data_set}; if they are there, packed or under "
            "another name, unpack or link them yourself"
        )
    return found


def _link(files: dict[str, Path], folder: Path) -> None:
    """Make links to files. Raises InputError, before any is made, where something else has that name."""
    links = {folder / name: path.absolute() for name, path in files.items()}
    for link, path in links.items():
        if os.path.lexists(link) and not (link.is_symlink() and Path(os.readlink(link)) == path):
            raise InputError(f"{link} is already there and something else; move it away, or choose another --data_path")
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for link, path in links.items():
            if not link.is_symlink():
                link.symlink_to(path)
