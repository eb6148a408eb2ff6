"""The list of presets."""

from __future__ import annotations

import json

import pytest

from minicache_trt.checkpoint import PRESETS
from tests.cli.command import Invoke, assert_refused, run_process


def test_every_preset_with_its_figures(invoke: Invoke) -> None:
    report = json.loads(invoke("models", "--memory", "24GiB", "--json").out)
    rows = {row["name"]: row for row in report["models"]}
    assert list(rows) == sorted(PRESETS) and report["memory"] == 24 << 30
    llama = rows["llama2-7b"]
    assert (llama["hub_id"], llama["parameters"]) == ("meta-llama/Llama-2-7b-hf", 6_738_415_616)
    assert llama["weight_bytes"] == 2 * 6_738_415_616
    full, default, merged = llama["methods"]
    assert full["method"] == "full" and full["kv_bytes_per_token"] == 2 * 2 * 32 * 4096
    assert full["context"] == ((24 << 30) - llama["weight_bytes"]) // (64 * 2**19) * 64
    assert default["method"] == "kivi4" and 3 < full["kv_bytes_per_token"] / default["kv_bytes_per_token"] < 4
    assert merged["method"] == "minicache4" and merged["context"] > default["context"] > 3 * full["context"]
    assert all(method["context"] == 0 for method in rows["llama3-70b"]["methods"])
    assert rows["mistral-7b"]["sliding_window"] == 4096
    assert all(method["context"] is None for method in rows["mistral-7b"]["methods"])


def test_table() -> None:
    out = run_process("models", COLUMNS="80").out
    for part in ("mixtral-8x7b ", "46.7B", "qwen3-8b ", "80.0 GiB", "512.0", "138k", "any"):
        assert part in out


@pytest.mark.parametrize("memory", ["much", "0", "-1GiB"])
def test_memory_that_is_none(invoke: Invoke, memory: str) -> None:
    assert_refused(invoke("models", f"--memory={memory}"), "--memory: expected")
