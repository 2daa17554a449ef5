"""Size augmentation: which regions and words stay, at which rates, and that words are treated as wholes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.data.batches import choose_regions, disturb_words
from lib.data.tokenizer import TokenizedCaptions

MASK, VOCABULARY, FIRST_WORD = 4, 50, 1000


def captions_of(shapes):
    """Captions of words of so many pieces each; a piece's id is FIRST_WORD and its place among all pieces."""
    words = [word for shape in shapes for word, pieces in enumerate(shape) for _ in range(pieces)]
    starts = np.cumsum([0, *(sum(shape) for shape in shapes)])
    return TokenizedCaptions(FIRST_WORD + np.arange(len(words)), np.array(words, np.int64), starts)


def fates(captions, seed, mask_id=MASK):
    """What happens to each piece: "kept", "masked", "replaced" or "dropped"."""
    disturbed = disturb_words(captions, mask_id, VOCABULARY, np.random.default_rng(seed))
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


@pytest.mark.parametrize(
    ("mask_id", "expected"),
    [
        (MASK, {"kept": 0.8, "masked": 0.1, "replaced": 0.02, "dropped": 0.08}),
        (None, {"kept": 0.8, "masked": 0.0, "replaced": 0.02, "dropped": 0.18}),
    ],
)
def test_words_are_kept_masked_replaced_and_dropped_at_the_published_rates(mask_id, expected):
    """A replacement is the mask token itself once in VOCABULARY draws."""
    of_pieces = fates(captions_of([[1] * 20] * 2500), 0, mask_id)
    rates = {fate: float((of_pieces == fate).mean()) for fate in expected}
    assert rates == pytest.approx(expected, abs=0.01)  # more than five standard deviations
    assert rates["replaced"] == pytest.approx(0.02, abs=0.004)


def test_the_pieces_of_a_word_share_its_fate():
    of_pieces = fates(captions_of([[4] * 10] * 300), seed=1).reshape(-1, 4)
    for fate in ("kept", "dropped"):
        assert ((of_pieces == fate).all(axis=1) == (of_pieces == fate).any(axis=1)).all()
    replaced = (of_pieces == "replaced").any(axis=1)
    assert (of_pieces[~replaced] == of_pieces[~replaced][:, :1]).all()  # masked: one mask token for each piece
    assert replaced.any()


def test_each_piece_of_a_replaced_word_is_drawn_by_itself():
    disturbed = disturb_words(captions_of([[2] * 10] * 2000), MASK, VOCABULARY, np.random.default_rng(2))
    pairs = disturbed.ids.reshape(-1, 2)
    replaced = pairs[(pairs < FIRST_WORD).all(axis=1) & (pairs != MASK).all(axis=1)]
    assert len(replaced) > 200
    assert (replaced[:, 0] == replaced[:, 1]).mean() < 0.1


def test_the_last_word_of_a_caption_and_the_first_of_the_next_are_two_words():
    """One-word captions have equal word indices all along; each must meet a fate of its own."""
    kept = fates(captions_of([[1]] * 20000), seed=3) == "kept"
    assert (kept[1:] & kept[:-1]).mean() == pytest.approx(0.8 * 0.8, abs=0.02)


def test_replacements_cover_the_whole_vocabulary_special_entries_too():
    captions = captions_of([[1] * 10] * 20000)
    disturbed = disturb_words(captions, MASK, VOCABULARY, np.random.default_rng(4))
    counts = np.bincount(disturbed.ids[disturbed.ids < FIRST_WORD], minlength=VOCABULARY)
    assert len(counts) == VOCABULARY
    assert np.delete(counts, MASK) == pytest.approx(len(captions.ids) * 0.02 / VOCABULARY, rel=0.6)


@settings(deadline=None)
@given(shapes=st.lists(st.lists(st.integers(1, 3), max_size=5), max_size=5), seed=st.integers(0, 2**32))
def test_what_is_untouched_stays_in_its_caption_and_order(shapes, seed):
    """Any captions, empty ones and none at all too; all words of a caption may vanish."""
    captions = captions_of(shapes)
    before = captions.ids.copy()
    disturbed = disturb_words(captions, MASK, VOCABULARY, np.random.default_rng(seed))
    assert np.array_equal(captions.ids, before)
    assert len(disturbed) == len(captions)
    for caption in range(len(captions)):
        own, after = (some.select(np.array([caption])) for some in (captions, disturbed))
        kept = after.ids >= FIRST_WORD
        places = after.ids[kept] - captions.starts[caption] - FIRST_WORD
        assert (np.diff(places) > 0).all()
        assert np.array_equal(own.words[places], after.words[kept])
        assert (np.diff(after.words) >= 0).all()
