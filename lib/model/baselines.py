"""What X-Dim is compared with: gates that change one thing, aggregation without dependencies."""

import math

import torch
from torch import Tensor, nn

from lib.model.layers import l2_normalize
from lib.model.xdim import AdaptiveGate, XDimSimilarity


class OpenGate(AdaptiveGate):
    """Thresholds start within a sigmoid's reach, so that every row begins with some open entries (docs/training.md)."""

    def __init__(self, embed_size: int, start: float = 1.5):
        super().__init__(embed_size, start)


class FixedGate(AdaptiveGate):
    """Thresholds stay where they start: lambda is not learned."""

    def __init__(self, embed_size: int, start: float = 2.5):
        super().__init__(embed_size, start)
        self.threshold_scale.requires_grad_(False)


class DiagonalGate(AdaptiveGate):
    """Norms by the diagonal of D^T D alone: D multiply-adds for a word and an image instead of D^2 / 2."""

    diagonal = True


class UniformGate(nn.Module):
    """All dimensions depend on each other alike, and nothing is learned: D^T D is 1 on its diagonal and `correlation`
    elsewhere, so that an engine takes norms by two numbers (docs/gate.md).
    """

    diagonal = False
    ones: Tensor

    def __init__(self, embed_size: int, correlation: float = 0.08):
        super().__init__()
        if not 0 <= correlation < 1:
            raise ValueError(f"--gate uniform: correlation={correlation} is not from 0 to below 1")
        self.embed_size, self.correlation = embed_size, correlation
        self.register_buffer("ones", torch.ones(embed_size), persistent=False)

    def forward(self) -> Tensor:
        """The dependency matrix D (D, D), the symmetric square root of D^T D."""
        own = math.sqrt(1 - self.correlation)
        of_all = math.sqrt(1 - self.correlation + self.embed_size * self.correlation)
        return own * self.ones.diag() + (of_all - own) / self.embed_size

    def gram_rows(self, D: Tensor) -> Tensor:
        """D^T D as rows (2, D)."""
        return torch.stack([(1 - self.correlation) * self.ones, math.sqrt(self.correlation) * self.ones])

    def figures(self) -> dict[str, float]:
        """Nothing to log: nothing of it changes."""
        return {}


class DenseGate(nn.Module):
    """No mask: every dimension depends on every other one, D = P with L2-normalised rows."""

    diagonal = False

    def __init__(self, embed_size: int):
        super().__init__()
        self.joint_logits = nn.Parameter(torch.randn(embed_size, embed_size))  # E

    def forward(self) -> Tensor:
        """The dependency matrix D (D, D)."""
        return l2_normalize(self.joint_logits.sigmoid())

    def figures(self) -> dict[str, float]:
        """Nothing to log: it has no thresholds."""
        return {}


class IndependentSimilarity(XDimSimilarity):
    """The same attention, dimensions aggregated one by one: a word's score is the cosine of the word and its
    context.
    """

    diagonal = False

    def __init__(self, embed_size: int):
        nn.Module.__init__(self)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def dependency(self) -> None:
        """There is none."""
        return None

    def figures(self) -> dict[str, float]:
        """What the log says of the similarity."""
        return {"temperature": self.log_temperature.exp().item()}
