"""The data set that the project draws itself: its captions are true, its features see only pixels, its files repeat."""

import inspect
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, BertConfig

from lib.prepare.__main__ import main as prepare_main
from lib.prepare.scenes import captions as grammar
from lib.prepare.scenes import split_sizes, vocabulary, write_scenes, writer
from lib.prepare.scenes.drawing import draw, masks, overlaps
from lib.prepare.scenes.features import REGIONS, describe
from lib.prepare.scenes.world import PICTURE_SIZE, Scene, Thing, make_scene

IMAGES = 24  # not a whole number of batches
SPLITS = ("train", "dev", "testall", "test")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """A small data set and its vocabulary: (folder, vocab_folder)."""
    root = tmp_path_factory.mktemp("scenes")
    folder, vocab_folder = root / "data" / "scenes_precomp", root / "vocab" / "scenes"
    assert write_scenes(folder, vocab_folder, IMAGES, seed=3)
    return folder, vocab_folder


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def captions_of(folder, split):
    return (folder / f"{split}_caps.txt").read_text(encoding="utf-8").split("\n")[:-1]


# Captions: read back from their words, and held against the scene


COLOURS = ("red", "orange", "yellow", "green", "blue", "pink", "brown", "black", "white")
WORDS = {  # the reader's own dictionary: word -> (attribute, value)
    **dict.fromkeys(("small", "tiny", "little"), ("size", "small")),
    **dict.fromkeys(("large", "big"), ("size", "large")),
    **dict.fromkeys(("plain", "solid"), ("texture", "plain")),
    **dict.fromkeys(("dotted", "spotted"), ("texture", "dotted")),
    **dict.fromkeys(("checkered", "checked"), ("texture", "checkered")),
    **dict.fromkeys(("circle", "disc"), ("shape", "circle")),
    **dict.fromkeys(("ring", "hoop"), ("shape", "ring")),
    **dict.fromkeys(("cross", "plus_sign"), ("shape", "cross")),
    **dict.fromkeys(("diamond", "rhombus"), ("shape", "diamond")),
    **dict.fromkeys(("crescent", "moon"), ("shape", "crescent")),
    **dict.fromkeys(("purple", "violet"), ("colour", "purple")),
    **dict.fromkeys(("shape", "object", "thing"), ("any", "any")),
    **{word: ("shape", word) for word in ("square", "triangle", "star", "hexagon", "heart")},
    **{word: ("colour", word) for word in COLOURS},
    "medium-sized": ("size", "medium"),
    "striped": ("texture", "striped"),
}
NOUNS = [word for word, (attribute, _) in WORDS.items() if attribute in ("shape", "any")]
PLURALS = {f"{word}es" if word in ("cross", "rhombus") else f"{word}s": word for word in NOUNS}
COUNTS = {"a": None, "an": None, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6}
BACKDROPS = {
    "on a plain grey background": "plain",
    "on plain grey": "plain",
    "on a fading background": "gradient",
    "on a smooth gradient": "gradient",
    "on a noisy background": "noisy",
    "on a grainy grey background": "noisy",
    "on a brick wall": "brick",
    "against a wall of bricks": "brick",
    "on a striped background": "striped",
    "against wide stripes": "striped",
    "on a grid": "grid",
    "on squared paper": "grid",
    "in the night sky": "night",
    "against a dark night sky": "night",
}
THIRD = PICTURE_SIZE / 3
PLACES = {
    r"in the (?:top|upper) left(?: corner)?": lambda t: t.x < THIRD and t.y < THIRD,
    r"in the (?:top|upper) right(?: corner)?": lambda t: t.x > 2 * THIRD and t.y < THIRD,
    r"in the (?:bottom|lower) left(?: corner)?": lambda t: t.x < THIRD and t.y > 2 * THIRD,
    r"in the (?:bottom|lower) right(?: corner)?": lambda t: t.x > 2 * THIRD and t.y > 2 * THIRD,
    r"(?:at|near) the top": lambda t: t.y < THIRD,
    r"(?:at|near) the bottom": lambda t: t.y > 2 * THIRD,
    r"on the left(?: side)?": lambda t: t.x < THIRD,
    r"on the right(?: side)?": lambda t: t.x > 2 * THIRD,
    r"in the (?:middle|centre)": lambda t: THIRD < t.x < 2 * THIRD and THIRD < t.y < 2 * THIRD,
}
RELATIONS = {
    r"(?:to the )?left of": lambda a, b, _: a.x < b.x,
    r"(?:to the )?right of": lambda a, b, _: a.x > b.x,
    "above|over": lambda a, b, _: a.y < b.y,
    "below|under|beneath": lambda a, b, _: a.y > b.y,
    "next to|beside|close to": lambda a, b, _: 0 <= gap(a, b) <= 12,
    "in front of|partly covering": lambda a, b, hides: (a, b) in hides,
    "behind|partly hidden by": lambda a, b, hides: (b, a) in hides,
}
FILLERS = "there is|there are|a picture of|a picture with|a drawing of|we see|one of them|and|with|is|sits|,"


def gap(a, b):
    return np.hypot(a.x - b.x, a.y - b.y) - a.radius - b.radius


def phrase_pattern():
    adjectives = "|".join(word for word, (attribute, _) in WORDS.items() if attribute not in ("shape", "any"))
    nouns = "|".join([*PLURALS, *NOUNS])
    return rf"({'|'.join(COUNTS)}) ((?:(?:{adjectives}) )*(?:{nouns}))"


def read(caption):
    """Claims of a caption, in order: (kind, value); fails on any word that it cannot read."""
    text = caption.lower().rstrip(".").replace("plus sign", "plus_sign")
    kinds = [("backdrop", "|".join(BACKDROPS)), ("phrase", phrase_pattern())]
    kinds += [("place", "|".join(PLACES)), ("relation", "|".join(RELATIONS)), ("it", "it"), ("filler", FILLERS)]
    claims = []
    while text := text.lstrip():
        kind, match = next(
            ((kind, match) for kind, pattern in kinds if (match := re.match(rf"(?:{pattern})(?![\w-])|,", text))),
            ("unreadable", None),
        )
        assert match, f"cannot read {text!r} in {caption!r}"
        if kind != "filler" and match[0] != ",":
            claims.append((kind, match[0]))
        text = text[match.end() :]
    return claims


def meant(phrase, scene):
    """The things that a noun phrase fits, and the number that it claims."""
    article, *words = phrase.split()
    wanted = dict(WORDS[PLURALS.get(word, word)] for word in words)
    wanted.pop("any", None)
    return [t for t in scene.things if all(getattr(t, k) == v for k, v in wanted.items())], COUNTS[article]


def check(caption, scene, hides):
    """Assert that each claim of a caption holds in its scene."""
    claims = read(caption)
    for (kind, value), following in zip(claims, [*claims[1:], (None, None)], strict=True):
        if kind == "backdrop":
            assert BACKDROPS[value] == scene.background, caption
        if kind == "phrase":
            things, count = meant(value, scene)
            assert len(things) == count if count else things, caption
        if kind == "phrase" and following[0] == "place":
            fits = next(test for pattern, test in PLACES.items() if re.fullmatch(pattern, following[1]))
            assert any(map(fits, things)), caption
    for i, (kind, value) in enumerate(claims):
        if kind == "relation":
            names = [claims[i - 1][1], claims[i - 2 if claims[i + 1][0] == "it" else i + 1][1]]
            firsts, seconds = (meant(name, scene)[0] for name in names)
            fits = next(test for pattern, test in RELATIONS.items() if re.fullmatch(pattern, value))
            assert any(fits(a, b, hides) for a in firsts for b in seconds if a != b), caption


def test_captions_are_true_of_their_picture():
    claims = set()
    for index in range(150):
        rng = np.random.default_rng([7, index])
        scene = make_scene(rng)
        pairs = overlaps(masks(scene))
        hides = {(scene.things[i], scene.things[j]) for i, j in pairs}
        written = grammar.write_captions(scene, pairs, rng)
        assert len(set(written)) == 5
        for caption in written:
            assert 6 <= len(caption.split()) <= 20
            assert caption.isascii()
            check(caption, scene, hides)
            claims.update(kind for kind, _ in read(caption))
    assert claims == {"backdrop", "phrase", "place", "relation", "it"}


@pytest.mark.parametrize(
    "caption",
    [
        "a red circle is left of a blue star",  # it is to the right
        "two red circles and a blue star",  # there is one
        "a red circle and a green star",  # nothing is green
        "a red circle in the top left corner",  # it is on the right
        "a red circle and a blue star on a brick wall",  # the sky
        "a blue star in front of a red circle",  # they are apart
        "a large striped red circle",  # it is small
    ],
)
def test_the_reader_of_captions_notices_what_is_false(caption):
    circle = Thing("small", "striped", "red", "circle", 100, 64, 10, 0)
    star = Thing("large", "plain", "blue", "star", 30, 64, 24, 0)
    check("a small red circle is right of a blue star in the night sky.", Scene("night", (circle, star)), set())
    with pytest.raises(AssertionError):
        check(caption, Scene("night", (circle, star)), set())


def test_in_front_of_is_said_of_the_thing_that_is_drawn_later():
    back = Thing("large", "plain", "red", "square", 60, 64, 24, 0)
    front = Thing("small", "plain", "blue", "circle", 80, 64, 10, 0)
    scene = Scene("plain", (back, front))
    coverage = masks(scene)
    assert overlaps(coverage) == {(1, 0)}
    red, _, blue = draw(scene, coverage, np.random.default_rng(0))[:, 64, 76].astype(int)  # where both lie
    assert blue > red


# Pictures and features


def test_things_lie_inside_the_picture_and_stay_mostly_visible():
    for index in range(50):
        things = make_scene(np.random.default_rng([8, index])).things
        coverage = masks(Scene("plain", things))
        assert 3 <= len(things) <= 6
        assert not coverage[:, [0, -1], :].any()
        assert not coverage[:, :, [0, -1]].any()
        for i, mask in enumerate(coverage):
            visible = mask * (1 - coverage[i + 1 :]).prod(axis=0)
            assert visible.sum() > 0.6 * mask.sum()


def test_two_pictures_of_one_scene_have_different_pixels():
    scene = make_scene(np.random.default_rng(0))
    first, second = (draw(scene, masks(scene), np.random.default_rng(seed)) for seed in (1, 2))
    assert first.shape == (3, PICTURE_SIZE, PICTURE_SIZE)
    assert first.dtype == np.uint8
    assert (first != second).mean() > 0.5


def test_features_are_computed_from_pixels_only(scenes):
    folder, _ = scenes
    assert list(inspect.signature(describe).parameters) == ["pictures"]
    pictures = np.stack([np.asarray(Image.open(folder / f"images/testall_{i:05d}.png")) for i in range(3)])
    boxes, _ = describe(torch.from_numpy(pictures).permute(0, 3, 1, 2))
    assert np.array_equal(boxes.numpy(), np.load(folder / "testall_boxes.npy")[:3])


@pytest.mark.parametrize("kind", ["black", "noise"])
def test_any_picture_has_exactly_36_boxes_and_finite_features(kind):
    shape = (2, 3, PICTURE_SIZE, PICTURE_SIZE)
    noise = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    boxes, features = describe(noise if kind == "noise" else torch.zeros_like(noise))
    assert boxes.shape == (2, REGIONS, 4)
    assert features.shape[:2] == (2, REGIONS)
    assert features.isfinite().all()
    assert all(len(rows.unique(dim=0)) == REGIONS for rows in boxes)


# Files


def test_the_files_have_the_layout_of_scan(scenes):
    folder, _ = scenes
    sizes = {"train": 24, "dev": 2, "testall": 12, "test": 2}
    settings = json.loads((folder / "scenes.json").read_text())
    assert settings["splits"] == sizes == split_sizes(IMAGES)
    for split, count in sizes.items():
        features, boxes = (np.load(folder / f"{split}_{name}.npy") for name in ("ims", "boxes"))
        assert features.dtype == boxes.dtype == np.float32
        assert features.shape == (count, 36, settings["img_dim"])
        assert boxes.shape == (count, 36, 4)
        assert (boxes[..., :2] >= 0).all()
        assert (boxes[..., 2:] <= PICTURE_SIZE).all()
        assert (boxes[..., 2:] - boxes[..., :2] >= 16).all()
        assert len(captions_of(folder, split)) == 5 * count
        assert (folder / f"{split}_ids.txt").read_text().split() == [str(number) for number in range(count)]
        assert len(list((folder / "images").glob(f"{split}_[0-9]*.png"))) == count


def test_features_are_standardised(scenes):
    folder, _ = scenes
    features = np.load(folder / "train_ims.npy")
    assert abs(features.mean()) < 0.1
    assert 0.8 < features.std() < 1.2
    assert np.abs(features).max() <= 5


def test_test_is_the_beginning_of_testall(scenes):
    folder, _ = scenes
    for name in ("ims", "boxes"):
        test, testall = (np.load(folder / f"{split}_{name}.npy") for split in ("test", "testall"))
        assert np.array_equal(test, testall[: len(test)])
    assert captions_of(folder, "test") == captions_of(folder, "testall")[:10]


def test_no_two_splits_share_a_picture(scenes):
    folder, _ = scenes
    first = {split: tuple(captions_of(folder, split)[:5]) for split in ("train", "dev", "testall")}
    assert len(set(first.values())) == 3


def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_pictures(scenes, tmp_path):
    folder, vocab_folder = scenes
    write_scenes(tmp_path / "again", tmp_path / "vocab", IMAGES, seed=3)
    assert contents(tmp_path / "again") == contents(folder)
    assert contents(tmp_path / "vocab") == contents(vocab_folder)
    write_scenes(tmp_path / "other", tmp_path / "vocab", 10, seed=4)
    assert not set(captions_of(tmp_path / "other", "train")) & set(captions_of(folder, "train"))
    assert contents(tmp_path / "vocab") == contents(vocab_folder)


def test_a_larger_set_begins_with_the_smaller_one(scenes, tmp_path):
    folder, vocab_folder = scenes
    write_scenes(tmp_path / "small", vocab_folder, 11, seed=3)
    for split in SPLITS:
        small = captions_of(tmp_path / "small", split)
        assert small == captions_of(folder, split)[: len(small)]
        for name in ("ims", "boxes"):
            rows = np.load(tmp_path / "small" / f"{split}_{name}.npy")
            assert np.array_equal(rows, np.load(folder / f"{split}_{name}.npy")[: len(rows)])
    large = contents(folder / "images")
    assert all(large[name] == picture for name, picture in contents(tmp_path / "small" / "images").items())


def test_the_vocabulary_covers_every_caption_and_loads_with_transformers(scenes):
    folder, vocab_folder = scenes
    tokenizer = AutoTokenizer.from_pretrained(vocab_folder, local_files_only=True)
    config = BertConfig.from_pretrained(vocab_folder, local_files_only=True)
    assert tokenizer.convert_tokens_to_ids(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]) == [0, 1, 2, 3, 4]
    assert config.vocab_size == len(tokenizer) == len((vocab_folder / "vocab.txt").read_text().split())
    ids = tokenizer([caption for split in SPLITS for caption in captions_of(folder, split)])["input_ids"]
    assert all(tokenizer.unk_token_id not in row for row in ids)
    assert max(map(len, ids)) <= config.max_position_embeddings
    assert tokenizer.unk_token_id not in tokenizer("Xylophone quiz: 1970s jacks", add_special_tokens=False)["input_ids"]


def test_training_the_vocabulary_repeats_in_another_process(scenes):
    folder, _ = scenes
    code = """if True:
        import runpy, sys
        train = runpy.run_path(sys.argv[1])["train_vocabulary"]
        print(*train(sys.stdin.read().splitlines()), sep="\\n")"""
    command = [sys.executable, "-c", code, vocabulary.__file__]
    text = (folder / "train_caps.txt").read_text()
    result = subprocess.run(command, input=text, capture_output=True, text=True, check=True)
    assert result.stdout.split() == vocabulary.train_vocabulary(text.splitlines())


# The command


def prepare_scenes(root, *flags):
    return prepare_main(["scenes", "--data_path", str(root), "--vocab", str(root / "vocab"), "--images", "10", *flags])


def test_the_command_says_what_it_wrote_and_does_not_write_it_twice(tmp_path, capsys):
    assert prepare_scenes(tmp_path) == 0
    output, errors = capsys.readouterr()
    assert "train 10 (50 captions)" in output
    assert errors == ""
    before = (tmp_path / "scenes_precomp" / "train_ims.npy").stat().st_mtime_ns
    assert prepare_scenes(tmp_path) == 0
    assert "already there" in capsys.readouterr().out
    assert (tmp_path / "scenes_precomp" / "train_ims.npy").stat().st_mtime_ns == before


def test_a_kill_half_way_leaves_nothing_under_the_final_name(tmp_path, monkeypatch):
    leftover = tmp_path / ".scenes_precomp.partial"
    leftover.mkdir()
    (leftover / "of_an_earlier_kill").touch()

    def killed(*_):
        assert not (leftover / "of_an_earlier_kill").exists()
        assert (leftover / "train_ims.npy").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(writer, "_copy_split", killed)
    assert prepare_scenes(tmp_path) == 130
    assert sorted(path.name for path in tmp_path.iterdir()) == ["vocab"]
    monkeypatch.undo()
    assert prepare_scenes(tmp_path) == 0


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--images", "9"], "--images 9"),
        (["--seed", "-1"], "--seed -1"),
        (["--data_name", "file/below"], "file"),
        (["--data_name", "foreign"], "--data_name"),
        (["--data_name", "broken"], "--data_name"),
        (["--data_name", "older"], "images 12"),
        (["--vocab", "{root}/foreign"], "--vocab"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(tmp_path, capsys, flags, said):
    (tmp_path / "file").touch()
    for name, text in {"foreign": None, "broken": "{", "older": '{"version": 1, "images": 12, "seed": 0}'}.items():
        (tmp_path / name).mkdir()
        if text:
            (tmp_path / name / "scenes.json").write_text(text)
    assert prepare_scenes(tmp_path, *(flag.format(root=tmp_path) for flag in flags)) == 2
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.count("\n") == 1
    assert errors.startswith("error: ")
    assert said in errors
    assert not list(tmp_path.glob(".*.partial"))
