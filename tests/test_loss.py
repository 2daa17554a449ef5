import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from lib.loss import hinge_triplet_loss


@pytest.mark.parametrize(("hardest", "name"), [(False, "sum"), (True, "max")])
def test_loss_and_gradient_equal_the_published_code(golden, hardest, name):
    figures = golden("hinge_loss")
    scores = torch.from_numpy(figures["scores"]).requires_grad_()
    loss = hinge_triplet_loss(scores, 0.2, hardest)
    loss.backward()
    assert loss.item() == pytest.approx(float(figures[f"loss.{name}"]), rel=1e-12)
    torch.testing.assert_close(scores.grad, torch.from_numpy(figures[f"grad.{name}"]), rtol=0, atol=1e-12)


def plain_loss(scores, margin, hardest):
    total, batch = 0.0, len(scores)
    for i in range(batch):
        row = [max(0.0, margin + scores[i][j] - scores[i][i]) for j in range(batch) if j != i]
        column = [max(0.0, margin + scores[j][i] - scores[i][i]) for j in range(batch) if j != i]
        total += max(row) + max(column) if hardest else sum(row) + sum(column)
    return total


@settings(deadline=None)
@given(
    st.integers(2, 7).flatmap(lambda n: hnp.arrays("float64", (n, n), elements=st.floats(-2, 2))),
    st.floats(0.01, 1),
    st.booleans(),
)
def test_loss_equals_the_sum_written_out(scores, margin, hardest):
    loss = hinge_triplet_loss(torch.from_numpy(scores), margin, hardest).item()
    assert loss == pytest.approx(plain_loss(scores.tolist(), margin, hardest), abs=1e-9)
