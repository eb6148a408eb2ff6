"""Similarity, norms and angles of an engine's keys and values, as Figure 2 of MiniCache (arXiv 2405.14366)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from minicache_trt.compression.stream import PARTS
from minicache_trt.plots.figure import COLORS, new_figure, save, set_title
from minicache_trt.tracing.similarity import BIN_DEGREES, PairSimilarity, Spread, StreamStatistics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MANY = 24
"""More pairs than this are labelled every other one, or less often."""


def save_stream_figures(statistics: StreamStatistics, directory: Path, title: str) -> list[Path]:
    """Write ``similarity.png``, ``norms.png`` and ``angles.png``; returns their paths.

    Raises
    ------
    UserError
        The directory cannot be written.
    """
    figures = {"similarity": similarity_figure, "norms": norms_figure, "angles": angles_figure}
    paths = []
    for name, draw in figures.items():
        paths.append(directory / f"{name}.png")
        save(draw(statistics, title), paths[-1])
    return paths


def similarity_figure(statistics: StreamStatistics, title: str) -> Figure:
    """Mean cosine similarity of each pair of layers, with the band from the 10th to the 90th percentile."""
    return _panels(statistics, f"Cosine similarity of adjacent layers: {title}", _similarity)


def norms_figure(statistics: StreamStatistics, title: str) -> Figure:
    """Mean norm of each layer's keys and values, with the band from the 10th to the 90th percentile."""
    return _panels(statistics, f"Norms of keys and values: {title}", _norms)


def angles_figure(statistics: StreamStatistics, title: str) -> Figure:
    """Distribution of the angle between each pair of layers."""
    return _panels(statistics, f"Angles between adjacent layers: {title}", _angles)


def _panels(statistics: StreamStatistics, title: str, draw: Callable[[Any, StreamStatistics, str], None]) -> Figure:
    figure = new_figure(12, 5)
    for axes, part in zip(figure.subplots(1, 2, sharey=draw is not _norms), PARTS, strict=True):
        draw(axes, statistics, part)
        axes.set_title({"key": "keys (after RoPE)", "value": "values"}[part], fontsize=11)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.24), ncol=2, frameon=False)
    set_title(figure, f"{title}, {statistics.tokens} tokens")
    return figure


def _over(statistics: StreamStatistics, part: str) -> str:
    return "tokens and heads" if statistics.granularity[part] == "head" else "tokens, all heads as one vector"


def _band(axes: Any, spreads: Sequence[Spread], part: str, over: str) -> None:
    x, color = range(len(spreads)), COLORS[part]
    low, high = [spread.p10 for spread in spreads], [spread.p90 for spread in spreads]
    axes.fill_between(x, low, high, color=color, alpha=0.18, lw=0, label="10th to 90th percentile")
    axes.plot(x, [spread.mean for spread in spreads], "o-", color=color, ms=4, lw=1.6, label=f"mean over {over}")


def _similarity(axes: Any, statistics: StreamStatistics, part: str) -> None:
    _, pairs = statistics.of(part)
    _mark_merged(axes, pairs)
    _band(axes, [pair.cosine for pair in pairs], part, _over(statistics, part))
    axes.axhline(0, color=COLORS["neutral"], lw=0.8)
    lowest = min(pair.cosine.p10 for row in PARTS for pair in statistics.of(row)[1])
    axes.set(ylabel="cosine similarity", ylim=(min(-0.05, lowest - 0.05), 1.02))
    _label_pairs(axes, pairs)


def _norms(axes: Any, statistics: StreamStatistics, part: str) -> None:
    layers, _ = statistics.of(part)
    _band(axes, [row.norm for row in layers], part, _over(statistics, part))
    axes.set(xlabel="layer", ylabel=f"norm of a {part} vector")
    axes.set_ylim(bottom=0)
    axes.set_xticks(range(0, len(layers), max(1, -(-len(layers) // MANY))))


def _angles(axes: Any, statistics: StreamStatistics, part: str) -> None:
    _, pairs = statistics.of(part)
    _mark_merged(axes, pairs)
    centers = BIN_DEGREES * (np.arange(180 // BIN_DEGREES) + 0.5)
    for x, pair in enumerate(pairs):
        counts = np.array(pair.histogram)
        half = 0.42 * counts / counts.max()
        label = f"distribution over {_over(statistics, part)}" if x == 0 else None
        axes.fill_betweenx(centers, x - half, x + half, color=COLORS[part], alpha=0.65, lw=0, label=label)
    axes.plot(
        range(len(pairs)),
        [pair.angle.mean for pair in pairs],
        "_",
        color="black",
        ms=min(9, 270 / len(pairs)),
        label="mean",
    )
    axes.axhline(90, color=COLORS["neutral"], lw=0.9, ls="--", label="unrelated directions (90°)")
    top = max(pair.angle.p90 for row in PARTS for pair in statistics.of(row)[1])
    axes.set(ylabel="angle (degrees)", ylim=(0, min(180, max(120, top + 30))))
    _label_pairs(axes, pairs)


def _mark_merged(axes: Any, pairs: list[PairSimilarity]) -> None:
    label: str | None = "merged by the engine's plan"
    for x, pair in enumerate(pairs):
        if pair.merged:
            axes.axvspan(x - 0.5, x + 0.5, color=COLORS["merged"], alpha=0.16, lw=0, label=label)
            label = None


def _label_pairs(axes: Any, pairs: list[PairSimilarity]) -> None:
    step = max(1, -(-len(pairs) // MANY))
    labels = ["{}-{}".format(*pair.layers) for pair in pairs]
    axes.set_xticks(range(0, len(pairs), step), labels[::step], rotation=60, fontsize=8)
    axes.set(xlabel="pair of layers", xlim=(-0.7, len(pairs) - 0.3))
