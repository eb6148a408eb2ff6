"""Decode attention by the kernels against its PyTorch twin."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from minicache_trt.compression.methods import make_plan
from minicache_trt.compression.plan import CompressionPlan
from minicache_trt.compression.segment import Segment
from minicache_trt.compression.stream import Stream
from minicache_trt.config import BLOCK_SIZE, ModelConfig
from minicache_trt.functions.step import read_map_name
from minicache_trt.kernels.attention import StepTensors, attention_arguments, decode_attention, decode_workspace
from minicache_trt.kernels.library import KernelError, KernelLibrary, StreamShape, device_maps, stream_view
from minicache_trt.kernels.structs import AttentionArguments
from minicache_trt.model.maps import plan_maps
from minicache_trt.model.rope import inverse_frequencies
from minicache_trt.model.torch_attention import Pools, paged_attention
from minicache_trt.runtime.batch import Batch
from tests.support.plans import all_plans, completed, lossless_plan, several_run_plans, single_run_plans
from tests.support.steps import random_pools, step

POISON = -77.0


def config_of(head_dim: int, heads: int, kv_heads: int) -> ModelConfig:
    return ModelConfig("llama", 4, 64, 64, heads, kv_heads, head_dim, 100, 4096)


CONFIG = config_of(80, 6, 2)
PLANS = {"full": make_plan(CONFIG, "full")} | all_plans(CONFIG)
# (length after the step, compressed length, tokens): decodes first, then a prefill chunk whose rows are not written.
SEQUENCES = [(1, 0, 1), (64, 0, 1), (65, 64, 1), (300, 192, 1), (40, 0, 40)]


@dataclass
class Layer:
    """One layer's arguments, and what must outlive them."""

    arguments: AttentionArguments
    workspace: Tensor
    out: Tensor
    owned: tuple[Any, ...]


def views(library: KernelLibrary, pools: Pools, layer: int) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Key and value view of a layer, and what they point to."""
    arrays = plan_maps(pools.plan, pools.config)
    result, owned = [], []
    for part in ("key", "value"):
        index, member = pools.plan.find(part, layer)
        prefix = read_map_name(index, member, "")
        maps = device_maps({n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}, "cpu")
        shape = StreamShape(library, pools.layouts[index], member)
        result.append(stream_view(shape, pools.layouts[index], pools.tensors, maps))
        owned += [shape, maps]
    return tuple(result), tuple(owned)


def layer_of(
    library: KernelLibrary, pools: Pools, batch: Batch, q: Tensor, layer: int, window: int = 0, padding: int = 0
) -> Layer:
    """Arguments with poisoned output and workspace; ``padding``: columns of both tables beyond the batch's."""
    compressed = pools.plan.compresses

    def tensor(name: str) -> Tensor:
        x = torch.from_numpy(getattr(batch, name))
        return torch.nn.functional.pad(x, (0, padding)) if name.endswith("table") else x.clone()

    tensors = StepTensors(
        tensor("query_start"),
        tensor("context_len"),
        tensor("slot_mapping"),
        tensor("full_table"),
        tensor("compressed_len") if compressed else None,
        tensor("compressed_table") if compressed else None,
        len(batch.decode_rows),
        batch.prefill_rows.shape[1],
    )
    streams, owned = views(library, pools, layer) if compressed else ((), ())
    config = pools.config
    frequencies = inverse_frequencies(config.rope, config.head_dim)
    out = torch.full_like(q, POISON)
    arguments = attention_arguments(
        config, tensors, pools.tensors[f"kv.{layer}"], q, out, *streams, inverse_frequencies=frequencies,
        sliding_window=window,
    )  # fmt: skip
    workspace = torch.full((decode_workspace(library, arguments),), -1, dtype=torch.int8)
    return Layer(arguments, workspace, out, (tensors, owned, streams, frequencies, q))


def attend(library: KernelLibrary, pools: Pools, batch: Batch, q: Tensor, layer: int, **options: int) -> Tensor:
    own = layer_of(library, pools, batch, q, layer, **options)
    decode_attention(library, own.arguments, own.workspace)
    return own.out


def queries(batch: Batch, config: ModelConfig, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Queries, keys and values of a batch's tokens."""
    heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
    return [torch.randn(batch.num_tokens, n * config.head_dim).to(dtype) for n in heads]


def sequences_of(plan: CompressionPlan, rows: Sequence[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    return [(n, c if plan.compresses else 0, tokens) for n, c, tokens in rows]


def check(library: KernelLibrary, pools: Pools, batch: Batch, layer: int, tolerance: float = 2e-5) -> None:
    dtype = pools.tensors[f"kv.{layer}"].dtype
    q, k, v = queries(batch, pools.config, dtype)
    expected = paged_attention(pools, batch, q, k, v, layer)
    out = attend(library, pools, batch, q, layer)
    decodes = len(batch.decode_rows)
    torch.testing.assert_close(out[:decodes].float(), expected[:decodes].float(), atol=tolerance, rtol=tolerance)
    assert (out[decodes:] == POISON).all()


@pytest.mark.parametrize("name", PLANS)
def test_agrees_with_twin(host_library: KernelLibrary, name: str) -> None:
    torch.manual_seed(1)
    plan = PLANS[name]
    pools, batch = random_pools(CONFIG, plan), step(sequences_of(plan, SEQUENCES))
    for layer in range(CONFIG.num_layers):
        check(host_library, pools, batch, layer)


def test_lossless_streams(host_library: KernelLibrary) -> None:
    torch.manual_seed(10)
    config = config_of(64, 4, 2)
    pools, batch = random_pools(config, lossless_plan(config)), step([(130, 64, 1), (300, 192, 1)])
    for layer in range(config.num_layers):
        check(host_library, pools, batch, layer)


SHAPES = [(64, 2, 2), (64, 12, 1), (80, 4, 2), (96, 3, 1), (128, 4, 1), (128, 8, 1), (256, 2, 1), (256, 1, 1)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ["full", "minicache4", "mixed", "keys before RoPE", "three layers with residuals"])
def test_head_dimensions_and_groups(host_library: KernelLibrary, name: str, shape: tuple[int, int, int]) -> None:
    torch.manual_seed(2)
    config = config_of(*shape)
    plan = make_plan(config, "full") if name == "full" else all_plans(config)[name]
    pools, batch = random_pools(config, plan, 8, 4), step(sequences_of(plan, [(70, 64, 1), (150, 128, 1)]), 0, 8, 4)
    for layer in (0, 2):
        check(host_library, pools, batch, layer)


@pytest.mark.parametrize("name", ["full", "minicache4", "aligned KLT", "mixed"])
def test_several_splits_of_both_tiers(host_library: KernelLibrary, name: str) -> None:
    torch.manual_seed(3)
    config = config_of(64, 2, 1)
    plan = make_plan(config, "full") if name == "full" else all_plans(config)[name]
    rows = sequences_of(plan, [(1088, 512, 1), (1101, 576, 1), (1600, 1088, 1), (1025, 0, 1), (5, 0, 1)])
    pools, batch = random_pools(config, plan, 80, 40), step(rows, 0, 80, 40)
    for layer in (0, 1):
        check(host_library, pools, batch, layer)


def rank_plan(config: ModelConfig) -> CompressionPlan:
    """Streams of more components than a head has, and segments that meet in the middle of 32."""
    segments = (Segment(48, "int4"), Segment(80, "g3")), (Segment(16, "int8"), Segment(192, "int4"), Segment(48))
    return completed(
        config,
        Stream("key", (0, 1, 2, 3), segments[1], merge="linear", retained=32),
        Stream("value", (0, 1, 2, 3), segments[1][::-1], merge="linear", retained=32, retained_format="int4"),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_largest_streams(host_library: KernelLibrary, dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    config = config_of(64, 2, 1)
    pools, batch = random_pools(config, rank_plan(config), 8, 4, dtype), step([(150, 128, 1), (65, 64, 1)], 0, 8, 4)
    check(host_library, pools, batch, 1, TOLERANCE[dtype])


TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 1e-2}
"""Logits are sums of about D products of magnitude 1, with queries (and keys before RoPE) rounded to 11 or 8 bits;
outputs are rounded to the type."""


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PLANS)
def test_16_bit_types(host_library: KernelLibrary, name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(5)
    plan = PLANS[name]
    pools = random_pools(CONFIG, plan, 12, 6, dtype)
    batch = step(sequences_of(plan, [(70, 64, 1), (200, 128, 1)]), 0, 12, 6)
    for layer in range(CONFIG.num_layers):
        check(host_library, pools, batch, layer, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("name", single_run_plans(config_of(64, 4, 2)))
def test_streams_of_one_run(host_library: KernelLibrary, name: str, dim: int, dtype: torch.dtype) -> None:
    torch.manual_seed(5)
    config = config_of(dim, 4, 2)
    pools = random_pools(config, single_run_plans(config)[name], 24, 12, dtype)
    batch = step([(70, 64, 1), (700, 576, 1)], 0, 24, 12)
    for layer in (0, 3):
        check(host_library, pools, batch, layer, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("name", several_run_plans(config_of(64, 4, 2)))
def test_streams_of_several_runs(host_library: KernelLibrary, name: str, dim: int, dtype: torch.dtype) -> None:
    torch.manual_seed(5)
    config = config_of(dim, 4, 2)
    pools = random_pools(config, several_run_plans(config)[name], 24, 16, dtype)
    batch = step([(70, 64, 1), (700, 576, 1), (330, 256, 1)], 0, 24, 16)
    check(host_library, pools, batch, 3, TOLERANCE[dtype])


@pytest.mark.parametrize("name", ["full", "minicache4", "aligned KLT", "three layers with residuals"])
def test_result_does_not_depend_on_the_batch(host_library: KernelLibrary, name: str) -> None:
    torch.manual_seed(6)
    plan = PLANS[name]
    rows = sequences_of(plan, [(300, 192, 1), (65, 64, 1), (150, 128, 1), (700, 64, 1)])
    pools, batch = random_pools(CONFIG, plan), step(rows)
    q, _, _ = queries(batch, CONFIG)
    together = attend(host_library, pools, batch, q, 1)
    for s in range(len(rows)):
        alone = one_of(batch, s)
        for padding in (0, 9):
            out = attend(host_library, pools, alone, q[s : s + 1], 1, padding=padding)
            assert torch.equal(out[0], together[s])


def one_of(batch: Batch, s: int) -> Batch:
    """The batch's decode number ``s`` alone, in the same blocks."""
    alone = step([(1, 0, 1)])
    full, compressed = (table[s : s + 1] for table in (batch.full_table, batch.compressed_table))
    used = max(1, int(batch.compressed_len[s]) // BLOCK_SIZE)
    lengths = {name: getattr(batch, name)[s : s + 1] for name in ("context_len", "compressed_len", "slot_mapping")}
    return type(batch)(**{**vars(alone), **lengths, "full_table": full, "compressed_table": compressed[:, :used]})


@pytest.mark.parametrize("name", ["full", "minicache4", "mixed"])
def test_numbers_nobody_may_see(host_library: KernelLibrary, name: str) -> None:
    """NaN beyond the sequences' ends and in blocks they do not own."""
    torch.manual_seed(7)
    plan = PLANS[name]
    rows = sequences_of(plan, [(1, 0, 1), (100, 64, 1), (200, 128, 1)])
    pools, batch = random_pools(CONFIG, plan), step(rows)
    q, k, v = queries(batch, CONFIG)
    expected = paged_attention(pools, batch, q, k, v, 0)
    seen = torch.zeros(48, BLOCK_SIZE, dtype=torch.bool)
    used = torch.zeros(16, dtype=torch.bool)
    for s, (length, compressed, _) in enumerate(rows):
        for p in range(length - compressed):
            seen[int(batch.full_table[s, p // BLOCK_SIZE]), p % BLOCK_SIZE] = True
        used[torch.from_numpy(batch.compressed_table[s, : compressed // BLOCK_SIZE]).long()] = True
    kv = pools.tensors["kv.0"]
    kv.copy_(torch.where(seen[:, None, None, :, None], kv, torch.nan))
    for tensor in pools.tensors.values():
        if len(tensor) == len(used):
            tensor[~used] = torch.nan if tensor.is_floating_point() else 127
    torch.testing.assert_close(attend(host_library, pools, batch, q, 0), expected, atol=2e-5, rtol=2e-5)


def windowed(pools: Pools, batch: Batch, q: Tensor, layer: int, window: int) -> Tensor:
    """Decodes over the last ``window`` tokens, from the definition."""
    config, out = pools.config, []
    for s in range(len(batch.decode_rows)):
        length, compressed = int(batch.context_len[s]), int(batch.compressed_len[s])
        tiers = []
        for place, part in enumerate(("key", "value")):
            old = torch.from_numpy(batch.compressed_table[s, : compressed // BLOCK_SIZE]).long()
            new = torch.from_numpy(batch.full_table[s, : -(-(length - compressed) // BLOCK_SIZE)]).long()
            recent = pools.recent(place, layer, new)[:, : length - compressed]
            history = pools.history(part, layer, old) if compressed else recent[:, :0]
            tiers.append(torch.cat([history, recent], 1)[:, -window:].repeat_interleave(config.group_size, 0))
        query = q[s].view(config.num_heads, config.head_dim, 1)
        logits = tiers[0] @ query / math.sqrt(config.query_scalar or config.head_dim)
        if config.attention_softcap is not None:
            logits = config.attention_softcap * torch.tanh(logits / config.attention_softcap)
        weights = logits.softmax(1)
        out.append((weights.mT @ tiers[1]).flatten())
    return torch.stack(out)


@pytest.mark.parametrize("name", ["full", "minicache4", "keys before RoPE"])
@pytest.mark.parametrize("window", [1, 37, 64, 100, 520, 1000])
def test_sliding_window(host_library: KernelLibrary, name: str, window: int) -> None:
    torch.manual_seed(8)
    plan = PLANS[name]
    rows = sequences_of(plan, [(700, 640, 1), (130, 64, 1), (64, 0, 1)])
    pools, batch = random_pools(CONFIG, plan), step(rows)
    q, _, _ = queries(batch, CONFIG)
    expected = windowed(pools, batch, q, 1, window)
    for s, (length, compressed, _) in enumerate(rows):  # blocks behind the window may be gone
        behind = max(0, length - window)
        batch.compressed_table[s, : min(behind, compressed) // BLOCK_SIZE] = 0
        batch.full_table[s, : max(0, behind - compressed) // BLOCK_SIZE] = 0
    out = attend(host_library, pools, batch, q, 1, window=window)
    torch.testing.assert_close(out, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", ["full", "minicache4", "keys before RoPE"])
@pytest.mark.parametrize("window", [0, 100])
def test_scale_and_soft_cap(host_library: KernelLibrary, name: str, window: int) -> None:
    torch.manual_seed(8)
    plan, config = PLANS[name], replace(CONFIG, query_scalar=9.0, attention_softcap=2.0)
    batch = step(sequences_of(plan, [(700, 640, 1), (130, 64, 1), (64, 0, 1)]))
    pools, (q, _, _) = random_pools(config, plan), queries(batch, config)
    out = attend(host_library, pools, batch, q, 1, window=window)
    torch.testing.assert_close(out, windowed(pools, batch, q, 1, window), atol=2e-5, rtol=2e-5)


def test_strided_rows(host_library: KernelLibrary) -> None:
    torch.manual_seed(9)
    plan = PLANS["minicache4"]
    pools, batch = random_pools(CONFIG, plan), step([(70, 64, 1), (200, 128, 1)])
    q, _, _ = queries(batch, CONFIG)
    wide = torch.randn(2, 3 * 480)
    wide[:, 480:960] = q
    assert torch.equal(
        attend(host_library, pools, batch, wide[:, 480:960], 2), attend(host_library, pools, batch, q, 2)
    )


def test_no_decodes_is_nothing_to_do(host_library: KernelLibrary) -> None:
    pools, batch = random_pools(CONFIG, PLANS["minicache4"]), step([(20, 0, 20)])
    q, _, _ = queries(batch, CONFIG)
    assert (attend(host_library, pools, batch, q, 0) == POISON).all()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("kv", None, "kv is null"),
        ("q", None, "q is null"),
        ("out", None, "out is null"),
        ("kv", 8, "kv is not aligned"),
        ("q", 8, "q is not aligned to 16 bytes"),
        ("out", 2, "out is not aligned to its numbers"),
        ("key.maps.offset", 8, "key.offset is not aligned to 16 bytes"),
        ("shape.dim", 72, "dim: expected 64, 80, 96, 128 or 256, got 72"),
        ("shape.heads", 4, "query_heads: expected a multiple of heads"),
        ("shape.heads", 3, "key.shape: expected 3 heads of 80, got 2 of 80"),
        ("step.decodes", 3, "decodes: expected 0 to 2, got 3"),
        ("step.context_len", None, "context_len is null"),
        ("step.full_table", None, "full_table is null"),
        ("step.full_columns", 0, "full_columns"),
        ("step.compressed_len", None, "compressed_len is null"),
        ("step.compressed_columns", 0, "compressed_columns"),
        ("q_stride", 479, "q_stride and out_stride: expected at least"),
        ("q_stride", 482, "q_stride: expected a multiple of 4, got 482"),
        ("sliding_window", -1, "sliding_window"),
        ("shape.softcap", -1, "softcap: expected 0 or more"),
        ("full_blocks", 0, "full_blocks"),
        ("type", 9, "type: number 9"),
        ("key.shape", None, "key.shape and value.shape"),
        ("key.pools.codes", None, "key.codes is null"),
        ("value.pools.retained_index", None, "value.retained_index is null"),
        ("value.pools.norms", 4, "value.norms is not aligned"),
    ],
)
def test_bad_arguments_are_named(host_library: KernelLibrary, path: str, value: int | None, message: str) -> None:
    pools, batch = random_pools(CONFIG, PLANS["minicache4"], 8, 4), step([(70, 64, 1), (66, 64, 1)], 0, 8, 4)
    own = layer_of(host_library, pools, batch, queries(batch, CONFIG)[0], 3)
    *parents, field = path.split(".")
    target = own.arguments
    for parent in parents:
        target = getattr(target, parent)
    setattr(target, field, value)
    with pytest.raises(KernelError) as error:
        decode_attention(host_library, own.arguments, own.workspace)
    assert str(error.value).startswith("decode_attention: ") and message in str(error.value)


def test_missing_maps_and_workspace_are_named(host_library: KernelLibrary) -> None:
    pools, batch = random_pools(CONFIG, PLANS["aligned KLT"], 8, 4), step([(70, 64, 1)], 0, 8, 4)
    q = queries(batch, CONFIG)[0]
    for name in ("map", "offset", "slots"):
        own = layer_of(host_library, pools, batch, q, 0)
        setattr(own.arguments.key.maps, name, None)
        with pytest.raises(KernelError, match=rf"key\.{name} is null"):
            decode_attention(host_library, own.arguments, own.workspace)
    own = layer_of(host_library, pools, batch, q, 0)
    own.arguments.shape.inverse_frequencies = None
    with pytest.raises(KernelError, match="inverse_frequencies is null"):
        decode_attention(host_library, own.arguments, own.workspace)
    own = layer_of(host_library, pools, batch, q, 0)
    with pytest.raises(KernelError, match="workspace_bytes: expected at least"):
        decode_attention(host_library, own.arguments, own.workspace[:-1])
