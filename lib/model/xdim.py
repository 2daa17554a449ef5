"""X-Dim: "Unlocking the Power of Cross-Dimensional Semantic Dependency for Image-Text Matching" (ACM MM 2023).

Regions and words are embedded in D shared dimensions; a learned sparse matrix says which dimensions depend on each
other; images and captions are compared by groups of dependent dimensions. The formulas are the paper's; how they are
computed differs (see similarity.py).
"""

import torch
from torch import Tensor, nn
from transformers import BertModel

from lib.model.image_encoder import ImageEncoder
from lib.model.similarity import Similarity
from lib.model.text_encoder import TextEncoder


class XDim(nn.Module):
    """The whole model: two encoders and the similarity.

    bert: the language model to build on (without its pooling layer). img_dim: numbers of a region feature.
    embed_size: shared dimensions D. normalize_regions, normalize_words: L2-normalise each embedding (--no_imgnorm,
    --no_txtnorm switch it off). mask_padding: keep padding regions out of the attention and of BatchNorm.
    """

    def __init__(
        self,
        bert: BertModel,
        img_dim: int = 2048,
        embed_size: int = 1024,
        normalize_regions: bool = True,
        normalize_words: bool = True,
        mask_padding: bool = False,
    ):
        super().__init__()
        self.mask_padding = mask_padding
        self.image_encoder = ImageEncoder(img_dim, embed_size, normalize_regions)
        self.text_encoder = TextEncoder(bert, embed_size, normalize_words)
        self.similarity = Similarity(embed_size)

    def forward(self, features: Tensor, counts: Tensor, ids: Tensor, lengths: Tensor) -> Tensor:
        """Scores (B, B) of all images against all captions of a batch.

        features: (B, R, img_dim), padded with zero rows. counts: (B,) real regions of each image.
        ids: (B, N) token ids, padded with 0. lengths: (B,) tokens of each caption.
        """
        return self.similarity(*self.embed(features, counts, ids, lengths))

    def embed(
        self, features: Tensor, counts: Tensor, ids: Tensor, lengths: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """What the similarity takes of a batch: region and word embeddings, lengths, and which regions take part."""
        regions, words = self.encode_images(features, counts), self.encode_captions(ids, lengths)
        return regions, words, lengths, self._real(features, counts)

    def encode_images(self, features: Tensor, counts: Tensor) -> Tensor:
        """Region embeddings (B, R, D) of features (B, R, img_dim)."""
        return self.image_encoder(features, self._real(features, counts))

    def encode_captions(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Word embeddings (W, D), packed, of token ids (C, N)."""
        return self.text_encoder(ids, lengths)

    def _real(self, features: Tensor, counts: Tensor) -> Tensor | None:
        """Which regions take part, (B, R); None where all do."""
        if not self.mask_padding:
            return None
        return torch.arange(features.shape[1], device=features.device) < counts[:, None]

    def parameter_counts(self) -> dict[str, int]:
        """Number of parameters of each part."""
        parts = {
            "image encoder": self.image_encoder,
            "BERT": self.text_encoder.bert,
            "text projection": self.text_encoder.linear,
            "dependency gate": self.similarity,
        }
        return {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
