"""`prepare own`: any captions and features become a data set, to the bit; the page that shows it says what happens."""

import csv
import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import test
import train
from lib.data.dataset import open_split
from lib.prepare.own import draw_splits, read_captions
from tests.conftest import ROOT
from tests.data.samples import refusal
from tests.prepare.samples import (
    IMG_DIM,
    check_split,
    make_images,
    prepare,
    write_captions,
    write_image_files,
    write_store,
)

SPLITS = ("train", "dev", "test")
SPEED = re.compile(r"in [\d.]+ s, [\d.]+ a second, on cpu \(\d+ threads\)")
SUFFIXES = (".csv", ".tsv", ".jsonl", ".json")


def write_as(path, rows):
    """rows: dicts with image_id, caption and perhaps split."""
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        write_captions(path, rows)
    else:
        with open(path, "w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, list(rows[0]), delimiter="," if path.suffix == ".csv" else "\t")
            table.writeheader()
            table.writerows(rows)
    return path


def make_rows(images=8, splits=None):
    """Image 0 has one caption, image 1 two, image 2 three, image 3 one ... and they do not stand together."""
    rows = [
        {"image_id": f"image {n}", "caption": f'caption {k}, "of" {n}'}
        for k in range(3)
        for n in range(images)
        if k <= n % 3
    ]
    return [{**row, "split": splits[row["image_id"]]} if splits else row for row in rows]


def captions_of(rows):
    captions = {}
    for row in rows:
        captions.setdefault(row["image_id"], []).append(row["caption"])
    return captions


@pytest.fixture
def run(tmp_path, capsys):
    """Runs the command on captions and features, into data/new."""
    return lambda captions, *features, flags=(): prepare(
        *(capsys, "own", captions, "--features", *features, *flags),
        *("--data_path", tmp_path / "data", "--data_name", "new"),
    )


def test_captions_and_features_become_a_data_set_to_the_bit(tmp_path, run):
    images = make_images([f"image {n}" for n in range(8)], (3, 10, 1))
    splits = dict(zip(images, ["train", "dev", "test", "train"] * 2, strict=True))
    rows = make_rows(splits=splits)
    code, out, _ = run(
        write_captions(tmp_path / "c.jsonl", rows), write_image_files(tmp_path / "files", images, ".npz")
    )
    assert code == 0
    for split in SPLITS:
        expected = {image_id: image for image_id, image in images.items() if splits[image_id] == split}
        check_split(tmp_path / "data" / "new", split, expected, captions_of(rows))
    assert (tmp_path / "data" / "new" / "train_boxes.npy").exists()
    assert "\nfeatures: 1 to 10 (median 3) regions of 5 numbers, float32\n" in out
    assert re.search(r"train +4 +6 +1 to 2 \(median 1.5\) +3 to 10 \(median 6.5\) +0\n", out)


def test_the_images_of_a_split_are_in_the_order_in_which_they_appear(tmp_path, run):
    names = ["c", "a", "b", "e", "d"]
    rows = [{"image_id": name, "caption": "x", "split": "train"} for name in [*names, *sorted(names)]]
    run(write_captions(tmp_path / "c.jsonl", rows), write_store(tmp_path / "store", make_images("abcde")))
    folder = tmp_path / "data" / "new"
    assert (folder / "train_ids.txt").read_text().split() == names
    assert {path.name.split("_")[0] for path in folder.iterdir()} == {"train"}


@pytest.mark.parametrize(("splits", "told"), [(("train",), True), (("train", "test"), True), (("train", "dev"), False)])
def test_a_file_whose_splits_cannot_be_trained_on_is_told_so(tmp_path, run, splits, told):
    rows = make_rows(splits={f"image {n}": splits[n % len(splits)] for n in range(8)})
    out = run(
        write_captions(tmp_path / "c.jsonl", rows), write_store(tmp_path / "store", make_images(captions_of(rows)))
    )[1]
    line = f"splits: {', '.join(splits)}; training needs train and dev, drawn where no column is called split\n"
    assert (line in out) == told


def test_the_draw_depends_on_ids_and_seed_and_not_on_the_order_of_lines():
    ids = [f"image {n}" for n in range(200)]
    drawn = draw_splits(ids, 0.1, 0.2, 0)
    assert draw_splits(reversed(ids), 0.1, 0.2, 0) == drawn
    assert [list(drawn.values()).count(split) for split in SPLITS] == [140, 20, 40]
    assert draw_splits(ids, 0.1, 0.2, 1) != drawn
    assert [ids.index(i) for i, split in drawn.items() if split == "dev"] != list(range(20))


def test_a_few_images_still_give_one_to_dev_and_one_to_test():
    drawn = list(draw_splits(map(str, range(3)), 0.1, 0.1, 0).values())
    assert sorted(drawn) == ["dev", "test", "train"]


@pytest.mark.parametrize(
    ("dev", "test", "seed", "words"),
    [
        (0, 0.1, 0, "--dev 0 --test 0.1 --seed 0: expected parts above 0 and below 1"),
        (0.1, 1, 0, "expected parts above 0 and below 1"),
        (float("nan"), 0.1, 0, "expected parts above 0 and below 1"),
        (0.5, 0.5, 0, "8 images are too few: --dev 0.5 and --test 0.5 leave none for train"),
        (0.1, 0.1, -1, "a seed from 0 on"),
    ],
)
def test_parts_that_cannot_be_are_refused(dev, test, seed, words):
    assert words in refusal(draw_splits, map(str, range(8)), dev, test, seed)


def test_what_has_no_features_or_no_captions_is_counted_named_and_listed(tmp_path, run):
    rows = make_rows(splits={f"image {n}": SPLITS[n % 3] for n in range(8)})
    images = make_images([*(f"image {n}" for n in range(8) if n not in (0, 3, 4)), *"zyx"])
    _, out, _ = run(write_captions(tmp_path / "c.jsonl", rows), write_image_files(tmp_path / "files", images))
    folder = tmp_path / "data" / "new"
    ids = {split: (folder / f"{split}_ids.txt").read_text().splitlines() for split in SPLITS}
    assert ids == {"train": ["image 6"], "dev": ["image 1", "image 7"], "test": ["image 2", "image 5"]}
    assert f"no features for train: 2 images (image 0, image 3); all are in {folder / 'train_missing.txt'}\n" in out
    assert (folder / "train_missing.txt").read_text() == "image 0\nimage 3\n"
    assert f"no captions: 3 images (x, y, z); all are in {folder / 'without_captions.txt'}\n" in out
    assert (folder / "without_captions.txt").read_text() == "x\ny\nz\n"


@pytest.mark.parametrize("name", ["bbox", "num_boxes", "num_bbox"])
def test_features_stored_as_numbers_by_regions_are_turned_and_counted_where_boxes_say_so(tmp_path, run, name):
    images = make_images([f"image {n}" for n in range(8)], (3, 4, 6))
    (tmp_path / "files").mkdir()
    for number, (image_id, (features, boxes)) in enumerate(images.items()):
        of_boxes = boxes if name == "bbox" else len(boxes)
        np.savez(tmp_path / "files" / image_id, x=features.T if number else features, **{name: of_boxes})
    splits = dict.fromkeys(images, "train")
    _, out, _ = run(write_captions(tmp_path / "c.jsonl", make_rows(splits=splits)), tmp_path / "files")
    check_split(tmp_path / "data" / "new", "train", images)
    assert "stored as (numbers, regions), and turned: 7 images (image 1, image 2, " in out


def test_images_that_end_in_zeros_are_counted_and_named_as_perhaps_padded(tmp_path, run):
    captions, rows = write_captions(tmp_path / "c.jsonl", make_rows()), np.ones((8, 4, IMG_DIM), np.float32)
    rows[[2, 5], 3] = 0
    (tmp_path / "files").mkdir()
    for number, features in enumerate(rows):
        np.savez(tmp_path / "files" / f"image {number}.npz", features)  # without a name it is arr_0
    out = run(captions, tmp_path / "files")[1]
    assert "end in a region of zeros; if it is padding, store num_boxes: 2 images (image 2, image 5)\n" in out
    np.savez(tmp_path / "files" / "image 2.npz", rows[3]), np.savez(tmp_path / "files" / "image 5.npz", rows[3])
    (tmp_path / "data" / "new").rename(tmp_path / "data" / "old")
    assert "padding" not in run(captions, tmp_path / "files")[1]


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_byte_order_marks_line_ends_and_blank_lines_do_not_matter(tmp_path, mark, end):
    lines = ["caption, other,image_id", "A dog,3,a", "", '"Two  ""cats"",', 'on a mat",4,b', " Hund ,5, a "]
    path = tmp_path / "c.csv"
    path.write_bytes((mark + end.join(lines) + end).encode())
    assert read_captions(path)[:2] == ({"a": ["A dog", "Hund"], "b": ['Two "cats", on a mat']}, {})
    rows = [{"image_id": "a", "caption": "A\ndog"}, {"caption": "Zwei Hünde", "image_id": 7, "split": None}]
    path = tmp_path / "c.jsonl"
    path.write_bytes((mark + f"{end} {end}".join(json.dumps(row, ensure_ascii=False) for row in rows)).encode())
    assert read_captions(path)[:2] == ({"a": ["A dog"], "7": ["Zwei Hünde"]}, {})


CSV = b"image_id,caption,split\na,A dog,train\n"
JSONL = b'{"image_id": "a", "caption": "A dog", "split": "train"}\n'


@pytest.mark.parametrize(
    ("suffix", "content", "words"),
    [
        (".csv", CSV + b"b,caf\xe9,dev\n", "line 3 is not UTF-8"),
        (".csv", CSV + b"b,A cat\n", "line 3: every caption must have a split, or none"),
        (".csv", CSV + b"b,A cat, a dog,dev\n", "line 3: more columns than the header; put captions into quotes"),
        (".csv", CSV + b'b,"A cat,dev\nc,A dog,dev\n', "line 4: unexpected end of data"),
        (".csv", CSV + b" ,A cat,dev\n", "line 3: image_id must be"),
        (".csv", CSV + b"b,A cat,eval\n", "line 3: split 'eval' is none of train, restval, dev, val, validation, test"),
        (".csv", b"Image_ID,Caption,Split\na,A dog,eval\n", "line 2: split 'eval' is none of"),
        (".jsonl", b'{"image_id": 1, "caption": "A dog", "split": ["train"]}\n', "line 1: split ['train'] is none of"),
        (".csv", CSV + b"a,A cat,dev\n", "line 3: image a is in dev, but in train before"),
        (".csv", b"image_id,caption\n", "no captions in it"),
        (
            ".csv",
            b"id,caption\n1,a\n",
            "with --image_column (a table's first line names the columns); there are id, caption",
        ),
        (
            ".csv",
            b"image,filename,text\n1,a,b\n",
            "line 2: choose the image with --image_column (a table's first line names the columns); several may be it",
        ),
        (
            ".json",
            b'[{"image": 1, "raw": "a", "text": "b"}]',
            "with --caption_column (a table's first line names the columns); several may be it: raw, text",
        ),
        (".csv", b"image,text,text\n1,a,b\n", "line 1: several columns are called text; rename or delete all but one"),
        (".txt", b"a.jpg#0\tA dog\nb.jpg A cat\n", "line 2: expected {"),
        (".txt", b"image_name| comment_number| comment\na.jpg| 0   A dog\n", "line 2: comment must be text"),
        (
            ".json",
            b'{"dataset": "coco", "images": []}',
            "neither a list of captions nor COCO's captions; Karpathy's splits",
        ),
        (".jsonl", JSONL + b"b,A dog\n", "line 2: Expecting value"),
        (".jsonl", JSONL + b'["b", "A dog"]\n', 'line 2: expected {"image_id"'),
        (".jsonl", JSONL + b'{"image_id": 1, "caption": ["A cat", 3]}\n', "line 2: caption must be text, or a list"),
        (".jsonl", JSONL + b'{"image_id": 1, "caption": []}\n', "line 2: caption must be text, or a list"),
        (".jsonl", JSONL + b'{"image_id": 1, "caption": "\\ud800", "split": "dev"}\n', "surrogates"),
        (".jsonl", JSONL + b'{"image_id": "\\u001b[2J", "caption": "a"}\n', "line 2: image_id must be"),
        (".json", b'[{"image_id": 1, "caption": "a"}, 3]', "entry 1 (counted from 0): expected {"),
        (".json", b'{"annotations": 3}', "not COCO's captions"),
        (".json", JSONL + JSONL, "not JSON; copy or download it again, or call it .jsonl if each line is an object"),
        (".jsonl", b'[\n{"image_id": 1, "caption": "a"}]', "line 1: Expecting value: line 1 column 2 (char 1); a list"),
        (".md", b"a dog\n", "expected a file that ends in .csv, .tsv, .txt, .token, .jsonl, .json, .parquet"),
    ],
)
def test_a_bad_line_is_named(tmp_path, suffix, content, words):
    path = tmp_path / f"c{suffix}"
    path.write_bytes(content)
    message = refusal(read_captions, path)
    assert message.startswith(f"{path}: ")
    assert words in message
    assert message.isprintable()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("c.csv", '\n\nImage ,Caption\na.jpg,A dog\na.jpg,"[A] cat"\n'),
        ("c.TXT", "\na.jpg#0\tA dog\na.jpg#1\t[A] cat\n"),
        ("c.csv", ",image,caption\n0,a.jpg,A dog\n1,a.jpg,[A] cat\n"),  # with pandas' index
        ("c.csv", 'filename,raw\na.jpg,"[""A dog"", ""[A] cat""]"\n'),
        ("c.csv", "filename,raw\na.jpg,\"['A dog', '[A] cat']\"\n"),
        ("c.json", '{"a.jpg": ["A dog", "[A] cat"]}'),
        ("c.json", '{"annotations": [{"image_id": "a.jpg", "caption": ["A dog", "[A] cat"]}]}'),
    ],
)
def test_captions_are_found_in_what_spreadsheets_and_scripts_write(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert read_captions(tmp_path / name) == ({"a.jpg": ["A dog", "[A] cat"]}, {}, {})


def test_a_mapping_leads_from_ids_to_file_names_and_something_else_is_refused(tmp_path, run):
    images, path = make_images(["b", "c", "a"]), tmp_path / "m.json"
    captions = write_captions(
        tmp_path / "c.jsonl", [{"image_id": n, "caption": "x", "split": "train"} for n in range(3)]
    )
    store, flags = write_store(tmp_path / "store", images), ("--id_mapping", path)
    path.write_text('["a.jpg"]')
    assert f"--id_mapping {path}: not a JSON object of image ids and file names" in run(captions, store, flags=flags)[2]
    path.write_text('{"0": "pictures/a.jpg", "1": "pictures/b.jpg", "2": "pictures/c.jpg"}')
    assert (
        "matched by file_name, name without folder and ending: 3 of 3 images, 0 is a"
        in run(captions, store, flags=flags)[1]
    )
    check_split(tmp_path / "data" / "new", "train", {"0": images["a"], "1": images["b"], "2": images["c"]})


def test_parquet_without_its_package_or_damaged_is_named(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pyarrow", None)
        assert f"{path}: Parquet needs pyarrow: pip install pyarrow" in refusal(read_captions, path)
    pytest.importorskip("pyarrow")
    assert f"{path}: not a Parquet file" in refusal(read_captions, path)


CAPTION = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=30).filter(str.strip)
ROW = st.tuples(st.sampled_from(["a", "b c", "7", "ä", 'x"y', "x,y"]), CAPTION)


@settings(deadline=None)
@given(rows=st.lists(ROW, min_size=1, max_size=10), suffix=st.sampled_from(SUFFIXES))
def test_any_captions_come_back_as_they_were_written(tmp_path_factory, rows, suffix):
    path = tmp_path_factory.getbasetemp() / f"any_rows{suffix}"
    write_as(path, [{"image_id": image_id, "caption": caption} for image_id, caption in rows])
    expected = {}
    for image_id, caption in rows:
        expected.setdefault(image_id, []).append(" ".join(caption.split()))
    assert read_captions(path)[:2] == (expected, {})


# The page


def test_the_page_says_what_happens(tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs" / "own_data.md").read_text(encoding="utf-8")
    kinds, blocks = zip(*re.findall(r"^```(\w+)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL), strict=True)
    assert kinds == ("python", "csv", "sh", "text", "sh", "python", "text")
    pictures, captions, preparation, printed, training, ranking, ranked = blocks
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    monkeypatch.chdir(tmp_path)
    exec(pictures, {})
    Path("captions.csv").write_text(captions)
    _, *argv = shlex.split(preparation)
    assert argv[:2] == ["-m", "lib.prepare"]
    said, expected = (SPEED.sub("", text) for text in (prepare(capsys, *argv[2:])[1], printed))
    assert said == expected
    assert [len(open_split("data", "photos", split, 414).features) for split in SPLITS] == [4, 2, 2]
    for line, program in zip(training.replace("\\\n", "").splitlines(), (train, test), strict=True):
        _, name, *flags = shlex.split(line)
        assert name == f"{program.__name__}.py"
        assert program.main([*flags, "--device", "cpu"]) == 0
    assert "rsum" in capsys.readouterr().out.lower()
    exec(ranking, {})
    lines, theirs = (text.split() for text in (capsys.readouterr().out, ranked))
    assert lines[1] == theirs[1] == "photos/photo0.jpg"  # the red circle
    assert sorted(lines[1::2]) == sorted(theirs[1::2])
    assert sorted(lines[::2], reverse=True) == lines[::2]
