"""One vector a side: the mean, and a global head beside X-Dim: its scores, its loss, their gradients."""

import math

import pytest
import torch
from torch.func import functional_call

from lib.losses import hinge, hinge_all, ramped, rank_distillation
from lib.model import registry
from lib.model.engine import Embedded, make_engine
from lib.model.layers import l2_normalize
from lib.model.pooling import GpoSimilarity, MeanPooling
from lib.training.loop import batch_loss
from tests.model.test_engine import make, random_inputs

LENGTHS = [2, 5, 1, 3, 3]
OPTIONS = {"dims": 8, "weight": 0.7, "loss": 0.3, "distill": 0.2, "temperature": 0.4}


def parts(engine):
    """X-Dim, a head with options of its own, and their engine; in float64."""
    torch.manual_seed(0)
    similarity, head = make(), registry.build("global_head", {"name": "gpo", "options": OPTIONS}, 12).double()
    return similarity, head, make_engine(engine, similarity, head)


def masked():
    """Embedded pairs of 12 dimensions and 8 of the head, not normalised, of which some images have padding regions."""
    regions, words, lengths = random_inputs(5, LENGTHS, dims=20)
    regions, words = (rows * (0.5 + torch.rand(*rows.shape[:-1], 1)) for rows in (regions, words))
    return Embedded(regions, words, lengths, torch.arange(7) < torch.tensor([7, 3, 1, 7, 5])[:, None])


def apart(similarity, head, embedded):
    """X-Dim's own scores (I, C), by the plain formula, and the head's cosines, by GPO's own similarity."""
    gpo = GpoSimilarity(8).double()
    (regions, words), others = embedded[:2], embedded[2:]
    xdim = similarity(l2_normalize(regions[..., :12]), l2_normalize(words[..., :12]), *others)
    return xdim, functional_call(
        gpo, dict(head.named_parameters()), (regions[..., 12:], words[..., 12:], *others), strict=False
    )


def test_the_mean_of_a_set_is_that_of_its_own_regions_and_words():
    embedded = masked()
    images = [torch.nn.functional.normalize(r[m].mean(dim=0), dim=0) for r, m in zip(*embedded[::3], strict=True)]
    captions = [torch.nn.functional.normalize(w.mean(dim=0), dim=0) for w in embedded.words.split(LENGTHS)]
    torch.testing.assert_close(
        MeanPooling()(*embedded), torch.stack(images) @ torch.stack(captions).T, atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("engine", ["tiled", "plain"])
def test_a_pairs_score_is_xdims_plus_the_heads_weight_times_the_cosine(engine):
    (similarity, head, combined), embedded = parts(engine), masked()
    xdim, cosines = apart(similarity, head, embedded)
    expected = xdim + 0.7 * cosines
    torch.testing.assert_close(combined(*embedded), expected)
    exact, coarse = combined.scorer(), combined.scorer(coarse=True)
    torch.testing.assert_close(
        exact.all_pairs(embedded.regions, exact.captions(*embedded[1:3]), embedded.real), expected
    )
    alone = coarse.all_pairs(embedded.regions, coarse.captions(*embedded[1:3]), embedded.real)
    torch.testing.assert_close(alone, cosines)
    images, captions = torch.tensor([4, 0, 0, 2]), torch.tensor([1, 1, 3, 0])
    pairs = exact.pairs(*embedded[:3], images, captions, embedded.real)
    torch.testing.assert_close(pairs, expected[images, captions])
    kept = embedded.regions[..., :12]  # what an index holds
    pairs = exact.own.pairs(kept, *embedded[1:3], images, captions, embedded.real)
    torch.testing.assert_close(pairs, xdim[images, captions])
    torch.testing.assert_close(exact.own.all_pairs(kept, exact.own.captions(*embedded[1:3]), embedded.real), xdim)


@pytest.mark.parametrize("loss", [hinge, hinge_all, ramped])
@pytest.mark.parametrize("engine", ["tiled", "plain"])
@pytest.mark.parametrize("image_of", [None, [0, 1, 0, 2, 1]])
def test_the_loss_is_that_of_both_scores_and_of_the_ranking_with_its_gradients(engine, loss, image_of):
    (similarity, head, combined), embedded = parts(engine), masked()
    image_of = None if image_of is None else torch.tensor(image_of)
    ours, _ = batch_loss(combined, embedded, loss, 0.2, image_of=image_of)
    xdim, cosines = apart(similarity, head, embedded)
    scores = xdim + head.log_weight.exp() * cosines
    left_out = torch.zeros(5, 5, dtype=torch.bool)
    if image_of is not None:
        left_out = (image_of[:, None] == image_of) & ~torch.eye(5, dtype=torch.bool)
        scores, cosines = scores.masked_fill(left_out, -math.inf), cosines.masked_fill(left_out, -math.inf)
    expected = loss(scores, 0.2) + 0.3 * loss(cosines, 0.2) + 0.2 * divergence(cosines, scores.detach(), left_out)
    torch.testing.assert_close(ours, expected)
    leaves = [embedded.regions, embedded.words, *similarity.parameters(), *head.parameters()]
    for one, other in zip(*(torch.autograd.grad(value, leaves) for value in (ours, expected)), strict=True):
        torch.testing.assert_close(one, other)


def divergence(scores, teacher, left_out, temperature=0.4):
    """Query by query, over its negatives alone."""
    kept, total = ~left_out & ~torch.eye(len(scores), dtype=torch.bool), 0
    scores, teacher = scores / temperature, 2 * teacher / teacher[kept].std(correction=0)
    for way, taught, among in ((scores, teacher, kept), (scores.T, teacher.T, kept.T)):
        for ours, wanted, negatives in zip(way, taught, among, strict=True):
            p, q = (one[negatives].softmax(dim=0) for one in (wanted, ours))
            total = total + (p * (p.log() - q.log())).sum()
    return total


def test_a_query_without_negatives_is_taught_nothing_and_equal_rankings_cost_nothing():
    scores = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    alone = torch.full((3, 3), -math.inf, dtype=torch.float64).fill_diagonal_(1.0)
    taught = rank_distillation(scores, alone, 0.1)
    assert taught == 0
    assert not torch.autograd.grad(taught, scores)[0].any()
    spread = scores.detach()[~torch.eye(3, dtype=torch.bool)].std(correction=0).item()
    assert rank_distillation(scores, 5 * scores.detach(), spread / 2).abs() < 1e-12  # at this temperature


def test_every_model_has_one_vector_a_side_and_one_that_pools_takes_no_head():
    assert registry.describe({"global_head": "gpo:distill=0.0"})["global_head"]["options"] == {"distill": 0.0}
    assert "global_head" not in registry.describe({})
    with pytest.raises(ValueError, match="--global_head: --similarity gpo is one vector a side itself"):
        registry.describe({"global_head": "gpo", "similarity": "gpo"})
    with pytest.raises(ValueError, match="weight and temperature must be above 0"):
        registry.build("global_head", {"name": "gpo", "options": {"weight": 0.0}}, 12)
