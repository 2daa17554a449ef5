"""X-Dim: "Unlocking the Power of Cross-Dimensional Semantic Dependency for Image-Text Matching" (ACM MM 2023).

Regions and words are embedded in D shared dimensions; a learned sparse matrix says which dimensions depend on each
other; images and captions are compared by groups of dependent dimensions. The formulas are the paper's; how they are
computed differs (see similarity.py).
"""

from torch import Tensor, nn
from transformers import BertModel

from lib.model.image_encoder import ImageEncoder
from lib.model.regions import pad_regions, real_regions
from lib.model.similarities import make_similarity, takes_unit_vectors
from lib.model.text_encoder import TextEncoder


class XDim(nn.Module):
    """The whole model: two encoders and the similarity.

    bert: the language model to build on (without its pooling layer). img_dim: numbers of a region feature.
    embed_size: shared dimensions D. normalize_regions, normalize_words: L2-normalise each embedding (--no_imgnorm,
    --no_txtnorm switch it off), where the similarity takes unit vectors. mask_padding: in training, keep padding
    regions out of the attention and of BatchNorm. similarity, gate: names in similarities.py.
    """

    def __init__(
        self,
        bert: BertModel,
        img_dim: int = 2048,
        embed_size: int = 1024,
        normalize_regions: bool = True,
        normalize_words: bool = True,
        mask_padding: bool = False,
        similarity: str = "xdim",
        gate: str = "adaptive",
    ):
        super().__init__()
        self.mask_padding = mask_padding
        unit = takes_unit_vectors(similarity)
        self.image_encoder = ImageEncoder(img_dim, embed_size, normalize_regions and unit)
        self.text_encoder = TextEncoder(bert, embed_size, normalize_words and unit)
        self.similarity = make_similarity(similarity, embed_size, gate)

    def forward(self, features: Tensor, counts: Tensor, ids: Tensor, lengths: Tensor) -> Tensor:
        """Scores (B, B) of all images against all captions of a batch.

        features: (n, img_dim) of all regions, one image after the other. counts: (B,) regions of each image, on the
        CPU. ids: (B, N) token ids, padded with 0. lengths: (B,) tokens of each caption.
        """
        return self.similarity(*self.embed(features, counts, ids, lengths))

    def embed(
        self, features: Tensor, counts: Tensor, ids: Tensor, lengths: Tensor, longest: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """What the similarity takes of a batch: region and word embeddings, lengths, and which regions take part.

        longest: regions that images are padded to, of a batch that several processes share; else the largest count.
        """
        if self.training and not self.mask_padding:  # as published: padding regions are zeros that become unit vectors
            regions, real = self.image_encoder(pad_regions(features, counts, longest)), None
        else:
            regions, real = pad_regions(self.encode_images(features), counts), real_regions(counts, features.device)
        return regions, self.encode_captions(ids, lengths), lengths, real

    def encode_images(self, features: Tensor) -> Tensor:
        """Region embeddings (n, D) of features (n, img_dim), none of which is padding."""
        return self.image_encoder(features)

    def encode_captions(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Word embeddings (W, D), packed, of token ids (C, N)."""
        return self.text_encoder(ids, lengths)

    def parameter_counts(self) -> dict[str, int]:
        """Number of parameters of each part."""
        parts = {
            "image encoder": self.image_encoder,
            "BERT": self.text_encoder.bert,
            "text projection": self.text_encoder.linear,
            "similarity": self.similarity,
        }
        return {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
