"""``minicache-trt models``: the presets, and what their caches cost."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Annotated

import typer
from rich import box
from rich.table import Table

from minicache_trt.checkpoint import Preset, list_presets, weight_shapes
from minicache_trt.checkpoint.weights import ITEM_SIZES
from minicache_trt.cli import options
from minicache_trt.cli.console import print_json, stdout, table
from minicache_trt.compression.methods import DEFAULT_METHOD, make_plan
from minicache_trt.compression.size import baseline_bytes_per_token, bytes_per_token, context_that_fits
from minicache_trt.config import BuildConfig
from minicache_trt.errors import UserError
from minicache_trt.units import format_bytes, parse_bytes

METHODS = ("full", DEFAULT_METHOD, "minicache4")
"""What is listed: 16 bit, the default, and the paper's merging with the paper's 4 bits."""


@dataclass(frozen=True)
class MethodCost:
    """A method on one model: bytes per token of a long context, and what fits beside the weights (None: any length)."""

    method: str
    kv_bytes_per_token: float
    context: int | None


@dataclass(frozen=True)
class ModelCost:
    """A preset's size; ``weight_bytes`` are of its checkpoint's own type."""

    name: str
    hub_id: str
    family: str
    parameters: int
    weight_bytes: int
    max_position_embeddings: int
    sliding_window: int | None
    methods: tuple[MethodCost, ...]


def models(
    memory: Annotated[
        str, typer.Option(help="Memory for the 16-bit weights and the cache of one sequence: 80GiB, 24GB.")
    ] = "80GiB",
    json: options.Json = False,
) -> None:
    """List the presets: parameters, KV-cache bytes per token before and after, and the context that fits a memory.

    Nothing is downloaded. A checkpoint of the same families works by its hub id or directory too.

    [bold]Examples[/]

      minicache-trt models

      minicache-trt models --memory 24GiB --json
    """
    size = parse_bytes(memory, "--memory")
    if size < 1:
        raise UserError(f"--memory: expected at least 1 byte, got {memory}")
    costs = [model_cost(preset, size) for preset in list_presets()]
    if json:
        print_json({"memory": size, "models": [asdict(cost) for cost in costs]})
        return
    stdout.print(_table(costs, size))


def _table(costs: list[ModelCost], memory: int) -> Table:
    """At most 80 columns wide."""
    labels = [method.replace("full", "16 bit").replace("minicache", "mini-\ncache") for method in METHODS]
    rows = table(
        f"KiB of cache per token, and tokens that fit {format_bytes(memory)} beside the weights",
        "model",
        "size",
        *(f"KiB\n{label}" for label in labels),
        *(f"fits\n{label}" for label in labels),
    )
    rows.box, rows.show_edge, rows.pad_edge = box.SIMPLE, False, False
    rows.columns[0].no_wrap = True
    rows.caption_justify = "left"
    rows.caption = "any: a sliding window bounds the cache, which fits; -: the weights do not fit"
    for cost in costs:
        per_token = [f"{method.kv_bytes_per_token / 1024:.1f}" for method in cost.methods]
        fits = ["any" if m.context is None else _count(m.context) if m.context else "-" for m in cost.methods]
        rows.add_row(cost.name, _count(cost.parameters), *per_token, *fits)
    return rows


def model_cost(preset: Preset, memory: int) -> ModelCost:
    """What a preset costs, and what of it fits ``memory`` bytes beside the weights."""
    config, window = preset.config, BuildConfig().window
    parameters = sum(math.prod(shape) for shape in weight_shapes(config).values())
    weights = parameters * ITEM_SIZES[config.dtype]
    context = min(config.max_position_embeddings, config.cache_window or config.max_position_embeddings)
    rows = []
    for method in METHODS:
        plan = make_plan(config, method)
        size: float = baseline_bytes_per_token(config)
        if plan.compresses:
            size = bytes_per_token(plan, config, context, window)
        rows.append(MethodCost(method, size, context_that_fits(plan, config, max(0, memory - weights), window)))
    return ModelCost(
        preset.name,
        preset.hub_id,
        config.family,
        parameters,
        weights,
        config.max_position_embeddings,
        config.sliding_window,
        tuple(rows),
    )


def _count(number: int) -> str:
    """``6738415616`` as ``6.7B``."""
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            scaled = number / unit
            return f"{scaled:.1f}{letter}" if scaled < 100 else f"{scaled:.0f}{letter}"
    return str(number)
