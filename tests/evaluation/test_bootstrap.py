"""Intervals by bootstrap: every draw against a slow computation, and whether intervals hold a truth that is known."""

from typing import NamedTuple

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import example, given, settings

from lib.evaluation.bootstrap import AT_ONCE, DRAWS, LEVEL, bootstrap, bootstrap_means, interval, p_value
from lib.evaluation.evaluate import add_intervals, draw_metrics, measure
from lib.evaluation.metrics import RECALL_AT, mean_metrics
from lib.evaluation.parts import folds, whole
from lib.evaluation.ranks import Ranks

SOME_DRAWS = (0, 1, AT_ONCE - 1, AT_ONCE, DRAWS - 1)
NAMES = ("r1", "r5", "r10", "avg", "medr", "meanr")


def redraw(images, seed):
    """The images of every draw (DRAWS, images), by their numbers."""
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.integers(images, size=(AT_ONCE, images)) for _ in range(DRAWS // AT_ONCE)])


def plain_metrics(i2t, t2i):
    """The metrics of two lists of ranks."""
    recalls = [[100 * np.mean(np.array(ranks) < k) for k in (1, 5, 10)] for ranks in (i2t, t2i)]
    figures = [
        [*of_way, np.mean(of_way), np.floor(np.median(ranks)) + 1, np.mean(ranks) + 1]
        for ranks, of_way in zip((i2t, t2i), recalls, strict=True)
    ]
    ways = {way: dict(zip(NAMES, of_way, strict=True)) for way, of_way in zip(("i2t", "t2i"), figures, strict=True)}
    return {**ways, "rsum": np.sum(recalls)}


def metrics_of_images(ranks, image_of_caption, drawn):
    """The metrics of some images, each as often as it is named, with all captions of its own."""
    of_image = [ranks.t2i[image_of_caption == image].tolist() for image in range(len(ranks.i2t))]
    return plain_metrics([ranks.i2t[image] for image in drawn], [rank for image in drawn for rank in of_image[image]])


def flat(metrics):
    """All 13 figures in one order."""
    assert [sorted(metrics[way]) for way in ("i2t", "t2i")] == [sorted(NAMES)] * 2
    return [*(metrics[way][name] for way in ("i2t", "t2i") for name in NAMES), metrics["rsum"]]


def random_ranks(counts, levels, seed):
    """Ranks below `levels` of images with these numbers of captions, and the images of the captions."""
    rng = np.random.default_rng(seed)
    ranks = Ranks(rng.integers(levels, size=len(counts)), rng.integers(levels, size=sum(counts)))
    return ranks, np.repeat(np.arange(len(counts)), counts)


# What a draw is


@settings(deadline=None, max_examples=60, derandomize=True)
@example(counts=[1], levels=9, seed=0)
@example(counts=[7], levels=9, seed=0)
@example(counts=[1] * 10, levels=20, seed=0)
@given(
    counts=st.lists(st.integers(1, 7), min_size=1, max_size=12),
    levels=st.sampled_from([1, 3, 12, 40]),
    seed=st.integers(0, 2**32 - 1),
)
def test_figures_of_a_draw_equal_those_of_its_images_written_out_with_all_their_captions(counts, levels, seed):
    ranks, image_of_caption = random_ranks(counts, levels, seed)
    metrics, drawn = bootstrap(ranks, image_of_caption, seed), redraw(len(counts), seed)
    assert {figure.shape for figure in flat(metrics)} == {(DRAWS,)}
    for draw in SOME_DRAWS:
        expected = metrics_of_images(ranks, image_of_caption, drawn[draw])
        assert [figure[draw] for figure in flat(metrics)] == pytest.approx(flat(expected))


def test_there_are_2000_draws_and_intervals_of_95_percent():
    assert (DRAWS, LEVEL) == (2000, 95)
    shuffled = np.random.default_rng(0).permutation(2001)
    assert interval(shuffled) == [50, 1950]
    assert interval(np.full(DRAWS, 3.5)) == [3.5, 3.5]


def test_captions_of_one_image_are_drawn_together_and_with_their_image():
    counts = np.random.default_rng(0).integers(1, 8, size=30)
    hit = np.random.default_rng(1).integers(2, size=30)
    metrics = bootstrap(Ranks(hit, np.repeat(hit, counts)), np.repeat(np.arange(30), counts))
    same = bootstrap(Ranks(hit, hit), np.arange(30))
    np.testing.assert_array_equal(metrics["i2t"]["r1"], same["t2i"]["r1"])
    every, of_image = redraw(30, 0), np.where(hit == 0, counts, 0)
    expected = 100 * of_image[every].sum(axis=1) / counts[every].sum(axis=1)
    np.testing.assert_allclose(metrics["t2i"]["r1"], expected)


def test_the_same_seed_gives_the_same_draws_whatever_is_measured_and_another_seed_others():
    (one, image_of_caption), (other, _) = random_ranks([5] * 40, 12, 0), random_ranks([5] * 40, 12, 1)
    assert np.array_equal(flat(bootstrap(one, image_of_caption)), flat(bootstrap(one, image_of_caption, seed=0)))
    assert not np.array_equal(flat(bootstrap(one, image_of_caption)), flat(bootstrap(one, image_of_caption, seed=1)))
    both = Ranks(one.i2t + other.i2t, one.t2i + other.t2i)
    mean_ranks = [bootstrap(ranks, image_of_caption)["t2i"]["meanr"] - 1 for ranks in (one, other, both)]
    np.testing.assert_allclose(mean_ranks[0] + mean_ranks[1], mean_ranks[2])


@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    image_of_query=st.lists(st.integers(0, 30), min_size=1, max_size=25),
    seed=st.integers(0, 2**32 - 1),
)
def test_means_equal_those_of_the_queries_written_out_and_images_without_queries_do_not_matter(image_of_query, seed):
    image_of_query = np.array(image_of_query)
    values = np.random.default_rng(seed).standard_normal((len(image_of_query), 3))
    means, images = bootstrap_means(values, image_of_query, seed), sorted(set(image_of_query))
    drawn = redraw(len(images), seed)
    assert means.shape == (DRAWS, 3)
    for draw in SOME_DRAWS:
        queries = [query for place in drawn[draw] for query in np.flatnonzero(image_of_query == images[place])]
        np.testing.assert_allclose(means[draw], values[queries].mean(axis=0), atol=1e-12)
    without_gaps = np.searchsorted(images, image_of_query)
    np.testing.assert_array_equal(bootstrap_means(values, without_gaps, seed), means)


# Whether intervals hold the truth


IMAGES, DATA_SETS = 400, 1000
FIVE_EACH = np.full(IMAGES, 5)
ONE_TO_SEVEN = np.random.default_rng(0).integers(1, 8, size=IMAGES)


class Study(NamedTuple):
    """Data sets drawn from one truth, and their figures in every draw of the bootstrap."""

    truth: dict[str, float]
    ranks: Ranks  # (queries, DATA_SETS)
    image_of_caption: np.ndarray
    drawn: dict[str, np.ndarray]  # (DRAWS, DATA_SETS)


@pytest.fixture(
    scope="module",
    params=[(20, FIVE_EACH), (50, FIVE_EACH), (80, FIVE_EACH), (50, ONE_TO_SEVEN)],
    ids=["20 %", "50 %", "80 %", "50 %, 1 to 7 captions"],
)
def study(request):
    """Queries fall behind one more wrong item after the other; how probably, their image says (Beta)."""
    percent, counts = request.param
    a, b, rng = percent / 50, 2 - percent / 50, np.random.default_rng([percent, counts.sum()])
    hit = rng.beta(a, b, size=(IMAGES, DATA_SETS))
    ranks = Ranks(rng.geometric(hit) - 1, rng.geometric(hit.repeat(counts, axis=0)) - 1)
    missed = np.cumprod([(b + j) / (a + b + j) for j in range(max(RECALL_AT))])
    recalls = [100 * (1 - missed[k - 1]) for k in RECALL_AT]
    image_of_caption = np.repeat(np.arange(IMAGES), counts)
    i2t = draw_together(ranks.i2t, np.arange(IMAGES), RECALL_AT)
    t2i = draw_together(ranks.t2i, image_of_caption, RECALL_AT)
    drawn = {"i2t r1": i2t[0], "t2i r1": t2i[0], "rsum": i2t.sum(axis=0) + t2i.sum(axis=0)}
    truth = {"i2t r1": recalls[0], "t2i r1": recalls[0], "rsum": 2 * sum(recalls)}
    return Study(truth, ranks, image_of_caption, drawn)


def draw_together(ranks, image, at):
    """R@K of each draw (K, DRAWS, DATA_SETS): all data sets have the same number of images, so the same draws."""
    hits = np.concatenate([100.0 * (ranks < k) for k in at], axis=1)
    return bootstrap_means(hits, image).reshape(DRAWS, len(at), -1).swapaxes(0, 1)


def coverage(draws, truth):
    """The percentage of data sets whose interval holds the truth. draws: (DRAWS, DATA_SETS)."""
    low, high = np.array([interval(of_one) for of_one in draws.T]).T
    return 100 * np.mean((low <= truth) & (truth <= high))


def test_intervals_hold_the_truth_in_93_to_97_percent_of_1000_data_sets(study):
    found = {name: coverage(study.drawn[name], truth) for name, truth in study.truth.items()}
    assert all(93 <= percent <= 97 for percent in found.values()), found


def test_two_models_that_are_equally_good_are_told_apart_in_3_to_7_percent_of_1000_pairs(study):
    for name, drawn in study.drawn.items():
        found = [p_value(of_pair) < 0.05 for of_pair in (drawn - np.roll(drawn, 1, axis=1)).T]
        assert 3 <= 100 * np.mean(found) <= 7, (name, np.mean(found))


def test_captions_drawn_one_by_one_would_hold_the_truth_in_less_than_90_percent(study):
    captions = np.arange(len(study.image_of_caption))
    (drawn,) = draw_together(study.ranks.t2i, captions, RECALL_AT[:1])
    assert coverage(drawn, study.truth["t2i r1"]) < 90


def test_draws_that_data_sets_share_are_those_of_each_alone(study):
    for number in (0, DATA_SETS - 1):
        of_one = Ranks(study.ranks.i2t[:, number], study.ranks.t2i[:, number])
        alone = bootstrap(of_one, study.image_of_caption)
        np.testing.assert_array_equal(study.drawn["i2t r1"][:, number], alone["i2t"]["r1"])
        np.testing.assert_array_equal(study.drawn["t2i r1"][:, number], alone["t2i"]["r1"])
        np.testing.assert_allclose(study.drawn["rsum"][:, number], alone["rsum"])


def test_the_truth_of_these_data_sets_is_their_mean(study):
    for way, ranks in zip(("i2t", "t2i"), study.ranks, strict=True):
        weights = np.bincount(study.image_of_caption) if way == "t2i" else np.ones(IMAGES)
        error = 100 * np.sqrt((weights**2).sum()) / weights.sum() * 0.5 / np.sqrt(DATA_SETS)
        assert 100 * (ranks < 1).mean() == pytest.approx(study.truth[f"{way} r1"], abs=4 * error)
    rsum = 100 * sum((ranks < k).mean() for ranks in study.ranks for k in RECALL_AT)
    assert rsum == pytest.approx(study.truth["rsum"], abs=1)


# Folds


def width(ends):
    return ends[1] - ends[0]


def parts_of(image_of_caption):
    images = image_of_caption[-1] + 1
    return [whole(images, len(image_of_caption)), *folds(5, images, image_of_caption)]


def cut(ranks, parts):
    return [Ranks(ranks.i2t[part.images], ranks.t2i[part.captions]) for part in parts]


@pytest.mark.parametrize("alike", [False, True])
def test_the_mean_of_five_folds_has_an_interval_as_narrow_as_that_of_five_times_the_images(alike):
    ranks, image_of_caption = random_ranks([5] * 300, 12, 0)
    if alike:
        ranks = Ranks(np.tile(ranks.i2t[:60], 5), np.tile(ranks.t2i[:300], 5))
    parts = parts_of(image_of_caption)
    of_parts = cut(ranks, parts)
    results = add_intervals(measure(of_parts), of_parts, parts, image_of_caption)
    for pick in (lambda one: one["interval"]["i2t"]["r5"], lambda one: one["interval"]["rsum"]):
        of_mean, of_folds = width(pick(results)), [width(pick(fold)) for fold in results["folds"]]
        assert of_mean < 0.6 * min(of_folds)
        assert of_mean == pytest.approx(np.sqrt(np.square(of_folds).sum()) / 5, rel=0.1)
        assert of_mean == pytest.approx(width(pick(results["full"])), rel=0.15)


def test_images_of_a_fold_are_drawn_within_it_with_a_seed_of_its_own():
    counts = np.random.default_rng(0).integers(1, 8, size=20)
    ranks, image_of_caption = random_ranks(counts, 12, 0)
    parts = parts_of(image_of_caption)
    every, *of_folds = draw_metrics(cut(ranks, parts), parts, image_of_caption)
    np.testing.assert_array_equal(flat(every), flat(bootstrap(ranks, image_of_caption)))
    for draw in SOME_DRAWS:
        expected = []
        for k in range(5):
            own = image_of_caption // 4 == k
            fold = Ranks(ranks.i2t[4 * k : 4 * k + 4], ranks.t2i[own])
            expected.append(metrics_of_images(fold, image_of_caption[own] - 4 * k, redraw(4, seed=k + 1)[draw]))
        means = [figure[draw] for figure in flat(mean_metrics(of_folds))]
        assert means == pytest.approx(np.mean([flat(fold) for fold in expected], axis=0))


# p-values


def test_no_difference_has_a_p_value_of_1():
    assert p_value(np.zeros(DRAWS)) == 1
    assert p_value(np.array([-1.0, 1.0] * 100)) == 1
    assert p_value(np.array([0.0] * 60 + [1.0] * 40)) == 1


def test_differences_of_one_sign_have_the_smallest_p_value_that_so_many_draws_can_show():
    assert p_value(np.full(DRAWS, 0.1)) == 2 / (DRAWS + 1)
    assert p_value(np.full(DRAWS, -0.1)) == 2 / (DRAWS + 1)


def test_the_p_value_is_twice_the_part_of_draws_without_the_sign_of_the_most():
    assert p_value(np.array([0.0, -1.0, -2.0] + [0.5] * 96)) == pytest.approx(2 * (1 + 3) / 100)


@settings(deadline=None, derandomize=True)
@given(st.lists(st.integers(-3, 5), min_size=1, max_size=50))
def test_the_p_value_does_not_ask_which_of_the_two_comes_first(differences):
    differences = np.array(differences, float)
    assert p_value(differences) == p_value(-differences)
    assert 0 < p_value(differences) <= 1


def test_draws_in_which_each_gains_what_the_other_loses_are_no_difference():
    ranks, image_of_caption = random_ranks([5] * 82, 15, 0)
    a, b = ranks.i2t.copy(), ranks.i2t.copy()
    a[:7], b[:7] = [7] * 5 + [0] * 2, [3] * 7
    drawn = [bootstrap(Ranks(one, ranks.t2i), image_of_caption) for one in (a, b)]
    hits = np.array([sum(one < k for k in (1, 5, 10)) for one in (a, b)])
    gained = (hits[1] - hits[0])[redraw(82, 0)].sum(axis=1)
    assert p_value(drawn[1]["rsum"] - drawn[0]["rsum"]) == p_value(gained)
