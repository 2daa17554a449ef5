import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from lib.losses import hinge, hinge_all, loss_of_epoch, ramped, violations
from lib.model import registry
from lib.model.engine import Embedded, autograd, make_engine
from lib.training.loop import batch_loss


@pytest.mark.parametrize(("loss", "name"), [(hinge_all, "sum"), (hinge, "max")])
def test_loss_and_gradient_equal_the_published_code(golden, loss, name):
    figures = golden("hinge_loss")
    scores = torch.from_numpy(figures["scores"]).requires_grad_()
    value = loss(scores, 0.2)
    value.backward()
    assert value.item() == pytest.approx(float(figures[f"loss.{name}"]), rel=1e-12)
    torch.testing.assert_close(scores.grad, torch.from_numpy(figures[f"grad.{name}"]), rtol=0, atol=1e-12)


def plain_loss(scores, margin, hardest):
    total, batch = 0.0, len(scores)
    for i in range(batch):
        row = [max(0.0, margin + scores[i][j] - scores[i][i]) for j in range(batch) if j != i]
        column = [max(0.0, margin + scores[j][i] - scores[i][i]) for j in range(batch) if j != i]
        total += max(row) + max(column) if hardest else sum(row) + sum(column)
    return total


squares = st.integers(2, 7).flatmap(lambda n: hnp.arrays("float64", (n, n), elements=st.floats(-2, 2)))


@settings(deadline=None)
@given(squares, st.floats(0.01, 1), st.booleans())
def test_loss_equals_the_sum_written_out(scores, margin, hardest):
    loss = (hinge if hardest else hinge_all)(torch.from_numpy(scores), margin).item()
    assert loss == pytest.approx(plain_loss(scores.tolist(), margin, hardest), abs=1e-9)


def plain_ramped_loss(scores, margin):
    """With its gradient in the scores, a step of the loss at a time."""
    batch, total, gradient = len(scores), 0.0, np.zeros_like(scores)
    for way, of in ((scores, gradient), (scores.T, gradient.T)):
        wins = [all(way[i, j] < way[i, i] for j in range(batch) if j != i) for i in range(batch)]
        recall = sum(wins) / batch
        for i in range(batch):
            losses = {j: margin + way[i, j] - way[i, i] for j in range(batch) if j != i}
            violated = {j: loss for j, loss in losses.items() if loss > 0}
            if not violated:
                continue
            hardest = max(violated, key=violated.get)
            total += recall * violated[hardest] + (1 - recall) * sum(violated.values()) / len(violated)
            for j in violated:
                weight = recall * (j == hardest) + (1 - recall) / len(violated)
                of[i, j] += weight
                of[i, i] -= weight
    return total, gradient


@settings(deadline=None)
@given(squares, st.floats(0.01, 1))
def test_ramped_loss_equals_its_formula_written_out(scores, margin):
    loss = ramped(torch.from_numpy(scores), margin).item()
    assert loss == pytest.approx(plain_ramped_loss(scores, margin)[0], abs=1e-9)


@pytest.mark.parametrize("size", [2, 5, 9])
def test_ramped_gradient_equals_its_formula_written_out(size):
    scores = np.random.default_rng(size).normal(size=(size, size)) * 0.2 + 0.3 * np.eye(size)
    leaf = torch.from_numpy(scores).requires_grad_()
    ramped(leaf, 0.2).backward()
    np.testing.assert_allclose(leaf.grad.numpy(), plain_ramped_loss(scores, 0.2)[1], rtol=0, atol=1e-12)


def test_ramped_loss_pulls_equal_scores_apart_with_every_negative():
    scores = torch.full((5, 5), 0.7, dtype=torch.float64, requires_grad=True)
    ramped(scores, 0.2).backward()
    expected = torch.full((5, 5), 2 / 4, dtype=torch.float64).fill_diagonal_(-2)
    torch.testing.assert_close(scores.grad, expected)


def loss_without_same_image(scores, margin, image_of, loss):
    """Query by query, over the negatives of other images alone."""
    total = 0
    for way in (scores, scores.T):
        queries = [(row[image_of != image_of[i]], row[i]) for i, row in enumerate(way)]
        recall = sum(bool((negatives < true).all()) for negatives, true in queries) / len(queries)
        for negatives, true in queries:
            violated = (margin + negatives - true).clamp(min=0)
            hardest = torch.cat([violated, true.new_zeros(1)]).max()
            by_recall = recall * hardest + (1 - recall) * violated.sum() / max((violated > 0).sum(), 1)
            total = total + {hinge_all: violated.sum(), hinge: hardest, ramped: by_recall}[loss]
    return total


@pytest.mark.parametrize("loss", [hinge_all, hinge, ramped])
@pytest.mark.parametrize(("engine", "few_pairs"), [("plain", 0), ("tiled", 0), ("tiled", 1)])
@pytest.mark.parametrize("images", [[0, 1, 0, 2, 3, 0, 2, 4], [5] * 8, list(range(8))])
def test_captions_of_an_image_can_be_left_out_of_its_negatives(monkeypatch, double, loss, engine, few_pairs, images):
    """Values and gradients; whether all pairs or those with a gradient are differentiated."""
    monkeypatch.setitem(autograd.FEW_PAIRS, "cpu", few_pairs)
    torch.manual_seed(0)
    similarity = registry.build("similarity", registry.describe({})["similarity"], 6)
    lengths, image_of = torch.tensor([2, 5, 1, 3, 3, 2, 4, 1]), torch.tensor(images)
    leaves = [torch.randn(8, 4, 6, requires_grad=True), torch.randn(int(lengths.sum()), 6, requires_grad=True)]
    embedded = Embedded(*leaves, lengths)
    ours, spread = batch_loss(make_engine(engine, similarity), embedded, loss, 0.2, image_of=image_of)
    whole = similarity(*embedded).std() if loss is not hinge_all else torch.tensor(torch.nan)  # pairwise: never whole
    torch.testing.assert_close(spread, whole.detach(), equal_nan=True)
    expected = loss_without_same_image(similarity(*embedded), 0.2, image_of, loss)
    torch.testing.assert_close(ours, expected)
    if images == [5] * 8:
        assert ours == 0
        return
    leaves += similarity.parameters()
    both = (torch.autograd.grad(one, leaves, materialize_grads=True) for one in (ours, expected))
    for one, other in zip(*both, strict=True):
        torch.testing.assert_close(one, other)


def test_all_negatives_are_taken_pair_by_pair_and_a_loss_is_given_no_option_that_it_does_not_have():
    assert loss_of_epoch({"name": "hinge", "options": {}}, 0, 1).pairwise.func is violations
    assert not hasattr(loss_of_epoch({"name": "hinge", "options": {}}, 1, 1), "pairwise")
    with pytest.raises(ValueError, match="--loss ramped: has no option 'x'"):
        loss_of_epoch({"name": "ramped", "options": {"x": 1}}, 0, 1)


def test_options_reach_a_losses_pairwise_form_and_the_warm_up_that_takes_them(monkeypatch):
    def pairs(scores, true_of_images, true_of_captions, margin, scale=1.0):
        return scale * violations(scores, true_of_images, true_of_captions, margin)

    def scaled(scores, margin, scale=1.0):
        return scale * hinge_all(scores, margin)

    vars(scaled).update(pairwise=pairs, warmup=hinge)
    monkeypatch.setattr("lib.model.registry.find", lambda *_: scaled)
    part, scores = {"name": "scaled", "options": {"scale": 3}}, torch.randn(4, 4)
    true = scores.diagonal()
    pairwise = loss_of_epoch(part, 1, 1).pairwise(scores, true[:, None], true, 0.2).fill_diagonal_(0).sum()
    torch.testing.assert_close(pairwise, loss_of_epoch(part, 1, 1)(scores, 0.2))
    torch.testing.assert_close(pairwise, 3 * hinge_all(scores, 0.2))
    assert loss_of_epoch(part, 0, 1)(scores, 0.2) == hinge(scores, 0.2)
