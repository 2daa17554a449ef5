"""What the benchmarks compare with: the formulas as they are written, one caption at a time (paper, section 3.3)."""

import torch
from torch import Tensor
from torch.nn import functional as F

from lib.model.norm import l2_normalize


def loop_scores(
    regions: Tensor,
    words: Tensor,
    lengths: Tensor,
    dependency: Tensor,
    temperature: Tensor,
    captions: int | None = None,
) -> Tensor:
    """Scores (I, C): for each caption a copy for each image, multiplied by diag(delta) and, as S, by D^T.

    regions: (I, R, D). words: (W, D), packed. lengths: (C,). captions: only the first so many.
    """
    diagonal = torch.diag(dependency.sum(dim=0))
    columns = []
    for caption in words.split(lengths.tolist())[:captions]:
        copies = caption.repeat(len(regions), 1, 1)  # (I, n, D)
        attention = F.leaky_relu(torch.bmm(copies @ diagonal, regions.transpose(1, 2)).tanh(), 0.1)  # (I, n, R)
        attention = attention / (attention.norm(dim=1, keepdim=True) + 1e-8)
        attention = torch.softmax(temperature * attention, dim=-1)
        correspondence = l2_normalize(torch.bmm(attention, regions)) * copies
        columns.append(l2_normalize(correspondence @ dependency.T).sum(dim=-1).mean(dim=1))
    return torch.stack(columns, dim=1)
