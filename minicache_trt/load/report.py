"""Points as tables, as rows for spreadsheets and as JSON."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from minicache_trt.cli.console import table
from minicache_trt.load.metrics import METRICS, PERCENTILES, Point


def tables(points: Sequence[Point]) -> list[Table]:
    """Throughput, latency and, where requests failed, errors."""
    columns = ["requests/s", "out tok/s", "all tok/s", "ok", "failed", "peak"]
    has_slo = any(point.good is not None for point in points)
    throughput = table("Throughput", "load", *columns, *(["good/s"] if has_slo else []))
    latency = table("Latency, ms", "load", "", "mean", *(f"p{q}" for q in PERCENTILES), left=2)
    failures = table("Errors", "load", "kind", "requests", "such as", left=2)
    for rows in (throughput, latency, failures):
        rows.box, rows.caption_justify = SIMPLE, "left"
    failures.columns[-1].justify = "left"
    throughput.caption = "out tok/s: generated; all tok/s: with prompts; ok, failed: requests; peak: most at once"
    if has_slo:
        throughput.caption += "; good/s: requests within the objectives"
    for rows in (throughput, latency, failures):
        rows.columns[0].no_wrap = True
    for point in points:
        rates = (len(point.ok), point.output_tokens, point.input_tokens + point.output_tokens)
        cells = [f"{point.per_second(count):.2f}" for count in rates]
        cells += [str(number) for number in (len(point.ok), sum(point.errors.values()), point.peak_concurrency)]
        if has_slo:
            cells.append(f"{point.per_second(point.good or 0):.2f}")
        throughput.add_row(point.load.label, *cells)
        for name in METRICS:
            values = point.latencies[name]
            if values is not None:
                numbers = (values.mean, *(value for _, value in values.percentiles))
                latency.add_row(point.load.label, name.upper(), *(f"{number:.1f}" for number in numbers))
        for kind, count in point.errors.items():
            failures.add_row(point.load.label, kind, str(count), _example(point, kind))
    latency.caption = "; ".join(f"{name.upper()}: {text}" for name, text in METRICS.items())
    return [throughput, latency, *([failures] if failures.row_count else [])]


def _example(point: Point, kind: str) -> str:
    return next(record.message for record in point.records if record.error == kind)


def to_json(points: Sequence[Point], detailed: bool) -> list[dict[str, Any]]:
    """Every point; with every request's times (seconds since the start of its point) when ``detailed``."""
    return [
        point.to_json() | ({"requests": [asdict(record) for record in point.records]} if detailed else {})
        for point in points
    ]


def write_csv(points: Sequence[Point], file: Path) -> None:
    """One row per point with the fields of the JSON; errors as ``kind=count`` separated by spaces."""
    rows = [point.to_json() for point in points]
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        for row in rows:
            writer.writerow(row | {"errors": " ".join(f"{kind}={count}" for kind, count in row["errors"].items())})
