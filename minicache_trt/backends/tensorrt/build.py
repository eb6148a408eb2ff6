"""An engine directory's TensorRT engines, built from its graphs."""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import onnx_ir as ir

from minicache_trt.backends.tensorrt.builder import build_engine_file
from minicache_trt.backends.tensorrt.collectives import set_ranks
from minicache_trt.backends.tensorrt.description import describe_network, write_description
from minicache_trt.backends.tensorrt.module import load_module
from minicache_trt.backends.tensorrt.network import parse_network
from minicache_trt.backends.tensorrt.options import TensorRtOptions
from minicache_trt.backends.tensorrt.plugins import find_plugins, load_plugins
from minicache_trt.backends.tensorrt.profiles import compressor_profiles, decoder_profiles, tensor_shapes
from minicache_trt.backends.tensorrt.simplified import simplify
from minicache_trt.backends.tensorrt.weight_only import write_signed
from minicache_trt.checkpoint.binding import linear_weights, weight_shapes
from minicache_trt.checkpoint.cast import cast_weights
from minicache_trt.checkpoint.quantize import changed_floats, quantized_views
from minicache_trt.checkpoint.resolve import Checkpoint
from minicache_trt.checkpoint.weights import WeightView, read_safetensors_file
from minicache_trt.compression.plan import CompressionPlan
from minicache_trt.config import WEIGHT_BITS, BuildConfig
from minicache_trt.engine_directory import (
    COMPRESSOR,
    COMPRESSOR_ENGINE,
    DECODER,
    DECODER_ENGINE,
    ENGINES,
    MAPS,
    QUANTIZED,
)
from minicache_trt.engine_writer import Report, graph_form, weight_locations
from minicache_trt.model.graph import build_decoder
from minicache_trt.model.maps import GraphMaps, plan_maps
from minicache_trt.model.weights import GraphWeights
from minicache_trt.tracing.decoder_graph import traced_decoder

CAST_GRAPH, DEBUG_GRAPH, SIMPLE_DECODER, SIMPLE_COMPRESSOR, CAST_WEIGHTS, SIGNED_CODES = TEMPORARY = (
    "cast.onnx",
    "debug.onnx",
    "simple-decoder.onnx",
    "simple-compressor.onnx",
    "cast.safetensors",
    "codes.safetensors",
)
"""Files that are gone when the engines are built."""


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
    decoder = _decoder(staging, checkpoint, plan, build, report)
    if options.debug_output:
        traced = traced_decoder(decoder, config)
        decoder = staging / DEBUG_GRAPH
        decoder.write_bytes(traced)
    graphs = {DECODER_ENGINE: decoder} | ({COMPRESSOR_ENGINE: staging / COMPRESSOR} if plan.compresses else {})
    if plugins is None:  # plugins are single nodes already
        for name, simple in ((DECODER_ENGINE, SIMPLE_DECODER), (COMPRESSOR_ENGINE, SIMPLE_COMPRESSOR)):
            if name in graphs:
                simplify(graphs[name], staging / simple)
                graphs[name] = staging / simple
    stop = Event()

    def built(name: str) -> dict[str, Any]:
        shapes = tensor_shapes(plan, config, decoder=name == DECODER_ENGINE)
        if name == DECODER_ENGINE:
            profiles = decoder_profiles(build, plan, config, plugins is not None)
        else:
            profiles = compressor_profiles(build, plan, config)
        network = parse_network(trt, graphs[name])
        set_ranks(network, form.ranks)
        build_engine_file(network, staging / name, profiles, shapes, options, plugins, report, stop)
        return {**describe_network(network, profiles, shapes), "bytes": (staging / name).stat().st_size}

    # RTX builds without the GPU; the other module measures kernels there, which nothing may disturb.
    with ThreadPoolExecutor(len(graphs) if build.backend == "tensorrt-rtx" else 1) as pool:
        try:
            engines = dict(zip(graphs, pool.map(built, graphs), strict=True))
        except BaseException:
            stop.set()
            raise
    for temporary in TEMPORARY:
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
    """The decoder's graph, with weights in the type it computes in, or codes with such scales."""
    config, form = checkpoint.config, graph_form(build)
    stored = quantized_views(staging / QUANTIZED) if (staging / QUANTIZED).exists() else {}
    linears = {key.removesuffix(".codes") for key in stored if key.endswith(".codes")}
    every_float = checkpoint.weights | changed_floats(stored)
    floats = {key: view for key, view in every_float.items() if key.removesuffix(".weight") not in linears}
    views = cast_weights(staging / CAST_WEIGHTS, floats, build.dtype, partial(report, "cast"))
    if not linears and views == checkpoint.weights:
        return staging / DECODER
    signed: dict[str, WeightView] = {}
    if linears:
        names, every = linear_weights(config), weight_shapes(config)
        shapes = {name: every[names[name]] for name in linears}
        target, source = staging / SIGNED_CODES, staging / QUANTIZED
        signed = write_signed(target, source, shapes, build.dtype, partial(report, "codes"))
    locations = weight_locations(checkpoint) | {name: name for name in (CAST_WEIGHTS, SIGNED_CODES, QUANTIZED)}
    weights = GraphWeights(config, views, locations, signed, WEIGHT_BITS.get(build.weights), form)
    matrices = read_safetensors_file(staging / MAPS) if (staging / MAPS).exists() else {}
    maps = GraphMaps(plan_maps(plan, config), matrices)
    ir.save(build_decoder(config, plan, weights, maps, form), staging / CAST_GRAPH)
    return staging / CAST_GRAPH
