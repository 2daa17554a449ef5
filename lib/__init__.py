"""X-Dim: image-text matching with cross-dimensional semantic dependency.

from lib import load
model = load("runs/demo")                       # a run folder, a checkpoint of this project or a published one
scores = model.score(regions, ["a red ball"])   # (images, captions)
"""

__version__ = "0.3.0"


def load(checkpoint, **settings):
    """Load a trained model; see `lib.evaluation.score.load` for arguments, result and errors."""
    from lib.evaluation import score  # importing torch takes seconds: only when asked for

    return score.load(checkpoint, **settings)
