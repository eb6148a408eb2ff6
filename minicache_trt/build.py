"""From a checkpoint to an engine directory, and from an engine directory to a running engine."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from minicache_trt.backends import open_backend
from minicache_trt.backends.base import Engine
from minicache_trt.backends.tensorrt.estimate import Room, build_needs, check_room
from minicache_trt.backends.tensorrt.options import TensorRtOptions
from minicache_trt.build_checks import check_build, check_weights, int4_build
from minicache_trt.checkpoint.resolve import Checkpoint, load_checkpoint
from minicache_trt.compression.plan import CompressionPlan
from minicache_trt.config import TENSORRT_BACKENDS, BuildConfig, ModelConfig
from minicache_trt.engine_directory import (
    CHECKPOINT,
    EngineInfo,
    is_engine_directory,
    read_engine,
    write_config,
)
from minicache_trt.engine_writer import Report, write_engine
from minicache_trt.errors import UserError
from minicache_trt.parallel.engine import TensorParallelEngine, check_ranks
from minicache_trt.quantization.partial import kept_if_killed
from minicache_trt.quantization.store import WeightOptions
from minicache_trt.staging import staged


@dataclass(frozen=True)
class BuildResult:
    """``linked`` is False when the weights had to be copied (another file system); ``notes`` are for people."""

    directory: Path
    model: ModelConfig
    plan: CompressionPlan
    build: BuildConfig
    linked: bool
    notes: tuple[str, ...] = ()


def silent(stage: str, done: int, total: int) -> None:
    """A `Report` that reports nothing."""


Configure = Callable[[ModelConfig], tuple[CompressionPlan, BuildConfig]]
"""From the model's shape, once it is known, to what to build."""

Calibrate = Callable[[CompressionPlan, Checkpoint, Report], CompressionPlan]
"""From a plan to the same plan with constants computed from the checkpoint."""

DEFAULT_MAX_SEQ_LEN = 4096


def default_max_seq_len(config: ModelConfig) -> int:
    """The context an engine is built for unless told otherwise: the model's own, at most 4,096 tokens."""
    return min(DEFAULT_MAX_SEQ_LEN, config.max_position_embeddings)


def build_engine(
    model: str,
    output: str | Path,
    configure: Configure,
    *,
    calibrate: Calibrate | None = None,
    load_format: str = "auto",
    revision: str | None = None,
    lora_dir: str | Path | None = None,
    tokenizer: str | Path | None = None,
    overwrite: bool = False,
    weights: WeightOptions = WeightOptions(),  # noqa: B008 (frozen)
    tensorrt: TensorRtOptions = TensorRtOptions(),  # noqa: B008 (frozen)
    report: Report = silent,
) -> BuildResult:
    """Build an engine directory.

    Parameters
    ----------
    model : str
        Preset, hub id or local checkpoint, of any format `minicache_trt.checkpoint.resolve` reads.
    output : str or Path
        Directory to create; it appears only when it is complete.
    configure : callable
    calibrate : callable, optional
        For plans whose constants depend on the checkpoint.
    load_format : str
        ``auto`` or ``dummy`` (the model's shape without its weights).
    revision : str, optional
        Branch, tag or commit of a hub id.
    lora_dir, tokenizer : str or Path, optional
        As for `load_checkpoint`.
    weights : WeightOptions
        How weights of another format are computed. A killed build's finished ones are used by the next.
    overwrite : bool
        Replace an engine that is already there.
    tensorrt : TensorRtOptions
        Settings of TensorRT's builder, for its backends.
    report : callable

    Raises
    ------
    UserError
        Anything the user can mend; nothing is left behind.
    """
    output = Path(output)
    if is_engine_directory(model):
        raise UserError(f"{model} is an engine, expected a checkpoint", f"its checkpoint is {Path(model) / CHECKPOINT}")
    with (
        staged(output, overwrite) as staging,
        kept_if_killed(Path(os.path.realpath(output)), staging.with_name("partial")) as partial_weights,
    ):
        report("checkpoint", 0, 1)
        checkpoint = load_checkpoint(
            model,
            revision=revision,
            load_format=load_format,
            work_dir=staging.with_name("converted"),
            lora_dir=lora_dir,
            tokenizer=tokenizer,
            progress=partial(report, "convert"),
        )
        plan, build = configure(checkpoint.config)
        if checkpoint.int4 is not None:
            build = int4_build(build, checkpoint)
        build = check_build(checkpoint.config, plan, build, tensorrt)
        if not checkpoint.dummy:
            plan.check_source(checkpoint.checksum())
        if (needs := build_needs(checkpoint.config, build)) is not None:
            check_room(needs, Room.here(output.parent), build)
        check_weights(checkpoint, build, weights)
        checkpoint = replace(checkpoint, config=checkpoint.config.for_context(build.max_seq_len))
        report("checkpoint", 1, 1)
        if calibrate is not None:
            plan = calibrate(plan, checkpoint, report).validate(checkpoint.config)
            check_ranks(checkpoint.config, plan, build)
        source, one_rank = _source(checkpoint), replace(build, tp_size=1)
        written = write_engine(staging, checkpoint, plan, one_rank, weights, partial_weights, report)
        checkpoint = written.checkpoint
        if build.backend in TENSORRT_BACKENDS and build.tp_size > 1:
            from minicache_trt.backends.tensorrt.rank_engines import build_rank_engines

            build_rank_engines(staging, checkpoint, plan, build, tensorrt, report)
        elif build.backend in TENSORRT_BACKENDS:
            from minicache_trt.backends.tensorrt.build import build_engines

            build_engines(staging, checkpoint, plan, build, tensorrt, report)
        report("fingerprint", 0, 1)
        write_config(staging, EngineInfo(checkpoint.config, plan, build, source))
        report("fingerprint", 1, 1)
    return BuildResult(output, checkpoint.config, plan, build, written.linked, checkpoint.notes)


def load_engine(path: str | Path, num_threads: int | None = None, backend: str | None = None) -> Engine:
    """Load an engine directory on the backend it was built for, or on another that can read it.

    Parameters
    ----------
    path : str or Path
    num_threads : int, optional
        Threads of one step. Default: all cores.
    backend : str, optional
        A key of `minicache_trt.backends.BACKENDS`; default: the engine's own.

    Raises
    ------
    UserError
        The directory is damaged or of another version, or the backend cannot run it.
    """
    info = read_engine(path)
    name = backend or info.build.backend
    if info.build.tp_size > 1:
        return TensorParallelEngine(Path(path), info, name, num_threads)
    return open_backend(name)(Path(path), info, num_threads)


def _source(checkpoint: Checkpoint) -> dict[str, object]:
    origin = checkpoint.origin or checkpoint.directory
    return {
        "name": checkpoint.source,
        "format": checkpoint.format,
        "directory": None if checkpoint.dummy else str(origin.absolute()),
        "revision": checkpoint.revision,
        "checksum": checkpoint.checksum(),
        "dummy": checkpoint.dummy,
    }
