"""AdamW as published, and its state across a resume."""

import copy

import pytest
import torch

from lib.checkpoints.native import new_model
from lib.training.optim import build_optimizer, restore_optimizer, set_learning_rate
from tests.conftest import TINY_BERT

RATE = 5e-4


@pytest.fixture
def model():
    torch.manual_seed(0)
    return new_model({"bert": str(TINY_BERT), "bert_from_scratch": True, "img_dim": 8, "embed_size": 8})[0]


def rates(model, optimizer):
    """The rate of each parameter by name; each is in one group."""
    of = [(id(parameter), group["lr"]) for group in optimizer.param_groups for parameter in group["params"]]
    assert len(of) == len(dict(of)) == len(list(model.parameters()))
    return {name: dict(of)[id(parameter)] for name, parameter in model.named_parameters()}


def take_steps(model, optimizer, first, last):
    """Steps with gradients that only the step's number decides."""
    for step in range(first, last):
        torch.manual_seed(step)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()


@pytest.mark.parametrize(("epoch", "factor"), [(0, 1.0), (14, 1.0), (15, 0.1), (29, 0.1)])
def test_the_rate_falls_to_a_tenth_at_lr_update_and_the_text_backbone_has_a_tenth_of_it(model, epoch, factor):
    optimizer = build_optimizer(model, RATE)
    assert set_learning_rate(optimizer, epoch, RATE, lr_update=15) == pytest.approx(factor * RATE)
    for name, rate in rates(model, optimizer).items():
        assert rate == pytest.approx(factor * RATE * (0.1 if ".backbone." in name else 1))


def test_weight_decay_shrinks_every_parameter_and_adamws_other_settings_are_pytorchs(model):
    optimizer = build_optimizer(model, RATE)
    set_learning_rate(optimizer, 0, RATE, lr_update=15)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, rate in rates(model, optimizer).items():
        expected = before[name] * (1 - rate * 1e-4)
        torch.testing.assert_close(model.get_parameter(name).detach(), expected, rtol=1e-7, atol=0)
    defaults = torch.optim.AdamW([torch.zeros(1)]).defaults
    for group in optimizer.param_groups:
        assert all(group[name] == defaults[name] for name in ("betas", "eps", "amsgrad"))


@pytest.mark.parametrize("fused", [True, False])
def test_a_restored_optimiser_continues_to_the_bit_and_one_that_was_not_fused_within_rounding(model, fused):
    other = copy.deepcopy(model)
    optimizer, restored = build_optimizer(model, RATE), build_optimizer(other, RATE)
    for group in optimizer.param_groups:
        group["fused"] = fused
    take_steps(model, optimizer, 0, 3)
    other.load_state_dict(model.state_dict())
    restore_optimizer(restored, copy.deepcopy(optimizer.state_dict()))
    assert all(group["fused"] for group in restored.param_groups)
    take_steps(model, optimizer, 3, 5)
    take_steps(other, restored, 3, 5)
    tolerance = {"rtol": 0, "atol": 0} if fused else {"rtol": 1e-5, "atol": 1e-7}
    for ours, theirs in zip(other.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state["state"][0].update(exp_avg=torch.zeros(3)),
        lambda state: state["state"][0].pop("exp_avg_sq"),
        lambda state: state["state"][0].update(step=torch.zeros(2)),
        lambda state: state["state"][0].update(exp_avg="moment"),
        lambda state: state["state"].update({10_000: state["state"][0]}),
        lambda state: state["param_groups"][0]["params"].pop(),
    ],
)
def test_a_state_that_does_not_fit_the_parameters_is_refused_and_its_groups_numbers_are_not_taken(model, change):
    optimizer = build_optimizer(model, RATE)
    take_steps(model, optimizer, 0, 1)
    state = copy.deepcopy(optimizer.state_dict())
    for group in state["param_groups"]:
        group.update(amsgrad=True, lr="fast", weight_decay=1e9)
    restored = build_optimizer(model, RATE)
    restore_optimizer(restored, copy.deepcopy(state))
    assert all(group["amsgrad"] is False and group["weight_decay"] == 1e-4 for group in restored.param_groups)
    change(state)
    with pytest.raises((ValueError, LookupError, AttributeError, TypeError)):
        restore_optimizer(restored, state)
