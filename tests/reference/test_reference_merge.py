"""Merges of the reference: groups of more than two layers, residuals and linear merges."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minicache_trt.compression.segment import Segment
from minicache_trt.compression.stream import Stream
from minicache_trt.config import BLOCK_SIZE
from minicache_trt.reference import Constants, EncodedBlocks, encode, restore
from minicache_trt.reference.merge import direction_weights, karcher_mean

D = 16


def group(merge: str, members: int, **options: Any) -> Stream:
    return Stream("value", tuple(range(members)), (Segment(D),), merge=merge, **options)


def encode_token(vectors: list[list[float]], stream: Stream, heads: int = 1) -> EncodedBlocks:
    """Position 0 of one block holds ``vectors[layer]``, the other positions the same vector in all layers."""
    x = torch.ones(len(vectors), 1, heads, BLOCK_SIZE, D)
    for layer, vector in enumerate(vectors):
        x[layer, 0, :, 0] = torch.tensor(vector + [0.0] * (D - len(vector)))
    return encode(x, torch.tensor([1]), stream)


def at(degrees: float, length: float = 1.0) -> list[float]:
    return [length * math.cos(math.radians(degrees)), length * math.sin(math.radians(degrees))]


def first(values: Tensor) -> list[float]:
    numbers: list[float] = values[0, 0, 0].tolist()
    return numbers


# ------------------------------------------------------------------------------------------------- spherical means


@pytest.mark.parametrize(
    ("members", "t", "expected"),
    [
        (2, 0.6, [0.4, 0.6]),
        (3, 0.5, [1 / 3] * 3),
        (3, 0.0, [1, 0, 0]),
        (4, 1.0, [0, 0, 0, 1]),
        (3, 0.6, [16 / 76, 24 / 76, 36 / 76]),
    ],
)
def test_weights_by_hand(members: int, t: float, expected: list[float]) -> None:
    assert direction_weights(members, t) == pytest.approx(expected)


def test_three_directions_in_a_plane_have_the_mean_of_their_angles() -> None:
    encoded = encode_token([at(0, 2.0), at(30, 3.0), at(90, 4.0)], group("slerp", 3, t=0.5))
    assert first(encoded.latent)[:2] == pytest.approx(at(40), abs=1e-6)
    assert encoded.score[0, 0, 0].item() == pytest.approx(math.pi / 2)
    assert encoded.norms is not None and encoded.norms[0, :, 0, 0].tolist() == [2.0, 3.0, 4.0]
    restored = restore(encoded)[:, 0, 0, 0, :2]
    assert restored.tolist() == [pytest.approx(at(40, length), abs=1e-5) for length in (2.0, 3.0, 4.0)]


@pytest.mark.parametrize(("t", "angle"), [(0.0, 0.0), (1.0, 90.0)])
def test_extreme_weights_take_one_direction(t: float, angle: float) -> None:
    encoded = encode_token([at(0), at(30), at(90)], group("slerp", 3, t=t))
    assert first(encoded.latent)[:2] == pytest.approx(at(angle), abs=1e-6)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), members=st.integers(3, 6), t=st.floats(0.2, 0.8), spread=st.floats(0.2, 1.5))
def test_karcher_steps_lower_the_weighted_squared_angles(seed: int, members: int, t: float, spread: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(1, D, generator=generator) + spread * torch.randn(members, D, generator=generator)
    directions = torch.nn.functional.normalize(directions.double(), dim=-1)
    weights = direction_weights(members, t)

    def cost(mean: Tensor) -> float:
        angles = (directions @ mean).clamp(-1, 1).arccos()
        return float((torch.tensor(weights, dtype=torch.float64) * angles**2).sum())

    start = torch.nn.functional.normalize(torch.tensor(weights).double() @ directions, dim=-1)
    mean = karcher_mean(directions, weights)
    assert float(mean.norm()) == pytest.approx(1.0)
    assert cost(mean) <= cost(start) + 1e-12
    # A minimum: no direction on the sphere leads lower by more than the steps left undone.
    for _ in range(5):
        aside = torch.nn.functional.normalize(mean + 0.1 * torch.randn(D, generator=generator).double(), dim=-1)
        assert cost(mean) < cost(aside)


def test_parallel_directions_keep_theirs() -> None:
    encoded = encode_token([[3.0, 4.0], [6.0, 8.0], [0.3, 0.4]], group("slerp", 3))
    assert first(encoded.latent)[:2] == pytest.approx([0.6, 0.8], abs=1e-6)
    assert encoded.score[0, 0, 0].item() == pytest.approx(0.0, abs=1e-3)


@pytest.mark.parametrize(
    "vectors",
    [
        [[0.0], at(10), at(20)],
        [at(0), at(179.99), at(20)],
        [at(20), at(0), at(179.99)],
        [at(0), at(20), [0.0]],
    ],
)
@pytest.mark.parametrize("merge", ["mean", "slerp"])
def test_any_zero_vector_or_opposed_pair_has_no_meaning(vectors: list[list[float]], merge: str) -> None:
    encoded = encode_token(vectors, group(merge, 3, retained=1))
    assert not encoded.meaningful[0, 0, 0] and encoded.meaningful[0, 0, 1:].all()
    assert encoded.score[0, 0, 0].item() == pytest.approx(math.pi)
    assert encoded.retained_index[0, 0].tolist() == [0]
    if merge == "slerp":
        length = math.hypot(*vectors[-1])
        expected = [v / length for v in vectors[-1]] if length else [0.0]
        assert first(encoded.latent)[: len(expected)] == pytest.approx(expected, abs=1e-6)


def test_mean_of_three() -> None:
    encoded = encode_token([[3.0, 0.0], [0.0, 6.0], [0.0, 0.0, 9.0]], group("mean", 3))
    assert first(encoded.latent)[:4] == [1.0, 2.0, 3.0, 0.0]
    assert encoded.score[0, 0, 0].item() == pytest.approx(math.pi / 2)


# ------------------------------------------------------------------------------------------------------- residuals


@pytest.mark.parametrize("norm", ["head", "token"])
@pytest.mark.parametrize("members", [2, 3])
def test_residuals_lead_back_to_each_layer(norm: str, members: int) -> None:
    x = torch.randn(members, 2, 3, BLOCK_SIZE, D, generator=torch.Generator().manual_seed(members))
    plain = restore(encode(x, torch.arange(2), group("slerp", members, norm=norm)))
    errors = [float((plain - x).norm() / x.norm())]
    for residual in ("int2", "int4", "int8"):
        encoded = encode(x, torch.arange(2), group("slerp", members, norm=norm, residual=residual))
        assert encoded.residual is not None and encoded.residual.codes is not None
        assert encoded.residual.codes.shape == (2, members, 3, BLOCK_SIZE, D)
        errors.append(float((restore(encoded) - x).norm() / x.norm()))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 5e-3 < 0.3 < errors[0]


def test_residual_by_hand() -> None:
    """Orthogonal unit vectors at t = 0.5: e = (s, s) with s = sqrt(1/2), residuals (1 - s, -s) and (-s, 1 - s)."""
    encoded = encode_token([[3.0, 0.0], [0.0, 4.0]], group("slerp", 2, t=0.5, residual="int8"))
    residual, s = encoded.residual, math.sqrt(0.5)
    assert residual is not None and residual.minimum is not None and residual.codes is not None
    assert residual.components[0, :, 0, 0, :2].tolist() == [
        pytest.approx([1 - s, -s], abs=1e-6),
        pytest.approx([-s, 1 - s], abs=1e-6),
    ]
    assert residual.minimum[0, :, 0, 0].tolist() == [pytest.approx(-s, abs=1e-3)] * 2
    assert residual.codes[0, 0, 0, 0, :3].tolist() == [255, 0, round(s * 255)]
    assert restore(encoded)[:, 0, 0, 0, :2].flatten().tolist() == pytest.approx([3, 0, 0, 4], abs=1e-2)


# --------------------------------------------------------------------------------------------------- linear merges


def test_linear_by_hand() -> None:
    """y keeps half the sum of both layers' components 0 and 1; the mean of layer 1 is (0, 2)."""
    stream = Stream("value", (0, 1), (Segment(16),), merge="linear", retained=1)
    encode_matrix = np.zeros((1, 2 * D, 16), np.float32)
    encode_matrix[0, [0, D], 0] = encode_matrix[0, [1, D + 1], 1] = 0.5
    decode_matrix = (encode_matrix.swapaxes(1, 2) * 2).copy()
    mean = np.zeros((1, 2 * D), np.float32)
    mean[0, D + 1] = 2.0
    constants = Constants.of(stream, {"encode": encode_matrix, "decode": decode_matrix, "mean": mean})
    x = torch.zeros(2, 1, 1, BLOCK_SIZE, D)
    x[:, 0, 0, 0, :2] = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    encoded = encode(x, torch.tensor([3]), stream, constants=constants)
    assert encoded.latent[0, 0, 0, :3].tolist() == [2.0, 2.0, 0.0]
    assert encoded.latent[0, 0, 1, :2].tolist() == [0.0, -1.0]
    # Reads ((2, 2), (2, 4)): errors (1, 0, 1, 0) of lengths (1, 2, 3, 4). Zero vectors have score 0.
    assert encoded.score[0, 0].tolist() == [pytest.approx(math.sqrt(2 / 30))] + [0.0] * 63
    assert encoded.retained_index[0, 0].tolist() == [0]
    restored = restore(encoded)
    assert restored[:, 0, 0, 0, :2].tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert restored[:, 0, 0, 1, :2].tolist() == [[0.0, -1.0], [0.0, 1.0]]


def identity(stream: Stream, heads: int) -> Constants:
    width = len(stream.layers) * D
    eye = np.tile(np.eye(width, dtype=np.float32), (heads, 1, 1))
    matrices = {"encode": eye[:, :, : stream.rank], "decode": eye[:, : stream.rank], "mean": eye[:, 0] * 0}
    return Constants.of(stream, matrices)


@pytest.mark.parametrize("norm", ["head", "token"])
def test_linear_score_is_the_error_of_what_is_not_stored(norm: str) -> None:
    """With identity matrices: layer 1 is beyond the rank's second half, which is dropped."""
    segments = (Segment(16, "int2"), Segment(16, "drop"))
    stream = Stream("value", (0, 1), segments, merge="linear", norm=norm)
    x = torch.randn(2, 1, 3, BLOCK_SIZE, D, generator=torch.Generator().manual_seed(3))
    encoded = encode(x, torch.tensor([0]), stream, constants=identity(stream, 3))
    for position in (0, 40):
        for head in range(3 if norm == "head" else 1):
            heads = slice(head, head + 1) if norm == "head" else slice(0, 3)
            own = x[:, 0, heads, position]
            expected = float(own[1].norm() / own.norm())
            assert encoded.score[0, head, position].item() == pytest.approx(expected, abs=1e-6)
    assert (restore(encoded)[1] == 0).all()


def test_linear_score_saturates() -> None:
    stream = Stream("value", (0,), (Segment(16),), merge="linear")
    constants = identity(stream, 1)
    assert constants.mean is not None and constants.decode is not None
    constants.decode.mul_(-9.0)
    x = torch.ones(1, 1, 1, BLOCK_SIZE, D)
    assert encode(x, torch.tensor([0]), stream, constants=constants).score[0, 0, 0].item() == 4.0


def test_missing_constants_are_named() -> None:
    stream = Stream("key", (0, 1), (Segment(16, "g2"),), merge="linear", basis="pre_rope", align=True)
    with pytest.raises(ValueError, match="expected align, encode, decode, mean, sigma, frequencies"):
        Constants.of(stream, {})
