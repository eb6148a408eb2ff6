"""Reference codec against numbers worked out by hand and scalar definitions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minicache_trt.compression.segment import Segment
from minicache_trt.compression.stream import Stream
from minicache_trt.config import BLOCK_SIZE
from minicache_trt.reference import EncodedBlocks, encode, restore

D = 16
FLOAT16_MAX = 65504.0


def slerp_stream(size: int = D, **options: object) -> Stream:
    return Stream("key", (0, 1), (Segment(size),), merge="slerp", **options)  # type: ignore[arg-type]


def single_stream(*segments: Segment) -> Stream:
    return Stream("value", (0,), segments)


def encode_tokens(tokens: list[list[list[float]]], stream: Stream) -> EncodedBlocks:
    """Encode one block of one head; ``tokens[layer][position]`` lists leading components, the rest are orthogonal.

    Positions that are not given hold the same vector in both layers.
    """
    x = torch.ones(len(stream.layers), 1, 1, BLOCK_SIZE, stream.rank)
    for layer, vectors in enumerate(tokens):
        for position, vector in enumerate(vectors):
            x[layer, 0, 0, position] = torch.tensor(vector + [0.0] * (stream.rank - len(vector)))
    return encode(x, torch.tensor([0]), stream)


def quantize_row(row: list[float], fmt: str) -> EncodedBlocks:
    """Encode a block whose first token is ``row``, per token."""
    return encode_tokens([[row]], single_stream(Segment(len(row), fmt)))


def token(values: Tensor | None, position: int) -> list[float]:
    """One token of the first block and head."""
    assert values is not None
    return [float(v) for v in values[0, 0, position].flatten()]


# ---------------------------------------------------------------------------------------------------------- slerp


@pytest.mark.parametrize("t", [0.0, 0.25, 0.6, 1.0])
def test_slerp_of_orthogonal_vectors(t: float) -> None:
    encoded = encode_tokens([[[3.0, 0.0]], [[0.0, 4.0]]], slerp_stream(t=t))
    expected = [math.cos(t * math.pi / 2), math.sin(t * math.pi / 2)] + [0.0] * (D - 2)
    assert token(encoded.latent, 0) == pytest.approx(expected, abs=1e-6)
    assert encoded.score[0, 0, 0].item() == pytest.approx(math.pi / 2)
    assert encoded.norms is not None
    assert encoded.norms[0, :, 0, 0].tolist() == [3.0, 4.0]
    restored = restore(encoded)
    assert restored[0, 0, 0, 0].tolist() == pytest.approx([3 * e for e in expected], abs=1e-5)
    assert restored[1, 0, 0, 0].tolist() == pytest.approx([4 * e for e in expected], abs=1e-5)


def test_slerp_weights_at_sixty_degrees() -> None:
    encoded = encode_tokens([[[1.0, 0.0]], [[0.5, math.sqrt(0.75)]]], slerp_stream())
    angle = math.radians(36)  # t = 0.6 of the way from the first direction to the second
    assert token(encoded.latent, 0)[:2] == pytest.approx([math.cos(angle), math.sin(angle)], abs=1e-6)
    assert encoded.score[0, 0, 0].item() == pytest.approx(math.pi / 3, abs=1e-6)


def test_slerp_of_parallel_vectors_is_their_direction() -> None:
    encoded = encode_tokens([[[3.0, 4.0]], [[6.0, 8.0]]], slerp_stream())
    assert token(encoded.latent, 0)[:2] == pytest.approx([0.6, 0.8], abs=1e-6)
    assert encoded.score[0, 0, 0].item() == pytest.approx(0.0, abs=1e-3)


def test_slerp_of_antipodal_vectors_is_the_later_direction() -> None:
    encoded = encode_tokens([[[3.0, 4.0]], [[-6.0, -8.0]]], slerp_stream())
    assert token(encoded.latent, 0)[:2] == pytest.approx([-0.6, -0.8], abs=1e-6)
    assert encoded.score[0, 0, 0].item() == pytest.approx(math.pi)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [([0.0, 0.0], [3.0, 4.0], [0.6, 0.8]), ([3.0, 4.0], [0.0, 0.0], [0.0, 0.0]), ([0.0], [0.0], [0.0, 0.0])],
)
def test_slerp_of_zero_vectors(first: list[float], second: list[float], expected: list[float]) -> None:
    encoded = encode_tokens([[first], [second]], slerp_stream())
    assert token(encoded.latent, 0)[:2] == pytest.approx(expected, abs=1e-6)
    assert encoded.score[0, 0, 0].item() == pytest.approx(math.pi)
    assert torch.isfinite(restore(encoded)).all()


def test_merge_uses_exact_norms_and_stores_rounded_ones() -> None:
    encoded = encode_tokens([[[2049.0]], [[1e6]]], slerp_stream())
    assert token(encoded.latent, 0)[0] == 1.0
    assert encoded.norms is not None
    assert encoded.norms[0, :, 0, 0].tolist() == [2048.0, FLOAT16_MAX]


@pytest.mark.parametrize("norm", ["head", "token"])
def test_slerp_matches_the_scalar_formula(norm: str) -> None:
    heads, blocks = 2, 3
    x = torch.randn(2, blocks, heads, BLOCK_SIZE, D, generator=torch.Generator().manual_seed(0))
    encoded = encode(x, torch.arange(blocks), slerp_stream(norm=norm, t=0.3))
    assert encoded.norms is not None
    assert encoded.norms.shape == (blocks, 2, heads if norm == "head" else 1, BLOCK_SIZE)
    assert encoded.score.shape == (blocks, heads if norm == "head" else 1, BLOCK_SIZE)
    for block, head, position in [(0, 0, 0), (1, 1, 5), (2, 0, 63)]:
        chosen = slice(head, head + 1) if norm == "head" else slice(0, heads)
        group = head if norm == "head" else 0
        first, second = x[:, block, chosen, position].double().flatten(1)
        angle = math.acos(float(first @ second / first.norm() / second.norm()))
        merged = math.sin(0.7 * angle) * first / first.norm() + math.sin(0.3 * angle) * second / second.norm()
        expected = (merged / math.sin(angle)).float().reshape(-1, D)
        torch.testing.assert_close(encoded.latent[block, chosen, position], expected, rtol=1e-4, atol=1e-5)
        assert encoded.score[block, group, position].item() == pytest.approx(angle, abs=1e-5)
        assert encoded.norms[block, :, group, position].tolist() == [first.norm().half(), second.norm().half()]


def test_mean_is_the_average_and_ranks_by_angle() -> None:
    stream = Stream("value", (0, 1), (Segment(D),), merge="mean")
    encoded = encode_tokens([[[3.0, 0.0], [2.0]], [[0.0, 4.0], [-2.0]]], stream)
    assert encoded.norms is None
    assert token(encoded.latent, 0)[:2] == [1.5, 2.0]
    assert token(encoded.latent, 1)[0] == 0.0
    assert token(encoded.score[..., None], 0) == pytest.approx([math.pi / 2])
    assert token(encoded.score[..., None], 1) == pytest.approx([math.pi])
    assert restore(encoded)[:, 0, 0, 0, :2].tolist() == [[1.5, 2.0], [1.5, 2.0]]


# ------------------------------------------------------------------------------------------------------- retention


def vectors_at(degrees: list[float]) -> list[list[float]]:
    return [[math.cos(math.radians(a)), math.sin(math.radians(a))] for a in degrees]


def test_retention_keeps_the_most_distant_tokens_in_ascending_order() -> None:
    encoded = encode_tokens([vectors_at([0.0] * 5), vectors_at([10, 80, 30, 90, 170])], slerp_stream(retained=3))
    assert encoded.retained_index[0, 0].tolist() == [1, 3, 4]


def test_retention_ties_go_to_the_lower_position() -> None:
    encoded = encode_tokens([vectors_at([0.0] * 6), vectors_at([10, 90, 10, 90, 90, 90])], slerp_stream(retained=2))
    assert encoded.retained_index[0, 0].tolist() == [1, 3]


def test_antipodal_and_zero_vectors_are_retained_first() -> None:
    first = [*vectors_at([0.0, 0.0, 0.0]), [0.0]]
    second = [*vectors_at([179.0, 90.0, 180.0]), [1.0]]
    encoded = encode_tokens([first, second], slerp_stream(retained=2))
    assert encoded.retained_index[0, 0].tolist() == [2, 3]


def test_sinks_come_first_in_the_first_block_only() -> None:
    x = torch.ones(2, 2, 1, BLOCK_SIZE, D)
    x[1, :, :, 40:43] *= -1
    encoded = encode(x, torch.tensor([0, 7]), slerp_stream(retained=3, sink_tokens=2))
    assert encoded.retained_index[:, 0].tolist() == [[0, 1, 40], [40, 41, 42]]


@pytest.mark.parametrize("merge", ["slerp", "mean"])
@pytest.mark.parametrize("norm", ["head", "token"])
def test_retained_tokens_are_exact_in_every_layer(merge: str, norm: str) -> None:
    heads = 3
    x = torch.randn(2, 2, heads, BLOCK_SIZE, D, generator=torch.Generator().manual_seed(1))
    stream = Stream("key", (0, 1), (Segment(D, "int2", "channel"),), merge=merge, norm=norm, retained=4)
    encoded = encode(x, torch.arange(2), stream)
    assert encoded.retained_index.shape == (2, heads if norm == "head" else 1, 4)
    assert encoded.exact.shape == (2, 2, heads, 4, D)
    exact = (restore(encoded) == x).all(dim=-1).all(dim=0)
    for block in range(2):
        for head in range(heads):
            kept = encoded.retained_index[block, head if norm == "head" else 0].tolist()
            assert exact[block, head].nonzero().flatten().tolist() == kept


def test_token_granularity_ranks_by_the_angle_over_all_heads() -> None:
    """Position 5 is opposed in a small head only, position 9 orthogonal in the large one."""
    x = torch.zeros(2, 1, 2, BLOCK_SIZE, D)
    x[:, :, 0, :, 0] = 10.0
    x[:, :, 1, :, 0] = 0.1
    x[1, 0, 1, 5, 0] = -0.1
    x[1, 0, 0, 9, 0], x[1, 0, 0, 9, 1] = 0.0, 10.0
    by_head = encode(x, torch.tensor([1]), slerp_stream(norm="head", retained=1))
    by_token = encode(x, torch.tensor([1]), slerp_stream(norm="token", retained=1))
    assert by_head.retained_index[0].tolist() == [[9], [5]]
    assert by_token.retained_index[0].tolist() == [[9]]


# ------------------------------------------------------------------------------------------------------- quantizer


def test_two_bit_codes_by_hand() -> None:
    row = [1.0, 3.0, 5.0, 7.0] + [2.5, 3.5, 1.0, 7.0] + [1.0] * 8
    encoded = quantize_row(row, "int2")
    (segment,) = encoded.segments
    assert token(segment.scale, 0) == [2.0]
    assert token(segment.minimum, 0) == [1.0]
    assert token(segment.grid, 0)[:6] == [0.0, 1.0, 2.0, 3.0, 0.75, 1.25]
    assert token(segment.codes, 0) == [0, 1, 2, 3, 1, 1, 0, 3] + [0] * 8
    assert restore(encoded)[0, 0, 0, 0, :8].tolist() == [1.0, 3.0, 5.0, 7.0, 3.0, 3.0, 1.0, 7.0]


@pytest.mark.parametrize(("fmt", "levels"), [("int2", 3), ("int4", 15), ("int8", 255)])
def test_halves_round_to_even(fmt: str, levels: int) -> None:
    row = [0.0, float(levels), 0.5, 1.5, 2.5] + [0.0] * 11
    (segment,) = quantize_row(row, fmt).segments
    assert token(segment.scale, 0) == [1.0]
    assert token(segment.codes, 0)[:5] == [0, levels, 0, 2, 2]


def test_constant_vector_has_scale_and_codes_zero() -> None:
    encoded = quantize_row([0.1] * 16, "int4")
    (segment,) = encoded.segments
    assert token(segment.scale, 0) == [0.0]
    assert token(segment.grid, 0) == token(segment.codes, 0) == [0.0] * 16
    assert restore(encoded)[0, 0, 0, 0].tolist() == [torch.tensor(0.1).half().item()] * 16


def test_scale_that_underflows_gives_code_zero() -> None:
    (segment,) = quantize_row([0.0, 1e-8] + [0.0] * 14, "int2").segments
    assert token(segment.scale, 0) == [0.0]
    assert token(segment.codes, 0) == [0.0] * 16


def test_scale_and_minimum_saturate() -> None:
    encoded = quantize_row([-1e6, 1e6, 0.0] + [0.0] * 13, "int4")
    (segment,) = encoded.segments
    assert token(segment.scale, 0) == [FLOAT16_MAX]
    assert token(segment.minimum, 0) == [-FLOAT16_MAX]
    assert token(segment.codes, 0)[:3] == [0, 15, 1]
    assert restore(encoded)[0, 0, 0, 0, :3].tolist() == [-FLOAT16_MAX, 14 * FLOAT16_MAX, 0.0]


def test_codes_use_the_rounded_scale_and_minimum() -> None:
    """The minimum 2049 is stored as 2048, so that a value of 2049 is one step above it."""
    encoded = quantize_row([2049.0, 2052.0] + [2049.0] * 14, "int2")
    (segment,) = encoded.segments
    assert token(segment.minimum, 0) == [2048.0]
    assert token(segment.codes, 0)[:2] == [1, 3]
    assert restore(encoded)[0, 0, 0, 0, :2].tolist() == [2049.0, 2051.0]


def test_channel_ranges_are_per_component_over_the_block() -> None:
    x = torch.zeros(1, 1, 1, BLOCK_SIZE, D)
    x[0, 0, 0, :, 0] = torch.arange(BLOCK_SIZE) % 4
    x[0, 0, 0, 10, 1] = 30.0
    (segment,) = encode(x, torch.tensor([0]), single_stream(Segment(D, "int2", "channel"))).segments
    assert segment.scale is not None and segment.codes is not None
    assert segment.scale.shape == (1, 1, D)
    assert segment.scale[0, 0].tolist() == [1.0, 10.0] + [0.0] * 14
    assert segment.codes[0, 0, :, 0].tolist() == [0, 1, 2, 3] * 16
    assert segment.codes[0, 0, :, 1].tolist() == [0] * 10 + [3] + [0] * 53


def test_channel_ranges_exclude_retained_tokens_whose_codes_are_zero() -> None:
    x = torch.zeros(2, 1, 1, BLOCK_SIZE, D)
    x[:, 0, 0, :, 0] = 1.0
    x[:, 0, 0, :32, 1] = 1.0
    x[1, 0, 0, 20] = 0.0
    x[1, 0, 0, 20, 5] = 100.0  # orthogonal to its partner, hence retained
    stream = Stream("key", (0, 1), (Segment(D, "int4", "channel"),), merge="mean", retained=1)
    encoded = encode(x, torch.tensor([2]), stream)
    (segment,) = encoded.segments
    assert encoded.retained_index[0, 0].tolist() == [20]
    assert segment.scale is not None and segment.codes is not None and segment.minimum is not None
    assert segment.scale[0, 0, 5] == 0.0
    assert segment.minimum[0, 0, 0] == 1.0
    assert segment.codes[0, 0, :, 1].tolist() == [15] * 20 + [0] + [15] * 11 + [0] * 32


def test_token_ranges_include_retained_tokens() -> None:
    stream = Stream("key", (0, 1), (Segment(D, "int2"),), merge="mean", retained=1)
    (segment,) = encode_tokens([[[6.0, 0.0]], [[0.0, 12.0]]], stream).segments
    assert token(segment.codes, 0)[:3] == [2, 3, 0]  # 3 / 2 rounds to even


def test_segments_are_quantized_separately() -> None:
    row = [float(i) for i in range(16)] + [10.0 * i for i in range(16)] + [0.5] * 16
    stream = single_stream(Segment(16, "int4"), Segment(16, "int4"), Segment(16))
    encoded = encode_tokens([[row]], stream)
    first, second, third = encoded.segments
    assert [segment.start for segment in encoded.segments] == [0, 16, 32]
    assert token(first.scale, 0) == [1.0] and token(second.scale, 0) == [10.0]
    assert token(first.codes, 0) == token(second.codes, 0) == list(range(16))
    assert third.codes is None and token(third.values, 0) == [0.5] * 16
    assert restore(encoded)[0, 0, 0, 0].tolist() == row


def test_model_format_and_exact_vectors_are_kept_in_the_compute_type() -> None:
    x = torch.randn(2, 1, 1, BLOCK_SIZE, D, generator=torch.Generator().manual_seed(2))
    encoded = encode(x, torch.tensor([0]), slerp_stream(retained=2), model_dtype=torch.float16)
    assert encoded.exact.dtype == torch.float16
    assert encoded.segments[0].values is not None
    assert torch.equal(encoded.segments[0].values, encoded.latent.half())
    assert restore(encoded).dtype == torch.float32


@settings(max_examples=60, deadline=None)
@given(
    fmt=st.sampled_from(["int2", "int4", "int8"]),
    axis=st.sampled_from(["token", "channel"]),
    seed=st.integers(0, 2**32 - 1),
    magnitude=st.floats(-6, 3),
    offset=st.floats(-4, 4),
)
def test_error_is_at_most_half_a_step(fmt: str, axis: str, seed: int, magnitude: float, offset: float) -> None:
    """Rounding scale and minimum to float16 adds at most their own error, at the ends of the range."""
    x = torch.randn(1, 2, 1, BLOCK_SIZE, D, generator=torch.Generator().manual_seed(seed)) + offset
    x *= 10**magnitude
    encoded = encode(x, torch.arange(2), single_stream(Segment(D, fmt, axis)))
    (segment,) = encoded.segments
    assert segment.scale is not None and segment.minimum is not None
    shared = 2 if axis == "channel" else 3
    low, high = x[0].amin(dim=shared), x[0].amax(dim=shared)
    levels = 2**segment.segment.bits - 1
    scale, minimum = segment.scale.float(), segment.minimum.float()
    rounding = (minimum - low).abs() + levels * (scale - (high - low) / levels).abs()
    bound = scale / 2 * 1.001 + rounding + 1e-6 * torch.maximum(low.abs(), high.abs())
    assert ((restore(encoded)[0] - x[0]).abs() <= bound.unsqueeze(shared)).all()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), retained=st.integers(0, 32), norm=st.sampled_from(["head", "token"]))
def test_retained_are_the_largest_scores(seed: int, retained: int, norm: str) -> None:
    x = torch.randn(2, 2, 2, BLOCK_SIZE, D, generator=torch.Generator().manual_seed(seed))
    encoded = encode(x, torch.tensor([0, 1]), slerp_stream(retained=retained, norm=norm))
    for scores, kept in zip(encoded.score.flatten(0, 1), encoded.retained_index.flatten(0, 1), strict=True):
        ranked = sorted(range(BLOCK_SIZE), key=lambda i: (-scores[i].item(), i))
        assert kept.tolist() == sorted(ranked[:retained])


@pytest.mark.parametrize(
    ("shape", "index", "message"),
    [
        ((1, 1, 1, BLOCK_SIZE, D), [0], r"x: expected shape \[2, N, H, B, 16\]"),
        ((2, 1, 1, BLOCK_SIZE, 32), [0], r"x: expected shape \[2, N, H, B, 16\]"),
        ((2, 2, 1, BLOCK_SIZE, D), [0], r"block_index: expected shape \[2\]"),
    ],
)
def test_shapes_are_checked(shape: tuple[int, ...], index: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode(torch.zeros(shape), torch.tensor(index), slerp_stream())
