"""What a trained model does, first as arrays, then as figures: attention of words, dependencies of dimensions."""

import inspect
import textwrap
from importlib import import_module
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import torch

from lib.cli import InputError
from lib.config import AttentionSettings, DependenciesSettings, ShowSettings
from lib.data.dataset import read_boxes, read_ids
from lib.data.images import find_pictures, open_picture
from lib.evaluation.attention import Attention, attention, paint
from lib.evaluation.evaluate import open_split_of
from lib.evaluation.score import Matcher, load, look_of
from lib.figures import import_matplotlib, new_figure, save_figure

SMALL = 11  # points
PANEL, COLUMNS, LARGEST = 1.7, 6, 400  # width of a panel in inches, panels side by side, pixels of a picture's side
HEAT, OPAQUE, DARKER = "YlOrRd_r", 0.8, 1.8  # dark to light, in grey too, on a picture that is darker than it is
HOW_TO_READ = "Light: what the word looks at; boxes of regions that overlap add up. Below: the word's own score."
COLOURS, BAR, BINS = "Blues", "steelblue", 30
LEAST_MASK = 1e-4  # below which an entry of the mask is drawn as nothing
NO_MASK = "this gate has no mask and no thresholds:\nevery dimension depends on all others"
WORDS, REGIONS, PARTNERS = 14, 9, 6  # of a group
OFTEN = 5  # times that a word must come among the captions, where some do


def open_model(settings: ShowSettings) -> Matcher:
    """The model of --checkpoint. Raises InputError, also where the figure could not be written in the end."""
    import_matplotlib(settings.out)
    return load(settings.checkpoint, settings.bert, settings.device, settings.precision, settings.engine)


# Attention


class Pair(NamedTuple):
    """An image, and what is said of it."""

    image: Any  # as `attention` takes it
    boxes: np.ndarray | None  # (R, 4) of its regions where these are given, in pixels
    picture: Path
    caption: str


def find_pair(matcher: Matcher, settings: AttentionSettings) -> Pair:
    """The picture --image, or the image of that id or number with what the data set stores of it. Raises InputError."""
    if Path(settings.image).is_file():
        if not settings.caption.strip():
            raise InputError(f"--image {settings.image}: say with --caption what is to be looked for in it")
        return Pair(settings.image, None, Path(settings.image), settings.caption)
    split = open_split_of([matcher.content], settings)[0]
    ids = read_ids(split) or [str(number) for number in range(len(split.features))]
    if settings.image in ids:
        place = ids.index(settings.image)
    elif settings.image.isdecimal() and int(settings.image) < len(ids):
        place = int(settings.image)
    else:
        what = f"neither a file nor an image of {split.folder} {split.name}, whose ids are like {ids[0]}"
        raise InputError(f"--image {settings.image}: {what}")
    caption = settings.caption or split.captions[np.searchsorted(split.image_of_caption, place)]
    if look_of(matcher.model):
        return Pair(split.features.paths[place], None, split.features.paths[place], caption)
    if (boxes := read_boxes(split)) is None:
        what = f"{split.folder} has no {split.name}_boxes.npy, which says where in a picture its regions are"
        raise InputError(f"{what}; python -m lib.prepare tsv, own and images make it, SCAN's files are without")
    (picture,) = find_pictures(split.folder, [ids[place]], settings.image_path)
    first, last = split.features.starts[place : place + 2]
    return Pair(split.features.read(np.array([place])), boxes[first:last], picture, caption)


def draw_attention(found: Attention, picture: PIL.Image.Image, caption: str) -> Any:
    """The picture, and for each word the same in grey with the word's attention painted on the regions' boxes.

    found: with boxes in pixels of the picture.
    """
    assert found.boxes is not None
    small = picture.copy()
    small.thumbnail((LARGEST, LARGEST))
    boxes = found.boxes * (small.width / picture.width)
    heats = [paint(weights, boxes, small.height, small.width) for weights in found.weights]
    most, columns = max(heat.max() for heat in heats), min(COLUMNS, len(heats) + 1)
    rows = -(-(len(heats) + 1) // columns)
    figure = new_figure(PANEL * columns + 1, rows * (PANEL * small.height / small.width + 0.5) + 0.8)
    figure.suptitle(textwrap.fill(caption, 16 * columns), parse_math=False)
    panels = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    labels = [("score of the pair", found.score), *zip(found.words, found.scores, strict=True)]
    for axes, label in zip_longest(panels, labels):
        axes.set(xticks=[], yticks=[], visible=label is not None)
        axes.set_xlabel("{}\n{:.2f}".format(*label or ("", 0)), parse_math=False)
    figure.supxlabel(HOW_TO_READ, fontsize=SMALL)
    panels[0].imshow(small)
    for axes, heat in zip(panels[1:], heats, strict=False):
        axes.imshow(small.convert("L"), cmap="gray", vmin=0, vmax=DARKER * 255)
        shown = axes.imshow(heat, cmap=HEAT, vmin=0, vmax=most, alpha=np.minimum(heat / most, OPAQUE))
    figure.colorbar(shown, ax=panels, label="share of the word's attention", aspect=40)
    return figure


def show_attention(settings: AttentionSettings) -> None:
    """show.py attention."""
    matcher = open_model(settings)
    pair = find_pair(matcher, settings)
    found, picture = attention(matcher, pair.image, pair.caption), open_picture(pair.picture)
    if pair.boxes is not None:
        found = found._replace(boxes=pair.boxes)
        if (pair.boxes.max(axis=0)[2:] > np.array(picture.size) + 1).any():
            what = "the boxes of its regions reach beyond it; they are of the same picture in another size"
            raise InputError(f"{pair.picture}: {what}: name the folder of the pictures of that size, --image_path")
    save_figure(draw_attention(found, picture, pair.caption), settings.out)


# Dependencies


class Dependencies(NamedTuple):
    """What the gate says: row i is made of what dimension i depends on."""

    D: np.ndarray  # (D, D) dependency matrix
    mask: np.ndarray | None  # (D, D) soft sparse mask; None for a gate without
    thresholds: np.ndarray | None  # (D,) lambda: by how many standard deviations a row's threshold exceeds its mean
    start: float | None  # mean of lambda when training began
    partners: np.ndarray  # (rows,) dimensions that a row of D is made of, rows of which nothing is left being left out


@torch.inference_mode()
def read_dependencies(matcher: Matcher) -> Dependencies:
    """The dependency matrix of a model and what it is made of. Raises InputError where it has none."""
    similarity = matcher.model.similarity
    D = similarity.dependency() if hasattr(similarity, "dependency") else None
    if D is None:
        name = matcher.content["architecture"]["similarity"]["name"]
        raise InputError(f"--similarity {name} has no dependency matrix: only X-Dim's gates make one")
    mask = thresholds = start = None
    if hasattr(gate := similarity.gate, "mask"):
        mask, thresholds = gate.mask()[0].cpu().numpy(), gate.threshold_scale.cpu().numpy()
        options = matcher.content["architecture"]["similarity"]["options"].get("gate", {}).get("options", {})
        start = options.get("start", inspect.signature(type(gate)).parameters["start"].default)
    squares = D.square()
    kept = squares[squares.sum(dim=1) >= 0.25]  # as the log counts them (AdaptiveGate.figures)
    partners = kept.sum(dim=1).square() / kept.square().sum(dim=1)
    return Dependencies(D.cpu().numpy(), mask, thresholds, start, partners.cpu().numpy())


def order_dimensions(D: np.ndarray) -> np.ndarray:
    """An order (D,) of the dimensions of D (D, D) in which those that depend on each other stand side by side.

    That of the Fiedler vector: of the second largest eigenvalue of N^-1/2 (|D| + |D|^T) N^-1/2, whose diagonal is left
    out and N holds the sums of the rows, scaled by N^-1/2.
    """
    weights = np.abs(D) + np.abs(D).T
    np.fill_diagonal(weights, 0)
    scale = 1 / np.sqrt(np.maximum(weights.sum(axis=1), 1e-6))
    _, vectors = np.linalg.eigh(scale[:, None] * weights * scale)
    return np.argsort(vectors[:, -2] * scale, kind="stable")


def draw_dependencies(found: Dependencies, title: str = "") -> Any:
    """D and the mask in the order of `order_dimensions`; the thresholds and the partners of a row as histograms."""
    figure, order = new_figure(11, 8.5), order_dimensions(found.D)
    figure.suptitle(title)
    (of_D, of_mask), (of_thresholds, of_partners) = figure.subplots(2, 2, height_ratios=(5, 3))
    panels = [(of_D, found.D, "Dependency matrix D\na row: what a dimension depends on", None)]
    if found.mask is None:
        of_mask.text(0.5, 0.5, NO_MASK, ha="center", va="center")
    else:
        is_open = f"{np.mean(found.mask >= 0.5):.1%} of it at least half open"
        scale = import_module("matplotlib.colors").LogNorm(LEAST_MASK, 1, clip=True)
        panels.append((of_mask, found.mask, f"Mask M, before rows are brought to length 1\n{is_open}", scale))
    for axes, matrix, name, scale in panels:
        image = axes.imshow(matrix[order][:, order], cmap=COLOURS, norm=scale, interpolation="nearest")
        axes.set_title(name, fontsize=SMALL)
        figure.colorbar(image, ax=axes)
    side = f"the {len(order)} dimensions, dependent ones side by side"
    for axes in (of_D, of_mask):
        axes.set(xlabel=side, ylabel="the same order", xticks=[], yticks=[])
    of_thresholds.set(title="Thresholds", xlabel="lambda: standard deviations above the row's mean", ylabel="rows")
    if found.thresholds is None:
        of_thresholds.text(0.5, 0.5, NO_MASK, ha="center", va="center")
    else:
        of_thresholds.hist(found.thresholds, bins=BINS, color=BAR, label="now")
        of_thresholds.axvline(found.start, color="black", linestyle="--", label=f"mean at the start, {found.start:g}")
        of_thresholds.legend()
    of_partners.set(title="Partners: how many dimensions a row is made of", xlabel="dimensions", ylabel="rows")
    of_partners.hist(found.partners, bins=BINS, color=BAR)
    if closed := len(order) - len(found.partners):
        of_partners.text(0.98, 0.95, f"{closed} rows have none", ha="right", va="top", transform=of_partners.transAxes)
    return figure


def show_dependencies(settings: DependenciesSettings) -> None:
    """show.py dependencies."""
    matcher = open_model(settings)
    save_figure(draw_dependencies(read_dependencies(matcher), str(matcher.content["path"])), settings.out)
