"""X-Dim: image-text matching with cross-dimensional semantic dependency.

from lib import load
model = load("runs/demo")                                # a run folder, a checkpoint of this project or a published one
scores = model.score(["a.jpg", "b.jpg"], ["a red ball"])  # (images, captions); or arrays of regions for pictures
"""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lib.evaluation.score import Matcher

__version__ = "0.3.0"


def load(
    checkpoint: str | Path,
    bert: str = "",
    device: str = "auto",
    precision: str = "",
    engine: str = "",
    image_weights: str = "",
) -> "Matcher":
    """Load a trained model; `score(images, captions)` of the result scores, in one thread at a time.

    checkpoint: a run folder (its best epoch), a checkpoint of this project or a published one. bert: name or folder of
    the language model, for a published checkpoint that is not BERT-base; others carry it. device: auto, cpu, cuda or
    cuda:N. precision: fp32, tf32 (CUDA) or bf16; empty: the device's default. engine: tiled, or plain for the formula
    of lib/model/xdim.py; empty: what the model was trained with. image_weights: file of the vision model's weights (or
    an hf: model's folder), for scoring pictures by a model whose regions were made with weights that are elsewhere now.
    Raises InputError.
    """
    from lib.evaluation import score  # importing torch takes seconds: only when asked for

    return score.load(checkpoint, bert, device, precision, engine, image_weights)
