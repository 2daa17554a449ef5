"""What tests of the commands share: images, and files that hold them."""

import base64
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from lib.prepare.__main__ import main
from lib.prepare.io import open_features

IMG_DIM = 5
Images = dict[str, tuple[np.ndarray, np.ndarray]]  # id: features (r, IMG_DIM), boxes (r, 4)


def make_images(ids: Iterable, counts: Sequence[int] = (4,), dtype: type = np.float32, seed: int = 0) -> Images:
    """Random images, whose numbers of regions are `counts` in turn."""
    rng = np.random.default_rng(seed)
    images = {}
    for number, image_id in enumerate(ids):
        regions = counts[number % len(counts)]
        features = rng.normal(size=(regions, IMG_DIM)).astype(dtype)
        images[str(image_id)] = features, rng.random((regions, 4), np.float32) * 640
    return images


def tsv_line(
    image_id: str, features: np.ndarray, boxes: np.ndarray, end: bytes = b"\r\n", types: Sequence[str] = ("<f4", "<f4")
) -> bytes:
    """types: of the boxes and of the features."""
    arrays = [
        base64.b64encode(np.asarray(array, one).tobytes()) for array, one in zip((boxes, features), types, strict=True)
    ]
    return b"\t".join([*(str(field).encode() for field in (image_id, 640, 480, len(features))), *arrays]) + end


def write_tsv(path: Path, images: Images) -> Path:
    path.write_bytes(b"".join(tsv_line(image_id, *image) for image_id, image in images.items()))
    return path


def write_store(folder: Path, images: Images, split: str = "all", repeats: int = 1, boxes: bool = True) -> Path:
    """Features of equal numbers of regions, their ids and boxes."""
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / f"{split}_ims.npy", np.stack([features for features, _ in images.values()]).repeat(repeats, 0))
    write_lines(folder / f"{split}_ids.txt", [image_id for image_id in images for _ in range(repeats)])
    if boxes:
        np.save(folder / f"{split}_boxes.npy", np.stack([b for _, b in images.values()]))
    return folder


def write_image_files(folder: Path, images: Images, suffix: str = ".npy") -> Path:
    folder.mkdir()
    for image_id, (features, boxes) in images.items():
        if suffix == ".npy":
            np.save(folder / f"{image_id}.npy", features)
        else:
            np.savez(folder / f"{image_id}.npz", x=features, bbox=boxes)
    return folder


def write_captions(path: Path, rows: Sequence[dict]) -> Path:
    """rows: image_id, caption and perhaps split."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def entry(number: int, split: str = "train", sentences: int = 5, **fields: object) -> dict:
    """An image of Karpathy's file."""
    raw = [{"raw": f"caption {k} of {number}", "tokens": ["not", "these"]} for k in range(sentences)]
    return {"split": split, "imgid": number, "filename": f"{number}.jpg", "sentences": raw, **fields}


def write_karpathy(path: Path, entries: Sequence[dict], name: str = "flickr30k") -> Path:
    path.write_text(json.dumps({"dataset": name, "images": entries}))
    return path


def write_lines(path: Path, lines: Iterable[object]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def prepare(capsys, *argv: object) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of `python -m lib.prepare ...`; an error is one line."""
    code = main([str(argument) for argument in argv])
    captured = capsys.readouterr()
    assert (code, len(captured.err.splitlines())) in ((0, 0), (2, 1)), captured.err
    return code, captured.out, captured.err


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())} if folder.exists() else {}


def check_split(folder: Path, split: str, expected: Images, captions: dict[str, list[str]] | None = None) -> None:
    """A split holds these images, to the bit and in this order."""
    opened = open_features(folder, split)
    features = [features for features, _ in expected.values()]
    assert (folder / f"{split}_ids.txt").read_text().splitlines() == list(expected)
    assert opened.features.counts.tolist() == list(map(len, features))
    assert opened.features.dtype == features[0].dtype
    assert np.array_equal(opened.features.read(np.arange(len(features))), np.concatenate(features))
    if (folder / f"{split}_boxes.npy").exists():
        boxes = np.load(folder / f"{split}_boxes.npy").reshape(-1, 4)
        assert np.array_equal(boxes, np.concatenate([boxes for _, boxes in expected.values()]))
    if captions is not None:
        assert opened.captions == [caption for image_id in expected for caption in captions[image_id]]
        assert np.bincount(opened.image_of_caption).tolist() == [len(captions[image_id]) for image_id in expected]
