"""Pictures with their captions, boxes and features, in batches.

What belongs to a picture depends on (seed, split, index) only, so a larger set begins with the smaller one. What all
sets share, the scale of the features and the vocabulary, comes from reference pictures of a fixed seed.
"""

from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
from torch.nn.functional import pad

from lib.prepare.scenes.captions import write_captions
from lib.prepare.scenes.drawing import draw, masks, overlaps
from lib.prepare.scenes.features import describe
from lib.prepare.scenes.vocabulary import train_vocabulary
from lib.prepare.scenes.world import Scene, make_scene

STREAMS = {"train": 0, "dev": 1, "testall": 2, "reference": 3}
BATCH = 20
REFERENCE_PICTURES = 60  # for the scale of the features: whole batches
REFERENCE_CAPTIONED = 200  # pictures whose captions the vocabulary is trained on
CLIP = 5.0  # standard deviations


@dataclass(frozen=True)
class Batch:
    """Some consecutive pictures of a split."""

    pictures: torch.Tensor  # uint8 (B, 3, H, W)
    captions: list[list[str]]  # five of each picture
    boxes: np.ndarray  # float32 (B, R, 4), x1 y1 x2 y2 in pixels
    features: np.ndarray  # float32 (B, R, D), standardised


def make_picture(seed: int, split: str, index: int) -> tuple[np.ndarray, list[str]]:
    """One picture, uint8 (3, H, W), and its five captions."""
    rng = np.random.default_rng([seed, STREAMS[split], index])
    scene, coverage, captions = _make_captioned_scene(rng)
    return draw(scene, coverage, rng), captions


def _make_captioned_scene(rng: np.random.Generator) -> tuple[Scene, np.ndarray, list[str]]:
    scene = make_scene(rng)
    coverage = masks(scene)
    return scene, coverage, write_captions(scene, overlaps(coverage), rng)


def make_batch(seed: int, split: str, start: int, count: int) -> Batch:
    """Pictures number `start` to `start + count` of a split, `count` being BATCH at most."""
    mean, deviation = _reference_scale()
    batch = _make_raw_batch(seed, split, start, count)
    return replace(batch, features=((batch.features - mean) / deviation).clip(-CLIP, CLIP))


@cache
def make_vocabulary() -> tuple[str, ...]:
    """The vocabulary of all sets, whatever their size and seed."""
    streams = (np.random.default_rng([0, STREAMS["reference"], index]) for index in range(REFERENCE_CAPTIONED))
    return tuple(train_vocabulary(caption for rng in streams for caption in _make_captioned_scene(rng)[2]))


def img_dim() -> int:
    """Numbers that describe a region."""
    mean, _ = _reference_scale()
    return len(mean)


@cache
def _reference_scale() -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each feature over the regions of the reference pictures, each float32 (D,)."""
    batches = [_make_raw_batch(0, "reference", start, BATCH) for start in range(0, REFERENCE_PICTURES, BATCH)]
    features = np.concatenate([batch.features for batch in batches]).astype(np.float64)
    deviation = np.maximum(features.std(axis=(0, 1)), 1e-3)
    return features.mean(axis=(0, 1)).astype(np.float32), deviation.astype(np.float32)


def _make_raw_batch(seed: int, split: str, start: int, count: int) -> Batch:
    made = [make_picture(seed, split, index) for index in range(start, start + count)]
    pictures = torch.from_numpy(np.stack([picture for picture, _ in made]))
    # Always a full batch: the last bits of a sum may depend on the shape that it is computed in
    boxes, features = describe(pad(pictures, (0, 0) * 3 + (0, BATCH - count)))
    return Batch(pictures, [captions for _, captions in made], boxes[:count].numpy(), features[:count].numpy())
