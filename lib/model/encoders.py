"""What turns images into regions and captions into words of D shared dimensions (paper, section 3.1).

An image encoder is called as `encoder(images, counts, shard) -> regions (I, R, D), counts (I,)`, has `width` (D), and
takes `embed_size` and its options; if it has a `vision` model, its images are pixels. A text encoder is called as
`encoder(ids, lengths) -> words (sum of W, D)`, has `width` and `backbone_parameters()`, the pretrained ones, which are
trained at a tenth of the learning rate.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from lib.model.backbone import build_backbone
from lib.model.layers import BatchNorm, BatchNorm2d, Shard, at_least_float32, l2_normalize, pad_rows, upload
from lib.model.vision import VisionModel, build_vision

# Captions that the language model takes at a time, by kind of device. A CPU's time grows with every padding token:
# BERT-base, 128 captions of 5 to 35 tokens, forward and backward on one thread take 36 s in one padded batch, 19 s in
# groups of 64, 16 s of 32 or of 16. Elsewhere a batch is one group: more kernels should cost more than padding (not
# measured).
GROUP = {"cpu": 32}
ALL_TO_ALL = ("bert", "roberta", "xlm-roberta")  # every token attends to every other: a mask (C, 1, 1, N) says it all


class RegionEncoder(nn.Module):
    """Region features to embeddings: a linear layer plus a two-layer MLP with BatchNorm over all regions,
    L2-normalised.

    mask_padding: in training, padding regions stay out of BatchNorm and of the attention. As published they take part:
    zero rows that become unit vectors (specification of the published recipe: docs/method.md).
    """

    def __init__(
        self,
        embed_size: int,
        img_dim: int = 2048,
        normalize: bool = True,
        mask_padding: bool = False,
        mlp: bool = True,
    ):
        """mlp: False leaves the linear layer alone, as the published recipe from pixels does."""
        super().__init__()
        self.img_dim, self.width = img_dim, embed_size
        self.normalize, self.mask_padding = normalize, mask_padding
        self.linear = nn.Linear(img_dim, embed_size)
        middle = embed_size // 2
        layers = [nn.Linear(img_dim, middle), BatchNorm(middle), nn.ReLU(), nn.Linear(middle, embed_size)]
        self.mlp = nn.Sequential(*layers) if mlp else None
        nn.init.xavier_uniform_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Tensor, counts: Tensor, shard: Shard | None = None) -> tuple[Tensor, Tensor]:
        """Regions (I, R, D) of the own images, and how many of each, from the first, may be attended to (I,).

        features: (n, img_dim) of the own images' regions, one image after the other. counts: (B,) regions of each image
        of the whole batch, on the CPU.
        """
        own = counts if shard is None else counts[shard.own]
        if self.training and not self.mask_padding:
            longest = int(counts.max())  # of the whole batch: padding counts in BatchNorm
            return self.embed(pad_rows(features, own, longest), shard), torch.full_like(own, longest)
        return pad_rows(self.embed(features, shard), own), own

    def embed(self, features: Tensor, shard: Shard | None = None) -> Tensor:
        """Embeddings (..., D) of features (..., img_dim), over all of which BatchNorm takes its statistics."""
        rows = features.flatten(0, -2)
        embedded = self.linear(rows)
        if self.mlp:
            first, norm, relu, last = self.mlp
            embedded = embedded + last(relu(norm(first(rows), shard)))
        embedded = l2_normalize(embedded) if self.normalize else at_least_float32(embedded)
        return embedded.view(*features.shape[:-1], -1)


class Pixels(NamedTuple):
    """Pictures, and which of their cells are used."""

    pictures: Tensor  # (n, 3, H, W) uint8
    cells: Tensor  # (sum of the own counts,) numbers of cells among the n * R of all pictures, picture after picture


class PixelEncoder(RegionEncoder):
    """A vision model (vision.py), trained along, and a linear layer: its cells are the regions.

    model: its name, `torchvision:resnet50`. regions: at most so many cells, their maps pooled; 0: as they are. whole:
    with a region of the whole picture. config: of a transformers model. vision: a pretrained one instead of a random
    one. micro_batch: as of TextEncoder, in pictures.
    """

    def __init__(
        self,
        embed_size: int,
        model: str,
        regions: int = 0,
        image_size: int = 0,
        normalize: bool = True,
        mask_padding: bool = False,
        mlp: bool = False,
        whole: bool = False,
        config: dict | None = None,
        vision: VisionModel | None = None,
    ):
        vision = vision or build_vision(model, config or {}, regions, image_size, whole)
        super().__init__(embed_size, vision.width, normalize, mask_padding, mlp)
        self.vision, self.micro_batch, self.thawed = vision, 0, 0
        self.norms: list[Any] = [module for module in vision.modules() if isinstance(module, nn.BatchNorm2d)]
        for norm in self.norms:
            norm.__class__ = BatchNorm2d  # its parameters and their names stay
        self.thaw(0)

    def thaw(self, stages: int) -> None:
        """Train so many of the vision model's stages, from the top; the others are frozen, BatchNorm's averages too."""
        self.thawed = stages
        for number, stage in enumerate(self.vision.stages()):
            stage.requires_grad_(number < stages)

    def train(self, mode: bool = True) -> "PixelEncoder":
        super().train(mode)
        frozen = self.vision.stages()[self.thawed :] if self.thawed else [self.vision]
        for module in [*frozen, *(self.norms if self.micro_batch else [])]:  # statistics of a part are not the batch's
            module.eval()
        return self

    def forward(self, images: Pixels | Tensor, counts: Tensor, shard: Shard | None = None) -> tuple[Tensor, Tensor]:
        """As RegionEncoder's; images: a tensor means all cells of its pictures."""
        pictures, cells = (images, None) if isinstance(images, Tensor) else images
        for norm in self.norms:
            norm.shard = shard
        size = self.micro_batch if self.training and self.thawed else 0
        features = [self._features(part, bool(size)) for part in pictures.split(size or len(pictures))]
        packed = torch.cat(features).flatten(0, 1)
        return super().forward(packed if cells is None else packed.index_select(0, cells), counts, shard)

    def _features(self, pictures: Tensor, recomputed: bool) -> Tensor:
        """(n, R, F). recomputed: in the backward pass, instead of keeping activations."""
        return recompute(self.vision, pictures) if recomputed else self.vision(pictures)


class TextEncoder(nn.Module):
    """A language model's last hidden state, a linear layer to D dimensions, L2 normalisation of each word.

    micro_batch: in training, the most captions whose activations the language model holds at a time; 0 = no limit. All
    words are embedded before the loss, which so has every negative of the batch; the backward pass computes the
    language model anew, one group of captions after the other, and gives the whole batch's gradients (the idea of
    GradCache, Gao et al. 2021). Only the language model needs it: BERT-base holds 9.8 MB of activations for a caption
    of 14 tokens, the image encoder 0.6 for 36 regions, and its BatchNorm needs all of them at once; the similarity
    works in tiles anyway.
    """

    backbone: Any

    def __init__(
        self,
        embed_size: int,
        config: dict,
        pad_id: int | None = 0,
        normalize: bool = True,
        backbone: PreTrainedModel | None = None,
    ):
        """config: of the language model. pad_id: a token that is never attended to, wherever it stands; None: there is
        none, as where the end of text pads too. backbone: a pretrained language model instead of a random one.
        """
        super().__init__()
        self.width, self.pad_id, self.normalize = embed_size, pad_id, normalize
        self.micro_batch = 0
        self.backbone: PreTrainedModel = backbone or self.make_backbone(config)
        self.linear = nn.Linear(self.backbone.config.hidden_size, embed_size)

    make_backbone = staticmethod(build_backbone)

    def backbone_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the language model."""
        return self.backbone.parameters()

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Embed captions.

        ids: (C, N) token ids, the special tokens included, padded. lengths: (C,) tokens of each caption; on the CPU, so
        that no shape makes Python wait for the device. Returns (W, D), W = lengths.sum(): the words of all captions one
        after the other, without padding.
        """
        embedded = self.linear(self._encode(ids, lengths.cpu()))
        return l2_normalize(embedded) if self.normalize else at_least_float32(embedded)

    def _encode(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Last hidden states (W, hidden) of all words, computed in groups of captions of like length."""
        micro_batch = self.micro_batch if self.training and torch.is_grad_enabled() else 0
        compute = self._recomputed if micro_batch else self._hidden
        hidden, starts, end = [], torch.empty_like(lengths), 0  # starts: where a caption starts in `hidden`
        for group in groups_of_like_length(lengths, micro_batch or GROUP.get(ids.device.type, len(lengths))):
            chosen = group if isinstance(group, slice) else upload(group, ids.device)
            padded = compute(ids[chosen, : int(lengths[group].max())], lengths[group])  # (captions, longest, hidden)
            starts[group] = end + padded.shape[1] * torch.arange(len(padded))
            end += len(padded) * padded.shape[1]
            hidden.append(padded.flatten(0, 1))
        before = lengths.cumsum(0) - lengths  # where a caption starts in the result
        places = torch.repeat_interleave(starts - before, lengths) + torch.arange(int(lengths.sum()))
        return torch.cat(hidden).index_select(0, upload(places, ids.device))

    def _recomputed(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """`_hidden`, computed again with the same dropout in the backward pass instead of keeping its activations."""
        return recompute(self._hidden, ids, lengths)

    def _hidden(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Last hidden state (C, N, hidden) of captions (C, N) that have `lengths` tokens (C,)."""
        if self.pad_id is None:
            positions = torch.arange(ids.shape[1], device=ids.device)
            attended = positions < upload(lengths, ids.device)[:, None]
        else:  # beyond `lengths` too, all tokens are padding
            attended = ids != self.pad_id
        # Attention is faster without a mask. On CUDA, to look whether one is needed would be to wait for the device;
        # transformers looks, too, but only into masks of two dimensions.
        if ids.device.type == "cpu" and attended.all():
            mask = None
        else:
            mask = attended[:, None, None] if self.backbone.config.model_type in ALL_TO_ALL else attended
        return self.states(input_ids=ids, attention_mask=mask)

    def states(self, **inputs: Tensor | None) -> Tensor:
        """The states (C, N, hidden) that words are made from: the language model's last ones."""
        return self.backbone(**inputs).last_hidden_state


def recompute(function: Callable[..., Tensor], inputs: Tensor, *others: Any) -> Tensor:
    """function(inputs, *others), computed again in the backward pass instead of keeping its activations."""
    device = inputs.device.type
    dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
    # Without the cache each group rounds the weights for itself, and their gradients add up in float32. Groups that
    # share rounded weights add them up in bfloat16, to twice the error at 64 groups.
    with torch.autocast(device, dtype, enabled, cache_enabled=False):
        return checkpoint(function, inputs, *others, use_reentrant=False)


def groups_of_like_length(lengths: Tensor, size: int) -> list[Tensor] | list[slice]:
    """Indices of captions in groups of at most `size`, ordered by length; all in their own order where one will do."""
    return [slice(None)] if len(lengths) <= size else list(lengths.argsort(stable=True).split(size))
