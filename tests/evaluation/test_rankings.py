"""Lists of queries and their figures, against sorting each list and counting along it."""

import hypothesis.strategies as st
import numpy as np
import pytest
from eccv_caption._metrics import compute_eccv_metrics, compute_r_at_k, compute_rprecision
from hypothesis import given, settings

from lib.evaluation.rankings import ABSENT, Judged, Protocol, RankedList, judge, query_figures
from lib.evaluation.ranks import rank_matrix

SCORES = (-np.inf, -1.5, -0.0, 0.0, 0.25, 2.0)  # few, so that many are equal; the two zeros are
LENGTHS = st.integers(1, 30)
SEEDS = st.integers(0, 2**32 - 1)
DTYPES = st.sampled_from([np.float64, np.float32, np.float16])


def draw_list(items, seed, dtype=np.float32):
    """Scores (items,) and the ascending numbers of one or more right items."""
    rng = np.random.default_rng(seed)
    right = rng.choice(items, size=rng.integers(1, items + 1), replace=False)
    return rng.choice(SCORES, size=items).astype(dtype), np.sort(right)


def sorted_items(scores, right):
    """Best first; of equal scores the wrong ones first, then the first."""
    return sorted(range(len(scores)), key=lambda item: (-scores[item], item in right, item))


# One list


@settings(deadline=None)
@given(items=LENGTHS, seed=SEEDS, dtype=DTYPES)
def test_positions_are_those_in_a_sorted_list_with_wrong_items_before_right_ones_of_the_same_score(items, seed, dtype):
    scores, right = draw_list(items, seed, dtype)
    order = sorted_items(scores, set(right))
    assert RankedList(scores).positions(right).tolist() == [order.index(item) for item in right]


@settings(deadline=None)
@given(items=LENGTHS, seed=SEEDS)
def test_right_items_take_the_same_places_in_whatever_order_they_are_given(items, seed):
    scores, right = draw_list(items, seed)
    shuffled = np.random.default_rng(seed).permutation(right)
    ranked = RankedList(scores)
    assert sorted(ranked.positions(shuffled)) == sorted(ranked.positions(right))


@settings(deadline=None)
@given(items=LENGTHS, seed=SEEDS, absent=st.integers(1, 3))
def test_right_items_that_are_not_there_stand_behind_all_and_change_no_other_place(items, seed, absent):
    scores, right = draw_list(items, seed)
    ranked = RankedList(scores)
    positions = ranked.positions(np.append([ABSENT] * absent, right))
    assert positions[:absent].tolist() == list(range(items, items + absent))
    assert positions[absent:].tolist() == ranked.positions(right).tolist()


@settings(deadline=None)
@given(items=LENGTHS, seed=SEEDS, dtype=DTYPES, k=st.integers(1, 12))
def test_the_first_items_are_those_of_a_sorted_list_or_all_where_there_are_fewer(items, seed, dtype, k):
    scores, right = draw_list(items, seed, dtype)
    order = sorted_items(scores, set(right))
    assert RankedList(scores).top(right, k).tolist() == order[:k]
    assert RankedList(scores).top(right).tolist() == order[:10]


# Figures of one query


def slow_figures(fits, right=None):
    """The definitions written out.

    fits: (items,) in the list's order, whether an item fits. right: how many fit, where the list is but a beginning.
    """
    right, average_precision = right or sum(fits), 0.0
    for place in range(right):
        if fits[place]:
            average_precision += sum(fits[: place + 1]) / (place + 1) / right
    recalls = {f"r{k}": float(any(fits[:k])) for k in (1, 5, 10)}
    average = sum(recalls.values()) / 3
    return {**recalls, "avg": average, "r_precision": sum(fits[:right]) / right, "map_at_r": average_precision}


@settings(deadline=None)
@given(items=st.integers(1, 60), seed=SEEDS)
def test_figures_are_the_written_out_definitions(items, seed):
    _, right = draw_list(items, seed)
    fits = [place in right for place in range(items)]
    shuffled = np.random.default_rng(seed).permutation(right)
    assert query_figures(shuffled) == pytest.approx(slow_figures(fits), abs=1e-12)


@settings(deadline=None)
@given(items=st.integers(1, 60), seed=SEEDS)
def test_figures_are_those_of_the_package_eccv_caption(items, seed):
    scores, right = draw_list(items, seed)
    found = query_figures(RankedList(scores).positions(right))
    ranked, fits = {7: sorted_items(scores, set(right))}, {7: right.tolist()}
    theirs = compute_eccv_metrics(ranked, fits)
    assert found["map_at_r"] == pytest.approx(theirs["eccv_map_at_r"], abs=1e-12)
    assert found["r_precision"] == pytest.approx(theirs["eccv_rprecision"], abs=1e-12)
    assert found["r_precision"] == pytest.approx(compute_rprecision(ranked, fits), abs=1e-12)
    assert found["r1"] == theirs["eccv_r1"]
    for k in (1, 5, 10):
        assert found[f"r{k}"] == compute_r_at_k(ranked, fits, k)


@pytest.mark.parametrize(
    ("positions", "r_precision", "map_at_r"),
    [
        ([0], 1, 1),
        ([1], 0, 0),
        ([0, 1, 2], 1, 1),
        ([1, 2, 7], 2 / 3, (1 / 2 + 2 / 3) / 3),
        ([0, 3, 4, 5], 2 / 4, (1 + 2 / 4) / 4),
        ([4, 30, 31, 32], 0, 0),
    ],
)
def test_precisions_computed_by_hand(positions, r_precision, map_at_r):
    found = query_figures(np.array(positions))
    assert (found["r_precision"], found["map_at_r"]) == pytest.approx((r_precision, map_at_r))


def test_recalls_count_the_first_one_five_and_ten_places():
    first = {place: query_figures(np.array([place, 20])) for place in (0, 1, 4, 5, 9, 10)}
    recalls = {place: tuple(found[name] for name in ("r1", "r5", "r10", "avg")) for place, found in first.items()}
    assert recalls[0] == (1, 1, 1, 1)
    assert recalls[1] == recalls[4] == (0, 1, 1, pytest.approx(2 / 3))
    assert recalls[5] == recalls[9] == (0, 0, 1, pytest.approx(1 / 3))
    assert recalls[10] == (0, 0, 0, 0)


# Whole matrices


def own_pairs(image_of_caption, name="pairs", folds=()):
    """The protocol in which an image and its captions fit each other."""
    images = range(image_of_caption.max() + 1)
    captions = {image: np.flatnonzero(image_of_caption == image) for image in images}
    return Protocol(name, ("r1",), captions, {c: np.array([i]) for c, i in enumerate(image_of_caption)}, folds)


def draw_right(queries, items, rng):
    """Some queries, each with one right answer or more."""
    chosen = rng.choice(queries, size=rng.integers(1, queries + 1), replace=False)
    return {int(q): np.sort(rng.choice(items, size=rng.integers(1, items + 1), replace=False)) for q in chosen}


def draw_matrix(counts, seed, dtype=np.float32):
    """Scores (images, captions), the image of each caption, and a generator for more."""
    rng = np.random.default_rng(seed)
    image_of_caption = np.repeat(np.arange(len(counts)), counts)
    return rng.choice(SCORES, size=(len(counts), sum(counts))).astype(dtype), image_of_caption, rng


def lists_of(scores):
    """(way, query, scores of all items), images first."""
    return [("i2t", i, row) for i, row in enumerate(scores)] + [("t2i", c, row) for c, row in enumerate(scores.T)]


def right_answers(protocol, way, query):
    return (protocol.captions if way == "i2t" else protocol.images).get(query)


COUNTS = st.lists(st.integers(1, 7), min_size=1, max_size=8)


@settings(deadline=None)
@given(counts=COUNTS, seed=SEEDS, dtype=DTYPES)
def test_each_query_of_a_matrix_is_judged_by_its_sorted_list(counts, seed, dtype):
    scores, image_of_caption, rng = draw_matrix(counts, seed, dtype)
    sizes = scores.shape
    more = Protocol("more", ("map_at_r",), draw_right(*sizes, rng), draw_right(*reversed(sizes), rng))
    protocols, judged = [own_pairs(image_of_caption), more], []
    for way, query, row in lists_of(scores):
        right = {protocol.name: right_answers(protocol, way, query) for protocol in protocols}
        places = {
            name: [sorted_items(row, set(those)).index(item) for item in those]
            for name, those in right.items()
            if those is not None
        }
        top = [(item, float(row[item])) for item in sorted_items(row, set(right["pairs"]))[:10]]
        judged.append((way, query, top, right["pairs"].tolist(), places))
    assert [as_lists(one) for one in judge(scores, protocols)] == judged


def as_lists(one: Judged):
    positions = {name: places.tolist() for name, places in one.positions.items()}
    return one.way, one.query, one.top, one.right.tolist(), positions


@settings(deadline=None)
@given(counts=COUNTS, seed=SEEDS, dtype=DTYPES)
def test_the_best_place_of_a_data_sets_own_pairs_is_the_rank_that_is_counted(counts, seed, dtype):
    scores, image_of_caption, _ = draw_matrix(counts, seed, dtype)
    best = [one.positions["pairs"].min() for one in judge(scores, [own_pairs(image_of_caption)])]
    (ranks,) = rank_matrix(scores, image_of_caption)
    assert best == [*ranks.i2t, *ranks.t2i]


def draw_folds(image_of_caption, rng):
    """Images and captions of up to three folds of any sizes, scattered over the matrix."""
    fold_of_image = rng.integers(3, size=image_of_caption.max() + 1)
    each = ((fold_of_image == fold, fold_of_image[image_of_caption] == fold) for fold in np.unique(fold_of_image))
    return [(np.flatnonzero(images), np.flatnonzero(captions)) for images, captions in each]


@settings(deadline=None)
@given(counts=COUNTS, seed=SEEDS)
def test_a_fold_is_judged_as_if_there_were_nothing_else(counts, seed):
    scores, image_of_caption, rng = draw_matrix(counts, seed)
    folds = draw_folds(image_of_caption, rng)
    protocols = [own_pairs(image_of_caption, "all"), own_pairs(image_of_caption, "fold", folds)]
    places = {(one.way, one.query): one.positions["fold"].tolist() for one in judge(scores, protocols)}
    alone = {}
    for images, captions in folds:
        own = own_pairs(np.searchsorted(images, image_of_caption[captions]))
        for one in judge(scores[np.ix_(images, captions)], [own]):
            query = (images if one.way == "i2t" else captions)[one.query]
            alone[one.way, int(query)] = one.positions["pairs"].tolist()
    assert places == alone


def test_folds_change_neither_the_first_items_nor_the_places_by_other_protocols():
    scores, image_of_caption, rng = draw_matrix([5] * 12, seed=0)
    folds = draw_folds(image_of_caption, rng)
    protocols = [own_pairs(image_of_caption, "all"), own_pairs(image_of_caption, "fold", folds)]
    whole = list(map(as_lists, judge(scores, protocols[:1])))
    both = list(map(as_lists, judge(scores, protocols)))
    assert [one[:4] for one in both] == [one[:4] for one in whole]
    assert [one[4]["all"] for one in both] == [one[4]["all"] for one in whole]
    assert any(one[4]["fold"] != one[4]["all"] for one in both)


def test_more_captions_than_are_taken_at_a_time_are_judged_each_by_its_own_scores():
    scores, image_of_caption, _ = draw_matrix([261, 256, 1, 90], seed=1)
    judged = list(judge(scores, [own_pairs(image_of_caption)]))
    assert [(one.way, one.query) for one in judged] == [(way, query) for way, query, _ in lists_of(scores)]
    for one, (_, _, row) in zip(judged, lists_of(scores), strict=True):
        assert one.top == [(item, row[item]) for item in sorted_items(row, set(one.right))[:10]]
