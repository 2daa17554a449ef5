"""`prepare tsv`: bottom-up attention TSV files become a store, to the bit; a damaged line is named."""

import re

import numpy as np
import pytest

from tests.prepare.samples import IMG_DIM, check_split, make_images, prepare, tsv_line, write_tsv

VARYING = (3, 10, 1, 6)


@pytest.fixture
def run(tmp_path, capsys):
    """Runs the command on some files, into data/store."""
    return lambda *files: prepare(capsys, "tsv", *files, "--data_path", tmp_path / "data", "--data_name", "store")


@pytest.mark.parametrize(("counts", "said"), [((4,), "4 regions"), (VARYING, "1 to 10 (median 3) regions")])
def test_features_and_boxes_come_back_to_the_bit(tmp_path, run, counts, said):
    images = make_images(range(100, 109), counts)
    _, out, _ = run(write_tsv(tmp_path / "a.tsv", images))
    assert "all_ims.npy: 9 images (100, 101, 102, 103, 104, ...)\n" in out
    assert f"\nfeatures: {said} of {IMG_DIM} numbers, float32 in 9 images\n" in out
    assert (tmp_path / "data" / "store" / "all_boxes.npy").exists()
    check_split(tmp_path / "data" / "store", "all", images)


def test_all_parts_are_read_and_repeated_ids_left_out_and_counted(tmp_path, run):
    images = make_images("abcdefg", VARYING)
    parts = [dict(list(images.items())[:4]), dict(list(images.items())[2:])]
    files = [write_tsv(tmp_path / f"{number}.tsv", part) for number, part in enumerate(parts)]
    assert "repeated image ids left out: 2\n" in run(*files)[1]
    check_split(tmp_path / "data" / "store", "all", images)


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\n\r\n\n"])
def test_any_line_end_will_do_and_the_last_may_be_missing(tmp_path, run, end):
    images = make_images("ab")
    lines = [tsv_line(image_id, *image, end=b"") for image_id, image in images.items()]
    (tmp_path / "a.tsv").write_bytes(end.join(lines))
    assert run(tmp_path / "a.tsv")[0] == 0
    check_split(tmp_path / "data" / "store", "all", images)


def test_a_byte_order_mark_and_pythons_printed_bytes_do_not_matter(tmp_path, run):
    images = make_images("ab")
    columns = [tsv_line(image_id, *image, end=b"").split(b"\t") for image_id, image in images.items()]
    lines = [b"\t".join([*start, b"b'%b'" % boxes, b"b'%b'" % features]) for *start, boxes, features in columns]
    (tmp_path / "a.tsv").write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines))
    run(tmp_path / "a.tsv")
    check_split(tmp_path / "data" / "store", "all", images)


def test_more_regions_than_numbers_are_asked_about(tmp_path, run):
    out = run(write_tsv(tmp_path / "a.tsv", make_images("ab", (6,))))[1]
    assert "features: 6 regions of 5 numbers, float32 in 2 images: more regions than numbers, are they stored" in out


@pytest.mark.parametrize("boxes_type", ["<f4", "<f2", "<f8"])
@pytest.mark.parametrize("stored", ["<f2", "<f4", "<f8"])
@pytest.mark.parametrize("draw", ["normal", "relu", "float16"])
def test_features_of_any_float_type_keep_their_size_and_values_and_the_type_is_printed(
    tmp_path, run, boxes_type, stored, draw
):
    rng, lines, images = np.random.default_rng(1), [], {}
    for image_id in "abc":
        features = rng.normal(size=(36, 64))
        features = np.maximum(features, 0) if draw == "relu" else features
        features = features.astype(np.float16) if draw == "float16" else features  # the rest of their bits are zeros
        boxes = rng.integers(0, 640, (36, 4)).astype(np.float32)
        lines.append(tsv_line(image_id, features, boxes, types=(boxes_type, stored)))
        images[image_id] = features.astype(stored).astype(np.float32), boxes
    (tmp_path / "a.tsv").write_bytes(b"".join(lines))
    out = run(tmp_path / "a.tsv")[1]
    assert f"features: 36 regions of 64 numbers, {np.dtype(stored).name} in 3 images\n" in out
    check_split(tmp_path / "data" / "store", "all", images)


ONES, BOXES = np.ones((2, IMG_DIM)), np.zeros((2, 4))
SOUND = tsv_line("7", ONES, BOXES)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"7 640 480\n", "not enough values"),
        (SOUND.replace(b"\t2\t", b"\t0\t"), "0 boxes"),
        (SOUND.replace(b"\t2\t", b"\t3\t"), "32 bytes of boxes, 4 floats for each of 3 expected"),
        (SOUND.replace(b"AACA", b"AA*A"), "base64"),
        (SOUND.replace(b"7", b"\xff", 1), "can't decode"),
        (tsv_line("7", ONES, BOXES, types=("<f4", "i1")), "10 bytes of features, floats for each of 2 boxes expected"),
        (tsv_line("7", ONES * np.nan, BOXES), "NaN or infinite features"),
        (tsv_line("7", ONES, BOXES + np.inf), "without NaN"),
        (tsv_line("7", np.ones((2, 3)), BOXES), "features of 3 numbers, but the images before have 5"),
        (tsv_line("\x1b[2J", ONES, BOXES), "printable"),
        (tsv_line(" ", ONES, BOXES), "without blanks around it"),
        (tsv_line(" 1x", ONES, BOXES), "without blanks around it"),
        (SOUND[:60], "the file ends in this line: copy or download it again"),
    ],
)
def test_a_damaged_line_is_named_with_its_file_and_nothing_stays(tmp_path, run, line, words):
    first = write_tsv(tmp_path / "a.tsv", make_images("ab"))
    second = tmp_path / "b.tsv"
    second.write_bytes(tsv_line("c", np.ones((3, IMG_DIM)), np.ones((3, 4))) + b"\n" + line)
    code, _, error = run(first, second)
    assert code == 2
    assert error.startswith(f"error: {second}: line 3: ")
    assert error.endswith("; --skip_damaged leaves such lines out\n")
    assert words in error
    assert "\x1b" not in error
    assert list((tmp_path / "data").iterdir()) == []


def test_damaged_lines_are_left_out_counted_and_listed_if_asked(tmp_path, run):
    images = make_images("abc", VARYING)
    first, *rest = [tsv_line(image_id, *image) for image_id, image in images.items()]
    other_size, nan = tsv_line("8", np.ones((2, 3)), BOXES), tsv_line("9", ONES * np.nan, BOXES)
    (tmp_path / "a.tsv").write_bytes(b"".join([b"image_id\timage_w\n", first, other_size, nan, *rest, SOUND[:60]]))
    code, out, _ = run(tmp_path / "a.tsv", "--skip_damaged")
    folder = tmp_path / "data" / "store"
    assert code == 0
    check_split(folder, "all", images)
    lines = (folder / "damaged.txt").read_text().splitlines()
    assert [int(re.search("line ([0-9]+)", line)[1]) for line in lines] == [1, 3, 4, 7]
    assert f"damaged lines left out: 4, all in {folder / 'damaged.txt'}; the first is {lines[0]}\n" in out


@pytest.mark.parametrize(("content", "words"), [(b"\n\r\n", "no images"), (None, "no such file")])
def test_a_file_without_images_is_refused(tmp_path, run, content, words):
    if content is not None:
        (tmp_path / "a.tsv").write_bytes(content)
    code, _, error = run(tmp_path / "a.tsv")
    assert code == 2
    assert words in error
