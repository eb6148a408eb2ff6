"""What a build does about weights that are not stored as the checkpoint has them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minicache_trt.checkpoint.binding import bind_weights, linear_weights
from minicache_trt.checkpoint.quantize import quantized_views
from minicache_trt.checkpoint.resolve import Checkpoint, load_checkpoint
from minicache_trt.checkpoint.weights import WEIGHTS_FILE, WeightView, read_json_object, read_safetensors_index
from minicache_trt.config import CALIBRATED_WEIGHTS, WEIGHT_BITS, WEIGHT_TYPES, BuildConfig, ModelConfig
from minicache_trt.engine_directory import CHECKPOINT, QUANTIZED, fingerprint, tool_versions
from minicache_trt.quantization.partial import Partial
from minicache_trt.quantization.partial_file import PartialFile
from minicache_trt.quantization.workers import available_cores
from minicache_trt.staging import link_or_copy

if TYPE_CHECKING:
    from minicache_trt.engine_writer import Report

LENGTH = 512
"""Tokens of a calibration sequence, at most."""


@dataclass(frozen=True)
class WeightOptions:
    """How a build computes weights.

    Parameters
    ----------
    text : Path, optional
        Calibration text, for formats that need it.
    samples : int
        Sequences of it.
    threads : int, optional
        Default: all cores.
    codes : Path, optional
        Codes of this checkpoint in the build's weight format, from another engine: used as they are.
    """

    text: Path | None = None
    samples: int = 16
    threads: int | None = None
    codes: Path | None = None

    @property
    def workers(self) -> int:
        return self.threads or available_cores()


def cast_checkpoint(
    directory: Path, checkpoint: Checkpoint, build: BuildConfig, options: WeightOptions, partial_: Partial,
    report: Report,
) -> Checkpoint | None:  # fmt: skip
    """The checkpoint in ``directory`` with floats of the build's weight format; None where it is in that already.

    Raises
    ------
    UserError
        Weights hold infinities or NaN.
    """
    dtype = WEIGHT_TYPES.get(build.weights)
    if dtype is None or all(view.dtype == dtype for view in checkpoint.weights.values()):
        return None
    from minicache_trt.quantization.casting import cast_groups, cast_shapes, write_config
    from minicache_trt.quantization.groups import write_groups

    shapes, clipped = cast_shapes(checkpoint.config, dtype), list[str]()
    groups = cast_groups(read_safetensors_index(checkpoint.directory), shapes, dtype, clipped)
    with PartialFile(partial_.directory(), shapes, _key(checkpoint, build), {"format": "pt"}) as file:
        write_groups(file, groups, options.workers, partial(report, build.weights))
        file.publish(directory / WEIGHTS_FILE)
    write_config(read_json_object(checkpoint.directory / "config.json"), directory, dtype)
    config = dataclasses.replace(checkpoint.config, dtype=dtype)
    weights = bind_weights(config, read_safetensors_index(directory), directory)
    notes = checkpoint.notes + ((_beyond(clipped),) if clipped else ())
    return dataclasses.replace(checkpoint, config=config, weights=weights, notes=notes)


def _beyond(names: list[str]) -> str:
    return f"numbers beyond float16's range were clipped in {', '.join(sorted(set(names)))}; consider --weights bf16"


def write_codes(
    path: Path, checkpoint: Checkpoint, build: BuildConfig, options: WeightOptions, partial_: Partial, report: Report
) -> dict[str, WeightView]:
    """A file of codes of the linear layers, going on where a killed build was.

    Returns
    -------
    dict of WeightView
        Of `minicache_trt.checkpoint.quantize.quantized_views`.

    Raises
    ------
    UserError
        Weights hold infinities or NaN, or the calibration text cannot be used.
    """
    from minicache_trt.quantization.groups import write_groups
    from minicache_trt.quantization.nearest import code_shapes, rounded_groups

    if options.codes is not None:
        link_or_copy(options.codes, path)
        return quantized_views(path)
    bits, block = WEIGHT_BITS[build.weights], build.group_size
    linears = linear_views(checkpoint.config, checkpoint.weights)
    metadata = {"format": "pt", "bits": str(bits)}
    if build.weights == CALIBRATED_WEIGHTS:
        _write_awq(path, checkpoint, build, options, partial_, metadata, report)
        return quantized_views(path)
    shapes = code_shapes(linears, bits, block)
    with PartialFile(partial_.directory(), shapes, _key(checkpoint, build), metadata) as file:
        groups = rounded_groups(linears, bits, block)
        write_groups(file, groups, options.workers, partial(report, "quantize"))
        file.publish(path)
    return quantized_views(path)


def _write_awq(
    path: Path, checkpoint: Checkpoint, build: BuildConfig, options: WeightOptions, partial_: Partial,
    metadata: dict[str, str], report: Report,
) -> None:  # fmt: skip
    from minicache_trt.calibration.samples import text_hash, text_windows
    from minicache_trt.compression.calibration_text import required_tokenizer, sequence_length
    from minicache_trt.quantization.awq import awq_shapes, quantize_awq
    from minicache_trt.quantization.search import AwqSettings

    assert options.text is not None
    config, views = checkpoint.config, checkpoint.weights
    linears = linear_views(config, views)
    tokenizer = required_tokenizer(_tokenizer_directory(checkpoint), options.text)
    length = min(LENGTH, sequence_length(config))
    tokens = text_windows(options.text, tokenizer, config, length, options.samples)
    settings = AwqSettings(WEIGHT_BITS[build.weights], build.group_size)
    key = _key(checkpoint, build, text_hash(options.text), dataclasses.asdict(settings), tokens.shape)
    with PartialFile(partial_.directory(), awq_shapes(config, views, linears, settings), key, metadata) as file:
        quantize_awq(file, config, views, linears, tokens, settings, options.workers, partial(report, "awq"))
        file.publish(path)


def codes_of(directory: Path) -> WeightOptions:
    """Options for another engine of an engine directory's checkpoint, in the same weight format."""
    codes = directory / QUANTIZED
    return WeightOptions(codes=codes if codes.exists() else None)


def weight_bytes(directory: Path) -> int:
    """Bytes of the weights an engine directory is run with."""
    views = load_checkpoint(str(directory / CHECKPOINT)).weights
    codes = quantized_views(directory / QUANTIZED) if (directory / QUANTIZED).exists() else {}
    rounded = {name.replace(".codes", ".weight") for name in codes if name.endswith(".codes")}
    kept = [view for name, view in views.items() if name not in rounded and name not in codes]
    return sum(view.nbytes for view in (*kept, *codes.values()))


def _tokenizer_directory(checkpoint: Checkpoint) -> Path:
    return checkpoint.sidecars[0].parent if checkpoint.sidecars else checkpoint.directory


def linear_views(config: ModelConfig, views: dict[str, WeightView]) -> dict[str, WeightView]:
    """Linear layers (by name, without ``.weight``) that weight-only formats quantize, the output layer included."""
    return {name: views[weight] for name, weight in linear_weights(config).items()}


def _key(checkpoint: Checkpoint, build: BuildConfig, *more: Any) -> str:
    """Digest of what the weights are computed from.

    Files are told apart by their size, samples of their bytes and, where they are not converted anew by every build,
    their time of change.
    """
    files = checkpoint.weight_files()
    sources = files if checkpoint.origin is None else _files_of(checkpoint.origin)
    parts = [
        tool_versions()["minicache-trt"],
        build.weights,
        build.group_size,
        checkpoint.checksum(),
        [fingerprint(path) for path in files],
        [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sources],
        *more,
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _files_of(origin: Path) -> list[Path]:
    return sorted(path for path in origin.iterdir() if path.is_file()) if origin.is_dir() else [origin]
