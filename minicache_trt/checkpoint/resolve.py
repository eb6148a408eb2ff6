"""From what the user typed to a ``Checkpoint``: a local directory, a preset or a repository on the Hugging Face Hub."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minicache_trt.checkpoint.binding import bind_weights
from minicache_trt.checkpoint.dummy import DUMMY_MARK, write_dummy
from minicache_trt.checkpoint.hf_config import parse_config
from minicache_trt.checkpoint.hub import CONFIG_PATTERNS, SIDECAR_PATTERNS, WEIGHT_PATTERNS, download, is_hub_id
from minicache_trt.checkpoint.presets import PRESETS, Preset
from minicache_trt.checkpoint.weights import WeightView, read_header, read_json_object, read_safetensors_index
from minicache_trt.config import ModelConfig
from minicache_trt.errors import UserError

LOAD_FORMATS = ("auto", "dummy")


@dataclass(frozen=True)
class Checkpoint:
    """A model's shape and the addresses of its weights.

    Parameters
    ----------
    config : ModelConfig
    weights : dict of str to WeightView
        By canonical name (``layers.0.attention.q.weight``); exactly those the config calls for.
    directory : Path
        Of the checkpoint.
    source : str
        What the user typed.
    revision : str or None
        Commit of a checkpoint from the hub.
    dummy : bool
        The weights are not real.
    """

    config: ModelConfig
    weights: dict[str, WeightView]
    directory: Path
    source: str
    revision: str | None = None
    dummy: bool = False

    def sidecar_files(self) -> list[Path]:
        """Tokenizer, chat template and generation config: what an engine directory takes along."""
        return _sidecar_files(self.directory)

    def weight_files(self) -> list[Path]:
        """The safetensors files that hold weights, by name."""
        return sorted({view.file for view in self.weights.values()})

    def checksum(self) -> str:
        """SHA-256 over config.json and, per weight file, its name, size and safetensors header.

        It tells checkpoints of different shape, layout or origin apart in milliseconds. It does not read the weights:
        a change of values alone, in a file of the same size, goes unnoticed.
        """
        digest = hashlib.sha256((self.directory / "config.json").read_bytes())
        for path in self.weight_files():
            digest.update(f"\0{path.name}\0{path.stat().st_size}\0".encode())
            digest.update(read_header(path))
        return digest.hexdigest()


def load_checkpoint(
    model: str,
    *,
    revision: str | None = None,
    load_format: str = "auto",
    token: str | None = None,
    work_dir: str | Path | None = None,
) -> Checkpoint:
    """Find a checkpoint, download it if need be, and check it.

    Parameters
    ----------
    model : str
        A local directory, a preset's name or a hub id, tried in this order.
    revision : str, optional
        Branch, tag or commit on the hub.
    load_format : str
        ``auto``, or ``dummy`` for the model's shape without its weights; a dummy of a preset downloads nothing.
    token : str, optional
        Access token of the hub. Default: ``HF_TOKEN`` or the token of ``hf auth login``.
    work_dir : str or Path, optional
        Where a dummy is written. Default: a new temporary directory, which is the caller's to delete.

    Raises
    ------
    UserError
        The model is unknown, unreachable, unsupported or damaged.
    """
    if load_format not in LOAD_FORMATS:
        raise UserError(f"load_format: expected {' or '.join(LOAD_FORMATS)}, got {load_format!r}")
    place = _locate(model, revision)
    if load_format == "dummy":
        return _load_dummy(place, model, revision, token, work_dir)
    directory, commit = _fetch(place, (*CONFIG_PATTERNS, *SIDECAR_PATTERNS), revision, token)
    config, raw = _read_config(directory)  # an unsupported model is refused before its weights are downloaded
    directory, commit = _fetch(place, (*CONFIG_PATTERNS, *SIDECAR_PATTERNS, *WEIGHT_PATTERNS), commit, token)
    weights = bind_weights(config, read_safetensors_index(directory), directory)
    if raw.get("dtype") is None and raw.get("torch_dtype") is None:
        config = dataclasses.replace(config, dtype=weights["embed.weight"].dtype)
    return Checkpoint(config, weights, directory, model, commit, bool(raw.get(DUMMY_MARK)))


def resolve_config(model: str, *, revision: str | None = None, token: str | None = None) -> ModelConfig:
    """Shape of a model, without its weights. A preset downloads nothing, a hub id only its config.json.

    Parameters are those of ``load_checkpoint``.

    Raises
    ------
    UserError
        The model is unknown, unreachable or unsupported.
    """
    place = _locate(model, revision)
    if isinstance(place, Preset):
        return place.config
    return _read_config(_fetch(place, CONFIG_PATTERNS, revision, token)[0])[0]


def _locate(model: str, revision: str | None) -> Path | Preset | str:
    """A local directory, a preset or a hub id."""
    try:
        path = Path(model).expanduser()
        is_directory, exists = path.is_dir(), path.exists()
    except (OSError, RuntimeError) as error:
        raise UserError(f"{model}: cannot be looked up ({error})", "check the path and its permissions") from error
    if model and is_directory:
        if revision is not None:
            raise UserError(f"{model}: a local directory has no revision {revision!r}", "leave the revision out")
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


def _fetch(
    place: Path | Preset | str, patterns: tuple[str, ...], revision: str | None, token: str | None
) -> tuple[Path, str | None]:
    if isinstance(place, Path):
        return place, None
    return download(place.hub_id if isinstance(place, Preset) else place, patterns, revision=revision, token=token)


def _read_config(directory: Path) -> tuple[ModelConfig, dict[str, Any]]:
    path, generation_path = directory / "config.json", directory / "generation_config.json"
    if not path.is_file():
        raise UserError(
            f"{directory}: no config.json, so not a Hugging Face checkpoint",
            "give a directory that save_pretrained wrote",
        )
    raw = read_json_object(path)
    generation = read_json_object(generation_path) if generation_path.is_file() else None
    return parse_config(raw, generation=generation, path=str(path)), raw


def _load_dummy(
    place: Path | Preset | str, model: str, revision: str | None, token: str | None, work_dir: str | Path | None
) -> Checkpoint:
    raw: Mapping[str, Any]
    if isinstance(place, Preset):
        config, raw, sidecars, commit = place.config, place.raw_config, [], None
    else:
        source, commit = _fetch(place, (*CONFIG_PATTERNS, *SIDECAR_PATTERNS), revision, token)
        config, raw = _read_config(source)
        sidecars = _sidecar_files(source)
    directory = Path(work_dir) if work_dir is not None else Path(tempfile.mkdtemp(prefix="minicache-trt-dummy-"))
    write_dummy(directory, config, raw)
    for path in sidecars:
        if path.parent != directory:
            shutil.copyfile(path, directory / path.name)
    weights = bind_weights(config, read_safetensors_index(directory), directory)
    return Checkpoint(config, weights, directory, model, commit, dummy=True)


def _sidecar_files(directory: Path) -> list[Path]:
    return sorted({path for pattern in SIDECAR_PATTERNS for path in directory.glob(pattern) if path.is_file()})
