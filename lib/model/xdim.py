"""X-Dim: "Unlocking the Power of Cross-Dimensional Semantic Dependency for Image-Text Matching" (ACM MM 2023).

The page of the paper: the gate (section 3.2), the similarity as a plain formula (section 3.3), the model. Change the
formula here and train with `--engine plain`; the checkpoint is then evaluated with it too. The default engine
(lib/model/engine/) computes the formula as it stands now, faster, and does not follow your change. Symbols are the
paper's, shapes stand beside the lines that change them:

    B pairs of a batch    I images    R regions of an image    C captions    W words of a caption    D shared dimensions

In formulas D is the dependency matrix, (D, D), and C the attended context, (I, W, D), as in the paper.

Captions travel packed: the words of all captions one after the other (sum of W, D), with their lengths (C,).
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib.model import registry
from lib.model.backbone import checkpoint_activations
from lib.model.encoders import Pixels
from lib.model.engine import Embedded, make_engine
from lib.model.layers import EPSILON, Shard, at_least_float32, l2_normalize, real_rows
from lib.model.pooling import MeanPooling

# tanh(exp(x)) is 1 in every precision from x = 4 on; where exp(x) is infinite, its gradient is NaN.
MAX_EXPONENT = 20.0


class AdaptiveGate(nn.Module):
    """The adaptive sparse probabilistic gate: which dimensions depend on which. start: mean of lambda at the start."""

    diagonal = False  # whether the norm of S D^T is taken by the diagonal of D^T D alone

    def __init__(self, embed_size: int, start: float = 2.5):
        super().__init__()
        self.joint_logits = nn.Parameter(torch.randn(embed_size, embed_size))  # E
        self.threshold_scale = nn.Parameter(torch.empty(embed_size).normal_(start, 0.1))  # lambda
        self.log_sharpness = nn.Parameter(torch.tensor(4.0))

    def mask(self) -> tuple[Tensor, Tensor]:
        """The soft sparse mask M and the joint probabilities P, each (D, D), row i = dimension i."""
        P = self.joint_logits.sigmoid()
        std, mean = torch.std_mean(P, dim=1)
        threshold = (mean + self.threshold_scale * std)[:, None]
        M = (self.log_sharpness.exp() * (P - threshold)).clamp(max=MAX_EXPONENT).exp().tanh()
        return M, P

    def forward(self) -> Tensor:
        """The dependency matrix D (D, D)."""
        M, P = self.mask()
        return l2_normalize(M * P)

    @torch.no_grad()
    def figures(self) -> dict[str, float]:
        """How sparse a gate is.

        sparsity: share of the mask's entries below a half. open_rows: share of rows with an entry that is not.
        closed_rows: share of rows of D whose norm is below a half: they lie so far below their threshold that EPSILON
        dominates the normalisation. partners: dimensions that a row of D is made of, (sum of squares)^2 / sum of fourth
        powers, averaged over the rows that are not closed, 0 without any. threshold: mean of lambda. sharpness: the
        mask's.
        """
        mask, probabilities = self.mask()
        is_open = mask >= 0.5
        squares = l2_normalize(mask * probabilities).square()
        norms = squares.sum(dim=1)  # squared
        kept = norms >= 0.25
        partners = norms[kept].square() / squares[kept].square().sum(dim=1)
        return {
            "sparsity": 1 - is_open.float().mean().item(),
            "open_rows": is_open.any(dim=1).float().mean().item(),
            "closed_rows": 1 - kept.float().mean().item(),
            "partners": partners.mean().item() if kept.any() else 0.0,
            "threshold": self.threshold_scale.mean().item(),
            "sharpness": self.log_sharpness.exp().item(),
        }


def attend(V: Tensor, T: Tensor, D: Tensor | None, temperature: Tensor, real: Tensor | None = None) -> Tensor:
    """Attention A (I, W, R) of each word of a caption T (W, D) to the regions of images V (I, R, D); rows sum to 1.

    Arguments as `score_words` takes them.
    """
    delta = T.new_ones(T.shape[-1]) if D is None else D.sum(dim=0)
    Z = at_least_float32((T * delta) @ V.mT)  # (I, W, R) = T diag(delta) V^T
    A = F.leaky_relu(Z.tanh(), 0.1)
    A = temperature * A / (A.norm(dim=1, keepdim=True) + EPSILON)  # over the caption's words, for each region
    if real is not None:
        A = A.masked_fill(~real[:, None], -math.inf)  # after the product: the temperature's gradient would be NaN
    return A.softmax(dim=-1)  # over the regions


def score_groups(V: Tensor, T: Tensor, A: Tensor, D: Tensor | None, diagonal: bool = False) -> Tensor:
    """What the group of each dimension adds to a word's similarity: U (I, W, D), of attention A (I, W, R).

    Arguments as `score_words` takes them.
    """
    C = l2_normalize(A @ V)  # (I, W, D) attended image context of each word
    S = C * T  # (I, W, D) correspondence of each dimension
    if D is None:
        return S
    U = at_least_float32(S @ D.mT)  # (I, W, D); row d of D is the group of dimension d
    norm = (S * D.norm(dim=0) if diagonal else U).norm(dim=-1, keepdim=True)
    return U / (norm + EPSILON)


def score_words(
    V: Tensor, T: Tensor, D: Tensor | None, temperature: Tensor, real: Tensor | None = None, diagonal: bool = False
) -> Tensor:
    """Similarity (I, W) of images V (I, R, D) and each word of a caption T (W, D); their mean is the caption's.

    D: dependency matrix (D, D); None: dimensions are aggregated one by one (the baseline `independent`). real: (I, R),
    False for padding regions, which must not be attended to. diagonal: the norm of S D^T by the diagonal of D^T D
    alone.
    """
    A = attend(V, T, D, temperature, real)
    return score_groups(V, T, A, D, diagonal).sum(dim=-1)


def score_caption(V: Tensor, *others: Any) -> Tensor:
    """Similarity (I,) of images V (I, R, D) and one caption; arguments as `score_words` takes them."""
    return score_words(V, *others).mean(dim=-1)


class XDimSimilarity(nn.Module):
    """Scores images against captions by groups of dependent dimensions. gate: a part of registry.GATES."""

    unit_vectors = True  # the encoders L2-normalise each region and each word for it

    def __init__(self, embed_size: int, gate: dict | None = None):
        super().__init__()
        self.log_temperature = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.gate = registry.build("gate", gate or {"name": registry.PAPERS_GATE, "options": {}}, embed_size)

    @property
    def diagonal(self) -> bool:
        """Whether norms are taken by the diagonal of D^T D alone."""
        return self.gate.diagonal

    def dependency(self) -> Tensor | None:
        """The dependency matrix D (D, D); None where dimensions count as independent."""
        return self.gate()

    def gram_rows(self, D: Tensor) -> Tensor | None:
        """Rows (1 + N, D) k, w_1, ..., w_N of D^T D = diag(k) + sum of w_n w_n^T, by which the engine takes norms where
        the gate has so few of them; else None.
        """
        if self.diagonal:
            return D.square().sum(dim=0)[None]
        return self.gate.gram_rows(D) if hasattr(self.gate, "gram_rows") else None

    def forward(self, regions: Tensor, words: Tensor, lengths: Tensor, real: Tensor | None = None) -> Tensor:
        """Scores (I, C) of all pairs by the plain formula, differentiable by ordinary autograd.

        regions: (I, R, D). words: (sum of W, D). lengths: (C,) words of each caption. real: (I, R), False for padding.
        """
        D, temperature = self.dependency(), self.log_temperature.exp()
        captions = words.split(lengths.tolist())
        return torch.stack([score_caption(regions, T, D, temperature, real, self.diagonal) for T in captions], dim=1)

    def explain(
        self, regions: Tensor, words: Tensor, D: Tensor | None, real: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Attention (I, W, R) of each word (W, D) of one caption to regions (I, R, D), and what the group of each
        dimension adds to the word's score (I, W, D). D: what dependency() gives.
        """
        A = attend(regions, words, D, self.log_temperature.exp(), real)
        return A, score_groups(regions, words, A, D, self.diagonal)

    tiled = staticmethod(forward)  # what the tiled engine computes; a subclass with another forward() is not tiled

    def figures(self) -> dict[str, float]:
        """What the log says of the similarity."""
        return {**self.gate.figures(), "temperature": self.log_temperature.exp().item()}


class XDim(nn.Module):
    """The whole model: an image encoder, a text encoder, a similarity, each by its name in registry.py."""

    image_encoder: Any
    text_encoder: Any
    similarity: Any
    global_head: Any

    def __init__(
        self,
        image_encoder: nn.Module,
        text_encoder: nn.Module,
        similarity: nn.Module,
        global_head: nn.Module | None = None,
    ):
        """global_head: one vector a side beside the similarity (pooling.py)."""
        super().__init__()
        self.image_encoder, self.text_encoder, self.similarity = image_encoder, text_encoder, similarity
        self.global_head = global_head
        self.architecture: dict = {}  # what `build` was given, for checkpoints
        self.use_engine("tiled")

    @classmethod
    def build(cls, architecture: dict, backbone: nn.Module | None = None, vision: nn.Module | None = None) -> "XDim":
        """A model of random weights from `registry.describe`'s architecture, complete with the text configuration.

        backbone, vision: a pretrained language and vision model to take instead of random ones. Raises ValueError where
        a part is unknown or does not take its options.
        """
        dims = architecture["embed_size"]
        image, text = architecture["image_encoder"], architecture["text_encoder"]
        if backbone is None:  # before all other weights: the order of random numbers is part of a seed's result
            backbone = registry.find("text_encoder", text["name"]).make_backbone(text["options"]["config"])
        head = architecture.get("global_head") and registry.build("global_head", architecture["global_head"], dims)
        width, pretrained = head.width if head else dims, {"vision": vision} if vision else {}
        image_encoder = registry.build("image_encoder", image, width, **pretrained)
        text_encoder = registry.build("text_encoder", text, width, backbone=backbone)
        similarity = registry.build("similarity", architecture["similarity"], dims)
        model = cls(image_encoder, text_encoder, similarity, head)
        model.architecture = architecture
        return model

    @property
    def vision(self) -> Any:
        """The vision model of an image encoder that starts from pixels; None for region features."""
        return getattr(self.image_encoder, "vision", None)

    def checkpoint_activations(self) -> None:
        """Have language and vision model compute activations again in the backward pass, instead of keeping them.

        Raises ValueError where one cannot.
        """
        checkpoint_activations(self.text_encoder.backbone)
        if self.vision:
            self.vision.checkpoint_activations()

    def use_engine(self, name: str) -> None:
        """Choose how scores are computed: "tiled", fast, or "plain", by the similarity's own formula."""
        self.engine = make_engine(name, self.similarity, self.global_head)

    @property
    def pooling(self) -> MeanPooling:
        """What makes one vector of an image and one of a caption: the global head, or the similarity where that pools;
        else the mean region and the mean word, which no training has prepared for it.
        """
        own = self.global_head or self.similarity
        return own if isinstance(own, MeanPooling) else MeanPooling()

    def figures(self) -> dict[str, float]:
        """What the log says of similarity and global head."""
        return self.similarity.figures() | (self.global_head.figures() if self.global_head else {})

    def forward(self, images: Tensor, counts: Tensor, ids: Tensor, lengths: Tensor) -> Tensor:
        """Scores (B, B) of all images against all captions of a batch; see `embed`."""
        return self.engine(*self.embed(images, counts, ids, lengths))

    def embed(
        self, images: Tensor | Pixels, counts: Tensor, ids: Tensor, lengths: Tensor, shard: Shard | None = None
    ) -> Embedded:
        """Embed a batch of which each process has its own pairs, and gather the words of all captions.

        images: what the image encoder takes of the own images: region features (n, img_dim), packed, or Pixels. counts:
        (B,) regions of each image of the whole batch. ids: (own captions, N) token ids. lengths: (B,) tokens of each
        caption of the whole batch. counts and lengths are on the CPU.
        """
        shard = shard or Shard(len(lengths))
        regions, own_counts = self.image_encoder(self._floats(images), counts, shard)
        words = self.text_encoder(ids, lengths[shard.own])
        words = shard.gather_inputs(words, [int(part.sum()) for part in lengths.split(shard.sizes)])
        return Embedded(regions, words, lengths, real_rows(own_counts, regions.device))

    def encode_images(self, images: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Region embeddings (I, R, D), zero or anything beyond an image's count, and the counts (I,)."""
        return self.image_encoder(self._floats(images), counts)

    def _floats(self, images: Tensor | Pixels) -> Tensor | Pixels:
        """Features in the model's dtype: in files, and on their way to the device, they may be float16."""
        if isinstance(images, Tensor) and images.is_floating_point():
            return images.to(next(self.parameters()).dtype)
        return images

    def encode_captions(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Word embeddings (sum of W, D), packed, of token ids (C, N)."""
        return self.text_encoder(ids, lengths)

    def parameter_counts(self) -> dict[str, int]:
        """Number of parameters of each part."""
        backbone = list(self.text_encoder.backbone_parameters())
        counts = {name: sum(p.numel() for p in part.parameters()) for name, part in self.named_children()}
        language = sum(p.numel() for p in backbone)
        vision = sum(p.numel() for p in self.vision.parameters()) if self.vision else 0
        return {
            **({"vision model": vision} if vision else {}),
            "image encoder": counts["image_encoder"] - vision,
            "language model": language,
            "text projection": counts["text_encoder"] - language,
            "similarity": counts["similarity"],
            **({"global head": counts["global_head"]} if self.global_head else {}),
        }
