"""`restore_blocks` of the host build against the PyTorch twin."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from minicache_trt.compression import codec as twin
from minicache_trt.compression.matrices import stream_matrices
from minicache_trt.compression.plan import CompressionPlan
from minicache_trt.compression.segment import Segment
from minicache_trt.compression.stream import Stream
from minicache_trt.compression.stream_constants import StreamConstants
from minicache_trt.config import ModelConfig
from minicache_trt.contract import StreamLayout, plan_layout, stream_layout
from minicache_trt.functions.stream_maps import read_maps
from minicache_trt.kernels.codec import restore_blocks
from minicache_trt.kernels.library import KernelError, KernelLibrary, StreamShape, device_maps, stream_view
from tests.support.agreement import assert_restored
from tests.support.matrices import random_matrices
from tests.support.plans import all_plans
from tests.support.strategies import streams

CONFIGS = {
    "80": ModelConfig("llama", 4, 64, 64, 6, 2, 80, 100, 4096),
    "128": ModelConfig("llama", 4, 64, 64, 2, 2, 128, 100, 4096),
    "64": ModelConfig("llama", 4, 64, 64, 6, 3, 64, 100, 4096),
}
TYPES = {"80": torch.float32, "128": torch.bfloat16, "64": torch.float16}
SMALL = ModelConfig("llama", 4, 64, 64, 4, 2, 48, 100, 4096)
BLOCKS, BLOCK_INDEX = torch.tensor([2, 4, 1], dtype=torch.int32), torch.tensor([0, 9, 2047], dtype=torch.int32)


def stored(plan: CompressionPlan, layout: StreamLayout, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    """Pools of five blocks by kind; `BLOCKS` hold what the twin stores of layers that are partly alike."""
    config, generator = layout.config, torch.Generator().manual_seed(seed)
    shape = (len(BLOCKS), config.num_kv_heads, 64, config.head_dim)
    common = torch.randn(shape, generator=generator)
    x = torch.stack([common + 0.5 * torch.randn(shape, generator=generator) for _ in layout.stream.layers]).to(dtype)
    fields = twin.compress_blocks(layout, x, BLOCK_INDEX, StreamConstants.of(plan, layout.index))
    pools = {}
    for kind, values in fields.items():
        pools[kind] = torch.full((5, *values.shape[1:]), 77, dtype=values.dtype)
        pools[kind][BLOCKS.long()] = values
    return pools


def check_stream(
    library: KernelLibrary, plan: CompressionPlan, layout: StreamLayout, dtype: torch.dtype, seed: int = 0
) -> None:
    """Every layer of a stream."""
    pools = stored(plan, layout, dtype, seed)
    tensors = {layout.pools[kind].name: values for kind, values in pools.items()}
    fields = {kind: values[BLOCKS.long()] for kind, values in pools.items()}
    constants = StreamConstants.of(plan, layout.index)
    for member in range(len(layout.stream.layers)):
        maps = device_maps(read_maps(layout, stream_matrices(plan.matrices, layout.index), member), "cpu")
        shape = StreamShape(library, layout, member)
        mine = restore_blocks(library, shape, layout, tensors, maps, BLOCKS, BLOCK_INDEX, layout.config, dtype)
        theirs = twin.restore_blocks(layout, fields, member, BLOCK_INDEX, constants)
        assert mine.dtype == dtype
        assert_restored(layout, mine, theirs, member)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", all_plans(CONFIGS["80"]))
def test_kernel_agrees_with_twin(host_library: KernelLibrary, name: str, config: str) -> None:
    plan = all_plans(CONFIGS[config])[name]
    seen: set[Stream] = set()
    for layout in plan_layout(plan, CONFIGS[config]):
        kind = replace(layout.stream, layers=tuple(range(len(layout.stream.layers))))
        if kind not in seen:
            check_stream(host_library, plan, layout, TYPES[config])
        seen.add(kind)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(stream=streams(SMALL), seed=st.integers(0, 2**20))
def test_kernel_reads_any_stream(host_library: KernelLibrary, stream: Stream, seed: int) -> None:
    plan = CompressionPlan("custom", (stream,))
    plan = replace(plan, matrices=random_matrices(plan, SMALL, seed))
    check_stream(host_library, plan, stream_layout(0, stream, SMALL), torch.float32, seed)


@pytest.mark.parametrize("dim", [16, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_smallest_and_largest_heads(host_library: KernelLibrary, dim: int, dtype: torch.dtype) -> None:
    config = ModelConfig("llama", 4, 64, 64, 2, 1, dim, 100, 4096)
    half, wide = (Segment(dim // 2, "int8"),) * 2 if dim > 16 else (Segment(16),), (Segment(dim, "g4"),)
    group = (0, 1, 2)
    own = (
        Stream("key", group, half, merge="slerp", basis="pre_rope", align=True, residual="int8", retained=4),
        Stream("value", group, wide, merge="linear", retained=3, retained_format="fp8"),
    )
    for stream in own:
        plan = CompressionPlan("custom", (stream,))
        plan = replace(plan, matrices=random_matrices(plan, config))
        check_stream(host_library, plan, stream_layout(0, stream, config), dtype)


def test_no_blocks(host_library: KernelLibrary) -> None:
    layout = plan_layout(all_plans(CONFIGS["64"])["minicache4"], CONFIGS["64"])[-1]
    tensors = {pool.name: torch.zeros((1, *pool.shape)) for pool in layout.pools.values()}
    shape, none = StreamShape(host_library, layout), torch.zeros(0, dtype=torch.int32)
    out = restore_blocks(host_library, shape, layout, tensors, {}, none, none, layout.config)
    assert out.shape == (0, 3, 64, 64)
    assert out.dtype == torch.float16


class Call:
    """Arguments of the C function for one stream, any of which a test may spoil."""

    def __init__(self, library: KernelLibrary, name: str, index: int) -> None:
        self.library = library
        config, plan = CONFIGS["64"], all_plans(CONFIGS["64"])[name]
        layout = plan_layout(plan, config)[index]
        self.tensors = {layout.pools[k].name: x for k, x in stored(plan, layout, torch.float32).items()}
        self.maps = device_maps(read_maps(layout, stream_matrices(plan.matrices, layout.index), 0), "cpu")
        self.shape = StreamShape(library, layout)
        self.view = stream_view(self.shape, layout, self.tensors, self.maps)
        self.out = torch.empty(3, 3, 64, 64)
        self.frequencies = torch.ones(32)
        self.workspace = torch.empty(library.size("restore_workspace", 0, self.shape.address, 3), dtype=torch.uint8)
        self.arguments: dict[str, object] = {
            "type": 0,
            "view": ctypes.byref(self.view),
            "blocks": BLOCKS.data_ptr(),
            "block_index": BLOCK_INDEX.data_ptr(),
            "count": 3,
            "frequencies": self.frequencies.data_ptr(),
            "out": self.out.data_ptr(),
            "workspace": self.workspace.data_ptr(),
            "size": len(self.workspace),
            "stream": 0,
        }

    def __call__(self, **spoiled: object) -> None:
        self.library.call("restore_blocks", *(self.arguments | spoiled).values())


@pytest.mark.parametrize("left_out", [[1], [0, 2], [0, 1], [0, 1, 2]])
@pytest.mark.parametrize(("name", "index"), [("keys before RoPE", 1), ("kivi4", 0), ("hadamard4", -1), ("g3", 0)])
def test_negative_blocks_are_left_out(host_library: KernelLibrary, name: str, index: int, left_out: list[int]) -> None:
    call = Call(host_library, name, index)
    call()
    whole, some = call.out.clone(), BLOCKS.clone()
    some[left_out] = -1
    call.out.fill_(7.0)
    call(blocks=some.data_ptr())
    whole[left_out] = 7.0
    assert torch.equal(call.out, whole)


def test_arguments_are_checked(host_library: KernelLibrary) -> None:
    call = Call(host_library, "keys before RoPE", 1)
    call()
    for spoiled, message in (
        ({"type": 5}, "type 5 is not supported"),
        ({"view": None}, "shape is null"),
        ({"blocks": None}, "blocks is null"),
        ({"block_index": None}, "block_index is null"),
        ({"frequencies": None}, "inverse_frequencies is null"),
        ({"count": -2}, "count of at least 0, got -2"),
        ({"out": None}, "out is null"),
        ({"out": call.out.data_ptr() + 8}, "out is not aligned to 16 bytes"),
        ({"workspace": None}, "workspace is null"),
        ({"workspace": call.workspace.data_ptr() + 8}, "workspace is not aligned to 16 bytes"),
        ({"size": len(call.workspace) - 1}, f"workspace_bytes: expected at least {len(call.workspace)}, got"),
    ):
        with pytest.raises(KernelError, match=f"restore_blocks: .*{message}"):
            call(**spoiled)
    call.view.maps.map_heads = 2
    with pytest.raises(KernelError, match=r"maps.map_heads: expected 1 or 3, got 2"):
        call()


@pytest.mark.parametrize(
    ("name", "index", "struct", "field"),
    [
        ("minicache4", -1, "pools", "codes"),
        ("minicache4", -1, "pools", "norms"),
        ("minicache4", -1, "pools", "exact"),
        ("mixed", 0, "pools", "latent"),
        ("three layers with residuals", 0, "pools", "residual"),
        ("aligned, matched, threshold", 0, "maps", "map"),
        ("aligned, matched, threshold", 0, "maps", "slots"),
        ("aligned, matched, threshold", 1, "maps", "residual_map"),
        ("pair KLT", 0, "maps", "offset"),
    ],
)
def test_missing_pools_and_maps_are_named(
    host_library: KernelLibrary, name: str, index: int, struct: str, field: str
) -> None:
    call = Call(host_library, name, index)
    call()
    setattr(getattr(call.view, struct), field, None)
    with pytest.raises(KernelError, match=f"{struct}.{field} is null"):
        call()
