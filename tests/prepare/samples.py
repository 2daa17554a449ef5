"""What tests of `tsv`, `karpathy` and `own` share: images, and files that hold them."""

import base64
import json

import numpy as np

from lib.data.dataset import open_split
from lib.prepare.__main__ import main

IMG_DIM = 5


def make_images(ids, counts=(4,), dtype=np.float32, seed=0):
    """{id: (features (r, IMG_DIM), boxes (r, 4))}; the numbers of regions in turn."""
    rng = np.random.default_rng(seed)
    images = {}
    for number, image_id in enumerate(ids):
        regions = counts[number % len(counts)]
        features = rng.normal(size=(regions, IMG_DIM)).astype(dtype)
        images[str(image_id)] = features, rng.random((regions, 4), np.float32) * 640
    return images


def encode(array):
    return base64.b64encode(np.asarray(array, "<f4").tobytes())


def tsv_line(image_id, features, boxes, size=(640, 480), end=b"\r\n"):
    numbers = (str(number).encode() for number in (image_id, *size, len(features)))
    return b"\t".join([*numbers, encode(boxes), encode(features)]) + end


def write_tsv(path, images):
    path.write_bytes(b"".join(tsv_line(image_id, *image) for image_id, image in images.items()))
    return path


def write_store(folder, images, split="all", repeats=1, boxes=True):
    """Features of equal numbers of regions, their ids and boxes."""
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / f"{split}_ims.npy", np.stack([features for features, _ in images.values()]).repeat(repeats, 0))
    (folder / f"{split}_ids.txt").write_text("".join(f"{image_id}\n" * repeats for image_id in images))
    if boxes:
        np.save(folder / f"{split}_boxes.npy", np.stack([b for _, b in images.values()]).repeat(repeats, 0))
    return folder


def write_folder(folder, images, suffix=".npy"):
    """A file for each image."""
    folder.mkdir()
    for image_id, (features, boxes) in images.items():
        if suffix == ".npy":
            np.save(folder / f"{image_id}.npy", features)
        else:
            np.savez(folder / f"{image_id}.npz", x=features, bbox=boxes)
    return folder


def entry(number, split="train", sentences=5, **fields):
    """An image of Karpathy's file."""
    raw = [{"raw": f"caption {k} of {number}", "tokens": ["not", "these"], "imgid": number} for k in range(sentences)]
    return {"split": split, "imgid": number, "filename": f"{number}.jpg", "sentences": raw, **fields}


def write_karpathy(path, entries, name="flickr30k"):
    path.write_text(json.dumps({"dataset": name, "images": entries}))
    return path


def prepare(capsys, *argv):
    """(exit code, stdout, stderr) of `python -m lib.prepare ...`."""
    code = main([str(argument) for argument in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def refused(capsys, *argv):
    """The one line with which a command refuses what it is given."""
    code, _, err = prepare(capsys, *argv)
    assert code == 2
    assert len(err.splitlines()) == 1, err
    assert err.isprintable() or err[:-1].isprintable()
    return err


def check_split(folder, split, expected, captions=None):
    """A split holds these images, to the bit and in this order. expected: {id: (features, boxes)}."""
    opened = open_split(str(folder.parent), folder.name, split, IMG_DIM)
    features = [features for features, _ in expected.values()]
    assert (folder / f"{split}_ids.txt").read_text().split() == list(expected)
    assert opened.features.counts.tolist() == list(map(len, features))
    assert opened.features.dtype == features[0].dtype
    assert np.array_equal(opened.features.read(np.arange(len(features))), np.concatenate(features))
    if (folder / f"{split}_boxes.npy").exists():
        boxes = np.load(folder / f"{split}_boxes.npy").reshape(-1, 4)
        assert np.array_equal(boxes, np.concatenate([boxes for _, boxes in expected.values()]))
    if captions is not None:
        assert opened.captions == [caption for image_id in expected for caption in captions[image_id]]
        assert np.bincount(opened.image_of_caption).tolist() == [len(captions[image_id]) for image_id in expected]
