"""Figures, tables and the picture, from scores made by hand."""

from __future__ import annotations

import io
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from minicache_trt.evaluation.contenders import Memory
from minicache_trt.evaluation.evaluate import CellScores, Result
from minicache_trt.evaluation.plots import draw_pareto, lifts, pareto
from minicache_trt.evaluation.report import figures, summarize, tables
from minicache_trt.evaluation.scoring import Scores


def scores(nll: list[float], exact: list[float]) -> Scores:
    count = np.array([10.0, 30.0])
    return Scores(np.array(nll), np.array([4.0, 12.0]), count, np.array(exact), np.array([1.0, 3.0]))


def result(name: str, bits: float, factor: float) -> Result:
    memory = Memory(bits, 16 / bits, 16 / bits, 100, 200, 0, "fp32", 1 << 20)
    own = scores([20 * factor, 90 * factor], [1, 2 - factor])
    cells = (CellScores(64, 0.0, own), CellScores(64, 0.5, own))
    harness = {"task": {"acc": {"value": 0.5, "stderr": None, "samples": [0.0, 1.0]}}}
    return Result(name, memory, {"perplexity": (CellScores(64, None, own),), "passkey": cells}, harness)


def test_figures_by_hand() -> None:
    values = figures(scores([22, 99], [1, 1]), scores([20, 90], [1, 2]))
    assert np.isclose(values["nll"], 121 / 40) and np.isclose(values["perplexity"], np.exp(121 / 40))
    assert np.isclose(values["nll_change"], 11 / 40)
    assert np.isclose(values["perplexity_change"], np.exp(11 / 40) - 1)
    assert values["accuracy"] == 16 / 40 and values["accuracy_change"] == 0
    assert values["exact"] == 2 / 4 and values["exact_change"] == -1 / 4
    # Two sequences: a resample is one of them twice, or both.
    low, high = values["nll_change_interval"]
    assert np.isclose(low, 2 / 10) and np.isclose(high, 9 / 30)


def test_summary_and_tables() -> None:
    summary = summarize([result("full", 16, 1.0), result("half", 8, 1.1)])
    assert [line["method"] for line in summary] == ["full", "half"]
    assert summary[0]["tasks"]["passkey"]["nll_change_interval"] == (0, 0)
    assert [(c["length"], c["depth"], c["examples"]) for c in summary[1]["tasks"]["passkey"]["cells"]] == [
        (64, 0.0, 2), (64, 0.5, 2),
    ]  # fmt: skip
    console = Console(width=100, record=True, file=io.StringIO())
    for table in tables(summary, "some [model]"):
        console.print(table, markup=False)
    text = console.export_text()
    perplexity = f"{np.exp(121 / 40):.2f}"
    for part in ("perplexity", "passkey", "64 @50%", "half", "8.00", "2.00x", perplexity, "lm-eval-harness"):
        assert part in text, part
    assert f"{100 * np.expm1(11 / 40):+.1f}%" in text


def test_pareto_by_brute_force() -> None:
    points = [tuple(p) for p in np.random.default_rng(0).integers(0, 12, (30, 2)).tolist()]
    beaten = {
        i
        for i, j in (pair for a, b in combinations(range(30), 2) for pair in ((a, b), (b, a)))
        if points[j] != points[i] and points[j][0] <= points[i][0] and points[j][1] <= points[i][1]
    }
    front = pareto(points)
    assert {points[i] for i in front} == {points[i] for i in range(30) if i not in beaten}
    assert [points[i][0] for i in front] == sorted({points[i][0] for i in front})


@pytest.mark.parametrize(("name", "magic"), [("a.png", b"\x89PNG"), ("b.svg", b"<?xml")])
def test_picture(tmp_path: Path, name: str, magic: bytes) -> None:
    summary = summarize([result("full", 16, 1.0), result("ha$lf_", 8, 1.1), result("x", 2, 1.5)])
    draw_pareto(summary, tmp_path / name, "title")
    data = (tmp_path / name).read_bytes()
    assert data.startswith(magic) and len(data) > 5000


def test_labels_of_points_that_lie_together_are_stacked() -> None:
    assert lifts([(16, 0.0), (4.5, 0.01), (4.5, 0.012), (2.5, 1.0), (4.4, 0.0), (12.4, 1.0)]) == [0, 1, 2, 0, 0, 0]
