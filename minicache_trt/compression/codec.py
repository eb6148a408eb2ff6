"""`CompressBlocks` in PyTorch: the specification the ONNX function and the kernels are held to.

A block's fields are tensors with the shapes of `minicache_trt.contract.StreamLayout`, with the number of blocks N in
front, keyed by the pool's kind (``latent``, ``codes``, ``params``, ``norms``, ``exact``, ``retained_index``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from minicache_trt.compression.merge import merge_group, retained_tokens
from minicache_trt.compression.quantize import dequantize, pack, quantize, saturate_float16, unpack
from minicache_trt.compression.segment import MODEL
from minicache_trt.contract import StreamLayout

Fields = dict[str, Tensor]


def compress_blocks(layout: StreamLayout, x: Tensor, block_index: Tensor) -> Fields:
    """Compress full blocks of one stream.

    Parameters
    ----------
    layout : StreamLayout
    x : Tensor
        ``[m, N, H, B, D]``: the stream's keys or values, one entry per layer of the group, compute type.
    block_index : Tensor
        ``[N]`` integer, the block's number within its sequence (block 0 holds the sinks).

    Returns
    -------
    dict of Tensor
        A tensor ``[N, *shape]`` for every pool of the layout.
    """
    stream = layout.stream
    _, blocks, heads, block_size, _ = x.shape
    latent, norms, score = merge_group(stream, x.float())
    fields: Fields = {}
    retained = torch.zeros(blocks, 1, block_size, dtype=torch.bool, device=x.device)
    if stream.retained:
        assert score is not None
        index = retained_tokens(stream, score, block_index)
        retained = torch.zeros_like(score, dtype=torch.bool).scatter_(-1, index, True)
        fields["retained_index"] = index.to(torch.int8)
        gather = index.expand(-1, heads, -1)[None, ..., None].expand(x.shape[0], -1, -1, -1, x.shape[-1])
        fields["exact"] = x.gather(3, gather).transpose(0, 1)
    if norms is not None:
        fields["norms"] = saturate_float16(norms)
    latents: list[Tensor] = []
    codes: list[Tensor] = []
    params: list[Tensor] = []
    for part in layout.segments:
        segment = part.segment
        y = latent[..., part.component : part.component + segment.length]
        if segment.kind == MODEL:
            latents.append(y.to(x.dtype))
            continue
        code, scale, minimum = quantize(segment, y, retained)
        codes.append(pack(code, segment.bits))
        params += [scale, minimum]
    for kind, parts in (("latent", latents), ("codes", codes), ("params", params)):
        if parts:
            fields[kind] = torch.cat(parts, dim=-1)
    return fields


def restore_latent(layout: StreamLayout, fields: Fields) -> Tensor:
    """Dequantized latent vectors ``[N, H, B, rank]`` in float32."""
    parts = []
    for part in layout.segments:
        segment = part.segment
        if segment.kind == MODEL:
            parts.append(fields["latent"][..., part.storage : part.storage + segment.length].float())
            continue
        stored = fields["codes"][..., part.storage : part.storage + segment.length * segment.bits // 8]
        count = part.minimum - part.scale
        scale = fields["params"][..., part.scale : part.scale + count]
        minimum = fields["params"][..., part.minimum : part.minimum + count]
        parts.append(dequantize(segment, unpack(stored, segment.bits), scale, minimum))
    return torch.cat(parts, dim=-1)


def restore_blocks(layout: StreamLayout, fields: Fields, member: int) -> Tensor:
    """Keys or values ``[N, H, B, D]`` of the group's layer number ``member``, float32, retained tokens exact."""
    stream = layout.stream
    x = restore_latent(layout, fields)
    if "norms" in fields:
        x = x * fields["norms"][:, member].float().unsqueeze(-1)
    if stream.retained:
        index = fields["retained_index"].long()
        used = index >= 0
        exact = fields["exact"][:, member].float()
        offset = torch.arange(x.shape[2], device=x.device)
        chosen = ((index.unsqueeze(-1) == offset) & used.unsqueeze(-1)).expand(-1, x.shape[1], -1, -1).float()
        x = torch.where(chosen.amax(2).unsqueeze(-1) > 0, chosen.transpose(-1, -2) @ exact, x)
    return x
