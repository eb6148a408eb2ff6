"""A mixture of experts in standard ONNX operators, of which each expert computes the rows that were sent to it.

::

    x ──► router ──► softmax ──► top k ──► assignments, sorted by expert ──► rows of x in that order
                                                │                                   │
                                                │       per expert: If it has rows: its gated MLP, else nothing
                                                ▼                                   │
                                  each token's k results, weighed and added ◄───────┘

Only what is chosen is computed, whatever the step: k of the experts' weights are read for a single decode.

Graphs without branches compute every expert for every token and weigh those that were not chosen by zero
(`dense_mixture`): experts / k times the arithmetic, and all weights are read in every step.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from minicache_trt.config import ModelConfig
from minicache_trt.functions.form import GraphForm
from minicache_trt.functions.step import arange
from minicache_trt.functions.tape import Emitter

Expert = Callable[[ir.Value, int], ir.Value]
"""Emits the MLP of an expert."""


def mixture(
    g: Emitter, config: ModelConfig, x: ir.Value, router: ir.Value, expert: Expert, name: str, form: GraphForm
) -> ir.Value:
    """``[T, hidden]`` for ``x [T, hidden]`` and the ``router``'s logits ``[T, experts]``.

    ``name`` is path-like, for the graphs of the branches.
    """
    k = config.experts_per_token
    shares, chosen = _route(g, config, router, form)
    order, starts = _by_expert(g, config, chosen)
    rows = g.op("Gather", x, g.op("Div", order, g.constant(k)), attrs={"axis": 0})
    parts = [_own_rows(g, rows, starts, index, expert, name, form) for index in range(config.num_experts)]
    results = g.concat(parts, 0)
    # Where each assignment's result is: the inverse of the order.
    count = g.extent(order, 0)
    places = g.op("ScatterElements", order, order, arange(g, count), attrs={"axis": 0})
    results = g.reshape(g.op("Gather", results, places, attrs={"axis": 0}), [-1, k, config.hidden_size])
    return g.reduce("Sum", g.op("Mul", results, g.unsqueeze(shares, 2)), 1, keep=False)


def dense_mixture(
    g: Emitter, config: ModelConfig, x: ir.Value, router: ir.Value, expert: Expert, form: GraphForm
) -> ir.Value:
    """`mixture` without branches: every expert, those that were not chosen weighed by zero."""
    shares, chosen = _route(g, config, router, form)
    experts = g.constant(list(range(config.num_experts)))
    sent = g.cast(g.op("Equal", g.unsqueeze(chosen, 2), experts), form.compute)
    weights = g.reduce("Sum", g.op("Mul", sent, g.unsqueeze(shares, 2)), 1, keep=False)
    results = []
    for index in range(config.num_experts):
        results.append(g.op("Mul", expert(x, index), g.slice(weights, index, index + 1, 1)))
    return g.sum(results)


def _route(g: Emitter, config: ModelConfig, router: ir.Value, form: GraphForm) -> tuple[ir.Value, ir.Value]:
    """Shares (compute type, computed in float32) and numbers of each token's experts, ``[T, k]`` each."""
    k = config.experts_per_token
    shares = g.op("Softmax", router if form.wide else g.float32(router), attrs={"axis": -1})
    shares, chosen = g.op_multi("TopK", shares, g.constant([k]), outputs=2, attrs={"axis": -1})
    shares = g.op("Div", shares, g.reduce("Sum", shares, 1))
    return shares if form.wide else g.cast(shares, form.compute), chosen


def _by_expert(g: Emitter, config: ModelConfig, chosen: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Assignments (token * k + place) of ``chosen [T, k]`` sorted by expert and token, ``[T * k]``; where each expert's
    begin in that order, ``[experts + 1]``."""
    flat = g.reshape(chosen, [-1])
    count = g.extent(flat, 0)
    keys = g.op("Add", g.op("Mul", flat, count), arange(g, count))
    keys, order = g.op_multi("TopK", keys, count, outputs=2, attrs={"axis": 0, "largest": 0, "sorted": 1})
    experts = g.constant(np.arange(config.num_experts + 1)[:, None])
    before = g.op("Less", g.unsqueeze(g.op("Div", keys, count), 0), experts)
    return order, g.reduce("Sum", g.int64(before), 1, keep=False)


def _own_rows(
    g: Emitter, rows: ir.Value, starts: ir.Value, index: int, expert: Expert, name: str, form: GraphForm
) -> ir.Value:
    """Results of one expert for its rows, which may be none."""
    begin, end = (g.slice(starts, index + i, index + i + 1, 0) for i in (0, 1))
    own = g.slice(rows, begin, end, 0)
    branches = {}
    for branch, emit in (("then_branch", expert), ("else_branch", lambda x, _: g.op("Identity", x))):
        with g.subgraph() as tape:
            out = emit(own, index)
        out.type = ir.TensorType(form.compute)
        branches[branch] = ir.Graph([], [out], nodes=tape.nodes, name=f"{name}.{index}.{branch}")
    return g.op("If", g.op("Squeeze", g.op("Less", begin, end)), attrs=branches)
