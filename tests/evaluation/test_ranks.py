"""Ranks counted strip by strip, of whole splits and of folds, against sorting each query's list."""

from itertools import pairwise

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from lib.cli import InputError
from lib.evaluation.parts import folds, unshared, whole
from lib.evaluation.ranks import count_ranks, rank_matrix
from tests.evaluation.test_metrics import sorted_ranks


def strips_of(scores, edges):
    """The matrix cut at some columns, the strips out of order."""
    cuts = [0, *sorted(edges), scores.shape[1]]
    return reversed([(first, [scores[:, first:end]]) for first, end in pairwise(cuts)])


@settings(deadline=None)
@given(
    images_of_fold=st.integers(1, 4),
    captions_of_image=st.integers(1, 4),
    levels=st.integers(1, 8),
    seed=st.integers(0, 2**32 - 1),
    data=st.data(),
)
def test_ranks_of_folds_and_whole_do_not_depend_on_the_strips(images_of_fold, captions_of_image, levels, seed, data):
    images = 5 * images_of_fold
    image_of_caption = np.repeat(np.arange(images), captions_of_image)
    scores = np.random.default_rng(seed).integers(levels, size=(images, len(image_of_caption))).astype(np.float32)
    edges = data.draw(st.sets(st.integers(1, len(image_of_caption) - 1)))
    parts = [whole(*scores.shape), *folds(5, images, image_of_caption)]
    true_scores = torch.from_numpy(scores[image_of_caption, np.arange(len(image_of_caption))])
    strips = strips_of(torch.from_numpy(scores), edges)
    given = [true_scores], torch.from_numpy(image_of_caption), parts, unshared(*scores.shape)
    (ranks,) = count_ranks(strips, *given)
    for part, (i2t, t2i) in zip(parts, ranks, strict=True):
        own = image_of_caption[part.captions] - part.images.start
        expected = sorted_ranks(scores[part.images, part.captions], own)
        np.testing.assert_array_equal(i2t, expected[0])
        np.testing.assert_array_equal(t2i, expected[1])


def test_folds_take_the_captions_of_their_images_where_images_have_any_number():
    image_of_caption = np.array([0, 1, 1, 1, 2, 3, 3, 4])
    assert [(p.images.start, p.captions.start, p.captions.stop) for p in folds(5, 5, image_of_caption)] == [
        (0, 0, 1),
        (1, 1, 4),
        (2, 4, 5),
        (3, 5, 7),
        (4, 7, 8),
    ]


@pytest.mark.parametrize("value", [float("nan")])
def test_a_nan_in_any_strip_is_an_error(value):
    scores = np.zeros((200, 3000), np.float32)
    scores[199, 2999] = value
    with pytest.raises(InputError, match="NaN"):
        rank_matrix(scores, np.arange(3000) // 15)
