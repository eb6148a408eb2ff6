"""Whether an implementation's stored blocks agree with the independent reference, up to ties.

Every code and every retained index that differs must lie within `TOLERANCE` of its decision boundary: codes are
recomputed from the reference's latent vectors and the implementation's own stored ranges, so that a scale rounded to
the neighbouring float16 does not excuse a wrong code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minicache_trt.compression.quantize import unpack
from minicache_trt.contract import StreamLayout
from minicache_trt.reference.codec import EncodedBlocks

TOLERANCE = 1e-3


def assert_blocks_agree(
    layout: StreamLayout, fields: dict[str, Tensor], expected: EncodedBlocks, latent_tolerance: float = 2e-6
) -> int:
    """Check the fields of N blocks and return how many codes differ from the reference's own."""
    stream = layout.stream
    assert set(fields) == set(layout.pools)
    agreed = torch.ones(expected.latent.shape[:3], dtype=torch.bool)
    if stream.retained:
        agreed = _check_retained(fields, expected)
    if "norms" in fields:
        assert expected.norms is not None
        _check_float16(fields["norms"], expected.norms.float())
    differing = 0
    for part in layout.segments:
        segment = part.segment
        y = expected.latent[..., part.component : part.component + segment.length]
        if segment.bits is None:
            stored = fields["latent"][..., part.storage : part.storage + segment.length].float()
            torch.testing.assert_close(stored, y, rtol=latent_tolerance, atol=latent_tolerance)
            continue
        reference = next(item for item in expected.segments if item.start == part.component)
        assert reference.codes is not None and reference.scale is not None and reference.minimum is not None
        count = part.minimum - part.scale
        scale = fields["params"][..., part.scale : part.scale + count]
        minimum = fields["params"][..., part.minimum : part.minimum + count]
        packed = fields["codes"][..., part.storage : part.storage + segment.length * segment.bits // 8]
        codes = unpack(packed, segment.bits)
        axis = -1 if segment.axis == "token" else 2
        whole = agreed.all(-1) if segment.axis == "channel" else None
        _check_float16(
            scale if whole is None else scale[whole],
            (reference.scale if whole is None else reference.scale[whole]).float(),
        )
        _check_float16(
            minimum if whole is None else minimum[whole],
            (reference.minimum if whole is None else reference.minimum[whole]).float(),
        )
        step = scale.float().unsqueeze(axis)
        grid = ((y - minimum.float().unsqueeze(axis)) / torch.where(step > 0, step, 1.0)).clamp(0, 2**segment.bits - 1)
        grid = torch.where(step > 0, grid, 0.0)
        if segment.axis == "channel" and stream.retained:
            kept = _retained_mask(fields["retained_index"], y.shape[1])
            grid = grid.masked_fill(kept.unsqueeze(-1), 0.0)
        assert ((grid - codes).abs() <= 0.5 + TOLERANCE).all()
        differing += int((codes != reference.codes.to(torch.int32)).sum())
    return differing


def _retained_mask(index: Tensor, heads: int) -> Tensor:
    """bool ``[N, H, B]`` of the tokens an implementation retains."""
    mask = torch.zeros(*index.shape[:2], 64, dtype=torch.bool)
    mask.scatter_(-1, index.long().clamp_min(0), True)
    return mask.expand(-1, heads, -1)


def _check_retained(fields: dict[str, Tensor], expected: EncodedBlocks) -> Tensor:
    """bool ``[N, H, B]``, False in blocks whose retained tokens differ (which only ties may)."""
    mine, reference = fields["retained_index"].long(), expected.retained_index
    assert mine.shape == reference.shape
    assert (mine[..., 1:] > mine[..., :-1]).all(), "retained_index is not ascending"
    same = (mine == reference).all(-1)
    boundary = expected.score.gather(-1, reference).amin(-1, keepdim=True)
    chosen = expected.score.gather(-1, mine)
    assert (chosen >= boundary - TOLERANCE).all(), "a retained token lies clearly below the retention boundary"
    heads = expected.latent.shape[1]
    for n, h in same.nonzero().tolist():
        rows = slice(None) if same.shape[1] == 1 else slice(h, h + 1)
        torch.testing.assert_close(
            fields["exact"][n, :, rows].float(), expected.exact[n, :, rows].float(), rtol=1e-5, atol=1e-5
        )
    return same.unsqueeze(-1).expand(-1, heads if same.shape[1] == 1 else -1, 64)


def _check_float16(mine: Tensor, reference: Tensor) -> None:
    """Equal, or neighbouring float16 numbers."""
    torch.testing.assert_close(mine.float(), reference, rtol=2**-10, atol=2**-24)
