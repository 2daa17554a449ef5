"""Figures of a model: what is drawn is what the model computes with."""

import numpy as np
import PIL.Image
import pytest
import torch

import eval as eval_program
import show
from lib import load
from lib.cli import InputError
from lib.config import AttentionSettings, ShowSettings, parse

pytest.importorskip("matplotlib")

from lib.data.dataset import open_split
from lib.figures import model
from tests.conftest import write_data, write_model, write_pictures

DEVICE = ["--device", "cpu"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A data set of features with boxes, and its pictures of 40 x 30 pixels."""
    folder = write_data(tmp_path_factory.mktemp("data") / "tiny_precomp", images={"test": 10})
    corners = np.random.default_rng(0).integers(0, 30, (10, 6, 2, 2))
    np.save(folder / "test_boxes.npy", np.concatenate([corners.min(2), corners.max(2) + 1], axis=2).astype(np.float32))
    write_pictures(folder / "images", [f"{number}.png" for number in range(10)])
    return folder


@pytest.fixture(scope="module")
def checkpoint(data):
    return write_model(data.parent / "model.safetensors", data, img_dim=16, seed=1)


def run(command, checkpoint, out, *flags):
    return show.main([command, "--checkpoint", str(checkpoint), "--out", str(out), *map(str, flags), *DEVICE])


def test_an_image_of_a_data_set_has_evals_score_and_its_heat_is_the_weights_on_their_boxes(data, checkpoint, tmp_path):
    sims = tmp_path / "sims.npy"
    assert (
        eval_program.main(["--checkpoint", str(checkpoint), "--save_sims", str(sims), "--workers", "0", *DEVICE]) == 0
    )
    caption = (data / "test_caps.txt").read_text().splitlines()[20]
    assert run("attention", checkpoint, tmp_path / "a.svg", "--image", "4", "--caption", caption) == 0
    matcher = load(checkpoint, device="cpu")
    image, picture, boxes, first = model.find_pair(matcher, AttentionSettings(image="4", out="a.png"))
    assert (first, picture) == (caption, PIL.Image.open(data / "images" / "4.png"))
    found = model.attention(matcher, image, caption)._replace(boxes=boxes)
    assert found.score == pytest.approx(np.load(sims)[4, 20], abs=1e-5)
    plain, *panels = model.draw_attention(found, picture, caption).axes
    assert plain.get_xlabel().endswith(f"{found.score:.2f}")
    left, top, right, bottom = np.load(data / "test_boxes.npy")[4].T[:, :, None, None]
    y, x = np.mgrid[:30, :40] + 0.5  # centres of pixels
    inside = (left < x) & (x < right) & (top < y) & (y < bottom)
    for word, score, weights, panel in zip(found.words, found.scores, found.weights, panels, strict=False):
        assert panel.get_xlabel() == f"{word}\n{score:.2f}"
        shares = inside / inside.sum(axis=(1, 2), keepdims=True)
        heat = (np.tensordot(weights, shares, 1) / np.maximum(shares.sum(axis=0), 1e-9))[..., None]
        expected = np.asarray(picture) * (0.25 + 0.75 * heat / heat.max())
        np.testing.assert_allclose(panel.images[0].get_array(), expected, atol=1)  # whole numbers


def test_what_an_attention_lacks_is_said_in_one_line(data, checkpoint, tmp_path, capsys):
    lacking = write_data(tmp_path / "plain", images={"test": 3})
    flags = ["--data_path", tmp_path, "--data_name", "plain", "--image"]
    for prepare, image, message in (
        (lambda: None, "b.jpg", "neither a file nor an image of"),
        (lambda: None, "1", "no test_boxes.npy"),
        (lambda: np.save(lacking / "test_boxes.npy", np.ones((3, 6, 4))), "1", "say where they are with --image_path"),
        (lambda: write_pictures(lacking / "images", ["1.png"]), data / "images" / "1.png", "say with --caption"),
        (
            lambda: np.save(lacking / "test_boxes.npy", np.full((3, 6, 4), 90)),
            "1",
            "they are of another size of this picture",
        ),
    ):
        prepare()
        assert run("attention", checkpoint, tmp_path / "a.png", *flags, image) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line


def test_what_cannot_be_drawn_is_one_line_and_a_picture_has_a_panel_whatever_its_shape(
    data, checkpoint, tmp_path, capsys
):
    flags = ["--data_path", data.parent, "--data_name", data.name, "--image", "1", "--caption"]
    for caption, code, message in (("\u200b", 2, "no words are in it"), ("\U0001f3c3", 0, "missing from font")):
        assert run("attention", checkpoint, tmp_path / "a.png", *flags, caption) == code
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
    halves = np.array([[0, 0, 30, 10000], [0, 10000, 30, 20000]])  # of a picture that is one pixel wide where drawn
    found = model.Attention(["dogs"], np.array([[0.25, 0.75]]), np.ones(1), 1.0, np.ones(1), halves)
    figure = model.draw_attention(found, PIL.Image.new("RGB", (30, 20000)), "dogs")
    lit = model.light(PIL.Image.new("RGB", (30, 20000), "white"), halves, found.weights, 256)[1]
    assert lit[:128].max() < lit[128:].min() == 255
    assert figure.get_size_inches().max() < 10


def test_a_word_gets_what_the_group_adds_by_the_formula_and_regions_share_it_by_attention(data, checkpoint):
    matcher, split = load(checkpoint, device="cpu"), open_split(str(data.parent), data.name, "test")
    split.captions[0] = "A man holding a red ball."  # words of one piece each
    regions = torch.from_numpy(split.features.read(np.array([0])))
    found = model.attention(matcher, regions, split.captions[0])
    (block,) = matcher.embed_images([matcher.batch([regions])])
    words, _ = matcher.embed_captions(matcher.tokenizer.tokenize(split.captions[:1]), 1)
    D = matcher.model.similarity.dependency().detach()
    _, U = model.explain_pieces(matcher, block, words)
    for dimension, added in enumerate(U[0, 1:-1].T):  # without [CLS] and [SEP]
        group = model.respond(matcher, split, dimension, pairs=1)
        assert group.partners[0] == (int(D[dimension].argmax()), pytest.approx(D[dimension].max().item()))
        heard = [group.words[word.lower()].pop(0) for word in found.words]
        np.testing.assert_allclose(heard, added, atol=1e-5)
        shares = found.weights.T @ heard
        ((value, image, region, _),) = group.regions
        assert (value, image, region) == (pytest.approx(shares.max(), abs=1e-5), 0, shares.argmax())
        left, top, right, bottom = np.load(data / "test_boxes.npy")[0][region].astype(int).tolist()
        (shown,) = model.crop(matcher, split, group.regions)
        np.testing.assert_array_equal(
            shown, np.array(PIL.Image.open(data / "images" / "0.png"))[top:bottom, left:right]
        )


def test_a_group_is_drawn_without_pictures_too_and_one_that_is_not_there_refused(data, checkpoint, tmp_path, capsys):
    plain = write_data(tmp_path / "plain", images={"test": 3})
    captions = (plain / "test_caps.txt").read_text().splitlines()
    (plain / "test_caps.txt").write_text("\n".join(["\u200b", *captions[1:]]) + "\n", encoding="utf-8")
    for folder in (data, plain):
        flags = ["--data_path", folder.parent, "--data_name", folder.name, "--pairs", "9"]
        assert run("dimension", checkpoint, tmp_path / "d.png", "3", *flags) == 0
        assert ("no pictures of regions" in capsys.readouterr().out) == (folder == plain)
    for given, number, message in (
        (checkpoint, 16, "dimension 16: the model has 16, from 0 to 15"),
        (
            write_model(tmp_path / "i.safetensors", data, img_dim=16, similarity="independent"),
            0,
            "no dependency matrix",
        ),
        (write_model(tmp_path / "g.safetensors", data, img_dim=16, similarity="gpo"), 0, "no dependency matrix"),
    ):
        assert run("dimension", given, tmp_path / "e.png", number) == 2
        assert message in capsys.readouterr().err


def test_the_matrix_that_is_drawn_is_the_models_in_the_order_given(trained_run, tmp_path, capsys):
    matcher = load(trained_run, device="cpu")
    figure = model.draw_dependencies(model.read_dependencies(matcher))
    D = matcher.model.similarity.dependency().detach().numpy()
    order, drawn = model.order_dimensions(D), figure.axes[0].images[0].get_array()
    assert sorted(order) == list(range(len(D)))
    back = np.argsort(order)
    np.testing.assert_array_equal(drawn[back][:, back], D)
    (odd := tmp_path / "$x_{$").symlink_to(trained_run)  # which is no mathematics
    for ending in ("png", "pdf", "svg"):
        out = tmp_path / f"dependencies.{ending}"
        assert show.main(["dependencies", "--checkpoint", str(odd), "--out", str(out), *DEVICE]) == 0
        assert out.stat().st_size > 10_000


def test_a_gate_without_a_mask_says_so(data):
    dense = write_model(data.parent / "dense.safetensors", data, img_dim=16, gate="dense")
    figure = model.draw_dependencies(model.read_dependencies(load(dense, device="cpu")))
    assert [text.get_text() for axes in figure.axes for text in axes.texts] == [
        "this gate has no mask:\neverything depends on everything",
        "this gate has no thresholds",
    ]


def test_dimensions_that_depend_on_each_other_stand_side_by_side():
    groups = np.random.default_rng(0).permutation(np.repeat(np.arange(4), 8))
    D = (groups[:, None] == groups) + 0.01
    ordered = groups[model.order_dimensions(D)]
    assert (np.diff(ordered) != 0).sum() == 3


def test_the_ending_of_the_file_is_refused_before_anything_is_loaded():
    with pytest.raises(InputError, match=r"--out a\.jpg: .* ends in \.png or \.pdf or \.svg"):
        parse(ShowSettings, "", ["--checkpoint", "nowhere", "--out", "a.jpg"])
