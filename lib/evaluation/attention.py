"""What a pair's score is made of: the regions that each word attends to, and what each group of dimensions adds.

X-Dim's score is the mean over all pieces of a caption, special tokens too; a global head's share is added to it.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageDraw
import torch
from torch import Tensor

from lib.cli import InputError, refusing
from lib.data.dataset import Split, names_of, read_boxes
from lib.data.images import find_pictures, open_picture
from lib.evaluation.score import Block, Matcher

SIDE, COLUMNS, DRAWN = 160, 6, 23  # pixels of a panel's side, panels side by side, words that are drawn
DARK, LINE, TINY = 0.25, 15, 1e-9  # what is left of a picture's light where nobody looks; pixels of a line of text


class Pair(NamedTuple):
    """An image, and what is said of it."""

    image: Any  # as `attention` takes it
    picture: PIL.Image.Image
    boxes: Any  # (R, 4) of its regions, in the picture's pixels; None where they are not known yet
    caption: str


class Attention(NamedTuple):
    """A pair of an image and a caption, word by word."""

    words: list[str]  # W of them, as the caption spells them
    weights: np.ndarray  # (W, R): share of each region in a word's context; each row sums to 1
    scores: np.ndarray  # (W,): each word's own score
    score: float  # of the pair
    groups: np.ndarray  # (D,): what the group of each dimension adds to X-Dim's score, which is their sum
    boxes: np.ndarray | None = None  # (R, 4): x1 y1 x2 y2 in pixels of the upright picture


@torch.inference_mode()
def attention(matcher: Matcher, image: Any, caption: str) -> Attention:
    """What a model looks at in an image for a caption, and how it comes to its score. Raises InputError.

    image: a picture, its path or PIL's, or features (R, img_dim) of regions, without boxes.
    """
    ((seen, boxes),) = matcher.take([image])
    (block,) = matcher.embed_images([matcher.batch([seen])])
    words, lengths = matcher.embed_captions(matcher.tokenizer.tokenize([caption]), 1)
    (found,), added = explain(matcher, block, words, caption), 0.0
    if head := matcher.model.global_head:
        with matcher.compute.in_force():
            added = (head.weight * head(block.regions, words, lengths, block.real)).item()
    return found._replace(score=found.score + added, boxes=None if boxes is None else boxes.numpy())


@torch.inference_mode()
def explain(matcher: Matcher, block: Block, words: Tensor, caption: str, D: Tensor | None = None) -> list[Attention]:
    """The same for images that are embedded already and one caption, without a global head's share of the score.

    words: (W, D), or (W, D + G) as the block's regions with a global head, embeddings of the caption's pieces. D: the
    dependency matrix, where it is at hand. A word's row is the mean of its pieces; special tokens and what the text
    model does not take are left out. Raises InputError where the similarity attends to nothing.
    """
    weights, groups = explain_pieces(matcher, block, words, D)
    scores, groups = groups.sum(dim=-1), groups.mean(dim=1)  # (I, W), (I, D)
    names, mean = rows_of(matcher, caption, len(words))
    counts = [weights.shape[-1]] * len(weights) if block.real is None else block.real.sum(dim=1).tolist()
    rows = [one[:, :count].numpy() for one, count in zip(mean @ weights, counts, strict=True)]
    parts = zip(rows, (scores @ mean.T).numpy(), scores.mean(dim=1).tolist(), groups.numpy(), strict=True)
    return [Attention(names, *part) for part in parts]


@torch.inference_mode()
def explain_pieces(matcher: Matcher, block: Block, words: Tensor, D: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What `explain` adds up, on the CPU: attention (I, W, R) of each piece, what each group adds to it (I, W, D)."""
    similarity, head = matcher.model.similarity, matcher.model.global_head
    if not hasattr(similarity, "explain"):
        name = matcher.model.architecture["similarity"]["name"]
        raise InputError(f"--similarity {name}: compares one vector of an image with one of a caption, no attention")
    with matcher.compute.in_force():
        regions, words = map(head.of_xdim, (block.regions, words)) if head else (block.regions, words)
        D = matcher.dependency() if D is None else D
        weights, groups = similarity.explain(regions, words, D, block.real)
        return weights.float().cpu(), groups.float().cpu()


def rows_of(matcher: Matcher, caption: str, pieces: int) -> tuple[list[str], Tensor]:
    """The words of a caption, and the matrix (W, pieces) that makes their rows as means of pieces; see `explain`."""
    tokenizer = matcher.tokenizer
    numbers, spelled = tokenizer.spell(caption)
    before, after = len(tokenizer.prefix), len(tokenizer.suffix)
    word_of = torch.tensor([-1] * before + numbers[: pieces - before - after] + [-1] * after)
    words = word_of[word_of >= 0].unique()
    own = (word_of == words[:, None]).float()
    return [spelled[word] for word in words.tolist()], own / own.sum(dim=1, keepdim=True)


def light(picture: PIL.Image.Image, boxes: np.ndarray, weights: np.ndarray, side: int) -> list[np.ndarray]:
    """A picture of at most `side` pixels, and once more for each word, bright where it looks: uint8 (H, W, 3).

    boxes: (R, 4) in the given picture's pixels. weights: (W, R). A region's share is spread over its box; what lies on
    a pixel is compared with an even look, which else would show where boxes overlap. Where that is most, a word's
    picture is as bright as the first, and DARK of it where there is nothing.
    """
    small = picture.copy()
    small.thumbnail((side, side))
    scales = np.tile(np.divide(small.size, picture.size), 2)  # which rounding makes differ
    pixels, edges = np.asarray(small), np.rint(boxes * scales).astype(int).clip(0)

    def spread(shares: np.ndarray) -> np.ndarray:
        density = np.zeros((small.height, small.width, 1), np.float32)
        for share, (x1, y1, x2, y2) in zip(shares, edges, strict=True):
            part = density[y1 : max(y2, y1 + 1), x1 : max(x2, x1 + 1)]
            part += share / max(part.size, 1)
        return density

    even = np.maximum(spread(np.ones(len(edges))), TINY)
    heats = [spread(of_word) / even for of_word in weights]
    return [pixels, *((pixels * (DARK + (1 - DARK) * heat / max(heat.max(), TINY))).astype(np.uint8) for heat in heats)]


def partners(D: Tensor | None, dims: Sequence[int], number: int) -> list[list[tuple[int, float]]]:
    """For each of some dimensions the others with the largest entries of its row of D, its group, and these entries."""
    if D is None:
        return [[] for _ in dims]
    rows = D[list(dims)].float().cpu()
    rows[torch.arange(len(rows)), list(dims)] = -1
    values, others = rows.topk(min(number, len(D) - 1), dim=1)
    return [list(zip(*pair, strict=True)) for pair in zip(others.tolist(), values.tolist(), strict=True)]


# Of a data set, as pictures


def find_pairs(matcher: Matcher, split: Split, images: Sequence[int], image_path: str = "") -> list[Pair]:
    """Images of a split, each with its first caption. Raises InputError where pictures or boxes are missing."""
    vision, features, pairs = matcher.model.vision, split.features, []
    stored = None if vision else read_boxes(split)
    if not vision and stored is None:
        what = f"{split.folder} has no {split.name}_boxes.npy, which says where in a picture its regions are"
        raise InputError(f"{what}; python -m lib.prepare tsv and images write it, SCAN's files are without")
    names = features.paths if vision else names_of(split)
    paths = [names[image] for image in images]
    paths = paths if vision else find_pictures(split.folder, paths, image_path)
    for image, path in zip(images, paths, strict=True):
        with refusing(str(path)):
            picture = open_picture(path)
        if stored is None:
            taken, boxes = picture, vision.boxes.cpu().numpy() * np.tile(picture.size, 2)
        else:
            taken, boxes = features.read(np.array([image])), stored[slice(*features.starts[image : image + 2])]
        if (boxes[:, 2:] > np.array(picture.size) + 1).any():
            what = "the boxes of its regions reach beyond it, they are of another size of this picture"
            raise InputError(f"{path}: {what}; say with --image_path where the pictures of that size are")
        pairs.append(Pair(taken, picture, boxes, split.captions[np.searchsorted(split.image_of_caption, image)]))
    return pairs


def draw_words(pair: Pair, found: Attention) -> PIL.Image.Image:
    """The picture, small, and again for each word, lit where the word looks; below it the word and its score."""
    lit = light(pair.picture, pair.boxes, found.weights[:DRAWN], SIDE)
    texts = [("score", found.score), *zip(found.words, found.scores, strict=True)]
    height, columns = len(lit[0]), min(COLUMNS, len(lit))
    sheet = PIL.Image.new("RGB", (columns * SIDE, -(-len(lit) // columns) * (height + LINE)), "white")
    pen = PIL.ImageDraw.Draw(sheet)
    for number, (panel, (word, score)) in enumerate(zip(lit, texts, strict=False)):
        x, y = number % columns * SIDE, number // columns * (height + LINE)
        sheet.paste(PIL.Image.fromarray(panel), (x, y))
        pen.text((x + 2, y + height), f"{word} {score:.2f}", "black", font_size=12)
    return sheet
