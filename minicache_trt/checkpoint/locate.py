"""What the user typed for a model: a local path, a preset or a repository on the Hugging Face Hub."""

from __future__ import annotations

import difflib
import os
import stat
from pathlib import Path

from minicache_trt.checkpoint.hub import is_hub_id
from minicache_trt.checkpoint.presets import PRESETS, Preset
from minicache_trt.errors import UserError


def locate(model: str, revision: str | None) -> Path | Preset | str:
    """A local directory or GGUF file, a preset or a hub id.

    Raises
    ------
    UserError
        It is none of them.
    """
    try:
        path = Path(model).expanduser()
        mode = _mode(path) if model else None
    except (OSError, RuntimeError) as error:
        raise UserError(f"{model}: cannot be looked up ({error})", "check the path and its permissions") from error
    if mode is not None and stat.S_ISDIR(mode):
        if revision is not None:
            raise UserError(f"{model}: a local directory has no revision {revision!r}", "leave the revision out")
        return path
    if mode is not None and path.suffix == ".gguf":
        return path
    if mode is not None:
        raise UserError(f"{model}: a file, expected a directory", f"give the checkpoint's directory: {path.parent}")
    name = model.removeprefix("https://huggingface.co/").rstrip("/") if "://" in model else model
    if name.lower() in PRESETS:
        return PRESETS[name.lower()]
    if is_hub_id(name):
        return name
    if name.startswith((".", "~")) or os.sep in name or "\\" in name:
        raise UserError(f"{model}: no such directory", "check the path")
    close = difflib.get_close_matches(name.lower(), PRESETS, n=1, cutoff=0.4)
    hint = f"did you mean {close[0]}? " if close else ""
    raise UserError(
        f"{model!r} is not a directory, a preset or a hub id (organisation/name)",
        f"{hint}presets: {', '.join(sorted(PRESETS))}",
    )


def _mode(path: Path) -> int | None:
    """Of what is there, or None; `Path.exists` of Python 3.14 also takes for absent what cannot be looked up."""
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):  # the last: a name that no file can have
        return None
