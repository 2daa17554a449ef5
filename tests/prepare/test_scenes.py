"""The data set that the project draws itself: its captions are true, its features see only pixels, its files repeat."""

import hashlib
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, BertConfig

from lib.data.dataset import read_encoder
from lib.data.images import find_pictures, load_picture
from lib.model.vision import load_recorded, load_vision
from lib.prepare import scenes
from lib.prepare.__main__ import main as prepare_main
from lib.prepare.scenes.captions import WORDS, write_captions
from lib.prepare.scenes.drawing import (
    BACKGROUNDS,
    COLOURS,
    PICTURE_SIZE,
    SHAPES,
    SIZES,
    TEXTURES,
    Scene,
    Thing,
    draw,
    make_scene,
    masks,
    overlaps,
)
from lib.prepare.scenes.features import REGIONS, describe

IMAGES = 24  # not a whole number of batches
SIZE_OF_SPLITS = {"train": 24, "dev": 2, "testall": 12, "test": 2}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A small data set and its vocabulary: (folder, vocab_folder)."""
    root = tmp_path_factory.mktemp("scenes")
    folder, vocab_folder = root / "data" / "scenes_precomp", root / "vocab" / "scenes"
    assert scenes.write_scenes(folder, vocab_folder, IMAGES, seed=3)
    return folder, vocab_folder


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def captions_of(folder, split):
    return (folder / f"{split}_caps.txt").read_text(encoding="utf-8").split("\n")[:-1]


# Captions: read back from their words, and held against the scene

ATTRIBUTES = dict.fromkeys(SIZES, "size") | dict.fromkeys(TEXTURES, "texture") | dict.fromkeys(COLOURS, "colour")
ADJECTIVES = {word: value for value in ATTRIBUTES for word in WORDS.get(value, value).split("|")}
NOUNS = {word: shape for shape in SHAPES for word in WORDS.get(shape, shape).split("|")}
NOUNS |= dict.fromkeys(("shape", "object", "thing"))
NOUNS |= {word + ("es" if word in ("cross", "rhombus") else "s"): shape for word, shape in NOUNS.items()}
COUNTS = {"a": None, "an": None, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6}
KINDS = {  # kind of a claim: how it reads
    "background": "|".join(WORDS[name] for name in BACKGROUNDS),
    "phrase": f"({'|'.join(COUNTS)}) (({'|'.join(ADJECTIVES)}) )*({'|'.join(sorted(NOUNS, reverse=True))})",
    "place": "(in|at|near|on) the (top|upper|bottom|lower|left|right|middle|centre)( left| right| side)?( corner)?",
    "relation": "(to the )?(left|right) of|above|over|below|under|beneath|next to|beside|close to|in front of|"
    "partly covering|behind|partly hidden by",
    "it": "it",
    "filler": "there is|there are|a picture of|a picture with|a drawing of|we see|one of them|and|with|is|sits|,",
}


def read(caption):
    """Claims of a caption, in order: (kind, words); fails on any word that it cannot read."""
    text, claims = caption.lower().rstrip("."), []
    while text := text.lstrip(" "):
        matches = ((kind, re.match(rf"(?:{pattern})(?![\w-])|,", text)) for kind, pattern in KINDS.items())
        kind, match = next(((kind, match) for kind, match in matches if match), ("unreadable", None))
        assert match, f"cannot read {text!r} in {caption!r}"
        if kind != "filler" and match[0] != ",":
            claims.append((kind, match[0]))
        text = text[match.end() :]
    return claims


def meant(phrase, scene):
    """The things that a noun phrase fits, and the number that it claims."""
    article, *words = phrase.replace("plus sign", "plus_sign").split()
    shape = NOUNS[words.pop().replace("_", " ")]
    wanted = {ATTRIBUTES[ADJECTIVES[word]]: ADJECTIVES[word] for word in words} | ({"shape": shape} if shape else {})
    return [t for t in scene.things if all(getattr(t, k) == v for k, v in wanted.items())], COUNTS[article]


def lies(thing, place):
    """Whether a thing lies in the third of the picture, or the ninth, that a place names."""
    row, column = (int(3 * centre / PICTURE_SIZE) for centre in (thing.y, thing.x))
    rows = {"top": 0, "upper": 0, "middle": 1, "centre": 1, "bottom": 2, "lower": 2}
    columns = {"left": 0, "middle": 1, "centre": 1, "right": 2}
    words = place.split()
    return all(rows.get(word, row) == row and columns.get(word, column) == column for word in words)


def holds(relation, a, b, scene):
    """Whether a relation is true of `a` seen from `b`."""
    near = 0 <= np.hypot(a.x - b.x, a.y - b.y) - a.radius - b.radius <= 12
    truths = {"left": a.x < b.x, "right": a.x > b.x, "next": near, "beside": near, "close": near}
    truths |= dict.fromkeys(("above", "over"), a.y < b.y) | dict.fromkeys(("below", "under", "beneath"), a.y > b.y)
    truths |= dict.fromkeys(("front", "covering"), (a, b) in overlaps(scene))
    truths |= dict.fromkeys(("behind", "hidden"), (b, a) in overlaps(scene))
    return next(truths[word] for word in relation.split() if word in truths)


def check(caption, scene):
    """Assert that each claim of a caption holds in its scene."""
    claims = [*read(caption), ("end", "")]
    for i, (kind, words) in enumerate(claims):
        if kind == "background":
            assert words in WORDS[scene.background].split("|"), caption
        if kind == "phrase":
            things, count = meant(words, scene)
            assert len(things) == count if count else things, caption
            if claims[i + 1][0] == "place":
                assert any(lies(thing, claims[i + 1][1]) for thing in things), caption
        if kind == "relation":
            names = [claims[i - 1][1], claims[i - 2 if claims[i + 1][0] == "it" else i + 1][1]]
            firsts, seconds = (meant(name, scene)[0] for name in names)
            assert any(holds(words, a, b, scene) for a in firsts for b in seconds if a != b), caption


def test_captions_are_true_of_their_picture():
    claims = set()
    for index in range(150):
        rng = np.random.default_rng([7, index])
        scene = make_scene(rng)
        captions = write_captions(scene, rng)
        assert len(set(captions)) == 5
        for caption in captions:
            assert 6 <= len(caption.split()) <= 20
            check(caption, scene)
            claims.update(kind for kind, _ in read(caption))
    assert claims == {"background", "phrase", "place", "relation", "it"}


def test_the_reader_of_captions_notices_what_is_false():
    circle = Thing("small", "striped", "red", "circle", 100, 64, 10, 0)
    scene = Scene("night", (circle, Thing("large", "plain", "blue", "star", 30, 64, 24, 0)))
    check("a small red circle is right of a blue star in the night sky.", scene)
    for caption in (
        "a red circle is left of a blue star",  # it is to the right
        "two red circles and a blue star",  # there is one
        "a red circle and a green star",  # nothing is green
        "a red circle in the top left corner",  # it is on the right
        "a red circle and a blue star on a brick wall",  # it is night
        "a blue star in front of a red circle",  # they are apart
        "a large striped red circle",  # it is small
    ):
        with pytest.raises(AssertionError):
            check(caption, scene)


# Pictures and features


def test_in_front_of_is_said_of_the_thing_that_is_drawn_later():
    back = Thing("large", "plain", "red", "square", 60, 64, 24, 0)
    front = Thing("small", "plain", "blue", "circle", 80, 64, 10, 0)
    scene = Scene("grey", (back, front))
    assert overlaps(scene) == {(front, back)}
    first, second = (draw(scene, np.random.default_rng(seed)) for seed in (1, 2))
    red, _, blue = first[:, 64, 76].astype(int)  # where both lie
    assert blue > red
    assert (first != second).mean() > 0.5  # two pictures of one scene have different pixels


def test_things_lie_inside_the_picture_and_stay_mostly_visible():
    for index in range(50):
        scene = make_scene(np.random.default_rng([8, index]))
        coverage = masks(scene)
        assert 3 <= len(scene.things) <= 6
        assert not coverage[:, [0, -1], :].any()
        assert not coverage[:, :, [0, -1]].any()
        for i, mask in enumerate(coverage):
            assert (mask * (1 - coverage[i + 1 :]).prod(axis=0)).sum() > 0.6 * mask.sum()


@pytest.mark.parametrize("brightest", [1, 256])
def test_any_picture_has_36_different_boxes_and_finite_features(brightest):
    generator = torch.Generator().manual_seed(0)
    boxes, features = describe(torch.randint(0, brightest, (2, 3, 128, 128), dtype=torch.uint8, generator=generator))
    assert features.shape == (2, REGIONS, scenes.IMG_DIM)
    assert features.isfinite().all()
    assert all(len(rows.unique(dim=0)) == REGIONS for rows in boxes)


# Files


def test_the_files_have_the_layout_of_scan_and_their_features_come_from_the_pictures(written):
    folder, _ = written
    settings = json.loads((folder / "scenes.json").read_text())
    assert settings["splits"] == SIZE_OF_SPLITS
    mean, deviation = scenes.feature_scale()
    for split, count in SIZE_OF_SPLITS.items():
        features, boxes = (np.load(folder / f"{split}_{name}.npy") for name in ("ims", "boxes"))
        assert features.shape == (count, 36, settings["img_dim"])
        assert (boxes[..., :2] >= 0).all()
        assert (boxes[..., 2:] <= PICTURE_SIZE).all()
        assert len(captions_of(folder, split)) == 5 * count
        assert (folder / f"{split}_ids.txt").read_text().split() == [f"{split}_{i:05d}.png" for i in range(count)]
        pictures = [np.asarray(Image.open(folder / f"images/{split}_{i:05d}.png")) for i in range(count)]
        found, described = describe(torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous())
        assert np.array_equal(found, boxes)
        standardised = ((described.numpy() - mean) / deviation).clip(-5, 5)
        np.testing.assert_allclose(standardised, features, rtol=1e-3, atol=1e-3)
    assert 0.8 < features.std() < 1.2


def test_a_pictures_file_has_the_features_that_the_data_set_stores(written):
    folder, _ = written
    model = load_recorded(read_encoder(folder))
    for split in ("train", "dev"):
        ids = (folder / f"{split}_ids.txt").read_text().split()
        loaded = [load_picture(path, model.preprocessing) for path in find_pictures(folder, ids)]
        regions = model.describe(*zip(*loaded, strict=True))
        for name, described in (("ims", "features"), ("boxes", "boxes")):
            stored = np.load(folder / f"{split}_{name}.npy")
            assert np.array_equal(stored, np.stack([getattr(one, described) for one in regions]))
    larger = model.describe(loaded[0][0][None], [(2 * PICTURE_SIZE, PICTURE_SIZE)])[0]
    assert np.array_equal(larger.boxes, regions[0].boxes * torch.tensor([1, 2, 1, 2]))
    with pytest.raises(ValueError, match="scenes: has no weights"):
        load_vision("scenes", weights="some.pth")


def test_the_same_seed_gives_the_same_bytes_and_a_larger_set_begins_with_the_smaller(written, tmp_path):
    folder, vocab_folder = written
    scenes.write_scenes(tmp_path / "again", tmp_path / "vocab", IMAGES, seed=3)
    assert contents(tmp_path / "again") == contents(folder)
    assert contents(tmp_path / "vocab") == contents(vocab_folder)
    scenes.write_scenes(tmp_path / "small", tmp_path / "vocab", 11, seed=3)
    for split, larger in (*((split, split) for split in SIZE_OF_SPLITS), ("test", "testall")):
        captions = captions_of(tmp_path / "small", split)
        assert captions == captions_of(folder, larger)[: len(captions)]
        for name in ("ims", "boxes"):
            rows = np.load(tmp_path / "small" / f"{split}_{name}.npy")
            assert np.array_equal(rows, np.load(folder / f"{larger}_{name}.npy")[: len(rows)])
    assert contents(tmp_path / "small" / "images").items() <= contents(folder / "images").items()
    scenes.write_scenes(tmp_path / "other", tmp_path / "vocab", 10, seed=4)
    parts = [captions_of(folder, split) for split in ("train", "dev", "testall")]
    parts.append(captions_of(tmp_path / "other", "train"))
    assert len({caption for part in parts for caption in part[:5]}) == 20  # no split or seed shares a picture


def test_captions_and_vocabulary_stay_what_they_were():
    captions = [caption for index in range(20) for caption in scenes.make_picture(0, "train", index)[1]]
    digests = [hashlib.sha256("\n".join(lines).encode()).hexdigest() for lines in (captions, scenes.make_vocabulary())]
    assert [digest[:16] for digest in digests] == ["716c13e12f8deed9", "4e67b6993a88b560"]


def test_the_vocabulary_covers_every_caption_and_loads_with_transformers(written):
    folder, vocab_folder = written
    tokenizer = AutoTokenizer.from_pretrained(vocab_folder, local_files_only=True)
    config = BertConfig.from_pretrained(vocab_folder, local_files_only=True)
    assert tokenizer.convert_tokens_to_ids(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]) == [0, 1, 2, 3, 4]
    assert config.vocab_size == len(tokenizer) == len((vocab_folder / "vocab.txt").read_text().split())
    captions = [caption for split in SIZE_OF_SPLITS for caption in captions_of(folder, split)]
    ids = tokenizer([*captions, "Xylophone quiz: 1970s jacks"])["input_ids"]
    assert all(tokenizer.unk_token_id not in row for row in ids)
    assert max(map(len, ids)) <= config.max_position_embeddings


def prepare(root, *flags):
    return prepare_main(["scenes", "--data_path", str(root), "--vocab", str(root / "vocab"), "--images", "10", *flags])


def test_the_command_says_what_it_wrote_and_does_not_write_it_twice(tmp_path, capsys):
    assert prepare(tmp_path) == 0
    assert "train 10 (50 captions)" in capsys.readouterr().out
    before = (tmp_path / "scenes_precomp" / "train_ims.npy").stat().st_mtime_ns
    assert prepare(tmp_path) == 0
    assert "already there" in capsys.readouterr().out
    assert (tmp_path / "scenes_precomp" / "train_ims.npy").stat().st_mtime_ns == before


def test_an_interrupted_command_leaves_nothing_under_the_final_name(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(scenes, "write_split", interrupted)
    assert prepare(tmp_path) == 130
    assert [path.name for path in tmp_path.iterdir()] == ["vocab"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--images", "9"], "--images 9"),
        (["--seed", "-1"], "--seed -1"),
        (["--data_name", "file/below"], "file"),
        (["--data_name", "other"], "--data_name"),
        (["--vocab", "{root}/other"], "--vocab"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(tmp_path, capsys, flags, said):
    (tmp_path / "file").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "scenes.json").write_text('{"version": 1, "images": 12, "seed": 0}')
    assert prepare(tmp_path, *(flag.format(root=tmp_path) for flag in flags)) == 2
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert said in errors
    assert not list(tmp_path.glob(".*.tmp"))
