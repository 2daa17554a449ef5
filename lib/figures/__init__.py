"""Figures: what is to be seen as arrays first, drawn by Matplotlib second, as files of their own."""

import io
import sys
import warnings
from pathlib import Path
from typing import Any

import PIL.Image

from lib.cli import optional, reason
from lib.files import check_writable, replacing

DPI = 150  # pixels an inch


def import_matplotlib(out: str = "") -> Any:
    """matplotlib.figure. Raises InputError where it is missing, or `out`, a figure's file, could not be written."""
    check_writable(out)
    return optional("matplotlib.figure", "show.py")


def new_figure(width: float, height: float, dpi: float = DPI) -> Any:
    """An empty figure of this size in inches, whose panels are placed so that no texts overlap. dpi: pixels an inch."""
    return import_matplotlib().Figure(figsize=(width, height), dpi=dpi, layout="compressed")


def save_figure(figure: Any, out: str) -> None:
    """Write a figure as what the file's ending says: .png, .pdf or .svg. Raises InputError."""
    kind, drawn = Path(out).suffix[1:].lower(), io.BytesIO()
    with warnings.catch_warnings(record=True) as said:
        figure.savefig(drawn, format=kind)
    with replacing(out) as file:
        if kind == "png":  # Matplotlib's is larger: nothing in it is transparent, but it says so of each pixel
            PIL.Image.open(drawn).convert("RGB").save(file, "PNG", optimize=True, dpi=(figure.dpi,) * 2)
        else:
            file.write(drawn.getvalue())
    if said:  # no font has a letter, no room is left
        print(f"warning: {reason(said[0].message)}", file=sys.stderr)  # type: ignore[arg-type]
    print(out)
