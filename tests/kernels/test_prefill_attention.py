"""Attention of prefill chunks against its PyTorch twin, on the host build of the kernel."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from minicache_trt.compression.methods import make_plan
from minicache_trt.config import BLOCK_SIZE, ModelConfig
from minicache_trt.kernels.library import TYPES, KernelError, KernelLibrary, address
from minicache_trt.kernels.prefill import prefill_attention, prefill_workspace
from minicache_trt.kernels.structs import AttentionArguments, AttentionShape, Step
from minicache_trt.model.torch_attention import Pools, paged_attention
from minicache_trt.runtime.batch import Batch
from tests.support.steps import random_pools, step

# Unit roundoff of each compute type.
ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
WIDE_TILES = 100_000
"""A bound on chunks large enough for the launcher to choose its larger tiles."""
MIXED = [(70, 0, 1), (200, 0, 1), (190, 0, 126), (300, 0, 150), (20, 0, 20), (2, 0, 2)]


def shape(dim: int = 64, heads: int = 2, group: int = 2) -> ModelConfig:
    return ModelConfig("llama", 4, 64, 64, heads * group, heads, dim, 100, 4096)


@dataclass(frozen=True)
class Case:
    """A step over random pools, and what the kernel is told about it."""

    pools: Pools
    batch: Batch
    q: Tensor
    layer: int = 1
    sliding_window: int = 0
    longest_chunk: int | None = None

    @classmethod
    def random(cls, config: ModelConfig, sequences: Sequence[tuple[int, int, int]], dtype: torch.dtype) -> Case:
        torch.manual_seed(1)
        plan = make_plan(config, "full")
        batch, pools = step(sequences), random_pools(config, plan, full_blocks=64)
        tensors = {name: tensor.to(dtype) for name, tensor in pools.tensors.items()}
        q = torch.randn(batch.num_tokens, config.num_heads * config.head_dim).to(dtype)
        return cls(replace(pools, tensors=tensors), batch, q)

    @property
    def kv(self) -> Tensor:
        return self.pools.tensors[f"kv.{self.layer}"]

    def with_poison(self) -> Case:
        """Not a number wherever no position of the step is, as memory outside the contract may hold it."""
        used = torch.zeros(self.kv.shape[0], BLOCK_SIZE, dtype=torch.bool)
        for s, (length, compressed) in enumerate(
            zip(self.batch.context_len.tolist(), self.batch.compressed_len.tolist(), strict=True)
        ):
            place = np.arange(length - compressed)
            used[torch.from_numpy(self.batch.full_table[s, place // BLOCK_SIZE]).long(), place % BLOCK_SIZE] = True
        kv = torch.where(used[:, None, None, :, None], self.kv, torch.nan)
        return replace(self, pools=replace(self.pools, tensors=self.pools.tensors | {f"kv.{self.layer}": kv}))

    def arguments(self, out: Tensor) -> AttentionArguments:
        """Pointers into this case's tensors, which must outlive them."""
        config, batch = self.pools.config, self.batch
        chunks = batch.query_start[1:] - batch.query_start[:-1]
        longest = int(chunks[len(batch.decode_rows) :].max(initial=0))
        pointers = {
            name: getattr(batch, name).ctypes.data
            for name in ("query_start", "context_len", "slot_mapping", "full_table")
        }
        return AttentionArguments(
            type=TYPES[self.q.dtype],
            shape=AttentionShape(
                config.num_heads, config.num_kv_heads, config.head_dim, 1 / math.sqrt(config.head_dim), None
            ),
            step=Step(
                tokens=batch.num_tokens,
                sequences=len(batch.context_len),
                decodes=len(batch.decode_rows),
                full_columns=batch.full_table.shape[1],
                longest_chunk=longest if self.longest_chunk is None else self.longest_chunk,
                **pointers,
            ),
            kv=address(self.kv),
            full_blocks=len(self.kv),
            sliding_window=self.sliding_window,
            q=address(self.q),
            out=address(out),
            q_stride=self.q.stride(0),
            out_stride=out.stride(0),
        )

    def attend(self, library: KernelLibrary) -> Tensor:
        out = torch.full(self.q.shape, 7.0, dtype=self.q.dtype)
        arguments = self.arguments(out)
        workspace = torch.full((max(16, prefill_workspace(library, arguments)),), 0xFF, dtype=torch.uint8)
        prefill_attention(library, arguments, workspace)
        decodes = len(self.batch.decode_rows)
        assert (out[:decodes] == 7.0).all(), "rows of decodes are not the kernel's"
        return out[decodes:]

    def expected(self) -> Tensor:
        """The twin's prefill rows; it appends, so it is given the keys and values that are there already."""
        slots = torch.from_numpy(self.batch.slot_mapping).long()
        new = self.kv[slots // BLOCK_SIZE, :, :, slots % BLOCK_SIZE].flatten(2)
        out = paged_attention(self.pools, self.batch, self.q.float(), new[:, 0], new[:, 1], self.layer)
        return out[len(self.batch.decode_rows) :]

    def magnitude(self) -> Tensor:
        """Attention with absolute values in place of values: what rounded weights may be off by, per unit roundoff."""
        kv = torch.stack([self.kv[:, 0], self.kv[:, 1].abs()], 1)
        return replace(
            self, pools=replace(self.pools, tensors=self.pools.tensors | {f"kv.{self.layer}": kv})
        ).expected()


def assert_agrees(library: KernelLibrary, case: Case) -> None:
    """Weights and results are rounded once each, everything else is float32."""
    expected, roundoff = case.expected(), ROUNDOFF[case.q.dtype]
    tolerance = 2e-5 + (0 if case.q.dtype == torch.float32 else roundoff) * (case.magnitude() + expected.abs())
    difference = (case.with_poison().attend(library).float() - expected).abs()
    assert (difference <= tolerance).all(), f"off by {(difference / tolerance).max():.2f} of the tolerance"


@pytest.mark.parametrize("longest_chunk", [None, WIDE_TILES], ids=["tiles of 64", "tiles of 128"])
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_head_dims(host_library: KernelLibrary, dim: int, longest_chunk: int | None) -> None:
    case = Case.random(shape(dim), [(70, 0, 1), (150, 0, 70), (20, 0, 20)], torch.float32)
    assert_agrees(host_library, replace(case, longest_chunk=longest_chunk))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_rounded_types(host_library: KernelLibrary, dim: int, dtype: torch.dtype) -> None:
    case = Case.random(shape(dim), [(70, 0, 1), (150, 0, 70), (20, 0, 20)], dtype)
    assert_agrees(host_library, case)
    if dim <= 128:
        torch.testing.assert_close(
            replace(case, longest_chunk=WIDE_TILES).attend(host_library), case.attend(host_library), rtol=0, atol=0
        )


@pytest.mark.parametrize("group", [1, 2, 3, 4, 8])
def test_groups(host_library: KernelLibrary, group: int) -> None:
    assert_agrees(host_library, Case.random(shape(group=group), MIXED, torch.float32))


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
    case = Case.random(shape(), sequences, torch.float32)
    assert_agrees(host_library, case)
    assert_agrees(host_library, replace(case, longest_chunk=WIDE_TILES))


def windowed_reference(case: Case, visible: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Attention over the full tier with `visible` (query position, key position), in float64, spelled out."""
    config, batch, rows = case.pools.config, case.batch, []
    for s in range(len(batch.decode_rows), len(batch.context_len)):
        length, start, stop = int(batch.context_len[s]), int(batch.query_start[s]), int(batch.query_start[s + 1])
        table = torch.from_numpy(batch.full_table[s, : -(-length // BLOCK_SIZE)]).long()
        keys, values = case.kv[table].double().permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :length]
        keys, values = (x.repeat_interleave(config.group_size, 0) for x in (keys, values))
        q = case.q[start:stop].double().view(stop - start, config.num_heads, config.head_dim).transpose(0, 1)
        logits = q @ keys.transpose(1, 2) / math.sqrt(config.head_dim)
        seen = visible(torch.arange(length - (stop - start), length)[:, None], torch.arange(length))
        weights = logits.masked_fill(~seen, -torch.inf).softmax(-1)
        rows.append((weights @ values).transpose(0, 1).flatten(1))
    return torch.cat(rows).float()


@pytest.mark.parametrize("longest_chunk", [None, WIDE_TILES], ids=["tiles of 64", "tiles of 128"])
@pytest.mark.parametrize("window", [1, 7, 64, 100, 10_000])
def test_sliding_windows(host_library: KernelLibrary, window: int, longest_chunk: int | None) -> None:
    case = Case.random(shape(group=3), MIXED, torch.float32)
    expected = windowed_reference(case, lambda query, key: (key <= query) & (key > query - window))
    case = replace(case.with_poison(), sliding_window=window, longest_chunk=longest_chunk)
    torch.testing.assert_close(case.attend(host_library), expected, atol=2e-5, rtol=0)


def test_blocks_behind_the_window_are_not_read(host_library: KernelLibrary) -> None:
    case = Case.random(shape(), [(300, 0, 20), (190, 0, 126)], torch.float32)
    expected = windowed_reference(case, lambda query, key: (key <= query) & (key > query - 50))
    case.batch.full_table[0, : (300 - 20 - 50) // BLOCK_SIZE] = 0
    case = replace(case.with_poison(), sliding_window=50)
    case.kv[0] = torch.nan
    torch.testing.assert_close(case.attend(host_library), expected, atol=2e-5, rtol=0)


def test_padded_rows_between_tokens(host_library: KernelLibrary) -> None:
    case = Case.random(shape(), [(90, 0, 1), (90, 0, 40)], torch.float32)
    wide = torch.full((len(case.q), 600), torch.nan)
    wide[:, 200:456] = case.q
    assert_agrees(host_library, replace(case, q=wide[:, 200:456]))


def test_neighbours_change_nothing(host_library: KernelLibrary) -> None:
    """A sequence alone, and among others, with tiles of either size: the same bits."""
    case = Case.random(shape(group=3), [(70, 0, 1), (200, 0, 73), (190, 0, 126)], torch.float16)
    together, batch = case.attend(host_library), case.batch
    alone = replace(
        batch,
        query_start=np.array([0, 126], np.int32),
        context_len=batch.context_len[2:],
        compressed_len=batch.compressed_len[2:],
        full_table=np.ascontiguousarray(batch.full_table[2:, :3]),
        input_ids=batch.input_ids[74:],
        decode_rows=batch.decode_rows[:0],
    )
    for longest_chunk in (None, WIDE_TILES):
        result = replace(case, batch=alone, q=case.q[74:], longest_chunk=longest_chunk).attend(host_library)
        assert torch.equal(result, together[73:])


def test_steps_without_chunks(host_library: KernelLibrary) -> None:
    assert len(Case.random(shape(), [(70, 0, 1), (3, 0, 1)], torch.float32).attend(host_library)) == 0


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
        ("shape.dim", 72, "head_dim: expected 64, 80, 96, 128 or 256, got 72"),
        ("shape.query_heads", 3, "query_heads: expected a multiple of 2 KV heads, got 3"),
        ("shape.scale", math.nan, "scale: expected a positive number"),
        ("sliding_window", -1, "sliding_window: expected at least 0, got -1"),
        ("type", 9, "type: expected 0 to 2, got 9"),
        ("full_blocks", 0, "full_blocks: expected at least 1, got 0"),
        ("q_stride", 255, "q_stride: expected a multiple of 4 from 256 on, got 255"),
        ("out_stride", 128, "out_stride: expected a multiple of 4 from 256 on, got 128"),
    ],
)
def test_bad_arguments_are_named(host_library: KernelLibrary, path: str, value: float | None, message: str) -> None:
    case = Case.random(shape(), [(70, 0, 1), (20, 0, 20)], torch.float32)
    out = torch.zeros_like(case.q)
    arguments = case.arguments(out)
    *structs, field = path.split(".")
    target = arguments
    for name in structs:
        target = getattr(target, name)
    setattr(target, field, value)
    with pytest.raises(KernelError, match=message):
        prefill_attention(host_library, arguments, torch.zeros(16))
