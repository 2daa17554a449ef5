"""Draw what a trained model does and how a training went. Each command writes one file (docs/figures.md)."""

import sys
from collections.abc import Callable, Sequence

from lib.cli import check_packages, program
from lib.config import (
    AttentionSettings,
    CurvesSettings,
    DimensionSettings,
    GallerySettings,
    ShowSettings,
    parse_command,
)

COMMANDS = {
    "attention": (
        AttentionSettings,
        "Draw what each word of a caption looks at in a picture, and the word's own score.",
    ),
    "dependencies": (
        ShowSettings,
        "Draw the dependency matrix, dependent dimensions side by side, mask and thresholds.",
    ),
    "dimension": (DimensionSettings, "Draw which words and regions a dimension with its partners responds to."),
    "retrieval": (GallerySettings, "Write a page of queries with the pictures or captions found, the failures first."),
    "training": (CurvesSettings, "Draw the loss, dev's rSum and the gate's sparsity of one or several runs."),
}


@program
def main(argv: Sequence[str] | None = None) -> None:
    settings = parse_command(COMMANDS, argv)
    check_packages()
    from lib.figures import model, results  # importing PyTorch takes seconds: not before the flags are right

    draw: dict[type, Callable] = {
        AttentionSettings: model.show_attention,
        ShowSettings: model.show_dependencies,
        DimensionSettings: model.show_dimension,
        GallerySettings: results.show_gallery,
        CurvesSettings: results.show_curves,
    }
    draw[type(settings)](settings)


if __name__ == "__main__":
    sys.exit(main())
