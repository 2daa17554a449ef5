"""Features and captions on disk: both layouts, repeated rows, line ends, and one clear line for every damage."""

import io
import math
import os
import pickle
import re
import shutil
from codecs import BOM_UTF8

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.data.dataset import find_folder, open_split, read_captions
from lib.data.features import MOST_REGIONS, FeatureFile
from lib.files import LINE_BYTES
from tests.damage import changes, cuts, grow, memory_below, refusal, spoil, unless_refused, write_bytes

IMAGES, REGIONS, IMG_DIM = 7, 3, 4


def make_features(images=IMAGES, dtype=np.float32, repeats=1):
    features = np.random.default_rng(0).normal(size=(images, REGIONS, IMG_DIM)).astype(dtype)
    return features.repeat(repeats, axis=0)


def make_captions(images=IMAGES):
    return [f"caption {k} of image {image}" for image in range(images) for k in range(5)]


def write(folder, features, captions=None, split="dev"):
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / f"{split}_ims.npy", features)
    lines = make_captions() if captions is None else captions
    (folder / f"{split}_caps.txt").write_bytes("".join(f"{line}\n" for line in lines).encode())


def as_npy(array, **options):
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def with_header(header, data=b""):
    """A .npy file of any header text."""
    header = header.encode("latin1")
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data


@pytest.fixture
def folder(tmp_path):
    """A sound data set of the split dev."""
    write(tmp_path / "f30k_precomp", make_features())
    return tmp_path / "f30k_precomp"


def open_dev(folder, img_dim=IMG_DIM):
    return open_split(str(folder.parent), folder.name, "dev", img_dim)


# What is read


@pytest.mark.parametrize("name", ["f30k_precomp", "precomp"])
def test_layouts_of_scan_and_of_gpo_are_found(tmp_path, name):
    write(tmp_path / name, make_features())
    split = open_split(str(tmp_path), "f30k_precomp", "dev", IMG_DIM)
    assert split.folder == tmp_path / name
    assert split.name == "dev"
    assert split.captions == make_captions()


def test_the_named_folder_comes_before_that_of_gpo(tmp_path):
    write(tmp_path / "precomp", make_features())
    write(tmp_path / "f30k_precomp", make_features())
    assert open_split(str(tmp_path), "f30k_precomp", "dev", IMG_DIM).folder == tmp_path / "f30k_precomp"


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("repeats", [1, 5])
def test_each_image_is_one_row_however_often_the_file_holds_it(tmp_path, repeats, dtype):
    write(tmp_path / "precomp", make_features(dtype=dtype, repeats=repeats))
    split = open_split(str(tmp_path), "precomp", "dev", IMG_DIM)
    assert len(split.features) == IMAGES
    assert (split.features.regions, split.features.img_dim) == (REGIONS, IMG_DIM)
    assert split.image_of_caption.tolist() == [image for image in range(IMAGES) for _ in range(5)]
    for images in (np.arange(IMAGES), np.array([6, 0, 0, 3])):
        rows = split.features.read(images)
        assert rows.dtype == dtype
        assert np.array_equal(rows, make_features(dtype=dtype)[images].reshape(-1, IMG_DIM))


def test_one_image_repeated_is_recognised(tmp_path):
    write(tmp_path / "precomp", make_features(1, repeats=5), make_captions(1))
    assert len(open_split(str(tmp_path), "precomp", "dev", IMG_DIM).features) == 1


@pytest.mark.parametrize("equal", [slice(0), slice(0, 5), slice(15, 20), slice(30, 35), slice(1, 35)])
def test_rows_that_do_not_all_come_in_fives_are_not_taken_for_repeats(tmp_path, equal):
    features = make_features(35)
    features[equal] = 1
    write(tmp_path / "precomp", features)
    message = refusal(open_split, str(tmp_path), "precomp", "dev", IMG_DIM)
    assert "35 captions do not fit the 35 rows" in message


def test_features_stay_on_the_disk_and_travel_as_a_path(folder):
    big = np.random.default_rng(0).normal(size=(IMAGES, 500, IMG_DIM)).astype(np.float32)
    np.save(folder / "dev_ims.npy", big)
    features = open_dev(folder).features
    features.read(np.array([0]))
    pickled = pickle.dumps(features)
    assert len(pickled) < 2000
    copy = pickle.loads(pickled)
    assert len(copy) == IMAGES
    assert np.array_equal(copy.read(np.array([2, 4])), big[[2, 4]].reshape(-1, IMG_DIM))


def test_a_forked_process_reads_the_same_file_without_disturbing_the_other(folder):
    """Both use one descriptor: a position of its own would be shared."""
    features = open_dev(folder).features
    expected = features.read(np.arange(IMAGES))
    child = os.fork()
    equal = all(np.array_equal(features.read(np.arange(IMAGES)), expected) for _ in range(300))
    if not child:
        os._exit(0 if equal else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert equal


@settings(deadline=None)
@given(rows=st.lists(st.integers(0, IMAGES * REGIONS - 1)), half=st.booleans(), repeats=st.sampled_from([1, 5]))
def test_any_regions_in_any_order_are_read(tmp_path_factory, rows, half, repeats):
    path = write_bytes(tmp_path_factory.getbasetemp() / "some_ims.npy", as_npy(make_features(repeats=repeats)))
    expected = make_features().reshape(-1, IMG_DIM)[np.array(rows, int)]
    read = FeatureFile(path, repeats).read_rows(np.array(rows, int), half)
    assert read.dtype == (np.float16 if half else np.float32)
    assert np.array_equal(read, expected.astype(read.dtype))


def test_a_file_cut_while_it_is_open_is_named(folder):
    features = open_dev(folder).features
    features.read(np.array([IMAGES - 1]))
    os.truncate(folder / "dev_ims.npy", 150)
    message = refusal(features.read, np.array([IMAGES - 1]))
    assert message.startswith(f"{folder / 'dev_ims.npy'}: has become shorter")


@pytest.mark.parametrize("value", [1e5, -7e4])
def test_what_float16_cannot_hold_is_refused_only_where_it_is_asked_for(folder, value):
    rows = make_features()
    rows[3, 1, 2] = value
    write(folder, rows)
    features = open_dev(folder).features
    assert features.read(np.array([3])).max() <= 1e5
    message = refusal(features.read_rows, np.arange(IMAGES * REGIONS), True)
    assert message.startswith(f"{folder / 'dev_ims.npy'}: row 3 holds a feature beyond float16's largest number, 65504")


def test_reading_ahead_asks_for_every_byte_of_the_images_and_changes_nothing(folder, monkeypatch):
    asked = []
    monkeypatch.setattr("lib.data.features.READ_AHEAD_BYTES", 20)
    monkeypatch.setattr(
        os, "posix_fadvise", lambda _, first, length, advice: asked.append((first, length)), raising=False
    )
    monkeypatch.setattr(os, "POSIX_FADV_WILLNEED", 3, raising=False)
    write(folder, make_features(repeats=5))
    open_dev(folder).features.read_ahead(np.array([4, 1]))
    size = 4 * REGIONS * IMG_DIM
    assert asked == [
        (128 + 5 * image * size + part, length) for image in (4, 1) for part, length in ((0, 20), (20, 20), (40, 8))
    ]
    monkeypatch.delattr(os, "posix_fadvise")
    open_dev(folder).features.read_ahead(np.array([4, 1]))


# Varying numbers of regions, and of captions


COUNTS = [3, 1, 5, 2, 2]


def write_varying(folder, counts=COUNTS, dtype=np.float32, offsets=None, captions=None):
    """All regions of all images one after the other, with offsets."""
    rows = np.random.default_rng(0).normal(size=(sum(counts), IMG_DIM)).astype(dtype)
    write(folder, rows, captions or make_captions(len(counts)))
    np.save(folder / "dev_offsets.npy", np.cumsum([0, *counts]) if offsets is None else offsets)
    return rows


@settings(deadline=None)
@given(counts=st.lists(st.integers(1, 6), min_size=1, max_size=8), dtype=st.sampled_from([np.float16, np.float32]))
def test_images_of_varying_counts_are_read_by_their_offsets(tmp_path_factory, counts, dtype):
    folder = tmp_path_factory.getbasetemp() / "varying_precomp"
    rows = write_varying(folder, counts, dtype)
    features = open_dev(folder).features
    assert features.counts.tolist() == counts
    assert (features.regions, features.varies) == (max(counts), len(set(counts)) > 1)
    assert features.dtype == dtype
    images = np.split(rows, np.cumsum(counts)[:-1])
    for order in (np.arange(len(counts)), np.arange(len(counts))[::-1]):
        assert np.array_equal(features.read(order), np.concatenate([images[image] for image in order]))


def test_equal_counts_stored_with_offsets_are_the_same_data(tmp_path):
    features, captions = make_features(), make_captions()
    first = fingerprint(tmp_path / "once", features, captions)
    (tmp_path / "offsets").mkdir()
    np.save(tmp_path / "offsets" / "dev_offsets.npy", np.arange(IMAGES + 1) * REGIONS)
    assert fingerprint(tmp_path / "offsets", features.reshape(-1, IMG_DIM), captions) == first


def test_counts_belong_to_the_fingerprint(tmp_path):
    write_varying(tmp_path / "one", [3, 1, 2])
    write_varying(tmp_path / "two", [3, 2, 1])
    assert open_dev(tmp_path / "one").fingerprint() != open_dev(tmp_path / "two").fingerprint()


def test_a_row_that_is_no_number_is_named_by_its_place_among_all_regions(tmp_path):
    rows = write_varying(tmp_path / "varying")
    rows[7, 2] = np.nan
    np.save(tmp_path / "varying" / "dev_ims.npy", rows)
    message = refusal(open_dev(tmp_path / "varying").features.read, np.arange(5))
    assert message.startswith(f"{tmp_path / 'varying' / 'dev_ims.npy'}: row 7 holds NaN")


@pytest.mark.parametrize("counts", [COUNTS, [3, 3, 3]])
def test_the_row_of_a_packed_region_is_its_own_and_otherwise_its_images_first(tmp_path, counts):
    write_varying(tmp_path / "packed", counts)
    features = open_dev(tmp_path / "packed").features
    assert [features.row_of(region) for region in range(sum(counts))] == list(range(sum(counts)))
    write(tmp_path / "five", make_features(repeats=5))
    features = open_dev(tmp_path / "five").features
    assert [features.row_of(features.starts[image] + 2) for image in range(IMAGES)] == list(range(0, 5 * IMAGES, 5))


OFFSETS = {
    "not from zero": [1, 3, 4, 9, 11, 13],
    "not to the end": [0, 3, 4, 9, 11, 12],
    "beyond the end": [0, 3, 4, 9, 11, 14],
    "an image without regions": [0, 3, 3, 9, 11, 13],
    "falling": [0, 4, 3, 9, 11, 13],
    "one alone": [0],
    "two dimensions": [[0, 3, 4, 9, 11, 13]],
    "floats": [0.0, 3.0, 4.0, 9.0, 11.0, 13.0],
    "more than there are regions": list(range(20)),
}


@pytest.mark.parametrize("wrong", OFFSETS)
def test_offsets_that_cannot_be_are_named(tmp_path, wrong):
    write_varying(tmp_path / "varying", offsets=np.array(OFFSETS[wrong]))
    message = refusal(open_dev, tmp_path / "varying")
    assert message.startswith(f"{tmp_path / 'varying' / 'dev_offsets.npy'}: ")


def test_missing_and_damaged_offsets_are_named(tmp_path):
    write_varying(tmp_path / "varying")
    path = tmp_path / "varying" / "dev_offsets.npy"
    for content in (path.read_bytes()[:-1], b"", b"nothing"):
        write_bytes(path, content)
        assert refusal(open_dev, tmp_path / "varying").startswith(f"{path}: ")
    path.unlink()
    assert "dev_offsets.npy must stand beside it" in refusal(open_dev, tmp_path / "varying")


def write_counts(folder, text):
    write(folder, make_features(4), [f"caption {k}" for k in range(9)])
    return write_bytes(folder / "dev_caps_counts.txt", text)


@pytest.mark.parametrize("text", [b"1\n5\n2\n1\n", b"1\r\n5\r\n2\r\n1"])
def test_any_number_of_captions_belongs_to_an_image(tmp_path, text):
    write_counts(tmp_path / "own", text)
    split = open_dev(tmp_path / "own")
    assert split.image_of_caption.tolist() == [0, 1, 1, 1, 1, 1, 2, 2, 3]
    assert split.captions == [f"caption {k}" for k in range(9)]


def test_one_caption_an_image_is_not_taken_for_repeated_images(tmp_path):
    features = make_features(2).repeat(5, axis=0)
    write(tmp_path / "own", features, [f"caption {k}" for k in range(10)])
    assert len(open_dev(tmp_path / "own").features) == 2
    write_bytes(tmp_path / "own" / "dev_caps_counts.txt", b"1\n" * 10)
    assert len(open_dev(tmp_path / "own").features) == 10


def test_numbers_of_captions_belong_to_the_fingerprint(tmp_path):
    write_counts(tmp_path / "own", b"1\n5\n2\n1\n")
    before = open_dev(tmp_path / "own").fingerprint()
    write_counts(tmp_path / "own", b"5\n1\n2\n1\n")
    assert open_dev(tmp_path / "own").fingerprint() != before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"1\n5\n0\n3\n", "line 3 is not a number of captions"),
        (b"1\n5\n-2\n5\n", "line 3 is not a number of captions"),
        (b"1\n5\n\n3\n", "line 3 is not a number of captions"),
        (b"1\n5\n2.0\n3\n", "line 3 is not a number of captions"),
        (b"1\n5\n" + b"9" * 5000 + b"\n3\n", "line 3 is not a number of captions"),
        ("1\n5\n²\n3\n".encode(), "line 3 is not a number of captions"),
        (b"1\n5\n3\n", "3 lines for 4 images"),
        (b"1\n5\n1\n1\n1\n", "5 lines for 4 images"),
        (b"", "0 lines for 4 images"),
    ],
)
def test_wrong_numbers_of_captions_are_named_with_their_line(tmp_path, text, message):
    path = write_counts(tmp_path / "own", text)
    assert refusal(open_dev, tmp_path / "own").startswith(f"{path}: {message}")


def test_a_sum_that_is_not_that_of_the_captions_is_named(tmp_path):
    write_counts(tmp_path / "own", b"1\n5\n2\n2\n")
    assert "9 captions do not fit the 4 rows of dev_ims.npy; expected 10 captions" in refusal(
        open_dev, tmp_path / "own"
    )


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("final", [True, False])
def test_lines_end_at_newlines_with_or_without_a_last_one(tmp_path, end, final):
    path = write_bytes(tmp_path / "caps.txt", (end.join(["a dog", "two  cats "]) + end * final).encode())
    assert read_captions(path) == ["a dog", "two  cats "]


@pytest.mark.parametrize("separator", ["\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\u2029", "\r"])
def test_other_separators_stay_inside_a_caption(tmp_path, separator):
    caption = f"a dog{separator}runs"
    path = write_bytes(tmp_path / "caps.txt", f"{caption}\n{caption}\r\n".encode())
    assert read_captions(path) == [caption, caption]


def test_a_line_end_cut_in_the_middle_still_ends_the_line(tmp_path):
    assert read_captions(write_bytes(tmp_path / "caps.txt", b"a dog\r\na cat\r")) == ["a dog", "a cat"]


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b""])
def test_a_byte_order_mark_is_no_part_of_the_first_caption(tmp_path, end):
    path = write_bytes(tmp_path / "caps.txt", BOM_UTF8 + b"a dog" + end)
    assert read_captions(path) == ["a dog"]


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b""])
@pytest.mark.parametrize("start", [b"", BOM_UTF8])
def test_a_caption_of_the_greatest_length_is_read_whole(tmp_path, start, end):
    path = write_bytes(tmp_path / "caps.txt", b"a dog\n" + b"x" * (LINE_BYTES - 2) + end)
    assert read_captions(path) == ["a dog", "x" * (LINE_BYTES - 2)]


@pytest.mark.parametrize("most", [1, 2, 3])
def test_no_more_captions_are_kept_than_asked_for(tmp_path, most):
    path = write_bytes(tmp_path / "caps.txt", b"a\nb\nc\n\n")
    assert read_captions(path, most) == ["a", "b", "c"][:most]


def test_files_may_be_links(folder):
    for name in ("dev_ims.npy", "dev_caps.txt"):
        (folder / name).rename(folder / f"elsewhere_{name}")
        (folder / name).symlink_to(folder / f"elsewhere_{name}")
    split = open_dev(folder)
    assert np.array_equal(split.features.read(np.arange(IMAGES)), make_features().reshape(-1, IMG_DIM))
    assert split.captions == make_captions()


@pytest.mark.parametrize("name", ["coco/precomp", "coco/precomp/", "./coco/precomp", "größe", "a..b", "with space"])
def test_names_below_the_folder_are_found(tmp_path, name):
    write(tmp_path / name, make_features(), split="mini..1K")
    assert find_folder(str(tmp_path), name) == tmp_path / name
    assert open_split(str(tmp_path), name, "mini..1K", IMG_DIM).captions == make_captions()


# The fingerprint


def fingerprint(folder, *args, **kwargs):
    write(folder, *args, **kwargs)
    return open_dev(folder).fingerprint()


@pytest.mark.parametrize("images", [1, IMAGES, 64, 65, 200])
def test_the_same_data_has_the_same_fingerprint_wherever_and_however_it_is_stored(tmp_path, images):
    features, captions = make_features(images), make_captions(images)
    first = fingerprint(tmp_path / "once", features, captions)
    assert re.fullmatch("[0-9a-f]{16}", first)
    assert fingerprint(tmp_path / "five_times", features.repeat(5, axis=0), captions) == first
    assert fingerprint(tmp_path / "windows", features, [f"{caption}\r" for caption in captions]) == first


def halve(features, captions):
    return features[: IMAGES // 2], captions[: 5 * (IMAGES // 2)]


def change_row(features, captions, row):
    features[row, 1, 2] += 1
    return features, captions


CHANGED = {
    "a caption": lambda features, captions: (features, [*captions[:-1], captions[-1] + " "]),
    "the order of captions": lambda features, captions: (features, captions[::-1]),
    "the first row": lambda features, captions: change_row(features, captions, 0),
    "the last row": lambda features, captions: change_row(features, captions, -1),
    "the order of rows": lambda features, captions: (features[::-1], captions),
    "the type": lambda features, captions: (features.astype(np.float16), captions),
    "the number of images": halve,
    "the number of regions": lambda features, captions: (features[:, :2], captions),
}


@pytest.mark.parametrize("change", CHANGED)
def test_other_data_has_another_fingerprint(tmp_path, change):
    features = make_features(dtype=np.float16).astype(np.float32)  # the same values in either type
    before = fingerprint(tmp_path / "before", features, make_captions())
    assert fingerprint(tmp_path / "after", *CHANGED[change](features, make_captions())) != before


def test_the_fingerprint_reads_sixty_four_rows_of_many(tmp_path):
    features, captions = make_features(130), make_captions(130)
    before = fingerprint(tmp_path / "before", features, captions)
    noticed = sum(
        fingerprint(tmp_path / "after", *change_row(features.copy(), captions, row)) != before for row in range(130)
    )
    assert noticed == 64


# What is refused


def test_a_missing_data_set_is_explained(tmp_path):
    message = refusal(open_split, str(tmp_path), "f30k_precomp", "train", IMG_DIM)
    for part in (tmp_path / "f30k_precomp", tmp_path / "precomp", "train_ims.npy", "train_caps.txt"):
        assert str(part) in message
    assert "usually obtained" in message
    assert "train_demo.sh" in message


@pytest.mark.parametrize("name", ["dev_ims.npy", "dev_caps.txt"])
@pytest.mark.parametrize("instead", ["nothing", "a folder"])
def test_a_missing_file_is_explained(folder, name, instead):
    (folder / name).unlink()
    if instead == "a folder":
        (folder / name).mkdir()
    message = refusal(open_dev, folder)
    assert message.startswith(f"{folder / name} is missing")
    for part in ("dev_ims.npy", "dev_caps.txt", "usually obtained", "train_demo.sh"):
        assert part in message


def zipped():
    file = io.BytesIO()
    np.savez(file, make_features())
    return file.getvalue()


class NotArray:
    pass


SOUND = as_npy(make_features())
NOT_FEATURES = {
    "cut in the data": SOUND[:-1],
    "cut in the header": SOUND[:40],
    "cut in the magic number": SOUND[:5],
    "empty": b"",
    "text": b"Not found\n" * 20,
    "a web page": b"<!DOCTYPE html>\n<html>\n" * 50,
    "an .npz archive": zipped(),
    "a cut .npz archive": zipped()[:200],
    "a pickled array": as_npy(np.array([{"a": 1}], dtype=object), allow_pickle=True),
    "a pickle": pickle.dumps([1, 2, 3]),
    "float64": as_npy(make_features(dtype=np.float64)),
    "integers": as_npy(make_features().astype(np.int32)),
    "other byte order": as_npy(make_features().astype(">f4")),
    "structured": as_npy(np.zeros((7, 3, 4), dtype=[("a", "f4")])),
    "one dimension less, without offsets": as_npy(make_features()[:, 0]),
    "two dimensions less": as_npy(make_features()[:, 0, 0]),
    "stored by columns": as_npy(np.asfortranarray(make_features())),
    "one dimension more": as_npy(make_features()[None]),
    "a single number": as_npy(np.float32(1)),
    "no images": as_npy(make_features()[:0]),
    "no regions": as_npy(make_features()[:, :0]),
    "unknown version": b"\x93NUMPY\x09\x00" + SOUND[8:],
    "a huge header": with_header(
        "{'descr': '<f4', 'shape': (7, 3, 4), " + " " * 20000 + "'fortran_order': False}", SOUND
    ),
    "an unclosed header": with_header("{'descr': '<f4', 'fortran_order': False, 'shape': (7, 3", SOUND),
    "a nonsense header": with_header("\n((( {[", SOUND),
    "negative size": with_header("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 3, 4)}", SOUND),
    "a size that overflows": with_header(
        f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({2**62}, 4, {2**62})}}", bytes(64)
    ),
    "fewer rows than there are": with_header(
        "{'descr': '<f4', 'fortran_order': False, 'shape': (6, 3, 4)}", SOUND[128:]
    ),
    "data after the last row": SOUND + b"\n",
    "too many regions": as_npy(np.zeros((7, MOST_REGIONS + 1, 4), np.float16)),
    "a size that is no number": with_header("{'descr': '<f4', 'fortran_order': False, 'shape': (7, 3, 'x')}", SOUND),
    "a deep header": with_header("(" * 9000, SOUND),
    "a header of code": with_header("__import__('os').abort()", SOUND),
    "another version's header": SOUND[:6] + b"\x02\x00" + SOUND[8:],
    "gigantic size": with_header("{'descr': '<f4', 'fortran_order': False, 'shape': (9" + "0" * 30 + ", 3, 4)}", SOUND),
}


@pytest.mark.parametrize("damage", NOT_FEATURES)
def test_a_file_that_does_not_hold_features_is_named(folder, damage):
    path = write_bytes(folder / "dev_ims.npy", NOT_FEATURES[damage])
    assert refusal(open_dev, folder).startswith(f"{path}: ")


class Trap:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_code_in_a_feature_file_does_not_run(folder, tmp_path):
    objects = np.array([Trap(tmp_path / "sprung")] * 12, dtype=object).reshape(1, 3, 4)
    for content in (as_npy(objects, allow_pickle=True), pickle.dumps(objects)):
        path = write_bytes(folder / "dev_ims.npy", content)
        assert refusal(open_dev, folder).startswith(f"{path}: ")
        assert not (tmp_path / "sprung").exists()
        np.load(path, allow_pickle=True)
        (tmp_path / "sprung").unlink()  # the trap itself works


def test_a_header_that_claims_gigabytes_of_itself_is_not_read(folder):
    path = write_bytes(folder / "dev_ims.npy", b"\x93NUMPY\x02\x00" + b"\xff\xff\xff\xff")
    grow(path, 5 * 2**30)
    with memory_below(2**20):
        assert refusal(open_dev, folder).startswith(f"{path}: truncated or not a .npy file")


def test_more_images_than_any_file_has_are_refused_before_they_are_counted(folder):
    images = 2 * 10**8
    path = write_bytes(
        folder / "dev_ims.npy", with_header(f"{{'descr': '<f2', 'fortran_order': False, 'shape': ({images}, 1, 1)}}")
    )
    grow(path, path.stat().st_size + 2 * images)
    with memory_below(2**20):
        assert refusal(open_dev, folder).startswith(f"{path}: expected float32 or float16")


def test_what_a_header_says_does_not_reach_the_terminal_as_it_is(folder):
    descr = [("\x1b[2J" + "x" * 3000, "<f4")]
    write_bytes(folder / "dev_ims.npy", as_npy(np.zeros((7, 3, 4), dtype=descr)))
    message = refusal(open_dev, folder)
    assert "\x1b" not in message
    assert len(message) < 1000


@pytest.mark.parametrize("change", [-1, 1, 5, -34])
def test_a_wrong_number_of_captions_is_named_with_both_counts(folder, change):
    captions = (make_captions() * 2)[: 5 * IMAGES + change]
    write(folder, make_features(), captions)
    message = refusal(open_dev, folder)
    assert message.startswith(f"{folder / 'dev_caps.txt'}: {len(captions)} captions")
    assert f"the {IMAGES} rows of dev_ims.npy" in message


def test_a_wrong_feature_size_is_named_with_the_flag(folder):
    message = refusal(open_dev, folder, 2048)
    assert message.startswith(f"{folder / 'dev_ims.npy'}: features of {IMG_DIM} numbers")
    assert "--img_dim 2048" in message


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_features_that_are_not_numbers_are_named_with_their_row(folder, dtype, value):
    rows = make_features(dtype=dtype)
    rows[4, 2, 1] = value
    write(folder, rows)
    features = open_dev(folder).features
    features.read(np.array([0, 3, 5]))
    message = refusal(features.read, np.array([6, 4, 1]))
    assert message.startswith(f"{folder / 'dev_ims.npy'}: row 4 ")


@pytest.mark.parametrize("image", [2, 6])
def test_the_row_is_that_of_the_file_where_images_are_repeated(folder, image):
    rows = make_features(repeats=5)
    rows[5 * image, 0, 0] = np.nan
    write(folder, rows)
    message = refusal(lambda: open_dev(folder).features.read(np.arange(IMAGES)))
    assert message.startswith(f"{folder / 'dev_ims.npy'}: row {5 * image} ")


@pytest.mark.parametrize("line", [1, 20, 35])
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (b"caf\xe9", "is not UTF-8"),
        (b"", "empty"),
        (b" \t", "empty"),
        (b"\r", "empty"),
        (b"a\0dog", "NUL"),
        (b"x" * (LINE_BYTES + 1), f"longer than {LINE_BYTES} bytes"),
    ],
)
def test_a_bad_caption_is_named_with_its_line(folder, line, damage, words):
    lines = [caption.encode() for caption in make_captions()]
    lines[line - 1] = damage
    path = write_bytes(folder / "dev_caps.txt", b"\n".join(lines) + b"\n")
    message = refusal(open_dev, folder)
    assert re.match(rf"{re.escape(str(path))}: line {line} .*{words}", message)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_captions_in_another_encoding_are_refused_with_what_to_do(folder, encoding):
    path = write_bytes(folder / "dev_caps.txt", "\n".join(make_captions()).encode(encoding))
    message = refusal(open_dev, folder)
    assert message.startswith(f"{path}: line 1 ")
    assert "convert the file to UTF-8" in message


def test_gigabytes_without_a_line_end_are_refused_in_little_memory(folder):
    grow(folder / "dev_caps.txt", 2**33)
    with memory_below(2**20):
        assert "line 36 is longer than" in refusal(open_dev, folder)


def test_captions_by_the_million_are_counted_and_not_kept(folder):
    surplus = 2_000_000
    write_bytes(folder / "dev_caps.txt", b"a\n" * (5 * IMAGES + surplus))
    with memory_below(3 * 2**20):
        assert f": {5 * IMAGES + surplus} captions do not fit" in refusal(open_dev, folder)


def test_captions_that_cannot_be_read_are_named(tmp_path):
    assert refusal(read_captions, tmp_path).startswith(f"{tmp_path}: cannot be read")


CLIMBING = [
    "",
    ".",
    "..",
    "../other",
    "a/../../other",
    "/etc",
    "a\0b",
    "a\nb",
    "\x1b[2J",
    "x" * 300,
    "ä" * 150,
    "\udc80",
]


@pytest.mark.parametrize("name", [*CLIMBING, None, 3])
def test_names_that_lead_out_of_the_folder_are_refused_with_their_flag(tmp_path, name):
    write(tmp_path / "data" / "precomp", make_features())
    write(tmp_path / "other", make_features())
    message = refusal(open_split, str(tmp_path / "data"), name, "dev", IMG_DIM)
    assert message.startswith("--data_name '")
    assert message.isprintable()


@pytest.mark.parametrize("split", [*CLIMBING, "a/b", "./dev", "dev/", "../precomp/dev"])
def test_splits_that_are_no_plain_name_are_refused_with_their_flag(tmp_path, split):
    write(tmp_path / "precomp", make_features())
    message = refusal(open_split, str(tmp_path), "precomp", split, IMG_DIM)
    assert message.startswith("--split '")
    assert message.isprintable()


@pytest.mark.parametrize("path", ["x" * 5000, "a\0b", ""])
def test_a_data_path_that_cannot_be_one_is_a_missing_data_set(path):
    assert refusal(open_split, path, "no_such", "dev", IMG_DIM).startswith("no data set at ")


@pytest.mark.parametrize("content", [b"", b"\n", b"\r\n", BOM_UTF8])
def test_an_empty_captions_file_is_named(folder, content):
    path = write_bytes(folder / "dev_caps.txt", content)
    assert refusal(open_dev, folder).startswith(f"{path}: ")


def test_a_file_that_vanishes_is_named_by_the_worker_that_opens_it_again(folder):
    features = pickle.loads(pickle.dumps(open_dev(folder).features))
    shutil.rmtree(folder)
    assert refusal(features.read, np.array([0])).startswith(f"{folder / 'dev_ims.npy'}: ")


# Whatever the bytes are


CAPTION = st.text(st.characters(codec="utf-8", exclude_characters="\n\0"), min_size=1).filter(
    lambda text: text.strip() and not text.endswith("\r") and not text.startswith("\ufeff")
)


@settings(deadline=None)
@given(
    captions=st.lists(CAPTION, min_size=1),
    end=st.sampled_from(["\n", "\r\n"]),
    final=st.booleans(),
    mark=st.sampled_from(["", "\ufeff"]),
)
def test_any_captions_come_back_as_they_were_written(tmp_path_factory, captions, end, final, mark):
    content = mark + end.join(captions) + end * final
    path = write_bytes(tmp_path_factory.getbasetemp() / "any_caps.txt", content.encode())
    assert read_captions(path) == captions


def captions_in(content):
    """What a caption file of short lines says, read all at once; None where it must be refused."""
    lines = content.removeprefix(BOM_UTF8).split(b"\n")
    try:
        captions = [line.removesuffix(b"\r").decode() for line in lines[: -1 if lines[-1] == b"" else None]]
    except UnicodeDecodeError:
        return None
    sound = captions and all(caption.strip() and "\0" not in caption for caption in captions)
    return captions if sound else None


WRITTEN = "Ein Hund läuft.\r\nA dog \u2028 runs.\n两只狗\n🐕\n a \n"
ENCODED = [
    *(WRITTEN.encode(encoding) for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-7")),
    "Ein Hund läuft.\r\nin Köln\n".encode("cp1252"),
]


@settings(deadline=None, max_examples=1500)
@given(
    st.one_of(
        st.binary(),
        st.text("a \r\n\u2028é\ufeff\0").map(str.encode),
        st.builds(spoil, st.sampled_from(ENCODED), cuts(140), changes(140)),
    )
)
def test_any_bytes_are_the_captions_they_say_or_refused(tmp_path_factory, content):
    path = write_bytes(tmp_path_factory.getbasetemp() / "any_bytes_caps.txt", content)
    assert unless_refused(lambda: read_captions(path), f"{path}: ") == captions_in(content)


def read_all(path):
    """All features of a file, or None where it is refused."""
    features = unless_refused(lambda: FeatureFile(path), f"{path}: ")
    rows = features and unless_refused(lambda: features.read(np.arange(len(features))), f"{path}: ")
    if rows is None:
        return None
    assert rows.shape == (len(features) * features.regions, features.img_dim)
    assert rows.dtype == features.dtype
    assert rows.dtype in (np.float16, np.float32)
    return rows


@settings(deadline=None, max_examples=1500)
@given(
    dtype=st.sampled_from(["f2", "f4", "f8", "i4", "u1", "?", "c8", "S3", ">f4"]),
    shape=st.one_of(st.lists(st.integers(0, 4), max_size=4), st.lists(st.integers(1, 4), min_size=3, max_size=3)),
    order=st.sampled_from("CF"),
    version=st.sampled_from([(1, 0), (2, 0)]),
    kept=cuts(400),
    changed=changes(140),
    surplus=st.sampled_from([b"", b"", b"\0"]),
)
def test_any_file_gives_its_features_or_is_refused(
    tmp_path_factory, dtype, shape, order, version, kept, changed, surplus
):
    """Arrays of any type and shape, cut anywhere, bytes changed and added: the array itself or InputError."""
    array = np.zeros(shape, dtype, order)
    array.flat = np.arange(array.size)
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version)
    sound = file.getvalue()
    content = spoil(sound, kept, changed, surplus)
    rows = read_all(write_bytes(tmp_path_factory.getbasetemp() / "any_ims.npy", content))
    if content == sound:
        usable = array.ndim == 3 and array.size and array.dtype in (np.float16, np.float32)
        usable = usable and array.flags.c_contiguous  # by rows, or in one dimension
        assert (rows is not None) == bool(usable)
        assert rows is None or (rows.dtype == array.dtype and np.array_equal(rows.ravel(), array.ravel()))
    if len(content) != len(sound) and content[:128] == sound[:128]:
        assert rows is None


SIZE = st.one_of(st.integers(1, 4), st.sampled_from([-1, 0, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1, 10**40]))


@settings(deadline=None, max_examples=1000)
@given(
    descr=st.sampled_from(["<f4", "<f2", "<f8", ">f4", "|O", "|V4", "<U3", "f4,f4", "nonsense", "(2,)<f4"]),
    shape=st.lists(SIZE, min_size=2, max_size=4).map(tuple),
    surplus=st.sampled_from([0, 0, -1, 1, 64]),
)
def test_any_header_is_what_the_file_holds_or_refused(tmp_path_factory, descr, shape, surplus):
    header = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}}}"
    size = math.prod(shape) * {"<f2": 2, "<f8": 8}.get(descr, 4)
    data = bytes(size + surplus if 0 < size <= 1000 else 64)
    path = write_bytes(tmp_path_factory.getbasetemp() / "any_header_ims.npy", with_header(header, data))
    true = descr in ("<f4", "<f2") and len(shape) == 3 and min(shape) > 0 and size == len(data)
    rows = read_all(path)
    assert (rows is not None) == true
    assert rows is None or (len(rows), *rows.shape[1:]) == (shape[0] * shape[1], shape[2])
