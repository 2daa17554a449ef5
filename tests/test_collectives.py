"""The collectives give every process the single process's values, and gradients that add up to the single process's."""

import torch

from lib import distributed
from lib.collectives import shard
from lib.model.layers import Shard
from tests.ranks import run_ranks

PAIRS = 7  # 2, 2 and 3 for three processes
ROWS = torch.arange(2.0 * PAIRS).view(PAIRS, 2)


def model(rows, weight, batch):
    """Embeddings whose mean is taken over all pairs, own rows scored against everybody's, one loss of all scores."""
    own = rows * weight
    own = own - batch.sum_inputs(own.sum(dim=0)) / batch.total
    columns = batch.gather_inputs(own.sin(), batch.sizes)
    return batch.gather_outputs((own @ columns.T).square().sum(dim=1), batch.sizes).logsumexp(dim=0)


def loss_and_gradient(batch):
    weight = torch.tensor([0.1, 0.2], requires_grad=True)
    loss = model(ROWS[batch.own], weight, batch)
    loss.backward()
    return loss.detach(), batch.sum(weight.grad)


def of_a_rank():
    with distributed.joined(torch.device("cpu")):
        batch = shard(PAIRS)
        return (*loss_and_gradient(batch), batch.gather(ROWS[batch.own], batch.sizes), batch.sizes)


def test_three_processes_compute_the_loss_and_gradient_of_one():
    loss, gradient = loss_and_gradient(Shard(PAIRS))
    for outcome in run_ranks(of_a_rank, 3):
        torch.testing.assert_close(outcome.value[:3], (loss, gradient, ROWS))
        assert outcome.value[3] == [2, 2, 3]
