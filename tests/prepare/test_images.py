"""`prepare images`: a folder of pictures and their captions become a data set, however many processes read them."""

import json
import shutil

import numpy as np
import PIL.Image
import pytest
import torch

from lib.data.images import load_picture
from lib.model.vision import Preprocessing, Regions, VisionModel, build_vision, load_recorded
from lib.prepare import images
from lib.prepare.__main__ import main
from lib.prepare.io import open_features
from tests.prepare.samples import contents, entry, prepare, write_captions, write_karpathy
from tests.ranks import run_ranks

ENCODER, SIZE = "torchvision:squeezenet1_1", 64
NAMES = [f"{folder}{number}.jpg" for number in range(10) for folder in ("", "sub/")]
ROTATED = "sub/3.jpg"  # its pixels are stored lying on the side


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "squeezenet.pth"
    torch.save(build_vision(ENCODER, image_size=SIZE).network.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def gallery(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    (folder / "sub").mkdir()
    for place, name in enumerate(NAMES):
        rough = PIL.Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8))
        exif = PIL.Image.Exif()
        exif[0x0112] = 6 if name == ROTATED else 1
        rough.resize((90 + place, 70), PIL.Image.Resampling.BICUBIC).save(folder / name, exif=exif)
    return folder


@pytest.fixture
def photos(gallery, tmp_path):
    return shutil.copytree(gallery, tmp_path / "photos")


def caption_rows(names=NAMES):
    splits = ("train", "train", "dev", "test")
    return [
        {"image": name, "caption": f"caption {k} of {name}", "split": splits[place % 4]}
        for k in range(2)
        for place, name in enumerate(names)
    ]


def arguments(photos, weights, folder, *more):
    flags = ["--encoder", ENCODER, "--weights", weights, "--image_size", SIZE, "--regions", 4, "--batch_size", 3]
    return ["images", photos, *more, *flags, "--data_path", folder, "--data_name", "new"]


@pytest.fixture
def run(photos, weights, tmp_path, capsys):
    return lambda *more: prepare(capsys, *arguments(photos, weights, tmp_path / "data", *more))


def test_each_pictures_regions_are_what_the_vision_model_says_of_it_alone(photos, weights, tmp_path, run):
    out = run(write_captions(tmp_path / "c.jsonl", caption_rows()))[1]
    new = tmp_path / "data" / "new"
    record = json.loads((new / "encoder.json").read_text())
    model, boxes_of = load_recorded(record), {}
    for split in ("train", "dev", "test"):
        opened, boxes = open_features(new, split), np.load(new / f"{split}_boxes.npy")
        ids = (new / f"{split}_ids.txt").read_text().splitlines()
        assert ids == [row["image"] for row in caption_rows() if row["split"] == split][: len(ids)]
        assert opened.captions == [f"caption {k} of {name}" for name in ids for k in range(2)]
        assert opened.features.dtype == np.float16
        for place, name in enumerate(ids):
            pixels, size = load_picture(photos / name, model.preprocessing)
            with torch.inference_mode():
                alone = model.describe([pixels], [size])[0]
            features = opened.features.read(np.array([place])).reshape(5, 1512)
            assert np.allclose(features, alone.features, rtol=2e-3, atol=2e-3)
            assert np.array_equal(boxes[place], alone.boxes)
            boxes_of[name] = boxes[place]
    assert sorted(boxes_of) == sorted(NAMES)
    assert boxes_of[ROTATED][0].tolist() == [0, 0, 70, 90 + NAMES.index(ROTATED)]  # as it is seen: upright
    assert record["folder"] == str(photos)
    assert record["weights"] in out
    assert "5 regions of 1,512 numbers of each of 20 pictures, seen at 64 x 64 pixels" in out
    assert "20 pictures in " in out
    assert "a second, on cpu" in out
    assert "matched by image_id, whole name: 20 of 20 images" in out
    assert sorted(path.name for path in new.iterdir() if not path.name.startswith(("train", "dev", "test"))) == [
        "encoder.json"
    ]


def test_what_is_left_out_is_said_and_listed(photos, tmp_path, run):
    whole = (photos / "0.jpg").read_bytes()
    (photos / "0.jpg").write_bytes(whole[: len(whole) // 2])
    (photos / "1.jpg").write_bytes(b"<html>")
    (photos / "9.jpg").write_bytes(b"")  # without captions, so that nobody looks
    (photos / "Thumbs.db").touch()
    (photos / "bad\nname.jpg").touch()
    names = [name for name in NAMES if name != "9.jpg"] + ["gone.jpg"]
    out = run(write_captions(tmp_path / "c.jsonl", caption_rows(names)))[1]
    new = tmp_path / "data" / "new"
    unreadable = (new / "unreadable.txt").read_text().splitlines()
    assert [line.split(":")[0] for line in unreadable] == ["'bad\\nname.jpg'", "0.jpg", "1.jpg"]
    assert "truncated" in unreadable[1]
    assert "not a picture" in unreadable[2]
    assert (new / "without_captions.txt").read_text() == "9.jpg\n"
    missing = [(new / f"{split}_missing.txt").read_text() for split in ("train", "dev", "test")]
    assert missing == ["0.jpg\n", "1.jpg\n", "gone.jpg\n"]
    ids = [line for split in ("train", "dev", "test") for line in (new / f"{split}_ids.txt").read_text().splitlines()]
    assert sorted(ids) == sorted(set(names) - {"0.jpg", "1.jpg", "gone.jpg"})
    assert all("0.jpg" not in caption.split() for caption in open_features(new, "train").captions)
    assert "other files than pictures, not looked at: 1\n" in out
    assert "unreadable: 3 images ('bad\\nname.jpg': its name is not printable text, 0.jpg: image file is trunc" in out
    assert "no captions: 1 image (9.jpg); all are in " in out


def test_a_gallery_has_no_captions_and_others_can_be_added_later(photos, tmp_path, run, capsys):
    run("--no_captions")
    gallery = open_features(tmp_path / "data" / "new", "all")
    assert len(gallery.features) == len(NAMES)
    assert gallery.captions == []
    captions = write_captions(tmp_path / "c.jsonl", caption_rows())
    later = ["own", captions, "--features", tmp_path / "data" / "new", "--data_path", tmp_path, "--data_name", "later"]
    prepare(capsys, *later)
    (tmp_path / "data" / "new").rename(tmp_path / "gallery")
    run(captions)
    assert contents(tmp_path / "later") == contents(tmp_path / "data" / "new")


def test_karpathys_captions_name_the_pictures(photos, tmp_path, run):
    entries = [entry(number, split) for number, split in enumerate(["train"] * 7 + ["val", "test", "test"])]
    shutil.rmtree(photos / "sub")
    assert "matched by filename, whole name: 10 of 10" in run(write_karpathy(tmp_path / "k.json", entries))[1]
    assert (tmp_path / "data" / "new" / "test_ids.txt").read_text() == "8.jpg\n9.jpg\n"


def prepare_on_threads(threads, argv):
    torch.set_num_threads(threads)
    return main(argv)


def test_processes_and_threads_change_no_byte(photos, weights, tmp_path):
    (photos / "1.jpg").write_bytes(b"")
    captions, made = write_captions(tmp_path / "c.jsonl", caption_rows()), []
    for processes, threads in ((1, 1), (1, 3), (3, 1)):  # of two batches, so that one process has none
        folder = tmp_path / f"{processes} {threads}"
        argv = list(map(str, [*arguments(photos, weights, folder, captions), "--batch_size", 10]))
        if processes == 1:
            assert prepare_on_threads(threads, argv) == 0
            torch.set_num_threads(1)
        else:
            outcomes = run_ranks(prepare_on_threads, processes, threads, argv)
            assert [outcome.value for outcome in outcomes] == [0] * processes
            assert [bool(outcome.out) for outcome in outcomes] == [True] + [False] * (processes - 1)
        assert [path.name for path in folder.iterdir()] == ["new"]
        made.append(contents(folder / "new"))
    assert all(one == made[0] for one in made)


BAD = {
    "no folder": (lambda photos: shutil.rmtree(photos), [], "photos: no such folder of pictures"),
    "no pictures": (
        lambda photos: [path.unlink() for path in photos.rglob("*.jpg")] and (photos / "a.txt").touch(),
        [],
        "photos: no pictures in it, nor in folders below it; other files: 1",
    ),
    "no captions": (None, [], "give a file of captions after the folder of pictures, or --no_captions"),
    "both": (None, ["CAPTIONS", "--no_captions"], "give a file of captions after the folder of pictures, or --no_capt"),
    "captions of others": (
        lambda photos: [path.rename(path.with_name(f"x{path.name}")) for path in photos.rglob("*.jpg")],
        ["CAPTIONS"],
        "photos: the captions are of 20 images (0.jpg, sub/0.jpg, ",
    ),
    "encoder": (None, ["--no_captions", "--encoder", "torchvision:resnet5"], "the nearest are torchvision:resnet"),
    "weights": (
        None,
        ["--no_captions", "--encoder", "torchvision:resnet18"],
        "not the weights of torchvision:resnet18",
    ),
    "no weights": (None, ["--no_captions", "--weights", "gone.pth"], "gone.pth: there is no such file"),
    "number": (None, ["--no_captions", "--regions", "-1"], "--regions, --image_size, --batch_size, --workers: give 0"),
    "all unreadable": (
        lambda photos: [path.write_bytes(b"") for path in photos.rglob("*.jpg")],
        ["--no_captions"],
        "photos: 20 pictures (0.jpg: not a picture, or of a kind that Pillow does not read, 1.jpg",
    ),
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_input_is_one_line_before_anything_is_encoded(fault, photos, weights, tmp_path, capsys, monkeypatch):
    spoil, flags, message = BAD[fault]
    captions = write_captions(tmp_path / "c.jsonl", caption_rows())
    if spoil:
        spoil(photos)
    monkeypatch.setattr(VisionModel, "describe", lambda *_: pytest.fail("a picture was encoded"))
    given = [captions] if "CAPTIONS" in flags else []
    argv = arguments(photos, weights, tmp_path / "data", *given)
    code, _, error = prepare(capsys, *argv, *[flag for flag in flags if flag != "CAPTIONS"])
    assert code == 2
    assert message in error
    assert not (tmp_path / "data").exists() or list((tmp_path / "data").iterdir()) == []


class Detector(VisionModel):
    """Finds as many boxes as the picture's width says."""

    def __init__(self):
        super().__init__(
            "test:detector", torch.nn.Identity(), Preprocessing((0, 0), (20, 30), "bilinear", (0.5,), (1.0,))
        )
        self.width, self.regions, self.asked, self.whole, self.categories = 3, 0, 4, False, ["cat", "dog"]

    def describe(self, pictures, sizes):
        counts = [1 + width % 4 for _, width in sizes]
        means = [picture.float().mean((1, 2)) for picture in pictures]
        boxes = [torch.tensor([[0.0, 0, picture.shape[2], picture.shape[1]]]) for picture in pictures]
        numbers = zip(means, boxes, counts, strict=True)
        return [Regions(m.expand(n, 3), b.expand(n, 4), torch.tensor([[1.0, 0.5]]).expand(n, 2)) for m, b, n in numbers]


def test_what_a_detector_sees_in_boxes_stays_with_them(photos, tmp_path, run, monkeypatch, capsys):
    monkeypatch.setattr(images, "load_vision", lambda *_: Detector())
    out = run("--no_captions")[1]
    assert "boxes of 3 numbers of each of 20 pictures, seen at 20 to 30 pixels a side" in out
    new = tmp_path / "data" / "new"
    objects, offsets = np.load(new / "all_objects.npy"), np.load(new / "all_offsets.npy")
    assert objects.shape == (offsets[-1], 2)
    assert (objects == [1, 0.5]).all()
    assert len(np.load(new / "all_boxes.npy")) == len(objects)
    assert json.loads((new / "encoder.json").read_text())["categories"] == ["cat", "dog"]
    flags = ["--data_path", tmp_path / "data", "--data_name", "new", "--to", "packed"]
    prepare(capsys, "pack", *flags)
    assert contents(new) == contents(tmp_path / "data" / "packed")
