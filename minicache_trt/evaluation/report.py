"""Results as numbers with intervals, and as tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from minicache_trt.cli.console import table
from minicache_trt.evaluation.bootstrap import Resamples, interval
from minicache_trt.evaluation.evaluate import CellScores, Result
from minicache_trt.evaluation.harness import with_changes
from minicache_trt.evaluation.scoring import Scores
from minicache_trt.evaluation.tasks import TASKS

FIGURES = {"nll": ("nll", "count"), "accuracy": ("right", "count"), "exact": ("exact", "answers")}
"""Each figure: a sum over examples divided by another."""


def figures(scores: Scores, full: Scores) -> dict[str, Any]:
    """Figures of one task with 95 % intervals; changes are against ``full`` on the same resampled examples.

    Returns
    -------
    dict
        ``nll`` (nats per token), ``accuracy`` (tokens right), ``exact`` (answers right), ``perplexity``, each also
        with ``_interval``, ``_change`` and ``_change_interval``; perplexity's change is relative.
    """
    resamples = Resamples.of(len(scores.nll))
    found: dict[str, Any] = {}
    for name, (numerator, denominator) in FIGURES.items():
        own = resamples.ratio(getattr(scores, numerator), getattr(scores, denominator))
        change = own - resamples.ratio(getattr(full, numerator), getattr(full, denominator))
        found |= _figure(name, own, change)
        if name == "nll":
            found |= _figure("perplexity", np.exp(own), np.expm1(change))
    return found


def _figure(name: str, own: np.ndarray[Any, Any], change: np.ndarray[Any, Any]) -> dict[str, Any]:
    return {
        name: float(own[0]),
        f"{name}_interval": interval(own),
        f"{name}_change": float(change[0]),
        f"{name}_change_interval": interval(change),
    }


def _cell(cell: CellScores) -> dict[str, Any]:
    s = cell.scores
    return {
        "length": cell.length,
        "depth": cell.depth,
        "examples": len(s.nll),
        "nll": float(s.nll.sum() / s.count.sum()),
        "accuracy": float(s.right.sum() / s.count.sum()),
        "exact": float(s.exact.sum() / s.answers.sum()),
    }


def summarize(results: Sequence[Result]) -> list[dict[str, Any]]:
    """One JSON value per method; changes are against the first.

    Returns
    -------
    list of dict
        ``method``, ``memory``, ``tasks`` (see `figures`, with ``cells``) and ``harness``.
    """
    return [
        {
            "method": result.name,
            "memory": result.memory.to_dict(),
            "tasks": {
                task: figures(result.scores(task), results[0].scores(task)) | {"cells": [_cell(c) for c in cells]}
                for task, cells in result.tasks.items()
            },
            "harness": with_changes(result.harness, results[0].harness),
        }
        for result in results
    ]


def tables(summary: Sequence[dict[str, Any]], title: str) -> list[Table]:
    """A table per task, one more where a task has several lengths or depths, and one of lm-eval-harness's results."""
    found = []
    for task in summary[0]["tasks"]:
        found.append(_task(summary, task, f"{title}: {task}"))
        if len(summary[0]["tasks"][task]["cells"]) > 1:
            found.append(_by_cell(summary, task))
    if summary[0]["harness"]:
        found.append(_harness(summary))
    found[0].caption_justify = "left"
    found[0].caption = (
        "bits of a number in the compressed tier, with scales and norms; smaller: 16-bit cache of a sequence over the "
        "bytes it holds, pools: of all sequences over the bytes allocated in both tiers; 95 % intervals"
    )
    return found


def _task(summary: Sequence[dict[str, Any]], task: str, title: str) -> Table:
    headline = TASKS[task].headline
    is_text = headline == "perplexity"
    forms = (".2f", "+.1%") if is_text else (".1%", "+.1%")
    sizes = [f"{line['memory']['weight_bytes'] / 2**20:,.1f} MiB" for line in summary]
    weights = ["weights"] if len({line["memory"]["weights"] for line in summary}) > 1 else []
    rows = table(title, "method", "bits", "smaller", "pools", *weights, headline, "change", "nll")
    rows.box = box.SIMPLE
    for line, size in zip(summary, sizes, strict=True):
        values, memory = line["tasks"][task], line["memory"]
        rows.add_row(
            line["method"],
            f"{memory['bits']:.2f}",
            f"{memory['sequence_ratio']:.2f}x",
            f"{memory['ratio']:.2f}x",
            *([size] if weights else []),
            f"{values[headline]:{forms[0]}}" if is_text else span(values, headline, forms[0]),
            span(values, f"{headline}_change", forms[1]),
            f"{values['nll']:.3f}",
        )
    return rows


def span(values: dict[str, Any], name: str, form: str) -> str:
    """A figure and its interval."""
    low, high = values[f"{name}_interval"]
    return f"{values[name]:{form}} [{low:{form}}, {high:{form}}]"


def _by_cell(summary: Sequence[dict[str, Any]], task: str) -> Table:
    headline = TASKS[task].headline
    cells = summary[0]["tasks"][task]["cells"]
    names = [str(c["length"]) if c["depth"] is None else f"{c['length']} @{c['depth']:.0%}" for c in cells]
    by = "length" if cells[0]["depth"] is None else "length and depth"
    rows = table(f"{task}: {headline} by {by}", "method", *names)
    rows.box = box.SIMPLE
    for line in summary:
        rows.add_row(line["method"], *(f"{cell[headline]:.0%}" for cell in line["tasks"][task]["cells"]))
    return rows


def _harness(summary: Sequence[dict[str, Any]]) -> Table:
    metrics = [(task, metric) for task, values in summary[0]["harness"].items() for metric in values]
    rows = table("lm-eval-harness", "method", *(f"{task} {metric}" for task, metric in metrics))
    for line in summary:
        cells = []
        for task, metric in metrics:
            values = line["harness"][task][metric]
            change = values.get("change_interval")
            text = f"{values['value']:.4g}"
            cells.append(text if change is None else f"{text} ({change[0]:+.3g} to {change[1]:+.3g})")
        rows.add_row(line["method"], *cells)
    rows.box = box.SIMPLE
    rows.caption, rows.caption_justify = "in brackets: 95 % interval of the change from the first row", "left"
    return rows
