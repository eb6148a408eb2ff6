"""Steps for the plugins: one attention layer over random pools, on the host or on a GPU."""

from __future__ import annotations

from dataclasses import replace

import torch

from minicache_trt.config import ModelConfig
from tests.gpu.cases import Case
from tests.gpu.conftest import Kernels
from tests.support.plugin_cache import PluginCache
from tests.support.plugin_harness import Harness
from tests.support.plugin_nodes import nodes_named, plans_of
from tests.support.steps import step

Sequences = list[tuple[int, int, int]]

STEPS: dict[str, Sequences] = {
    "mixed": [(70, 0, 1), (130, 64, 1), (449, 384, 1), (65, 64, 1), (190, 64, 126), (300, 128, 150), (20, 0, 20)],
    "decodes": [(1, 0, 1), (64, 0, 1), (65, 64, 1), (300, 192, 1)],
    "prefills": [(190, 64, 126), (20, 0, 20)],
}
"""(length after the step, compressed length, tokens): decodes first, then prefill chunks."""


def plugin_case(
    harness: Harness,
    kernels: Kernels,
    config: ModelConfig,
    name: str,
    sequences: Sequences,
    dtype: torch.dtype,
) -> Case:
    """A case of the plan ``name`` whose cache is run by the plugins of the decoder's nodes."""
    plan = plans_of(config)[name]
    rows = [(n, c if plan.compresses else 0, tokens) for n, c, tokens in sequences]
    batch = step(rows, sliding_window=config.sliding_window)
    case = Case.random(kernels, config, plan, batch, dtype)
    cache = PluginCache(harness, nodes_named(config, name), kernels.library, config, plan, kernels.device, dtype)
    cache.tensors = case.cache.tensors
    return replace(case, cache=cache)
