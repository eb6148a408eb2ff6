"""Engines of models that have not been built."""

from __future__ import annotations

from pathlib import Path

from minicache_trt.compression.methods import CALIBRATED_METHODS, make_plan
from minicache_trt.compression.plan import CompressionPlan
from minicache_trt.config import BuildConfig, ModelConfig
from minicache_trt.errors import UserError
from minicache_trt.quantization.store import WeightOptions


def engine_directory(
    model: str | Path,
    work_dir: Path,
    method: str,
    plan: CompressionPlan | None,
    build_config: BuildConfig | None,
    load_format: str,
    weights: WeightOptions | None = None,
) -> Path:
    """``model`` itself when it is an engine directory, else a new engine below ``work_dir``.

    Raises
    ------
    UserError
        When the model cannot be built.
    """
    from minicache_trt.build import build_engine, default_max_seq_len
    from minicache_trt.engine_directory import is_engine_directory

    if is_engine_directory(model):
        return Path(model)
    if plan is None and method in CALIBRATED_METHODS:
        raise UserError(
            f"method {method!r} needs text to calibrate on",
            f"give an engine that minicache-trt build --method {method} --calibration-text FILE wrote",
        )

    def configure(config: ModelConfig) -> tuple[CompressionPlan, BuildConfig]:
        build = build_config or BuildConfig(max_seq_len=default_max_seq_len(config))
        return plan or make_plan(config, method), build

    options = weights or WeightOptions()
    return build_engine(str(model), work_dir / "engine", configure, load_format=load_format, weights=options).directory
