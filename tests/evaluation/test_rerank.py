"""Coarse-to-fine ranking against the plain definition."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from lib.evaluation.parts import folds, whole
from lib.evaluation.ranks import rank_matrix
from lib.evaluation.rerank import Reranker


class Exact:
    """Gives exact scores from a matrix and remembers which were asked for."""

    def __init__(self, scores):
        self.scores, self.asked = torch.as_tensor(scores), []

    def __call__(self, images, captions):
        self.asked += zip(images.tolist(), captions.tolist(), strict=True)
        return self.scores[images, captions]


def random_scores(images, captions_of_image, seed, noise):
    """Distinct coarse and exact scores (images, captions) and the captions' images."""
    rng = np.random.default_rng(seed)
    coarse = rng.permutation(images * images * captions_of_image).reshape(images, -1).astype(np.float32)
    exact = (coarse + noise * coarse.size * rng.standard_normal(coarse.shape)).astype(np.float32)
    return coarse, exact, np.repeat(np.arange(images), captions_of_image)


def plain_rank(coarse, exact, is_true, k):
    """The rank of the best true item, one query's list sorted: the best k by exact score, the others as they were."""
    order = np.argsort(-coarse)
    order = [*sorted(order[:k], key=lambda item: (-exact[item], is_true[item])), *order[k:]]
    return next(place for place, item in enumerate(order) if is_true[item])


@settings(deadline=None)
@given(
    images_of_fold=st.integers(1, 3),
    captions_of_image=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
    noise=st.sampled_from([0, 0.05, 1]),
    k=st.integers(1, 40),
)
def test_ranks_are_those_of_the_best_k_sorted_again(images_of_fold, captions_of_image, seed, noise, k):
    coarse, exact, image_of_caption = random_scores(5 * images_of_fold, captions_of_image, seed, noise)
    parts = [whole(*coarse.shape), *folds(5, len(coarse), image_of_caption)]
    ranks = Reranker(torch.from_numpy(coarse), Exact(exact), image_of_caption, parts).ranks(k)
    for (images, captions), (i2t, t2i) in zip(parts, ranks, strict=True):
        is_true = np.arange(len(coarse))[images, None] == image_of_caption[None, captions]
        lists = coarse[images, captions], exact[images, captions], is_true
        assert i2t.tolist() == [plain_rank(*one, k) for one in zip(*lists, strict=True)]
        assert t2i.tolist() == [plain_rank(*one, k) for one in zip(*(of.T for of in lists), strict=True)]


def test_with_all_items_exact_the_ranks_are_the_exact_ones():
    coarse, exact, image_of_caption = random_scores(12, 3, seed=0, noise=1)
    (ranks,) = Reranker(torch.from_numpy(coarse), Exact(exact), image_of_caption, [whole(12, 36)]).ranks(36)
    (expected,) = rank_matrix(exact, image_of_caption)
    np.testing.assert_array_equal(ranks.i2t, expected.i2t)
    np.testing.assert_array_equal(ranks.t2i, expected.t2i)


def test_a_wrong_item_with_the_same_exact_score_counts_as_before_the_true_one():
    coarse = torch.tensor([[2.0, 1.0], [0.0, 3.0]])
    (ranks,) = Reranker(coarse, Exact(torch.zeros(2, 2)), np.arange(2), [whole(2, 2)]).ranks(2)
    assert ranks.i2t.tolist() == ranks.t2i.tolist() == [1, 1]


def test_no_pair_is_scored_exactly_twice_and_only_candidates_are():
    coarse, exact, image_of_caption = random_scores(40, 5, seed=1, noise=0.1)
    scorer = Exact(exact)
    reranker = Reranker(torch.from_numpy(coarse), scorer, image_of_caption, [whole(40, 200)])
    reranker.ranks(4)
    assert len(scorer.asked) <= 4 * (40 + 200)
    reranker.ranks(8)
    assert len(scorer.asked) == len(set(scorer.asked)) == len(reranker.known) <= 8 * (40 + 200)


@pytest.mark.parametrize("noise", [0, 0.02, 1])
def test_doubling_ends_when_no_recall_changes(noise):
    coarse, exact, image_of_caption = random_scores(60, 5, seed=2, noise=noise)
    make = lambda: Reranker(torch.from_numpy(coarse), Exact(exact), image_of_caption, [whole(60, 300)])  # noqa: E731
    ranks, k = make().ranks_until_they_stay()
    recalled = {
        tried: [np.concatenate(one) < at for one in make().ranks(tried) for at in (1, 5, 10)]
        for tried in (10 * 2**i for i in range(6))
        if tried <= k
    }
    assert all(np.array_equal(a, b) for a, b in zip(make().ranks(k)[0], ranks[0], strict=True))
    same = {tried: np.array_equal(recalled[tried], recalled[2 * tried]) for tried in recalled if 2 * tried in recalled}
    assert not any(same[tried] for tried in same if 2 * tried < k)
    assert same[k // 2] or k >= 300
    if not noise:
        assert k == 20
