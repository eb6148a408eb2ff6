"""Loss against memory: which methods nobody beats in both."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minicache_trt.evaluation.tasks import TASKS
from minicache_trt.plots.figure import COLORS, new_figure, save, set_title

LABELS = {"perplexity": "nll change, nats per token", "accuracy": "tokens right", "exact": "answers right"}


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points ``(bits, loss)`` that no other point beats in one and equals in the other; by bits."""
    best, found = float("inf"), []
    for index in sorted(range(len(points)), key=lambda i: points[i]):
        if points[index][1] < best:
            best = points[index][1]
            found.append(index)
    return found


def lifts(points: Sequence[tuple[float, float]]) -> list[int]:
    """Lines by which the label of each point ``(bits, value)`` is raised, so that it covers no other label."""
    values = [y for _, y in points]
    close = 0.05 * (max(values) - min(values))
    found: dict[int, int] = {}
    for index in sorted(range(len(points)), key=lambda i: points[i][1]):
        x, y = points[index]
        near = [
            lift
            for other, lift in found.items()
            if abs(math.log2(x / points[other][0])) < 0.45 and y - points[other][1] <= close
        ]
        found[index] = max(near, default=-1) + 1
    return [found[index] for index in range(len(points))]


def draw_pareto(summary: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """A panel per task: bits per number against loss, with 95 % intervals; the front is a line.

    Parameters
    ----------
    summary : sequence of dict
        Of `minicache_trt.evaluation.report.summarize`.
    path : Path
    title : str

    Raises
    ------
    UserError
        The file cannot be written.
    """
    tasks = list(summary[0]["tasks"])
    columns = min(3, len(tasks))
    rows = -(-len(tasks) // columns)
    figure = new_figure(5.2 * columns, 4.4 * rows)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, task in zip(axes, tasks, strict=False):
        _panel(axis, summary, task)
    for axis in axes[len(tasks) :]:
        axis.remove()
    set_title(figure, title)
    save(figure, path)


def _panel(axis: Any, summary: Sequence[dict[str, Any]], task: str) -> None:
    headline = TASKS[task].headline
    name, sign = ("nll_change", 1) if headline == "perplexity" else (headline, -1)
    bits = [line["memory"]["bits"] for line in summary]
    values = [line["tasks"][task][name] for line in summary]
    points = list(zip(bits, values, strict=True))
    for line, (x, y), lift in zip(summary, points, lifts(points), strict=True):
        low, high = line["tasks"][task][f"{name}_interval"]
        spread = [[max(0.0, y - low)], [max(0.0, high - y)]]
        axis.errorbar([x], [y], spread, fmt="o", color=COLORS["neutral"], capsize=3, markersize=5)
        place = {"xytext": (5, 5 + 10 * lift), "textcoords": "offset points"}
        axis.annotate(line["method"], (x, y), fontsize=8, parse_math=False, **place)
    front = pareto([(x, sign * y) for x, y in points])
    axis.plot([bits[i] for i in front], [values[i] for i in front], color=COLORS["merged"], zorder=0, linewidth=1.5)
    axis.set_xscale("log", base=2)
    axis.margins(0.12)
    ticks = [tick for tick in (1, 2, 4, 8, 16) if min(bits) / 1.5 <= tick <= max(bits) * 1.5]
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()
    axis.set(title=task, xlabel="bits per number of keys and values", ylabel=LABELS[headline])
    axis.grid(alpha=0.3)
