"""Tokens a block keeps exactly: which ones, how they are stored, and how readers put them back, in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from minicache_trt.compression.constants import FIRST_SCORE
from minicache_trt.compression.quantize import load, store
from minicache_trt.compression.segment import MODEL
from minicache_trt.compression.stream import Stream
from minicache_trt.contract import BYTE_OFFSET, StreamLayout


def retained_tokens(stream: Stream, score: Tensor, block_index: Tensor) -> Tensor:
    """Offsets of the tokens a block keeps exactly.

    Parameters
    ----------
    stream : Stream
    score : Tensor
        ``[N, Hn, B]``, distances; angles of `FIRST_SCORE` or more have no meaning.
    block_index : Tensor
        ``[N]``; in block 0 of a sequence the sink tokens come before all others.

    Returns
    -------
    Tensor
        ``[N, Hn, R]`` int64, ascending; unused slots hold -1 and come last. Ties go to the lower position.
    """
    block_size = score.shape[-1]
    sink = (block_index[:, None, None] == 0) & (torch.arange(block_size, device=score.device) < stream.sink_tokens)
    rank = -score if stream.retention == "paper_literal" else score
    rank = rank + 2 * FIRST_SCORE * sink
    if stream.retention != "topk":
        rank = rank.masked_fill(~(_candidates(stream, score) | sink), -torch.inf)
    ranked, index = torch.sort(rank, dim=-1, descending=True, stable=True)
    index = index[..., : stream.retained]
    if stream.retention == "topk":
        return index.sort(dim=-1).values
    unused = ranked[..., : stream.retained] == -torch.inf
    ordered = index.masked_fill(unused, block_size).sort(dim=-1).values
    return ordered.masked_fill(ordered == block_size, -1)


def _candidates(stream: Stream, score: Tensor) -> Tensor:
    """Where a threshold rule would keep a token, ``[N, Hn, B]`` bool; the range is that of the meaningful scores."""
    meaningful = score < (torch.inf if stream.merge == "linear" else FIRST_SCORE)
    high = score.masked_fill(~meaningful, -torch.inf).amax(-1, keepdim=True)
    low = score.masked_fill(~meaningful, torch.inf).amin(-1, keepdim=True)
    share = (high - low) * stream.gamma
    if stream.retention == "threshold":
        return (score > high - share) | ~meaningful
    return (score < low + share) & meaningful


def retained_mask(index: Tensor, block_size: int) -> Tensor:
    """Offsets ``[N, Hn, R]`` as ``[N, Hn, B]`` bool."""
    return (index.unsqueeze(-1) == torch.arange(block_size, device=index.device)).any(2)


def store_exact(layout: StreamLayout, x: Tensor, index: Tensor) -> dict[str, Tensor]:
    """Fields of the retained vectors of ``x [m, N, H, B, D]`` (compute type, heads in slots); unused slots are zero."""
    members, _, heads, _, dim = x.shape
    used = (index >= 0).expand(-1, heads, -1)[None, ..., None]
    place = index.clamp(min=0).expand(-1, heads, -1)[None, ..., None].expand(members, -1, -1, -1, dim)
    exact = x.gather(3, place).masked_fill(~used, 0).transpose(0, 1)
    fields = {"retained_index": index.to(torch.int8)}
    if layout.exact.kind == MODEL:
        return fields | {"exact": exact}
    codes, ranges = store(layout.exact, exact.float())
    empty = ~used.transpose(0, 1)
    ranges = ranges.masked_fill(empty.squeeze(-1).repeat(1, 1, 1, ranges.shape[-1] // index.shape[-1]), 0)
    return fields | {"exact": codes.masked_fill(empty, -BYTE_OFFSET), "exact_params": ranges}


def put_exact(layout: StreamLayout, fields: dict[str, Tensor], member: int, x: Tensor) -> Tensor:
    """Restored vectors ``[N, H, B, D]`` (heads in slots) with the retained ones in their places, float32."""
    index = fields["retained_index"].long()
    stored = fields["exact"][:, member]
    exact = (
        stored.float() if layout.exact.kind == MODEL else load(layout.exact, stored, fields["exact_params"][:, member])
    )
    chosen = index.unsqueeze(-1) == torch.arange(x.shape[2], device=x.device)
    rows = chosen.expand(-1, x.shape[1], -1, -1).float().transpose(-1, -2) @ exact
    return torch.where(chosen.any(2).unsqueeze(-1), rows, x)
