"""What ranks tell each other within a step, as nodes of TensorRT's op ``DistCollective``.

TensorRT's ONNX parser imports it (releases 11, and TensorRT-RTX 1.7), and NCCL carries it out; no other runtime has it.
It combines along the first axis. https://docs.nvidia.com/deeplearning/tensorrt/latest/_static/operators/DistCollective.html
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from minicache_trt.config import ModelConfig
from minicache_trt.functions.form import GraphForm
from minicache_trt.functions.tape import Emitter
from minicache_trt.parallel.shard import Shard, splits_vocabulary, sums_over_ranks

OP = "DistCollective"
Linear = Callable[[ir.Value, str], ir.Value]


def all_reduce(g: Emitter, x: ir.Value, form: GraphForm) -> ir.Value:
    """The ranks' tensors added up; with one rank, ``x``."""
    return x if form.ranks == 1 else _collective(g, x, form, "all_reduce", "sum")


def gather_columns(g: Emitter, x: ir.Value, form: GraphForm, columns: int) -> ir.Value:
    """The ranks' ``[rows, columns / ranks]`` side by side: ``[rows, columns]``."""
    stacked = g.reshape(_collective(g, x, form, "all_gather", "none"), [form.ranks, -1, columns // form.ranks])
    return g.reshape(g.op("Transpose", stacked, attrs={"perm": [1, 0, 2]}), [-1, columns])


def linear_over_ranks(g: Emitter, linear: Linear, config: ModelConfig, form: GraphForm) -> Linear:
    """A linear layer of the whole model from one of a rank's share of weights; biases of sums are rank 0's alone."""
    if form.ranks == 1:
        return linear

    def combined(x: ir.Value, name: str) -> ir.Value:
        y = linear(x, name)
        if sums_over_ranks(name):
            return all_reduce(g, y, form)
        if name == "lm_head" and splits_vocabulary(config.vocab_size, Shard(0, form.ranks)):
            return gather_columns(g, y, form, config.vocab_size)
        return y

    return combined


def _collective(g: Emitter, x: ir.Value, form: GraphForm, operation: str, reduce: str) -> ir.Value:
    attrs = {"collective_operation": operation, "reduce_op": reduce, "root": -1, "nb_rank": form.ranks}
    return g.op(OP, x, attrs=attrs)
