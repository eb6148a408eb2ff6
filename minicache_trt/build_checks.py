"""What is refused before a build begins: what does not go together, or with the model."""

from __future__ import annotations

from dataclasses import replace

from minicache_trt.backends import open_backend
from minicache_trt.backends.tensorrt.module import load_module
from minicache_trt.backends.tensorrt.options import TensorRtOptions
from minicache_trt.checkpoint.resolve import Checkpoint
from minicache_trt.compression.plan import CompressionPlan
from minicache_trt.config import (
    CALIBRATED_WEIGHTS,
    TENSORRT_BACKENDS,
    WEIGHT_BITS,
    WEIGHT_TYPES,
    BuildConfig,
    ModelConfig,
)
from minicache_trt.errors import UserError
from minicache_trt.parallel.engine import check_ranks
from minicache_trt.quantization.store import WeightOptions


def check_build(
    config: ModelConfig, plan: CompressionPlan, build: BuildConfig, tensorrt: TensorRtOptions
) -> BuildConfig:
    """What can be known of a build before any weight is read; the build with its compute type.

    Raises
    ------
    UserError
        The plan, the limits or the backend do not go with the model, or with one another.
    """
    plan.validate(config)
    open_backend(build.backend)
    build = build.for_model(config)
    tensorrt.check(build.backend)
    if build.backend in TENSORRT_BACKENDS:
        load_module(build.backend)
        if build.tp_size > 1 and (build.weights in WEIGHT_TYPES or build.weights == CALIBRATED_WEIGHTS):
            raise UserError(
                f"TensorRT engines of {build.tp_size} ranks have no {build.weights} weights",
                "use --weights int4, int8 or fp8, or leave it out: the engine's are of its --dtype",
            )
    elif build.weights == "fp8":
        raise UserError(
            f"backend {build.backend} has no fp8 weights", "use --weights int8 or int4, or --backend tensorrt-rtx"
        )
    check_ranks(config, plan, build)
    _check_limits(config, build)
    return build


def int4_build(build: BuildConfig, checkpoint: Checkpoint) -> BuildConfig:
    """The weights of a checkpoint that is quantized to 4 bits stay as they are."""
    if build.weights not in ("fp32", "int4"):
        raise UserError(
            f"weights {build.weights}: the {checkpoint.format} holds 4-bit weights",
            "leave --weights out, or give the unquantized checkpoint",
        )
    return replace(build, weights="int4")


def check_weights(checkpoint: Checkpoint, build: BuildConfig, weights: WeightOptions) -> None:
    """What can be known of a checkpoint's weights before any is written.

    Raises
    ------
    UserError
        The build cannot have them in the format it asks for.
    """
    if checkpoint.int4 is not None and build.backend in TENSORRT_BACKENDS and build.tp_size > 1:
        raise UserError(
            f"TensorRT engines of {build.tp_size} ranks cannot be built from 4-bit checkpoints",
            "use --tp-size 1, or the checkpoint that is not quantized",
        )
    if build.backend == "onnxruntime" and build.weights in WEIGHT_BITS and build.dtype != "float32":
        raise UserError(f"weights {build.weights} take activations in float32, not {build.dtype}", "leave out --dtype")
    if build.weights != CALIBRATED_WEIGHTS or weights.codes is not None:
        return
    if checkpoint.dummy:
        raise UserError(f"weights {CALIBRATED_WEIGHTS}: a dummy has no weights to calibrate", "use --weights int4")
    if weights.text is None:
        raise UserError(
            f"weights {CALIBRATED_WEIGHTS} need text to calibrate on",
            "give --calibration-text FILE, a text of the kind the model will read, or use --weights int4",
        )


def _check_limits(config: ModelConfig, build: BuildConfig) -> None:
    if build.max_seq_len > config.max_position_embeddings:
        raise UserError(
            f"max_seq_len {build.max_seq_len} is beyond the model's {config.max_position_embeddings} positions",
            f"use --max-seq-len {config.max_position_embeddings} or less",
        )
