"""Data sets on disk: layouts, captions and their counts, the fingerprint, one clear line for whatever is wrong."""

import numpy as np
import pytest

from lib.data.dataset import open_split, read_captions, read_ids
from tests.data.samples import IMAGES, IMG_DIM, REGIONS, make_captions, make_features, open_dev, refusal, write


def captions_of(count):
    return [f"caption {k}" for k in range(count)]


@pytest.fixture
def folder(tmp_path):
    """A sound data set of the split dev."""
    return write(tmp_path / "f30k_precomp", make_features())


# Layouts


def test_the_folder_of_scan_is_found_and_where_there_is_none_that_of_gpo(tmp_path):
    data_path = tmp_path / "f30k"
    for name in ("precomp", "f30k_precomp"):  # GPO's first; SCAN's goes before it
        data_path.mkdir(exist_ok=True)
        write(data_path / name, make_features())
        split = open_split(str(data_path), "f30k_precomp", "dev", IMG_DIM)
        assert (split.folder, split.name, split.captions) == (data_path / name, "dev", make_captions())


def test_a_mistyped_name_does_not_open_the_data_set_of_another_name(tmp_path):
    data_path = tmp_path / "coco"
    data_path.mkdir()
    write(data_path / "precomp", make_features())
    message = refusal(open_split, str(data_path), "f30k_precomp", "dev", IMG_DIM)
    assert message.endswith(f"f30k_precomp; if {data_path / 'precomp'} is the one that is meant: --data_name precomp")
    assert open_split(str(data_path), "precomp", "dev", IMG_DIM).folder == data_path / "precomp"


@pytest.mark.parametrize("images", [1, IMAGES])
@pytest.mark.parametrize("repeats", [1, 5])
def test_an_image_is_one_row_however_often_the_file_holds_it(tmp_path, images, repeats):
    split = open_dev(write(tmp_path / "precomp", make_features(images, repeats=repeats), make_captions(images)))
    assert len(split.features) == images
    assert (split.features.regions, split.features.img_dim) == (REGIONS, IMG_DIM)
    assert split.image_of_caption.tolist() == [image for image in range(images) for _ in range(5)]
    assert np.array_equal(split.features.read(np.arange(images)), make_features(images).reshape(-1, IMG_DIM))


@pytest.mark.parametrize("equal", [slice(0), slice(5), slice(15, 20), slice(30, 35), slice(1, 35), np.r_[:15, 20:35]])
def test_rows_that_do_not_all_come_in_fives_are_not_taken_for_repeats(tmp_path, equal):
    features = make_features(35)
    features[equal] = 1
    assert "35 captions do not fit the 35 rows" in refusal(open_dev, write(tmp_path / "precomp", features))


def test_any_number_of_captions_belongs_to_an_image_even_where_images_are_equal(tmp_path):
    counts = [1, 2, 1, 1, 1, 1, 2, 1, 1, 1]
    captions = captions_of(sum(counts))
    split = open_dev(write(tmp_path / "own", make_features(2, repeats=5), captions, counts))
    assert len(split.features) == 10  # not taken for repeats
    assert split.image_of_caption.tolist() == [0, 1, 1, 2, 3, 4, 5, 6, 6, 7, 8, 9]


def test_ids_are_one_or_five_equal_lines_an_image(folder):
    split, path, ids = open_dev(folder), folder / "dev_ids.txt", [f"image{k}" for k in range(IMAGES)]
    assert read_ids(split) is None
    for repeats in (1, 5):
        path.write_text("".join(f"{one}\n" * repeats for one in ids))
        assert read_ids(split) == ids
    for text, words in (
        ("a\n", "1 ids do not fit 7 images"),
        ("a\n" * 34 + "b\n", "line 35 differs"),
        ("\n" * 7, "line 1 is"),
    ):
        path.write_text(text)
        assert refusal(read_ids, split).startswith(f"{path}: {words}")


# Captions


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_captions_end_at_newlines_only_with_or_without_a_last_one(tmp_path, start, end):
    captions, path = ["Ein Hund läuft.", "two  cats ", "a\x0bb\u2028c\x85d\re", "两只狗 🐕"], tmp_path / "caps.txt"
    for final in ("", end):
        path.write_bytes((start + end.join(captions) + final).encode())
        assert read_captions(path) == captions


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (b"a dog\n\n", "line 2 is an empty caption"),
        (b"a dog\na caf\xe9\n", "line 2 is not UTF-8"),
        ("a dog".encode("utf-16-le"), "line 1 holds a NUL byte"),
        (b"", "no captions in it"),
    ],
)
def test_bad_captions_are_named_with_their_line(tmp_path, damage, words):
    path = tmp_path / "caps.txt"
    path.write_bytes(damage)
    assert refusal(read_captions, path).startswith(f"{path}: {words}")


# The fingerprint


def test_fingerprints_are_those_of_older_checkpoints_however_the_data_is_stored(tmp_path):
    features, captions, offsets = make_features(200), make_captions(200), np.arange(201) * REGIONS
    for folder in (
        write(tmp_path / "once", features, captions),
        write(tmp_path / "five_times", features.repeat(5, axis=0), captions),
        write(tmp_path / "packed", features.reshape(-1, IMG_DIM), captions, offsets=offsets),
        write(tmp_path / "counted", features, captions, counts=[5] * 200),
    ):
        assert open_dev(folder).fingerprint() == "23875d09262c18bf"
    assert open_dev(write(tmp_path / "half", make_features(dtype=np.float16))).fingerprint() == "bfeea2a5cbd0a6b6"
    packed, captions, offsets = make_features(2).reshape(-1, IMG_DIM), captions_of(6), np.array([0, 1, 4, 6])
    varying = write(tmp_path / "varying", packed, captions, [1, 3, 2], offsets)
    assert open_dev(varying).fingerprint() == "3162db789d1c52c1"


def test_other_data_has_another_fingerprint(tmp_path):
    features, captions, last = make_features(), make_captions(), make_features()
    last[-1, 1, 2] += 1
    packed = features.reshape(-1, IMG_DIM)
    others = [
        (features, captions),
        (last, captions),
        (features.astype(np.float16), captions),
        (features[:, :2], captions),
        (features[:3], captions[:15]),
        (features, [*captions[:-1], captions[-1] + " "]),
        (features, captions, [4, 6, 5, 5, 5, 5, 5]),
        (packed, captions, None, np.array([0, 2, 6, 9, 12, 15, 18, 21])),
    ]
    found = {open_dev(write(tmp_path / f"{k}", *other)).fingerprint() for k, other in enumerate(others)}
    assert len(found) == len(others)


# What is refused


def test_a_missing_data_set_and_a_missing_file_are_explained(folder):
    for message in (refusal(open_split, str(folder), "f30k_precomp", "dev"), refusal(open_dev, folder.parent / "coco")):
        assert message.startswith("no data set at ")
        assert "train_ims.npy, train_caps.txt" in message
        assert "train_demo.sh" in message
    for name, there in (("dev_caps.txt", "of its splits there are dev"), ("dev_ims.npy", "usually obtained from")):
        (folder / name).unlink()
        message = refusal(open_dev, folder)
        assert message.startswith(f"{folder / name} is missing: f30k_precomp needs it for the split dev; {there}")


def test_another_name_of_a_split_is_told_which_ones_there_are(folder):
    np.save(folder / "test_ims.npy", make_features())
    message = refusal(open_split, str(folder.parent), folder.name, "val", IMG_DIM)
    assert message.endswith("needs it for the split val; of its splits there are dev, test")


def test_numbers_that_do_not_fit_are_named_with_what_is_expected(folder):
    message = refusal(open_dev, folder, 2048)
    assert message.startswith(f"{folder / 'dev_ims.npy'}: features of {IMG_DIM} numbers, but the model takes --img_dim")
    message = refusal(open_dev, write(folder, make_features(), make_captions()[1:]))
    assert message.startswith(f"{folder / 'dev_caps.txt'}: 34 captions do not fit the {IMAGES} rows")
    assert "expected 5 captions for each image" in message


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([1, 5, 0, 3], "dev_caps_counts.txt: line 3 is not a number of captions"),
        ([1, 5, 3], "dev_caps_counts.txt: 3 lines for 4 images"),
        ([1, 5, 2, 2], "dev_caps.txt: 9 captions do not fit the 4 rows of dev_ims.npy; expected 10 captions"),
    ],
)
def test_wrong_numbers_of_captions_are_named(tmp_path, counts, message):
    folder = write(tmp_path / "own", make_features(4), captions_of(9), counts)
    assert refusal(open_dev, folder).startswith(f"{folder}/{message}")
