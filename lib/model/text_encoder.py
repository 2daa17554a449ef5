"""Token ids to word embeddings through BERT (paper, section 3.1)."""

import torch
from torch import Tensor, nn
from transformers import BertModel

from lib.model.norm import l2_normalize


class TextEncoder(nn.Module):
    """BERT's last hidden state, a linear layer to the shared dimensions, L2 normalisation of each word."""

    def __init__(self, bert: BertModel, embed_size: int, normalize: bool = True):
        super().__init__()
        self.normalize = normalize
        self.bert = bert
        self.linear = nn.Linear(bert.config.hidden_size, embed_size)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Embed captions.

        ids: (C, N) token ids, [CLS] and [SEP] included, padded with 0. lengths: (C,) tokens of each caption.
        Returns (W, D), W = lengths.sum(): the words of all captions one after the other, without padding.
        """
        hidden = self.bert(input_ids=ids, attention_mask=(ids != 0).long()).last_hidden_state  # (C, N, hidden)
        is_word = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]  # (C, N)
        embedded = self.linear(hidden[is_word])  # (W, D)
        return (
            l2_normalize(embedded)
            if self.normalize
            else embedded.to(torch.promote_types(embedded.dtype, torch.float32))
        )
