"""``minicache-trt calibrate``: checkpoint and text to the compression plan that costs the model least."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box

from minicache_trt.calibration.settings import GROUP_SIZES, READ_COSTS, CalibrationSettings
from minicache_trt.cli import options
from minicache_trt.cli.console import print_json, progress_bars, quiet_transformers, stderr, stdout, table
from minicache_trt.config import ModelConfig
from minicache_trt.errors import UserError
from minicache_trt.units import format_bytes

if TYPE_CHECKING:
    from minicache_trt.calibration.result import Calibration

DEFAULT_RATIO = 5.0
PLAN_FILE = "plan.json"
SAMPLES = "Samples"


def calibrate(
    model: options.Model,
    text: Annotated[Path, typer.Option(help="UTF-8 text of the kind the model will read; documents are separated by "
                                            "newline and NUL.")],
    target_ratio: Annotated[float | None, typer.Option(
        help="Least loss at this ratio to a 16-bit cache.", show_default=f"{DEFAULT_RATIO:g}")] = None,
    max_loss: Annotated[str | None, typer.Option(
        help="Smallest plan whose loss is at most this, such as 0.5%: divergence from the uncompressed model over text "
             "and recall, as a change of perplexity.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="plan.json, or a directory for it.")] = Path(PLAN_FILE),
    plot: Annotated[Path | None, typer.Option(help="Directory for figures.")] = None,
    read_cost: Annotated[str, typer.Option(
        help=f"{' or '.join(READ_COSTS)}: free allows nothing that costs time when history is read.")] = "any",
    groups: Annotated[str, typer.Option(help=f"Layers a stream may hold, among {GROUP_SIZES}.")] = "1,2",
    context: Annotated[int | None, typer.Option(
        min=1, help="Tokens at which the ratio counts.", show_default="the model's own, at most 4096")] = None,
    recall_share: Annotated[float, typer.Option(
        help="Share of synthetic sequences that can only be continued by recall, and their weight in the loss.",
        rich_help_panel=SAMPLES)] = CalibrationSettings.recall_share,
    length: Annotated[int, typer.Option(help="Tokens of a sequence.", rich_help_panel=SAMPLES)] =
    CalibrationSettings.length,
    moment_sequences: Annotated[int, typer.Option(
        help="Sequences for second moments.", rich_help_panel=SAMPLES)] = CalibrationSettings.moment_sequences,
    gradient_sequences: Annotated[int, typer.Option(
        help="Of these, for sensitivities.", rich_help_panel=SAMPLES)] = CalibrationSettings.gradient_sequences,
    search_sequences: Annotated[int, typer.Option(
        help="Sequences for losses of streams.", rich_help_panel=SAMPLES)] = CalibrationSettings.search_sequences,
    verify_sequences: Annotated[int, typer.Option(
        help="Sequences for losses of whole plans.", rich_help_panel=SAMPLES)] = CalibrationSettings.verify_sequences,
    seed: Annotated[int, typer.Option(help="Of synthetic sequences.", rich_help_panel=SAMPLES)] = 0,
    threads: options.Threads = None,
    revision: options.Revision = None,
    json: options.Json = False,
) -> None:  # fmt: skip
    """Measure what each way to store keys and values costs this model, and write the best plan.

    Writes plan.json and plan.safetensors for [bold]build --plan[/], and plan.calibration.json, a record of everything
    measured. A run that is killed goes on where it was when it is started again with the same options.

    [bold]Examples[/]

      minicache-trt calibrate -m ./checkpoint --text text.txt --target-ratio 8 -o plan.json --plot plots

      minicache-trt calibrate -m ./checkpoint --text text.txt --max-loss 0.5% --read-cost free

      minicache-trt build -m ./checkpoint --plan plan.json -o engine
    """
    from minicache_trt.calibration.target import parse_percent
    from minicache_trt.plots.figure import check_directory

    if target_ratio is not None and max_loss is not None:
        raise UserError("--target-ratio and --max-loss exclude each other", "give one of them")
    if target_ratio is not None and not (math.isfinite(target_ratio) and target_ratio > 1):
        raise UserError(f"--target-ratio: expected a number above 1, got {target_ratio:g}")
    loss = None if max_loss is None else math.log1p(parse_percent(max_loss, "--max-loss"))
    ratio = None if max_loss is not None else target_ratio or DEFAULT_RATIO
    plan_path = output if output.suffix == ".json" and not output.is_dir() else output / PLAN_FILE
    if plot is not None:
        check_directory(plot)
    try:
        settings = CalibrationSettings(
            length=length, moment_sequences=moment_sequences, gradient_sequences=gradient_sequences,
            search_sequences=search_sequences, verify_sequences=verify_sequences, recall_share=recall_share,
            groups=_groups(groups), read_cost=read_cost, seed=seed,
        )  # fmt: skip
    except ValueError as error:
        name, _, rest = str(error).partition(": ")
        raise UserError(f"--{name.replace('_', '-')}: {rest}") from error
    start = time.perf_counter()
    result = _run(model, text, plan_path, context, settings, ratio, loss, threads, revision, show=not json)
    data = _write(result, text, plan_path, settings, time.perf_counter() - start)
    plots = [] if plot is None else _plot(result, data, plot, f"{model}, {text.name}")
    if json:
        print_json({"model": model, "output": str(plan_path), **data, "plots": plots})
        return
    _print(data, model)
    for path in (str(plan_path), *plots):
        stderr.print(f"wrote {path}")


def _groups(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise UserError(f"--groups: expected sizes such as 1,2,4, got {text!r}") from error


def _run(
    model: str, text: Path, plan_path: Path, context: int | None, settings: CalibrationSettings,
    ratio: float | None, loss: float | None, threads: int | None, revision: str | None, show: bool,
) -> Calibration:  # fmt: skip
    from minicache_trt.build import default_max_seq_len
    from minicache_trt.checkpoint import load_checkpoint

    with progress_bars(show) as report:
        report("checkpoint", 0, 1)
        import torch

        from minicache_trt.calibration.calibrate import calibrate as run

        quiet_transformers()
        if threads is not None:
            torch.set_num_threads(threads)
        checkpoint = load_checkpoint(model, revision=revision)
        report("checkpoint", 1, 1)
        tokens = default_max_seq_len(checkpoint.config) if context is None else context
        _check_context(checkpoint.config, tokens, settings.length)
        return run(checkpoint, text, plan_path, tokens, settings, ratio, loss, report)


def _check_context(config: ModelConfig, context: int, length: int) -> None:
    most = config.max_position_embeddings
    for flag, value in (("--context", context), ("--length", length)):
        if value > most:
            raise UserError(f"{flag} {value} is beyond the model's {most} positions", f"use {most} or less")


def _write(
    result: Calibration, text: Path, plan_path: Path, settings: CalibrationSettings, seconds: float
) -> dict[str, Any]:
    from minicache_trt.calibration.record import record, record_path, save_record
    from minicache_trt.compression.plan_json import save_plan

    data = record(result, text, settings, seconds)
    try:
        plan_path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {plan_path}: {error.strerror or error}") from error
    save_plan(result.chosen.plan, plan_path)
    save_record(data, record_path(plan_path))
    result.state.remove()
    return data


def _plot(result: Calibration, data: dict[str, Any], directory: Path, title: str) -> list[str]:
    from minicache_trt.plots.calibration import save_calibration_figures

    alike = result.similarities
    before, after = ((), ()) if alike is None else (alike.before, alike.after)
    return [str(path) for path in save_calibration_figures(data, before, after, directory, title)]


def _print(data: dict[str, Any], model: str) -> None:
    rows = table(f"Plan for {model}: {data['plan']['name']}", "keys or values", "layers", "basis", "storage",
                 "bits", "text", "recall", "products", left=4)  # fmt: skip
    rows.box = box.SIMPLE
    for row in data["streams"]:
        layers = "+".join(map(str, row["layers"]))
        storage = " + ".join(row["segments"]) + (f" +{row['retained']}" if row["retained"] else "")
        measured = (f"{row[name]:.1e}" if row[name] is not None else "-" for name in DIVERGENCES)
        rows.add_row(row["part"], layers, row["basis"], storage, f"{row['bits_per_number']:.2f}", *measured,
                     str(row["products_per_token"]))  # fmt: skip
    rows.caption = "text, recall: divergence in nats; products: extra ones per cached token and head when read"
    rows.caption_justify = "left"
    stdout.print(rows)
    summary = table(
        f"Whole plans at {data['context']} tokens", "plan", "ratio", "bits", "loss", "perplexity", "recall", left=1
    )
    for row in (data["plan"], *data["tried"], *data["baselines"]):
        chosen = " (written)" if row is data["plan"] else ""
        summary.add_row(
            f"{row['name']}{chosen}", f"{row['ratio']:.2f}x", f"{row['bits_per_number']:.2f}",
            f"{math.expm1(row['loss']):.3%}", f"{row['perplexity_change']:+.2%}", f"{row['recall_change']:+.2%}",
        )  # fmt: skip
    stdout.print(summary)
    if data["plan"]["constant_bytes"]:
        stdout.print(f"constants, once per model: {format_bytes(data['plan']['constant_bytes'])}")


DIVERGENCES = ("text_divergence", "recall_divergence")
