"""Figures of a model: what is drawn is what the model computes with."""

import numpy as np
import pytest

import show
from lib import load
from lib.cli import InputError
from lib.config import DependenciesSettings, parse

pytest.importorskip("matplotlib")

from lib.figures import model

DEVICE = ["--device", "cpu"]


def test_the_matrix_that_is_drawn_is_the_models_in_the_order_given(trained_run, tmp_path, capsys):
    matcher = load(trained_run, device="cpu")
    figure = model.draw_dependencies(model.read_dependencies(matcher))
    D = matcher.model.similarity.dependency().detach().numpy()
    order, drawn = model.order_dimensions(D), figure.axes[0].images[0].get_array()
    assert sorted(order) == list(range(len(D)))
    back = np.argsort(order)
    np.testing.assert_array_equal(drawn[back][:, back], D)
    for ending in ("png", "pdf", "svg"):
        out = tmp_path / f"dependencies.{ending}"
        assert show.main(["dependencies", "--checkpoint", str(trained_run), "--out", str(out), *DEVICE]) == 0
        assert out.stat().st_size > 10_000


def test_dimensions_that_depend_on_each_other_stand_side_by_side():
    groups = np.random.default_rng(0).permutation(np.repeat(np.arange(4), 8))
    D = (groups[:, None] == groups) + 0.01
    ordered = groups[model.order_dimensions(D)]
    assert (np.diff(ordered) != 0).sum() == 3


def test_the_ending_of_the_file_is_refused_before_anything_is_loaded():
    with pytest.raises(InputError, match=r"--out a\.jpg: .* ends in \.png or \.pdf or \.svg"):
        parse(DependenciesSettings, "", ["--checkpoint", "nowhere", "--out", "a.jpg"])
