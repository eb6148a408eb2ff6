"""What the user typed for a model: a local path, a preset or a repository on the Hugging Face Hub."""

from __future__ import annotations

import difflib
import os
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
        is_directory, exists = path.is_dir(), path.exists()
    except (OSError, RuntimeError) as error:
        raise UserError(f"{model}: cannot be looked up ({error})", "check the path and its permissions") from error
    if model and is_directory:
        if revision is not None:
            raise UserError(f"{model}: a local directory has no revision {revision!r}", "leave the revision out")
        return path
    if model and exists and path.suffix == ".gguf":
        return path
    if model and exists:
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
