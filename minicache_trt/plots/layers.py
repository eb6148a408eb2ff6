"""Where two sides part, layer by layer and token by token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from minicache_trt.plots.figure import COLORS, new_figure, set_title
from minicache_trt.tracing.divergence import LOGITS, Divergence
from minicache_trt.tracing.points import EMBED

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = {
    "attention": ("attention", COLORS["key"], "o", "-"),
    "output": ("residual stream after the layer", COLORS["merged"], "^", "-"),
    "middle": ("residual stream after attention", COLORS["value"], "s", ":"),
}
"""Last component of a trace point to label, colour, marker and line."""
MANY = 40
"""With more layers than this, lines and markers are thinner."""
FLOOR = 1e-8
"""Below float32's resolution; zero, which a logarithmic axis cannot show, is drawn here."""


def divergence_figure(result: Divergence, a: str, b: str) -> Figure:
    """Relative error per layer, and per layer and token; ``a`` and ``b`` name the sides."""
    layers = 1 + max(point.layer for point in result.points if point.layer is not None)
    figure = new_figure(13, 6)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.15))
    _lines(left, result, layers)
    _heatmap(figure, right, result, layers)
    set_title(figure, f"A: {a}\nB: {b}", 10)
    return figure


def _lines(axes: Any, result: Divergence, layers: int) -> None:
    width, size = (1.6, 4) if layers <= MANY else (1.0, 2.5)
    for kind, (label, color, marker, line) in KINDS.items():
        rows = [point for point in result.points if point.point.endswith(f".{kind}")]
        error = _shown([row.relative_error for row in rows])
        axes.plot([row.layer for row in rows], error, line, color=color, lw=width, marker=marker, ms=size, label=label)
    gap = max(1, layers // 16)
    ends = {EMBED: -gap, LOGITS: layers - 1 + gap}
    for row in result.points:
        if row.point in ends:
            axes.plot(ends[row.point], _shown([row.relative_error]), color=COLORS["neutral"], marker="D", ms=5, ls="")
    axes.axhline(result.tolerance, color="crimson", ls="--", lw=1.2, label=f"tolerance {result.tolerance:g}")
    first = result.first
    if first is not None:
        place = ends.get(first.point, first.layer)
        axes.axvline(place, color="crimson", ls=":", lw=1.2, label=f"parts first: {first.point}")
    axes.set_yscale("log")
    inner = range(0, layers, max(1, -(-layers // 16)))
    axes.set_xticks([ends[EMBED], *inner, ends[LOGITS]], [EMBED, *map(str, inner), LOGITS], fontsize=8)
    for end in (0, -1):
        axes.get_xticklabels()[end].set_rotation(40)
    zero = f" (0 is drawn at {FLOOR:g})" if any(point.relative_error == 0 for point in result.points) else ""
    axes.set(xlabel="layer", ylabel=f"relative error  ‖A - B‖ / ‖B‖{zero}", title="All tokens, per layer")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncol=2, frameon=False)


def _heatmap(figure: Figure, axes: Any, result: Divergence, layers: int) -> None:
    from matplotlib.colors import LogNorm

    rows = [i for i, point in enumerate(result.points) if point.point.endswith(".output")]
    error = _shown(result.profile[rows])
    low, high = float(error.min()), float(error.max())
    norm = LogNorm(low, high if high > low else 10 * low)
    tokens = error.shape[1]
    extent = (-0.5, tokens - 0.5, -0.5, layers - 0.5)
    image = axes.imshow(
        error, aspect="auto", origin="lower", interpolation="nearest", norm=norm, cmap="magma", extent=extent
    )
    figure.colorbar(image, ax=axes, label="relative error of the token")
    start = 0
    for index, (prompt, length) in enumerate(result.lengths):
        if index:
            axes.axvline(start - 0.5, color="white", lw=1.6)
        label = "first generated token" if index == 0 else None
        axes.axvline(start + prompt - 0.5, color="deepskyblue", ls="--", lw=1.2, label=label)
        start += length
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.2), frameon=False)
    prompts = "" if len(result.lengths) == 1 else f", {len(result.lengths)} prompts side by side"
    axes.set(xlabel=f"token{prompts}", ylabel="layer", title="Residual stream after the layer, per token")
    axes.set_yticks(range(0, layers, max(1, -(-layers // 16))))


def _shown(error: object) -> NDArray[np.float64]:
    """What a logarithmic axis can show: at least `FLOOR`; numbers that are not finite at the top of what is."""
    array = np.asarray(error, np.float64)
    finite = array[np.isfinite(array)]
    top = max(float(finite.max()) if finite.size else 1.0, 1.0)
    return np.clip(np.nan_to_num(array, nan=top, posinf=top), FLOOR, None)
