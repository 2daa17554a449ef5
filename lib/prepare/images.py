"""Make a data set of a folder of pictures and a file of captions. A vision model turns each picture into regions.
CAPTIONS is what `own` takes, or Karpathy's JSON, with the pictures' file names or ids; without it, give --no_captions.
Under torchrun each process takes its share of the pictures. A run that was interrupted begins again."""

import argparse
import json
import shutil
import time
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from lib import distributed
from lib.cli import InputError, with_bar
from lib.data.batches import allocate, in_threads, loader
from lib.data.dataset import ENCODER
from lib.data.images import NotAPicture, list_photographs, load_picture
from lib.files import TEMPORARY, new_folder, read_lines
from lib.model.vision import Preprocessing, VisionModel, load_vision
from lib.prepare import own
from lib.prepare.assemble import Features, Splits, fill, match
from lib.prepare.io import FEATURES, Image, add_data_flags, read_json, some, write_lines, write_split
from lib.prepare.karpathy import read_karpathy
from lib.runtime import Compute, choose_compute

DEFAULT_ENCODER = "torchvision:regnet_y_1_6gf"  # why: docs/results.md
BATCH_SIZE, BATCH_SIZE_OF_GPU = 8, 64  # on CPUs, what larger ones take no longer fits into the processor's caches


class Pictures(NamedTuple):
    """A batch of pictures."""

    names: list[str]
    pixels: Tensor  # uint8, (H, W, 3) of each picture, one after the other, in one dimension
    shapes: list[tuple[int, int]]  # (H, W) of each
    sizes: list[tuple[int, int]]  # (height, width) of each before it was resized
    unreadable: list[str]  # "NAME: why" of others

    def each(self) -> list[Tensor]:
        """The pictures, uint8 (3, H, W)."""
        parts = self.pixels.split([3 * height * width for height, width in self.shapes])
        return [part.view(*shape, 3).permute(2, 0, 1) for part, shape in zip(parts, self.shapes, strict=True)]


class PictureBatches(Dataset):
    """Pictures of a folder, `batch_size` at a time, as a vision model takes them."""

    def __init__(self, folder: Path, names: Sequence[str], batch_size: int, preprocessing: Preprocessing):
        self.folder, self.preprocessing = folder, preprocessing
        self.batches = [names[start : start + batch_size] for start in range(0, len(names), batch_size)]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, k: int) -> Pictures:
        loaded, unreadable = {}, []
        for name in self.batches[k]:
            try:
                loaded[name] = load_picture(self.folder / name, self.preprocessing)
            except NotAPicture as error:
                unreadable.append(f"{name}: {error}")
        rows = [picture.permute(1, 2, 0).flatten() for picture, _ in loaded.values()]
        pixels = torch.cat(rows, out=allocate((sum(map(len, rows)),), torch.uint8)) if rows else torch.empty(0)
        shapes = [(picture.shape[1], picture.shape[2]) for picture, _ in loaded.values()]
        return Pictures(list(loaded), pixels, shapes, [size for _, size in loaded.values()], unreadable)


def add_flags(flags: argparse.ArgumentParser) -> None:
    flags.add_argument("photos", type=Path, metavar="PHOTOS", help="folder of pictures, which may have folders in it")
    flags.add_argument("captions", type=Path, metavar="CAPTIONS", nargs="?", help="a file of captions of them")
    flags.add_argument("--no_captions", action="store_true", help="none: one split, `all`, of all pictures")
    what = "vision model: torchvision:NAME, a classifier or detector; hf:NAME, of the Hugging Face hub or a folder"
    flags.add_argument("--encoder", default=DEFAULT_ENCODER, metavar="NAME", help=what)
    whose = "its weights (default: the library's, fetched once)"
    flags.add_argument("--weights", default="", metavar="FILE", help=whose)
    flags.add_argument("--regions", type=int, default=36, help="cells or boxes of a picture, at most; 0: all")
    flags.add_argument("--image_size", type=int, default=0, help="pixels of each side; 0: the vision model's own")
    sizes = f"pictures at a time; 0: {BATCH_SIZE}, on a GPU {BATCH_SIZE_OF_GPU} where all are of one size"
    flags.add_argument("--batch_size", type=int, default=0, help=sizes)
    flags.add_argument("--workers", type=int, default=10, help="processes that read pictures for a GPU")
    flags.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    flags.add_argument("--precision", default="", choices=["fp32", "tf32", "bf16"], help="default: tf32 on CUDA")
    own.add_caption_flags(flags)
    add_data_flags(flags)


def run(args: argparse.Namespace) -> None:
    if min(args.regions, args.image_size, args.workers, args.batch_size) < 0:
        raise InputError("--regions, --image_size, --batch_size, --workers: give 0 or more")
    names, unreadable, others = list_photographs(args.photos)
    if others:
        print(f"{args.photos}: other files than pictures, not looked at: {others:,}")
    splits, without = _choose(args, names)
    wanted = sorted({name for captions in splits.values() for name in captions}.intersection(names))
    folder, compute = args.data_path / args.data_name, choose_compute(args.device, args.precision)
    of_first = nullcontext(folder.with_name(f".{folder.name}{TEMPORARY}"))
    with new_folder(folder, "--data_name") if distributed.is_first() else of_first as temporary:
        parts = temporary / "parts"  # a store of each process
        if distributed.is_first():
            parts.mkdir()
        with compute.in_force(), distributed.joined(compute.device):
            with distributed.local_main_first():  # the others find what the first one has fetched
                try:
                    model = load_vision(args.encoder, args.regions, args.weights, args.image_size)
                except ValueError as error:
                    raise InputError(f"--encoder {args.encoder}: {error}") from None
            record = {**model.record(), "folder": str(args.photos.resolve()), "categories": list(model.categories)}
            _describe(model, record["weights"], len(wanted))
            on_gpu, started = compute.device.type == "cuda" and any(model.preprocessing.size), time.time()
            size = args.batch_size or (BATCH_SIZE_OF_GPU if on_gpu else BATCH_SIZE)
            pictures = PictureBatches(args.photos, wanted, size, model.preprocessing)
            write_part(parts, pictures, model, compute, args.workers)
        seconds = time.time() - started
        if not distributed.is_first():
            return
        unreadable += [line for path in parts.glob("unreadable*.txt") for _, line in read_lines(path)]
        if not list(parts.glob(f"*{FEATURES}")):
            raise InputError(f"{args.photos}: {some(sorted(unreadable), 'picture')}, of which none can be read")
        write_lines(temporary / ENCODER, [json.dumps(record, indent=2)])
        features = Features([parts])
        left_out = {"without_captions.txt": ("no captions", without)}
        left_out |= {"unreadable.txt": ("unreadable", sorted(unreadable))}
        report = fill(temporary, folder, splits, {name: name for name in features.ids}, features, left_out)
        shutil.rmtree(parts)
    print(f"{len(wanted):,} pictures in {seconds:.1f} s, {len(wanted) / seconds:.1f} a second, on {compute}\n{report}")


def _choose(args: argparse.Namespace, names: Sequence[str]) -> tuple[Splits, list[str]]:
    """Captions by split and picture, or id where no picture is there; pictures without captions. Raises InputError."""
    if args.no_captions == bool(args.captions):
        raise InputError("give a file of captions after the folder of pictures, or --no_captions for a gallery")
    if args.no_captions:
        return {"all": dict.fromkeys(names, ())}, []
    if args.captions.suffix.lower() == ".json" and "dataset" in read_json(args.captions):
        given, called = read_karpathy(args.captions)
    else:
        given, called = own.read_splits(args)
    found = match(called, names, str(args.photos), "pictures")
    splits = {split: {found.get(one, one): of_image[one] for one in of_image} for split, of_image in given.items()}
    without = set(names).difference(name for captions in splits.values() for name in captions)
    if len(without) == len(names):
        raise InputError(f"{args.captions}: no captions of the pictures in {args.photos}, {names[0]} for one")
    return splits, sorted(without)


def _describe(model: VisionModel, weights: str, pictures: int) -> None:
    """Print what is going to be done."""
    (height, width), (shorter, longer) = model.preprocessing.size, model.preprocessing.limits
    size = f"{shorter} to {longer} pixels a side" if shorter else "their size"
    size = f"{height} x {width} pixels" if height else size
    regions = f"{model.regions} regions" if model.regions else "boxes"
    what = f"{model.name}, weights {weights}: {regions} of {model.width:,} numbers"
    print(f"{what} of each of {pictures:,} pictures, seen at {size}", flush=True)


def write_part(folder: Path, pictures: PictureBatches, model: VisionModel, compute: Compute, workers: int) -> None:
    """Write this process's share of the pictures, every batch whose number is its rank, modulo the world size."""
    rank, unreadable = distributed.rank(), []
    share = Subset(pictures, range(rank, len(pictures), distributed.world_size()))
    model.to(compute.device)

    def describe(batch: Pictures) -> list[Image]:
        unreadable.extend(batch.unreadable)
        with torch.inference_mode(), compute.autocast():
            regions = model.describe(batch.each(), batch.sizes) if batch.names else []
        images = []
        for name, one in zip(batch.names, regions, strict=True):
            boxes, objects = (None if part is None else part.float().cpu().numpy() for part in one[1:])
            features = one.features.half().cpu().numpy()
            images.append(Image(name, features, boxes, objects=objects, origin=str(pictures.folder / name)))
        return images

    if compute.device.type == "cuda":
        described = map(describe, loader(share, workers, compute.device))
    else:
        described = in_threads(lambda k: describe(share[k]), range(len(share)), torch.get_num_threads(), alone=True)
    images = chain.from_iterable(with_bar(described, "batches of pictures", len(share)))
    if first := next(images, None):
        write_split(folder, f"part{rank}", chain([first], images), np.float16)
    write_lines(folder / f"unreadable{rank}.txt", unreadable)
