"""Engines of the bundled model, and servers that are closed and checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from minicache_trt.build import load_engine
from minicache_trt.engine_directory import CHECKPOINT
from minicache_trt.runtime.llm import LLM
from tests.conftest import ROOT
from tests.serving.live import Live
from tests.support.engines import build

DEMO = ROOT / "examples" / "demo_model" / "checkpoint"


@pytest.fixture(scope="session")
def demo_engines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Engine directories by method."""
    directory = tmp_path_factory.mktemp("demo")
    return {method: build(DEMO, directory / method, method, max_seq_len=512) for method in ("full", "kivi2")}


@pytest.fixture(scope="session")
def demo_llm(demo_engines: dict[str, Path]) -> Callable[[str], LLM]:
    """``demo_llm(method)`` opens an engine of the bundled model."""

    def open_llm(method: str) -> LLM:
        directory = demo_engines[method]
        return LLM.from_engine(load_engine(directory, 1), tokenizer=directory / CHECKPOINT)

    return open_llm


@pytest.fixture(scope="module")
def demo(demo_llm: Callable[[str], LLM]) -> Iterator[Live]:
    """A server of the bundled model, two bits."""
    live = Live(demo_llm("kivi2"))
    yield live
    live.close()


@pytest.fixture
def serve() -> Iterator[Callable[..., Live]]:
    """``serve(llm, **options)``: more servers."""
    started: list[Live] = []

    def start(llm: LLM, **options: Any) -> Live:
        started.append(Live(llm, **options))
        return started[-1]

    yield start
    for live in started:
        live.close()
