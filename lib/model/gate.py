"""The adaptive sparse probabilistic gate: which dimensions depend on which (paper, section 3.2), and its ablations."""

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

    diagonal = False  # whether norms take K = D^T D for its diagonal
    start = 2.5  # of lambda

    def __init__(self, embed_size: int):
        super().__init__()
        self.joint_logits = nn.Parameter(torch.randn(embed_size, embed_size))  # E
        self.threshold_scale = nn.Parameter(torch.normal(self.start, 0.1, (embed_size,)))  # lambda
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
    def figures(self) -> dict[str, float]:
        """For logs.

        sparsity: share of the mask's entries that are closed (below a half). open_rows: share of rows with one that is
        not. closed_rows: share of rows of D with a norm below a half, which lie so far below their threshold that the
        normalisation's guard against a division by zero has closed them. partners: dimensions that a row of D is made
        of, (sum of squares)^2 / sum of fourth powers, the mean over the other rows; 0 where there are none. threshold:
        mean of lambda. sharpness: the mask's.
        """
        mask, probabilities = self.mask()
        is_open = mask >= 0.5
        squares = l2_normalize(mask * probabilities).square()
        norms = squares.sum(dim=1)  # squared
        there = norms >= 0.25
        partners = norms[there].square() / squares[there].square().sum(dim=1)
        return {
            "sparsity": 1 - is_open.float().mean().item(),
            "open_rows": is_open.any(dim=1).float().mean().item(),
            "closed_rows": 1 - there.float().mean().item(),
            "partners": partners.mean().item() if there.any() else 0.0,
            "threshold": self.threshold_scale.mean().item(),
            "sharpness": self.log_sharpness.exp().item(),
        }


class OpenGate(DependencyGate):
    """Thresholds start within a sigmoid's reach, so that rows begin with some open entries; docs/training.md."""

    start = 1.5


class FixedGate(DependencyGate):
    """Thresholds stay where they start: lambda is not learned."""

    def __init__(self, embed_size: int):
        super().__init__(embed_size)
        self.threshold_scale.requires_grad_(False)


class DiagonalGate(DependencyGate):
    """Norms by the diagonal of D^T D alone: D multiply-adds for a word and an image instead of D^2 / 2."""

    diagonal = True


class DenseGate(nn.Module):
    """No mask: every dimension depends on every other one, D = P with L2-normalised rows."""

    diagonal = False

    def __init__(self, embed_size: int):
        super().__init__()
        self.joint_logits = nn.Parameter(torch.randn(embed_size, embed_size))  # E

    def forward(self) -> Tensor:
        """The dependency matrix (D, D)."""
        return l2_normalize(self.joint_logits.sigmoid())

    def figures(self) -> dict[str, float]:
        return {}


def initial_log_temperature() -> Tensor:
    """ln(1 / 0.07), where the attention's inverse temperature starts."""
    return torch.tensor(math.log(1 / 0.07))
