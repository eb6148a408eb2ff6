"""Benchmark scripts keep up with the package they measure: each can be loaded, with all it imports."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

import numpy as np
import pytest

from minicache_trt.build import load_engine
from tests.support.checkpoints import make_checkpoint
from tests.support.engines import build
from tests.support.scripts import load_script

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.py")))
def test_script_loads(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    load_script(FOLDER / f"{name}.py")


@pytest.mark.parametrize("method", ["full", "kivi4"])
def test_a_step_packed_by_hand_is_one_the_engine_runs(
    tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    common = importlib.import_module("common")
    directory = build(make_checkpoint(tmp_path / "checkpoint"), tmp_path / "engine", method)
    engine = load_engine(directory, 1)
    common.fill_pools(engine, 40, 40)
    assert np.isfinite(engine.decode(common.decode_step(engine, 3, 200, 40, 40))).all()
