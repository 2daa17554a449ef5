"""The adaptive sparse probabilistic gate: which dimensions depend on which (paper, section 3.2)."""

import math

import torch
from torch import Tensor, nn

from lib.model.norm import l2_normalize

# tanh(exp(x)) is 1 in every precision long before x = 20; beyond it exp overflows in the backward pass.
MAX_EXPONENT = 20.0


class DependencyGate(nn.Module):
    """Learned dependency matrix of the shared dimensions.

    P = sigmoid(E), the joint probabilities; a row's threshold is its mean plus `threshold_scale` standard deviations;
    M = tanh(exp(sharpness * (P - threshold))) opens where P lies above the threshold.
    """

    def __init__(self, embed_size: int):
        super().__init__()
        self.joint_logits = nn.Parameter(torch.randn(embed_size, embed_size))  # E
        self.threshold_scale = nn.Parameter(torch.normal(2.5, 0.1, (embed_size,)))  # lambda
        self.log_sharpness = nn.Parameter(torch.tensor(4.0))

    def mask(self) -> tuple[Tensor, Tensor]:
        """The soft sparse mask M and the joint probabilities P, each (D, D), row i = dimension i."""
        probabilities = self.joint_logits.sigmoid()
        std, mean = torch.std_mean(probabilities, dim=1)
        threshold = (mean + self.threshold_scale * std)[:, None]
        exponent = self.log_sharpness.exp() * (probabilities - threshold)
        return exponent.clamp(max=MAX_EXPONENT).exp().tanh(), probabilities

    def forward(self) -> Tensor:
        """The dependency matrix (D, D): M * P with L2-normalised rows."""
        mask, probabilities = self.mask()
        return l2_normalize(mask * probabilities)

    @torch.no_grad()
    def sparsity(self) -> float:
        """Share of the mask's entries that are closed (below a half)."""
        mask, _ = self.mask()
        return (mask < 0.5).float().mean().item()


def initial_log_temperature() -> Tensor:
    """ln(1 / 0.07), where the attention's inverse temperature starts."""
    return torch.tensor(math.log(1 / 0.07))
