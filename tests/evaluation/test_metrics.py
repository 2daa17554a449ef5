"""Ranks and metrics against the published code and against sorting each list; intervals against a known truth."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import example, given, settings

from lib.evaluation.metrics import (
    DRAWS,
    DRAWS_AT_ONCE,
    RECALL_AT,
    Ranks,
    bootstrap,
    bootstrap_means,
    bootstrap_parts,
    chance_metrics,
    interval,
    metrics_of_parts,
    p_value,
    parts_of_split,
    rank_matrix,
    rank_parts,
    retrieval_metrics,
    t_test,
)

WAYS = ("i2t", "t2i")
PUBLISHED = ("r1", "r5", "r10", "medr", "meanr")
NAMES = ("r1", "r5", "r10", "avg", "medr", "meanr")
SOME_DRAWS = (0, 1, DRAWS_AT_ONCE - 1, DRAWS_AT_ONCE, DRAWS - 1)
SEEDS = st.integers(0, 2**32 - 1)


def five_each(images):
    return np.repeat(np.arange(images), 5)


def sorted_ranks(scores, image_of_caption):
    """Ranks by sorting each query's list, wrong items first among equals."""
    is_right = image_of_caption[None, :] == np.arange(len(scores))[:, None]

    def rank(row, right):
        order = sorted(range(len(right)), key=lambda item: (-row[item], right[item]))
        return next(place for place, item in enumerate(order) if right[item])

    return [list(map(rank, *lists)) for lists in ((scores, is_right), (scores.T, is_right.T))]


def plain_metrics(i2t, t2i):
    """The metrics of two lists of ranks."""
    recalls = [[100 * np.mean(np.array(ranks) < k) for k in (1, 5, 10)] for ranks in (i2t, t2i)]
    ways = {
        way: dict(zip(NAMES, [*some, np.mean(some), np.floor(np.median(ranks)) + 1, np.mean(ranks) + 1], strict=True))
        for way, ranks, some in zip(WAYS, (i2t, t2i), recalls, strict=True)
    }
    return {**ways, "rsum": np.sum(recalls)}


def flat(metrics):
    """All 13 values in one order."""
    assert [sorted(metrics[way]) for way in WAYS] == [sorted(NAMES)] * 2
    return [*(metrics[way][name] for way in WAYS for name in NAMES), metrics["rsum"]]


def random_ranks(counts, levels, seed):
    """Ranks below `levels` of images with these numbers of captions, and the images of the captions."""
    rng = np.random.default_rng(seed)
    ranks = Ranks(rng.integers(levels, size=len(counts)), rng.integers(levels, size=sum(counts)))
    return ranks, np.repeat(np.arange(len(counts)), counts)


# Ranks


@pytest.mark.parametrize("prefix", ["", "half_"])
def test_ranks_and_metrics_equal_the_published_code(golden, prefix):
    expected = golden("retrieval_metrics")
    scores = expected[f"{prefix}similarity"]
    ranks = rank_matrix(scores, five_each(len(scores)))
    metrics = retrieval_metrics(ranks)
    for way, of_way in zip(WAYS, ranks, strict=True):
        np.testing.assert_array_equal(of_way, expected[f"{prefix}{way}_ranks"])
        assert [metrics[way][name] for name in PUBLISHED] == pytest.approx(expected[f"{prefix}{way}"])


def test_folds_and_their_mean_equal_the_published_code(golden):
    expected = golden("retrieval_metrics")
    parts = parts_of_split(five_each(50), folds=5)
    ranks = rank_parts(expected["similarity"], five_each(50), parts)
    found = metrics_of_parts(ranks, bootstrap_parts(ranks, parts, five_each(50)))
    pick = lambda one: [one[way][name] for way in WAYS for name in PUBLISHED] + [one["rsum"]]  # noqa: E731
    np.testing.assert_allclose([pick(fold) for fold in found["folds"]], expected["fold_metrics"])
    np.testing.assert_allclose(pick(found), expected["fold_mean"])


@settings(deadline=None)
@given(
    counts=st.lists(st.integers(1, 6), min_size=1, max_size=3).map(lambda some: some * 5),
    levels=st.integers(1, 8),
    seed=SEEDS,
    dtype=st.sampled_from([np.float64, np.float32, np.float16]),
)
def test_ranks_of_split_and_folds_equal_a_sort_with_ties_against_the_query(counts, levels, seed, dtype):
    image_of_caption = np.repeat(np.arange(len(counts)), counts)
    scores = np.random.default_rng(seed).integers(levels, size=(len(counts), sum(counts))).astype(dtype)
    parts = parts_of_split(image_of_caption, folds=5)
    assert len(parts) == 6
    for part, ranks in zip(parts, rank_parts(scores, image_of_caption, parts), strict=True):
        own = image_of_caption[part.captions] - part.images.start
        expected = sorted_ranks(scores[part.images, part.captions], own)
        assert [of_way.tolist() for of_way in ranks] == expected


def test_chance_is_the_mean_recall_of_random_scores():
    rng = np.random.default_rng(0)
    drawn = [retrieval_metrics(rank_matrix(rng.random((20, 100)), five_each(20))) for _ in range(600)]
    chance = chance_metrics(five_each(20))
    for way in WAYS:
        for name in ("r1", "r5", "r10"):
            assert np.mean([metrics[way][name] for metrics in drawn]) == pytest.approx(chance[way][name], abs=1.5)


# What a draw of the bootstrap is


def redraw(images, seed):
    """The images of every draw (DRAWS, images), by their numbers."""
    rng = np.random.default_rng(seed)
    size = (DRAWS_AT_ONCE, images)
    return np.concatenate([rng.integers(images, size=size) for _ in range(DRAWS // DRAWS_AT_ONCE)])


def metrics_of_images(ranks, image_of_caption, drawn):
    """The metrics of some images, each as often as it is named, with all its captions."""
    of_image = [ranks.t2i[image_of_caption == image].tolist() for image in range(len(ranks.i2t))]
    return plain_metrics([ranks.i2t[image] for image in drawn], [rank for image in drawn for rank in of_image[image]])


@settings(deadline=None, max_examples=40, derandomize=True)
@example(counts=[1], levels=9, seed=0)
@example(counts=[7], levels=9, seed=0)
@given(counts=st.lists(st.integers(1, 7), min_size=1, max_size=12), levels=st.sampled_from([1, 3, 12, 40]), seed=SEEDS)
def test_metrics_of_a_draw_are_those_of_its_images_written_out_with_all_their_captions(counts, levels, seed):
    ranks, image_of_caption = random_ranks(counts, levels, seed)
    metrics, drawn = bootstrap(ranks, image_of_caption, seed), redraw(len(counts), seed)
    assert {values.shape for values in flat(metrics)} == {(DRAWS,)}
    for draw in SOME_DRAWS:
        expected = metrics_of_images(ranks, image_of_caption, drawn[draw])
        assert [values[draw] for values in flat(metrics)] == pytest.approx(flat(expected))


@settings(deadline=None, max_examples=30, derandomize=True)
@given(image_of_query=st.lists(st.integers(0, 30), min_size=1, max_size=25), seed=SEEDS)
def test_means_of_a_draw_are_those_of_its_queries_written_out_and_images_without_queries_do_not_count(
    image_of_query, seed
):
    image_of_query = np.array(image_of_query)
    values = np.random.default_rng(seed).standard_normal((len(image_of_query), 3))
    means, images = bootstrap_means(values, image_of_query), sorted(set(image_of_query))
    drawn = redraw(len(images), seed=0)
    assert means.shape == (DRAWS, 3)
    for draw in SOME_DRAWS:
        queries = [query for place in drawn[draw] for query in np.flatnonzero(image_of_query == images[place])]
        np.testing.assert_allclose(means[draw], values[queries].mean(axis=0), atol=1e-12)


# Whether intervals hold the truth


IMAGES, DATA_SETS = 400, 1000


@pytest.fixture(scope="module")
def study():
    """Data sets drawn from one truth: by name a metric's truth and its values in each draw (DRAWS, DATA_SETS).

    A query falls behind one more wrong item after the other; how probably, its image says: uniformly distributed."""
    rng = np.random.default_rng(0)
    counts, hit = rng.integers(1, 8, size=IMAGES), rng.random((IMAGES, DATA_SETS))
    ranks = Ranks(rng.geometric(hit) - 1, rng.geometric(hit.repeat(counts, axis=0)) - 1)
    truth = [100 * (1 - 1 / (k + 1)) for k in RECALL_AT]
    images = np.arange(IMAGES)
    i2t, t2i = draw_together(ranks.i2t, images), draw_together(ranks.t2i, images.repeat(counts))
    of_rsum = 2 * sum(truth), i2t.sum(axis=0) + t2i.sum(axis=0)
    return {"i2t r1": (truth[0], i2t[0]), "t2i r1": (truth[0], t2i[0]), "rsum": of_rsum}


def draw_together(ranks, image):
    """R@K of each draw (K, DRAWS, DATA_SETS): all data sets have the same number of images, so the same draws."""
    hits = np.concatenate([100.0 * (ranks < k) for k in RECALL_AT], axis=1)
    return bootstrap_means(hits, image).reshape(DRAWS, len(RECALL_AT), -1).swapaxes(0, 1)


def coverage(draws, truth):
    """The percentage of data sets whose interval holds the truth. draws: (DRAWS, DATA_SETS)."""
    low, high = np.array([interval(of_one) for of_one in draws.T]).T
    return 100 * np.mean((low <= truth) & (truth <= high))


def test_intervals_hold_the_truth_in_93_to_97_percent_of_1000_data_sets(study):
    found = {name: coverage(draws, truth) for name, (truth, draws) in study.items()}
    assert all(93 <= percent <= 97 for percent in found.values()), found


def test_two_models_that_are_equally_good_are_told_apart_in_3_to_7_percent_of_1000_pairs(study):
    for name, (_, draws) in study.items():
        found = [p_value(of_pair) < 0.05 for of_pair in (draws - np.roll(draws, 1, axis=1)).T]
        assert 3 <= 100 * np.mean(found) <= 7, (name, np.mean(found))


# p-values


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ([0.1] * DRAWS, 2 / (DRAWS + 1)),
        ([0.0, -1.0, -2.0] + [0.5] * 96, 2 * (1 + 3) / 100),
        ([0.1 + 0.2 - 0.3] * 60 + [1.0] * 40, 1),  # zero but for rounding
    ],
)
def test_the_p_value_is_twice_the_share_of_draws_without_the_sign_of_the_most(differences, expected):
    assert p_value(np.array(differences)) == p_value(-np.array(differences)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("seeds", "quantile"), [(2, 12.7062), (3, 4.30265), (5, 2.77645), (10, 2.26216), (30, 2.04523)]
)
def test_the_t_test_agrees_with_printed_tables(seeds, quantile):
    differences = np.random.default_rng(seeds).normal(1, 1, seeds)
    error = differences.std(ddof=1) / np.sqrt(seeds)
    mean = differences.mean()
    assert t_test(differences)["interval"] == pytest.approx(
        [mean - quantile * error, mean + quantile * error], abs=1e-4
    )
    significant = differences - mean + quantile * error
    assert t_test(significant)["p"] == pytest.approx(0.05, abs=1e-5)
    assert t_test(-significant)["p"] == t_test(significant)["p"]


def test_the_t_test_of_nothing_says_nothing():
    assert t_test(np.array([3.0])) is None
    assert t_test(np.zeros(3)) == {"interval": [0, 0], "p": 1}
