"""Any stream a plan may hold: the ONNX functions against the reference codec and the PyTorch twin."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from minicache_trt.compression.codec import restore_blocks
from minicache_trt.compression.matrices import stream_matrices
from minicache_trt.compression.plan import CompressionPlan
from minicache_trt.compression.segment import Segment
from minicache_trt.compression.stream import PARTS, Stream
from minicache_trt.compression.stream_constants import StreamConstants
from minicache_trt.config import ModelConfig
from minicache_trt.contract import StreamLayout, stream_layout
from minicache_trt.functions.compress_blocks import compress_blocks
from minicache_trt.functions.stream_loading import load_stream
from minicache_trt.functions.stream_maps import StreamMaps, read_maps
from minicache_trt.functions.stream_restoring import block_rotation, restore_stream
from minicache_trt.functions.streams import prepare_query, stream_logits, stream_values, to_heads
from minicache_trt.functions.tape import Emitter
from minicache_trt.model.maps import plan_maps, writer_maps
from tests.support.agreement import assert_blocks_agree
from tests.support.matrices import random_matrices
from tests.support.onnx_function import run_function
from tests.support.strategies import streams

CONFIG = ModelConfig("llama", 4, 64, 64, 4, 2, 48, 100, 4096)
# A layer that is all but the merged one: its residuals are what float32 leaves uncertain.
NOISE = Stream("value", (0, 1), (Segment(48, "fp8"),), merge="slerp", t=1e-5, residual="int4")
TYPES = {"model": np.float32, "int8": np.int8, "float16": np.float16}
SOURCE, TARGET, BLOCK_INDEX = (np.array(x, np.int32) for x in ([3, 1], [2, 4], [0, 9]))


def alike(stream: Stream, seed: int) -> list[torch.Tensor]:
    """Full-tier pools of the group's layers, partly alike."""
    torch.manual_seed(seed)
    common = torch.randn(5, 2, CONFIG.num_kv_heads, 64, CONFIG.head_dim)
    return [common + 0.3 * torch.randn_like(common) for _ in stream.layers]


def reader(layout: StreamLayout, member: int, maps: tuple[str, ...]) -> object:
    """A function of queries, weights, block ids, block numbers, pools and maps that reads one layer all three ways."""
    g = Emitter("test")
    q, weights, blocks, number = (g.parameter(name) for name in ("q", "weights", "blocks", "number"))
    pools = {kind: g.parameter(f"pool.{kind}") for kind in layout.pools}
    values = {name: g.parameter(f"map.{name}") for name in maps}
    own = StreamMaps(**values)
    rotation = block_rotation(g, CONFIG, number) if layout.stream.basis == "pre_rope" else None
    restored = to_heads(g, restore_stream(g, layout, load_stream(g, layout, member, pools, blocks), own, rotation), own)
    outputs = [restored]
    if rotation is None:
        stream = load_stream(g, layout, member, pools, blocks)
        outputs.append(to_heads(g, stream_logits(g, stream, prepare_query(g, layout, own, q)), own))
        outputs.append(stream_values(g, stream, weights, own))
    inputs = [q, weights, blocks, number, *pools.values(), *values.values()]
    return g.function("Reader", inputs, outputs)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(stream=streams(CONFIG), seed=st.integers(0, 2**20))
@example(stream=NOISE, seed=3)
def test_functions_store_and_read_any_stream(stream: Stream, seed: int) -> None:
    plan = CompressionPlan("custom", (stream,))
    plan = replace(plan, matrices=random_matrices(plan, CONFIG, seed))
    layout, matrices = stream_layout(0, stream, CONFIG), stream_matrices(plan.matrices, 0)
    kv, arrays = alike(stream, seed), plan_maps(plan, CONFIG)
    pools = [np.zeros((6, *pool.shape), TYPES[pool.dtype]) for pool in layout.pools.values()]
    writer = writer_maps(layout, arrays)
    inputs = [
        SOURCE,
        TARGET,
        BLOCK_INDEX,
        *[x.numpy() for x in kv],
        *[arrays[name] for name in writer.values()],
        *pools,
    ]
    pools = run_function(compress_blocks("CompressBlocks", layout, tuple(writer)), inputs)
    fields = {kind: torch.from_numpy(pool[TARGET]) for kind, pool in zip(layout.pools, pools, strict=True)}
    x = torch.stack([layer[SOURCE, PARTS.index(stream.part)] for layer in kv])
    assert_blocks_agree(plan, layout, fields, x, torch.from_numpy(BLOCK_INDEX))

    q = torch.randn(2, CONFIG.num_kv_heads, CONFIG.group_size, CONFIG.head_dim)
    weights = torch.rand(2, CONFIG.num_kv_heads, CONFIG.group_size, 64)
    constants = StreamConstants.of(plan, 0)
    for member in range(len(stream.layers)):
        maps = read_maps(layout, matrices, member)
        function = reader(layout, member, tuple(maps))
        ids = [TARGET.astype(np.int64), BLOCK_INDEX.astype(np.int64)]
        outputs = run_function(function, [q.numpy(), weights.numpy(), *ids, *pools, *maps.values()])
        expected = restore_blocks(layout, fields, member, torch.from_numpy(BLOCK_INDEX), constants)
        wanted = [expected, q @ expected.transpose(-1, -2), weights @ expected]
        for mine, theirs in zip(outputs, wanted, strict=False):
            np.testing.assert_allclose(mine, theirs.numpy(), atol=3e-5 * float(theirs.abs().max()) + 1e-6)
