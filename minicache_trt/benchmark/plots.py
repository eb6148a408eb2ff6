"""Cells as pictures."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from minicache_trt.benchmark.measure import Cell, Figures

COLORS = ("tab:blue", "tab:orange")
MARKERS = "osD^v"
MIB = 2**20


def write_plots(cells: Sequence[Cell], directory: Path, title: str) -> list[Path]:
    """Write ``throughput.png``, ``latency.png`` and ``memory.png`` and return their paths.

    Raises
    ------
    OSError
        The directory cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for name, draw in (("throughput", _throughput), ("latency", _latency), ("memory", _memory)):
        figure, axes = pyplot.subplots(1, 2, figsize=(10, 4.8), layout="constrained")
        draw(axes, cells)
        figure.suptitle(f"{name.capitalize()}: {title}", fontsize=11)
        figure.savefig(directory / f"{name}.png", dpi=144)
        pyplot.close(figure)
        written.append(directory / f"{name}.png")
    return written


def _throughput(axes: Any, cells: Sequence[Cell]) -> None:
    _over_context(axes[0], cells, "Prefill", "tokens/s", lambda figures: figures.prefill_tokens_per_second)
    _over_context(
        axes[1], cells, "Decode, all sequences together", "tokens/s", lambda figures: figures.decode_tokens_per_second
    )


def _latency(axes: Any, cells: Sequence[Cell]) -> None:
    def milliseconds(figures: Figures) -> list[float]:
        return [1e3 * value for value in figures.time_to_first_token]

    _over_context(axes[0], cells, "Time to first token", "ms", milliseconds)
    shades = {"p50": 1.0, "p90": 0.6, "p99": 0.3}
    series = {
        name: [
            (label, alpha, 1e3 * cell.figures[name].inter_token_latency[label])
            for cell in cells
            for label, alpha in shades.items()
        ]
        for name in cells[0].figures
    }
    _bars(axes[1], cells, series, "Time between tokens", "ms")


def _memory(axes: Any, cells: Sequence[Cell]) -> None:
    peaks = {
        name: [("peak in the cell", 1.0, (cell.figures[name].peak_bytes or 0) / MIB) for cell in cells]
        for name in cells[0].figures
    }
    _bars(axes[0], cells, peaks, "Peak resident memory of the process", "MiB")
    caches = {
        name: [
            (label, alpha, (size or 0) / MIB)
            for cell in cells
            for label, alpha, size in (
                ("used", 1.0, cell.figures[name].cache_bytes_used),
                ("allocated", 0.4, cell.figures[name].cache_bytes_allocated),
            )
        ]
        for name in cells[0].figures
        if cells[0].figures[name].cache_bytes_allocated is not None
    }
    _bars(axes[1], cells, caches, "KV cache, both tiers", "MiB")


def _over_context(
    axis: Any, cells: Sequence[Cell], title: str, unit: str, values: Callable[[Figures], list[float]]
) -> None:
    """A line per contender and batch size; bars span the rounds."""
    batches = sorted({cell.batch for cell in cells})
    contexts = sorted({cell.context for cell in cells})
    for color, name in zip(COLORS, cells[0].figures, strict=False):
        for index, batch in enumerate(batches):
            row = sorted((cell for cell in cells if cell.batch == batch), key=lambda cell: cell.context)
            samples = [values(cell.figures[name]) for cell in row]
            middle = [statistics.median(sample) for sample in samples]
            spread = [
                [y - min(sample) for y, sample in zip(middle, samples, strict=True)],
                [max(sample) - y for y, sample in zip(middle, samples, strict=True)],
            ]
            style = ("-", "--", ":", "-.")[index % 4]
            axis.errorbar(
                [cell.context for cell in row], middle, spread, color=color, linestyle=style, capsize=3,
                marker=MARKERS[index % len(MARKERS)], label=f"{name}, batch {batch}",
            )  # fmt: skip
    if len(contexts) > 1:
        axis.set_xscale("log", base=2)
    axis.set_xticks(contexts, [str(context) for context in contexts])
    axis.minorticks_off()
    axis.set_ylim(bottom=0)
    axis.set(title=title, xlabel="context, tokens per sequence", ylabel=unit)
    axis.grid(alpha=0.3)
    _legend(axis)


def _bars(
    axis: Any, cells: Sequence[Cell], series: dict[str, list[tuple[str, float, float]]], title: str, unit: str
) -> None:
    """Groups of bars, a group per cell; a bar is its label, opacity and height."""
    contenders = list(series)
    per_cell = len(next(iter(series.values()))) // len(cells) if series else 0
    width = 0.8 / max(1, per_cell * len(contenders))
    for place, name in enumerate(contenders):
        for index, (label, alpha, height) in enumerate(series[name]):
            cell, part = divmod(index, per_cell)
            offset = (place * per_cell + part + 0.5) * width - 0.4
            axis.bar(
                cell + offset, height, width, color=COLORS[place], alpha=alpha,
                label=f"{name}, {label}" if cell == 0 else None,
            )  # fmt: skip
    axis.set_xticks(range(len(cells)), [f"{cell.batch} x\n{cell.context}" for cell in cells])
    axis.set(title=title, xlabel="batch x context", ylabel=unit)
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)
    if series:
        _legend(axis)


def _legend(axis: Any) -> None:
    """Below the axis, where it hides nothing."""
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.19), ncols=2, fontsize=8, frameon=False)
