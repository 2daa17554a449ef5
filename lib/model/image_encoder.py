"""Region features to region embeddings (paper, section 3.1)."""

import torch
from torch import Tensor, nn

from lib.model.norm import l2_normalize


class ImageEncoder(nn.Module):
    """A linear layer plus a two-layer MLP with BatchNorm over all regions, then L2 normalisation of each region."""

    def __init__(self, img_dim: int, embed_size: int, normalize: bool = True):
        super().__init__()
        self.normalize = normalize
        self.linear = nn.Linear(img_dim, embed_size)
        self.mlp = nn.Sequential(
            nn.Linear(img_dim, embed_size // 2),
            nn.BatchNorm1d(embed_size // 2),
            nn.ReLU(),
            nn.Linear(embed_size // 2, embed_size),
        )
        nn.init.xavier_uniform_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Tensor, real: Tensor | None = None) -> Tensor:
        """Embed regions.

        features: (B, R, img_dim). real: (B, R), true where a region is no padding; None: every row takes part, padding
        too, as in the published training, where padding rows become unit vectors through the bias.
        Returns (B, R, D); rows that are not real are zero and outside BatchNorm's statistics.
        """
        if real is None:
            return self._embed(features.flatten(0, 1)).view(*features.shape[:2], -1)
        embedded = self._embed(features[real])
        return embedded.new_zeros(*features.shape[:2], embedded.shape[-1]).masked_scatter(real[..., None], embedded)

    def _embed(self, rows: Tensor) -> Tensor:  # (rows, img_dim) -> (rows, D)
        embedded = self.linear(rows) + self.mlp(rows)
        return (
            l2_normalize(embedded)
            if self.normalize
            else embedded.to(torch.promote_types(embedded.dtype, torch.float32))
        )
