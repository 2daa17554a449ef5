"""Size augmentation of regions and words, training only: a whole batch at a time, in numpy."""

import numpy as np

from lib.data.tokenizer import TokenizedCaptions

KEEP_REGION = 0.8
CHOOSE_WORD = 0.2
# What happens to a chosen word; the rest is left out.
MASK_CHOSEN, REPLACE_CHOSEN = 0.5, 0.1


def choose_regions(starts: np.ndarray, counts: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Keep each region with probability 0.8, at least one of each image.

    starts, counts: (images,) number of each image's first region, and how many it has. Returns the numbers of the kept
    regions, one image after the other, ascending, and how many are kept (images,).
    """
    keep = rng.random((len(counts), counts.max())) < KEEP_REGION
    keep &= np.arange(keep.shape[1]) < counts[:, None]
    survivor = rng.integers(counts)
    emptied = ~keep.any(axis=1)
    keep[emptied, survivor[emptied]] = True
    return (starts[:, None] + np.arange(keep.shape[1]))[keep], keep.sum(axis=1)


def disturb_words(
    captions: TokenizedCaptions, mask_id: int, vocab_size: int, rng: np.random.Generator
) -> TokenizedCaptions:
    """Choose each word with probability 0.2; a chosen one is masked (0.5), replaced (0.1) or left out (0.4).

    A word's pieces share its fate: one [MASK] or one random vocabulary entry, any entry, for each piece.
    """
    caption = np.repeat(np.arange(len(captions)), np.diff(captions.starts))
    starts_word = np.ones(len(captions.ids), dtype=bool)
    starts_word[1:] = (captions.words[1:] != captions.words[:-1]) | (caption[1:] != caption[:-1])
    word = np.cumsum(starts_word) - 1  # counted over the whole batch

    fate = rng.random(starts_word.sum())[word] / CHOOSE_WORD  # below 1: chosen
    masked = fate < MASK_CHOSEN
    replaced = ~masked & (fate < MASK_CHOSEN + REPLACE_CHOSEN)
    dropped = ~masked & ~replaced & (fate < 1)

    ids = np.where(masked, mask_id, captions.ids)
    ids = np.where(replaced, rng.integers(vocab_size, size=len(ids)), ids)
    lengths = np.bincount(caption[~dropped], minlength=len(captions))
    return TokenizedCaptions(ids[~dropped], captions.words[~dropped], np.concatenate([[0], np.cumsum(lengths)]))
