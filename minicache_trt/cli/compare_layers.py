"""``minicache-trt compare --layers``: where two sides part."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.text import Text

from minicache_trt.cli.console import print_json, progress_bars, stderr, stdout, table
from minicache_trt.cli.run import text_llm
from minicache_trt.engine_directory import read_engine
from minicache_trt.errors import UserError

if TYPE_CHECKING:
    from minicache_trt.config import KvCacheConfig
    from minicache_trt.tracing.divergence import Divergence


@dataclass(frozen=True)
class LayerOptions:
    """Flags of one command line, as they were given."""

    against: str | None
    tolerance: float | None
    plot: Path | None
    max_tokens: int
    threads: int | None
    backend: str | None
    cache: KvCacheConfig
    json: bool


def compare_layers(engine: Path, prompts: list[str], flags: LayerOptions) -> None:
    """Trace both sides, print the table, draw the plot.

    Raises
    ------
    UserError
        Before anything has run, wherever that can be known.
    """
    from minicache_trt.plots.figure import check_file

    if flags.tolerance is not None and not (math.isfinite(flags.tolerance) and flags.tolerance >= 0):
        raise UserError(f"--tolerance: expected a finite number of at least 0, got {flags.tolerance}")
    if flags.plot is not None:
        check_file(flags.plot)
    info = read_engine(engine)
    from minicache_trt.tracing import layers

    a = layers.Side(engine, info, flags.backend or info.build.backend)
    b = layers.other_side(engine, info, layers.TORCH if flags.against is None else flags.against)
    tolerance = layers.default_tolerance(a, b) if flags.tolerance is None else flags.tolerance
    with stderr.status(Text(f"loading {engine}")):
        recording = a.record(flags.threads)
        llm = text_llm(recording, engine, flags.cache)
    with progress_bars(not flags.json) as report:
        result = layers.compare_layers(
            llm, recording, b, prompts, flags.max_tokens, tolerance, flags.threads, partial(report, "trace")
        )
    if flags.plot is not None:
        from minicache_trt.plots.figure import save
        from minicache_trt.plots.layers import divergence_figure

        save(divergence_figure(result, str(a), str(b)), flags.plot)
    if flags.json:
        print_json({"a": str(a), "b": str(b), **result.to_dict(), "plot": flags.plot and str(flags.plot)})
        return
    _print(result, f"A: {a}\nB: {b}")
    if flags.plot is not None:
        stderr.print(f"wrote {flags.plot}")


def _print(result: Divergence, title: str) -> None:
    from minicache_trt.tracing.points import BETWEEN

    rows = table(title, "layer", "point", "max diff", "mean diff", "rel. error", "cosine", "", left=2)
    rows.box, rows.caption_justify = box.SIMPLE, "left"
    rows.caption = (
        "attention: output of PagedAttention; middle, output: residual stream after attention and after the layer; "
        "diff: of A and B; rel. error: norm of the difference over norm of B"
    )
    layer = None
    for point in result.points:
        if point.layer != layer:
            rows.add_section()
            layer = point.layer
        rows.add_row(
            "" if layer is None else str(layer),
            point.point.rpartition(".")[2],
            f"{point.max_abs_diff:.1e}",
            f"{point.mean_abs_diff:.1e}",
            f"{point.relative_error:.1e}",
            f"{point.cosine:.6f}",
            "" if point.within else "beyond",
        )
    stdout.print(rows)
    first, token = result.first, result.first_token()
    if first is None:
        stdout.print(f"The sides agree: no relative error exceeds {result.tolerance:g}.", soft_wrap=True)
        return
    where = "" if token is None else f", first at token {token[1]} of prompt {token[0]}"
    cause = BETWEEN[first.point.rpartition(".")[2]]
    stdout.print(
        f"The sides part at {first.point}{where}: its relative error {first.relative_error:.1e} exceeds "
        f"{result.tolerance:g}, everything before it agrees. Between lies {cause}.",
        soft_wrap=True,
    )
