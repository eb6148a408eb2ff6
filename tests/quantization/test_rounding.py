"""Codes and scales against a reference that goes number by number."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from minicache_trt.checkpoint.quantize import dequantize_weight
from minicache_trt.quantization.rounding import quantize_rows, row_chunks


def reference(weight: np.ndarray, bits: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes ``[out, blocks, block]`` before they are packed, and scales."""
    rows, columns = weight.shape
    zero, blocks = 1 << (bits - 1), -(-columns // block)
    codes, scales = np.full((rows, blocks, block), zero, np.uint8), np.zeros((rows, blocks), np.float32)
    for row in range(rows):
        for b in range(blocks):
            values = weight[row, b * block : (b + 1) * block]
            high, low = max(values.max(), 0), min(values.min(), 0)
            scale = np.float32((high if high >= -low else low) / -zero)
            scales[row, b] = scale
            for i, value in enumerate(values):
                if scale:
                    codes[row, b, i] = min(
                        max(round(float(np.float32(value) * (np.float32(1) / scale))) + zero, 0), 2 * zero - 1
                    )
    return codes, scales


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("columns", "block"), [(96, 32), (80, 32), (128, 128), (70, 64)])
def test_codes(bits: int, columns: int, block: int) -> None:
    rng = np.random.default_rng(bits + columns)
    weight = rng.standard_normal((5, columns)).astype(np.float32)
    weight[1, :block] = 0
    weight[2] = np.abs(weight[2])
    weight[3] = -np.abs(weight[3])
    expected, expected_scales = reference(weight, bits, block)
    codes, scales = quantize_rows(torch.from_numpy(weight), bits, block)
    wide = (
        codes.numpy() if bits == 8 else np.stack([codes.numpy() & 15, codes.numpy() >> 4], -1).reshape(expected.shape)
    )
    assert (wide == expected).all() and (scales.numpy() == expected_scales).all()
    values = dequantize_weight(codes.numpy(), scales.numpy(), bits, columns)
    assert values.shape == weight.shape
    # The end of the range that has no code is off by a whole step at most, everything else by half of one.
    step = np.repeat(np.abs(scales.numpy()), block, 1)[:, :columns]
    assert (np.abs(values - weight) <= step * 1.0001).all()
    assert (np.abs(values - weight) <= step * 0.5001).mean() > 0.9


def test_clip_scales_the_scale() -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    _, plain = quantize_rows(weight, 4, 32)
    factor = torch.tensor([[0.5, 1.0]]).expand(4, 2)
    codes, scales = quantize_rows(weight, 4, 32, factor)
    assert torch.equal(scales, plain * factor)
    assert dequantize_weight(codes.numpy(), scales.numpy(), 4, 64)[:, :32].max() <= 8 * scales.abs().max()


@pytest.mark.parametrize(("rows", "columns"), [(1, 10_000_000), (1000, 1), (999_999, 3), (7, 4096)])
def test_chunks_cover_all_rows(rows: int, columns: int) -> None:
    chunks = list(row_chunks(rows, columns))
    assert chunks[0].start == 0 and chunks[-1].stop == rows
    assert all(a.stop == b.start for a, b in pairwise(chunks))
