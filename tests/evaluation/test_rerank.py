"""Coarse-to-fine ranking against the plain definition; no work twice in scoring."""

from itertools import pairwise

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from lib.cli import InputError
from lib.evaluation import score
from lib.evaluation.metrics import parts_of_split
from lib.evaluation.score import Reranker
from lib.model import registry
from lib.model.engine import make_engine
from lib.model.layers import Shard


class Exact:
    """Gives exact scores from a matrix and remembers which were asked for."""

    def __init__(self, scores):
        self.scores, self.asked = torch.as_tensor(scores), []

    def __call__(self, images, captions):
        self.asked += zip(images.tolist(), captions.tolist(), strict=True)
        return self.scores[images, captions]


def make(images, captions_of_image, seed, noise, folds=0):
    """A reranker of distinct coarse scores, the coarse and exact scores, the captions' images and the parts."""
    rng = np.random.default_rng(seed)
    coarse = rng.permutation(images * images * captions_of_image).reshape(images, -1).astype(np.float32)
    exact = (coarse + noise * coarse.size * rng.standard_normal(coarse.shape)).astype(np.float32)
    image_of_caption = np.repeat(np.arange(images), captions_of_image)
    parts = parts_of_split(image_of_caption, folds)
    return Reranker(torch.from_numpy(coarse), Exact(exact), image_of_caption, parts), coarse, exact, parts


def plain_rank(coarse, exact, is_right, k):
    """The rank of the best right item: the best k sorted again by exact score, the others as they were."""
    order = np.argsort(-coarse)
    order = [*sorted(order[:k], key=lambda item: (-exact[item], is_right[item])), *order[k:]]
    return next(place for place, item in enumerate(order) if is_right[item])


@settings(deadline=None)
@given(
    images_of_fold=st.integers(1, 3),
    captions_of_image=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
    noise=st.sampled_from([0, 0.05, 1]),
    k=st.integers(1, 40),
)
def test_ranks_are_those_of_the_best_k_sorted_again(images_of_fold, captions_of_image, seed, noise, k):
    reranker, coarse, exact, parts = make(5 * images_of_fold, captions_of_image, seed, noise, folds=5)
    is_right = np.arange(len(coarse))[:, None] == reranker.image_of_caption.numpy()
    for part, (i2t, t2i) in zip(parts, reranker.ranks(k), strict=True):
        lists = [scores[part.images, part.captions] for scores in (coarse, exact, is_right)]
        assert i2t.tolist() == [plain_rank(*one, k) for one in zip(*lists, strict=True)]
        assert t2i.tolist() == [plain_rank(*one, k) for one in zip(*(of.T for of in lists), strict=True)]


def test_no_pair_is_scored_exactly_twice_and_only_candidates_are():
    reranker, *_ = make(40, 5, seed=1, noise=0.1)
    for k in (4, 8):
        reranker.ranks(k)
        asked = reranker.score_pairs.asked
        assert len(asked) == len(set(asked)) == reranker.exact_pairs <= k * (40 + 200)


@pytest.mark.parametrize("noise", [0, 0.02, 1])
def test_doubling_ends_when_no_recall_changes(noise):
    ranks, k = make(60, 5, seed=2, noise=noise)[0].ranks_until_stable()
    tried, reranker = [10 * 2**i for i in range(6) if 10 * 2**i <= k], make(60, 5, seed=2, noise=noise)[0]
    recalled = [[np.concatenate(one) < at for one in reranker.ranks(each) for at in (1, 5, 10)] for each in tried]
    same = [np.array_equal(a, b) for a, b in pairwise(recalled)]
    assert tried[-1] == k
    assert not any(same[:-1])
    assert same[-1] or k >= 300
    assert noise or k == 20
    (expected,) = reranker.ranks(k)
    np.testing.assert_array_equal(np.concatenate(ranks[0]), np.concatenate(expected))


def test_equal_exact_scores_count_against_the_query_and_nan_is_an_error():
    coarse, image_of_caption = torch.tensor([[2.0, 1.0], [0.0, 3.0]]), np.arange(2)
    parts = parts_of_split(image_of_caption)
    (ranks,) = Reranker(coarse, Exact(torch.zeros(2, 2)), image_of_caption, parts).ranks(2)
    assert ranks.i2t.tolist() == ranks.t2i.tolist() == [1, 1]
    with pytest.raises(InputError, match="NaN"):
        Reranker(coarse, Exact(torch.full((2, 2), torch.nan)), image_of_caption, parts).ranks(1)


def test_pooled_captions_are_pooled_once_whatever_the_number_of_blocks_and_chunks(monkeypatch):
    monkeypatch.setattr(score, "CHUNK", {"cpu": 2})
    model = registry.build("similarity", {"name": "gpo", "options": {}}, 6)
    pooled, pool = [], model.pool_captions
    monkeypatch.setattr(
        model, "pool_captions", lambda words, lengths: pooled.append(len(lengths)) or pool(words, lengths)
    )
    regions, lengths = torch.randn(6, 3, 6), torch.tensor([2, 1, 3, 2, 1])
    words = torch.randn(9, 6)
    blocks = [score.Block(slice(k, k + 2), regions[k : k + 2], None) for k in (0, 2, 4)]
    scorer = make_engine("tiled", model).scorer()
    scores = score.score_all(scorer, score.Embeddings(blocks, 6, words, lengths, Shard(3)))
    assert pooled == [2, 2, 1]
    torch.testing.assert_close(scores, model(regions, words, lengths).detach())
