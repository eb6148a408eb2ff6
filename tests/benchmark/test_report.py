"""Tables, CSV and plots of known cells."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from rich.console import Console

from minicache_trt.benchmark.measure import Cell, Figures
from minicache_trt.benchmark.plots import write_plots
from minicache_trt.benchmark.report import CSV_COLUMNS, tables, to_json, write_csv
from minicache_trt.benchmark.timings import Ratio

LATENCY = {"p50": 0.001, "p90": 0.002, "p99": 0.003}
OURS = Figures([100.0, 300.0, 200.0], [0.05, 0.06, 0.07], [10.0, 20.0, 40.0], LATENCY, 9, 3 << 20, 1 << 20, 2 << 20)
THEIRS = Figures([50.0, 100.0, 100.0], [0.1] * 3, [10.0] * 3, LATENCY, 9, None, None, None)
RATIOS = {"prefill": Ratio(2.0, 2.0, 3.0), "decode": Ratio(2.0, 1.0, 4.0)}
PAIRED = [Cell(batch, context, {"ours": OURS, "hf": THEIRS}, RATIOS, 0.5) for batch in (1, 8) for context in (16, 64)]
ALONE = [Cell(1, 16, {"ours": OURS}, {}, None)]


def text(cells: list[Cell]) -> str:
    console = Console(width=80)
    with console.capture() as capture:
        for rows in tables(cells):
            console.print(rows)
    return capture.get()


def test_tables() -> None:
    shown = text(PAIRED)
    assert "8 x 64" in shown and "200.0" in shown and "60.0" in shown and "20.0" in shown
    assert "2.00 (1.00-4.00)" in shown and "50%" in shown and "3.0 MiB" in shown and "None" not in shown
    assert "Ratio" not in text(ALONE)
    assert max(map(len, shown.splitlines())) <= 80


def test_csv(tmp_path: Path) -> None:
    write_csv(PAIRED, tmp_path / "cells.csv")
    with (tmp_path / "cells.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == CSV_COLUMNS and len(rows) == 8
    assert rows[0]["contender"] == "ours" and float(rows[0]["prefill_tokens_per_second"]) == 200.0
    assert float(rows[0]["inter_token_p99_s"]) == 0.003 and rows[0]["cache_bytes_allocated"] == str(2 << 20)
    assert rows[1]["contender"] == "hf" and rows[1]["peak_bytes"] == ""


def test_json() -> None:
    data = to_json(PAIRED)[0]
    assert data["figures"]["ours"]["decode_tokens_per_second"] == [10.0, 20.0, 40.0]
    assert data["ratios"]["decode"] == {"median": 2.0, "low": 1.0, "high": 4.0}


@pytest.mark.parametrize("cells", [PAIRED, ALONE], ids=["paired", "alone"])
def test_plots(tmp_path: Path, cells: list[Cell]) -> None:
    written = write_plots(cells, tmp_path / "a" / "plots", "title")
    assert [path.name for path in written] == ["throughput.png", "latency.png", "memory.png"]
    for path in written:
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG") and len(content) > 10_000
