"""A workspace sized for the largest extents of a profile is enough for all smaller ones."""

from __future__ import annotations

from dataclasses import astuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.gpu.cases import model
from tests.support.plugin_cache import Bounds, largest_inputs
from tests.support.plugin_harness import Harness
from tests.support.plugin_nodes import nodes_named, plans_of

CONFIG = model(128, 2, 4)
EXTENTS = st.tuples(st.integers(1, 16_384), st.integers(1, 512), st.integers(1, 300), st.integers(1, 2_000))


@pytest.mark.parametrize("name", ["full", "kivi4", "keys before RoPE", "aligned KLT"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(one=EXTENTS, other=EXTENTS)
def test_more_of_anything_takes_no_less(
    harness: Harness, name: str, one: tuple[int, ...], other: tuple[int, ...]
) -> None:
    plan, nodes = plans_of(CONFIG)[name], nodes_named(CONFIG, name)
    node = nodes.attention[1]
    plugin = harness.create(node.op, node.fields)
    both = Bounds(*(max(pair) for pair in zip(one, other, strict=True)))
    sizes = []
    for bounds in (Bounds(*one), Bounds(*other), both):
        inputs = largest_inputs(nodes, node, plan, CONFIG, bounds, torch.float16)
        outputs = [inputs[0], inputs[3]]
        plugin.configure(inputs, outputs)
        sizes.append(plugin.workspace(inputs, outputs))
    assert max(sizes) == sizes[2], (astuple(both), sizes)
    assert min(sizes) > 0
