"""Losses by name (--loss): each a function (scores, margin) -> scalar.

scores: (B, B), row = image, column = caption, true pairs on the diagonal, -inf for a pair that is left out, the same on
all processes. The result is a sum over the batch, not a mean. A loss may carry two attributes:

    warmup     the loss that takes its place in the first --vse_mean_warmup_epochs epochs
    pairwise   the loss is the sum over wrong pairs of pairwise(scores, true_of_images, true_of_captions, margin), see
               `violations`, and is computed without holding the whole matrix
"""

import inspect
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lib.model import registry

Loss = Callable[[Tensor, float], Tensor]


def loss_of_epoch(part: Mapping[str, Any], epoch: int, warmup_epochs: int) -> Loss:
    """The function of a loss, given as {"name", "options"}, in an epoch counted from 0. Raises ValueError."""
    registry.check_options("loss", part)
    loss = registry.find("loss", part["name"])
    if epoch < warmup_epochs:
        loss = getattr(loss, "warmup", loss)
    return _bind(loss, part["options"])


def _bind(function: Callable, options: Mapping[str, Any]) -> Callable:
    """A loss, and its pairwise form, with those of the options that it takes."""
    takes = inspect.signature(function).parameters
    bound = partial(function, **{name: value for name, value in options.items() if name in takes})
    vars(bound)["__name__"] = function.__name__
    if pairwise := getattr(function, "pairwise", None):
        vars(bound)["pairwise"] = _bind(pairwise, options)
    return bound


def _with(**attributes: Any) -> Callable[[Loss], Loss]:
    def add(loss: Loss) -> Loss:
        vars(loss).update(attributes)
        return loss

    return add


def violations(scores: Tensor, true_of_images: Tensor, true_of_captions: Tensor, margin: float) -> Tensor:
    """The hinge loss (I, C) of pairs, both directions added.

    scores: (I, C). true_of_images: (I, 1), true_of_captions: (C,), scores of the true pairs.
    """
    return (margin + scores - true_of_images).clamp(min=0) + (margin + scores - true_of_captions).clamp(min=0)


@_with(pairwise=violations)
def hinge_all(scores: Tensor, margin: float) -> Tensor:
    """Hinge triplet loss: max(0, margin + score of a negative - score of the true pair), summed over all negatives."""
    true = scores.diagonal()
    return violations(scores, true[:, None], true, margin).masked_fill(_diagonal(scores), 0).sum()


@_with(warmup=hinge_all)
def hinge(scores: Tensor, margin: float) -> Tensor:
    """Hinge triplet loss of the hardest negative of each row and each column (VSE++, Faghri et al. 2018).

    The published recipe: the first epochs, by default one, take all negatives.
    """
    wrong = scores.masked_fill(_diagonal(scores), float("-inf"))
    hardest = torch.cat([wrong.max(dim=1).values, wrong.max(dim=0).values])
    return (margin + hardest - scores.diagonal().repeat(2)).clamp(min=0).sum()


def ramped(scores: Tensor, margin: float) -> Tensor:
    """The hinge triplet loss, harder the better the batch is retrieved already, the same in every epoch.

    In each direction, with recall = the share of queries whose true pair beats all their negatives in the batch, a
    query's loss is  recall x its hardest negative's + (1 - recall) x the mean over its negatives within the margin. So
    an untrained model learns from many negatives, a trained one mostly from the hardest, and one whose scores have
    become equal is at recall 0 and gets the gradients that it started with (measurements: docs/training.md).
    """
    wrong = scores.masked_fill(_diagonal(scores), float("-inf"))
    wrong, true = torch.cat([wrong, wrong.T]), scores.diagonal().repeat(2)[:, None]  # (2 B, B): images, then captions
    is_first = (wrong < true).all(dim=1).unflatten(0, (2, -1))
    recall = is_first.to(scores.dtype).mean(dim=1, keepdim=True).expand(is_first.shape).flatten()
    violated = (margin + wrong - true).clamp(min=0)
    mean = violated.sum(dim=1) / (violated > 0).sum(dim=1).clamp(min=1)
    return (recall * violated.max(dim=1).values + (1 - recall) * mean).sum()


TAUGHT = 2.0  # standard deviation of the teacher's logits: it says an order, whatever the scale of its scores is


def rank_distillation(scores: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """How far scores (B, B) are from the teacher's ranking of each query's negatives, summed over the batch.

    KL(teacher || scores) of the softmax over the query's negatives, in both directions (the idea of CPRD). teacher:
    (B, B), without gradient; as everywhere here, -inf where a pair is left out. temperature: of the scores.
    """
    left_out, total = _diagonal(scores) | (teacher == -math.inf), scores.new_zeros(())
    logits = scores / temperature, teacher * (TAUGHT / _deviation(teacher, left_out))
    for dim in (0, 1):  # NaN for a query without a negative, all of which is left out below
        ours, wanted = (one.masked_fill(left_out, -math.inf).log_softmax(dim) for one in logits)
        total = total + F.kl_div(ours, wanted, reduction="none", log_target=True).masked_fill(left_out, 0).sum()
    return total


def _deviation(scores: Tensor, left_out: Tensor) -> Tensor:
    """The standard deviation of those that are not left out."""
    kept = scores.masked_fill(left_out, 0)
    count = (~left_out).sum().clamp(min=1)
    variance = (kept - kept.sum() / count).masked_fill(left_out, 0).square().sum() / count
    return variance.sqrt().clamp(min=1e-6)


def _diagonal(scores: Tensor) -> Tensor:
    return torch.eye(len(scores), dtype=torch.bool, device=scores.device)
