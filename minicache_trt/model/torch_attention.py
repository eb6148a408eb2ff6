"""`PagedAttention` in PyTorch: the specification the ONNX function and the kernels are held to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from minicache_trt.compression.codec import restore_blocks
from minicache_trt.compression.plan import CompressionPlan
from minicache_trt.compression.stream_constants import StreamConstants
from minicache_trt.config import BLOCK_SIZE, ModelConfig
from minicache_trt.contract import StreamLayout, plan_layout
from minicache_trt.runtime.batch import Batch


@dataclass(frozen=True)
class Pools:
    """Cache pools as tensors, keyed by the contract's names (``kv.<layer>``, ``stream.<index>.<kind>``), and each
    stream's constants."""

    config: ModelConfig
    plan: CompressionPlan
    layouts: tuple[StreamLayout, ...]
    constants: tuple[StreamConstants, ...]
    tensors: dict[str, Tensor]

    @classmethod
    def of(cls, config: ModelConfig, plan: CompressionPlan, tensors: dict[str, Tensor]) -> Pools:
        device = next(iter(tensors.values())).device if tensors else torch.device("cpu")
        constants = tuple(StreamConstants.of(plan, index, device) for index in range(len(plan.streams)))
        return cls(config, plan, plan_layout(plan, config), constants, tensors)

    def append(self, layer: int, k: Tensor, v: Tensor, slot_mapping: Tensor) -> None:
        """Write ``k, v [T, H*D]`` into their slots; a number that is not finite is written as zero."""
        kv = self.tensors[f"kv.{layer}"]
        new = torch.stack([k, v], 1).view(len(k), 2, self.config.num_kv_heads, self.config.head_dim).to(kv.dtype)
        kv[slot_mapping // BLOCK_SIZE, :, :, slot_mapping % BLOCK_SIZE] = torch.where(new.isfinite(), new, 0)

    def history(self, part: str, layer: int, blocks: Tensor) -> Tensor:
        """Restored ``[H, len(blocks) * B, D]`` of one layer, float32; ``blocks`` are a sequence's, from its start."""
        index, member = self.plan.find(part, layer)
        layout = self.layouts[index]
        fields = {kind: self.tensors[pool.name][blocks] for kind, pool in layout.pools.items()}
        block_index = torch.arange(len(blocks), device=blocks.device)
        restored = restore_blocks(layout, fields, member, block_index, self.constants[index])
        return restored.transpose(0, 1).flatten(1, 2)

    def recent(self, place: int, layer: int, blocks: Tensor) -> Tensor:
        """Keys (``place`` 0) or values (1) of full-tier blocks, ``[H, len(blocks) * B, D]`` float32."""
        return self.tensors[f"kv.{layer}"][blocks, place].float().transpose(0, 1).flatten(1, 2)


def paged_attention(pools: Pools, batch: Batch, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
    """Append, then attend over both tiers, sequence by sequence.

    Parameters
    ----------
    pools : Pools
        Changed in place: slots of the batch's tokens.
    batch : Batch
    q : Tensor
        ``[T, Hq*D]`` after RoPE.
    k, v : Tensor
        ``[T, H*D]``, keys after RoPE.
    layer : int

    Returns
    -------
    Tensor
        ``[T, Hq*D]``.
    """
    config = pools.config.at_layer(layer)
    device = q.device
    pools.append(layer, k, v, torch.from_numpy(batch.slot_mapping).long().to(device))
    out = torch.empty_like(q)
    for s in range(len(batch.context_len)):
        rows = slice(int(batch.query_start[s]), int(batch.query_start[s + 1]))
        length, compressed = int(batch.context_len[s]), int(batch.compressed_len[s])
        full_blocks = -(-(length - compressed) // BLOCK_SIZE)
        full = torch.from_numpy(batch.full_table[s, :full_blocks]).long().to(device)
        blocks = torch.from_numpy(batch.compressed_table[s, : compressed // BLOCK_SIZE]).long().to(device)
        tiers = []
        for place, part in enumerate(("key", "value")):
            recent = pools.recent(place, layer, full)[:, : length - compressed]
            tiers.append(torch.cat([pools.history(part, layer, blocks), recent], 1) if compressed else recent)
        count = rows.stop - rows.start
        queries = q[rows].float().view(count, config.num_heads, config.head_dim).transpose(0, 1)
        position = torch.arange(length - count, length, device=device)[:, None]
        visible = torch.arange(length, device=device) <= position
        if config.sliding_window is not None:
            visible &= torch.arange(length, device=device) > position - config.sliding_window
        keys, values = (tier.repeat_interleave(config.group_size, 0) for tier in tiers)
        logits = queries @ keys.transpose(1, 2) * config.attention_scale
        if config.attention_softcap is not None:
            logits = torch.tanh(logits / config.attention_softcap) * config.attention_softcap
        weights = logits.masked_fill(~visible, -torch.inf).softmax(-1)
        out[rows] = (weights @ values).transpose(0, 1).flatten(1).to(q.dtype)
    return out
