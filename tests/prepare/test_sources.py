"""Features by image id: the same numbers from every kind of place, the first of equal ids, nothing hostile executed."""

import io
import pickle
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.prepare import sources
from lib.prepare.sources import Features
from tests.damage import changes, cuts, memory_below, refusal, spoil, unless_refused, write_bytes
from tests.prepare.samples import IMG_DIM, make_images, prepare, write_folder, write_store, write_tsv


def check(features, images, boxes=True):
    for image_id, (expected, expected_boxes) in images.items():
        regions = features.read(features.find(image_id))
        assert regions.features.dtype == expected.dtype
        assert np.array_equal(regions.features, expected)
        assert np.array_equal(regions.boxes, expected_boxes) if boxes else regions.boxes is None


# Where features can be


@pytest.mark.parametrize("counts", [(4,), (2, 7, 3)])
def test_what_tsv_wrote_is_found(tmp_path, capsys, counts):
    images = make_images("abc", counts)
    path = write_tsv(tmp_path / "a.tsv", images)
    prepare(capsys, "tsv", path, "--data_path", tmp_path, "--data_name", "store")
    for place in (tmp_path / "store", tmp_path / "store" / "all"):
        features = Features([place])
        check(features, images)
        assert features.read("b").size == (640, 480)
        assert features.find("d") is None


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_a_file_for_each_image_is_found(tmp_path, suffix, dtype):
    images = make_images(["a", "b", "17.jpg"], (2, 7, 3), dtype)
    features = Features([write_folder(tmp_path / "files", images, suffix)])
    check(features, images, boxes=suffix == ".npz")
    assert features.summarise(list(images)) == (12 * IMG_DIM * np.dtype(dtype).itemsize, dtype, suffix == ".npz")


@pytest.mark.parametrize(("name", "boxes"), [("features", "boxes"), ("x", "bbox"), ("x", "unknown")])
def test_arrays_go_by_the_names_that_tools_give_them(tmp_path, name, boxes):
    image = make_images("a")["a"]
    np.savez_compressed(tmp_path / "a.npz", **{name: image[0], boxes: image[1], "num_bbox": 4})
    check(Features([tmp_path]), {"a": image}, boxes=boxes != "unknown")


@pytest.mark.parametrize("captions", [True, False])
@pytest.mark.parametrize("ids", ["five equal ids", "one id an image"])
def test_published_files_that_hold_images_five_times_are_found(tmp_path, ids, captions):
    images = make_images("abc")
    folder = write_store(tmp_path / "f30k_precomp", images, "dev", repeats=5)
    if ids == "one id an image":
        (folder / "dev_ids.txt").write_text("a\nb\nc\n")
    if captions:
        (folder / "dev_caps.txt").write_text("a caption\n" * 15)
    features = Features([folder])
    check(features, images)
    assert sorted(features.ids) == ["a", "b", "c"]
    assert features.summarise(["a"])[0] == 4 * IMG_DIM * 4


def test_all_splits_of_a_folder_that_have_ids_are_searched(tmp_path):
    first, second = make_images("abc"), make_images("de", seed=1)
    write_store(tmp_path, first, "train")
    write_store(tmp_path, second, "dev")
    write_store(tmp_path, make_images("f"), "test")
    (tmp_path / "test_ids.txt").unlink()
    features = Features([tmp_path])
    check(features, {**first, **second})
    assert features.find("f") is None


def test_of_equal_ids_the_first_source_counts(tmp_path):
    first, second = make_images("abc"), make_images("bcd", (2,), seed=1)
    stores = write_store(tmp_path / "first", first), write_store(tmp_path / "second", second)
    check(Features(stores), {**second, **first})
    check(Features(reversed(stores)), {**first, **second})
    within = write_store(tmp_path / "within", make_images("ab"))
    (within / "all_ids.txt").write_text("a\na\n")
    check(Features([within]), {"a": make_images("ab")["a"]})


def test_several_sources_keep_to_what_all_can_give(tmp_path):
    whole = write_store(tmp_path / "whole", make_images("ab"))
    half = write_store(tmp_path / "half", make_images("cd", dtype=np.float16), boxes=False)
    features = Features([whole, half])
    assert features.summarise(["a", "b"]) == (2 * 4 * IMG_DIM * 4, np.float32, True)
    assert features.summarise(["c"]) == (4 * IMG_DIM * 2, np.float16, False)
    assert features.summarise(["a", "c"]) == (2 * 4 * IMG_DIM * 4, np.float32, False)


def test_a_number_finds_the_name_that_ends_in_it_if_only_one_does(tmp_path):
    names = ["COCO_val2014_000000391895", "COCO_val2014_000000000000", "a_7", "b_7", "8", "c_8", "9a"]
    features = Features([write_folder(tmp_path / "files", make_images(names))])
    assert features.find("391895") == "COCO_val2014_000000391895"
    assert features.find("0") == "COCO_val2014_000000000000"
    assert features.find("COCO_val2014_000000391895") == "COCO_val2014_000000391895"
    assert features.find("8") == "8"
    assert [features.find(other) for other in ("7", "9", "1895", "")] == [None] * 4


@pytest.mark.parametrize(("write", "name"), [(write_store, "all_ims.npy"), (write_folder, "a.npy")])
def test_features_that_change_have_another_identity(tmp_path, write, name):
    folder = write(tmp_path / "features", make_images("ab"))
    before = Features([folder]).identity
    assert Features([folder]).identity == before
    np.save(folder / name, np.load(folder / name) + 1)
    assert Features([folder]).identity != before


# What is refused


def test_places_without_features_are_named_with_the_flag(tmp_path):
    (tmp_path / "empty").mkdir()
    no_ids = write_store(tmp_path / "no_ids", make_images("ab"))
    (no_ids / "all_ids.txt").unlink()
    for place, words in [
        (tmp_path / "none", "no such folder"),
        (tmp_path / "empty", "neither NAME_ims.npy with NAME_ids.txt in it, nor ID.npy or ID.npz"),
        (no_ids, "needs all_ids.txt"),
        (no_ids / "all", "needs all_ids.txt"),
    ]:
        message = refusal(Features, [place])
        assert message.startswith(f"--features {place}")
        assert words in message


def test_ids_that_do_not_fit_are_named(tmp_path):
    folder = write_store(tmp_path / "store", make_images("abc"))
    (folder / "all_ids.txt").write_text("a\nb\n")
    assert refusal(Features, [folder]).startswith(f"{folder / 'all_ids.txt'}: ")


def test_files_of_another_precision_than_those_looked_at_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "SAMPLED", 1)
    folder = write_folder(tmp_path / "files", make_images("ab", dtype=np.float16))
    np.save(folder / "b.npy", np.ones((4, IMG_DIM), np.float32))
    assert refusal(Features([folder]).read, "b").startswith(
        f"{folder / 'b.npy'}: float32, other files there are float16"
    )


class Trap:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def as_npz(**members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return file.getvalue()


def as_npy(array, **options):
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_code_in_a_file_does_not_run(tmp_path, suffix):
    objects = as_npy(np.array([[Trap(tmp_path / "sprung")]], dtype=object), allow_pickle=True)
    for content in (objects, pickle.dumps(Trap(tmp_path / "sprung"))):
        (tmp_path / "files").mkdir(exist_ok=True)
        path = write_bytes(tmp_path / "files" / f"a{suffix}", as_npz(x=content) if suffix == ".npz" else content)
        assert refusal(Features, [tmp_path / "files"]).startswith(f"{path}: not an image's features")
        assert not (tmp_path / "sprung").exists()


def test_an_archive_that_unpacks_to_gigabytes_is_refused_in_little_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "IMAGE_BYTES", 2**20)
    path = write_bytes(tmp_path / "a.npz", as_npz(features=as_npy(np.zeros((2_000, 8_192), np.float32))))
    assert path.stat().st_size < 2**18
    with memory_below(2**23):
        assert "more than 1048576 bytes" in refusal(Features, [tmp_path])


def test_a_name_that_writes_to_the_terminal_is_not_taken(tmp_path):
    folder = write_folder(tmp_path / "files", make_images(["a", "\x1b[2J"]))
    assert Features([folder]).ids == ["a"]


SOUND = as_npy(np.ones((2, 3), np.float32))
ARCHIVE = as_npz(features=SOUND, boxes=SOUND)


@settings(deadline=None, max_examples=800)
@given(
    st.sampled_from([(".npy", SOUND), (".npz", ARCHIVE)]).flatmap(
        lambda kind: st.tuples(
            st.just(kind[0]), st.builds(spoil, st.just(kind[1]), cuts(len(kind[1])), changes(len(kind[1])))
        )
    )
)
def test_any_file_is_an_images_features_or_refused(tmp_path_factory, file):
    suffix, content = file
    folder = tmp_path_factory.getbasetemp() / f"any{suffix[1:]}"
    folder.mkdir(exist_ok=True)
    path = write_bytes(folder / f"a{suffix}", content)
    features = unless_refused(lambda: Features([folder]), f"{path}: ")
    if content in (SOUND, ARCHIVE):
        assert np.array_equal(features.read("a").features, np.ones((2, 3), np.float32))
    elif features is not None:
        assert features.read("a").features.ndim == 2


@pytest.mark.parametrize("command", [["tsv", "x.tsv"], ["karpathy", "x.json"], ["own", "x.csv"]])
@pytest.mark.parametrize("name", ["../other", "/etc", ""])
def test_a_name_that_leads_out_of_the_data_path_is_refused(tmp_path, capsys, command, name):
    flags = [] if command[0] == "tsv" else ["--features", tmp_path]
    code, _, error = prepare(capsys, *command, *flags, "--data_path", tmp_path / "data", "--data_name", name)
    assert code == 2
    assert error.startswith("error: --data_name '")
    assert not (tmp_path / "data").exists()
