"""`compress_blocks` of the host build against the independent reference codec and the PyTorch twin."""

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
from minicache_trt.compression.stream import PARTS, Stream
from minicache_trt.compression.stream_constants import StreamConstants
from minicache_trt.config import ModelConfig
from minicache_trt.contract import StreamLayout, plan_layout, stream_layout
from minicache_trt.functions.stream_maps import read_maps, write_maps
from minicache_trt.kernels.codec import CompressStream
from minicache_trt.kernels.library import (
    KernelError,
    KernelLibrary,
    StreamShape,
    device_maps,
    stream_pools,
    write_maps_of,
)
from minicache_trt.model.rope import inverse_frequencies
from tests.support.agreement import assert_blocks_agree
from tests.support.matrices import random_matrices
from tests.support.plans import all_plans
from tests.support.strategies import streams

CONFIGS = {
    "80": ModelConfig("llama", 4, 64, 64, 6, 2, 80, 100, 4096),
    "128": ModelConfig("llama", 4, 64, 64, 2, 2, 128, 100, 4096),
    "64": ModelConfig("llama", 4, 64, 64, 6, 3, 64, 100, 4096),
}
TYPES = {"80": torch.float32, "128": torch.float16, "64": torch.float16}
SMALL = ModelConfig("llama", 4, 64, 64, 4, 2, 48, 100, 4096)
SMALL_WIDE = ModelConfig("llama", 4, 64, 64, 2, 2, 64, 100, 4096)
BLOCKS = ([3, 1, 5], [2, 4, 1], [0, 9, 0])
POISON = 77


def compressor(library: KernelLibrary, plan: CompressionPlan, layout: StreamLayout) -> CompressStream:
    matrices = stream_matrices(plan.matrices, layout.index)
    readers = [read_maps(layout, matrices, member) for member in range(len(layout.stream.layers))]
    return CompressStream(library, layout, write_maps(layout, matrices), readers, layout.config)


def group(layout: StreamLayout, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """Full tiers of the stream's layers, partly alike, one vector of the last layer zero."""
    config, generator = layout.config, torch.Generator().manual_seed(seed)
    shape = (7, 2, config.num_kv_heads, 64, config.head_dim)
    common = torch.randn(shape, generator=generator)
    kv = [(common + 0.5 * torch.randn(shape, generator=generator)).to(dtype) for _ in layout.stream.layers]
    kv[-1][1, :, 0, 7] = 0.0
    return kv


def poisoned(layout: StreamLayout, dtype: torch.dtype) -> dict[str, Tensor]:
    types = {"model": dtype, "int8": torch.int8, "float16": torch.float16}
    return {pool.name: torch.full((6, *pool.shape), POISON, dtype=types[pool.dtype]) for pool in layout.pools.values()}


def compressed(
    library: KernelLibrary, plan: CompressionPlan, layout: StreamLayout, kv: list[Tensor]
) -> dict[str, Tensor]:
    """Pools after compressing `BLOCKS`; no other block may have changed."""
    pools = poisoned(layout, kv[0].dtype)
    source, target, number = (torch.tensor(x, dtype=torch.int32) for x in BLOCKS)
    compressor(library, plan, layout)(kv, pools, source, target, number)
    for pool in pools.values():
        assert (pool[[0, 3, 5]] == POISON).all(), "a block that is not a target was written"
    return pools


def check_stream(
    library: KernelLibrary,
    plan: CompressionPlan,
    layout: StreamLayout,
    kv: list[Tensor],
) -> None:
    pools = compressed(library, plan, layout, kv)
    source, target, number = BLOCKS
    fields = {kind: pools[pool.name][target] for kind, pool in layout.pools.items()}
    x = torch.stack([layer[source, PARTS.index(layout.stream.part)] for layer in kv])
    assert_blocks_agree(plan, layout, fields, x, torch.tensor(number), x.dtype)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", all_plans(CONFIGS["80"]))
def test_kernel_agrees_with_reference(host_library: KernelLibrary, name: str, config: str) -> None:
    plan = all_plans(CONFIGS[config])[name]
    seen: set[Stream] = set()
    for layout in plan_layout(plan, CONFIGS[config]):
        kind = replace(layout.stream, layers=tuple(range(len(layout.stream.layers))))
        if kind not in seen:
            check_stream(host_library, plan, layout, group(layout, TYPES[config]))
        seen.add(kind)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(stream=streams(SMALL), seed=st.integers(0, 2**20))
def test_kernel_stores_any_stream(host_library: KernelLibrary, stream: Stream, seed: int) -> None:
    plan = CompressionPlan("custom", (stream,))
    plan = replace(plan, matrices=random_matrices(plan, SMALL, seed))
    layout = stream_layout(0, stream, SMALL)
    check_stream(host_library, plan, layout, group(layout, torch.float32, seed))


@pytest.mark.parametrize("name", ["minicache4", "minicache-token", "mixed", "pair KLT", "mean of four", "fp8"])
def test_bfloat16_agrees_with_twin(host_library: KernelLibrary, name: str) -> None:
    plan = all_plans(CONFIGS["80"])[name]
    for layout in plan_layout(plan, CONFIGS["80"]):
        kv = group(layout, torch.bfloat16)
        pools = compressed(host_library, plan, layout, kv)
        source, target, number = BLOCKS
        x = torch.stack([layer[source, PARTS.index(layout.stream.part)] for layer in kv])
        expected = twin.compress_blocks(layout, x, torch.tensor(number), StreamConstants.of(plan, layout.index))
        for kind, pool in layout.pools.items():
            mine, theirs = pools[pool.name][target].float(), expected[kind].float()
            share = float((mine != theirs).float().mean())
            assert share <= 2e-3, (layout.stream, kind, share)
            if kind in ("latent", "params", "norms", "exact"):
                torch.testing.assert_close(mine, theirs, rtol=2.0**-7, atol=1e-4)


@pytest.mark.parametrize("dim", [16, 256])
def test_smallest_and_largest_heads(host_library: KernelLibrary, dim: int) -> None:
    config = ModelConfig("llama", 4, 64, 64, 2, 1, dim, 100, 4096)
    segments = (Segment(dim, "int4", transform="hadamard"),)
    options = {"retained": 3, "retained_format": "int8", "residual": "int2"}
    for part, basis, axis in (("key", "pre_rope", "channel"), ("value", "post_rope", "token")):
        own = tuple(replace(segment, axis=axis) for segment in segments)
        for members in (2, 8):
            layers = tuple(range(members))
            stream = Stream(part, layers, own, merge="slerp", basis=basis, **options)  # type: ignore[arg-type]
            layout = stream_layout(0, stream, replace(config, num_layers=members))
            check_stream(host_library, CompressionPlan("custom", (stream,)), layout, group(layout, torch.float16))


def degenerate(layout: StreamLayout) -> list[Tensor]:
    """Equal, opposite, zero, tiny and huge vectors, and blocks of one number."""
    kv = group(layout, torch.float32, 1)
    for layer, sign in zip(kv, (1.0, -1.0, 1.0), strict=False):
        layer[1, :, :, :8] = sign * kv[0][1, :, :, :8].abs()
        layer[1, :, :, 8:16] = kv[0][1, :, :, 8:16]
        layer[1, :, :, 16] = 0.0
        layer[1, :, :, 17] *= 1e-6
        layer[3, :, :, 18] *= 1e4
        layer[5] = 0.25
    return kv


@pytest.mark.parametrize("members", [2, 3])
@pytest.mark.parametrize("norm", ["head", "token"])
def test_vectors_without_a_direction(host_library: KernelLibrary, members: int, norm: str) -> None:
    layers = tuple(range(members))
    for fmt, axis in (("int8", "token"), ("int4", "channel"), ("fp8", "channel"), ("int2", "token")):
        segments = (Segment(SMALL.head_dim, fmt, axis),)
        for rule in ("topk", "threshold", "paper_literal"):
            stream = Stream("value", layers, segments, merge="slerp", norm=norm, retained=8, retention=rule, gamma=0.3)
            layout = stream_layout(0, stream, SMALL)
            check_stream(host_library, CompressionPlan("custom", (stream,)), layout, degenerate(layout))


def test_no_blocks_is_no_change(host_library: KernelLibrary) -> None:
    plan = all_plans(SMALL_WIDE)["minicache4"]
    layout = plan_layout(plan, SMALL_WIDE)[-1]
    pools, none = poisoned(layout, torch.float32), torch.zeros(0, dtype=torch.int32)
    compressor(host_library, plan, layout)(group(layout, torch.float32), pools, none, none, none)
    assert all((pool == POISON).all() for pool in pools.values())


class Call:
    """Arguments of the C function for one stream, any of which a test may spoil."""

    def __init__(self, library: KernelLibrary, name: str, index: int) -> None:
        self.library = library
        plan = all_plans(SMALL_WIDE)[name]
        self.layout = plan_layout(plan, SMALL_WIDE)[index]
        self.kv = group(self.layout, torch.float32)
        self.tensors = poisoned(self.layout, torch.float32)
        self.ids = [torch.tensor(x, dtype=torch.int32) for x in BLOCKS]
        self.shape = StreamShape(library, self.layout)
        matrices = stream_matrices(plan.matrices, self.layout.index)
        self.owned = device_maps(write_maps(self.layout, matrices), "cpu")
        members = range(len(self.layout.stream.layers))
        self.readers = [device_maps(read_maps(self.layout, matrices, member), "cpu") for member in members]
        self.workspace = torch.empty(1 << 22, dtype=torch.uint8)
        self.arguments: dict[str, object] = {
            "type": 0,
            "shape": self.shape.address,
            "layers": (ctypes.c_void_p * len(self.kv))(*(layer.data_ptr() for layer in self.kv)),
            "source": self.ids[0].data_ptr(),
            "target": self.ids[1].data_ptr(),
            "block_index": self.ids[2].data_ptr(),
            "count": 3,
            "pools": stream_pools(self.layout, self.tensors),
            "maps": write_maps_of(self.owned, self.readers),
            "frequencies": inverse_frequencies(SMALL_WIDE.rope, SMALL_WIDE.head_dim),
            "workspace": self.workspace.data_ptr(),
            "workspace_bytes": len(self.workspace),
            "stream": 0,
        }

    def __call__(self, **spoiled: object) -> None:
        def plain(x: object) -> object:
            if isinstance(x, ctypes.Structure):
                return ctypes.byref(x)
            return x.data_ptr() if isinstance(x, Tensor) else x

        self.library.call("compress_blocks", *(plain(x) for x in (self.arguments | spoiled).values()))


def test_arguments_are_checked(host_library: KernelLibrary) -> None:
    call = Call(host_library, "three layers, dropped segment, retention", 0)
    call()
    for spoiled, message in (
        ({"shape": None}, "shape is null"),
        ({"layers": None}, "layers is null"),
        ({"source": None}, "source_blocks is null"),
        ({"target": None}, "target_blocks is null"),
        ({"block_index": None}, "block_index is null"),
        ({"count": -1}, "count of at least 0, got -1"),
        ({"pools": None}, "pools is null"),
        ({"maps": None}, "maps.encode is null"),
        ({"workspace": None}, "workspace is null"),
        ({"workspace": call.workspace.data_ptr() + 4}, "workspace is not aligned to 16 bytes"),
        ({"workspace_bytes": 16}, "expected a workspace of at least"),
        ({"type": 9}, "type 9 is not supported"),
    ):
        with pytest.raises(KernelError, match=f"compress_blocks: .*{message}"):
            call(**spoiled)
    layers = call.arguments["layers"]
    layers[1] += 2  # type: ignore[index]
    with pytest.raises(KernelError, match=r"layers\[i\] is not aligned"):
        call()


def test_workspace_is_as_large_as_said_and_maps_may_be_absent(host_library: KernelLibrary) -> None:
    for name, index in (("pair KLT", 1), ("mean of four", 0), ("minicache-token", 2), ("minicache4", -1)):
        call = Call(host_library, name, index)
        size = host_library.size("compress_workspace", 0, call.shape.address, 3)
        call.workspace.fill_(POISON)
        call(workspace_bytes=size)
        assert (call.workspace[size:] == POISON).all()
        assert (size > 0) == (name != "minicache4")
        if size > 0:
            with pytest.raises(KernelError, match=f"at least {size} bytes, got {size - 1}"):
                call(workspace_bytes=size - 1)
        else:
            call(maps=None, workspace=None, frequencies=None)


@pytest.mark.parametrize(
    ("name", "index", "struct", "field"),
    [
        ("minicache4", -1, "pools", "codes"),
        ("minicache4", -1, "pools", "params"),
        ("minicache4", -1, "pools", "norms"),
        ("minicache4", -1, "pools", "exact"),
        ("minicache4", -1, "pools", "retained_index"),
        ("three layers with residuals", 0, "pools", "residual"),
        ("three layers with residuals", 0, "pools", "residual_params"),
        ("mixed", 0, "pools", "latent"),
        ("aligned, matched, threshold", 0, "pools", "exact_params"),
        ("aligned, matched, threshold", 0, "maps", "align"),
        ("aligned, matched, threshold", 0, "maps", "heads"),
        ("pair KLT", 1, "maps", "encode"),
        ("pair KLT", 1, "maps", "bias"),
    ],
)
def test_missing_pools_and_maps_are_named(
    host_library: KernelLibrary, name: str, index: int, struct: str, field: str
) -> None:
    call = Call(host_library, name, index)
    call()
    setattr(call.arguments[struct], field, None)
    with pytest.raises(KernelError, match=f"{struct}.{field} is null"):
        call()


def test_missing_frequencies_and_reading_maps_are_named(host_library: KernelLibrary) -> None:
    call = Call(host_library, "keys before RoPE", 1)
    with pytest.raises(KernelError, match="inverse_frequencies is null"):
        call(frequencies=None)
    maps = call.arguments["maps"]
    maps.offset[1] = None  # type: ignore[attr-defined]
    with pytest.raises(KernelError, match=r"maps.offset is null"):
        call()
    maps.map[1] = None  # type: ignore[attr-defined]
    with pytest.raises(KernelError, match=r"maps.map is null"):
        call()
