"""What every figure shares: how it looks and how it is saved."""

from __future__ import annotations

import io
import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from minicache_trt.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = ("png", "svg", "pdf")
COLORS = {"key": "#1f77b4", "value": "#d95f02", "neutral": "#555555", "merged": "#2a9d3a"}


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches; it belongs to no window and to no global state."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it tells of font caches it builds
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=130, layout="constrained")


def set_title(figure: Figure, title: str, size: int = 12) -> None:
    """A title taken as it is: dollar signs are no formulas, and what is no Unicode becomes a question mark."""
    text = title.encode(errors="replace").decode()
    figure.suptitle(text, fontsize=size, parse_math=False)


def check_file(path: Path) -> None:
    """Before anything is computed: can a figure be saved there?

    Raises
    ------
    UserError
        Unknown suffix, missing directory, or a directory in its place.
    """
    if path.suffix.lower().removeprefix(".") not in FORMATS:
        raise UserError(f"--plot: {path} has no known suffix", f"use one of {', '.join(f'.{f}' for f in FORMATS)}")
    if path.is_dir():
        raise UserError(f"--plot: cannot write {path}: Is a directory")
    if not path.parent.is_dir():
        raise UserError(f"--plot: cannot write {path}: no such directory {path.parent}")


def check_directory(path: Path) -> None:
    """Before anything is computed: can figures be saved in there (it may not exist yet)?

    Raises
    ------
    UserError
        Something else is in its place, or in the place of one of its parents.
    """
    existing = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not existing.is_dir():
        raise UserError(f"--plot: {existing} is a file, expected a directory")


def save(figure: Figure, path: Path) -> None:
    """Write a figure in the format of the path's suffix; a file is complete or not there.

    Raises
    ------
    UserError
        The path cannot be written.
    """
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a path's characters may be missing from the font
        figure.savefig(buffer, format=path.suffix.lower().removeprefix("."))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(buffer.getvalue())
    except OSError as error:
        raise UserError(f"--plot: cannot write {path}: {error.strerror or error}") from error
