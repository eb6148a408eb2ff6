"""``minicache-trt build``: checkpoint to engine directory."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minicache_trt.backends.tensorrt.options import TensorRtOptions
from minicache_trt.cli import options
from minicache_trt.cli.console import print_json, progress_bars, quiet_transformers, stderr, stdout, table
from minicache_trt.compression.methods import CALIBRATED_METHODS
from minicache_trt.compression.plan import CompressionPlan
from minicache_trt.compression.size import bytes_per_token, ratio
from minicache_trt.compression.smoothquant import key_scales, with_scales
from minicache_trt.config import AUTO, GROUP_SIZES, WEIGHT_BITS, WEIGHT_FORMATS, BuildConfig, ModelConfig
from minicache_trt.errors import UserError
from minicache_trt.quantization.store import WeightOptions
from minicache_trt.units import format_bytes

if TYPE_CHECKING:
    from minicache_trt.build import BuildResult
    from minicache_trt.checkpoint import Checkpoint
    from minicache_trt.engine_writer import Report

LIMITS, TENSORRT = "Limits", "TensorRT's builder"


def build(
    model: options.Model,
    output: Annotated[Path, typer.Option("--output", "-o", "--output-dir", help="Engine directory to create.")],
    merge_start: options.MergeStart = None,
    method: options.Method = None,
    plan: options.PlanFile = None,
    kv_format: options.KvFormat = None,
    t: options.T = None,
    gamma: options.Gamma = None,
    norm: options.Norm = None,
    sink_tokens: options.SinkTokens = None,
    calibration_text: options.CalibrationText = None,
    weights: Annotated[
        str,
        typer.Option(
            *options.WEIGHT_FLAGS,
            help=f"Weight format: {', '.join(WEIGHT_FORMATS)}; fp32 keeps the checkpoint's files, fp8 is TensorRT's.",
            rich_help_panel=options.WEIGHTS_HELP,
        ),
    ] = "fp32",
    group_size: Annotated[
        int,
        typer.Option(
            *options.GROUP_FLAGS,
            help=f"Inputs that share a scale in int8 and int4: {', '.join(map(str, GROUP_SIZES))}.",
            rich_help_panel=options.WEIGHTS_HELP,
        ),
    ] = BuildConfig.group_size,
    calibration_samples: options.CalibrationSamples = WeightOptions.samples,
    threads: options.WeightThreads = None,
    backend: Annotated[
        str,
        typer.Option(
            help="onnxruntime, tensorrt, tensorrt-rtx, cuda (PyTorch with our kernels), or torch (reference)."
        ),
    ] = "onnxruntime",
    dtype: Annotated[
        str,
        typer.Option(
            help="Compute type: float32, float16 or bfloat16.",
            show_default="float32 on the CPU; on a GPU bfloat16 for such checkpoints, else float16",
        ),
    ] = AUTO,
    max_batch_size: Annotated[
        int, typer.Option("--max-batch-size", "--max-num-seqs", help="Sequences in one step.", rich_help_panel=LIMITS)
    ] = 8,
    max_seq_len: Annotated[
        int | None,
        typer.Option(
            "--max-seq-len",
            "--max-model-len",
            help="Prompt plus generated tokens.",
            show_default="the model's own, at most 4096",
            rich_help_panel=LIMITS,
        ),
    ] = None,
    max_num_tokens: Annotated[
        int,
        typer.Option(
            "--max-num-tokens", "--max-num-batched-tokens", help="Tokens in one step.", rich_help_panel=LIMITS
        ),
    ] = 2048,
    optimization_level: Annotated[
        int | None,
        typer.Option(
            "--builder-optimization-level",
            help="0 (fast to build) to 5.",
            show_default="TensorRT's",
            rich_help_panel=TENSORRT,
        ),
    ] = None,
    version_compatible: Annotated[
        bool,
        typer.Option("--version-compatible", help="Later minor versions run it too.", rich_help_panel=TENSORRT),
    ] = False,
    weight_streaming: Annotated[
        bool,
        typer.Option("--weight-streaming", help="Weights may stay in the machine's memory.", rich_help_panel=TENSORRT),
    ] = False,
    timing_cache: Annotated[
        Path | None, typer.Option(help="File of measured kernels, read and written.", rich_help_panel=TENSORRT)
    ] = None,
    debug_output: Annotated[
        bool,
        typer.Option(
            "--enable-debug-output",
            help="Every layer's attention and residual stream is an output, for compare --layers.",
            rich_help_panel=TENSORRT,
        ),
    ] = False,
    load_format: Annotated[str, typer.Option(help="auto, or dummy: the model's shape without its weights.")] = "auto",
    revision: options.Revision = None,
    lora_dir: options.LoraDir = None,
    tokenizer: options.TokenizerDir = None,
    tp_size: options.TensorParallel = 1,
    pp_size: options.PipelineParallel = 1,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what the build needs and whether it is here; build nothing.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace an engine that is already there.")] = False,
    json: options.Json = False,
) -> None:
    """Build an engine directory from a checkpoint.

    Weights are hard-linked, not copied; other weight formats write new ones (a build that is killed goes on where it
    was when the same command is given again), and checkpoints that are not Hugging Face safetensors are converted.

    [bold]Examples[/]

      minicache-trt build -m ./Llama-3.2-1B -o engine                        (4-bit cache)

      minicache-trt build -m llama2-7b --merge-start 16 -o engine            (the MiniCache paper's plan)

      minicache-trt build -m llama2-7b --method minicache4 --weights int4 -o engine

      minicache-trt build -m ./checkpoint --weights int4_awq --calibration-text text.txt -o engine

      minicache-trt build --checkpoint_dir ./trtllm_ckpt --tokenizer ./Llama-2-7b-hf --output_dir engine

      minicache-trt build -m ./Llama-3.2-1B --backend tensorrt-rtx --dtype float16 -o engine    (needs no GPU)

      minicache-trt build -m llama2-7b --backend tensorrt-rtx -o engine --dry-run    (memory and disk it would take)

      minicache-trt build -m ./checkpoint --method smoothquant --calibration-text text.txt --backend torch -o engine
    """
    from minicache_trt.build import build_engine, default_max_seq_len

    options.check_pipeline(pp_size)
    weight_format = options.weight_format(weights)
    options.check_calibration_text(calibration_text, method, plan, load_format, (weight_format,))
    plan_options = options.PlanOptions(method, merge_start, plan, kv_format, t, gamma, norm, sink_tokens)

    def configure(config: ModelConfig) -> tuple[CompressionPlan, BuildConfig]:
        length = default_max_seq_len(config) if max_seq_len is None else max_seq_len
        try:
            limits = BuildConfig(
                max_batch_size, length, max_num_tokens, weight_format, backend, tp_size=tp_size, dtype=dtype,
                group_size=group_size,
            )  # fmt: skip
        except ValueError as error:
            raise UserError(str(error)) from error
        return plan_options(config), limits

    try:
        tensorrt = TensorRtOptions(optimization_level, version_compatible, weight_streaming, timing_cache, debug_output)
    except ValueError as error:
        raise UserError(f"--builder-{str(error).replace('_', '-')}") from error
    if dry_run:
        from minicache_trt.cli.dry_run import dry_run as print_needs

        print_needs(model, output, configure, tensorrt, revision, json)
        return
    calibrated = plan is None and method in CALIBRATED_METHODS
    start = time.perf_counter()
    with progress_bars(not json) as report:
        result = build_engine(
            model,
            output,
            configure,
            calibrate=None if calibration_text is None or not calibrated else partial(_calibrate, calibration_text),
            load_format=load_format,
            revision=revision,
            lora_dir=lora_dir,
            tokenizer=tokenizer,
            overwrite=force,
            weights=WeightOptions(calibration_text, calibration_samples, threads),
            tensorrt=tensorrt,
            report=report,
        )
    summary = _summary(result, time.perf_counter() - start)
    if json:
        print_json(summary)
        return
    for note in result.notes:
        stderr.print(f"note: {note}")
    if not result.linked:
        stderr.print("note: the weights were copied, because the output is on another file system than the checkpoint")
    rows = table(f"Engine {output}", "what", "value")
    for key, value in summary.items():
        rows.add_row(key.replace("_", " "), format_bytes(value) if key.startswith("bytes_added") else _text(value))
    stdout.print(rows)


def _calibrate(text: Path, plan: CompressionPlan, checkpoint: Checkpoint, report: Report) -> CompressionPlan:
    quiet_transformers()
    if checkpoint.int4 is not None:
        raise UserError(
            f"the {checkpoint.format} holds 4-bit weights, which cannot be calibrated on",
            "give the unquantized checkpoint, or use another method",
        )
    if checkpoint.sidecars is not None:
        raise UserError(
            "--calibration-text is read with the checkpoint's own tokenizer, so --tokenizer cannot be added to it",
            "put the tokenizer's files into the checkpoint directory",
        )
    progress = partial(report, "calibrate")
    return with_scales(plan, key_scales(checkpoint.directory, checkpoint.config, text, progress))


def _text(value: object) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _summary(result: BuildResult, seconds: float) -> dict[str, Any]:
    plan, model, limits = result.plan, result.model, result.build
    files = [path for path in result.directory.rglob("*") if path.is_file()]
    # st_blocks counts what is on disk, so that a dummy's sparse file weighs what it takes.
    added = sum(path.stat().st_blocks * 512 for path in files if path.stat().st_nlink == 1)
    context = limits.max_seq_len
    return {
        "directory": str(result.directory),
        "family": model.family,
        "layers": model.num_layers,
        "method": plan.method,
        "weights": limits.weights,
        "group_size": limits.group_size if limits.weights in WEIGHT_BITS else None,
        "backend": limits.backend,
        "tp_size": limits.tp_size,
        "dtype": limits.dtype,
        "max_seq_len": context,
        "cache_bytes_per_token": round(bytes_per_token(plan, model, context, limits.window), 1),
        "ratio_to_16_bit": round(ratio(plan, model, context, limits.window), 3),
        "weights_linked": result.linked,
        "bytes_added_on_disk": added,
        "seconds": round(seconds, 2),
    }
