"""Size augmentation: which regions and words stay, at which rates, and that words are treated as wholes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.data.batches import choose_regions, disturb_words
from lib.data.tokenizer import TokenizedCaptions

MASK, VOCABULARY, FIRST_WORD = 4, 50, 1000


def captions_of(pieces_of_words, captions=1):
    """Captions of words of so many pieces each, all alike; ids from FIRST_WORD on are the places of the pieces."""
    pieces = sum(pieces_of_words) * captions
    words = np.repeat(np.arange(len(pieces_of_words)), pieces_of_words)
    starts = np.arange(captions + 1) * sum(pieces_of_words)
    return TokenizedCaptions(np.arange(FIRST_WORD, FIRST_WORD + pieces), np.tile(words, captions), starts)


def fates(captions, seed):
    """What happens to each piece: "kept", "masked", "replaced" or "dropped"."""
    disturbed = disturb_words(captions, MASK, VOCABULARY, np.random.default_rng(seed))
    before, after = (np.repeat(np.arange(len(c)), np.diff(c.starts)) * 100 + c.words for c in (captions, disturbed))
    stays = np.isin(before, after)
    assert np.array_equal(before[stays], after)  # no piece of a word is lost alone
    result = np.full(len(before), "dropped", dtype="U8")
    result[stays] = np.where(disturbed.ids >= FIRST_WORD, "kept", np.where(disturbed.ids == MASK, "masked", "replaced"))
    return result


# Regions


@settings(deadline=None)
@given(counts=st.lists(st.integers(1, 8), min_size=1, max_size=6), gap=st.integers(0, 3), seed=st.integers(0, 2**32))
def test_kept_regions_are_regions_of_their_image_in_order_and_at_least_one(counts, gap, seed):
    counts = np.array(counts)
    starts = np.cumsum(counts + gap)[::-1]  # images in any order, anywhere
    before = starts.copy(), counts.copy()
    rows, kept = choose_regions(starts, counts, np.random.default_rng(seed))
    assert (kept >= 1).all()
    assert kept.sum() == len(rows)
    for start, count, of_image in zip(starts, counts, np.split(rows, np.cumsum(kept)[:-1]), strict=True):
        assert of_image.tolist() == sorted(set(of_image.tolist()))
        assert start <= of_image[0]
        assert of_image[-1] < start + count
    assert np.array_equal(starts, before[0])
    assert np.array_equal(counts, before[1])


def test_four_of_five_regions_stay():
    _, kept = choose_regions(np.zeros(2000, int), np.full(2000, 36), np.random.default_rng(0))
    assert kept.mean() / 36 == pytest.approx(0.8, abs=0.008)  # five standard deviations
    assert kept.var() == pytest.approx(36 * 0.8 * 0.2, rel=0.2)  # each region by itself


def test_four_of_five_stay_of_few_and_of_many():
    counts = np.tile([10, 100], 1000)
    _, kept = choose_regions(np.zeros(2000, int), counts, np.random.default_rng(0))
    assert kept[::2].mean() / 10 == pytest.approx(0.8, abs=0.02)
    assert kept[1::2].mean() / 100 == pytest.approx(0.8, abs=0.007)


def test_a_single_region_always_stays():
    rows, kept = choose_regions(np.arange(500), np.ones(500, int), np.random.default_rng(0))
    assert (kept == 1).all()
    assert np.array_equal(rows, np.arange(500))


@pytest.mark.parametrize("counts", [np.full(800, 4), np.tile([4, 9], 400)])
def test_of_an_image_that_would_lose_all_any_region_may_stay(counts):
    class Unlucky:
        """Draws that keep no region."""

        random = staticmethod(np.ones)
        integers = np.random.default_rng(0).integers

    rows, kept = choose_regions(np.zeros(800, int), counts, Unlucky())
    assert (kept == 1).all()
    for count in set(counts):
        share = (counts == count).sum() / count
        assert np.bincount(rows[counts == count], minlength=count) == pytest.approx(share, rel=0.5)


# Words


def test_words_are_kept_masked_replaced_and_dropped_at_the_published_rates():
    of_pieces = fates(captions_of([1] * 20, captions=2500), seed=0)
    rates = {fate: float((of_pieces == fate).mean()) for fate in ("kept", "masked", "replaced", "dropped")}
    expected = {"kept": 0.8, "masked": 0.1, "replaced": 0.02, "dropped": 0.08}
    # A replacement is [MASK] itself once in VOCABULARY draws.
    assert rates == pytest.approx(expected, abs=0.01)  # more than five standard deviations
    assert rates["replaced"] == pytest.approx(0.02, abs=0.004)


def test_the_pieces_of_a_word_share_its_fate():
    pieces = 4
    of_pieces = fates(captions_of([pieces] * 10, captions=300), seed=1).reshape(-1, pieces)
    for fate in ("kept", "dropped"):
        assert ((of_pieces == fate).all(axis=1) == (of_pieces == fate).any(axis=1)).all()
    replaced = (of_pieces == "replaced").any(axis=1)
    assert (of_pieces[~replaced] == of_pieces[~replaced][:, :1]).all()  # masked: one [MASK] for each piece
    assert replaced.any()


def test_each_piece_of_a_replaced_word_is_drawn_by_itself():
    captions = captions_of([2] * 10, captions=2000)
    disturbed = disturb_words(captions, MASK, VOCABULARY, np.random.default_rng(2))
    pairs = disturbed.ids.reshape(-1, 2)
    replaced = pairs[(pairs < FIRST_WORD).all(axis=1) & (pairs != MASK).all(axis=1)]
    assert len(replaced) > 200
    assert (replaced[:, 0] == replaced[:, 1]).mean() < 0.1


def test_the_last_word_of_a_caption_and_the_first_of_the_next_are_two_words():
    """One-word captions have equal word indices all along; each must meet a fate of its own."""
    of_pieces = fates(captions_of([1], captions=20000), seed=3)
    kept = of_pieces == "kept"
    assert (kept[1:] & kept[:-1]).mean() == pytest.approx(0.8 * 0.8, abs=0.02)


def test_replacements_cover_the_whole_vocabulary_special_entries_too():
    captions = captions_of([1] * 10, captions=20000)
    disturbed = disturb_words(captions, MASK, VOCABULARY, np.random.default_rng(4))
    counts = np.bincount(disturbed.ids[disturbed.ids < FIRST_WORD], minlength=VOCABULARY)
    assert len(counts) == VOCABULARY
    others = np.delete(counts, MASK)
    assert others == pytest.approx(len(captions.ids) * 0.02 / VOCABULARY, rel=0.6)


def test_all_words_of_a_caption_may_vanish():
    captions = captions_of([1], captions=200)
    disturbed = disturb_words(captions, MASK, VOCABULARY, np.random.default_rng(5))
    lengths = np.diff(disturbed.starts)
    assert len(disturbed) == 200
    assert set(lengths) == {0, 1}
    assert disturbed.starts[-1] == len(disturbed.ids) == len(disturbed.words)


@settings(deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(1, 3), max_size=5), max_size=5),
    seed=st.integers(0, 2**32),
)
def test_what_is_untouched_stays_in_its_caption_and_order(shapes, seed):
    """Any captions, empty ones and none at all too."""
    lengths = [sum(shape) for shape in shapes]
    captions = TokenizedCaptions(
        np.arange(FIRST_WORD, FIRST_WORD + sum(lengths)),
        np.array(
            [word for shape in shapes for word, pieces in enumerate(shape) for _ in range(pieces)], dtype=np.int64
        ),
        np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]),
    )
    before = captions.ids.copy()
    disturbed = disturb_words(captions, MASK, VOCABULARY, np.random.default_rng(seed))
    assert np.array_equal(captions.ids, before)
    assert len(disturbed) == len(captions)
    assert disturbed.ids.dtype == np.int64
    for caption in range(len(captions)):
        own = captions.select(np.array([caption]))
        after = disturbed.select(np.array([caption]))
        kept = after.ids >= FIRST_WORD
        places = after.ids[kept] - captions.starts[caption] - FIRST_WORD
        assert (np.diff(places) > 0).all()
        assert np.array_equal(own.words[places], after.words[kept])
        assert (np.diff(after.words) >= 0).all()
