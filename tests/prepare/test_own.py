"""`prepare own`: any captions and features become a data set, to the bit; the page that shows it says what happens."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.data.dataset import open_split
from lib.prepare import writer
from lib.prepare.own import LINE_BYTES, draw_splits, read_captions
from tests.damage import changes, cuts, grow, memory_below, refusal, spoil, unless_refused, write_bytes
from tests.prepare.interruptions import check_final, contents, files_at_most, restore, states
from tests.prepare.samples import (
    check_split,
    make_images,
    prepare,
    refused,
    write_folder,
    write_store,
    write_tsv,
)

ROOT = Path(__file__).resolve().parents[2]
SPLITS = ("train", "dev", "test")


def write_captions(path, rows):
    """rows: dicts with image_id, caption and perhaps split."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        with open(path, "w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, list(rows[0]))
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
    return lambda captions, *features, flags=(), call=prepare: call(
        *(capsys, "own", captions, "--features", *features, *flags),
        *("--data_path", tmp_path / "data", "--data_name", "new"),
    )


def ids_of(folder):
    return {split: (folder / f"{split}_ids.txt").read_text().splitlines() for split in SPLITS}


# What is made


@pytest.mark.parametrize("counts", [(36,), (3, 10, 1)])
@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_from_tsv_to_a_split_all_numbers_stay_the_same_to_the_bit(tmp_path, capsys, run, suffix, counts):
    images = {f"image_{n}": image for n, image in enumerate(make_images(range(8), counts).values())}
    path = write_tsv(tmp_path / "a.tsv", dict(reversed(images.items())))
    prepare(capsys, "tsv", path, "--data_path", tmp_path, "--data_name", "store")
    splits = dict(zip(images, ["train", "dev", "test", "train"] * 2, strict=True))
    rows = [{**row, "image_id": row["image_id"].replace(" ", "_")} for row in make_rows()]
    rows = [{**row, "split": splits[row["image_id"]]} for row in rows]
    code, out, _ = run(write_captions(tmp_path / f"captions{suffix}", rows), tmp_path / "store")
    assert code == 0
    for split in SPLITS:
        expected = {image_id: image for image_id, image in images.items() if splits[image_id] == split}
        check_split(tmp_path / "data" / "new", split, expected, captions_of(rows))
    assert re.search(r"train +4 +6 +1 to 2, mean 1.5 ", out)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_a_file_for_each_image_will_do(tmp_path, run, suffix, dtype):
    images = make_images(range(8), (3, 10, 1), dtype)
    rows = [{"image_id": int(image_id), "caption": "a dog"} for image_id in images]
    code, _, _ = run(write_captions(tmp_path / "c.jsonl", rows), write_folder(tmp_path / "files", images, suffix))
    assert code == 0
    drawn = ids_of(tmp_path / "data" / "new")
    assert sorted(image_id for ids in drawn.values() for image_id in ids) == list(images)
    for split, ids in drawn.items():
        check_split(tmp_path / "data" / "new", split, {image_id: images[image_id] for image_id in ids})


def test_the_images_of_a_split_are_in_the_order_in_which_they_appear(tmp_path, run):
    names = ["c", "a", "b", "e", "d"]
    rows = [{"image_id": name, "caption": "x", "split": "train"} for name in [*names, *sorted(names)]]
    run(write_captions(tmp_path / "c.csv", rows), write_store(tmp_path / "store", make_images("abcde")))
    assert (tmp_path / "data" / "new" / "train_ids.txt").read_text().split() == names
    assert sorted({name.split("_")[0] for name in contents(tmp_path / "data" / "new")}) == ["train"]


def test_the_draw_depends_on_ids_and_seed_and_not_on_the_order_of_lines():
    ids = [f"image {n}" for n in range(200)]
    drawn = draw_splits(ids, 0.1, 0.2, 0)
    assert draw_splits(reversed(ids), 0.1, 0.2, 0) == drawn
    assert [list(drawn.values()).count(split) for split in SPLITS] == [140, 20, 40]
    assert draw_splits(ids, 0.1, 0.2, 1) != drawn
    assert [ids.index(i) for i, split in drawn.items() if split == "dev"] != list(range(20))


@pytest.mark.parametrize("images", [3, 4, 5])
def test_a_few_images_still_give_one_to_dev_and_one_to_test(images):
    drawn = list(draw_splits(map(str, range(images)), 0.1, 0.1, 0).values())
    assert (drawn.count("dev"), drawn.count("test"), drawn.count("train")) == (1, 1, images - 2)


def test_what_has_no_features_or_no_captions_is_counted_named_and_listed(tmp_path, run):
    splits = {f"image {n}": SPLITS[n % 3] for n in range(8)}
    rows = make_rows(splits=splits)
    images = make_images([*(f"image {n}" for n in range(8) if n not in (0, 3, 4)), *"zyx"])
    _, out, _ = run(write_captions(tmp_path / "c.csv", rows), write_folder(tmp_path / "files", images))
    folder = tmp_path / "data" / "new"
    assert ids_of(folder) == {"train": ["image 6"], "dev": ["image 1", "image 7"], "test": ["image 2", "image 5"]}
    assert f"no features for 2 of train: image 0, image 3; all are in {folder / 'train_missing.txt'}\n" in out
    assert (folder / "train_missing.txt").read_text() == "image 0\nimage 3\n"
    assert (folder / "dev_missing.txt").read_text() == "image 4\n"
    assert f"no captions for 3 with features: x, y, z; all are in {folder / 'without_captions.txt'}\n" in out
    assert (folder / "without_captions.txt").read_text() == "x\ny\nz\n"


def test_run_again_it_says_that_it_is_there(tmp_path, run):
    captions = write_captions(tmp_path / "c.csv", make_rows())
    store = write_folder(tmp_path / "files", make_images([f"image {n}" for n in range(8)]))
    run(captions, store)
    before = contents(tmp_path / "data" / "new")
    code, out, _ = run(captions, store)
    assert code == 0
    assert f"{tmp_path / 'data' / 'new'} is already there\n" in out
    assert contents(tmp_path / "data" / "new") == before
    assert "made from something else" in run(captions, store, flags=("--seed", 1), call=refused)


# What is read


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_byte_order_marks_line_ends_and_blank_lines_do_not_matter(tmp_path, mark, end):
    lines = ["caption,other,image_id", "A dog,3,a", "", '"Two  ""cats"",', 'on a mat",4,b', " Hund ,5, a "]
    path = write_bytes(tmp_path / "c.csv", (mark + end.join(lines) + end).encode())
    assert read_captions(path) == ({"a": ["A dog", "Hund"], "b": ['Two "cats", on a mat']}, {})
    rows = [{"image_id": "a", "caption": "A\ndog"}, {"caption": "Zwei Hünde", "image_id": 7, "split": None}]
    lines = [json.dumps(rows[0]), " ", json.dumps(rows[1], ensure_ascii=False)]
    path = write_bytes(tmp_path / "c.jsonl", (mark + end.join(lines)).encode())
    assert read_captions(path) == ({"a": ["A dog"], "7": ["Zwei Hünde"]}, {})


CSV, JSONL = b"image_id,caption,split\na,A dog,train\n", b'{"image_id": "a", "caption": "A dog", "split": "train"}\n'
BAD_LINES = {
    "csv": {
        "not UTF-8": (CSV + b"b,caf\xe9,dev\n", 3, "not UTF-8"),
        "a column too few": (CSV + b"b,A cat\n", 3, "2 columns instead of 3"),
        "a comma not quoted": (CSV + b"b,A cat, a dog,dev\n", 3, "4 columns instead of 3; quote commas"),
        "a quote not closed": (CSV + b'b,"A cat,dev\nc,A dog,dev\n', 3, "unexpected end of data"),
        "a quote in the middle": (CSV + b'b,"A" cat,dev\n', 3, "expected after"),
        "a lone return": (CSV + b"b,A\rcat,dev\n", 3, "new-line character"),
        "no id": (CSV + b" ,A cat,dev\n", 3, "image_id must be"),
        "an id over two lines": (CSV + b'"b\nc",A cat,dev\n', 3, "image_id holds what cannot be printed"),
        "an id without end": (CSV + b"x" * 600 + b",A cat,dev\n", 3, "image_id must be"),
        "no caption": (CSV + b"b, ,dev\n", 3, "the caption is empty"),
        "NUL": (CSV + b"b,A\0cat,dev\n", 3, "NUL"),
        "an unknown split": (CSV + b"b,A cat,val\n", 3, "split 'val' is none of train, dev, test"),
        "no split": (CSV + b"b,A cat,\n", 3, "every line must have a split, or none"),
        "another split": (CSV + b"a,A cat,dev\n", 3, "image a is in dev, but in train before"),
    },
    "jsonl": {
        "no JSON": (JSONL + b"b,A dog\n", 2, "no JSON"),
        "a list": (JSONL + b'["b", "A dog"]\n', 2, "expected {"),
        "null": (JSONL + b"null\n", 2, "expected {"),
        "too deep": (JSONL + b"[" * 50_000 + b"\n", 2, "no JSON"),
        "not UTF-8": (JSONL + b'{"image_id": "\xff"}\n', 2, "not UTF-8"),
        "no id": (JSONL + b'{"caption": "A cat"}\n', 2, "image_id must be"),
        "a yes for an id": (JSONL + b'{"image_id": true, "caption": "A cat"}\n', 2, "image_id must be"),
        "no caption": (JSONL + b'{"image_id": 1}\n', 2, "caption must be a text"),
        "captions in a list": (JSONL + b'{"image_id": 1, "caption": ["A cat"]}\n', 2, "caption must be a text"),
        "half a character": (JSONL + b'{"image_id": 1, "caption": "\\ud800"}\n', 2, "surrogate"),
        "a split that is a number": (JSONL + b'{"image_id": 1, "caption": "a", "split": 3}\n', 2, "split 3 is none of"),
        "a split that is a list": (JSONL + b'{"image_id": 1, "caption": "a", "split": ["dev"]}\n', 2, "is none of"),
        "a terminal code": (JSONL + b'{"image_id": "\\u001b[2J", "caption": "a"}\n', 2, "cannot be printed"),
        "no split": (JSONL + b'{"image_id": 1, "caption": "a"}\n', 2, "every line must have a split, or none"),
    },
}


@pytest.mark.parametrize(
    ("suffix", "damage"), [(suffix, damage) for suffix in BAD_LINES for damage in BAD_LINES[suffix]]
)
def test_a_bad_line_is_named(tmp_path, suffix, damage):
    content, line, words = BAD_LINES[suffix][damage]
    path = write_bytes(tmp_path / f"c.{suffix}", content)
    message = refusal(read_captions, path)
    assert message.startswith(f"{path}: line {line}")
    assert words in message
    assert message.isprintable()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("c.csv", b"", "no captions in it"),
        ("c.csv", b"image_id,caption\n", "no captions in it"),
        ("c.csv", b"id,caption\n1,a\n", "the first line must name the columns, image_id and caption"),
        ("c.csv", b"image_id;caption\n1;a\n", "the first line must name the columns"),
        ("c.csv", b"image_id,caption,caption\n1,a,b\n", "the first line must name the columns"),
        ("c.jsonl", b"\n\n", "no captions in it"),
        ("c.txt", b"a dog\n", "expected a file that ends in .jsonl or .csv"),
        ("c.csv", "image_id,caption\n1,a\n".encode("utf-16"), "not UTF-8"),
    ],
)
def test_a_file_that_is_none_of_captions_is_named(tmp_path, name, content, words):
    path = write_bytes(tmp_path / name, content)
    message = refusal(read_captions, path)
    assert message.startswith(f"{path}: ")
    assert words in message


@pytest.mark.parametrize("name", ["c.csv", "c.jsonl"])
def test_gigabytes_without_a_line_end_are_refused_in_little_memory(tmp_path, name):
    path = write_bytes(tmp_path / name, CSV if name == "c.csv" else JSONL)
    grow(path, 2**33)
    with memory_below(2**20):
        assert f"is longer than {LINE_BYTES} bytes" in refusal(read_captions, path)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--dev", 0), "--dev 0.0: a part of the images"),
        (("--test", 1), "--test 1.0: a part of the images"),
        (("--dev", "nan"), "--dev nan: a part of the images"),
        (("--dev", 0.5, "--test", 0.5), "8 images are too few: --dev 0.5 and --test 0.5 take 4 and 4"),
        (("--seed", -1), "--seed -1 is negative"),
    ],
)
def test_parts_that_cannot_be_are_refused(tmp_path, run, flags, words):
    captions = write_captions(tmp_path / "c.csv", make_rows())
    store = write_folder(tmp_path / "files", make_images([f"image {n}" for n in range(8)]))
    assert words in run(captions, store, flags=flags, call=refused)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("images", [1, 2])
def test_too_few_images_for_three_splits_are_refused(images):
    assert f"{images} images are too few" in refusal(draw_splits, map(str, range(images)), 0.1, 0.1, 0)


def test_a_split_without_features_is_refused(tmp_path, run):
    rows = make_rows(splits={f"image {n}": SPLITS[n % 3] for n in range(8)})
    store = write_folder(tmp_path / "files", make_images(["image 0", "image 2"]))
    message = run(write_captions(tmp_path / "c.csv", rows), store, call=refused)
    assert "no image of dev has any there; the captions are of image 1, image 4, image 7, the features of" in message
    assert not (tmp_path / "data").exists()


# Whatever the bytes are

CAPTION = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=30).filter(str.strip)
ROW = st.tuples(st.sampled_from(["a", "b c", "7", "ä", 'x"y', "x,y"]), CAPTION)


@settings(deadline=None)
@given(rows=st.lists(ROW, min_size=1, max_size=10), suffix=st.sampled_from([".csv", ".jsonl"]))
def test_any_captions_come_back_as_they_were_written(tmp_path_factory, rows, suffix):
    path = tmp_path_factory.getbasetemp() / f"any_rows{suffix}"
    write_captions(path, [{"image_id": image_id, "caption": caption} for image_id, caption in rows])
    expected = {}
    for image_id, caption in rows:
        expected.setdefault(image_id, []).append(" ".join(caption.split()))
    assert read_captions(path) == (expected, {})


@settings(deadline=None, max_examples=500)
@given(
    suffix=st.sampled_from(["csv", "jsonl"]),
    content=st.one_of(
        st.binary(),
        st.text('image_id,caption\n"a{}: \r').map(str.encode),
        *(st.builds(spoil, st.just(sound * 2), cuts(120), changes(120)) for sound in (CSV, JSONL)),
    ),
)
def test_any_bytes_are_captions_or_refused(tmp_path_factory, suffix, content):
    path = write_bytes(tmp_path_factory.getbasetemp() / f"any_bytes.{suffix}", content)
    read = unless_refused(lambda: read_captions(path), f"{path}: ")
    for image_id, captions in (read[0] if read else {}).items():
        assert image_id.isprintable()
        assert all(caption and caption == " ".join(caption.split()) for caption in captions)
    if content == {"csv": CSV, "jsonl": JSONL * 2}[suffix]:
        assert read


# Interruptions


@pytest.fixture
def work(tmp_path, run, monkeypatch):
    """Runs the command on features of varying numbers, one of them missing and one without captions."""
    monkeypatch.setattr(writer, "SYNC_BYTES", 250)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    captions = write_captions(tmp_path / "c.csv", make_rows(12))
    images = make_images([*(f"image {n}" for n in range(12) if n != 4), "x"], (3, 10, 1, 6))
    folder = write_folder(tmp_path / "files", images, ".npz")
    return lambda call=prepare: run(captions, folder, call=call)


def test_a_kill_at_any_point_leaves_no_half_file_and_the_rerun_ends_right(tmp_path, work):
    folder = tmp_path / "data" / "new"
    left = states(work, folder)
    expected = contents(folder)
    assert len(left) > 60
    for state in left:
        shutil.rmtree(folder)
        restore(folder, state)
        check_final(folder, {name: content for name, content in expected.items() if name != "without_captions.txt"})
        assert work()[0] == 0
        assert contents(folder) == expected


def test_a_full_disk_is_refused_before_and_half_way(tmp_path, work, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 0, 100))
        assert "are free on that disk" in work(refused)
    assert not (tmp_path / "data").exists()
    with files_at_most(500):
        assert "could not be written: File too large" in work(refused)
    assert work()[0] == 0


# The page


def test_the_page_says_what_happens(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "own_data.md").read_text(encoding="utf-8")
    kinds, blocks = zip(*re.findall(r"^```(\w+)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL), strict=True)
    assert kinds == ("python", "csv", "sh", "text", "sh")
    features, captions, preparation, printed, training = blocks
    for name in ("lib", "tests", "train.py", "test.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    exec(features, {})
    Path("captions.csv").write_text(captions)
    assert re.sub(r"\d+ seconds", "0 seconds", shell(preparation)) == printed
    assert [len(open_split("data", "photos", split, 16).features) for split in SPLITS] == [4, 2, 2]
    said = shell(training.replace("\n", " --device cpu\n"))
    assert "rsum" in said.lower()


def shell(script):
    """What a script prints, run with this Python."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["sh", "-e", "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
