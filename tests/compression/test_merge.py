"""Merges against float64 arithmetic spelled out, vector by vector."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from minicache_trt.compression.constants import FIRST_SCORE
from minicache_trt.compression.merge import merge_group
from minicache_trt.compression.plan import CompressionPlan
from minicache_trt.compression.segment import Segment
from minicache_trt.compression.spherical import layer_weights
from minicache_trt.compression.stream import Stream
from minicache_trt.compression.stream_constants import NO_CONSTANTS, StreamConstants
from minicache_trt.config import ModelConfig
from tests.support.matrices import random_matrices

CONFIG = ModelConfig("llama", 4, 64, 64, 4, 2, 32, 100, 4096)


def slerp_stream(members: int, t: float = 0.6, **options: object) -> Stream:
    return Stream("value", tuple(range(members)), (Segment(32),), merge="slerp", t=t, retained=1, **options)  # type: ignore[arg-type]


def angle(a: np.ndarray, b: np.ndarray) -> float:
    return math.acos(max(-1.0, min(1.0, float(a @ b))))


def karcher(units: list[np.ndarray], t: float) -> np.ndarray:
    """Two steps of the spherical mean from the normalised weighted sum."""
    raw = [t**i * (1 - t) ** (len(units) - 1 - i) for i in range(len(units))]
    weights = [w / sum(raw) for w in raw]
    e = sum(w * u for w, u in zip(weights, units, strict=True))
    e = e / np.linalg.norm(e)
    for _ in range(2):
        v = np.zeros_like(e)
        for w, u in zip(weights, units, strict=True):
            theta = angle(u, e)
            factor = 1.0 if theta < 1e-4 else theta / math.sin(theta)
            v += w * factor * (u - math.cos(theta) * e)
        length = np.linalg.norm(v)
        e = e if length == 0 else math.cos(length) * e + math.sin(length) * v / length
        e = e / np.linalg.norm(e)
    return e


@pytest.mark.parametrize("members", [3, 4, 8])
@pytest.mark.parametrize("t", [0.0, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("spread", [0.0, 1e-6, 0.3, 2.0])
def test_spherical_mean(members: int, t: float, spread: float) -> None:
    torch.manual_seed(members)
    x = torch.randn(1, 2, 2, 64, 32) + spread * torch.randn(members, 2, 2, 64, 32)
    merged = merge_group(slerp_stream(members, t), x, NO_CONSTANTS)
    wide = x.double().numpy()
    units = wide / np.linalg.norm(wide, axis=-1, keepdims=True)
    for place in [(0, 0, 0), (1, 1, 63), (0, 1, 17)]:
        own = [unit[place] for unit in units]
        np.testing.assert_allclose(merged.latent[place], karcher(own, t), atol=2e-5)
        largest = max(angle(a, b) for a, b in itertools.combinations(own, 2))
        assert merged.score is not None and float(merged.score[place]) == pytest.approx(largest, abs=2e-3)
    assert merged.norms is not None
    np.testing.assert_allclose(merged.norms, np.moveaxis(np.linalg.norm(wide, axis=-1), 0, 1), rtol=1e-5)
    assert layer_weights(members, 0.3) == pytest.approx(
        np.array([0.3**i * 0.7 ** (members - 1 - i) for i in range(members)])
        / sum(0.3**i * 0.7 ** (members - 1 - i) for i in range(members))
    )


def test_residual_is_what_the_direction_lacks() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 2, 2, 64, 32)
    for norm in ("head", "token"):
        merged = merge_group(slerp_stream(3, residual="int2", norm=norm), x, NO_CONSTANTS)
        assert merged.residual is not None and merged.norms is not None
        restored = merged.norms[..., None] * (merged.latent[:, None] + merged.residual)
        torch.testing.assert_close(restored, x.transpose(0, 1))


@pytest.mark.parametrize("members", [2, 3])
@pytest.mark.parametrize("merge", ["slerp", "mean"])
def test_angles_without_meaning(members: int, merge: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(members, 1, 2, 64, 32)
    x[0, 0, 0, 3] = 0.0
    x[-1, 0, 0, 4] = 0.0
    x[-1, 0, 1, 5] = -2.0 * x[0, 0, 1, 5]
    stream = Stream("value", tuple(range(members)), (Segment(32),), merge=merge, retained=1)
    merged = merge_group(stream, x, NO_CONSTANTS)
    assert merged.score is not None
    places = [(0, 0, 3), (0, 0, 4), (0, 1, 5)]
    for place in places:
        assert merged.score[place] == FIRST_SCORE
        last = x[-1][place]
        expected = last / last.norm().clamp(min=1e-30) if merge == "slerp" else x[(slice(None), *place)].mean(0)
        torch.testing.assert_close(merged.latent[place], expected)
    assert int((merged.score == FIRST_SCORE).sum()) == len(places)
    assert merged.latent.isfinite().all()


def test_mean_of_many_layers() -> None:
    x = torch.randn(4, 2, 2, 64, 32)
    merged = merge_group(Stream("key", (0, 1, 2, 3), (Segment(32),), merge="mean"), x, NO_CONSTANTS)
    torch.testing.assert_close(merged.latent, x.mean(0))


@pytest.mark.parametrize("norm", ["head", "token"])
def test_linear_merge_and_its_error(norm: str) -> None:
    torch.manual_seed(0)
    segments = (Segment(32, "int4"), Segment(16, "drop"))
    stream = Stream("key", (0, 2), segments, merge="linear", retained=2, norm=norm)
    matrices = random_matrices(CompressionPlan("custom", (stream,)), CONFIG)
    constants = StreamConstants.of(matrices, 0)
    x = torch.randn(2, 3, 2, 64, 32)
    x[:, 0, :, 5] = 0.0
    merged = merge_group(stream, x, constants)
    encode, decode, mean = (
        matrices[f"streams.0.{name}"].astype(np.float64)  # type: ignore[union-attr]
        for name in ("encode", "decode", "mean")
    )
    wide = np.concatenate(list(x.double().numpy()), -1)
    y = np.einsum("nhbi,hir->nhbr", wide - mean[:, None], encode)
    np.testing.assert_allclose(merged.latent, y, atol=1e-4)
    y[..., 32:] = 0.0
    lost = wide - np.einsum("nhbr,hri->nhbi", y, decode) - mean[:, None]
    axes = (-1,) if norm == "head" else (1, -1)
    size = np.sqrt((wide**2).sum(axes))
    error = np.sqrt((lost**2).sum(axes)) / np.where(size > 0, size, 1)
    expected = np.where(size > 0, np.minimum(error, FIRST_SCORE), 0.0).reshape(3, -1, 64)
    assert merged.score is not None and expected[0, 0, 5] == 0.0
    np.testing.assert_allclose(merged.score, expected, atol=1e-5)
    tiny = merge_group(stream, 1e-6 * x, constants)
    assert tiny.score is not None and (tiny.score[1] == FIRST_SCORE).all()
