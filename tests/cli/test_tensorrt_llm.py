"""``bench`` and ``compare`` against TensorRT-LLM, on a stand-in that has the shape of its LLM API."""

from __future__ import annotations

import json
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.command import Invoke
from tests.support import stub_packages

Refused = Callable[..., None]
BENCH = ["--batch-sizes", "1,2", "--contexts", "8", "--new-tokens", "4", "--rounds", "2", "--threads", "1"]


@pytest.fixture
def python(workspace: Path) -> Path:
    """An interpreter of an environment that has the stand-in: it drops -I and looks there."""
    path = workspace / "python"
    stubs = next(iter(stub_packages.__path__))
    path.write_text(f'#!/bin/sh\nshift\nPYTHONPATH="{stubs}" exec "{sys.executable}" "$@"\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_bench(invoke: Invoke, engine: Path, python: Path) -> None:
    result = invoke("bench", "-e", engine, *BENCH, "--against", "tensorrt-llm", "--peer-python", python, "--json")
    assert result.code == 0, result
    data = json.loads(result.out)
    assert data["peers"]["tensorrt-llm"] == {"name": "tensorrt-llm", "version": "1.2.0", "settings": {}}
    for cell in data["cells"]:
        theirs = cell["figures"]["tensorrt-llm"]
        assert all(0 < rate < 1000 * cell["batch"] for rate in theirs["decode_tokens_per_second"])


def test_compare(invoke: Invoke, engine: Path, python: Path) -> None:
    flags = ["-p", "the cat", "-p", "a dog", "--max-tokens", 6, "--threads", 1, "--peer-python", python]
    result = invoke("compare", "-e", engine, *flags, "--against", "tensorrt-llm", "--json")
    assert result.code == 0, result
    data = json.loads(result.out)
    assert data["against"] == "tensorrt-llm" and len(data["prompts"]) == 2
    for row in data["prompts"]:
        assert row["generated_tokens"] == 6 and 0 <= row["common_prefix"] <= row["same"] <= 6


@pytest.mark.long
def test_compare_with_transformers_finds_the_same_tokens(invoke: Invoke, checkpoint: Path) -> None:
    """Uncompressed, the engine's greedy tokens are those of transformers."""
    assert invoke("build", "-m", checkpoint, "-o", "full", "--method", "full", "--max-seq-len", 128).code == 0
    result = invoke("compare", "-e", "full", "-p", "the cat", "--max-tokens", 20, "--threads", 1, "--against", "hf")
    assert result.code == 0 and "20/20" in result.out and "100.0 %" in result.out, result


@pytest.mark.parametrize("verb", ["bench", "compare"])
def test_environment_without_it(refused: Refused, engine: Path, verb: str) -> None:
    flags = BENCH if verb == "bench" else ["-p", "the cat", "--threads", "1"]
    arguments = [verb, "-e", engine, *flags, "--against", "tensorrt-llm"]
    refused(arguments, "No module named 'tensorrt_llm'", "install tensorrt-llm", "--peer-python")
    refused([*arguments, "--peer-python", "nowhere"], "--peer-python: nowhere: no such file")


def test_flags_that_do_not_fit(refused: Refused, engine: Path) -> None:
    refused(["bench", "-e", engine, *BENCH, "--against", "tensorrt-llm", "--peer-model", "x"], "--peer-model belongs")
    flags = ["-p", "a", "--peer-python", "x"]
    refused(["compare", "-e", engine, *flags, "--against", "hf"], "--peer-python belongs to --against tensorrt-llm")
    refused(["compare", "-e", engine, *flags], "--peer-python belongs to --against tensorrt-llm")
