"""``minicache-trt plan``: what a plan costs, before anything is built."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table

from minicache_trt.backends.tensorrt.estimate import build_needs
from minicache_trt.checkpoint import resolve_config
from minicache_trt.cli import options
from minicache_trt.cli.console import print_json, stderr, stdout, table
from minicache_trt.compression.methods import CALIBRATED_METHODS
from minicache_trt.compression.plan import CompressionPlan
from minicache_trt.compression.plan_json import save_plan
from minicache_trt.compression.size import (
    StreamCost,
    baseline_sequence_bytes,
    bytes_per_token,
    constant_bytes,
    layer_costs,
    ratio,
)
from minicache_trt.config import BuildConfig, ModelConfig
from minicache_trt.errors import UserError
from minicache_trt.units import format_bytes


def plan(
    model: options.Model,
    merge_start: options.MergeStart = None,
    method: options.Method = None,
    plan: options.PlanFile = None,
    kv_format: options.KvFormat = None,
    t: options.T = None,
    gamma: options.Gamma = None,
    norm: options.Norm = None,
    sink_tokens: options.SinkTokens = None,
    context: Annotated[int, typer.Option(min=1, help="Tokens of a sequence.")] = 4096,
    save: Annotated[Path | None, typer.Option(help="Write the plan to this plan.json.")] = None,
    revision: options.Revision = None,
    json: options.Json = False,
) -> None:
    """Show what a plan costs: bytes per token, ratio, tokens that fit, and the table per layer.

    Nothing is downloaded for a preset.

    [bold]Examples[/]

      minicache-trt plan -m llama2-7b --method minicache4

      minicache-trt plan -m ./checkpoint --merge-start 8 --kv-format int8 --save plan.json
    """
    if save is not None and plan is None and method in CALIBRATED_METHODS:
        raise UserError(
            f"method {method!r} has no plan to save before it is calibrated",
            "build --calibration-text FILE writes it to the engine directory",
        )
    config = resolve_config(model, revision=revision)
    chosen = options.PlanOptions(method, merge_start, plan, kv_format, t, gamma, norm, sink_tokens)(config)
    summary = plan_summary(chosen, config, context, BuildConfig().window)
    costs = layer_costs(chosen, config)
    if save is not None:
        save_plan(chosen, save)
        stderr.print(f"wrote {save}")
    if json:
        print_json({"model": model, **summary, "layers": [asdict(cost) for cost in costs]})
        return
    stdout.print(layer_table(f"{model}, method {chosen.method}", costs))
    rows = table(f"At {context} tokens", "what", "value")
    rows.add_row("ratio to 16 bit", f"{summary['ratio']:.2f}x")
    rows.add_row("bytes per token", f"{summary['bytes_per_token']:.0f} (16 bit: {summary['baseline_bytes_per_token']})")
    rows.add_row("tokens per GiB", f"{summary['tokens_per_gib']} (16 bit: {summary['baseline_tokens_per_gib']})")
    rows.add_row("cache of one sequence", format_bytes(summary["bytes_per_token"] * context))
    if summary["constant_bytes"]:
        rows.add_row("constants, once per model", format_bytes(summary["constant_bytes"]))
    needs = build_needs(config, BuildConfig(backend="tensorrt-rtx").for_model(config))
    if needs is not None:
        memory, disk = format_bytes(needs.memory_bytes), format_bytes(needs.disk_bytes)
        rows.add_row("building it with TensorRT, about", f"{memory} of memory, {disk} of disk")
    stdout.print(rows)


def plan_summary(plan: CompressionPlan, config: ModelConfig, context: int, window: int) -> dict[str, Any]:
    """Figures of a plan at one context length, of which a sliding window keeps only a part."""
    size = bytes_per_token(plan, config, context, window)
    baseline = baseline_sequence_bytes(config, context) // context
    return {
        "method": plan.method,
        "context": context,
        "ratio": ratio(plan, config, context, window),
        "bytes_per_token": size,
        "baseline_bytes_per_token": baseline,
        "tokens_per_gib": int(2**30 / size),
        "baseline_tokens_per_gib": 2**30 // baseline,
        "constant_bytes": constant_bytes(plan),
    }


def layer_table(title: str, costs: list[StreamCost]) -> Table:
    """One row per layer; bytes and ratio are of its keys and values together."""
    rows = table(title, "layer", "shared by", "keys", "values", "B/token", "ratio", left=4)
    rows.box = box.SIMPLE
    if any(cost.retained for cost in costs):
        rows.caption, rows.caption_justify = "+n: n tokens of each block are kept exactly", "left"
    for key, value in zip(costs[::2], costs[1::2], strict=True):
        groups = {"+".join(map(str, cost.layers)) for cost in (key, value)}
        shared = (
            groups.pop()
            if len(groups) == 1
            else f"{'+'.join(map(str, key.layers))}, {'+'.join(map(str, value.layers))}"
        )
        size = key.bytes_per_token + value.bytes_per_token
        ratio = size / (key.bytes_per_token * key.ratio + value.bytes_per_token * value.ratio)
        rows.add_row(str(key.layer), shared, _storage(key), _storage(value), f"{size:.1f}", f"{1 / ratio:.2f}x")
    return rows


def _storage(cost: StreamCost) -> str:
    merged = "" if cost.merge == "none" else f"{cost.merge} "
    return f"{merged}{cost.storage}{f' +{cost.retained}' if cost.retained else ''}"
