"""What the tests of data sets share."""

import numpy as np
import pytest

from lib.cli import InputError
from lib.data.dataset import open_split

IMAGES, REGIONS, IMG_DIM = 7, 3, 4


def make_features(images=IMAGES, dtype=np.float32, repeats=1):
    """Features (images * repeats, REGIONS, IMG_DIM), each value another one."""
    size = images * REGIONS * IMG_DIM
    features = (np.arange(size) - size // 2).reshape(images, REGIONS, IMG_DIM) / 8
    return features.astype(dtype).repeat(repeats, axis=0)


def make_captions(images=IMAGES):
    return [f"caption {k} of image {image}" for image in range(images) for k in range(5)]


def write(folder, features, captions=None, counts=None, offsets=None):
    """A data set of the split dev. counts: captions of each image. offsets: of packed features."""
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "dev_ims.npy", features)
    (folder / "dev_caps.txt").write_text("".join(f"{line}\n" for line in captions or make_captions()))
    if counts is not None:
        (folder / "dev_caps_counts.txt").write_text("".join(f"{count}\n" for count in counts))
    if offsets is not None:
        np.save(folder / "dev_offsets.npy", offsets)
    return folder


def open_dev(folder, img_dim=IMG_DIM):
    return open_split(str(folder.parent), folder.name, "dev", img_dim)


def refusal(function, *args):
    """The message of the InputError that a call raises, which is one line."""
    with pytest.raises(InputError) as caught:
        function(*args)
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    return message
