"""`prepare tsv`: bottom-up attention TSV files become a store, to the bit; damaged lines are named; it goes on."""

import base64
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.data.features import FeatureFile
from lib.prepare import tsv, writer
from lib.prepare.tsv import COLUMNS, LINE_BYTES, read_row
from tests.damage import changes, cuts, grow, memory_below, refusal, spoil, unless_refused
from tests.prepare.interruptions import check_final, contents, files_at_most, record_every, restore, states
from tests.prepare.samples import IMG_DIM, encode, make_images, prepare, refused, tsv_line, write_tsv

VARYING = (3, 10, 1, 6)


@pytest.fixture
def run(tmp_path, capsys):
    """Runs the command on some files, into data/store."""
    return lambda *files, call=prepare: call(
        *(capsys, "tsv", *files, "--data_path", tmp_path / "data", "--data_name", "store")
    )


def check_store(folder, images):
    features = FeatureFile(folder / "all_ims.npy")
    assert (folder / "all_ids.txt").read_text().split() == list(images)
    assert features.dtype == np.float32
    assert features.counts.tolist() == [len(features) for features, _ in images.values()]
    assert np.array_equal(features.read(np.arange(len(images))), np.concatenate([f for f, _ in images.values()]))
    boxes = np.load(folder / "all_boxes.npy").reshape(-1, 4)
    assert np.array_equal(boxes, np.concatenate([boxes for _, boxes in images.values()]))


# What is read


@pytest.mark.parametrize(("counts", "said"), [((36,), "36 regions"), (VARYING, "1 to 10, mean 4.8 regions")])
def test_features_and_boxes_come_back_to_the_bit(tmp_path, run, counts, said):
    images = make_images(range(100, 109), counts)
    code, out, _ = run(write_tsv(tmp_path / "a.tsv", images))
    assert code == 0
    assert f"9 images, {said}, img_dim {IMG_DIM}" in out
    check_store(tmp_path / "data" / "store", images)
    assert set((tmp_path / "data" / "store" / "all_sizes.txt").read_text().splitlines()) == {"640 480"}


def test_all_parts_are_read_and_repeated_ids_left_out_and_counted(tmp_path, run):
    images = make_images("abcdefg", VARYING)
    parts = [dict(list(images.items())[:4]), dict(list(images.items())[2:])]
    files = [write_tsv(tmp_path / f"{number}.tsv", part) for number, part in enumerate(parts)]
    _, out, _ = run(*files)
    assert "repeated image ids left out: 2\n" in out
    check_store(tmp_path / "data" / "store", images)


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("last", [True, False])
def test_any_line_end_will_do(tmp_path, run, end, last):
    images = make_images("ab")
    content = end.join(tsv_line(image_id, *image, end=b"") for image_id, image in images.items()) + end * last
    (tmp_path / "a.tsv").write_bytes(content)
    assert run(tmp_path / "a.tsv")[0] == 0
    check_store(tmp_path / "data" / "store", images)


def test_run_again_it_says_that_it_is_there(tmp_path, run):
    path = write_tsv(tmp_path / "a.tsv", make_images("ab"))
    run(path)
    before = contents(tmp_path / "data" / "store")
    code, out, _ = run(path)
    assert code == 0
    assert out == f"{tmp_path / 'data' / 'store' / 'all_ims.npy'} is already there\n"
    assert contents(tmp_path / "data" / "store") == before


def test_other_files_do_not_replace_a_store(tmp_path, run):
    run(write_tsv(tmp_path / "a.tsv", make_images("ab")))
    assert "made from something else" in run(write_tsv(tmp_path / "b.tsv", make_images("cd")), call=refused)


# What is refused

SOUND = tsv_line("7", np.ones((2, IMG_DIM)), np.zeros((2, 4)))


def sound_with(column, content):
    fields = SOUND.rstrip(b"\r\n").split(b"\t")
    fields[COLUMNS.index(column)] = content
    return b"\t".join(fields) + b"\n"


DAMAGES = {
    "no tabs": (b"7 640 480\n", "1 columns instead of 6 (image_id, image_w"),
    "a column more": (SOUND.replace(b"\r", b"\t\r"), "7 columns instead of 6"),
    "a header": (b"\t".join(name.encode() for name in COLUMNS) + b"\n", "image_w is b'image_w'"),
    "no boxes": (sound_with("num_boxes", b"0"), "num_boxes is b'0', expected a number from 1"),
    "too many boxes": (sound_with("num_boxes", b"5000"), "num_boxes is b'5000', expected a number from 1 to 4096"),
    "a number without end": (sound_with("num_boxes", b"9" * 10_000), "num_boxes is b'999"),
    "a negative width": (sound_with("image_w", b"-3"), "image_w is b'-3'"),
    "another number of boxes": (sound_with("num_boxes", b"3"), "boxes has 32 bytes, which is not the same number"),
    "half the boxes": (sound_with("boxes", encode(np.zeros((2, 2)))), "4 numbers in the 2 boxes, expected 4 for each"),
    "features cut": (sound_with("features", encode(np.ones(2 * IMG_DIM - 1))), "features has 36 bytes"),
    "no features": (sound_with("features", b""), "features has 0 bytes"),
    "bad base64": (sound_with("features", b"AAAA*AAA"), "features is not base64"),
    "cut base64": (sound_with("boxes", b"AAAAA"), "boxes is not base64"),
    "features that are no numbers": (sound_with("features", encode([[np.nan] * IMG_DIM] * 2)), "NaN or infinite"),
    "boxes that are no numbers": (sound_with("boxes", encode([[np.inf] * 4] * 2)), "of finite numbers"),
    "another size": (sound_with("features", encode(np.ones((2, 3)))), "features of 3 numbers, those before have 5"),
    "an id that is not UTF-8": (sound_with("image_id", b"\xff"), "can't decode"),
    "an id that writes to the terminal": (sound_with("image_id", b"\x1b[2J"), "printable"),
    "no id": (sound_with("image_id", b""), "printable"),
    "a terminal code": (sound_with("image_h", b"\x1b[2J"), "image_h is b'\\x1b[2J'"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_line_is_named_with_its_file(tmp_path, run, damage):
    line, words = DAMAGES[damage]
    first = write_tsv(tmp_path / "a.tsv", make_images("ab"))
    second = tmp_path / "b.tsv"
    second.write_bytes(tsv_line("c", np.ones((3, IMG_DIM)), np.ones((3, 4))) + b"\n" + line)
    message = run(first, second, call=refused)
    assert message.startswith(f"error: {second}: line 3: ")
    assert words in message
    assert "ends in this line" not in message
    assert not (tmp_path / "data" / "store" / "all_ims.npy").exists()


@pytest.mark.parametrize("cut", [3, 7, 20, 60, len(SOUND) - 3])
def test_a_file_that_ends_in_the_middle_of_a_line_says_so(tmp_path, run, cut):
    path = tmp_path / "a.tsv"
    path.write_bytes(SOUND + SOUND.replace(b"7", b"8", 1)[:cut])
    message = run(path, call=refused)
    assert message.startswith(f"error: {path}: line 2: ")
    assert "the file ends in this line: copy or download it again" in message


def test_gigabytes_without_a_line_end_are_refused_in_little_memory(tmp_path, run, monkeypatch):
    monkeypatch.setattr(tsv, "LINE_BYTES", 2**20)
    path = write_tsv(tmp_path / "a.tsv", make_images("ab"))
    grow(path, 2**33)
    monkeypatch.setattr(tsv, "check_space", lambda *_: None)
    with memory_below(2**23):
        assert f"{path}: line 3 is longer than 1048576 bytes" in run(path, call=refused)
    assert LINE_BYTES >= 100 * 2048 * 4 * 4 / 3


@pytest.mark.parametrize("content", [b"", b"\n\r\n"])
def test_a_file_without_images_is_refused(tmp_path, run, content):
    (tmp_path / "a.tsv").write_bytes(content)
    assert "no images" in run(tmp_path / "a.tsv", call=refused)


@pytest.mark.parametrize("split", ["", "a/b", "..", "\x1b[2J", "x" * 101])
def test_a_name_of_the_split_that_is_no_plain_name_is_refused(tmp_path, run, split):
    path = write_tsv(tmp_path / "a.tsv", make_images("ab"))
    assert "--split '" in run(path, "--split", split, call=refused)
    assert not (tmp_path / "data").exists()


def test_a_file_that_is_not_there_is_named(tmp_path, run):
    assert f"{tmp_path / 'none.tsv'}: cannot be read" in run(tmp_path / "none.tsv", call=refused)
    assert not (tmp_path / "data").exists()


# Whatever the bytes are


@settings(deadline=None)
@given(
    image_id=st.text(st.characters(codec="utf-8", exclude_characters="\t\r\n"), min_size=1),
    size=st.tuples(st.integers(1, 10**6), st.integers(1, 10**6)),
    regions=st.integers(1, 5),
    img_dim=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_any_line_comes_back_as_it_was_written(image_id, size, regions, img_dim, seed):
    rng = np.random.default_rng(seed)
    boxes, features = rng.random((regions, 4), np.float32), rng.random((regions, img_dim), np.float32)
    row = read_row(tsv_line(image_id, features, boxes, size), "x")
    assert (row.image_id, row.size) == (image_id, size)
    assert np.array_equal(row.boxes, boxes)
    assert np.array_equal(row.features, features)


@settings(deadline=None, max_examples=500)
@given(
    st.one_of(
        st.binary(),
        st.builds(spoil, st.just(SOUND), cuts(len(SOUND)), changes(len(SOUND)), st.sampled_from([b"", b"="])),
    )
)
def test_any_bytes_are_a_sound_row_or_refused(line):
    row = unless_refused(lambda: read_row(line, "x: line 1"), "x: line 1: ")
    if row is not None:
        assert len(row.features) == len(row.boxes)
        assert row.boxes.shape[1] == 4
        fields = line.rstrip(b"\r\n").split(b"\t")
        assert [row.boxes.tobytes(), row.features.tobytes()] == list(map(base64.b64decode, fields[4:]))
    assert row is not None or line != SOUND


# Interruptions


@pytest.fixture
def often(monkeypatch):
    """How far the work has come is recorded at every third image or so; nothing waits for the disk."""
    record_every(250, monkeypatch)


@pytest.fixture
def files(tmp_path):
    """Two files with repeated ids: within the second, and across both."""
    images = list(make_images(range(9), VARYING).items())
    lines = [tsv_line(image_id, *image) for image_id, image in images]
    (tmp_path / "a.tsv").write_bytes(b"".join(lines[:4]))
    (tmp_path / "b.tsv").write_bytes(b"".join([*lines[2:7], *lines[5:]]))
    return tmp_path / "a.tsv", tmp_path / "b.tsv"


def test_a_kill_at_any_point_leaves_no_half_file_and_the_rerun_ends_right(tmp_path, run, often, files):
    folder = tmp_path / "data" / "store"
    left = states(lambda: run(*files), folder)
    _, said, _ = run(*files)
    expected = contents(folder)
    assert len(left) > 30
    for state in left:
        shutil.rmtree(folder)
        restore(folder, state)
        check_final(folder, expected)
        code, out, _ = run(*files)
        assert code == 0
        assert "repeated image ids left out: 4\n" in out or out == said
        assert contents(folder) == expected


def test_a_rerun_reads_only_what_is_left(tmp_path, run, often, files, monkeypatch):
    folder, read = tmp_path / "data" / "store", []
    left = states(lambda: run(*files), folder)
    monkeypatch.setattr(tsv, "read_row", lambda line, origin: (read.append(origin), read_row(line, origin))[1])
    origins = [*(f"{files[0]}: line {n}" for n in range(1, 5)), *(f"{files[1]}: line {n}" for n in range(1, 10))]
    counts = set()
    for state in left:
        shutil.rmtree(folder, ignore_errors=True)
        restore(folder, state)
        read.clear()
        run(*files)
        assert read == origins[len(origins) - len(read) :]
        counts.add(len(read))
    assert len(counts) >= 4
    assert {0, len(origins)} <= counts


def test_a_disk_without_room_is_refused_before_anything_is_written(tmp_path, run, files, monkeypatch):
    needed = sum(path.stat().st_size for path in files) * 3 // 4
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 0, needed - 1))
    assert "are free on that disk" in run(*files, call=refused)
    assert not (tmp_path / "data").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 0, needed))
    assert run(*files)[0] == 0


def test_what_is_written_already_is_not_asked_for_again(tmp_path, run, often, files, monkeypatch):
    state = states(lambda: run(*files), tmp_path / "data" / "store")[-8]
    shutil.rmtree(tmp_path / "data")
    restore(tmp_path / "data" / "store", state)
    there = sum(len(state[f"all_{name}.npy.part"]) for name in ("ims", "boxes"))
    assert there > 500
    needed = sum(path.stat().st_size for path in files) * 3 // 4
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 0, needed - there))
    assert run(*files)[0] == 0


def test_a_disk_that_fills_half_way_gives_one_line_and_the_rerun_ends_right(tmp_path, run, often, files):
    with files_at_most(600):
        assert "could not be written: File too large" in run(*files, call=refused)
    assert (tmp_path / "data" / "store" / "all_progress.json").exists()
    assert run(*files)[0] == 0
    check_store(tmp_path / "data" / "store", make_images(range(9), VARYING))


def test_a_second_process_is_refused(tmp_path, run, files):
    store = writer.SplitWriter(tmp_path / "data" / "store", "all", {})
    with store:
        assert "another process is writing it" in run(*files, call=refused)
    assert refusal(lambda: store.finish()).endswith("no images for the split all")
    assert run(*files)[0] == 0
