"""Size augmentation: which regions and words stay, at which rates, and that words are treated as wholes."""

from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.data.batches import choose_regions, disturb_words
from lib.data.tokenizer import TokenizedCaptions

MASK, VOCABULARY, FIRST = 4, 50, 1000


def captions_of(shapes):
    """Captions of words of so many pieces each; a piece's id is FIRST and its place among all pieces."""
    words = [word for shape in shapes for word, pieces in enumerate(shape) for _ in range(pieces)]
    starts = np.cumsum([0, *(sum(shape) for shape in shapes)])
    return TokenizedCaptions(FIRST + np.arange(len(words)), np.array(words, np.int64), starts)


def fates(captions, seed, mask_id=MASK):
    """What happens to each piece ("kept", "masked", "replaced" or "dropped"), and the disturbed captions."""
    disturbed = disturb_words(captions, mask_id, VOCABULARY, np.random.default_rng(seed))
    before, after = (np.repeat(np.arange(len(c)), np.diff(c.starts)) * 100 + c.words for c in (captions, disturbed))
    stays = np.isin(before, after)
    assert np.array_equal(before[stays], after)  # no piece of a word is lost alone
    result = np.full(len(before), "dropped", dtype="U8")
    result[stays] = np.where(disturbed.ids >= FIRST, "kept", np.where(disturbed.ids == MASK, "masked", "replaced"))
    return result, disturbed


@settings(deadline=None)
@given(counts=st.lists(st.integers(1, 8), min_size=1, max_size=6), gap=st.integers(0, 3), seed=st.integers(0, 2**32))
def test_kept_regions_are_regions_of_their_image_in_order_and_at_least_one(counts, gap, seed):
    counts = np.array(counts)
    starts = np.cumsum(counts + gap)[::-1]  # images in any order, anywhere
    rows, kept = choose_regions(starts, counts, np.random.default_rng(seed))
    assert (kept >= 1).all()
    assert kept.sum() == len(rows)
    for start, count, of_image in zip(starts, counts, np.split(rows, np.cumsum(kept)[:-1]), strict=True):
        assert (np.diff(of_image) > 0).all()
        assert start <= of_image[0]
        assert of_image[-1] < start + count


def test_four_of_five_regions_stay_each_by_itself_of_few_and_of_many():
    _, kept = choose_regions(np.zeros(4000, int), np.tile([10, 36], 2000), np.random.default_rng(0))
    assert kept[::2].mean() / 10 == pytest.approx(0.8, abs=0.015)  # five standard deviations
    assert kept[1::2].mean() / 36 == pytest.approx(0.8, abs=0.008)
    assert kept[1::2].var() == pytest.approx(36 * 0.8 * 0.2, rel=0.2)


def test_of_an_image_that_would_lose_all_any_region_may_stay():
    unlucky = Mock(random=np.ones, integers=np.random.default_rng(0).integers)  # draws that keep no region
    counts = np.tile([4, 9], 400)
    rows, kept = choose_regions(np.zeros(800, int), counts, unlucky)
    assert (kept == 1).all()
    for count in (4, 9):
        assert np.bincount(rows[counts == count], minlength=count) == pytest.approx(400 / count, rel=0.5)


@pytest.mark.parametrize(
    ("mask_id", "expected"),
    [
        (MASK, {"kept": 0.8, "masked": 0.1, "replaced": 0.02, "dropped": 0.08}),
        (None, {"kept": 0.8, "masked": 0.0, "replaced": 0.02, "dropped": 0.18}),
    ],
)
def test_words_are_kept_masked_replaced_and_dropped_at_the_published_rates(mask_id, expected):
    """Captions of one word each, whose indices are all equal: each word still meets a fate of its own."""
    of_words, disturbed = fates(captions_of([[1]] * 100_000), 0, mask_id)
    rates = {fate: float((of_words == fate).mean()) for fate in expected}
    assert rates == pytest.approx(expected, abs=0.006)  # five standard deviations; a replacement may be MASK
    kept = of_words == "kept"
    assert (kept[1:] & kept[:-1]).mean() == pytest.approx(0.8 * 0.8, abs=0.01)
    drawn = np.bincount(disturbed.ids[disturbed.ids < FIRST], minlength=VOCABULARY)
    assert np.delete(drawn, MASK) == pytest.approx(100_000 * 0.02 / VOCABULARY, rel=0.6)  # special entries too


def test_the_pieces_of_a_word_share_its_fate_and_are_replaced_each_by_itself():
    of_pieces, disturbed = fates(captions_of([[2] * 10] * 2000), seed=1)
    of_pieces = of_pieces.reshape(-1, 2)
    for fate in ("kept", "dropped"):
        assert ((of_pieces == fate).all(axis=1) == (of_pieces == fate).any(axis=1)).all()
    pairs = disturbed.ids.reshape(-1, 2)
    replaced = pairs[(pairs < FIRST).all(axis=1) & (pairs != MASK).any(axis=1)]
    assert len(replaced) > 200
    assert (replaced[:, 0] == replaced[:, 1]).mean() < 0.1


@settings(deadline=None)
@given(shapes=st.lists(st.lists(st.integers(1, 3), max_size=5), max_size=5), seed=st.integers(0, 2**32))
def test_what_is_untouched_stays_in_its_caption_and_order(shapes, seed):
    """Any captions, empty ones and none at all too; all words of a caption may vanish."""
    captions = captions_of(shapes)
    disturbed = disturb_words(captions, MASK, VOCABULARY, np.random.default_rng(seed))
    assert np.array_equal(captions.ids, captions_of(shapes).ids)
    assert len(disturbed) == len(captions)
    for caption in range(len(captions)):
        own, after = (some.select(np.array([caption])) for some in (captions, disturbed))
        kept = after.ids >= FIRST
        places = after.ids[kept] - captions.starts[caption] - FIRST
        assert (np.diff(places) > 0).all()
        assert np.array_equal(own.words[places], after.words[kept])
        assert (np.diff(after.words) >= 0).all()
