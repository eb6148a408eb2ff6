"""Figures: what is drawn, and what is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from minicache_trt.compression.plan import CompressionPlan
from minicache_trt.compression.segment import Segment
from minicache_trt.compression.stream import Stream
from minicache_trt.errors import UserError
from minicache_trt.plots.figure import check_directory, check_file, save
from minicache_trt.plots.layers import FLOOR, divergence_figure
from minicache_trt.plots.streams import angles_figure, norms_figure, save_stream_figures, similarity_figure
from minicache_trt.tracing.divergence import Divergence, diverge
from minicache_trt.tracing.similarity import StreamStatistics, stream_statistics

LAYERS = 5


def divergence(parts: int | None, tokens: int = 12) -> Divergence:
    """Two prompts; from layer ``parts`` on the sides differ by a tenth."""
    rng = np.random.default_rng(0)
    kinds = ("attention", "middle", "output")
    names = ["embed", *(f"layers.{layer}.{kind}" for layer in range(LAYERS) for kind in kinds), "logits"]
    a = [{name: rng.standard_normal((tokens, 4)).astype(np.float32) for name in names} for _ in range(2)]
    b = [{name: array.copy() for name, array in trace.items()} for trace in a]
    for trace in b:
        for name, array in trace.items():
            if parts is not None and name.startswith("layers.") and int(name.split(".")[1]) >= parts:
                array *= 1.1
    return diverge(a, b, [(tokens // 2, tokens)] * 2, 1e-3)


@pytest.fixture(scope="module")
def statistics() -> StreamStatistics:
    rng = np.random.default_rng(0)
    data = [{f"kv.{layer}": rng.standard_normal((20, 2, 2, 16)).astype(np.float32) for layer in range(LAYERS)}]
    streams = [
        Stream(part, layers, (Segment(16),), merge="slerp" if len(layers) == 2 else "none")
        for part in ("key", "value")
        for layers in ((0,), (1,), (2,), (3, 4))
    ]
    return stream_statistics(data, CompressionPlan("custom", tuple(streams)), LAYERS)


def assert_drawn(path: Path) -> None:
    """A PNG that opens, is of a readable size, and has more in it than a background and a frame."""
    with Image.open(path) as image:
        assert image.format == "PNG" and image.width >= 1000 and image.height >= 500
        counts = [count for count, _ in image.convert("RGB").getcolors(1 << 24) or []]
    assert len(counts) > 50 and max(counts) < 0.97 * sum(counts)


def legend(axes: Any) -> str:
    return " | ".join(text.get_text() for text in axes.get_legend().get_texts())


@pytest.mark.parametrize("parts", [None, 0, 3])
def test_divergence(tmp_path: Path, parts: int | None) -> None:
    result = divergence(parts)
    figure = divergence_figure(result, "this engine$", "that one caf\udce9$_")
    lines, heatmap = figure.axes[:2]
    assert lines.get_xlabel() == "layer" and "relative error" in lines.get_ylabel() and lines.get_yscale() == "log"
    assert ("parts first: layers.3.attention" in legend(lines)) == (parts == 3)
    drawn = {line.get_label(): line.get_ydata() for line in lines.lines}
    error = [point.relative_error for point in result.points if point.point.endswith(".output")]
    np.testing.assert_allclose(drawn["residual stream after the layer"], np.maximum(error, FLOOR))
    np.testing.assert_allclose(heatmap.images[0].get_array(), np.maximum(result.profile[3::3], FLOOR))
    assert "2 prompts" in heatmap.get_xlabel() and heatmap.get_ylabel() == "layer"
    assert figure.get_suptitle() == "A: this engine$\nB: that one caf?$_"
    save(figure, tmp_path / "layers.png")
    assert_drawn(tmp_path / "layers.png")


def test_divergence_with_numbers_that_are_not_finite(tmp_path: Path) -> None:
    result = divergence(3)
    profile = result.profile.copy()
    profile[8, 2], profile[9, 3] = np.nan, np.inf
    save(divergence_figure(Divergence(1e-3, result.points, result.lengths, profile), "a", "b"), tmp_path / "x.png")
    assert_drawn(tmp_path / "x.png")


@pytest.mark.parametrize("draw", [similarity_figure, angles_figure])
def test_pairs(statistics: StreamStatistics, draw: Any) -> None:
    figure = draw(statistics, "an engine")
    for axes in figure.axes:
        assert [label.get_text() for label in axes.get_xticklabels()] == ["0-1", "1-2", "2-3", "3-4"]
        assert axes.get_xlabel() == "pair of layers" and axes.get_ylabel()
        assert "merged by the engine's plan" in legend(axes)
        merged = [patch.get_x() + patch.get_width() / 2 for patch in axes.patches]
        assert merged == pytest.approx([3])
    assert "20 tokens" in figure.get_suptitle()


def test_lines_are_the_statistics(statistics: StreamStatistics) -> None:
    for part, axes in zip(("key", "value"), similarity_figure(statistics, "x").axes, strict=True):
        np.testing.assert_allclose(axes.lines[0].get_ydata(), [pair.cosine.mean for pair in statistics.of(part)[1]])
    for part, axes in zip(("key", "value"), norms_figure(statistics, "x").axes, strict=True):
        np.testing.assert_allclose(axes.lines[0].get_ydata(), [row.norm.mean for row in statistics.of(part)[0]])
        assert axes.get_xlabel() == "layer" and axes.get_ylabel() == f"norm of a {part} vector"


def test_stream_figures_are_written(statistics: StreamStatistics, tmp_path: Path) -> None:
    paths = save_stream_figures(statistics, tmp_path / "new" / "plots", "an engine")
    assert sorted(path.name for path in paths) == ["angles.png", "norms.png", "similarity.png"]
    for path in paths:
        assert_drawn(path)


@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".PDF", b"%PDF"), (".svg", b"<?xml")])
def test_format_follows_the_suffix(tmp_path: Path, suffix: str, start: bytes) -> None:
    path = tmp_path / f"layers{suffix}"
    check_file(path)
    save(divergence_figure(divergence(1), "a", "b"), path)
    assert path.read_bytes().startswith(start)


def test_paths_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for name, part in (("x.bmp", "suffix"), ("x", "suffix"), ("no/x.png", "no such dir"), ("file/x.png", "no such")):
        with pytest.raises(UserError, match=part):
            check_file(tmp_path / name)
    (tmp_path / "d.png").mkdir()
    with pytest.raises(UserError, match="Is a directory"):
        check_file(tmp_path / "d.png")
    for name in ("file", "file/plots"):
        with pytest.raises(UserError, match="file is a file, expected a directory"):
            check_directory(tmp_path / name)
    check_directory(tmp_path / "a" / "b")
    with pytest.raises(UserError, match="cannot write"):
        save(divergence_figure(divergence(1), "a", "b"), tmp_path / "file" / "x.png")
