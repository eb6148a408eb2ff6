"""``minicache-trt inspect --plot``: similarity, norms and angles of an engine's keys and values."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.text import Text

from minicache_trt.cli.console import progress_bars, stderr, stdout, table
from minicache_trt.cli.run import text_llm
from minicache_trt.compression.stream import PARTS
from minicache_trt.config import KvCacheConfig
from minicache_trt.engine_directory import EngineInfo

if TYPE_CHECKING:
    from minicache_trt.tracing.similarity import Spread, StreamStatistics


def measure(
    engine: Path, info: EngineInfo, prompts: list[str], threads: int | None, show_progress: bool
) -> StreamStatistics:
    """Prefill the prompts and measure what they leave in the cache.

    Raises
    ------
    UserError
        The engine cannot be loaded, or a prompt cannot be used.
    """
    with stderr.status(Text(f"loading {engine}")):
        from minicache_trt.backends import open_backend
        from minicache_trt.tracing.engines import one_at_a_time
        from minicache_trt.tracing.recording import keys_and_values
        from minicache_trt.tracing.streams import measure_streams

        loaded = open_backend(info.build.backend)(engine, one_at_a_time(info), threads)
        recording = keys_and_values(loaded)
        llm = text_llm(recording, engine, KvCacheConfig())
    with progress_bars(show_progress) as report:
        return measure_streams(llm, recording, prompts, partial(report, "prefill"))


def save_plots(statistics: StreamStatistics, directory: Path, engine: Path, info: EngineInfo) -> list[str]:
    """Draw everything; returns the files' paths."""
    from minicache_trt.plots.streams import save_stream_figures

    return [str(path) for path in save_stream_figures(statistics, directory, f"{engine} ({info.plan.method})")]


def print_statistics(statistics: StreamStatistics) -> None:
    """Pairs of layers, for keys and for values, and each layer's norms."""
    spread = ("10 %", "90 %")
    for part, name in (("key", "Keys"), ("value", "Values")):
        over = "head by head" if statistics.granularity[part] == "head" else "all heads as one vector"
        title = f"{name} of pairs of layers, {statistics.tokens} tokens, {over}"
        rows = table(title, "layers", "", "cosine", *spread, "angle", *spread, left=2)
        rows.box = box.SIMPLE
        for pair in statistics.of(part)[1]:
            merged = "merged" if pair.merged else ""
            rows.add_row("{}, {}".format(*pair.layers), merged, *_cells(pair.cosine, ".2f"), *_cells(pair.angle, ".0f"))
        rows.caption, rows.caption_justify = "mean, 10th and 90th percentile; angles in degrees", "left"
        stdout.print(rows)
    rows = table("Norms", "layer", "keys", *spread, "values", *spread)
    rows.box = box.SIMPLE
    for key, value in zip(*(statistics.of(part)[0] for part in PARTS), strict=True):
        rows.add_row(str(key.layer), *_cells(key.norm, ".2f"), *_cells(value.norm, ".2f"))
    stdout.print(rows)


def to_json(statistics: StreamStatistics, plots: list[str]) -> dict[str, Any]:
    return {**statistics.to_dict(), "plots": plots}


def _cells(spread: Spread, form: str) -> tuple[str, str, str]:
    return f"{spread.mean:{form}}", f"{spread.p10:{form}}", f"{spread.p90:{form}}"
