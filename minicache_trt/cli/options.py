"""Options that several verbs share."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from minicache_trt.backends import BACKENDS
from minicache_trt.compression.methods import CALIBRATED_METHODS, DEFAULT_METHOD, METHODS, MethodOptions, make_plan
from minicache_trt.compression.plan import CompressionPlan
from minicache_trt.compression.plan_json import load_plan
from minicache_trt.config import CALIBRATED_WEIGHTS, WEIGHT_FORMATS, KvCacheConfig, ModelConfig
from minicache_trt.errors import UserError
from minicache_trt.units import format_bytes, parse_bytes

Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        "--model-dir",
        "--checkpoint-dir",
        help="Preset (llama2-7b), Hugging Face hub id, or local checkpoint: a Hugging Face directory (safetensors, "
        "PyTorch, AWQ, GPTQ), a TensorRT-LLM checkpoint directory, or a GGUF file.",
    ),
]
EngineDir = Annotated[Path, typer.Option("--engine", "-e", "--engine-dir", help="Engine directory that build wrote.")]
TokenizerDir = Annotated[
    Path | None,
    typer.Option("--tokenizer", "--tokenizer-dir", help="Directory of a tokenizer to use in place of the model's own."),
]
LoraDir = Annotated[
    Path | None,
    typer.Option("--lora-dir", help="LoRA adapter (peft's format) to merge into the weights."),
]
TensorParallel = Annotated[
    int,
    typer.Option(
        "--tp-size", "--tensor-parallel-size", help="Ranks that share heads and columns, a process (and GPU) each."
    ),
]
PipelineParallel = Annotated[
    int, typer.Option("--pp-size", "--pipeline-parallel-size", help="GPUs the layers are dealt out to; only 1 so far.")
]
Prompt = Annotated[
    list[str] | None, typer.Option("--prompt", "-p", "--input-text", help="Prompt; may be given several times.")
]
OptionalEngineDir = Annotated[
    Path | None, typer.Option("--engine", "-e", "--engine-dir", help="Engine directory that build wrote.")
]
PromptFile = Annotated[
    Path | None, typer.Option("--prompts", help="File of prompts: one per line, or .jsonl with a field prompt.")
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads.", show_default="all cores")]
Backend = Annotated[
    str | None,
    typer.Option(
        help=f"Run on another backend: {', '.join(BACKENDS)}.", show_default="the one the engine was built for"
    ),
]
CacheMemory = Annotated[
    str | None,
    typer.Option(
        help="Bytes for the cache, both tiers together: 512MiB, 2GB, 1000000.",
        show_default="enough for a full batch of the longest sequences",
    ),
]
GpuFraction = Annotated[
    float | None,
    typer.Option(
        "--kv-cache-free-gpu-memory-fraction",
        help="Share of the GPU's free memory the cache may take (backend cuda).",
        show_default="0.9",
    ),
]
MAX_CACHE_BYTES = 1 << 50
"""Beyond any machine; block counts and array sizes up to here overflow nothing."""

PLAN_HELP = "Compression"
Method = Annotated[
    str | None,
    typer.Option(
        help=f"Compression method: {', '.join(METHODS)}.",
        show_default=f"{DEFAULT_METHOD}; minicache with --merge-start",
        rich_help_panel=PLAN_HELP,
    ),
]
MergeStart = Annotated[
    int | None,
    typer.Option(
        help="First layer merged with its successor.", show_default="half the layers", rich_help_panel=PLAN_HELP
    ),
]
PlanFile = Annotated[
    Path | None, typer.Option("--plan", help="plan.json to use instead of a method.", rich_help_panel=PLAN_HELP)
]
KvFormat = Annotated[
    str | None,
    typer.Option(help="Storage of a merging method: model (16 bit), int8, int4, int2.", rich_help_panel=PLAN_HELP),
]
T = Annotated[
    float | None,
    typer.Option("--t", help="SLERP weight of the later layer.", show_default="0.6", rich_help_panel=PLAN_HELP),
]
Gamma = Annotated[
    float | None,
    typer.Option(help="Share of each block's tokens kept exact.", show_default="0.05", rich_help_panel=PLAN_HELP),
]
Norm = Annotated[
    str | None,
    typer.Option(
        help="Granularity of merged directions: head or token.", show_default="head", rich_help_panel=PLAN_HELP
    ),
]
SinkTokens = Annotated[
    int | None,
    typer.Option(help="First positions always kept exact.", show_default="0", rich_help_panel=PLAN_HELP),
]
CalibrationText = Annotated[
    Path | None,
    typer.Option(
        help=f"Text to calibrate {', '.join((*CALIBRATED_METHODS, CALIBRATED_WEIGHTS))} on: UTF-8, documents separated "
        "by newline and NUL.",
        rich_help_panel=PLAN_HELP,
    ),
]
WEIGHTS_HELP = "Weights"
WEIGHT_FLAGS = ("--weights", "--weight-format", "--quantization", "--qformat")
GROUP_FLAGS = ("--group-size", "--awq-block-size")
WeightThreads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        "--workers",
        min=1,
        help="CPU threads that convert weights.",
        show_default="all cores",
        rich_help_panel=WEIGHTS_HELP,
    ),
]
CalibrationSamples = Annotated[
    int,
    typer.Option(
        "--calibration-samples",
        "--calib-size",
        min=1,
        help=f"Sequences of the text that {CALIBRATED_WEIGHTS} is calibrated on.",
        rich_help_panel=WEIGHTS_HELP,
    ),
]
WEIGHT_NAMES = {
    "auto": "fp32",
    "none": "fp32",
    "float32": "fp32",
    "float16": "fp16",
    "half": "fp16",
    "bfloat16": "bf16",
    "int8_wo": "int8",
    "int4_wo": "int4",
    "awq": "int4_awq",
}
"""What TensorRT-LLM and vLLM call weight formats."""


def weight_format(text: str) -> str:
    """A weight format under its own or another tool's name.

    Raises
    ------
    UserError
        There is no such format.
    """
    name = WEIGHT_NAMES.get(text.strip().lower(), text.strip())
    if name not in WEIGHT_FORMATS:
        raise UserError(f"--weights: expected one of {', '.join(WEIGHT_FORMATS)}, got {name!r}")
    return name


def weight_formats(text: str) -> tuple[str, ...]:
    """Weight formats of a comma-separated list, each once, in order; raises as `weight_format`."""
    return tuple(dict.fromkeys(weight_format(word) for word in text.split(",")))


KV_FORMATS = ("model", "int8", "int4", "int2")


@dataclass(frozen=True)
class PlanOptions:
    """The compression flags of one command line."""

    method: str | None
    merge_start: int | None
    plan: Path | None
    kv_format: str | None
    t: float | None
    gamma: float | None
    norm: str | None
    sink_tokens: int | None

    def __call__(self, config: ModelConfig) -> CompressionPlan:
        """The plan these flags ask for.

        Raises
        ------
        UserError
            Flags that contradict each other or do not fit the model.
        """
        if self.plan is not None:
            others = {
                "--method": self.method,
                "--merge-start": self.merge_start,
                "--kv-format": self.kv_format,
                "--t": self.t,
                "--gamma": self.gamma,
                "--norm": self.norm,
                "--sink-tokens": self.sink_tokens,
            }
            given = [name for name, value in others.items() if value is not None]
            if given:
                raise UserError(f"--plan says everything about compression, {', '.join(given)} cannot be added to it")
            return load_plan(self.plan).validate(config)
        if self.kv_format is not None and self.kv_format not in KV_FORMATS:
            raise UserError(f"unknown --kv-format {self.kv_format!r}", f"formats: {', '.join(KV_FORMATS)}")
        merges = self.merge_start is not None or self.kv_format is not None
        method = self.method if self.method is not None else "minicache" if merges else DEFAULT_METHOD
        chosen = {
            name: value
            for name in ("merge_start", "kv_format", "t", "gamma", "norm", "sink_tokens")
            if (value := getattr(self, name)) is not None
        }
        return make_plan(config, method, MethodOptions(**chosen))


def check_pipeline(size: int) -> None:
    """Refuse layers on several GPUs."""
    if size != 1:
        raise UserError(
            f"--pp-size {size}: layers are not dealt out to several GPUs",
            "use --tp-size; a TensorRT-LLM checkpoint of several ranks is joined when it is built",
        )


def check_calibration_text(
    text: Path | None, method: str | None, plan: Path | None, load_format: str, weights: tuple[str, ...]
) -> None:
    """Refuse calibration text where nothing is calibrated, and its absence where something must be.

    A dummy model has no weights to calibrate: its scales stay 1 unless text is given.
    """
    calibrated = plan is None and method in CALIBRATED_METHODS
    if text is not None and not calibrated and CALIBRATED_WEIGHTS not in weights:
        chosen = f"method {method!r}" if method is not None else "the default method" if plan is None else "--plan"
        raise UserError(
            f"{chosen} takes no --calibration-text",
            f"methods that take one: {', '.join(CALIBRATED_METHODS)}; weights: {CALIBRATED_WEIGHTS}",
        )
    if text is None and calibrated and load_format != "dummy":
        raise UserError(
            f"method {method!r} needs text to calibrate on",
            "give --calibration-text FILE, a text of the kind the model will read",
        )


def cache_config(memory: str | None, gpu_fraction: float | None = None) -> KvCacheConfig:
    """The cache's budget from ``--kv-cache-memory`` and ``--kv-cache-free-gpu-memory-fraction``."""
    config = KvCacheConfig()
    if gpu_fraction is not None:
        if not 0 < gpu_fraction < 1:
            raise UserError(
                f"--kv-cache-free-gpu-memory-fraction: expected a number between 0 and 1, got {gpu_fraction}"
            )
        config = replace(config, free_gpu_memory_fraction=gpu_fraction)
    if memory is None:
        return config
    try:
        size = parse_bytes(memory, "--kv-cache-memory")
    except OverflowError:
        size = sys.maxsize
    if not 1 <= size <= MAX_CACHE_BYTES:
        raise UserError(f"--kv-cache-memory: expected 1 byte to {format_bytes(MAX_CACHE_BYTES)}, got {memory}")
    return replace(config, max_bytes=size)


def positive_numbers(flag: str, text: str) -> tuple[int, ...]:
    """Positive numbers of a comma-separated list, each once, in order."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdecimal() and len(word) < 10 and int(word) for word in words):
        raise UserError(f"{flag}: expected positive numbers separated by commas, got {text!r}", f"such as {flag} 1,8")
    return tuple(dict.fromkeys(map(int, words)))


def check_output(flag: str, path: Path | None) -> None:
    """Raises `UserError` when results could not be written there, before they are measured."""
    if path is None:
        return
    if flag == "--plot" and path.exists() and not path.is_dir():
        raise UserError(f"{flag}: {path} is not a directory")
    if flag == "--csv" and (path.is_dir() or not path.parent.is_dir()):
        raise UserError(f"{flag}: cannot write {path}", "name a file in a directory that exists")
