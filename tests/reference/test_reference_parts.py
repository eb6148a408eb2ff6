"""Rotation, transforms and number formats of the reference against their definitions and other libraries."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from minicache_trt.compression.constants import gaussian_boundaries, gaussian_levels
from minicache_trt.config import RopeConfig
from minicache_trt.reference.gaussian import lloyd_max_levels, midpoints
from minicache_trt.reference.rotation import block_positions, rope_frequencies, rotate
from minicache_trt.reference.segments import float8_numbers
from minicache_trt.reference.transforms import apply_transform, hadamard, hadamard_blocks

# -------------------------------------------------------------------------------------------------------- rotation


def test_frequencies_by_hand() -> None:
    assert rope_frequencies(RopeConfig(theta=16.0), 8).tolist() == pytest.approx([1, 1 / 2, 1 / 4, 1 / 8])
    linear = RopeConfig(theta=16.0, scaling="linear", factor=4.0)
    assert rope_frequencies(linear, 8).tolist() == pytest.approx([1 / 4, 1 / 8, 1 / 16, 1 / 32])


def test_llama3_frequencies_by_wavelength() -> None:
    """Short waves stay, those longer than the original context are slowed down, and in between both are mixed."""
    rope = RopeConfig(5e5, "llama3", 8.0, 1.0, 4.0, 8192)
    plain = rope_frequencies(RopeConfig(5e5), 128).double()
    scaled = rope_frequencies(rope, 128).double()
    turns = 8192 * plain / (2 * math.pi)
    for before, after, n in zip(plain.tolist(), scaled.tolist(), turns.tolist(), strict=True):
        share = min(1.0, max(0.0, (n - 1.0) / (4.0 - 1.0)))
        assert after == pytest.approx(before * (share + (1 - share) / 8), rel=1e-5)


def test_rotation_by_hand() -> None:
    """A quarter turn takes (x_j, x_{j + D/2}) = (1, 2) to (-2, 1)."""
    x = torch.tensor([1.0, 2.0], dtype=torch.float64).reshape(1, 1, 1, 1, 2)
    turned = rotate(x, torch.tensor([[1]]), torch.tensor([math.pi / 2]))
    assert turned.flatten().tolist() == pytest.approx([-2.0, 1.0], abs=1e-6)


@pytest.mark.parametrize("size", [16, 80, 128])
def test_rotation_is_hugging_faces(size: int) -> None:
    x = torch.randn(1, 3, 2, 64, size, generator=torch.Generator().manual_seed(size)).double()
    frequencies = rope_frequencies(RopeConfig(), size)
    positions = block_positions(torch.tensor([0, 5, 100]))
    assert positions[:, 1].tolist() == [1, 321, 6401]
    angles = (positions[..., None].float() * frequencies).double()
    angles = torch.cat([angles, angles], dim=-1)
    expected, _ = apply_rotary_pos_emb(x[0], x[0], angles.cos(), angles.sin())
    torch.testing.assert_close(rotate(x, positions, frequencies)[0], expected)


@settings(max_examples=30, deadline=None)
@given(size=st.sampled_from([16, 48, 64]), number=st.integers(0, 2000), theta=st.floats(10.0, 1e6))
def test_rotation_round_trip_keeps_lengths(size: int, number: int, theta: float) -> None:
    x = torch.randn(2, 1, 1, 64, size, generator=torch.Generator().manual_seed(number)).double()
    positions, frequencies = block_positions(torch.tensor([number])), rope_frequencies(RopeConfig(theta), size)
    turned = rotate(x, positions, frequencies)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(rotate(turned, positions, frequencies, backwards=True), x)


def test_scores_depend_on_distance_only() -> None:
    """Queries and keys rotated by positions 10 apart have the same product anywhere."""
    q, k = torch.randn(2, 1, 1, 1, 1, 32, generator=torch.Generator().manual_seed(0)).double()
    frequencies = rope_frequencies(RopeConfig(), 32)
    products = [
        float((rotate(q, torch.tensor([[p + 10]]), frequencies) * rotate(k, torch.tensor([[p]]), frequencies)).sum())
        for p in (0, 3, 500)
    ]
    assert products == pytest.approx([products[0]] * 3, abs=1e-3)


# ------------------------------------------------------------------------------------------------------ transforms


def test_hadamard_by_hand() -> None:
    signs = [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]
    assert (hadamard(4) * 2).tolist() == signs
    y = torch.zeros(16)
    y[3] = 4.0
    assert apply_transform(y, "hadamard").tolist() == [1, -1, -1, 1] * 4


def test_hadamard_is_sylvesters_doubling() -> None:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    step = torch.tensor([[1, 1], [1, -1]], dtype=torch.float64) / math.sqrt(2)
    for size in (2, 4, 8, 16, 32, 64, 128, 256):
        matrix = torch.kron(step, matrix)
        torch.testing.assert_close(hadamard(size), matrix)


@pytest.mark.parametrize(
    ("length", "blocks"), [(16, [16]), (48, [32, 16]), (80, [64, 16]), (112, [64, 32, 16]), (256, [256])]
)
def test_hadamard_blocks_are_the_largest_that_fit(length: int, blocks: list[int]) -> None:
    assert hadamard_blocks(length) == blocks
    start = 0
    for size in blocks:
        y = torch.zeros(length)
        y[start : start + size] = 1.0
        expected = torch.zeros(length, dtype=torch.float64)
        expected[start] = math.sqrt(size)
        torch.testing.assert_close(apply_transform(y, "hadamard"), expected)
        start += size


@pytest.mark.parametrize("length", range(16, 257, 16))
def test_hadamard_is_its_own_inverse_and_keeps_lengths(length: int) -> None:
    y = torch.randn(5, length, generator=torch.Generator().manual_seed(length)).double()
    turned = apply_transform(y, "hadamard")
    torch.testing.assert_close(turned.norm(dim=-1), y.norm(dim=-1))
    torch.testing.assert_close(apply_transform(turned, "hadamard"), y)


# --------------------------------------------------------------------------------------------------------- formats


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_levels_agree_with_the_shared_constants(bits: int) -> None:
    assert lloyd_max_levels(bits) == pytest.approx(gaussian_levels(bits), abs=1e-6)
    assert midpoints(lloyd_max_levels(bits)) == pytest.approx(gaussian_boundaries(bits), abs=1e-6)


def test_levels_of_one_bit_are_the_mean_of_half_the_distribution() -> None:
    assert lloyd_max_levels(1) == pytest.approx((-math.sqrt(2 / math.pi), math.sqrt(2 / math.pi)))


def test_float8_numbers_are_torchs() -> None:
    mine = float8_numbers()
    theirs = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)
    assert mine[0x38] == 1.0 and mine[0x7E] == 448.0 and mine[1] == 2.0**-9
