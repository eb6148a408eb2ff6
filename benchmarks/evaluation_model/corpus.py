"""Python sources of this machine as training text: the standard library and the installed packages."""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

SKIP = {"site-packages", "dist-packages", "encodings", "pydoc_data", "turtledemo", "__pycache__"}
TESTS = {"test", "tests", "testing"}
PACKAGE_BYTES = 1_000_000
"""No package gives more than this, so that the largest ones do not drown the others."""


@dataclass
class Corpus:
    """Source texts: to train on and held out."""

    stdlib: list[str] = field(default_factory=list)
    packages: list[str] = field(default_factory=list)
    held: list[str] = field(default_factory=list)


def held_out(name: str) -> bool:
    """Whether a file of the standard library, or a package, is among the held-out ~3 %, decided by its name only."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 1000 < 30


def load_corpus(exclude: list[str], megabytes: float) -> Corpus:
    """Read the standard library and, up to ``megabytes``, the installed packages; equal files count once.

    Parameters
    ----------
    exclude : list of str
        Documents that must not be trained on, whatever file they are in.
    megabytes : float
        Size limit of the installed packages together.
    """
    corpus = Corpus()
    seen = {_digest(text) for text in exclude}
    paths = sysconfig.get_paths()
    stdlib, installed = Path(paths["stdlib"]), Path(paths["purelib"])
    for path in sorted(stdlib.rglob("*.py")):
        if not (SKIP | TESTS).intersection(path.relative_to(stdlib).parts) and (text := _read(path, seen)):
            (corpus.held if held_out(path.relative_to(stdlib).as_posix()) else corpus.stdlib).append(text)
    packages: dict[str, list[Path]] = {}
    for path in sorted(installed.rglob("*.py")):
        parts = path.relative_to(installed).parts
        if not (TESTS | {"__pycache__", "_vendor"}).intersection(parts):
            packages.setdefault(parts[0], []).append(path)
    left, rng = megabytes * 1e6, np.random.default_rng(0)
    for name in rng.permutation(sorted(packages)).tolist():
        share = min(left, PACKAGE_BYTES)
        for index in rng.permutation(len(packages[name])).tolist():
            if share > 0 and (text := _read(packages[name][index], seen)):
                (corpus.held if held_out(name) else corpus.packages).append(text)
                share, left = share - len(text), left - len(text)
    return corpus


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.strip().encode()).digest()


def _read(path: Path, seen: set[bytes]) -> str | None:
    """A file's text; nothing for short, unreadable and already seen ones."""
    try:
        text = path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return None
    key = _digest(text)
    if len(text) < 400 or key in seen:
        return None
    seen.add(key)
    return text
