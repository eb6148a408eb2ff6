"""Formats and packing against their definitions, number by number."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minicache_trt.compression import gaussian
from minicache_trt.compression.constants import gaussian_boundaries, gaussian_levels
from minicache_trt.compression.float8 import from_bytes, to_bytes
from minicache_trt.compression.packing import pack, unpack
from minicache_trt.compression.quantize import dequantize, load, quantize, store
from minicache_trt.compression.segment import Segment
from minicache_trt.compression.stream import Stream
from minicache_trt.config import ModelConfig
from minicache_trt.contract import stream_layout

CONFIG = ModelConfig("llama", 4, 64, 64, 4, 2, 64, 100, 4096)


def e4m3(byte: int) -> float:
    """Value of an e4m3 byte from its bits: sign, 4 bits of exponent with bias 7, 3 of mantissa."""
    sign, exponent, mantissa = -1.0 if byte & 128 else 1.0, (byte >> 3) & 15, byte & 7
    if exponent == 0:
        return sign * mantissa / 8 * 2.0**-6
    return math.nan if (exponent, mantissa) == (15, 7) else sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


def nearest_e4m3(x: float) -> float:
    """Round half to even among the finite e4m3 numbers, saturating."""
    return min((e4m3(byte) for byte in range(127)), key=lambda v: (abs(v - abs(x)), e4m3_index(v) % 2)) * (
        -1.0 if x < 0 else 1.0
    )


def e4m3_index(value: float) -> int:
    return next(byte for byte in range(127) if e4m3(byte) == value)


def test_float8_bytes_are_e4m3() -> None:
    codes = torch.tensor([byte for byte in range(256) if byte & 127 != 127])
    assert from_bytes(codes).tolist() == [e4m3(int(byte)) for byte in codes]
    assert torch.equal(to_bytes(from_bytes(codes)), codes.int())


@settings(max_examples=300)
@given(st.floats(-1000, 1000, width=32))
def test_float8_rounds_half_to_even_and_saturates(x: float) -> None:
    assert float(from_bytes(to_bytes(torch.tensor([x])))) == nearest_e4m3(x)


def test_float8_ties_and_types() -> None:
    x = torch.linspace(-460, 460, 40001)
    assert torch.equal(from_bytes(to_bytes(x)), x.clamp(-448, 448).to(torch.float8_e4m3fn).float())
    assert np.array_equal(to_bytes(x), np.clip(x, -448, 448).numpy().astype(ml_dtypes.float8_e4m3fn).view(np.uint8))
    ties = [(17.0, 16.0), (19.0, 20.0), (1.0625, 1.0), (1.1875, 1.25), (2.0**-10, 0.0), (449.0, 448.0), (1e9, 448.0)]
    for number, expected in ties:
        assert float(from_bytes(to_bytes(torch.tensor([-number])))) == -expected


@pytest.mark.parametrize("axis", ["token", "channel"])
def test_float8_ranges(axis: str) -> None:
    torch.manual_seed(0)
    segment = Segment(32, "fp8", axis)
    y = torch.randn(2, 3, 64, 32) * torch.rand(32) * 10
    y[0, 0, 5] = 0.0
    y[0, 1, :, 7] = 0.0
    codes, (scale,) = quantize(segment, y)
    largest = y.abs().amax(-1 if axis == "token" else -2)
    assert torch.equal(scale, (largest / 448).half())
    assert (codes[0, 0, 5] == 0).all() or axis == "channel"
    error = (dequantize(segment, codes, [scale]) - y).abs()
    assert (error <= y.abs() / 16 + largest.unsqueeze(-1 if axis == "token" else -2) * (2.0**-10 / 448 * 1.1)).all()


@pytest.mark.parametrize("fmt", ["int4", "fp8"])
def test_retained_tokens_do_not_widen_channels(fmt: str) -> None:
    torch.manual_seed(0)
    y = torch.randn(2, 3, 64, 32)
    retained = torch.zeros(2, 3, 64, dtype=torch.bool)
    retained[:, :, [4, 9]] = True
    expected, ranges = quantize(Segment(32, fmt, "channel"), y[:, :, [i for i in range(64) if i not in (4, 9)]])
    y[:, :, [4, 9]] = 1e4
    codes, widened = quantize(Segment(32, fmt, "channel"), y, retained)
    assert (codes[:, :, [4, 9]] == 0).all()
    assert all(torch.equal(a, b) for a, b in zip(ranges, widened, strict=True))
    assert torch.equal(codes[:, :, [i for i in range(64) if i not in (4, 9)]], expected)


@pytest.mark.parametrize("fmt", ["fp8", "int8", "int4", "int2"])
@pytest.mark.parametrize("axis", ["token", "channel"])
@pytest.mark.parametrize("scale", [0.0, 1e-7, 1.0, 3e5, 1e9])
def test_stored_numbers_are_finite_and_near(fmt: str, axis: str, scale: float) -> None:
    torch.manual_seed(0)
    segment, y = Segment(48, fmt, axis), scale * torch.randn(2, 64, 48)
    codes, ranges = store(segment, y)
    assert codes.shape == (2, 64, segment.code_bytes) and codes.dtype == torch.int8
    restored = load(segment, codes, ranges)
    assert restored.isfinite().all()
    if scale == 1.0:
        bits = 4.0 if fmt == "fp8" else segment.bits
        assert (restored - y).abs().amax() <= y.abs().amax() * 2.2 / (2**bits - 1) / 2 * 1.01


@given(st.integers(0, 2**30), st.sampled_from([1, 2, 3, 4, 8]), st.sampled_from([16, 48, 80]))
def test_packing_round_trips(seed: int, bits: int, length: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (3, 2, length), generator=generator, dtype=torch.int32)
    packed = pack(codes, bits)
    assert packed.dtype == torch.int8 and packed.shape == (3, 2, length * bits // 8)
    assert torch.equal(unpack(packed, bits), codes)
    stream = sum(int(code) << (bits * i) for i, code in enumerate(codes[1, 1]))
    expected = [byte - 128 for byte in stream.to_bytes(length * bits // 8, "little")]
    assert packed[1, 1].tolist() == expected


def test_lowest_bits_hold_the_first_code() -> None:
    assert pack(torch.tensor([1, 15], dtype=torch.int32), 4).tolist() == [0xF1 - 128]
    assert pack(torch.tensor([1, 0, 2, 3], dtype=torch.int32), 2).tolist() == [0b11100001 - 128]
    octal = torch.tensor([1, 2, 3, 4, 5, 6, 7, 0], dtype=torch.int32)
    assert pack(octal, 3).tolist() == [byte - 128 for byte in 0o07654321.to_bytes(3, "little")]


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_gaussian_codes_count_boundaries_below(bits: int) -> None:
    edges = torch.tensor(gaussian_boundaries(bits))
    u = torch.cat([edges, torch.nextafter(edges, torch.full_like(edges, torch.inf)), torch.tensor([-50.0, 50.0])])
    codes = gaussian.quantize(u, torch.ones((), dtype=torch.float16), bits)
    assert codes.tolist() == [sum(float(edge) < float(x) for edge in edges) for x in u]
    levels = gaussian.dequantize(codes, torch.tensor(2.0, dtype=torch.float16), bits)
    assert levels.tolist() == pytest.approx([2 * gaussian_levels(bits)[code] for code in codes])


def test_gaussian_norm_is_that_of_the_stored_components() -> None:
    torch.manual_seed(0)
    segments = (Segment(16, "g4"), Segment(32, "drop"), Segment(16, "g2"))
    layout = stream_layout(0, Stream("value", (0,), segments), CONFIG)
    z = torch.randn(2, 2, 64, 64)
    z[..., 16:48] = 1e3
    z[0, 0, 3] = 0.0
    u, norm = gaussian.standardize(layout.segments, z)
    stored = torch.cat([z[..., :16], z[..., 48:]], -1)
    torch.testing.assert_close(norm, stored.square().mean(-1).sqrt().half())
    assert (u[0, 0, 3] == 0).all()
    assert (gaussian.quantize(u[..., :16], norm, 4)[0, 0, 3] == 0).all()
    torch.testing.assert_close((u * norm.float().unsqueeze(-1))[1], z[1])
