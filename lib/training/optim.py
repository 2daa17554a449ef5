"""The published optimiser: AdamW, the text backbone at a tenth of the rate, which is a function of the epoch."""

from typing import Any

import torch

from lib.model.xdim import XDim

WEIGHT_DECAY = 1e-4
BACKBONE_FACTOR = 0.1  # of the learning rate, for the text backbone
ALL_STAGES = 1_000
ENCODER_FACTORS = {"torchvision": 0.01, "hf": 0.1}  # of the learning rate, for a vision model
DECAY_FACTOR = 0.1  # of the learning rate, from epoch --lr_update on
MOMENTS = ("exp_avg", "exp_avg_sq")


def build_optimizer(model: XDim, learning_rate: float, encoder_lr: float = 0.0) -> torch.optim.AdamW:
    """AdamW over all parameters: the rest, the text backbone and, at encoder_lr times the rate, any vision model.

    Weight decay applies to each, the gate's too; frozen parameters have no gradient and stay as they are.
    """
    groups: list[dict[str, Any]] = [
        {"params": list(model.text_encoder.backbone_parameters()), "factor": BACKBONE_FACTOR}
    ]
    if model.vision:
        groups.append({"params": list(model.vision.parameters()), "factor": encoder_lr, "warms_up": True})
    grouped = {id(parameter) for group in groups for parameter in group["params"]}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in grouped]
    groups.insert(0, {"params": rest, "factor": 1.0})
    # On a CPU at BERT-base's size fused is 7 times faster than foreach
    return torch.optim.AdamW(groups, lr=learning_rate, weight_decay=WEIGHT_DECAY, fused=True)


def restore_optimizer(optimizer: torch.optim.AdamW, state: dict) -> None:
    """Load a checkpoint's moments and steps; what the groups' numbers are is not the checkpoint's to say.

    Raises ValueError where they are not those of the parameters: fused AdamW would read beyond their memory.
    """
    groups, moments = optimizer.state_dict()["param_groups"], state["state"]
    sizes, wanted = ([len(group["params"]) for group in each] for each in (state["param_groups"], groups))
    if sizes != wanted:
        raise ValueError(f"groups of {sizes} parameters, expected {wanted}")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if strangers := moments.keys() - set(range(len(parameters))):
        raise ValueError(f"moments of a parameter {next(iter(strangers))}, which there is not")
    for number, entry in moments.items():
        like = parameters[number]
        tensors = [entry[name] for name in MOMENTS] + [torch.as_tensor(entry["step"])]
        for tensor, shape in zip(tensors, (like.shape, like.shape, ()), strict=True):
            if tensor.shape != shape or not tensor.is_floating_point():
                raise ValueError(
                    f"moments of parameter {number} of shape {tuple(tensor.shape)}, expected {tuple(shape)}"
                )
    kept = {number: {name: entry[name] for name in (*MOMENTS, "step")} for number, entry in moments.items()}
    optimizer.load_state_dict({"state": kept, "param_groups": groups})


def set_learning_rate(
    optimizer: torch.optim.Optimizer, epoch: int, learning_rate: float, lr_update: int, warmth: float = 1.0
) -> float:
    """Set the rate of an epoch (from 0): a tenth from epoch `lr_update` on, however the run got there. Returns it.

    warmth: share of its rate that the vision model has.
    """
    rate = learning_rate * (DECAY_FACTOR if epoch >= lr_update else 1.0)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"] * (warmth if group.get("warms_up") else 1.0)
    return rate


def thawed_stages(epoch: int, freeze_epochs: int, thaw_epochs: int) -> int:
    """How many of the vision model's stages train in an epoch (from 0), from the top: none in the first epochs, then
    one, and one more every `thaw_epochs`, or all at once where that is 0.
    """
    if epoch < freeze_epochs:
        return 0
    return 1 + (epoch - freeze_epochs) // thaw_epochs if thaw_epochs else ALL_STAGES
