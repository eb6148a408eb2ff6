"""Engines whose cache is run by plugins, made from the nodes of the graphs in their own directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from minicache_trt.backends import torch_kernels
from minicache_trt.compression.plan import CompressionPlan
from minicache_trt.config import BLOCK_SIZE, ModelConfig
from minicache_trt.engine_directory import read_engine
from minicache_trt.kernels.library import KernelLibrary
from tests.support.plugin_cache import Bounds, PluginCache
from tests.support.plugin_harness import Harness
from tests.support.plugin_nodes import Nodes


def use_plugins(monkeypatch: pytest.MonkeyPatch, harness: Harness, directory: Path) -> list[PluginCache]:
    """Have kernel engines of a directory use the plugins; returns the caches they make from then on."""
    made: list[PluginCache] = []
    nodes, build = Nodes.of_engine(directory), read_engine(directory).build
    columns = -(-build.max_seq_len // BLOCK_SIZE) + 1
    bounds = Bounds(build.max_num_tokens, build.max_batch_size, columns, columns, blocks=64)

    def cache(
        library: KernelLibrary, config: ModelConfig, plan: CompressionPlan, device: torch.device, dtype: torch.dtype
    ) -> Any:
        made.append(PluginCache(harness, nodes, library, config, plan, device, dtype, bounds))
        return made[-1]

    monkeypatch.setattr(torch_kernels, "KernelCache", cache)
    return made
