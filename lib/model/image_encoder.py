"""Region features to region embeddings (paper, section 3.1)."""

import torch
from torch import Tensor, nn

from lib.model.batch_norm import BatchNorm
from lib.model.norm import l2_normalize


class ImageEncoder(nn.Module):
    """A linear layer plus a two-layer MLP with BatchNorm over all regions, then L2 normalisation of each region."""

    def __init__(self, img_dim: int, embed_size: int, normalize: bool = True):
        super().__init__()
        self.normalize = normalize
        self.linear = nn.Linear(img_dim, embed_size)
        self.mlp = nn.Sequential(
            nn.Linear(img_dim, embed_size // 2),
            BatchNorm(embed_size // 2),
            nn.ReLU(),
            nn.Linear(embed_size // 2, embed_size),
        )
        nn.init.xavier_uniform_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Region embeddings (..., D) of features (..., img_dim), over all of which BatchNorm takes its statistics."""
        rows = features.flatten(0, -2)
        embedded = self.linear(rows) + self.mlp(rows)
        if self.normalize:
            embedded = l2_normalize(embedded)
        else:
            embedded = embedded.to(torch.promote_types(embedded.dtype, torch.float32))
        return embedded.view(*features.shape[:-1], -1)
