"""The two-tier cache with the plugins of a library in place of direct calls of the kernels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from minicache_trt.compression.plan import CompressionPlan
from minicache_trt.config import ModelConfig
from minicache_trt.contract import compressed_pools, full_pools
from minicache_trt.kernels.cache import KernelCache
from minicache_trt.kernels.library import KernelLibrary, device_maps, stream_of
from minicache_trt.kernels.steps import StepInputs
from tests.support.plugin_harness import RUNTIME, Harness, Plugin, TensorStruct, described
from tests.support.plugin_nodes import Node, Nodes

GUARD = 256
"""Bytes behind a workspace that must stay as they are."""
POISON = 0xFF
"""Every byte of a workspace before a call: not a number in any floating-point type."""


@dataclass(frozen=True)
class Bounds:
    """Largest extents an engine is built for."""

    tokens: int = 512
    sequences: int = 8
    full_columns: int = 16
    compressed_columns: int = 16
    blocks: int = 16

    def extents(self, name: str, own: tuple[int, ...]) -> tuple[int, ...]:
        """Of a node's input with extents ``own``; each is a bound for itself, as profiles have them."""
        t, s = self.tokens, self.sequences
        bounds = {
            "q": (t, own[-1]),
            "k": (t, own[-1]),
            "v": (t, own[-1]),
            "query_start": (s + 1,),
            "context_len": (s,),
            "compressed_len": (s,),
            "slot_mapping": (t,),
            "full_table": (s, self.full_columns),
            "compressed_table": (s, self.compressed_columns),
            "decode_rows": (s,),
            "prefill_rows": (s, t),
            "source_blocks": (self.blocks,),
            "target_blocks": (self.blocks,),
            "block_index": (self.blocks,),
        }
        result = bounds.get(name, own)
        assert all(a >= b for a, b in zip(result, own, strict=True)), f"{name}: {own} is more than {result}"
        return result


class BuiltNode:
    """A node that went through an engine's life: configured, its fields kept, made again, attached to a context.

    Parameters
    ----------
    harness : Harness
    node : Node
    bounds : Bounds
    inputs, outputs : sequence of Tensor
        Of one call; others may be as large as ``bounds``.
    """

    def __init__(
        self, harness: Harness, node: Node, bounds: Bounds, inputs: list[Tensor], outputs: list[Tensor]
    ) -> None:
        self.node, self.bounds = node, bounds
        builder = harness.create(node.op, node.fields).clone()
        largest = self._largest(inputs)
        results = [described(x) for x in outputs]
        for place in range(len(inputs) + len(outputs)):
            assert builder.supports(place, largest, results), (node.name, place)
        aliased = [(x, inputs[place]) for x, place in zip(outputs, builder.aliases(), strict=True) if place >= 0]
        assert all(x.data_ptr() == source.data_ptr() for x, source in aliased)
        builder.configure(largest, results)
        self.workspace_bytes = builder.workspace(largest, results)
        before = [x.clone() for x in outputs]
        builder.enqueue([described(x) for x in inputs], results, None)
        assert "an engine is being built, and nothing is computed" in harness.messages()
        same = zip(before, outputs, strict=True)
        assert all(torch.equal(a.view(torch.int8), b.view(torch.int8)) for a, b in same), "changed while building"
        kept = harness.create(node.op, builder.fields(), RUNTIME)
        self.plugin: Plugin = kept.attach()
        self._workspace = torch.empty(self.workspace_bytes + GUARD, dtype=torch.uint8, device=outputs[0].device)

    def __call__(self, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        """Run on PyTorch's current stream."""
        self._largest(inputs)
        given, results = [described(x) for x in inputs], [described(x) for x in outputs]
        self._workspace.fill_(POISON)
        self.plugin.shape_change(given, results)
        self.plugin.enqueue(given, results, self._workspace.data_ptr(), stream_of(outputs[0]))
        if outputs[0].device.type == "cpu":
            assert (self._workspace[self.workspace_bytes :] == POISON).all(), "written behind the workspace"

    def _largest(self, inputs: list[Tensor]) -> list[TensorStruct]:
        named = zip(self.node.inputs, inputs, strict=True)
        return [described(x, self.bounds.extents(name, tuple(x.shape))) for name, x in named]


class PluginCache(KernelCache):
    """`KernelCache` whose two custom ops are the nodes of graphs, run by plugins.

    Parameters
    ----------
    harness : Harness
    nodes : Nodes
    library, config, plan, device, dtype
        As of `KernelCache`, which still restores.
    bounds : Bounds
    """

    def __init__(
        self,
        harness: Harness,
        nodes: Nodes,
        library: KernelLibrary,
        config: ModelConfig,
        plan: CompressionPlan,
        device: torch.device,
        dtype: torch.dtype,
        bounds: Bounds = Bounds(),
    ) -> None:
        super().__init__(library, config, plan, device, dtype)
        self._harness, self._nodes, self._bounds = harness, nodes, bounds
        self._constants = device_maps(nodes.constants, device)
        self.built: dict[str, BuiltNode] = {}
        self._unread: dict[tuple[int, ...], Tensor] = {}
        self.calls: dict[str, int] = {"PagedAttention": 0, "CompressBlocks": 0}

    def attend(self, step: StepInputs, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        node, out = self._nodes.attention[layer], torch.full_like(q, torch.nan)
        self._run(node, self.roles(step, q, k, v), [out, self.tensors[f"kv.{layer}"]])
        return out

    def roles(self, step: StepInputs, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
        """What a layer's node takes of a step, by what it is to the node."""
        shape = step.shape
        counts = {
            "decode_rows": self._not_read((shape.decodes,)),
            "prefill_rows": self._not_read((shape.sequences - shape.decodes, shape.longest_chunk)),
            "full_work": self._not_read((3,)),
            "compressed_work": self._not_read((5,)),
            "prefill_past": self._not_read((2,)),
        }
        return {"q": q.contiguous(), "k": k.contiguous(), "v": v.contiguous(), **step.tensors, **counts}

    def compress_stream(self, stream: int, source: Tensor, target: Tensor, block_index: Tensor) -> None:
        node = self._nodes.compression[stream]
        roles = {"source_blocks": source, "target_blocks": target, "block_index": block_index}
        self._run(node, roles, [self.tensors[name.removesuffix(".out")] for name in node.outputs])

    def inputs(self, node: Node, roles: Mapping[str, Tensor]) -> list[Tensor]:
        """A node's inputs: by what they are to it, else by their name in the graph."""
        graph = self.tensors | self._constants
        return [roles[name] if name in roles else graph[tensor] for name, tensor in node.inputs.items()]

    def _run(self, node: Node, roles: Mapping[str, Tensor], outputs: list[Tensor]) -> None:
        inputs = self.inputs(node, roles)
        if node.name not in self.built:
            self.built[node.name] = BuiltNode(self._harness, node, self._bounds, inputs, outputs)
        self.built[node.name](inputs, outputs)
        self.calls[node.op] += 1

    def _not_read(self, shape: tuple[int, ...]) -> Tensor:
        """Tensors of which plugins take the extents alone."""
        if shape not in self._unread:
            self._unread[shape] = torch.full(shape, -77, dtype=torch.int32, device=self.device)
        return self._unread[shape]


def largest_inputs(
    nodes: Nodes, node: Node, plan: CompressionPlan, config: ModelConfig, bounds: Bounds, dtype: torch.dtype
) -> list[TensorStruct]:
    """An attention node's inputs with their largest extents and no memory."""
    types = {"model": dtype, "int8": torch.int8, "float16": torch.float16}
    pools = {pool.name: pool for pool in (*full_pools(config), *compressed_pools(plan, config))}
    width = {"q": config.num_heads, "k": config.num_kv_heads, "v": config.num_kv_heads}
    result = []
    for name, tensor in node.inputs.items():
        if tensor in nodes.constants:
            result.append(described(torch.from_numpy(nodes.constants[tensor])))
        elif tensor in pools:
            pool = pools[tensor]
            result.append(described(torch.empty(0, dtype=types[pool.dtype]), (1, *pool.shape)))
        elif name in width:
            extents = bounds.extents(name, (0, width[name] * config.head_dim))
            result.append(described(torch.empty(0, dtype=dtype), extents))
        else:
            rank = 2 if name in ("full_table", "compressed_table", "prefill_rows") else 1
            result.append(described(torch.empty(0, dtype=torch.int32), bounds.extents(name, (0,) * rank)))
    return result
