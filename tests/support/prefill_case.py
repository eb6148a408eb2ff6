"""One step of prefill attention: pools, batch and queries, the kernel's answer and the twin's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from minicache_trt.compression.matrices import stream_matrices
from minicache_trt.compression.methods import make_plan
from minicache_trt.compression.plan import CompressionPlan
from minicache_trt.config import BLOCK_SIZE, ModelConfig
from minicache_trt.functions.stream_maps import read_maps
from minicache_trt.kernels.attention import StepTensors, attention_arguments
from minicache_trt.kernels.library import KernelLibrary, StreamShape, device_maps, stream_view
from minicache_trt.kernels.prefill import prefill_attention, prefill_workspace
from minicache_trt.kernels.structs import StreamView
from minicache_trt.model.rope import inverse_frequencies
from minicache_trt.model.torch_attention import Pools, paged_attention
from minicache_trt.runtime.batch import Batch
from tests.support.steps import random_pools, step


@dataclass(frozen=True)
class RoundedPools(Pools):
    """Restored history is rounded to the type of queries, as the kernel's workspace is.

    ``absolute``: values, of both tiers, without their sign.
    """

    absolute: bool = False

    def history(self, part: str, layer: int, blocks: Tensor) -> Tensor:
        restored = super().history(part, layer, blocks).to(self.tensors[f"kv.{layer}"].dtype).float()
        return restored.abs() if self.absolute and part == "value" else restored

    def recent(self, place: int, layer: int, blocks: Tensor) -> Tensor:
        recent = super().recent(place, layer, blocks)
        return recent.abs() if self.absolute and place == 1 else recent


@dataclass(frozen=True)
class PrefillCase:
    """A step over random pools, and what the kernel is told about it."""

    pools: RoundedPools
    batch: Batch
    q: Tensor
    layer: int = 1
    sliding_window: int = 0
    longest_chunk: int | None = None

    @classmethod
    def random(
        cls,
        config: ModelConfig,
        sequences: Sequence[tuple[int, int, int]],
        dtype: torch.dtype,
        plan: CompressionPlan | None = None,
        layer: int = 1,
    ) -> PrefillCase:
        torch.manual_seed(1)
        plan = plan or make_plan(config, "full")
        batch, pools = step(sequences), random_pools(config, plan, full_blocks=64)
        tensors = {name: x.to(dtype) if x.dtype == torch.float32 else x for name, x in pools.tensors.items()}
        rounded = RoundedPools(config, plan, pools.layouts, pools.constants, tensors)
        return cls(rounded, batch, torch.randn(batch.num_tokens, config.num_heads * config.head_dim).to(dtype), layer)

    @property
    def kv(self) -> Tensor:
        return self.pools.tensors[f"kv.{self.layer}"]

    def with_kv(self, kv: Tensor) -> PrefillCase:
        tensors = self.pools.tensors | {f"kv.{self.layer}": kv}
        return replace(self, pools=replace(self.pools, tensors=tensors))

    def with_poison(self) -> PrefillCase:
        """Not a number wherever no position of the step is, as memory outside the contract may hold it."""
        used = torch.zeros(self.kv.shape[0], BLOCK_SIZE, dtype=torch.bool)
        lengths = zip(self.batch.context_len.tolist(), self.batch.compressed_len.tolist(), strict=True)
        for s, (length, compressed) in enumerate(lengths):
            place = np.arange(length - compressed)
            used[torch.from_numpy(self.batch.full_table[s, place // BLOCK_SIZE]).long(), place % BLOCK_SIZE] = True
        return self.with_kv(torch.where(used[:, None, None, :, None], self.kv, torch.nan))

    def attend(self, library: KernelLibrary, workspace_bytes: int | None = None) -> Tensor:
        """Rows of the chunks."""
        out = torch.full(self.q.shape, 7.0, dtype=self.q.dtype)
        call = PrefillCall(library, self, out)
        size = prefill_workspace(library, call.arguments) if workspace_bytes is None else workspace_bytes
        workspace = torch.full((max(16, size),), 0xFF, dtype=torch.uint8)
        prefill_attention(library, call.arguments, workspace)
        decodes = len(self.batch.decode_rows)
        assert (out[:decodes] == 7.0).all(), "rows of decodes are not the kernel's"
        return out[decodes:]

    def expected(self) -> Tensor:
        """The twin's rows; it appends, so it is given the keys and values that are there already."""
        slots = torch.from_numpy(self.batch.slot_mapping).long()
        new = self.kv[slots // BLOCK_SIZE, :, :, slots % BLOCK_SIZE].flatten(2)
        out = paged_attention(self.pools, self.batch, self.q.float(), new[:, 0], new[:, 1], self.layer)
        return out[len(self.batch.decode_rows) :]

    def tolerance(self) -> Tensor:
        """Weights and results are rounded once each; what is restored, to 16 bits, comes from factors of binary16.

        Everything else is float32.
        """
        if self.q.dtype == torch.float32:
            return torch.full((), 2e-5)
        bits = {torch.float16: 11, torch.bfloat16: 8}[self.q.dtype]
        absolute = replace(self, pools=replace(self.pools, absolute=True)).expected()
        restored = 2.0**-10 * absolute if self.batch.compressed_len.any() else 0.0
        return 2e-5 + 2.0**-bits * (absolute + self.expected().abs()) + restored


class PrefillCall:
    """Pointers into a case's tensors; keeps alive what they point to."""

    def __init__(self, library: KernelLibrary, case: PrefillCase, out: Tensor) -> None:
        config, batch, plan = case.pools.config, case.batch, case.pools.plan
        streams = [self._stream(library, case, part) for part in ("key", "value")] if plan.compresses else []
        views = [view for *_, view in streams]
        chunks = (batch.query_start[1:] - batch.query_start[:-1])[len(batch.decode_rows) :]
        step = StepTensors(
            torch.from_numpy(batch.query_start),
            torch.from_numpy(batch.context_len),
            torch.from_numpy(batch.slot_mapping),
            torch.from_numpy(batch.full_table),
            torch.from_numpy(batch.compressed_len) if plan.compresses else None,
            torch.from_numpy(batch.compressed_table) if plan.compresses else None,
            len(batch.decode_rows),
            int(chunks.max(initial=0)) if case.longest_chunk is None else case.longest_chunk,
        )
        frequencies = inverse_frequencies(config.rope, config.head_dim)
        self.arguments = attention_arguments(
            config, step, case.kv, case.q, out, *views or (None, None), frequencies, case.sliding_window
        )
        self._alive = (case, out, streams, step, frequencies)

    @staticmethod
    def _stream(
        library: KernelLibrary, case: PrefillCase, part: str
    ) -> tuple[StreamShape, dict[str, Tensor], StreamView]:
        pools = case.pools
        index, member = pools.plan.find(part, case.layer)
        layout = pools.layouts[index]
        maps = device_maps(read_maps(layout, stream_matrices(pools.plan.matrices, index), member), "cpu")
        shape = StreamShape(library, layout, member)
        return shape, maps, stream_view(shape, layout, pools.tensors, maps)
