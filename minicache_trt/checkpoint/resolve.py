"""From what the user typed to a ``Checkpoint``: a local checkpoint of any format, a preset or a hub repository."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minicache_trt.checkpoint.binding import bind_weights
from minicache_trt.checkpoint.dummy import DUMMY_MARK, write_dummy
from minicache_trt.checkpoint.fingerprint import fingerprint
from minicache_trt.checkpoint.formats import hugging_face, open_source
from minicache_trt.checkpoint.hf_config import parse_config
from minicache_trt.checkpoint.hub import (
    CONFIG_PATTERNS,
    PYTORCH_PATTERNS,
    SIDECAR_PATTERNS,
    WEIGHT_PATTERNS,
    download,
)
from minicache_trt.checkpoint.locate import locate
from minicache_trt.checkpoint.lora import with_lora
from minicache_trt.checkpoint.names import listed
from minicache_trt.checkpoint.presets import Preset
from minicache_trt.checkpoint.quantize import linears_in
from minicache_trt.checkpoint.source import INT4_FILE, INT4_MARK, QUANTIZED_FILE, Source, materialize
from minicache_trt.checkpoint.tensor_file import Progress
from minicache_trt.checkpoint.tokenizer_files import sidecar_files, tokenizer_directory, with_tokenizer
from minicache_trt.checkpoint.weights import WeightView, read_json_object, read_safetensors_index
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
        Of the checkpoint, in Hugging Face format: where it lies, or where it was converted to.
    source : str
        What the user typed.
    revision : str or None
        Commit of a checkpoint from the hub.
    dummy : bool
        The weights are not real.
    origin : Path or None
        Where a converted checkpoint came from.
    format : str
        What it was before.
    int4 : Path or None
        File of the linear layers of a checkpoint that is quantized to 4 bits; ``weights`` lacks them.
    sidecars : tuple of Path or None
        Tokenizer files from elsewhere, in place of the directory's.
    notes : tuple of str
        What people should know about the conversion.
    """

    config: ModelConfig
    weights: dict[str, WeightView]
    directory: Path
    source: str
    revision: str | None = None
    dummy: bool = False
    origin: Path | None = None
    format: str = "Hugging Face checkpoint"
    int4: Path | None = None
    sidecars: tuple[Path, ...] | None = None
    notes: tuple[str, ...] = ()

    def sidecar_files(self) -> list[Path]:
        """Tokenizer, chat template and generation config: what an engine directory takes along."""
        return sidecar_files(self.directory) if self.sidecars is None else list(self.sidecars)

    def weight_files(self) -> list[Path]:
        """The safetensors files that hold weights, by name."""
        return sorted({view.file for view in self.weights.values()})

    def checksum(self) -> str:
        """What a plan remembers of the checkpoint it was calibrated on; see `fingerprint`."""
        files = [*self.weight_files(), *([self.int4] if self.int4 is not None else [])]
        return fingerprint(self.directory / "config.json", files)


def load_checkpoint(
    model: str,
    *,
    revision: str | None = None,
    load_format: str = "auto",
    token: str | None = None,
    work_dir: str | Path | None = None,
    lora_dir: str | Path | None = None,
    tokenizer: str | Path | None = None,
    progress: Progress | None = None,
) -> Checkpoint:
    """Find a checkpoint, download it if need be, and check it.

    Hugging Face safetensors are used where they lie. Any other format, or a checkpoint with an adapter merged into it,
    is first written as such.

    Parameters
    ----------
    model : str
        A local checkpoint (a directory, or a GGUF file), a preset's name or a hub id, tried in this order.
    revision : str, optional
        Branch, tag or commit on the hub.
    load_format : str
        ``auto``, or ``dummy`` for the model's shape without its weights; a dummy of a preset downloads nothing.
    token : str, optional
        Access token of the hub. Default: ``HF_TOKEN`` or the token of ``hf auth login``.
    work_dir : str or Path, optional
        Where a dummy or a converted checkpoint is written. Default: a new temporary directory, which is the caller's to
        delete.
    lora_dir : str or Path, optional
        Adapter in peft's format to merge into the weights.
    tokenizer : str or Path, optional
        Directory whose tokenizer takes the place of the checkpoint's.
    progress : callable, optional
        Called with tensors converted and tensors in all.

    Raises
    ------
    UserError
        The model is unknown, unreachable, unsupported or damaged.
    """
    if load_format not in LOAD_FORMATS:
        raise UserError(f"load_format: expected {' or '.join(LOAD_FORMATS)}, got {load_format!r}")
    place = locate(model, revision)
    sidecars = None if tokenizer is None else tokenizer_directory(Path(tokenizer))
    if load_format == "dummy":
        if lora_dir is not None:
            raise UserError(
                "a dummy has no weights to merge an adapter into", "leave out --lora-dir or the load format"
            )
        return _load_dummy(place, model, revision, token, work_dir, sidecars)
    directory, commit = _fetch(place, (*CONFIG_PATTERNS, *SIDECAR_PATTERNS), revision, token)
    config, raw, source = read_config(directory)  # an unsupported model is refused before its weights are downloaded
    if not isinstance(place, Path):
        directory, commit = _fetch_weights(place, commit, token)
        config, raw, source = read_config(directory)
    if lora_dir is not None:
        source = with_lora(source or hugging_face(directory, raw), Path(lora_dir))
    if source is None:
        checkpoint = _bind(config, raw, directory, model, commit)
        return dataclasses.replace(checkpoint, sidecars=None if sidecars is None else tuple(sidecars))
    files = sidecar_files(directory) if sidecars is None and directory.is_dir() else sidecars or []
    source = dataclasses.replace(source, sidecars=files, finish=None if sidecars is not None else source.finish)
    if any(path.name.startswith("tokenizer") for path in files):
        source = dataclasses.replace(source, config=with_tokenizer(source.config, files[0].parent))
    target = _work_dir(work_dir, "converted")
    notes = materialize(source, target, progress or (lambda done, total: None))
    config, raw, _ = read_config(target)
    checkpoint = _bind(config, raw, target, model, commit)
    return dataclasses.replace(checkpoint, origin=directory, format=source.format, notes=(*notes, *checkpoint.notes))


def resolve_config(model: str, *, revision: str | None = None, token: str | None = None) -> ModelConfig:
    """Shape of a model, without its weights. A preset downloads nothing, a hub id only its config.json.

    Parameters are those of ``load_checkpoint``.

    Raises
    ------
    UserError
        The model is unknown, unreachable or unsupported.
    """
    place = locate(model, revision)
    if isinstance(place, Preset):
        return place.config
    return read_config(_fetch(place, CONFIG_PATTERNS, revision, token)[0])[0]


def read_config(directory: Path) -> tuple[ModelConfig, dict[str, Any], Source | None]:
    """Shape of the checkpoint at a path, its config.json in Hugging Face's words, and how to convert it if need be."""
    source = open_source(directory)
    path, generation_path = directory / "config.json", directory / "generation_config.json"
    if source is None and not path.is_file():
        raise UserError(
            f"{directory}: no config.json, so not a Hugging Face checkpoint",
            "give a directory that save_pretrained wrote, a TensorRT-LLM checkpoint directory, or a GGUF file",
        )
    raw = read_json_object(path) if source is None else source.config
    generation = read_json_object(generation_path) if generation_path.is_file() else None
    return parse_config(raw, generation=generation, path=str(path if source is None else directory)), raw, source


def _bind(config: ModelConfig, raw: Mapping[str, Any], directory: Path, model: str, commit: str | None) -> Checkpoint:
    """A checkpoint in Hugging Face safetensors."""
    int4 = _int4_file(directory) if raw.get(INT4_MARK) else None
    elsewhere = [] if int4 is None else linears_in(int4)
    weights = bind_weights(config, read_safetensors_index(directory), directory, elsewhere)
    if raw.get("dtype") is None and raw.get("torch_dtype") is None:
        config = dataclasses.replace(config, dtype=weights["embed.weight"].dtype)
    dummy, notes = bool(raw.get(DUMMY_MARK)), _mixed_types(weights)
    return Checkpoint(config, weights, directory, model, commit, dummy, int4=int4, notes=notes)


def _mixed_types(weights: Mapping[str, WeightView]) -> tuple[str, ...]:
    """A note that names the weights of another type than most."""
    types = Counter(view.dtype for view in weights.values())
    if len(types) < 2:
        return ()
    usual, others = types.most_common()[0][0], types.most_common()[1:]
    named = (f"{dtype}: {listed(v.name for v in weights.values() if v.dtype == dtype)}" for dtype, _ in others)
    return (f"the weights are {usual} but for {'; '.join(named)}; each is taken as it is",)


def _int4_file(directory: Path) -> Path:
    for path in (directory / INT4_FILE, directory.parent / QUANTIZED_FILE):
        if path.is_file():
            return path
    raise UserError(
        f"{directory}: {INT4_FILE}, which holds its 4-bit weights, is missing",
        "in an engine directory they are beside checkpoint/; build the engine again",
    )


def _fetch(
    place: Path | Preset | str, patterns: tuple[str, ...], revision: str | None, token: str | None
) -> tuple[Path, str | None]:
    if isinstance(place, Path):
        return place, None
    return download(place.hub_id if isinstance(place, Preset) else place, patterns, revision=revision, token=token)


def _fetch_weights(place: Preset | str, commit: str | None, token: str | None) -> tuple[Path, str | None]:
    """The same with safetensors weights, or PyTorch ones where there are no others."""
    beside = (*CONFIG_PATTERNS, *SIDECAR_PATTERNS)
    directory, commit = _fetch(place, (*beside, *WEIGHT_PATTERNS), commit, token)
    if any(directory.glob("*.safetensors")):
        return directory, commit
    return _fetch(place, (*beside, *PYTORCH_PATTERNS), commit, token)


def _work_dir(given: str | Path | None, kind: str) -> Path:
    return Path(given) if given is not None else Path(tempfile.mkdtemp(prefix=f"minicache-trt-{kind}-"))


def _load_dummy(
    place: Path | Preset | str,
    model: str,
    revision: str | None,
    token: str | None,
    work_dir: str | Path | None,
    sidecars: Sequence[Path] | None,
) -> Checkpoint:
    raw: Mapping[str, Any]
    if isinstance(place, Preset):
        config, raw, files, commit = place.config, place.raw_config, [], None
    else:
        source, commit = _fetch(place, (*CONFIG_PATTERNS, *SIDECAR_PATTERNS), revision, token)
        config, raw, _ = read_config(source)
        files = sidecar_files(source)
    directory = _work_dir(work_dir, "dummy")
    write_dummy(directory, config, raw)
    for path in files if sidecars is None else sidecars:
        if path.parent != directory:
            shutil.copyfile(path, directory / path.name)
    weights = bind_weights(config, read_safetensors_index(directory), directory)
    return Checkpoint(config, weights, directory, model, commit, dummy=True)
