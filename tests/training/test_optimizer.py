import copy
import math

import pytest
import torch

from lib.checkpoints.native import new_model
from lib.training.collapse import WATCHED_STEPS, CollapseWatch
from lib.training.optimizer import build_optimizer, learning_rate_of, restore_optimizer, set_learning_rate
from tests.conftest import TINY_BERT


@pytest.fixture
def model():
    torch.manual_seed(0)
    return new_model({"bert": str(TINY_BERT), "img_dim": 8, "embed_size": 8})[0]


def test_bert_has_a_tenth_of_the_rate_and_every_parameter_is_in_one_group(model):
    optimizer = build_optimizer(model, 5e-4)
    set_learning_rate(optimizer, 5e-4)
    rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(rate) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        assert rate[id(parameter)] == pytest.approx(5e-5 if ".backbone." in name else 5e-4)


def test_weight_decay_shrinks_every_parameter_also_the_gate(model):
    optimizer = build_optimizer(model, 5e-4)
    set_learning_rate(optimizer, 5e-4)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        rate = 5e-5 if ".backbone." in name else 5e-4
        torch.testing.assert_close(parameter.detach(), before[name] * (1 - rate * 1e-4), rtol=1e-7, atol=0)


def test_adamw_keeps_pytorchs_other_defaults(model):
    defaults = torch.optim.AdamW([torch.zeros(1)]).defaults
    for group in build_optimizer(model, 5e-4).param_groups:
        assert (group["betas"], group["eps"], group["amsgrad"]) == (defaults["betas"], defaults["eps"], False)


def take_steps(model, optimizer, first, last):
    """Steps with gradients that only the step's number decides."""
    for step in range(first, last):
        torch.manual_seed(step)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()


def test_a_restored_optimiser_goes_on_to_the_bit(model):
    other = copy.deepcopy(model)
    optimizer, restored = build_optimizer(model, 5e-4), build_optimizer(other, 5e-4)
    take_steps(model, optimizer, 0, 3)
    other.load_state_dict(model.state_dict())
    restore_optimizer(restored, copy.deepcopy(optimizer.state_dict()))
    take_steps(model, optimizer, 3, 5)
    take_steps(other, restored, 3, 5)
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_the_state_of_an_unfused_adamw_goes_on_fused(model):
    other = copy.deepcopy(model)
    fused = build_optimizer(other, 5e-4)
    unfused = torch.optim.AdamW(
        [
            {k: v for k, v in group.items() if k in ("params", "factor")}
            for group in build_optimizer(model, 1).param_groups
        ],
        lr=5e-4,
        weight_decay=1e-4,
        fused=False,
    )
    take_steps(model, unfused, 0, 3)
    other.load_state_dict(model.state_dict())
    restore_optimizer(fused, copy.deepcopy(unfused.state_dict()))
    assert all(group["fused"] for group in fused.param_groups)
    take_steps(model, unfused, 3, 5)
    take_steps(other, fused, 3, 5)
    for one, its in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(its, one, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("epoch", "rate"), [(0, 1.0), (14, 1.0), (15, 0.1), (16, 0.1), (29, 0.1)])
def test_the_rate_is_a_function_of_the_epoch(epoch, rate):
    assert learning_rate_of(epoch, 1.0, 15) == pytest.approx(rate)


@pytest.mark.parametrize(("loss", "remedy"), [("hinge", "--loss ramped"), ("ramped", "--learning_rate")])
def test_scores_that_stay_equal_are_said_once_with_what_to_do(loss, remedy):
    watch = CollapseWatch(margin=0.2, loss=loss)
    said = [watch.warning(0.0199) for _ in range(WATCHED_STEPS + 20)]
    assert [i for i, text in enumerate(said) if text] == [WATCHED_STEPS - 1]
    assert remedy in said[WATCHED_STEPS - 1]


@pytest.mark.parametrize("now_and_then", [0.021, math.nan])
def test_scores_that_differ_or_were_not_all_computed_are_no_collapse(now_and_then):
    watch = CollapseWatch(margin=0.2, loss="hinge")
    spreads = [now_and_then, *[0.001] * (WATCHED_STEPS - 1)] * 9
    assert not any(watch.warning(spread) for spread in spreads)
