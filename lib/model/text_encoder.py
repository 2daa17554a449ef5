"""Token ids to word embeddings through BERT (paper, section 3.1)."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import BertModel

from lib.model.norm import l2_normalize

# Captions that BERT takes at a time, by kind of device. A CPU's time grows with every padding token: BERT-base, 128
# captions of 5 to 35 tokens, forward and backward on one thread take 36 s in one padded batch, 19 s in groups of 64,
# 16 s of 32 or of 16. Elsewhere a batch is one group: more kernels should cost more than padding (not measured).
GROUP = {"cpu": 32}


class TextEncoder(nn.Module):
    """BERT's last hidden state, a linear layer to the shared dimensions, L2 normalisation of each word.

    micro_batch: in training, the most captions whose activations BERT holds at a time; 0 = no limit. All words are
    embedded before the loss, which so has every negative of the batch; the backward pass computes BERT anew, one group
    of captions after the other, and gives the whole batch's gradients (the idea of GradCache, Gao et al. 2021). Only
    BERT needs it: at BERT-base's size it holds 9.8 MB of activations for a caption of 14 tokens, the image encoder 0.6
    for 36 regions, and its BatchNorm needs all of them at once; the similarity works in tiles anyway.
    """

    def __init__(self, bert: BertModel, embed_size: int, normalize: bool = True):
        super().__init__()
        self.normalize = normalize
        self.micro_batch = 0
        self.bert = bert
        self.linear = nn.Linear(bert.config.hidden_size, embed_size)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Embed captions.

        ids: (C, N) token ids, [CLS] and [SEP] included, padded with 0. lengths: (C,) tokens of each caption; all shapes
        follow from them, so that a device never makes Python wait where they are on the CPU.
        Returns (W, D), W = lengths.sum(): the words of all captions one after the other, without padding.
        """
        embedded = self.linear(self._encode(ids, lengths.cpu()))  # (W, D)
        return (
            l2_normalize(embedded)
            if self.normalize
            else embedded.to(torch.promote_types(embedded.dtype, torch.float32))
        )

    def _encode(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """BERT's last hidden states (W, hidden) of all words, computed in groups of captions of like length."""
        micro_batch = self.micro_batch if self.training and torch.is_grad_enabled() else 0
        compute = self._replayed if micro_batch else self._hidden
        hidden, starts, end = [], torch.empty_like(lengths), 0  # starts: where a caption starts in `hidden`
        for group in groups_of_like_length(lengths, micro_batch or GROUP.get(ids.device.type, len(lengths))):
            padded = compute(ids[group, : int(lengths[group].max())])  # (captions, longest, hidden)
            starts[group] = end + padded.shape[1] * torch.arange(len(padded))
            end += len(padded) * padded.shape[1]
            hidden.append(padded.flatten(0, 1))
        before = lengths.cumsum(0) - lengths  # where a caption starts in the result
        places = torch.repeat_interleave(starts - before, lengths) + torch.arange(int(lengths.sum()))
        return torch.cat(hidden).index_select(0, places.to(ids.device, non_blocking=True))

    def _replayed(self, ids: Tensor) -> Tensor:
        """`_hidden`, which the backward pass computes once more, with the same dropout, instead of keeping it all."""
        device = ids.device.type
        dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        # Without the cache each group rounds the weights for itself, and their gradients add up in float32. Groups that
        # share rounded weights add them up in bfloat16, to twice the error at 64 groups.
        with torch.autocast(device, dtype, enabled, cache_enabled=False):
            return checkpoint(self._hidden, ids, use_reentrant=False)

    def _hidden(self, ids: Tensor) -> Tensor:
        """BERT's last hidden state (C, N, hidden) of captions (C, N)."""
        attended = ids != 0
        # Attention is faster without a mask. On CUDA, to look whether one is needed would be to wait for the device;
        # transformers looks, too, but only into masks of two dimensions.
        unmasked = ids.device.type == "cpu" and attended.all()
        mask = None if unmasked else attended[:, None, None]
        return self.bert(input_ids=ids, attention_mask=mask).last_hidden_state


def groups_of_like_length(lengths: Tensor, size: int) -> list[Tensor] | list[slice]:
    """Indices of captions in groups of at most `size`, ordered by length; all in their own order where one will do."""
    return [slice(None)] if len(lengths) <= size else list(lengths.argsort(stable=True).split(size))
