"""Pixels -> region boxes and their features. Nothing here knows what was drawn; there are no learned weights.

Boxes: square windows of many sizes, scored by how much each differs from the ring around it, thinned by non-maximum
suppression. Features: maps of colours, edges and textures, pooled over a grid in each box; silhouette; geometry.

Legend: B pictures, C channels, H x W pixels, N windows, R regions. RGB values are 0 to 1.
"""

import math
from functools import cache, reduce
from operator import add

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, pad
from torchvision.ops import nms, roi_align

REGIONS = 36  # the first is always the whole picture
WINDOW_SIDES = (18, 21, 25, 30, 36, 43, 52, 64)
SHORTLIST = 300  # windows that go into the suppression
PALETTE = (  # the basic colour terms: red, green, blue
    (0.05, 0.05, 0.05), (0.35, 0.35, 0.35), (0.65, 0.65, 0.65), (0.95, 0.95, 0.95),  # black, dark grey, grey, white
    (0.80, 0.10, 0.10), (0.95, 0.55, 0.10), (0.95, 0.90, 0.15), (0.15, 0.60, 0.20),  # red, orange, yellow, green
    (0.15, 0.30, 0.85), (0.45, 0.15, 0.60), (0.95, 0.55, 0.75), (0.45, 0.28, 0.12),  # blue, purple, pink, brown
)  # fmt: skip
IMG_DIM = 414  # of a feature: what the parts below add up to


def describe(pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Of pictures uint8 (B, 3, H, W), H = W, boxes (B, REGIONS, 4), x1 y1 x2 y2 in pixels, and features
    (B, REGIONS, D), not standardised, in float32."""
    rgb = pictures.float() / 255
    boxes = propose(rgb)
    pooled = torch.cat([_colour(rgb, boxes), _edges(rgb, boxes), _texture(rgb, boxes), _silhouette(rgb, boxes)], dim=1)
    return boxes, torch.cat([pooled.unflatten(0, boxes.shape[:2]), _geometry(boxes / rgb.shape[-1])], dim=-1)


def propose(rgb: Tensor) -> Tensor:
    """REGIONS boxes of each picture (B, 3, H, W): the whole picture, then windows by falling objectness."""
    size = rgb.shape[-1]
    windows, boxes = _windows(size), []
    for scores, order in zip(*_objectness(rgb, windows).sort(descending=True, stable=True), strict=True):
        shortlist = windows[order[:SHORTLIST]]
        kept = nms(shortlist.float(), scores[:SHORTLIST], iou_threshold=0.5)
        spare = torch.ones(len(shortlist), dtype=torch.bool).index_fill(0, kept, False)  # where too few are kept
        boxes.append(torch.cat([torch.tensor([[0, 0, size, size]]), shortlist[kept], shortlist[spare]])[:REGIONS])
    return torch.stack(boxes).float()


@cache
def _windows(size: int) -> Tensor:
    """Square windows of all sizes that lie inside the picture: int64 (N, 4)."""
    boxes = []
    for side in WINDOW_SIDES:  # at steps of a seventh of it
        starts = torch.linspace(0, size - side, math.ceil((size - side) / (side * (1 / 7))) + 1).round().long()
        corners = torch.cartesian_prod(starts, starts)
        boxes.append(torch.cat([corners, corners + side], dim=1))
    return torch.cat(boxes)


def _objectness(rgb: Tensor, windows: Tensor) -> Tensor:
    """How much the inside of each window differs from the ring around it, in colour and edges: (B, N)."""
    edges = _gradients(rgb)[2].sqrt()
    maps = torch.cat([rgb, edges, torch.ones_like(edges)], dim=1)  # the ones add up to areas
    integral = pad(maps.cumsum(2).cumsum(3), (1, 0, 1, 0)).permute(2, 3, 0, 1).contiguous()  # (H + 1, W + 1, B, 5)
    around = _widen(windows, (0.2 * (windows[:, 2:] - windows[:, :2])).round().long()).clamp(0, rgb.shape[-1])
    inner, outer = _box_sums(integral, windows), _box_sums(integral, around)
    inside, ring = (sums[..., :4] / sums[..., 4:] for sums in (inner, outer - inner))  # means (N, B, 4)
    return ((inside - ring)[..., :3].norm(dim=-1) + (inside - ring)[..., 3]).T


def _widen(boxes: Tensor, margin: Tensor) -> Tensor:
    return torch.cat([boxes[..., :2] - margin, boxes[..., 2:] + margin], dim=-1)


def _box_sums(integral: Tensor, boxes: Tensor) -> Tensor:
    """Sums over boxes (N, 4) from integral images (H + 1, W + 1, B, C): (N, B, C)."""
    x1, y1, x2, y2 = boxes.unbind(1)
    return integral[y2, x2] - integral[y1, x2] - integral[y2, x1] + integral[y1, x1]


def _pool(maps: Tensor, boxes: Tensor, grid: int, scale: float = 1) -> Tensor:
    """Means of maps (B, C, h, w), `scale` times the picture's size, over a grid in each box: (B * R, C * grid**2)."""
    return roi_align(maps, list(boxes), grid, spatial_scale=scale, sampling_ratio=2, aligned=True).flatten(1)


def _colour(rgb: Tensor, boxes: Tensor) -> Tensor:
    """Share of each colour of the palette."""
    palette = torch.tensor(PALETTE)[:, :, None, None]
    squared = (avg_pool2d(rgb, 2).unsqueeze(1) - palette).square().sum(2)  # (B, colours, H/2, W/2)
    return _pool((-squared / (2 * 0.12**2)).softmax(1), boxes, 3, scale=1 / 2)


def _gradients(rgb: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient along x and y of the channel that changes most, and its squared length, each (B, 1, H, W)."""
    padded = pad(rgb, (1, 1, 1, 1), mode="replicate")
    dx = (padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]) / 2
    dy = (padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]) / 2
    squared, channel = (dx.square() + dy.square()).max(1, keepdim=True)
    return dx.gather(1, channel), dy.gather(1, channel), squared


def _edges(rgb: Tensor, boxes: Tensor) -> Tensor:
    """Edge energy by orientation at two scales, brought to unit length in each box and square-rooted, as in HOG."""
    angles = torch.arange(6)[:, None, None] * (math.pi / 6)
    parts = []
    for maps, grid, scale in ((_blur(rgb, 3), 4, 1), (avg_pool2d(rgb, 4), 3, 1 / 4)):
        dx, dy, squared = _gradients(maps)
        length = squared.sqrt() + 1e-4
        cosine = (dx * angles.cos() + dy * angles.sin()) / length
        rows = _pool(length * cosine.pow(8), boxes, grid, scale)
        parts.append((rows / (rows.norm(dim=1, keepdim=True) + 1e-3)).sqrt())
    return torch.cat(parts, dim=1)


def _blur(maps: Tensor, side: int) -> Tensor:
    """Mean over a square window of odd side, along one axis and then the other."""
    height, width = maps.shape[-2:]
    padded = pad(maps, (side // 2,) * 4, mode="replicate")
    rows = reduce(add, (padded[:, :, i : i + height] for i in range(side)))
    return reduce(add, (rows[..., i : i + width] for i in range(side))) / side**2


def _texture(rgb: Tensor, boxes: Tensor) -> Tensor:
    """Local statistics of brightness and its gradient, which tell plain, striped, dotted and checkered apart."""
    grey = _blur(rgb.mean(1, keepdim=True), 3)
    dx, dy, squared = _gradients(grey)
    spots = (grey - _blur(grey, 5)).abs()
    maps = torch.cat([grey, grey**2, grey**3, spots, squared, dx * dx - dy * dy, 2 * dx * dy], dim=1)
    local = _blur(avg_pool2d(maps, 2), 5)  # half the resolution is enough
    mean, square, cube, spots, energy, difference, product = local.split(1, dim=1)
    variance = (square - mean**2).clamp_min(0)
    deviation = variance.sqrt()
    skew = (cube - 3 * mean * square + 2 * mean**3) / (deviation**3 + 1e-4)
    coherence = (difference**2 + product**2).sqrt() / (energy + 1e-4)
    busyness = (energy / (variance + 1e-3)).sqrt()
    measures = [energy.sqrt(), deviation, coherence, skew, skew.abs(), busyness, spots / (deviation + 0.03)]
    return _pool(torch.cat(measures, dim=1), boxes, 3, scale=1 / 2)


def _silhouette(rgb: Tensor, boxes: Tensor) -> Tensor:
    """Distance in colour of each of 8 x 8 cells from the mean of the cells around the box, the largest being 1."""
    cells = _pool(rgb, _widen(boxes, (boxes[..., 2:] - boxes[..., :2]) / 8), 10).unflatten(1, (3, 10, 10))
    inside = cells[:, :, 1:-1, 1:-1]  # (B * R, 3, 8, 8)
    outside = (cells.sum((2, 3)) - inside.sum((2, 3))) / (10**2 - 8**2)
    distance = (inside - outside[:, :, None, None]).norm(dim=1).flatten(1)
    return distance / (distance.amax(1, keepdim=True) + 0.05)


def _geometry(boxes: Tensor) -> Tensor:
    """Centre and side of boxes (B, R, 4), as they are and in soft bins, corners, area; in shares of the picture."""
    centres = (boxes[..., :2] + boxes[..., 2:]) / 2
    side = (boxes[..., 2:3] - boxes[..., :1]).sqrt()
    values = torch.cat([centres, side], dim=-1)  # (B, R, 3)
    bins = (-((values.unsqueeze(-1) - torch.linspace(0, 1, 7)) * 6).square()).exp().flatten(-2)
    return torch.cat([values, bins, boxes, side.pow(4)], dim=-1)
