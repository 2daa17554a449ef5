"""Writes the data set `scenes` in SCAN's layout, with its pictures and boxes, and the vocabulary that goes with it."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.lib.format import open_memmap
from PIL import Image
from tqdm import tqdm

from lib.cli import InputError
from lib.prepare.scenes.captions import CAPTIONS_PER_PICTURE
from lib.prepare.scenes.features import REGIONS
from lib.prepare.scenes.generator import BATCH, img_dim, make_batch, make_vocabulary
from lib.prepare.scenes.vocabulary import write_bert
from lib.prepare.scenes.world import PICTURE_SIZE

VERSION = 1  # of the generator: to be raised with any change to what it makes
MIN_IMAGES = 10


def split_sizes(images: int) -> dict[str, int]:
    """Pictures in each split of a set with `images` train pictures; test is the first fifth of testall."""
    testall = images // 2
    return {"train": images, "dev": images // 10, "testall": testall, "test": testall // 5}


def write_scenes(folder: Path, vocab_folder: Path, images: int, seed: int) -> bool:
    """Write a data set with `images` train pictures, and the vocabulary; False if both are there already.

    Each folder appears under its name only when it is complete. Raises InputError if the set would be too small, if
    something else has one of the names, or if a folder cannot be written.
    """
    if images < MIN_IMAGES:
        raise InputError(f"--images {images} is too few: give at least {MIN_IMAGES}")
    if seed < 0:
        raise InputError(f"--seed {seed} is negative: give 0 or more")
    folder, vocab_folder = Path(folder), Path(vocab_folder)
    try:
        set_missing = not _holds_set(folder, images, seed)
        vocabulary_written = _write_vocabulary(vocab_folder)
        if set_missing:
            _write_in_place(folder, lambda partial: _write_set(partial, images, seed))
    except OSError as error:
        raise InputError(f"cannot write {error.filename or folder}: {error.strerror}; choose another folder") from error
    return set_missing or vocabulary_written


def _holds_set(folder: Path, images: int, seed: int) -> bool:
    """Whether the very set asked for is there; InputError if something else is."""
    if not folder.exists():
        return False
    wanted = {"version": VERSION, "images": images, "seed": seed}
    try:
        settings = json.loads((folder / "scenes.json").read_text(encoding="utf-8"))
        found = {name: settings[name] for name in wanted}
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError, KeyError):
        raise InputError(f"{folder} holds something else: delete it or choose another --data_name") from None
    if found != wanted:
        settings = ", ".join(f"{name} {value}" for name, value in found.items())
        raise InputError(f"{folder} holds scenes of {settings}: delete it or choose another --data_name")
    return True


def _write_vocabulary(folder: Path) -> bool:
    """Write the vocabulary; False if it is there already, InputError if something else is."""
    vocabulary = make_vocabulary()
    if folder.exists():
        path = folder / "vocab.txt"
        if not path.is_file() or path.read_text(encoding="utf-8").split() != list(vocabulary):
            raise InputError(f"{folder} holds another vocabulary: delete it or choose another --vocab")
        return False
    _write_in_place(folder, lambda partial: write_bert(partial, vocabulary))
    return True


def _write_in_place(folder: Path, write: Callable[[Path], None]):
    """Let `write` fill a folder beside `folder`, then rename it, so that the name never holds half of anything."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        write(partial)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_set(folder: Path, images: int, seed: int):
    sizes = split_sizes(images)
    (folder / "images").mkdir()
    with (
        _one_thread_each() as executor,
        tqdm(total=sum(sizes.values()) - sizes["test"], unit="picture", disable=None) as progress,
    ):
        for split in ("train", "dev", "testall"):
            _write_split(folder, seed, split, sizes[split], executor, progress)
    _copy_split(folder, "testall", "test", sizes["test"])
    settings = {
        "version": VERSION,
        "images": images,
        "seed": seed,
        "splits": sizes,
        "regions": REGIONS,
        "img_dim": img_dim(),
        "picture_size": PICTURE_SIZE,
    }
    (folder / "scenes.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _one_thread_each() -> Iterator[Executor]:
    """An executor with as many workers as torch has threads, each of which computes in one.

    On tensors this small, torch's own threads wait for one another longer than they work.
    """
    threads = torch.get_num_threads()
    executor = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    torch.set_num_threads(1)
    try:
        yield executor
    finally:
        executor.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def _write_split(folder: Path, seed: int, split: str, count: int, executor: Executor, progress: tqdm):
    features = open_memmap(folder / f"{split}_ims.npy", "w+", np.float32, (count, REGIONS, img_dim()))
    boxes = open_memmap(folder / f"{split}_boxes.npy", "w+", np.float32, (count, REGIONS, 4))

    def write(start: int) -> list[list[str]]:
        batch = make_batch(seed, split, start, min(BATCH, count - start))
        rows = slice(start, start + len(batch.pictures))
        features[rows], boxes[rows] = batch.features, batch.boxes
        for number, picture in enumerate(batch.pictures, start):
            image = Image.fromarray(picture.permute(1, 2, 0).numpy())
            image.save(_picture_path(folder, split, number), compress_level=1)  # the pixels' noise hardly shrinks
        return batch.captions

    with (folder / f"{split}_caps.txt").open("w", encoding="utf-8", newline="\n") as file:
        for captions in executor.map(write, range(0, count, BATCH)):
            file.writelines(f"{caption}\n" for five in captions for caption in five)
            progress.update(len(captions))
    (folder / f"{split}_ids.txt").write_text("".join(f"{number}\n" for number in range(count)), encoding="utf-8")


def _copy_split(folder: Path, source: str, target: str, count: int):
    """Make the first `count` pictures of a split a split of their own."""
    for name in ("ims", "boxes"):
        np.save(folder / f"{target}_{name}.npy", np.load(folder / f"{source}_{name}.npy", mmap_mode="r")[:count])
    for name, lines_per_picture in (("caps", CAPTIONS_PER_PICTURE), ("ids", 1)):
        lines = (folder / f"{source}_{name}.txt").read_text(encoding="utf-8").splitlines(keepends=True)
        text = "".join(lines[: count * lines_per_picture])
        (folder / f"{target}_{name}.txt").write_text(text, encoding="utf-8", newline="\n")
    for number in range(count):
        shutil.copyfile(_picture_path(folder, source, number), _picture_path(folder, target, number))


def _picture_path(folder: Path, split: str, number: int) -> Path:
    return folder / "images" / f"{split}_{number:05d}.png"
