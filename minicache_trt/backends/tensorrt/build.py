"""An engine directory's TensorRT engines, built from its graphs."""

from __future__ import annotations

import ctypes
from functools import partial
from pathlib import Path

import onnx_ir as ir

from minicache_trt.backends.tensorrt.builder import build_engine_file
from minicache_trt.backends.tensorrt.collectives import set_ranks
from minicache_trt.backends.tensorrt.description import describe_network, write_description
from minicache_trt.backends.tensorrt.module import load_module
from minicache_trt.backends.tensorrt.network import parse_network
from minicache_trt.backends.tensorrt.options import TensorRtOptions
from minicache_trt.backends.tensorrt.plugins import find_plugins, load_plugins
from minicache_trt.backends.tensorrt.profiles import compressor_profiles, decoder_profiles, tensor_shapes
from minicache_trt.checkpoint.cast import cast_weights
from minicache_trt.checkpoint.resolve import Checkpoint
from minicache_trt.checkpoint.weights import read_safetensors_file
from minicache_trt.compression.plan import CompressionPlan
from minicache_trt.config import BuildConfig
from minicache_trt.engine_directory import COMPRESSOR, COMPRESSOR_ENGINE, DECODER, DECODER_ENGINE, ENGINES, MAPS
from minicache_trt.engine_writer import Report, graph_form, weight_locations
from minicache_trt.model.graph import build_decoder
from minicache_trt.model.maps import GraphMaps, plan_maps
from minicache_trt.model.weights import GraphWeights

CAST_GRAPH, CAST_WEIGHTS = "cast.onnx", "cast.safetensors"


def build_engines(
    staging: Path,
    checkpoint: Checkpoint,
    plan: CompressionPlan,
    build: BuildConfig,
    options: TensorRtOptions,
    report: Report,
) -> None:
    """Write ``decoder.engine``, ``compressor.engine`` (where the plan compresses) and their description.

    Weights of another type than the engine's are cast into a file that is gone when the engine is built: the graph that
    stays in the directory casts them itself, which TensorRT would do in memory.

    Raises
    ------
    UserError
        TensorRT is missing, or refuses something.
    """
    trt = load_module(build.backend)
    _return_freed_memory()
    form, config = graph_form(build), checkpoint.config
    plugins = find_plugins() if form.plugins else None
    if plugins is not None:
        load_plugins(trt, plugins)
    graphs = {DECODER_ENGINE: _decoder(staging, checkpoint, plan, build, report)}
    if plan.compresses:
        graphs[COMPRESSOR_ENGINE] = staging / COMPRESSOR
    engines = {}
    for name, graph in graphs.items():
        decoder = name == DECODER_ENGINE
        shapes = tensor_shapes(plan, config, decoder)
        if decoder:
            profiles = decoder_profiles(build, plan, config, plugins is not None)
        else:
            profiles = compressor_profiles(build, plan, config)
        network = parse_network(trt, graph)
        set_ranks(network, form.ranks)
        build_engine_file(network, staging / name, profiles, shapes, options, plugins, report)
        engines[name] = {**describe_network(network, profiles, shapes), "bytes": (staging / name).stat().st_size}
    for temporary in (CAST_GRAPH, CAST_WEIGHTS):
        (staging / temporary).unlink(missing_ok=True)
    write_description(staging / ENGINES, {"backend": build.backend, "version": trt.__version__, "engines": engines})


def _return_freed_memory() -> None:
    """Have the C library give freed weights back to the system: its own threshold grows with what was freed before."""
    mmap_threshold, size = -3, 1 << 20  # M_MMAP_THRESHOLD of glibc's malloc.h
    try:
        ctypes.CDLL(None).mallopt(mmap_threshold, size)
    except (OSError, AttributeError):  # another C library
        return


def _decoder(staging: Path, checkpoint: Checkpoint, plan: CompressionPlan, build: BuildConfig, report: Report) -> Path:
    """The decoder's graph, with weights in the type it computes in."""
    config, form = checkpoint.config, graph_form(build)
    views = cast_weights(staging / CAST_WEIGHTS, checkpoint.weights, build.dtype, partial(report, "cast"))
    if views == checkpoint.weights:
        return staging / DECODER
    locations = weight_locations(checkpoint) | {CAST_WEIGHTS: CAST_WEIGHTS}
    weights = GraphWeights(config, views, locations, form=form)
    matrices = read_safetensors_file(staging / MAPS) if (staging / MAPS).exists() else {}
    maps = GraphMaps(plan_maps(plan, config), matrices)
    ir.save(build_decoder(config, plan, weights, maps, form), staging / CAST_GRAPH)
    return staging / CAST_GRAPH
