"""`prepare karpathy`: his captions and splits with features by image id, to the bit; nothing is dropped in silence."""

import re

import numpy as np
import pytest

from lib.prepare import karpathy
from tests.prepare.samples import (
    check_split,
    entry,
    make_images,
    prepare,
    write_image_files,
    write_karpathy,
    write_store,
    write_tsv,
)

SPLITS = ["train", "val", "restval", "test"] * 3


@pytest.fixture
def run(tmp_path, capsys):
    """Runs the command on some features, into data/new."""
    return lambda *features: prepare(
        *(capsys, "karpathy", tmp_path / "dataset.json", "--features", *features),
        *("--data_path", tmp_path / "data", "--data_name", "new"),
    )


@pytest.fixture
def entries():
    return [entry(number, split) for number, split in enumerate(SPLITS)]


def in_splits(images, *splits):
    return {image_id: image for image_id, image in images.items() if SPLITS[int(image_id)] in splits}


def table(out):
    """{split: [figures]} as printed; columns are two blanks apart."""
    rows = [re.split(" {2,}", line.strip()) for line in out.splitlines() if re.match(r"\w+ {2,}[\d,]+ ", line)]
    return {name: figures for name, *figures in rows}


@pytest.mark.parametrize(("counts", "place"), [((36,), "store"), ((3, 10, 1, 6), "store/all")])
def test_from_tsv_to_a_split_all_numbers_stay_the_same_to_the_bit(tmp_path, capsys, run, entries, counts, place):
    images = make_images(range(12), counts)
    path = write_tsv(tmp_path / "a.tsv", dict(reversed(images.items())))
    prepare(capsys, "tsv", path, "--data_path", tmp_path, "--data_name", "store")
    write_karpathy(tmp_path / "dataset.json", entries)
    _, out, _ = run(tmp_path / place)
    captions = {image_id: [f"caption {k} of {image_id}" for k in range(5)] for image_id in images}
    folder = tmp_path / "data" / "new"
    for split, his in {"train": ("train", "restval"), "dev": ("val",), "test": ("test",)}.items():
        check_split(folder, split, in_splits(images, *his), captions)
    assert (folder / "train_boxes.npy").exists()
    assert not (folder / "train_caps_counts.txt").exists()
    figures = {split: figures[:3] for split, figures in table(out).items()}
    assert figures == {"train": ["6", "30", "5"], "dev": ["3", "15", "5"], "test": ["3", "15", "5"]}


def test_coco_has_the_first_of_val_and_test_and_all_of_them(tmp_path, run, monkeypatch):
    assert karpathy.FIRST == 1_000
    monkeypatch.setattr(karpathy, "FIRST", 2)
    images = make_images(range(12))
    numbered = [entry(900 + n, split, cocoid=n, filename=f"COCO_{n:012d}.jpg") for n, split in enumerate(SPLITS)]
    write_karpathy(tmp_path / "dataset.json", numbered, "coco")
    run(write_store(tmp_path / "store", images))
    folder = tmp_path / "data" / "new"
    check_split(folder, "train", in_splits(images, "train", "restval"))
    for part, whole, his in (("dev", "devall", "val"), ("test", "testall", "test")):
        expected = in_splits(images, his)
        check_split(folder, whole, expected)
        check_split(folder, part, dict(list(expected.items())[:2]))


def test_the_first_five_captions_count_and_words_stand_in_for_empty_ones(tmp_path, run):
    entries = [entry(0, sentences=7), entry(1, sentences=1)]
    entries[1]["sentences"] = [
        {"raw": " A  dog\n\truns.\u2028 "},
        {"raw": "", "tokens": ["a", "cat"]},
        {"tokens": ["a", "bird"]},
        {"raw": " ", "tokens": []},
    ]
    write_karpathy(tmp_path / "dataset.json", entries)
    images = make_images("01")
    run(write_store(tmp_path / "store", images))
    captions = {"0": [f"caption {k} of 0" for k in range(5)], "1": ["A dog runs.", "a cat", "a bird"]}
    check_split(tmp_path / "data" / "new", "train", images, captions)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("{cocoid}", "cocoid, whole name"),
        ("COCO_val2014_{cocoid:012d}", "cocoid, number at the end"),
        ("{n}", "imgid, whole name"),
    ],
)
def test_the_key_that_finds_most_images_is_taken_and_named(tmp_path, run, name, how):
    entries = [entry(n, cocoid=100 + n, filename=f"photo {n}.jpg") for n in range(6)]
    write_karpathy(tmp_path / "dataset.json", entries)
    images = make_images([name.format(n=n, cocoid=100 + n) for n in range(6)], dtype=np.float16)
    _, out, _ = run(write_image_files(tmp_path / "files", images))
    assert f"matched by {how}: 6 of 6 images, 100 is {next(iter(images))}\n" in out
    expected = {str(100 + n): image for n, image in enumerate(images.values())}
    check_split(tmp_path / "data" / "new", "train", expected)


def test_images_without_captions_are_left_out_counted_named_and_listed(tmp_path, run, entries):
    for number in (3, 7, 11):  # test
        entries[number]["sentences"] = [{"raw": " ", "tokens": []}] if number == 7 else []
    write_karpathy(tmp_path / "dataset.json", entries)
    images = make_images(n for n in range(12) if n != 11)
    code, out, _ = run(write_store(tmp_path / "store", images))
    folder = tmp_path / "data" / "new"
    assert code == 0
    assert f"no captions: 3 images (11, 3, 7); all are in {folder / 'without_captions.txt'}\n" in out
    assert table(out)["dev"] == ["3", "15", "5", "4", "0"]
    assert "test" not in table(out)
    check_split(folder, "train", in_splits(images, "train", "restval"))


def test_features_of_images_without_captions_alone_are_refused(tmp_path, run, entries):
    entries[3]["sentences"] = []
    write_karpathy(tmp_path / "dataset.json", entries)
    code, _, error = run(write_store(tmp_path / "store", make_images([3])))
    assert (code, error) == (2, "error: --features: no image that has features has captions, 3 for one\n")


def test_cocos_captions_file_is_named_as_what_it_is_with_the_command_that_takes_it(tmp_path, run):
    path = tmp_path / "dataset.json"
    path.write_text('{"info": {}, "images": [{"id": 1, "file_name": "1.jpg"}], "annotations": []}')
    code, _, error = run(write_store(tmp_path / "store", make_images("xyz")))
    assert (code, error) == (
        2,
        f"error: {path}: captions in COCO's own form, not Karpathy's splits: give the file to `own`\n",
    )


@pytest.mark.parametrize("content", [b"images", b"[]", b'{"dataset": "coco"}'])
def test_a_file_that_is_not_karpathys_is_named(tmp_path, run, content):
    path = tmp_path / "dataset.json"
    path.write_bytes(content)
    code, _, error = run(write_store(tmp_path / "store", make_images("xyz")))
    assert code == 2
    assert error.startswith(f"error: {path}: not ")


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("split", "eval", "eval"),
        ("imgid", "", "KeyError('imgid')"),
        ("imgid", 2, "its id 2 is that of an image before"),
        ("sentences", None, "not iterable"),
        ("sentences", [{"raw": "half a character: \ud800"}], "surrogates"),
    ],
)
def test_a_bad_image_is_named_with_its_place(tmp_path, run, entries, field, value, words):
    entries[4][field] = value
    path = write_karpathy(tmp_path / "dataset.json", entries)
    code, _, error = run(write_store(tmp_path / "store", make_images("xyz")))
    assert code == 2
    assert error.startswith(f"error: {path}: image 4 (counted from 0)")
    assert words in error
