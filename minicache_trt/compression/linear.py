"""Linear merges in PyTorch: the calibrated joint KLT of a group of layers, and any other pair of matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from minicache_trt.compression.constants import FIRST_SCORE
from minicache_trt.compression.segment import DROPPED
from minicache_trt.compression.stream import Stream
from minicache_trt.compression.stream_constants import StreamConstants


def encode(x: Tensor, constants: StreamConstants) -> Tensor:
    """``([x_1 .. x_m] - mean) encode`` per slot: ``[m, N, H, B, D]`` to ``[N, H, B, r]``."""
    assert constants.mean is not None and constants.encode is not None
    return (_side_by_side(x) - constants.mean[:, None]) @ constants.encode


def decode(y: Tensor, member: int, dim: int, constants: StreamConstants) -> Tensor:
    """The part of ``y decode + mean`` that is layer ``member``: ``[N, H, B, r]`` to ``[N, H, B, D]``."""
    assert constants.mean is not None and constants.decode is not None
    own = slice(member * dim, (member + 1) * dim)
    return y @ constants.decode[..., own] + constants.mean[:, None, own]


def relative_error(stream: Stream, x: Tensor, y: Tensor, constants: StreamConstants) -> Tensor:
    """Retention score ``[N, Hn, B]``: how much of ``x`` is lost before quantization, dropped segments included.

    ``|X - X~| / |X|`` with ``X`` the group's vectors side by side (all heads of them for ``norm="token"``), at most
    `FIRST_SCORE`; 0 where ``X`` is zero.
    """
    assert constants.mean is not None and constants.decode is not None
    kept = torch.cat([torch.full((s.length,), float(s.kind != DROPPED), device=y.device) for s in stream.segments])
    whole = _side_by_side(x)
    restored = (y * kept) @ constants.decode + constants.mean[:, None]
    lost, size = ((whole - restored).square().sum(-1), whole.square().sum(-1))
    if stream.norm == "token":
        lost, size = lost.sum(1, keepdim=True), size.sum(1, keepdim=True)
    lost, size = lost.sqrt(), size.sqrt()
    ratio = lost / torch.where(size > 0, size, torch.ones_like(size))
    return torch.where(size > 0, ratio.clamp(max=FIRST_SCORE), torch.zeros_like(ratio))


def _side_by_side(x: Tensor) -> Tensor:
    """``[m, N, H, B, D]`` as ``[N, H, B, m * D]``."""
    return torch.cat(x.unbind(0), -1)
