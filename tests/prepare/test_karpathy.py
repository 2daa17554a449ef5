"""`prepare karpathy`: his captions and splits with features by image id, to the bit; nothing is dropped in silence."""

import json
import os
import re
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.data.dataset import open_split
from lib.data.features import FeatureFile
from lib.prepare import karpathy, writer
from lib.prepare.karpathy import read_karpathy
from lib.prepare.sources import Features
from tests.damage import changes, cuts, memory_below, refusal, spoil, unless_refused, write_bytes
from tests.prepare.interruptions import check_final, contents, files_at_most, kill, record_every, restore, states
from tests.prepare.samples import (
    IMG_DIM,
    check_split,
    entry,
    make_images,
    prepare,
    refused,
    write_folder,
    write_karpathy,
    write_store,
    write_tsv,
)

SPLITS = ["train", "val", "restval", "test"] * 3


@pytest.fixture
def run(tmp_path, capsys):
    """Runs the command on some features, into data/new."""
    return lambda *features, call=prepare: call(
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


# What is made


@pytest.mark.parametrize("counts", [(36,), (3, 10, 1, 6)])
def test_from_tsv_to_a_split_all_numbers_stay_the_same_to_the_bit(tmp_path, capsys, run, entries, counts):
    images = make_images(range(12), counts)
    path = write_tsv(tmp_path / "a.tsv", dict(reversed(images.items())))
    prepare(capsys, "tsv", path, "--data_path", tmp_path, "--data_name", "store")
    write_karpathy(tmp_path / "dataset.json", entries)
    code, out, _ = run(tmp_path / "store")
    assert code == 0
    captions = {image_id: [f"caption {k} of {image_id}" for k in range(5)] for image_id in images}
    folder = tmp_path / "data" / "new"
    for split, his in {"train": ("train", "restval"), "dev": ("val",), "test": ("test",)}.items():
        check_split(folder, split, in_splits(images, *his), captions)
    assert {name.split("_")[0] for name in contents(folder)} == {"train", "dev", "test"}
    assert {split: figures[:3] for split, figures in table(out).items()} == {
        "train": ["6", "30", "5"],
        "dev": ["3", "15", "5"],
        "test": ["3", "15", "5"],
    }


def test_coco_has_the_first_of_val_and_test_and_all_of_them(tmp_path, run, monkeypatch):
    monkeypatch.setattr(karpathy, "FIRST", 2)
    images = make_images(range(12))
    numbered = [entry(900 + n, split, cocoid=n, filename=f"COCO_{n:012d}.jpg") for n, split in enumerate(SPLITS)]
    write_karpathy(tmp_path / "dataset.json", numbered, "coco")
    assert run(write_store(tmp_path / "store", images))[0] == 0
    folder = tmp_path / "data" / "new"
    check_split(folder, "train", in_splits(images, "train", "restval"))
    for ours, his in {"dev": "val", "test": "test"}.items():
        whole = in_splits(images, his)
        check_split(folder, "testall" if ours == "test" else "devall", whole)
        check_split(folder, ours, dict(list(whole.items())[:2]))
    assert karpathy.FIRST == 2
    monkeypatch.undo()
    assert karpathy.FIRST == 1_000


def test_the_first_five_captions_count_and_fewer_are_kept(tmp_path, run):
    sentences = [5, 7, 3, 1]
    write_karpathy(tmp_path / "dataset.json", [entry(n, sentences=count) for n, count in enumerate(sentences)])
    images = make_images(range(4))
    _, out, _ = run(write_store(tmp_path / "store", images))
    captions = {str(n): [f"caption {k} of {n}" for k in range(min(5, count))] for n, count in enumerate(sentences)}
    check_split(tmp_path / "data" / "new", "train", images, captions)
    assert table(out)["train"][:3] == ["4", "14", "1 to 5, mean 3.5"]


def test_captions_are_one_line_each_and_words_stand_in_for_empty_ones(tmp_path, run):
    image = entry(0)
    image["sentences"] = [
        {"raw": " A  dog\n\truns.\u2028 "},
        {"raw": "", "tokens": ["a", "cat"]},
        {"tokens": ["a", "bird"]},
        {"raw": " ", "tokens": []},
        {"raw": "Ein Hund läuft \U0001f415"},
    ]
    write_karpathy(tmp_path / "dataset.json", [image])
    images = make_images("0")
    _, out, _ = run(write_store(tmp_path / "store", images))
    captions = ["A dog runs.", "a cat", "a bird", "Ein Hund läuft \U0001f415"]
    check_split(tmp_path / "data" / "new", "train", images, {"0": captions})
    assert "1 empty captions left out" in out


def test_half_precision_stays_half_precision(tmp_path, run, entries):
    write_karpathy(tmp_path / "dataset.json", entries)
    images = make_images(range(12), dtype=np.float16)
    run(write_folder(tmp_path / "files", images))
    check_split(tmp_path / "data" / "new", "dev", in_splits(images, "val"))


@pytest.mark.parametrize(
    ("names", "key"),
    [
        (lambda n: 100 + n, "cocoid"),
        (lambda n: f"COCO_val2014_{100 + n:012d}", "cocoid"),
        (lambda n: f"photo {n}", "filename"),
        (lambda n: f"photo {n}.jpg", "filename"),
        (lambda n: n, "imgid"),
    ],
)
def test_the_key_that_finds_most_images_is_taken_and_named(tmp_path, run, names, key):
    entries = [entry(n, cocoid=100 + n, filename=f"photo {n}.jpg") for n in range(6)]
    write_karpathy(tmp_path / "dataset.json", entries)
    images = make_images([names(n) for n in range(6)])
    _, out, _ = run(write_folder(tmp_path / "files", images))
    assert f"features found by {key}\n" in out
    expected = {str(100 + n): image for n, image in enumerate(images.values())}
    check_split(tmp_path / "data" / "new", "train", expected)


def test_between_keys_that_find_as_many_the_first_is_taken(tmp_path, run):
    write_karpathy(tmp_path / "dataset.json", [entry(1, cocoid=2), entry(2, cocoid=1)])
    _, out, _ = run(write_store(tmp_path / "store", make_images("12")))
    assert "features found by cocoid\n" in out
    assert (tmp_path / "data" / "new" / "train_ids.txt").read_text() == "2\n1\n"


def test_images_without_features_are_counted_named_and_listed(tmp_path, run, entries):
    write_karpathy(tmp_path / "dataset.json", entries)
    images = {image_id: image for image_id, image in make_images(range(12)).items() if image_id not in ("0", "2", "5")}
    code, out, _ = run(write_store(tmp_path / "store", images))
    folder = tmp_path / "data" / "new"
    assert code == 0
    check_split(folder, "train", in_splits(images, "train", "restval"))
    assert {split: figures[-1] for split, figures in table(out).items()} == {"train": "2", "dev": "1", "test": "0"}
    assert f"no features for 2 of train: 0, 2; all are in {folder / 'train_missing.txt'}" in out
    assert (folder / "train_missing.txt").read_text() == "0\n2\n"
    assert (folder / "dev_missing.txt").read_text() == "5\n"
    assert not (folder / "test_missing.txt").exists()


def test_a_split_of_which_no_image_has_features_is_said_and_listed(tmp_path, run, entries):
    write_karpathy(tmp_path / "dataset.json", entries)
    _, out, _ = run(write_store(tmp_path / "store", in_splits(make_images(range(12)), "test")))
    folder = tmp_path / "data" / "new"
    assert table(out)["train"] == ["0", "0", "6"]
    assert len((folder / "train_missing.txt").read_text().split()) == 6
    assert not (folder / "train_ims.npy").exists()
    assert len(open_split(str(tmp_path / "data"), "new", "test", IMG_DIM).features) == 3


def test_features_of_other_images_are_refused_with_names_of_both(tmp_path, run, entries):
    write_karpathy(tmp_path / "dataset.json", entries)
    message = run(write_store(tmp_path / "store", make_images("xyz")), call=refused)
    assert "no image has any there; the captions are of 0, 2, 4, 6, 8, ..., the features of x, y, z" in message
    assert not (tmp_path / "data").exists()


def test_a_data_set_is_not_written_among_its_features(tmp_path, run, entries):
    write_karpathy(tmp_path / "dataset.json", entries)
    store = write_store(tmp_path / "data" / "new", make_images(range(12)))
    before = contents(store)
    assert "is where the data set goes" in run(store, call=refused)
    assert contents(store) == before


def test_features_that_are_not_numbers_are_named(tmp_path, run, entries):
    write_karpathy(tmp_path / "dataset.json", entries)
    images = make_images(range(12))
    images["8"][0][2, 1] = np.nan
    folder = write_folder(tmp_path / "files", images)
    assert f"{folder / '8.npy'}: NaN or infinite" in run(folder, call=refused)
    assert not (tmp_path / "data" / "new" / "train_ims.npy").exists()


# What is refused


def test_run_again_it_says_that_it_is_there_and_writes_nothing(tmp_path, run, entries):
    write_karpathy(tmp_path / "dataset.json", entries)
    store = write_store(tmp_path / "store", make_images(range(12)))
    _, first, _ = run(store)
    before = contents(tmp_path / "data" / "new")
    code, out, _ = run(store)
    assert code == 0
    assert f"{tmp_path / 'data' / 'new'} is already there\n" in out
    assert table(out) == table(first)
    assert contents(tmp_path / "data" / "new") == before


@pytest.mark.parametrize("change", ["captions", "features"])
def test_what_was_made_from_something_else_is_not_taken_for_it(tmp_path, run, entries, change):
    path = write_karpathy(tmp_path / "dataset.json", entries)
    store = write_store(tmp_path / "store", make_images(range(12)))
    run(store)
    if change == "captions":
        path.write_text(path.read_text().replace("caption 3 of 4", "another caption"))
    else:
        write_store(tmp_path / "store", make_images(range(12), seed=1))
    assert "made from something else" in run(store, call=refused)


BAD_FILES = {
    "no JSON": (b"images", "Expecting value"),
    "nothing": (b"", "Expecting value"),
    "not UTF-8": (b'{"dataset": "\xff"}', "can't decode"),
    "too deep": (b"[" * 100_000, "recursion"),
    "a list": (b"[]", "images: expected a JSON object around it, found list"),
    "no images": (b'{"dataset": "coco"}', "images is NoneType, expected list"),
    "no name": (b'{"images": []}', "dataset is NoneType, expected str"),
    "an empty list": (b'{"images": [], "dataset": "coco"}', "no images in it"),
}


@pytest.mark.parametrize("damage", BAD_FILES)
def test_a_file_that_is_not_karpathys_is_named(tmp_path, damage):
    content, words = BAD_FILES[damage]
    path = write_bytes(tmp_path / "dataset.json", content)
    message = refusal(read_karpathy, path)
    assert message.startswith(f"{path}: ")
    assert words in message


BAD_FIELDS = {
    "split": ([None, 3, "eval", "\x1b[2J"], "split"),
    "imgid": (["1", 1.0, True, -1, 10**30, None], "imgid"),
    "cocoid": (["1", [1], -3], "cocoid"),
    "filename": ([3, "\x1b[2J"], "filename"),
    "sentences": ([None, {}, "a dog", [3], [], [{"raw": 3}], [{"tokens": [3]}], [{"tokens": "a"}], [{}]], ""),
}


@pytest.mark.parametrize(("field", "value"), [(f, value) for f, (values, _) in BAD_FIELDS.items() for value in values])
def test_a_bad_field_is_named_with_the_images_place(tmp_path, entries, field, value):
    entries[4][field] = value
    path = write_karpathy(tmp_path / "dataset.json", entries)
    message = refusal(read_karpathy, path)
    assert message.startswith(f"{path}: image 4 (counted from 0): ")
    assert BAD_FIELDS[field][1] in message
    assert message.isprintable()


@pytest.mark.parametrize(
    ("text", "words"), [("\ud800", "surrogate"), ("a\0b", "NUL"), ("x" * 9_000, "longer than 8192")]
)
def test_a_caption_that_is_none_is_named(tmp_path, entries, text, words):
    entries[4]["sentences"][2]["raw"] = text
    message = refusal(read_karpathy, write_karpathy(tmp_path / "dataset.json", entries))
    assert "image 4 (counted from 0)" in message
    assert words in message


def test_an_id_twice_is_named_with_both_places(tmp_path, entries):
    entries[7]["imgid"] = 2
    message = refusal(read_karpathy, write_karpathy(tmp_path / "dataset.json", entries))
    assert "image 7 (counted from 0): has the id of image 2, 2" in message


def test_a_file_of_gigabytes_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(karpathy, "JSON_BYTES", 2**20)
    path = write_bytes(tmp_path / "dataset.json", b"")
    os.truncate(path, 2**33)
    with memory_below(2**22):
        assert "more than 1048576 bytes" in refusal(read_karpathy, path)


SOUND = json.dumps({"dataset": "coco", "images": [entry(n, sentences=1, cocoid=5 + n) for n in range(3)]}).encode()


@settings(deadline=None, max_examples=500)
@given(st.one_of(st.binary(), st.builds(spoil, st.just(SOUND), cuts(len(SOUND)), changes(len(SOUND)))))
def test_any_bytes_are_karpathys_or_refused(tmp_path_factory, content):
    path = write_bytes(tmp_path_factory.getbasetemp() / "any.json", content)
    read = unless_refused(lambda: read_karpathy(path), f"{path}: ")
    assert read is None or all(len(one.captions) == 1 and one.id.isdigit() for one in read[1])
    assert read is not None or content != SOUND


# Interruptions


@pytest.fixture
def often(monkeypatch):
    record_every(250, monkeypatch)


@pytest.fixture
def work(tmp_path, run, entries, often):
    """Runs the command on features of varying numbers, one of them missing."""
    write_karpathy(tmp_path / "dataset.json", entries)
    folder = write_folder(tmp_path / "files", make_images([n for n in range(12) if n != 4], (3, 10, 1, 6)))
    return lambda call=prepare: run(folder, call=call)


def test_a_kill_at_any_point_leaves_no_half_file_and_the_rerun_ends_right(tmp_path, work, monkeypatch):
    folder, read = tmp_path / "data" / "new", []
    left = states(work, folder)
    expected = contents(folder)
    read_image = Features.read
    monkeypatch.setattr(Features, "read", lambda self, found: (read.append(found), read_image(self, found))[1])
    assert len(left) > 60
    counts = []
    for state in left:
        shutil.rmtree(folder)
        restore(folder, state)
        check_final(folder, expected)
        read.clear()
        assert work()[0] == 0
        assert contents(folder) == expected
        counts.append(len(read))
    assert counts == sorted(counts, reverse=True)  # the later the kill, the less is read again
    assert counts[0] == 11
    assert counts[-1] == 0
    assert len(set(counts)) >= 5


def test_real_kills_one_after_the_other_come_to_the_end(tmp_path, work, often):
    kills = 0
    while kill(work, 450):
        kills += 1
        assert kills < 10
    assert kills >= 2
    assert len(FeatureFile(tmp_path / "data" / "new" / "train_ims.npy")) == 5


def test_a_disk_without_room_is_refused_before_anything_is_written(tmp_path, work, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 0, 100))
    assert "are free on that disk" in work(refused)
    assert not (tmp_path / "data").exists()


def test_a_disk_that_fills_half_way_gives_one_line_and_the_rerun_ends_right(tmp_path, work):
    with files_at_most(500):
        assert "could not be written: File too large" in work(refused)
    assert work()[0] == 0
    assert len(FeatureFile(tmp_path / "data" / "new" / "train_ims.npy")) == 5


def test_a_second_process_is_refused(tmp_path, work):
    with writer.SplitWriter(tmp_path / "data" / "new", "dev", {}):
        assert "another process is writing it" in work(refused)
    assert work()[0] == 0
