"""The engine audits compare with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from minicache_trt.backends.base import Engine
from minicache_trt.build import build_engine, load_engine
from minicache_trt.compression.methods import make_plan
from minicache_trt.compression.plan import CompressionPlan
from minicache_trt.config import BuildConfig, KvCacheConfig, ModelConfig
from minicache_trt.engine_directory import CHECKPOINT
from minicache_trt.quantization.store import codes_of
from minicache_trt.runtime.runner import Runner

STEP_TOKENS = 128
"""Most prompt tokens in one step of an audit, so that a live request waits for no long one."""


def uncompressed_runner(engine: Engine, directory: Path, work_dir: Path, num_threads: int | None) -> Runner:
    """A runner for one sequence at a time on an engine of the same checkpoint with method ``full``.

    Parameters
    ----------
    engine : Engine
        The one that serves.
    directory : Path
        Its engine directory.
    work_dir : Path
        The new engine is written below it; its weights are linked.
    num_threads : int, optional
        As for `load_engine`.

    Raises
    ------
    UserError
        When the engine cannot be built, or there is no memory for it.
    """
    build = replace(engine.build, max_batch_size=1, max_num_tokens=min(STEP_TOKENS, engine.build.max_num_tokens))

    def configure(config: ModelConfig) -> tuple[CompressionPlan, BuildConfig]:
        return make_plan(config, "full"), build

    built = build_engine(str(directory / CHECKPOINT), work_dir / "uncompressed", configure, weights=codes_of(directory))
    cache = KvCacheConfig(enable_block_reuse=False)
    return Runner(load_engine(built.directory, num_threads, build.backend), cache)
