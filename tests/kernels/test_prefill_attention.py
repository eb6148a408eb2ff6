"""Attention of prefill chunks against its PyTorch twin, on the host build of the kernel."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from minicache_trt.compression.methods import make_plan
from minicache_trt.config import BLOCK_SIZE, ModelConfig
from minicache_trt.kernels.library import TYPES, KernelError, KernelLibrary
from minicache_trt.kernels.prefill import prefill_attention, prefill_workspace
from tests.support.plans import all_plans
from tests.support.prefill_case import PrefillCall, PrefillCase

WIDE_TILES = 100_000
"""A bound on chunks large enough for the launcher to choose its larger tiles."""
MIXED = [(70, 0, 1), (200, 0, 1), (190, 0, 126), (300, 0, 150), (20, 0, 20), (2, 0, 2)]


def shape(dim: int = 64, heads: int = 2, group: int = 2) -> ModelConfig:
    return ModelConfig("llama", 4, 64, 64, heads * group, heads, dim, 100, 4096)


def assert_agrees(library: KernelLibrary, case: PrefillCase) -> None:
    difference = (case.with_poison().attend(library).float() - case.expected()).abs()
    tolerance = case.tolerance()
    assert (difference <= tolerance).all(), f"off by {(difference / tolerance).max():.2f} of the tolerance"


@pytest.mark.parametrize("longest_chunk", [None, WIDE_TILES], ids=["tiles of 64", "tiles of 128"])
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_head_dims(host_library: KernelLibrary, dim: int, longest_chunk: int | None) -> None:
    case = PrefillCase.random(shape(dim), [(70, 0, 1), (150, 0, 70), (20, 0, 20)], torch.float32)
    assert_agrees(host_library, replace(case, longest_chunk=longest_chunk))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_rounded_types(host_library: KernelLibrary, dim: int, dtype: torch.dtype) -> None:
    case = PrefillCase.random(shape(dim), [(70, 0, 1), (150, 0, 70), (20, 0, 20)], dtype)
    assert_agrees(host_library, case)
    if dim <= 128:
        torch.testing.assert_close(
            replace(case, longest_chunk=WIDE_TILES).attend(host_library), case.attend(host_library), rtol=0, atol=0
        )


@pytest.mark.parametrize("group", [1, 2, 3, 4, 8])
def test_groups(host_library: KernelLibrary, group: int) -> None:
    assert_agrees(host_library, PrefillCase.random(shape(group=group), MIXED, torch.float32))


@pytest.mark.parametrize(
    "sequences",
    [
        [(2, 0, 2)],
        [(64, 0, 64)],
        [(65, 0, 65)],
        [(128, 0, 64), (129, 0, 65), (127, 0, 63)],
        [(1000, 0, 5)],
        [(700, 0, 300)],
        [(66, 0, 2)] * 7,
    ],
    ids=str,
)
def test_edges_of_blocks_and_tiles(host_library: KernelLibrary, sequences: list[tuple[int, int, int]]) -> None:
    case = PrefillCase.random(shape(), sequences, torch.float32)
    assert_agrees(host_library, case)
    assert_agrees(host_library, replace(case, longest_chunk=WIDE_TILES))


PLANS = all_plans(shape())
HISTORY = [(70, 64, 1), (200, 128, 1), (190, 64, 126), (300, 192, 70), (20, 0, 20), (250, 192, 30)]


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("name", PLANS)
def test_compressed_history(host_library: KernelLibrary, name: str, layer: int) -> None:
    case = PrefillCase.random(shape(), HISTORY, torch.float32, PLANS[name], layer)
    assert_agrees(host_library, case)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("method", ["kivi4", "minicache4"])
def test_rounded_history(host_library: KernelLibrary, method: str, dim: int, dtype: torch.dtype) -> None:
    config = shape(dim)
    assert_agrees(host_library, PrefillCase.random(config, HISTORY, dtype, make_plan(config, method), 3))


@pytest.mark.parametrize("window", [0, 100, 500])
def test_pieces_of_the_history_change_nothing(host_library: KernelLibrary, window: int) -> None:
    """Any workspace from the smallest on, tiles of either size: the same bits."""
    sequences = [(700, 640, 9), (290, 256, 20), (20, 0, 20)]
    case = PrefillCase.random(shape(group=3), sequences, torch.float16, PLANS["minicache4"])
    case = replace(case.with_poison(), sliding_window=window)
    whole = case.attend(host_library)
    call = PrefillCall(host_library, case, whole)
    state = case.batch.num_tokens * case.pools.config.num_heads * (64 + 5) * 4
    for columns in (1, 3, 9):
        blocks = len(sequences) * columns
        restoring = max(
            host_library.size("restore_workspace", TYPES[torch.float16], view.shape, blocks)
            for view in (call.arguments.key, call.arguments.value)
        )
        size = blocks * (2 * 2 * 64 * 64 * 2 + 8) + restoring + state + 8 * 256
        assert size < prefill_workspace(host_library, call.arguments)
        for longest_chunk in (None, WIDE_TILES):
            pieces = replace(case, longest_chunk=longest_chunk).attend(host_library, size)
            assert torch.equal(pieces, whole)


def test_workspace_is_bounded(host_library: KernelLibrary) -> None:
    """It does not grow with the table beyond what is restored at a time."""
    case = PrefillCase.random(shape(128), HISTORY, torch.float16, make_plan(shape(128), "kivi4"))
    call = PrefillCall(host_library, case, torch.empty_like(case.q))
    sizes = []
    for columns in (4, 2048, 1_000_000):
        call.arguments.step.compressed_columns = columns
        sizes.append(prefill_workspace(host_library, call.arguments))
    assert sizes[0] < sizes[1] == sizes[2] < 80 << 20


def test_workspace_too_small(host_library: KernelLibrary) -> None:
    case = PrefillCase.random(shape(), HISTORY, torch.float16, PLANS["kivi4"])
    with pytest.raises(KernelError, match=r"workspace_bytes: expected at least [0-9]+, got 1000"):
        case.attend(host_library, 1000)


def windowed_reference(case: PrefillCase, visible: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Attention over the full tier with `visible` (query position, key position), in float64, spelled out."""
    config, batch, rows = case.pools.config, case.batch, []
    for s in range(len(batch.decode_rows), len(batch.context_len)):
        length, start, stop = int(batch.context_len[s]), int(batch.query_start[s]), int(batch.query_start[s + 1])
        table = torch.from_numpy(batch.full_table[s, : -(-length // BLOCK_SIZE)]).long()
        keys, values = case.kv[table].double().permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :length]
        keys, values = (x.repeat_interleave(config.group_size, 0) for x in (keys, values))
        q = case.q[start:stop].double().view(stop - start, config.num_heads, config.head_dim).transpose(0, 1)
        logits = q @ keys.transpose(1, 2) / math.sqrt(config.query_scalar or config.head_dim)
        if config.attention_softcap is not None:
            logits = config.attention_softcap * torch.tanh(logits / config.attention_softcap)
        seen = visible(torch.arange(length - (stop - start), length)[:, None], torch.arange(length))
        weights = logits.masked_fill(~seen, -torch.inf).softmax(-1)
        rows.append((weights @ values).transpose(0, 1).flatten(1))
    return torch.cat(rows).float()


@pytest.mark.parametrize("longest_chunk", [None, WIDE_TILES], ids=["tiles of 64", "tiles of 128"])
@pytest.mark.parametrize("window", [1, 7, 64, 100, 10_000])
def test_sliding_windows(host_library: KernelLibrary, window: int, longest_chunk: int | None) -> None:
    case = PrefillCase.random(shape(group=3), MIXED, torch.float32)
    expected = windowed_reference(case, lambda query, key: (key <= query) & (key > query - window))
    case = replace(case.with_poison(), sliding_window=window, longest_chunk=longest_chunk)
    torch.testing.assert_close(case.attend(host_library), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("longest_chunk", [None, WIDE_TILES], ids=["tiles of 64", "tiles of 128"])
@pytest.mark.parametrize("window", [0, 100])
def test_scale_and_soft_cap(host_library: KernelLibrary, window: int, longest_chunk: int | None) -> None:
    config = replace(shape(group=3), query_scalar=9.0, attention_softcap=2.0)
    case = PrefillCase.random(config, MIXED, torch.float32)
    expected = windowed_reference(case, lambda query, key: (key <= query) & (key > query - (window or 10_000)))
    case = replace(case.with_poison(), sliding_window=window, longest_chunk=longest_chunk)
    torch.testing.assert_close(case.attend(host_library), expected, atol=2e-5, rtol=0)


def test_blocks_behind_the_window_are_not_read(host_library: KernelLibrary) -> None:
    case = PrefillCase.random(shape(), [(300, 0, 20), (190, 0, 126)], torch.float32)
    expected = windowed_reference(case, lambda query, key: (key <= query) & (key > query - 50))
    case.batch.full_table[0, : (300 - 20 - 50) // BLOCK_SIZE] = 0
    case = replace(case.with_poison(), sliding_window=50)
    case.kv[0] = torch.nan
    torch.testing.assert_close(case.attend(host_library), expected, atol=2e-5, rtol=0)


def test_padded_rows_between_tokens(host_library: KernelLibrary) -> None:
    case = PrefillCase.random(shape(), [(90, 0, 1), (90, 0, 40)], torch.float32)
    wide = torch.full((len(case.q), 600), torch.nan)
    wide[:, 200:456] = case.q
    assert_agrees(host_library, replace(case, q=wide[:, 200:456]))


def test_neighbours_change_nothing(host_library: KernelLibrary) -> None:
    """A sequence alone, and among others, with tiles of either size: the same bits."""
    case = PrefillCase.random(shape(group=3), [(70, 0, 1), (200, 0, 73), (190, 0, 126)], torch.float16)
    together, batch = case.attend(host_library), case.batch
    alone = replace(
        batch,
        query_start=np.array([0, 126], np.int32),
        context_len=batch.context_len[2:],
        compressed_len=batch.compressed_len[2:],
        full_table=np.ascontiguousarray(batch.full_table[2:, :3]),
        input_ids=batch.input_ids[74:],
        slot_mapping=batch.slot_mapping[74:],
        decode_rows=batch.decode_rows[:0],
    )
    for longest_chunk in (None, WIDE_TILES):
        result = replace(case, batch=alone, q=case.q[74:], longest_chunk=longest_chunk).attend(host_library)
        assert torch.equal(result, together[73:])


def test_steps_without_chunks(host_library: KernelLibrary) -> None:
    assert len(PrefillCase.random(shape(), [(70, 0, 1), (3, 0, 1)], torch.float32).attend(host_library)) == 0


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("kv", None, "kv is null"),
        ("q", None, "q is null"),
        ("out", None, "out is null"),
        ("q", 24, "q is not aligned to 16 bytes"),
        ("step.query_start", None, "query_start is null"),
        ("step.context_len", None, "context_len is null"),
        ("step.full_table", None, "full_table is null"),
        ("step.longest_chunk", 3, "longest_chunk: expected at least 20, got 3"),
        ("step.decodes", 5, "decodes: expected 0 to 2, got 5"),
        ("step.tokens", 1, "tokens: expected at least 2, got 1"),
        ("step.sequences", 1, "tokens: expected 1, got 21"),
        ("step.full_columns", 0, "full_columns: expected at least 1, got 0"),
        ("step.longest_chunk", 2**30, "longest_chunk: queries of all query heads .* got 2147483648"),
        ("step.full_columns", 2**30, "full_columns and compressed_columns: positions times query heads"),
        ("step.sequences", 2**20, "tokens: expected at least 1048576"),
        ("full_blocks", 2**30, "full_blocks: blocks of all KV heads: expected at most 2147483647, got 4294967296"),
        ("shape.dim", 72, "head_dim: expected 64, 80, 96, 128 or 256, got 72"),
        ("shape.query_heads", 3, "query_heads: expected a multiple of 2 KV heads, got 3"),
        ("shape.scale", math.nan, "scale: expected a positive number"),
        ("sliding_window", -1, "sliding_window: expected at least 0, got -1"),
        ("shape.softcap", math.nan, "softcap: expected at least 0"),
        ("type", 9, "type: expected 0 to 2, got 9"),
        ("full_blocks", 0, "full_blocks: expected at least 1, got 0"),
        ("q_stride", 255, "q_stride: expected a multiple of 4 from 256 on, got 255"),
        ("out_stride", 128, "out_stride: expected a multiple of 4 from 256 on, got 128"),
    ],
)
def test_bad_arguments_are_named(host_library: KernelLibrary, path: str, value: float | None, message: str) -> None:
    case = PrefillCase.random(shape(), [(70, 0, 1), (20, 0, 20)], torch.float32)
    out = torch.zeros_like(case.q)
    call = PrefillCall(host_library, case, out)
    arguments = call.arguments
    *structs, field = path.split(".")
    target = arguments
    for name in structs:
        target = getattr(target, name)
    setattr(target, field, value)
    with pytest.raises(KernelError, match=message):
        prefill_attention(host_library, arguments, torch.zeros(16))
