"""The similarity straight from the formulas, one image and one caption at a time: slow and obviously right."""

import torch
from torch import Tensor
from torch.nn import functional as F


def l2(vectors: Tensor) -> Tensor:
    return vectors / (vectors.norm(dim=-1, keepdim=True) + 1e-8)


def dependency_matrix(joint_logits: Tensor, threshold_scale: Tensor, log_sharpness: Tensor) -> Tensor:
    """D (d, d) from E, lambda and the log of the sharpness."""
    rows = []
    for i, row in enumerate(torch.sigmoid(joint_logits)):
        threshold = row.mean() + threshold_scale[i] * row.std()
        mask = torch.tanh(torch.exp((torch.exp(log_sharpness) * (row - threshold)).clamp(max=20)))
        rows.append(l2(mask * row))
    return torch.stack(rows)


def pair_score(regions: Tensor, words: Tensor, dependency: Tensor, log_temperature: Tensor) -> Tensor:
    """Similarity of one image (R, d) and one caption (n, d)."""
    weights = torch.diag(dependency.sum(dim=0))
    attention = F.leaky_relu(torch.tanh(words @ weights @ regions.T), 0.1)  # (n, R)
    attention = attention / (attention.norm(dim=0, keepdim=True) + 1e-8)
    attention = torch.softmax(torch.exp(log_temperature) * attention, dim=1)
    context = l2(attention @ regions)
    return l2(context * words @ dependency.T).sum(dim=1).mean()


def scores(regions, words, lengths, dependency, log_temperature, counts=None) -> Tensor:
    """All pairs (I, C): regions (I, R, d), of which the first `counts` are real; words packed (W, d)."""
    counts = [regions.shape[1]] * len(regions) if counts is None else counts
    captions = words.split(list(lengths))
    return torch.stack(
        [
            torch.stack([pair_score(image[:n], caption, dependency, log_temperature) for caption in captions])
            for image, n in zip(regions, counts, strict=True)
        ]
    )
