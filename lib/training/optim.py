"""The published optimiser: AdamW, the text backbone at a tenth of the rate, which is a function of the epoch."""

from typing import Any

import torch

from lib.model.xdim import XDim

WEIGHT_DECAY = 1e-4
BACKBONE_FACTOR = 0.1  # of the learning rate, for the text backbone
DECAY_FACTOR = 0.1  # of the learning rate, from epoch --lr_update on
# On a CPU at BERT-base's size fused is 7 times faster than foreach.
IMPLEMENTATION: dict[str, Any] = {"fused": True, "foreach": None}


def build_optimizer(model: XDim, learning_rate: float) -> torch.optim.AdamW:
    """AdamW over all parameters in two groups, backbone and rest; weight decay applies to each, the gate's too."""
    backbone = list(model.text_encoder.backbone_parameters())
    of_backbone = {id(parameter) for parameter in backbone}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in of_backbone]
    groups = [{"params": rest, "factor": 1.0}, {"params": backbone, "factor": BACKBONE_FACTOR}]
    return torch.optim.AdamW(groups, lr=learning_rate, weight_decay=WEIGHT_DECAY, **IMPLEMENTATION)


def restore_optimizer(optimizer: torch.optim.AdamW, state: dict) -> None:
    """Load a checkpoint's state, also one that another implementation of AdamW wrote."""
    groups = [{**group, **IMPLEMENTATION} for group in state["param_groups"]]  # load_state_dict takes it from the state
    optimizer.load_state_dict({**state, "param_groups": groups})


def set_learning_rate(optimizer: torch.optim.Optimizer, epoch: int, learning_rate: float, lr_update: int) -> float:
    """Set the rate of an epoch (from 0): a tenth from epoch `lr_update` on, however the run got there. Returns it."""
    rate = learning_rate * (DECAY_FACTOR if epoch >= lr_update else 1.0)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]
    return rate
