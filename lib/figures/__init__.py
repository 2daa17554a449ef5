"""Figures: what is to be seen as arrays first, drawn by Matplotlib second, as files of their own."""

import io
import sys
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import PIL.Image

from lib.cli import InputError, reason
from lib.files import check_writable, replacing

DPI = 150  # pixels an inch


def import_matplotlib(out: str = "") -> Any:
    """matplotlib.figure. Raises InputError where it is missing, or `out`, a figure's file, could not be written."""
    check_writable(out)
    try:
        return import_module("matplotlib.figure")
    except ModuleNotFoundError as error:
        raise InputError(f"{error}: figures need Matplotlib, run: pip install matplotlib") from None


def new_figure(width: float, height: float, dpi: float = DPI) -> Any:
    """An empty figure of this size in inches, whose panels are placed so that no texts overlap. dpi: pixels an inch."""
    return import_matplotlib().Figure(figsize=(width, height), dpi=dpi, layout="compressed")


def save_figure(figure: Any, out: str) -> None:
    """Write a figure as what the file's ending says: .png, .pdf or .svg. Raises InputError."""
    kind = Path(out).suffix[1:].lower()
    with replacing(out) as file, warnings.catch_warnings(record=True) as said:
        figure.savefig(drawn := io.BytesIO(), format=kind)
        if kind == "png":  # without transparency, which nothing uses, a tenth less
            PIL.Image.open(drawn).convert("RGB").save(file, "PNG", optimize=True)
        else:
            file.write(drawn.getvalue())
    if said:  # no font has a letter, no room is left
        print(f"warning: {reason(said[0].message)}", file=sys.stderr)  # type: ignore[arg-type]
    print(out)
