"""A TensorRT engine directory of several ranks: ``rank<k>`` holds one rank's engines."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from minicache_trt.backends.tensorrt.build import build_engines
from minicache_trt.backends.tensorrt.options import TensorRtOptions
from minicache_trt.checkpoint.resolve import Checkpoint
from minicache_trt.checkpoint.streaming import encode_header
from minicache_trt.checkpoint.weights import SAFETENSORS_DTYPES, WeightView, read_safetensors_file
from minicache_trt.compression.plan import CompressionPlan
from minicache_trt.config import BuildConfig
from minicache_trt.engine_directory import COMPRESSOR_ENGINE, DECODER_ENGINE, ENGINES, rank_folder
from minicache_trt.engine_writer import Report, write_engine
from minicache_trt.parallel.shard import (
    Shard,
    columns_of,
    rows_of,
    shard_model,
    shard_plan,
    splits_vocabulary,
    sums_over_ranks,
)
from minicache_trt.quantization.partial import kept_if_killed
from minicache_trt.quantization.store import WeightOptions

COLUMNS = "columns.safetensors"
"""Shares of weights that are cut along their columns, as long as an engine is built from them."""


def build_rank_engines(
    staging: Path,
    checkpoint: Checkpoint,
    plan: CompressionPlan,
    build: BuildConfig,
    options: TensorRtOptions,
    report: Report,
) -> None:
    """One rank after the other: its graphs, whose sums over ranks are TensorRT's collectives, and their engines.

    Raises
    ------
    UserError
        TensorRT refuses something.
    """
    for rank in range(build.tp_size):
        folder = rank_folder(staging, rank)
        folder.mkdir()
        shard = Shard.of(checkpoint.config, rank, build.tp_size)
        own, own_plan = rank_checkpoint(checkpoint, shard, folder / COLUMNS), shard_plan(plan, checkpoint.config, shard)
        with kept_if_killed(folder, folder / "partial") as partial_weights:
            write_engine(folder, own, own_plan, build, WeightOptions(), partial_weights, report)
        build_engines(folder, own, own_plan, build, options, report)
        for path in folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in (DECODER_ENGINE, COMPRESSOR_ENGINE, ENGINES):
                path.unlink()


def rank_checkpoint(checkpoint: Checkpoint, shard: Shard, columns: Path) -> Checkpoint:
    """A checkpoint of one rank's share: its shape, and weights that are views into the whole one's files.

    Shares of columns are not contiguous there and are written to the file ``columns``, one at a time.
    """
    model = shard_model(checkpoint.config, shard)
    weights = _rank_weights(checkpoint.weights, shard, columns)
    if "lm_head.weight" not in weights and splits_vocabulary(model.vocab_size, shard):
        embed, own = checkpoint.weights["embed.weight"], shard.part(model.vocab_size)
        weights["lm_head.weight"] = embed.rows(own.start, own.stop - own.start)
        model = replace(model, tie_word_embeddings=False)
    return replace(checkpoint, config=model, weights=weights)


def _rank_weights(views: Mapping[str, WeightView], shard: Shard, path: Path) -> dict[str, WeightView]:
    cut = {name: part for name, view in views.items() if (part := columns_of(name, view.shape[-1], shard)) is not None}
    _write_columns(path, {name: views[name] for name in cut}, cut)
    written = read_safetensors_file(path)
    result: dict[str, WeightView] = {}
    for name, view in views.items():
        rows = rows_of(name, view.shape[0], shard)
        if rows is not None:
            result[name] = view.rows(rows.start, rows.stop - rows.start)
        elif name in cut:
            result[name] = written[name]
        elif not (shard.rank and name.endswith(".bias") and sums_over_ranks(name.removesuffix(".bias"))):
            result[name] = view  # biases of sums are added by rank 0
    return result


def _write_columns(path: Path, views: Mapping[str, WeightView], parts: Mapping[str, slice]) -> None:
    stored = {dtype: key for key, dtype in SAFETENSORS_DTYPES.items()}
    shapes = {name: (view.shape[0], parts[name].stop - parts[name].start) for name, view in views.items()}
    with path.open("wb") as file:
        file.write(encode_header({name: (stored[view.dtype], shapes[name]) for name, view in views.items()}))
        for name, view in views.items():
            file.write(np.ascontiguousarray(view.numpy()[:, parts[name]]).view(np.uint8).data)
