"""Whole streams of the reference: what is lossless comes back, what is quantized errs by what its format says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minicache_trt.compression.segment import Segment
from minicache_trt.compression.stream import Stream
from minicache_trt.config import BLOCK_SIZE
from minicache_trt.reference import Constants, encode, restore
from minicache_trt.reference.rotation import block_positions, rope_frequencies, rotate
from tests.support.reference_streams import CONFIG, HEADS, D, random_constants, random_group, streams

DISTORTION = {"g1": 0.36338, "g2": 0.11748, "g3": 0.034548, "g4": 0.0095010}
"""Mean squared error of Lloyd-Max quantizers of N(0, 1): Max (1960), table I (1 - 2 / pi for one bit)."""


def single(*segments: Segment) -> Stream:
    return Stream("value", (0,), segments)


def block_of(row: list[float]) -> Tensor:
    """One block and head whose first token is ``row``; the others are zero."""
    x = torch.zeros(1, 1, 1, BLOCK_SIZE, len(row))
    x[0, 0, 0, 0] = torch.tensor(row)
    return x


# -------------------------------------------------------------------------------------------------------- lossless


@settings(max_examples=80, deadline=None)
@given(
    members=st.integers(1, 3),
    basis=st.sampled_from(["post_rope", "pre_rope"]),
    align=st.booleans(),
    match=st.booleans(),
    transform=st.sampled_from(["none", "hadamard"]),
    numbers=st.lists(st.integers(0, 200), min_size=1, max_size=3),
    seed=st.integers(0, 2**20),
)
def test_linear_streams_of_full_rank_lose_nothing(
    members: int, basis: str, align: bool, match: bool, transform: str, numbers: list[int], seed: int
) -> None:
    segments = (Segment(16, transform=transform), Segment(members * D - 16, transform=transform))
    stream = Stream("key", tuple(range(members)), segments, merge="linear", basis=basis, align=align, match_heads=match)
    constants = random_constants(stream, seed)
    x = random_group(stream, constants, len(numbers), seed)
    restored = restore(encode(x, torch.tensor(numbers), stream, constants=constants))
    assert (restored - x).norm() <= 1e-5 * x.norm()
    assert (restored - x).abs().amax() <= 1e-5 * x.abs().amax()


@settings(max_examples=40, deadline=None)
@given(
    match=st.booleans(),
    align=st.booleans(),
    basis=st.sampled_from(["post_rope", "pre_rope"]),
    number=st.integers(0, 500),
    seed=st.integers(0, 2**20),
)
def test_bases_of_single_layers_are_undone(match: bool, align: bool, basis: str, number: int, seed: int) -> None:
    stream = Stream("key", (3,), (Segment(D),), basis=basis, align=align, match_heads=match)
    constants = random_constants(stream, seed)
    x = random_group(stream, constants, 1, seed)
    restored = restore(encode(x, torch.tensor([number]), stream, constants=constants))
    if basis == "post_rope" and not align:
        assert torch.equal(restored, x)
    torch.testing.assert_close(restored, x, rtol=1e-5, atol=1e-5)


@settings(max_examples=100, deadline=None)
@given(stream=streams(), seed=st.integers(0, 2**20))
def test_retained_tokens_come_back_exactly_and_others_finite(stream: Stream, seed: int) -> None:
    """Whatever basis, order of heads and merge: slot h of layer i is KV head ``head_map[i, h]``."""
    stream = replace(stream, retained_format="model")
    constants = random_constants(stream, seed)
    x = random_group(stream, constants, 2, seed)
    encoded = encode(x, torch.tensor([0, 2]), stream, constants=constants)
    restored = restore(encoded)
    assert restored.isfinite().all()
    index = encoded.retained_index.expand(2, HEADS, -1)
    for block, slot, place in (index >= 0).nonzero().tolist():
        position = index[block, slot, place]
        for layer in range(len(stream.layers)):
            head = slot if constants.head_map is None else constants.head_map[layer, slot]
            assert torch.equal(restored[layer, block, head, position], x[layer, block, head, position])
            assert torch.equal(encoded.exact[block, layer, slot, place], x[layer, block, head, position])


def test_matched_heads_are_merged_with_their_match() -> None:
    """Layer 1 holds layer 0's heads in the other order, twice as large: nothing is lost but the rounding of norms."""
    stream = Stream("value", (0, 1), (Segment(D),), merge="slerp", match_heads=True)
    x = torch.randn(2, 1, 2, BLOCK_SIZE, D, generator=torch.Generator().manual_seed(0))
    x[1] = 2 * x[0].flip(1)
    constants = Constants(head_map=torch.tensor([[0, 1], [1, 0]]))
    encoded = encode(x, torch.tensor([0]), stream, constants=constants)
    assert encoded.score.max() < 1e-3
    assert (restore(encoded) - x).norm() < 1e-3 * x.norm()
    assert encode(x, torch.tensor([0]), Stream("value", (0, 1), (Segment(D),), merge="slerp")).score.mean() > 1


def test_heads_in_a_cycle_are_put_back_where_they_came_from() -> None:
    """Three heads, so that the order and its inverse differ."""
    stream = Stream("value", (0, 1), (Segment(D),), merge="mean", match_heads=True)
    x = torch.zeros(2, 1, 3, BLOCK_SIZE, D)
    x[0, :, 0], x[0, :, 1], x[0, :, 2] = 10.0, 20.0, 30.0
    x[1, :, 1], x[1, :, 2], x[1, :, 0] = 12.0, 22.0, 32.0
    encoded = encode(x, torch.tensor([0]), stream, constants=Constants(head_map=torch.tensor([[0, 1, 2], [1, 2, 0]])))
    assert encoded.latent[0, :, 0, 0].tolist() == [11.0, 21.0, 31.0]
    assert restore(encoded)[:, 0, :, 0, 0].tolist() == [[11.0, 21.0, 31.0], [31.0, 11.0, 21.0]]


def test_aligned_layers_merge_without_loss() -> None:
    """Layer 0 is layer 1 turned by an orthogonal matrix, which ``align`` undoes."""
    turn = torch.linalg.qr(torch.randn(HEADS, D, D, generator=torch.Generator().manual_seed(1)).double())[0]
    x = torch.randn(2, 1, HEADS, BLOCK_SIZE, D, generator=torch.Generator().manual_seed(2))
    x[0] = (x[1].double() @ turn.transpose(1, 2)).float()
    eye = torch.eye(D, dtype=torch.float64).expand(HEADS, D, D)
    stream = Stream("value", (0, 1), (Segment(D),), merge="mean", align=True)
    encoded = encode(x, torch.tensor([0]), stream, constants=Constants(align=torch.stack([turn, eye])))
    torch.testing.assert_close(encoded.latent, x[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(restore(encoded), x, rtol=1e-5, atol=1e-5)


def test_pre_rope_keys_are_constant_where_only_rotation_differs() -> None:
    """One key at every position, rotated: its channels have no range before RoPE."""
    frequencies = rope_frequencies(CONFIG.rope, D)
    base = torch.randn(D, generator=torch.Generator().manual_seed(0)).double().expand(1, 1, 1, BLOCK_SIZE, D)
    x = rotate(base, block_positions(torch.tensor([7])), frequencies).float()
    stream = Stream("key", (0,), (Segment(D, "int2", "channel"),), basis="pre_rope")
    encoded = encode(x, torch.tensor([7]), stream, constants=Constants(frequencies=frequencies))
    assert encoded.segments[0].scale is not None and encoded.segments[0].scale.max() < 1e-6
    torch.testing.assert_close(encoded.latent[0, 0], base[0, 0, 0].float(), rtol=1e-5, atol=1e-5)
    assert (restore(encoded) - x).norm() < 1e-3 * x.norm()
    wrong = encode(x, torch.tensor([8]), stream, constants=Constants(frequencies=frequencies))
    assert (wrong.latent[0, 0] - base[0, 0, 0].float()).norm() > x.norm() / 2


# -------------------------------------------------------------------------------------------------- formats by hand


def test_float8_by_hand() -> None:
    """The scale is 448 / 448 = 1. 17 lies between 16 and 18 and rounds to the even mantissa, as 19 does."""
    row = [448.0, 1.0, -2.0, 17.0, 19.0, 2.0**-9, 2.0**-11, 1.0625] + [0.0] * 8
    encoded = encode(block_of(row), torch.tensor([0]), single(Segment(16, "fp8")))
    (segment,) = encoded.segments
    assert segment.scale is not None and segment.codes is not None and segment.minimum is None
    assert segment.scale[0, 0, :2].tolist() == [1.0, 0.0]
    assert segment.codes[0, 0, 0, :8].tolist() == [0x7E, 0x38, 0xC0, 0x58, 0x5A, 0x01, 0x00, 0x38]
    assert (segment.codes[0, 0, 1:] == 0).all()
    assert restore(encoded)[0, 0, 0, 0, :8].tolist() == [448.0, 1.0, -2.0, 16.0, 20.0, 2.0**-9, 0.0, 1.0]


def test_float8_scale_saturates() -> None:
    row = [4e7, -4e7] + [1.0] * 14
    encoded = encode(block_of(row), torch.tensor([0]), single(Segment(16, "fp8")))
    (segment,) = encoded.segments
    assert segment.scale is not None and segment.codes is not None
    assert segment.scale[0, 0, 0] == 65504.0
    assert segment.codes[0, 0, 0, :2].tolist() == [0x7E, 0xFE]


def test_float8_channels_exclude_retained_tokens() -> None:
    stream = Stream("key", (0, 1), (Segment(16, "fp8", "channel"),), merge="mean", retained=1)
    x = torch.ones(2, 1, 1, BLOCK_SIZE, 16)
    x[0, 0, 0, 9, 3], x[1, 0, 0, 9, 3] = -100.0, 200.0
    encoded = encode(x, torch.tensor([1]), stream)
    (segment,) = encoded.segments
    assert encoded.retained_index[0, 0].tolist() == [9]
    assert segment.scale is not None and segment.codes is not None
    assert segment.scale[0, 0].tolist() == [torch.tensor(1 / 448).half().item()] * 16
    assert (segment.codes[0, 0, 9] == 0).all() and (segment.codes[0, 0, 8] == 0x7E).all()


def test_gaussian_by_hand() -> None:
    """Root mean square 2; over it: 0.5, -0.5, 1, 1.5, -1.5; the boundaries of two bits are -0.98, 0 and 0.98."""
    row = [1.0, -1.0, 2.0, 3.0, -3.0] + [0.0] * 10
    row.append((16 * 4 - sum(v * v for v in row)) ** 0.5)
    encoded = encode(block_of(row), torch.tensor([0]), single(Segment(16, "g2")))
    (segment,) = encoded.segments
    assert encoded.norms is not None and encoded.norms.shape == (1, 1, 1, BLOCK_SIZE)
    assert encoded.norms[0, 0, 0, :2].tolist() == [2.0, 0.0]
    assert segment.codes is not None and segment.scale is None
    # Zero lies on a boundary, which is not below it.
    assert segment.codes[0, 0, 0].tolist() == [2, 1, 3, 3, 0] + [1] * 10 + [3]
    assert (segment.codes[0, 0, 1:] == 0).all()
    expected = [0.90556, -0.90556, 3.02084, 3.02084, -3.02084]
    assert restore(encoded)[0, 0, 0, 0, :5].tolist() == pytest.approx(expected, abs=1e-5)
    assert (restore(encoded)[0, 0, 0, 1:] == 0).all()


def test_gaussian_segments_share_one_norm_without_dropped_ones() -> None:
    row = [3.0] * 16 + [100.0] * 16 + [1.0] * 16
    segments = (Segment(16, "g4"), Segment(16, "drop"), Segment(16, "g1"))
    encoded = encode(block_of(row), torch.tensor([0]), single(*segments))
    assert encoded.norms is not None
    assert encoded.norms[0, 0, 0, 0].item() == pytest.approx(5**0.5, rel=1e-3)
    assert restore(encoded)[0, 0, 0, 0, 16:32].tolist() == [0.0] * 16
    assert restore(encoded)[0, 0, 0, 0, -1].item() == pytest.approx(5**0.5 * 0.79788, rel=1e-3)


def test_hadamard_before_rounding_by_hand() -> None:
    """One large component becomes sixteen equal ones, which two bits hold exactly."""
    row = [0.0] * 5 + [8.0] + [0.0] * 10
    encoded = encode(block_of(row), torch.tensor([0]), single(Segment(16, "int2", transform="hadamard")))
    assert encoded.segments[0].components[0, 0, 0].abs().tolist() == pytest.approx([2.0] * 16)
    assert restore(encoded)[0, 0, 0, 0].tolist() == pytest.approx(row, abs=5e-3)


# ------------------------------------------------------------------------------------------------- errors by format


@settings(max_examples=40, deadline=None)
@given(
    fmt=st.sampled_from(["int2", "int4", "int8"]),
    members=st.integers(1, 2),
    basis=st.sampled_from(["post_rope", "pre_rope"]),
    seed=st.integers(0, 2**20),
)
def test_integers_err_by_half_a_step_in_the_orthonormal_basis(fmt: str, members: int, basis: str, seed: int) -> None:
    """Every map around the quantizer is orthogonal, so the error of a token has the length of its codes' errors."""
    segments = (Segment(members * D, fmt, transform="hadamard"),)
    layers = tuple(range(members))
    stream = Stream("key", layers, segments, merge="linear", basis=basis, align=True, match_heads=True)
    constants = random_constants(stream, seed)
    x = random_group(stream, constants, 1, seed)
    encoded = encode(x, torch.tensor([3]), stream, constants=constants)
    error = constants.to_slots(restore(encoded) - x).square().sum(dim=(0, 4)).sqrt()
    (segment,) = encoded.segments
    assert segment.scale is not None and segment.minimum is not None
    low, high = segment.components.amin(dim=-1), segment.components.amax(dim=-1)
    levels = 2**segment.segment.bits - 1
    rounding = (segment.minimum - low).abs() + (segment.scale.float() * levels - (high - low)).abs()
    bound = (segment.scale.float() / 2 + rounding) * (members * D) ** 0.5
    assert (error <= bound * 1.001 + 1e-5).all()


@settings(max_examples=40, deadline=None)
@given(axis=st.sampled_from(["token", "channel"]), seed=st.integers(0, 2**20), magnitude=st.floats(-2, 3))
def test_float8_errs_by_a_sixteenth(axis: str, seed: int, magnitude: float) -> None:
    """Three bits of mantissa, half a step; below the smallest normal number, half the smallest subnormal one."""
    x = torch.randn(1, 1, 2, BLOCK_SIZE, D, generator=torch.Generator().manual_seed(seed)) * 10**magnitude
    encoded = encode(x, torch.tensor([0]), Stream("value", (0,), (Segment(D, "fp8", axis),)))
    scale = encoded.segments[0].scale
    assert scale is not None
    step = scale.float().unsqueeze(2 if axis == "channel" else 3)
    bound = torch.maximum(x[0].abs() * 2.0**-4, step * 2.0**-10)
    # A scale rounded down makes the largest number saturate.
    saturated = (x[0].abs() - 448 * step).clamp(min=0)
    assert ((restore(encoded)[0] - x[0]).abs() <= bound * 1.001 + saturated).all()


@pytest.mark.parametrize("fmt", DISTORTION)
@pytest.mark.parametrize("transform", ["none", "hadamard"])
def test_gaussian_error_is_the_quantizers_distortion(fmt: str, transform: str) -> None:
    stream = Stream("value", (0,), (Segment(128, fmt, transform=transform),))
    x = 3.0 * torch.randn(1, 4, 4, BLOCK_SIZE, 128, generator=torch.Generator().manual_seed(0))
    restored = restore(encode(x, torch.arange(4), stream))
    error = float((restored - x).square().mean() / x.square().mean())
    assert error == pytest.approx(DISTORTION[fmt], rel=0.03)


@pytest.mark.parametrize("fmt", DISTORTION)
def test_gaussian_error_of_calibrated_streams_is_relative_to_sigma(fmt: str) -> None:
    """Each component of y errs by its own variance times the distortion."""
    stream = Stream("key", (0, 1), (Segment(32, fmt), Segment(32, fmt)), "linear", "pre_rope", align=True)
    constants = random_constants(stream, 1)
    x = random_group(stream, constants, 40, 1)
    encoded = encode(x, torch.arange(40), stream, constants=constants)
    again = encode(restore(encoded), torch.arange(40), stream, constants=constants)
    assert constants.sigma is not None
    error = ((again.latent - encoded.latent) / constants.sigma[:, None]).square().mean(dim=(0, 2))
    assert float(error.mean()) == pytest.approx(DISTORTION[fmt], rel=0.05)
    assert (error < 1.5 * DISTORTION[fmt]).all()


@pytest.mark.parametrize(("fmt", "worst"), [("fp8", 0.04), ("int8", 0.01), ("int4", 0.15)])
def test_retained_vectors_in_other_formats(fmt: str, worst: float) -> None:
    stream = Stream("key", (0, 1), (Segment(16),), "linear", "pre_rope", True, True, retained=4, retained_format=fmt)
    constants = random_constants(stream, 2)
    x = random_group(stream, constants, 1, 2)
    encoded = encode(x, torch.tensor([5]), stream, constants=constants)
    numbers = encoded.exact_numbers
    assert numbers.codes is not None and numbers.codes.shape == (1, 2, HEADS, 4, D)
    assert numbers.scale is not None and numbers.scale.shape == (1, 2, HEADS, 4)
    slots, restored = constants.to_slots(x), constants.to_slots(restore(encoded))
    for head in range(HEADS):
        kept = encoded.retained_index[0, head]
        error = (restored - slots)[:, 0, head, kept].norm(dim=-1) / slots[:, 0, head, kept].norm(dim=-1)
        assert 0 < error.max() < worst


@pytest.mark.parametrize(("better", "worse"), [("g4", "g3"), ("g3", "g2"), ("g2", "g1"), ("int8", "int4")])
def test_more_bits_err_less(better: str, worse: str) -> None:
    errors = []
    for fmt in (better, worse):
        stream = Stream("value", (0, 1), (Segment(48, fmt), Segment(16, "drop")), "linear", match_heads=True)
        constants = random_constants(stream, 3)
        x = random_group(stream, constants, 4, 3)
        errors.append(float((restore(encode(x, torch.arange(4), stream, constants=constants)) - x).norm()))
    assert errors[0] < errors[1]
