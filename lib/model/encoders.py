"""What turns images into regions and captions into words of D shared dimensions (paper, section 3.1).

An image encoder is called as `encoder(images, counts, shard) -> regions (I, R, D), counts (I,)`, has `width` (D), and
takes `embed_size` and its options. A text encoder is called as `encoder(ids, lengths) -> words (sum of W, D)`, has
`width` and `backbone_parameters()`, the pretrained ones, which are trained at a tenth of the learning rate.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from lib.model.backbone import build_backbone
from lib.model.layers import BatchNorm, Shard, at_least_float32, l2_normalize, pad_rows, upload

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

    def __init__(self, embed_size: int, img_dim: int = 2048, normalize: bool = True, mask_padding: bool = False):
        super().__init__()
        self.img_dim, self.width = img_dim, embed_size
        self.normalize, self.mask_padding = normalize, mask_padding
        self.linear = nn.Linear(img_dim, embed_size)
        self.mlp = nn.Sequential(
            nn.Linear(img_dim, embed_size // 2),
            BatchNorm(embed_size // 2),
            nn.ReLU(),
            nn.Linear(embed_size // 2, embed_size),
        )
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
        first, norm, relu, last = self.mlp
        embedded = self.linear(rows) + last(relu(norm(first(rows), shard)))
        embedded = l2_normalize(embedded) if self.normalize else at_least_float32(embedded)
        return embedded.view(*features.shape[:-1], -1)


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
        device = ids.device.type
        dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        # Without the cache each group rounds the weights for itself, and their gradients add up in float32. Groups that
        # share rounded weights add them up in bfloat16, to twice the error at 64 groups.
        with torch.autocast(device, dtype, enabled, cache_enabled=False):
            return checkpoint(self._hidden, ids, lengths, use_reentrant=False)

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


def groups_of_like_length(lengths: Tensor, size: int) -> list[Tensor] | list[slice]:
    """Indices of captions in groups of at most `size`, ordered by length; all in their own order where one will do."""
    return [slice(None)] if len(lengths) <= size else list(lengths.argsort(stable=True).split(size))
