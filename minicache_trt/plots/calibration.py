"""Figures of a calibration: similarity before and after alignment, loss of each stream, size against loss."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minicache_trt.compression.stream import PARTS
from minicache_trt.plots.figure import COLORS, new_figure, save, set_title
from minicache_trt.tracing.similarity import PairSimilarity

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MANY = 24
"""More bars or pairs than this are labelled every other one, or less often."""
FLOOR = 1e-7
"""Losses below it are drawn there: they are rounding."""


def save_calibration_figures(
    data: dict[str, Any], before: Sequence[PairSimilarity], after: Sequence[PairSimilarity], directory: Path, title: str
) -> list[Path]:
    """Write ``alignment.png``, ``streams.png`` and ``front.png``; returns the paths.

    Parameters
    ----------
    data : dict
        The calibration's record.
    before, after : sequence of PairSimilarity
        Adjacent layers, before and after matching and alignment.

    Raises
    ------
    UserError
        The directory cannot be written.
    """
    figures = {"alignment": alignment_figure(before, after, title)} if before else {}
    if data["streams"]:
        figures["streams"] = stream_figure(data["streams"], title)
    figures["front"] = front_figure(data, title)
    paths = []
    for name, figure in figures.items():
        paths.append(directory / f"{name}.png")
        save(figure, paths[-1])
    return paths


def alignment_figure(before: Sequence[PairSimilarity], after: Sequence[PairSimilarity], title: str) -> Figure:
    """Cosine of each pair of adjacent layers as it is, and with heads matched and rotated."""
    figure = new_figure(12, 5)
    for axes, part in zip(figure.subplots(1, 2, sharey=True), PARTS, strict=True):
        for pairs, color, label in ((before, COLORS["neutral"], "as they are"), (after, COLORS[part], "aligned")):
            own = [pair for pair in pairs if pair.part == part]
            x = range(len(own))
            axes.fill_between(
                x, [p.cosine.p10 for p in own], [p.cosine.p90 for p in own], color=color, alpha=0.18, lw=0
            )
            axes.plot(x, [p.cosine.mean for p in own], "o-", color=color, ms=4, lw=1.6, label=label)
        axes.axhline(0, color=COLORS["neutral"], lw=0.8)
        axes.set_title({"key": "keys", "value": "values"}[part], fontsize=11)
        axes.set(xlabel="pair of layers", ylabel="cosine similarity (mean, 10th to 90th percentile)")
        _ticks(axes, ["{}-{}".format(*pair.layers) for pair in own])
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, frameon=False)
    set_title(figure, f"Adjacent layers before and after alignment: {title}")
    return figure


def stream_figure(streams: Sequence[dict[str, Any]], title: str) -> Figure:
    """Loss when each stream of the plan alone is compressed, text and recall, with its bits per number."""
    figure = new_figure(12, 6)
    for axes, part in zip(figure.subplots(2, 1), PARTS, strict=True):
        own = [row for row in streams if row["part"] == part]
        for offset, name, color in ((-0.2, "text", COLORS[part]), (0.2, "recall", COLORS["neutral"])):
            heights = [max(FLOOR, row[f"{name}_divergence"] or 0.0) for row in own]
            axes.bar([x + offset for x in range(len(own))], heights, 0.4, color=color, label=name, bottom=0)
        axes.set_yscale("log")
        axes.set(ylabel=f"{part}s: divergence (nats)")
        labels = [f"{'-'.join(map(str, row['layers']))}\n{row['bits_per_number']:.1f} bit" for row in own]
        _ticks(axes, labels, rotation=0)
        axes.grid(alpha=0.3, axis="y")
        axes.legend(fontsize=8, frameon=False)
    set_title(figure, f"Loss of each stream alone: {title}")
    return figure


def front_figure(data: dict[str, Any], title: str) -> Figure:
    """Bits per number of keys and values against loss: the front by sums, and whole plans as measured."""
    figure = new_figure(8, 5)
    axes = figure.subplots()
    front = data["front"]
    axes.plot(
        [point["bits"] for point in front], [max(FLOOR, point["expected"]) for point in front], "o-",
        color=COLORS["key"], ms=4, lw=1.4, label="best plans, sum of streams",
    )  # fmt: skip
    rows = [("chosen", data["plan"], "merged", "*", 14), *(("tried", row, "neutral", "x", 6) for row in data["tried"])]
    rows += [(row["name"], row, "value", "s", 6) for row in data["baselines"]]
    named: set[str] = set()
    for name, row, color, marker, size in rows:
        label = None if name in named else f"{name}, measured"
        named.add(name)
        loss = max(FLOOR, row["loss"])
        axes.plot(row["bits_per_number"], loss, marker, color=COLORS[color], ms=size, label=label, ls="none")
    axes.set_yscale("log")
    axes.set(xlabel="bits per number in the compressed tier", ylabel="divergence from the uncompressed model (nats)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, frameon=False)
    set_title(figure, f"Size against loss: {title}")
    return figure


def _ticks(axes: Any, labels: Sequence[str], rotation: int = 60) -> None:
    step = max(1, -(-len(labels) // MANY))
    axes.set_xticks(range(0, len(labels), step), labels[::step], rotation=rotation, fontsize=8)
