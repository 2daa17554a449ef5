"""The one way vectors are normalised in X-Dim."""

import torch
from torch import Tensor

EPSILON = 1e-8


def l2_normalize(vectors: Tensor) -> Tensor:
    """x / (||x|| + 1e-8) over the last dimension, in float32 at least whatever autocast made of the input."""
    vectors = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
    return vectors / (vectors.norm(dim=-1, keepdim=True) + EPSILON)
