"""Engines as they are written to disk, their custom ops run by the plugins, against the independent reference."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from minicache_trt.kernels.locate import LIBRARY_VARIABLE
from tests.support.checkpoints import make_checkpoint
from tests.support.engines import assert_equals_reference, build
from tests.support.plugin_engine import use_plugins
from tests.support.plugin_harness import Harness


@pytest.fixture(autouse=True)
def one_torch_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("plan", ["full", "kivi4", "minicache4", "keys before RoPE", "aligned, matched, threshold"])
@pytest.mark.usefixtures("host_library")
def test_logits_and_codes_are_the_references(
    harness: Harness, host_plugins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plan: str
) -> None:
    """decoder.onnx and compressor.onnx carry what the plugins need: prompts over several quanta, decodes, demotions."""
    monkeypatch.setenv(LIBRARY_VARIABLE, str(host_plugins))
    checkpoint = make_checkpoint(tmp_path / "checkpoint", head_dim=64)
    limits = {"quantum": 128, "max_seq_len": 512, "max_num_tokens": 512}
    directory = build(checkpoint, tmp_path / "engine", plan, **limits)
    caches = use_plugins(monkeypatch, harness, directory)
    assert_equals_reference(directory, [300, 70], 70, "host-kernels")
    (cache,) = caches
    assert cache.calls["PagedAttention"] >= 4 * 70
    assert (cache.calls["CompressBlocks"] > 0) == (plan != "full")


@pytest.mark.usefixtures("host_library")
def test_sliding_window_is_the_references(
    harness: Harness, host_plugins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LIBRARY_VARIABLE, str(host_plugins))
    checkpoint = make_checkpoint(tmp_path / "checkpoint", family="mistral", sliding_window=100, head_dim=64)
    directory = build(checkpoint, tmp_path / "engine", "kivi4", quantum=128, max_seq_len=512, max_num_tokens=512)
    caches = use_plugins(monkeypatch, harness, directory)
    assert_equals_reference(directory, [300, 3], 70, "host-kernels")
    assert caches[0].calls["PagedAttention"] >= 4 * 70
