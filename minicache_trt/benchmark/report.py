"""Cells as tables, as rows for spreadsheets and as JSON."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from minicache_trt.benchmark.measure import PERCENTILES, Cell, Figures
from minicache_trt.cli.console import table
from minicache_trt.units import format_bytes

CSV_COLUMNS = (
    "batch", "context", "contender", "prefill_tokens_per_second", "time_to_first_token_s", "decode_tokens_per_second",
    "inter_token_p50_s", "inter_token_p90_s", "inter_token_p99_s", "peak_bytes", "cache_bytes_used",
    "cache_bytes_allocated",
)  # fmt: skip


def tables(cells: Sequence[Cell]) -> list[Table]:
    """Speed, memory and, with a peer, ratios; medians over rounds."""
    speed = table("Speed", "cell", "", "prefill", "TTFT", "decode", *(f"p{q}" for q in PERCENTILES), left=2)
    speed.caption = (
        "cell: batch x context; prefill and decode in tokens/s; TTFT: time to first token, "
        "p50 to p99: time between tokens, in ms"
    )
    ratio = table("Ratio of speeds, median (range) over rounds", "cell", "prefill", "decode", "same tokens")
    memory = table("Memory", "cell", "", "peak resident", "cache used", "cache allocated", left=2)
    for rows in (speed, ratio, memory):
        rows.box, rows.caption_justify = SIMPLE, "left"
    for cell in cells:
        place = f"{cell.batch} x {cell.context}"
        for name, figures in cell.figures.items():
            speed.add_row(place, name, *_speed(figures))
            sizes = (figures.peak_bytes, figures.cache_bytes_used, figures.cache_bytes_allocated)
            memory.add_row(place, name, *("" if size is None else format_bytes(size) for size in sizes))
        if cell.ratios:
            ratio.add_row(place, str(cell.ratios["prefill"]), str(cell.ratios["decode"]), f"{cell.same_tokens:.0%}")
    return [speed, *([ratio] if ratio.row_count else []), memory]


def _speed(figures: Figures) -> list[str]:
    prefill, first, decode = _medians(figures)
    latencies = (f"{1e3 * value:.1f}" for value in figures.inter_token_latency.values())
    return [f"{prefill:.1f}", f"{1e3 * first:.1f}", f"{decode:.1f}", *latencies]


def _medians(figures: Figures) -> tuple[float, float, float]:
    """Prefill tokens per second, seconds to the first token, decode tokens per second."""
    median = statistics.median
    return (
        median(figures.prefill_tokens_per_second),
        median(figures.time_to_first_token),
        median(figures.decode_tokens_per_second),
    )


def write_csv(cells: Sequence[Cell], file: Path) -> None:
    """One row per cell and contender, columns ``CSV_COLUMNS``; medians over rounds, empty where nothing is known."""
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(CSV_COLUMNS)
        for cell in cells:
            for name, figures in cell.figures.items():
                sizes = (figures.peak_bytes, figures.cache_bytes_used, figures.cache_bytes_allocated)
                latencies = figures.inter_token_latency.values()
                writer.writerow([cell.batch, cell.context, name, *_medians(figures), *latencies, *sizes])


def to_json(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Every cell with its samples."""
    return [asdict(cell) for cell in cells]
