"""What an engine directory is made of, written in order: linked weights, quantized weights, matrices, graphs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import onnx_ir as ir

from minicache_trt.backends.tensorrt.plugins import find_plugins
from minicache_trt.backends.tensorrt.weight_only import write_row_codes
from minicache_trt.checkpoint.quantize import changed_floats, quantized_views
from minicache_trt.checkpoint.resolve import Checkpoint
from minicache_trt.checkpoint.weights import INDEX_FILE, WeightView
from minicache_trt.compression.matrices import save_matrices
from minicache_trt.compression.plan import CompressionPlan
from minicache_trt.config import ROW_FORMATS, TENSORRT_BACKENDS, WEIGHT_BITS, BuildConfig
from minicache_trt.engine_directory import CHECKPOINT, COMPRESSOR, DECODER, MAPS, MATRICES, QUANTIZED
from minicache_trt.functions.form import COMPUTE_TYPES, GraphForm
from minicache_trt.model.graph import build_compressor, build_decoder
from minicache_trt.model.maps import GraphMaps, plan_maps, write_plan_maps
from minicache_trt.model.weights import GraphWeights
from minicache_trt.quantization.partial import Partial
from minicache_trt.quantization.store import WeightOptions, cast_checkpoint, linear_views, write_codes
from minicache_trt.staging import link_or_copy

Report = Callable[[str, int, int], None]
"""Progress: stage, done, total."""


@dataclass(frozen=True)
class Written:
    """What was written of a checkpoint: ``linked`` if no weight file had to be copied, and the checkpoint itself, whose
    floats may have become another type's."""

    linked: bool
    checkpoint: Checkpoint


def write_engine(
    staging: Path,
    checkpoint: Checkpoint,
    plan: CompressionPlan,
    build: BuildConfig,
    weights: WeightOptions,
    partial_weights: Partial,
    report: Report,
) -> Written:
    """Everything but config.json."""
    target = staging / CHECKPOINT
    target.mkdir()
    for file in checkpoint.sidecar_files():
        shutil.copyfile(file, target / file.name)
    cast = cast_checkpoint(target, checkpoint, build, weights, partial_weights, report)
    linked = True if cast is not None else _link_checkpoint(target, checkpoint, report)
    stored = cast or checkpoint
    quantized: dict[str, WeightView] = {}
    if checkpoint.int4 is not None:
        linked &= link_or_copy(checkpoint.int4, staging / QUANTIZED)
        quantized = quantized_views(staging / QUANTIZED)
    elif build.weights in ROW_FORMATS and build.backend in TENSORRT_BACKENDS:
        linears = linear_views(checkpoint.config, checkpoint.weights)
        quantized = write_row_codes(staging / QUANTIZED, linears, build.weights, partial(report, "quantize"))
    elif build.weights in WEIGHT_BITS:
        quantized = write_codes(staging / QUANTIZED, checkpoint, build, weights, partial_weights, report)
    if plan.matrices:
        save_matrices(plan.matrices, staging / MATRICES)
    _write_graphs(staging, stored, plan, quantized, build, report)
    return Written(linked, stored)


def _link_checkpoint(target: Path, checkpoint: Checkpoint, report: Report) -> bool:
    """Link config, index and weight files; True if none of them had to be copied."""
    linked = True
    files = checkpoint.weight_files()
    for done, file in enumerate(files):
        report("weights", done, len(files))
        linked &= link_or_copy(file, target / file.name)
    report("weights", len(files), len(files))
    index = checkpoint.directory / INDEX_FILE
    for file in (checkpoint.directory / "config.json", *([index] if index.exists() else [])):
        shutil.copyfile(file, target / file.name)
    return linked


def graph_form(build: BuildConfig) -> GraphForm:
    """The form of an engine's graphs. TensorRT's nodes keep the step's inputs only where it has our plugins."""
    tensorrt = build.backend in TENSORRT_BACKENDS
    plugins = not tensorrt or (build.backend == "tensorrt" and find_plugins() is not None)
    ranks = build.tp_size if tensorrt else 1
    return GraphForm(COMPUTE_TYPES[build.graph_dtype], loops=not tensorrt, plugins=plugins, ranks=ranks)


def _write_graphs(
    staging: Path,
    checkpoint: Checkpoint,
    plan: CompressionPlan,
    quantized: dict[str, WeightView],
    build: BuildConfig,
    report: Report,
) -> None:
    form, bits = graph_form(build), WEIGHT_BITS.get(build.weights)
    locations = weight_locations(checkpoint) | {QUANTIZED: QUANTIZED}
    floats = checkpoint.weights | changed_floats(quantized)
    weights = GraphWeights(checkpoint.config, floats, locations, quantized, bits, form)
    report("graphs", 0, 2)
    arrays = plan_maps(plan, checkpoint.config)
    views = write_plan_maps(arrays, staging / MAPS)
    ir.save(build_decoder(checkpoint.config, plan, weights, GraphMaps(arrays, views), form), staging / DECODER)
    report("graphs", 1, 2)
    if plan.compresses:
        ir.save(build_compressor(checkpoint.config, plan, GraphMaps(arrays, views), form), staging / COMPRESSOR)
    report("graphs", 2, 2)


def weight_locations(checkpoint: Checkpoint) -> dict[str, str]:
    """Where a graph in the engine directory finds the checkpoint's weight files, by their names."""
    return {file.name: f"{CHECKPOINT}/{file.name}" for file in checkpoint.weight_files()}
