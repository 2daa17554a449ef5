"""Features by image id: the same numbers from every kind of place, the first of equal ids, faults with their file."""

import sys

import numpy as np
import pytest

from lib.prepare.assemble import Features, match
from lib.prepare.io import Image, write_split
from tests.data.samples import refusal
from tests.prepare.samples import IMG_DIM, make_images, write_image_files, write_store


def check(features, images, boxes=True):
    for image_id, (expected, expected_boxes) in images.items():
        image = features.read(image_id)
        assert image.features.dtype == expected.dtype
        assert np.array_equal(image.features, expected)
        assert np.array_equal(image.boxes, expected_boxes) if boxes else image.boxes is None


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_a_file_for_each_image_is_found(tmp_path, suffix, dtype):
    images = make_images(["a", "b", "17.jpg"], (2, 7, 3), dtype)
    features = Features([write_image_files(tmp_path / "files", images, suffix)])
    check(features, images, boxes=suffix == ".npz")
    assert features.dtype_of(list(images)) == dtype


@pytest.mark.parametrize("one_id_an_image", [True, False])
def test_published_files_that_hold_images_five_times_are_found(tmp_path, one_id_an_image):
    images = make_images("abc")
    folder = write_store(tmp_path / "f30k_precomp", images, "dev", repeats=5)
    (folder / "dev_caps.txt").write_text("a caption\n" * 15)
    if one_id_an_image:
        (folder / "dev_ids.txt").write_text("a\nb\nc\n")
    features = Features([folder])
    check(features, images)
    assert sorted(features.ids) == ["a", "b", "c"]


def test_all_splits_of_a_folder_that_have_ids_are_searched(tmp_path):
    first, second = make_images("abc"), make_images("de", seed=1)
    write_store(tmp_path, first, "train")
    write_store(tmp_path, second, "dev")
    write_store(tmp_path, make_images("f"), "test")
    (tmp_path / "test_ids.txt").unlink()
    features = Features([tmp_path])
    check(features, {**first, **second})
    assert "f" not in features.ids


def test_of_equal_ids_the_first_counts(tmp_path):
    first, second = make_images("abc"), make_images("bcd", (2,), seed=1)
    stores = write_store(tmp_path / "first", first), write_store(tmp_path / "second", second)
    check(Features(stores), {**second, **first})
    check(Features(reversed(stores)), {**first, **second})
    within = write_store(tmp_path / "within", make_images("ab"))
    (within / "all_ids.txt").write_text("a\na\n")
    check(Features([within]), {"a": make_images("ab")["a"]})


def matched(names, features):
    return match(names, features.ids, "--features", "features")


COCO = ["COCO_val2014_000000391895", "COCO_val2014_000000000000", "COCO_train2014_000000000042"]
FLICKR = ["1000268201_693b08cb0e", "1001773457_577c3a7d70", "1002674143_1b742ab4b8", "1003163366_4427320012"]


@pytest.mark.parametrize(
    ("names", "ids", "how"),
    [
        (["b", "a"], ["a", "b", "c"], "whole name"),
        (["b.jpg", "a.JPEG"], ["a", "b"], "name without ending"),
        (["b", "a"], ["a.png", "b.png"], "name without ending"),
        (["7", "42"], ["000042", "000007"], "name without ending"),
        (["train2014/a.jpg"], ["a", "b"], "name without folder and ending"),
        (["C:\\data\\a.jpg"], ["a", "b"], "name without folder and ending"),
        (["391895", "0", "42"], COCO, "number at the end"),
        ([f"{name}.jpg" for name in COCO], ["0", "42", "391895"], "number at the end"),
    ],
)
def test_names_are_matched_in_one_way_for_all_images_which_is_said(tmp_path, capsys, names, ids, how):
    features = Features([write_image_files(tmp_path / "files", make_images(ids))])
    found = matched({"image": {name: name for name in names}}, features)
    first = next(iter(found))
    said = f"matched by image, {how}: {len(names)} of {len(names)} images, {first} is {found[first]}\n"
    assert capsys.readouterr().out == said
    digits = {name: "".join(filter(str.isdigit, name.split("_")[-1])).lstrip("0") for name in [*names, *ids]}
    for name, one in found.items():
        assert name.replace("\\", "/").split("/")[-1].split(".")[0] == one.split(".")[0] or digits[name] == digits[one]


@pytest.mark.parametrize(
    ("names", "ids"),
    [
        (["0", "8", "70", "4427320012"], FLICKR),  # digits that end a hexadecimal number, and one that is all digits
        (["1", "2"], ["train_1", "dev_1", "dev_2"]),  # which of two is 1?
        (["1", "2"], ["train_1", "train_2", "mean"]),
        (["test_1", "test_2"], ["train_1", "train_2"]),
        (["test/1.jpg", "test/2.jpg"], ["train/1", "train/2"]),
        (["test/1.jpg", "dev/1.jpg"], ["1", "2"]),
        ([*map(str, range(2, 12))], [f"photo_{n}" for n in range(10, 20)]),  # 2 of 10
    ],
)
def test_names_that_only_some_images_share_or_two_do_are_refused(tmp_path, names, ids):
    features = Features([write_store(tmp_path, make_images(ids))])
    message = refusal(matched, {"image": {name: name for name in names}}, features)
    assert message.startswith(f"--features: the captions are of {len(names)} images ({names[0]}, ")
    assert message.endswith("none in common" if len(ids) < 10 else "2 in common (by image, number at the end)")


def test_few_whole_names_are_enough_and_of_several_kinds_the_one_that_finds_most_counts(tmp_path):
    features = Features([write_image_files(tmp_path / "files", make_images(["a", "b", "x"]))])
    image_ids = {str(n): str(n) for n in range(9)}
    names = {"0": "a.jpg", "1": "b.jpg", "2": "c.jpg"}
    assert matched({"image_id": image_ids, "filename": names}, features) == {"0": "a", "1": "b"}
    assert matched({"image_id": {**image_ids, "x": "x"}}, features) == {"x": "x"}


def test_sources_of_both_types_give_float32_and_boxes_are_written_where_all_have_them(tmp_path):
    images = {**make_images("ab"), **make_images("cd", dtype=np.float16, seed=1)}
    whole = write_store(tmp_path / "whole", dict(list(images.items())[:2]))
    half = write_store(tmp_path / "half", dict(list(images.items())[2:]), boxes=False)
    features = Features([whole, half])
    for ids, dtype in (("ab", np.float32), ("cd", np.float16), ("ac", np.float32)):
        assert features.dtype_of(list(ids)) == dtype
        write_split(tmp_path, ids, map(features.read, ids), dtype)
        expected = np.stack([images[one][0] for one in ids])
        assert np.array_equal(np.load(tmp_path / f"{ids}_ims.npy"), expected)
        assert (tmp_path / f"{ids}_boxes.npy").exists() == (ids == "ab")


def test_places_without_features_are_named_with_the_flag(tmp_path):
    (tmp_path / "empty").mkdir()
    no_ids = write_store(tmp_path / "no_ids", make_images("ab"))
    (no_ids / "all_ids.txt").unlink()
    for place, words in [
        (tmp_path / "none", "no such folder"),
        (no_ids / "all_ims.npy", "expected a folder, or a file .h5; make a folder of TSV files with `tsv`"),
        (tmp_path / "empty", "neither NAME_ims.npy with NAME_ids.txt in it, nor ID.npy or ID.npz"),
        (no_ids, "needs all_ids.txt"),
        (no_ids / "all", "needs all_ids.txt"),
    ]:
        message = refusal(Features, [place])
        assert message.startswith(f"--features {place}")
        assert words in message


class Trap:
    """Unpickled, it raises."""

    def __reduce__(self):
        return exec, ("raise AssertionError",)


@pytest.mark.parametrize("damage", ["cut", "empty", "no array", "pickle"])
@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_an_image_file_that_is_damaged_is_named_and_nothing_in_it_runs(tmp_path, suffix, damage):
    folder = write_image_files(tmp_path / "files", make_images("a"), suffix)
    path = folder / f"a{suffix}"
    if damage in ("cut", "empty"):
        path.write_bytes(path.read_bytes()[: 150 if damage == "cut" else 0])
    elif damage == "pickle" or suffix == ".npy":
        path.unlink()
        (np.save if suffix == ".npy" else np.savez)(path, **{"arr" if suffix == ".npy" else "x": np.array([Trap()])})
    else:
        np.savez(path, y=np.ones(3))
    assert refusal(Features([folder]).read, "a").startswith(f"{path}: not an image's features")


def test_arrays_that_are_not_known_or_are_two_are_listed(tmp_path):
    np.savez(tmp_path / "a.npz", fc7=np.ones((4, 7)), info=3)
    np.savez(tmp_path / "b.npz", x=np.ones((4, 7)), feat=np.ones((4, 7)))
    features = Features([tmp_path])
    assert "none of fc7, info is called features or feat or x" in refusal(features.read, "a")
    assert "both feat and x are in it" in refusal(features.read, "b")


def test_hdf5_without_its_package_or_ids_is_named(tmp_path, monkeypatch):
    path = tmp_path / "a.h5"
    path.write_bytes(b"")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "h5py", None)
        assert f"--features {path}: HDF5 needs h5py: pip install h5py" in refusal(Features, [path])
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "groups.h5", "w") as file:
        file["a/feat"], file["a/bbox"] = np.ones((3, 7)), np.ones((2, 4))
    assert refusal(Features([tmp_path / "groups.h5"]).read, "a").startswith(
        f"{tmp_path / 'groups.h5'}: image a: not an"
    )
    for ids, words in (([], "none of features is called ids or image_ids"), ([1, 2, 3], "3 ids, but arrays of 2 rows")):
        path = tmp_path / f"{len(ids)}.h5"
        with h5py.File(path, "w") as file:
            file.update({"features": np.ones((2, 4, 3), np.float32)} | ({"ids": ids} if ids else {}))
        message = refusal(Features, [path])
        assert message.startswith(f"--features {path}: not a file of features and ids of images")
        assert words in message


def test_a_number_of_boxes_that_fits_neither_size_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.ones((4, 7), np.float32), num_boxes=5)
    assert "5 boxes, but features of shape (4, 7)" in refusal(Features([tmp_path]).read, "a")


def test_rows_beyond_the_number_of_boxes_are_padding(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.ones((4, 7), np.float32), boxes=np.ones((4, 4)), num_boxes=3)
    image = Features([tmp_path]).read("a")
    assert (image.features.shape, image.boxes.shape) == ((3, 7), (3, 4))


@pytest.mark.parametrize("shapes", [[(9, 3), (9, 4)], [(3, 9), (9, 4)]])
def test_shapes_that_only_fit_each_other_when_turned_are_refused_with_the_reason(tmp_path, shapes):
    images = [Image(str(n), np.ones(shape, np.float32)) for n, shape in enumerate(shapes)]
    message = refusal(write_split, tmp_path, "train", images)
    assert "image '1': features of 4 numbers, but the images before have" in message
    assert "(9, 4) looks like (numbers, regions)" in message
    other = [Image(str(n), np.ones(shape, np.float32)) for n, shape in enumerate([(3, 9), (3, 7)])]
    assert "looks like" not in refusal(write_split, tmp_path, "train", other)


def test_files_of_another_type_than_those_looked_at_are_named(tmp_path):
    folder = write_image_files(tmp_path / "files", make_images("ab", dtype=np.float16))
    np.save(folder / "b.npy", np.ones((4, IMG_DIM), np.float32))
    images = map(Features([folder]).read, "ab")
    message = refusal(write_split, tmp_path, "train", images, np.float16)
    assert message == f"{folder / 'b.npy'}: float32 features, but other images have float16; make them one type"
