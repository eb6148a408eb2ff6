"""Points as pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minicache_trt.load.metrics import METRICS, Point
from minicache_trt.plots.figure import new_figure, save, set_title

MARKERS = "osD^v<>p"


def write_plots(points: Sequence[Point], directory: Path, title: str) -> list[Path]:
    """Write ``throughput.png``, ``latency.png`` and ``distribution.png`` and return their paths.

    Raises
    ------
    UserError
        The directory cannot be written.
    """
    written = []
    for name, draw in (("throughput", _throughput), ("latency", _latency), ("distribution", _distribution)):
        figure = new_figure(10, 7.5 if name == "distribution" else 4.6)
        draw(figure, points)
        set_title(figure, f"{name.capitalize()}: {title}")
        save(figure, directory / f"{name}.png")
        written.append(directory / f"{name}.png")
    return written


def _throughput(figure: Any, points: Sequence[Point]) -> None:
    left, right = figure.subplots(1, 2)
    _over_points(left, points, "output tokens/s", {"output": lambda point: point.per_second(point.output_tokens)})
    series: dict[str, Callable[[Point], float]] = {"completed": lambda point: point.per_second(len(point.ok))}
    if all(point.good is not None for point in points):
        series["within objectives"] = lambda point: point.per_second(point.good or 0)
    if any(point.errors for point in points):
        series["failed"] = lambda point: point.per_second(sum(point.errors.values()))
    _over_points(right, points, "requests/s", series)


def _latency(figure: Any, points: Sequence[Point]) -> None:
    for axis, name in zip(figure.subplots(1, 3), ("ttft", "itl", "e2el"), strict=True):
        _over_points(
            axis,
            points,
            f"{METRICS[name]}, ms",
            {f"p{percent}": _percentile(name, percent) for percent in (50, 90, 99)},
        )


def _percentile(name: str, percent: int) -> Callable[[Point], float]:
    def value(point: Point) -> float:
        found = point.latencies[name]
        return dict(found.percentiles)[percent] if found else float("nan")

    return value


def _over_points(axis: Any, points: Sequence[Point], label: str, series: dict[str, Callable[[Point], float]]) -> None:
    places = range(len(points))
    for marker, (name, value) in zip(MARKERS, series.items(), strict=False):
        axis.plot(places, [value(point) for point in points], marker=marker, label=name)
    axis.set_xticks(places, [point.load.label.replace(", ", "\n") for point in points])
    axis.set_ylim(bottom=0)
    axis.set_title(label, fontsize=10)
    axis.grid(alpha=0.3)
    if len(series) > 1:
        axis.legend(fontsize=8, frameon=False)


def _distribution(figure: Any, points: Sequence[Point]) -> None:
    """Share of samples below a value, a line per point."""
    for axis, (name, title) in zip(figure.subplots(2, 2).flat, METRICS.items(), strict=True):
        for point in points:
            samples = np.sort(1000 * np.array(_samples(point, name)))
            if len(samples):
                axis.step(samples, np.arange(1, len(samples) + 1) / len(samples), where="post", label=point.load.label)
        axis.set(title=f"{title}, ms", ylabel="share of samples", ylim=(0, 1.02))
        axis.set_xlim(left=0)
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=7, frameon=False, loc="lower right")


def _samples(point: Point, name: str) -> list[float]:
    if name == "itl":
        return [gap for record in point.ok for gap in record.itl]
    return [value for record in point.ok if (value := getattr(record, name)) is not None]
