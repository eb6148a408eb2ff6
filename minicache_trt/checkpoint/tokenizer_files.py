"""Tokenizer, chat template and generation config: the files that travel beside weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minicache_trt.checkpoint.hub import SIDECAR_PATTERNS
from minicache_trt.checkpoint.weights import read_json_object
from minicache_trt.errors import UserError


def sidecar_files(directory: Path) -> list[Path]:
    """The files of a directory that an engine takes along, by name."""
    return sorted({path for pattern in SIDECAR_PATTERNS for path in directory.glob(pattern) if path.is_file()})


def tokenizer_directory(directory: Path) -> list[Path]:
    """The files of a directory given for its tokenizer.

    Raises
    ------
    UserError
        It holds none.
    """
    files = sidecar_files(directory) if directory.is_dir() else []
    if not any(path.name.startswith(("tokenizer", "vocab")) for path in files):
        raise UserError(
            f"--tokenizer: {directory} holds no tokenizer",
            "give a directory with tokenizer.json (or tokenizer.model) and tokenizer_config.json",
        )
    return files


def with_tokenizer(raw: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    """A config.json with the ids of special tokens that it lacks, from the directory of its tokenizer.

    Formats that say nothing about tokens leave the end of a text to the tokenizer.
    """
    config = dict(raw)
    wanted = [key for key in ("bos_token_id", "eos_token_id") if key in config and config[key] is None]
    path = directory / "config.json"
    theirs = read_json_object(path) if path.is_file() else {}
    config |= {key: theirs[key] for key in wanted if theirs.get(key) is not None}
    wanted = [key for key in wanted if config.get(key) is None]
    if wanted:
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(directory)
        except Exception as error:  # transformers raises whatever its loading stumbles over
            reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
            raise UserError(f"--tokenizer: {directory} cannot be loaded: {reason}", "check its files") from None
        config |= {key: getattr(tokenizer, key) for key in wanted}
    return config
