"""Draw what a trained model does: what its words look at, and which of its dimensions depend on each other.

Each command writes one file.
"""

import sys
from collections.abc import Callable, Sequence

from lib.cli import InputError, check_packages, program
from lib.config import AttentionSettings, CurvesSettings, DependenciesSettings, GallerySettings, parse

ABOUT = {
    "attention": "Draw what each word of a caption looks at in a picture, with the word's own score.",
    "dependencies": "Draw the dependency matrix, dependent dimensions side by side, its mask and thresholds.",
    "retrieval": "Write a page of queries with the pictures or captions found for them, the failures first.",
    "training": "Draw the loss, dev's rSum and the gate's sparsity of one or several runs.",
}
SETTINGS: dict[str, type] = {
    "attention": AttentionSettings,
    "dependencies": DependenciesSettings,
    "retrieval": GallerySettings,
    "training": CurvesSettings,
}


@program
def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] not in ABOUT:
        lines = [f"show.py {name:<14}{text}" for name, text in ABOUT.items()]
        if argv and argv[0] in ("-h", "--help"):
            print("\n".join([*lines, "show.py COMMAND --help: its flags"]))
            return
        raise InputError(f"expected show.py {', '.join(ABOUT)} ... (see show.py --help)")
    settings = parse(SETTINGS[argv[0]], ABOUT[argv[0]], argv[1:], command=f"show.py {argv[0]}")
    check_packages()
    from lib.figures import model, results  # importing PyTorch takes seconds: not before the flags are right

    draw: dict[str, Callable] = {
        "attention": model.show_attention,
        "dependencies": model.show_dependencies,
        "retrieval": results.show_gallery,
        "training": results.show_curves,
    }
    draw[argv[0]](settings)


if __name__ == "__main__":
    sys.exit(main())
