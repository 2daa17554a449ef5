import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from lib.cli import InputError
from lib.evaluation.metrics import (
    chance_metrics,
    mean_metrics,
    retrieval_metrics,
)
from lib.evaluation.parts import folds
from lib.evaluation.ranks import rank_matrix

NAMES = ("r1", "r5", "r10", "medr", "meanr")


def five_each(images):
    return np.repeat(np.arange(images), 5)


def matrix_metrics(scores, image_of_caption):
    return retrieval_metrics(rank_matrix(scores, image_of_caption)[0])


def figures(metrics):
    return [metrics[way][name] for way in ("i2t", "t2i") for name in NAMES] + [metrics["rsum"]]


@pytest.mark.parametrize("prefix", ["", "half_"])
def test_ranks_and_metrics_equal_the_published_code(golden, prefix):
    expected = golden("retrieval_metrics")
    scores = expected[f"{prefix}similarity"]
    image_of_caption = five_each(len(scores))
    metrics = matrix_metrics(scores, image_of_caption)
    (ranks,) = rank_matrix(scores, image_of_caption)
    np.testing.assert_array_equal(ranks.i2t, expected[f"{prefix}i2t_ranks"])
    np.testing.assert_array_equal(ranks.t2i, expected[f"{prefix}t2i_ranks"])
    for way in ("i2t", "t2i"):
        assert [metrics[way][name] for name in NAMES] == pytest.approx(expected[f"{prefix}{way}"])


def test_folds_and_their_mean_equal_the_published_code(golden):
    expected = golden("retrieval_metrics")
    parts = folds(5, 50, five_each(50))
    of_folds = [retrieval_metrics(ranks) for ranks in rank_matrix(expected["similarity"], five_each(50), parts)]
    np.testing.assert_allclose([figures(fold) for fold in of_folds], expected["fold_metrics"])
    np.testing.assert_allclose(figures(mean_metrics(of_folds)), expected["fold_mean"])


def sorted_ranks(scores, image_of_caption):
    """Ranks by sorting each query's list, wrong items first among equals."""
    is_true = image_of_caption[None, :] == np.arange(len(scores))[:, None]

    def rank(query_scores, true):
        order = sorted(range(len(true)), key=lambda i: (-query_scores[i], true[i]))
        return next(place for place, i in enumerate(order) if true[i])

    i2t = [rank(scores[i], is_true[i]) for i in range(scores.shape[0])]
    t2i = [rank(scores[:, c], is_true[:, c]) for c in range(scores.shape[1])]
    return i2t, t2i


@settings(deadline=None)
@given(
    counts=st.lists(st.integers(1, 6), min_size=1, max_size=8),
    levels=st.integers(1, 8),
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from([np.float64, np.float32, np.float16]),
)
def test_ranks_equal_a_sort_with_ties_against_the_query_and_any_number_of_captions(counts, levels, seed, dtype):
    image_of_caption = np.repeat(np.arange(len(counts)), counts)
    scores = np.random.default_rng(seed).integers(levels, size=(len(counts), sum(counts))).astype(dtype)
    i2t, t2i = sorted_ranks(scores, image_of_caption)
    (ranks,) = rank_matrix(scores, image_of_caption)
    np.testing.assert_array_equal(ranks.i2t, i2t)
    np.testing.assert_array_equal(ranks.t2i, t2i)


def test_equal_scores_everywhere_give_no_recall():
    metrics = matrix_metrics(np.zeros((20, 100), np.float32), five_each(20))
    assert metrics["rsum"] == 0
    assert metrics["i2t"]["medr"] == 96
    assert metrics["t2i"]["medr"] == 20


def test_a_nan_score_is_an_error():
    scores = np.zeros((5, 25))
    scores[3, 7] = np.nan
    with pytest.raises(InputError, match="NaN"):
        rank_matrix(scores, five_each(5))


def test_folds_that_do_not_divide_are_an_error():
    with pytest.raises(InputError, match="--fold5: 12 images"):
        folds(5, 12, five_each(12))


def test_chance_level_is_the_mean_recall_of_random_scores():
    image_of_caption, rng = five_each(20), np.random.default_rng(0)
    drawn = [matrix_metrics(rng.random((20, 100)), image_of_caption) for _ in range(600)]
    chance = chance_metrics(image_of_caption)
    for way in ("i2t", "t2i"):
        for name in ("r1", "r5", "r10"):
            assert np.mean([metrics[way][name] for metrics in drawn]) == pytest.approx(chance[way][name], abs=1.5)
