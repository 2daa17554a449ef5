"""Pictures of every kind come out as what one sees; what is none says why; a data set's pictures are found by ids."""

import io
import json
import os
import struct
import zlib
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest

from lib.cli import InputError
from lib.data.images import NotAPicture, find_pictures, list_pictures, load_picture, open_picture

# Four quarters that tell which way is up: red, green above blue, white.
COLOURS = np.array([[(255, 0, 0), (0, 255, 0)], [(0, 0, 255), (255, 255, 255)]], np.uint8)
PIXELS = COLOURS.repeat(24, axis=0).repeat(32, axis=1)  # 48 high, 64 wide
PICTURE = PIL.Image.fromarray(PIXELS)
# What EXIF's orientation says of stored pixels: where their first row and first column are, seen upright.
STORED = {
    1: PIXELS,
    2: PIXELS[:, ::-1],
    3: PIXELS[::-1, ::-1],
    4: PIXELS[::-1],
    5: PIXELS.transpose(1, 0, 2),  # first row: left side, first column: top
    6: PIXELS.transpose(1, 0, 2)[::-1],  # first row: right side, first column: top
    7: PIXELS.transpose(1, 0, 2)[::-1, ::-1],  # first row: right side, first column: bottom
    8: PIXELS.transpose(1, 0, 2)[:, ::-1],  # first row: left side, first column: bottom
}
GRID = SimpleNamespace(size=(12, 16), limits=(0, 0), resample="bilinear")


def saved(picture, kind="PNG", **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return PIL.Image.open(io.BytesIO(file.getvalue()))


def with_orientation(number):
    exif = PIL.Image.Exif()
    exif[0x0112] = number
    return exif


def png_of_16_bits(pixels):
    """A PNG as cameras and scanners write them; Pillow writes no 16-bit RGB."""
    height, width, channels = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    head = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 3: 2}[channels], 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    parts = [struct.pack(">I", len(c)) + t + c + struct.pack(">I", zlib.crc32(t + c)) for t, c in chunks]
    return PIL.Image.open(io.BytesIO(b"\x89PNG\r\n\x1a\n" + b"".join(parts)))


@pytest.mark.parametrize("number", STORED)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_a_picture_stands_upright_whatever_the_camera_says(number, kind, tmp_path):
    options = {"quality": 95} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    stored = PIL.Image.fromarray(np.ascontiguousarray(STORED[number]))
    stored.save(tmp_path / "picture", kind, exif=with_orientation(number), **options)
    upright = np.asarray(open_picture(tmp_path / "picture"), int)
    assert upright.shape == PIXELS.shape
    assert np.abs(upright - PIXELS)[4:-4:8, 4:-4:8].max() < 30
    small, size = load_picture(tmp_path / "picture", SimpleNamespace(size=(6, 8), limits=(0, 0), resample="bilinear"))
    assert size == (48, 64)
    assert small.shape == (3, 6, 8)
    np.testing.assert_array_equal(open_picture(open_picture(tmp_path / "picture")), upright)  # and is not turned twice
    assert np.abs(small[:, [1, 4]][:, :, [1, 6]].permute(1, 2, 0).numpy().astype(int) - COLOURS).max() < 40


GREY = np.linspace(0, 255, 48 * 64).reshape(48, 64).round().astype(np.uint8)
ALPHA = np.zeros((48, 64), np.uint8)
ALPHA[:, :32] = 255  # the right half cannot be seen
ON_WHITE = np.where(ALPHA[..., None] > 0, PIXELS, 255).astype(np.uint8)
GREY_RGB = GREY[..., None].repeat(3, axis=2)
GREY_ON_WHITE = np.where(ALPHA[..., None], GREY_RGB, 255)
RED = (PIXELS == (255, 0, 0)).all(axis=2, keepdims=True)
CLEAR = PIL.Image.fromarray(np.dstack([PIXELS, ALPHA]))
OTHER = PIL.Image.new("RGB", PICTURE.size, "purple")
MOVING = {"save_all": True, "append_images": [OTHER], "duration": 100}
KINDS = {
    "palette": (saved(PICTURE.quantize(8)), PIXELS),
    "palette with a transparent colour": (saved(CLEAR.quantize(8)), ON_WHITE),
    "GIF with a transparent colour": (saved(CLEAR, "GIF"), ON_WHITE),
    "black and white": (saved(PIL.Image.fromarray(GREY > 99)), np.where(GREY_RGB > 99, 255, 0)),
    "grey": (saved(PIL.Image.fromarray(GREY)), GREY_RGB),
    "grey with alpha": (saved(PIL.Image.fromarray(np.dstack([GREY, ALPHA]))), GREY_ON_WHITE),
    "grey, a shade transparent": (saved(PIL.Image.fromarray(GREY), transparency=0), np.where(GREY_RGB, GREY_RGB, 255)),
    "RGBA": (saved(CLEAR), ON_WHITE),
    "RGBA in WebP": (saved(CLEAR, "WEBP", lossless=True, exact=True), ON_WHITE),
    "RGB, one colour transparent": (saved(PICTURE, transparency=(255, 0, 0)), np.where(RED, 255, PIXELS)),
    "CMYK in TIFF": (saved(PICTURE.convert("CMYK"), "TIFF"), PIXELS),
    "animated GIF": (saved(PICTURE, "GIF", **MOVING), PIXELS),
    "animated WebP": (saved(PICTURE, "WEBP", lossless=True, **MOVING), PIXELS),
    "animated PNG": (saved(PICTURE, **MOVING), PIXELS),
    "16-bit grey": (saved(PIL.Image.fromarray(GREY.astype(np.uint16) * 257)), GREY_RGB),
    "16-bit grey with a camera's byte order": (png_of_16_bits(GREY[..., None].astype(int) * 257), GREY_RGB),
    "16-bit RGB": (png_of_16_bits(PIXELS.astype(int) * 257), PIXELS),
    "32-bit whole numbers": (saved(PIL.Image.fromarray(GREY.astype(np.int32) * 257), "TIFF"), GREY_RGB),
    "floats from 0 to 1": (saved(PIL.Image.fromarray(GREY.astype(np.float32) / 255), "TIFF"), GREY_RGB),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_picture_comes_out_as_one_sees_it(kind):
    picture, seen = KINDS[kind]
    opened = open_picture(picture)
    assert opened.mode == "RGB"
    assert np.array_equal(np.asarray(opened), seen)


def test_a_cmyk_jpeg_and_one_of_a_phone_with_several_pictures_have_their_colours(tmp_path):
    PICTURE.convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    PICTURE.save(tmp_path / "b.mpo", "MPO", save_all=True, append_images=[OTHER], quality=95)
    for name in ("a.jpg", "b.mpo"):
        assert np.abs(np.asarray(open_picture(tmp_path / name), int) - PIXELS)[4::8, 4::8].max() < 30


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"])
def test_a_truncated_picture_is_none(kind, tmp_path):
    noise = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    noise.save(tmp_path / "whole", kind)
    content = (tmp_path / "whole").read_bytes()
    for share in (0.02, 0.5, 0.9):
        (tmp_path / "part").write_bytes(content[: int(share * len(content))])
        with pytest.raises(NotAPicture, match=r"\w"):
            open_picture(tmp_path / "part")


def test_what_is_no_picture_says_why(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(NotAPicture, match="not a file"):
        open_picture(tmp_path / "pipe.jpg")
    for name, content in {"empty.jpg": b"", "page.jpg": b"<html>not found</html>"}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(NotAPicture, match="not a picture"):
            open_picture(tmp_path / name)
    PICTURE.convert("RGB").save(tmp_path / "program.jpg", "EPS")
    with pytest.raises(NotAPicture, match="PostScript"):
        open_picture(tmp_path / "program.jpg")
    with pytest.raises(NotAPicture, match="No such file"):
        open_picture(tmp_path / "missing.jpg")
    PICTURE.save(tmp_path / "large.png")
    for limit in (PICTURE.width * PICTURE.height - 1, 100):  # Pillow itself warns of the one and refuses the other
        monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(NotAPicture, match=f"more than {limit:,} pixels"):
            open_picture(tmp_path / "large.png")
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", PICTURE.width * PICTURE.height)
    assert open_picture(tmp_path / "large.png").size == PICTURE.size


def test_a_large_jpeg_is_decoded_smaller_and_looks_the_same(tmp_path):
    smooth = PICTURE.resize((16, 12), PIL.Image.Resampling.BILINEAR).resize((1600, 1200), PIL.Image.Resampling.BICUBIC)
    smooth.save(tmp_path / "a.jpg", quality=95, exif=with_orientation(6))
    assert open_picture(tmp_path / "a.jpg").size == (1200, 1600)
    assert open_picture(tmp_path / "a.jpg", (200, 150)).size == (300, 400)  # a quarter; an eighth is less than twice
    assert open_picture(tmp_path / "a.jpg", (1600, 1200)).size == (1200, 1600)
    preprocessing = SimpleNamespace(size=(200, 150), limits=(0, 0), resample="bicubic")
    small, size = load_picture(tmp_path / "a.jpg", preprocessing)
    assert size == (1600, 1200)
    upright = PIL.Image.fromarray(np.asarray(open_picture(tmp_path / "a.jpg")))
    assert (small.int() - load_picture(upright, preprocessing)[0].int()).abs().max() <= 6


def test_a_picture_is_resized_to_what_the_vision_model_asks_for():
    assert load_picture(PICTURE, GRID)[0].shape == (3, 12, 16)
    assert np.array_equal(load_picture(PICTURE, GRID)[0][:, 2, 2], COLOURS[0, 0])
    detector = SimpleNamespace(size=(0, 0), limits=(80, 100), resample="bilinear")
    assert load_picture(PICTURE, detector)[0].shape == (3, 75, 100)  # the longer side binds
    assert load_picture(PICTURE.resize((40, 48)), detector)[0].shape == (3, 96, 80)  # the shorter
    as_it_is = SimpleNamespace(size=(0, 0), limits=(0, 0), resample="bilinear")
    assert np.array_equal(load_picture(PICTURE, as_it_is)[0].permute(1, 2, 0), PIXELS)


def test_pictures_are_found_in_subfolders_and_other_files_are_counted(tmp_path):
    for name in ("b.JPG", "a/x.png", "a/10.webp", ".hidden.jpg", ".git/x.png", "Thumbs.db", "a/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "elsewhere").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "round").symlink_to(tmp_path)
    names, others = list_pictures(tmp_path)
    assert names[:3] == ["a/10.webp", "a/x.png", "b.JPG"]
    assert others >= 3
    assert len(names) < 10


@pytest.mark.parametrize(
    ("files", "ids", "mapping"),
    [
        (["mine/images/a.jpg", "mine/images/b/c.png"], ["a.jpg", "b/c.png"], None),
        (["mine/images/a.jpg", "mine/images/b.jpg"], ["a", "b"], None),
        (["flickr30k-images/1.jpg", "flickr30k-images/2.jpg"], ["0", "1"], {"0": "1.jpg", "1": "2.jpg"}),
        (["images/train2014/COCO_train2014_000000000009.jpg", "images/val2014/COCO_val2014_000000000042.jpg"],
         ["9", "42"], None),
        (["images/train2017/000000000009.jpg", "images/val2017/000000000042.jpg"], ["9", "42"], None),
        (["images/train2014/COCO_train2014_000000000009.jpg", "images/val2014/COCO_val2014_000000000042.jpg"],
         ["3", "7"], {"3": "train2014/COCO_train2014_000000000009.jpg", "7": "COCO_val2014_000000000042.jpg"}),
        (["photos/a.jpg", "photos/b.jpg"], ["a.jpg", "b.jpg"], "encoder.json"),
        (["other/a.jpg", "other/b.jpg"], ["a.jpg", "b.jpg"], "--image_path"),
    ],
)  # fmt: skip
def test_a_data_sets_pictures_are_found_by_its_ids(files, ids, mapping, tmp_path):
    (tmp_path / "mine").mkdir()
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    if isinstance(mapping, dict):
        (tmp_path / "id_mapping.json").write_text(json.dumps(mapping))
    if mapping == "encoder.json":
        record = {"encoder": "torchvision:resnet50", "weights": "0" * 16, "regions": 36, "whole": True}
        record |= {"preprocessing": {"size": [224, 224]}, "folder": str(tmp_path / "photos")}
        (tmp_path / "mine" / "encoder.json").write_text(json.dumps(record))
    given = str(tmp_path / "other") if mapping == "--image_path" else ""
    assert find_pictures(tmp_path / "mine", ids, given) == [tmp_path / name for name in files]


def test_pictures_that_are_missing_are_named(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").touch()
    with pytest.raises(InputError, match=r"2 of 3 pictures are missing \(b, c\).*images; say where.*--image_path"):
        find_pictures(tmp_path / "mine", ["a", "b", "c"])
    for name in ("x", "y"):  # two of one name: nobody knows which is meant
        (tmp_path / "images" / name).mkdir()
        (tmp_path / "images" / name / "b.jpg").touch()
    with pytest.raises(InputError, match="1 of 2"):
        find_pictures(tmp_path / "mine", ["a", "b"])
