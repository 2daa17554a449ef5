"""What a trained model does, first as arrays, then as figures: attention of words, dependencies of dimensions."""

import inspect
import textwrap
from collections import defaultdict
from collections.abc import Sequence
from importlib import import_module
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import torch

from lib.cli import QUOTED, InputError, refusing, with_bar
from lib.config import AttentionSettings, DimensionSettings, ShowSettings
from lib.data.batches import ImageBatches
from lib.data.dataset import Split, names_of, read_ids
from lib.data.images import open_picture
from lib.evaluation.attention import Attention, Pair, attention, explain_pieces, find_pairs, light, rows_of
from lib.evaluation.evaluate import open_split_of
from lib.evaluation.score import BLOCK, Matcher, load, look_of
from lib.figures import DPI, import_matplotlib, new_figure, save_figure
from lib.files import refuse_inputs

WIDE, SMALL = 8.7, 10  # inches, points: 8 of them where the figure is printed 7 inches wide
PANEL, COLUMNS, LARGEST = 1.2, 6, 256  # width of a panel in inches, panels side by side, pixels of a picture's side
LETTERS = 13  # of a word that a panel has room for in a line
TALLEST = 4  # times its width that a panel is high
HOW_TO_READ = "Bright: what the word looks at. Below: the word's own score."
COLOURS, STEPS, BAR, BINS = "Blues", 16, "steelblue", 30
MATRIX = 2.9  # inches of a drawn matrix
LEAST_MASK = 1e-4  # below which an entry of the mask is drawn as nothing
WORDS, REGIONS, PARTNERS, LEAST_PARTNER = 14, 9, 6, 0.05  # that are drawn of a group, the smallest entry of D
OFTEN = 5  # times that a word must come among the captions, where some do
HOW_TO_READ_REGIONS = "Regions that respond most. Below: the word that looks at it, what the group adds for that."


def open_model(settings: ShowSettings) -> Matcher:
    """The model of --checkpoint. Raises InputError, also where the figure could not be written in the end."""
    import_matplotlib(settings.out)
    return load(settings.checkpoint, settings.bert, settings.device, settings.precision, settings.engine)


# Attention


def find_pair(matcher: Matcher, settings: AttentionSettings) -> Pair:
    """What --image, a picture's path or the id or number of an image of the data set, and --caption mean; of a path
    without boxes. Raises InputError."""
    if Path(settings.image).is_file():
        if not settings.caption.strip():
            raise InputError(f"--image {settings.image}: say with --caption what is to be looked for in it")
        with refusing(f"--image {settings.image}"):
            return Pair(settings.image, open_picture(settings.image), None, settings.caption)
    split = open_split_of([matcher.content], settings)[0]
    ids = read_ids(split) or []
    numbers = {str(place): place for place in range(len(split.features))}
    place = (numbers | {one: place for place, one in enumerate(ids)}).get(settings.image)
    if place is None:
        where = f"{split.folder} {split.name}, whose ids are like {[*ids, *numbers][0]}"
        raise InputError(f"--image {settings.image}: neither a file nor an image of {where}")
    (pair,) = find_pairs(matcher, split, [place], settings.image_path)
    return pair._replace(caption=settings.caption.strip() or pair.caption)


def draw_attention(found: Attention, picture: PIL.Image.Image, caption: str) -> Any:
    """The picture, and for each word the same, bright where it looks (`light`), with its score. found: with boxes."""
    assert found.boxes is not None
    lit = light(picture, found.boxes, found.weights, LARGEST)
    rows = -(-len(lit) // COLUMNS)
    columns, shape = -(-len(lit) // rows), min(len(lit[0]) / lit[0].shape[1], TALLEST)
    figure = new_figure(PANEL * columns, rows * (PANEL * shape + 0.5) + 1)
    figure.suptitle(textwrap.fill(caption, 14 * columns), parse_math=False)
    words = [textwrap.fill(word, LETTERS) for word in found.words]
    labels = [("score of the pair", found.score), *zip(words, found.scores, strict=True)]
    for axes, pixels, label in zip_longest(figure.subplots(rows, columns, squeeze=False).flat, lit, labels):
        axes.set(xticks=[], yticks=[], visible=label is not None)
        if label:
            axes.imshow(pixels, interpolation="nearest")
            axes.set_xlabel("{}\n{:.2f}".format(*label), parse_math=False)
    figure.supxlabel(textwrap.fill(HOW_TO_READ, 16 * columns), fontsize=SMALL)
    return figure


def show_attention(settings: AttentionSettings) -> None:
    """show.py attention."""
    refuse_inputs([settings.out], [settings.image])
    matcher = open_model(settings)
    image, picture, boxes, caption = find_pair(matcher, settings)
    found = attention(matcher, image, caption)
    if not found.words:
        raise InputError(f"--caption {caption[:QUOTED]!a}: no words are in it")
    found = found._replace(boxes=found.boxes if boxes is None else boxes)
    save_figure(draw_attention(found, picture, caption), settings.out)


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
    if (D := matcher.dependency()) is None:
        name = matcher.model.architecture["similarity"]["name"]
        raise InputError(f"--similarity {name} has no dependency matrix and no groups of dimensions: X-Dim's gates do")
    mask = thresholds = start = None
    if hasattr(gate := matcher.model.similarity.gate, "mask"):
        mask, thresholds = gate.mask()[0].cpu().numpy(), gate.threshold_scale.cpu().numpy()
        options = matcher.content["architecture"]["similarity"]["options"].get("gate", {}).get("options", {})
        start = options.get("start", inspect.signature(type(gate)).parameters["start"].default)
    squares = D.square()
    kept = squares[squares.sum(dim=1) >= 0.25]  # as the log counts them (AdaptiveGate.figures)
    partners = kept.sum(dim=1).square() / kept.square().sum(dim=1)
    return Dependencies(D.cpu().numpy(), mask, thresholds, start, partners.cpu().numpy())


def order_dimensions(D: np.ndarray) -> np.ndarray:
    """An order (D,) of the dimensions of D (D, D) in which those that depend on each other stand side by side.

    Spectral bisection: the dimensions in the order of the Fiedler vector, cut in two at its largest step (an eighth of
    them at least), and so on in each part. The graph's weights are |D| + |D|^T without the diagonal.
    """
    weights = np.abs(D) + np.abs(D).T
    np.fill_diagonal(weights, 0)

    def arrange(dims: np.ndarray) -> np.ndarray:
        within = weights[np.ix_(dims, dims)]
        scale = 1 / np.sqrt(np.maximum(within.sum(axis=1), 1e-6))
        _, vectors = np.linalg.eigh(scale[:, None] * within * scale)
        fiedler = vectors[:, -2] * scale
        fiedler *= np.sign(fiedler @ (np.arange(len(dims)) - len(dims) / 2)) or 1  # keep the whole's direction
        dims, steps, least = dims[np.argsort(fiedler, kind="stable")], np.diff(np.sort(fiedler)), len(dims) // 8
        cut = least + 1 + int(steps[least : len(steps) - least].argmax())
        return np.concatenate([arrange(part) if len(part) > 3 else part for part in np.split(dims, [cut])])

    return arrange(np.arange(len(D)))


def draw_dependencies(found: Dependencies, title: str = "") -> Any:
    """D and the mask in the order of `order_dimensions`; the thresholds and the partners of a row as histograms."""
    dims, order = len(found.D), order_dimensions(found.D)
    figure = new_figure(WIDE, 7, dpi=max(DPI, min(400, dims / MATRIX)))  # a pixel for each entry
    figure.suptitle(title, fontsize=SMALL, parse_math=False)
    (of_D, of_mask), (of_thresholds, of_partners) = figure.subplots(2, 2, height_ratios=(5, 3))
    name = "Dependency matrix D\na row: what a dimension depends on"
    panels: list[tuple[Any, ...]] = [(of_D, found.D, name, {"vmin": 0})]
    if found.mask is None:
        of_mask.text(0.5, 0.5, "this gate has no mask:\neverything depends on everything", ha="center", va="center")
        of_thresholds.text(0.5, 0.5, "this gate has no thresholds", ha="center", va="center")
    else:
        half = f"{np.sum(found.mask >= 0.5):,} of {found.mask.size:,} entries at least half open"
        name = f"Mask M, before rows are brought to length 1\n{half}"
        panels.append((of_mask, found.mask, name, {"norm": "log", "vmin": LEAST_MASK, "vmax": 1}))
        of_thresholds.hist(found.thresholds, bins=BINS, color=BAR)
        of_thresholds.axvline(found.start, color="black", linestyle="--")
    colours = import_module("matplotlib").colormaps[COLOURS].resampled(STEPS)  # as many as keep the file small
    for axes, matrix, name, scale in panels:
        image = axes.imshow(matrix[order][:, order], cmap=colours, interpolation="nearest", **scale)
        figure.colorbar(image, ax=axes)
        axes.set_title(name, fontsize=SMALL)
    for axes in (of_D, of_mask):
        labels = {"xlabel": f"the {dims} dimensions, dependent ones side by side", "ylabel": "the same order"}
        axes.set(xticks=[], yticks=[], **labels)
    of_thresholds.set(xlabel="lambda: standard deviations above the row's mean", ylabel="rows")
    of_thresholds.set_title("Thresholds; dashed: their mean at the start", fontsize=SMALL)
    of_partners.hist(found.partners, bins=BINS, color=BAR)
    of_partners.set(xlabel="dimensions", ylabel=f"rows ({dims - len(found.partners)} have none)")
    of_partners.set_title("Partners: how many dimensions a row is made of", fontsize=SMALL)
    return figure


def show_dependencies(settings: ShowSettings) -> None:
    """show.py dependencies."""
    matcher = open_model(settings)
    save_figure(draw_dependencies(read_dependencies(matcher), str(matcher.content["path"])), settings.out)


# What a group responds to

# What the group adds to the words' scores for looking at it, the image's place in the split, which of its regions, and
# the word of the image's caption that gains most.
Region = tuple[float, int, int, str]


class Group(NamedTuple):
    """What a dimension, with those that it depends on, adds to the scores of images and captions of theirs."""

    dimension: int
    partners: list[tuple[int, float]]  # the largest entries of the dimension's row of D
    words: dict[str, list[float]]  # what is added to each word's score, each time that it comes
    regions: list[Region]  # of each image the one with the largest value, largest first


@torch.inference_mode()
def respond(matcher: Matcher, split: Split, dimension: int, pairs: int = 1000) -> Group:
    """What the group of a dimension adds for captions evenly spaced through a split, each with its own image.

    A region's share in what is added to a word is the word's attention to it. Raises InputError without such a group.
    """
    D = torch.from_numpy(read_dependencies(matcher).D).to(matcher.compute.device)
    if dimension >= len(D):
        raise InputError(f"dimension {dimension}: the model has {len(D)}, from 0 to {len(D) - 1}")
    chosen = np.unique(np.linspace(0, len(split.captions) - 1, pairs).astype(int))
    captions, places = [split.captions[k] for k in chosen], split.image_of_caption[chosen].tolist()
    images = ImageBatches(split.features, 1, matcher.compute.half_features, look_of(matcher.model))
    blocks = matcher.embed_images([images[place] for place in dict.fromkeys(places)])
    of_place = dict(zip(dict.fromkeys(places), blocks, strict=True))
    words, lengths = matcher.embed_captions(matcher.tokenizer.tokenize(captions), BLOCK)
    heard, seen = defaultdict(list), {}
    embedded = zip(captions, places, words.split(lengths.tolist()), strict=True)
    for caption, place, pieces in with_bar(embedded, "pairs", len(captions)):
        weights, groups = explain_pieces(matcher, of_place[place], pieces, D)
        names, mean = rows_of(matcher, caption, len(pieces))
        if not names:  # none of its words is one that the text model takes
            continue
        shares = mean @ (groups[0, :, dimension, None] * weights[0])  # (W, R)
        for name, value in zip(names, shares.sum(dim=1).tolist(), strict=True):
            heard[name.lower()].append(value)
        value, region = shares.sum(dim=0).max(dim=0)
        found = (value.item(), place, int(region), names[int(shares[:, region].argmax())])
        seen[place] = max(seen.get(place, found), found)
    if not seen:
        raise InputError(f"{split.folder} {split.name}: no words are in the captions looked at, take more --pairs")
    best = D[dimension].topk(min(PARTNERS, len(D)))
    partners = list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return Group(dimension, partners, dict(heard), sorted(seen.values(), reverse=True))


def crop(matcher: Matcher, split: Split, regions: Sequence[Region], image_path: str = "") -> list[PIL.Image.Image]:
    """The regions' parts of their pictures. Raises InputError where boxes or pictures are missing."""
    pairs = find_pairs(matcher, split, [image for _, image, _, _ in regions], image_path)
    crops = []
    for (_, picture, boxes, _), (_, _, region, _) in zip(pairs, regions, strict=True):
        x1, y1, x2, y2 = np.rint(boxes[region]).astype(int).tolist()
        crops.append(picture.crop((x1, y1, max(x2, x1 + 1), max(y2, y1 + 1))))
    return crops


def draw_group(group: Group, crops: Sequence[PIL.Image.Image | str], title: str = "") -> Any:
    """The words to whose scores a group adds most as bars, and below them crops of regions, or texts instead."""
    figure = new_figure(WIDE, 5.6)
    grid = figure.add_gridspec(2, REGIONS, height_ratios=(3, 1))
    made_of = ", ".join(f"{other} ({weight:.2f})" for other, weight in group.partners if weight >= LEAST_PARTNER)
    title = f"{title}\nDimension {group.dimension} depends on {made_of or 'nothing'}"
    figure.suptitle(title, fontsize=SMALL, parse_math=False)
    often = min(OFTEN, max(map(len, group.words.values())))
    means = {word: np.mean(values) for word, values in group.words.items() if len(values) >= often}
    best = sorted(means, key=lambda word: means[word])[-WORDS:]
    bars = figure.add_subplot(grid[0, :])
    bars.set_title("Words that respond most", fontsize=SMALL)
    bars.barh(range(len(best)), [means[word] for word in best], color=BAR)
    names = [f"{word} ({len(group.words[word])} times)" for word in best]
    bars.set_yticks(range(len(best)), names, parse_math=False)
    mean = np.mean(list(chain.from_iterable(group.words.values())))
    bars.axvline(mean, color="black", linestyle="--", label="mean of all words")
    bars.set_xlabel("what the group of these dimensions adds to the word's score, on average")
    bars.legend(loc="lower right")
    for k, ((value, _, _, word), shown) in enumerate(zip(group.regions, crops, strict=False)):
        axes = figure.add_subplot(grid[1, k], xticks=[], yticks=[])
        axes.set_xlabel(f"{word}\n{value:.2f}", parse_math=False)
        if isinstance(shown, str):
            text = textwrap.fill(shown, 8)
            axes.text(0.5, 0.5, text, ha="center", va="center", fontsize=SMALL, parse_math=False).set_in_layout(False)
        else:
            axes.imshow(shown)
    figure.supxlabel(HOW_TO_READ_REGIONS, fontsize=SMALL)
    return figure


def show_dimension(settings: DimensionSettings) -> None:
    """show.py dimension."""
    matcher = open_model(settings)
    split = open_split_of([matcher.content], settings)[0]
    group = respond(matcher, split, settings.dimension, settings.pairs)
    best = group.regions[:REGIONS]
    try:
        crops: list[Any] = crop(matcher, split, best, settings.image_path)
    except InputError as error:
        print(f"no pictures of regions: {error}")
        names = names_of(split)
        crops = [f"region {region} of {names[image]}" for _, image, region, _ in best]
    save_figure(draw_group(group, crops, f"{matcher.content['path']}, {split.folder.name} {split.name}"), settings.out)
