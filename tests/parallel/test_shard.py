"""Shares of models, weights and plans: put together they are the whole."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from minicache_trt.checkpoint.weights import WeightView
from minicache_trt.compression.codec import compress_blocks
from minicache_trt.compression.methods import MethodOptions, make_plan
from minicache_trt.compression.plan import CompressionPlan
from minicache_trt.compression.segment import Segment
from minicache_trt.compression.stream import Stream
from minicache_trt.compression.stream_constants import StreamConstants
from minicache_trt.config import BLOCK_SIZE, BuildConfig, ModelConfig
from minicache_trt.contract import plan_layout
from minicache_trt.errors import UserError
from minicache_trt.parallel.engine import check_ranks
from minicache_trt.parallel.shard import Shard, check_shardable, shard_model, shard_plan, shard_tensor
from tests.support.plans import all_plans, completed

MODEL = ModelConfig("llama", 4, 64, 96, 8, 4, 64, 100, 4096)


def shardable_plans() -> dict[str, CompressionPlan]:
    """Plans that two ranks can share; those with matched heads match them within a rank."""
    linear = Stream("key", (0, 2), (Segment(64, "g4"),), merge="linear", match_heads=True, align=True)
    retained = Stream("value", (1, 3), (Segment(64, "int4"),), "slerp", match_heads=True, retained=4)
    matched = completed(MODEL, linear, retained)
    swapped = np.array([[1, 0, 2, 3], [0, 1, 3, 2]], np.int32)
    maps = {name: swapped for name in matched.matrices if name.endswith("head_map")}
    plans = all_plans(MODEL) | {"matched": replace(matched, matrices={**matched.matrices, **maps})}
    result = {}
    for name, plan in plans.items():
        try:
            check_shardable(MODEL, plan, 2)
        except UserError:
            continue
        result[name] = plan
    return result


PLANS = shardable_plans()


def test_most_plans_can_be_shared() -> None:
    assert {"kivi4", "minicache4", "smoothquant", "keys before RoPE", "g3", "fp8", "matched"} <= PLANS.keys()


@pytest.mark.parametrize("name", PLANS)
def test_ranks_compress_their_heads_as_the_whole_does(name: str) -> None:
    """Bit by bit, every pool: a block of all heads against blocks of each rank's."""
    plan, whole = PLANS[name], plan_layout(PLANS[name], MODEL)
    generator = torch.Generator().manual_seed(5)
    for layout in whole:
        x = torch.randn(len(layout.stream.layers), 2, 4, BLOCK_SIZE, 64, generator=generator)
        blocks = torch.tensor([0, 3])
        expected = compress_blocks(layout, x, blocks, StreamConstants.of(plan, layout.index))
        parts = []
        for rank in range(2):
            shard = Shard(rank, 2)
            model, own = shard_model(MODEL, shard), shard_plan(plan, MODEL, shard)
            own.validate(model)
            small = plan_layout(own, model)[layout.index]
            heads = x[:, :, shard.part(4)]
            parts.append(compress_blocks(small, heads, blocks, StreamConstants.of(own, layout.index)))
        for kind, values in expected.items():
            axis = next(i for i, (a, b) in enumerate(zip(values.shape, parts[0][kind].shape, strict=True)) if a != b)
            torch.testing.assert_close(torch.cat([part[kind] for part in parts], axis), values, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "axis"),
    [
        ("layers.0.attention.q.weight", 0),
        ("layers.0.attention.v.bias", 0),
        ("layers.10.mlp.gate.weight", 0),
        ("layers.1.moe.experts.11.up.weight", 0),
        ("lm_head.weight", 0),
        ("layers.0.attention.o.weight", 1),
        ("layers.0.mlp.down.weight", 1),
        ("layers.1.moe.experts.11.down.weight", 1),
    ],
)
def test_weights_are_cut_along(name: str, axis: int) -> None:
    weight = torch.arange(8 * 12.0).reshape(8, 12)[:, 0 if name.endswith("bias") else slice(None)]
    parts = [shard_tensor(name, weight, Shard(rank, 4)) for rank in range(4)]
    assert all(part.shape[axis] == weight.shape[axis] // 4 for part in parts)
    assert torch.equal(torch.cat(parts, axis), weight)


@pytest.mark.parametrize(
    "name",
    ["embed.weight", "layers.0.attention.q_norm.weight", "layers.0.moe.router.weight", "layers.0.mlp.down.bias"],
)
def test_weights_every_rank_holds(name: str) -> None:
    weight = torch.arange(8.0)
    assert torch.equal(shard_tensor(name, weight, Shard(1, 4)), weight)


@pytest.mark.parametrize(
    ("size", "heads"), [(2, [[0, 1], [2, 3]]), (4, [[0], [1], [2], [3]]), (8, [[0], [0], [1], [1]])]
)
def test_each_rank_holds_the_kv_heads_its_queries_attend_with(size: int, heads: list[list[int]]) -> None:
    weight = torch.arange(4.0).repeat_interleave(64)[:, None].expand(-1, 96)
    queries = torch.arange(8.0).repeat_interleave(64)[:, None].expand(-1, 96)
    for rank, expected in enumerate(heads):
        shard = Shard.of(MODEL, rank, size)
        own = shard_tensor("layers.0.attention.v.weight", weight, shard)[::64, 0].int().tolist()
        assert own == expected and shard_model(MODEL, shard).num_kv_heads == len(expected)
        attending = shard_tensor("layers.0.attention.q.weight", queries, shard)[::64, 0].int() // 2
        assert sorted(set(attending.tolist())) == expected


def test_rows_of_a_vocabulary_that_does_not_divide_stay_whole() -> None:
    weight = torch.zeros(101, 4)
    assert shard_tensor("lm_head.weight", weight, Shard(1, 2)).shape == (101, 4)


@pytest.mark.parametrize(
    ("size", "plan", "message"),
    [
        (3, make_plan(MODEL, "full"), "tp_size: 3 ranks cannot share the model's heads and columns evenly"),
        (16, make_plan(MODEL, "full"), "possible for this model: 1, 2, 4, 8"),
        (2, make_plan(MODEL, "minicache", MethodOptions(norm="token")), "norm: 'token' spans all heads, which lie on"),
        (2, completed(MODEL, Stream("key", (0,), (Segment(64),), match_heads=True)), "matches heads of different"),
    ],
)
def test_what_cannot_be_cut_is_refused(size: int, plan: CompressionPlan, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        check_shardable(MODEL, plan, size)


def test_backends_of_one_rank_are_refused() -> None:
    with pytest.raises(UserError, match="backend onnxruntime runs one rank, and the engine is for tp_size 2"):
        check_ranks(MODEL, make_plan(MODEL, "full"), BuildConfig(tp_size=2))


def test_views_of_rows_stay_in_the_file() -> None:
    view = WeightView("w", None, 100, 8 * 12 * 4, (8, 12), "float32")  # type: ignore[arg-type]
    assert view.rows(4, 2) == replace(view, offset=100 + 4 * 48, nbytes=96, shape=(2, 12))
