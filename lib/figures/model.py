"""What a trained model does, as arrays and as figures: which of its dimensions depend on each other."""

import inspect
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
import torch

from lib.cli import InputError
from lib.config import DependenciesSettings, ShowSettings
from lib.evaluation.score import Matcher, load
from lib.figures import import_matplotlib, new_figure, save_figure

COLOURS, BAR, BINS = "Blues", "steelblue", 30  # light to dark, in grey too
SMALL = 11  # points
LEAST_MASK = 1e-4  # below which an entry of the mask is drawn as nothing
NO_MASK = "this gate has no mask and no thresholds:\nevery dimension depends on all others"


def open_model(settings: ShowSettings) -> Matcher:
    """The model of --checkpoint. Raises InputError, also where the figure could not be written in the end."""
    import_matplotlib(settings.out)
    return load(settings.checkpoint, settings.bert, settings.device, settings.precision, settings.engine)


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
