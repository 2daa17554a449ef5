"""Scores of a split on their way, of several rows side by side: single models or files, and their mean."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lib import distributed
from lib.cli import InputError, reason
from lib.evaluation.matcher import Embeddings, score_strips, score_true_pairs
from lib.evaluation.parts import Part, Shares, chunks, overlap
from lib.files import replacing
from lib.model.engine.autograd import Scorer

Rows = Iterator[tuple[int, list[Tensor]]]  # first caption, of each row the scores (own images, captions)


class Scores(NamedTuple):
    """The scores of a split in one or more rows."""

    of_true_pairs: list[Tensor]  # of each row (captions,), on every process: those in the strips, to the bit
    strips: Rows  # of consecutive captions, on one device


def scores_of_model(scorer: Scorer, embeddings: Embeddings, image_of_caption: np.ndarray) -> Scores:
    """Exact scores of all pairs, in one row. image_of_caption: (captions,)."""
    true = score_true_pairs(scorer, embeddings, image_of_caption)
    image = torch.from_numpy(image_of_caption).to(true.device)
    strips = _put_true_scores(score_strips(scorer, embeddings), true, image, embeddings.shares.mine)
    return Scores([true], ((first, [scores]) for first, scores in strips))


def saved_scores(matrix: np.ndarray, image_of_caption: np.ndarray, shares: Shares, device: torch.device) -> Scores:
    """A saved matrix's scores (images, captions), in one row."""
    own, captions = shares.mine.images, np.arange(len(image_of_caption))
    true = torch.from_numpy(matrix[image_of_caption, captions].astype(np.float32)).to(device)
    strips = (
        (chunk.start, [torch.from_numpy(matrix[own, chunk].astype(np.float32)).to(device)])
        for chunk in chunks(len(captions))
    )
    return Scores([true], strips)


def open_matrix(path: str | Path) -> np.ndarray:
    """A saved matrix of scores, read as it is used. Raises InputError where it is none."""
    try:
        matrix = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path}: no readable matrix of scores ({reason(error)})") from None
    if not isinstance(matrix, np.ndarray) or matrix.ndim != 2 or matrix.dtype.kind != "f":
        raise InputError(f"{path}: expected a matrix of floating-point scores, images x captions")
    return matrix


def side_by_side(sources: Sequence[Scores]) -> Scores:
    """The rows of several sources under each other."""
    strips = (
        (several[0][0], [row for _, rows in several for row in rows])
        for several in zip(*(source.strips for source in sources), strict=True)
    )
    return Scores([row for source in sources for row in source.of_true_pairs], strips)


def with_mean(scores: Scores) -> Scores:
    """The rows, and below them their mean: the scores of an ensemble."""
    strips = ((first, [*rows, _mean(rows)]) for first, rows in scores.strips)
    return Scores([*scores.of_true_pairs, _mean(scores.of_true_pairs)], strips)


def written(strips: Rows, path: str, shape: tuple[int, int], shares: Shares) -> Rows:
    """Strips on their way; the first process writes all scores of the last row to a .npy file."""
    with replacing(path) if shares.own == 0 else nullcontext() as file:
        if file:
            np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
            begin = file.tell()
        for first, rows in strips:
            every = shares.gather_images(rows[-1])
            if file:
                for image, row in enumerate(every.cpu().numpy().astype("<f4", copy=False)):
                    file.seek(begin + 4 * (image * shape[1] + first))
                    file.write(row)
            del every
            yield first, rows


def kept(strips: Rows, number: int, matrices: np.ndarray, shares: Shares) -> Rows:
    """Strips on their way; the first process puts all scores of the last `number` rows into its matrices."""
    for first, rows in strips:
        for k, row in enumerate(rows[-number:]):
            every = shares.gather_images(row)
            if distributed.is_first():
                matrices[k, :, first : first + every.shape[1]] = every.cpu().numpy()
        yield first, rows


def _put_true_scores(
    strips: Iterator[tuple[int, Tensor]], true: Tensor, image_of_caption: Tensor, share: Part
) -> Iterator[tuple[int, Tensor]]:
    """Strips with the true pairs' scores as they were computed before, so that each pair has one score to the bit."""
    for first, scores in strips:
        own = overlap(slice(first, first + scores.shape[1]), share.captions)
        captions = torch.arange(own.start, own.stop, device=scores.device)
        scores[image_of_caption[captions] - share.images.start, captions - first] = true[captions]
        yield first, scores


def _mean(rows: list[Tensor]) -> Tensor:
    """One after the other, so that a score is the same to the bit wherever it stands."""
    return sum(rows[1:], rows[0]) / len(rows)
