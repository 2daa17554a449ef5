"""Draw the embedded data set `scenes`: pictures of coloured shapes, five captions each, and their region features.

An interrupted run leaves nothing under the folders' names and begins again.
"""

# drawing.py (what a picture holds, pixels) -> captions.py (sentences) and features.py (pixels -> regions).
# A picture and its captions depend on (seed, split, index) alone, so a larger set begins with the smaller one. What all
# sets share, the scale of the features and the vocabulary, comes from reference pictures of a fixed seed.

import argparse
import json
from collections.abc import Sequence
from functools import cache, partial
from itertools import chain
from pathlib import Path
from string import ascii_lowercase, digits, punctuation

import numpy as np
import PIL.Image
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn

from lib.cli import InputError, with_bar
from lib.data.batches import in_threads
from lib.data.dataset import CAPTIONS_PER_IMAGE, ENCODER
from lib.files import new_folder
from lib.model.vision import Preprocessing, Regions, VisionModel
from lib.prepare.io import Image, add_data_flags, write_lines, write_split
from lib.prepare.scenes.captions import write_captions
from lib.prepare.scenes.drawing import PICTURE_SIZE, draw, make_scene
from lib.prepare.scenes.features import IMG_DIM, REGIONS, describe

VERSION = 2  # of what is made: to be raised with any change to it
STREAMS = {"train": 0, "dev": 1, "testall": 2, "test": 2, "reference": 3}  # test is the beginning of testall
BATCH = 20  # pictures
REFERENCE_PICTURES, REFERENCE_CAPTIONED = 60, 200  # for the features' scale: whole batches; for the vocabulary
CLIP = 5.0  # standard deviations of a feature
BERT = {"model_type": "bert", "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
BERT |= {"intermediate_size": 256, "max_position_embeddings": 64}
BERT |= {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
Made = tuple[np.ndarray, list[str]]  # a picture, uint8 (3, H, W), and its captions


def add_flags(flags: argparse.ArgumentParser) -> None:
    add_data_flags(flags, "scenes_precomp")
    flags.add_argument("--vocab", type=Path, default=Path("vocab/scenes"), help="folder of the vocabulary")
    flags.add_argument("--images", type=int, default=2000, help="train pictures; dev has a tenth, testall half of them")
    flags.add_argument("--seed", type=int, default=0, help="another seed draws other pictures")


def run(args: argparse.Namespace) -> None:
    folder = args.data_path / args.data_name
    if not write_scenes(folder, args.vocab, args.images, args.seed):
        print(f"{folder} and {args.vocab} are already there")
        return
    counts = split_sizes(args.images).items()
    sizes = ", ".join(f"{split} {count} ({CAPTIONS_PER_IMAGE * count} captions)" for split, count in counts)
    print(f"{folder}: images {sizes}; {REGIONS} regions of img_dim {IMG_DIM} each")
    print(f"{args.vocab}: the vocabulary")


def split_sizes(images: int) -> dict[str, int]:
    """Pictures in each split of a set with `images` train pictures."""
    return {"train": images, "dev": images // 10, "testall": images // 2, "test": images // 2 // 5}


def write_scenes(folder: Path, vocab_folder: Path, images: int, seed: int) -> bool:
    """Write a data set with `images` train pictures, and the vocabulary; False if both are there already.

    Raises InputError if the set would be too small, if something else has one of the names, or on a write error.
    """
    if images < 10 or seed < 0:
        raise InputError(f"--images {images} --seed {seed}: give at least 10 images and a seed of 0 or more")
    sizes, vocabulary = split_sizes(images), make_vocabulary()
    settings = {"version": VERSION, "images": images, "seed": seed, "splits": sizes}
    settings |= {"regions": REGIONS, "img_dim": IMG_DIM, "picture_size": PICTURE_SIZE}
    text, words = json.dumps(settings, indent=2), "\n".join(vocabulary)
    vocabulary_missing = _is_missing(vocab_folder, "--vocab", "vocab.txt", words)
    set_missing = _is_missing(folder, "--data_name", "scenes.json", text)
    if vocabulary_missing:
        with new_folder(vocab_folder, "--vocab") as new:
            write_lines(new / "vocab.txt", [words])
            write_lines(new / "config.json", [json.dumps(BERT | {"vocab_size": len(vocabulary)}, indent=2)])
    if set_missing:
        with new_folder(folder, "--data_name") as new:
            _write_splits(new, sizes, seed)
            write_lines(new / "scenes.json", [text])
            vision = SceneVision("scenes", REGIONS, 0, True, "", None)
            record = vision.record() | {"folder": "images", "categories": []}
            write_lines(new / ENCODER, [json.dumps(record, indent=2)])
    return vocabulary_missing or set_missing


def _is_missing(folder: Path, flag: str, name: str, text: str) -> bool:
    """Whether a folder is not there; InputError where its file `name` has another text."""
    path = folder / name
    if folder.exists() and not (path.is_file() and path.read_bytes().rstrip() == text.encode()):
        raise InputError(f"{path} is not what these flags make: delete {folder} or choose another {flag}")
    return not folder.exists()


def _write_splits(folder: Path, sizes: dict[str, int], seed: int) -> None:
    (folder / "images").mkdir()
    for split, count in sizes.items():
        make = partial(_make_images, folder / "images", feature_scale(), seed, split)
        parts = [range(start, min(start + BATCH, count)) for start in range(0, count, BATCH)]
        made = in_threads(make, parts, torch.get_num_threads(), alone=True)
        write_split(folder, split, chain.from_iterable(with_bar(made, f"{split} batches", len(parts))))


def _make_images(folder: Path, scale: tuple, seed: int, split: str, indices: range) -> list[Image]:
    """A batch of pictures, which are written to the folder, as images of a data set."""
    made, boxes, features = make_batch(seed, split, indices)
    names = [f"{split}_{index:05d}.png" for index in indices]
    for name, (picture, _) in zip(names, made, strict=True):
        pixels = PIL.Image.fromarray(picture.transpose(1, 2, 0))
        pixels.save(folder / name, compress_level=1)  # noise hardly shrinks
    features = ((features - scale[0]) / scale[1]).clip(-CLIP, CLIP)
    rows = zip(names, features, boxes, (captions for _, captions in made), strict=True)
    return [Image(*row) for row in rows]


def make_picture(seed: int, split: str, index: int) -> Made:
    """One picture, uint8 (3, H, W), and its five captions."""
    rng = np.random.default_rng([seed, STREAMS[split], index])
    scene = make_scene(rng)
    captions = write_captions(scene, rng)
    return draw(scene, rng), captions


def make_batch(seed: int, split: str, indices: range) -> tuple[list[Made], np.ndarray, np.ndarray]:
    """Pictures (BATCH at most) with their captions, their boxes, and features that are not standardised."""
    made = [make_picture(seed, split, index) for index in indices]
    return made, *describe_batch(np.stack([picture for picture, _ in made]))


def describe_batch(pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (B, REGIONS, 4) and features (B, REGIONS, D), not standardised, of pictures uint8 (B, 3, H, W)."""
    # Always a full batch: the last bits of a sum may depend on the shape that it is computed in
    batch = torch.zeros(BATCH, 3, PICTURE_SIZE, PICTURE_SIZE, dtype=torch.uint8)
    batch[: len(pictures)] = torch.from_numpy(pictures)
    boxes, features = describe(batch)
    return boxes[: len(pictures)].numpy(), features[: len(pictures)].numpy()


@cache
def feature_scale() -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each feature over the regions of the reference pictures, each float32 (D,)."""
    starts = range(0, REFERENCE_PICTURES, BATCH)
    features = np.concatenate([make_batch(0, "reference", range(start, start + BATCH))[2] for start in starts])
    mean, deviation = features.mean((0, 1), np.float64), features.std((0, 1), np.float64)
    return mean.astype(np.float32), np.maximum(deviation, 1e-3).astype(np.float32)


class SceneVision(VisionModel):
    """The hand-made features of this data set as one vision model among others: `--encoder scenes`. No weights."""

    trains = False

    def __init__(self, name: str, regions: int, image_size: int, whole: bool, weights: str | None, config: dict | None):
        if weights or image_size not in (0, PICTURE_SIZE) or regions not in (0, REGIONS):
            what = f"has no weights, and finds {REGIONS} regions in pictures of {PICTURE_SIZE} pixels"
            raise ValueError(f"{name}: {what}")
        preprocessing = Preprocessing((PICTURE_SIZE, PICTURE_SIZE), (0, 0), "bilinear", (0.0,) * 3, (1.0,) * 3)
        super().__init__(name, nn.Identity(), preprocessing)
        self.network.register_buffer("version", torch.tensor(VERSION))  # so that the fingerprint depends on it
        self.width, self.regions, self.asked, self.whole = IMG_DIM, REGIONS, REGIONS, True

    def describe(self, pictures: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> list[Regions]:
        """Regions as the data set holds them, in float32 and on the CPU."""
        (mean, deviation), described = feature_scale(), []
        for start in range(0, len(pictures), BATCH):
            with torch.autocast("cpu", enabled=False):
                boxes, features = describe_batch(torch.stack(list(pictures[start : start + BATCH])).cpu().numpy())
            features = ((features - mean) / deviation).clip(-CLIP, CLIP)
            described += list(zip(map(torch.from_numpy, features), map(torch.from_numpy, boxes), strict=True))
        scales = [torch.tensor([width, height, width, height]) / PICTURE_SIZE for height, width in sizes]
        return [Regions(rows, boxes * scale) for (rows, boxes), scale in zip(described, scales, strict=True)]


@cache
def make_vocabulary() -> list[str]:
    """WordPieces in BERT's uncased conventions, [PAD] first, the same for all sets; the place in the list is the id.

    All of ASCII is in it, letters and digits also as they stand inside a word, so that any plain English has pieces.
    """
    characters = sorted(ascii_lowercase + digits)
    # Pieces that are given keep this order; those that the trainer finds itself it numbers by chance
    given = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    given += [*punctuation, *characters, *(f"##{character}" for character in characters)]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made = [make_picture(0, "reference", index) for index in range(REFERENCE_CAPTIONED)]
    trainer = trainers.WordPieceTrainer(vocab_size=450, special_tokens=given, show_progress=False)
    tokenizer.train_from_iterator(sorted(caption for _, captions in made for caption in captions), trainer)
    ids = tokenizer.get_vocab()
    return sorted(ids, key=lambda piece: ids[piece])
