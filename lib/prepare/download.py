"""Download the region features that people share, and put them where training looks for them.

They come from the Kaggle data set kuanghueilee/scan-features: Flickr30K and COCO in one archive, which is fetched whole
by kagglehub (pip install kagglehub) into its own cache. --data_path gets links to the files there, wherever in the
archive they are.
"""

import argparse
import os
import re
from collections.abc import Iterator
from pathlib import Path

from lib.cli import InputError, one_line
from lib.files import check_space, writing_to

HANDLE = "kuanghueilee/scan-features"

# Bytes of float32 features, 36 regions of 2,048 numbers a row. Flickr30K: 29,000 train images and five times each of
# 1,014 for dev and of 1,000 for test; COCO: 113,287 and five times each of 1,000, of 1,000 and of 5,000 (testall).
ROW_BYTES = 36 * 2048 * 4
F30K_BYTES = (29_000 + 5 * 1_014 + 5 * 1_000) * ROW_BYTES
COCO_BYTES = (113_287 + 5 * 1_000 + 5 * 1_000 + 5 * 5_000) * ROW_BYTES
# Such numbers hardly shrink, and the archive is there until all of it has been extracted.
NEEDED_BYTES = 2 * (F30K_BYTES + COCO_BYTES)

FILE = re.compile(r"(train|dev|test|testall)_(ims\.npy|caps\.txt|ids\.txt)")
FOLDERS = {"f30k": re.compile(r"f30k|flickr(?!8)", re.IGNORECASE), "coco": re.compile("coco", re.IGNORECASE)}
SPLITS = {"f30k": ("train", "dev", "test"), "coco": ("train", "dev", "testall")}  # those that must be there

Found = dict[str, dict[str, list[Path]]]  # of each data set and file name, where such a file is


def add_flags(flags: argparse.ArgumentParser) -> None:
    flags.add_argument("--data_path", type=Path, default=Path("data"), help="folder of the data sets")
    flags.add_argument(
        "--data_set", choices=("f30k", "coco", "both"), default="both", help="which to put there; both are downloaded"
    )


def run(args: argparse.Namespace) -> None:
    wanted = ("f30k", "coco") if args.data_set == "both" else (args.data_set,)
    missing = []
    for data_set in wanted:
        if _is_there(data_set, _folder(args, data_set)):
            print(f"{_folder(args, data_set)} is already there")
        else:
            missing.append(data_set)
    if missing:
        _put_in_place(args, missing, _download())


def _put_in_place(args: argparse.Namespace, data_sets: list[str], root: Path) -> None:
    """Link what was found. Raises InputError on what was not, once the other data set has been linked."""
    found, problems = _find(root), []
    for data_set in data_sets:
        try:
            files = _choose(data_set, found[data_set], root)
            _link(files, _folder(args, data_set))
        except InputError as error:
            problems.append(str(error))
            continue
        print(f"{_folder(args, data_set)}: {len(files)} links to files in {root}")
    if len(problems) < len(data_sets):
        print(
            "The download stays there, in kagglehub's cache; the environment variable KAGGLEHUB_CACHE names another "
            "place for it. Next: python -m lib.prepare verify"
        )
    if problems:
        raise InputError("; ".join(problems))


def _folder(args: argparse.Namespace, data_set: str) -> Path:
    return args.data_path / f"{data_set}_precomp"


def _is_there(data_set: str, folder: Path) -> bool:
    return all((folder / name).exists() for name in _needed(data_set))


def _needed(data_set: str) -> list[str]:
    return [f"{split}_{ending}" for split in SPLITS[data_set] for ending in ("ims.npy", "caps.txt")]


# The download


def _download() -> Path:
    """Fetch the archive, or what of it is not there yet. Returns its folder. Raises InputError."""
    try:
        import kagglehub  # here: an optional dependency
    except ImportError as error:
        raise InputError(
            f"kagglehub cannot be used ({one_line(str(error))}): pip install kagglehub, and run this again"
        ) from None
    _check_space()
    try:
        return Path(kagglehub.dataset_download(HANDLE))
    except Exception as error:  # requests', kagglehub's own, the system's: all are reasons not to have it
        said = one_line(" ".join(str(error).split())) or type(error).__name__
        raise InputError(
            f"the Kaggle data set {HANDLE} could not be downloaded ({said}); look at the network and at your Kaggle "
            "credentials (https://www.kaggle.com/settings, API; then ~/.kaggle/kaggle.json), and run this again: it "
            "goes on from where it was"
        ) from None


def _check_space() -> None:
    """Refuse a download that will not fit; what is in the cache needs no room any more."""
    cache = Path(os.environ.get("KAGGLEHUB_CACHE") or Path.home() / ".cache" / "kagglehub")
    there = cache / "datasets" / HANDLE
    if any(there.glob("*.complete")):
        return
    written = sum(path.stat().st_size for path in there.rglob("*") if path.is_file())
    check_space(cache, NEEDED_BYTES - written, "the archive and what is in it (KAGGLEHUB_CACHE names another folder)")


# What is in it


def _find(root: Path) -> Found:
    """All files of a data set's layout; which data set, the nearest folder says that names one."""
    found = {data_set: {} for data_set in FOLDERS}
    for path in _walk(root):
        data_set = _data_set_of(path.relative_to(root))
        if data_set and FILE.fullmatch(path.name):
            found[data_set].setdefault(path.name, []).append(path)
    return found


def _walk(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders.sort()
        yield from (Path(folder) / name for name in sorted(names))


def _data_set_of(path: Path) -> str | None:
    for folder in reversed(path.parts[:-1]):
        named = [data_set for data_set, pattern in FOLDERS.items() if pattern.search(folder)]
        if len(named) == 1:
            return named[0]
    return None


def _choose(data_set: str, found: dict[str, list[Path]], root: Path) -> dict[str, Path]:
    """The one file of each name. Raises InputError where one is missing or stands there more than once."""
    missing = [name for name in _needed(data_set) if name not in found]
    if missing:
        archives = [path.relative_to(root) for path in _walk(root) if path.suffix in (".zip", ".tar", ".gz", ".tgz")]
        hint = f"unpack {one_line(str(archives[0]))} there" if archives else "link them yourself if they are there"
        raise InputError(
            f"{root}: no {', '.join(missing)} in it, below a folder that names {data_set}; {hint}, and run this again"
        )
    for name, paths in found.items():
        if len(paths) > 1:
            places = " and ".join(one_line(str(path.relative_to(root))) for path in paths[:2])
            raise InputError(
                f"{root}: {name} of {data_set} is there more than once ({places}); link the right files yourself"
            )
    return {name: path for name, (path,) in found.items()}


def _link(files: dict[str, Path], folder: Path) -> None:
    """Make links to files. Raises InputError, before any is made, where something else has that name."""
    links = {folder / name: path.absolute() for name, path in files.items()}
    for link, path in links.items():
        if os.path.lexists(link) and not (link.is_symlink() and Path(os.readlink(link)) == path):
            raise InputError(f"{link} is already there and something else; move it away, or choose another --data_path")
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for link, path in links.items():
            if not os.path.lexists(link):
                link.symlink_to(path)
